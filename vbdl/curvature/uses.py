"""A forward pass that records which operations use chosen parameters, with their inputs and outputs.

The parameters are recognized where torch's functions get them, so custom layers are found like those of torch.nn. The
recorded outputs are where backward passes end: the graph of autograd starts at the first chosen layer, and a frozen
backbone before it runs once, without one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vbdl.calling.graphs import FunctionMode
from vbdl.calling.outputs import pick
from vbdl.calling.stacking import call
from vbdl.types import Arguments, Inputs, Keywords, Output, State


@dataclass
class Use:
    """One call of an operation with chosen parameters.

    kind: "linear", "scale" (normalization: output = input * weight + bias) or "embedding".
    shape: of the operation's input.
    weight, bias: the names of the chosen parameters, None where a parameter is not chosen or not there.
    output: the operation's output, from which autograd goes on.
    inputs_at: function that returns the inputs of these rows, (rows, positions, groups, inputs); for an embedding the
        ids, (rows, positions).
    gradients_at: function of a gradient in `output` that returns it as (rows, positions, groups, outputs).
    """

    kind: str
    shape: torch.Size
    weight: str | None
    bias: str | None
    output: Tensor
    inputs_at: Callable[[slice], Tensor]
    gradients_at: Callable[[Tensor], Tensor]
    passed_on: Tensor = field(init=False)  # a copy of the output, which the network may change in place

    def __post_init__(self) -> None:
        self.passed_on = self.output.clone()


@dataclass
class Recorded:
    """The outputs of a network, (batch, ...), and the uses of the chosen parameters behind them."""

    outputs: Tensor
    uses: list[Use]
    elsewhere: set[str] = field(default_factory=set)  # see `parameters_elsewhere`; found if asked for
    leaves: State = field(default_factory=dict)  # parameters by name that autograd differentiates as they are


def record(
    network: nn.Module,
    state: State,
    chosen: Sequence[str],
    inputs: Inputs,
    rows: int,
    output: Output,
    axes: Sequence[int] | None = None,
    find_elsewhere: bool = False,
) -> Recorded:
    """Run the network with these parameters and buffers, and record the uses of the chosen parameters.

    state: all parameters and buffers, detached. rows: of the batch. output: which of the network's outputs to take.
    axes: the axis of the batch in the input of each use, in order; the first unless given.
    find_elsewhere: find which chosen parameters the outputs depend on other than by the uses. The uses are then not
        connected by autograd.
    """
    if find_elsewhere:
        state = {**state, **{name: state[name].detach().requires_grad_() for name in chosen}}
    names = {id(state[name]): name for name in chosen}
    recorder = Recorder(names, rows, axes, cut=find_elsewhere)
    with torch.enable_grad(), recorder:
        outputs = call(network, dict(state), inputs)
    picked = pick(outputs, output)
    if picked.dtype in (torch.bfloat16, torch.float16):
        picked = picked.float()
    elsewhere = parameters_elsewhere(names, [picked, *recorder.others]) if find_elsewhere else set()
    return Recorded(picked, recorder.uses, elsewhere)


def parameters_elsewhere(names: Mapping[int, str], tensors: Sequence[Tensor]) -> set[str]:
    """Find the parameters that these tensors depend on, in autograd's graph; returns their names.

    With the outputs of all uses cut off, these are the parameters of operations without a rule, such as a product, and
    those that are another argument of a use than its weight or bias, such as the input of a layer.
    """
    found = {names[id(t)] for t in tensors if id(t) in names}
    nodes, seen = [t.grad_fn for t in tensors], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = names.get(id(getattr(node, "variable", None)))  # of a node where autograd adds to a leaf
        found |= set() if name is None else {name}
        nodes += [before for before, _ in node.next_functions]
    return found


class Recorder(FunctionMode):
    """A context that records the uses of parameters.

    names: the name of each chosen parameter by its id.
    axes: the axis of the batch in the input of each use, in order; the first unless given.
    cut: whether every recorded output starts a graph of its own, so that only operations without a recorded one behind
        them reach the network's outputs.
    """

    def __init__(self, names: Mapping[int, str], rows: int, axes: Sequence[int] | None = None, cut: bool = False):
        super().__init__()
        self._names, self.rows, self._axes, self._cut = names, rows, axes, cut
        self.uses: list[Use] = []
        self.others: list[Tensor] = []  # the arguments of uses that are not their weight or bias

    def __torch_function__(
        self, func: Callable[..., object], types: Sequence[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (rule := _RULES.get(name)) is not None and (use := rule(self, func, *args, **kwargs)) is not None:
            self.uses.append(use)
            if self._cut:
                self.others += self._without_own(use, [t for t in tree_leaves([args, kwargs]) if isinstance(t, Tensor)])
            return use.passed_on
        return func(*args, **kwargs)

    def _without_own(self, use: Use, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The arguments of a use without its weight and bias; one that is also its input occurs once more."""
        own = [name for name in (use.weight, use.bias) if name is not None]
        rest = []
        for t in reversed(tensors):  # the input comes first
            if (name := self.name(t)) in own:
                own.remove(name)
            else:
                rest.append(t)
        return rest

    def name(self, parameter: Tensor | None) -> str | None:
        """The name of a chosen parameter, or None for any other tensor."""
        return None if parameter is None else self._names.get(id(parameter))

    def started(self, output: Tensor) -> Tensor:
        """The output of an operation, from which a graph of autograd goes on or starts."""
        return output.detach().requires_grad_() if self._cut or not output.requires_grad else output

    def by_row(self, values: Tensor, batch_axis: int) -> Tensor:
        """(rows, positions, features) of values with the features last."""
        return values.movedim(batch_axis, 0).reshape(self.rows, -1, values.shape[-1])

    def batch_axis(self) -> int:
        """The axis of the batch in the input of the next use."""
        number = len(self.uses)
        return self._axes[number] if self._axes is not None and number < len(self._axes) else 0


def _linear(
    recorder: Recorder, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Use | None:
    names = recorder.name(weight), recorder.name(bias)
    if names == (None, None) or weight.ndim != 2:
        return None
    output, at, axis = recorder.started(func(input, weight, bias)), input.detach(), recorder.batch_axis()
    return Use(
        "linear",
        input.shape,
        *names,
        output,
        lambda rows: recorder.by_row(at, axis)[rows].unsqueeze(2),
        lambda gradient: recorder.by_row(gradient, axis).unsqueeze(2),
    )


def _convolution(
    recorder: Recorder,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Use | None:
    names = recorder.name(weight), recorder.name(bias)
    if names == (None, None):
        return None
    count = recorder.rows
    if input.ndim != weight.ndim or input.shape[0] % count:
        return None
    output = recorder.started(func(input, weight, bias, stride, padding, dilation, groups))
    at, sizes = input.detach(), weight.shape[2:]

    def patches(rows: slice) -> Tensor:
        some = at.unflatten(0, (count, -1))[rows]  # a row may have several images, such as the frames of a film
        return (
            _patches(some.flatten(0, 1), sizes, stride, padding, dilation, groups)
            .unflatten(0, (len(some), -1))
            .flatten(1, 2)
        )

    def gradients(gradient: Tensor) -> Tensor:
        last = gradient.flatten(2).mT.reshape(count, -1, gradient.shape[1])  # (rows, positions, channels)
        return last.unflatten(-1, (groups, -1))

    return Use("linear", input.shape, *names, output, patches, gradients)


def _patches(
    x: Tensor,
    sizes: Sequence[int],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    """The inputs of a convolution at each position, (rows, positions, groups, channels of a group * kernel)."""
    axes = len(sizes)
    each = lambda value: [value] * axes if isinstance(value, int) else list(value) * (axes if len(value) == 1 else 1)
    strides, dilations = each(stride), each(dilation)
    reach = [d * (k - 1) for k, d in zip(sizes, dilations, strict=True)]
    if isinstance(padding, str):
        sides = [(r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reach]
    else:
        sides = [(p, p) for p in each(padding)]
    x = F.pad(x, [p for side in reversed(sides) for p in side])
    for axis in range(axes):
        x = x.unfold(2 + axis, reach[axis] + 1, strides[axis])[..., :: dilations[axis]]
    x = x.unflatten(1, (groups, -1))  # (rows, groups, channels, *positions, *kernel)
    order = [0, *range(3, 3 + axes), 1, 2, *range(3 + axes, 3 + 2 * axes)]
    count = math.prod(x.shape[3 : 3 + axes])
    return x.permute(order).reshape(x.shape[0], count, groups, -1)


def _normalization(channels_last: bool, at: Callable[..., "_Plain"]) -> Callable[..., Use | None]:
    """The rule of a normalization with a scale and a shift; at: the call without them, and with its weight and bias."""

    def rule(recorder: Recorder, func: Callable, *args, **kwargs) -> Use | None:
        plain, weight, bias = at(func, *args, **kwargs)
        names = recorder.name(weight), recorder.name(bias)
        if names == (None, None) or weight is None:
            return None
        output, input, normalized = recorder.started(func(*args, **kwargs)), args[0], plain().detach()
        features, axis = weight.ndim if channels_last else 1, recorder.batch_axis()

        def last(values: Tensor) -> Tensor:
            if not channels_last:
                at_positions = values.flatten(2).mT if values.ndim > 2 else values
                return at_positions.reshape(recorder.rows, -1, values.shape[1])  # a row may have several images
            return recorder.by_row(values.flatten(-features), axis)

        assert isinstance(input, Tensor)
        return Use(
            "scale",
            input.shape,
            *names,
            output,
            lambda rows: last(normalized)[rows].unsqueeze(2),
            lambda gradient: last(gradient).unsqueeze(2),
        )

    return rule


_Plain = tuple[Callable[[], Tensor], Tensor | None, Tensor | None]  # the call without weight and bias, and these two


def _layer_norm(func, input, normalized_shape, weight=None, bias=None, eps=1e-5) -> _Plain:
    return lambda: func(input, normalized_shape, None, None, eps), weight, bias


def _rms_norm(func, input, normalized_shape, weight=None, eps=None) -> _Plain:
    return lambda: func(input, normalized_shape, None, eps), weight, None


def _group_norm(func, input, num_groups, weight=None, bias=None, eps=1e-5) -> _Plain:
    return lambda: func(input, num_groups, None, None, eps), weight, bias


def _batch_norm(
    func, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> _Plain:
    return lambda: func(input, running_mean, running_var, None, None, training, momentum, eps), weight, bias


def _embedding(
    recorder: Recorder, func: Callable, input: Tensor, weight: Tensor, *args: object, **kwargs: object
) -> Use | None:
    name = recorder.name(weight)
    if name is None:
        return None
    output = recorder.started(func(input, weight, *args, **kwargs))
    axis = recorder.batch_axis()
    ids = lambda: input.movedim(axis, 0).reshape(recorder.rows, -1)  # only of tables that have an id for each row
    padding = kwargs.get("padding_idx", args[0] if args else None)

    def gradients(gradient: Tensor) -> Tensor:
        by_row = recorder.by_row(gradient, axis).unsqueeze(2)
        if padding is None:
            return by_row
        return by_row * (ids() != int(padding) % len(weight))[..., None, None]  # type: ignore[call-overload]

    return Use("embedding", input.shape, name, None, output, lambda rows: ids()[rows], gradients)


_RULES: dict[str, Callable[..., Use | None]] = {
    "linear": _linear,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "layer_norm": _normalization(True, _layer_norm),
    "rms_norm": _normalization(True, _rms_norm),
    "group_norm": _normalization(False, _group_norm),
    "batch_norm": _normalization(False, _batch_norm),
    "embedding": _embedding,
}
