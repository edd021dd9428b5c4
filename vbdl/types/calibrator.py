"""The base class of calibrators: corrections of predictions."""

from typing import Self

from torch import Tensor, nn

from vbdl.types.prediction import Prediction, Recalibration
from vbdl.types.values import State


def _few(t: Tensor) -> str:
    """The numbers of a tensor in words, or its shape if they are many."""
    return ", ".join(f"{v:.6g}" for v in t.flatten().tolist()) if t.numel() <= 4 else f"of shape {tuple(t.shape)}"


class Calibrator(nn.Module):
    """A correction of predictions, fitted on rows that training never saw. Subclass it to write a calibrator.

    acts_on names the stage of a prediction that the calibrator corrects:

    * "logits": each draw's class logits, before they are averaged. `fit` takes logits (samples, batch, classes),
      `forward` maps logits of any shape (..., classes).
    * "probs": the averaged class probabilities. `fit` and `forward` take (batch, classes), or (batch,) p(y = 1).
    * "prediction": the finished prediction, which `fit_prediction` takes; `fields`, `samples` and `recalibration`
      correct its fields, its draws and its distribution function.

    Everything but `fit` and `fit_prediction` is plain torch, traced and compiled with the network. Fitted numbers are
    buffers; constructor arguments are attributes of the same name, which saving reads.
    """

    acts_on: str = "prediction"
    of_classes: bool = False
    """For "prediction": True to correct predictions of classes, False for regressions."""
    needs_samples: bool = False
    """For "prediction": whether `fit_prediction` reads prediction.samples, or a density or quantile."""
    changes_samples: bool = False
    """For "prediction": whether `samples` changes the draws."""
    one_logit: bool = False
    """For "logits": whether it can also calibrate the logit of a binary target, which `fit` takes as (0, logit)."""

    def __init__(self) -> None:
        super().__init__()

    @property
    def recalibration(self) -> Recalibration | None:
        """The map of the distribution function of a regression, or None if it does not change."""
        return None

    @property
    def fitted_in_words(self) -> str:
        """The fitted numbers in words, for the model card: its buffers, unless overridden."""
        plain = {n.removeprefix("log_"): t.exp() if n.startswith("log_") else t for n, t in self.named_buffers()}
        return ", ".join(f"{name.replace('_', ' ')} {_few(t)}" for name, t in plain.items()) or "nothing fitted"

    def fit(self, outputs: Tensor, y: Tensor) -> Self:
        """Fit to float64 outputs of this stage and (batch,) int64 classes, and return self."""
        raise NotImplementedError(f'{type(self).__name__} acts on "{self.acts_on}" and needs a method fit(outputs, y)')

    def fit_prediction(self, prediction: Prediction, y: Tensor) -> Self:
        """Fit to a prediction of the calibration rows and their targets, and return self."""
        raise NotImplementedError(f"{type(self).__name__} needs a method fit_prediction(prediction, y)")

    def fields(self, fields: State) -> State:
        """The corrected fields of the prediction; may add `sets`, or `lower` and `upper`."""
        return fields

    def samples(self, samples: Tensor) -> Tensor:
        """The draws of the calibrated prediction; samples: (samples, batch, ...) parameters of p(y | x)."""
        return samples
