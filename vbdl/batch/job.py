"""The description of a batch job for every engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from vbdl.batch.model import Model, digest
from vbdl.batch.options import JobOptions
from vbdl.batch.sources.source import Source
from vbdl.tabular import Schema
from vbdl.types import Json

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Job:
    """Predict every row of `sources` with `model`. A job can be pickled and sent to another machine.

    kept: output types of the input columns that are copied to the output; `settle` finds them.
    """

    model: Model
    sources: tuple[Source, ...]
    options: JobOptions
    schema: Schema | None
    kept: "Mapping[str, pyarrow.DataType]" = field(default_factory=dict)

    def recorded(self, kind: str) -> Json:
        """Return everything that the output depends on, for JSON: jobs with equal records write equal bytes.

        kind: format of the output, one of `vbdl.batch.naming.FORMATS`.
        """
        return {
            "model": digest(self.model),
            "schema": None if self.schema is None else self.schema.to_dict(),
            "input": [source.state() for source in self.sources],
            "options": self.options.recorded(),
            "format": kind,
            "torch": str(torch.__version__),
        }
