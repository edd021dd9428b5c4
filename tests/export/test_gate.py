"""The gate refuses what an exporter gets wrong without a word, real ones included."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

import vbdl
from vbdl.export.gate import ExportError, check

SAMPLES = 6


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def dropout() -> vbdl.Predictor:
    torch.manual_seed(0)
    return vbdl.Predictor(vbdl.MCDropout(net()), vbdl.Categorical(), n_samples=SAMPLES, compile=False)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randn(20, 4, generator=torch.Generator().manual_seed(1))


def honest(predictor):
    seeded = functools.cache(lambda seed: predictor.replace(seed=seed))  # each is traced once
    return lambda x, seed: {n: t for n, t in vars(seeded(seed)(x)).items() if isinstance(t, torch.Tensor)}


def changed(call, **changes):
    return lambda x, seed: {n: changes[n](t) if n in changes else t for n, t in call(x, seed).items()}


@pytest.fixture(scope="module")
def as_exported(dropout):
    return honest(dropout)


def test_the_predictor_itself_passes(dropout, as_exported, rows):
    measured = check(dropout, as_exported, rows)
    assert measured.pop("rows") == 20 and set(measured.values()) == {0.0}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"epistemic": lambda t: t * 0}, "epistemic spread is gone: mean 0"),
        ({"epistemic": lambda t: t * 1e-4}, "epistemic spread is gone"),
        ({"epistemic": lambda t: t * 0.98}, "epistemic spread is different"),
        ({"epistemic": lambda t: t * torch.nan}, "epistemic spread"),
        ({"probs": lambda t: t + 2e-5}, "probs differs .* 2e-05"),
        ({"total": lambda t: torch.where(torch.arange(20) == 7, t + 1e-4, t)}, "total differs"),
        ({"probs": lambda t: torch.where(torch.arange(60).view(20, 3) == 7, torch.nan, t)}, "probs differs"),
        ({"probs": lambda t: t.double()}, "probs is torch.float64"),
        ({"probs": lambda t: t[:, :2]}, r"probs is torch.float32 \(20, 2\)"),
    ],
)
def test_other_numbers_are_refused(changes, reason, dropout, as_exported, rows):
    with pytest.raises(ExportError, match=reason):
        check(dropout, changed(as_exported, **changes), rows)


def test_differences_below_the_tolerance_pass(dropout, as_exported, rows):
    measured = check(dropout, changed(as_exported, probs=lambda t: t + 5e-6), rows)
    assert 4e-6 < measured["probs"] < 6e-6


def test_a_seed_without_effect_is_refused(dropout, as_exported, rows):
    with pytest.raises(ExportError, match="probs differs|another seed|spread is different"):
        check(dropout, lambda x, seed: as_exported(x, 0), rows)


def test_a_field_that_is_missing_is_refused(dropout, as_exported, rows):
    with pytest.raises(ExportError, match="standard_error"):
        check(dropout, lambda x, seed: {n: t for n, t in as_exported(x, seed).items() if n != "standard_error"}, rows)


def test_an_action_that_differs_is_refused(dropout, rows):
    decided = vbdl.with_decision(dropout, vbdl.decision.Referral("total", 0.9))
    call = honest(decided)
    assert check(decided, call, rows)["action"] == 0.0
    with pytest.raises(ExportError, match="1 of 20 values of action"):
        check(decided, changed(call, action=lambda t: torch.where(torch.arange(20) == 3, t + 1, t)), rows)


def test_nothing_can_be_said_of_a_predictor_without_spread(rows):
    one = net()
    same = vbdl.Predictor(vbdl.DeepEnsemble([one, one]), vbdl.Categorical(), compile=False)
    with pytest.raises(ExportError, match="the predictor has no epistemic uncertainty"):
        check(same, honest(same), rows)


@pytest.mark.parametrize("scale", [1e-4, pytest.param(1.0, marks=pytest.mark.slow), 1e5])  # far from 1 on both sides
def test_regressions_are_measured_in_their_own_unit(scale, rows):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 1))

        def forward(self, x):
            return self.inside(x) * scale

    torch.manual_seed(0)
    q = vbdl.MCDropout(Scaled())
    predict = vbdl.Predictor(q, vbdl.Gaussian(1, std=scale), n_samples=SAMPLES, compile=False)
    call = honest(predict)
    check(predict, call, rows)
    check(predict, changed(call, mean=lambda t: t * (1 + 1e-6)), rows)
    with pytest.raises(ExportError, match="mean differs"):
        check(predict, changed(call, mean=lambda t: t * (1 + 1e-4)), rows)
    with pytest.raises(ExportError, match="aleatoric differs"):
        check(predict, changed(call, aleatoric=lambda t: t * (1 + 1e-3)), rows)


@pytest.mark.filterwarnings("ignore")
def test_dropout_that_onnx_switches_off_is_refused(dropout, rows, tmp_path):
    """A network in training mode, exported as anyone would: ONNX Runtime drops nothing, and says nothing."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    trained = dropout.posterior.module.inner

    class Passes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(*trained).train()

        def forward(self, x):
            return torch.stack([self.inner(x) for _ in range(SAMPLES)])

    path = str(tmp_path / "passes.onnx")
    torch.onnx.export(Passes(), (rows,), path, dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def exported(x, seed):
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        likelihood = dropout.likelihood
        return likelihood.finish(likelihood.summarize(torch.from_numpy(np.asarray(logits))))

    assert float(dropout(rows).epistemic.mean()) > 1e-3
    with pytest.raises(ExportError, match="spread is gone"):
        check(dropout, exported, rows)


def test_one_draw_has_no_spread_and_is_compared_all_the_same(rows):
    torch.manual_seed(0)
    one = vbdl.Predictor(vbdl.DeepEnsemble([net()]), vbdl.Categorical(), compile=False)
    assert set(check(one, honest(one), rows).values()) == {0.0, 20.0}
    with pytest.raises(ExportError, match="probs differs"):
        check(one, changed(honest(one), probs=lambda t: t + 2e-5), rows)
    drawn = vbdl.Predictor(vbdl.MCDropout(net()), vbdl.Categorical(), n_samples=1, compile=False)
    check(drawn, honest(drawn), rows)
    frozen = honest(drawn)
    with pytest.raises(ExportError, match="probs differs|another seed"):
        check(drawn, lambda x, seed: frozen(x, 0), rows)


def _recurrent(kind, **options):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.drop, self.out = (
                getattr(nn, kind)(4, 8, batch_first=True, **options),
                nn.Dropout(0.2),
                nn.Linear(options.get("proj_size", 8 * (1 + options.get("bidirectional", False))), 3),
            )

        def forward(self, x):
            return self.out(self.drop(self.inside(x.unsqueeze(1))[0][:, -1]))

    return Recurrent()


def _linearized(network, rows):
    posterior, likelihood = vbdl.Laplace(network, parameters="all", structure="diagonal"), vbdl.Categorical()
    vbdl.fit(posterior, (rows, torch.arange(len(rows)) % 3), likelihood, epochs=0, progress=False)
    return posterior, likelihood


class Unknown(nn.Module):
    """An operation that ONNX has not."""

    def __init__(self):
        super().__init__()
        self.drop, self.out = nn.Dropout(0.2), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.drop(torch.special.bessel_j0(x)))


class InFloat64(nn.Module):
    """An operation that ONNX has, and ONNX Runtime has not for this dtype."""

    def __init__(self):
        super().__init__()
        self.drop, self.out = nn.Dropout(0.2), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.drop(torch.erf(x.double()).float()))


# a decision by risk, whose graph is large, is refused as the small one in float64 is
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["one network", "GRU", "LSTM", "RNN", "members", "projected", "linearized", "unknown", "in float64"]
    + [pytest.param("risk", marks=pytest.mark.slow)],
)
def test_onnx_takes_it_or_says_in_words_what_it_cannot(name, rows, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    posterior, likelihood = {
        "one network": lambda: (vbdl.DeepEnsemble([net()]), vbdl.Categorical()),
        "GRU": lambda: (vbdl.MCDropout(_recurrent("GRU")), vbdl.Categorical()),
        "LSTM": lambda: (vbdl.MCDropout(_recurrent("LSTM", bidirectional=True)), vbdl.Categorical()),
        "RNN": lambda: (vbdl.MCDropout(_recurrent("RNN", nonlinearity="relu", bias=False)), vbdl.Categorical()),
        "members": lambda: (vbdl.DeepEnsemble([_recurrent("GRU", num_layers=2) for _ in range(4)]), vbdl.Categorical()),
        "projected": lambda: (vbdl.MCDropout(_recurrent("LSTM", proj_size=3)), vbdl.Categorical()),
        "linearized": lambda: _linearized(_recurrent("LSTM"), rows),
        "unknown": lambda: (vbdl.MCDropout(Unknown()), vbdl.Categorical()),
        "in float64": lambda: (vbdl.MCDropout(InFloat64()), vbdl.Categorical()),
        "risk": lambda: (vbdl.MCDropout(net()), vbdl.Gaussian(3)),
    }[name]()
    n_samples = 1 if name == "one network" else 4
    predict = vbdl.Predictor(posterior, likelihood, n_samples=n_samples, compile=False, tiles=32)
    refused = {"projected": "no LSTM with projections", "unknown": "for bessel_j0"}
    refused |= {"in float64": "ONNX Runtime has no Erf", "risk": "ONNX Runtime has no Erf"}
    if name == "risk":
        predict = vbdl.with_decision(predict, vbdl.decision.Risk())
    if name in refused:
        with pytest.raises(ExportError, match=f'{refused[name]}.*[Ee]xport with backend="aoti"') as caught:
            predict.export(tmp_path / "package", backend="onnx", example=rows)
        assert "\n" not in str(caught.value) and not (tmp_path / "package").exists()
    else:
        predict.export(tmp_path / "package", backend="onnx", example=rows)


@pytest.mark.parametrize("raised", [RuntimeError("one\ntwo"), NotImplementedError(), AttributeError("x")])
def test_whatever_an_exporter_raises_is_an_export_error(raised, dropout, rows, tmp_path, monkeypatch):
    def fails(*_):
        raise raised

    monkeypatch.setattr("vbdl.export.building._compile", fails)
    for backend, name in (("aoti", "AOTInductor"), ("onnx", "ONNX")):
        with pytest.raises(ExportError, match=f"{name} cannot export this predictor") as caught:
            dropout.export(tmp_path / "package", backend=backend, example=rows)
        assert caught.value.__cause__ is raised and "\n" not in str(caught.value)


@pytest.mark.slow
def test_one_network_is_compiled_ahead_of_time(rows, tmp_path):
    torch.manual_seed(0)
    one = vbdl.Predictor(vbdl.DeepEnsemble([net()]), vbdl.Categorical(), compile=False, tiles=32)
    package = one.export(tmp_path / "package", example=rows)
    torch.testing.assert_close(package(rows).probs, one(rows).probs)
