"""Time one epoch of training for ensembles and single networks against what one would write. CPU, one thread.

    python benchmarks/training.py [--quick] [--cells mlp-100:5:256,cnn:5:32] [--contenders loop,vbdl] [--out FILE]
    python benchmarks/training.py --table FILE       the results of a run as a Markdown table
    python benchmarks/training.py --memory ...       peak resident memory too, each contender in a new process (Linux)
    python benchmarks/training.py --compiling ...    seconds to compile vbdl's step too, each in a new process: with an
                                                     empty cache of compiled code and headers, and then with that cache

A cell is network:members:batch. The networks classify rows of 10 classes: an MLP of two hidden layers, a small CNN on
images of 3x32x32, and a transformer of two layers on sequences of 16. Contenders, all with AdamW and batches of their
own order for each member unless said otherwise:

    loop                one member after the other: index_select, forward, cross entropy, backward, AdamW(fused=True)
    loop-compiled       the same loop with torch.compile(network)
    torch-uncertainty   its deep_ensembles wrapper and one optimizer; all members see the same batches
    torch.func          vmap(grad_and_value(...)) of stacked parameters by hand, one fused optimizer
    vbdl                vbdl.fit as of a long training with default settings, once compiled code has taken over
    vbdl-uncompiled     vbdl.fit(compile=False), as of a training too short to compile for
    vbdl-bfloat16       vbdl.fit(precision="bfloat16") as of a long training
    products            no training: the loop's matrix products, convolutions and attention kernels alone, which is the
                        most that a training with the same products can reach, where products take longer than calls

Times are processor seconds of the thread; contenders run in turn in every round, ratios are formed within a round, and
medians are reported. Every contender trains for the same epochs; its mean validation loss is printed beside, and a
contender that trains worse than the loop by more than the spread of the loop's members is marked. Compiling runs in the
background of a training; here the step that takes over is the first of the second epoch, which waits for the compiler.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

import vbdl
from vbdl.bench.provenance import provenance
from vbdl.training.options import TrainingOptions
from vbdl.training.run import TrainingRun

CLASSES, LR = 10, 1e-3
MLP_CELLS = [f"mlp-{width}:{m}:{b}" for width in (64, 100, 256) for m in (1, 5, 20) for b in (32, 256, 1024)]
CELLS = [*MLP_CELLS, "cnn:5:32", "cnn:5:256", "transformer:5:32", "transformer:5:256"]
QUICK = ["mlp-64:1:32", "mlp-100:5:256", "mlp-64:20:32"]


def steps(kind: str, batch: int) -> int:
    """The number of batches in an epoch: fewer where a step takes long."""
    return 4 if not kind.startswith("mlp-") else 20 if batch < 1024 else 5


class Transformer(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, CLASSES)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)).mean(1))


def network(kind: str) -> nn.Module:
    if kind.startswith("mlp-"):
        w = int(kind.removeprefix("mlp-"))
        return nn.Sequential(nn.Linear(32, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, CLASSES))
    if kind == "transformer":
        return Transformer()
    block = lambda i, o: [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)]
    return nn.Sequential(*block(3, 16), nn.MaxPool2d(2), *block(16, 32), *pooled)


def rows(kind: str, n: int) -> tuple[Tensor, Tensor]:
    """Inputs, and classes that depend on them."""
    shape = {"cnn": (3, 32, 32), "transformer": (16, 8)}.get(kind, (32,))
    x = torch.randn(n, *shape)
    return x, (x.flatten(1)[:, :CLASSES] + 0.5 * x.flatten(1)[:, CLASSES : 2 * CLASSES].square()).argmax(1)


class Loop:
    """One member after the other, as one would write it."""

    def __init__(self, kind: str, members: int, batch: int, data: tuple[Tensor, Tensor], compiled: bool = False):
        self.x, self.y = data
        self.batch = batch
        self.networks = [network(kind).train() for _ in range(members)]
        self.called: list = self.networks
        if compiled:
            # every member counts as a recompilation of one forward, which runs uncompiled past a limit
            torch._dynamo.config.recompile_limit = max(8, 2 * members)
            self.called = [torch.compile(n) for n in self.networks]
        self.optimizers = [torch.optim.AdamW(n.parameters(), LR, weight_decay=0.0, fused=True) for n in self.networks]

    def epoch(self) -> None:
        for member, optimizer in zip(self.called, self.optimizers, strict=True):
            order = torch.randperm(len(self.x))
            for start in range(0, len(self.x), self.batch):
                picked = order[start : start + self.batch]
                loss = F.cross_entropy(member(self.x.index_select(0, picked)), self.y.index_select(0, picked))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def losses(self, x: Tensor, y: Tensor) -> list[float]:
        """The loss of each member on these rows."""
        with torch.no_grad():
            return [float(F.cross_entropy(n.eval()(x), y)) for n in self.networks]


class TorchUncertainty(Loop):
    """The library's wrapper of several networks, which runs them one after the other on one batch."""

    def __init__(self, kind: str, members: int, batch: int, data: tuple[Tensor, Tensor]):
        from torch_uncertainty.methods import deep_ensembles

        super().__init__(kind, members, batch, data)
        self.ensemble = deep_ensembles(self.networks) if members > 1 else self.networks[0]
        self.optimizer = torch.optim.AdamW(self.ensemble.parameters(), LR, weight_decay=0.0, fused=True)

    def epoch(self) -> None:
        self.ensemble.train()
        order = torch.randperm(len(self.x))
        for start in range(0, len(self.x), self.batch):
            picked = order[start : start + self.batch]
            outputs = self.ensemble(self.x.index_select(0, picked))
            y = self.y.index_select(0, picked).repeat(len(self.networks))
            loss = F.cross_entropy(outputs, y) * len(self.networks)  # every member has the gradient of its own mean
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class Stacked(Loop):
    """torch.func by hand."""

    def __init__(self, kind: str, members: int, batch: int, data: tuple[Tensor, Tensor]):
        super().__init__(kind, members, batch, data)
        parameters, self.buffers = torch.func.stack_module_state(self.networks)
        self.parameters = {name: nn.Parameter(t.detach()) for name, t in parameters.items()}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), LR, weight_decay=0.0, fused=True)

        def loss(parameters, buffers, x, y):
            outputs = torch.func.functional_call(self.networks[0], (parameters, buffers), (x,))
            return F.cross_entropy(outputs, y)

        self.step = torch.func.vmap(torch.func.grad_and_value(loss))

    def epoch(self) -> None:
        members = len(self.networks)
        order = torch.stack([torch.randperm(len(self.x)) for _ in range(members)])
        for start in range(0, len(self.x), self.batch):
            picked = order[:, start : start + self.batch]
            x = self.x.index_select(0, picked.flatten()).view(*picked.shape, *self.x.shape[1:])
            y = self.y.index_select(0, picked.flatten()).view(picked.shape)
            values = {name: p.detach() for name, p in self.parameters.items()}
            gradients, _ = self.step(values, self.buffers, x, y)
            for name, p in self.parameters.items():
                p.grad = gradients[name].contiguous()
            self.optimizer.step()

    def losses(self, x: Tensor, y: Tensor) -> list[float]:
        for index, member in enumerate(self.networks):
            entries = {**self.parameters, **self.buffers}
            member.load_state_dict({name: t.detach()[index] for name, t in entries.items()})
        return super().losses(x, y)


class Products(Loop):
    """The products of the loop alone, on the tensors of one of its steps."""

    def __init__(self, kind: str, members: int, batch: int, data: tuple[Tensor, Tensor]):
        super().__init__(kind, members, batch, data)
        recorded = _Recorded()
        with recorded:
            F.cross_entropy(self.networks[0](self.x[:batch]), self.y[:batch]).backward()
        self.calls = recorded.calls

    @torch.no_grad()
    def epoch(self) -> None:
        for _ in range(len(self.networks) * -(-len(self.x) // self.batch)):
            for product, args, kwargs in self.calls:
                product(*args, **kwargs)

    def losses(self, x: Tensor, y: Tensor) -> list[float]:
        return [math.nan]


class _Recorded(TorchDispatchMode):
    """A context that records the products that run inside: operators whose floating-point operations torch counts."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in flop_registry or "attention" in func.overloadpacket.__name__:
            detached = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, args)
            self.calls.append((func, detached, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Vbdl:
    """Epochs of `vbdl.fit`, one at a time; epochs: those of the whole training, by which it decides what to compile."""

    def __init__(
        self, kind: str, members: int, batch: int, data: tuple[Tensor, Tensor], compile: bool | None = None,
        epochs: int = 10_000, precision: str = "float32",
    ):  # fmt: skip
        self.kind, self.likelihood = kind, vbdl.Categorical()
        self.q = vbdl.Deterministic(network(kind)) if members == 1 else vbdl.DeepEnsemble(network(kind), members)
        options = TrainingOptions(
            epochs=epochs, batch_size=batch, lr=LR, compile=compile, progress=False, precision=precision
        )
        self.run, self.number = TrainingRun(self.q, data, self.likelihood, options), 0
        self.q.train()

    def epoch(self) -> None:
        for code in self.run.step.taking_over():
            code.first = 0
        with torch.enable_grad():
            self.run._epoch(self.number)
        self.number += 1

    def losses(self, x: Tensor, y: Tensor) -> list[float]:
        self.q.eval()
        predict = vbdl.Predictor(self.q, self.likelihood, compile=False)
        members = predict(x, samples=True).samples
        return [float(self.likelihood.nll(m, y).mean()) for m in members]


CONTENDERS: dict[str, Callable[..., Loop | Vbdl]] = {
    "loop": Loop,
    "loop-compiled": lambda *a: Loop(*a, compiled=True),
    "torch-uncertainty": TorchUncertainty,
    "torch.func": Stacked,
    "vbdl": Vbdl,
    "vbdl-uncompiled": lambda *a: Vbdl(*a, compile=False),
    "vbdl-bfloat16": lambda *a: Vbdl(*a, precision="bfloat16"),
    "products": Products,
}


def measure(cell: str, names: list[str], rounds: int, warm: int) -> list[dict]:
    """The results of one cell, a dict for each contender."""
    kind, members, batch = (int(part) if part.isdigit() else part for part in cell.split(":"))
    torch.manual_seed(0)
    data, (x, y) = rows(kind, steps(kind, batch) * batch), rows(kind, 2000)
    runs, first = {}, {}
    for name in names:
        torch.manual_seed(1)
        begun = time.perf_counter()
        try:
            runs[name] = CONTENDERS[name](kind, members, batch, data)
        except (ImportError, ValueError) as error:  # not installed, or no instructions for bfloat16
            print(f"{cell} {name}: {error}", file=sys.stderr)
            continue
        for _ in range(warm):
            runs[name].epoch()
            first.setdefault(name, time.perf_counter() - begun)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begun = time.thread_time()
            run.epoch()
            times[name].append(time.thread_time() - begun)
    results = []
    for name, run in runs.items():
        ratios = [a / b for a, b in zip(times["loop"], times[name], strict=True)] if "loop" in times else [math.nan]
        losses = run.losses(x, y)
        step = run.run.step if isinstance(run, Vbdl) else None
        results.append({
            "cell": cell, "contender": name, "seconds": statistics.median(times[name]),
            "ratio": statistics.median(ratios), "validation": sum(losses) / len(losses),
            "spread": float(torch.tensor(losses).std(correction=0)), "first_epoch": first[name],
            "compile_seconds": None if step is None else step.compiler_seconds,
        })  # fmt: skip
    return results


def peak_memory(cell: str, name: str) -> float:
    """The peak of resident memory, MiB, of a new process that trains one contender for three epochs."""
    command = [sys.executable, __file__, "--cells", cell, "--contenders", name, "--peak"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def compiling_seconds(cell: str) -> list[float]:
    """The seconds that compiling vbdl's step takes in a new process with an empty cache, and in the next one."""
    command = [sys.executable, __file__, "--cells", cell, "--contenders", "vbdl", "--compiler"]
    with tempfile.TemporaryDirectory() as folder:
        # TMPDIR: precompiled headers are beside the default cache, wherever the cache is
        places = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache", "TMPDIR": folder}
        runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=places) for _ in range(2)]
    return [float(done.stdout.split()[-1]) for done in runs]


def table(path: Path) -> None:
    """Print a file of results as a Markdown table: ratios to the loop, and seconds to compile if that was measured."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_cell: dict[str, dict[str, dict]] = {}
    for line in lines:
        by_cell.setdefault(line["cell"], {})[line["contender"]] = line
    names = [n for n in CONTENDERS if n != "loop" and any(n in found for found in by_cell.values())]
    compiled = any("compiling" in found.get("vbdl", {}) for found in by_cell.values())
    last = [" vbdl compiles, s: empty, full cache |"] if compiled else []
    print(f"| network, members, batch | loop, ms an epoch | {' | '.join(names)} |", *last, sep="")
    print("| --- " * (len(names) + 2 + len(last)) + "|")
    for cell, found in by_cell.items():
        ratios = [f"{found[n]['ratio']:.2f}x" if n in found else "" for n in names]
        seconds = found.get("vbdl", {}).get("compiling", [])
        compiling = [", ".join(f"{s:.1f}" if s >= 1 else f"{s:.2f}" for s in seconds)] if last else []
        loop = f"{1e3 * found['loop']['seconds']:.0f}"
        print(f"| {' | '.join([cell.replace(':', ', '), loop, *ratios, *compiling])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="three cells, three rounds, the loop and vbdl only")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--compiling", action="store_true")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compiler", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="append one JSON line per cell and contender to this file")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.table is not None:
        table(options.table)
        return
    torch.set_num_threads(1)
    cells = options.cells.split(",") if options.cells else QUICK if options.quick else CELLS
    names = ["loop", "vbdl"] if options.quick else options.contenders.split(",")
    if options.compiler:
        print(measure(cells[0], names, 1, 2)[0]["compile_seconds"])
        return
    if options.peak:
        measure(cells[0], names, 1, 2)
        # not ru_maxrss, which a new process inherits from the one that starts it
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(int(peak.split()[1]) / 1024)
        return
    about = provenance()
    for cell in cells:
        results = measure(cell, names, 3 if options.quick else options.rounds, 2)
        loop = next((r for r in results if r["contender"] == "loop"), None)
        for r in results:
            if options.memory:
                r["peak_mib"] = peak_memory(cell, r["contender"])
            if options.compiling and r["contender"] == "vbdl":
                r["compiling"] = compiling_seconds(cell)
            # the noise of a mean over members, and for one network a few per cent of the loss
            noise = math.inf if loop is None else max(3 * loop["spread"], 0.05 * loop["validation"])
            worse = "  TRAINS WORSE" if loop is not None and r["validation"] > loop["validation"] + noise else ""
            print(
                f"{cell:20} {r['contender']:18} {1e3 * r['seconds']:9.1f} ms {r['ratio']:6.2f}x  validation "
                f"{r['validation']:.3f}{worse}  first epoch {r['first_epoch']:.1f} s"
                + (f"  peak {r['peak_mib']:.0f} MiB" if options.memory else "")
                + (f"  compiles in {r['compiling']} s" if "compiling" in r else ""),
                flush=True,
            )
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a") as file:
                    file.write(json.dumps({**r, **about}) + "\n")


if __name__ == "__main__":
    main()
