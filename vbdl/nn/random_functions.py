"""torch's random functions, computed from the noise of a draw.

Each replacement takes the noise of a draw before the function's arguments.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdl.nn.noise import Noise


def _sizes(args: tuple[Any, ...], size: Sequence[int] | None) -> tuple[int, ...]:
    if size is not None:
        return tuple(size)
    return tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else tuple(args)


def _of_new(dtype: torch.dtype | None, device: Any) -> tuple[torch.dtype, torch.device]:
    device = torch.get_default_device() if device is None else torch.device(device)
    return dtype or torch.get_default_dtype(), device


def _new(draw: Callable) -> Callable:
    """The replacement of a function that takes a size, like `torch.randn`."""

    def replacement(noise, *args, size=None, dtype=None, device=None, **_):
        return draw(noise, draw.__name__.strip("_"), _sizes(args, size), *_of_new(dtype, device))

    return replacement


def _like(draw: Callable, kind: str) -> Callable:
    """The replacement of a function that takes a tensor of the noise's shape, like `torch.randn_like`."""

    def replacement(noise, input, dtype=None, device=None, **_):
        return draw(noise, kind, input.shape, dtype or input.dtype, torch.device(device or input.device))

    return replacement


def _rand(noise: Noise, kind: str, shape, dtype, device) -> Tensor:
    return noise.uniform(kind, shape, dtype, device)


def _randn(noise: Noise, kind: str, shape, dtype, device) -> Tensor:
    return noise.normal(kind, shape, dtype, device)


def normal(noise: Noise, mean: Any = 0.0, std: Any = 1.0, size=None, dtype=None, device=None, **_) -> Tensor:
    """`torch.normal`, whose draws have no gradient."""
    tensors = [t.detach() for t in (mean, std) if isinstance(t, Tensor)]
    if tensors:
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        dtype, device = tensors[0].dtype, tensors[0].device
    else:
        shape, (dtype, device) = tuple(size or ()), _of_new(dtype, device)
    mean, std = (t.detach() if isinstance(t, Tensor) else t for t in (mean, std))
    numbers = noise.normal("normal", shape, dtype, device)
    return numbers if not tensors and (mean, std) == (0, 1) else mean + std * numbers


def normal_(noise: Noise, self: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    numbers = noise.normal("normal_", self.shape, self.dtype, self.device)
    return noise.draw_into(self, numbers if (mean, std) == (0, 1) else mean + std * numbers)


def log_normal_(noise: Noise, self: Tensor, mean: float = 1.0, std: float = 2.0) -> Tensor:
    return noise.draw_into(self, (mean + std * noise.normal("log_normal_", self.shape, self.dtype, self.device)).exp())


def uniform_(noise: Noise, self: Tensor, *bounds: float, **named: float) -> Tensor:
    low, high = [*bounds, *((0.0, 1.0)[len(bounds) :])]
    low, high = named.get("from", low), named.get("to", high)
    numbers = noise.uniform("uniform_", self.shape, self.dtype, self.device)
    return noise.draw_into(self, low + (high - low) * numbers)


def exponential_(noise: Noise, self: Tensor, lambd: float = 1.0) -> Tensor:
    return noise.draw_into(self, noise.exponential("exponential_", self.shape, self.dtype, self.device) / lambd)


def cauchy_(noise: Noise, self: Tensor, median: float = 0.0, sigma: float = 1.0) -> Tensor:
    numbers = noise.uniform("cauchy_", self.shape, self.dtype, self.device)
    return noise.draw_into(self, median + sigma * (math.pi * (numbers - 0.5)).tan())


def geometric_(noise: Noise, self: Tensor, p: float) -> Tensor:
    waited = noise.exponential("geometric_", self.shape, torch.float32, self.device) / -math.log1p(-p)
    return noise.draw_into(self, waited.ceil().clamp_min(1.0))


def bernoulli(noise: Noise, input: Tensor, p: float | None = None) -> Tensor:
    drawn = noise.bernoulli("bernoulli", input.shape, input if p is None else p, input.device)
    return drawn.to(input.dtype)


def bernoulli_(noise: Noise, self: Tensor, p: Tensor | float = 0.5) -> Tensor:
    return noise.draw_into(self, noise.bernoulli("bernoulli_", self.shape, p, self.device))


def _whole_numbers(noise: Noise, kind: str, low: int, high: int, shape: Sequence[int], device) -> Tensor:
    """Uniform whole numbers, low <= number < high, int64."""
    if not 0 < high - low < 2**31:
        noise.refuse(f"{kind} from {low} to {high}")
    return low + ((noise.words(kind, shape, device) * (high - low)) >> 32)


def randint(
    noise: Noise, *args: Any, low: Any = 0, high: Any = None, size: Any = None, dtype=None, device=None, **_
) -> Tensor:
    """`torch.randint(high, size)` or `torch.randint(low, high, size)`, any of them by name."""
    numbers = [a for a in args if isinstance(a, int)]
    (size,) = [a for a in args if not isinstance(a, int)] or [size]
    if len(numbers) == 2:
        low, high = numbers
    elif numbers:
        low, high = (low, numbers[0]) if high is None else (numbers[0], high)
    drawn = _whole_numbers(noise, "randint", low, high, tuple(size), _of_new(None, device)[1])
    return drawn.to(dtype or torch.int64)


def randint_like(noise: Noise, input: Tensor, low: int, high: int | None = None, dtype=None, **_) -> Tensor:
    bounds = (0, low) if high is None else (low, high)
    return _whole_numbers(noise, "randint_like", *bounds, input.shape, input.device).to(dtype or input.dtype)


def random_(noise: Noise, self: Tensor, *bounds: int, **named: int) -> Tensor:
    if not bounds and "to" not in named:
        noise.refuse("random_ without bounds")
    low, high = bounds if len(bounds) == 2 else (0, *bounds) if bounds else (0, 0)
    low, high = named.get("from", low), named.get("to", high)
    return noise.draw_into(self, _whole_numbers(noise, "random_", low, high, self.shape, self.device))


def randperm(noise: Noise, n: int, dtype: torch.dtype = torch.int64, device=None, **_) -> Tensor:
    return noise.words("randperm", (n,), _of_new(None, device)[1]).argsort(stable=True).to(dtype)


def multinomial(noise: Noise, input: Tensor, num_samples: int, replacement: bool = False) -> Tensor:
    weights, device = input.detach(), input.device
    if not replacement:  # a race of exponential waiting times
        waits = noise.exponential("multinomial", input.shape, weights.dtype, device)
        return (weights / waits).topk(num_samples, dim=-1).indices
    drawn = noise.uniform("multinomial", (*input.shape[:-1], num_samples), weights.dtype, device)
    below = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
    return (drawn.unsqueeze(-1) >= below[..., :-1].unsqueeze(-2)).sum(-1)


def gumbel_softmax(
    noise: Noise, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    gumbel = -noise.exponential("gumbel_softmax", logits.shape, logits.dtype, logits.device).log()
    soft = ((logits + gumbel) / tau).softmax(dim)
    if not hard:
        return soft
    one = torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
    return one - soft.detach() + soft


def rrelu(
    noise: Noise, input: Tensor, lower=1 / 8, upper=1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    if not training:
        return F.leaky_relu(input, (lower + upper) / 2)
    slope = lower + (upper - lower) * noise.uniform("rrelu", input.shape, input.dtype, input.device)
    return torch.where(input >= 0, input, input * slope)


# functions of torch.nn.init that a mode gets as one call; the others call methods of tensors


def _filled_normal(noise: Noise, tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return normal_(noise, tensor, mean, std)


def _filled_uniform(noise: Noise, tensor: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    return uniform_(noise, tensor, a, b)


def _filled_kaiming_uniform(
    noise: Noise, tensor: Tensor, a: float = 0, mode: Any = "fan_in", nonlinearity: Any = "leaky_relu"
) -> Tensor:
    if 0 in tensor.shape:
        return tensor
    fan = nn.init._calculate_correct_fan(tensor, mode)
    bound = math.sqrt(3 / fan) * nn.init.calculate_gain(nonlinearity, a)
    return uniform_(noise, tensor, -bound, bound)


OF_INIT: Mapping[Callable[..., Tensor], Callable[..., Tensor]] = {
    nn.init.normal_: _filled_normal,
    nn.init.uniform_: _filled_uniform,
    nn.init.kaiming_uniform_: _filled_kaiming_uniform,
}
REPLACEMENTS: Mapping[str, Callable[..., Tensor]] = {
    "rand": _new(_rand),
    "rand_like": _like(_rand, "rand_like"),
    "randn": _new(_randn),
    "randn_like": _like(_randn, "randn_like"),
    "normal": normal,
    "normal_": normal_,
    "log_normal_": log_normal_,
    "uniform_": uniform_,
    "exponential_": exponential_,
    "cauchy_": cauchy_,
    "geometric_": geometric_,
    "bernoulli": bernoulli,
    "bernoulli_": bernoulli_,
    "randint": randint,
    "randint_like": randint_like,
    "random_": random_,
    "randperm": randperm,
    "multinomial": multinomial,
    "gumbel_softmax": gumbel_softmax,
    "rrelu": rrelu,
    "rrelu_": rrelu,
}
