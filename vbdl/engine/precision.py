"""Measures what a lower precision costs: predictions of a few rows against those of the same draws in float32."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vbdl.engine.predictor import Predictor
    from vbdl.types import Inputs


@dataclass(frozen=True)
class PrecisionError:
    """The error of a lower precision in the predictive means of an example, as a probability or in the target's unit.

    largest: the largest difference from float32 with the same draws. standard_error: the standard error of the means
    from sampling so few draws, averaged over rows and outputs; an error far below it is lost in that of sampling.
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
    """Compare a predictor with autocast against the same draws in float32, which run once and uncompiled.

    Raises ValueError for a predictor that runs in float32.
    """
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
