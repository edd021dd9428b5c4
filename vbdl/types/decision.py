"""The base class of decisions: maps from predictions to actions."""

from torch import Tensor, nn


class Decision(nn.Module):
    """A map from predictions to actions in plain torch, compiled with the predictor. Subclass it to write a decision.

    forward(prediction) returns (batch,) actions, or {"action": ..., and any of "risk", "var", "es"}. The prediction
    holds probs and label, or mean, and total, aleatoric and epistemic.
    """

    reads_distribution: bool = False
    """Whether it reads prediction.distribution, the calibrated predictive distribution of a regression; all draws are
    then kept."""
    reads_draws: bool = False
    """Whether it reads prediction.per_draw, the mean over the draws of the result of `per_draw`. If a calibrator
    changed the draws, the prediction has `distribution` instead."""

    reads_epistemic: bool = False
    """Whether it compares prediction.epistemic, which a single network does not know; such a predictor is refused."""

    def __init__(self) -> None:
        super().__init__()

    def per_draw(self, parameters: Tensor) -> Tensor:
        """One number per draw and row, (samples, batch), for decisions that read draws.

        parameters: (samples, batch, ...) of p(y | x).
        """
        raise NotImplementedError(f"{type(self).__name__} reads draws and needs a method per_draw(parameters)")

    @property
    def caution(self) -> str | None:
        """The warning to give when this decision is put on a predictor, or None."""
        return None
