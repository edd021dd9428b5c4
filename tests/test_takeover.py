"""Compiled code takes the place of a traced step at a step that no clock decides, and members train in turn."""

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import vbdl
from vbdl.nn import members as member_posteriors
from vbdl.training import step as steps
from vbdl.training import takeover, worth
from vbdl.training.in_turn import MemberStep
from vbdl.training.options import TrainingOptions
from vbdl.training.run import TrainingRun

sys.path.insert(0, str(Path(__file__).parent))
from two_outputs import FEATURES, OUTPUTS, ROUNDING, network, rows  # noqa: E402

N, BATCH = 72, 24  # three steps in an epoch
FIRST = 7  # the step at which compiled code takes over, in the third epoch


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return rows(N)


@pytest.fixture
def taken_over(monkeypatch):
    """Steps are traced, and code that is marked takes over at step FIRST: its gradients are a per cent larger."""
    monkeypatch.setattr(worth, "_STEPS_WORTH_TRACING", 1)
    monkeypatch.setattr(steps, "steps_until_compiled", lambda graph, count, runs: FIRST)
    calls: list[str] = []

    def compile_graph(graph, like, whole):
        def marked(*arguments):
            calls.append("compiled")
            losses, *gradients = graph(*arguments)
            return (losses, *(1.01 * g for g in gradients))

        return marked

    monkeypatch.setattr(takeover, "compile_graph", compile_graph)
    return calls


def state(*modules: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": t.detach().clone() for i, m in enumerate(modules) for name, t in m.state_dict().items()}


def trained(data, epochs=5, q=None, **options):
    torch.manual_seed(3)
    q = vbdl.DeepEnsemble(network(), 3) if q is None else q
    likelihood = vbdl.Gaussian(OUTPUTS)
    options = {"epochs": epochs, "batch_size": BATCH, "lr": 1e-2, "progress": False} | options
    history = vbdl.fit(q, data, likelihood, **options)
    return state(q, likelihood), history


@pytest.fixture(params=["together", "in turn"])
def in_turn(request, monkeypatch) -> bool:
    """Whether members train one after the other."""
    large = request.param == "in turn"
    monkeypatch.setattr(member_posteriors, "_BYTES_OF_A_VALUE", 0 if large else 2**30)
    return large


def test_code_takes_over_at_one_step_of_repeated_and_resumed_trainings(
    in_turn, data, taken_over, monkeypatch, tmp_path
):
    """Bit for bit, also in trainings that are resumed before, in and after the epoch of that step."""
    expected, _ = trained(data)
    assert len(taken_over) == (5 * 3 - FIRST) * (3 if in_turn else 1)
    again, _ = trained(data)
    assert all(torch.equal(t, again[name]) for name, t in expected.items())
    set_kl = TrainingRun._set_kl
    for stop in (1, 2, 3, 4):
        options = {"checkpoint": tmp_path / f"{stop}.ckpt", "checkpoint_every": 1}

        def interrupted(run, epoch, stop=stop):
            if epoch == stop:
                raise KeyboardInterrupt
            set_kl(run, epoch)

        monkeypatch.setattr(TrainingRun, "_set_kl", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(data, **options)
        monkeypatch.setattr(TrainingRun, "_set_kl", set_kl)
        resumed, history = trained(data, **options)
        assert history.epochs == 5
        assert all(torch.equal(t, resumed[name]) for name, t in expected.items())


def test_a_checkpoint_of_the_former_format_goes_on(data, tmp_path):
    """It does not say which code ran which step, so the rest is equal to rounding."""
    path = tmp_path / "checkpoint.safetensors"
    trained(data, epochs=2, checkpoint=path, checkpoint_every=1, compile=False)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["vbdl"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del about["steps"]
    save_file(tensors, path, {"vbdl": json.dumps(about | {"format": 1})})
    resumed, history = trained(data, epochs=4, checkpoint=path, checkpoint_every=1, compile=False)
    whole, _ = trained(data, epochs=4, compile=False)
    assert len(history.train_loss) == 4
    torch.testing.assert_close(resumed, whole, **ROUNDING)


def test_training_goes_on_while_the_compiler_runs(in_turn, data, monkeypatch):
    """Until the step that waits for it, and steps after it are computed by its code."""
    monkeypatch.setattr(worth, "_STEPS_WORTH_TRACING", 1)
    monkeypatch.setattr(steps, "steps_until_compiled", lambda graph, count, runs: FIRST)
    may_end, threads = threading.Event(), []

    def compile_graph(graph, like, whole):
        threads.append(threading.current_thread())
        assert may_end.wait(60)
        return graph

    monkeypatch.setattr(takeover, "compile_graph", compile_graph)
    of_step = takeover.Takeover.of_step
    numbers = []

    def watched(self, number):
        numbers.append(number)
        if number >= FIRST:
            may_end.set()
        return of_step(self, number)

    monkeypatch.setattr(takeover.Takeover, "of_step", watched)
    ends, history = trained(data)
    assert set(range(FIRST)) < set(numbers) and threads and threads[0] is not threading.main_thread()
    expected, _ = trained(data, compile=False)
    for name, t in expected.items():
        torch.testing.assert_close(ends[name], t, **ROUNDING)


def test_the_compiled_step_computes_what_the_python_code_does(in_turn, data, monkeypatch):
    monkeypatch.setattr(worth, "_STEPS_WORTH_TRACING", 1)
    monkeypatch.setattr(steps, "steps_until_compiled", lambda graph, count, runs: FIRST)
    ends = [trained(data, compile=compile, clip_norm=0.5)[0] for compile in (None, False, True)]
    for end in ends[1:]:
        for name, t in ends[0].items():
            torch.testing.assert_close(end[name], t, **ROUNDING)


def test_no_code_is_compiled_that_would_take_over_too_late(monkeypatch):
    monkeypatch.setattr(worth, "can_compile", lambda: True)
    assert worth.steps_until_compiled(_step(), 100) is None
    until = worth.steps_until_compiled(_step(), 10**7)
    assert until is not None and until == worth.steps_until_compiled(_step(), 10**8)
    assert worth.steps_until_compiled(_step(), until) is None
    assert worth.steps_until_compiled(_step(), 10**7, 5) == math.ceil(until / 5)
    monkeypatch.setattr(worth, "can_compile", lambda: False)
    assert worth.steps_until_compiled(_step(), 10**8) is None


def _step() -> torch.fx.GraphModule:
    from vbdl.compiling.graph import trace

    return trace(lambda x, w: ((x @ w).relu().sum(),), torch.randn(8, 4), torch.randn(4, 4), aligned=False)


NETWORKS = {
    "plain": network,
    "batch normalization": lambda: nn.Sequential(
        nn.Linear(FEATURES, 7, bias=False), nn.BatchNorm1d(7), nn.Linear(7, OUTPUTS)
    ),
    "dropout": lambda: nn.Sequential(nn.Linear(FEATURES, 7), nn.Dropout(0.3), nn.Linear(7, OUTPUTS)),
    "recurrent": lambda: nn.Sequential(nn.Unflatten(1, (FEATURES, 1)), _Last(), nn.Linear(4, OUTPUTS)),
}


class _Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(1, 4, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0][:, -1]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("compile", [False, True])
def test_members_in_turn_train_as_together(name, compile, data, traced_only, monkeypatch):
    """With the same batches, draws, clipping, early stopping and learning rates."""
    ends = []
    for together in (True, False):
        kinds = []
        monkeypatch.setattr(member_posteriors, "_BYTES_OF_A_VALUE", 2**30 if together else 0)
        monkeypatch.setattr("vbdl.training.run.trains_in_turn", (lambda *a: False) if together else _noting(kinds))
        torch.manual_seed(3)
        members = vbdl.MCDropout(NETWORKS[name]()) if name == "dropout" else NETWORKS[name]()
        q = vbdl.DeepEnsemble(members, 3)
        options = {"validation": 0.25, "patience": 3, "clip_norm": 0.3, "schedule": "cosine", "weight_decay": 0.1}
        end, history = trained(data, epochs=8, q=q, compile=compile, **options)
        ends.append((end, history))
        assert kinds == ([] if together else [True])
    for key, t in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][key], t, **ROUNDING)
    assert ends[0][1].best_epoch == ends[1][1].best_epoch and ends[0][1].epochs == ends[1][1].epochs
    torch.testing.assert_close(
        torch.tensor(ends[0][1].train_loss), torch.tensor(ends[1][1].train_loss), rtol=1e-4, atol=1e-5
    )


def _noting(kinds):
    from vbdl.training.in_turn import trains_in_turn

    return lambda *a: kinds.append(trains_in_turn(*a)) or kinds[-1]


@pytest.mark.parametrize(
    "compile, batch, kind", [(False, 6, True), (True, 6, False), (False, 24, True), (True, 24, True)]
)
def test_members_of_large_parameters_train_in_turn_while_nothing_is_traced(
    compile, batch, kind, data, traced_only, monkeypatch
):
    """The gradients of all members leave the cache then; compiled steps are faster stacked, unless values are large."""
    monkeypatch.setattr(member_posteriors, "_BYTES_OF_A_VALUE", 4 * 64 * 16)  # of a batch of 16
    q = vbdl.DeepEnsemble(
        nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, OUTPUTS)), 2
    )
    options = TrainingOptions(epochs=1, batch_size=batch, compile=compile)
    run = TrainingRun(q, data, vbdl.Gaussian(OUTPUTS), options)
    run.run()
    assert isinstance(run.step, MemberStep) == kind


class _Noisy(nn.Linear):
    def forward(self, x):
        out = super().forward(x)
        return out + 0.01 * torch.randn(x.shape[0], OUTPUTS) if self.training else out


class _Unused(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.other = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    "case", ["noise", "unused", "own losses", "optimizer", "accumulate", "rates", "shared rows", "one member"]
)
def test_members_that_would_train_otherwise_do_not_train_in_turn(case, data, monkeypatch):
    monkeypatch.setattr(member_posteriors, "_BYTES_OF_A_VALUE", 0)

    class Own(vbdl.DeepEnsemble):
        def losses(self, x, y, likelihood, own_rows=False):
            return 2 * super().losses(x, y, likelihood, own_rows)

    layer = {"noise": _Noisy, "unused": _Unused}.get(case, nn.Linear)
    q = (Own if case == "own losses" else vbdl.DeepEnsemble)(layer(FEATURES, OUTPUTS), 1 if case == "one member" else 3)
    options = {
        "optimizer": {"optimizer": lambda ps: torch.optim.SGD(ps, lr=0.1)},
        "accumulate": {"accumulate": 2},
        "rates": {"lr": [0.1, 0.2, 0.3]},
    }.get(case, {})
    if case == "shared rows":
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=BATCH)
    run = TrainingRun(q, data, vbdl.Gaussian(OUTPUTS), TrainingOptions(epochs=1, batch_size=BATCH, **options))
    run.run()
    assert not isinstance(run.step, MemberStep)


def test_a_process_ends_while_the_compiler_runs():
    """Also by an interrupt: the message and the status are those of the program."""
    program = """
import torch, vbdl
from torch import nn
from vbdl.training import step
step.steps_until_compiled = lambda graph, count, runs: 10**9
x = torch.randn(64, 5)
q = vbdl.DeepEnsemble(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)), 3)
vbdl.fit(q, (x, x[:, :2]), vbdl.Gaussian(2), epochs=310, batch_size=64, progress=False)
print("trained", flush=True)
"""
    for ending, codes, words in (("", {0}, ""), ("raise KeyboardInterrupt", {1, -2}, "KeyboardInterrupt")):
        done = subprocess.run([sys.executable, "-c", program + ending], capture_output=True, text=True, timeout=120)
        assert done.stdout == "trained\n" and done.returncode in codes, done.stderr
        assert words in done.stderr and "Fatal" not in done.stderr and "_Leaving" not in done.stderr


def test_a_later_process_loads_the_code_of_a_step(data, compiled):
    """Steps write to their arguments, numbers of steps and batch statistics, and are stored all the same."""
    for _ in range(2):
        trained(data, compile=True, q=vbdl.DeepEnsemble(NETWORKS["batch normalization"](), 3))
    assert len(compiled) == 1


def test_an_error_of_the_compiler_is_a_warning_and_the_graph_goes_on(data, monkeypatch, caplog):
    monkeypatch.setattr(worth, "_STEPS_WORTH_TRACING", 1)
    monkeypatch.setattr(steps, "steps_until_compiled", lambda graph, count, runs: FIRST)
    expected, _ = trained(data, compile=False)

    def broken(graph, like, whole):
        raise RuntimeError("no such register")

    monkeypatch.setattr(takeover, "compile_graph", broken)
    ends, _ = trained(data)
    assert [r.getMessage() for r in caplog.records if "cannot be compiled" in r.getMessage()] == [
        "the training step cannot be compiled and runs uncompiled, which is slower: no such register"
    ]
    for name, t in expected.items():
        torch.testing.assert_close(ends[name], t, **ROUNDING)


class Sum(nn.Module):
    """Two parameters that get one and the same gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.layer = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8)), nn.Linear(FEATURES, 8)
        self.head = nn.Linear(8, OUTPUTS)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x) * (self.a + self.b)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(FEATURES, 6, batch_first=True), nn.Linear(6, OUTPUTS)

    def forward(self, x):
        return self.head(self.layer(x.unsqueeze(1).expand(-1, 4, -1))[0][:, -1])


@pytest.mark.parametrize("make", [Sum, Recurrent])
def test_clipping_scales_every_gradient_once(make, data, monkeypatch):
    monkeypatch.setattr(member_posteriors, "_BYTES_OF_A_VALUE", 0)
    results = []
    for in_turn in (True, False):
        if not in_turn:
            monkeypatch.setattr("vbdl.training.run.trains_in_turn", lambda *arguments: False)
        torch.manual_seed(0)
        q = vbdl.DeepEnsemble([make() for _ in range(3)])
        results.append(trained(data, q=q, clip_norm=0.01, compile=False)[0])
    torch.testing.assert_close(*results, **ROUNDING)


class Penalized(vbdl.DeepEnsemble):
    """Its losses have a term that is 0 where training begins."""

    def losses(self, x, y, likelihood, own_rows=False):
        penalty = sum((p.abs() - 1).clamp_min(0).flatten(1).sum(1) for p in self.stacked().values())
        return super().losses(x, y, likelihood, own_rows) + 10 * penalty


def test_losses_of_its_own_train_together_even_if_they_begin_alike(data, monkeypatch):
    monkeypatch.setattr(member_posteriors, "_BYTES_OF_A_VALUE", 0)
    results = []
    for kind in (vbdl.DeepEnsemble, Penalized):
        torch.manual_seed(3)
        results.append(trained(data, q=kind(network(), 3), lr=0.3, compile=False)[0])
    assert any(not torch.allclose(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))


class Constant(nn.Module):
    """A network with a tensor in an attribute, which a graph of it holds itself."""

    def __init__(self):
        super().__init__()
        self.layer, self.head, self.scale = nn.Linear(FEATURES, 8), nn.Linear(8, OUTPUTS), torch.linspace(0.5, 2, 8)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)) * self.scale)


def test_the_graph_runs_while_inductor_compiles_it(data, monkeypatch):
    """Inductor replaces constants of what it traces: the graph that training runs is another."""
    monkeypatch.setattr(worth, "_STEPS_WORTH_TRACING", 1)
    monkeypatch.setattr(steps, "steps_until_compiled", lambda graph, count, runs: 60)
    given, used = [], []
    of = takeover.compile_graph
    monkeypatch.setattr(takeover, "compile_graph", lambda graph, *a, **k: given.append(graph) or of(graph, *a, **k))
    init = takeover.Takeover.__init__
    monkeypatch.setattr(
        takeover.Takeover,
        "__init__",
        lambda self, graph, like, first: used.append(graph) or init(self, graph, like, first),
    )
    torch.manual_seed(0)
    made = [Constant() for _ in range(2)]
    state, history = trained(data, epochs=30, q=vbdl.DeepEnsemble(made))
    assert given and given[0] is not used[0] and all(math.isfinite(loss) for loss in history.train_loss[-1])


def test_a_resumed_training_goes_on_as_it_began(data, monkeypatch, tmp_path):
    monkeypatch.setattr(member_posteriors, "_BYTES_OF_A_VALUE", 0)
    whole, _ = trained(data, epochs=4, compile=False)
    trained(data, epochs=2, compile=False, checkpoint=tmp_path / "c", checkpoint_every=1)
    monkeypatch.setattr("vbdl.training.run.trains_in_turn", lambda *arguments: pytest.fail("decided anew"))
    resumed, _ = trained(data, epochs=4, compile=False, checkpoint=tmp_path / "c", checkpoint_every=1)
    assert all(torch.equal(t, resumed[n]) for n, t in whole.items())


def test_a_training_resumed_with_options_for_stacked_steps_takes_them(data, monkeypatch, tmp_path):
    monkeypatch.setattr(member_posteriors, "_BYTES_OF_A_VALUE", 0)
    trained(data, epochs=2, compile=False, checkpoint=tmp_path / "c", checkpoint_every=1)
    monkeypatch.setattr(MemberStep, "begin_epoch", lambda self: pytest.fail("in turn"))
    _, history = trained(data, epochs=4, compile=False, checkpoint=tmp_path / "c", checkpoint_every=1, accumulate=3)
    assert len(history.train_loss) == 4
