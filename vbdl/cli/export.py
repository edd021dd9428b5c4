"""The command `vbdl export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Export:
    """Compile a saved model ahead of time: native code for Python without a compiler and for C++, or ONNX.

    Before the package is written, its predictions are compared with the model's. It is refused if they differ by more
    than 1e-5, or if its epistemic uncertainty is lost."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder that Predictor.save or `vbdl fit` wrote."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write."""
    backend: Literal["aoti", "onnx"] = "aoti"
    """aoti: native code for this machine. onnx: for ONNX Runtime anywhere."""
    tiles: tuple[int, ...] = ()
    """Batch sizes to compile for, like 1 64 for services that also answer single rows; the model's own unless given."""
    example: Path | None = None
    """NumPy file (.npy) of realistic rows for the comparison; random normal numbers unless given."""
    trust: tuple[str, ...] = ()
    """Packages that the network and registered classes may be imported from. Importing runs their code."""
    rebuild: bool = False
    """Compile again even if a package of this model exists and fits this machine."""

    def __call__(self) -> None:
        import numpy as np
        import torch

        from vbdl.artifact.loading import load
        from vbdl.export import export

        trust = self.trust
        predictor = load(self.model, trust=trust, tiles=self.tiles) if self.tiles else load(self.model, trust=trust)
        example = None
        if self.example is not None:
            try:
                example = torch.from_numpy(np.load(self.example, allow_pickle=False))
            except (ValueError, TypeError) as error:  # text, pickles, an archive of arrays
                raise ValueError(f"{self.example} is not a .npy file of numbers") from error
        package = export(predictor, self.out, backend=self.backend, example=example, rebuild=self.rebuild)
        about = package.description
        print(f"{self.out}: tiles of {', '.join(map(str, package.tiles))} rows, fields {', '.join(about.fields)}")
        compared = {n: v for n, v in about.measured.items() if n != "rows"}
        worst = max(compared, key=lambda n: compared[n])
        print(
            f"compared with the model on {about.measured['rows']:.0f} rows: largest difference "
            f"{compared[worst]:.1e} ({worst})"
        )
