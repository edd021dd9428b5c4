"""Measure the cost of a prediction as one size grows: draws, members, width, rows of a batch or rows in all.

python -m vbdl.bench.scaling METHOD DRAWS    # prints the peak memory of a prediction in bytes, in a fresh process
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from vbdl.bench.networks import mlp
from vbdl.bench.provenance import provenance
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.categorical import Categorical
from vbdl.methods import METHODS, Method, building
from vbdl.training.fit import fit
from vbdl.types import Json

FEATURES, CLASSES = 32, 10
USUAL = {"draws": 32, "members": 5, "width": 128, "batch": 64}
SIZES = {
    "draws": (8, 32, 128, 512),
    "members": (2, 8, 32),
    "width": (32, 128, 512),
    "batch": (1, 16, 256),
    "rows": (64, 512, 4096),  # in tiles of the usual batch
}
MEMORY_DRAWS = (32, 128, 512, 2048)

_STATUS = Path("/proc/self/status")


def cells() -> Iterator[tuple[str, str, int, str]]:
    """Yield (quantity, axis, size, method) for every size of every axis and the methods it applies to."""
    for axis, sizes in SIZES.items():
        for name in building():
            if _applies(METHODS[name], axis):
                yield from (("seconds", axis, size, name) for size in sizes)
    drawn = [name for name in building() if not METHODS[name].has_fixed_draws]
    yield from (("bytes", "draws", size, name) for name in drawn for size in MEMORY_DRAWS)


def _applies(method: Method, axis: str) -> bool:
    """Whether the method has this axis: draws or members to choose the number of, and all others."""
    if axis == "draws":
        return not method.has_fixed_draws
    return method.has_members if axis == "members" else True


def predictor(method: str, at: dict[str, int], compile: bool) -> Predictor:
    """A predictor with an untrained network of these sizes; the cost does not depend on the weights."""
    torch.manual_seed(0)
    entry = METHODS[method]
    network: nn.Module = mlp(FEATURES, at["width"], 0.2 if entry.needs_dropout else 0.0, CLASSES)
    posterior = entry.make(network, n_members=at["members"], n_data=1000)
    if entry.collects or posterior.fits_trained:  # it predicts only after a fit, however short
        rows, epochs = (torch.randn(8, FEATURES), torch.arange(8) % CLASSES), max(8, at["members"])
        fit(posterior, rows, Categorical(), epochs=epochs if entry.collects else 0, compile=False, progress=False)
    draws = None if entry.has_fixed_draws else at["draws"]
    return Predictor(posterior, Categorical(), draws, tiles=(at["batch"],), compile=compile)


def measure(out: Path, compile: bool = True, seconds: float = 0.5, say: Callable[[str], None] = print) -> list[Json]:
    """Measure every cell that `out` does not hold yet, and append a JSON line (quantity, axis, size, method, value).

    seconds: time spent on a cell. The quantity "seconds" is the median of a call; "bytes" is the peak of the resident
    memory during a prediction minus the peak before it (Linux only).
    """
    out = Path(out)
    lines = [json.loads(text) for text in out.read_text().splitlines()] if out.exists() else []
    done = {(r["quantity"], r["axis"], r["size"], r["method"]) for r in lines}
    about = provenance()
    for cell in cells():
        quantity, axis, size, method = cell
        if cell in done or (quantity == "bytes" and not _STATUS.is_file()):
            continue
        at = USUAL | {axis: size}
        line: Json = {"quantity": quantity, "axis": axis, "size": size, "method": method, "at": at}
        if quantity == "bytes":
            line |= {"value": _peak_in_a_process(method, size), "compiled": False}
            summary = f"{line['value'] / 2**20:.1f} MiB at the peak"
        else:
            line |= _timed(method, at, compile, seconds)
            summary = f"{1000 * line['value']:.3f} ms a call, first call {line['first_call']:.1f} s"
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(line | about) + "\n")
        lines.append(line | about)
        say(f"{axis} {size:5} {method:14} {summary}")
    return lines


def _timed(method: str, at: dict[str, int], compile: bool, seconds: float) -> Json:
    x = torch.randn(at.get("rows", at["batch"]), FEATURES, generator=torch.Generator().manual_seed(0))
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
    return {"value": statistics.median(times), "first_call": first, "compiled": compile}


def _peak_in_a_process(method: str, draws: int) -> int:
    command = [sys.executable, "-m", "vbdl.bench.scaling", method, str(draws)]
    # glibc before 2.38 does not reuse freed aligned blocks
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.split()[-1])


def _peak() -> int:
    """The peak of the resident memory so far, bytes. (`resource` would include the peak of the parent process.)"""
    match = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), flags=re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} has no line VmHWM, the peak of the resident memory")
    return int(match[1]) * 1024


def _peak_above_start(method: str, draws: int) -> int:
    """The bytes by which a prediction raises this process's peak memory; uncompiled, to exclude the compiler's."""
    torch.set_num_threads(1)
    x = torch.randn(USUAL["batch"], FEATURES)
    predictor(method, USUAL | {"draws": 2, "width": 8}, compile=False)(x)  # loads what torch loads at first use
    before = _peak()
    predictor(method, USUAL | {"draws": draws}, compile=False)(x)
    return _peak() - before


if __name__ == "__main__":
    print(_peak_above_start(sys.argv[1], int(sys.argv[2])))
