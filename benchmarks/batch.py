"""Measure the speed and memory of `vbdl.predict_table` beside a hand-written script.

    python benchmarks/batch.py [--rows 1000000] [--width 64] [--layers 2] [--classes 10] [--repeats 3]
        [--memory] [--out benchmarks/results]

The table has 32 columns of random numbers, in Parquet; the model is a deep ensemble of 16 multilayer perceptrons
(width, layers). The function `script` is what a competent user would write: it reads batches of 65,536 rows with
pyarrow, calls every member in turn without gradients, computes the mean probabilities, their entropy and its two parts,
and writes a Parquet file. predict_table writes a folder of parts with the same columns. Both use as many threads as
there are cores, or OMP_NUM_THREADS.

Contenders run in turn, each in its own process. `seconds` runs from the first row read to the last byte written. For
predict_table it includes syncing to the disk, and loading and compiling the model with torch's cache of earlier runs;
`start` is the time of these two, measured on a small table. For the script it excludes loading. `cpu` is the processor
time on all cores, which depends less on other programs. Outputs are compared before timing. Memory is the peak of the
process. `--memory` also runs ten times the rows, for the peak of predict_table only.
"""

import argparse
import json
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FEATURES, MEMBERS, SMALL = 32, 16, 10_000


def network(width: int, layers: int, classes: int):
    from torch import nn

    sizes = [FEATURES, *[width] * layers]
    hidden = [(nn.Linear(a, b), nn.ReLU()) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*(module for pair in hidden for module in pair), nn.Linear(width, classes))


def make(folder: Path, rows: int, width: int, layers: int, classes: int) -> None:
    """Write the tables, and the ensemble as an artifact and as its members' weights."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet
    import torch

    import vbdl

    random = np.random.default_rng(0)
    for name, n in (("small", SMALL), ("rows", rows)):
        path = folder / f"{name}.parquet"
        schema = pa.schema([(f"f{i}", pa.float32()) for i in range(FEATURES)])
        with pa.parquet.ParquetWriter(path, schema) as writer:
            for start in range(0, n, 100_000):
                values = random.normal(size=(min(100_000, n - start), FEATURES)).astype(np.float32)
                writer.write_table(pa.table({f"f{i}": values[:, i] for i in range(FEATURES)}))
    torch.manual_seed(0)
    ensemble = vbdl.DeepEnsemble(network(width, layers, classes), MEMBERS)
    for m in range(MEMBERS):
        torch.save(ensemble.member(m), folder / f"member-{m}.pt")
    vbdl.Predictor(ensemble, vbdl.Categorical()).save(
        folder / "model", example=torch.zeros(1, FEATURES), overwrite=True
    )


def script(folder: Path, data: Path, out: Path, width: int, layers: int, classes: int) -> dict[str, float]:
    """Predict a table in the way a user would write without vbdl: the baseline."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    begun = time.perf_counter()
    members = []
    for m in range(MEMBERS):
        member = network(width, layers, classes)
        member.load_state_dict(torch.load(folder / f"member-{m}.pt", weights_only=True))
        members.append(member.eval())
    loaded, busy = time.perf_counter(), time.process_time()
    writer, first = None, 0
    for batch in pq.ParquetFile(data).iter_batches(batch_size=65_536):
        columns = [torch.from_numpy(c.to_numpy(zero_copy_only=False)) for c in batch.columns]
        x = torch.stack(columns, dim=1)
        with torch.inference_mode():
            probs = torch.stack([member(x).softmax(-1) for member in members])
            mean = probs.mean(0)
            total = -(mean * mean.log()).sum(-1)
            aleatoric = -(probs * probs.log()).sum(-1).mean(0)
        predictions = {"row_id": np.arange(first, first + len(x)), "prediction": mean.argmax(-1).numpy()}
        predictions |= {f"probability_{k}": mean[:, k].contiguous().numpy() for k in range(classes)}
        predictions |= {
            "total": total.numpy(),
            "aleatoric": aleatoric.numpy(),
            "epistemic": (total - aleatoric).numpy(),
        }
        table = pa.table(predictions)
        writer = writer or pq.ParquetWriter(out, table.schema)
        writer.write_table(table)
        first += len(x)
    assert writer is not None
    writer.close()
    return {"start": loaded - begun, "seconds": time.perf_counter() - loaded, "cpu": time.process_time() - busy}


def ours(folder: Path, data: Path, out: Path, width: int, layers: int, classes: int) -> dict[str, float]:
    import torch

    import vbdl

    torch.set_num_threads(1)  # for everything but predict_table
    begun = time.perf_counter()
    options: dict[str, Any] = {"compile": True, "progress": False, "restart": True}
    first = vbdl.predict_table(folder / "model", folder / "small.parquet", folder / "first", **options)
    small, busy = time.perf_counter(), time.process_time()
    vbdl.predict_table(folder / "model", data, out.with_suffix(""), **options)
    ended, used = time.perf_counter(), time.process_time() - busy
    assert first.rows == SMALL and not first.resumed
    return {"start": small - begun, "seconds": ended - small, "cpu": used}


CONTENDERS = {"script": script, "vbdl": ours}


def run(name: str, folder: Path, data: Path, out: Path, width: int, layers: int, classes: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--contender", name, *map(str, (folder, data, out, width, layers, classes))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(a: Path, b: Path) -> float:
    """The largest difference between two files with the same columns, over all rows and numbers."""
    import numpy as np
    import pyarrow.parquet as pq

    x, y = pq.read_table(a), pq.read_table(b)
    assert x.schema.equals(y.schema) and x["row_id"].equals(y["row_id"]), (x.schema, y.schema)
    tied = np.array(x["prediction"]) != np.array(y["prediction"])
    assert tied.mean() < 1e-4, f"{tied.sum()} of {len(tied)} labels differ"
    names = [n for n in x.column_names if n not in ("row_id", "prediction")]
    return max(float(np.abs(np.array(x[n]) - np.array(y[n])).max()) for n in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--contender", nargs=7, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.contender:
        name, folder, data, out, *size = chosen.contender
        result = CONTENDERS[name](Path(folder), Path(data), Path(out), *map(int, size))
        result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result))
        return
    size = (chosen.width, chosen.layers, chosen.classes)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder, chosen.rows, *size)
        for name in CONTENDERS:  # also fills torch's compilation cache
            run(name, folder, folder / "small.parquet", folder / f"{name}-small.parquet", *size)
        difference = compare(folder / "script-small.parquet", folder / "vbdl-small")
        assert difference < 1e-5, f"the contenders differ by {difference}"
        print(f"largest difference of any number: {difference:.1e}")
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for repeat in range(chosen.repeats):
            for name in CONTENDERS:
                out = folder / f"{name}-{repeat}.parquet"
                runs[name].append(run(name, folder, folder / "rows.parquet", out, *size))
                print(name, json.dumps(runs[name][-1]), flush=True)
                shutil.rmtree(out.with_suffix("")) if out.with_suffix("").is_dir() else out.unlink()
        medians = {name: statistics.median(r["seconds"] for r in results) for name, results in runs.items()}
        result = {
            "benchmark": "batch", "rows": chosen.rows, "features": FEATURES, "members": MEMBERS,
            "width": chosen.width, "layers": chosen.layers, "classes": chosen.classes,
            "ratio": medians["script"] / medians["vbdl"],
            "ratios": [a["seconds"] / b["seconds"] for a, b in zip(runs["script"], runs["vbdl"], strict=True)],
            "cpu_ratios": [a["cpu"] / b["cpu"] for a, b in zip(runs["script"], runs["vbdl"], strict=True)],
            **{f"{n}_rows_per_second": chosen.rows / s for n, s in medians.items()},
            **{f"{n}_cpu_seconds": statistics.median(r["cpu"] for r in runs[n]) for n in runs},
            **{f"{n}_start_seconds": statistics.median(r["start"] for r in runs[n]) for n in runs},
            **{f"{n}_peak_mib": statistics.median(r["peak_mib"] for r in runs[n]) for n in runs},
            "difference": difference, "repeats": chosen.repeats,
        }  # fmt: skip
        if chosen.memory:
            make(folder, chosen.rows * 10, *size)
            more = run("vbdl", folder, folder / "rows.parquet", folder / "o.parquet", *size)
            result["vbdl_peak_mib_of_ten_times_the_rows"] = more["peak_mib"]
    import torch

    result |= {
        "torch": str(torch.__version__), "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
        with open(chosen.out / "batch-cpu.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
