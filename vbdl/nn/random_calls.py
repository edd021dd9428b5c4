"""Random functions of torch, drawn from counters: the noise of a network that draws in its own forward.

A network's forward runs under `CounterNoise`, which intercepts torch's random functions (`torch.randn_like(mu)`,
`eps.normal_()`, `Normal(mu, std).rsample()`, ...). Each call is a site, numbered in the order of the forward, and its
noise is a pure function of (key, number, element). Noise without a batch axis, like that of a weight, is one draw for
all rows. Noise with a batch axis is one draw that all rows share or, with `per_row`, one draw for each row.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_map_only
from vbdl_kernels import normal, words
from vbdl_kernels.philox import BIAS, UNIFORM, WEIGHT

from vbdl.nn.interception import CounterDropout
from vbdl.nn.masks import Masks, Site, described

_REFUSED = frozenset(
    """poisson binomial _standard_gamma _sample_dirichlet fractional_max_pool2d fractional_max_pool2d_with_indices
    fractional_max_pool3d fractional_max_pool3d_with_indices native_dropout _fused_dropout""".split()
)
# bits of a uniform number, as many as the dtype's fraction holds exactly
_BITS = {torch.float64: 32, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
_functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class RandomCall:
    """One call of a random function in a forward."""

    path: str  # name of the innermost module that makes the call; "" is the root
    kind: str  # name of the function
    shape: tuple[int, ...]  # shape of the noise
    axis: int | None = None  # the batch axis of that shape, or None if it has none
    multiple: int = 1  # entries of that axis per row of the batch


class CounterNoise(CounterDropout):
    """A context in which torch's random functions and dropout give the noise of one draw.

    key: (2,) int64, (seed, draw).
    root: the network, for the names of its modules.
    known: the random calls in their order with their batch axes; None: not known yet, so all noise has its full shape.
    sites: the dropout calls, as in `CounterDropout`.
    per_row: one draw for each row in noise that has a batch axis.
    training: one draw for each element of all noise and dropout, and normalization as in training.
    first: number of the first random call in the counters.
    """

    def __init__(
        self,
        key: Tensor,
        root: nn.Module,
        known: Sequence[RandomCall] | None = None,
        sites: tuple[Site, ...] | None = None,
        *,
        per_row: bool = False,
        training: bool = False,
        first: int = 0,
    ):
        self.masks = Masks(key, root, sites=sites, per_row=training)
        super().__init__(self.masks)
        self.key, self.known, self._each_row, self._first = key, known, per_row, first
        self.calls: list[RandomCall] = []
        self.watched: dict[int, str] = {}  # addresses of tensors that must not be drawn into, and what they are
        # the addresses of tensors that may be drawn into, or None for all; in training, a draw must not change what the
        # gradient of the draw before needs
        self.writable: set[int] | None = set() if training else None
        # by id: the tensor, so that its id is not reused, and what was drawn into it or what it is an alias of
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._origins: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._values:
            args, kwargs = tree_map_only(Tensor, self._value, (args, kwargs))
        name = getattr(func, "__name__", "")
        if (handler := _DRAWN.get(name)) is not None:
            if kwargs.get("out") is not None or getattr(func, "__module__", "") == "torch.nn.init":
                self.refuse(f"{func.__module__}.{name}" if kwargs.get("out") is None else f"{name}(out=)")
            kwargs.pop("generator", None)
            return handler(self, *args, **kwargs)
        if name in _REFUSED:
            self.refuse(name)
        if func == _DATA or name == "detach":  # `data` as `detach`, because torch's transforms refuse it
            alias = args[0].detach()
            self._origins[id(alias)] = (alias, args[0])
            return alias
        return super().__torch_function__(func, types, args, kwargs)

    def refuse(self, name: str) -> None:
        """Raise NotImplementedError for a random function that cannot be drawn from counters."""
        raise NotImplementedError(
            f"{name} is called in {described(self.masks.place())} and cannot be drawn from counters, so a draw would "
            f"not be reproducible: compute it from torch.rand, torch.randn or torch.bernoulli, whose draws can be"
        )

    # -- noise

    def normal(self, kind: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Standard normal noise of this shape."""
        self._check_dtype(kind, dtype)

        def draw(key: Tensor, number: int, vector: bool, rows: int, columns: int) -> Tensor:
            return normal(key, number, BIAS if vector else WEIGHT, rows, columns)

        return self._noise(kind, shape, device, draw).to(dtype)

    def words(self, kind: str, shape: Sequence[int], device: torch.device) -> Tensor:
        """Uniform 32-bit words, int64, of this shape."""

        def draw(key: Tensor, number: int, vector: bool, rows: int, columns: int) -> Tensor:
            return words(key, number, UNIFORM, rows, columns)

        return self._noise(kind, shape, device, draw)

    def uniform(self, kind: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Noise uniform in [0, 1)."""
        self._check_dtype(kind, dtype)
        bits = _BITS[dtype]
        return (self.words(kind, shape, device) >> (32 - bits)).to(dtype) * 2.0**-bits

    def exponential(self, kind: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Noise of the exponential distribution with rate 1, finite."""
        self._check_dtype(kind, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return -((self.words(kind, shape, device).to(wide) + 0.5) * 2.0**-32).log().to(dtype)

    def bernoulli(self, kind: str, shape: Sequence[int], p: Tensor | float, device: torch.device) -> Tensor:
        """True with probability p, bool."""
        if isinstance(p, Tensor):
            return self.uniform(kind, shape, torch.float32, device) < p.detach()
        return self.words(kind, shape, device) < round(p * 2**32)

    def _check_dtype(self, kind: str, dtype: torch.dtype) -> None:
        if dtype not in _BITS:
            self.refuse(f"{kind} of {dtype}")

    def _noise(
        self,
        kind: str,
        shape: Sequence[int],
        device: torch.device,
        draw: Callable[[Tensor, int, bool, int, int], Tensor],
    ) -> Tensor:
        """The noise of the next random call.

        draw: draw(key, number, whether it is a vector, rows, columns) -> (rows, columns).
        """
        shape, axis, multiple, number = tuple(shape), None, 1, len(self.calls)
        path = self.masks.place()
        if self.known is not None and not self.masks.per_row:
            if number >= len(self.known) or self.known[number].kind != kind:
                raise RuntimeError(
                    f"{kind} in {described(path)} was not called when the module first ran: a forward whose "
                    f"random calls depend on the data cannot be drawn reproducibly; call the same ones each time"
                )
            axis, multiple = self.known[number].axis, self.known[number].multiple
        self.calls.append(RandomCall(path, kind, shape, axis, multiple))
        key, number = self.key.to(device), self._first + number
        if axis is None:  # as the noise of a parameter: the row is its first axis
            vector = len(shape) < 2
            rows = 1 if vector else shape[0]
            return draw(key, number, vector, rows, math.prod(shape) // max(rows, 1)).view(shape)
        # the batch first, so that a row's noise does not depend on the rows after it
        sizes = [shape[axis] if self._each_row else multiple, *shape[:axis], *shape[axis + 1 :]]
        columns = sizes[-1] if len(sizes) > 1 else 1
        rows = math.prod(sizes) // max(columns, 1)
        noise = draw(key, number, False, rows, columns).view(sizes).movedim(0, axis)
        if self._each_row:
            return noise
        repeats = [1] * len(shape)
        repeats[axis] = shape[axis] // multiple
        if multiple == 1 and _without_mutations():
            return noise.expand(shape)
        return noise.repeat(repeats)

    # -- tensors that are drawn into

    def draw_into(self, target: Tensor, value: Tensor) -> Tensor:
        """Write drawn values into a tensor, or remember them in its place where a transform cannot write to it."""
        if self.watched:
            address = target.untyped_storage().data_ptr()
            if address in self.watched:
                raise ValueError(
                    f"{self.calls[-1].kind} in {described(self.calls[-1].path)} draws into "
                    f"{self.watched[address]} in place, so the next draw would find it changed: draw into a new "
                    f"tensor, e.g. torch.randn_like(x), or into a buffer"
                )
        if self.writable is None:  # inside vmap and functionalize, only a tensor of their level can be written to
            can_write = _functorch.maybe_get_level(target) >= _functorch.maybe_get_level(value)
        else:
            can_write = bool(self.writable) and target.untyped_storage().data_ptr() in self.writable
        if can_write:
            with torch.no_grad() if target.is_leaf else contextlib.nullcontext():
                return target.copy_(value)
        value = value.to(target.dtype)
        alias: Tensor | None = target
        while alias is not None:
            self._values[id(alias)] = (alias, value)
            alias = self._origins[id(alias)][1] if id(alias) in self._origins else None
        return value

    def _value(self, t: Tensor) -> Tensor:
        entry = self._values.get(id(t))
        return t if entry is None else entry[1]


def _without_mutations() -> bool:
    """Whether a trace removes mutations, so that a tensor whose elements share memory may be written to."""
    stack = _functorch.get_interpreter_stack() or ()
    return any(i.key() == _functorch.TransformType.Functionalize for i in stack)


# -- the handlers: handler(mode, *arguments of the function)


def _sizes(args: tuple[Any, ...], size: Sequence[int] | None) -> tuple[int, ...]:
    if size is not None:
        return tuple(size)
    return tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else tuple(args)


def _of_new(dtype: torch.dtype | None, device: Any) -> tuple[torch.dtype, torch.device]:
    device = torch.get_default_device() if device is None else torch.device(device)
    return dtype or torch.get_default_dtype(), device


def _new(draw: Callable) -> Callable:
    """The handler of a function that takes a size, like `torch.randn`."""

    def handler(mode, *args, size=None, dtype=None, device=None, **_):
        return draw(mode, draw.__name__.strip("_"), _sizes(args, size), *_of_new(dtype, device))

    return handler


def _like(draw: Callable, kind: str) -> Callable:
    """The handler of a function that takes a tensor of the noise's shape, like `torch.randn_like`."""

    def handler(mode, input, dtype=None, device=None, **_):
        return draw(mode, kind, input.shape, dtype or input.dtype, torch.device(device or input.device))

    return handler


def _rand(mode: CounterNoise, kind: str, shape, dtype, device) -> Tensor:
    return mode.uniform(kind, shape, dtype, device)


def _randn(mode: CounterNoise, kind: str, shape, dtype, device) -> Tensor:
    return mode.normal(kind, shape, dtype, device)


def _normal(mode: CounterNoise, mean: Any = 0.0, std: Any = 1.0, size=None, dtype=None, device=None, **_) -> Tensor:
    """`torch.normal`, whose draws have no gradient."""
    tensors = [t.detach() for t in (mean, std) if isinstance(t, Tensor)]
    if tensors:
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        dtype, device = tensors[0].dtype, tensors[0].device
    else:
        shape, (dtype, device) = tuple(size or ()), _of_new(dtype, device)
    mean, std = (t.detach() if isinstance(t, Tensor) else t for t in (mean, std))
    noise = mode.normal("normal", shape, dtype, device)
    return noise if not tensors and (mean, std) == (0, 1) else mean + std * noise


def _normal_(mode: CounterNoise, self: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    noise = mode.normal("normal_", self.shape, self.dtype, self.device)
    return mode.draw_into(self, noise if (mean, std) == (0, 1) else mean + std * noise)


def _log_normal_(mode: CounterNoise, self: Tensor, mean: float = 1.0, std: float = 2.0) -> Tensor:
    return mode.draw_into(self, (mean + std * mode.normal("log_normal_", self.shape, self.dtype, self.device)).exp())


def _uniform_(mode: CounterNoise, self: Tensor, *bounds: float, **named: float) -> Tensor:
    low, high = [*bounds, *((0.0, 1.0)[len(bounds) :])]
    low, high = named.get("from", low), named.get("to", high)
    noise = mode.uniform("uniform_", self.shape, self.dtype, self.device)
    return mode.draw_into(self, low + (high - low) * noise)


def _exponential_(mode: CounterNoise, self: Tensor, lambd: float = 1.0) -> Tensor:
    return mode.draw_into(self, mode.exponential("exponential_", self.shape, self.dtype, self.device) / lambd)


def _cauchy_(mode: CounterNoise, self: Tensor, median: float = 0.0, sigma: float = 1.0) -> Tensor:
    noise = mode.uniform("cauchy_", self.shape, self.dtype, self.device)
    return mode.draw_into(self, median + sigma * (math.pi * (noise - 0.5)).tan())


def _geometric_(mode: CounterNoise, self: Tensor, p: float) -> Tensor:
    waited = mode.exponential("geometric_", self.shape, torch.float32, self.device) / -math.log1p(-p)
    return mode.draw_into(self, waited.ceil().clamp_min(1.0))


def _bernoulli(mode: CounterNoise, input: Tensor, p: float | None = None) -> Tensor:
    drawn = mode.bernoulli("bernoulli", input.shape, input if p is None else p, input.device)
    return drawn.to(input.dtype)


def _bernoulli_(mode: CounterNoise, self: Tensor, p: Tensor | float = 0.5) -> Tensor:
    return mode.draw_into(self, mode.bernoulli("bernoulli_", self.shape, p, self.device))


def _whole_numbers(mode: CounterNoise, kind: str, low: int, high: int, shape: Sequence[int], device) -> Tensor:
    """Uniform whole numbers, low <= number < high, int64."""
    if not 0 < high - low < 2**31:
        mode.refuse(f"{kind} from {low} to {high}")
    return low + ((mode.words(kind, shape, device) * (high - low)) >> 32)


def _randint(
    mode: CounterNoise, *args: Any, low: Any = 0, high: Any = None, size: Any = None, dtype=None, device=None, **_
) -> Tensor:
    """`torch.randint(high, size)` or `torch.randint(low, high, size)`, any of them by name."""
    numbers = [a for a in args if isinstance(a, int)]
    (size,) = [a for a in args if not isinstance(a, int)] or [size]
    low, high = numbers if len(numbers) == 2 else (low, *numbers) if high is None else (*numbers, high, low)[:2]
    drawn = _whole_numbers(mode, "randint", low, high, tuple(size), _of_new(None, device)[1])
    return drawn.to(dtype or torch.int64)


def _randint_like(mode: CounterNoise, input: Tensor, low: int, high: int | None = None, dtype=None, **_) -> Tensor:
    bounds = (0, low) if high is None else (low, high)
    return _whole_numbers(mode, "randint_like", *bounds, input.shape, input.device).to(dtype or input.dtype)


def _random_(mode: CounterNoise, self: Tensor, *bounds: int, **named: int) -> Tensor:
    if not bounds and "to" not in named:
        mode.refuse("random_ without bounds")
    low, high = bounds if len(bounds) == 2 else (0, *bounds) if bounds else (0, 0)
    low, high = named.get("from", low), named.get("to", high)
    return mode.draw_into(self, _whole_numbers(mode, "random_", low, high, self.shape, self.device))


def _randperm(mode: CounterNoise, n: int, dtype: torch.dtype = torch.int64, device=None, **_) -> Tensor:
    return mode.words("randperm", (n,), _of_new(None, device)[1]).argsort(stable=True).to(dtype)


def _multinomial(mode: CounterNoise, input: Tensor, num_samples: int, replacement: bool = False) -> Tensor:
    weights, device = input.detach(), input.device
    if not replacement:  # a race of exponential waiting times
        waits = mode.exponential("multinomial", input.shape, weights.dtype, device)
        return (weights / waits).topk(num_samples, dim=-1).indices
    drawn = mode.uniform("multinomial", (*input.shape[:-1], num_samples), weights.dtype, device)
    below = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
    return (drawn.unsqueeze(-1) >= below[..., :-1].unsqueeze(-2)).sum(-1)


def _gumbel_softmax(
    mode: CounterNoise, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    gumbel = -mode.exponential("gumbel_softmax", logits.shape, logits.dtype, logits.device).log()
    soft = ((logits + gumbel) / tau).softmax(dim)
    if not hard:
        return soft
    one = torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
    return one - soft.detach() + soft


def _rrelu(
    mode: CounterNoise, input: Tensor, lower=1 / 8, upper=1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    if not training:
        return F.leaky_relu(input, (lower + upper) / 2)
    slope = lower + (upper - lower) * mode.uniform("rrelu", input.shape, input.dtype, input.device)
    return torch.where(input >= 0, input, input * slope)


_DRAWN: Mapping[str, Callable[..., Tensor]] = {
    "rand": _new(_rand),
    "rand_like": _like(_rand, "rand_like"),
    "randn": _new(_randn),
    "randn_like": _like(_randn, "randn_like"),
    "normal": _normal,
    "normal_": _normal_,
    "log_normal_": _log_normal_,
    "uniform_": _uniform_,
    "exponential_": _exponential_,
    "cauchy_": _cauchy_,
    "geometric_": _geometric_,
    "bernoulli": _bernoulli,
    "bernoulli_": _bernoulli_,
    "randint": _randint,
    "randint_like": _randint_like,
    "random_": _random_,
    "randperm": _randperm,
    "multinomial": _multinomial,
    "gumbel_softmax": _gumbel_softmax,
    "rrelu": _rrelu,
    "rrelu_": _rrelu,
}


# -- checks of torch.distributions


class _Checks:
    """How many forwards run without the checks of `torch.distributions`, and whether they were on before."""

    lock = threading.Lock()
    running = 0
    before = True


@contextlib.contextmanager
def without_checks_of_values() -> Iterator[None]:
    """A context in which `torch.distributions` does not check its values, which no trace or `vmap` allows."""
    with _Checks.lock:
        if _Checks.running == 0:
            _Checks.before = Distribution._validate_args
            Distribution.set_default_validate_args(False)
        _Checks.running += 1
    try:
        yield
    finally:
        with _Checks.lock:
            _Checks.running -= 1
            if _Checks.running == 0:
                Distribution.set_default_validate_args(_Checks.before)
