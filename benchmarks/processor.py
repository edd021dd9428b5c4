"""What a processor's ways to run layers bring on real networks: a forward pass of each way over that of the network.

    python benchmarks/processor.py [--networks resnet18-112,vit-tiny-224] [--rows 1,32] [--seconds 6]
                                   [--out benchmarks/results/processor-cpu.jsonl]
    python benchmarks/processor.py --table         prints the results of the file as a Markdown table, runs nothing

One thread, inference mode, one eager pass. Contenders, each only where the network has such layers:

    network        the network as it is
    folded         batch normalization folded into the convolution before it (torch.nn.utils.fuse_conv_bn_eval)
    channels-last  weights and images in torch.channels_last
    both           folded, and channels last
    packed         the weights of linear layers packed once by oneDNN for these rows: a second copy of them
    bfloat16       autocast, which rounds to 8 bits; on processors with instructions for it

Before timing, the outputs of all but bfloat16 are compared with the network's to 1e-4 of the largest.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

sys.path.insert(0, str(Path(__file__).parent))

import speed
from networks import NETWORKS, commit

RESULTS = Path(__file__).parent / "results" / "processor-cpu.jsonl"
DEFAULT = "resnet18-112,unet-128,cnn-96,vit-tiny-224,minilm-128,ft-transformer"


class Packed(nn.Module):
    """A linear layer whose weight oneDNN has packed for a number of rows."""

    def __init__(self, layer: nn.Linear, rows: int):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def folded(net: nn.Module) -> nn.Module | None:
    """The network with each normalization that directly follows a convolution in its parent folded into it."""
    net, count = copy.deepcopy(net), 0
    for parent in list(net.modules()):
        children = list(parent.named_children())
        for (first, a), (second, b) in zip(children, children[1:], strict=False):
            if isinstance(a, nn.Conv2d) and isinstance(b, nn.BatchNorm2d):
                setattr(parent, first, fuse_conv_bn_eval(a, b))
                setattr(parent, second, nn.Identity())
                count += 1
    return net if count else None


def packed(net: nn.Module, inputs: Any) -> nn.Module | None:
    """The network with every linear layer that it calls packed for the rows of this call."""
    net, rows = copy.deepcopy(net), {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args: rows.__setitem__(m, args[0].numel() // args[0].shape[-1]))
        for m in net.modules()
        if type(m) is nn.Linear
    ]
    net(inputs)
    for hook in hooks:
        hook.remove()
    for parent in list(net.modules()):
        for name, m in list(parent.named_children()):
            if m in rows:
                setattr(parent, name, Packed(m, rows[m]))
    return net if rows else None


def ways(net: nn.Module, inputs: Any) -> dict[str, Callable[[], Any]]:
    """The contenders by name."""
    has_images = any(isinstance(m, nn.Conv2d) for m in net.modules())
    made: dict[str, tuple[nn.Module | None, Any]] = {"network": (net, inputs), "packed": (packed(net, inputs), inputs)}
    if has_images:
        last = lambda m: None if m is None else copy.deepcopy(m).to(memory_format=torch.channels_last)
        images = inputs.contiguous(memory_format=torch.channels_last)
        made |= {"folded": (folded(net), inputs), "channels-last": (last(net), images)}
        made |= {"both": (last(folded(net)), images)}
    runs: dict[str, Callable[[], Any]] = {n: (lambda m=m, x=x: m(x)) for n, (m, x) in made.items() if m is not None}
    expected = runs["network"]()
    for name, run in runs.items():
        different = float((run() - expected).abs().max() / expected.abs().max())
        if different > 1e-4:
            raise SystemExit(f"{name}: outputs differ by {different:.2g}")

    def rounded() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return net(inputs)

    if torch.cpu._is_avx512_bf16_supported():
        runs["bfloat16"] = rounded
    return runs


def table(rows: list[dict[str, Any]]) -> str:
    names = ["folded", "channels-last", "both", "packed", "bfloat16"]
    last = {(r["network"], r["rows"]): r for r in rows}
    lines = [f"| network | rows | ms | {' | '.join(names)} |", "| --- " * (3 + len(names)) + "|"]
    for (network, count), r in last.items():
        cells = [f"{r['ratio'][n]:.2f}" if n in r["ratio"] else "-" for n in names]
        lines.append(f"| {network} | {count} | {r['ms']['network']:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=DEFAULT)
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.out.read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    here, revision, rows = speed.machine(), commit(), []
    for name in options.networks.split(","):
        torch.manual_seed(0)
        net = NETWORKS[name].build().eval()
        for count in map(int, options.rows.split(",")):
            with torch.inference_mode():
                timings = speed.interleave(ways(net, NETWORKS[name].inputs(count)), options.seconds, 5)
            row = {"network": name, "rows": count}
            row |= {
                "ms": {n: 1e3 * t.wall for n, t in timings.items()},
                "ratio": {n: t.ratio for n, t in timings.items()},
            }
            rows.append(row)
            print(row, flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(row | {"commit": revision, "machine": here}) + "\n")
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
