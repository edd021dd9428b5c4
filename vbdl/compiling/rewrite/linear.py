"""Linear layers as single operations of the traced graph, so that rewrites can recognize them.

Under vmap, torch traces a linear layer as views, expansions and one of several products, depending on which of its
arguments are stacked. Here it stays one `stacked_linear` until all rewrites are done, and is then lowered to the
product that is fastest for its shapes.
"""

import functools
import math
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.autograd import forward_ad

from vbdl.calling.autograd import holds_tangent, innermost_is_forward_mode
from vbdl.calling.graphs import FunctionMode
from vbdl.nn.gaussian.operators import LOWERED


@torch.library.custom_op("vbdl::stacked_linear", mutates_args=())
def stacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, stacked: list[bool]) -> Tensor:
    """A linear layer for all samples: y[s, ..., o] = sum_i x[(s), ..., i] weight[(s), o, i] + bias[(s), o].

    stacked: for each of x, weight and bias, whether it has the leading samples axis s.
    """
    return lower(x, weight, bias, stacked)


@stacked_linear.register_fake
def _(x, weight, bias, stacked):
    lead = x.shape[:-1] if stacked[0] or not any(stacked) else (_samples(x, weight, bias, stacked), *x.shape[:-1])
    return x.new_empty((*lead, weight.shape[-2]))


@stacked_linear.register_vmap
def _(info, in_dims, x, weight, bias, stacked):
    mapped = list(zip((x, weight, bias), in_dims[:3], strict=True))
    if any(stacked):  # a vmap inside the module, within that over draws: one after the other
        size = next(t.shape[d] for t, d in mapped if d is not None)
        each = [[None if t is None else t if d is None else t.select(d, i) for t, d in mapped] for i in range(size)]
        return torch.stack([lower(x, w, b, stacked) for x, w, b in each]), 0  # type: ignore[arg-type]
    first = [t if not d else t.movedim(d, 0) for t, d in mapped]
    return stacked_linear(*first, [d is not None for d in in_dims[:3]]), 0


LINEAR = torch.ops.vbdl.stacked_linear.default


def _samples(x, weight, bias, stacked) -> int:
    return next(t.shape[0] for t, s in zip((x, weight, bias), stacked, strict=True) if s)


def lower(x: Tensor, weight: Tensor, bias: Tensor | None, stacked: list[bool]) -> Tensor:
    """`stacked_linear` in plain operations: one product if the weights are shared, otherwise mostly a batched one."""
    xs, ws, bs = stacked
    lead = x.shape[:1] if xs and ws else ()
    flat = x.reshape(*lead, math.prod(x.shape[len(lead) : -1]), x.shape[-1])
    rows, out = flat.shape[-2], weight.shape[-2]
    if not ws:
        y = _product(flat, weight).reshape(*x.shape[:-1], out)
        if bias is None:
            return y
        return y + (spread(bias, y.ndim - 2 if xs else y.ndim - 1) if bs else bias)
    samples = weight.shape[0]
    if weight.numel() * rows <= _TINY:
        # a plain sum, which Inductor fuses with the operations around it, is faster than a library's product
        kernels = weight.mT.contiguous()
        y = ((flat if xs else flat.unsqueeze(0)).unsqueeze(-1) * kernels.unsqueeze(1)).sum(-2)
    elif not xs and _as_one_matrix(samples, rows, out, flat):
        wide = weight.reshape(samples * out, -1)  # layers side by side are one matrix
        y = _product(flat, wide)
        y = y.mT.view(samples, out, rows).mT if _across(flat, wide) else y.view(rows, samples, out).transpose(0, 1)
    elif rows == 1 and flat.device.type == "cpu" and weight.numel() * weight.itemsize >= _STREAMED:
        y = _vector_products(flat if xs else flat.expand(samples, *flat.shape), weight)
    else:
        if xs and x.ndim == 3 and _across(flat, weight):
            # the layout that the product before returns, so that the transpositions between the two cancel (loops.py)
            flat = flat.mT.contiguous().mT
        y = _product(flat if xs else flat.expand(samples, *flat.shape), weight)
    y = y.reshape(samples, *x.shape[1 if xs else 0 : -1], out)
    if bias is None:
        return y
    return y + (spread(bias, y.ndim - 2) if bs else bias)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T: (..., rows, inputs), (..., outputs, inputs) -> (..., rows, outputs).

    With many rows, weight @ x^T is computed instead, and transposed: that is as fast for wide layers, several times
    faster for narrow ones, and a row's sum does not depend on its place (`tests/rewrite/test_linear.py`).
    """
    return torch.matmul(weight, x.mT).mT if _across(x, weight) else torch.matmul(x, weight.mT)


def _across(x: Tensor, weight: Tensor) -> bool:
    """True if rows are the columns of the product: with many rows, or with 16 bits on a CPU.

    There, weights in their own layout are read up to twice as fast. Columns that do not fill the last vector cost up to
    0.9 of the product (31 rows of 192 inputs, AVX-512), so the outputs are the columns if they fill it better.
    """
    if _is_half_on_cpu(x):
        return True
    rows, outputs = x.shape[-2], weight.shape[-2]
    return rows >= _ACROSS and rows % _LANES * outputs <= outputs % _LANES * rows


def _is_half_on_cpu(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu"


def _as_one_matrix(samples: int, rows: int, out: int, x: Tensor) -> bool:
    """True if the layers of all samples on the same x are faster as one wide product than as a batched product."""
    if _is_half_on_cpu(x):  # a batched product copies x for every sample
        return rows > 1 or out <= _NARROW
    return samples * out <= _WIDE or (rows >= _ACROSS and out <= _NARROW)


def _vector_products(x: Tensor, weight: Tensor) -> Tensor:
    """`_product` of one row and weights that no cache holds, as `baddbmm`.

    Inductor compiles `bmm` to a loop that reads one row of a matrix at a time; the library's product is faster.
    """
    zero = weight.new_zeros(())
    if _is_half_on_cpu(x):
        return torch.baddbmm(zero.expand(*weight.shape[:-1], 1), weight, x.mT, beta=0).mT
    return torch.baddbmm(zero.expand(weight.shape[0], 1, weight.shape[1]), x, weight.mT, beta=0)


_ACROSS = 16  # rows; from this many on, rows are the columns of the product
_LANES = 16  # numbers in a vector of AVX-512
_TINY = 2**16  # multiplications; up to this many take less time than a library call
_WIDE = 4096  # outputs of all samples; above, a batched product is as fast as one wide one
_NARROW = 64  # outputs of a layer; up to this many, a batched product is slower than one wide one
_STREAMED = 2**23  # bytes of weights; from this many on, the caches of a core do not hold them


def spread(bias: Tensor, axes: int) -> Tensor:
    """Insert `axes` axes of length 1 into a bias: (samples, outputs) -> (samples, 1, ..., outputs)."""
    return bias.view(bias.shape[0], *[1] * axes, bias.shape[-1])


class WholeLinears(FunctionMode):
    """A torch function mode in which every call of `F.linear` is traced as one `stacked_linear`.

    Also those inside `F.multi_head_attention_forward`, which torch hands to a mode as one call. There, vmap would copy
    the weights for every token, because the batch is not the first axis.

    `as_strided` of a tensor that is not contiguous raises RuntimeError: its numbers lie elsewhere than outside of the
    trace, because vmap puts samples beside channels in a convolution, and lowering changes layouts.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "").startswith("as_strided"):
            _check_contiguous(*args, **(kwargs or {}))
        if func is F.linear:
            return _whole(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            with self:
                return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _check_contiguous(input: Tensor, *args: Any, **kwargs: Any) -> None:
    step = 1
    for size, stride in zip(reversed(input.shape), reversed(input.stride()), strict=True):
        if size != 1 and stride != step:
            raise RuntimeError("as_strided reads the memory of a tensor that is not contiguous")
        step *= size


def _attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Run torch's own code of attention without its check for torch function modes, so that its layers reach them.

    It calls the functions of `torch.nn.functional` of this moment, of which a user may have replaced some.
    """
    own = F.multi_head_attention_forward
    lines = types.FunctionType(
        own.__code__, {**vars(F), "has_torch_function": lambda _: False}, argdefs=own.__defaults__
    )
    return lines(*args, **kwargs)


def _whole(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.ndim != 2 or not input.is_floating_point():
        return F.linear(input, weight, bias)
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if innermost_is_forward_mode():
        return _with_tangent(input, weight, bias)
    if any(t is not None and holds_tangent(t) for t in (input, weight, bias)):
        return F.linear(input, weight, bias)  # a network's own vmap in forward mode, or its own dual numbers
    return torch.ops.vbdl.stacked_linear(input, weight, bias, [False, False, False])


def _with_tangent(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer in a forward-mode product, as a `stacked_linear` of values and one for each tangent.

    The operator itself has no forward-mode rule, because torch offers none for its own operators: it would lose the
    tangents without a word.
    """
    (x, dx), (w, dw) = forward_ad.unpack_dual(input), forward_ad.unpack_dual(weight)
    b, db = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    plain = functools.partial(torch.ops.vbdl.stacked_linear, stacked=[False, False, False])
    y = plain(x, w, b)
    parts = [] if dx is None else [plain(dx, w, None)]
    if dw is not None:
        parts.append(plain(x, dw, db))
    elif db is not None:
        parts.append(db.expand_as(y))
    return y if not parts else forward_ad.make_dual(y, sum(parts[1:], parts[0]))


def is_linear(node: fx.Node) -> bool:
    """True if a node calls `stacked_linear`."""
    return node.op == "call_function" and node.target is LINEAR


def arguments(linear: fx.Node) -> tuple[Any, Any, Any, list[bool]]:
    """The arguments of a linear layer: x, weight, bias (or None), and which of them are stacked."""
    return linear.args  # type: ignore[return-value]


def add_bias(graph: fx.Graph, y: fx.Node, bias: fx.Node, stacked: bool, axes: int) -> fx.Node:
    """Add a bias to y, (samples, ..., outputs), with `axes` axes between.

    bias: (samples, outputs) if stacked, else (outputs,).
    """
    bias = graph.call_function(spread, (bias, axes)) if stacked else bias
    return graph.call_function(torch.ops.aten.add.Tensor, (y, bias))


def free_layout(traced: fx.GraphModule) -> None:
    """Make a graph independent of memory layouts, in place, because lowering may change those that were traced.

    Views become reshapes, and operations that need a contiguous tensor get a contiguous copy.
    """
    for node in traced.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.reshape
        elif node.target in _DENSE_ONLY and node.args[0].op != "placeholder":
            with traced.graph.inserting_before(node):
                node.update_arg(0, traced.graph.call_function(torch.clone, (node.args[0],), {"memory_format": _DENSE}))
    traced.recompile()


_DENSE = torch.contiguous_format
# operations that depend on memory layout; `tests/rewrite/test_linear.py` tries torch's layers to find others
_DENSE_ONLY = {
    torch.ops.aten.as_strided.default,
    torch.ops.aten.native_group_norm.default,
    torch.ops.aten.view_as_complex.default,
    torch.ops.aten.view.dtype,
}
DECOMPOSITIONS = {LINEAR: lower, **LOWERED}
