"""Rules for pooling: averages are exact for independent pixels, maxima use Clark's formula on two values at a time."""

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F

from vbdl.engine.moments.activation import maximum
from vbdl.engine.moments.value import Moments, each, rule


def _pair(value: int | Sequence[int], n: int) -> list[int]:
    """A pooling argument as a list of n numbers, one for each axis; a single number counts for every axis."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * n if len(numbers) == 1 else numbers


def _average(n: int):
    operation = getattr(torch.ops.aten, f"avg_pool{n}d")

    def run(
        x: Moments,
        kernel: int | Sequence[int],
        stride: int | Sequence[int] = (),
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Moments:
        if ceil_mode or divisor_override is not None or (not count_include_pad and any(_pair(padding, n))):
            raise ValueError(
                "moment propagation averages over windows of one size, so not with ceil_mode, divisor_override or "
                "count_include_pad=False: use estimator='sampling'"
            )
        size = 1
        for k in _pair(kernel, n):
            size *= k
        pool = lambda t: operation(t, _pair(kernel, n), _pair(stride, n) if stride else [], _pair(padding, n))
        return Moments(pool(x.mean), pool(x.var) / size)

    return run


for _n in (1, 2, 3):
    if hasattr(torch.ops.aten, f"avg_pool{_n}d"):
        rule(f"avg_pool{_n}d")(_average(_n))


@rule("_adaptive_avg_pool2d", "adaptive_avg_pool2d")
def adaptive_average(x: Moments, output: int | Sequence[int]) -> Moments:
    sizes, wanted = list(x.shape[-2:]), _pair(output, 2)
    if any(size % out for size, out in zip(sizes, wanted, strict=True)):
        raise ValueError(
            f"moment propagation averages over windows of one size, and {sizes} is no multiple of {wanted}: "
            f"use estimator='sampling'"
        )
    kernel = [size // out for size, out in zip(sizes, wanted, strict=True)]
    return Moments(F.avg_pool2d(x.mean, kernel), F.avg_pool2d(x.var, kernel) / (kernel[0] * kernel[1]))


def _maximum(n: int):
    def run(
        x: Moments,
        kernel: int | Sequence[int],
        stride: int | Sequence[int] = (),
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
    ) -> tuple[Moments, None]:
        if ceil_mode:
            raise ValueError("moment propagation has no rule for max pooling with ceil_mode: use estimator='sampling'")
        kernel, padding, dilation = _pair(kernel, n), _pair(padding, n), _pair(dilation, n)
        stride = _pair(stride, n) if stride else kernel
        around = [p for size in reversed(padding) for p in (size, size)]
        inside = F.pad(torch.ones(x.shape[-n:], dtype=torch.bool, device=x.mean.device), around)
        x = Moments(F.pad(x.mean, around), F.pad(x.var, around))
        largest, seen = None, None  # maxima so far, and which of them have seen a place that is not padding
        for offset in product(*map(range, kernel)):
            places: tuple = (...,)
            for axis, o in enumerate(offset):
                size, step = x.shape[axis - n], dilation[axis]
                count = (size - step * (kernel[axis] - 1) - 1) // stride[axis] + 1
                begin = o * step
                places += (slice(begin, begin + (count - 1) * stride[axis] + 1, stride[axis]),)
            one, valid = each(lambda t, places=places: t[places], x), inside[places]
            if largest is None:
                largest, seen = one, valid
                continue
            assert isinstance(largest, Moments) and isinstance(one, Moments) and seen is not None
            best = maximum(largest, one)
            if any(padding):  # padded places do not take part in the maximum
                pick = lambda b, f, o, seen=seen, valid=valid: torch.where(seen & valid, b, torch.where(seen, f, o))
                best = Moments(pick(best.mean, largest.mean, one.mean), pick(best.var, largest.var, one.var))
            largest, seen = best, seen | valid
        assert isinstance(largest, Moments)
        return largest, None

    return run


rule("max_pool2d_with_indices")(_maximum(2))
rule("max_pool3d_with_indices")(_maximum(3))
rule("max_pool2d")(lambda *args, **kwargs: _maximum(2)(*args, **kwargs)[0])
