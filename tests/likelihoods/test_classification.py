"""Categorical and Bernoulli: scores, averages and the split in nats, against torch.distributions and float64."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vbdl.likelihoods.bernoulli import Bernoulli
from vbdl.likelihoods.categorical import Categorical

FIELDS = ("probs", "total", "aleatoric", "epistemic", "standard_error")


def predict(likelihood, parameters, splits=None):
    """The prediction of samples (samples, batch, ...) added up in pieces of these sizes."""
    pieces = parameters.split(splits or len(parameters))
    summary = likelihood.summarize(pieces[0])
    for piece in pieces[1:]:
        summary = likelihood.merge(summary, likelihood.summarize(piece))
    return likelihood.prediction(likelihood.finish(summary), len(parameters))


def brute_force(logits, likelihood):
    """Probabilities, H[E p], E H[p] and MI in float64, by the definitions."""
    logits = logits.double()
    if isinstance(likelihood, Bernoulli):
        logits = torch.stack((logits, torch.zeros_like(logits)), -1)
    probs = logits.softmax(-1)
    entropy = lambda p: -torch.special.xlogy(p, p).sum(-1)
    total, aleatoric = entropy(probs.mean(0)), entropy(probs).mean(0)
    mean = probs.mean(0)
    return mean[..., 0] if isinstance(likelihood, Bernoulli) else mean, total, aleatoric, total - aleatoric


def assert_right(likelihood, logits, p):
    mean, total, aleatoric, epistemic = brute_force(logits, likelihood)
    # the promise of the project: 1e-6 absolute in float32
    for found, expected in ((p.probs, mean), (p.total, total), (p.aleatoric, aleatoric), (p.epistemic, epistemic)):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(p.total, p.aleatoric + p.epistemic, rtol=0, atol=1e-6)
    assert bool((p.epistemic >= 0).all())


@settings(max_examples=200, deadline=None)
@example(shape=(1, 1, 5), scale=10.0, shift=0.0, seed=61229, split=1)  # 1 - p had lost what was left of it
@given(
    shape=st.tuples(st.integers(1, 11), st.integers(0, 5), st.integers(1, 7)),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e4]),
    shift=st.sampled_from([0.0, -1e4, 1e4]),
    seed=st.integers(0, 2**32 - 1),
    split=st.integers(1, 11),
)
def test_the_split_is_that_of_the_definition(shape, scale, shift, seed, split):
    # one logit of 1e4 is coarse in float32 (1e-3), so a shift goes with logits that stay apart or are equal
    logits = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + (shift if scale != 1.0 else 0)
    p = predict(Categorical(), logits, split)
    assert_right(Categorical(), logits, p)
    assert bool((p.epistemic <= math.log(shape[-1]) + 1e-6).all())
    assert_right(Bernoulli(), logits, predict(Bernoulli(), logits, split))


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()])
def test_merging_any_split_is_the_whole(likelihood):
    logits = 3 * torch.randn(13, 5, 7)
    whole = predict(likelihood, logits)
    for splits in (1, 2, [1, 12], [5, 1, 7]):
        for name in FIELDS:
            merged = getattr(predict(likelihood, logits, splits), name)
            torch.testing.assert_close(merged, getattr(whole, name), rtol=0, atol=1e-6)
    assert torch.equal(whole.probs, predict(likelihood, logits, [13]).probs)


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()])
def test_an_empty_summary_adds_nothing(likelihood):
    logits = torch.randn(5, 3, 7)
    one = likelihood.summarize(logits)
    none = {n: torch.zeros_like(t) for n, t in one.items()}
    for name, t in likelihood.merge(none, one).items():
        assert torch.equal(t, one[name]), name


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()])
def test_identical_samples_have_no_epistemic_part(likelihood):
    p = predict(likelihood, torch.randn(1, 5, 7).expand(11, 5, 7))
    assert float(p.epistemic.abs().max()) < 1e-6 and float(p.standard_error.max()) < 1e-7


@pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
def test_extreme_logits_are_certain_not_nan(size):
    logits = torch.tensor([size, 0.0, -size]).expand(3, 2, 3)
    for likelihood in (Categorical(), Bernoulli()):
        p = predict(likelihood, logits)
        for name in FIELDS:
            assert bool(getattr(p, name).isfinite().all()), name
        assert_right(likelihood, logits, p)
    assert float(Categorical().nll(logits[0], torch.tensor([0, 2])).isfinite().all())


def test_two_samples_that_disagree():
    """Certain and opposite: H[E p] = log 2, no aleatoric part."""
    p = predict(Categorical(), torch.tensor([[[50.0, -50.0]], [[-50.0, 50.0]]]))
    torch.testing.assert_close(p.epistemic, torch.tensor([math.log(2)]))
    assert float(p.aleatoric) < 1e-6
    one_logit = predict(Bernoulli(), torch.tensor([[50.0], [-50.0]]))
    torch.testing.assert_close(one_logit.epistemic, torch.tensor([math.log(2)]))
    assert float(one_logit.probs) == 0.5


def test_the_standard_error_is_that_of_repeated_experiments():
    """The spread of the mean over 4000 experiments of 11 samples each; a standard deviation is then known to 1.1 %."""
    logits = 2 * torch.randn(11, 4000, 3)
    p = predict(Categorical(), logits)
    torch.testing.assert_close(
        p.standard_error.square().mean(0).sqrt(), p.probs.std(0), rtol=0.05, atol=0, msg=lambda m: m
    )


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 3, 2)])
def test_nll_is_that_of_torch(shape):
    logits = torch.randn(*shape, 7)
    y = torch.randint(7, shape)
    expected = -torch.distributions.Categorical(logits=logits).log_prob(y).flatten(1).sum(1) if len(shape) > 1 else None
    if expected is None:
        expected = -torch.distributions.Categorical(logits=logits).log_prob(y)
    torch.testing.assert_close(Categorical().nll(logits, y), expected)
    binary, ones = torch.randn(shape), torch.randint(2, shape)
    expected = -torch.distributions.Bernoulli(logits=binary).log_prob(ones.float()).reshape(5, -1).sum(1)
    torch.testing.assert_close(Bernoulli().nll(binary, Bernoulli().check_targets(ones, shape)), expected)


def test_one_logit_is_a_bernoulli():
    likelihood = Bernoulli()
    assert likelihood(torch.randn(5, 1)).shape == (5,) and likelihood(torch.randn(5, 3)).shape == (5, 3)
    p = predict(likelihood, torch.tensor([[-1.0, 2.0], [-2.0, 3.0]]))
    assert p.label.tolist() == [False, True]
    torch.testing.assert_close(p.log_prob(torch.tensor([0, 1])), p.confidence.log())


def test_classes_of_an_image_are_per_pixel():
    likelihood = Categorical(class_axis=1)
    images = torch.randn(11, 3, 7, 5, 2)  # (samples, batch, classes, height, width)
    parameters = torch.stack([likelihood(image) for image in images])
    assert parameters.shape == (11, 3, 5, 2, 7)
    p = predict(likelihood, parameters)
    assert p.probs.shape == (3, 5, 2, 7) and p.epistemic.shape == (3, 5, 2)
    assert_right(likelihood, parameters, p)
    y = torch.randint(7, (3, 5, 2))
    torch.testing.assert_close(
        likelihood.nll(parameters[0], y), torch.nn.functional.cross_entropy(images[0], y, reduction="none").sum((1, 2))
    )


def test_bfloat16_logits_are_summed_in_float32():
    logits = torch.randn(1000, 3, 5).bfloat16()
    p = predict(Categorical(), logits)
    assert p.probs.dtype == torch.float32
    assert_right(Categorical(), logits, p)


@pytest.mark.parametrize(
    "likelihood, y, shape, message",
    [
        (Categorical(), torch.tensor([0, 7]), (2, 7), "from 0 to 7.*0 to 6"),
        (Categorical(), torch.tensor([-1, 2]), (2, 7), "from -1 to 2"),
        (Categorical(), torch.tensor([0.0, 1.0]), (2, 7), "integer dtype.*float32"),
        (Categorical(), torch.tensor([[0], [1]]), (2, 7), r"targets \(2, 1\) do not fit"),
        (Categorical(), torch.zeros(2, 8, 9).long(), (2, 7, 8, 9), r"axis 1: use vbdl.Categorical\(class_axis=1\)"),
        (Categorical(), torch.zeros(2, 8, 9).long(), (2, 8, 7, 9), r"axis 2: use vbdl.Categorical\(class_axis=2\)"),
        (Categorical(1), torch.zeros(2, 8).long(), (2, 8, 9, 7), r"targets \(2, 8\) do not fit"),
        (Bernoulli(), torch.tensor([0, 2]), (2,), "0 or 1.*Categorical"),
        (Bernoulli(), torch.tensor([0.5, float("nan")]), (2,), "0 or 1"),
        (Bernoulli(), torch.tensor([0, 1, 1]), (2,), r"targets \(3,\) do not fit"),
    ],
)
def test_wrong_targets_are_refused_with_the_reason(likelihood, y, shape, message):
    with pytest.raises(ValueError, match=message):
        likelihood.check_targets(y, shape)


def test_wrong_outputs_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="Bernoulli"):
        Categorical()(torch.randn(5))
    with pytest.raises(ValueError, match="scalar"):
        Bernoulli()(torch.tensor(1.0))


def predicted(likelihood, parameters):
    return likelihood.prediction(likelihood.finish(likelihood.summarize(parameters)), len(parameters))


def test_the_log_probability_is_that_of_the_target():
    p = predicted(Categorical(), torch.randn(4, 3, 2))
    y = torch.tensor([0, 1, 1])
    expected = p.probs[torch.arange(3), y].log()
    for same in (y, y.to(torch.int32), y.numpy()):
        torch.testing.assert_close(p.log_prob(same), expected)
    p = predicted(Bernoulli(), torch.randn(4, 3))
    expected = torch.distributions.Bernoulli(p.probs).log_prob(y.float())
    for same in (y, y.bool(), y.float(), y.unsqueeze(1), y.numpy()):
        torch.testing.assert_close(p.log_prob(same), expected)


@pytest.mark.parametrize(
    "y, message",
    [([0, 1], "do not fit"), ([1], "do not fit"), ([0, 1, 2], "0 or 1|run from 0 to 2"), ([[0, 1]], "do not fit")],
)
def test_the_log_probability_of_targets_that_do_not_fit_is_refused(y, message):
    for p in (predicted(Categorical(), torch.randn(4, 3, 2)), predicted(Bernoulli(), torch.randn(4, 3))):
        with pytest.raises(ValueError, match=message):
            p.log_prob(torch.tensor(y))


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_entropy_is_minus_zero(likelihood, draws, compiled):
    """Where one class is certain there is nothing left, and nothing has no sign."""
    from vbdl.calibration.calibrated import _with_probs
    from vbdl.ood import scores

    logits = torch.tensor([[2000.0, 0.0, -2000.0], [-2000.0, 2000.0, 0.0], [0.0, -2000.0, 2000.0], [1.0, 0.0, 0.5]])
    if isinstance(likelihood, Bernoulli):
        logits = torch.tensor([2000.0, -2000.0, 2000.0, 1.0])
    logits = logits.expand(draws, *logits.shape)

    def fields(parameters):
        return likelihood.finish(likelihood.summarize(parameters))

    found = (torch.compile(fields) if compiled else fields)(logits)
    calibrated = _with_probs(found, torch.nn.Identity())
    if not isinstance(likelihood, Bernoulli):
        p = logits.softmax(-1)
        calibrated["entropy"], calibrated["expected"] = scores.entropy(p[0]), scores.expected_entropy(p)
    for one in (found, calibrated):
        for name in ("total", "aleatoric", "epistemic", "entropy", "expected"):
            if name in one:
                assert (one[name][:3] == 0).all() and not one[name].signbit().any(), (name, one[name])


@pytest.mark.parametrize("shape", [(9,), (4, 3, 2)])
def test_the_loss_of_a_class_is_its_log_probability_bit_for_bit(shape):
    """torch's fused loss is used, which would leave out rows of class -100; members under vmap gather instead."""
    logits, y = torch.randn(*shape, 5, requires_grad=True), torch.randint(5, shape)
    found = Categorical().nll(logits, y)
    expected = -logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1).flatten(1 if len(shape) > 1 else 0)
    expected = expected.sum(1) if len(shape) > 1 else expected
    gradients = [torch.autograd.grad(nll.mean(), logits)[0] for nll in (found, expected)]
    assert torch.equal(found, expected) and torch.equal(*gradients)
    mapped = torch.func.vmap(Categorical().nll)(torch.stack([logits, -logits]), torch.stack([y, y]))
    torch.testing.assert_close(mapped[0], found)
    with pytest.raises((IndexError, RuntimeError)):
        Categorical().nll(logits, torch.full_like(y, -100))
