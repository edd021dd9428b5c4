"""Write what `test_golden.py` compares with: python tests/golden/make.py FOLDER

Run at 361ba7c, the last commit before the house was rebuilt: its predictions, and an artefact of each predictor.
`python tests/golden/make.py FOLDER --changed`, run later, writes the numbers of the cases that are others on purpose.
"""

import sys
from pathlib import Path

import torch
from cases import CASES, CHANGED, TRAINING, predict
from machine import machine
from safetensors.numpy import save_file

import vbdl


def first(folder: Path) -> None:
    arrays = {}
    for name, make in CASES.items():
        predictor = make()
        arrays |= {f"{name}/{field}": array.copy() for field, array in predict(name, predictor).items()}
        sampling = predictor if predictor.estimator == "sampling" else predictor.replace(estimator="sampling")
        stored = sampling.save(folder / "artefacts" / name.replace(" ", "-"))
        (stored / "README.md").unlink()  # for people
    for name, train in TRAINING.items():
        arrays |= {f"training/{name}/{parameter}": array.copy() for parameter, array in train().items()}
    save_file(arrays, folder / "predictions.safetensors", metadata={"machine": machine()})


def changed(folder: Path) -> None:
    arrays = {}
    for case in CHANGED:
        how, _, name = case.partition(":")
        predictor = CASES[name]() if how == "built" else vbdl.load(folder / "artefacts" / name.replace(" ", "-"))
        arrays |= {f"{case}/{field}": array.copy() for field, array in predict(name, predictor).items()}
    save_file(arrays, folder / "changed.safetensors", metadata={"machine": machine()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (changed if "--changed" in sys.argv else first)(Path(sys.argv[1]))
