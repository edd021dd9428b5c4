"""Weights of a mean-field network that are drawn when an operation uses them, on devices with kernels for it.

In training, `Drawn` tensors take the place of the network's parameters. A linear layer of a `Drawn` weight runs as
`vbdl_kernels.sampled_linear`: the weights exist only inside the product, and the backward pass draws the noise again.
Any other operation gets the weights themselves, drawn in one pass that does not keep the noise either. The draws are
those of plain operations, from the same counters.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from vbdl_kernels import dispatch, normal, sample_weights, sampled_linear
from vbdl_kernels.philox import BIAS, WEIGHT

from vbdl.calling.stacking import is_of_a_trace
from vbdl.types import Arguments, Keywords

DEVICES = ("cuda", "xpu")  # device types with kernels for these operators


def noise(key: Tensor, layer: int, like: Tensor) -> Tensor:
    """Standard normal noise of the shape of a parameter, which the counters index by (row, column).

    The row is the first axis of the parameter, the column runs over the other axes; a vector is one row.
    """
    stream = BIAS if like.ndim < 2 else WEIGHT
    rows = 1 if like.ndim < 2 else like.shape[0]
    columns = like.numel() // max(rows, 1)
    return normal(key.to(like.device), layer, stream, rows, columns).view(like.shape).to(like.dtype)


def drawn(mean: Tensor, std: Tensor, key: Tensor, layer: int) -> Tensor:
    """mean + std * noise of the draw in `key`, (2,); a `Drawn` tensor if a kernel can draw it when it is used."""
    if _for_kernels(mean):
        return Drawn(mean, std, key, layer)
    normals = noise(key, layer, mean)
    if torch.is_grad_enabled() or any(map(is_of_a_trace, (normals, std, mean))):
        return mean + std * normals
    # the same numbers, in the memory of the noise; `data` counts no changes yet, by which writes of a forward are seen
    return normals.mul_(std).add_(mean).data


def _for_kernels(mean: Tensor) -> bool:
    """Whether to draw this parameter in kernels: on a device that has them, when computing a gradient.

    Kernels save the memory of the weights in the backward pass. A prediction's graph is rewritten as a whole instead
    (`vbdl/compiling/rewrite/fused.py`), and the means of stacked members are mapped, which the kernels do not take.
    """
    return (
        mean.device.type in DEVICES
        and mean.dtype in dispatch.KERNEL_DTYPES
        and mean.ndim > 0
        and torch.is_grad_enabled()
        and not torch.compiler.is_dynamo_compiling()
        and dispatch.only_gradients()
    )


@dataclass
class _Source:
    """The mean, std and counters from which a parameter is drawn."""

    mean: Tensor
    std: Tensor
    key: Tensor
    layer: int
    weights: Tensor | None = None  # after the first call of `Drawn.weights`


class Drawn(Tensor):
    """A parameter that is drawn on first use, with the shape, dtype and device of its mean."""

    source: _Source

    @staticmethod
    def __new__(cls, mean: Tensor, std: Tensor, key: Tensor, layer: int) -> "Drawn":
        self = Tensor._make_wrapper_subclass(cls, mean.shape, dtype=mean.dtype, device=mean.device)  # type: ignore[attr-defined]
        self.source = _Source(mean, std, key.to(mean.device), layer)
        return self

    def weights(self) -> Tensor:
        """The drawn weights, computed once."""
        source = self.source
        if source.weights is None:
            stream = BIAS if source.mean.ndim < 2 else WEIGHT
            source.weights = sample_weights(source.mean, source.std, source.key, source.layer, stream)
        return source.weights

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., object], types: Sequence[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is F.linear and (output := _fused(*args, **kwargs)) is not None:
            return output
        if func in READS and isinstance(args[0], Drawn):
            return func(args[0].source.mean, *args[1:], **kwargs)
        return _with_weights(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., object], types: Sequence[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        return _with_weights(func, args, kwargs or {})


def _with_weights(func: Callable[..., object], args: Arguments, kwargs: Keywords) -> object:
    """Call a function with the weights in place of the `Drawn` tensors among its arguments."""
    weights = functools.partial(tree_map_only, Drawn, Drawn.weights)
    return func(*weights(args), **weights(kwargs))


# properties and methods that are answered from the mean, without drawing the weights
_PROPERTIES = "shape dtype device ndim layout is_cuda is_xpu is_sparse is_nested is_quantized requires_grad".split()
_METHODS = """size dim numel nelement element_size is_floating_point is_complex __len__ new_empty new_zeros new_ones
    new_full new_tensor""".split()
READS = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}
READS |= {torch.numel, torch.is_floating_point, torch.is_complex}


def _fused(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The output of a linear layer whose weights are drawn in the product, or None if the kernel cannot take it."""
    if not isinstance(weight, Drawn) or isinstance(input, Drawn) or weight.ndim != 2 or input.ndim < 1:
        return None
    source = weight.source
    dtypes = {input.dtype, source.mean.dtype, *(() if bias is None else (bias.dtype,))}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(input.device.type):
        return None  # so that torch raises its own error about the dtypes
    bias_mean, bias_std, bias_layer = bias, None, None
    if isinstance(bias, Drawn):
        bias_mean, bias_std, bias_layer = bias.source.mean, bias.source.std, bias.source.layer
    return sampled_linear(
        input, source.mean, source.std, source.key, source.layer, bias_mean, bias_std, bias_layer=bias_layer
    )


# ---- values shared by draws


_shared: contextvars.ContextVar[dict[tuple[str, int], tuple[Tensor, Tensor]] | None] = contextvars.ContextVar(
    "shared", default=None
)


@contextlib.contextmanager
def draws_together() -> Iterator[None]:
    """A context in which `once` computes a value for the first draw, and returns it for the others.

    Parameters must stay as they are inside it, as in a training step, or in an answer.
    """
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def once(what: str, of: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """A value of one parameter that is the same for all draws: computed, and kept for the backward pass, once.

    what: name of the value. of: the parameter. make: computes the value.
    """
    cache = _shared.get()
    if cache is None:
        return make()
    if (what, id(of)) not in cache:
        cache[what, id(of)] = (make(), of)  # holds the parameter, so that its id is not reused
    return cache[what, id(of)][0]
