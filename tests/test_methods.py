"""One table of methods: an entry more in it is a method more everywhere."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from torch import nn

import vbdl
from vbdl.bench import Run, registry, scaling
from vbdl.bench.source import Source
from vbdl.bench.task import Stacked
from vbdl.cli import main
from vbdl.methods import METHODS, Method, method_of
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
