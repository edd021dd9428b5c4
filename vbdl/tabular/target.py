"""The target of a table: classes or a number, inferred from its cells, with the reason."""

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from vbdl.likelihoods.centered import is_far
from vbdl.likelihoods.normal_mixture import check_spread
from vbdl.tabular.cells import decoded, floats, is_text, text, texts, without
from vbdl.tabular.numerals import PLAIN, Recognized, Written, recognize
from vbdl.tabular.reading import NULLS, ArrowColumn, Reading, compute

MAX_CLASSES = 1000
_FEW = 10  # whole numbers with at most this many different values are taken for classes


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The target of a table's model.

    classes: names in the order of the network's outputs, or None for a number. mean, std: of the training rows; the
    network standardizes a number with them, and predicts it in the target's own unit. labels: type of a class in files,
    "text", "integer" or "boolean". missing: words for a missing target. written: notation of numbers in text.
    precise: whether numbers far from zero, compared with their std, stay float64; False in older models.
    """

    name: str
    classes: tuple[str, ...] | None = None
    labels: Literal["text", "integer", "boolean"] = "text"
    mean: float = 0.0
    std: float = 1.0
    reason: str = ""
    missing: tuple[str, ...] = tuple(NULLS)
    written: Written | None = None
    precise: bool = False

    @property
    def far(self) -> bool:
        """Whether the target's numbers are too far from zero for float32."""
        return self.classes is None and self.precise and is_far(self.mean, self.std)

    @property
    def task(self) -> str:
        return "regression" if self.classes is None else "classification"

    def __str__(self) -> str:
        if self.classes is None:
            return f"{self.name}, a number (regression): {self.reason}"
        shown = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
        return f"{self.name}, {len(self.classes)} classes (classification): {self.reason}. {shown}"

    def label(self, number: int) -> str | int | bool:
        """The label of a class, in its type in files."""
        assert self.classes is not None
        name = self.classes[number]
        return int(name) if self.labels == "integer" else name == "true" if self.labels == "boolean" else name

    def encode(self, column: ArrowColumn) -> tuple[Tensor, Tensor]:
        """Return the targets of a column, and (rows,) bool, whether the row has one.

        Targets are (rows,) class numbers, or (rows, 1) numbers, float64 if float32 is too coarse. Raises ValueError for
        an unknown class or a number that cannot be read.
        """
        if self.classes is None:
            values, missing, rejected = floats(column, self.name, self.missing, self.written)
            bad = [
                *rejected.items(),
                *((int(r), f"{values[r]} is not finite") for r in np.flatnonzero(np.isinf(values))),
            ]
            if bad:
                raise ValueError(f"target of row {bad[0][0]}: {bad[0][1]}")
            known = torch.from_numpy(~missing)
            y = torch.from_numpy(np.where(missing, self.mean if self.far else 0.0, values))
            y = y if self.far else y.to(torch.float32)
            return y.unsqueeze(1), known
        import pyarrow as pa

        pc = compute()

        words = without(texts(column), [w for w in self.missing if w not in self.classes])
        known = torch.from_numpy(pc.is_valid(words).to_numpy(zero_copy_only=False).copy())
        places = pc.index_in(words, value_set=pa.array(self.classes, pa.string()))
        numbers = torch.from_numpy(pc.fill_null(places, -1).to_numpy(zero_copy_only=False).astype(np.int64))
        strange = ((numbers < 0) & known).nonzero().flatten()
        if strange.numel():
            row = int(strange[0])
            raise ValueError(
                f"target of row {row} is {words[row].as_py()!r}, which training did not have: {list(self.classes)[:20]}"
            )
        return numbers.clamp_min(0), known


def has_target(column: ArrowColumn, missing: Sequence[str] = ()) -> np.ndarray:
    """Return (rows,) bool: whether the cell has a value, which null, NaN, empty text and words for missing are not."""
    column = decoded(column)
    if is_text(column.type):
        column = without(column, missing)
    return ~compute().is_null(column, nan_is_null=True).to_numpy(zero_copy_only=False)


def as_numbers(column: ArrowColumn, name: str, reading: Reading | None = None) -> Recognized | None:
    """Return the notation of numbers in a column of text, or None if it holds other text."""
    reading = reading or Reading()
    words = without(decoded(column), reading.missing)
    counts = {
        str(e["values"]): e["counts"] for e in compute().value_counts(words).to_pylist() if e["values"] is not None
    }
    recognized = recognize(counts, name, reading.decimal, reading.thousands)
    return recognized if isinstance(recognized, Recognized) else None


def decide(column: ArrowColumn, name: str, task: str | None = None, reading: Reading | None = None) -> tuple[str, str]:
    """Return ("classification" or "regression", reason). Raises ValueError if the column cannot be a target."""
    import pyarrow as pa

    pc = compute()

    categories = pa.types.is_dictionary(column.type)
    column = decoded(column)
    kind = column.type
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    number = number or pa.types.is_duration(kind)
    word = is_text(kind) or pa.types.is_boolean(kind)
    if not (number or word):
        raise ValueError(f"the target {name!r} holds {kind}: a target is a number, text or true and false")
    recognized = as_numbers(column, name, reading) if is_text(kind) and task != "classification" else None
    if task == "regression" and not number and recognized is None:
        raise ValueError(f"the target {name!r} holds {kind}, which has no mean: it can only be classified")
    if task is not None:
        return task, "as asked"
    if recognized is not None and not categories and _amounts(column, recognized, reading):
        shown, value = recognized.example
        return "regression", f"it holds text that is numbers, {shown!r} is {value:.12g}"
    if is_text(kind) and not categories:
        _check_words(column, name, reading)
    if word:
        return "classification", f"it holds {'text' if not pa.types.is_boolean(kind) else 'true and false'}"
    values = floats(pc.drop_null(column), name)[0]
    values = values[~np.isnan(values)]
    different = np.unique(values)
    whole = bool((different == np.round(different)).all())
    if whole and len(different) <= _FEW:
        return "classification", f"{len(different)} different whole numbers (task regression reads them as amounts)"
    if whole:
        return "regression", f"{len(different)} different whole numbers"
    return "regression", "it holds numbers with decimals"


def _check_words(column: ArrowColumn, name: str, reading: Reading | None) -> None:
    """Raise ValueError for text with numbers in nearly all cells, which is not meant as a class for each number."""
    cells = [word for word in column.to_pylist() if word is not None]
    cells = [word for word in cells if word.strip() not in {"", *(reading or Reading()).missing}]
    odd = [word for word in cells if not _is_number(word)]
    numbers = set(cells) - set(odd)
    if odd and len(numbers) > _FEW and len(odd) <= _ODD * len(cells):
        raise ValueError(
            f"the target {name!r} holds {len(cells) - len(odd)} numbers and {len(odd)} cells that are none, like "
            f"{odd[0]!r}: mend them or say that they are missing (--missing {odd[0]!r}); task classification takes "
            f"each different cell for a class"
        )


_ODD = 0.1  # largest fraction of other cells


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word.replace(",", "").strip(" %€$£")))
    except ValueError:
        return False


def _amounts(column: ArrowColumn, recognized: Recognized, reading: Reading | None) -> bool:
    """Whether numbers in text are amounts rather than names of classes, which may be digits too."""
    missing = [*(reading or Reading()).missing, *recognized.missing]
    values = np.unique(floats(column, "", missing, recognized.written)[0])
    values = values[~np.isnan(values)]
    whole = bool((values == np.round(values)).all())
    return len(values) > _FEW and (recognized.written != PLAIN or not whole)


def fit_target(
    column: ArrowColumn, name: str, training: np.ndarray, task: str | None = None, reading: Reading | None = None
) -> Target:
    """Return the target, with classes from the whole column, or mean and std from the training rows."""
    import pyarrow as pa

    missing = (reading or Reading()).missing
    task, reason = decide(column, name, task, reading)
    column = decoded(column)
    kind = column.type
    if task == "regression":
        recognized = as_numbers(column, name, reading) if is_text(kind) else None
        written = None if recognized is None else recognized.written
        missing = missing if recognized is None else (*missing, *recognized.missing)
        values, _, _ = floats(column, name, missing, written)
        values = values[training]
        values = values[np.isfinite(values)]
        if len(values) == 0 or values.min() == values.max():
            raise ValueError(f"the target {name!r} has one value in all training rows: there is nothing to learn")
        with np.errstate(over="ignore"):
            std = float(values.std())
        check_spread(std, f"the target {name!r}")
        mean = float(values.mean())
        return Target(
            name=name, mean=mean, std=std, reason=reason, missing=missing, written=written, precise=is_far(mean, std)
        )
    words = without(texts(column), missing)
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        words = pa.array(
            [None if v != v or v is None else text(float(v)) for v in floats(column, name)[0]], pa.string()
        )
    classes = [w for w in words.unique().to_pylist() if w is not None]
    if len(classes) < 2:
        raise ValueError(f"the target {name!r} has {len(classes)} class: there is nothing to tell apart")
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"the target {name!r} has {len(classes)} classes, more than {MAX_CLASSES}: is it an id?")
    labels = "boolean" if pa.types.is_boolean(kind) else "text"
    if labels == "text" and not is_text(kind):
        labels = "integer" if all(w.lstrip("-").isdigit() for w in classes) else "text"
    classes = sorted(classes, key=int) if labels == "integer" else sorted(classes)
    return Target(name=name, classes=tuple(classes), labels=labels, reason=reason, missing=missing)
