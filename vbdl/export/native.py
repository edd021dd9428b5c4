"""Native code loaded straight into torch's runtime.

torch's own loader in Python first asks for the instruction set that it would compile for, which builds a test program:
a second of work, and a compiler. Whether a package fits the machine is known from its description
(`vbdl.export.machine`).
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def runner(path: Path) -> Callable[..., list[Tensor]]:
    """A call of one tile: (seed, *tensors) -> the fields, in their order. Thread-safe; one call at a time runs."""
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)  # type: ignore[attr-defined]

    def call(*arguments: Tensor) -> list[Tensor]:
        return loader.boxed_run(list(arguments))

    return call
