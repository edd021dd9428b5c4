"""The base class of decisions: maps from predictions to actions."""

from collections.abc import Sequence

from torch import Tensor, nn


class Decision(nn.Module):
    """A map from predictions to actions in plain torch, compiled with the predictor. Subclass it to write a decision.

    forward(prediction) returns (batch,) actions, or {"action": ..., and any of "risk", "reason", "var", "es"}. The
    prediction holds probs and label, or mean, and total, aleatoric and epistemic.
    """

    reads_distribution: bool = False
    """Whether it reads prediction.distribution, the calibrated predictive distribution of a regression; all draws are
    then kept."""
    reads_draws: bool = False
    """Whether it reads prediction.per_draw, the mean over the draws of the result of `per_draw`. If a calibrator
    changed the draws, the prediction has `distribution` instead."""

    reads_epistemic: bool = False
    """Whether it compares prediction.epistemic, which a single network does not know; such a predictor is refused."""

    reads_layer: str | None = None
    """The name of the network's layer whose inputs `distance` takes; the prediction then has `distance`."""

    reasons: Sequence[str] = ()
    """Why rows are referred, in words: `prediction.reason` k is the k-th of them, counted from 1."""

    def __init__(self) -> None:
        super().__init__()

    def distance(self, features: Tensor) -> Tensor:
        """The distance of each row from the training rows, (batch,), for decisions with `reads_layer`.

        features: (batch, features), the inputs of that layer in the first network of the posterior.
        """
        raise NotImplementedError(f"{type(self).__name__} reads a layer and needs a method distance(features)")

    def per_draw(self, parameters: Tensor) -> Tensor:
        """One number per draw and row, (samples, batch), for decisions that read draws.

        parameters: (samples, batch, ...) of p(y | x).
        """
        raise NotImplementedError(f"{type(self).__name__} reads draws and needs a method per_draw(parameters)")

    @property
    def caution(self) -> str | None:
        """The warning to give when this decision is put on a predictor, or None."""
        return None

    @property
    def fitted_in_words(self) -> str:
        """The fitted or chosen numbers in words, for the model card; "" if there are none."""
        return ""

    def words(self, action: Tensor) -> list[str] | None:
        """Each row's action in words, as a service answers it, or None for a decision without words."""
        return None
