"""The command `vbdl evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Evaluate:
    """Score a model of a table on rows with known targets, with 95 % intervals.

    Rows that the model was trained or calibrated on are refused, because they would make the scores too good.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of the model."""
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """File or folder of files, with the target's column."""
    allow_training_rows: bool = False
    """Score rows that were used for training or calibration anyway."""
    json: bool = False
    """Print the scores as JSON."""
    trust: tuple[str, ...] = ()
    """Packages that the network and registered classes may be imported from. Importing runs their code."""

    def __call__(self) -> None:
        import json

        import vbdl
        from vbdl.tabular.evaluation import evaluate
        from vbdl.tabular.labeled import labeled

        predictor = vbdl.load(self.model, trust=self.trust, compile=False)
        allowed = self.allow_training_rows
        rows = labeled(predictor, self.data, allow_training_rows=allowed, allow_calibration_rows=allowed)
        assert predictor.manifest is not None  # load sets it
        base = predictor.manifest.extras.get("training", {}).get("base")
        evaluation = evaluate(predictor, rows.x, rows.y, rows.schema.target, base, rows.when)
        if self.json:
            print(json.dumps(evaluation.to_dict(), indent=1))
            return
        for note in rows.notes:
            print(f"note: {note}")
        print(evaluation)
