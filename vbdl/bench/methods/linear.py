"""Linear models, the baseline that a network should beat."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vbdl.bench.registry import method
from vbdl.bench.task import Run, Stacked, Task

_RIDGE = 1e-6


@method("linear")
def linear(task: Task, run: Run) -> Stacked:
    """Bayesian linear regression in closed form, or logistic regression"""
    return _Linear(task) if task.regression else _Logistic(task)


class _Linear(Stacked):
    """Bayesian linear regression N(x w, noise (1 + x A^-1 x)) in float64.

    w is the ridge least-squares solution, A the regularized Gram matrix, noise the variance of the residuals.
    """

    def __init__(self, task: Task):
        x, y = _with_one(task.x[:, : task.n_train]), task.y[:, : task.n_train, 0].double()
        a = x.transpose(1, 2) @ x + _RIDGE * torch.eye(x.shape[2], dtype=torch.float64)
        self.inverse = torch.linalg.inv(a)
        self.weights = torch.einsum("kij,knj,kn->ki", self.inverse, x, y)
        residual = y - torch.einsum("kni,ki->kn", x, self.weights)
        self.noise = residual.square().sum(1) / (x.shape[1] - x.shape[2])

    def parameters(self, x: Tensor) -> Iterator[Tensor]:
        x = _with_one(x)
        mean = torch.einsum("kni,ki->kn", x, self.weights)
        variance = self.noise[:, None] * (1 + torch.einsum("kni,kij,knj->kn", x, self.inverse, x))
        yield torch.stack((mean, variance.log()), dim=-1)[None, :, :, None]


class _Logistic(Stacked):
    """Softmax regression with a ridge of 1, fitted by L-BFGS; images are flattened to their pixels."""

    def __init__(self, task: Task):
        x, y = _with_one(task.x[:, : task.n_train].flatten(2)), task.y[:, : task.n_train]
        w = torch.zeros(task.n_splits, x.shape[2], len(task.classes), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

        def closure():
            optimizer.zero_grad()
            logits = x @ w
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
            loss = (nll + 0.5 * w.square().sum()) / y.numel()
            loss.backward()
            return loss

        optimizer.step(closure)
        self.weights = w.detach()
        if not math.isfinite(float(self.weights.sum())):
            raise FloatingPointError(f"{task.name}: the logistic regression did not converge")

    def parameters(self, x: Tensor) -> Iterator[Tensor]:
        yield (_with_one(x.flatten(2)) @ self.weights)[None]


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1).double()
