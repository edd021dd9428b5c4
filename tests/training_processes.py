"""One of several processes of test_training_processes.py: `python training_processes.py WHAT MEETING_FILE RANK SIZE`.

The numbers of several processes are compared with those of one, which this process trains by itself.
"""

import datetime
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import vbdl

torch.set_num_threads(1)
what, meet, rank, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
# float32 weights near 1 are rounded by 6e-8 in each of at most 50 steps, and gradients are sums of at most 16 rows in
# another order, which is 16 times that relative to the sum; Adam keeps relative errors. 50 * (1 + 16 * lr) * 6e-8
TOLERANCE = 5e-6
options = {"epochs": 8, "batch_size": 16, "lr": 1e-2, "validation": 0.25, "progress": False, "compile": False}


def check(promise, ok):
    print(f"{'ok' if ok else 'NOT ok'}: {promise}", flush=True)


def state(q, likelihood):
    return {**q.state_dict(), **{f"likelihood.{n}": p for n, p in likelihood.named_parameters()}}


def apart(one, other):
    """The largest difference of two trainings in weights and losses, relative to numbers above 1.

    It is infinite if they stopped at other epochs.
    """
    (a, of_a), (b, of_b) = ((state(q, likelihood), h) for q, likelihood, h in (one, other))
    if (of_a.epochs, of_a.best_epoch) != (of_b.epochs, of_b.best_epoch) or a.keys() != b.keys():
        return float("inf")
    pairs = [(a[n].detach().double(), b[n].detach().double()) for n in a if not n.endswith("_vectors")]
    if isinstance(
        one[0], vbdl.Laplace
    ):  # its eigenvectors turn freely where eigenvalues are close: compare what they do
        means = [vbdl.Predictor(q, likelihood, compile=False)(x).mean for q, likelihood, _ in (one, other)]
        pairs.append((means[0].double(), means[1].double()))
    pairs += [
        (torch.tensor(u, dtype=torch.float64), torch.tensor(v, dtype=torch.float64))
        for u, v in ((of_a.train_loss, of_b.train_loss), (of_a.validation_nll, of_b.validation_nll))
    ]
    return max(float(((u - v).abs() / u.abs().clamp_min(1.0)).max()) for u, v in pairs if u.numel())


def trained(make, likelihood, data, seed=0, **more):
    torch.manual_seed(1)  # of the weights
    q, likelihood = make(), likelihood()
    return q, likelihood, vbdl.fit(q, data, likelihood, **{**options, "seed": seed, **more})


torch.manual_seed(0)
x = torch.randn(67, 4)
classes, real = (x[:, 0] > 0.3 * torch.randn(67)).long(), x[:, :1].sin() + 0.1 * torch.randn(67, 1)


def net(out=3, p=0.2):
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(p), nn.Linear(16, out))


class Sequence(nn.Module):
    """A network of sequences whose dropout masks have their batch in the second axis."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(1, 4, 2, dropout=0.3)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.recurrent(x.t().unsqueeze(-1))[0][-1])


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.1 * torch.randn_like(x[:, :1]) + 0.1 * torch.randn(self.out_features)


categorical, gaussian = (vbdl.Categorical, (x, classes)), (vbdl.Gaussian, (x, real))
frozen = net()
frozen[0].requires_grad_(False)
architectures = lambda: [net(), nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))]
methods = {
    "a deep ensemble": (lambda: vbdl.DeepEnsemble(net(), 5, seed=1), *categorical, {"bootstrap": True}),
    "an ensemble that stops early": (lambda: vbdl.DeepEnsemble(net(1), 5), *gaussian, {"patience": 2, "lr": 0.1}),
    "an ensemble with a frozen layer": (lambda: vbdl.DeepEnsemble(frozen, 4), *categorical, {"clip_norm": 0.5}),
    "an ensemble of dropout": (lambda: vbdl.DeepEnsemble(vbdl.MCDropout(net()), 3), *categorical, {}),
    "an ensemble of mean-field": (
        lambda: vbdl.DeepEnsemble(vbdl.MeanField(net(), 50), 3), *categorical, {"kl_warmup": 4}),
    "MultiSWAG": (lambda: vbdl.DeepEnsemble(vbdl.SWAG(net(), 3), 3), *categorical, {}),
    "fewer members than processes": (lambda: vbdl.DeepEnsemble(net(1), 1), *gaussian, {"patience": 2}),
    "several architectures": (lambda: vbdl.DeepEnsemble(architectures()), *categorical, {}),
    "dropout": (lambda: vbdl.MCDropout(net(1)), *gaussian, {"clip_norm": 0.5, "patience": 1, "lr": 0.1}),
    "dropout between recurrent layers": (lambda: vbdl.MCDropout(Sequence()), *categorical, {}),
    "mean-field": (lambda: vbdl.MeanField(net(), 50, n_samples=2), *categorical, {"kl_warmup": 4}),
    "a network's own noise": (
        lambda: vbdl.Stochastic(nn.Sequential(Noisy(4, 8), nn.Dropout(0.2), Noisy(8, 3))), *categorical, {}),
    "one network": (lambda: vbdl.Deterministic(net()), *categorical, {"schedule": "cosine"}),
    "SWAG": (lambda: vbdl.SWAG(net(), 3), *categorical, {}),
    "snapshots": (lambda: vbdl.Snapshots(net(), 3), *categorical, {}),
    "IVON": (lambda: vbdl.IVON(net(), 50), *categorical, {}),
    "an ensemble of IVON": (lambda: vbdl.DeepEnsemble(vbdl.IVON(net(), 50), 3), *categorical, {}),
    "a batch ensemble": (lambda: vbdl.BatchEnsemble(net(1), 4), *gaussian, {"patience": 2, "clip_norm": 0.5}),
    "Masksembles": (lambda: vbdl.Masksembles(net(), 3), *categorical, {}),
    "batches that are accumulated": (lambda: vbdl.MCDropout(net()), *categorical, {"accumulate": 2}),
    "members with learning rates of their own": (
        lambda: vbdl.DeepEnsemble(net(), 3), *categorical, {"lr": [1e-3, 1e-2, 2e-2], "weight_decay": [0.0, 0.1, 0.2]}),
    "Laplace": (lambda: vbdl.Laplace(net()), *categorical, {"epochs": 2}),
}  # fmt: skip
FIRST = (
    "an ensemble that stops early",
    "an ensemble of dropout",
    "fewer members than processes",
    "dropout",
    "mean-field",
)


def numbers(names):
    for name in names:
        make, likelihood, data, more = methods[name]
        one = trained(make, likelihood, data, processes=False, **more)
        together = trained(make, likelihood, data, **more)
        print(f"{name}: {apart(one, together):.1e} apart")
        check(f"{name} is that of one process", apart(one, together) < TOLERANCE)
        if name == "dropout":
            other = trained(make, likelihood, data, seed=3, processes=False, **more)
            check("another seed is told apart", apart(one, other) > 100 * TOLERANCE)
        of_all = [None] * size
        dist.all_gather_object(of_all, [t.tolist() for t in state(*together[:2]).values()])
        check(f"{name} is the same in all processes", all(values == of_all[0] for values in of_all))


def loaders():
    for name in ("a deep ensemble", "dropout"):
        make, likelihood, data, _ = methods[name]
        results = []
        for processes in (False, None):
            loader = DataLoader(TensorDataset(*data), batch_size=16, shuffle=True)
            results.append(trained(make, likelihood, loader, validation=None, processes=processes))
        check(f"{name} of a loader is that of one process", apart(*results) < TOLERANCE)


def compiled():
    for name in ("a deep ensemble", "dropout", "mean-field"):
        make, likelihood, data, more = methods[name]
        one = trained(make, likelihood, data, processes=False, **more)
        together = trained(make, likelihood, data, **{**more, "compile": True})
        check(f"{name} compiled is that of one process", apart(one, together) < TOLERANCE)


def resumed():
    """Each training is interrupted after half its epochs, and ended by another number of processes."""
    groups = {n: dist.new_group(list(range(n))) for n in range(2, size + 1)}
    for name in ("an ensemble that stops early", "dropout"):
        make, likelihood, data, more = methods[name]
        more = {**more, "patience": 3}
        one = trained(make, likelihood, data, processes=False, **more)
        counts = range(1, size + 1)
        for before, after in [(a, b) for a in counts for b in counts if a != b]:
            path = meet.parent / f"{name}-{before}-{after}"
            result = None
            for count, epochs in ((before, 3), (after, options["epochs"])):
                if rank < count:
                    result = trained(
                        make, likelihood, data, processes=groups.get(count, False), checkpoint=path,
                        checkpoint_every=2, **{**more, "epochs": epochs},
                    )  # fmt: skip
                dist.barrier()
            ok = rank >= after or (result is not None and apart(one, result) < TOLERANCE)
            check(f"{name} goes on from {before} to {after}", ok)
            check(f"{name} leaves one file, {before} to {after}", len(list(meet.parent.glob(f"{path.name}*"))) == 1)


def refused():
    def says(promise, words, make=methods["dropout"][0], data=(x, real), likelihood=vbdl.Gaussian, **more):
        try:
            trained(make, likelihood, data, **more)
        except (ValueError, TypeError) as error:
            print(f"{promise}: {error}")
            check(promise, words in str(error))

    says("other rows are refused", "the rows of the data", data=(x + rank * (torch.arange(67) == 5).unsqueeze(1), real))
    says("other targets are refused", "the rows of the data", data=(x, real + rank))
    says("another seed is refused", "fit(seed=) (0 and 1)", seed=rank)
    says("other epochs are refused", "fit(epochs=)", epochs=2 + rank)
    says("another method's seed is refused", "the seed", make=lambda: vbdl.MCDropout(net(1), seed=rank))
    says("fewer members elsewhere are refused", "the posterior", make=lambda: vbdl.DeepEnsemble(net(1), 3 + rank))

    def unseeded():
        torch.manual_seed(rank)
        return vbdl.MCDropout(net(1))

    says("other weights are refused", "torch.manual_seed", make=unseeded)
    for name, make in (("dropout", methods["dropout"][0]), ("ensemble", lambda: vbdl.DeepEnsemble(net(1), 3))):
        rows = TensorDataset(x, real)
        loader = DataLoader(rows, batch_size=16, sampler=DistributedSampler(rows, size, rank))
        says(f"rows shared out by a sampler are refused: {name}", "DistributedSampler", make, loader, validation=None)
    normalized = lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))
    says("batch statistics are refused", "BatchNorm1d", make=lambda: vbdl.MCDropout(normalized()))

    class Centered(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            return x - x.mean(0) if self.training else x

    says("rows that are mixed are refused", "mean of the losses", make=lambda: vbdl.Deterministic(Centered(4, 1)))
    path = meet.parent / f"checkpoint of {rank}"
    if rank == 0:
        trained(methods["dropout"][0], vbdl.Gaussian, (x, real), processes=False, checkpoint=path, epochs=1)
    says("a checkpoint of one process alone is refused", "the checkpoint's file", checkpoint=path)
    says("what is no group is refused", "process group", processes=3)
    # after all these, the processes still train together
    make = lambda: vbdl.DeepEnsemble(normalized(), size + 1)
    slow = {"optimizer": lambda ps: torch.optim.SGD(ps, 0.01)}  # Adam would amplify what statistics leave of a bias
    one, together = (trained(make, vbdl.Gaussian, (x, real), processes=p, **slow) for p in (False, None))
    check("batch statistics of whole members are those of one process", apart(one, together) < TOLERANCE)


class Stopping(nn.Module):
    """A network whose forward ends or stops the process of the last rank in its tenth step."""

    def __init__(self, stop):
        super().__init__()
        self.inner, self.calls, self.stop = net(1), [0], stop

    def forward(self, x):
        self.calls[0] += self.training
        if rank == size - 1 and self.calls[0] == 10:
            self.stop()
        return self.inner(x)


def ended(stop):
    try:
        trained(lambda: vbdl.MCDropout(Stopping(stop)), vbdl.Gaussian, (x, real))
    except RuntimeError as error:
        print(error)
        check("the others end with an error", "another process has ended or did not answer" in str(error))
    os._exit(0)


def dies():
    os._exit(1)


def hangs():
    time.sleep(60)


dist.init_process_group(
    "gloo", init_method=f"file://{meet}", rank=rank, world_size=size,
    timeout=datetime.timedelta(seconds=8 if what == "hanging" else 120),
)  # fmt: skip
if what in ("dying", "hanging"):
    ended(dies if what == "dying" else hangs)
elif what in ("methods", "others"):
    numbers(name for name in methods if (name in FIRST) == (what == "methods"))
elif what in methods:
    numbers([what])
else:
    {"loaders": loaders, "compiled": compiled, "resumed": resumed, "refused": refused}[what]()
dist.barrier()
sys.stdout.flush()
os._exit(0)  # once in some hundred runs torch aborted while gloo ended its threads, after every promise was kept
