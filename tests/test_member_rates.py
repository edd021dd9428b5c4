"""A learning rate and weight decay for each member: each trains as it would alone with its own."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vbdl
from vbdl.training.adamw import FusedAdamW

sys.path.insert(0, str(Path(__file__).parent))
from two_outputs import FEATURES, OUTPUTS, ROUNDING, network, rows  # noqa: E402

N = 71
RATES, DECAYS = [1e-2, 3e-3, 0.0], [0.0, 0.1, 0.5]


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return rows(N)


def steps(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.3)


@pytest.mark.parametrize("schedule", [None, "cosine", steps], ids=["constant", "cosine", "steps"])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_members_train_as_alone_with_their_own(schedule, clip_norm, data):
    options = {"epochs": 6, "batch_size": 17, "schedule": schedule, "clip_norm": clip_norm, "compile": False}
    q, likelihood = vbdl.DeepEnsemble(network(), 3), vbdl.Gaussian(OUTPUTS)
    start = q.member(2)
    vbdl.fit(q, data, likelihood, lr=RATES, weight_decay=DECAYS, **options)
    for m in range(3):
        alone, own = vbdl.DeepEnsemble(network(), 1, seed=m), vbdl.Gaussian(OUTPUTS)
        vbdl.fit(alone, data, own, lr=RATES[m], weight_decay=DECAYS[m], seed=m, **options)
        for name, t in q.member(m).items():
            torch.testing.assert_close(t, alone.member(0)[name], **ROUNDING)
        torch.testing.assert_close(likelihood.noise_std[m], own.noise_std[0], **ROUNDING)
    assert all(torch.equal(t, start[name]) for name, t in q.member(2).items())  # a rate of 0


def test_one_value_for_all_beside_values_of_each_and_arrays_are_taken(data):
    ends = []
    for lr, decay in (([1e-2] * 2, 0.1), (1e-2, torch.tensor([0.1, 0.1], dtype=torch.float64).numpy()), (1e-2, 0.1)):
        q = vbdl.DeepEnsemble(network(), 2)
        vbdl.fit(q, data, vbdl.Gaussian(OUTPUTS), epochs=3, lr=lr, weight_decay=decay, compile=False)
        ends.append(torch.cat([t.flatten() for t in q.stacked().values()]))
    torch.testing.assert_close(ends[0], ends[2], **ROUNDING)
    torch.testing.assert_close(ends[1], ends[2], **ROUNDING)


def test_a_resumed_run_is_the_uninterrupted_one(data, tmp_path):
    options = {"batch_size": 17, "lr": RATES, "weight_decay": DECAYS, "compile": False, "schedule": steps}
    whole = vbdl.DeepEnsemble(network(), 3)
    history = vbdl.fit(whole, data, vbdl.Gaussian(OUTPUTS), epochs=5, **options)
    resumed, checkpoint = None, {"checkpoint": tmp_path / "run.safetensors", "checkpoint_every": 1}
    for epochs in (3, 5):
        resumed = vbdl.DeepEnsemble(network(), 3)
        again = vbdl.fit(resumed, data, vbdl.Gaussian(OUTPUTS), epochs=epochs, **options, **checkpoint)
    assert again.train_loss == history.train_loss
    assert all(torch.equal(t, resumed.stacked()[name]) for name, t in whole.stacked().items())


def test_architectures_get_the_values_of_their_members(data):
    q = vbdl.DeepEnsemble([network(), nn.Linear(FEATURES, OUTPUTS), nn.Linear(FEATURES, OUTPUTS)])
    before = q.member(1)
    vbdl.fit(q, data, vbdl.Gaussian(OUTPUTS), epochs=2, lr=[1e-2, 0.0, 1e-2], compile=False)
    moved = [not torch.equal(q.member(m)["weight"], before["weight"]) for m in (1,)]
    assert moved == [False] and not torch.equal(q.member(2)["weight"], before["weight"])


def test_values_that_do_not_fit_are_refused(data):
    q, one = vbdl.DeepEnsemble(network(), 3), vbdl.MeanField(network(), N)
    several = vbdl.DeepEnsemble([network(), nn.Linear(FEATURES, OUTPUTS)])
    for posterior, options, words in (
        (q, {"lr": [0.1, 0.1]}, "one for each of 3 members; got 2"),
        (several, {"weight_decay": [0.1] * 3}, "one for each of 2 members; got 3"),
        (q, {"lr": [0.1, -0.1, 0.1]}, "positive number for each member"),
        (q, {"lr": [0.1] * 3, "optimizer": lambda ps: torch.optim.SGD(ps, lr=0.1)}, "leave optimizer= out"),
        (one, {"lr": [0.1]}, "members with parameters of their own, but they share"),
    ):
        with pytest.raises(ValueError, match=words):
            vbdl.fit(posterior, data, vbdl.Gaussian(OUTPUTS), epochs=1, compile=False, **options)


def test_the_fused_step_is_torchs_bit_for_bit_also_where_gradients_are_missing():
    torch.manual_seed(0)
    start = [torch.randn(7, 5), torch.randn(33), torch.randn(2, 3, 4)]
    groups = lambda ps: [{"params": ps[:2]}, {"params": ps[2:], "weight_decay": 0.0}]
    runs = []
    for make in (
        lambda ps: FusedAdamW(groups(ps), 1e-2, 0.1),
        lambda ps: torch.optim.AdamW(groups(ps), 1e-2, weight_decay=0.1, fused=True),
    ):
        parameters = [nn.Parameter(t.clone()) for t in start]
        optimizer = make(parameters)
        generator = torch.Generator().manual_seed(1)
        for number in range(12):
            for index, p in enumerate(parameters):
                p.grad = torch.randn(p.shape, generator=generator)
                if number in (5, 6) and index == 1:
                    p.grad = None
            optimizer.step()
            if number in (3, 8):  # as a checkpoint does
                saved = optimizer.state_dict()
                optimizer = make(parameters)
                optimizer.load_state_dict(saved)
        runs.append([*parameters, *(s[name] for s in optimizer.state.values() for name in ("step", "exp_avg"))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
