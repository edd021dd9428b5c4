"""The run of draw 0 before the first answer, which checks the network, and finds the layers that draw outputs."""

import contextlib
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.calling.attributes import Attributes
from vbdl.calling.closures import HeldParameters
from vbdl.calling.inputs import Flat
from vbdl.calling.traversing import parameters_of
from vbdl.compiling.rewrite import MANY_ROWS
from vbdl.engine.plain import Run, draws_in_a_call, repeated
from vbdl.engine.settings import PredictorSettings
from vbdl.engine.trial import check_apart, try_out
from vbdl.engine.ways import PLAIN, before_tracing
from vbdl.engine.written import only_reads, without_writing
from vbdl.model import Model
from vbdl.nn.dropout import DropoutNetwork
from vbdl.nn.gaussian.network import FactoredNetwork
from vbdl.nn.keyed import KeyedNetwork
from vbdl.nn.local_noise import Pass
from vbdl.nn.local_outputs import local_layers
from vbdl.nn.may_drop import DROPOUT_LAYERS
from vbdl.nn.stochastic import StochasticNetwork
from vbdl.types import State


def _trains(model: Model) -> bool:
    """Whether a layer stays in training mode, in which it may draw, but for dropout that is drawn from counters."""
    drawn = DROPOUT_LAYERS if isinstance(model.network, DropoutNetwork) else ()
    return any(m.training and not isinstance(m, drawn) for m in model.network.modules())


class FirstRun:
    """A run of draw 0 on a tile, or of all draws in one call. Raises ValueError for a network that must not be used.

    run: the run, for whom it is a part of the first answer. own: the names of a draw's entries.
    written: the names of the parameters that the forward writes to. tile: a copy of the tile.
    local_layers, local: the layers that draw outputs in the network as it is, and their number; None: unknown.
    """

    def __init__(self, model: Model, tile: Flat, settings: PredictorSettings, n_samples: int):
        self._model, self.tile, self._settings, self._n_samples = model, tile, settings, n_samples
        self.local_layers: Any = ()
        self.local: int | None = None
        self._kept: dict[Hashable, Tensor] = {}  # what a network with a key keeps of the draws that ran
        self._to_check: tuple[State, Tensor] | None = None  # a draw and its outputs, for `check_apart`
        entries = model.one_draw(0, settings.seed)
        state = {**{n: t.detach() for n, t in model.shared(entries).items()}, **entries}
        noise: Mapping[Hashable, Tensor] = {}
        self._others: Pass | None = None  # a run on other rows, if it shows that rows are apart
        if isinstance(model.network, StochasticNetwork):  # before it is copied
            noise, others = model.network.found(state["network.key"])
            # a function that chooses the output may mix rows, which a run of the network alone does not tell
            self._others = others if tile.rows == 1 and not callable(model.posterior.output) else None
        twin = model.twin()
        self.own = list(entries)
        replaced = {name.removeprefix("network.") for name in entries}
        if isinstance(twin.network, FactoredNetwork):
            replaced |= {f"inner.{name}" for name in twin.network.chosen}
        held = HeldParameters(twin.network, replaced)
        # a function that chooses the output is the user's
        reads = only_reads(twin) and not callable(model.posterior.output)
        self._reads = reads and not _trains(twin)
        parameters = () if reads else parameters_of(twin).keys()
        attributes = None if reads else Attributes(twin)
        sizes = {n: t.nbytes for n, t in entries.items()}
        del entries  # whose memory is laid out anew if nobody else holds it
        with held if held.held else contextlib.nullcontext():
            outputs, self.written = without_writing(lambda s: self._tried(twin, s, noise), state, parameters)
        own: nn.Module = model.network
        if isinstance(own, KeyedNetwork) and isinstance(twin.network, KeyedNetwork):
            own.reads_values = twin.network.reads_values
        is_draw = not self.local_layers and (bool(self._kept) or not isinstance(twin.network, KeyedNetwork))
        changed = attributes if attributes is not None and attributes.restore() else None
        self.run: Run | None = Run(twin, tile, outputs, sizes, self._kept, changed, is_draw and len(outputs) == 1)
        self._kept = {}  # held by the run alone
        self.tile = tile.map(Tensor.clone)  # the caller may put other rows into its memory
        self.shape, self.dtype = outputs.shape[1:], outputs.dtype

    def check_apart(self) -> None:
        """Check that the network keeps rows apart, if that was not checked yet."""
        if self._to_check is not None:
            state, outputs = self._to_check
            with torch.no_grad():
                check_apart(outputs, self._model.twin(), state, self.tile)
            self._to_check = None

    def _tried(self, model: Model, state: State, noise: Mapping[Hashable, Tensor]) -> Tensor:
        """Run draw 0, or all draws in one call, check the network by it, and find the layers that draw outputs.

        model: a twin that no other thread calls. noise: what is known of the noise of draw 0 of `vbdl.Stochastic`.
        Returns (draws, rows, ...).
        """
        network, tile, own = model.network, self.tile, self.own
        mixes_nothing = network.keeps_apart if isinstance(network, KeyedNetwork) else "network.key" not in own
        if self._settings.compile == "background" and tile.rows == 1 and mixes_nothing:
            # a row alone is not mixed with others: that is checked in the background, for the first answer to be fast
            outputs = self._all_tried(model, state)
            if outputs is None:
                outputs = try_out(model, state, tile, apart=False, reads=self._reads).unsqueeze(0)
            self._to_check = state, outputs[0]
            return outputs
        return self._one_tried(model, state, noise).unsqueeze(0)

    def _all_tried(self, model: Model, state: State) -> Tensor | None:
        """Run all draws of a row in one call, and check the network by it; None if they cannot be in one call."""
        network, tile, n = model.network, self.tile, self._n_samples
        if self.own != ["network.key"] or not isinstance(network, KeyedNetwork) or not network.takes_many_keys:
            return None
        if n == 1 or n > draws_in_a_call(network, tile):
            return None
        keys = self._model.entries(torch.arange(n), self._settings.seed)
        network.kept = {} if self._settings.memory_budget > 1 else None
        try:
            outputs = try_out(model, {**state, **keys}, repeated(tile, n), apart=False, reads=self._reads)
            self._kept = network.kept or {}
        except NotImplementedError:
            raise
        except Exception:  # of the user's network: it is raised by the run of one draw, in words about its rows
            return None
        finally:
            network.kept = None
        return outputs.unflatten(0, (n, tile.rows))

    def _one_tried(self, model: Model, state: State, noise: Mapping[Hashable, Tensor]) -> Tensor:
        """Run draw 0, check the network by it, and find the layers that draw outputs, as `_tried`."""
        network = model.network
        if not isinstance(network, FactoredNetwork) or network.linearized:
            return self._located(model, state, noise)
        network.kept = {}  # the runs that check it have the same weights
        outputs = self._located(model, state, noise)
        kept, network.kept = network.kept, None
        local = {*self.local_layers, *dict(self.local_layers).values()}
        self._kept = {name: t for name, t in kept.items() if name not in local}
        return outputs

    def _located(self, model: Model, state: State, noise: Mapping[Hashable, Tensor]) -> Tensor:
        """Run draw 0 and find the layers that draw outputs, as `_one_tried`, which keeps what is drawn."""
        network, settings, tile, own = model.network, self._settings, self.tile, self.own
        if (
            settings.joint or model.posterior.n_draws is not None or settings.autocast is not None
            or settings.largest_tile >= MANY_ROWS or own != ["network.key"]
            or before_tracing(model, settings, own)[0] == PLAIN
        ):  # fmt: skip
            return try_out(model, state, tile)
        if isinstance(network, StochasticNetwork):
            network.kept, network.recorded = dict(noise), []  # the noise of the draw is made once for all rows
            outputs = try_out(model, state, tile, apart=self._others is None)
            first = network.recorded[0]
            second = network.recorded[1] if self._others is None else self._others
            layers = None
            if not network.reads_values:  # draws that are put together would be decided for together
                layers = network.local_layers(state["network.key"], tile.nested, tile.rows, first, second)
            network.kept = network.recorded = None
            if layers is not None:
                self.local_layers, self.local = layers, len(layers)
            return outputs
        if not isinstance(network, FactoredNetwork) or not network.may_draw_outputs:
            return try_out(model, state, tile)
        network.recorded = []
        outputs = try_out(model, state, tile)
        first, second = network.recorded[:2]
        network.recorded = None
        local = None if network.reads_values else local_layers(first, second, tile.rows)
        if local is not None:
            self.local_layers, self.local = local, len(local)
        return outputs
