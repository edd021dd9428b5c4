"""The command `vbdl inspect`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Inspect:
    """Print the method, network, inputs, calibration, draws and metrics of a saved model, without running its code."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder that Predictor.save or `vbdl fit` wrote."""
    json: bool = False
    """Print the whole manifest as JSON."""

    def __call__(self) -> None:
        from vbdl.artifact.card import facts, figures
        from vbdl.artifact.manifest import encode, read

        manifest = read(self.model)
        if self.json:
            print(encode(manifest).decode(), end="")
            return
        rows = facts(manifest)
        rows += [(f"metric {name}", value) for name, value in figures(manifest.metrics)]
        if manifest.extras:
            rows.append(("also stored", ", ".join(manifest.extras)))
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            # text from the file must not send control characters to the terminal
            print("".join(c if c.isprintable() else "?" for c in f"{name:<{width}}  {value}"))
