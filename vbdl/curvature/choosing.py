"""Chooses the parameters of a Laplace approximation (the last layer, some or all) and groups them into factors."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vbdl.calling.adapters import how_to_unfreeze
from vbdl.calling.checks import check_chosen, check_drawn
from vbdl.calling.outputs import pick
from vbdl.calling.stacking import call, places_of
from vbdl.calling.traversing import state_of
from vbdl.curvature.uses import Recorder
from vbdl.nn.embedding import padding_rows
from vbdl.nn.sampled import choose
from vbdl.types import Inputs, Output

STRUCTURES = ("kronecker", "diagonal", "full")
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MOST_BYTES = 2**32  # of one matrix of curvature


@dataclass(frozen=True)
class Group:
    """Parameters whose covariance has one form, "kronecker", "diagonal" or "dense"; parameters of others are
    independent of them.
    """

    kind: str
    parameters: dict[str, Tensor]
    padding: dict[str, int]


def chosen_names(module: nn.Module, parameters: str | Sequence[str | type[nn.Module]]) -> list[str]:
    """The names of the trainable parameters that "last", "all", or a list of names and module types stands for."""
    if parameters == "all":
        return list(choose(module, None, 1.0))
    if parameters == "last":
        layer = last_layer(module)
        named = module.named_parameters()
        chosen = {n: p for n, p in named if n.rpartition(".")[0] == layer and p.requires_grad}
        check_drawn(chosen)
        return list(chosen)
    check_chosen("parameters", parameters)
    return list(choose(module, tuple(parameters), 1.0))


def last_layer(module: nn.Module) -> str:
    """The name of the layer that computes the network's outputs: a linear layer or convolution that can be trained.

    It is the network's own answer (`get_classifier` of timm, `get_output_embeddings` of Hugging Face) or the last that
    was registered; `check_last` compares it with a run. Raises ValueError if there is none.
    """
    layers = {id(m): name for name, m in _linear_layers(module)}
    for method in ("get_classifier", "get_output_embeddings"):
        function = getattr(module, method, None)
        head = function() if callable(function) else None
        if isinstance(head, nn.Module) and id(head) in layers:
            return layers[id(head)]
    if not layers:
        raise ValueError(
            f"the network has no linear layer or convolution with a weight that requires a gradient: name the "
            f"parameters of its last layer, Laplace(net, parameters=[...]), or set requires_grad"
            f"{how_to_unfreeze(module)}"
        )
    return list(layers.values())[-1]


def _linear_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linear layers and convolutions whose weights are parameters that require a gradient, in order."""
    inside = {id(child) for m in module.modules() if isinstance(m, nn.MultiheadAttention) for child in m.children()}
    return [
        (name, m)
        for name, m in module.named_modules()
        if isinstance(m, _LINEAR)
        and id(m) not in inside  # nn.MultiheadAttention never calls its projections
        and m._parameters.get("weight") is not None
        and m.weight.requires_grad
    ]


@contextlib.contextmanager
def curvature_is_known() -> Iterator[None]:
    """A context that says of torch's errors in it that they are about the curvature, and what else there is."""
    try:
        yield
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except (RuntimeError, IndexError) as error:
        raise NotImplementedError(
            f"the curvature of this network is not known, because its layers get rows in a way that Laplace cannot "
            f"follow, such as parts of the batch, or its forward takes gradients itself "
            f"({str(error).splitlines()[0]}): use vbdl.SWAG, vbdl.MCDropout or vbdl.DeepEnsemble"
        ) from error


@torch.no_grad()
def check_last(module: nn.Module, chosen: Sequence[str], x: Inputs, output: Output) -> None:
    """Raise ValueError unless the outputs depend on the chosen layer with no other linear layer after it."""
    state = {name: t.detach() for name, t in state_of(module).items()}
    parameters = dict(module.named_parameters())
    names = {id(state[name]): name for name in parameters}
    with torch.enable_grad(), curvature_is_known(), Recorder(names, 1, cut=True) as recorder:
        outputs = pick(call(module, dict(state), x), output).sum()
    if not outputs.requires_grad:
        return
    ends = [use.output for use in recorder.uses]
    gradients = torch.autograd.grad(outputs, ends, allow_unused=True)
    last = [u.weight for u, g in zip(recorder.uses, gradients, strict=True) if g is not None and u.kind == "linear"]
    if any(name in chosen for name in last):
        return
    layers = [name.rpartition(".")[0] for name in last if name is not None]
    mine = chosen[0].rpartition(".")[0]
    if layers:
        raise ValueError(
            f"layer '{mine}' was taken for the last one, but the outputs are computed by '{layers[-1]}': give "
            f"Laplace(net, parameters=[{layers[-1]!r}]), or parameters='all' for all trainable parameters, such as "
            f"adapters, if that layer is frozen"
        )
    raise ValueError(
        f"layer '{mine}' was taken for the last one, but the outputs do not come from a linear layer: name the "
        f"parameters of the last layer, Laplace(net, parameters=[...])"
    )


def grouped(module: nn.Module, names: Sequence[str], structure: str, joint_bias: bool = True) -> list[Group]:
    """Group parameters into factors.

    "kronecker": the weight and the bias of each nn.Linear and of each convolution without groups; all other
    parameters, such as scales of normalization, embeddings and tied weights, are independent ("diagonal").
    joint_bias: whether a bias is drawn together with its layer's weight; otherwise by a matrix of its own.
    Raises ValueError if a matrix would take more than 4 GB.
    """
    parameters = dict(module.named_parameters())
    padding = {name: row for name, row in padding_rows(module).items() if name in names}
    some = lambda kind, chosen: Group(
        kind, {n: parameters[n].detach() for n in chosen}, {n: padding[n] for n in chosen if n in padding}
    )
    if structure == "full":
        count = sum(parameters[n].numel() for n in names)
        _check_size(count, parameters[names[0]], f"the {count:,} chosen parameters")
        return [some("dense", names)]
    if structure == "diagonal":
        return [some("diagonal", [n]) for n in names]
    places, groups, done = places_of(module), [], set()
    layers = {f"{name}.weight" if name else "weight": m for name, m in _linear_layers(module)}
    for name in names:
        if name in done:
            continue
        layer = layers.get(name)
        plain = isinstance(layer, nn.Linear) or (layer is not None and layer.groups == 1)
        if not plain or len(places[name]) > 1:
            groups.append(some("diagonal", [name]))
            continue
        weight, bias = parameters[name], f"{name.removesuffix('weight')}bias"
        has_bias = bias in names and len(places[bias]) == 1
        _check_size(max(len(weight), weight[0].numel()), weight, f"the layer of '{name}'")
        groups.append(some("kronecker", [name, bias] if has_bias and joint_bias else [name]))
        if has_bias and not joint_bias:
            groups.append(some("dense", [bias]))
        done |= {bias} if has_bias else set()
    return groups


def _check_size(width: int, like: Tensor, what: str) -> None:
    size = width * width * like.element_size()
    if size > _MOST_BYTES:
        raise ValueError(
            f"the curvature of {what} is a matrix of {size / 1e9:.0f} GB: choose structure='diagonal' or, for fewer "
            f"parameters, parameters='last' or structure='kronecker'"
        )
