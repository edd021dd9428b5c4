"""While one thread traces, every other one predicts: no module that a trace or a trial runs is read by another.

A call with replaced weights puts them into its module for as long as it lasts. So a trace is stopped in the middle of
the forward, with the weights of the trace in the modules, and every public method is called meanwhile.
"""

import copy
import cProfile
import importlib.util
import itertools
import pickle
import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vbdl
from vbdl.calling.likelihood_members import replicate
from vbdl.engine import background
from vbdl.model import Model


def _suite(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_for_threads", Path(__file__).with_name(f"{name}.py"))
    suite = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # pickle looks for its classes there
    spec.loader.exec_module(suite)
    return suite


CONTRACT, OWN = _suite("test_contract"), _suite("test_own_methods")
POSTERIORS = {**CONTRACT.POSTERIORS, **{name: lambda make, cls=cls: cls(make()) for name, cls in OWN.OWN.items()}}
SAMPLES, CLASSES = CONTRACT.SAMPLES, CONTRACT.CLASSES
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
WAIT = 20.0  # seconds; the most that a thread stays stopped


def calibrated(method, y):
    def make(q):
        predict = vbdl.Predictor(q, trained_noise(vbdl.Gaussian(CLASSES), q), q.n_draws or SAMPLES, compile=False)
        x = torch.randn(90, 11, generator=torch.Generator().manual_seed(8))
        return vbdl.calibrate(predict, (x, y), method).likelihood

    return make


def trained_noise(likelihood, q):
    """With parameters of each member, where members have some, and no two alike."""
    if q.by_member:
        replicate(likelihood, q.n_members)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in likelihood.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return likelihood


LIKELIHOODS = {
    "gaussian": lambda q: trained_noise(vbdl.Gaussian(CLASSES), q),
    "own": lambda q: trained_noise(OWN.LaplaceNoise(CLASSES), q),
    "calibrated": calibrated(vbdl.calibration.StdScaling(), torch.randn(90, CLASSES)),
}


class Stop:
    """Stops the first forward that a thread chosen by `of` runs, until `resume`, with its weights in the modules."""

    def __init__(self, monkeypatch, of):
        self.inside, self._go, self._of, self._done = threading.Event(), threading.Event(), of, False
        forward = Model.forward

        def stopping(model, *args, **kwargs):
            outputs = forward(model, *args, **kwargs)
            if not self._done and self._of(threading.current_thread()):
                self._done = True
                self.inside.set()
                self._go.wait(WAIT)
            return outputs

        monkeypatch.setattr(Model, "forward", stopping)

    def resume(self):
        self._go.set()


def pair(posterior: str, likelihood: str):
    q = POSTERIORS[posterior](CONTRACT.mlp)
    for p in q.parameters():
        p.requires_grad_(p.is_floating_point())
    return q, LIKELIHOODS[likelihood](q)


def inputs(rows: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, 11, generator=generator), torch.randn(rows, CLASSES, generator=generator)


def numbers(predict, x, y) -> dict:
    """What each public method of a predictor answers, by name."""
    several = lambda p: {"mean": p.mean, "aleatoric": p.aleatoric, "epistemic": p.epistemic}
    answers = {
        "predict": several(predict(x)),
        "samples": {"samples": predict(x, samples=True).samples},
        "tolerance": several(predict(x, tolerance=1e-9)),
        "deadline": several(predict(x, deadline=1e6)),
        "gradients": several(predict(x.clone().requires_grad_())),
        "stream": several(next(predict.stream([x]))),
        "copy": several(copy.deepcopy(predict)(x)),
        "pickle": several(pickle.loads(pickle.dumps(predict))(x)),
        "replace": several(predict.replace(n_samples=predict.n_samples)(x)),
        "module": {"mean": predict.as_module()(x)},
        "draws": predict.posterior.draws(torch.arange(2), predict.seed) if len(predict.posterior.parts) == 1 else {},
        "noise": {name: p.detach() for name, p in predict.likelihood.named_parameters()},
        "state": {name: t for name, t in predict.posterior.state_dict().items()},
    }
    try:
        answers["log_prob"] = {"log_prob": predict.log_prob(x, y)}
    except ValueError:  # a calibration of the whole prediction has none
        assert vbdl.calibration.CalibratedLikelihood is type(predict.likelihood)
    return answers


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for method, fields in expected.items():
        assert found[method].keys() == fields.keys()
        for name, t in fields.items():
            torch.testing.assert_close(found[method][name], t, **CLOSE, msg=lambda m, at=(method, name): f"{at}: {m}")


each_posterior = pytest.mark.parametrize("posterior", POSTERIORS)
first = next(iter(LIKELIHOODS))
each_likelihood = pytest.mark.parametrize(
    "likelihood", [pytest.param(name, marks=() if name == first else pytest.mark.slow) for name in LIKELIHOODS]
)


@each_likelihood
@each_posterior
def test_every_method_answers_while_a_trace_is_inside_the_forward(posterior, likelihood, monkeypatch, traced_only):
    q, noise = pair(posterior, likelihood)
    x, y = inputs()
    settings = {"n_samples": q.n_draws or SAMPLES, "tiles": 20, "joint": True}
    expected = numbers(vbdl.Predictor(q, noise, compile=False, **settings), x, y)
    predict = vbdl.Predictor(q, noise, compile="background", **settings)
    stop = Stop(monkeypatch, lambda thread: thread.ident == background._worker.ident)
    try:
        predict(x)  # begins the trace
        assert stop.inside.wait(WAIT)
        assert_same(numbers(predict, x, y), expected)
    finally:
        stop.resume()
    predict.wait()
    assert_same(numbers(predict, x, y), expected)


@each_likelihood
@each_posterior
def test_a_first_batch_of_another_shape_disturbs_no_other_thread(posterior, likelihood, monkeypatch, traced_only):
    q, noise = pair(posterior, likelihood)
    x, y = inputs()
    settings = {
        "n_samples": q.n_draws or SAMPLES,
        "tiles": (8, 20),
        "joint": True,
        "memory_budget": 1 << 16,
        "chunk_size": 2,
    }
    expected = numbers(vbdl.Predictor(q, noise, compile=False, **settings), x, y)
    predict = vbdl.Predictor(q, noise, compile=True, **settings)
    predict(x, samples=True)
    predict(x, tolerance=1e-9)
    other: list = []
    thread = threading.Thread(target=lambda: other.append(predict(x[:8])))
    stop = Stop(monkeypatch, lambda current: current is thread)
    thread.start()
    try:
        assert stop.inside.wait(WAIT)
        answers = {
            "predict": {"mean": predict(x).mean},
            "samples": {"samples": predict(x, samples=True).samples},
            "tolerance": {"mean": predict(x, tolerance=1e-9).mean},
            "noise": {name: p.detach() for name, p in predict.likelihood.named_parameters()},
            "state": dict(predict.posterior.state_dict()),
        }
        assert_same(answers, {name: {k: expected[name][k] for k in fields} for name, fields in answers.items()})
    finally:
        stop.resume()
        thread.join()
    torch.testing.assert_close(other[0].mean, expected["predict"]["mean"][:8], **CLOSE)


class Draws(nn.Linear):
    """Draws from torch's generator itself, or lets another thread draw meanwhile."""

    def __init__(self, draws):
        super().__init__(4, 3)
        self.draws = draws

    def forward(self, x):
        return self.draws(super().forward(x))


def beside(x):
    """Another thread draws, as a data loader or another request does."""
    other = threading.Thread(target=torch.rand, args=(1,))
    other.start()
    other.join()
    return x


CALLS = itertools.count()


def beside_by_others(x):
    """Another thread draws from Python's generator, and from NumPy's in every fourth run: never in two of three."""
    other = threading.Thread(target=lambda: (random.random(), np.random.rand() if next(CALLS) % 4 == 0 else 0))
    other.start()
    other.join()
    return x


def attention(x):
    x = beside(x)[:, None, None]
    return F.scaled_dot_product_attention(x, x, x)[:, 0, 0]


@pytest.mark.parametrize(
    "innocent", [beside, beside_by_others, attention, lambda x: F.rrelu(F.dropout(beside(x), training=False))]
)
def test_what_another_thread_draws_is_not_the_networks(innocent):
    expected = Draws(innocent).eval()
    q = vbdl.DeepEnsemble([Draws(innocent).eval(), expected])
    for compile in (False, True):
        predict = vbdl.Predictor(q, vbdl.Categorical(), compile=compile)
        x = torch.randn(2, 4)
        torch.testing.assert_close(predict(x, samples=True).samples[1], expected(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "drawn", [lambda x: x + torch.randn_like(x), lambda x: F.dropout(beside(x), 0.5), lambda x: x * torch.rand(())]
)
def test_a_network_that_draws_is_refused(drawn):
    q = vbdl.DeepEnsemble([Draws(drawn).eval() for _ in range(2)])
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="draws from torch's generator"):
        vbdl.Predictor(q, vbdl.Categorical(), compile=False)(torch.ones(2, 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "drawn, generator",
    [
        (lambda x: x if random.random() < 0.9 else -x, "Python's random"),
        (lambda x: x + random.gauss(0, 1), "Python's random"),
        (lambda x: x[:, torch.tensor(random.sample(range(3), 3))], "Python's random"),
        (lambda x: x * float(np.random.rand()), "NumPy's random"),
        (lambda x: x if np.random.randint(10) else -x, "NumPy's random"),
    ],
)
@pytest.mark.parametrize("make", [lambda f: vbdl.DeepEnsemble([Draws(f).eval() for _ in range(2)]), "dropout"])
def test_a_network_that_draws_by_python_or_numpy_is_refused(make, drawn, generator):
    dropping = lambda: vbdl.MCDropout(nn.Sequential(nn.Dropout(0.5), Draws(drawn)))
    q = dropping() if make == "dropout" else make(drawn)
    with pytest.raises(ValueError, match=f"draws from {generator}"):
        vbdl.Predictor(q, vbdl.Categorical(), compile=False)(torch.ones(2, 4))


def test_numpys_generator_may_be_another_one():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        net = nn.Linear(4, 3)
        predict = vbdl.Predictor(vbdl.DeepEnsemble([net, net]), vbdl.Categorical(), compile=False)
        torch.testing.assert_close(predict(torch.ones(2, 4)).probs, net(torch.ones(2, 4)).softmax(-1))
        with pytest.raises(ValueError, match="draws from NumPy's random"):
            drawn = Draws(lambda x: x * float(np.random.rand())).eval()
            vbdl.Predictor(vbdl.DeepEnsemble([drawn, drawn]), vbdl.Categorical(), compile=False)(torch.ones(2, 4))
    finally:
        np.random.set_bit_generator(before)


def test_a_network_that_draws_by_python_is_refused_under_a_profiler():
    drawn = Draws(lambda x: x * random.random()).eval()
    predict = vbdl.Predictor(vbdl.DeepEnsemble([drawn, drawn]), vbdl.Categorical(), compile=False)
    profile = cProfile.Profile()
    with pytest.raises(ValueError, match="draws from Python's random"):
        profile.runcall(predict, torch.ones(2, 4))
