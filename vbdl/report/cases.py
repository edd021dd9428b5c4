"""Single rows for the report: the most uncertain test rows and the least uncertain out-of-distribution rows."""

from dataclasses import dataclass

from torch import Tensor

from vbdl.report.png import data_url
from vbdl.report.run import RowsRecord

_COLUMNS = 6  # features shown of a row of a table, those furthest from the training mean


@dataclass(frozen=True)
class Case:
    """A row of a data set, shown as an image or by its most unusual features, with its prediction."""

    row: int  # index in the test part of the first split
    picture: str | None
    features: list[tuple[str, float]]  # (name, standard deviations from the training mean)
    truth: str
    predicted: str
    right: bool | None
    total: float
    epistemic: float


def cases(tensors: dict[str, Tensor], about: RowsRecord) -> dict[str, list[Case]]:
    """The cases by heading: the test rows of largest, and the out-of-distribution rows of smallest uncertainty."""
    by_heading = {"Most uncertain test rows": _of_test(tensors, about)}
    for index, name in enumerate(about["ood"]):
        total, epistemic = tensors[f"ood.{index}.total"][0], tensors[f"ood.{index}.epistemic"][0]
        rows = tensors[f"ood.{index}.row"].tolist()
        least_uncertain = []
        for row, x in zip(rows, tensors[f"ood.{index}.input"], strict=True):
            picture, features = _shown(x, about)
            least_uncertain.append(
                Case(row, picture, features, name, "", None, float(total[row]), float(epistemic[row]))
            )
        by_heading[f"Least uncertain of {name}"] = least_uncertain
    return by_heading


def _of_test(tensors: dict[str, Tensor], about: RowsRecord) -> list[Case]:
    uncertain = []
    for row, x in zip(tensors["case.row"].tolist(), tensors["case.input"], strict=True):
        picture, features = _shown(x, about)
        if "label" in tensors:
            label, predicted = int(tensors["label"][0, row]), int(tensors["predicted"][0, row])
            truth, predicted_text = about["classes"][label], about["classes"][predicted]
            predicted_text = f"{predicted_text} ({float(tensors['confidence'][0, row]):.0%})"
            right = label == predicted
        else:
            target, mean = float(tensors["target"][0, row]), float(tensors["mean"][0, row])
            std = float(tensors["total"][0, row]) ** 0.5
            truth, predicted_text = f"{target:.4g}", f"{mean:.4g} ± {std:.2g}"
            right = abs(target - mean) <= 2 * std
        total, epistemic = float(tensors["total"][0, row]), float(tensors["epistemic"][0, row])
        uncertain.append(Case(row, picture, features, truth, predicted_text, right, total, epistemic))
    return uncertain


def _shown(x: Tensor, about: RowsRecord) -> tuple[str | None, list[tuple[str, float]]]:
    if about["image"]:
        return data_url(x), []
    flat = x.flatten()
    furthest = flat.abs().argsort(descending=True)[:_COLUMNS].tolist()
    names = about["columns"] or [f"feature {j + 1}" for j in range(len(flat))]
    return None, [(names[j], float(flat[j])) for j in furthest]
