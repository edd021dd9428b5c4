"""One ensemble, or the draws of one posterior, over several processes: for what is too large for one device.

    torchrun --nproc-per-node 2 script.py
        mesh = init_device_mesh("cpu", (2,))                  # or "cuda"
        predict = ShardedPredictor.load("model", mesh=mesh)   # each process reads its own members
        p = predict(x)                                        # on every process, the whole prediction

A plain ensemble's members are dealt out: each process holds its own, as the local part of a DTensor that is
`Shard(0)` over the mesh (`sharded.stacked`). Of an endless posterior every process holds the parameters and takes
its draws. For a tile of rows each process sums its draws and only the sums travel, `Likelihood.merge` adds them in the
order of the processes: the same numbers on all of them, equal to those of one process to rounding.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from vbdl.artifact.files import locate
from vbdl.artifact.loading import read_parts
from vbdl.artifact.manifest import Manifest
from vbdl.calling.inputs import Flat
from vbdl.engine.predictor import Predictor
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.types import Inputs, Likelihood, Posterior, State


class ShardedPredictor(Predictor):
    """A predictor whose draws are computed by all processes of a mesh; every process calls it with the same rows.

    posterior, likelihood, n_samples, seed and options: as for `Predictor`; posterior is the whole one on every process,
    of which a process keeps its share. For one that no process can hold, `load` reads shares of an artifact.
    mesh: a device mesh of one axis; all processes of the default group unless given.

    Raises ValueError where there are fewer draws than processes, or draws are kept (samples=True).
    """

    def __init__(
        self,
        posterior: Posterior,
        likelihood: Likelihood,
        n_samples: int | None = None,
        seed: int = 0,
        *,
        mesh: DeviceMesh | None = None,
        **options: Any,
    ):
        mesh = _mesh(mesh, options.get("device"), posterior)
        whole = Predictor(posterior, likelihood, n_samples, seed, **options)
        own = _own(mesh, whole.n_samples)
        share, sharded = _share(whole.posterior, own)
        likelihood, total = whole.likelihood, whole.n_samples
        del whole
        self._begin(mesh, share, sharded, likelihood, own, total, {"seed": seed, **options})

    def _begin(
        self, mesh: DeviceMesh, share: "_Share", sharded: bool, likelihood: Any, own: range, total: int, options: dict
    ) -> None:
        held = _own_members(likelihood, own) if sharded else likelihood
        super().__init__(share, held, len(own), **options)
        self.likelihood.for_draws(total)  # sums of all processes are merged
        self.mesh, self._group = mesh, mesh.get_group()
        self.n_draws, self._sharded = total, sharded

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        mesh: DeviceMesh | None = None,
        module: nn.Module | Sequence[nn.Module] | None = None,
        trust: Sequence[str] = (),
        **settings: Any,
    ) -> "ShardedPredictor":
        """The predictor of an artifact, of which every process reads its own members and never holds the others;
        arguments as for `vbdl.load`. Posteriors that are no plain ensemble are loaded whole."""
        mesh = _mesh(mesh, settings.get("device", "cpu"), None)

        def share(manifest: Manifest) -> range:
            return _own(mesh, settings.get("n_samples", manifest.settings.n_samples))

        found = read_parts(locate(Path(folder)), module=module, trust=trust, share=share)
        options = {**found.settings, **settings}
        total = options.pop("n_samples")
        if found.own is None:
            self = cls(found.posterior, found.likelihood, total, mesh=mesh, **options)
        else:
            self = cls.__new__(cls)
            own = found.own
            self._begin(mesh, _Share(found.posterior, 0, len(own)), True, found.likelihood, own, total, options)
        self.manifest = found.manifest
        return self

    @property
    def stacked(self) -> dict[str, DTensor]:
        """An ensemble's parameters and buffers, (members, ...) each, sharded over the mesh; empty for other posteriors.
        `full_tensor()` of one gathers it."""
        if not self._sharded:
            return {}
        return {n: DTensor.from_local(t, self.mesh, [Shard(0)]) for n, t in self.posterior.inner.stacked().items()}

    def __call__(self, x: Inputs, samples: bool = False, **options: Any) -> Any:
        if samples or options:
            raise ValueError("a sharded predictor gives sums of its draws, not the draws, and always takes all of them")
        flat = self.check(x)
        parts = [self._merged(tile) for tile in self.tiles_of(flat)]
        fields = {n: torch.cat([p[n] for p in parts])[: flat.rows] for n in parts[0]}
        return self.likelihood.prediction(fields, self.n_draws)

    def _merged(self, tile: Flat) -> State:
        executions = self.executions.of(tile)
        with self.executions.compiling(executions, "sums"):
            sums = executions[0].empty_sums()
            for execution in executions:
                sums = execution.sums(tile, sums)
        each = _gathered(sums, self.mesh.size(), self._group)
        merged = each[0]
        for other in each[1:]:
            merged = self.likelihood.merge(merged, other)
        return self.likelihood.finish(merged)


class _Share(Posterior):
    """Draws `start, start + 1, ...` of a posterior, numbered from 0."""

    def __init__(self, inner: Any, start: int, n_draws: int):
        super().__init__()
        self.inner, self.start, self.n_draws = inner, start, n_draws
        self.n_members = inner.n_members

    @property
    def module(self) -> nn.Module:
        return self.inner.module

    def draws(self, numbers: Tensor, seed: int) -> State:
        return self.inner.draws(numbers + self.start, seed)

    def member_of(self, numbers: Tensor) -> Tensor:
        return self.inner.member_of(numbers + self.start)

    def prepare(self, inputs: Inputs) -> None:
        self.inner.prepare(inputs)

    def losses(self, x: Inputs, y: Tensor, likelihood: Likelihood, own_rows: bool = False) -> Tensor:
        raise NotImplementedError("a sharded posterior predicts, and is trained before it is shared out")


def _mesh(mesh: DeviceMesh | None, device: Any, posterior: Any) -> DeviceMesh:
    if mesh is None:
        mesh = DeviceMesh(_device_type(device, posterior), torch.arange(dist.get_world_size()))
    if mesh.ndim != 1:
        raise ValueError(f"the mesh has one axis, over which draws are shared out; got {mesh.ndim}")
    return mesh


def _own(mesh: DeviceMesh, total: int) -> range:
    """The draws of this process."""
    rank, size = mesh.get_local_rank(), mesh.size()
    if total < size:
        raise ValueError(f"{total} draws cannot be shared out to {size} processes: every one takes at least one")
    bounds = [total * r // size for r in range(size + 1)]
    return range(bounds[rank], bounds[rank + 1])


def _share(posterior: Any, own: range) -> tuple[_Share, bool]:
    """What a process needs for its draws, and whether that is a part of the members."""
    if len(posterior.parts) > 1:
        raise ValueError("members of different architectures cannot be shared out: make an ensemble of each")
    if isinstance(posterior, DeepEnsemble) and posterior.base is None and own.stop <= posterior.n_members:
        networks = []
        for number in own:
            network = _network(posterior, number)
            networks.append(network)
        return _Share(DeepEnsemble(networks), 0, len(own)), True
    return _Share(posterior, own.start, len(own)), False


def _network(posterior: DeepEnsemble, number: int) -> nn.Module:
    """A member as a network of its own."""
    import copy

    network = copy.deepcopy(posterior.module).to_empty(device=next(iter(posterior.stacked().values())).device)
    network.load_state_dict(posterior.member(number))
    return network


def _own_members(likelihood: Any, own: range) -> Any:
    """The likelihood with the parameters of its own members, where each has some."""
    if likelihood.n_members is None:
        return likelihood
    import copy

    found: Likelihood = copy.deepcopy(likelihood)
    inner = found.innermost
    for name, p in list(inner.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(inner.get_submodule(owner), leaf, nn.Parameter(p.detach()[own.start : own.stop].clone(), False))
    holder: Likelihood | None = found
    while holder is not None:  # which one has the number itself depends on which one was trained
        if "n_members" in vars(holder):
            holder.n_members = len(own)
        holder = holder.wrapped
    return found


def _gathered(sums: State, size: int, group: Any) -> list[State]:
    """The sums of every process, in one message."""
    flat = torch.cat([t.reshape(-1) for t in sums.values()])
    each = [torch.empty_like(flat) for _ in range(size)]
    dist.all_gather(each, flat, group=group)
    found = []
    for one in each:
        pieces = one.split([t.numel() for t in sums.values()])
        found.append({n: piece.reshape(t.shape) for (n, t), piece in zip(sums.items(), pieces, strict=True)})
    return found


def _device_type(device: Any, posterior: Any) -> str:
    if device is not None:
        return torch.device(device).type
    return next(iter([*posterior.parameters(), *posterior.buffers()])).device.type
