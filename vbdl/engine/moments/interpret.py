"""The interpreter of traced graphs: runs them with moments in place of random values."""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from vbdl.compiling.graph import draws_from_generator, name_of, operator_of

# importing these modules enters their rules into RULES
from vbdl.engine.moments import (  # noqa: F401
    activation,
    arithmetic,
    derivative,
    linear,
    normalization,
    pooling,
    shape,
    sources,
)
from vbdl.engine.moments.value import RULES, is_random

_SOURCES: dict[str, Callable[..., object]] = {
    "words": sources.words,
    "keep": sources.keep,
    "normal": sources.normal,
    "kronecker_noise": sources.kronecker_noise,
    "dense_noise": sources.dense_noise,
    "low_rank_noise": sources.low_rank_noise,
}


Values = dict[fx.Node, Any]  # of a graph: tensors, Moments, Uniform, and lists and numbers of torch's


def dependent(graph: fx.Graph, names: Iterable[str]) -> set[fx.Node]:
    """The placeholders with these names and all nodes that depend on them."""
    names, nodes = set(names), set()
    for node in graph.nodes:
        if node.name in names or any(used in nodes for used in node.all_input_nodes):
            nodes.add(node)
    return nodes


def run(module: fx.GraphModule, nodes: Iterable[fx.Node], values: Mapping[fx.Node, object]) -> Values:
    """Run these nodes in order, and return their values and the given ones.

    values: the values of the nodes that they need, tensors or Moments.
    """
    results: Values = dict(values)
    for node in nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            results[node] = getattr(module, str(node.target))
        elif node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: results[n])
            results[node] = _call(node, args, kwargs)
    return results


def _call(node: fx.Node, args: tuple, kwargs: dict) -> object:
    """Run one operation: by its rule if an argument is random, as it is otherwise."""
    target: Any = node.target
    operation = operator_of(node)
    if operation is not None and operation.namespace == "vbdl" and name_of(node) in _SOURCES:
        if name_of(node) == "keep":
            _used_once(node)
        return _SOURCES[name_of(node)](*args, **kwargs)
    if draws_from_generator(node):
        raise ValueError(
            f"the module calls {target} in prediction, which draws from torch's generator and ignores the predictor's "
            f"seed: remove the call"
        )
    if target is operator.getitem or not is_random([*args, *kwargs.values()]):
        return target(*args, **kwargs)
    name = name_of(node)
    if name == "ge":
        _used_once(node)
    if name not in RULES:
        raise ValueError(f"moment propagation has no rule for {target} of a random value: use estimator='sampling'")
    return RULES[name](*args, **kwargs)


def _used_once(mask: fx.Node) -> None:
    """Raise ValueError if a mask is used in two places, as in alpha dropout: rules assume independent arguments."""
    node = mask
    while len(node.users) == 1:
        node = next(iter(node.users))
        if name_of(node) not in ("view", "_to_copy", "unsqueeze", "expand", "reshape"):
            return
    raise ValueError(
        "one dropout mask enters the result in two places, as in alpha dropout, but moment propagation assumes "
        "independent values: use estimator='sampling'"
    )
