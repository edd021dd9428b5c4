"""Tolerances and deadlines: exactly the prefix's answer, no compile after warm_up, guarantees that hold however often
one looks."""

import gc
import types

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor

import vbdl
from vbdl.engine.adaptive import LabelDecided, StandardError, ThresholdDecided, step_size
from vbdl.engine.predictor import Predictor

ROUNDING = {"rtol": 0.0, "atol": 1e-5}


def network(outputs=4, scale=2.0):
    net = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, outputs))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    return net


def predictor(q=None, likelihood=None, n_samples=150, **settings):
    q = vbdl.MCDropout(network()) if q is None else q
    return Predictor(q, likelihood or vbdl.Categorical(), n_samples, **{"compile": False, **settings})


def assert_prefixes(predict, x, found, names=("probs", "total", "epistemic", "standard_error")):
    """Every row is that of a predictor of as many samples."""
    counts = found.n_samples
    counts = torch.full((len(x),), counts) if isinstance(counts, int) else counts
    for k in counts.unique().tolist():
        whole, rows = predict.replace(n_samples=k)(x), counts == k
        for name in names:
            torch.testing.assert_close(getattr(found, name)[rows], getattr(whole, name)[rows], **ROUNDING)
    return counts


# -- the prefix's answer


# how rows that are left are packed does not depend on the rule that left them
@pytest.mark.parametrize("rule", [0.02, LabelDecided(0.95), ThresholdDecided(0.5, 0.95, of=1)])
@pytest.mark.parametrize("tiles", [(64,), (1, 16, 64)])
@pytest.mark.slow_where(cell=lambda p: len(p["tiles"]) > 1 and p["rule"] != 0.02)
def test_a_tolerance_gives_each_row_a_prefix(rule, tiles):
    predict, x = predictor(tiles=tiles), 2 * torch.randn(150, 5)
    found = predict(x, tolerance=rule)
    counts = assert_prefixes(predict, x, found)
    assert counts.shape == (150,) and len(counts.unique()) > 2  # rows differ, or the test says nothing
    assert int(counts.min()) >= step_size(150) and int(counts.max()) <= 150
    if isinstance(rule, float):
        early = counts < 150
        assert bool((found.standard_error[early] <= rule).all())


def test_equal_steps_are_equal_bit_for_bit():
    predict, x = predictor(chunk_size=10, tiles=64), 2 * torch.randn(150, 5)
    found = predict(x, tolerance=0.02)
    counts = found.n_samples
    for k in counts.unique().tolist():
        rows = counts == k
        assert torch.equal(found.probs[rows], predict.replace(n_samples=k)(x).probs[rows])


def test_mean_field_and_regression():
    q = vbdl.MeanField(network(outputs=2), n_data=10, initial_std=0.1)
    predict, x = predictor(q, vbdl.Gaussian(2), joint=True), torch.randn(70, 5)
    found = predict(x, tolerance=0.08)
    counts = assert_prefixes(predict, x, found, ("mean", "total", "epistemic"))
    assert len(counts.unique()) > 1


def test_an_ensemble_of_several_architectures():
    networks = [network() for _ in range(9)] + [network(scale=1.9) for _ in range(9)]
    networks[9:] = [nn.Sequential(*n, nn.Identity()) for n in networks[9:]]
    predict, x = predictor(vbdl.DeepEnsemble(networks), n_samples=18), torch.randn(20, 5)
    found = predict(x, tolerance=0.09)
    assert_prefixes(predict, x, found)


def test_what_is_never_settled_gets_all_draws_and_what_is_at_once_few():
    predict, x = predictor(), torch.randn(7, 5)
    assert predict(x, tolerance=1e-9).n_samples == 150
    assert predict(x, tolerance=10.0).n_samples == 20  # the first step after 16 draws
    torch.testing.assert_close(predict(x, tolerance=1e-9).probs, predict(x).probs, **ROUNDING)
    assert predict(x[:0], tolerance=0.1).probs.shape == (0, 4)


# -- deadlines, on a clock of our own


class Clock:
    """Every look takes one second."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_a_deadline_gives_a_prefix_and_says_of_how_many_draws():
    predict, x = predictor(), torch.randn(7, 5)
    counts = []
    for deadline in (1.0, 8.0, 14.0, 1e6):
        predict.clock = Clock()
        found = predict(x, deadline=deadline)
        assert isinstance(found.n_samples, int)
        assert_prefixes(predict, x, found)
        counts.append(found.n_samples)
    assert counts[0] == 10 and counts[-1] == 150  # at least one step, at most all
    assert counts == sorted(counts) and len(set(counts)) == 4


def test_a_deadline_in_the_middle_of_a_batch_leaves_rows_with_different_numbers():
    predict, x = predictor(), torch.randn(200, 5)
    predict.clock = Clock()
    found = predict(x, deadline=13.0)
    counts = assert_prefixes(predict, x, found)
    assert len(counts.unique()) == 2 and bool((counts[:-1] >= counts[1:]).all())


def test_no_step_is_begun_that_would_end_late():
    predict, x = predictor(), torch.randn(7, 5)
    clock = Clock()
    predict.clock = clock
    predict(x, deadline=9.5)
    # a step takes two looks at the clock here; the last look is the one that saw that time was up
    assert clock.now - 1.0 <= 9.5


# -- memory


def bytes_held(root):
    """Bytes of the memory of all tensors that are reached from an object, memory that several share once."""
    seen, sizes, stack = set(), {}, [root]
    while stack:
        found = stack.pop()
        if id(found) in seen or isinstance(found, type | types.ModuleType):
            continue
        seen.add(id(found))
        if isinstance(found, torch.Tensor) and not isinstance(found, FakeTensor):
            sizes[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
        if isinstance(found, types.FunctionType):  # what it closes over, not the globals of its file
            stack.extend(cell.cell_contents for cell in found.__closure__ or ())
        else:
            stack.extend(gc.get_referents(found))
    return sum(sizes.values())


def wide():
    narrow = (nn.Linear(256, 8), nn.Dropout(0.3), nn.Linear(8, 4))
    return nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), *narrow)


@pytest.mark.parametrize("rule", [0.05, LabelDecided(0.9)])
@pytest.mark.parametrize("make", [lambda: vbdl.MCDropout(wide()), lambda: vbdl.DeepEnsemble(wide(), 32)])
def test_the_weights_are_held_once(make, rule):
    q, x = make(), torch.randn(64, 8)
    once = sum(t.numel() * t.element_size() for t in q.parameters())
    predict = Predictor(q, vbdl.Categorical(), 32, tiles=64, compile=False)
    predict(x)
    assert bytes_held(predict) >= once  # or the count misses them
    predict(x, tolerance=rule)
    predict(x, deadline=100.0)
    assert bytes_held(predict) < 1.2 * once


# -- after warm_up


@pytest.mark.slow
def test_nothing_is_compiled_after_an_adaptive_warm_up():
    q, x = vbdl.MCDropout(network()), 2 * torch.randn(9, 5)
    predict = Predictor(q, vbdl.Categorical(), 20, tiles=(4,))
    predict.warm_up((9,), example=x, adaptive=True)
    seen = []
    import vbdl.engine.program as program

    original = program.compile_graph
    try:
        program.compile_graph = lambda *args, **kwargs: seen.append(args) or original(*args, **kwargs)
        for rule in (0.05, LabelDecided(0.9)):
            predict(x, tolerance=rule)
        predict(x, deadline=10.0)
    finally:
        program.compile_graph = original
    assert not seen


def test_what_was_not_warmed_up_is_refused():
    predict, x = predictor(), torch.randn(7, 5)
    predict.warm_up((7,), example=x)
    with pytest.raises(RuntimeError, match="adaptive=True"):
        predict(x, tolerance=0.1)


# -- guarantees under repeated looks, by simulation


def looks(rule, draws, step=8):
    """(trials,) which are decided, at the first look that says so, and the state then; draws: (n, trials, ...)"""
    state, decided, said = {}, torch.zeros(draws.shape[1], dtype=torch.bool), torch.zeros(draws.shape[1])
    for start in range(0, len(draws), step):
        state = rule.update(state, draws[start : start + step])
        mean = draws[: start + step].mean(0)
        now = rule.settled({"probs": mean}, start + step, state) & ~decided
        said[now] = (mean.argmax(-1) if mean.ndim > 1 else (mean > rule.threshold)).float()[now]
        decided |= now
    return decided, said


def spread(kind, mean, trials, n):
    """(n, trials) probabilities with this mean: all or nothing, a Beta around it, or rarely far off."""
    if kind == "all or nothing":
        return torch.bernoulli(torch.full((n, trials), mean)).double()
    if kind == "beta":
        return torch.distributions.Beta(4 * mean, 4 * (1 - mean)).sample((n, trials)).double()
    rare = torch.bernoulli(torch.full((n, trials), 0.02)).double()
    low = (mean - 0.02) / 0.98
    return torch.where(rare.bool(), torch.ones_like(rare), torch.full_like(rare, low))


TRIALS, DRAWS, CONFIDENCE = 4000, 400, 0.9


@pytest.mark.parametrize("kind", ["all or nothing", "beta", "rarely far off"])
@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_a_threshold_is_decided_wrongly_no_more_often_than_promised(kind, threshold):
    """The mean lies on the threshold's lower side by nothing: 'above' is an error, looked for at 50 looks."""
    rule = ThresholdDecided(threshold, CONFIDENCE)
    decided, above = looks(rule, spread(kind, threshold, TRIALS, DRAWS))
    wrong = float((decided & above.bool()).double().mean())
    assert wrong <= 0.1 + 3 * (0.1 * 0.9 / TRIALS) ** 0.5


def test_looking_after_every_step_at_a_normal_interval_would_break_the_promise():
    """What the bets are there for: an interval for one look, used at every look, is wrong far more often."""
    draws = spread("all or nothing", 0.5, TRIALS, DRAWS)
    wrong = torch.zeros(TRIALS, dtype=torch.bool)
    for n in range(16, DRAWS + 1, 8):
        mean, std = draws[:n].mean(0), draws[:n].std(0)
        wrong |= mean - 1.645 * std / n**0.5 > 0.5  # one-sided 95 %, for an error of 0.1 in both directions
    assert float(wrong.double().mean()) > 0.15


def test_a_label_is_wrong_no_more_often_than_promised():
    """Two classes of equal probability beside a third: the label decided is an error half of the time."""
    p = torch.distributions.Dirichlet(torch.tensor([2.0, 2.0, 1.0])).sample((DRAWS, TRIALS)).double()
    decided, _ = looks(LabelDecided(CONFIDENCE), p)
    # a mean that is equal is an error on either side, once for each of the labels a first step can choose
    assert float(decided.double().mean()) <= 0.1 + 3 * (0.1 * 0.9 / TRIALS) ** 0.5


def test_a_clear_answer_is_decided_early():
    p = torch.distributions.Dirichlet(torch.tensor([9.0, 2.0, 1.0])).sample((DRAWS, 1000)).double()
    decided, label = looks(LabelDecided(0.95), p[:40])
    assert float(decided.double().mean()) > 0.9 and float((label[decided] == 0).double().mean()) > 0.999
    decided, above = looks(ThresholdDecided(0.5, 0.95), spread("beta", 0.8, 1000, 40))
    assert float(decided.double().mean()) > 0.9 and float(above[decided].mean()) > 0.999


# -- refused


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: StandardError(0.0), "positive and finite"),
        (lambda: LabelDecided(1.0), "between 0 and 1"),
        (lambda: ThresholdDecided(1.5), "between 0 and 1"),
        (lambda: predictor()(torch.randn(3, 5), tolerance=-0.1), "positive and finite"),
        (lambda: predictor()(torch.randn(3, 5), tolerance="0.1"), "standard error or a rule.*got '0.1'"),
        (lambda: predictor()(torch.randn(3, 5), tolerance=True), "standard error or a rule.*got True"),
        (lambda: predictor()(torch.randn(3, 5), tolerance=LabelDecided), "standard error or a rule.*got <class"),
        (lambda: predictor()(torch.randn(3, 5), deadline=0.0), "positive number of seconds"),
        (lambda: predictor()(torch.randn(3, 5), deadline="1"), "positive number of seconds, got '1'"),
        (lambda: predictor()(torch.randn(3, 5), samples=True, deadline=1.0), "neither with samples=True"),
        (lambda: predictor(estimator="moments")(torch.randn(3, 5), tolerance=0.1), "nor with estimator='moments'"),
        (lambda: predictor()(torch.randn(3, 5), tolerance=ThresholdDecided(0.5)), "of=class"),
        (lambda: predictor()(torch.randn(3, 5), tolerance=ThresholdDecided(0.5, of=7)), "of=7"),
        (
            lambda: predictor(likelihood=vbdl.Gaussian(4))(torch.randn(3, 5), tolerance=LabelDecided()),
            "use a standard error",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.slow
def test_bernoulli_labels():
    predict, x = predictor(vbdl.MCDropout(network(1)), vbdl.Bernoulli()), torch.randn(70, 5)
    found = predict(x, tolerance=LabelDecided(0.95))
    counts = assert_prefixes(predict, x, found)
    assert len(counts.unique()) > 2
