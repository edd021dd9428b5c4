"""A traced graph run with moments in place of random values."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

# the rules enter themselves
from vbdl.engine.moments import activation, arithmetic, linear, normalization, pooling, shape, sources  # noqa: F401
from vbdl.engine.moments.value import RULES, is_random

_SOURCES = {"words": sources.words, "normal": sources.normal}


def dependent(graph: fx.Graph, names: Iterable[str]) -> set[fx.Node]:
    """Nodes that depend on these placeholders, themselves among them."""
    names, found = set(names), set()
    for node in graph.nodes:
        if node.name in names or any(used in found for used in node.all_input_nodes):
            found.add(node)
    return found


def run(module: fx.GraphModule, nodes: Iterable[fx.Node], values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    """The values of these nodes, in order, given those of the nodes they need."""
    found = dict(values)
    for node in nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            found[node] = getattr(module, str(node.target))
        elif node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: found[n])
            found[node] = _call(node, args, kwargs)
    return found


def _call(node: fx.Node, args: tuple, kwargs: dict) -> Any:
    target: Any = node.target
    if getattr(target, "namespace", "") == "vbdl" and target._opname in _SOURCES:
        return _SOURCES[target._opname](*args, **kwargs)
    if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
        raise ValueError(f"the module calls {target} in prediction, which draws from torch's generator")
    if target is operator.getitem or not is_random([*args, *kwargs.values()]):
        return target(*args, **kwargs)
    name = target._opname
    if name == "ge":
        _used_once(node)
    if name not in RULES:
        raise ValueError(f"moment propagation has no rule for {target} of a random value: use estimator='sampling'")
    return RULES[name](*args, **kwargs)


def _used_once(mask: fx.Node) -> None:
    """Rules take their arguments to be independent: a mask that enters a formula twice is not (alpha dropout)."""
    node = mask
    while len(node.users) == 1:
        node = next(iter(node.users))
        if getattr(node.target, "_opname", "") not in ("view", "_to_copy", "unsqueeze", "expand", "reshape"):
            return
    raise ValueError(
        "one dropout mask enters the result in two places, as in alpha dropout, and moment propagation takes its "
        "values to be independent: use estimator='sampling'"
    )
