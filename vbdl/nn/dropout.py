"""A network that keeps dropout on in evaluation mode: one mask per draw, shared by all rows of a batch.

Running the network finds its dropout calls and the batch axis of each.

Gal and Ghahramani, Dropout as a Bayesian Approximation, ICML 2016, https://arxiv.org/abs/1506.02142
"""

import contextlib
import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vbdl.calling.autograd import with_gradients_if_needed
from vbdl.calling.inputs import arguments, map_inputs
from vbdl.calling.outputs import leaves
from vbdl.calling.stacking import call
from vbdl.nn.frozen import hold_frozen
from vbdl.nn.interception import CounterDropout
from vbdl.nn.keyed import KeyedNetwork
from vbdl.nn.masks import Masks, Site, batch_axis, described
from vbdl.nn.may_drop import DROPOUT_LAYERS, is_part_of_torch
from vbdl.nn.normalization import NORMALIZATION_LAYERS
from vbdl.nn.training_reads import EVERY, Place, Reads, places_of_dropout
from vbdl.types import Inputs


class DropoutNetwork(KeyedNetwork):
    """A module whose evaluation mode keeps dropout on, with the masks of the draw in `key`.

    In training mode it runs the module as it is (`Objective` draws the masks, one per row). In evaluation mode dropout
    is on and everything else is in evaluation mode: normalization, modules named in `deterministic`, and whatever else
    a user's module does in training only (`vbdl/nn/training_reads.py`).
    """

    found_by_running = ("sites", "on", "off")  # not part of the architecture: running the network finds them again

    def __init__(
        self,
        inner: nn.Module,
        rate: float | Mapping[str, float] | None = None,
        deterministic: tuple[str | type[nn.Module], ...] = (),
    ):
        super().__init__()
        self.inner, self.rate, self.deterministic = inner, rate, deterministic
        self.sites: tuple[Site, ...] | None = None
        self.on: frozenset[Place] | None = EVERY
        self.off: list[str] | None = None  # places that read `training` for other than dropout; None: unknown
        self.register_buffer("key", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.train(inner.training)

    def train(self, mode: bool = True) -> "DropoutNetwork":
        super().train(mode)
        if not mode:
            for name, module in self.inner.named_modules():
                module.training = not self._stays_deterministic(name, module)
        else:
            hold_frozen(self.inner)
        return self

    def _stays_deterministic(self, name: str, module: nn.Module) -> bool:
        if isinstance(module, (*NORMALIZATION_LAYERS, nn.RReLU)):
            return True
        if is_part_of_torch(module) and not isinstance(module, DROPOUT_LAYERS) and not hasattr(module, "dropout"):
            return True  # it drops nothing, but e.g. a spectral norm must not iterate
        return self._is_named_deterministic(name, module)

    def _is_named_deterministic(self, name: str, module: nn.Module) -> bool:
        for chosen in self.deterministic:
            if isinstance(chosen, str):
                if name == chosen or name.startswith(f"{chosen}."):
                    return True
            elif isinstance(module, chosen):
                return True
        return False

    def _fixed(self) -> set[int]:
        """The ids of the modules that `deterministic` names, whose reads of `training` get the module's flag."""
        return {id(m) for name, m in self.inner.named_modules() if self._is_named_deterministic(name, m)}

    def _masks(self) -> Masks:
        return Masks(self.key, self.inner, self.rate, self.sites, kept=self.kept)

    @property
    def takes_many_keys(self) -> bool:
        return self.sites is not None and all(site.axis is not None for site in self.sites if site.p > 0)

    def forward(self, *args, **kwargs):
        if self.training:
            return self.inner(*args, **kwargs)
        with CounterDropout(self._masks()), self._reads():
            return self.inner(*args, **kwargs)

    def _reads(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.on is EVERY else Reads(self.on, self._fixed()).of(self.inner)

    def _find_reads(self, inputs: Inputs) -> None:
        """Find out which reads of `self.training` are about dropout, by running two different rows."""

        def two_rows(t: Tensor) -> Tensor:
            other = t[:1] * 0.5 + 0.1 if t.is_floating_point() else t[:1]
            return torch.cat([t[:1], other]).contiguous()

        inputs = map_inputs(two_rows, inputs)

        def run(reads: Reads) -> tuple[object, list[Tensor], int]:
            buffers = {n: b.clone() for n, b in self.inner.named_buffers()}
            silent = Masks(self.key, self.inner, self.rate, silent=True)
            with torch.random.fork_rng(devices=[]), reads.of(self.inner), CounterDropout(silent):
                outputs = call(self.inner, buffers, inputs)
            return outputs, list(buffers.values()), sum(site.p > 0 for site in silent.calls)

        self.on, self.off = places_of_dropout(run, self._fixed())

    def adopt(self, other: KeyedNetwork) -> None:
        assert isinstance(other, DropoutNetwork)
        self.sites, self.on, self.off = other.sites, other.on, other.off

    @torch.no_grad()
    def locate(self, inputs: Inputs) -> tuple[Site, ...]:
        """The dropout calls of a forward and the batch axis of each, found by running two batch sizes.

        Raises RuntimeError or ValueError for dropout that cannot be drawn reproducibly for each row.
        """
        if self.off is None:
            self._find_reads(inputs)
        calls = []
        self.sites = None
        for rows in (2, 3):
            repeated = map_inputs(lambda t, rows=rows: t[:1].expand(rows, *t.shape[1:]).contiguous(), inputs)
            args, kwargs = arguments(repeated)
            masks = self._masks()
            with CounterDropout(masks), self._reads():
                with_gradients_if_needed(functools.partial(self.inner, *args, **kwargs))
            calls.append(masks.calls)
        if [s.kind for s in calls[0]] != [s.kind for s in calls[1]]:
            raise RuntimeError(
                "the module calls other dropouts for another batch size, so draws cannot be reproduced: call the same "
                "ones for every batch size"
            )
        self.sites = tuple(_place_batch(a, b) for a, b in zip(*calls, strict=True))
        if any(site.multiple > 1 for site in self.sites):
            # `keep` assumes that a folded axis holds each row's entries in one block; equal rows then stay equal
            with CounterDropout(Masks(self.key, self.inner, 0.5, self.sites)), self._reads():
                outputs = with_gradients_if_needed(functools.partial(self.inner, *args, **kwargs))
            for t in leaves(outputs).values():
                if isinstance(t, Tensor) and not torch.allclose(t, t[:1].expand_as(t), rtol=1e-3, atol=1e-4):
                    raise ValueError(
                        "dropout runs over an axis that folds the batch behind another axis, so vbdl cannot tell "
                        "which part belongs to which row of the batch: put the batch first when folding"
                    )
        return self.sites


def _place_batch(two: Site, three: Site) -> Site:
    """The dropout call with its batch axis."""
    axis, multiple = batch_axis(two.shape, three.shape, f"{two.kind} in {described(two.path)} masks")
    return Site(two.path, two.kind, two.p, two.shape, axis, multiple)
