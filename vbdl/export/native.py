"""Load compiled code with torch's C++ loader.

torch's Python loader first detects the instruction set it would compile for by building a test program, which takes a
second and needs a compiler. Here the package's description says whether it fits the machine (`vbdl.export.machine`).
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor


def written(inputs: Iterable[tuple[str, Iterable[int]]]) -> str:
    """The text "dtype:shape;..." that compiled code stores about its inputs. inputs: (dtype, shape of a row) each."""
    return ";".join(f"{dtype}:{','.join(map(str, shape))}" for dtype, shape in inputs)


def runner(path: Path, rows: int, inputs: str) -> Callable[..., list[Tensor]]:
    """Load a function (seed, *tensors) -> fields that predicts one tile. It is thread-safe, with one call at a time.

    rows: the tile's size. inputs: its input tensors, as text from `written`. Raises ValueError if the code was compiled
    for another size or other inputs, which it would read out of bounds.
    """
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)  # type: ignore[attr-defined]
    about = loader.get_metadata()
    if (about.get("vbdl_rows"), about.get("vbdl_inputs")) != (str(rows), inputs):
        raise ValueError(
            f"{path.name} was compiled for {about.get('vbdl_rows')} rows of {about.get('vbdl_inputs')}, not for {rows} "
            f"rows of {inputs}"
        )

    def call(*arguments: Tensor) -> list[Tensor]:
        return loader.boxed_run(list(arguments))

    return call
