"""The error of a lower precision: predictions with autocast against those of the same draws in float32."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vbdl.engine.predictor import Predictor
    from vbdl.types import Inputs


@dataclass(frozen=True)
class PrecisionError:
    """The error that a lower precision makes in the predictive means of an example, in the means' unit.

    largest: the largest absolute difference from float32 with the same draws. standard_error: the standard error of
    the means from sampling, averaged over rows and outputs; a precision error far below it does not matter.
    """

    dtype: torch.dtype
    largest: float
    standard_error: float

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"precision      {name}: means differ from float32 by at most {self.largest:.2g} on the example "
            f"(sampling's own standard error {self.standard_error:.2g})"
        )


def against_float32(predictor: "Predictor", example: "Inputs") -> PrecisionError:
    """Compare a predictor with autocast to the same draws in float32, run once and uncompiled.

    Raises ValueError if the predictor has no autocast.
    """
    dtype = predictor.settings.autocast
    if dtype is None:
        raise ValueError("this predictor already runs in float32: pass one that was made with autocast=torch.bfloat16")
    low = predictor(example)
    full = predictor.replace(autocast=None, compile=False)(example)
    assert full.standard_error is not None  # of draws
    return PrecisionError(
        dtype=dtype,
        largest=float((low.mean.double() - full.mean.double()).abs().max()),
        standard_error=float(full.standard_error.double().mean()),
    )
