"""A LoRA ensemble of 8 on a Llama of 21 million parameters against the loop over peft's adapters. CPU, one thread.

    PYTHONPATH=... python benchmarks/lora.py [--cells 1x1,1x16,8x32] [--methods DeepEnsemble,MeanField,Laplace]
                                             [--seconds 20] [--out benchmarks/results/lora-cpu.jsonl]
    python benchmarks/lora.py --table     prints the results of the file as Markdown, runs nothing

Network: 6 layers of width 512, 8 heads, 2,000 tokens, random weights; LoRA of rank 8 on the queries and values of all
layers. A cell is rows x tokens; the answer is the distribution of the next token. Contenders:

    loop         one PeftModel with 8 adapters: `set_adapter(m)` and a forward pass for each, as peft's users write it;
                 for MeanField and Laplace 8 draws of vbdl's posterior as such adapters, made once
    peft-mixed   peft's own batch of several adapters, `model(repeated rows, adapter_names=[...])`; ensembles only
    vbdl         Predictor(posterior, Categorical()), compiled

Before timing, the answers of the loop and of vbdl with the same draws of the adapters are compared: equal to 1e-4 of
the largest probability. Times are medians of contenders in turn, ratios medians of each round's. Memory: bytes of
parameters and buffers that the predictor holds over those of one network with one adapter; and resident memory of a
process of its own with that predictor, uncompiled, after predicting, over one with that network.
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

import speed
from networks import commit
from zoo.text import NextToken

import vbdl

RESULTS = Path(__file__).parent / "results" / "lora-cpu.jsonl"
N, WORDS, ROWS = 8, 2000, 64
SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
METHODS = ("DeepEnsemble", "MeanField", "Laplace")


def network() -> Any:  # a PeftModel
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=512, **SHAPE))
    return get_peft_model(base, LoraConfig(**LORA), adapter_name="m0").eval()


def posterior(method: str, net: nn.Module) -> Any:
    """A posterior over the adapters; of Laplace, after its pass over 64 rows of 16 random tokens."""
    if method == "DeepEnsemble":
        return vbdl.DeepEnsemble(net, N)
    if method == "MeanField":
        return vbdl.MeanField(net, ROWS)
    q = vbdl.Laplace(net, parameters="all", linearized=False, fisher_samples=1, prior_precision=100.0)
    rows = torch.randint(WORDS, (ROWS, 16)), torch.randint(WORDS, (ROWS,))
    with torch.enable_grad():
        vbdl.fit(q, rows, vbdl.Categorical(), epochs=0, batch_size=16, compile=False, progress=False)
    return q


def adapters(predict: vbdl.Predictor, method: str) -> list[dict[str, Tensor]]:
    """The adapters of each draw, by their names in the PeftModel."""
    q, states = predict.posterior, []
    for m in range(N):
        if method == "DeepEnsemble":
            states.append(q.member(m))
        else:
            q.module.key.copy_(q.draws(torch.tensor([m]), predict.seed)["key"][0])
            states.append(q.module.weights())
    return [{n.removeprefix("model."): t.clone() for n, t in s.items() if "lora_" in n} for s in states]


def contenders(method: str, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The contenders by name: functions that return the mean probabilities, (rows, tokens)."""
    from peft import LoraConfig

    net = network()
    predict = vbdl.Predictor(
        posterior(method, NextToken(net)),
        vbdl.Categorical(),
        n_samples=None if method == "DeepEnsemble" else N,
        compile=True,
    )
    for m in range(1, N):
        net.add_adapter(f"m{m}", LoraConfig(**LORA))
    own = dict(net.named_parameters())
    for m, state in enumerate(adapters(predict, method)):
        for name, t in state.items():
            own[name.replace(".m0.", f".m{m}.")].data.copy_(t)
    called = NextToken(net).eval()

    def loop() -> Tensor:
        each = []
        for m in range(N):
            net.set_adapter(f"m{m}", inference_mode=True)
            each.append(called(x))
        return torch.stack(each).softmax(-1).mean(0)

    names, repeated = [f"m{m}" for m in range(N) for _ in range(len(x))], x.repeat(N, 1)

    def mixed() -> Tensor:
        logits = net(input_ids=repeated, use_cache=False, adapter_names=names).logits[:, -1]
        return logits.unflatten(0, (N, len(x))).softmax(-1).mean(0)

    runs = {"loop": loop, "peft-mixed": mixed, "vbdl": lambda: predict(x).probs}
    predict.warm_up((len(x),), example=x)
    # of the loop's weights, where the predictor may draw outputs in place of weights
    expected, answer = loop(), predict.replace(joint=True, compile=False)(x).probs
    different = float((answer - expected).abs().max() / expected.max())
    if different > 1e-4:
        raise SystemExit(f"{method}, {tuple(x.shape)}: answers differ by {different:.2g}")
    return runs if method == "DeepEnsemble" else {n: run for n, run in runs.items() if n != "peft-mixed"}


def run_cell(method: str, rows: int, length: int, seconds: float) -> dict[str, Any]:
    torch.manual_seed(1)
    x = torch.randint(WORDS, (rows, length))
    timings = speed.interleave(contenders(method, x), seconds, 5)
    return {"ms": {n: 1e3 * t.wall for n, t in timings.items()}, "ratio": {n: t.ratio for n, t in timings.items()}}


# -- memory


def numbers(state: dict[str, Tensor]) -> int:
    """The bytes of these tensors."""
    return sum(t.numel() * t.element_size() for t in state.values())


def held(method: str) -> dict[str, Any]:
    """Bytes of the tensors of one network, and of the posterior over its adapters."""
    net = NextToken(network())
    one = numbers({**dict(net.named_parameters()), **dict(net.named_buffers())})
    q = posterior(method, net)
    tensors = {**dict(q.named_parameters()), **dict(q.named_buffers())}
    return {"network_mb": one / 2**20, "held_mb": numbers(tensors) / 2**20, "held_ratio": numbers(tensors) / one}


def resident(what: str) -> float:
    """MiB of resident memory that a network (or a predictor, by its method) adds in this process, after an answer."""
    import ctypes
    import gc

    import peft  # noqa: F401
    import transformers  # noqa: F401

    x = torch.randint(WORDS, (1, 16))
    read = lambda: int(next(s.split()[1] for s in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in s))
    before = read()
    if what == "network":
        net = NextToken(network())
        net(x)
    else:
        made = posterior(what, NextToken(network()))
        n = None if what == "DeepEnsemble" else N
        predict = vbdl.Predictor(made, vbdl.Categorical(), n_samples=n, compile=False)
        del made
        predict(x)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of freed tensors
    return (read() - before) / 1024


def apart(what: str) -> float:
    """`resident` in a process of its own."""
    command = [sys.executable, __file__, "--resident", what]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


# -- for people


def report(rows: list[dict[str, Any]]) -> str:
    last = {(r["method"], r["cell"]): r for r in rows}
    lines = ["| method | rows x tokens | loop, ms | peft-mixed | vbdl | loop / vbdl |", "| --- " * 6 + "|"]
    digits = lambda v: "-" if v is None else f"{v:.3g}" if v < 1000 else f"{v:.0f}"
    for (method, cell), r in last.items():
        if "ms" in r:
            ms = [digits(r["ms"].get(n)) for n in ("loop", "peft-mixed", "vbdl")]
            lines.append(f"| {method} | {cell} | {' | '.join(ms)} | {digits(r['ratio']['vbdl'])} |")
    lines += ["", "| method | tensors, MiB | to one network | resident, MiB | to one network |", "| --- " * 5 + "|"]
    for (method, _), r in last.items():
        if "held_mb" in r:
            lines.append(
                f"| {method} | {digits(r['held_mb'])} | {digits(r['held_ratio'])} | {digits(r['resident_mb'])} | "
                f"{digits(r['resident_ratio'])} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="1x1,1x16,1x64,8x32")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if options.table:
        print(report([json.loads(line) for line in options.out.read_text().splitlines()]))
        return
    if options.resident:
        print(resident(options.resident))
        return
    here, revision, rows = speed.machine(), commit(), []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(row | {"commit": revision, "machine": here}) + "\n")

    one = apart("network") if options.methods else 0.0
    for method in options.methods.split(","):
        memory = held(method) | {"resident_mb": apart(method)}
        keep({"method": method, "cell": "memory", **memory, "resident_ratio": memory["resident_mb"] / one})
        for cell in filter(None, options.cells.split(",")):
            n_rows, length = map(int, cell.split("x"))
            keep({"method": method, "cell": cell, **run_cell(method, n_rows, length, options.seconds)})
    print("\n" + report(rows))


if __name__ == "__main__":
    main()
