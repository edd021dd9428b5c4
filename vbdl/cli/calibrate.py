"""The command `vbdl calibrate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Calibrate:
    """Calibrate a saved model of a table on new rows with known targets, and save it under another name.

    temperature, platt, isotonic, histogram and beta change class probabilities; std-scaling and cdf change a
    regression; sets and intervals add prediction sets or intervals of a coverage. Training rows are refused.

    Without --add, all earlier calibrations of the model are removed: --method sets or intervals then also removes the
    temperature or std-scaling of `vbdl fit`, so that probabilities and variances are those of the network again.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of the model."""
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """File or folder of files, with the target's column."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the calibrated model."""
    method: (
        Literal["temperature", "platt", "isotonic", "histogram", "beta", "std-scaling", "cdf", "sets", "intervals"]
        | None
    ) = None
    """Calibration to fit; temperature for classes and std-scaling for numbers unless given."""
    coverage: float = 0.9
    """Coverage of sets and intervals."""
    add: bool = False
    """Keep the model's calibrations and apply the new one after them; sets and intervals replace earlier ones."""
    overwrite: bool = False
    """Replace an existing model."""
    trust: tuple[str, ...] = ()
    """Packages that the network and registered classes may be imported from. Importing runs their code."""

    def __call__(self) -> None:
        from vbdl.tabular.recalibrating import recalibrate

        print(
            recalibrate(
                self.model, self.data, self.out, self.method, self.coverage, self.add, self.overwrite, self.trust
            )
        )
