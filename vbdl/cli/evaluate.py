"""The command `vbdl evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Evaluate:
    """Score a model of a table on rows with known targets, with 95 % intervals.

    Rows that the model was trained or calibrated on are refused, because they would make it look better than it is.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of the model."""
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """File, or folder of files, with the target's column."""
    allow_training_rows: bool = False
    """Score them in spite of all, rows calibrated on among them."""
    json: bool = False
    """Print JSON."""
    trust: tuple[str, ...] = ()
    """Packages to import the network and registered classes from. Importing runs code: name only your own."""

    def __call__(self) -> None:
        import json

        import vbdl
        from vbdl.tabular.evaluation import evaluate
        from vbdl.tabular.labeled import labeled

        predictor = vbdl.load(self.model, trust=self.trust, compile=False)
        allowed = self.allow_training_rows
        rows = labeled(predictor, self.data, allow_training_rows=allowed, allow_calibration_rows=allowed)
        base = predictor.manifest.extras.get("training", {}).get("base")
        found = evaluate(predictor, rows.x, rows.y, rows.schema.target, base)
        if self.json:
            print(json.dumps(found.to_dict(), indent=1))
            return
        for note in rows.notes:
            print(f"note: {note}")
        print(found)
