"""Training by several processes: each trains its members of an ensemble, or computes its rows of every batch.

    torchrun --nproc-per-node 2 script.py
        torch.distributed.init_process_group()
        q = vbdl.DeepEnsemble(network, n_members=8)   # the same in every process
        vbdl.fit(q, (x, y), likelihood)               # trains members 0 to 3 here, 4 to 7 there

If members can be trained apart and there are at least as many as processes, each process trains a range of them, and
the processes exchange a few numbers per epoch. Otherwise each process computes a range of the rows of every batch, and
gradients are averaged in every step; masks and noise of a row are those that it has in the whole batch. Either way the
result is that of one process, up to float rounding, and every process has all of it.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from vbdl.calling.inputs import map_inputs
from vbdl.calling.likelihood_members import of_members
from vbdl.calling.stacking import call
from vbdl.calling.traversing import state_of
from vbdl.nn.part_of_batch import Call, PartOfBatch, part_of_batch, recorded_shapes
from vbdl.training.options import TrainingOptions, is_of_each_member
from vbdl.types import Inputs, Likelihood, Posterior, State

_ROWS_COMPARED = 8  # rows on which the loss of a batch is compared with that of its parts
_OWN = {"progress", "compile", "checkpoint", "processes"}  # arguments of fit that may differ between processes
_APART = 1e-4  # relative to the loss: far above rounding errors, far below the effect of rows that are mixed


class Processes:
    """The processes that train together and what they exchange, or this process alone.

    chosen: a process group or a device mesh of one axis; None for all processes of torch.distributed if it is
        initialized, False for this process alone.
    device: of the tensors in training.
    """

    def __init__(self, chosen: "dist.ProcessGroup | DeviceMesh | bool | None", device: torch.device):
        self._group = _group(chosen)
        self.rank = 0 if self._group is None else dist.get_rank(self._group)
        self.size = 1 if self._group is None else dist.get_world_size(self._group)
        nccl = self._group is not None and "nccl" in dist.get_backend(self._group)
        self._device = device if nccl else torch.device("cpu")

    def part(self, n: int) -> range:
        """The numbers that are this process's of 0, 1, ..., n - 1; may be empty."""
        return self._part_of(self.rank, n)

    def _part_of(self, rank: int, n: int) -> range:
        return range(n * rank // self.size, n * (rank + 1) // self.size)

    def shown(self, progress: bool | None) -> bool | None:
        """Whether this process shows its progress: only the first one does."""
        return progress if self.rank == 0 else False

    def sum(self, t: Tensor) -> Tensor:
        """The sum of a tensor over the processes, the same bits on all of them."""
        if self.size == 1:
            return t
        total = t.detach().to(self._device, copy=True)
        self._exchange("a sum", lambda: dist.all_reduce(total, group=self._group))
        return total.to(t.device)

    def check_alike(self, about: Mapping[str, object], advice: str) -> None:
        """Raise ValueError on every process if these values are not the same on all of them.

        about: values that can be pickled, by what they are, in the order in which they are compared.
        """
        if self.size == 1:
            return
        of_all: list[Any] = [None] * self.size
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # where objects are gathered
        self._exchange("a comparison", lambda: dist.all_gather_object(of_all, dict(about), group=self._group))
        for rank, other in enumerate(of_all):
            for name in {**of_all[0], **other}:
                first, this = of_all[0].get(name), other.get(name)
                if first != this:
                    values = "" if isinstance(this, bytes) else f" ({first!r:.200} and {this!r:.200})"
                    raise ValueError(f"processes 0 and {rank} of the training differ in {name}{values}: {advice}")

    def to_first(self, t: Tensor, n: int) -> Tensor:
        """The parts of a tensor joined along their first axis, of n entries, on process 0; the part itself elsewhere.

        t: the entries `part(n)` of it.
        """
        if self.size == 1:
            return t
        if self.rank:
            sent = _bytes(t).to(self._device)
            self._exchange("a checkpoint", lambda: dist.send(sent, group=self._group, group_dst=0))
            return t
        joined = t.new_empty((n, *t.shape[1:]), device=self._device)
        joined[: len(t)] = t
        for rank in range(1, self.size):
            part = joined[self._part_of(rank, n).start : self._part_of(rank, n).stop]
            into = _bytes(part)
            self._exchange("a checkpoint", lambda b=into, r=rank: dist.recv(b, group=self._group, group_src=r))
        return joined

    def complete(self, t: Tensor, by_part: bool) -> None:
        """Give every process all entries of a tensor: those of its part from each process, or all from process 0."""
        owners = range(self.size) if by_part else [0]
        for rank in owners:
            mine = self._part_of(rank, len(t)) if by_part else None
            part = t if mine is None else t[mine.start : mine.stop]
            held = part.detach().to(self._device).contiguous()
            sent = _bytes(held)
            self._exchange("the result", lambda b=sent, r=rank: dist.broadcast(b, group=self._group, group_src=r))
            if rank != self.rank:
                part.detach().copy_(held)

    def _exchange(self, what: str, do: Callable[[], object]) -> None:
        """Communicate. Raises RuntimeError if another process has ended or does not answer in time."""
        try:
            do()
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} of {self.size} waited for {what} of the training, but another process has ended "
                f"or did not answer in time: see the error of that process, and resume from a checkpoint if there is "
                f"one. torch says: {str(error).splitlines()[0]}"
            ) from error


def _group(chosen: "dist.ProcessGroup | DeviceMesh | bool | None") -> "dist.ProcessGroup | None":
    """The process group of several processes, or None for this process alone."""
    initialized = dist.is_available() and dist.is_initialized()
    if chosen is False:
        return None
    if chosen is None or chosen is True:
        if not initialized:
            if chosen:
                raise ValueError(
                    "processes=True trains with all processes of torch.distributed, which is not initialized: call "
                    "torch.distributed.init_process_group() under torchrun, or leave processes out"
                )
            return None
        group = dist.group.WORLD
    elif isinstance(chosen, DeviceMesh):
        if chosen.ndim != 1:
            raise ValueError(f"the mesh must have one axis, over which training is shared out; got {chosen.ndim}")
        group = chosen.get_group()
    elif dist.is_available() and isinstance(chosen, dist.ProcessGroup):
        group = chosen
    else:
        raise TypeError(
            f"processes must be a process group of torch.distributed, a device mesh, False or None; got "
            f"{type(chosen).__name__}"
        )
    return None if group is None or dist.get_world_size(group) == 1 else group


def _bytes(t: Tensor) -> Tensor:
    """The memory of a contiguous tensor, which every backend can send, whatever its dtype."""
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def digest(*values: Tensor) -> bytes:
    """A hash of the bits of these tensors, to compare them between processes."""
    hashed = hashlib.blake2b(digest_size=16)
    for t in values:
        hashed.update(str((tuple(t.shape), t.dtype)).encode())
        hashed.update(_bytes(t.cpu()).numpy().data)
    return hashed.digest()


class Sharing:
    """How one training is shared out over processes: by members, or by the rows of every batch.

    posterior, likelihood: what this process trains: its members alone, whose tensors are parts of the whole, or all.
    members: the numbers of the members that this process trains.
    by_rows: whether every process trains all members on its rows of each batch.
    """

    def __init__(self, processes: Processes, posterior: Posterior, likelihood: Likelihood):
        self.processes, self._whole = processes, (posterior, likelihood)
        self.n_members = posterior.n_members
        self.members = range(self.n_members)
        self.posterior, self.likelihood = posterior, likelihood
        part = None
        if processes.size > 1 and posterior.by_member and self.n_members >= processes.size:
            part = posterior.of_members(processes.part(self.n_members))
        if part is not None:
            self.members = processes.part(self.n_members)
            self.posterior, self.likelihood = part, of_members(likelihood, self.members)
        self.by_members = part is not None
        self.by_rows = processes.size > 1 and part is None
        self._axes: dict[Call, int | None] = {}

    def alike(self, options: TrainingOptions, hashes: Callable[[], list[Tensor]]) -> dict[str, object]:
        """What must be the same in every process, by its name in an error. hashes: those of the rows."""
        if self.processes.size == 1:
            return {}
        posterior, likelihood = self._whole
        about: dict[str, object] = {
            "the posterior": f"{type(posterior).__name__} of {self.n_members} members",
            "the likelihood": type(likelihood).__name__,
        }
        for name in sorted(vars(options)):
            value = getattr(options, name)
            if name in ("lr", "weight_decay") and is_of_each_member(value):
                value = [float(one) for one in value]
            if name not in _OWN and (value is None or isinstance(value, str | int | float | bool | list | dict)):
                about[f"fit({name}=)"] = value
        path = options.checkpoint
        if path is not None:
            size = Path(path).stat().st_size if Path(path).exists() else None
            about["the size of the checkpoint's file, which has to be one that all processes read"] = size
        about["the rows of the data"] = digest(*hashes())
        about["the seed"] = getattr(posterior, "seed", None)
        return about | {f"the tensor '{n}'": digest(t) for n, t in _named(posterior, likelihood).items()}

    # -- members

    def of_all(self, values: Tensor) -> Tensor:
        """The values of all members, (members,), from those of this process's; in rows mode they are all."""
        if not self.by_members:
            return values
        whole = values.new_zeros(self.n_members)
        whole[self.members.start : self.members.stop] = values
        return self.processes.sum(whole)

    def to_first(self, t: Tensor, by_member: bool) -> Tensor:
        """A tensor of this process's members, (members, ...), as process 0 saves it: that of all members."""
        return self.processes.to_first(t, self.n_members) if self.by_members and by_member else t

    def of_my_members(self, options: TrainingOptions) -> TrainingOptions:
        """The arguments of fit for this process's members: their own learning rates and weight decay."""
        if not self.by_members:
            return options
        of_each = {n: v for n in ("lr", "weight_decay") if is_of_each_member(v := getattr(options, n))}
        for name, values in of_each.items():
            if len(values) != self.n_members:
                raise ValueError(
                    f"{name} must be one number, or one for each of {self.n_members} members; got {len(values)}"
                )
        if of_each and options.checkpoint is not None:
            raise ValueError(
                "a checkpoint of members with learning rates or weight decay of their own is written by one process: "
                "leave checkpoint out, or train in one process, with processes=False"
            )
        return replace(options, **{n: values[self.members.start : self.members.stop] for n, values in of_each.items()})

    def of_mine(self, t: Tensor, by_member: bool) -> Tensor:
        """The part of a saved tensor that is of this process's members."""
        return t[self.members.start : self.members.stop] if self.by_members and by_member else t

    def complete(self, by_member: frozenset[str]) -> None:
        """Give every process the whole posterior and likelihood. by_member: names of entries with a members axis."""
        if self.processes.size == 1:
            return
        posterior, likelihood = self._whole
        trained = _named(self.posterior, self.likelihood)
        for name, t in _named(posterior, likelihood).items():
            mine = self.of_mine(t, name in by_member)
            if mine.data_ptr() != trained[name].data_ptr():
                mine.detach().copy_(trained[name].detach())
            self.processes.complete(t, self.by_members and name in by_member)
        posterior.one_by_one = self.posterior.one_by_one

    # -- rows

    def rows(self, n: int) -> range:
        """The rows of n that this process computes: all, unless rows are shared out."""
        return self.processes.part(n) if self.by_rows else range(n)

    def check_step(self, losses: nn.Module, x: Inputs, y: Tensor, own: bool) -> None:
        """Find out what random calls draw for each row; raise ValueError if rows of a batch cannot be shared out.

        losses: (inputs, targets) -> the loss of each member. own: whether each member has its own batch.
        """
        if not self.by_rows:
            return
        axis, n = int(own), y.shape[int(own)]

        def run(rows: list[int], part: PartOfBatch | None = None) -> tuple[Tensor, State, dict]:
            numbers = torch.tensor(rows, device=y.device)
            cut = lambda t: t.index_select(axis, numbers)
            state = {name: t.detach().clone() for name, t in state_of(losses).items()}
            devices = [y.device] if y.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices), recorded_shapes() as shapes:
                torch.manual_seed(0)
                if part is None:
                    values = call(losses, state, (map_inputs(cut, x), cut(y)))
                else:
                    with part_of_batch(part):
                        values = call(losses, state, (map_inputs(cut, x), cut(y)))
            return values.detach(), state, shapes

        two, three = (run([i % n for i in range(count)])[2] for count in (2, 3))
        self._axes = {c: _axis(two[c], three.get(c)) for c in two}
        count = min(n, _ROWS_COMPARED)
        if count < 2:
            return
        whole, after, _ = run(list(range(count)))
        buffers = [name for name, t in losses.named_buffers() if not t.is_complex()]
        parts = [range(count // 3), range(count // 3, count)] if count > 2 else [range(1), range(1, 2)]
        joined = torch.zeros_like(whole)
        for rows in parts:
            values, of_part, _ = run(list(rows), PartOfBatch(rows.start, len(rows), count, self._axes))
            joined += values * len(rows) / count
            for name in buffers:
                if not torch.allclose(of_part[name].double(), after[name].double(), _APART, _APART, equal_nan=True):
                    raise ValueError(self._mixed(f"buffer '{name}' is computed from the rows of a batch"))
        if not torch.allclose(joined, whole, rtol=_APART, atol=_APART * float(whole.abs().max()), equal_nan=True):
            raise ValueError(self._mixed("the loss of a batch is not the mean of the losses of its rows"))

    def _mixed(self, what: str) -> str:
        """The error for rows that cannot be shared out."""
        layers = [
            f"module '{name}' ({type(m).__name__}) normalizes over the batch"
            for name, m in self.posterior.module.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
        ]
        return (
            f"{self.processes.size} processes cannot share out the rows of a batch: {(layers or [what])[0]} in "
            f"training. Use layers that take each row alone, like GroupNorm or LayerNorm, or freeze those layers; "
            f"train an ensemble of at least as many members as processes; or train in one process, with "
            f"processes=False"
        )

    # -- steps

    def step(
        self,
        step: Callable[[Inputs, Tensor], Tensor],
        trained: Mapping[str, Tensor],
        x: Inputs,
        y: Tensor,
        own: bool,
        number: int,
    ) -> Tensor:
        """The loss of each member on a batch, (members,), whose gradient is put in `grad` of the trained tensors.

        step: does so for the rows that it gets. number: of the step, by which a network that draws from torch's
        generator draws other noise than the members of other processes; all draw the same batches from it.
        """
        if self.by_members:
            with _own_noise(y.device, (torch.initial_seed() + (self.members.start << 32) + number) % 2**63):
                return step(x, y)
        if not self.by_rows:
            return step(x, y)
        axis, n = int(own), y.shape[int(own)]
        # a process without rows computes those of another with a weight of 0, to make the same changes as all others
        rows = self.rows(n) or range(1)
        weight = len(self.rows(n)) / n
        cut = lambda t: t.narrow(axis, rows.start, len(rows)).contiguous()
        with part_of_batch(PartOfBatch(rows.start, len(rows), n, self._axes)):
            losses = step(map_inputs(cut, x), cut(y))
        return self._averaged(losses, list(trained.values()), weight)

    def _averaged(self, losses: Tensor, parameters: list[Tensor], weight: float) -> Tensor:
        """Average losses and gradients over the processes, in one message for each dtype."""
        mine = [p.grad is not None for p in parameters]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        losses = losses.detach().clone()
        averaged = [torch.view_as_real(t) if t.is_complex() else t for t in (losses, *gradients)]
        sent: dict[torch.dtype, list[Tensor]] = {}
        for t in averaged:
            sent.setdefault(_summed_in(t), []).append(t.reshape(-1).to(_summed_in(t)) * weight)
        sent[_summed_in(losses)].append(torch.tensor(mine, device=losses.device, dtype=_summed_in(losses)))
        sums: dict[torch.dtype, Any] = {}
        for dtype, parts in sent.items():
            total = self.processes.sum(torch.cat(parts))
            sums[dtype] = iter(total.split([t.numel() for t in parts]))
        for t in averaged:
            t.copy_(next(sums[_summed_in(t)]).view(t.shape))
        # a parameter that no row used has no gradient, so that an optimizer leaves it as it is
        used = mine if all(mine) else next(sums[_summed_in(losses)]).tolist()
        for p, gradient, by_any in zip(parameters, gradients, used, strict=True):
            p.grad = gradient if by_any else None
        return losses


@contextlib.contextmanager
def _own_noise(device: torch.device, seed: int) -> Iterator[None]:
    """A context in which torch's generators start from this seed; afterwards they go on as before."""
    # not torch.random.fork_rng and torch.manual_seed, which take longer than the step of a small network
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _summed_in(t: Tensor) -> torch.dtype:
    """The dtype in which values are summed over processes."""
    return torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype


def _axis(two: tuple[int, ...], three: tuple[int, ...] | None) -> int | None:
    """The axis in which the shapes drawn for 2 and for 3 rows differ, or None."""
    if three is None or len(two) != len(three):
        return None
    return next((axis for axis, (a, b) in enumerate(zip(two, three, strict=True)) if a != b), None)


def _named(posterior: Posterior, likelihood: Likelihood) -> State:
    """The tensors of posterior and likelihood, by the names of `Model.by_member`."""
    named = {f"posterior.{n}": t for n, t in state_of(posterior).items()}
    return named | {f"likelihood.{n}": t for n, t in state_of(likelihood).items()}
