"""Training data: the accepted types, the checks of rows, and the order in which each member sees the rows."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from vbdl import former
from vbdl.calling.inputs import flatten, map_inputs, mapping, tensor_of, tensors
from vbdl.types import Inputs

Data = Dataset | DataLoader | Sequence[object]
"""Training data: (inputs, targets) as tensors or arrays, a Dataset of such pairs, or a DataLoader."""


def as_tensor(value: object) -> Any:  # of the kind of the value
    """The value with every NumPy array in it replaced by a tensor; lists become tuples."""
    if isinstance(value, np.ndarray):
        return tensor_of(value)
    if isinstance(value, dict):
        return {k: as_tensor(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(as_tensor(v) for v in value)
    return value


def whole(data: object) -> tuple[Inputs, Tensor]:
    """All rows as (inputs, targets), from arrays, tensors, a TensorDataset or any Dataset of (input, target) pairs.

    Arrays in memory-mapped files are not read; `check_rows` does.
    """
    if isinstance(data, TensorDataset):
        *x, y = data.tensors
        return (x[0] if len(x) == 1 else tuple(x)), y
    if isinstance(data, IterableDataset):
        raise TypeError("an IterableDataset is a stream: give fit a DataLoader of it, or its rows as tensors")
    if isinstance(data, Dataset):
        rows = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
        if not rows:
            raise ValueError("there are no rows to train on")
        return _pair(_collated(rows), "a Dataset must have")
    if isinstance(data, DataLoader):
        raise TypeError("all rows are needed at once here, as for validation: give tensors or a Dataset, no DataLoader")
    if isinstance(data, Sequence) and len(data) == 2:
        return flatten(data[0]).nested, torch.as_tensor(as_tensor(data[1]))
    raise TypeError(
        f"data must be (inputs, targets) as tensors or arrays, a Dataset or a DataLoader; got {type(data).__name__}: "
        f"put other collections, like a dataset of Hugging Face, into a DataLoader"
    )


def _collated(rows: list[Any]) -> Any:  # of the structure that all rows have
    """Join the rows of a Dataset along a new first axis, in the structure of a row; None and texts stay as they are."""
    first = rows[0]
    if first is None or isinstance(first, str):
        if any(row is not first and row != first for row in rows):
            raise ValueError(
                f"where one row of the Dataset has {first!r}, another has something else: all need the same"
            )
        return first
    if isinstance(first, Mapping):
        return mapping(type(first), {name: _collated([row[name] for row in rows]) for name in first})
    if isinstance(first, list | tuple):
        parts = [_collated(list(part)) for part in zip(*rows, strict=True)]
        return tuple(parts) if type(first) in (list, tuple) else type(first)(*parts)  # a named tuple
    return default_collate(rows)


TARGETS = ("labels", "label", "targets", "target")
"""The names under which a dict has its targets; Hugging Face's collators use the first."""


def _pair(item: object, source: str) -> tuple[Inputs, Tensor]:
    """The inputs and the targets of an item: a pair, or a dict with its targets under one of the names in `TARGETS`.

    The other entries of a dict are inputs by argument name. Raises TypeError for anything else, and for a dict that
    has none of these names, or several.

    source: subject and verb of that error, e.g. "a Dataset must have".
    """
    if isinstance(item, Sequence) and len(item) == 2 and not isinstance(item, str):
        return flatten(item[0]).nested, torch.as_tensor(as_tensor(item[1]))
    if isinstance(item, Mapping):
        names = [name for name in TARGETS if name in item]
        if len(names) == 1:
            inputs = {name: value for name, value in item.items() if name != names[0]}
            if not inputs:
                raise TypeError(f"{source} inputs beside the targets {names[0]!r}, got a dict of nothing else")
            return flatten(inputs).nested, torch.as_tensor(as_tensor(item[names[0]]))
        kind = f"a dict of {list(item)}"
        raise TypeError(
            f"{source} (inputs, targets), or a dict with its targets under one of the names {', '.join(TARGETS)}; got "
            f"{kind}: rename the entry that holds the targets to 'labels'"
            + (f", and take the other away, as both {names} are there" if names else "")
        )
    kind = f"a sequence of {len(item)}" if isinstance(item, Sequence) else type(item).__name__
    raise TypeError(
        f"{source} (inputs, targets), got {kind}: put several inputs first, as one tuple or one dict by argument name"
    )


_NUMBERS_AT_ONCE = 1 << 20  # of the inputs, when all rows are looked through


def blocks(x: Inputs, n: int) -> Iterator[range]:
    """The numbers of n rows in blocks that are small enough to be held in memory beside the rows."""
    numbers = sum(t[:1].numel() for t in tensors(x))
    rows = max(1, _NUMBERS_AT_ONCE // max(1, numbers))
    for start in range(0, n, rows):
        yield range(start, min(n, start + rows))


def check_sizes(x: Inputs, y: Tensor) -> None:
    """Raise ValueError if inputs and targets differ in their number of rows or have none."""
    inputs = tensors(x)
    if not inputs:
        raise TypeError("inputs must be tensors or arrays: one, a tuple of them, or a dict by argument name; got none")
    sizes = {t.shape[0] for t in [*inputs, y]}
    if len(sizes) != 1:
        raise ValueError(f"inputs and targets disagree on the number of rows: {sorted(sizes)}")
    if sizes == {0}:
        raise ValueError("there are no rows to train on")


def check_finite(x: Inputs, first: int = 0, takes: Callable[[Inputs], bool] = lambda rows: False) -> None:
    """Raise ValueError if inputs are not finite.

    first: the number of the first row. takes: whether the network makes finite numbers of rows that are not finite.
    """
    for t in [t for t in tensors(x) if t.is_floating_point()]:
        bad: list[Tensor] = []
        for rows in blocks(t, len(t)):
            finite = t[rows.start : rows.stop].isfinite()
            if not bool(finite.all()):
                bad.append((~finite.flatten(1).all(1)).nonzero().flatten() + rows.start)
        if bad and not takes(take(x, numbers := torch.cat(bad))):
            raise ValueError(
                f"{len(numbers)} input rows are not finite, the first is row {int(numbers[0]) + first}: remove or "
                f"impute them"
            )


def floating_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the module's first floating-point parameter, or None if it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def check_dtype(
    tensors: Iterable[Tensor], floating: torch.dtype | None, takes: Callable[[], bool] = lambda: False
) -> None:
    """Raise ValueError if a floating-point input has another dtype than `floating`, that of the module's parameters.

    takes: whether the network converts inputs of another dtype itself; asked only if there are any.
    """
    others = [t.dtype for t in tensors if floating is not None and t.is_floating_point() and t.dtype != floating]
    if others and not takes():
        raise ValueError(
            f"inputs are {others[0]} and the module's parameters {floating}: convert with x.to({floating}), an array "
            f"with x.astype({str(floating).removeprefix('torch.')!r})"
        )


_GRAPH = "if the rows are the nodes of a graph, make the graph one row, (1, nodes, features), as docs/networks.md does"


def cannot_take(x: Inputs, error: Exception, module: nn.Module | None = None) -> ValueError:
    """A ValueError that names the rows' shapes and dtypes and wraps the module's own error."""
    if module is not None and (range_error := outside_range(x, error, [module])) is not None:
        return range_error
    if (kept_error := kept_tensor(error)) is not None:
        return kept_error
    leaves = tensors(x)
    shapes = ", ".join(f"{tuple(t.shape[1:])} {t.dtype}" for t in leaves)
    hint = ""
    if isinstance(error, IndexError) and "out of bounds for dimension 0" in str(error):
        hint = f"; {_GRAPH}"
    elif not isinstance(error, IndexError) and not all(t.is_floating_point() for t in leaves):
        hint = "; convert integers that are not indices with x.to(torch.float32)"
    elif all(t.ndim == 1 for t in leaves):
        hint = "; each row is one number: if the inputs are one row, give them a batch axis, x[None]"
    elif module is not None and len(leaves) == 1:
        hint = _of_channels(tuple(leaves[0].shape[1:]), module)
    return ValueError(f"the module cannot take rows of {shapes}: {error}{hint}")


def _of_channels(row: tuple[int, ...], module: nn.Module) -> str:
    """What to do about a row whose channels are missing or misplaced for the first convolution, or ""."""
    first = next((m for m in module.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    if first is None:
        return ""
    axes, channels = len(first.kernel_size), first.in_channels
    if len(row) == axes and channels == 1:
        return "; the axis of the channels is missing: use x.unsqueeze(1), (batch, 1, ...)"
    if len(row) == axes + 1 and row[0] != channels == row[-1]:
        return "; the channels are the last axis, and torch has them before height and width: use x.movedim(-1, 1)"
    if len(row) != axes + 1 or row[0] != channels:
        return f"; its first convolution takes rows of {channels} channels and {axes} more axes"
    return ""


def unknown_argument(x: Inputs, error: Exception) -> ValueError | None:
    """A ValueError for inputs by name of which a network's forward does not take one, or None for any other error."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if found is None or not isinstance(x, Mapping) or found[1] not in x:
        return None
    return ValueError(
        f"the rows have {list(x)}, and the network's forward takes no argument '{found[1]}': leave out that entry, "
        f"e.g. in the collate_fn of a DataLoader, or name it as the forward does"
    )


def kept_tensor(error: Exception) -> ValueError | None:
    """A ValueError for a network that keeps a tensor in an attribute between calls, or None for any other error.

    error: raised by torch, which finds a tensor of an earlier `vmap` in the attribute.
    """
    if "escaped from inside a function being vmapped" not in str(error):
        return None
    return ValueError(
        "the network keeps a tensor in an attribute from one call to the next, which members would share: make it a "
        "buffer with register_buffer(name, tensor), so that each has its own"
    )


def outside_range(x: object, error: Exception, modules: Iterable[nn.Module]) -> ValueError | None:
    """A ValueError that names the ids in the inputs and the embeddings that are too small for them.

    error: raised by torch or compiled code. Returns None unless `error` is about an index out of range.
    """
    if not re.search(r"index out of range in self|index out of bounds|not in the valid range", str(error)):
        return None
    ids = [t for t in tree_leaves(x) if isinstance(t, Tensor) and not t.is_floating_point() and t.numel()]
    tables = [
        (name.removeprefix("inner."), type(m).__name__, m.num_embeddings)
        for module in modules
        for name, m in module.named_modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    ]
    if ids:
        low, high = min(int(t.min()) for t in ids), max(int(t.max()) for t in ids)
        small = [f"'{m}' ({kind}) takes 0 to {n - 1}" for m, kind, n in dict.fromkeys(tables) if low < 0 or high >= n]
        if small:
            return ValueError(f"the ids in the inputs run from {low} to {high}, but module {', '.join(small)}")
    return ValueError(
        "the module computed an index out of range from its inputs: check that ids and lengths are within the range "
        f"that it was built for; {_GRAPH}"
    )


def holdout(n: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """The ascending row numbers to train on and, disjoint, a random fraction of all rows to validate on."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be a share of the rows between 0 and 1, got {fraction}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    count = round(n * fraction)
    if not 0 < count < n:
        raise ValueError(f"{fraction} of {n} rows leaves nothing to validate or to train on: give another share")
    return order[count:].sort().values, order[:count].sort().values


def take(x: Inputs, rows: Tensor) -> Inputs:
    """The rows with these numbers of every input; rows: (...) int64, which replace the first axis."""
    if isinstance(x, Tensor):
        return rows_of(x, rows)
    return map_inputs(lambda t: rows_of(t, rows), x)


def rows_of(t: Tensor, rows: Tensor) -> Tensor:
    """t[rows], (*rows.shape, *t.shape[1:]), by `index_select`, which is many times faster for rows of a few numbers."""
    if not t.is_contiguous():  # as images with channels last, whose layout indexing keeps
        return t[rows]
    if rows.ndim == 1:
        return t.index_select(0, rows.to(t.device))
    return t.index_select(0, rows.flatten().to(t.device)).view(*rows.shape, *t.shape[1:])


class MemberRows:
    """Batches of a data set in memory: each member sees its own rows in its own order, or all see one order.

    rows: (members, n) row numbers, or (1, n) for all members. own: whether each member has its own batches, so that a
    batch (x, y) has a leading members axis. The order of an epoch depends only on the member's seed and the epoch, so
    that a resumed run sees the same batches as an uninterrupted one.
    """

    def __init__(self, x: Inputs, y: Tensor, rows: Tensor, batch_size: int, seeds: list[int], own: bool):
        self.x, self.y, self.rows, self.batch_size, self.seeds, self.own = x, y, rows, batch_size, seeds, own

    def __len__(self) -> int:
        return -(-self.rows.shape[1] // self.batch_size)

    def steps_with(self, rows: int) -> int:
        """The number of batches of so many rows in an epoch: all but the last have `batch_size`."""
        whole, rest = divmod(self.rows.shape[1], self.batch_size)
        return whole if rows == self.batch_size else int(rows == rest)

    def epoch(self, number: int) -> Iterator[tuple[Inputs, Tensor]]:
        orders = [self._order(number, index) for index in range(len(self.seeds))]
        return self._batches(torch.stack(orders) if self.own else orders[0])

    def epoch_of(self, member: int, number: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield the batches of one member, (batch, ...) each."""
        return self._batches(self._order(number, member))

    def _order(self, number: int, index: int) -> Tensor:
        """Draw the order in which an epoch takes a member's rows: their numbers, (n,)."""
        generator = torch.Generator().manual_seed((self.seeds[index] * 1_000_003 + number) % 2**63)
        return self.rows[min(index, len(self.rows) - 1)][torch.randperm(self.rows.shape[1], generator=generator)]

    def _batches(self, order: Tensor) -> Iterator[tuple[Inputs, Tensor]]:
        for picked in order.split(self.batch_size, dim=-1):
            yield self._batch(picked)

    def _batch(self, picked: Tensor) -> tuple[Inputs, Tensor]:
        """The rows with these numbers, (batch,), or (members, batch) if each member has its own."""
        return take(self.x, picked), rows_of(self.y, picked)


class Batches:
    """Batches of a DataLoader, (inputs, targets), the same for all members.

    check: raises ValueError for inputs that are not finite.
    """

    own = False

    def __init__(self, loader: DataLoader, check: Callable[[Inputs], None] = check_finite):
        self.loader, self._check = loader, check

    def __len__(self) -> int:
        try:
            return len(self.loader)
        except TypeError:  # a stream of unknown length, which has at least one batch
            return 1

    def steps_with(self, rows: int) -> int:
        """The number of batches of so many rows in an epoch, if all but one have the loader's batch size."""
        return len(self) if self.loader.batch_size in (None, rows) else 1

    def epoch(self, number: int) -> Iterator[tuple[Inputs, Tensor]]:
        if getattr(self.loader, "_iterator", None) is not None:
            # workers that persist got their seed in an earlier epoch; others draw it before the order of the rows,
            # which is to be the same in every training and in one that is resumed
            torch.empty((), dtype=torch.int64).random_(generator=self.loader.generator)
        empty = True
        for batch in self.loader:
            x, y = _pair(batch, "a DataLoader must yield")
            check_sizes(x, y)
            self._check(x)
            yield x, y
            empty = False
        if empty:
            raise ValueError(
                f"the DataLoader yielded no batch in epoch {number}: check that it has rows, and that an "
                f"IterableDataset begins anew in every epoch, with __iter__ that returns a new iterator"
            )


def bootstrap(n: int, seed: int) -> Tensor:
    """Draw n of n row numbers with replacement. Efron, Bootstrap Methods: Another Look at the Jackknife, 1979."""
    return torch.randint(n, (n,), generator=torch.Generator().manual_seed(seed))


__getattr__ = former.names(__name__, {"Rows": "MemberRows"})
