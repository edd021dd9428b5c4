"""The distance to the k-th nearest training row in feature space.

Sun, Ming, Zhu, Li, Out-of-Distribution Detection with Deep Nearest Neighbors, 2022, https://arxiv.org/abs/2204.06507
"""

import torch
from torch import Tensor, nn

from vbdl import former
from vbdl.metrics._checks import check_finite
from vbdl.ood.features import check_features

_PAIRS = 4_000_000  # distances held in memory at a time, 32 MB


class KNN(nn.Module):
    """An out-of-distribution score: the Euclidean distance to the k-th nearest of the fitted rows.

    normalize: scale features to length one first, as in the paper.

    >>> _ = torch.manual_seed(0)
    >>> knn = vbdl.ood.KNN(k=5, normalize=False).fit(torch.randn(100, 8))
    >>> near, far = knn(torch.stack([torch.zeros(8), torch.full((8,), 10.0)]))
    >>> bool(far > near)
    True
    """

    rows: Tensor | None

    @former.arguments(normalise="normalize")
    def __init__(self, k: int = 10, normalize: bool = True):
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        self.k, self.normalize = k, normalize
        self.register_buffer("rows", None)  # (n, features)

    def _features(self, features: Tensor) -> Tensor:
        f = features.to(torch.float64)
        if not self.normalize:
            return f
        length = torch.linalg.vector_norm(f, dim=1, keepdim=True)
        return f / torch.where(length > 0, length, 1.0)

    def fit(self, features: Tensor) -> "KNN":
        """Store the features of training rows, (n, features) with n >= k; return self."""
        features = check_finite(features, "features")
        if features.ndim != 2 or features.shape[0] < self.k:
            raise ValueError(
                f"features must be (rows, features) with at least k = {self.k} rows, not {tuple(features.shape)}"
            )
        self.rows = self._features(features)
        return self

    def forward(self, features: Tensor) -> Tensor:
        """The distances of rows: (batch, features) -> (batch,) float64."""
        if self.rows is None:
            raise RuntimeError("KNN has not been fitted: call fit first")
        queries = self._features(check_features(features, self.rows.shape[1]))
        if queries.shape[0] == 0:
            return queries.new_zeros(0)
        block = max(1, _PAIRS // self.rows.shape[0])
        # without cdist's matmul shortcut, which is wrong by 1e-4 for coinciding rows
        parts = [
            torch.cdist(chunk, self.rows, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(self.k).values
            for chunk in queries.split(block)
        ]
        return torch.cat(parts)
