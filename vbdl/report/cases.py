"""The rows a method was least sure of, and those out of distribution that it was surest of."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vbdl.report.png import data_url

_COLUMNS = 6  # features shown of a row of a table: those furthest from the training mean


@dataclass(frozen=True)
class Case:
    """One row: an image or its most unusual features, and what was said of it."""

    row: int  # of the test part of the first split
    picture: str | None
    features: list[tuple[str, float]]  # (name, standard deviations from the training mean)
    truth: str
    predicted: str
    right: bool | None
    total: float
    epistemic: float


def cases(tensors: dict[str, Tensor], about: dict[str, Any]) -> dict[str, list[Case]]:
    """By heading."""
    found = {"Most uncertain test rows": _of_test(tensors, about)}
    for index, name in enumerate(about["ood"]):
        total, epistemic = tensors[f"ood.{index}.total"][0], tensors[f"ood.{index}.epistemic"][0]
        rows = tensors[f"ood.{index}.row"].tolist()
        made = []
        for row, given in zip(rows, tensors[f"ood.{index}.input"], strict=True):
            picture, features = _shown(given, about)
            made.append(Case(row, picture, features, name, "", None, float(total[row]), float(epistemic[row])))
        found[f"Least uncertain of {name}"] = made
    return found


def _of_test(tensors: dict[str, Tensor], about: dict[str, Any]) -> list[Case]:
    made = []
    for row, given in zip(tensors["case.row"].tolist(), tensors["case.input"], strict=True):
        picture, features = _shown(given, about)
        if "label" in tensors:
            label, predicted = int(tensors["label"][0, row]), int(tensors["predicted"][0, row])
            truth, said = about["classes"][label], about["classes"][predicted]
            said = f"{said} ({float(tensors['confidence'][0, row]):.0%})"
            right = label == predicted
        else:
            target, mean = float(tensors["target"][0, row]), float(tensors["mean"][0, row])
            std = float(tensors["total"][0, row]) ** 0.5
            truth, said = f"{target:.4g}", f"{mean:.4g} ± {std:.2g}"
            right = abs(target - mean) <= 2 * std
        total, epistemic = float(tensors["total"][0, row]), float(tensors["epistemic"][0, row])
        made.append(Case(row, picture, features, truth, said, right, total, epistemic))
    return made


def _shown(given: Tensor, about: dict[str, Any]) -> tuple[str | None, list[tuple[str, float]]]:
    if about["image"]:
        return data_url(given), []
    flat = given.flatten()
    furthest = flat.abs().argsort(descending=True)[:_COLUMNS].tolist()
    names = about["columns"] or [f"feature {j + 1}" for j in range(len(flat))]
    return None, [(names[j], float(flat[j])) for j in furthest]
