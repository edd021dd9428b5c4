"""Checkpoints of a training run: a safetensors file, whose header holds everything that is not a tensor as JSON."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vbdl.types import Json

FORMAT = 2
_FORMER = 1  # without the steps, so that a resumed training compiles anew and repeats to rounding

Whole = Callable[[str, Tensor], Tensor]
"""A function of a tensor's name and the tensor that joins it with the parts of other processes, or takes a part."""


def save_checkpoint(
    path,
    tensors: dict[str, Tensor],
    optimizer,
    schedule,
    history: object,
    epoch: int,
    steps: Json,
    whole: Whole | None = None,
    writes: bool = True,
) -> None:
    """Write a checkpoint to a temporary file and rename it to `path`, so that `path` is always a complete file.

    steps: the numbers that tell which code runs which step. whole: gathers a tensor by its name, of which this process
    may hold a part only. writes: whether this process writes the file, or only takes part in the gathering.
    """
    path = Path(path)
    flat = dict(tensors)
    state = optimizer.state_dict()
    plain: dict[str, Json] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                flat[f"optimizer.{index}.{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    if whole is not None:
        flat = {name: whole(name, t) for name, t in flat.items()}
    if not writes:
        return
    about = {
        "format": FORMAT,
        "epoch": epoch,
        "steps": steps,
        "history": asdict(history) if is_dataclass(history) and not isinstance(history, type) else history,
        "optimizer": {"plain": plain, "param_groups": state["param_groups"]},
        "schedule": None if schedule is None else _plain(schedule.state_dict()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    owned = {n: t.detach().cpu().contiguous().clone() for n, t in flat.items()}
    save_file(owned, partial, metadata={"vbdl": json.dumps(about)})
    os.replace(partial, path)


def load_checkpoint(path, optimizer, schedule, part: Whole | None = None) -> tuple[dict[str, Tensor], int, Json, Json]:
    """Restore optimizer and schedule from a checkpoint; return its tensors, the next epoch, the history and the steps.

    part: takes the part of a tensor, by its name, that this process holds.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("vbdl")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a checkpoint of vbdl ({error}): remove it, or give another path") from error
    if part is not None:
        tensors = {name: part(name, t) for name, t in tensors.items()}
    if about is None:
        raise ValueError(f"{path} is not a checkpoint of vbdl: remove it, or give another path")
    about = json.loads(about)
    if about["format"] not in (FORMAT, _FORMER):
        raise ValueError(
            f"{path} has checkpoint format {about['format']}, but this version of vbdl reads up to {FORMAT}: remove "
            f"it, or give another path"
        )
    state: dict[int, Json] = {}
    for name in [n for n in tensors if n.startswith("optimizer.")]:
        _, index, entry = name.split(".", 2)
        state.setdefault(int(index), {})[entry] = tensors.pop(name)
    for index, entries in about["optimizer"]["plain"].items():
        state.setdefault(int(index), {}).update(entries)
    groups = about["optimizer"]["param_groups"]
    # "initial_lr" was added by a schedule
    if [set(g) - {"initial_lr"} for g in groups] != [
        set(g) - {"initial_lr"} for g in optimizer.state_dict()["param_groups"]
    ]:
        raise ValueError(f"the checkpoint {path} was saved with another optimizer: remove it, or give another path")
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    if schedule is not None and about["schedule"] is not None:
        schedule.load_state_dict(about["schedule"])
    return tensors, about["epoch"], about["history"], about.get("steps", {"steps": 0, "begun": {}})


def _plain(state: Json) -> Json:
    """The entries of a schedule's state that JSON can hold; the schedule's constructor restores the others."""
    kept = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            value = value.item() if value.numel() == 1 else value.tolist()
        try:
            json.dumps(value)
        except TypeError:
            continue
        kept[name] = value
    return kept
