"""Compare every kernel with code written without it, on one GPU.

    python benchmarks/kernels.py [--out DIR]                P1 to P9: one JSON line a row, and a table
    python benchmarks/kernels.py [--out DIR] --grid         the regime map on all shapes
    python benchmarks/kernels.py --once                     P1 to P9 compared and not timed, to fill compilers' caches
    python benchmarks/kernels.py --check                    every provider once, tiny, on the CPU

Providers with the same draws are compared before timing (tests/kernels/test_gpu.py compares kernels with their
references; with TRITON_INTERPRET=1, --check runs the kernels). Times are median milliseconds with the L2 cache flushed
between calls, on random data (zeros draw less power and run faster); whole small networks are timed as the replay of a
CUDA graph. `share_of_...` is bytes or operations per second divided by the measured peak of this card; `compile_s` is
the compile time, which no other time includes. Goals: kernels/README.md.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu import table
from torch import Tensor, nn
from vbdl_kernels import (
    bayesian_mlp,
    dispatch,
    ensemble_mlp,
    local_reparameterized_linear,
    make_key,
    masked_linear,
    normal,
    predictive_statistics,
    regime,
    sample_weights,
    sampled_linear,
)
from vbdl_kernels import words as vbdl_words

LAYER = 1
Providers = dict[str, Callable[[], object]]


class Bench:
    """A benchmark that times providers of one result side by side and writes the rows."""

    def __init__(self, device: str, out: Path | None, repeat_ms: int, part: str = "kernels"):
        self.device, self.repeat_ms = device, repeat_ms
        self.rows: list[dict] = []
        self.failed = 0
        self.peaks: dict[str, float] = {}  # bytes, bf16 and tf32 operations a second, measured
        self.file = None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            name = torch.cuda.get_device_name().replace(" ", "-").lower()
            self.file = (out / f"{part}-{name}.jsonl").open("w")

    def median_ms(self, call: Callable[[], object], in_graph: bool = False) -> float:
        from triton.testing import do_bench, do_bench_cudagraph

        if not self.repeat_ms:
            call()
            return float("nan")
        if in_graph:
            return do_bench_cudagraph(call, rep=self.repeat_ms, return_mode="median")
        return do_bench(call, warmup=10, rep=self.repeat_ms, return_mode="median")

    def compare(
        self,
        goal: str,
        case: dict,
        providers: Providers,
        tolerance: float,
        same: set[str] | None = None,
        in_graph: bool = False,
        **amount: float,
    ) -> dict[str, float]:
        """Check the providers in `same` (all unless given) against the first, then time all.

        in_graph: of calls that the host takes longer to start than they last, the time of a CUDA graph's replay.
        amount: bytes=, flops= or weights= of one call, for the achieved rate.
        """
        first = next(iter(providers))
        expected = None
        times = {}
        for name, call in providers.items():
            row = {"goal": goal, **case, "provider": name}
            try:
                started = time.perf_counter()
                result = call()
                self._synchronize()
                row["compile_s"] = round(time.perf_counter() - started, 2)
                if same is None or name in same or name == first:
                    expected = _double(result) if expected is None else expected
                    error = max(_relative(a, b) for a, b in zip(_double(result), expected, strict=True))
                    if not error <= tolerance:
                        raise AssertionError(f"relative error {error:.1e}, allowed {tolerance:.1e}")
            except Exception as error:  # a failure becomes a row, and the other providers are still timed
                self.failed += 1
                message = " ".join(f"{type(error).__name__}: {error}".split())
                self.emit({**row, "failed": message[:600]})
                continue
            del result
            if self.device == "cuda":
                times[name] = row["ms"] = self.median_ms(call, in_graph)
                counted = same is None or name in same or name == first
                for unit, count in amount.items():
                    if not counted and unit in ("bytes", "flops"):
                        continue  # other ways move and multiply other amounts
                    row[f"{unit}_per_s"] = count / row["ms"] * 1e3
                    peak = self.peaks.get("tf32" if case.get("dtype") == "float32" else "bf16")
                    peak = self.peaks.get("bytes") if unit == "bytes" else peak if unit == "flops" else None
                    if peak:
                        row[f"share_of_{unit}"] = row[f"{unit}_per_s"] / peak
                row["times_the_first"] = times.get(first, float("nan")) / row["ms"]
            self.emit(row)
        return times

    def emit(self, row: dict) -> None:
        self.rows.append(row)
        if self.device == "cuda" and not self.repeat_ms and "failed" not in row:
            return
        line = json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
        print(line, flush=True)
        if self.file is not None:
            self.file.write(line + "\n")
            self.file.flush()

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _double(result: object) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf.detach().double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()]


def problem(device, dtype, samples, batch, n_in, n_out, shared=True):
    make = lambda *shape: torch.randn(shape, device=device).to(dtype)
    x = make(*(() if shared else (samples,)), batch, n_in)
    key = make_key(1, range(samples)).to(device)
    return x, make(n_out, n_in) / n_in**0.5, make(n_out, n_in).abs() / n_in**0.5 / 4, key


def tolerance(dtype: torch.dtype) -> float:
    """tf32 products on the one side and roundings of another order on the other; half precision rounds the weights."""
    return 1e-2 if dtype == torch.float32 else 3e-2


# ---- the goals ------------------------------------------------------------------------------------------------


def peaks(bench: Bench) -> None:
    """Measure the peak rates of this card, the denominators of every share."""
    a = torch.randn(2**28, device="cuda")
    b = torch.empty_like(a)
    rates = {"bytes": 8 * a.numel() / bench.median_ms(lambda: b.copy_(a)) * 1e3}
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32)):
        m = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        rates[name] = 2 * 8192**3 / bench.median_ms(lambda m=m: m @ m) * 1e3
    bench.peaks = rates
    bench.emit({"goal": "peaks", **rates})


def noise(bench: Bench, size: int) -> None:
    """Measure P1: normals alone, in registers (summed, never stored) and written to memory."""
    key = make_key(0, range(16)).to(bench.device)
    case = {"normals": 16 * size * size}
    amount = {"normals": case["normals"], "bytes": 4 * case["normals"]}
    providers: Providers = {"vbdl.normal": lambda: normal(key, LAYER, 0, size, size)}
    if bench.device == "cuda":
        out = torch.empty(16, size, size, device="cuda")
        providers["torch.randn"] = lambda: out.normal_()
        for name, call in _register_noise(case["normals"]).items():
            providers[name] = call
    bench.compare("P1", case, providers, 0.0, {"vbdl.normal"}, **amount)


def stretch(bench: Bench, size: int) -> None:
    """Measure P9: normals from 16-bit radii and polynomial trigonometry, compared with vbdl's.

    That it makes normals is checked first, on its reference, and on a GPU against it.
    """
    import noise_kernels

    words = vbdl_words(make_key(0, range(4)), LAYER, 0, size, size).flatten()
    normals = noise_kernels.reference_halves(words).double().flatten()
    n = len(normals)
    # standard errors of mean, variance and fourth moment of n normals; and what 16 bits cut off
    far = (normals.mean() * n**0.5, (normals.var() - 1) / (2 / n) ** 0.5, ((normals**4).mean() - 3) / (96 / n) ** 0.5)
    if not max(abs(float(z)) for z in far) < 5:
        raise AssertionError(f"P9: mean, variance and fourth moment are off by {[f'{float(z):.1f}' for z in far]}")
    if bench.device == "cuda":
        import triton

        bits = words.to(torch.int32).cuda()  # the same bits
        out = torch.empty(2, n // 4, dtype=torch.int32, device="cuda")
        noise_kernels.halves_of[(triton.cdiv(n // 4, 1024),)](bits, out, n // 4, TILE=1024)
        kernel = out.view(torch.float16).view(2, -1).double().cpu()
        if not float((kernel - normals.view(2, -1)).abs().max()) < 2e-2:  # halves: 2**-11 of up to 4.9, a few times
            raise AssertionError("P9: the kernel's normals are not its reference's")
    count = 16 * size * size
    providers: Providers = {"reference": lambda: noise_kernels.reference_halves(words)}
    if bench.device == "cuda":
        chosen = noise_kernels.providers(count)
        providers = {name: chosen[name] for name in ("registers, ours", "registers, sixteen_bits")}
    bench.compare("P9", {"normals": count}, providers, 0.0, set() if bench.device == "cuda" else None, weights=count)


def _register_noise(count: int) -> Providers:
    import noise_kernels

    return noise_kernels.providers(count)


def layer(bench: Bench, dtype: torch.dtype, samples: int, batch: int, size: int, compiled: bool) -> None:
    """Measure P2, P3, P4: one layer under every draw, fused, as sampler and product, pre-drawn, eager, compiled."""
    x, mean, std, key = problem(bench.device, dtype, samples, batch, size, size)
    weights = sample_weights(mean, std, key, LAYER)

    def eager():
        eps = torch.randn(samples, size, size, device=x.device, dtype=dtype)
        return x @ (mean + std * eps).mT

    def fused():
        with regime.always("fused"):  # force the kernel
            return sampled_linear(x, mean, std, key, LAYER)

    providers: Providers = {
        "fused": fused,
        "sampler": lambda: x @ sample_weights(mean, std, key, LAYER).mT,
        "drawn": lambda: x @ weights.mT,
        "local": lambda: local_reparameterized_linear(x, mean, std, key, LAYER),
        "eager": eager,
    }
    if compiled:
        providers["compiled"] = torch.compile(eager)
    case = {"dtype": str(dtype)[6:], "samples": samples, "batch": batch, "size": size}
    count = samples * size * size
    same = {"fused", "sampler", "drawn"}
    amount = {"weights": count, "flops": 2 * count * batch}
    times = bench.compare("P2-P4", case, providers, tolerance(dtype), same, **amount)
    if {"fused", "sampler"} <= times.keys():
        exact = regime.is_exact(dtype.itemsize)
        chosen = regime.choose(samples, batch, size, size, dtype.itemsize, memory_budget=2**40, exact=exact)
        best = min(("fused", "sampler"), key=times.__getitem__)
        model = regime.choose(samples, batch, size, size, dtype.itemsize, memory_budget=2**40, card=regime.Card())
        row = {"chosen": chosen, "best": best, "slower_by": times[chosen] / times[best] - 1, "by_the_model": model}
        bench.emit({"goal": "P4", **case, **row})


def sampler(bench: Bench, samples: int, size: int) -> None:
    """Measure P5: weights drawn and written to memory."""
    _, mean, std, key = problem(bench.device, torch.bfloat16, samples, 1, size, size)
    eager = lambda: mean + std * torch.randn(samples, size, size, device=mean.device, dtype=mean.dtype)
    count = samples * size * size
    providers: Providers = {"sample_weights": lambda: sample_weights(mean, std, key, LAYER), "eager": eager}
    case = {"samples": samples, "size": size}
    bench.compare("P5", case, providers, 0.0, {"sample_weights"}, weights=count, bytes=2 * count)


def training(bench: Bench, samples: int, batch: int, size: int, materialize: bool) -> None:
    """Measure P6: forward and backward, the time and the peak memory above that before."""
    dtype = torch.bfloat16
    x, mean, std, key = problem(bench.device, dtype, samples, batch, size, size)
    leaves = [t.requires_grad_() for t in (x, mean, std)]
    forward = {
        "fused": lambda: sampled_linear(*leaves, key, LAYER),
        "sampler": lambda: leaves[0] @ sample_weights(leaves[1], leaves[2], key, LAYER).mT,
        "eager": lambda: (
            leaves[0] @ (leaves[1] + leaves[2] * torch.randn(samples, size, size, device=x.device, dtype=dtype)).mT
        ),
    }
    if not materialize:
        forward = {"fused": forward["fused"]}
    step = lambda f: torch.autograd.grad(f().float().square().sum(), leaves)
    case = {"samples": samples, "batch": batch, "size": size}
    providers = {name: lambda f=f: step(f) for name, f in forward.items()}
    bench.compare("P6", case, providers, 5e-2, {"fused", "sampler"}, weights=3 * samples * size * size)
    if bench.device == "cuda":
        for name, call in providers.items():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            bench.emit({"goal": "P6", **case, "provider": name, "peak_mib": peak / 2**20})


def local(bench: Bench, samples: int, batch: int, size: int) -> None:
    """Measure P7: the local reparameterization, its two products alone, and the fused draw."""
    x, mean, std, key = problem(bench.device, torch.bfloat16, samples, batch, size, size)
    providers: Providers = {
        "local": lambda: local_reparameterized_linear(x, mean, std, key, LAYER),
        "two products": lambda: (x @ mean.mT, x.square() @ std.square().mT),
        "fused": lambda: sampled_linear(x, mean, std, key, LAYER),
    }
    case = {"samples": samples, "batch": batch, "size": size}
    bench.compare("P7", case, providers, 0.0, {"local"}, flops=4 * batch * size * size)


def dropout(bench: Bench, samples: int, batch: int, size: int) -> None:
    """Measure the masked product, compared with a mask and a product."""
    x, weight, _, key = problem(bench.device, torch.bfloat16, samples, batch, size, size, shared=False)

    def eager():
        keep = torch.rand(samples, 1, size, device=x.device) >= 0.5
        return (x * keep * 2) @ weight.mT

    providers: Providers = {"masked_linear": lambda: masked_linear(x, weight, key, LAYER, 0.5), "eager": eager}
    case = {"samples": samples, "batch": batch, "size": size}
    bench.compare("masked", case, providers, 0.0, {"masked_linear"}, flops=2 * samples * batch * size * size)


def statistics(bench: Bench, samples: int, batch: int, classes: int) -> None:
    """Measure P8: one pass over the logits, compared with the same in torch."""
    logits = torch.randn(samples, batch, classes, device=bench.device).to(torch.bfloat16)
    probs = lambda: logits.float().softmax(-1)

    def eager():
        p = probs()
        mean = p.mean(0)
        entropy = lambda p: torch.special.entr(p).sum(-1)
        return mean, p.var(0, correction=0), entropy(mean), entropy(p).mean(0)

    providers: Providers = {"kernel": lambda: tuple(predictive_statistics(logits)), "eager": eager}
    if bench.device == "cuda":
        providers["compiled"] = torch.compile(eager)
    case = {"samples": samples, "batch": batch, "classes": classes}
    bench.compare("P8", case, providers, 1e-3, bytes=logits.numel() * 2)


def networks(bench: Bench, members: int, batch: int, width: int) -> None:
    """Measure whole small networks: one launch, compared with batched products, both in CUDA graphs."""
    dtype = torch.bfloat16
    make = lambda *shape: torch.randn(shape, device=bench.device).to(dtype)
    widths = [width, width, width, 16]
    pairs = list(zip(widths, widths[1:], strict=False))
    x = make(batch, width)
    weights, biases = [make(members, o, i) / i**0.5 for i, o in pairs], [make(members, o) for _, o in pairs]

    def layers(x, weights, biases):
        x = x.expand(members, -1, -1)
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            x = torch.baddbmm(b[:, None], x, w.mT)
            x = x.relu() if i < len(weights) - 1 else x
        return x

    providers: Providers = {
        "ensemble_mlp": lambda: ensemble_mlp(x, weights, biases),
        "baddbmm": lambda: layers(x, weights, biases),
    }
    case = {"members": members, "batch": batch, "width": width}
    bench.compare("mlp", case, providers, 5e-2, in_graph=True)

    mean, std = [w[0] for w in weights], [w[0].abs() / 4 for w in weights]
    bias_mean, bias_std = [b[0] for b in biases], [b[0].abs() / 4 for b in biases]
    key, numbers = make_key(0, range(members)).to(bench.device), list(range(len(mean)))

    def one_by_one():
        h = x
        for i in range(len(mean)):
            h = sampled_linear(h, mean[i], std[i], key, numbers[i], bias_mean[i], bias_std[i])
            h = h.relu() if i < len(mean) - 1 else h
        return h

    drawn: Providers = {
        "bayesian_mlp": lambda: bayesian_mlp(x, mean, std, bias_mean, bias_std, key, numbers),
        "sampled_linear, layer by layer": one_by_one,
    }
    bench.compare("mlp", case, drawn, 5e-2, in_graph=True)


def convolution(bench: Bench, samples: int, batch: int, channels: int) -> None:
    """Measure a convolution with drawn weights, and the share of its time that drawing takes."""
    mean = torch.randn(channels, channels, 3, 3, device=bench.device)
    std, key = mean.abs() / 4, make_key(0, range(samples)).to(bench.device)
    x = torch.randn(batch, channels, 16, 16, device=bench.device)
    kept = sample_weights(mean, std, key, LAYER)
    mapped = torch.vmap(lambda weights: nn.functional.conv2d(x, weights, padding=1))
    providers: Providers = {
        "drawn in the call": lambda: mapped(sample_weights(mean, std, key, LAYER)),
        "drawn before": lambda: mapped(kept),
    }
    bench.compare("conv", {"samples": samples, "batch": batch, "channels": channels}, providers, 1e-6)


def core(bench: Bench) -> Iterator[str]:
    """Measure P1 to P9, the most important shapes first; yield the name of each part when it is done."""
    half, single = torch.bfloat16, torch.float32
    peaks(bench)
    yield "peaks"
    for size, samples, batch in ((4096, 32, 16), (1024, 128, 16), (4096, 32, 1), (4096, 32, 64), (4096, 32, 128)):
        layer(bench, half, samples, batch, size, compiled=batch in (1, 16) and size == 4096)
    layer(bench, half, 32, 256, 4096, compiled=False)
    layer(bench, single, 32, 16, 1024, compiled=False)
    yield "P2-P4"
    sampler(bench, 32, 4096)
    yield "P5"
    for samples in (8, 32, 128, 256):
        training(bench, samples, 16, 4096, materialize=samples <= 32)
    yield "P6"
    for batch in (1, 256):
        local(bench, 32, batch, 4096)
    yield "P7"
    for classes in (16, 100, 1000):
        statistics(bench, 100, 2**20 // classes, classes)
    yield "P8"
    noise(bench, 8192)
    yield "P1"
    stretch(bench, 1024)
    yield "P9"
    for width in (64, 128):
        for batch in (1, 64):
            networks(bench, 64, batch, width)
    convolution(bench, 32, 32, 64)
    for batch in (1, 256):
        dropout(bench, 32, batch, 4096)
    sampler(bench, 32, 1024)
    training(bench, 32, 16, 1024, materialize=True)
    yield "networks, convolutions, dropout"


def grid(bench: Bench, tiny: bool = False) -> Iterator[str]:
    """Measure the regime map: widths 512 to 4096, 8 to 256 draws, batches of 1 to 4096; coarse before fine."""
    sizes, draws, batches = (512, 1024, 2048, 4096), (8, 32, 128, 256), (1, 16, 64, 128, 256, 1024, 4096)
    if tiny:
        sizes, draws, batches = (33,), (3,), (1, 5)
    else:
        peaks(bench)
    shapes = [
        (size, samples, batch)
        for size in sizes
        for samples in draws
        for batch in batches
        if samples * size * (size + batch) <= 2**32  # the limit of the eager baseline's memory
    ]
    coarse = lambda size, samples, batch: size in (1024, 4096) and samples in (8, 128) and batch in (1, 64, 256, 1024)
    for dtype in (torch.bfloat16, torch.float32):
        for wanted in (True, False):
            for shape in shapes:
                if coarse(*shape) == wanted:
                    size, samples, batch = shape
                    layer(bench, dtype, samples, batch, size, compiled=False)
            yield f"{'coarse' if wanted else 'fine'} {dtype}"


def check(bench: Bench) -> None:
    """Run every provider that is available, at sizes that are no multiples of the tiles."""
    noise(bench, 9)
    if dispatch.has_triton():
        stretch(bench, 256)
    for dtype in (torch.float32, torch.bfloat16):
        layer(bench, dtype, 3, 5, 130, compiled=False)
    sampler(bench, 3, 33)
    training(bench, 3, 5, 33, materialize=True)
    local(bench, 3, 5, 33)
    dropout(bench, 3, 5, 33)
    statistics(bench, 7, 9, 11)
    networks(bench, 3, 5, 20)
    convolution(bench, 2, 3, 4)


def stamp() -> dict:
    """The machine and versions on which the numbers were measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {"commit": commit, "python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        versions |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        versions |= {"cuda": torch.version.cuda, "memory_gib": round(properties.total_memory / 2**30)}
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run every provider once, at tiny sizes, on the CPU")
    parser.add_argument("--grid", action="store_true", help="measure the regime map on all shapes")
    parser.add_argument("--once", action="store_true", help="compare all outputs without timing")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.check:
        bench = Bench("cpu", None, 0)
        for _ in grid(bench, tiny=True) if options.grid else [check(bench)]:
            pass
        print(f"{len(bench.rows) - bench.failed} providers agree with their references")
        raise SystemExit(bool(bench.failed))
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --check runs the providers without one")
    torch.set_float32_matmul_precision("high")  # tf32 for all providers
    out, repeat_ms = (None, 0) if options.once else (options.out, 10 if options.grid else 20)
    bench = Bench("cuda", out, repeat_ms, "grid" if options.grid else "kernels")
    bench.emit({"goal": "machine", **stamp()})
    started = time.perf_counter()
    for part in grid(bench) if options.grid else core(bench):
        print(f"# {part}: {time.perf_counter() - started:.0f} s", flush=True)
    if not options.once:
        print(table(bench.rows))
    raise SystemExit(bool(bench.failed))


if __name__ == "__main__":
    main()
