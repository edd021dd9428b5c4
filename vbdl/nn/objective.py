"""The training objective as a module, so that it can be stacked, mapped and compiled like a network."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from vbdl_kernels import make_key

from vbdl.calling.checks import check_network, parameter_hooks, unwrapped
from vbdl.calling.inputs import map_inputs
from vbdl.calling.outputs import check_output, named_part, pick
from vbdl.calling.stacking import call, call_with_buffer
from vbdl.calling.traversing import state_of
from vbdl.model import autocast
from vbdl.nn.drawn import draws_together
from vbdl.nn.interception import CounterDropout
from vbdl.nn.keyed import KeyedNetwork
from vbdl.nn.masks import Masks
from vbdl.nn.may_drop import is_plain
from vbdl.types import Inputs, Likelihood, Output, Posterior, State

_TRAINING = 1 << 62  # flips a bit of the seed, so that training and prediction never share draws


def training_keys(seed: int, n_members: int, number: Tensor) -> Tensor:
    """The keys of a training step, (members, 2); member m draws from seed + m. number: () first draw of the step."""
    if not -(2**63) <= seed <= seed + n_members - 1 < 2**63:
        raise ValueError(f"seed + member must fit in 64 bits, got {seed} for {n_members} members")
    seeds = (torch.arange(n_members, device=number.device) + seed) ^ _TRAINING
    return torch.stack([seeds, number.expand(n_members)], dim=-1)


class StepOptions:
    """How the networks of a training step run; `used` tells whether an objective ran under these options.

    dtype: what a network computes in by autocast, its parameters' if None; its likelihood stays in float32.
    auxiliary: the weights in the loss of further outputs, by name or index; the chosen output has weight 1.
    """

    def __init__(self, dtype: torch.dtype | None = None, auxiliary: Mapping[str | int, float] = MappingProxyType({})):
        self.dtype, self.auxiliary, self.used = dtype, auxiliary, False


_options: contextvars.ContextVar[StepOptions | None] = contextvars.ContextVar("step_options", default=None)


@contextlib.contextmanager
def under_options(options: StepOptions) -> Iterator[None]:
    """A context in which every `Objective` runs its network under these options."""
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


class Objective(nn.Module):
    """The mean over the batch of -log p(y | x, w), plus the network's regularization (the KL) if it has one.

    Dropout masks, one per row, and sampled weights are drawn from `key`, (2,) int64: a step is a pure function of its
    key, the same eager or compiled, alone or stacked with other members.

    n_samples: draws of the network per step, averaged. output: the network's output to predict from.
    """

    key: Tensor

    def __init__(self, network: nn.Module, likelihood: Likelihood, n_samples: int = 1, output: Output = None):
        super().__init__()
        self.network, self.n_samples, self.output = network, n_samples, output
        self.likelihood = likelihood
        self.register_buffer("key", torch.zeros(2, dtype=torch.int64))
        self._draws = not _draws_nothing(network)

    def forward(self, inputs: Inputs, y: Tensor) -> Tensor:
        """The loss, (), in nats per row."""
        key = self.key if self._draws else None
        return mean_loss(self.network, self.likelihood, key, (inputs, y), self.n_samples, self.output)


def mean_loss(
    network: nn.Module,
    likelihood: Likelihood,
    key: Tensor | None,
    batch: tuple[Inputs, Tensor],
    n_samples: int,
    output: Output,
) -> Tensor:
    """What `Objective` computes, (), in nats per row, without a module, which takes longer to make than a small network
    to run. key: None for a network that draws nothing.
    """
    if key is None:
        return _at(network, likelihood, None, *batch, output)
    with draws_together():
        terms = [_at(network, likelihood, _later(key, k), *batch, output) for k in range(n_samples)]
    return terms[0] if len(terms) == 1 else torch.stack(terms).mean()


def _at(
    network: nn.Module, likelihood: Likelihood, key: Tensor | None, inputs: Inputs, y: Tensor, output: Output
) -> Tensor:
    options = _options.get()
    if options is not None:
        options.used = True
    dtype = None if options is None else options.dtype
    if key is None or not isinstance(network, KeyedNetwork):
        masked = contextlib.nullcontext() if key is None else CounterDropout(Masks(key, network, per_row=True))
        with masked as dropout, autocast(dtype, inputs):
            outputs = call(network, {}, inputs)
            outputs = outputs if dropout is None else dropout.returned(outputs)
        return _loss(likelihood, outputs, y, output, options)
    # `inner`, because `rate` is by the user's module names
    with CounterDropout(Masks(key, network.inner, network.rate, per_row=True)) as dropout, autocast(dtype, inputs):
        outputs = dropout.returned(call_with_buffer(network, "key", key, inputs))
    loss = _loss(likelihood, outputs, y, output, options)
    # with the same key, since the KL of some priors is estimated at the drawn weights
    regularization = network.regularization(key)
    return loss if regularization is None else loss + regularization


def _draws_nothing(network: nn.Module) -> bool:
    """Whether a network needs no key, known without running it.

    Then no masks are at hand while it runs: each function that it would call with them takes as long as a small layer.
    """
    if isinstance(network, KeyedNetwork):
        return network.only_calls_inner and is_plain(network.inner)
    return is_plain(network)


def _loss(likelihood: Likelihood, outputs: object, y: Tensor, output: Output, options: StepOptions | None) -> Tensor:
    """The loss of the chosen output plus those of the auxiliary ones by their weights, (), in nats per row."""
    chosen = pick(outputs, output)
    if options is None:
        return _nll(likelihood, chosen, y)
    loss = _nll(likelihood, chosen, y, options.dtype)
    for name, weight in options.auxiliary.items():
        if (part := named_part(outputs, name)) is chosen:
            raise ValueError(
                f"auxiliary names the output that is predicted from, {name!r}, whose weight is 1: leave it out"
            )
        loss = loss + weight * _nll(likelihood, part, y, options.dtype)
    return loss


def _nll(likelihood: Likelihood, outputs: Tensor, y: Tensor, autocast_to: torch.dtype | None = None) -> Tensor:
    if autocast_to is not None and outputs.dtype in (torch.bfloat16, torch.float16):
        outputs = outputs.float()
    return likelihood.training_loss(likelihood(outputs), y).mean()


def _later(key: Tensor, k: int) -> Tensor:
    """The key of the k-th draw after this one, (2,); no constant, which would keep a wrapper around a compiled step."""
    return torch.stack([key[0], key[1] + k]) if k else key


def take_network(posterior: Posterior, module: nn.Module, output: Output) -> nn.Module:
    """Check a user's network, and the choice of its output, for a posterior that is being made of it.

    Sets the posterior's `output` and `lost_hooks`. Returns the network itself, without what wraps it.
    """
    network = unwrapped(module)
    check_network(network)
    check_output(output)
    posterior.lost_hooks, posterior.output = parameter_hooks(network), output
    return network


class PosteriorOfOneNetwork(Posterior):
    """A posterior whose training changes one network, whose dropout and weights are drawn from counters.

    seed: of the draws in training. steps: () int64 buffer, the number of training steps so far. n_samples: draws per
    training step, averaged.
    """

    seed: int
    steps: Tensor
    n_samples: int = 1

    def shared(self) -> State:
        stacked = self.stacked()
        return {name: t for name, t in state_of(self.module).items() if name not in stacked}

    def losses(self, x: Inputs, y: Tensor, likelihood: Likelihood, own_rows: bool = False) -> Tensor:
        """The mean over the batch of -log p(y | x, draw) plus the network's regularization, (1,), in nats per row."""
        if own_rows:
            x, y = map_inputs(lambda t: t[0], x), y[0]
        key = None if _draws_nothing(self.module) else training_keys(self.seed, 1, self.steps * self.n_samples)[0]
        self.steps.add_(1)  # not +=, for which nn.Module looks through all its tables
        return mean_loss(self.module, likelihood, key, (x, y), self.n_samples, self.output).unsqueeze(0)


class KeyedPosterior(PosteriorOfOneNetwork):
    """A posterior of one network whose draws differ only in their key, in training and in prediction.

    It defines `draws` and `losses`: a step of training draws from a key of its own, made of seed and `steps`, the
    number of steps so far, so that a compiled or resumed training draws the same. `vbdl.DeepEnsemble(q, n_members)`
    takes it as its members, stacked, in which member m draws from seed + m. A method of your own is a `KeyedNetwork`
    around the user's network and a subclass of this whose constructor makes it, with `config()` for saving.

    module: the network whose forward draws from its key. n_samples: draws per training step, averaged. seed: of the
    draws in training. output: the output to predict from, if the network returns several.

    >>> from vbdl_kernels import normal
    >>> from vbdl.nn.keyed import KeyedNetwork
    >>> class Blurred(KeyedNetwork):
    ...     def forward(self, *args, **kwargs):
    ...         out = self.inner(*args, **kwargs)
    ...         return out + 0.1 * normal(self.key, 0, 0, 1, out.shape[-1]).view(-1)
    >>> q = KeyedPosterior(Blurred(nn.Linear(4, 1)))
    >>> p = vbdl.Predictor(vbdl.DeepEnsemble(q, 3), vbdl.Gaussian(), n_samples=30, compile=False)(torch.randn(5, 4))
    >>> p.mean.shape, bool((p.epistemic > 0).all())
    (torch.Size([5, 1]), True)
    """

    module: KeyedNetwork

    def __init__(self, module: KeyedNetwork | None = None, *, n_samples: int = 1, seed: int = 0, output: Output = None):
        super().__init__()
        if module is None:  # the subclass sets them
            return
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}")
        self.module, self.n_samples, self.seed, self.output = module, n_samples, seed, output
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=module.key.device))

    @property
    def kl_weight(self) -> float | None:  # type: ignore[override]
        """The weight of the KL term in the loss, which `fit(kl_warmup=...)` raises from 0; None without a KL term."""
        weight = self.module._buffers.get("kl_weight")
        return None if weight is None else float(weight)

    @kl_weight.setter
    def kl_weight(self, value: float) -> None:
        weight = self.module._buffers.get("kl_weight")
        if weight is None:
            raise ValueError(
                f"{type(self.module).__name__} has no KL term to weigh: give it a buffer kl_weight, as KeyedNetwork("
                f"inner, kl=True) does, and use it in regularization(key)"
            )
        weight.fill_(value)

    @property
    def user_network(self) -> nn.Module:
        return self.module.inner

    def draws(self, numbers: Tensor, seed: int) -> State:
        """The key of each draw, {"key": (samples, 2)}; numbers: (samples,)."""
        return {"key": make_key(seed, numbers)}
