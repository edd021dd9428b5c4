"""What a lower precision costs: the predictions of a few rows against those of the same draws in float32."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vbdl.engine import Inputs, Predictor


@dataclass(frozen=True)
class PrecisionError:
    """Of the predictive means of an example's rows, in their unit (a probability, or the target's).

    largest: difference from float32, the same draws. standard_error: of sampling so few draws, the mean over rows and
    outputs; a difference far below it changes nothing that more draws would not change too.
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
    """Measure it; the float32 network runs once, uncompiled. Raises ValueError where the predictor is in float32."""
    dtype = predictor.settings.autocast
    if dtype is None:
        raise ValueError("this predictor runs in float32: there is nothing to compare, see autocast=")
    low = predictor(example)
    full = predictor.replace(autocast=None, compile=False)(example)
    return PrecisionError(
        dtype=dtype,
        largest=float((low.mean.double() - full.mean.double()).abs().max()),
        standard_error=float(full.standard_error.double().mean()),
    )
