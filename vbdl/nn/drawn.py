"""Weights of a mean-field network that are drawn where they are used, on devices that have kernels for it.

In training a network of drawn weights takes `Drawn` tensors in the place of its parameters. A linear layer that meets
one is `vbdl_kernels.sampled_linear`: its weights exist inside the product only, and its backward pass draws the noise
again. Whatever else meets one sees the weights, drawn in one pass, of which the noise is not kept either. The draws
are those of plain operations, by the same counters.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from vbdl_kernels import dispatch, normal, sample_weights, sampled_linear
from vbdl_kernels.philox import BIAS, WEIGHT

DEVICES = ("cuda", "xpu")  # where the operators are kernels


def noise(key: Tensor, layer: int, like: Tensor) -> Tensor:
    """Standard normals of one parameter: row = its first axis, column = the others, flat; a vector is one row."""
    stream = BIAS if like.ndim < 2 else WEIGHT
    rows = 1 if like.ndim < 2 else like.shape[0]
    columns = like.numel() // max(rows, 1)
    return normal(key.to(like.device), layer, stream, rows, columns).view(like.shape).to(like.dtype)


def drawn(mean: Tensor, std: Tensor, key: Tensor, layer: int) -> Tensor:
    """mean + std * noise of the draw in `key`, (2,); where a kernel can draw it, only once it is used."""
    if _for_kernels(mean):
        return Drawn(mean, std, key, layer)
    return mean + std * noise(key, layer, mean)


def _for_kernels(mean: Tensor) -> bool:
    """On a device with kernels and for a gradient, which they save the memory of. A prediction's graph is rewritten
    as a whole (`vbdl/compiling/rewrite/fused.py`), and members of an ensemble have means of their own, mapped."""
    return (
        mean.device.type in DEVICES
        and mean.dtype in dispatch.KERNEL_DTYPES
        and mean.ndim > 0
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and dispatch.only_gradients()
    )


@dataclass
class _Source:
    """What a parameter is drawn from."""

    mean: Tensor
    std: Tensor
    key: Tensor
    layer: int
    weights: Tensor | None = None  # once something has asked for them


class Drawn(Tensor):
    """A parameter that is not there yet. It has the shape, dtype and device of its mean."""

    source: _Source

    @staticmethod
    def __new__(cls, mean: Tensor, std: Tensor, key: Tensor, layer: int) -> "Drawn":
        self = Tensor._make_wrapper_subclass(cls, mean.shape, dtype=mean.dtype, device=mean.device)  # type: ignore[attr-defined]
        self.source = _Source(mean, std, key.to(mean.device), layer)
        return self

    def weights(self) -> Tensor:
        """The draw itself, made once."""
        own = self.source
        if own.weights is None:
            stream = BIAS if own.mean.ndim < 2 else WEIGHT
            own.weights = sample_weights(own.mean, own.std, own.key, own.layer, stream)
        return own.weights

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and (found := _fused(*args, **kwargs)) is not None:
            return found
        if func in _ABOUT and isinstance(args[0], Drawn):
            return func(args[0].source.mean, *args[1:], **kwargs)
        args, kwargs = tree_map_only(Drawn, Drawn.weights, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Drawn, Drawn.weights, (args, kwargs or {}))
        return func(*args, **kwargs)


# what is known of the weights without drawing them
_PROPERTIES = "shape dtype device ndim layout is_cuda is_xpu is_sparse is_nested is_quantized requires_grad".split()
_METHODS = """size dim numel nelement element_size is_floating_point is_complex __len__ new_empty new_zeros new_ones
    new_full new_tensor""".split()
_ABOUT = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}
_ABOUT |= {torch.numel, torch.is_floating_point, torch.is_complex}


def _fused(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The layer with its weights drawn in the product; None where the kernel does not take it."""
    if not isinstance(weight, Drawn) or isinstance(input, Drawn) or weight.ndim != 2 or input.ndim < 1:
        return None
    own = weight.source
    dtypes = {input.dtype, own.mean.dtype, *(() if bias is None else (bias.dtype,))}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(input.device.type):
        return None  # torch says what does not fit
    bias_mean, bias_std, bias_layer = bias, None, None
    if isinstance(bias, Drawn):
        bias_mean, bias_std, bias_layer = bias.source.mean, bias.source.std, bias.source.layer
    return sampled_linear(input, own.mean, own.std, own.key, own.layer, bias_mean, bias_std, bias_layer=bias_layer)


# ---- what the draws of one step share


_shared: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar("shared", default=None)


@contextlib.contextmanager
def draws_of_one_step() -> Iterator[None]:
    """Inside, `once` computes a value for the first draw and hands it to the others."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def once(what: str, of: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """A value that no draw changes, of one parameter: kept once for the backward pass and not for every draw."""
    cache = _shared.get()
    if cache is None:
        return make()
    if (what, id(of)) not in cache:
        cache[what, id(of)] = (make(), of)  # which keeps the parameter, and so its id
    return cache[what, id(of)][0]
