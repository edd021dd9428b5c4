"""What a prediction costs as one size grows, the others held: draws, members, width, rows of a batch."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vbdl.bench.networks import mlp
from vbdl.bench.provenance import provenance
from vbdl.engine import Predictor
from vbdl.likelihoods.categorical import Categorical
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.mc_dropout import MCDropout
from vbdl.posteriors.mean_field import MeanField

FEATURES, CLASSES = 32, 10
USUAL = {"draws": 32, "members": 5, "width": 128, "batch": 64}
SIZES = {"draws": (8, 32, 128, 512), "members": (2, 8, 32), "width": (32, 128, 512), "batch": (1, 16, 256)}
ENDLESS = ("mc-dropout", "mean-field")


def cells() -> Iterator[tuple[str, int, str]]:
    """(axis, size, method): every size of every axis, for the methods that it means something to."""
    for axis, sizes in SIZES.items():
        methods = {"draws": ENDLESS, "members": ("deep-ensemble",)}.get(axis, (*ENDLESS, "deep-ensemble"))
        yield from ((axis, size, method) for method in methods for size in sizes)


def predictor(method: str, at: dict[str, int], compile: bool) -> Predictor:
    """An untrained network of these sizes, two hidden layers: cost does not depend on the weights."""
    torch.manual_seed(0)
    network: nn.Module = mlp(FEATURES, at["width"], 0.0 if method != "mc-dropout" else 0.2, CLASSES)
    posterior: Any
    if method == "deep-ensemble":
        posterior, draws = DeepEnsemble(network, at["members"]), None
    else:
        posterior = MCDropout(network) if method == "mc-dropout" else MeanField(network, n_data=1000)
        draws = at["draws"]
    return Predictor(posterior, Categorical(), draws, tiles=(at["batch"],), compile=compile)


def measure(
    out: Path, compile: bool = True, seconds: float = 0.5, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Time every cell that `out` does not hold yet; one JSON line each: axis, size, method, seconds a call (median)."""
    out = Path(out)
    found = [json.loads(text) for text in out.read_text().splitlines()] if out.exists() else []
    done = {(r["axis"], r["size"], r["method"]) for r in found}
    about = provenance()
    for axis, size, method in cells():
        if (axis, size, method) in done:
            continue
        at = USUAL | {axis: size}
        x = torch.randn(at["batch"], FEATURES, generator=torch.Generator().manual_seed(0))
        with torch.random.fork_rng(devices=[]):
            predict = predictor(method, at, compile)
        begun = time.perf_counter()
        predict(x)
        first = time.perf_counter() - begun
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < 5 or time.perf_counter() < end:
            begun = time.perf_counter()
            predict(x)
            times.append(time.perf_counter() - begun)
        line = {"axis": axis, "size": size, "method": method, "at": at, "seconds": statistics.median(times)}
        line |= {"first_call": first, "compiled": compile, **about}
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        found.append(line)
        say(f"{axis} {size:5} {method:14} {1000 * line['seconds']:.3f} ms a call, first call {first:.1f} s")
    return found
