"""Native code loaded straight into torch's runtime.

torch's own loader in Python first asks for the instruction set that it would compile for, which builds a test program:
a second of work, and a compiler. Whether a package fits the machine is known from its description
(`vbdl.export.machine`).
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor


def written(inputs: Iterable[tuple[str, Iterable[int]]]) -> str:
    """(dtype, shape of a row) of each tensor, as compiled code carries it."""
    return ";".join(f"{dtype}:{','.join(map(str, shape))}" for dtype, shape in inputs)


def runner(path: Path, rows: int, inputs: str) -> Callable[..., list[Tensor]]:
    """A call of one tile: (seed, *tensors) -> the fields, in their order. Thread-safe; one call at a time runs.

    rows, inputs: of the tile, as `written` has them. ValueError where the code was compiled for others, which it would
    read out of bounds.
    """
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)  # type: ignore[attr-defined]
    about = loader.get_metadata()
    if (about.get("vbdl_rows"), about.get("vbdl_inputs")) != (str(rows), inputs):
        raise ValueError(f"{path.name} was compiled for {about.get('vbdl_rows')} rows of {about.get('vbdl_inputs')}")

    def call(*arguments: Tensor) -> list[Tensor]:
        return loader.boxed_run(list(arguments))

    return call
