"""The demo's models on disk: tensors as safetensors, and a JSON file that says what they are. No pickle.

The format of a whole predictor will be `vbdl.save`; until then this one holds exactly the demo's posteriors.
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from vbdl import __version__
from vbdl.demo.compare import predictor
from vbdl.demo.data import TASKS
from vbdl.demo.training import METHODS, Trained, build
from vbdl.engine import Predictor
from vbdl.stacking import replicate

_FORMAT = 1


def save(trained: Trained, folder: Path, seed: int = 0) -> Path:
    """Two files: <task>-<method>.safetensors and .json. Returns the second."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{trained.task.name}-{trained.method}.json".replace(" ", "-").lower()
    tensors = {f"posterior.{n}": t for n, t in trained.posterior.state_dict().items()}
    tensors |= {f"likelihood.{n}": t for n, t in trained.likelihood.state_dict().items()}
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path.with_suffix(".safetensors"))
    described = {
        "format": _FORMAT,
        "vbdl": __version__,
        "task": trained.task.name,
        "method": trained.method,
        "seed": seed,
        "n_samples": trained.n_samples or trained.posterior.n_draws,
        "likelihood": repr(trained.likelihood),
        "network": str(trained.posterior.module).splitlines()[0].rstrip("("),
        "epochs": trained.epochs,
        "training_seconds": round(trained.seconds, 2),
    }
    path.write_text(json.dumps(described, indent=2) + "\n")
    return path


def load(path: str | Path, compile: bool = True) -> Predictor:
    """The predictor of a saved model: the same draws, hence the same predictions. ValueError for other files."""
    path = Path(path).with_suffix(".json")
    described = json.loads(path.read_text())
    if described.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a model of this demo (format {described.get('format')}, expected {_FORMAT})")
    if described["task"] not in TASKS or described["method"] not in METHODS:
        raise ValueError(f"{path} is of an unknown task or method: {described['task']!r}, {described['method']!r}")
    found = build(TASKS[described["task"]](described["seed"]), described["method"], described["seed"])
    if found.posterior.by_member:
        replicate(found.likelihood, found.posterior.n_members)
    tensors = load_file(path.with_suffix(".safetensors"))
    for name, module in (("posterior", found.posterior), ("likelihood", found.likelihood)):
        own = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
        module.load_state_dict(own)
    return predictor(found, compile=compile, seed=described["seed"])
