"""A schema from a table: which columns are inputs, of what kind, and what the training rows say of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vbdl.tabular.columns import Boolean, Categorical, Column, Date, Numeric, booleans, combined, days, floats, texts
from vbdl.tabular.reading import as_table, compute
from vbdl.tabular.schema import Schema
from vbdl.tabular.target import fit_target

KINDS = ("numeric", "categorical", "boolean", "date", "ignore")
MAX_CATEGORIES = 64  # the most frequent ones; the rest is `other`
MIN_ROWS = 5  # of a category with a number of its own


def kinds_of(numeric: Sequence[str] = (), categorical: Sequence[str] = (), date: Sequence[str] = ()) -> dict[str, str]:
    """{column: kind} for `infer`. ValueError where a column is in two of the lists."""
    kinds: dict[str, str] = {}
    for kind, names in (("numeric", numeric), ("categorical", categorical), ("date", date)):
        for name in names:
            if name in kinds:
                raise ValueError(f"column {name!r} is said to be {kinds[name]} and {kind}")
            kinds[name] = kind
    return kinds


def infer(
    table: Any,
    target: str,
    training: np.ndarray | None = None,
    kinds: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    task: str | None = None,
) -> tuple[Schema, dict[str, str]]:
    """The schema, and the columns that are not inputs with the reason.

    table: a pyarrow.Table. training: the rows whose means, medians and categories are taken; all unless given.
    kinds: column -> numeric, categorical, boolean, date or ignore, in place of what its type says.
    task: classification or regression, in place of what the target's cells say.

    Numbers are numeric, text and dictionaries categorical. ValueError for dates, lists and other types that no kind is
    chosen for: what they mean to the target is not for a program to guess.
    """
    names = as_table(table).column_names
    kinds = {**(kinds or {}), **{name: "ignore" for name in ignore}}
    for name in [target, *kinds]:
        if name not in names:
            raise ValueError(f"there is no column {name!r}; there are {names}")
    for name, kind in kinds.items():
        if kind not in KINDS:
            raise ValueError(f"column {name!r}: kind {kind!r} is none of {', '.join(KINDS)}")
    rows = np.arange(table.num_rows) if training is None else training
    columns: list[Column] = []
    left_out: dict[str, str] = {}
    for name in names:
        if name == target:
            continue
        if kinds.get(name) == "ignore":
            left_out[name] = "as asked"
            continue
        found = _column(name, table.column(name), rows, kinds.get(name))
        if isinstance(found, str):
            left_out[name] = found
        else:
            columns.append(found)
    if not columns:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"no column is left to predict {target!r} from. {why}")
    return Schema(columns=tuple(columns), target=fit_target(table.column(target), target, rows, task)), left_out


def _column(name: str, column: Any, rows: np.ndarray, kind: str | None) -> Column | str:
    """The column, or why it is not an input."""
    import pyarrow as pa

    column = combined(column)
    kind = kind or _kind(name, column)
    if pa.types.is_null(column.type):
        return "it has no value in any row"
    training = column.take(pa.array(rows))
    if kind == "categorical":
        return _categorical(name, training)
    read: Any = {"numeric": floats, "boolean": booleans, "date": days}[kind]
    values, missing, rejected = read(training, name)
    if rejected:
        row, reason = min(rejected.items())
        raise ValueError(f"row {int(rows[row])}, {reason}; {len(rejected)} such cells in training rows")
    known = values[~missing & np.isfinite(values)]
    if len(known) == 0:
        return "it has no value in any training row"
    with np.errstate(over="ignore", invalid="ignore"):
        spread = float(known.std())
    if not np.isfinite(spread):
        largest = float(np.abs(known).max())
        raise ValueError(
            f"column {name!r} has {largest:g} in it, too large to scale by: is it a code for a missing cell?"
        )
    if not spread > 0 and not missing.any():
        return f"it is {known[0]:g} in every training row"
    make: Any = {"numeric": Numeric, "boolean": Boolean, "date": Date}[kind]
    return make(
        name=name,
        mean=float(known.mean()),
        std=spread or 1.0,
        fill=float(np.median(known)),
        indicator=bool(missing.any()),
    )


def _kind(name: str, column: Any) -> str:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        return "numeric"
    if pa.types.is_dictionary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "categorical"
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        raise ValueError(
            f"column {name!r} holds dates, and what a date means to the target is not known: leave it out (--ignore "
            f"{name}), read it as days since 1970 (--date {name}), or, in vbdl fit, split by it (--time {name})"
        )
    raise ValueError(f"column {name!r} holds {kind}, which is no kind of input: leave it out (--ignore {name})")


def _categorical(name: str, training: Any) -> Categorical | str:
    pc = compute()

    words = texts(training)
    counted = {str(e["values"]): e["counts"] for e in pc.value_counts(words).to_pylist() if e["values"] is not None}
    if not counted:
        return "it has no value in any training row"
    rows = sum(counted.values())
    often = sorted((w for w, n in counted.items() if n >= MIN_ROWS), key=lambda w: (-counted[w], w))
    if not often or (len(counted) > 20 and len(counted) > rows / 2):
        return f"it has {len(counted)} different values in {rows} training rows: an id or free text, not categories"
    if len(counted) == 1 and words.null_count == 0:
        return f"it is {often[0]!r} in every training row"
    return Categorical(name=name, categories=tuple(sorted(often[:MAX_CATEGORIES])), indicator=words.null_count > 0)
