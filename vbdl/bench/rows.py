"""Save the test rows of a result in one safetensors file, for the report's figures and `vbdl compare`."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vbdl.bench.summary import EvaluatedRows
from vbdl.bench.task import Task
from vbdl.report.run import RowsRecord

CASES = 12  # number of most uncertain test rows saved with their inputs


def save(path: Path, task: Task, rows: EvaluatedRows, ood: dict[str, EvaluatedRows]) -> None:
    """Save the rows of a result atomically: write a temporary file, then rename it.

    Tensors: total, aleatoric, epistemic, nll and loss of each test row, (splits, rows); pit, mean, crps and target of
    regressions, or confidence, label and predicted of classes; `ood.<i>.total` etc. of the out-of-distribution sets
    that the metadata names; `case.*` of the most uncertain rows of the first split.
    """
    y = task.test[1]
    tensors: dict[str, Tensor] = {}
    for name in ("total", "aleatoric", "epistemic", "nll", "loss", "pit", "mean", "crps"):
        value = vars(rows)[name]
        if value is not None:
            tensors[name] = value.float()
    if rows.probs is not None:
        tensors["confidence"], predicted = (t for t in rows.probs.float().max(-1))
        tensors["predicted"], tensors["label"] = predicted.to(torch.int16), y.to(torch.int16)
    else:
        scale, center = torch.tensor(task.scale), torch.tensor(task.center)
        tensors["target"] = y[..., 0] * scale[:, None] + center[:, None]
    worst = rows.total[0].argsort(descending=True)[:CASES]
    tensors["case.row"] = worst.to(torch.int32)
    tensors["case.input"] = _pictures(task, task.test[0][0, worst])
    for index, (name, outside) in enumerate(ood.items()):
        for part in ("total", "aleatoric", "epistemic"):
            tensors[f"ood.{index}.{part}"] = vars(outside)[part].float()
        # the least uncertain rows, which a threshold on the uncertainty would not detect
        passed = outside.total[0].argsort()[:6]
        tensors[f"ood.{index}.input"] = _pictures(task, task.ood[name][0, passed])
        tensors[f"ood.{index}.row"] = passed.to(torch.int32)
    about: RowsRecord = {
        "classes": list(task.classes),
        "columns": list(task.columns),
        "ood": list(ood),
        "image": task.image is not None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    contiguous = {n: t.detach().contiguous().clone() for n, t in tensors.items()}
    save_file(contiguous, partial, metadata={"vbdl": json.dumps(about)})
    os.replace(partial, path)


def _pictures(task: Task, x: Tensor) -> Tensor:
    """Images as bytes, (rows, height, width, channels); rows of tables unchanged, i.e. standardized."""
    if task.image is None:
        return x.float()
    factor, offset = task.image
    pixels = (x * factor + offset).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1)
