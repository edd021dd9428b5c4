"""One table of methods: an entry more in it is a method more everywhere."""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from torch import nn

import vbdl
from vbdl import plugins
from vbdl.bench import Run, registry, scaling
from vbdl.bench.source import Source
from vbdl.bench.task import Stacked
from vbdl.cli import main
from vbdl.methods import METHODS, Method, add, method_of
from vbdl.recommendation import recommend


class HalfDropout(vbdl.MCDropout):
    """MC dropout at a rate of one half."""

    def __init__(self, module, seed=0):
        super().__init__(module, p=0.5, seed=seed)


registry.load_builtin()  # before a test puts dicts of its own in the place of those that this fills once

HALF = Method(
    name="half-dropout",
    module=__name__,
    class_name="HalfDropout",
    words="dropout of every second unit",
    when="a coin is at hand",
    arguments=("seed",),
    needs_dropout=True,
    training={"lr": 1e-2, "patience": 5},
)


@pytest.fixture
def half(monkeypatch):
    monkeypatch.setitem(METHODS, HALF.name, HALF)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 3, generator=generator)
    return x, (x[:, 0] > 0).long()


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))


@pytest.mark.parametrize("name", METHODS)
def test_an_entry_is_a_public_class_that_is_made_of_what_it_names(name):
    method = METHODS[name]
    assert getattr(vbdl, method.class_name) is method.load()
    q = method.make(_network(), n_data=120, n_members=2, seed=3, unknown=1)
    assert type(q) is method.load() and q.seed == 3
    assert (q.n_draws is not None) == method.has_fixed_draws


def test_old_names_work_and_warn_and_unknown_ones_are_refused(half):
    for old, name in (("dropout", "mc-dropout"), ("ensemble", "deep-ensemble")):
        with pytest.warns(DeprecationWarning, match=f"'{old}' is called '{name}' now"):
            assert method_of(old) is METHODS[name]
    known = "mc-dropout, mean-field, deep-ensemble, batch-ensemble, masksembles, swag, ivon, snapshots, deterministic"
    with pytest.raises(ValueError, match=f"no method 'magic': choose one of {known}, laplace, half-dropout"):
        method_of("magic")


def test_a_new_method_is_an_estimators(half, data):
    estimator = vbdl.VBDLClassifier(method="half-dropout", epochs=2, hidden=(8,), n_samples=4, random_state=0)
    estimator.fit(data[0].numpy(), data[1].numpy())
    assert type(estimator.posterior_) is HalfDropout and estimator.predictor_.n_samples == 4


def test_a_new_method_is_recommended_among_the_others(half, data):
    tried = recommend(_network(), data, budget=0.5)
    methods = [
        "MCDropout", "MeanField", "DeepEnsemble", "BatchEnsemble", "Masksembles", "SWAG", "IVON", "Snapshots",
        "Deterministic", "Laplace", "HalfDropout",
    ]  # fmt: skip
    assert [m.method for m in tried.table] == methods
    assert tried.table[-1].nll is not None and "HalfDropout" in str(tried)


def test_a_new_method_is_named_by_inspect(half):
    report = str(vbdl.inspect(_network()))
    assert "HalfDropout: a coin is at hand" in report and "MCDropout: the network has dropout" in report


def test_a_new_method_is_in_the_suite_and_the_scaling(half, monkeypatch):
    monkeypatch.setattr(registry, "DATASETS", dict(registry.DATASETS))
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    registry.load_builtin()
    assert registry.METHODS["half-dropout"].about == "dropout of every second unit, without a published protocol"
    task = registry.DATASETS["iris"].make(Source(None, False), "2016")
    run = Run(effort=0.02, n_samples=4, compile=False)
    trained = registry.METHODS["half-dropout"].make(task, run)
    posterior = trained.posterior.base if isinstance(trained, Stacked) else trained.predictors[0].posterior
    assert type(posterior) is HalfDropout
    assert ("seconds", "draws", 8, "half-dropout") in scaling.cells()
    assert ("seconds", "members", 8, "half-dropout") not in scaling.cells()


def test_a_new_method_is_an_option_of_the_command_line(half, tmp_path, capsys):
    random = np.random.default_rng(0)
    a = random.normal(size=200)
    pa.parquet.write_table(pa.table({"a": a, "kind": np.where(a > 0, "big", "small")}), tmp_path / "t.parquet")
    options = ["--width", "8", "--depth", "1", "--epochs", "2", "--no-figures", "--out", str(tmp_path / "m.vbdl")]
    main(["fit", str(tmp_path / "t.parquet"), "--target", "kind", "--method", "half-dropout", *options])
    assert "half-dropout: 2 epochs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    help_text = capsys.readouterr().out
    assert all(name in help_text for name in ("mc-dropout", "mean-field", "deep-ensemble"))


PLUGIN = """
import copy
import vbdl
from neighbor_of_plugin import SCALE
from vbdl_kernels import make_key, normal


@vbdl.register(name="shaken", words="a shaken network", when="a test", training={"lr": 1e-2})
class Shaken(vbdl.types.Posterior):
    def __init__(self, network, n_data=0, scale=SCALE):
        super().__init__()
        self.module, self.n_data, self.scale = copy.deepcopy(network), n_data, scale

    def config(self):
        return {"n_data": self.n_data, "scale": self.scale}

    def draws(self, numbers, seed):
        key, w = make_key(seed, numbers), self.module
        noise = lambda i, p: normal(key, i, 0, 1, p.numel()).view(-1, *p.shape)
        return {n: p + self.scale * noise(i, p) for i, (n, p) in enumerate(w.named_parameters())}

    def losses(self, x, y, likelihood, own_rows=False):
        return likelihood.training_loss(likelihood(self.module(x)), y).mean().reshape(1)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A file with a method, beside one that it imports, which the process does not find by itself."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "plugin_shaken.py").write_text(PLUGIN)
    (folder / "neighbor_of_plugin.py").write_text("SCALE = 0.1")
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr(plugins, "_LOADED", {})
    tables = [(table, dict(table)) for table in (METHODS, registry.METHODS)]
    yield folder / "plugin_shaken.py"
    for table, before in tables:
        table.clear()
        table.update(before)
    for name in ("plugin_shaken", "neighbor_of_plugin"):
        sys.modules.pop(name, None)


def test_commands_take_a_method_from_a_plugin(plugin, data, tmp_path, capsys):
    x, y = data
    table = tmp_path / "rows.csv"
    rows = [f"{a:.4f},{b:.4f},{'yes' if t else 'no'}" for (a, b, _), t in zip(x.tolist(), y.tolist(), strict=True)]
    table.write_text("\n".join(["a,b,target", *rows]))
    usual = ["--target", "target"]
    out = str(tmp_path / "model.vbdl")
    with pytest.raises(SystemExit):
        main(["fit", str(table), *usual, "--method", "shaken", "--out", out])
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "--plugin" in said and "@vbdl.register(name='shaken')" in said
    options = ["--method", "shaken", "--plugin", str(plugin), "--no-figures", "--epochs", "3", "--width", "8"]
    assert main(["fit", str(table), *usual, *options, "--out", out]) == 0
    assert "shaken: 3 epochs" in capsys.readouterr().out
    assert type(vbdl.load(out, trust=("plugin_shaken",)).posterior).__name__ == "Shaken"
    assert main(["recommend", str(table), *usual, "--budget", "2", "--width", "8", "--plugin", str(plugin)]) == 0
    assert "Shaken " in capsys.readouterr().out
    x, y = x.numpy(), y.numpy()
    assert vbdl.VBDLClassifier(method="shaken", epochs=3).fit(x, y).score(x, y) > 0.3
    folder = tmp_path / "results"
    bench = [
        "bench",
        "--sets",
        "diabetes",
        "--methods",
        "shaken",
        "--plugin",
        str(plugin),
        "--effort",
        "0.02",
        "--splits",
        "1",
    ]
    assert main([*bench, "--out", str(folder)]) == 0


def test_what_cannot_be_a_plugin_is_said(plugin, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        plugins.load(tmp_path / "none.py")
    for name, said in (("not a name.py", "not a Python file that can be"), ("json.py", "rename the file")):
        (tmp_path / name).write_text("raise AssertionError")
        with pytest.raises(ValueError, match=said):
            plugins.load(tmp_path / name)
    plugins.load(plugin)
    plugins.load(plugin)  # once is enough
    assert METHODS["shaken"].arguments == ("n_data",) and METHODS["shaken"].training == {"lr": 1e-2}


def test_names_of_methods_that_are_refused():
    for name, said in (("a b", "letters, digits"), ("dropout", "use another name"), ("swag", "use another name")):
        with pytest.raises(ValueError, match=said):
            add(HalfDropout, name)
    with pytest.raises(TypeError, match="name= is for methods"):
        vbdl.register(name="likelihood")(vbdl.Gaussian)
    with pytest.raises(TypeError, match="register takes a class, or name="):
        vbdl.register()
