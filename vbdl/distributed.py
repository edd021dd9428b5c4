"""Prediction by several processes: each computes its members of an ensemble, or its draws of another posterior.

    torchrun --nproc-per-node 2 script.py
        mesh = init_device_mesh("cpu", (2,))                  # or "cuda"
        predict = ShardedPredictor.load("model", mesh=mesh)   # each process reads its own members
        p = predict(x)                                        # the whole prediction, on every process

Each process holds its own members of a plain ensemble, as the local part of a DTensor that is `Shard(0)` over the mesh
(`sharded.stacked`). Of any other posterior every process holds all parameters and computes its own draws. For each tile
of rows a process summarizes its draws, and only these sums are sent; `Likelihood.merge` adds them in the order of the
processes. All processes get identical predictions, equal to those of one process up to rounding.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from vbdl.artifact.files import locate
from vbdl.artifact.loading import read_parts
from vbdl.artifact.manifest import Manifest
from vbdl.calling.copies import holding
from vbdl.calling.inputs import Flat
from vbdl.calling.likelihood_members import of_members
from vbdl.engine.predictor import Predictor
from vbdl.engine.settings import PredictorOptions
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.types import Inputs, Likelihood, Posterior, Prediction, State


class ShardedPredictor(Predictor):
    """A predictor whose draws are computed by all processes of a mesh; every process calls it with the same rows.

    posterior, likelihood, n_samples, seed and options: as for `Predictor`. Every process passes the whole posterior and
    keeps its share; if the posterior is too large for one process, `load` reads shares of an artifact.
    mesh: a device mesh of one axis; by default all processes of the default group.

    Raises ValueError if there are fewer draws than processes, or if a call asks for draws (samples=True).
    """

    posterior: "_Share"

    def __init__(
        self,
        posterior: Posterior,
        likelihood: Likelihood,
        n_samples: int | None = None,
        seed: int = 0,
        *,
        mesh: DeviceMesh | None = None,
        **options: Unpack[PredictorOptions],
    ):
        mesh = _mesh(mesh, options.get("device"), posterior)
        whole = Predictor(posterior, likelihood, n_samples, seed, **options)
        local = _local_draws(mesh, whole.n_samples)
        share, sharded = _share(whole.posterior, local)
        likelihood, total = whole.likelihood, whole.n_samples
        del whole
        self._begin(mesh, share, sharded, likelihood, local, total, seed, options)

    def _begin(
        self,
        mesh: DeviceMesh,
        share: "_Share",
        sharded: bool,
        likelihood: Likelihood,
        local: range,
        total: int,
        seed: int,
        options: PredictorOptions,
    ) -> None:
        """Initialize from this process's share. local: the draws of this process. total: the draws of all processes."""
        if likelihood.reads_layer is not None:
            raise ValueError(
                "a decision by distances reads features of the first network, which not every process has: use "
                "vbdl.Predictor, or a decision without OutOfDistribution"
            )
        local_likelihood = of_members(likelihood, local) if sharded else likelihood
        super().__init__(share, local_likelihood, len(local), seed, **options)
        self._tiling.learns = False  # all processes must cut a batch alike
        self.likelihood.for_draws(total)  # all draws, because the sums of all processes are merged
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
        n_samples: int | None = None,
        seed: int | None = None,
        **settings: Unpack[PredictorOptions],
    ) -> "ShardedPredictor":
        """Load a predictor from an artifact, each process only its own members of a plain ensemble.

        Other posteriors are loaded whole. Arguments as for `vbdl.load`, where given settings
        replace the saved ones.
        """
        mesh = _mesh(mesh, settings.get("device", "cpu"), None)

        def share(manifest: Manifest) -> range:
            return _local_draws(mesh, manifest.settings.n_samples if n_samples is None else n_samples)

        parts = read_parts(locate(Path(folder)), module=module, trust=trust, share=share)
        options: PredictorOptions = {**parts.options, **settings}
        total = parts.n_samples if n_samples is None else n_samples
        seed = parts.seed if seed is None else seed
        if parts.members is None:
            self = cls(parts.posterior, parts.likelihood, total, seed, mesh=mesh, **options)
        else:
            self = cls.__new__(cls)
            local = parts.members
            share_of_members = _Share(parts.posterior, 0, len(local))
            self._begin(mesh, share_of_members, True, parts.likelihood, local, total, seed, options)
        self.manifest = parts.manifest
        return self

    @property
    def stacked(self) -> dict[str, DTensor]:
        """The parameters and buffers of a plain ensemble, (members, ...) each, sharded over the mesh.

        It is empty for other posteriors. A tensor's `full_tensor()` gathers it.
        """
        if not self._sharded:
            return {}
        return {n: DTensor.from_local(t, self.mesh, [Shard(0)]) for n, t in self.posterior.inner.stacked().items()}

    def __call__(self, x: Inputs, samples: bool = False, **options: object) -> Prediction:
        if samples or options:
            raise ValueError(
                "a sharded predictor sums over all its draws and does not return them: call it with the rows alone, or "
                "use vbdl.Predictor"
            )
        flat = self.check(x)
        parts = [self._merged(tile) for tile in self.tiles_of(flat)]
        fields = {n: torch.cat([p[n] for p in parts])[: flat.rows] for n in parts[0]}
        return self.likelihood.prediction(fields, self.n_draws)

    def _merged(self, tile: Flat) -> State:
        executions = self.executions.drawing(tile)
        with self.executions.compiling(executions, "sums"):
            sums = executions[0].empty_sums()
            for execution in executions:
                sums = execution.sums(tile, sums)
        by_process = _gathered(sums, self.mesh.size(), self._group)
        merged = by_process[0]
        for added in by_process[1:]:
            merged = self.likelihood.merge(merged, added)
        return self.likelihood.finish(merged)


class _Share(Posterior):
    """The draws `start, start + 1, ...` of a posterior, numbered from 0."""

    inner: Posterior

    def __init__(self, inner: Posterior, start: int, n_draws: int):
        super().__init__()
        self.inner, self.start, self.n_draws = inner, start, n_draws
        self.n_members, self.output = inner.n_members, inner.output

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
        raise NotImplementedError("a sharded posterior cannot be trained: train the whole posterior before sharding it")


def _mesh(mesh: DeviceMesh | None, device: torch.device | str | None, posterior: Posterior | None) -> DeviceMesh:
    if mesh is None:
        mesh = DeviceMesh(_device_type(device, posterior), torch.arange(dist.get_world_size()))
    if mesh.ndim != 1:
        raise ValueError(f"the mesh must have one axis, over which draws are divided; got {mesh.ndim}")
    return mesh


def _local_draws(mesh: DeviceMesh, total: int) -> range:
    """The numbers of the draws of this process. total: the number of draws of all processes."""
    rank, size = mesh.get_local_rank(), mesh.size()
    if total < size:
        raise ValueError(f"{total} draws cannot be divided among {size} processes: take more draws, or fewer processes")
    bounds = [total * r // size for r in range(size + 1)]
    return range(bounds[rank], bounds[rank + 1])


def _share(posterior: Posterior, local: range) -> tuple[_Share, bool]:
    """The posterior of one process's draws, and whether it holds only a part of the members."""
    if len(posterior.parts) > 1:
        raise ValueError(
            "members of different architectures cannot be divided among processes: use one per architecture"
        )
    if isinstance(posterior, DeepEnsemble) and posterior.base is None and local.stop <= posterior.n_members:
        networks = [holding(posterior.module, posterior.member(number)) for number in local]
        return _Share(DeepEnsemble(networks, output=posterior.output), 0, len(local)), True
    return _Share(posterior, local.start, len(local)), False


def _gathered(sums: State, size: int, group: dist.ProcessGroup) -> list[State]:
    """Gather the sums of every process, in the order of the processes, in one message."""
    flat = torch.cat([t.reshape(-1) for t in sums.values()])
    received = [torch.empty_like(flat) for _ in range(size)]
    dist.all_gather(received, flat, group=group)
    by_process = []
    for values in received:
        pieces = values.split([t.numel() for t in sums.values()])
        by_process.append({n: piece.reshape(t.shape) for (n, t), piece in zip(sums.items(), pieces, strict=True)})
    return by_process


def _device_type(device: torch.device | str | None, posterior: Posterior | None) -> str:
    if device is not None:
        return torch.device(device).type
    assert posterior is not None  # or a device
    return next(iter([*posterior.parameters(), *posterior.buffers()])).device.type
