"""IVON: mean-field variational inference by natural gradients, with the updates and the cost of Adam.

Shen, Daheim, Cong, Nickl, Marconi, Bazan, Yokota, Gurevych, Cremers, Khan and Moellenhoff, Variational Learning is
Effective for Large Deep Networks, ICML 2024, https://arxiv.org/abs/2402.17641
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vbdl.calling.checks import check_chosen
from vbdl.calling.copies import copied
from vbdl.nn.embedding import padding_rows
from vbdl.nn.gaussian.network import GaussianNetwork
from vbdl.nn.gaussian.row_hessian import RowHessian
from vbdl.nn.layers import has_bayesian_layers
from vbdl.nn.objective import KeyedPosterior, take_network
from vbdl.nn.sampled import choose
from vbdl.types import Output, State

_ADAM = 0.01  # the learning rate of Adam over that of IVON


class IVON(KeyedPosterior):
    """A mean-field posterior q(w) = prod_i N(mean_i, 1 / (n_data (hessian_i + weight_decay))), fitted by IVON.

        q = vbdl.IVON(network, n_data=len(train))
        vbdl.fit(q, train, likelihood, epochs=100, schedule="cosine")  # lr=0.1 unless given

    It maximizes the ELBO of the prior N(0, 1 / (n_data weight_decay)). Each step takes the gradient g at drawn weights
    w; g (w - mean) / std^2 estimates the Hessian of the mean loss of a row, whose running mean gives the std and scales
    the step of the mean, as Adam's squared gradients do. The learning rate should fall to 0 in the end
    (schedule="cosine"): the mean moves with the noise of the batches. The default of 0.1 is the paper's, for long
    trainings of large networks; few rows or epochs want 0.3 to 1, which a learned Gaussian noise may not bear.

    Parameters without a posterior (those of the likelihood, and all that `parameters` leaves out) are trained by Adam
    at a hundredth of the learning rate.

    module: any network, trained or not; it is copied, and its weights are the initial means. Frozen parameters stay.
    n_data: number of rows in the training set. A larger number gives a colder posterior.
    weight_decay: the prior precision of each weight divided by n_data.
    parameters: the parameters to sample, by name or module type; by default all trainable ones.
    hess_init: the Hessian of every weight before training. Its std is then 1 / sqrt(n_data (hess_init + weight_decay)).
    beta1: the momentum of the gradient.
    beta2: the momentum of the Hessian, which is averaged over about 1 / (1 - beta2) steps. A training of fewer steps
        leaves it near hess_init, so that the stds say what was set and not what was learned. A lower beta2 learns them
        in fewer steps, and is noisy below those of some 20 epochs.
    clip_radius: the largest step of a mean in units of the learning rate.
    rescale_lr: multiply the learning rate by hess_init + weight_decay, so that the first steps are those of plain
        gradient descent with momentum.
    n_samples: draws of the weights per training step, averaged.
    seed: of the draws in training; in an ensemble of these, member m uses seed + m.
    output: name or index of the module's output to predict from, or a function that returns it, if it returns several;
        "logits" are found without it.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
    >>> q, likelihood = vbdl.IVON(net, n_data=20), vbdl.Categorical()
    >>> history = vbdl.fit(q, (x, y), likelihood, epochs=8, schedule="cosine", compile=False)
    >>> vbdl.Predictor(q, likelihood, compile=False)(x).epistemic.shape
    torch.Size([20])
    """

    module: GaussianNetwork
    learning_rate = 0.1

    def __init__(
        self,
        module: nn.Module,
        n_data: int,
        weight_decay: float = 1e-4,
        parameters: Sequence[str | type[nn.Module]] | None = None,
        *,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        clip_radius: float | None = None,
        rescale_lr: bool = True,
        n_samples: int = 1,
        seed: int = 0,
        output: Output = None,
    ):
        super().__init__()
        module = take_network(self, module, output)
        check_chosen("parameters", parameters)
        if n_data < 1:
            raise ValueError(f"n_data must be the number of training rows, at least 1, got {n_data}")
        for name, value in (("weight_decay", weight_decay), ("hess_init", hess_init)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ValueError(
                    f"{name} is the weight of the past in a running mean, at least 0 and below 1, got {value}"
                )
        if clip_radius is not None and not clip_radius > 0:
            raise ValueError(f"clip_radius must be positive, or None for no limit, got {clip_radius}")
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}")
        if has_bayesian_layers(module):
            raise ValueError(
                "the network has Bayesian layers, which draw their weights by stds of their own: give IVON the network "
                "with plain layers, or train it with vbdl.MeanField"
            )
        network = copied(module)
        chosen = tuple(choose(network, None if parameters is None else tuple(parameters), 1.0))
        of_network, padding = dict(network.named_parameters()), padding_rows(network)
        kinds: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}  # a factor has one dtype and device
        for name in chosen:
            kinds.setdefault((of_network[name].dtype, of_network[name].device), {})[name] = of_network[name]
        factors = [RowHessian(group, n_data, weight_decay, hess_init, padding) for group in kinds.values()]
        self.module = GaussianNetwork(network, factors)
        self.n_data, self.weight_decay = n_data, weight_decay
        self.hess_init, self.beta1, self.beta2 = hess_init, beta1, beta2
        self.clip_radius, self.rescale_lr = clip_radius, rescale_lr
        self.n_samples, self.seed = n_samples, seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=self.module.key.device))

    def config(self) -> dict[str, Any]:
        """The arguments that make it again, given its network."""
        arguments: dict[str, Any] = {
            "n_data": self.n_data,
            "weight_decay": self.weight_decay,
            "parameters": list(self.module.chosen),
            "hess_init": self.hess_init,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "clip_radius": self.clip_radius,
            "rescale_lr": self.rescale_lr,
            "n_samples": self.n_samples,
            "seed": self.seed,
        }
        return arguments if self.output is None else arguments | {"output": self.output}

    def own_optimizer(self, entries: State, others: Sequence[nn.Parameter], lr: float) -> Optimizer:
        pairs: list[tuple[Tensor, Tensor]] = []
        for number, factor in enumerate(self.module.factors):
            for index, name in enumerate(factor.names):
                if (mean := entries.get(f"inner.{name}")) is not None:
                    pairs.append((mean, entries[f"factors.{number}.hessian_{index}"]))
        paired = {id(t) for pair in pairs for t in pair}
        others = [*others, *(t for t in entries.values() if id(t) not in paired)]  # type: ignore[list-item]
        scale = self.hess_init + self.weight_decay if self.rescale_lr else 1.0
        return NaturalGradient(
            pairs,
            others,
            lr,
            n_data=self.n_data,
            weight_decay=self.weight_decay,
            betas=(self.beta1, self.beta2),
            scale=scale,
            clip_radius=self.clip_radius,
        )


class NaturalGradient(Optimizer):
    """The update rule of IVON (algorithm 1 of the paper) for means and Hessians, and Adam for other parameters.

    pairs: (mean, Hessian) of each parameter that is drawn. The gradient in a Hessian is that in the drawn weights by
        the chain rule, so that it holds g (w - mean), averaged over the draws.
    others: parameters that are not drawn.
    scale: factor of the learning rate of the means.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        others: Sequence[Tensor],
        lr: float,
        *,
        n_data: int,
        weight_decay: float,
        betas: tuple[float, float],
        scale: float = 1.0,
        clip_radius: float | None = None,
    ):
        if not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be a learning rate of at least 0, got {lr}")
        means, hessians = zip(*pairs, strict=True)
        groups: list[dict[str, Any]] = [{"params": list(means)}, {"params": list(hessians)}]
        if others:
            groups.append({"params": list(others), "lr": _ADAM * lr})
        super().__init__(groups, {"lr": lr, "done": 0})
        self._n_data, self._weight_decay, self._betas = n_data, weight_decay, betas
        self._scale, self._clip_radius = scale, clip_radius

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        means, hessians, *others = self.param_groups
        for group in self.param_groups:
            group["done"] += 1
        rate = means["lr"] * self._scale
        for mean, hessian in zip(means["params"], hessians["params"], strict=True):
            self._update(mean, hessian, rate, means["done"])
        for group in others:
            for p in group["params"]:
                if p.grad is not None:
                    self._adam(p, group["lr"], group["done"])

    def _update(self, mean: Tensor, hessian: Tensor, rate: float, step: int) -> None:
        """Update one parameter's momentum, Hessian and mean; a parameter that has no gradient returns to the prior."""
        beta1, beta2 = self._betas
        state = self.state[hessian]  # and not of the mean, to whose dtype, which may be narrower, torch would load it
        if not state:
            state["momentum"] = torch.zeros_like(hessian)
        momentum: Tensor = state["momentum"]
        precision = hessian + self._weight_decay
        # with std = (n precision)^(-1/2), the gradient in the Hessian is -1/2 g (w - mean) / precision
        if hessian.grad is None:
            estimate = torch.zeros_like(hessian)
        else:
            estimate = hessian.grad * precision.square().mul_(-2 * self._n_data)
        change = estimate.sub_(hessian).mul_(1 - beta2)
        # the quadratic term keeps the precision positive
        hessian.add_(change).add_(change.square_().div_(precision).mul_(0.5))
        momentum.mul_(beta1)
        if mean.grad is not None:
            momentum.add_(mean.grad, alpha=1 - beta1)
        moved = (momentum / (1 - beta1**step)).add_(mean, alpha=self._weight_decay)
        moved.div_(hessian + self._weight_decay)
        if self._clip_radius is not None:
            moved.clamp_(-self._clip_radius, self._clip_radius)
        mean.sub_(moved, alpha=rate)

    def _adam(self, p: Tensor, rate: float, step: int) -> None:
        """Update a parameter that is not drawn by Adam with torch's default numbers."""
        beta1, beta2, epsilon = 0.9, 0.999, 1e-8
        state, gradient = self.state[p], p.grad
        assert gradient is not None
        if p.is_complex():
            p, gradient = torch.view_as_real(p), torch.view_as_real(gradient)
        if not state:
            state["momentum"], state["squares"] = torch.zeros_like(p), torch.zeros_like(p)
        state["momentum"].lerp_(gradient, 1 - beta1)
        state["squares"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        length = (state["squares"] / (1 - beta2**step)).sqrt_().add_(epsilon)
        p.addcdiv_(state["momentum"], length, value=-rate / (1 - beta1**step))
