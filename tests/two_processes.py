"""One of two processes of tests/test_distributed.py: `python two_processes.py MEETING_FILE RANK`."""

import ctypes
import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import vbdl
from vbdl.distributed import ShardedPredictor

torch.set_num_threads(1)
torch.manual_seed(0)
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
x = torch.randn(150, 4)
y = (x[:, 0] > 0).long()
net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def check(promise, ok):
    print(f"{'ok' if ok else 'NOT ok'}: {promise}", flush=True)


def same(a, b, tolerance=1e-6):
    names = ("mean", "total", "aleatoric", "epistemic", "standard_error")
    return all(torch.allclose(getattr(a, n), getattr(b, n), rtol=1e-5, atol=tolerance) for n in names)


ensemble = vbdl.DeepEnsemble(net, 5, seed=1)  # two members here, three there
one = vbdl.Predictor(ensemble, vbdl.Categorical(), compile=False)
two = ShardedPredictor(ensemble, vbdl.Categorical(), mesh=mesh, compile=False)
p, expected = two(x), one(x)
check("ensemble is one process", same(p, expected) and p.n_samples == 5)
check("uneven shares", two.n_samples == (2, 3)[rank])
each = [torch.empty_like(p.probs) for _ in range(2)]
dist.all_gather(each, p.probs)
check("all processes agree", torch.equal(each[0], each[1]))
own = sum(t.numel() for t in two.posterior.parameters())
whole = sum(t.numel() for t in ensemble.parameters())
check("half the members", own * 5 == whole * (2, 3)[rank])
even = ShardedPredictor(vbdl.DeepEnsemble(net, 4, seed=1), vbdl.Categorical(), mesh=mesh, compile=False)
gathered = {n: t.full_tensor() for n, t in even.stacked.items()}
stacked = vbdl.DeepEnsemble(net, 4, seed=1).stacked()
check("gathered members are the ensemble", all(torch.equal(gathered[n], t.detach()) for n, t in stacked.items()))

regression = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
members, noise = vbdl.DeepEnsemble(regression, 4), vbdl.Gaussian()
vbdl.fit(members, (x, x[:, :1].sin()), noise, epochs=3, progress=False, compile=False)
a = vbdl.Predictor(members, noise, compile=False)(x)
check("gaussian ensemble is one process", same(a, ShardedPredictor(members, noise, mesh=mesh, compile=False)(x)))

dropout = vbdl.MCDropout(net)
a = vbdl.Predictor(dropout, vbdl.Categorical(), 21, seed=3, compile=False)(x)
check("dropout is one process", same(a, ShardedPredictor(dropout, vbdl.Categorical(), 21, 3, compile=False)(x)))
field = vbdl.MeanField(net[0:2], n_data=100)
a = vbdl.Predictor(field, vbdl.Categorical(), 20, compile=False, joint=True)(x)
b = ShardedPredictor(field, vbdl.Categorical(), 20, mesh=mesh, compile=False, joint=True)(x)
check("mean-field is one process", same(a, b))

cooled = vbdl.calibrate(one, (x[:60], y[:60]), vbdl.Temperature())
b = ShardedPredictor(cooled.posterior, cooled.likelihood, mesh=mesh, compile=False)(x)
check("calibrated is one process", same(cooled(x), b))


def growth(load):
    """Bytes of memory that the process takes at most while it loads and predicts, and what that gives."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is given back, and not used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    status = lambda name: next(
        int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if name in line
    )
    before = status("VmRSS")
    found = load()(x)
    return status("VmHWM") - before, found


folder = Path(sys.argv[1]).parent
wide = nn.Sequential(
    nn.Linear(4, 512), *[m for _ in range(12) for m in (nn.ReLU(), nn.Linear(512, 512))], nn.Linear(512, 3)
)
if rank == 0:
    vbdl.Predictor(vbdl.DeepEnsemble(wide, 8), vbdl.Categorical(), compile=False).save(folder / "wide", example=x)
    vbdl.Predictor(members, noise, compile=False).save(folder / "noise", example=x)
    vbdl.Predictor(dropout, vbdl.Categorical(), 21, seed=3, compile=False).save(folder / "dropout", example=x)
    cooled.save(folder / "cooled", example=x)
dist.barrier()
share, p = growth(lambda: ShardedPredictor.load(folder / "wide", mesh=mesh))
whole, expected = growth(lambda: vbdl.load(folder / "wide"))
state = 8 * sum(t.numel() * 4 for t in wide.parameters())
check("loaded shares are one process", same(p, expected) and p.n_samples == 8)
print(f"peak of a share {share / 2**20:.0f} MiB, of the whole {whole / 2**20:.0f} MiB, state {state / 2**20:.0f} MiB")
check("a share is loaded in about half the memory", 0.4 * whole < share < 0.6 * whole and whole > state)
for name in ("noise", "dropout", "cooled"):
    a, b = vbdl.load(folder / name), ShardedPredictor.load(folder / name)
    check(f"loaded {name} is one process", same(a(x), b(x)) and b.manifest == a.manifest and b.n_draws == a.n_samples)
fewer = ShardedPredictor.load(folder / "wide", mesh=mesh, n_samples=5)
check("fewer draws are the first", same(fewer(x), vbdl.load(folder / "wide", n_samples=5)(x)))
dist.barrier()
if rank == 0:
    damaged = folder / "wide" / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-9] ^= 1  # in the share of the other
    damaged.write_bytes(data)
dist.barrier()
try:
    ShardedPredictor.load(folder / "wide", mesh=mesh)
except ValueError as error:
    check("damage anywhere is refused everywhere", "damaged or replaced" in str(error))

try:
    ShardedPredictor(dropout, vbdl.Categorical(), 1, mesh=mesh, compile=False)
except ValueError as error:
    check("too few draws are refused", "take more draws" in str(error))
try:
    two(x, samples=True)
except ValueError as error:
    check("samples are refused", "does not return them" in str(error))
dist.barrier()
dist.destroy_process_group()
