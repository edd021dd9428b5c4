"""Referral of rows that are far from the training rows in the space of a network's features."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vbdl.calibration.overlap import row_numbers, trained_on
from vbdl.calling.inputs import flatten
from vbdl.data.fingerprint import fingerprints
from vbdl.data.rows import take
from vbdl.decision.cost import REFER, refer_or_answer
from vbdl.decision.distribution import Evidence
from vbdl.engine.predictor import Predictor
from vbdl.metrics._checks import check_rate
from vbdl.model import first_network
from vbdl.ood.features import features, last_layer_of
from vbdl.ood.knn import KNN
from vbdl.ood.threshold import threshold_at_fpr
from vbdl.types import Decision, Inputs, Prediction

_BATCH = 256  # rows whose features are computed at once


class OutOfDistribution(Decision):
    """A decision that refers rows whose features are farther from the training rows than a threshold, or NaN.

    It needs no posterior with several draws. Features are those of the network with its trained weights, of an ensemble
    those of its first member, of members that share their weights (BatchEnsemble, Masksembles) those of the shared
    weights. They are computed in the compiled prediction, once for all draws, by one more pass of the network up to
    that layer. Predictions have the field `distance`. Combine it with a `Referral` by `AnyOf`. A package for ONNX
    Runtime needs Mahalanobis, because ONNX has no operation for the distances of KNN.

    detector: vbdl.ood.KNN, vbdl.ood.Mahalanobis, or a registered module of yours with `fit(features)`, whose
        forward
        maps features (batch, features) to distances (batch,). Its fitted tensors are saved with the predictor.
    layer: the name of the layer whose inputs are the features, by default the last linear layer or convolution.
    threshold: chosen by `fit`. share: the largest share of familiar rows that `fit` let it refer.

    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(500, 4)
    >>> predict = vbdl.Predictor(vbdl.Deterministic(net), vbdl.Categorical(), compile=False)
    >>> guard = vbdl.decision.OutOfDistribution(vbdl.ood.KNN(normalize=False)).fit(predict, x[:300], x[300:], share=0.1)
    >>> vbdl.with_decision(predict, guard)(torch.full((1, 4), 50.0)).action  # far from all of them: refer
    tensor([-1])
    """

    threshold: Tensor

    def __init__(
        self,
        detector: nn.Module | None = None,
        layer: str | None = None,
        threshold: float = math.inf,
        share: float | None = None,
    ):
        super().__init__()
        self.detector = KNN() if detector is None else detector
        self.layer, self.share = layer, share
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float64))

    def extra_repr(self) -> str:
        return f"layer={self.layer!r}, threshold={float(self.threshold):.6g}, share={self.share}"

    @property
    def reads_layer(self) -> str | None:  # type: ignore[override]
        if self.layer is None:
            raise RuntimeError("OutOfDistribution has not been fitted: call fit(predictor, train, familiar) first")
        return self.layer

    def fit(
        self,
        predictor: Predictor,
        train: Inputs,
        familiar: Inputs,
        share: float = 0.05,
        *,
        y: Tensor | None = None,
        most_rows: int = 5000,
    ) -> "OutOfDistribution":
        """Fit the detector to training rows and set the threshold by familiar rows; return self.

        With probability 0.95 over the familiar rows, at most the share `share` of new rows like them is referred.

        train: the inputs that the network was trained on; at most `most_rows` of them, evenly spaced, are kept in the
            detector, which compares every new row with them.
        familiar: inputs of the same kind that training has not seen. Raises ValueError for training rows among them,
            which lie too close to themselves, and for too few rows.
        y: (rows,) classes of `train`, which Mahalanobis takes.
        """
        check_rate(share, "share")
        familiar_rows = flatten(familiar).nested
        seen = trained_on(predictor, fingerprints(familiar_rows))
        if bool(seen.any()):
            raise ValueError(
                f"{int(seen.sum())} of {len(seen)} familiar rows were trained on ({row_numbers(seen)}), so their "
                f"distances are too small: drop them by familiar[vbdl.unseen(predictor, familiar)]"
            )
        network = first_network(predictor.posterior)
        self.layer = last_layer_of(network) if self.layer is None else self.layer
        n = flatten(train).rows
        kept = torch.arange(n) if n <= most_rows else torch.linspace(0, n - 1, most_rows).round().long()
        near = self._features(network, predictor, take(flatten(train).nested, kept))
        fit: Callable[..., object] = getattr(self.detector, "fit")  # noqa: B009
        classes = () if y is None else (torch.as_tensor(y).cpu()[kept].to(near.device),)
        fit(near, *classes)
        distances = self.detector(self._features(network, predictor, familiar_rows)).float()
        threshold = threshold_at_fpr(distances.double(), share)
        if math.isinf(threshold.value):
            needed = math.ceil(math.log(0.05) / math.log1p(-share))
            raise ValueError(
                f"{len(distances)} familiar rows are too few for share={share:g}: give at least {needed}, or a larger "
                f"share"
            )
        self.share, self.threshold = share, torch.tensor(threshold.value, dtype=torch.float64)
        return self

    def _features(self, network: nn.Module, predictor: Predictor, x: Inputs) -> Tensor:
        flat = predictor.check(x)
        batches = [take(flat.nested, rows) for rows in torch.arange(flat.rows, device=predictor.device).split(_BATCH)]
        return features(network, self.layer, batches)

    def distances(self, predictor: Predictor, x: Inputs) -> Tensor:
        """The distance of each row from the training rows, (rows,) float64."""
        return self.distance(self._features(first_network(predictor.posterior), predictor, x))

    def refers(self, predictor: Predictor, x: Inputs) -> Tensor:
        """Whether each row is farther than the threshold, (rows,) bool: choose other thresholds on the rest."""
        return self._refer(self.distances(predictor, x).float())

    def distance(self, features: Tensor) -> Tensor:
        return self.detector(features)

    def _refer(self, distance: Tensor) -> Tensor:
        return ~(distance.to(torch.float64) <= self.threshold.to(distance.device))  # so that NaN is referred

    def forward(self, prediction: Prediction | Evidence) -> Tensor:
        """The most probable class of each row, of a regression 0, or REFER (-1): (batch,) int64."""
        if prediction.distance is None:
            raise ValueError(
                "this prediction has no distance: attach the decision by vbdl.with_decision(predictor, it)"
            )
        refer = self._refer(prediction.distance)
        label = getattr(prediction, "label", None)  # the evidence of a regression has none
        return torch.where(refer, REFER, 0 if label is None else label.to(torch.int64))

    @property
    def fitted_in_words(self) -> str:
        allowed = "" if self.share is None else f", referring at most {self.share:.1%} of familiar rows"
        name = f"{type(self.detector).__name__} distance of the inputs of layer {self.layer!r}"
        return f"{name}: refer above {float(self.threshold):.6g}{allowed}"

    @property
    def reasons(self) -> tuple[str, ...]:  # type: ignore[override]
        return (f"farther from the training rows than {float(self.threshold):.6g}",)

    def words(self, action: Tensor) -> list[str]:
        return refer_or_answer(action)
