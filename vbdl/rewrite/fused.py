"""On an accelerator, what is drawn is drawn by the kernels of `vbdl_kernels`: the same draws, less memory traffic.

    sampled_linear                  a linear layer whose weights exist only inside its product
    sample_weights                  a parameter's noise, scale and shift in one pass, where the weights are wanted
    local_reparameterised_linear    both products of the local reparameterisation from one read of the input

Which one a layer gets is decided by `vbdl_kernels.regime`: by its constants, or by what was measured on the device.
"""

from typing import Any

import torch
from torch import Tensor, fx
from vbdl_kernels import regime
from vbdl_kernels.philox import BIAS, WEIGHT

from vbdl.rewrite.linear import add_bias, arguments, is_linear
from vbdl.rewrite.local import Normal, drawn_by, local_linear

_aten, _ops = torch.ops.aten, torch.ops.vbdl
DEVICES = ("cuda", "xpu")  # where the operators are kernels; elsewhere they run their references, which save nothing
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fuse(traced: fx.GraphModule, *, n_samples: int, budget: int) -> list[str]:
    """Rewrite in place what runs on an accelerator; returns a sentence on each choice.

    n_samples: all draws, budget: bytes for what is kept of them, which decide whether weights would be kept.
    """
    count = {"sampled_linear": 0, "local_reparameterised_linear": 0, "sample_weights": 0}
    for node in list(traced.graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.device.type not in DEVICES:
            continue
        if is_linear(node) and _fused(traced.graph, node, n_samples, budget):
            count["sampled_linear"] += 1
        elif node.target is local_linear and _local(traced.graph, node):
            count["local_reparameterised_linear"] += 1
    for node in list(traced.graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.device.type in DEVICES and _sampled(traced.graph, node):
            count["sample_weights"] += 1
    if not any(count.values()):
        return []
    traced.graph.eliminate_dead_code()
    traced.recompile()
    words = {
        "sampled_linear": "linear layers draw their weights inside the product",
        "local_reparameterised_linear": "layers that draw their outputs do so in one kernel",
        "sample_weights": "parameters are drawn in one pass",
    }
    return [f"{n} {words[name]} ({name})" for name, n in count.items() if n]


def _fused(graph: fx.Graph, node: fx.Node, n_samples: int, budget: int) -> bool:
    """A linear layer with drawn weights, as `sampled_linear` where that is estimated to be fastest."""
    x, weight, bias, stacked = arguments(node)
    found = drawn_by(weight)
    if found is None or found.stream != WEIGHT or x.meta["val"].dtype not in _DTYPES:
        return False
    value = x.meta["val"]
    outputs, inputs = found.mean.meta["val"].shape
    rows = (value[0] if stacked[0] else value).numel() // inputs
    if not _is_fastest(n_samples, rows, inputs, outputs, value.dtype.itemsize, not stacked[0], budget):
        return False
    own = None if bias is None else drawn_by(bias)
    if own is not None and (own.stream != BIAS or _source(own.key) is not _source(found.key)):
        own = None
    with graph.inserting_before(node):
        flat = (value.shape[0], rows, inputs) if stacked[0] else (rows, inputs)
        x = graph.call_function(_aten.reshape.default, (x, flat))
        tensors = [found.mean, found.std, *(_as(own) if own else (None, None))]
        cast = [None if t is None else _cast(graph, t, value.dtype) for t in tensors]
        layer = own.layer if own else found.layer
        y = graph.call_function(_ops.sampled_linear.default, (x, *cast, found.key, found.layer, "", layer))
        y = graph.call_function(_aten.reshape.default, (y, tuple(node.meta["val"].shape)))
        if bias is not None and own is None:
            y = add_bias(graph, y, bias, stacked[2], axes=node.meta["val"].ndim - 2)
    _replace(graph, node, y)
    return True


def _is_fastest(n_samples: int, rows: int, inputs: int, outputs: int, size: int, shared: bool, budget: int) -> bool:
    """Against weights that are kept where all draws' fit the budget, and drawn again for every tile where not."""
    if n_samples * inputs * outputs * size > budget:
        return regime.choose(n_samples, rows, inputs, outputs, size, shared=shared, memory_budget=budget) == "fused"
    found = regime.estimates(n_samples, rows, inputs, outputs, size, shared)
    return found["fused"] < found["drawn"]


def _local(graph: fx.Graph, node: fx.Node) -> bool:
    """The local reparameterisation in one kernel."""
    x, mean, std, bias_mean, bias_std, key, layer = node.args
    dtype = _value(x).dtype
    if dtype not in _DTYPES:
        return False
    with graph.inserting_before(node):
        cast = [None if t is None else _cast(graph, t, dtype) for t in (mean, std, bias_mean, bias_std)]
        y = graph.call_function(_ops.local_reparameterised_linear.default, (x, *cast, key, layer, ""))
    _replace(graph, node, y)
    return True


def _sampled(graph: fx.Graph, node: fx.Node) -> bool:
    """mean + std * normal, as `sample_weights`."""
    if node.target is not _aten.add.Tensor or (found := drawn_by(node)) is None:
        return False
    mean, std = _value(found.mean), _value(found.std)
    if mean.dtype != std.dtype or mean.dtype != _value(node).dtype or mean.dtype not in _DTYPES:
        return False
    with graph.inserting_before(node):
        drawn = (found.mean, found.std, found.key, found.layer, found.stream)
        weights = graph.call_function(_ops.sample_weights.default, drawn)
    _replace(graph, node, weights)
    return True


def _source(key: fx.Node) -> fx.Node:
    """The key itself: every layer's noise has a view of it of its own."""
    while key.op == "call_function" and len(key.all_input_nodes) == 1:
        inner, name = key.all_input_nodes[0], getattr(key.target, "_opname", "")
        same = _value(inner).shape == _value(key).shape
        if name == "permute":
            same = list(key.args[1]) == sorted(key.args[1])  # type: ignore[arg-type]
        if not same or name not in ("alias", "detach", "view", "permute", "clone", "_to_copy"):
            break
        key = inner
    return key


def _as(own: Normal) -> tuple[Any, Any]:
    return own.mean, own.std


def _value(node: Any) -> Tensor:
    return node.meta["val"]


def _cast(graph: fx.Graph, node: Any, dtype: torch.dtype) -> Any:
    if _value(node).dtype == dtype:
        return node
    return graph.call_function(_aten._to_copy.default, (node,), {"dtype": dtype})


def _replace(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    graph.erase_node(node)
