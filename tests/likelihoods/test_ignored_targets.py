"""Targets that do not count, such as the padding of sequences, which torch's loss leaves out too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import vbdl
from vbdl.calibration import Temperature

LIKELIHOOD = vbdl.Categorical(ignore_index=-100)


def padded():
    """Logits (rows, tokens, classes), and targets of which the last, and all of the first row, do not count."""
    generator = torch.Generator().manual_seed(0)
    logits, y = torch.randn(6, 5, 3, generator=generator), torch.randint(3, (6, 5), generator=generator)
    y[:, 3:] = -100
    y[0] = -100
    return logits, y


def test_the_loss_is_that_of_torch():
    logits, y = padded()
    expected = F.cross_entropy(logits.movedim(-1, 1), y, reduction="none", ignore_index=-100).sum(1)
    torch.testing.assert_close(LIKELIHOOD.nll(logits, y), expected)
    torch.testing.assert_close(make_fx(lambda p, y: LIKELIHOOD.nll(p, y))(logits, y)(logits, y), expected)
    draws = torch.stack((logits, 2 * logits))
    torch.testing.assert_close(torch.vmap(LIKELIHOOD.nll, (0, None))(draws, y)[0], expected)
    assert not LIKELIHOOD.hessian(logits, y).diagonal().view(6, 5, 3)[:, 3:].any()


@pytest.mark.parametrize("compile", [False, True])
def test_a_network_is_trained_as_by_a_loop(compile):
    torch.manual_seed(0)
    x, (_, y) = torch.randn(6, 5, 4), padded()
    net, alone = nn.Linear(4, 3), nn.Linear(4, 3)
    alone.load_state_dict(net.state_dict())
    q, sgd = vbdl.DeepEnsemble([net, nn.Linear(4, 3)]), lambda ps: torch.optim.SGD(ps, 0.5)
    options = {"epochs": 3, "batch_size": 6, "optimizer": sgd, "progress": False, "compile": compile}
    vbdl.fit(q, (x, y), LIKELIHOOD, **options)
    optimizer = sgd(alone.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(alone(x).flatten(0, 1), y.flatten(), reduction="sum", ignore_index=-100)
        (loss / len(x)).backward()
        optimizer.step()
    samples = vbdl.Predictor(q, LIKELIHOOD, compile=False)(x, samples=True).samples
    torch.testing.assert_close(samples[0], alone(x).detach(), rtol=1e-5, atol=1e-5)


def test_the_density_of_a_prediction_leaves_them_out():
    x, (_, y) = torch.randn(6, 5, 4), padded()
    one = vbdl.Predictor(vbdl.DeepEnsemble([nn.Linear(4, 3)]), LIKELIHOOD, compile=False)  # its rows are no mixtures
    each = one(x).log_prob(y)
    assert not each[:, 3:].any() and not each[0].any()
    torch.testing.assert_close(each.sum(1), one.log_prob(x, y))
    with pytest.raises(ValueError, match="run from -7 to"):
        one(x).log_prob(y.masked_fill(y == -100, -7))


def test_calibration_wants_all_targets_and_an_artifact_keeps_the_number(tmp_path):
    x, (_, y) = torch.randn(6, 5, 4), padded()
    predict = vbdl.Predictor(vbdl.DeepEnsemble([nn.Linear(4, 3), nn.Linear(4, 3)]), LIKELIHOOD, compile=False)
    with pytest.raises(ValueError, match="targets are -100 and do not count.*rows without padding"):
        vbdl.calibrate(predict, (x, y), Temperature())
    predict.save(tmp_path / "model.vbdl")
    assert vbdl.load(tmp_path / "model.vbdl", compile=False).likelihood.ignore_index == -100


def test_without_it_they_are_refused_with_what_to_do():
    logits, y = padded()
    with pytest.raises(ValueError, match=r"run from -100 to 2.*Categorical\(ignore_index=-100\)"):
        vbdl.Categorical().check_targets(y, logits.shape)
    with pytest.raises(ValueError, match="run from 156 to 156, but the module returns 3 classes"):
        LIKELIHOOD.check_targets(torch.full((6, 5), 156, dtype=torch.uint8), logits.shape)
    with pytest.raises(ValueError, match="run from 0 to 3, but the module returns 3 classes"):
        LIKELIHOOD.check_targets(y.clamp_min(0).masked_fill(y == 1, 3), logits.shape)
