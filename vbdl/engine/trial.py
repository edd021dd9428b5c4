"""The trial run: one draw of a network runs before tracing, to check that it accepts the rows and does not mix them."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from vbdl.calling.copies import kept_by
from vbdl.calling.inputs import Flat, another_row
from vbdl.calling.outputs import are_same
from vbdl.calling.stacking import call
from vbdl.calling.traversing import buffers_of, modules_of
from vbdl.nn.keyed import KeyedNetwork
from vbdl.types import Arguments, Keywords, State

# relative to the largest output: more is never rounding, and less always may be; between them it is so many times what
# outputs change by when weights do by a few roundings
_APART, _ROUNDING, _TIMES = 1e-2, 1e-5, 16.0
_QUANTIZED = 0.1  # the same for quantized layers, which scale a batch by its largest value, and so mix its rows
_COARSE = (torch.bfloat16, torch.float16)


def try_out(model: nn.Module, state: State, tile: Flat, apart: bool = True, reads: bool = False) -> Tensor:
    """Run a draw on the tile, check that it draws nothing random, and return its outputs.

    apart: also check by `check_apart` that it keeps rows apart; otherwise only where the call left a trace, in its
    inputs or in an attribute of a module. reads: whether it is clear that the network writes, draws and keeps nothing.
    """
    versions = [t._version for t in tile.tensors]
    if reads:
        outputs = run_plainly(model, state, tile)
        if apart or versions != [t._version for t in tile.tensors]:
            check_apart(outputs, model, state, tile)
        return outputs
    before, kept = torch.get_rng_state(), kept_by(model)
    python, numpy = _python_state(), _numpy_state()
    outputs = run_plainly(model, state, tile)
    if python != _python_state() and _calls_python_random(lambda: run_plainly(model, state, tile)):
        raise _of_other_generator("Python's random")
    # another thread may draw meanwhile, but hardly in each of three runs
    if numpy != _numpy_state() and all(_draws_by_numpy(lambda: run_plainly(model, state, tile)) for _ in range(2)):
        raise _of_other_generator("NumPy's random numbers")
    if not torch.equal(before, torch.get_rng_state()):  # by this network, or by another thread
        with _Draws() as draws:
            run_plainly(model, state, tile)
        if draws.seen:
            torch.set_rng_state(before)
            raise draws_by_itself("draws")
    if apart or versions != [t._version for t in tile.tensors] or kept != kept_by(model):
        check_apart(outputs, model, state, tile)
    return outputs


def _python_state() -> tuple[object, ...]:
    """What Python's global generator has drawn: the place in its words, and a kept normal number."""
    _, words, normal = random.getstate()
    return words[-1], normal


def _numpy_state() -> tuple[object, ...]:
    """What NumPy's global generator has drawn."""
    state: Any = np.random.get_state(legacy=False)
    words = state["state"]
    return (words["pos"], state["has_gauss"], state["gauss"]) if "pos" in words else (repr(state),)


def _calls_python_random(run: Callable[[], object]) -> bool:
    """Whether a function draws from Python's global generator in this thread."""
    generator, seen = getattr(random.random, "__self__", None), []

    def profile(frame: FrameType, event: str, function: object) -> None:
        owner = frame.f_locals.get("self") if event == "call" else getattr(function, "__self__", None)
        if owner is generator:
            seen.append(event)

    if sys.getprofile() is not None:  # of somebody who looks at this process, and who would lose it
        before = _python_state()
        run()
        return before != _python_state()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return bool(seen)


def _draws_by_numpy(run: Callable[[], object]) -> bool:
    """Whether NumPy's global generator is drawn from while a function runs, by whatever thread."""
    before = _numpy_state()
    run()
    return before != _numpy_state()


def _of_other_generator(which: str) -> ValueError:
    """The error for a module that draws from a generator that is not torch's; which: its name in words."""
    return ValueError(
        f"in prediction the module draws from {which}, which ignores the predictor's seed: draw with torch, and wrap "
        f"the module in vbdl.Stochastic, or draw nothing in evaluation mode"
    )


class _Draws(TorchDispatchMode):
    """A context that sees whether this thread calls an operation that draws from torch's own generator.

    Operations with dropout that is off, as fused attention in prediction, do not draw.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        if torch.Tag.nondeterministic_seeded in func.tags:
            of = {argument.name: argument.default_value for argument in func._schema.arguments}
            given = {**of, **dict(zip(of, args, strict=False)), **(kwargs or {})}
            idle = any(given.get(n, 1) == 0 for n in ("p", "dropout", "dropout_p", "train", "training"))
            self.seen |= not idle and given.get("generator") is None
        return func(*args, **(kwargs or {}))


def draws_by_itself(what: str) -> NotImplementedError:
    """The error for a module that draws from torch's generator. what: "draws", or a phrase that ends with it."""
    return NotImplementedError(
        f"in prediction the module {what} from torch's generator and ignores the predictor's seed. Wrap the module in "
        f"vbdl.Stochastic, which draws a network's own noise, or in vbdl.MCDropout if it is dropout, or remove the call"
    )


def run_plainly(network: nn.Module, state: State, tile: Flat) -> Tensor:
    """Run the network on the tile with the parameters and buffers `state`, and return its outputs, (rows, ...).

    Raises ValueError if the number of output rows differs from the tile's or batch normalization mixes rows; torch's
    own error, if the network cannot take the tile, is not caught.
    """
    if any(isinstance(m, _BatchNorm) and m.running_mean is None for _, m in modules_of(network)):
        raise _mixing()
    buffers = buffers_of(network)  # cloned, because a forward pass may write to them
    outputs = call(network, {n: t.clone() if n in buffers else t for n, t in state.items()}, tile.nested)
    rows = tile.rows
    if outputs.shape[0] != rows:
        raise ValueError(
            f"the module returned {outputs.shape[0]} rows for a batch of {rows}: the batch is the first axis of "
            f"every input and of the output (batch_first=True in recurrent layers and attention)"
        )
    return outputs


def check_apart(outputs: Tensor, network: nn.Module, state: State, tile: Flat) -> None:
    """Raise ValueError if the output of a row changes when the other rows do, or if the inputs are written to.

    outputs: the network's outputs on the tile, (rows, ...). A row's place must not count either, unless its noise is
    numbered by places.
    """
    made_up = all(torch.equal(t, t[:1].expand_as(t)) for t in tile.tensors)  # there is no other row of the user's
    for in_places in (True,) if _numbers_places(network) else (False, True):
        try:
            if _stay_the_same(outputs, network, state, tile, in_places, made_up):
                return
            break
        except Exception:  # of the user's network: rows may have an order, such as falling lengths, and sums, or ids
            if in_places and not made_up:
                raise
    else:
        return  # it takes no row but this one, so far
    copies = tile.map(Tensor.clone)
    before = [t._version for t in copies.tensors]
    again = run_plainly(network, state, copies)
    if [t._version for t in copies.tensors] != before:
        raise ValueError(
            "the module writes into its inputs (x -= ..., x.div_(...)), so the next draw would read changed rows: "
            "write x = x - ... where it normalizes them"
        )
    if not are_same(again, outputs, _APART):
        raise ValueError(
            "the same rows give another output in the next call: the network keeps a tensor in an attribute. Make it a "
            "buffer with register_buffer(name, tensor), so that each draw has its own"
        )
    raise _mixing()


def _stay_the_same(
    outputs: Tensor, network: nn.Module, state: State, tile: Flat, in_places: bool, made_up: bool
) -> bool:
    """Whether rows have their outputs in tiles with other rows too; in_places, made_up: as of `_changed`."""
    for changed, at, of in _changed(tile, in_places, made_up):
        found, expected = run_plainly(network, state, changed)[at], outputs[of]
        if not are_same(found, expected, _ROUNDING) and not are_same(
            found, expected, _largest(network, state, tile, outputs)
        ):
            return False
    return True


def _largest(network: nn.Module, state: State, tile: Flat, outputs: Tensor) -> float:
    """How far outputs go when every weight is rounded a little otherwise, relative to the largest of them."""
    if any(".quantized" in type(m).__module__ for m in network.modules()):
        return _QUANTIZED
    if outputs.device.type != "cpu":  # products may round to the ten bits of TF32, in one kernel and not in another
        return _APART
    if getattr(network, "precision", None) in _COARSE or any(t.dtype in _COARSE for t in state.values()):
        return _APART
    nudged = run_plainly(network, {name: _nudged(t) for name, t in state.items()}, tile)
    scale = float(outputs.abs().nan_to_num(posinf=0.0).amax()) if outputs.numel() else 0.0
    far = float((nudged - outputs).abs().nan_to_num(0.0, posinf=0.0).amax()) if outputs.numel() else 0.0
    return min(_APART, max(_ROUNDING, _TIMES * far / scale if scale else 0.0))


def _nudged(t: Tensor) -> Tensor:
    """A tensor whose numbers are changed by a few roundings of float32, each by another factor."""
    if not t.is_floating_point() or t.layout != torch.strided:
        return t
    return t * (1 + 2**-22 * torch.arange(t.numel(), device=t.device).sin().view(t.shape)).to(t.dtype)


def _numbers_places(network: nn.Module) -> bool:
    """Whether rows at other places have other noise in the same draw."""
    return any(isinstance(m, KeyedNetwork) and m.numbers_places for _, m in modules_of(network))


def _changed(tile: Flat, in_places: bool, made_up: bool) -> Iterator[tuple[Flat, list[int], list[int]]]:
    """Yield tiles with some rows of the given one among others, the places of these rows, and those in the given one.

    First the first row comes last, and all others are made up, so that neither an earlier nor a later row is one of the
    tile's; a row alone is put between two others. in_places: every row stays in its place; of two rows one changes at a
    time. made_up: other rows are made up then too, instead of rows of the tile, which the network surely takes.
    """
    n = tile.rows
    first = lambda t: another_row(t[:1]) if made_up else t[:1]
    last = lambda t: another_row(another_row(t[:1])) if made_up else t[-1:]
    filled = lambda rows, a, b: torch.cat([a, b]).repeat(-(-rows // 2), *[1] * (a.ndim - 1))[:rows]
    if n == 1 and in_places:
        yield tile.map(lambda t: torch.cat([t, first(t)])), [0], [0]
    elif n == 1:
        yield tile.map(lambda t: torch.cat([first(t), t, last(t)])), [1], [0]
    elif not in_places:
        others = lambda t: filled(n - 1, another_row(t[-1:]), another_row(another_row(t[:1])))
        yield tile.map(lambda t: torch.cat([others(t), t[:1]])), [-1], [0]
    elif n == 2:
        yield tile.map(lambda t: torch.cat([t[:1], first(t)])), [0], [0]
        yield tile.map(lambda t: torch.cat([last(t), t[1:]])), [1], [1]
    else:
        yield tile.map(lambda t: torch.cat([t[:1], filled(n - 2, first(t), last(t)), t[-1:]])), [0, -1], [0, -1]


def _mixing() -> ValueError:
    """The error for a network that mixes the rows of a batch."""
    return ValueError(
        "the output of a row depends on the other rows of its batch, or on its place among them, so a row has no "
        "prediction of its own: make the batch the first axis of every input (batch_first=True in recurrent layers and "
        "attention; positions are those of another axis), and give batch normalization track_running_stats=True"
    )
