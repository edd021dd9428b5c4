"""The predictor: plans, budgets, streams, fallbacks, and errors that say what was wrong and what to do."""

import logging
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vbdl.compiling.compiler
from vbdl.compiling.graph import trace
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.bernoulli import Bernoulli
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.mc_dropout import MCDropout
from vbdl.posteriors.mean_field import MeanField

ROUNDING = {"rtol": 0.0, "atol": 1e-5}  # float32 sums of a few dozen terms of order 1


def network(outputs=5):
    return nn.Sequential(nn.Linear(3, 11), nn.ReLU(), nn.Dropout(0.3), nn.Linear(11, outputs))


def predictor(q=None, likelihood=None, **settings):
    q = MCDropout(network()) if q is None else q
    return Predictor(q, likelihood or Categorical(), **{"n_samples": 7, "compile": False, **settings})


def assert_same(a, b):
    for name in ("mean", "total", "aleatoric", "epistemic", "standard_error"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **ROUNDING)


# -- plans


def test_the_budget_picks_the_chunk():
    q = MeanField(nn.Sequential(nn.Linear(3, 11), nn.ReLU(), nn.Linear(11, 5)), 101, initial_std=0.3)
    predict, x = predictor(q, n_samples=101), torch.randn(13, 3)
    whole = predict(x)
    plan = next(iter(predict.executions.by_shape.values()))[0].plan
    assert plan.chunk == 101 and plan.keep_draws
    # half the budget is for activations: room for ten draws
    small = predict.replace(memory_budget=20 * plan.activation_bytes)
    assert_same(small(x), whole)
    assert 5 <= next(iter(small.executions.by_shape.values()))[0].plan.chunk <= 10
    with pytest.raises(ValueError, match="smaller tiles or a larger memory_budget"):
        predict.replace(memory_budget=plan.activation_bytes)(x)


@pytest.mark.parametrize(
    "body, bytes", [(nn.Conv2d(3, 9, 3), 8 * 2**20), (nn.Sequential(nn.Flatten(), nn.Linear(108, 160)), 2 * 2**20)]
)
def test_a_chunk_stays_in_the_caches(body, bytes):
    """Activations of a call; more where there is a convolution, whose weights are laid out anew in every call."""
    x = torch.randn(64, 3, 6, 6)
    net = nn.Sequential(nn.Dropout(0.5), body, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    net(x)
    predict = predictor(MCDropout(net), n_samples=300)
    predict.explain(x)
    plan = next(iter(predict.executions.by_shape.values()))[0].plan
    assert bytes / 2 < plan.chunk * plan.activation_bytes <= bytes


@pytest.mark.parametrize("width, alone", [(4, True), (512, False)])
def test_a_draw_that_fills_the_cache_runs_alone_if_its_convolutions_have_few_weights(width, alone):
    x = torch.randn(64, 3, 30, 30)
    end = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, width, 1), nn.Conv2d(width, width, 1), nn.Flatten()]
    net = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 12, 3), nn.ReLU(), *end)
    predict = predictor(MCDropout(net), n_samples=8)
    predict.explain(x)
    plan = next(iter(predict.executions.by_shape.values()))[0].plan
    assert 2 * 2**20 <= plan.activation_bytes < 4 * 2**20 and (plan.chunk == 1) == alone


def test_draws_that_are_not_kept_are_the_same():
    """Few activations and many weights: no budget keeps them all."""
    q = MeanField(nn.Sequential(nn.Linear(3, 211), nn.ReLU(), nn.Linear(211, 5)), 101, initial_std=0.3)
    x, settings = torch.randn(2, 3), dict(n_samples=31, tiles=(2,), joint=True)
    kept, again = predictor(q, **settings), predictor(q, memory_budget=2**17, **settings)
    assert_same(again(x), kept(x))
    assert_same(again(x), kept(x))
    plans = [next(iter(p.executions.by_shape.values()))[0].plan for p in (kept, again)]
    assert [p.keep_draws for p in plans] == [True, False]
    assert "more than half of memory_budget" in again.explain()


@pytest.mark.parametrize("posterior", [lambda m: MeanField(m, 101, initial_std=0.1), lambda m: DeepEnsemble(m, 3)])
def test_recurrent_layers_have_the_outputs_of_each_draw_in_turn(posterior):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 11, batch_first=True), nn.Linear(11, 5)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    q, x = posterior(Last()), torch.randn(13, 7, 3)
    predict = predictor(q, n_samples=3, joint=True)
    p = predict(x, samples=True)
    assert "recurrent layer" in predict.explain(x)
    q.eval()
    state = q.draws(torch.arange(3), 0)
    with torch.no_grad():
        each = [torch.func.functional_call(q.module, {n: t[s] for n, t in state.items()}, (x,)) for s in range(3)]
    torch.testing.assert_close(p.samples, torch.stack(each), **ROUNDING)


class NormalizesTransposed(nn.Module):
    """Batch normalization of a transposed value, whose strides are others in a trace than in its kernel."""

    def __init__(self):
        super().__init__()
        self.norm, self.first = nn.BatchNorm1d(8), nn.Linear(8, 7)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(7, 5)

    def forward(self, x):
        return self.head(self.drop(self.first(self.norm(x.transpose(1, 2)).transpose(1, 2)))).mean(1)


def test_batch_normalization_of_a_transposed_value():
    net, x = NormalizesTransposed().eval(), torch.randn(4, 6, 8)
    samples = predictor(MCDropout(net, p=0.0001))(x, samples=True).samples  # hardly any unit is dropped
    torch.testing.assert_close(samples.median(0).values, net(x), rtol=1e-3, atol=1e-3)


def test_explain_says_what_was_chosen():
    predict = predictor()
    with pytest.raises(ValueError, match="one batch"):
        predict.explain()
    said = predict.explain(torch.randn(2, 3))
    for part in ("strategy", "stacked", "7 draws", "layers before the first random one"):
        assert part in said


# -- predictions


def test_log_prob_is_that_of_the_mixture():
    x, y = torch.randn(70, 3), torch.randint(5, (70,))
    predict = predictor()
    p = predict(x, samples=True)
    expected = p.samples.double().softmax(-1).mean(0)[torch.arange(70), y].log()
    torch.testing.assert_close(predict.log_prob(x, y).double(), expected, **ROUNDING)
    assert predict.log_prob(x[:0], y[:0]).shape == (0,)
    regression = predictor(MCDropout(network(2)), Gaussian(2, std=0.5))
    targets = torch.randn(70, 2)
    means = regression(x, samples=True).samples[..., 0]
    each = torch.distributions.Normal(means, 0.5).log_prob(targets).sum(-1)
    torch.testing.assert_close(regression.log_prob(x, targets), each.logsumexp(0) - math.log(7), **ROUNDING)
    torch.testing.assert_close(
        regression(x, samples=True).log_prob(targets), regression.log_prob(x, targets), **ROUNDING
    )


def test_samples_are_kept_when_asked_for():
    p = predictor()(torch.randn(70, 3), samples=True)
    assert p.samples.shape == (7, 70, 5) and p.n_samples == 7
    torch.testing.assert_close(p.samples.softmax(-1).mean(0), p.probs, **ROUNDING)


@pytest.mark.parametrize(
    "compile, chunk_size",
    [(False, None), (False, 3), (True, None), pytest.param(True, 3, marks=pytest.mark.slow)],
)
def test_autocast_around_a_call_changes_nothing(compile, chunk_size):
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 5))
    make = lambda: predictor(MCDropout(net), compile=compile, chunk_size=chunk_size)
    x, p = torch.randn(64, 64), make()
    expected = make()(x).probs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, again = p(x).probs, p(x).probs
    for found in (first, again, p(x).probs):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 64, 65, 130])
def test_by_default_a_row_costs_few_rows_and_is_the_same_to_rounding(rows):
    predict, x = predictor(), torch.randn(130, 3)
    whole, part = predict(x), predict(x[:rows])
    assert_same_but_for_rounding(part, whole, rows)
    sizes = {shape[0] for key in predict.executions.by_shape for shape, _ in key[1]}
    rest = {n: next(size for size in (1, 8, 32, 64) if size >= (n % 64 or 64)) for n in (130, rows)}
    assert sizes == {64, *rest.values()}


def assert_same_but_for_rounding(part, whole, rows):
    for name in ("mean", "total", "aleatoric", "epistemic", "standard_error"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[:rows], rtol=1e-5, atol=1e-6)


def test_bits_do_not_depend_on_the_batch_where_that_is_asked_for():
    predict, x = predictor(batch_invariant=True), torch.randn(130, 3)
    assert predict.tiles == (64,)
    whole = predict(x)
    for rows in ([5], [5, 100], list(range(70)), [129, 0, 5]):
        assert torch.equal(predict(x[rows]).probs, whole.probs[rows])
    for tiles in (1, 64, 128):
        assert predictor(batch_invariant=True, tiles=tiles).tiles == (tiles,)
    for tiles in (8, (1, 64)):
        with pytest.raises(ValueError, match="one tile size, 1 or a multiple of 64"):
            predictor(batch_invariant=True, tiles=tiles)


def test_a_predictor_of_a_class_made_in_a_function_is_pickled():
    pytest.importorskip("cloudpickle")

    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = nn.Linear(3, 4), nn.Dropout(0.3)

        def forward(self, x):
            return self.drop(self.layer(x))

    x = torch.randn(5, 3)
    for q in (MCDropout(Local()), MeanField(Local(), 8), DeepEnsemble(Local(), 2)):
        predict = predictor(q, n_samples=2)
        assert torch.equal(pickle.loads(pickle.dumps(predict))(x).probs, predict(x).probs)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "likelihood, outputs",
    [(Categorical(), 5), (Gaussian(2), 2), pytest.param(Bernoulli(), 1, marks=pytest.mark.slow)],
)
def test_chunks_of_a_network_in_float64_are_one_call(likelihood, outputs, compile):
    """Compiled sums read the bytes that they are given: carried sums of another dtype were other numbers."""
    q, x = MCDropout(network(outputs).double()), torch.randn(9, 3, dtype=torch.float64)
    whole = predictor(q, likelihood.double(), compile=False)(x)
    chunked = predictor(q, likelihood.double(), compile=compile, chunk_size=3)
    for found in (chunked(x), chunked(x, tolerance=1e-9)):
        for name in ("mean", "total", "aleatoric", "epistemic", "standard_error"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-9, atol=1e-12)


def test_a_stream_is_its_batches():
    predict, x = predictor(batch_invariant=True), torch.randn(70, 3)
    whole = predict(x)
    parts = list(predict.stream(x.split(13)))
    assert torch.equal(torch.cat([p.probs for p in parts]), whole.probs)
    endless = predict.stream(iter(lambda: x[:2], None))
    next(endless)  # nothing is read ahead of what is asked for


def test_as_module_takes_the_networks_place():
    predict, x = predictor(), torch.randn(13, 3)
    model = predict.as_module()
    assert isinstance(model, nn.Module) and torch.equal(model(x), predict(x).probs)
    regression = predictor(MCDropout(network(2)), Gaussian(2))
    assert torch.equal(regression.as_module()(x), regression(x).mean)


def test_inputs_may_be_several_by_position_or_name():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, a, b):
            return self.net(a - b)

    predict, a, b = predictor(MCDropout(Sum())), torch.randn(13, 3), torch.randn(13, 3)
    by_position = predict((a, b))
    assert torch.equal(predict({"b": b, "a": a}).probs, by_position.probs)
    torch.testing.assert_close(by_position.probs, predict((a - b, torch.zeros(13, 3))).probs, **ROUNDING)


def test_arrays_are_taken():
    predict, x = predictor(), np.random.default_rng(0).normal(size=(13, 3)).astype(np.float32)
    expected = predict(torch.from_numpy(x)).probs
    assert torch.equal(predict(x).probs, expected)
    assert torch.equal(predict((x,)).probs, expected) and torch.equal(predict({"input": x}).probs, expected)
    assert torch.equal(predict(x[::-1]).probs, expected.flip(0))


def test_a_buffer_that_counts_calls_changes_nothing():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.net(x) + 0.1 * self.calls

    predict, x = predictor(MCDropout(Counts())), torch.randn(13, 3)
    first = predict(x)
    assert torch.equal(predict(x).probs, first.probs)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_without_a_compiler_it_runs_uncompiled_and_says_so_once(monkeypatch, caplog, chunk_size):
    class InvalidCxxCompiler(RuntimeError):
        pass

    def compile(*args, **kwargs):
        raise RuntimeError("inductor") from InvalidCxxCompiler("no g++")

    monkeypatch.setattr("vbdl.compiling.stored.load", lambda key: None)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile)
    vbdl.compiling.compiler._warned.clear()
    x = torch.randn(13, 3)
    with caplog.at_level(logging.WARNING, logger="vbdl"):
        found = predictor(compile=True, chunk_size=chunk_size)(x)
        predictor(compile=True, seed=1)(x)
    assert len([r for r in caplog.records if "no C++ compiler" in r.message]) == 1
    assert found.probs.shape == (13, 5)


def test_another_fault_of_the_compiler_is_not_hidden(monkeypatch):
    def compile(*args, **kwargs):
        raise RuntimeError("out of registers")

    monkeypatch.setattr("vbdl.compiling.stored.load", lambda key: None)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile)
    with pytest.raises((RuntimeError, ValueError), match="out of registers"):
        predictor(compile=True)(torch.randn(13, 3))


# -- what is refused, and how


def bad_rows():
    x = torch.randn(70, 3)
    x[66, 1] = float("nan")
    x[68, 2] = float("inf")
    return x


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.randn(7, 3).double(), ValueError, r"float64.*float32.*convert"),
        (torch.ones(7, 3, dtype=torch.int64), ValueError, r"rows of \(3,\) torch.int64: .*x.to\(torch.float32\)"),
        (torch.randn(7, 5), ValueError, r"cannot take rows of \(5,\)"),
        (torch.tensor(1.0), ValueError, "batch axis"),
        (bad_rows(), ValueError, "2 of 70 rows are not finite, the first is row 66"),
        ([1.0, 2.0], TypeError, "inputs are tensors or arrays"),
        ("text", TypeError, "inputs must be tensors or arrays"),
        (None, TypeError, "inputs must be tensors or arrays"),
        ((torch.randn(7, 3), torch.randn(5, 3)), ValueError, "disagree on the number of rows"),
        ((torch.randn(7, 3), torch.randn(7, 3)), (ValueError, TypeError), "argument"),
    ],
)
def test_wrong_inputs_are_refused_with_the_reason(x, error, message):
    with pytest.raises(error, match=message):
        predictor()(x)


def test_rows_that_do_not_fit_are_refused_in_one_error_and_no_log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch._subclasses.fake_tensor"), "handlers", [caplog.handler])
    with pytest.raises(ValueError, match=r"cannot take rows of \(5,\)"):
        Predictor(DeepEnsemble(nn.Linear(3, 2), 3), Categorical(), compile=False)(torch.randn(7, 5))
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]  # torch logs the traceback of what it raises


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(n_samples=0), "n_samples must be at least 1, got 0"),
        (dict(n_samples=-3), "n_samples must be at least 1"),
        (dict(tiles=()), "tiles"),
        (dict(tiles=(0, 8)), "tiles"),
        (dict(chunk_size=0), "chunk_size"),
        (dict(n_samples=8.0), "n_samples must be a whole number, got 8.0"),
        (dict(n_samples="8"), "n_samples must be a whole number, got '8'"),
        (dict(n_samples=True), "n_samples must be a whole number, got True"),
        (dict(seed=1.5), "seed must be a whole number, got 1.5"),
        (dict(tiles="64"), "each size in tiles must be a whole number, got '64'"),
        (dict(tiles=(64.0,)), "each size in tiles must be a whole number, got 64.0"),
        (dict(chunk_size=2.0), "chunk_size must be a whole number"),
        (dict(memory_budget="1GB"), "memory_budget must be a whole number"),
        (dict(autocast=True), "autocast must be torch.bfloat16, torch.float16 or None, got True"),
        (dict(autocast="bfloat16"), "autocast must be torch.bfloat16"),
        (dict(autocast=torch.int8), "autocast must be torch.bfloat16"),
    ],
)
def test_wrong_settings_are_refused_with_the_reason(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        predictor(**settings)


def test_whole_numbers_of_any_kind_are_taken():
    p = predictor(n_samples=np.int64(4), seed=torch.tensor(3), tiles=8)
    assert (p.n_samples, p.seed, p.tiles) == (4, 3, (8,))
    assert all(type(n) is int for n in (p.n_samples, p.seed, *p.tiles))


def test_more_samples_than_members_are_refused():
    with pytest.raises(ValueError, match="only 3 different draws"):
        predictor(DeepEnsemble(network(), 3), n_samples=5)


def test_a_plain_module_is_refused_with_a_way_out():
    with pytest.raises(TypeError, match="wrap the network in vbdl.MCDropout"):
        Predictor(network(), Categorical())


def forward_mode(f, x):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, x))


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x.expand(2, *x.shape)),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "dual numbers": forward_mode,
}
CALLS = {
    "predict": lambda p, x: p(x).total.sum(),
    "samples": lambda p, x: p(x, samples=True).samples.sum(),
    "density": lambda p, x: p.log_prob(x, torch.zeros(len(x), dtype=torch.int64)).sum(),
    "step by step": lambda p, x: p(x, deadline=10.0).total.sum(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_are_refused(transform, call):
    p, x = predictor(tiles=7), torch.randn(7, 3)
    with pytest.raises(NotImplementedError, match="requires_grad"):
        TRANSFORMS[transform](lambda x: CALLS[call](p, x), x)


def test_transforms_of_compiled_calls_are_refused():
    """A compiled call would lose a tangent without a word; reverse mode gives what forward mode would."""
    members = [network().eval() for _ in range(3)]
    p, x = predictor(DeepEnsemble(members), n_samples=3, tiles=7, compile=True), torch.randn(7, 3)
    p(x)
    for transform in TRANSFORMS.values():
        with pytest.raises(NotImplementedError, match="requires_grad"):
            transform(lambda x: CALLS["predict"](p, x), x)
    by_reverse = torch.autograd.functional.jvp(lambda x: p(x).probs, x, x)[1]
    loop = lambda x: torch.stack([member(x).softmax(-1) for member in members]).mean(0)
    torch.testing.assert_close(by_reverse, torch.func.jvp(loop, (x,), (x,))[1], **ROUNDING)


def test_outputs_that_are_no_tensor_are_refused():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x), x

    with pytest.raises((TypeError, ValueError), match="one Tensor"):
        predictor(MCDropout(Pair()))(torch.randn(7, 3))


class LastStep(nn.Module):
    """Recurrent, the batch on the axis that torch puts it on unless told otherwise: the second."""

    def __init__(self, batch_first: bool = False):
        super().__init__()
        self.layer, self.batch_first = nn.GRU(3, 8, batch_first=batch_first), batch_first
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        steps = self.layer(x)[0]
        return self.head(steps[:, -1] if self.batch_first else steps[-1])


class Attends(nn.Module):
    """Attention over the rows of the batch, as it is without batch_first."""

    def __init__(self, batch_first: bool = False):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.layer(x)[:, -1])


class Carries(nn.Module):
    """A recurrent layer over the rows of the batch, as it is without batch_first: a row gets what came before it."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


class Sums(nn.Linear):
    """A cumulative sum over the rows, forwards or backwards."""

    def __init__(self, step: int):
        super().__init__(8, 2)
        self.step = step

    def forward(self, x):
        return super().forward(x.cumsum(0) if self.step > 0 else x.flip(0).cumsum(0).flip(0))


class Positions(nn.Linear):
    """A table of positions, sequence first, added to the rows of the batch."""

    def forward(self, x):
        return super().forward(x + torch.arange(len(x), dtype=x.dtype).sin().view(-1, *[1] * (x.ndim - 1)))


class Centered(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))


def unstable_norm():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 2))


@pytest.mark.parametrize(
    "net, x, message",
    [
        (LastStep, torch.randn(20, 5, 3), "returned 5 rows for a batch of 32: the batch is the first axis"),
        (Attends, torch.randn(20, 5, 8), "depends on the other rows"),
        (lambda: Centered(3, 2), torch.randn(20, 3), "depends on the other rows"),
        *((lambda: Positions(8, 2), torch.randn(n, 8), "or on its place among them") for n in (2, 20)),
        *((Carries, torch.randn(n, 5, 8), "depends on the other rows") for n in (2, 20)),
        *((lambda s=s: Sums(s), torch.randn(n, 8), "depends on the other rows") for n in (2, 20) for s in (1, -1)),
        (unstable_norm, torch.randn(20, 3), "track_running_stats"),
        (unstable_norm, torch.randn(1, 3), "track_running_stats"),
    ],
)
def test_rows_that_do_not_stay_apart_are_refused(net, x, message):
    with pytest.raises(ValueError, match=message):
        predictor(DeepEnsemble(net(), 2), n_samples=2)(x)


@pytest.mark.parametrize("net, width", [(LastStep, 3), (Attends, 8)])
def test_rows_first_are_taken(net, width):
    members = [net(batch_first=True).eval() for _ in range(2)]
    x = torch.randn(20, 5, width)
    expected = torch.stack([m(x).softmax(-1) for m in members]).mean(0)
    torch.testing.assert_close(predictor(DeepEnsemble(members), n_samples=2)(x).probs, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "likelihood, outputs, y, message",
    [
        (Categorical(), 5, torch.full((70,), 5), "from 5 to 5.*0 to 4"),
        (Categorical(), 5, torch.zeros(70), "integer dtype"),
        (Bernoulli(), 1, torch.full((70,), 2), "0 or 1"),
        (Gaussian(1), 1, torch.cat([torch.zeros(66), torch.tensor([math.nan] * 4)]), "row 66 is not finite"),
        (Gaussian(1), 1, torch.zeros(69), r"70 rows and targets \(69,\)"),
        (Gaussian(1), 1, torch.zeros(70, 2), r"do not fit"),
    ],
)
def test_wrong_targets_are_refused_with_the_reason(likelihood, outputs, y, message):
    with pytest.raises(ValueError, match=message):
        predictor(MCDropout(network(outputs)), likelihood).log_prob(torch.randn(70, 3), y)


def test_a_likelihood_that_does_not_fit_the_outputs_is_named():
    with pytest.raises(ValueError, match="n_outputs=5"):
        predictor(likelihood=Gaussian(1))(torch.randn(7, 3))


def test_a_likelihood_of_other_members_is_refused():
    likelihood = Gaussian(5)
    likelihood.n_members = 2
    with pytest.raises(ValueError, match="2 members, the posterior has 3"):
        predictor(DeepEnsemble(network(), 3), likelihood, n_samples=3)


# -- tracing


@pytest.mark.parametrize(
    "q, n_samples", [(DeepEnsemble(network(), 5), 5), (MCDropout(network()), 16), (MeanField(network(), 9), 16)]
)
def test_a_network_is_traced_once_and_its_statistics_once(q, n_samples, monkeypatch):
    """Twice for the network: with each linear layer as one node, and with those lowered to products."""
    traces = []

    def counted(function, *args, **kwargs):
        graph = trace(function, *args, **kwargs)
        traces.append(sum(n.op == "call_function" for n in graph.graph.nodes))
        return graph

    for place in ("vbdl.engine.traced", "vbdl.engine.program"):
        monkeypatch.setattr(f"{place}.trace", counted)
    x = torch.randn(3, 3)
    predict = predictor(q, n_samples=n_samples)
    predict(x)
    assert len(traces) == 3, traces
    summarize = Categorical().summarize
    statistics = trace(lambda p: tuple(Categorical().finish(summarize(p)).values()), torch.randn(n_samples, 3, 5))
    assert traces[2] <= 3 + sum(n.op == "call_function" for n in statistics.graph.nodes)
    samples = predict(x, samples=True).samples.softmax(-1)
    torch.testing.assert_close(predict(x).probs, samples.mean(0), **ROUNDING)


def test_more_members_than_eight_are_the_same_ensemble():
    q, x = DeepEnsemble(network(), 11), torch.randn(4, 3)
    expected = torch.stack([torch.func.functional_call(network().eval(), q.member(m), (x,)) for m in range(11)])
    predict = predictor(q, n_samples=11)
    torch.testing.assert_close(predict(x).probs, expected.softmax(-1).mean(0), **ROUNDING)
    torch.testing.assert_close(predict.replace(chunk_size=3)(x).probs, predict(x).probs, **ROUNDING)


def test_statistics_follow_graphs_with_constants_and_running_sums():
    """A constant of the network and one of the statistics keep their values in one graph."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, x):
            return F.dropout(self.layer(x) * torch.tensor([1.0, -2.0, 3.0, 0.5, 0.25]), 0.3, self.training)

    q, x = MCDropout(Shifted()), torch.randn(6, 3)
    one = predictor(q)
    for chunk in (1, 2, 7):
        predict = predictor(q, chunk_size=chunk)
        torch.testing.assert_close(predict(x).probs, one(x, samples=True).samples.softmax(-1).mean(0), **ROUNDING)
