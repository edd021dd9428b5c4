"""Networks that draw in their own forward, as a pure function of a key."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vbdl.calling.copies import copied
from vbdl.calling.inputs import another_row, map_inputs, tensors
from vbdl.calling.outputs import all_same, leaves
from vbdl.calling.stacking import call, is_of_a_trace
from vbdl.calling.traversing import buffers_of, parameters_of
from vbdl.nn.keyed import KeyedNetwork
from vbdl.nn.local_noise import (
    CHECKED,
    LARGE,
    Linear,
    Linears,
    LocalLayer,
    OwnOutputs,
    Pass,
    are_as_found,
    local_layers,
    only_normal,
)
from vbdl.nn.masks import Site, UnknownCall, batch_axis, described, dropping, with_batch_axes
from vbdl.nn.noise import Known, Noise, RandomCall
from vbdl.nn.random_calls import CounterNoise, without_checks_of_values
from vbdl.nn.value_reads import Followed
from vbdl.types import Inputs, State

_T = TypeVar("_T")
_ROUNDING = 1e-6  # relative to the largest output: two runs of the same operations
_APART = 1e-3  # relative to the largest output: above rounding errors, below the effect of other noise
_FIRST_OF_KL = 1 << 20  # number in the counters of the first random call of the KL


class StochasticNetwork(KeyedNetwork):
    """A network whose random calls are drawn from the key.

    In training each element of the noise is drawn; in prediction rows share noise as `locate` found.

    kl: function of the network that returns its KL in nats; n_data: number of training rows, by which it is divided.
    noisy: names of the modules that are in training mode in prediction, with all modules inside them.
    per_row: one draw for each row in noise that has a batch axis.
    """

    draws_weights = True
    keeps_on_purpose = (*KeyedNetwork.keeps_on_purpose, "recorded", "_example", "_of_draws")
    kl_weight: Tensor
    # not part of the architecture: running the network finds them again
    found_by_running = (
        "calls",
        "sites",
        "written",
        "local",
        "recorded",
        "reads_values",
        "_found",
        "_others",
        "_example",
        "_of_draws",
    )

    def __init__(
        self,
        inner: nn.Module,
        kl: Callable[[nn.Module], Tensor] | None,
        n_data: int | None,
        noisy: tuple[str, ...],
        per_row: bool,
    ):
        super().__init__()
        self.inner, self.n_data, self.noisy, self.per_row = inner, n_data, noisy, per_row
        self._kl = (kl,)  # in a tuple, because a module would become a part of this one
        self.calls: tuple[RandomCall, ...] | None = None
        self.sites: tuple[Site, ...] | None = None
        self.local: tuple[LocalLayer, ...] = ()  # the layers that draw their outputs in this network as it is
        self._example: Inputs | None = None  # the row that `locate` ran on
        self._of_draws: dict[tuple[int, ...], Known] = {}  # by key, the calls of draws that make others than the first
        self._found: tuple[Tensor, dict[Hashable, Tensor]] | None = None  # a key, and its noise
        self._others: Pass | None = None  # the forward of the draw in `_found` on the first row between two others
        self.recorded: list[Pass] | None = None  # what each forward does is added to this list, if there is one
        self.written: tuple[str, ...] = ()  # buffers that the forward draws or writes into
        device = next((t.device for t in (*inner.parameters(), *inner.buffers())), None)
        self.register_buffer("kl_weight", torch.ones((), device=device))
        self.register_buffer("key", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)
        self.train(inner.training)

    @property
    def numbers_places(self) -> bool:  # type: ignore[override]
        return self.per_row

    @property
    def kl(self) -> Callable[[nn.Module], Tensor] | None:
        """The function of the network that returns its KL in nats."""
        return self._kl[0]

    def train(self, mode: bool = True) -> "StochasticNetwork":
        super().train(mode)
        if not mode:
            for name, module in self.inner.named_modules():
                module.training = any(not n or name == n or name.startswith(f"{n}.") for n in self.noisy)
        return self

    def forward(self, *args, **kwargs):
        if self.training:
            with without_checks_of_values(), CounterNoise(Noise(self.key, self.inner, training=True)) as drawn:
                return drawn.returned(self.inner(*args, **kwargs))
        inputs = kwargs if kwargs else args
        if self.recorded is not None:
            self.recorded.append(self._pass(self.key, inputs))
            return self.recorded[-1].outputs
        return self._with_calls(self.key, lambda known: self._drawn(inputs, known))

    def _drawn(self, inputs: Inputs, known: Known | None) -> Any:
        """Run the network under the draw in `key`, in which it makes these calls."""
        local = self.local if known is None or known.calls is self.calls else ()  # found in the calls of the first draw
        numbers = {number for layer in local for number in layer.noises}
        drawn_outputs = OwnOutputs(self.key, local) if local else None
        with self.noise(self.key, dict.fromkeys(numbers, 0.0), linears=drawn_outputs, known=known) as noise:
            outputs = noise.masks.returned(call(self.inner, self._buffers_of_draw(), inputs))
        noise.check_all_made()
        return outputs

    # -- calls that depend on the draw, as where noise decides whether a layer runs

    @property
    def _known(self) -> Known | None:
        """The calls of the draw that `locate` ran; None before it."""
        return None if self.calls is None or self.sites is None else Known(self.calls, self.sites)

    def _with_calls(self, key: Tensor, run: Callable[[Known | None], _T]) -> _T:
        """Run a draw with the calls that it makes: those of the first draw or, if they do not fit, its own.

        run: runs the network with these calls known. Raises UnknownCall if the calls depend on the rows too.
        """
        known = self._known
        if known is None or key.ndim > 1 or is_of_a_trace(key):
            return run(known and Known(known.calls, known.sites, strict=False))
        name = tuple(key.tolist()) if self._of_draws else ()
        try:
            return run(self._of_draws.get(name, known))
        except UnknownCall:
            if self.kept is not None:
                self.kept.clear()  # noise that was made for other calls
            self._of_draws[tuple(key.tolist())] = own = self.calls_of(key)
            return run(own)

    @torch.no_grad()
    def calls_of(self, key: Tensor) -> Known:
        """The calls that a draw makes for the row that `locate` ran on."""
        assert self._example is not None
        here = map_inputs(lambda t: t.to(key.device), self._example)
        two, three = (self._run(_repeated(here, rows), {}, key=key)[1] for rows in (2, 3))
        return _placed(two, three, strict=False)

    @contextlib.contextmanager
    def noise(
        self,
        key: Tensor,
        constants: Mapping[int, float] | None = None,
        kept: dict[Hashable, Tensor] | None = None,
        linears: TorchFunctionMode | None = None,
        known: Known | None = None,
    ) -> Iterator[Noise]:
        """A context in which random functions give the noise of the draw in `key`, (2,) int64.

        constants, kept, known: as of `Noise`. linears: as of `CounterNoise`.
        """
        kept = self.kept if kept is None else kept
        noise = Noise(key, self.inner, known, per_row=self.per_row, kept=kept, constants=constants)
        with without_checks_of_values(), CounterNoise(noise, linears):
            yield noise

    @property
    def _of_local(self) -> set[int]:
        """The numbers of the random calls whose noise is in the outputs of layers."""
        return {number for layer in self.local for number in layer.noises}

    @property
    def takes_many_keys(self) -> bool:
        if not self.local or dropping(self.sites or ()):
            return False
        return self._of_local == set(range(len(self.calls or ())))

    @torch.no_grad()
    def local_layers(
        self, key: Tensor, inputs: Inputs, rows: int, drawn: Pass, others: Pass
    ) -> tuple[LocalLayer, ...] | None:
        """The layers that can draw their outputs in place of their weights; None if it is not clear.

        drawn: the forward of the draw in `key` on the inputs, of so many rows. others: on other rows.
        """
        if self.calls is None or self.per_row or self._of_draws:
            return None
        try:
            return self._local_layers(self.calls, key, inputs, rows, drawn, others)
        except UnknownCall:  # noise decides which calls are made
            return None

    def _local_layers(
        self, calls: tuple[RandomCall, ...], key: Tensor, inputs: Inputs, rows: int, drawn: Pass, others: Pass
    ) -> tuple[LocalLayer, ...] | None:
        weights = [number for number, c in enumerate(calls) if c.axis is None and len(c.shape)]
        at_zero, at_large = (self._pass(key, inputs, dict.fromkeys(weights, value)) for value in (0.0, LARGE))
        layers = local_layers(drawn, at_zero, at_large, others, rows)
        if layers:
            if not only_normal(calls):
                return None
            for value in CHECKED:
                if not are_as_found(layers, at_zero, self._pass(key, inputs, dict.fromkeys(weights, value)), value):
                    return None
            # the noise of a layer's weight must not enter the output in another way
            given = {layer.call: drawn.linears[layer.call] for layer in layers}
            noises = {number: LARGE / 256 for layer in layers for number in layer.noises}
            if not all_same(drawn.outputs, self._pass(key, inputs, noises, given).outputs, _APART):
                return None
        return layers

    def _pass(
        self,
        key: Tensor,
        inputs: Inputs,
        constants: Mapping[int, float] | None = None,
        given: Mapping[int, Linear] | None = None,
    ) -> Pass:
        """Run the network under the draw in `key`, with what it did; given: weights of linear layers to use."""

        def run(known: Known | None) -> Pass:
            linears = Linears(given)
            with self.noise(key, constants, linears=linears, known=known) as noise:
                noise.normals, noise.followed = {}, Followed()
                outputs = noise.masks.returned(call(self.inner, self._buffers_of_draw(), inputs))
            noise.check_all_made()
            if noise.followed is not None and noise.followed.read:
                self.reads_values = True
            return Pass(linears.calls, outputs, noise.calls, noise.normals)

        return self._with_calls(key, run)

    def _buffers_of_draw(self) -> State:
        """Copies of the buffers that the forward writes into, which `vmap` maps like the key."""
        if not self.written:
            return {}
        buffers = buffers_of(self.inner)
        return {n: self._as_the_key(buffers[n]) for n in self.written}

    def _as_the_key(self, buffer: Tensor) -> Tensor:
        copy = self.key.new_zeros(buffer.shape, dtype=buffer.dtype, device=buffer.device)
        return copy.copy_(buffer.detach())

    def regularization(self, key: Tensor) -> Tensor | None:
        """The KL term in the loss of a row, in nats, or None without `kl`."""
        if self.kl is None or self.n_data is None:
            return None
        with without_checks_of_values(), CounterNoise(Noise(key, self.inner, training=True, first=_FIRST_OF_KL)):
            kl = self.kl(self.inner)
        if not isinstance(kl, Tensor) or kl.numel() != 1:
            shape = f"a tensor {tuple(kl.shape)}" if isinstance(kl, Tensor) else type(kl).__name__
            raise TypeError(f"kl must return the KL of the network in nats as a tensor of one number, got {shape}")
        return self.kl_weight * kl.reshape(()) / self.n_data

    def adopt(self, other: KeyedNetwork) -> None:
        assert isinstance(other, StochasticNetwork)
        self.calls, self.sites, self.written = other.calls, other.sites, other.written
        self._example, self._of_draws = other._example, {}

    def found(self, key: Tensor) -> tuple[dict[Hashable, Tensor], Pass | None]:
        """Return what `locate` found in the draw of this key, and forget it; ({}, None) if it drew another.

        That is the noise, and the forward of the first row between two others if its outputs do not depend on them.
        """
        found, others = self._found, self._others
        self._found = self._others = None
        return ({}, None) if found is None or not torch.equal(found[0], key) else (found[1], others)

    # -- what running the network tells

    @torch.no_grad()
    def locate(self, inputs: Inputs) -> tuple[RandomCall, ...]:
        """The random calls of a forward and the batch axis of each, found by running two batch sizes.

        Raises ValueError or NotImplementedError for noise that cannot be drawn reproducibly.
        """
        self.calls = self.sites = None
        self.written = ()
        self._example, self._of_draws = map_inputs(lambda t: t[:1].clone(), inputs), {}
        of = lambda rows: _repeated(inputs, rows)
        kept: dict[Any, Tensor] = {}
        outputs, two, buffers = self._run(of(2), kept)
        written = tuple(n for n, b in buffers_of(self.inner).items() if not _equal(buffers[n], b))
        three, same = self._between_others(outputs, two, inputs, kept), True
        if three is None:
            of_three, three, _ = self._run(of(3), kept, writes=False)
            # most networks compute the same for two of three equal rows; others run again on two
            same = all_same(leaves(outputs), _rows(of_three, 0, 2), _APART)
        if not same and not all_same(outputs, self._run(of(2), kept, writes=False)[0], _APART):
            again, _, _ = self._run(of(2), kept)
            if all_same(outputs, again, _ROUNDING):
                raise ValueError(
                    "the module draws into a part or a view of a tensor in place, like x[0].normal_(), which its draws "
                    "cannot do together: draw a new tensor, e.g. torch.randn(...), and assemble it with torch.cat or "
                    "torch.stack"
                )
            raise ValueError(
                "the module's output differs under the same draw: it draws from another generator than torch's, like "
                "Python's random or NumPy's, or keeps a state between calls; draw with torch, and keep no state"
            )
        known, self.written = _placed(two, three), written
        calls, sites = self.calls, self.sites = known.calls, known.sites
        shared = {number for number, call in enumerate(calls) if call.axis is None}
        self._found = (self.key.clone(), {k: t for k, t in kept.items() if len(k) == 3 and k[1] in shared})
        for name in written:  # a buffer for noise may be memory that nobody initialized, which cannot be saved
            self.inner.get_buffer(name).nan_to_num_(0.0, 0.0, 0.0)
        if not self.per_row and any(c.multiple > 1 for c in (*calls, *sites)):
            # noise is drawn as if a folded axis held each row's entries in one block; equal rows then stay equal
            outputs, _, _ = self._run(of(3), {})
            if not all(all_same(t, t[:1].expand_as(t), _APART) for t in tree_leaves(outputs) if isinstance(t, Tensor)):
                raise ValueError(
                    "noise runs over an axis that folds the batch behind another axis, so vbdl cannot tell which part "
                    "belongs to which row of the batch: put the batch first when folding"
                )
        return self.calls

    def _between_others(self, outputs: Any, two: Noise, inputs: Inputs, kept: dict[Hashable, Tensor]) -> Noise | None:
        """Run the first row between two others; None if its outputs then differ from those beside an equal row.

        Nothing is drawn in place, so that outputs also differ if the network needs that. two: the noise of the equal
        rows.
        """
        self._others, linears = None, Linears()
        floating = all(t.is_floating_point() for t in tensors(inputs))
        if not floating or any(call.shape[:1] == (2,) for call in two.calls):  # which rows may have of their own
            return None
        rows = map_inputs(lambda t: torch.cat([another_row(t[:1]), t[:1], another_row(another_row(t[:1]))]), inputs)
        try:
            found, noise, _ = self._run(rows, kept, writes=False, linears=linears)
        except Exception:  # of the user's network, which may not take rows that nobody gave
            return None
        if not all_same(_rows(outputs, 0, 1), _rows(found, 1, 2), _APART):
            return None
        self._others = Pass(linears.calls, found, noise.calls)
        return noise

    def _run(
        self,
        inputs: Inputs,
        kept: dict[Hashable, Tensor],
        writes: bool = True,
        linears: TorchFunctionMode | None = None,
        key: Tensor | None = None,
    ) -> tuple[Any, Noise, State]:
        """Run the network; return its outputs, the noise it ran under, and the buffers that it may have changed.

        writes: draw into tensors in place; if False only into buffers, as under `vmap`. linears: as of `CounterNoise`.
        key: that of the draw, if it is not the network's.
        """
        buffers = {n: b.clone() for n, b in buffers_of(self.inner).items()}
        with self.noise(self.key if key is None else key, kept=kept, linears=linears) as noise:
            address = lambda t: t.untyped_storage().data_ptr()
            noise.watched = {address(p): f"parameter '{n}'" for n, p in parameters_of(self.inner).items()}
            noise.watched |= {address(t): "an input" for t in tensors(inputs)}
            if not writes:
                noise.writable = {address(b) for b in buffers.values()}
            outputs = noise.masks.returned(call(self.inner, buffers, inputs))
        return outputs, noise, buffers


def _repeated(inputs: Inputs, rows: int) -> Inputs:
    """A batch of so many copies of the first row."""
    return map_inputs(lambda t: t[:1].expand(rows, *t.shape[1:]).contiguous(), inputs)


def _placed(two: Noise, three: Noise, strict: bool = True) -> Known:
    """The calls of a draw, found by running it on two and on three rows; strict: as of `Known`.

    Raises ValueError if the calls depend on the number of rows, or have no batch axis.
    """
    if _kinds(two) != _kinds(three):
        raise ValueError(
            "the module makes other random calls for another batch size, so draws cannot be reproduced: make the "
            "same ones for every batch size"
        )
    calls = []
    for a, b in zip(two.calls, three.calls, strict=True):
        axis = batch_axis(a.shape, b.shape, f"{a.kind} in {described(a.path)} draws")
        calls.append(RandomCall(a.path, a.kind, a.shape, *axis, a.at))
    return Known(tuple(calls), with_batch_axes(two.masks.calls, three.masks.calls, (2, 3)), strict)


def _kinds(noise: Noise) -> list[list[str]]:
    """The functions that a forward called with this noise: its random calls and its dropout."""
    return [[call.kind for call in noise.calls], [site.kind for site in dropping(noise.masks.calls)]]


def draws_noise(module: nn.Module, example: Inputs) -> bool:
    """Whether a network makes random calls in evaluation mode that can be drawn; a copy of it runs on the example."""
    try:
        return bool(StochasticNetwork(copied(module), None, None, (), False).eval().locate(example))
    except (NotImplementedError, RuntimeError, ValueError, TypeError, IndexError):
        return False


def _rows(outputs: object, start: int, stop: int) -> dict[tuple, object]:
    """These rows of a network's outputs, however deep, by place; None in place of a tensor that does not have them."""
    of = lambda t: (t[start:stop] if t.ndim and len(t) >= stop else None) if isinstance(t, Tensor) else t
    return {place: of(t) for place, t in leaves(outputs).items()}


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
