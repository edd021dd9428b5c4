"""The matrix products of a traced graph, by MKL or by oneDNN, whichever is faster on this processor.

torch multiplies float32 matrices by MKL, which uses AVX-512 on Intel's processors alone. oneDNN, which torch has for
convolutions, uses it on any: on an AMD EPYC products of 256 by 256 by 256 take half the time.
"""

import functools
import math
from pathlib import Path

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import register_flop_formula

from vbdl.compiling.graph import flops_of

aten = torch.ops.aten
# Operations of a product. For fewer, calling oneDNN takes what it saves; it copies a first factor that is transposed.
_FEWEST, _FEWEST_TRANSPOSED = 5e6, 1e7
_NARROWEST = 32  # the least number of rows, columns and terms of a product

_library = torch.library.Library("vbdl", "FRAGMENT")  # in the plain way: torch.library.custom_op takes 0.1 ms of a call
_library.define("product(Tensor a, Tensor b, Tensor? bias=None) -> Tensor")
product = torch.ops.vbdl.product.default
"""a @ b + bias, of matrices or of stacks of them, by oneDNN."""


@torch.library.impl(_library, "product", "CPU")
def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    if a.ndim == 2:
        bias = None if bias is None else bias.contiguous()  # it is read as one dense vector, whatever its strides
        return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), bias, "none", [], "")
    return torch.stack([_product(x, y) for x, y in zip(a.unbind(0), b.unbind(0), strict=True)])


@torch.library.register_fake("vbdl::product", lib=_library)
def _shape(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.has_bias = inputs[2] is not None


def _backward(ctx, gradient):
    a, b = ctx.saved_tensors
    return gradient @ b.mT, a.mT @ gradient, gradient.sum(0) if ctx.has_bias else None


torch.library.register_autograd("vbdl::product", _backward, setup_context=_setup, lib=_library)


@register_flop_formula(torch.ops.vbdl.product)  # type: ignore[misc]
def _flops(a, b, bias=None, out_shape=None, **_) -> int:
    return 2 * math.prod(a) * b[-1]


def faster_products(graph: fx.GraphModule) -> None:
    """Replace the products of a traced graph that oneDNN computes faster than MKL on this processor."""
    if not _pays():
        return
    for node in list(graph.graph.nodes):
        if (factors := _factors(node)) is None or not _is_faster(node, *factors[:2]):
            continue
        with graph.graph.inserting_before(node):
            faster = graph.graph.call_function(product, factors)
        faster.meta = dict(node.meta)
        node.replace_all_uses_with(faster)
        graph.graph.erase_node(node)
    graph.recompile()


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """The factors of a product and the bias that is added to its rows; None of any other node."""
    if node.kwargs:
        return None
    match node.target, node.args:
        case ((aten.mm.default | aten.bmm.default), (fx.Node() as a, fx.Node() as b)):
            return a, b, None
        case aten.addmm.default, (fx.Node() as bias, fx.Node() as a, fx.Node() as b):
            return (a, b, bias) if bias.meta["val"].shape == node.meta["val"].shape[-1:] else None
    return None


def _is_faster(node: fx.Node, a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    if x.device.type != "cpu" or x.dtype != torch.float32 or min(*x.shape[-2:], y.shape[-1]) < _NARROWEST:
        return False
    copies = 1 if x.ndim == 2 else x.shape[0]
    return flops_of(node) >= copies * (_FEWEST if x.is_contiguous() else _FEWEST_TRANSPOSED)


@functools.cache
def _pays() -> bool:
    """Whether torch's own products leave instructions unused that the processor has and oneDNN uses."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("vendor_id") and "GenuineIntel" not in line for line in lines)
