"""What travels with a predictor, what a network needs to be made again, and how a folder is written."""

import ctypes
import json
import os
import signal

import pytest
import torch
from torch import nn

import vbdl
from vbdl import calibration
from vbdl.artifact import ArtifactError, files, read
from vbdl.decision import AnomalyFlags, ExpectedCost


class Own(nn.Module):
    """A network that torch.nn does not know, with a setting that no tensor shows and two names for one parameter."""

    def __init__(self, width: int = 6, slope: float = 0.1, inputs: int = 4):
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, width)
        self.third = nn.Linear(width, width)
        self.third.weight = self.second.weight
        self.slope, self.drop = slope, nn.Dropout(0.3)

    def forward(self, x):
        h = self.second(nn.functional.leaky_relu(self.first(x), self.slope))
        return self.third(self.drop(h))[:, :3]


def make_own(width: int = 6, slope: float = 0.1) -> nn.Module:
    return Own(width, slope)


def net(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, classes))


def rows(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(2))


def predictor(q=None, likelihood=None, **settings) -> vbdl.Predictor:
    settings = {"compile": False, **({"n_samples": 4} if q is None or q.n_draws is None else {}), **settings}
    return vbdl.Predictor(q or vbdl.MCDropout(net()), likelihood or vbdl.Categorical(), **settings)


def assert_same(a: vbdl.Predictor, b: vbdl.Predictor, x=None) -> None:
    x = rows() if x is None else x
    p, q = vars(a(x)), vars(b(x))
    assert p.keys() == q.keys()
    for name, value in p.items():
        assert torch.equal(value, q[name]) if isinstance(value, torch.Tensor) else value == q[name], name


# -- likelihoods, calibration, decisions


@pytest.mark.parametrize(
    "method",
    [
        calibration.Temperature(),
        calibration.VectorScaling(),
        calibration.EnsembleTemperature(),
        calibration.Histogram(5),
        calibration.Isotonic(),
        calibration.BBQ(),
        calibration.Beta(),
        calibration.ConformalSets(0.2, calibration.RAPS(0.02, 1), per_class=True),
    ],
    ids=lambda m: type(m).__name__,
)
def test_calibration_and_decision_travel(method, tmp_path):
    y = torch.randint(3, (40,), generator=torch.Generator().manual_seed(3))
    calibrated = vbdl.calibrate(predictor(), (rows(), y), method)
    decided = vbdl.with_decision(calibrated, ExpectedCost(1 - torch.eye(3), 0.4))
    for predict in (calibrated, decided):
        loaded = vbdl.load(predict.save(tmp_path / type(predict.likelihood).__name__))
        assert_same(loaded, predict)
        assert str(loaded.likelihood) == str(predict.likelihood)


@pytest.mark.parametrize(
    "likelihood, outputs",
    [
        (vbdl.Categorical(), 3),
        (vbdl.Bernoulli(), 1),
        (vbdl.Gaussian(2, std=0.3, covariance=True), 2),
        (vbdl.Gaussian(1, std=0.3, learned=False), 1),
        (vbdl.HeteroscedasticGaussian(beta=0.5), 4),
        (vbdl.HeteroscedasticGaussian(beta=0.5, unit=250.0), 4),
    ],
    ids=lambda v: str(v),
)
def test_every_likelihood_and_flags(likelihood, outputs, tmp_path):
    predict = predictor(vbdl.MCDropout(net(outputs)), likelihood)
    if outputs != 2 and outputs != 4:  # flags take one number a row
        flags = AnomalyFlags(false_alarms=0.1).fit(predict(rows()).epistemic.flatten())
        predict = vbdl.with_decision(predict, flags) if outputs == 3 else predict
    assert_same(vbdl.load(predict.save(tmp_path / "model")), predict)


def test_a_noise_level_for_each_member(tmp_path):
    y = rows()[:, :1]
    likelihood = vbdl.Gaussian()
    q = vbdl.DeepEnsemble([net(1) for _ in range(3)])
    vbdl.fit(q, (rows(), y), likelihood, epochs=1, batch_size=20)
    assert likelihood.log_std.shape == (3, 1)
    predict = vbdl.Predictor(q, likelihood, compile=False)
    assert_same(vbdl.load(predict.save(tmp_path / "model")), predict)


@pytest.mark.parametrize("members", ["one architecture", "two architectures"])
def test_rows_of_the_training_are_still_refused(members, tmp_path):
    """Also for an ensemble of several architectures, and what was allowed all the same is recorded."""
    nets = [net(), net()] if members == "one architecture" else [net(), nn.Sequential(net())]
    q, y = vbdl.DeepEnsemble(nets), torch.randint(3, (40,), generator=torch.Generator().manual_seed(3))
    vbdl.fit(q, (rows(), y), vbdl.Categorical(), epochs=1)
    loaded = vbdl.load(predictor(q).save(tmp_path / "model"))
    assert loaded.manifest.training_rows == 40
    fresh = rows(60)[40:]
    with pytest.raises(ValueError, match="1 of 21 calibration rows were trained on"):
        vbdl.calibrate(
            loaded, (torch.cat((fresh, rows()[:1])), torch.zeros(21, dtype=torch.int64)), calibration.Temperature()
        )
    overlap = vbdl.calibrate(loaded, (rows(), y), calibration.Temperature(), allow_overlap=True)
    again = vbdl.load(overlap.save(tmp_path / "overlap"))
    assert int(again.likelihood.n_overlap) == 40 and again.manifest.training_rows == 40
    with pytest.raises(ValueError, match="40 of 40"):
        vbdl.calibrate(again, (rows(), y), calibration.Temperature())
    assert "calibrating on them is refused" in (tmp_path / "overlap" / "README.md").read_text()


# -- networks


def test_a_network_of_ones_own_by_reference(tmp_path):
    predict = predictor(vbdl.MCDropout(make_own(7, 0.2)))
    target = f"{__name__}:make_own"
    folder = predict.save(tmp_path / "model", architecture=target, arguments={"width": 7, "slope": 0.2})
    with pytest.raises(ArtifactError, match="trust="):
        vbdl.load(folder)
    with pytest.raises(ArtifactError, match="trust="):
        vbdl.load(folder, trust=(__name__[:-1],))
    with pytest.raises(TypeError, match="sequence"):
        vbdl.load(folder, trust=__name__)
    assert_same(vbdl.load(folder, trust=(__name__,)), predict)
    assert_same(vbdl.load(folder, module=make_own(7, 0.2)), predict)
    with pytest.raises(ValueError, match="slope is 0.1 and was 0.2"):
        predict.save(tmp_path / "other", architecture=target, arguments={"width": 7})
    with pytest.raises(ValueError, match="cannot be imported"):
        predict.save(tmp_path / "other", architecture=f"{__name__}:nothing")
    with pytest.raises(TypeError, match='"module:name" of a function or class that returns the network, got <class'):
        predict.save(tmp_path / "other", architecture=Own)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("posterior", ["dropout", "mean-field", "ensemble", "ensemble of mean-field"])
def test_a_network_of_ones_own_to_be_given(posterior, tmp_path):
    """One parameter under two names stays one: the weights drawn for it are put in both places."""
    q = {
        "dropout": lambda: vbdl.MCDropout(Own()),
        "mean-field": lambda: vbdl.MeanField(Own(), 20),
        "ensemble": lambda: vbdl.DeepEnsemble([Own(), Own()]),
        "ensemble of mean-field": lambda: vbdl.DeepEnsemble([vbdl.MeanField(Own(), 20) for _ in range(2)]),
    }[posterior]()
    predict = predictor(q)
    folder = predict.save(tmp_path / "model")
    assert_same(vbdl.load(folder, module=Own()), predict)
    with pytest.raises(ArtifactError, match="load\\(folder, module=...\\)"):
        vbdl.load(folder)
    with pytest.raises(ArtifactError, match="out_features is 5 and was 6"):
        vbdl.load(folder, module=Own(width=5))
    with pytest.raises(ArtifactError, match="slope is 0.3 and was 0.1"):
        vbdl.load(folder, module=Own(slope=0.3))
    with pytest.raises(ArtifactError, match="is Sequential and was Own"):
        vbdl.load(folder, module=nn.Sequential(Own()))


def test_one_network_described_and_one_given(tmp_path):
    q = vbdl.DeepEnsemble([net(), net(), Own()])
    folder = predictor(q).save(tmp_path / "model", architecture=[None, f"{__name__}:Own"], arguments=[{}, {"width": 6}])
    assert_same(vbdl.load(folder, trust=(__name__,)), predictor(q))
    with pytest.raises(ValueError, match="2 architectures, but architecture= has 1 entries"):
        predictor(q).save(tmp_path / "other", architecture=f"{__name__}:Own")


def test_layers_that_share_a_parameter_or_are_drawn(tmp_path):
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Dropout(0.2))
    tied[2].weight = tied[0].weight
    bayesian = nn.Sequential(
        vbdl.BayesianLinear(4, 8, prior=0.3),
        nn.ReLU(),
        vbdl.BayesianLinear(8, 3, False, prior=vbdl.ScaleMixture()),
    )
    for q in (
        vbdl.MCDropout(tied),
        vbdl.MeanField(tied, 20),
        vbdl.MeanField(bayesian, 20),
        vbdl.DeepEnsemble([vbdl.MeanField(bayesian, 20) for _ in range(2)]),
        vbdl.DeepEnsemble([tied.double(), tied]),
    ):
        predict = predictor(q)
        x = rows().to(next(p.dtype for p in q.parameters() if p.is_floating_point()))
        folder = predict.save(tmp_path / str(id(q)))
        assert json.loads((folder / "manifest.json").read_text())["posterior"]["type"] in (
            "MCDropout",
            "MeanField",
            "DeepEnsemble",
        )
        assert_same(vbdl.load(folder), predict, x)


def test_a_layer_that_was_tampered_with_does_not_describe_itself(tmp_path):
    """A hook, or a setting changed after construction that a fresh layer would not have, is no torch.nn layer."""
    hooked, changed = net(), net()
    hooked[0].register_forward_hook(lambda module, args, out: out * 2)
    changed[0].note = "mine"
    for network in (hooked, changed):
        folder = predictor(vbdl.MCDropout(network)).save(tmp_path / str(id(network)))
        with pytest.raises(ArtifactError, match="does not describe"):
            vbdl.load(folder)


# -- settings, schema, extras


def test_settings_travel_and_can_be_changed(tmp_path):
    q = vbdl.MeanField(net(), 20)
    predict = predictor(
        q, n_samples=3, seed=-5, tiles=(1, 64), memory_budget=2**24, chunk_size=2, autocast=torch.bfloat16, joint=True
    )
    loaded = vbdl.load(predict.save(tmp_path / "model"))
    assert (loaded.n_samples, loaded.seed, loaded.tiles, loaded.settings) == (3, -5, (1, 64), predict.settings)
    other = vbdl.load(tmp_path / "model", n_samples=7, seed=1, autocast=None)
    assert (other.n_samples, other.seed, other.settings.autocast) == (7, 1, None)
    assert_same(other, predict.replace(n_samples=7, seed=1, autocast=None))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out, self.drop = nn.Embedding(9, 4), nn.Linear(8, 3), nn.Dropout(0.4)

    def forward(self, code, x):
        return self.out(self.drop(torch.cat((self.table(code), x), dim=1)))


def test_what_rows_look_like(tmp_path):
    predict = predictor()
    assert read(predict.save(tmp_path / "nothing")).inputs is None
    example = predict.save(tmp_path / "example", example=rows(1))
    one = {"layout": "tensor", "tensors": [{"name": None, "dtype": "F32", "shape": [4]}]}
    assert json.loads((example / "manifest.json").read_text())["inputs"] == one
    predict(rows())
    assert read(predict.save(tmp_path / "predicted")).inputs == read(example).inputs
    loaded = vbdl.load(example)
    assert read(loaded.save(tmp_path / "again")).inputs == read(example).inputs
    two = predictor(vbdl.MCDropout(Two()))
    code = torch.arange(5)
    two({"x": rows(5), "code": code})
    found = read(two.save(tmp_path / "two")).inputs
    assert found.layout == "keyword" and [(t.name, t.dtype, t.shape) for t in found.tensors] == [
        ("x", "F32", [4]),
        ("code", "I64", []),
    ]
    assert read(two.save(tmp_path / "by place", example=(code, rows(5)))).inputs.layout == "positional"


def test_metrics_in_groups_are_a_line_each(tmp_path):
    scores = {"accuracy": {"unit": "share of rows", "value": 0.65, "lower": 0.48, "upper": 0.79}, "loss": None}
    folder = predictor().save(tmp_path / "model", metrics={"rows": 40, "test": scores})
    text = (folder / "README.md").read_text()
    for line in ("| rows | 40 |", "| test accuracy | 0.65 [0.48, 0.79] share of rows |", "| test loss | None |"):
        assert line in text


def test_extras_and_metrics(tmp_path):
    extras = {"columns": {"age": {"mean": 31.5, "kinds": ["a", "b|`c`"]}}, "target": "y\nz"}
    folder = predictor().save(tmp_path / "model", extras=extras, metrics={"accuracy": 0.912345678, "n": 5})
    assert vbdl.load(folder).manifest.extras == extras == read(folder).extras
    text = (folder / "README.md").read_text()
    assert "| accuracy | 0.912346 |" in text and "MC dropout" in text and "Categorical" in text
    for bad in ({"x": float("nan")}, {"x": (1, 2)}, {1: "x"}, {"x": torch.ones(1)}, {"x": "y" * 9_000_000}):
        with pytest.raises(ValueError, match="extras"):
            predictor().save(tmp_path / "bad", extras=bad)
    assert not (tmp_path / "bad").exists()


def test_what_cannot_be_saved_says_so(tmp_path):
    broken = vbdl.MCDropout(net())
    with torch.no_grad():
        broken.module.inner[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 36 values of posterior.module.inner.0.weight are not finite"):
        predictor(broken).save(tmp_path / "model")

    class Mine(nn.Module):
        def forward(self, prediction):
            return prediction.label

    with pytest.raises(ValueError, match="Mine cannot be stored because it is not registered"):
        vbdl.with_decision(predictor(), Mine()).save(tmp_path / "model")
    assert not os.listdir(tmp_path)


# -- the folder


def test_a_folder_is_not_overwritten_unasked(tmp_path):
    predict = predictor()
    folder = predict.save(tmp_path / "model")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        predict.replace(seed=9).save(folder)
    predict.replace(seed=9).save(folder, overwrite=True)
    assert vbdl.load(folder).seed == 9
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="thesis.txt"):
        predict.save(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(FileExistsError):
        predict.save(tmp_path / "link", overwrite=True)
    (tmp_path / "empty").mkdir()
    assert_same(vbdl.load(predict.save(tmp_path / "empty")), predict)
    assert sorted(os.listdir(tmp_path)) == ["empty", "link", "mine", "model"]


@pytest.fixture(params=["in one step", "by two renames"])
def replacing(request, monkeypatch):
    """Both ways to replace an artifact; the second is that of file systems that cannot exchange."""
    if request.param == "by two renames":
        monkeypatch.setattr(files, "_exchanged", lambda a, b: False)
    elif not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("needs a file system that can exchange two folders in one step")
    return request.param


@pytest.mark.parametrize("step", ["mkdir", "open", "fsync", "exchange", "rename", "second rename"])
def test_a_full_disk_while_writing_leaves_the_old_or_nothing(step, tmp_path, monkeypatch):
    predict = predictor()
    folder = predict.save(tmp_path / "model")
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if step == "second rename" and len(calls) != 2:  # the first moves the old one away, the third back
            return real(*args, **kwargs)
        raise OSError(28, "No space left on device")

    real = os.rename
    if "rename" in step:
        monkeypatch.setattr(files, "_exchanged", lambda a, b: False)
    place = {"mkdir": "pathlib.Path.mkdir", "fsync": "os.fsync"}.get(step, "os.rename")
    if step in ("open", "exchange"):
        monkeypatch.setattr(files, "open" if step == "open" else "_exchanged", fail, raising=False)
    else:
        monkeypatch.setattr(place, fail)
    for target, overwrite in ((folder, True), (tmp_path / "new", False)):
        calls.clear()
        if step in ("second rename", "exchange") and target != folder:
            continue
        with pytest.raises(OSError, match="No space left"):
            predict.replace(seed=9).save(target, overwrite=overwrite)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["model"]
    assert vbdl.load(folder).seed == 0


def test_a_kill_at_any_step_leaves_a_whole_artifact_at_the_name(replacing, tmp_path, monkeypatch):
    """A child replaces the artifact and is killed at its first step on the disk, at its second, and so on."""
    predict, seeds = predictor(), []
    for step in range(100):
        folder = tmp_path / str(step) / "model"
        predict.save(folder)
        child = os.fork()
        if child == 0:
            steps = []

            def counted(real, steps=steps, step=step):
                def call(*args, **kwargs):
                    if len(steps) == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    steps.append(real)
                    return real(*args, **kwargs)

                return call

            for place, name in ((os, "rename"), (os, "fsync"), (os, "rmdir"), (files, "_exchanged")):
                setattr(place, name, counted(getattr(place, name)))
            predict.replace(seed=1).save(folder, overwrite=True)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seeds.append(vbdl.load(folder).seed)
        predict.replace(seed=2).save(folder, overwrite=True)
        assert vbdl.load(folder).seed == 2
        left = [n for n in os.listdir(folder.parent) if not n.endswith(".partial")]  # those of a dead process
        assert left == ["model"]
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    # the old one until the step that replaces it, which is neither the first nor the last, then the new one
    assert len(seeds) >= 8 and seeds == sorted(seeds) and seeds.count(0) >= 5 and seeds.count(1) >= 3, seeds


def test_an_artifact_can_be_read_while_it_is_replaced(replacing, tmp_path):
    """Two artifacts of other weights take turns at a name: every reading gives one or the other, whole."""
    folder, x = tmp_path / "model", rows(5)
    one, two = predictor(seed=1), predictor(seed=2)
    expected = {1: one(x).probs, 2: two(x).probs}
    one.save(folder)
    writer = os.fork()
    if writer == 0:
        for turn in range(100_000):
            (two, one)[turn % 2].save(folder, overwrite=True)
    try:
        read = [vbdl.load(folder) for _ in range(40)]
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert {p.seed for p in read} == {1, 2}
    assert all(torch.equal(p(x).probs, expected[p.seed]) for p in read[-5:])


def test_a_sparse_buffer_is_named(tmp_path):
    class Adjacent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head = torch.nn.Dropout(0.2), torch.nn.Linear(4, 3)
            self.register_buffer("adjacency", torch.eye(4).to_sparse())

        def forward(self, x):
            return self.head(self.drop(torch.sparse.mm(self.adjacency, x.T).T))

    predict = vbdl.Predictor(vbdl.MCDropout(Adjacent()), vbdl.Categorical(), 4, compile=False)
    predict(torch.randn(6, 4))
    with pytest.raises(ValueError, match="nothing was saved: posterior.module.inner.adjacency is a sparse tensor"):
        predict.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
