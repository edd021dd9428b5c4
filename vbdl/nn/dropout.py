"""Dropout of every kind, drawn from counters: one mask per draw, shared by all rows of a batch.

A network's forward runs under `CounterDropout`, which intercepts every torch function and replaces those that drop
units, wherever they are: `nn.Dropout*`, `F.dropout` in a forward, attention, recurrent layers. Any other random
operation raises an error that names the module, so that nothing random is missed or shared by accident.

Gal and Ghahramani, Dropout as a Bayesian Approximation, ICML 2016, https://arxiv.org/abs/1506.02142
"""

import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from vbdl_kernels import keep_mask

from vbdl.calling.inputs import arguments, map_inputs
from vbdl.calling.stacking import call
from vbdl.nn.attention import multi_head_attention_forward, scaled_dot_product_attention
from vbdl.nn.embedding import embedding
from vbdl.nn.frozen import hold_frozen
from vbdl.nn.keyed import KeyedNetwork
from vbdl.nn.recurrent import recurrent
from vbdl.nn.training_reads import EVERY, Place, Reads, places_of_dropout

_ALPHA = -1.7580993408473766  # -scale * alpha of SELU, the value of dropped units in alpha dropout

_RANDOM = frozenset(
    """rand rand_like randn randn_like randint randint_like randperm bernoulli bernoulli_ normal normal_ uniform_
    exponential_ cauchy_ geometric_ log_normal_ random_ multinomial poisson binomial gumbel_softmax
    fractional_max_pool2d fractional_max_pool2d_with_indices fractional_max_pool3d
    fractional_max_pool3d_with_indices native_dropout _fused_dropout""".split()
)


@dataclass(frozen=True)
class Site:
    """One call of a dropout function in a forward."""

    path: str  # name of the innermost module that makes the call; "" is the root
    kind: str  # name of the function
    p: float  # dropout rate, after any override
    shape: tuple[int, ...]  # shape of the masked tensor
    axis: int | None = 0  # the batch axis of that shape, or None if it has none
    multiple: int = 1  # entries of that axis per row of the batch


class CounterDropout(TorchFunctionMode):
    """A context in which every dropout uses the masks of one draw.

    key: (2,) int64, (seed, draw).
    rate: overrides dropout rates, all of them or by module name.
    sites: the dropout calls in their order, found by `locate`; if None, axis 0 is taken for the batch in all of them.
    per_row: one mask per row, as in training, with normalization and other random operations left unchanged.
    silent: record the dropout calls in `found`, but drop nothing.
    """

    def __init__(
        self,
        key: Tensor,
        root: nn.Module,
        rate: float | Mapping[str, float] | None = None,
        sites: tuple[Site, ...] | None = None,
        per_row: bool = False,
        silent: bool = False,
    ):
        super().__init__()
        self.key, self.rate, self.sites, self.per_row, self.silent = key, rate, sites, per_row, silent
        self._root, self._names = root, None
        self.found: list[Site] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (handler := _HANDLERS.get(name)) is not None:
            return handler(self, func, *args, **kwargs)
        if name in _RANDOM and not self.per_row:
            raise NotImplementedError(
                f"{name} is called in {self._describe(self.place())}: only dropout can be drawn from counters. "
                f"Name that module in deterministic= to keep it in evaluation mode, or replace the call."
            )
        return func(*args, **kwargs)

    def place(self) -> str:
        """The name of the innermost module whose method is running."""
        if self._names is None:
            self._names = {id(module): name for name, module in self._root.named_modules()}
        frame = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self._names:
                return self._names[id(owner)]
            frame = frame.f_back
        return ""

    @staticmethod
    def _describe(path: str) -> str:
        return f"module '{path}'" if path else "the module itself"

    def p(self, p: float, path: str) -> float:
        """The dropout rate in a module: an override for all, for this module or one around it, or else p."""
        if isinstance(self.rate, Mapping):
            names = [n for n in self.rate if path == n or path.startswith(f"{n}.") or n == ""]
            return float(self.rate[max(names, key=len)]) if names else float(p)
        return float(p) if self.rate is None else float(self.rate)

    def keep(
        self, kind: str, shape: tuple[int, ...], p: float, device: torch.device, axis: int | None = 0
    ) -> Tensor | None:
        """The mask of the next dropout call, broadcastable to `shape`, or None if nothing is dropped.

        axis: the batch axis of `shape`, None if it has none, or -1 to look it up in `sites` (axis 0 without them).
        """
        if self.per_row:
            axis = None
        index, path = len(self.found), self.place()
        p, multiple = self.p(p, path), 1
        if axis == -1:
            axis = 0
            if self.sites is not None:
                if index >= len(self.sites) or self.sites[index].kind != kind:
                    raise RuntimeError(
                        f"{kind} in {self._describe(path)} was not called when the module first ran: a forward whose "
                        f"dropout calls depend on the data cannot be drawn reproducibly; call the same ones each time"
                    )
                axis, multiple = self.sites[index].axis, self.sites[index].multiple
        self.found.append(Site(path, kind, p, tuple(shape), axis, multiple))
        if p == 0.0 or self.silent:
            return None
        sizes = list(shape)
        if axis is not None:
            sizes[axis] = multiple
        # the counters of a draw index rows and columns, so that the mask of a longer sequence begins with that of a
        # shorter one; training does not need this and uses one long row, which wastes no random words
        columns = sizes[-1] if len(sizes) > 1 and not self.per_row else math.prod(sizes)
        rows = math.prod(sizes) // max(columns, 1)
        keep = keep_mask(self.key.to(device), index, rows, columns, p).view(sizes)
        if axis is not None and multiple > 1:  # the axis runs over (batch, multiple)
            repeats = [1] * len(sizes)
            repeats[axis] = shape[axis] // multiple
            keep = keep.repeat(repeats)
        return keep

    def drop(self, x: Tensor, p: float, kind: str, axis: int | None = -1) -> Tensor:
        """x with units dropped and the rest scaled by 1 / (1 - p)."""
        keep = self.keep(kind, tuple(x.shape), p, x.device, axis)
        return x if keep is None else _scale(x, keep, self.found[-1].p)


def _scale(x: Tensor, keep: Tensor, p: float) -> Tensor:
    return x * (keep.to(x.dtype) * (1.0 / (1.0 - p) if p < 1.0 else 0.0))


def _element(mode: CounterDropout, func, input, p=0.5, training=True, inplace=False, train=None):
    if not (training if train is None else train):
        return input
    return mode.drop(input, p, "dropout")


def _channel_sizes(mode: CounterDropout, kind: str, input: Tensor) -> Tensor:
    """One element per channel, (batch, channels), the shape of a mask that drops whole channels."""
    if input.ndim < 3:
        raise ValueError(
            f"{kind} in {mode._describe(mode.place())} got {tuple(input.shape)}: it needs (batch, channels, ...), with "
            f"at least one axis after the channels"
        )
    return input.flatten(2)[..., :1].squeeze(-1)


def _channels(mode: CounterDropout, func, input, p=0.5, training=True, inplace=False, train=None):
    if not (training if train is None else train):
        return input
    kind = func.__name__
    units = _channel_sizes(mode, kind, input)
    keep = mode.keep(kind, tuple(units.shape), p, input.device, axis=0)
    if keep is None:
        return input
    return _scale(input, keep.reshape(*keep.shape, *([1] * (input.ndim - 2))), mode.found[-1].p)


def _alpha(mode: CounterDropout, func, input, p=0.5, training=False, inplace=False, train=None):
    """Alpha dropout. Klambauer et al., Self-Normalizing Neural Networks, 2017, https://arxiv.org/abs/1706.02515"""
    if not (training if train is None else train):
        return input
    kind = func.__name__
    if "feature" in kind:
        units = _channel_sizes(mode, kind, input)
        keep = mode.keep(kind, tuple(units.shape), p, input.device, axis=0)
        if keep is not None:
            keep = keep.reshape(*keep.shape, *([1] * (input.ndim - 2)))
    else:
        keep = mode.keep(kind, tuple(input.shape), p, input.device, axis=-1)
    if keep is None:
        return input
    p = mode.found[-1].p
    if p == 1.0:
        return input * 0
    a = ((1 - p) * (1 + p * _ALPHA**2)) ** -0.5
    kept = keep.to(input.dtype)
    return a * (input * kept + _ALPHA * (1 - kept)) - a * p * _ALPHA


def _batch_norm(
    mode: CounterDropout,
    func,
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    """Batch normalization, in prediction with running statistics: a batch's own would mix its rows."""
    if mode.per_row:
        if training and input.ndim > 1 and input.numel() == input.shape[1]:
            raise ValueError(
                f"batch normalization in {mode._describe(mode.place())} got one row to train on, but needs two: choose "
                f"a batch_size that does not leave one row for the last batch, or drop_last=True in a DataLoader"
            )
        return func(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if running_mean is None:
        raise ValueError(
            f"batch normalization in {mode._describe(mode.place())} keeps no running statistics, so a row's "
            f"prediction would depend on its batch: train it with track_running_stats=True"
        )
    return func(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _rrelu(mode: CounterDropout, func, input, lower=1 / 8, upper=1 / 3, training=False, inplace=False):
    if training and mode.per_row:
        return func(input, lower, upper, True, False)
    return F.leaky_relu(input, (lower + upper) / 2)  # the evaluation of rrelu, without a random operation


_HANDLERS: dict[str, Callable[..., Any]] = {
    "dropout": _element,
    "dropout_": _element,
    "dropout1d": _channels,
    "dropout2d": _channels,
    "dropout3d": _channels,
    "feature_dropout": _channels,
    "feature_dropout_": _channels,
    "alpha_dropout": _alpha,
    "alpha_dropout_": _alpha,
    "feature_alpha_dropout": _alpha,
    "feature_alpha_dropout_": _alpha,
    "batch_norm": _batch_norm,
    "embedding": embedding,
    "rrelu": _rrelu,
    "rrelu_": _rrelu,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "multi_head_attention_forward": multi_head_attention_forward,
    "lstm": recurrent,
    "gru": recurrent,
    "rnn_tanh": recurrent,
    "rnn_relu": recurrent,
}

# these modules behave differently in training for reasons other than dropout
NORMALIZATION = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.RReLU)


DROPOUT_LAYERS = (nn.modules.dropout._DropoutNd,)


def _is_torchs_own(module: nn.Module) -> bool:
    return all(c.__module__.partition(".")[0] in ("torch", "builtins", "typing") for c in type(module).__mro__)


def may_drop(module: nn.Module) -> bool:
    """Whether a forward might call dropout, judged by its layers and source code, without running it."""
    for m in module.modules():
        if isinstance(m, DROPOUT_LAYERS) or getattr(m, "dropout", None):
            return True
        hooks = [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]
        homes = [type(m).__module__] if not _is_torchs_own(m) or "forward" in vars(m) else []
        for home in [*homes, *(getattr(getattr(hook, "func", hook), "__module__", "") for hook in hooks)]:
            try:
                # the whole file, because a forward may call functions of its file
                if "drop" in inspect.getsource(sys.modules[home]).lower():
                    return True
            except (OSError, TypeError, KeyError):
                return True  # without source, only running the module can tell
    return False


class DropoutNetwork(KeyedNetwork):
    """A module whose evaluation mode keeps dropout on, with the masks of the draw in `key`.

    In training mode it runs the module as it is (`Objective` draws the masks, one per row). In evaluation mode dropout
    is on and everything else is in evaluation mode: normalization, modules named in `deterministic`, and whatever else
    a user's module does in training only (`vbdl/nn/training_reads.py`).
    """

    found_by_running = ("sites", "on", "off")  # not part of the architecture: running the network finds them again

    def __init__(
        self,
        inner: nn.Module,
        rate: float | Mapping[str, float] | None = None,
        deterministic: tuple[str | type[nn.Module], ...] = (),
    ):
        super().__init__()
        self.inner, self.rate, self.deterministic = inner, rate, deterministic
        self.sites: tuple[Site, ...] | None = None
        self.on: frozenset[Place] | None = EVERY
        self.off: list[str] | None = None  # places that read `training` for other than dropout; None: unknown
        self.register_buffer("key", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.train(inner.training)

    def train(self, mode: bool = True) -> "DropoutNetwork":
        super().train(mode)
        if not mode:
            for name, module in self.inner.named_modules():
                module.training = not self._stays_deterministic(name, module)
        else:
            hold_frozen(self.inner)
        return self

    def _stays_deterministic(self, name: str, module: nn.Module) -> bool:
        if isinstance(module, NORMALIZATION):
            return True
        if _is_torchs_own(module) and not isinstance(module, DROPOUT_LAYERS) and not hasattr(module, "dropout"):
            return True  # it drops nothing, but e.g. a spectral norm must not iterate
        return self._is_named_deterministic(name, module)

    def _is_named_deterministic(self, name: str, module: nn.Module) -> bool:
        for chosen in self.deterministic:
            if isinstance(chosen, str):
                if name == chosen or name.startswith(f"{chosen}."):
                    return True
            elif isinstance(module, chosen):
                return True
        return False

    def _fixed(self) -> set[int]:
        """The ids of the modules that `deterministic` names, whose reads of `training` get the module's flag."""
        return {id(m) for name, m in self.inner.named_modules() if self._is_named_deterministic(name, m)}

    def masks(self) -> CounterDropout:
        return CounterDropout(self.key, self.inner, self.rate, self.sites)

    def forward(self, *args, **kwargs):
        if self.training:
            return self.inner(*args, **kwargs)
        with self.masks(), self._reads():
            return self.inner(*args, **kwargs)

    def _reads(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.on is EVERY else Reads(self.on, self._fixed()).of(self.inner)

    def _find_reads(self, inputs) -> None:
        """Find out which reads of `self.training` are about dropout, by running two different rows."""

        def two_rows(t: Tensor) -> Tensor:
            other = t[:1] * 0.5 + 0.1 if t.is_floating_point() else t[:1]
            return torch.cat([t[:1], other]).contiguous()

        inputs = map_inputs(two_rows, inputs)

        def run(reads: Reads) -> tuple[Any, list[Tensor], int]:
            buffers = {n: b.clone() for n, b in self.inner.named_buffers()}
            silent = CounterDropout(self.key, self.inner, self.rate, silent=True)
            with torch.random.fork_rng(devices=[]), reads.of(self.inner), silent as mode:
                outputs = call(self.inner, buffers, inputs)
            return outputs, list(buffers.values()), sum(site.p > 0 for site in mode.found)

        self.on, self.off = places_of_dropout(run, self._fixed())

    def adopt(self, other: KeyedNetwork) -> None:
        assert isinstance(other, DropoutNetwork)
        self.sites, self.on, self.off = other.sites, other.on, other.off

    @torch.no_grad()
    def locate(self, inputs) -> tuple[Site, ...]:
        """The dropout calls of a forward and the batch axis of each, found by running two batch sizes.

        Raises RuntimeError or ValueError for dropout that cannot be drawn reproducibly for each row.
        """
        if self.off is None:
            self._find_reads(inputs)
        calls = []
        self.sites = None
        for rows in (2, 3):
            repeated = map_inputs(lambda t, rows=rows: t[:1].expand(rows, *t.shape[1:]).contiguous(), inputs)
            args, kwargs = arguments(repeated)
            with self.masks() as mode, self._reads():
                self.inner(*args, **kwargs)
            calls.append(mode.found)
        if [s.kind for s in calls[0]] != [s.kind for s in calls[1]]:
            raise RuntimeError(
                "the module calls other dropouts for another batch size, so draws cannot be reproduced: call the same "
                "ones for every batch size"
            )
        self.sites = tuple(_place_batch(a, b) for a, b in zip(*calls, strict=True))
        if any(site.multiple > 1 for site in self.sites):
            # `keep` assumes that a folded axis holds each row's entries in one block; equal rows then stay equal
            with CounterDropout(self.key, self.inner, 0.5, self.sites), self._reads():
                outputs = self.inner(*args, **kwargs)
            for t in tree_leaves(outputs):
                if isinstance(t, Tensor) and not torch.allclose(t, t[:1].expand_as(t), rtol=1e-3, atol=1e-4):
                    raise ValueError(
                        "dropout runs over an axis that folds the batch behind another axis, so vbdl cannot tell "
                        "which part belongs to which row of the batch: put the batch first when folding"
                    )
        return self.sites


def _place_batch(two: Site, three: Site) -> Site:
    """The dropout call with its batch axis, the one that differs between calls on two and on three rows."""
    grown = [axis for axis, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    if not grown:
        return Site(two.path, two.kind, two.p, two.shape, None)
    axis = grown[0]
    multiple = two.shape[axis] // 2
    if len(grown) > 1 or two.shape[axis] != 2 * multiple or three.shape[axis] != 3 * multiple:
        raise ValueError(
            f"{two.kind} in module '{two.path}' masks {two.shape} for 2 rows and {three.shape} for 3, so vbdl cannot "
            f"tell which part belongs to which row of the batch: use dropout on tensors with the batch as one axis"
        )
    return Site(two.path, two.kind, two.p, two.shape, axis, multiple)
