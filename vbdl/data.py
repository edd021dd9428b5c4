"""Training data in the forms people have it in, and the order each member sees it in."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from vbdl.stacking import map_inputs, tensors
from vbdl.types import Inputs


def as_tensor(value: Any) -> Any:
    """Arrays as tensors, in whatever structure they come."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, dict):
        return {k: as_tensor(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(as_tensor(v) for v in value)
    return value


def whole(data: Any) -> tuple[Inputs, Tensor]:
    """(inputs, targets) of everything: arrays, tensors, a TensorDataset or any Dataset of (input, target) pairs."""
    if isinstance(data, TensorDataset):
        *x, y = data.tensors
        return (x[0] if len(x) == 1 else tuple(x)), y
    if isinstance(data, IterableDataset):
        raise TypeError("an IterableDataset is a stream: give fit a DataLoader of it, or its rows as tensors")
    if isinstance(data, Dataset):
        rows = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
        return _pair(torch.utils.data.default_collate(rows), "a Dataset has")
    if isinstance(data, DataLoader):
        raise TypeError("rows that are needed as a whole, as for validation, come as tensors or a Dataset, not batches")
    if isinstance(data, Sequence) and len(data) == 2:
        x, y = as_tensor(data[0]), torch.as_tensor(as_tensor(data[1]))
        check_rows(x, y)
        return x, y
    raise TypeError(
        f"data is (inputs, targets) as tensors or arrays, a Dataset or a DataLoader; got {type(data).__name__}"
    )


def _pair(found: Any, whose: str) -> tuple[Any, Any]:
    """(inputs, targets), or TypeError that says what there is instead."""
    if isinstance(found, Sequence) and len(found) == 2:
        return found[0], found[1]
    what = f"a dict of {list(found)}" if isinstance(found, Mapping) else type(found).__name__
    if isinstance(found, Sequence):
        what = f"{len(found)} of them"
    raise TypeError(
        f"{whose} (inputs, targets), got {what}: several inputs are a tuple, or a dict by argument name, in the first "
        f"place"
    )


def check_rows(x: Inputs, y: Tensor) -> None:
    """ValueError where inputs and targets disagree in number, there are none, or inputs are not finite."""
    if not all(isinstance(t, Tensor) for t in tensors(x)):
        raise TypeError("inputs are tensors or arrays: one, a tuple of them, or a dict by argument name")
    sizes = {t.shape[0] for t in [*tensors(x), y]}
    if len(sizes) != 1:
        raise ValueError(f"inputs and targets disagree on the number of rows: {sorted(sizes)}")
    if sizes == {0}:
        raise ValueError("there are no rows to train on")
    for t in tensors(x):
        if t.is_floating_point() and not bool((ok := t.isfinite().flatten(1).all(1)).all()):
            bad = (~ok).nonzero().flatten()
            raise ValueError(f"{len(bad)} input rows are not finite, the first is row {int(bad[0])}: remove or impute")


def floating_dtype(module: nn.Module) -> torch.dtype | None:
    """Of its parameters; None where none is floating."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def check_dtype(x: Inputs, floating: torch.dtype | None) -> None:
    """ValueError where inputs are of another floating dtype than the module's parameters, which are of this one."""
    for t in tensors(x):
        if floating is not None and t.is_floating_point() and t.dtype != floating:
            raise ValueError(
                f"inputs are {t.dtype} and the module's parameters {floating}: convert with x.to({floating})"
            )


def cannot_take(x: Inputs, error: Exception, module: nn.Module | None = None) -> ValueError:
    """The error for rows that the module raised this one for."""
    if module is not None and (said := outside_range(x, error, [module])) is not None:
        return said
    found = tensors(x)
    shapes = ", ".join(f"{tuple(t.shape[1:])} {t.dtype}" for t in found)
    hint = ""
    if not isinstance(error, IndexError) and not all(t.is_floating_point() for t in found):
        hint = "; integers that are no indices are converted with x.to(torch.float32)"
    return ValueError(f"the module cannot take rows of {shapes}: {error}{hint}")


def outside_range(x: Any, error: Exception, modules: Iterable[nn.Module]) -> ValueError | None:
    """A ValueError that names the ids and the embeddings that do not hold them, where this error of torch, or of
    compiled code, is about an index out of range; None for another error."""
    if not re.search(r"index out of range in self|index out of bounds|not in the valid range", str(error)):
        return None
    found = [t for t in tree_leaves(x) if isinstance(t, Tensor) and not t.is_floating_point() and t.numel()]
    tables = [
        (name.removeprefix("inner."), type(m).__name__, m.num_embeddings)
        for module in modules
        for name, m in module.named_modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    ]
    if found:
        low, high = min(int(t.min()) for t in found), max(int(t.max()) for t in found)
        small = [f"'{m}' ({kind}) takes 0 to {n - 1}" for m, kind, n in dict.fromkeys(tables) if low < 0 or high >= n]
        if small:
            return ValueError(f"the ids in the inputs run from {low} to {high}, and module {', '.join(small)}")
    return ValueError(
        "an index that the module makes of its inputs is outside of what it indexes: look whether ids and lengths are "
        "those that it was made for"
    )


def holdout(n: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers to train on and to validate on, apart."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation is a share of the rows between 0 and 1, or data; got {fraction}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held = round(n * fraction)
    if not 0 < held < n:
        raise ValueError(f"{fraction} of {n} rows leaves nothing to validate or to train on")
    return order[held:].sort().values, order[:held].sort().values


def take(x: Inputs, rows: Tensor) -> Inputs:
    """These rows of every input."""
    return map_inputs(lambda t: t[rows], x)


class Rows:
    """Batches of an in-memory data set: for each member its own rows in its own order, or one order for all.

    rows: (members, n) row numbers, or (1, n) shared by all.  A batch is (x, y) with a leading members axis when each
    has its own.  The order is a function of (seed of the member, epoch), so a resumed run sees what it would have.
    """

    def __init__(self, x: Inputs, y: Tensor, rows: Tensor, batch_size: int, seeds: list[int], own: bool):
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, got {batch_size}")
        self.x, self.y, self.rows, self.batch_size, self.seeds, self.own = x, y, rows, batch_size, seeds, own

    def __len__(self) -> int:
        return -(-self.rows.shape[1] // self.batch_size)

    def epoch(self, number: int) -> Iterator[tuple[Inputs, Tensor]]:
        n = self.rows.shape[1]
        orders = []
        for index, seed in enumerate(self.seeds):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
            orders.append(self.rows[min(index, len(self.rows) - 1)][torch.randperm(n, generator=generator)])
        order = torch.stack(orders) if self.own else orders[0]
        for start in range(0, n, self.batch_size):
            picked = order[..., start : start + self.batch_size]
            yield take(self.x, picked), self.y[picked]


class Batches:
    """A DataLoader's batches: (inputs, targets), the same for all members."""

    own = False

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        try:
            return len(self.loader)
        except TypeError:  # of a stream, whose length nobody knows: it has one batch at least
            return 1

    def epoch(self, number: int) -> Iterator[tuple[Inputs, Tensor]]:
        for batch in self.loader:
            x, y = _pair(batch, "a DataLoader yields")
            check_rows(x, y)
            yield x, y


def bootstrap(n: int, seed: int) -> Tensor:
    """(n,) row numbers drawn with replacement. Efron, Bootstrap Methods: Another Look at the Jackknife, 1979."""
    return torch.randint(n, (n,), generator=torch.Generator().manual_seed(seed))
