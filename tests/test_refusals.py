"""What is refused is refused with its true reason, and with what to do."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vbdl
from vbdl.calibration import ConformalSets, Platt, Temperature, calibrate
from vbdl.decision import Drive, HandOver, with_decision


def _net(outputs=3, *before):
    torch.manual_seed(0)
    return nn.Sequential(*before, nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, outputs))


def _fit(q, data, likelihood, compile=False):
    return vbdl.fit(q, data, likelihood, epochs=1, compile=compile, progress=False)


X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("questions", [2, 3])
def test_conformal_sets_of_several_questions(questions):
    predict = vbdl.Predictor(vbdl.MCDropout(_net(questions)), vbdl.Bernoulli(), n_samples=4, compile=False)
    y = (torch.arange(40 * questions).reshape(40, questions) % 3 == 0).float()
    with pytest.raises(ValueError, match=f"has {questions} binary outputs .multi-label.: fit one for each") as caught:
        calibrate(predict, (X, y), ConformalSets(0.1))
    assert "normalize" not in str(caught.value)
    with pytest.raises(ValueError, match=f"y has {questions} binary outputs .* fit one ConformalSets for each"):
        ConformalSets(0.1).fit(predict(X).probs, y.long())
    # and what it says works
    p = predict(X)
    for i in range(questions):
        assert ConformalSets(0.1).fit(p.probs[:, i], y[:, i].long())(p.probs[:, i]).shape == (40, 2)
    calibrate(predict, (X, y), Platt())
    calibrate(predict, (X, y), Temperature("probs"))


@pytest.mark.parametrize(
    "likelihood, outputs", [(vbdl.Bernoulli(), 3), (vbdl.Gaussian(3), 3), (vbdl.HeteroscedasticGaussian(), 6)]
)
def test_missing_labels_of_several_tasks(likelihood, outputs):
    y = (torch.arange(120).reshape(40, 3) % 2).float()
    y[3, 1] = y[7, 0] = torch.nan
    expected = (
        "targets of 2 of 40 rows are missing .NaN., first in row 3, .*one of several tasks.* fit one predictor per task"
    )
    with pytest.raises(ValueError, match=expected):
        _fit(vbdl.MCDropout(_net(outputs)), (X, y), likelihood)
    predict = vbdl.Predictor(vbdl.MCDropout(_net(outputs)), likelihood, n_samples=4, compile=False)
    with pytest.raises(ValueError, match=expected):
        predict.log_prob(X, y)
    method = Platt() if isinstance(likelihood, vbdl.Bernoulli) else vbdl.calibration.StdScaling()
    with pytest.raises(ValueError, match=expected):
        calibrate(predict, (X, y), method)


class Words(nn.Module):
    def __init__(self, bag=False, offset=0):
        super().__init__()
        self.table = nn.EmbeddingBag(10, 4) if bag else nn.Embedding(10, 4)
        self.drop, self.out, self.bag, self.offset = nn.Dropout(0.2), nn.Linear(4, 2), bag, offset

    def forward(self, i):
        found = self.table(i + self.offset)
        return self.out(self.drop(found if self.bag else found.mean(1)))


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["dropout", "ensemble", "mean-field"])
def test_ids_outside_an_embedding(method, compile):
    ids = torch.randint(0, 10, (40, 3), generator=torch.Generator().manual_seed(0))
    high, low = ids.clone(), ids.clone()
    high[33, 1], low[35, 2] = 10, -1
    make = {
        "dropout": lambda: vbdl.MCDropout(Words()),
        "ensemble": lambda: vbdl.DeepEnsemble(Words(), 2),
        "mean-field": lambda: vbdl.MeanField(Words(), 40),
    }[method]
    predict = vbdl.Predictor(make(), vbdl.Categorical(), n_samples=2, compile=compile, tiles=8)
    predict(ids)
    y = torch.zeros(40, dtype=torch.int64)
    for bad, said in ((high, "run from 0 to 10"), (low, "run from -1 to 9")):
        match = f"the ids in the inputs {said}, but module 'table' .Embedding. takes 0 to 9"
        for call in (
            lambda: predict(bad),  # noqa: B023
            lambda: predict(bad, samples=True),  # noqa: B023
            lambda: predict.log_prob(bad, y),  # noqa: B023
            lambda: vbdl.Predictor(make(), vbdl.Categorical(), n_samples=2, compile=compile)(bad),  # noqa: B023
            lambda: _fit(make(), (bad, y), vbdl.Categorical(), compile),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=match) as caught:
                call()
            assert ".cpp" not in str(caught.value)


def test_ids_that_the_module_makes_are_said_to_be_that():
    predict = vbdl.Predictor(vbdl.MCDropout(Words(offset=5)), vbdl.Categorical(), n_samples=2, compile=False)
    with pytest.raises(ValueError, match="the module computed an index out of range"):
        predict(torch.full((4, 3), 9))
    predict = vbdl.Predictor(vbdl.MCDropout(Words(bag=True)), vbdl.Categorical(), n_samples=2, compile=False)
    with pytest.raises(ValueError, match="'table' .EmbeddingBag. takes 0 to 9"):
        predict(torch.full((4, 3), 99))


def test_rrelu_predicts_with_its_mean_slope_and_trains():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.RReLU(0.1, 0.5), nn.Dropout(0.2), nn.Linear(8, 2))
    leaky = nn.Sequential(net[0], nn.LeakyReLU(0.3), *net[2:])
    for make in (vbdl.MCDropout, lambda n: vbdl.DeepEnsemble([n, n]), lambda n: vbdl.MeanField(n, 40)):
        found, right = (
            vbdl.Predictor(make(n), vbdl.Categorical(), n_samples=2, joint=True, compile=False)(X).probs
            for n in (net, leaky)
        )
        torch.testing.assert_close(found, right)
    q = vbdl.DeepEnsemble(net, 2)
    before = q.member(0)["0.weight"]
    _fit(q, (X, torch.zeros(40, dtype=torch.int64)), vbdl.Categorical())
    assert "rrelu" in q.one_by_one and not torch.equal(q.member(0)["0.weight"], before)


class Normalized(nn.Module):
    def __init__(self, writes):
        super().__init__()
        self.register_buffer("mean", torch.full((4,), 3.0))
        self.inside, self.writes = _net(2), writes

    def forward(self, x):
        if self.writes:
            x -= self.mean
            x /= 2
            return self.inside(x)
        return self.inside((x - self.mean) / 2)


def test_normalization_in_place_is_named():
    make = lambda n: vbdl.Predictor(vbdl.MCDropout(n), vbdl.Categorical(), n_samples=4, compile=False)
    with pytest.raises(ValueError, match=r"writes into its inputs .*write x = x - \.\.\. where it normalizes"):
        make(Normalized(True))(X.clone())
    make(Normalized(False))(X)
    # an activation in place, which changes nothing the second time, stays allowed
    make(_net(2, nn.ReLU(inplace=True)))(X.clone())


def test_every_frame_that_fails_is_one_line(caplog):
    predict = vbdl.Predictor(vbdl.MCDropout(_net()), vbdl.Categorical(), n_samples=4, compile=False, tiles=1)
    deciding = with_decision(predict, HandOver((9, 9), (9, 9), latched=False))
    deciding(X[:1])
    with Drive(deciding) as drive, caplog.at_level(logging.INFO, logger="vbdl"):
        for frame in (torch.zeros(1, 99), X[:1] * torch.nan, X[:2]) * 5:
            assert drive(frame).reason == "failed"
    records = [r for r in caplog.records if r.name.startswith("vbdl")]
    assert len(records) == 15
    for record in records:
        assert record.exc_info is None and "\n" not in caplog.handler.format(record)
        assert "a frame could not be predicted: ValueError: " in record.getMessage()


def test_the_order_of_rows_and_likelihood_is_said():
    with pytest.raises(TypeError, match="takes the rows before the likelihood"):
        _fit(vbdl.MCDropout(_net()), vbdl.Categorical(), (X, torch.zeros(40, dtype=torch.int64)))


class _Drawing(nn.Module):
    """The textbook variational layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return F.linear(x, self.layer.weight + 0.1 * torch.randn_like(self.layer.weight), self.layer.bias)


@pytest.mark.parametrize("compile", [False, "background"])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_output_function_that_mixes_rows_is_refused(rows, compile):
    q = vbdl.Stochastic(_Drawing(), output=lambda o: o - o.mean(0))
    with pytest.raises(ValueError, match="depends on the other rows"):
        vbdl.Predictor(q, vbdl.Categorical(), 8, compile=compile)(torch.randn(rows, 4))


@pytest.mark.parametrize("compile", [False, "background"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout])
def test_dropout_that_stays_in_training_mode_is_refused(rows, compile, kind):
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), kind(0.5), nn.Linear(64, 3))
    net[2].train = lambda mode=True, layer=net[2]: layer
    for q in (vbdl.DeepEnsemble([net, copy.deepcopy(net)]), vbdl.MeanField(net, n_data=10)):
        with pytest.raises(ValueError, match="draws from torch's generator"):
            vbdl.Predictor(q, vbdl.Categorical(), compile=compile)(torch.ones(rows, 4))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("wrap", [vbdl.MCDropout, vbdl.Deterministic, lambda n: vbdl.DeepEnsemble([n, n])])
def test_sparse_tensors_that_torch_cannot_copy_are_named(wrap):
    for adjacency in (torch.eye(4).to_sparse_csr(), nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False)):
        net = _net()
        (net.register_parameter if isinstance(adjacency, nn.Parameter) else net.register_buffer)("edges", adjacency)
        with pytest.raises(
            ValueError, match="'edges' is a sparse .*register it as a buffer of layout torch.sparse_coo"
        ):
            wrap(net)


@pytest.mark.parametrize("make", [vbdl.MCDropout, lambda n: vbdl.DeepEnsemble([n, n]), lambda n: vbdl.MeanField(n, 9)])
def test_weights_without_values_are_refused_with_what_to_do(make):
    """A network made on the meta device, as large ones are before their weights are loaded."""
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="0.weight' is on the meta device.*load_state_dict"):
        vbdl.Predictor(make(network), vbdl.Categorical())
    rows = torch.randn(6, 3), torch.arange(6) % 2
    with pytest.raises(ValueError, match="0.weight' is on the meta device.*load_state_dict"):
        vbdl.fit(make(network), rows, vbdl.Categorical(), epochs=1, progress=False)
