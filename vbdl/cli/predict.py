"""The command `vbdl predict`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Predict:
    """Predict every row of files of any size with a few chunks in memory; resume a job that was killed.

    Reads CSV, Parquet, Arrow and .npy files, or a folder of them or of images; writes .parquet, .csv, .arrow,
    .npy, or a folder of parts. Rows that cannot be read, or for which the model raises an error, are left out and
    listed with reasons; the exit code is then 3.

    Images become (channels, height, width) in [0, 1], their bytes divided by 255. Channels and the order of axes are
    those of the model's input: gray for one channel, RGB for three, RGBA for four. A model with integer inputs gets
    0 to 255. Other scalings belong into the network.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of the model."""
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """File or folder to predict."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """File or folder to write."""
    columns: tuple[str, ...] = ()
    """Columns of the output: prediction probabilities confidence mean std total aleatoric epistemic lower upper set
    action standard_error. Unless given, all that the model has, except confidence and standard_error."""
    keep: tuple[str, ...] = ()
    """Input columns to copy to the output, for example an id; from CSV files as their text."""
    interval: float = 0.0
    """Level of the central interval of a regression in lower and upper, instead of the calibrated interval."""
    inputs: tuple[str, ...] = ()
    """Input columns, in order, for a model that was not trained on a table."""
    engine: Literal["local", "ray"] = "local"
    """local computes in this process, ray on a Ray cluster."""
    workers: int | None = None
    """Number of threads, or of Ray actors; the number of cores unless given. Results do not depend on it."""
    chunk_rows: int = 65_536
    """Rows that are read, computed and written at a time; a killed job repeats only the unfinished chunks."""
    format: Literal["parquet", "csv", "arrow", "npy"] | None = None
    """Format of the parts in a folder."""
    on_error: Literal["quarantine", "stop"] = "quarantine"
    """quarantine lists rows that cannot be used in a file; stop ends the job at the first one."""
    compile: bool | None = None
    """Compile the model; unless given, if there are enough rows to repay the compilation."""
    restart: bool = False
    """Compute and write the output again, even if another job wrote it."""
    verify: bool = False
    """Check the content of every existing part, instead of those whose size or time has changed."""
    trust: tuple[str, ...] = ()
    """Packages that the network and registered classes may be imported from. Importing runs their code."""

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
