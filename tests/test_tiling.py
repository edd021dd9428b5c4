"""Batch sizes that come often get tiles of their own; what pads a batch costs a network as it is nothing."""

import copy

import pytest
import torch
from torch import nn

import vbdl
from vbdl.engine.predictor import Predictor
from vbdl.engine.settings import DEFAULT_TILES
from vbdl.engine.tiling import Tiling

ROUNDING = {"rtol": 1e-5, "atol": 2e-6}
METHODS = {
    "MC dropout": vbdl.MCDropout,
    "mean-field": lambda net: vbdl.MeanField(net, 9),
    "ensemble": lambda net: vbdl.DeepEnsemble([net, network(1)]),
    "ensemble of several": lambda net: vbdl.DeepEnsemble(
        [net, nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5))]
    ),
}


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Compiled graphs run as they were traced, and an own tile is always the faster one."""
    monkeypatch.setattr("vbdl.engine.program.compile_graph", lambda graph, inputs: graph)
    clock = iter(range(10**9))
    times = [0.0, 9.0, 1.0]  # three readings a round: the tiles take nine, the own one minus eight
    monkeypatch.setattr("vbdl.engine.tiling.perf_counter", lambda: times[next(clock) % 3])


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 11), nn.ReLU(), nn.Dropout(0.3), nn.Linear(11, 5))


def background(q=None, **settings):
    q = vbdl.MCDropout(network()) if q is None else q
    return Predictor(q, vbdl.Categorical(), **{"compile": "background", **settings})


def sizes(predict, rows):
    return predict._sizes(predict.check(torch.randn(rows, 3)))


@pytest.mark.parametrize("rows", [2, 33, 70, 200])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_size_that_comes_often_gets_its_own_tile(method, rows):
    predict, x = background(METHODS[method](network())), torch.randn(rows, 3)
    before = sizes(predict, rows)
    answers = [predict(x, samples=True)]
    for _ in range(3):
        predict.wait()
        answers.append(predict(x, samples=True))
    predict.wait()
    assert sizes(predict, rows) == [rows] != before
    answers.append(predict(x, samples=True))
    expected = Predictor(predict.posterior, vbdl.Categorical(), compile=False)(x, samples=True)
    for answer in answers:
        for field in ("probs", "total", "aleatoric", "epistemic", "samples"):
            torch.testing.assert_close(getattr(answer, field), getattr(expected, field), **ROUNDING)
    y = torch.zeros(rows, dtype=torch.int64)
    whole = Predictor(predict.posterior, vbdl.Categorical(), tiles=8, compile=False).log_prob(x, y)
    torch.testing.assert_close(predict.log_prob(x, y), whole, **ROUNDING)


def test_a_slower_own_tile_is_let_go(monkeypatch):
    predict, x = background(), torch.randn(33, 3)
    clock = iter([0.0, 1.0, 9.0] * 99)
    monkeypatch.setattr("vbdl.engine.tiling.perf_counter", lambda: next(clock))
    for _ in range(6):
        predict(x)
        predict.wait()
    assert sizes(predict, 33) == [64] and predict.executions.sizes(predict.check(x)) == {64}


@pytest.mark.parametrize(
    "settings", [{"tiles": (8, 64)}, {"batch_invariant": True}, {"compile": False}, {"estimator": "moments"}]
)
def test_other_settings_learn_no_tiles(settings):
    predict, x = background(**settings), torch.randn(33, 3)
    for _ in range(6):
        predict(x)
        predict.wait()
    assert sizes(predict, 33) == [64]


def test_noise_that_depends_on_the_place_in_a_tile_stays():
    q = vbdl.Stochastic(nn.Sequential(Noisy(), nn.Linear(3, 5)), per_row=True)
    predict, x = background(q), torch.randn(100, 3)
    first = predict(x)
    for _ in range(5):
        predict.wait()
        torch.testing.assert_close(predict(x).probs, first.probs, **ROUNDING)
    assert sizes(predict, 100) == [64, 64]


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def test_few_sizes_get_own_tiles():
    predict = background()
    for rows in (2, 3, 4, 5, 6, 33):
        for _ in range(4):
            predict(torch.randn(rows, 3))
        predict.wait()
    assert [len(own) for own in predict._tiling._own.values()] == [4]
    assert sizes(predict, 33) == [64]


def test_rows_of_ever_new_shapes_do_not_compile_for_ever(monkeypatch):
    clock = iter([0.0, 1.0, 9.0] * 999)  # own tiles are slower
    monkeypatch.setattr("vbdl.engine.tiling.perf_counter", lambda: next(clock))
    predict, made = background(), []
    of = predict.executions.make_behind
    monkeypatch.setattr(predict.executions, "make_behind", lambda tile: made.append(tile.rows) or of(tile))
    for rows in range(9, 25):
        for _ in range(3):
            predict(torch.randn(rows, 3))
        predict.wait()
    assert len(made) == 8


def test_every_batch_is_cut_into_tiles_that_hold_it():
    predict = background()
    own = {None, 3, 20, 40}
    for rows in own - {None}:
        predict._tiling.learn(predict.check(torch.randn(rows, 3)), predict.executions, lambda tile: None)
    for rows in range(300):
        cut = sizes(predict, rows)
        assert sum(cut[:-1]) <= rows <= sum(cut) or rows == 0 and cut == [1]
        last = rows - sum(cut[:-1])
        assert cut[-1] == min(s for s in {*DEFAULT_TILES, *(own - {None})} if s >= last), (rows, cut)


def test_warm_up_compiles_own_tiles_and_later_batches_use_what_is_there():
    predict = background()
    x = torch.randn(33, 3)
    predict.warm_up((1, 33), example=x)
    assert predict.executions.sizes(predict.check(x)) == {1, 33, 64}
    expected = Predictor(predict.posterior, vbdl.Categorical(), compile=False)
    for rows, cut in ((1, [1]), (20, [33]), (33, [33]), (40, [64]), (70, [64, 33]), (0, [1])):
        assert sizes(predict, rows) == cut
        batch = torch.randn(rows, 3)
        torch.testing.assert_close(predict(batch).probs, expected(batch).probs, **ROUNDING)
    copy.deepcopy(predict)(x)  # compiles again, and begins without own tiles


def test_a_copy_learns_again():
    predict, x = background(), torch.randn(33, 3)
    for _ in range(4):
        predict(x)
        predict.wait()
    assert sizes(predict, 33) == [33] and sizes(copy.deepcopy(predict), 33) == [64]


def test_inputs_of_other_shapes_have_tiles_of_their_own():
    predict = background()
    tiling = Tiling(predict.settings, predict.posterior)
    tiling.learn(predict.check(torch.randn(33, 3)), predict.executions, lambda tile: None)
    assert tiling.cut(predict.check(torch.randn(33, 3))) == [33]
    assert tiling.cut(predict.check(torch.randn(33, 2, 3))) == [64]


class Counting(nn.Module):
    """A network that cannot be traced, and writes down how many rows it gets."""

    def __init__(self):
        super().__init__()
        self.layer, self.rows = nn.Linear(3, 5), []

    def forward(self, x):
        global seen
        seen.append(len(x))
        return self.layer(x) if float(x.detach().sum()) < 1e9 else x[:, :1]


seen: list[int] = []


@pytest.mark.parametrize("make", [vbdl.MCDropout, lambda net: vbdl.DeepEnsemble(net, 2)])
def test_no_rows_have_an_answer_before_and_after_others(make):
    q = make(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3)))
    predict, x = Predictor(q, vbdl.Categorical(), compile="background"), torch.randn(7, 4)
    for rows in (0, 7, 0, 1, 0):
        answer = predict(x[:rows], samples=True)
        assert answer.probs.shape == (rows, 3)
        assert answer.samples.shape == (predict.n_samples, rows, 3)


@pytest.mark.parametrize("rows", [1, 5, 33, 70])
def test_a_network_as_it_is_gets_no_padding(rows):
    q = vbdl.DeepEnsemble([Counting() for _ in range(3)])
    predict, x = background(q), torch.randn(rows, 3)
    predict(x)
    predict.wait()
    seen.clear()
    answer = predict(x, samples=True)
    assert sum(seen) == 2 * 3 * rows  # `samples` and the fields, three members each
    expected = Predictor(q, vbdl.Categorical(), compile=False, tiles=rows)(x, samples=True)
    torch.testing.assert_close(answer.samples, expected.samples, **ROUNDING)
    torch.testing.assert_close(answer.epistemic, expected.epistemic, **ROUNDING)


def test_warm_up_of_everything_covers_own_tiles():
    predict, x = background(), torch.randn(33, 3)
    for _ in range(3):
        predict(x)
    predict.warm_up((1, 64), example=x, samples=True, adaptive=True)  # while the own tile is being compiled
    assert sizes(predict, 33) == [33]
    predict(x), predict(x, samples=True), predict(x, tolerance=0.05), predict(x, deadline=10.0)
    predict.log_prob(x, torch.zeros(33, dtype=torch.int64))


def test_no_more_than_four_sizes_even_if_many_wait():
    predict = background()
    for _ in range(3):
        for rows in (2, 3, 4, 5, 6, 9, 10, 12):
            predict(torch.randn(rows, 3))
    predict.wait()
    assert sum(map(len, predict._tiling._own.values())) == 4


def test_explain_while_a_tile_is_learned():
    predict, x = background(), torch.randn(3, 3)
    for _ in range(3):
        predict(x)
    predict(x[:1])
    assert predict.explain().count("strategy") >= 2
