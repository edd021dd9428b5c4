"""The choice between the two ways to run draws: as a traced graph, or with the network as it is.

The choice follows from the network and its graph alone, so that it is the same in every process, except where the two
are too close to tell: then they are timed.
"""

from collections.abc import Collection

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from vbdl.compiling.graph import BODY, DRAWN, Cut, name_of
from vbdl.compiling.rewrite import draws_outputs
from vbdl.engine.plan import Plan
from vbdl.engine.settings import PredictorSettings
from vbdl.model import Model
from vbdl.nn.keyed import KeyedNetwork

GRAPH, PLAIN, MEASURE = "graph", "plain", "measure"

_FLOPS = 2e10  # floating-point operations of a core in a second, in products of some size
_CACHE = 2**24  # bytes; at 10 MiB a draw the graph is as fast as the network as it is, at 40 MiB half as fast
_LARGE = 1e-4  # seconds; an operation that takes longer gains little by being mapped or compiled


def before_tracing(model: Model, settings: PredictorSettings, own: Collection[str]) -> tuple[str, str]:
    """PLAIN, with the reason, if there is no need to trace the model; GRAPH otherwise.

    own: the names of a draw's entries.
    """
    if isinstance(model.network, KeyedNetwork) and model.network.reads_values:
        return PLAIN, "the network reads numbers that differ between draws (an `if` on a tensor, .item(), NumPy)"
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.network.modules())
    whole = model.device.type == "cpu" and settings.autocast is None  # as `vbdl.nn.recurrent_layer` runs them
    if recurrent and not whole and not settings.keeps_bits:
        return PLAIN, "torch's own recurrent layers run a sequence faster than a graph of its steps"
    if whole and not settings.keeps_bits and model.posterior.n_draws != 1 and _convolution_bytes(model, own) > _CACHE:
        return PLAIN, "a draw's convolutions have more weights than a cache holds, and read them once in any way"
    return GRAPH, ""


def _convolution_bytes(model: Model, own: Collection[str]) -> int:
    """The bytes of a draw's weights in convolutions."""
    layers = ((name, m.weight) for name, m in model.network.named_modules() if isinstance(m, _ConvNd))
    return sum(w.numel() * w.itemsize for name, w in layers if f"network.{name}.weight" in own)


def after_tracing(cut: Cut, plan: Plan, drawn: Collection[str], settings: PredictorSettings) -> tuple[str, str]:
    """GRAPH, PLAIN or MEASURE, with the reason, for a traced graph.

    drawn: names of the placeholders that differ between draws.
    """
    if settings.keeps_bits or not _on_cpu(cut) or draws_outputs(plan.reasons):
        return GRAPH, ""
    if plan.strategy == "loop" and plan.n_samples > 1:
        return MEASURE, "the draws run one after the other"
    compiles = settings.compile is not False
    nodes = cut.regions[BODY].nodes
    count = sum(1 for n in nodes if name_of(n)) or 1
    large = plan.body_flops / count > _LARGE * _FLOPS
    if _convolves_drawn_weights(cut, drawn):
        if compiles:
            return MEASURE, "convolutions have weights that differ between draws"
        if large:
            return PLAIN, "large convolutions whose weights differ between draws run one draw after the other on a CPU"
    if large and compiles:
        return MEASURE, "the operations are large"
    return GRAPH, ""


def _on_cpu(cut: Cut) -> bool:
    values = [n.meta.get("val") for n in cut.regions[BODY].nodes]
    return all(v.device.type == "cpu" for v in values if isinstance(v, torch.Tensor))


def _convolves_drawn_weights(cut: Cut, drawn: Collection[str]) -> bool:
    """Whether a convolution in the body has weights that differ between draws."""
    drawn = {*drawn, *cut.regions[DRAWN].outputs}

    def from_draw(node: fx.Node) -> bool:
        reshapes = ("view", "reshape", "_unsafe_view", "clone", "permute", "squeeze", "select")
        while node.name not in drawn and name_of(node) in reshapes:
            node = node.all_input_nodes[0]
        return node.name in drawn

    found = (n for n in cut.regions[BODY].nodes if n.target is torch.ops.aten.convolution.default)
    return any(isinstance(n.args[1], fx.Node) and from_draw(n.args[1]) for n in found)
