"""The rows behind a result, in one safetensors file: what the report draws from and `vbdl compare` pairs."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vbdl.bench.summary import Rows
from vbdl.bench.task import Task

CASES = 12  # most uncertain test rows kept with their inputs


def save(path: Path, task: Task, rows: Rows, ood: dict[str, Rows]) -> None:
    """Written beside and renamed, so that a file that is there is whole.

    Tensors: total, aleatoric, epistemic, nll, loss of each test row (splits, rows); pit and mean, or confidence,
    label and predicted; `ood.<i>.total` and so on of the sets named in the metadata; `case.*` of the most uncertain
    rows of the first split.
    """
    y = task.test[1]
    found: dict[str, Tensor] = {}
    for name in ("total", "aleatoric", "epistemic", "nll", "loss", "pit", "mean", "crps"):
        value = getattr(rows, name)
        if value is not None:
            found[name] = value.float()
    if rows.probs is not None:
        found["confidence"], predicted = (t for t in rows.probs.float().max(-1))
        found["predicted"], found["label"] = predicted.to(torch.int16), y.to(torch.int16)
    else:
        scale, centre = torch.tensor(task.scale), torch.tensor(task.centre)
        found["target"] = y[..., 0] * scale[:, None] + centre[:, None]
    worst = rows.total[0].argsort(descending=True)[:CASES]
    found["case.row"] = worst.to(torch.int32)
    found["case.input"] = _pictures(task, task.test[0][0, worst])
    for index, (name, outside) in enumerate(ood.items()):
        for part in ("total", "aleatoric", "epistemic"):
            found[f"ood.{index}.{part}"] = getattr(outside, part).float()
        # the rows that a threshold on the uncertainty would let pass
        passed = outside.total[0].argsort()[:6]
        found[f"ood.{index}.input"] = _pictures(task, task.ood[name][0, passed])
        found[f"ood.{index}.row"] = passed.to(torch.int32)
    about: dict[str, Any] = {
        "classes": task.classes,
        "columns": task.columns,
        "ood": list(ood),
        "image": task.image is not None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    contiguous = {n: t.detach().contiguous().clone() for n, t in found.items()}
    save_file(contiguous, partial, metadata={"vbdl": json.dumps(about)})
    os.replace(partial, path)


def _pictures(task: Task, x: Tensor) -> Tensor:
    """Images as (rows, height, width, channels) bytes; tables as they are, standardized."""
    if task.image is None:
        return x.float()
    factor, offset = task.image
    pixels = (x * factor + offset).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1)
