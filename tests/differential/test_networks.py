"""Every layer of torch.nn and modules as people write them: stacked against each network alone in plain torch.

Trained: members of an ensemble after one step and after ten, entry by entry, against a loop of one's own. Predicted:
members against themselves, draws of MC dropout against the masked network, draws of mean-field against the network with
those weights put in by hand.
"""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vbdl_kernels import keep_mask, make_key

from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.categorical import Categorical
from vbdl.nn.drawn import noise
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.mc_dropout import MCDropout
from vbdl.posteriors.mean_field import MeanField
from vbdl.training.fit import fit

sys.path.insert(0, str(Path(__file__).parent))
from zoo import DROPOUT, LAYERS, NOT_LAYERS, ROWS, ZOO, network  # noqa: E402

TAKEN = [name for name, entry in ZOO.items() if not entry.refused]
TRAINED = [name for name, entry in ZOO.items() if entry.trained and "track_running" not in entry.refused]
REFUSED = [name for name, entry in ZOO.items() if entry.refused]
COMPILED = ["BatchNorm1d", "GRUCell"]  # by default, since each takes seconds; all of them in `make test-slow`
ALIKE = {"rtol": 1e-6, "atol": 1e-9}  # float64; the statistics of a prediction are sums of float64 too
LR = 0.05


def sampled(names):
    """One in four by default, the others slow: for what every layer of the zoo shows in another test already."""
    return [n if k % 4 == 0 else pytest.param(n, marks=pytest.mark.slow) for k, n in enumerate(names)]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of layers and not of what is tested
        yield


def targets():
    return torch.arange(ROWS) % 3


def trained_alone(net: nn.Module, x: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """What a loop of one's own makes of it; frozen normalization is in evaluation, as a careful loop has it."""
    net = copy.deepcopy(net).train()
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine and not m.weight.requires_grad:
            m.eval()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], LR)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), targets()).backward()
        optimizer.step()
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def check_trained(name: str, steps: int, compile: bool) -> None:
    nets = [network(name, seed)[0] for seed in range(3)]
    x = network(name)[1]
    q = DeepEnsemble(nets)
    sgd = lambda ps: torch.optim.SGD(ps, LR)
    history = fit(
        q, (x, targets()), Categorical(), epochs=steps, batch_size=ROWS, optimizer=sgd, compile=compile, progress=False
    )
    assert len(history.train_loss) == steps
    for m, net in enumerate(nets):
        alone, together = trained_alone(net, x, steps), q.member(m)
        assert together.keys() == alone.keys()
        for entry, right in alone.items():
            torch.testing.assert_close(together[entry], right.detach(), msg=lambda s, e=entry: f"{e}: {s}", **ALIKE)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 10])  # the first of ten shows in the rest
def test_members_train_as_alone(name, steps):
    check_trained(name, steps, compile=False)


@pytest.mark.parametrize("name", COMPILED)
def test_members_train_as_alone_compiled(name):
    check_trained(name, 3, compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRAINED if name not in COMPILED])
def test_every_layer_trains_as_alone_compiled(name):
    check_trained(name, 3, compile=True)


def check_predicted(name: str, **settings) -> None:
    nets = [network(name, seed)[0].eval() for seed in range(3)]
    x = network(name)[1]
    with torch.no_grad():
        right = torch.stack([copy.deepcopy(net)(x) for net in nets])
    p = Predictor(DeepEnsemble(nets), Categorical(), tiles=ROWS, **settings)(x, samples=True)
    torch.testing.assert_close(p.samples, right, **ALIKE)
    torch.testing.assert_close(p.probs, right.softmax(-1).mean(0), **ALIKE)


@pytest.mark.parametrize("name", TAKEN)
def test_members_predict_as_alone(name):
    check_predicted(name, compile=False)


@pytest.mark.parametrize("name", COMPILED)
def test_members_predict_as_alone_compiled(name):
    check_predicted(name, compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TAKEN if name not in COMPILED])
def test_every_layer_predicts_as_alone_compiled(name):
    check_predicted(name, compile=True)


BY_HAND = ("CrossMapLRN2d", "gradient by hand", "gradient by hand, older style")


def check_gradient(name: str, compile: bool | str) -> None:
    nets = [network(name, seed)[0].eval() for seed in range(2)]
    x, y = (network(name)[1].requires_grad_() for _ in range(2))
    predict = Predictor(DeepEnsemble(nets), Categorical(), tiles=ROWS, compile=compile)
    torch.stack([net(y).softmax(-1)[:, 0] for net in nets]).mean(0).sum().backward()
    for _ in range(2):  # before the graph is ready, and after it
        x.grad = None
        predict(x).probs[:, 0].sum().backward()
        torch.testing.assert_close(x.grad, y.grad, **ALIKE)
        predict.wait()


@pytest.mark.parametrize("compile", [False, "background"])
@pytest.mark.parametrize("name", BY_HAND)
def test_a_prediction_has_a_gradient_that_is_written_by_hand(name, compile):
    check_gradient(name, compile)


@pytest.mark.parametrize("name", sampled(n for n in TAKEN if ZOO[n].like != "ids" and n not in BY_HAND))
def test_a_prediction_has_the_gradient_of_its_members(name):
    check_gradient(name, compile=False)


@pytest.mark.parametrize("name", sampled(TAKEN))
def test_a_draw_of_dropout_is_the_masked_network(name):
    net, x = network(name, dropout=0.3)
    q = MCDropout(net.eval()).eval()
    found = Predictor(q, Categorical(), n_samples=3, seed=5, tiles=ROWS, compile=False)(x, samples=True).samples
    q.prepare(x)
    width, index = net.head.in_features, [site.path for site in q.module.sites].index("drop")
    for draw, key in enumerate(make_key(5, range(3))):
        masked = copy.deepcopy(net)
        mask = keep_mask(key, index, 1, width, 0.3).view(1, width).to(torch.float64) / 0.7
        masked.drop = Mask(mask)
        with torch.no_grad():
            torch.testing.assert_close(found[draw], masked(x), **ALIKE)


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


# which parameters are drawn is a question of how a module holds them: every module as people write them, and one layer
# of torch.nn in four; that a layer takes stacked weights shows in test_members_predict_as_alone, on all
@pytest.mark.parametrize("name", [*sampled(n for n in TAKEN if n in LAYERS), *(n for n in TAKEN if n not in LAYERS)])
def test_a_draw_of_mean_field_is_the_network_with_those_weights(name):
    net, x = network(name)
    q = MeanField(net, ROWS, initial_std=0.1).eval()
    found = Predictor(q, Categorical(), n_samples=2, seed=5, tiles=ROWS, compile=False, joint=True)(x, samples=True)
    for draw, key in enumerate(make_key(5, range(2))):
        drawn = with_drawn_weights(net, q, key)
        with torch.no_grad():
            torch.testing.assert_close(found.samples[draw], drawn.eval()(x), **ALIKE)


def with_drawn_weights(net: nn.Module, q: MeanField, key: torch.Tensor) -> nn.Module:
    """A copy of the network with the weights of a draw; a row that pads an embedding is left as it is."""
    drawn = copy.deepcopy(net)
    tables = {id(m.weight): m for m in drawn.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    tied = isinstance(drawn.layer, ZOO["tied tensors"].make)
    trained = [(n, p) for n, p in drawn.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for layer, (_, p) in enumerate(trained):
            step = 0.1 * noise(key, layer, p)
            table = tables.get(id(p))
            if table is not None and table.padding_idx is not None and not tied:
                step[table.padding_idx] = 0.0
            p.add_(step)
    return drawn


@pytest.mark.parametrize("name", sampled(n for n in TRAINED if n not in ("spectral norm", "orthogonal")))
def test_a_step_of_mean_field_is_the_gradient_at_those_weights(name):
    net, x = network(name)
    q = MeanField(copy.deepcopy(net), ROWS, initial_std=0.1).train()
    q.kl_weight = 0.0
    q.loss(x, targets(), Categorical()).backward()
    key = make_key(1 << 62, torch.zeros(1, dtype=torch.int64))[0]
    drawn = with_drawn_weights(net, q, key).train()
    for m in drawn.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine and not m.weight.requires_grad:
            m.eval()
    F.cross_entropy(drawn(x), targets()).backward()
    means = dict(q.module.inner.named_parameters())
    for entry, p in drawn.named_parameters():
        if p.requires_grad:
            right = torch.zeros_like(p) if p.grad is None else p.grad
            found = torch.zeros_like(p) if means[entry].grad is None else means[entry].grad
            torch.testing.assert_close(found, right, msg=lambda s, e=entry: f"{e}: {s}", **ALIKE)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_reason(name):
    net, x = network(name, dropout=0.3)
    with pytest.raises((ValueError, NotImplementedError, RuntimeError), match=ZOO[name].refused):
        Predictor(MCDropout(net.train()), Categorical(), n_samples=2, compile=False)(x)


@pytest.mark.parametrize("name", DROPOUT)
def test_every_dropout_is_found_and_is_off_in_an_ensemble(name):
    net, x = network(name)
    q = MCDropout(net).eval()
    q.prepare(x)
    assert [site.p for site in q.module.sites] == [0.3]
    drawn = Predictor(q, Categorical(), n_samples=16, compile=False)(x, samples=True).samples
    assert len(drawn.unique(dim=0)) > 2  # of two channels there are four masks
    right = net.eval()(x).detach()
    p = Predictor(DeepEnsemble([net, network(name, 1)[0]]), Categorical(), compile=False)(x, samples=True)
    torch.testing.assert_close(p.samples[0], right, **ALIKE)


def test_every_layer_of_torch_is_in_the_zoo():
    layers = {n for n in dir(nn) if isinstance(getattr(nn, n), type) and issubclass(getattr(nn, n), nn.Module)}
    there = {name.split(" ")[0] for name in {**LAYERS, **DROPOUT}}
    assert layers - there - NOT_LAYERS == set()
    assert len(ZOO) >= 120
