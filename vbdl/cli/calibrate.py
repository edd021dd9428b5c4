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

    Every calibration that the model has is replaced: after --method sets or intervals without --add, the temperature or
    std-scaling of `vbdl fit` is gone too, and probabilities and variances are those of the network again.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of the model."""
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """File, or folder of files, with the target's column."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the calibrated model."""
    method: Literal[
        "temperature", "platt", "isotonic", "histogram", "beta", "std-scaling", "cdf", "sets", "intervals"
    ] = "temperature"
    """What is fitted."""
    coverage: float = 0.9
    """Of sets and intervals."""
    add: bool = False
    """Keep the calibration that the model has, and fit behind it; sets and intervals take the place of earlier ones."""
    overwrite: bool = False
    """Replace a model that is there."""
    trust: tuple[str, ...] = ()
    """Packages to import the network and registered classes from. Importing runs code: name only your own."""

    def __call__(self) -> None:
        from vbdl.tabular.recalibrating import recalibrate

        print(
            recalibrate(
                self.model, self.data, self.out, self.method, self.coverage, self.add, self.overwrite, self.trust
            )
        )
