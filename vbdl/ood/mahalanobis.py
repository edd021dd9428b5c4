"""The Mahalanobis distance of features to the nearest class.

Lee, Lee, Lee, Shin, A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks, 2018,
https://arxiv.org/abs/1807.03888
Ren, Fort, Liu, Roy, Padhy, Lakshminarayanan, A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection,
2021, https://arxiv.org/abs/2106.09022 (relative)
"""

import torch
from torch import Tensor, nn

from vbdl.metrics._checks import check_finite, check_labels
from vbdl.ood.features import check_features


class Mahalanobis(nn.Module):
    """An out-of-distribution score: min over classes k of (f - mean_k)ᵀ Σ⁻¹ (f - mean_k), with one Σ for all classes.

    relative: subtract the distance to the mean of all rows under their covariance (Ren et al.).
    shrinkage: share of the covariance that is replaced by its mean variance times the identity; without it the
        covariance of constant features, or of more features than rows, has no inverse.

    >>> _ = torch.manual_seed(0)
    >>> distance = vbdl.ood.Mahalanobis().fit(torch.randn(100, 8), torch.randint(2, (100,)))
    >>> near, far = distance(torch.stack([torch.zeros(8), torch.full((8,), 10.0)]))
    >>> bool(far > near)
    True
    """

    means: Tensor | None

    def __init__(self, relative: bool = False, shrinkage: float = 1e-3):
        super().__init__()
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must lie in [0, 1], not {shrinkage}")
        self.relative, self.shrinkage = relative, shrinkage
        self.register_buffer("means", None)  # (classes, features)
        self.register_buffer("whiten", None)  # (features, features) L⁻¹ of Σ = L Lᵀ
        self.register_buffer("mean", None)  # (1, features)
        self.register_buffer("whiten_all", None)

    def fit(self, features: Tensor, y: Tensor | None = None) -> "Mahalanobis":
        """Estimate means and covariances from training rows; return self.

        features: (batch, features). y: (batch,) classes, each with at least one row; without y (regression) all rows
        are one class.
        """
        features = check_finite(features, "features")
        if features.ndim != 2 or features.shape[0] < 2:
            raise ValueError(f"features must be (batch, features) with at least two rows, not {tuple(features.shape)}")
        if y is None:
            y = torch.zeros(features.shape[0], dtype=torch.int64, device=features.device)
        n_classes = int(y.max()) + 1
        y = check_labels(y, features.shape[0], n_classes).to(features.device)
        counts = torch.bincount(y, minlength=n_classes)
        if bool((counts == 0).any()):
            raise ValueError(
                f"class {int((counts == 0).nonzero()[0])} has no rows; number the classes 0, 1, ... without gaps"
            )
        sums = torch.zeros(n_classes, features.shape[1], dtype=torch.float64, device=features.device)
        self.means = sums.index_add(0, y, features) / counts[:, None]
        self.whiten = self._whiten(features - self.means[y])
        self.mean = features.mean(dim=0, keepdim=True)
        self.whiten_all = self._whiten(features - self.mean)
        return self

    def _whiten(self, residual: Tensor) -> Tensor:
        n, d = residual.shape
        covariance = residual.T @ residual / n
        eye = torch.eye(d, dtype=residual.dtype, device=residual.device)
        level = covariance.diagonal().mean()
        if level == 0:
            raise ValueError("all features are constant, so distances are undefined; choose another layer")
        covariance = (1 - self.shrinkage) * covariance + self.shrinkage * level * eye
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            raise ValueError("the covariance of the features has no inverse: use shrinkage above 0")
        return torch.linalg.solve_triangular(factor, eye, upper=False)

    def forward(self, features: Tensor) -> Tensor:
        """The squared distances of rows: (batch, features) -> (batch,) float64."""
        if self.means is None:
            raise RuntimeError("Mahalanobis has not been fitted: call fit first")
        f = check_features(features, self.means.shape[1])
        distance = _squared_distances(f @ self.whiten.T, self.means @ self.whiten.T).amin(dim=1)
        if self.relative:
            distance = distance - ((f - self.mean) @ self.whiten_all.T).square().sum(dim=1)
        return distance


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    # from differences, because |a|² + |b|² - 2ab loses all digits for features far from zero
    return torch.stack([(a - row).square().sum(dim=1) for row in b], dim=1)
