"""The command `vbdl predict`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Predict:
    """Predict every row of files of any size, holding a few chunks in memory; resume a job that was killed.

    Reads CSV, Parquet, Arrow and .npy files, or a folder of them or of images; writes .parquet, .csv, .arrow,
    .npy, or a folder of parts. Rows that cannot be used, or that the model raises on, are left out and listed with
    reasons, and the exit code is then 3.

    Images become (channels, height, width) in [0, 1], their bytes divided by 255, in the channels and the order of axes
    that a row of the model has: gray for one, RGB for three, RGBA for four. A model of whole numbers gets 0 to 255.
    Other scalings belong into the network.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of the model."""
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """File or folder."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """File or folder to write."""
    columns: tuple[str, ...] = ()
    """Columns of the output: prediction probabilities confidence mean std total aleatoric epistemic lower upper set
    action standard_error. All that the model has but confidence and standard_error unless given."""
    keep: tuple[str, ...] = ()
    """Input columns to carry over, an id for instance; from CSV as the text that they are."""
    interval: float = 0.0
    """Level of the central interval in lower and upper of a regression, in place of the calibrated interval."""
    inputs: tuple[str, ...] = ()
    """Input columns, in order, of a model that was not trained on a table."""
    engine: Literal["local", "ray"] = "local"
    """Engine: this process, or Ray."""
    workers: int | None = None
    """Number of threads, or of Ray's actors; as many as there are cores unless given. Results do not depend on it."""
    chunk_rows: int = 65_536
    """Rows that are read, computed and written at a time; a killed job repeats at most the chunks at work."""
    format: Literal["parquet", "csv", "arrow", "npy"] | None = None
    """Format of the parts in a folder."""
    on_error: Literal["quarantine", "stop"] = "quarantine"
    """Whether a row that cannot be used is quarantined, or stops the job."""
    compile: bool | None = None
    """Compile the model; unless given, if there are enough rows to repay the compilation."""
    restart: bool = False
    """Write the output again, even if another job wrote it."""
    verify: bool = False
    """Check the content of every part that is there; otherwise only of parts whose size or time has changed."""
    trust: tuple[str, ...] = ()
    """Packages to import the network and registered classes from. Importing runs code: name only your own."""

    def __call__(self) -> int:
        from vbdl.batch.predicting import predict_table

        report = predict_table(
            self.model, self.data, self.out,
            columns=self.columns or None, keep=self.keep, interval=self.interval, inputs=self.inputs or None,
            engine=self.engine, workers=self.workers, chunk_rows=self.chunk_rows, format=self.format,
            on_error=self.on_error, compile=self.compile, restart=self.restart, verify=self.verify, trust=self.trust,
        )  # fmt: skip
        print(report)
        return 3 if report.rejected or report.failed else 0
