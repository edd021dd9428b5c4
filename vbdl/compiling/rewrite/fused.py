"""The rewrite to the kernels of `vbdl_kernels` on an accelerator, which draw the same values with less memory traffic.

    ensemble_mlp, bayesian_mlp      a small network in one kernel, which reads or draws its weights (`networks.py`)
    sampled_linear                  a linear layer whose weights are drawn inside its product and never stored
    local_reparameterized_linear    both products of the local reparameterization from one read of the input
    masked_linear                   dropout of an input that all draws share, with masks drawn inside the next product
    sample_weights                  a parameter's noise, scale and shift in one pass, for weights that are stored

`vbdl_kernels.regime` decides which kernel a layer gets, by its constants or by measurements on the device.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from vbdl_kernels import regime
from vbdl_kernels.philox import BIAS, DROPOUT, WEIGHT

from vbdl.compiling.rewrite.linear import add_bias, arguments, is_linear
from vbdl.compiling.rewrite.local import drawn_by, local_linear
from vbdl.compiling.rewrite.networks import source_of, whole_network

_aten, _ops = torch.ops.aten, torch.ops.vbdl
DEVICES = ("cuda", "xpu")  # devices with kernels; on others the operators run reference code, which saves nothing
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WORDS = {
    "ensemble_mlp": "small networks run in one kernel, their weights read there",
    "bayesian_mlp": "small networks run in one kernel, their weights drawn there",
    "sampled_linear": "linear layers draw their weights inside the product",
    "local_reparameterized_linear": "layers that draw their outputs do so in one kernel",
    "masked_linear": "linear layers make the masks of their input inside the product",
    "sample_weights": "parameters are drawn in one pass",
}


def fuse(traced: fx.GraphModule, *, n_samples: int, budget: int) -> list[str]:
    """Rewrite the nodes that run on an accelerator, in place, and return a sentence on each choice.

    n_samples: the number of all draws. budget: bytes for values that are kept of all draws.
    """
    graph, count = traced.graph, dict.fromkeys(_WORDS, 0)
    for node in list(graph.nodes):
        if not is_linear(node) or not _on_accelerator(node.args[0]):
            continue
        if kernel := whole_network(graph, node, n_samples, budget):
            count[kernel] += 1
    for node in list(graph.nodes):
        if is_linear(node) and _on_accelerator(node.args[0]):
            if _fused(graph, node, n_samples, budget):
                count["sampled_linear"] += 1
            elif _masked(graph, node, n_samples):
                count["masked_linear"] += 1
        elif node.target is local_linear and _on_accelerator(node.args[2]) and _local(graph, node):
            count["local_reparameterized_linear"] += 1
    for node in list(graph.nodes):
        if node.target is _aten.add.Tensor and _on_accelerator(node) and _sampled(graph, node):
            count["sample_weights"] += 1
    if not any(count.values()):
        return []
    graph.eliminate_dead_code()
    traced.recompile()
    return [f"{n} {_WORDS[name]} ({name})" for name, n in count.items() if n]


def _fused(graph: fx.Graph, node: fx.Node, n_samples: int, budget: int) -> bool:
    """Replace a linear layer with drawn weights by `sampled_linear` if estimated to be fastest; True if done."""
    x, weight, bias, stacked = arguments(node)
    drawn = drawn_by(weight)
    if drawn is None or drawn.stream != WEIGHT or x.meta["val"].dtype not in _DTYPES:
        return False
    value = x.meta["val"]
    outputs, inputs = drawn.mean.meta["val"].shape
    rows = (value[0] if stacked[0] else value).numel() // inputs
    if not _is_fastest(n_samples, rows, inputs, outputs, value.dtype.itemsize, not stacked[0], budget):
        return False
    drawn_bias = None if bias is None else drawn_by(bias)
    if drawn_bias is not None and (drawn_bias.stream != BIAS or source_of(drawn_bias.key) is not source_of(drawn.key)):
        drawn_bias = None
    with graph.inserting_before(node):
        flat = (value.shape[0], rows, inputs) if stacked[0] else (rows, inputs)
        x = graph.call_function(_aten.reshape.default, (x, flat))
        tensors = [drawn.mean, drawn.std, *((drawn_bias.mean, drawn_bias.std) if drawn_bias else (None, None))]
        cast = [None if t is None else _cast(graph, t, value.dtype) for t in tensors]
        layer = drawn_bias.layer if drawn_bias else drawn.layer
        y = graph.call_function(_ops.sampled_linear.default, (x, *cast, drawn.key, drawn.layer, "", layer))
        y = graph.call_function(_aten.reshape.default, (y, tuple(node.meta["val"].shape)))
        if bias is not None and drawn_bias is None:
            y = add_bias(graph, y, bias, stacked[2], axes=node.meta["val"].ndim - 2)
    _replace(graph, node, y)
    return True


def _is_fastest(n_samples: int, rows: int, inputs: int, outputs: int, size: int, shared: bool, budget: int) -> bool:
    """True if `sampled_linear` is estimated to be faster than a product with kept weights.

    Also true if the weights of all draws do not fit into the budget: the operator draws them inside its product, or a
    few at a time before it. size: bytes of a number. shared: all draws have the same input.
    """
    if n_samples * inputs * outputs * size > budget:
        return True
    exact = regime.is_exact(size)
    choice = regime.choose(
        n_samples, rows, inputs, outputs, size, shared=shared, memory_budget=budget, kept=True, exact=exact
    )
    return choice == "fused"


def _masked(graph: fx.Graph, node: fx.Node, n_samples: int) -> bool:
    """Replace dropout of an input that all draws share, and the layer after it, by `masked_linear`; True if done."""
    x, weight, bias, stacked = arguments(node)
    if stacked != [True, False, False] or x.target is not _aten.mul.Tensor or len(x.users) != 1:
        return False
    for source, mask in (x.args, x.args[::-1]):
        if _is_tensor(source) and _is_tensor(mask) and (dropout := _mask_of(mask)) is not None:
            break
    else:
        return False
    key, layer, p = dropout
    shape, value = _value(x).shape, _value(source)
    if value.ndim != 2 or tuple(_value(mask).shape) != (shape[0], 1, shape[2]) or value.dtype not in _DTYPES:
        return False
    if _value(weight).dtype != value.dtype or (bias is not None and _value(bias).dtype != value.dtype):
        return False
    (rows, inputs), outputs, size = value.shape, _value(weight).shape[0], value.dtype.itemsize
    times = regime.of_masks(n_samples, rows, inputs, outputs, size, exact=regime.is_exact(size))
    if times["masked"] >= times["activations"]:
        return False
    with graph.inserting_before(node):
        y = graph.call_function(_ops.masked_linear.default, (source, weight, bias, key, layer, p, "input", ""))
    _replace(graph, node, y)
    return True


def _mask_of(node: Any) -> tuple[fx.Node, int, float] | None:
    """The (key, layer, rate) of a dropout mask, if a node is keep_mask / (1 - rate) of each draw; otherwise None."""
    if node.target is not _aten.mul.Tensor or not isinstance(node.args[1], float):
        return None
    inner, scale = node.args
    while getattr(inner, "target", None) in (_aten._to_copy.default, _aten.view.default):
        inner = inner.args[0]
    if getattr(inner, "target", None) is _ops.keep.default:  # on a CPU
        words, threshold = inner, inner.args[5]
    elif getattr(inner, "target", None) is _aten.ge.Scalar and inner.args[0].target is _ops.words.default:
        words, threshold = inner.args
    else:
        return None
    if tuple(words.args[2:4]) != (DROPOUT, 1):
        return None
    p = threshold / 2**32
    return (words.args[0], words.args[1], p) if p < 1 and abs(scale * (1 - p) - 1) < 1e-6 else None


def _local(graph: fx.Graph, node: fx.Node) -> bool:
    """Replace a local reparameterization, and a constant bias added after it, by one kernel; True if done."""
    x, mean, std, bias_mean, bias_std, key, layer = node.args
    dtype, outputs = _value(x).dtype, _value(std).shape[0]
    if dtype not in _DTYPES or mean is None:
        return False
    last, user = node, next(iter(node.users), node)
    added = user.args[1] if user.target is _aten.add.Tensor and user.args[0] is node else None
    if bias_mean is None and len(node.users) == 1 and _is_tensor(added) and tuple(_value(added).shape) == (outputs,):
        last, bias_mean = user, added
    with graph.inserting_before(last):
        cast = [None if t is None else _cast(graph, t, dtype) for t in (mean, std, bias_mean, bias_std)]
        y = graph.call_function(_ops.local_reparameterized_linear.default, (x, *cast, key, layer, ""))
    _replace(graph, last, y)
    if last is not node:
        graph.erase_node(node)
    return True


def _sampled(graph: fx.Graph, node: fx.Node) -> bool:
    """Replace mean + std * normal by `sample_weights`; True if done."""
    if (drawn := drawn_by(node)) is None:
        return False
    mean, std = _value(drawn.mean), _value(drawn.std)
    if mean.dtype != std.dtype or mean.dtype != _value(node).dtype or mean.dtype not in _DTYPES:
        return False
    with graph.inserting_before(node):
        args = (drawn.mean, drawn.std, drawn.key, drawn.layer, drawn.stream)
        weights = graph.call_function(_ops.sample_weights.default, args)
    _replace(graph, node, weights)
    return True


def _on_accelerator(node: object) -> bool:
    return _is_tensor(node) and _value(node).device.type in DEVICES


def _is_tensor(node: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def _value(node: Any) -> Tensor:
    return node.meta["val"]


def _cast(graph: fx.Graph, node: Any, dtype: torch.dtype) -> Any:
    if _value(node).dtype == dtype:
        return node
    return graph.call_function(_aten._to_copy.default, (node,), {"dtype": dtype})


def _replace(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
