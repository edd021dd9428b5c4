"""Steps of training: traced as uncompiled, members one after the other, several batches for one update, and a lower
precision.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vbdl
from vbdl.calling import each
from vbdl.nn import members as member_posteriors
from vbdl.nn.interception import CounterDropout
from vbdl.training import step as steps
from vbdl.training import worth
from vbdl.training.optimization import clip_members
from vbdl.training.options import TrainingOptions, has_bfloat16
from vbdl.training.run import TrainingRun

sys.path.insert(0, str(Path(__file__).parent))
from two_outputs import FEATURES, OUTPUTS, ROUNDING, network, rows  # noqa: E402

N = 72


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return rows(N)


def state(q: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in q.state_dict().items()}


class Odd(nn.Module):
    """A network with parameters that get one gradient between them, one that gets none, and a transposed one."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(FEATURES, OUTPUTS).T), nn.Parameter(torch.randn(OUTPUTS))
        self.other, self.third = nn.Parameter(torch.randn(OUTPUTS)), nn.Parameter(torch.randn(1, OUTPUTS))
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return nn.functional.linear(x, self.weight) + (self.bias + self.other) + self.third


ODD = {
    "one": lambda: vbdl.Deterministic(Odd()),
    "members": lambda: vbdl.DeepEnsemble([Odd(), Odd()]),
    "convolution": lambda: vbdl.DeepEnsemble(
        nn.Sequential(nn.Unflatten(1, (1, FEATURES)), nn.Conv1d(1, 3, 2), nn.Flatten(), nn.Linear(12, OUTPUTS)), 2
    ),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("way", ["traced", "compiled"])
def test_steps_that_are_traced_are_those_of_the_python_code(name, way, data, monkeypatch, request):
    """Clipping scales gradients in place, and weight decay shrinks what has one: one in two places shows."""
    if way == "compiled":
        request.getfixturevalue("traced_only")
    else:
        monkeypatch.setattr(steps, "steps_until_compiled", lambda graph, count, runs: None)
        monkeypatch.setattr(worth, "_STEPS_WORTH_TRACING", 1)
    ends, seconds = [], []
    for compile in (False, True if way == "compiled" else None):
        torch.manual_seed(3)
        q = ODD[name]()
        options = {"epochs": 4, "batch_size": 17, "lr": 1e-2, "weight_decay": 0.3, "clip_norm": 0.5}
        history = vbdl.fit(q, data, vbdl.Gaussian(OUTPUTS), **options, compile=compile)
        ends.append(state(q))
        seconds.append(history.compile_seconds)
    assert seconds[0] == 0 < seconds[1]
    for key, t in ends[0].items():
        torch.testing.assert_close(ends[1][key], t, **ROUNDING)


def test_what_is_compiled_follows_from_the_steps_and_the_graph_alone(data, monkeypatch):
    """No clock decides, a batch of another shape is decided for itself, and few steps run as they are."""
    asked = []
    monkeypatch.setattr(steps, "steps_until_compiled", lambda graph, count, runs: asked.append(count))
    for given, expected in (
        (data, [1000]),  # 1000 epochs of one batch of 70 rows; those of the two rows left are no more
        (DataLoader(TensorDataset(*data), batch_size=12), [6000]),
    ):
        asked.clear()
        run = TrainingRun(
            vbdl.DeepEnsemble(network(), 2), given, vbdl.Gaussian(OUTPUTS), TrainingOptions(epochs=1000, batch_size=70)
        )
        with torch.enable_grad():
            run._epoch(0)
        assert sorted(set(asked)) == expected
    asked.clear()
    vbdl.fit(vbdl.DeepEnsemble(network(), 2), data, vbdl.Gaussian(OUTPUTS), epochs=3, batch_size=12)
    assert not asked


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_several_batches_for_one_update_are_one_batch_of_all_their_rows(compile, clip_norm, data, traced_only):
    ends = []
    # 72 rows: 24 is a third of them; 16 leaves 8 for the last batch, which is weighted by its rows
    for batch_size, accumulate in ((N, 1), (24, 3), (16, 5), (16, 9)):
        q, likelihood = vbdl.DeepEnsemble(network(), 3), vbdl.Gaussian(OUTPUTS)
        options = {"batch_size": batch_size, "accumulate": accumulate, "clip_norm": clip_norm, "compile": compile}
        history = vbdl.fit(q, data, likelihood, epochs=5, lr=1e-2, **options)
        ends.append((state(q), state(likelihood), history.train_loss))
    for members, noise, losses in ends[1:]:
        for name, t in members.items():
            if name != "steps":
                torch.testing.assert_close(t, ends[0][0][name], **ROUNDING)
        torch.testing.assert_close(noise["log_std"], ends[0][1]["log_std"], **ROUNDING)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(ends[0][2]), **ROUNDING)


def test_an_epoch_ends_with_an_update(data):
    """Two of five batches are left over: the third update of an epoch has one batch."""
    updates = []

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            if len(parameters := self.param_groups[0]["params"]) > 1:  # not of the trial on a tensor of two members
                updates.append([p.grad.clone() for p in parameters])
            return super().step(closure)

    q = vbdl.DeepEnsemble(network(), 2)
    optimizer = lambda ps: Counting(ps, lr=0.1)
    options = {"batch_size": 16, "accumulate": 2, "optimizer": optimizer, "compile": False}
    vbdl.fit(q, data, vbdl.Gaussian(OUTPUTS), epochs=2, **options)
    assert len(updates) == 6


@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this processor has no bfloat16 instructions")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        vbdl.Deterministic,
        lambda net: vbdl.MeanField(net, N),
        lambda net: vbdl.DeepEnsemble(net, 2),
        lambda net: vbdl.DeepEnsemble(vbdl.MCDropout(net), 2),
    ],
    ids=["deterministic", "mean-field", "ensemble", "ensemble of dropout"],
)
def test_bfloat16_trains_float32_parameters_about_as_well(make, compile, data, traced_only):
    seen, losses = [], {}

    class Spy(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            seen.append((self.weight.dtype, y.dtype))
            return y

    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        q = make(nn.Sequential(Spy(FEATURES, 32), nn.Tanh(), nn.Dropout(0.05), nn.Linear(32, OUTPUTS)))
        seen.clear()
        options = {"epochs": 40, "batch_size": 24, "lr": 1e-2, "compile": compile, "precision": precision}
        history = vbdl.fit(q, data, vbdl.Gaussian(OUTPUTS), **options)
        losses[precision] = torch.tensor(history.train_loss)
        assert all(p.dtype == torch.float32 for p in q.parameters())
        if not compile:  # a trace casts a copy
            assert seen[-1] == (torch.float32, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    assert not torch.equal(losses["bfloat16"], losses["float32"])
    fell = losses["float32"][0] - losses["float32"][-1]
    assert (fell > 0.3).all()
    assert ((losses["bfloat16"][-1] - losses["float32"][-1]).abs() < 0.1 * fell).all()


def test_a_precision_without_instructions_for_it_is_refused(data, monkeypatch):
    monkeypatch.setattr("vbdl.training.options.has_bfloat16", lambda device: False)
    q = vbdl.DeepEnsemble(network(), 2)
    with pytest.raises(ValueError, match="bfloat16 instructions, which this cpu does not have"):
        vbdl.fit(q, data, vbdl.Gaussian(OUTPUTS), epochs=1, precision="bfloat16")
    for options, words in (({"precision": "float16"}, "'float32' or 'bfloat16'"), ({"accumulate": 0}, "at least 1")):
        with pytest.raises(ValueError, match=words):
            vbdl.fit(q, data, vbdl.Gaussian(OUTPUTS), epochs=1, **options)


def test_a_method_with_a_loss_of_its_own_is_refused_a_lower_precision(data, monkeypatch):
    monkeypatch.setattr("vbdl.training.options.has_bfloat16", lambda device: True)

    class Own(vbdl.Deterministic):
        def losses(self, x, y, likelihood, own_rows=False):
            return likelihood.training_loss(likelihood(self.module(x)), y).mean().reshape(1)

    with pytest.raises(ValueError, match="Own computes its losses without"):
        vbdl.fit(Own(network()), data, vbdl.Gaussian(OUTPUTS), epochs=1, precision="bfloat16", compile=False)


class Watched(nn.Module):
    """A linear layer with a shared factor and a parameter that is not used, which writes down when it runs."""

    def __init__(self, events: list[str]):
        super().__init__()
        self.layer, self.factor, self.unused = nn.Linear(FEATURES, 1), nn.Parameter(torch.ones(())), nn.Linear(1, 1)
        self.events = events

    def forward(self, x, y):
        self.events.append("forward")
        out = self.layer(x) * self.factor
        out.register_hook(lambda _: self.events.append("backward"))
        return (out - y).square().mean()


def test_members_one_after_the_other_are_differentiated_one_after_the_other():
    """So one member's activations are in memory at a time; values and gradients are those of all losses together."""
    events: list[str] = []
    members = [Watched(events) for _ in range(3)]
    x, y, weights = torch.randn(3, 7, FEATURES), torch.randn(3, 7, 1), torch.tensor([1.0, -2.0, 0.5])
    found = []
    for run in (each.call_each, each.losses_of_each):
        stacked = {
            name: torch.stack([p.detach() for p in ps]).requires_grad_()
            for name, ps in (
                (n, [m.get_parameter(n) for m in members]) for n in ("layer.weight", "layer.bias", "unused.weight")
            )
        }
        shared = {"factor": torch.tensor(2.0, requires_grad=True)}
        events.clear()
        losses = run(members[0], stacked, shared, (x, y), inputs_stacked=True)
        (losses * weights).sum().backward()
        found.append((losses.detach(), [t.grad for t in (*stacked.values(), *shared.values())]))
    assert events == ["forward", "backward"] * 3
    torch.testing.assert_close(found[1][0], found[0][0])
    for one, other in zip(found[1][1], found[0][1], strict=True):
        if other is None or not other.any():
            assert one is None
        else:
            torch.testing.assert_close(one, other)


def test_members_of_large_values_run_one_after_the_other_as_they_would_together(data, monkeypatch):
    """The choice follows from the network and the rows in memory; batches of a loader may differ and do not count."""
    ends, kinds = [], []
    for largest, given in ((2**17, data), (8, data), (8, DataLoader(TensorDataset(*data), batch_size=24))):
        monkeypatch.setattr(member_posteriors, "_BYTES_OF_A_VALUE", largest)
        q = vbdl.DeepEnsemble(network(), 2)
        vbdl.fit(q, given, vbdl.Gaussian(OUTPUTS), epochs=3, batch_size=24, lr=1e-2, clip_norm=0.5, compile=False)
        ends.append(state(q))
        kinds.append(q._large)
    assert kinds == [False, True, False]
    for name, t in ends[0].items():
        torch.testing.assert_close(ends[1][name], t, **ROUNDING)


def test_attention_of_one_member_runs_as_torchs_own_and_draws_the_masks_of_all(data, monkeypatch):
    """A layer of attention without dropout is counted among the calls that draw, so that others draw alike."""

    def make() -> nn.Module:
        torch.manual_seed(5)
        layer = nn.TransformerEncoderLayer(FEATURES, 1, 8, dropout=0.0, batch_first=True)
        parts = [nn.Unflatten(1, (1, FEATURES)), layer, nn.Flatten(), nn.Dropout(0.3), nn.Linear(FEATURES, OUTPUTS)]
        return nn.Sequential(*parts)

    fused = []
    attention = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: fused.append(1) or attention(*a, **k)
    )
    ends = []
    for largest in (2**17, 8):
        monkeypatch.setattr(member_posteriors, "_BYTES_OF_A_VALUE", largest)
        fused.clear()
        q = vbdl.DeepEnsemble(make(), 2)
        vbdl.fit(q, data, vbdl.Gaussian(OUTPUTS), epochs=2, batch_size=24, lr=1e-2, compile=False)
        ends.append(state(q))
    assert len(fused) >= 2 * 2 * 3  # epochs, members and batches
    for name, t in ends[0].items():
        torch.testing.assert_close(ends[1][name], t, **ROUNDING)


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.Dropout(0.0)], ids=["plain", "dropout"])
def test_functions_of_a_network_of_plain_layers_are_called_as_they_are(layer, data, monkeypatch):
    """The mode that replaces functions calls each through Python, which takes as long as a small layer."""
    seen = []
    through = CounterDropout.__torch_function__
    monkeypatch.setattr(CounterDropout, "__torch_function__", lambda *a, **k: seen.append(1) or through(*a, **k))
    q = vbdl.Deterministic(nn.Sequential(nn.Linear(FEATURES, 8), layer, nn.Linear(8, OUTPUTS)))
    run = TrainingRun(q, data, vbdl.Gaussian(OUTPUTS), TrainingOptions(epochs=1, batch_size=24, compile=False))
    seen.clear()  # the checks before training call the network too
    q.train()
    run._epoch(0)
    assert bool(seen) == isinstance(layer, nn.Dropout)


def test_an_epoch_on_a_processor_seeds_its_generator_alone(data, monkeypatch):
    """torch.manual_seed also keeps a call for every device that is not there, with its traceback, for good."""
    calls = []
    seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda value: calls.append(value) or seed(value))
    q = vbdl.Deterministic(network())
    counts = []
    for epochs in (1, 5):
        calls.clear()
        vbdl.fit(q, data, vbdl.Gaussian(OUTPUTS), epochs=epochs, batch_size=24, compile=False)
        counts.append(len(calls))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_clipped_gradients_have_the_direction_and_at_most_the_norm_for_each_member(dtype):
    """Of all parameters together: one of a number for each member, one not contiguous, and one without elements."""
    torch.manual_seed(0)
    gradients = [torch.randn(3, 4, 5, dtype=dtype), torch.randn(3, dtype=dtype), torch.randn(6, 3, dtype=dtype).T]
    gradients.append(torch.zeros(3, 0, dtype=dtype))
    gradients = [g * torch.tensor([10.0, 1.0, 1e-4]).view(3, *[1] * (g.ndim - 1)) for g in gradients]
    before = [g.clone() for g in gradients]
    clip_members(gradients, 2.0)
    for member in range(3):
        whole = torch.cat([g[member].flatten() for g in before])
        clipped = torch.cat([g[member].flatten() for g in gradients])
        expected = whole * min(1.0, 2.0 / float(torch.view_as_real(whole + 0j).norm()))
        torch.testing.assert_close(clipped, expected, rtol=1e-5, atol=0)
