"""Methods of one's own: a posterior of each sort and a likelihood, made of `vbdl.types` alone, keep every promise.

Nothing in vbdl knows their names. Each posterior passes the whole contract suite, and is trained, resumed, saved,
exported, calibrated, served, compared and shared out like those of vbdl. The table of methods gets one line for it.
"""

import copy
import functools
import importlib.util
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from vbdl_kernels import make_key, normal

import vbdl
from vbdl.bench import registry
from vbdl.bench.runner import Suite, SuiteSettings
from vbdl.bench.source import Source
from vbdl.bench.stacked import stacked_parameters
from vbdl.cli import main
from vbdl.distributed import _Share
from vbdl.methods import METHODS, Method
from vbdl.serve.model import Model as Served
from vbdl.types import Likelihood, Posterior, Prediction, State

N, FEATURES, CLASSES, MEMBERS, SAMPLES = 60, 11, 5, 3, 7


# -- posteriors, a sort each


class NoisyOutputs(nn.Module):
    """Outputs times 1 + scale * noise, drawn from the key."""

    def __init__(self, inner: nn.Module, scale: float):
        super().__init__()
        self.inner, self.log_scale = inner, nn.Parameter(torch.tensor(math.log(scale)))
        self.register_buffer("key", torch.zeros(2, dtype=torch.int64), persistent=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs = self.inner(*inputs)
        noise = normal(self.key.to(outputs.device), 0, 0, 1, outputs.shape[-1]).squeeze(0)
        return outputs * (1 + self.log_scale.exp() * noise.to(outputs.dtype))


@vbdl.register
class DrawnInside(Posterior):
    """Draws by key inside the module."""

    steps: Tensor

    def __init__(self, network: nn.Module, scale: float = 0.5):
        super().__init__()
        self.module, self.scale = NoisyOutputs(copy.deepcopy(network), scale), scale
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def user_network(self) -> nn.Module:
        return self.module.inner

    def config(self) -> dict:
        return {"scale": self.scale}

    def draws(self, numbers: Tensor, seed: int) -> State:
        return {"key": make_key(seed, numbers)}

    def losses(self, x, y, likelihood, own_rows=False) -> Tensor:
        key = make_key(1 << 62, self.steps.reshape(1))[0]
        self.steps += 1
        outputs = functional_call(self.module, {"key": key}, (x,))
        return likelihood.training_loss(likelihood(outputs), y).mean().reshape(1)


@vbdl.register
class DrawnWeights(Posterior):
    """Entries made in `draws`: normals about the weights' mean over epochs, as in SWAG (Maddox et al., 2019).

    Its noise is drawn from the seed outside the network, so that a package of another seed cannot be exported.
    """

    epochs: Tensor

    def __init__(self, network: nn.Module, initial_std: float = 0.1):
        super().__init__()
        self.module, self.initial_std = copy.deepcopy(network), initial_std
        for index, p in enumerate(self.module.parameters()):
            self.register_buffer(f"mean_{index}", p.detach().clone())
            self.register_buffer(f"variance_{index}", torch.full_like(p, initial_std**2, requires_grad=False))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        self.rows_seen = 0

    def config(self) -> dict:
        return {"initial_std": self.initial_std}

    def draws(self, numbers: Tensor, seed: int) -> State:
        entries = {}
        for index, (name, p) in enumerate(self.module.named_parameters()):
            mean, variance = self.get_buffer(f"mean_{index}"), self.get_buffer(f"variance_{index}")
            noise = normal(make_key(seed, numbers).to(p.device), index, 0, 1, p.numel())
            entries[name] = mean + variance.sqrt() * noise.view(-1, *p.shape).to(p.dtype)
        return entries

    def losses(self, x, y, likelihood, own_rows=False) -> Tensor:
        return likelihood.training_loss(likelihood(self.module(x)), y).mean().reshape(1)

    @torch.no_grad()
    def after_epoch(self, epoch: int) -> None:
        self.epochs += 1
        for index, p in enumerate(self.module.parameters()):
            mean = self.get_buffer(f"mean_{index}")
            mean += (p - mean) / self.epochs

    def after_training(self, model, data) -> None:
        for x, y in data:
            assert model(x).shape[0] == len(y) and not self.training
            self.rows_seen += len(y)


def _stacked_losses(q: Posterior, entries: State, x, y, likelihood, own_rows: bool) -> Tensor:
    """(members,) each member's loss, one member after the other."""
    losses = []
    for m in range(q.n_members):
        own_x, own_y = (x[m], y[m]) if own_rows else (x, y)
        outputs = functional_call(q.module, {name: t[m] for name, t in entries.items()}, (own_x,))
        noise = {} if likelihood.n_members is None else {n: p[m] for n, p in likelihood.named_parameters()}
        parameters = functional_call(likelihood, noise, (outputs,))
        losses.append(likelihood.training_loss(parameters, own_y).mean())
    return torch.stack(losses)


@vbdl.register
class Members(Posterior):
    """Members: networks that start apart, all of whose entries are their own."""

    def __init__(self, network: nn.Module, n_members: int = MEMBERS):
        super().__init__()
        self.module = copy.deepcopy(network).requires_grad_(False)  # structure; the tensors used are the members'
        self.n_members = self.n_draws = n_members
        self._trained = [name for name, _ in network.named_parameters()]
        self._kept = [name for name, _ in network.named_buffers()]
        generator = torch.Generator().manual_seed(0)
        for index, p in enumerate(network.parameters()):
            noise = torch.randn(n_members, *p.shape, generator=generator)
            setattr(self, f"own_{index}", nn.Parameter(p.detach() + 0.3 * p.detach().abs().mean() * noise))
        for index, b in enumerate(network.buffers()):
            self.register_buffer(f"own_buffer_{index}", torch.stack([b] * n_members))

    def config(self) -> dict:
        return {"n_members": self.n_members}

    @property
    def by_member(self) -> frozenset[str]:
        return frozenset(name for name in (*self._parameters, *self._buffers) if name.startswith("own_"))

    def stacked(self) -> State:
        trained = {name: self.get_parameter(f"own_{i}") for i, name in enumerate(self._trained)}
        return trained | {name: self.get_buffer(f"own_buffer_{i}") for i, name in enumerate(self._kept)}

    def draws(self, numbers: Tensor, seed: int) -> State:
        which = numbers % self.n_members
        return {name: t.index_select(0, which.to(t.device)) for name, t in self.stacked().items()}

    def losses(self, x, y, likelihood, own_rows=False) -> Tensor:
        return _stacked_losses(self, self.stacked(), x, y, likelihood, own_rows)


class ScaledOutputs(nn.Module):
    """Outputs times a scale each."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.register_buffer("scale", torch.ones(()))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs) * self.scale


@vbdl.register
class SharedWeights(Posterior):
    """Members that share weights: each scales the outputs of one network, as in BatchEnsemble (Wen et al., 2020)."""

    def __init__(self, network: nn.Module, scales: list[float] = (0.3, 1.0, 3.0)):  # type: ignore[assignment]
        super().__init__()
        self.module = ScaledOutputs(copy.deepcopy(network))
        self.n_members = self.n_draws = len(scales)
        self.scales = nn.Parameter(torch.tensor(scales))
        self._first = list(scales)

    @property
    def user_network(self) -> nn.Module:
        return self.module.inner

    def config(self) -> dict:
        return {"scales": self._first}

    @property
    def by_member(self) -> frozenset[str]:
        return frozenset({"scales"})

    def stacked(self) -> State:
        return {"scale": self.scales}

    def draws(self, numbers: Tensor, seed: int) -> State:
        return {"scale": self.scales[(numbers % self.n_members).to(self.scales.device)]}

    def losses(self, x, y, likelihood, own_rows=False) -> Tensor:
        return _stacked_losses(self, self.stacked(), x, y, likelihood, own_rows)


OWN = {
    "draws by key inside the module": DrawnInside,
    "entries made in draws": DrawnWeights,
    "members": Members,
    "members that share weights": SharedWeights,
}


# -- a likelihood


@dataclass(frozen=True, kw_only=True)
class LaplacePrediction(Prediction):
    """A mean and its variances in squared target units, (batch, outputs) each."""

    mean: Tensor

    @property
    def parameters_shape(self) -> tuple[int, ...]:
        return (*self.mean.shape, 2)

    @property
    def std(self) -> Tensor:
        return self.total.sqrt()


@vbdl.register
class LaplaceNoise(Likelihood):
    """y = output + noise, noise ~ Laplace(0, scale): a scale that each member learns, in a unit that all share."""

    unit: Tensor

    def __init__(self, n_outputs: int = 1, unit: float = 2.0):
        super().__init__()
        self.n_outputs = n_outputs
        self.log_scale = nn.Parameter(torch.zeros(n_outputs))
        self.register_buffer("unit", torch.tensor(unit))

    def forward(self, outputs: Tensor) -> Tensor:
        log_scale = (self.log_scale + self.unit.log()).to(outputs.dtype)
        return torch.stack((outputs, log_scale.expand_as(outputs)), dim=-1)

    def check_targets(self, y: Tensor, parameters_shape) -> Tensor:
        if tuple(y.shape) != tuple(parameters_shape[:-1]):
            raise ValueError(f"targets {tuple(y.shape)} do not fit outputs {tuple(parameters_shape[:-1])}")
        return y.float()

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        mean, log_scale = parameters.unbind(-1)
        return ((y - mean).abs() * (-log_scale).exp() + log_scale + math.log(2.0)).flatten(1).sum(1)

    def summarize(self, parameters: Tensor) -> State:
        mean, log_scale = parameters.unbind(-1)
        n = torch.full((), float(mean.shape[0]), dtype=mean.dtype, device=mean.device)
        center = mean.mean(0)
        variance = (2 * (2 * log_scale).exp()).mean(0)
        return {"n": n, "mean": center, "deviation": (mean - center).square().sum(0), "aleatoric": variance}

    def merge(self, a: State, b: State) -> State:
        n = a["n"] + b["n"]
        apart = b["mean"] - a["mean"]
        return {
            "n": n,
            "mean": a["mean"] + apart * b["n"] / n,
            "deviation": a["deviation"] + b["deviation"] + apart.square() * a["n"] * b["n"] / n,
            "aleatoric": (a["aleatoric"] * a["n"] + b["aleatoric"] * b["n"]) / n,
        }

    def finish(self, summary: State) -> State:
        epistemic = summary["deviation"] / summary["n"]
        return {
            "mean": summary["mean"],
            "total": summary["aleatoric"] + epistemic,
            "aleatoric": summary["aleatoric"],
            "epistemic": epistemic,
            "standard_error": (summary["deviation"] / (summary["n"] * (summary["n"] - 1))).sqrt(),
        }

    def prediction(self, fields: State, n_samples: int, samples: Tensor | None = None) -> LaplacePrediction:
        return LaplacePrediction(**fields, n_samples=n_samples, samples=samples)


# -- the contract suite, line by line


def _contract():
    """The contract suite, read for these posteriors in place of vbdl's."""
    path = Path(__file__).with_name("test_contract.py")
    spec = importlib.util.spec_from_file_location("contract_of_own_methods", path)
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    suite.POSTERIORS.clear()
    suite.POSTERIORS.update({name: lambda make, cls=cls: cls(make()) for name, cls in OWN.items()})
    del suite.NETWORKS["transformer, length first"]  # where the batch is in a network is no matter of the method
    return suite


def _lines(suite) -> dict:
    """Its tests of every posterior."""
    return {
        name: test
        for name, test in vars(suite).items()
        if any(mark.name == "parametrize" and "posterior" in mark.args[0] for mark in getattr(test, "pytestmark", ()))
    }


CONTRACT = _contract()
globals().update(_lines(CONTRACT))
each_posterior = pytest.mark.parametrize("posterior", OWN)


def test_the_whole_contract_is_taken():
    assert len(_lines(CONTRACT)) >= 18


@pytest.mark.parametrize("posterior", ["draws by key inside the module", "members that share weights"])
def test_compiling_changes_nothing(posterior):
    x = CONTRACT.inputs("mlp")
    CONTRACT.assert_same(CONTRACT.usual(posterior, "mlp", compile=True)(x), CONTRACT.usual(posterior, "mlp")(x))


# -- what else the library does with a method


def test_the_example_of_the_documentation_runs(data):
    text = textwrap.dedent(Posterior.__doc__.partition("\n\n")[2].partition("\n\n")[2])
    names = {"copy": copy, "make_key": make_key, "normal": normal, "Posterior": Posterior}
    exec(text, names)
    q, likelihood = names["Perturbed"](network()), vbdl.Gaussian(2)
    vbdl.fit(q, data, likelihood, epochs=2, compile=False)
    p = predicted(q, likelihood)(data[0])
    assert p.n_samples == SAMPLES and bool((p.epistemic > 0).all())


def network(outputs: int = 2) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, outputs))


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, FEATURES, generator=generator)
    return x, x[:, :2] + 0.1 * torch.randn(N, 2, generator=generator)


@pytest.fixture(scope="module")
def data():
    return rows()


LIKELIHOODS = {"gaussian": lambda: vbdl.Gaussian(2), "own": lambda: LaplaceNoise(2)}
each_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
# the two of one's own together; that a method of one's own takes a likelihood of vbdl, too, shows in
# test_training_lowers_the_loss, and its predictions of every kind in the contract
own_likelihood = pytest.mark.parametrize("likelihood", [pytest.param("gaussian", marks=pytest.mark.slow), "own"])


def fitted(posterior: str, likelihood: str, **options):
    """A posterior and a likelihood trained for six epochs, and the history."""
    q, noise = OWN[posterior](network()), LIKELIHOODS[likelihood]()
    settings = {"epochs": 6, "batch_size": 16, "lr": 1e-2, "validation": 0.2, "clip_norm": 1.0, "compile": False}
    history = vbdl.fit(q, rows(), noise, **{**settings, **options})
    return q, noise, history


usual = functools.cache(fitted)  # for tests that change neither


def predicted(q, noise, **settings) -> vbdl.Predictor:
    return vbdl.Predictor(q, noise, q.n_draws or SAMPLES, compile=False, **settings)


def assert_equal(a, b) -> None:
    for name in ("mean", "total", "aleatoric", "epistemic"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@each_posterior
@each_likelihood
def test_training_lowers_the_loss(posterior, likelihood, data):
    q, noise, history = fitted(posterior, likelihood, epochs=30)
    assert len(history.train_loss[0]) == q.n_members
    assert sum(history.validation_nll[-1]) < sum(history.validation_nll[0])
    assert noise.n_members == (q.n_members if q.by_member else None)
    assert q.training_rows is not None and not q.training
    p = predicted(q, noise)(data[0])
    assert p.mean.isfinite().all() and bool((p.epistemic > 0).all())


def test_members_train_apart_and_share_what_they_share():
    """A member's clipping and noise level are its own; the trunk is one."""
    q, noise, _ = usual("members that share weights", "own")
    assert noise.log_scale.shape == (3, 2) and noise.unit.shape == ()
    assert len(noise.log_scale.unique()) == 6
    assert not torch.equal(q.module.inner[0].weight, network()[0].weight)


def test_hooks_of_training_are_called():
    q, _, _ = usual("entries made in draws", "gaussian")
    assert int(q.epochs) == 6 and q.rows_seen == N - round(0.2 * N)
    assert not torch.equal(q.mean_0, network()[0].weight)


@each_posterior
@own_likelihood
def test_a_resumed_training_is_an_uninterrupted_one(posterior, likelihood, tmp_path):
    whole, noise, _ = usual(posterior, likelihood)
    path = tmp_path / "checkpoint"
    fitted(posterior, likelihood, epochs=3, checkpoint=path)
    resumed, own, history = fitted(posterior, likelihood, checkpoint=path)
    assert history.epochs == 6
    for a, b in ((whole, resumed), (noise, own)):
        for name, t in a.state_dict().items():
            assert torch.equal(t, b.state_dict()[name]), name


@each_posterior
@own_likelihood
def test_log_prob_and_streams(posterior, likelihood, data):
    q, noise, _ = usual(posterior, likelihood)
    predict = predicted(q, noise)
    kept = predict(data[0], samples=True).samples
    each = torch.stack([-noise.nll(parameters, data[1]) for parameters in kept])
    expected = torch.logsumexp(each, 0) - math.log(len(kept))
    torch.testing.assert_close(predict.log_prob(*data), expected)
    whole = predict(data[0]).mean
    torch.testing.assert_close(torch.cat([p.mean for p in predict.stream(data[0].split(7))]), whole)


@each_posterior
@own_likelihood
def test_draws_until_a_tolerance(posterior, likelihood, data):
    q, noise, _ = usual(posterior, likelihood)
    predict = predicted(q, noise)
    adaptive, whole = predict(data[0], tolerance=1e-9), predict(data[0])
    torch.testing.assert_close(adaptive.mean, whole.mean, rtol=1e-4, atol=1e-5)


@each_posterior
@own_likelihood
def test_a_likelihood_is_calibrated(posterior, likelihood, data):
    q, noise, _ = usual(posterior, likelihood)
    x = data[0] + 1.0
    before = predicted(q, noise)
    after = vbdl.calibrate(before, (x, data[1]), vbdl.calibration.AbsoluteIntervals(0.2))
    p = after(x)
    assert_equal(p, before(x))
    assert bool((p.lower < p.upper).all())
    with pytest.raises(ValueError, match="were trained on"):
        vbdl.calibrate(before, data, vbdl.calibration.AbsoluteIntervals(0.2))


@each_posterior
@own_likelihood
def test_draws_are_shared_out(posterior, likelihood, data):
    """Two shares of the draws, merged, are the whole."""
    q, noise, _ = usual(posterior, likelihood)
    whole = predicted(q, noise, joint=True, tiles=64)
    n, x = whole.n_samples, data[0]
    sums = None
    for start, stop in ((0, n // 2), (n // 2, n)):
        share = vbdl.Predictor(_Share(q, start, stop - start), noise, stop - start, compile=False, joint=True)
        kept = share(x, samples=True).samples
        added = noise.summarize(kept)
        sums = added if sums is None else noise.merge(sums, added)
    expected = whole(x)
    for name, t in noise.finish(sums).items():
        torch.testing.assert_close(t, getattr(expected, name), rtol=1e-4, atol=1e-5, msg=name)


# one that is exported, and the one that is not: the others differ in what the graph holds, which the contract traces
@each_posterior
@pytest.mark.slow_where(cell=lambda p: p["posterior"].startswith("members"))
def test_a_package_is_exported_or_refused_in_words(posterior, data, tmp_path):
    pytest.importorskip("onnxruntime")
    q, noise, _ = usual(posterior, "own")
    predict = predicted(q, noise, tiles=8)
    if posterior == "entries made in draws":
        with pytest.raises(ValueError, match="from the seed outside the network"):
            predict.export(tmp_path / "package", backend="onnx", example=data[0])
        return
    package = predict.export(tmp_path / "package", backend="onnx", example=data[0])
    torch.testing.assert_close(package(data[0])["mean"], predict(data[0]).mean, rtol=1e-4, atol=1e-4)


@each_posterior
def test_the_suite_compares_it(posterior, tmp_path, monkeypatch):
    """As a method of a plug-in file."""
    registry.load_builtin()
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))

    @registry.method("own")
    def own(task, run):
        """a method of one's own"""
        predictors = []
        for x, y in zip(task.x[:, : task.n_train], task.y[:, : task.n_train], strict=True):
            q, likelihood = OWN[posterior](task.network(0.0, len(task.classes))), vbdl.Categorical()
            vbdl.fit(q, (x, y), likelihood, epochs=2, seed=run.seed, compile=False)
            predictors.append(predicted(q, likelihood))
        return predictors

    (result,) = Suite(tmp_path, ("iris",), ("own",), Source(), SuiteSettings(), print, False, compile=False).run()
    assert "error" not in result and result["method"] == "own" and result["scores"]


@each_posterior
def test_members_of_all_splits_are_evaluated_in_one_call(posterior, data):
    q, noise, _ = usual(posterior, "gaussian")
    own = stacked_parameters(q, noise, data[0][None], SAMPLES, per_split=q.n_members)
    kept = predicted(q, noise, joint=True)(data[0], samples=True).samples
    torch.testing.assert_close(torch.cat(list(own))[: len(kept), 0], kept)


@each_posterior
def test_a_network_is_inspected_and_its_plan_explained(posterior):
    q = OWN[posterior](network())
    assert "Linear" in str(vbdl.inspect(q.user_network, torch.zeros(3, FEATURES)))
    assert "strategy" in predicted(q, vbdl.Gaussian(2)).explain(torch.zeros(3, FEATURES))


@each_posterior
@own_likelihood
def test_a_saved_predictor_predicts_the_same(posterior, likelihood, data, tmp_path):
    q, noise, _ = usual(posterior, likelihood)
    predict = predicted(q, noise)
    predict.save(tmp_path / "model", example=data[0])
    loaded = vbdl.load(tmp_path / "model")
    assert_equal(loaded(data[0]), predict(data[0]))
    with pytest.raises(ValueError, match="were trained on"):
        vbdl.calibrate(loaded, data, vbdl.calibration.AbsoluteIntervals(0.2))


@each_posterior
@own_likelihood
def test_a_saved_predictor_is_served(posterior, likelihood, data, tmp_path):
    q, noise, _ = usual(posterior, likelihood)
    predicted(q, noise, tiles=64).save(tmp_path / "model", example=data[0])
    served = Served(tmp_path / "model")
    served.warm_up()
    answer = served.answer(served.predictor(data[0]), {})["predictions"]
    assert len(answer) == N and {"mean", "total", "epistemic"} <= answer[0].keys()
    assert served.about()["method"]


@pytest.fixture
def in_the_table(request, monkeypatch):
    """The method of this test under the name "own" in the table of methods, its only line."""
    cls = OWN[request.getfixturevalue("posterior")]
    line = Method(
        name="own",
        module=__name__,
        class_name=cls.__name__,
        words="a method of one's own",
        when="nothing else will do",
        arguments=("n_members",) if cls is Members else (),
        dropout=0.0,
    )
    monkeypatch.setitem(METHODS, "own", line)
    return line


@each_posterior
def test_an_estimator_takes_it(posterior, in_the_table, data):
    x, y = data[0].numpy(), data[1][:, 0].numpy()
    model = vbdl.VBDLRegressor(method="own", n_members=MEMBERS, n_samples=3, hidden=(8,), epochs=2, random_state=0)
    assert model.fit(x, y).predict(x).shape == (N,)
    assert type(model.posterior_) is OWN[posterior]


@each_posterior
def test_it_is_recommended_and_inspected(posterior, in_the_table, data, monkeypatch):
    for name in [n for n in METHODS if n != "own"]:
        monkeypatch.delitem(METHODS, name)
    found = vbdl.recommend(network(), data, vbdl.Gaussian(2), budget=0.5)
    assert found.method == OWN[posterior].__name__ and found.table[0].note == ""
    assert f"{OWN[posterior].__name__}: nothing else will do" in str(vbdl.inspect(network()))


@each_posterior
def test_the_command_line_trains_and_predicts_with_it(posterior, in_the_table, tmp_path, monkeypatch, capsys):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 2, generator=generator)
    lines = [f"{a:.4f},{b:.4f},{a + b:.4f}" for a, b in x.tolist()]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,y", *lines]))
    monkeypatch.chdir(tmp_path)
    options = ["--epochs", "2", "--width", "8", "--samples", "3", "--members", "3"]
    assert main(["fit", "table.csv", "--target", "y", "--method", "own", *options]) == 0, capsys.readouterr()
    assert main(["predict", "model.vbdl", "table.csv", "out.csv"]) == 0, capsys.readouterr()
    assert len(Path("out.csv").read_text().splitlines()) == 121


def test_what_a_calibrator_needs_of_a_prediction_is_said(data):
    """A likelihood of one's own that is no mixture of normal distributions."""
    q, noise, _ = usual("entries made in draws", "own")
    predict, x = predicted(q, noise), torch.randn(40, FEATURES)
    rows = (x, x[:, :2])
    for method in (vbdl.StdScaling(), vbdl.calibration.CDFRecalibration()):
        with pytest.raises(NotImplementedError, match="LaplacePrediction is no mixture of normal .*AbsoluteIntervals"):
            vbdl.calibrate(predict, rows, method)
    assert vbdl.calibrate(predict, rows, vbdl.calibration.AbsoluteIntervals(0.1))(x).lower is not None
    p = predict(x, samples=True)
    for name, argument in (("interval", 0.9), ("quantile", 0.5), ("cdf", rows[1]), ("log_prob", rows[1])):
        with pytest.raises(NotImplementedError, match=f"LaplacePrediction has no .*; give it a method {name}"):
            getattr(p, name)(argument)


class WithoutMean(LaplaceNoise):
    def finish(self, summary: State) -> State:
        fields = super().finish(summary)
        return {"center" if name == "mean" else name: t for name, t in fields.items()}

    def prediction(self, fields: State, n_samples: int, samples: Tensor | None = None) -> LaplacePrediction:
        mean = fields["center"]
        fields = {name: t for name, t in fields.items() if name != "center"}
        return LaplacePrediction(mean=mean, **fields, n_samples=n_samples, samples=samples)


def test_intervals_say_that_they_need_a_mean(data):
    q = DrawnWeights(network())
    predict, x = predicted(q, WithoutMean(2)), torch.randn(40, FEATURES)
    calibrated = vbdl.calibrate(predict, (x, x[:, :2]), vbdl.calibration.AbsoluteIntervals(0.1))
    with pytest.raises(NotImplementedError, match="AbsoluteIntervals reads the mean of each row.*field `mean`"):
        calibrated(x)


def test_a_decision_reads_no_parameters_of_another_meaning(data):
    """log_scale is no log-variance: risk is that of the mean and the total variance, in the predictor and after it."""
    q, noise, _ = usual("entries made in draws", "own")
    predict, x = predicted(q, noise), data[0]
    risk = vbdl.decision.Risk(0.9)
    inside = vbdl.with_decision(predict, risk)(x).action
    assert torch.equal(torch.as_tensor(risk(predict(x, samples=True))["action"]), inside)


def test_explain_counts_drawn_weights():
    """Those that `draws` makes, and products of a single row, which are traced as a sum."""
    q = DrawnWeights(nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 2)))
    said = vbdl.Predictor(q, vbdl.Gaussian(2), compile=False, tiles=1).explain(torch.randn(1, FEATURES))
    assert f"draws          {(64 * FEATURES + 64 + 2 * 64 + 2) * 4 / 1024:.1f} KiB each" in said
    assert " 0 flop for each draw" not in said
    members = vbdl.Predictor(Members(network()), vbdl.Gaussian(2), compile=False)
    members(torch.randn(1, FEATURES))
    (execution,) = next(iter(members.executions.by_shape.values()))
    assert execution.traced.entry_bytes(execution.chunking(MEMBERS).cut) == 0  # members are held anyway


def test_moments_say_which_posteriors_they_are_for(data):
    predict = vbdl.Predictor(DrawnWeights(network()), vbdl.Gaussian(2), estimator="moments", compile=False)
    with pytest.raises(ValueError, match="DrawnWeights draws network.0.weight.* outside of it: use estimator='sampl"):
        predict(data[0])


def test_a_tolerance_says_that_it_needs_a_standard_error(data):
    class WithoutError(LaplaceNoise):
        def finish(self, summary: State) -> State:
            return {name: t for name, t in super().finish(summary).items() if name != "standard_error"}

    predict = vbdl.Predictor(DrawnWeights(network()), WithoutError(2), compile=False)
    with pytest.raises(NotImplementedError, match="a field `standard_error`"):
        predict(data[0], tolerance=0.1)


def test_an_ensemble_of_a_plain_posterior_names_what_it_takes():
    with pytest.raises(
        TypeError, match="got DrawnWeights: let its class inherit from vbdl.nn.objective.KeyedPosterior"
    ):
        vbdl.DeepEnsemble(DrawnWeights(network()), 3)


class Backwards(vbdl.DeepEnsemble):
    """An ensemble whose draws come in the opposite order."""

    def draws(self, numbers: Tensor, seed: int) -> State:
        return super().draws(self.n_members - 1 - numbers, seed)


@pytest.mark.parametrize("compile", [False, "background"])
@pytest.mark.parametrize("width", [4, 1024])  # members of small entries, and of entries that are made one by one
def test_a_subclass_that_defines_draws_alone_has_its_own_draws(width, compile):
    nets = [nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, CLASSES)) for _ in range(3)]
    predict, x = vbdl.Predictor(Backwards(nets), vbdl.Categorical(), compile=compile), torch.randn(2, FEATURES)
    for _ in range(2):
        found = predict(x, samples=True).samples
        torch.testing.assert_close(found, torch.stack([net(x) for net in reversed(nets)]), rtol=1e-4, atol=1e-5)
        predict.wait()
