"""The measurement of the constants of `card.Card` on the current device.

python -m vbdl_kernels.measured        takes some seconds, prints the constants and stores them for this device
"""

import json
import sys
import time
from collections.abc import Callable

import torch

from vbdl_kernels.card import Card, device_name, keep
from vbdl_kernels.mlp import WIDEST, ensemble_mlp
from vbdl_kernels.philox import make_key
from vbdl_kernels.regime import always
from vbdl_kernels.sampled_linear import sampled_linear

Timer = Callable[[str, Callable[[], object]], float]  # (name of the operation, its call) -> seconds

ROWS = (16, 32, 64, 128, 256, 512, 1024)  # numbers of rows for which the fused kernel and the sampler are compared


def measure(timed: Timer, device: str = "cuda", size: int = 4096, samples: int = 8) -> dict[str, float]:
    """Measure the constants of `card.Card` with operations on layers of size x size and one small network.

    timed: times one operation, given its name and its call. Changes `torch.set_float32_matmul_precision` and restores
    it.
    """
    rows, many = 128, 1024  # reading the weights bounds a product of few rows
    make = lambda *shape: torch.randn(shape, device=device)
    weights = make(samples, size, size)
    mean, std, key = weights[0], weights[1].abs(), make_key(0, range(samples), device=device)
    half_mean, half_std = mean.bfloat16(), std.bfloat16()
    x = make(samples, many, size)
    half, half_weights, one = x.bfloat16(), weights.bfloat16(), make(1)
    count = samples * size * size
    launch = timed("launch", lambda: one + 1)
    # every number is read and written once, 4 bytes each
    copied = 8 * count / _above(timed("copy", lambda: weights.clone()), launch)
    product = _above(timed("product bfloat16", lambda: half @ half_weights.mT), launch)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        exact = _above(timed("product float32", lambda: x @ weights.mT), launch)
        torch.set_float32_matmul_precision("high")
        single = _above(timed("product tf32", lambda: x @ weights.mT), launch)
        with always("fused"):
            drawing = _above(
                timed("fused 16", lambda: sampled_linear(half[:, :16], half_mean, half_std, key, 0)), launch
            )
            both = _above(
                timed("fused 128", lambda: sampled_linear(half[:, :rows], half_mean, half_std, key, 0)), launch
            )
        crossings = {
            "half_rows": _crossing(timed, "bfloat16", half_mean, half_std, key),
            "float_rows": _crossing(timed, "tf32", mean, std, key),
        }
    finally:
        torch.set_float32_matmul_precision(before)
    narrow, bias = make(1, WIDEST, WIDEST).bfloat16(), make(1, WIDEST).bfloat16()
    few = make(16, WIDEST).bfloat16()
    network = _above(timed("network", lambda: ensemble_mlp(few, [narrow] * 4, [bias] * 4)), launch)
    few_rows = product * rows / many
    longer, shorter = max(drawing, few_rows), min(drawing, few_rows)
    programs = Card.programs
    if device == "cuda":
        programs = 2.0 * torch.cuda.get_device_properties(0).multi_processor_count
    return {
        "normals": count / drawing,
        "half_flops": 2 * count * many / product,
        "float_flops": 2 * count * many / single,
        "exact_flops": 2 * count * many / exact,
        "bytes": copied,
        "launch": launch,
        "dispatch": (_host(lambda: one + 1) + _host(lambda: sampled_linear(few, narrow[0], narrow[0], key, 0))) / 2,
        "overlap": min(1.0, max(0.01, (both - longer) / shorter)),
        "step": network / 4,
        "programs": programs,
        **crossings,
    }


def _host(call: Callable[[], object], times: int = 50) -> float:
    """The median seconds until the call returns, with its kernels started but not finished; after a warm-up call."""
    seconds = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return sorted(seconds[1:])[times // 2]


def _crossing(timed: Timer, name: str, mean: torch.Tensor, std: torch.Tensor, key: torch.Tensor) -> float:
    """The largest of ROWS up to which the fused kernel is faster than the sampler; half of the first if it never is."""
    fastest = ROWS[0] / 2
    for rows in ROWS:
        x = torch.randn(rows, mean.shape[1], device=mean.device).to(mean.dtype)
        times = {}
        for strategy in ("fused", "sampler"):
            with always(strategy):
                times[strategy] = timed(f"{strategy} {name} {rows}", lambda x=x: sampled_linear(x, mean, std, key, 0))
        if times["fused"] > times["sampler"]:
            break
        fastest = float(rows)
    return fastest


def _above(seconds: float, launch: float) -> float:
    """The seconds of an operation without its launch, but at least a tenth of them."""
    return max(seconds - launch, 0.1 * seconds)


def main() -> None:
    if "--check" in sys.argv[1:]:  # every measurement once, on tiny layers, on the CPU; stores nothing

        def once(_: str, call: Callable[[], object]) -> float:
            begun = time.perf_counter()
            call()
            return time.perf_counter() - begun

        print(json.dumps(measure(once, device="cpu", size=32, samples=2), indent=1))
        return
    name = device_name()
    if name is None:
        raise SystemExit("no accelerator, so nothing is measured: the cost model uses its default constants")
    from triton.testing import do_bench, do_bench_cudagraph

    def timed(name: str, call: Callable[[], object]) -> float:
        if name in ("launch", "network"):  # these run for less time than the host takes to start them
            return do_bench_cudagraph(call, rep=20, return_mode="median") * 1e-3
        return do_bench(call, warmup=10, rep=50, return_mode="median") * 1e-3

    constants = measure(timed)
    print(json.dumps(constants, indent=1))
    print(keep(name, constants))


if __name__ == "__main__":
    main()
