"""A trained network as it is: one draw, which knows no epistemic uncertainty, with everything else that vbdl does."""

import pytest
import torch
from torch import nn

import vbdl
from vbdl.decision import AnomalyFlags, HandOver, Referral, uncertainty_of

ROWS, FEATURES, CLASSES = 90, 4, 3


def network(outputs: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, outputs))


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :CLASSES].argmax(1)


def predictor(**settings) -> vbdl.Predictor:
    return vbdl.Predictor(vbdl.Deterministic(network()), vbdl.Categorical(), compile=False, **settings)


def test_it_is_the_network_and_total_is_aleatoric():
    x, net = rows()[0], network().eval()
    p = predictor()(x, samples=True)
    torch.testing.assert_close(p.probs, net(x).softmax(-1), rtol=0, atol=1e-6)  # rounding of one order of summation
    assert p.n_samples == 1 and p.samples.shape == (1, ROWS, CLASSES)
    assert torch.equal(p.total, p.aleatoric) and not p.epistemic.any() and p.standard_error.isnan().all()
    with torch.no_grad():
        variance = vbdl.Predictor(vbdl.Deterministic(network(1)), vbdl.Gaussian(std=0.5), compile=False)(x)
    assert torch.equal(variance.total, variance.aleatoric) and not variance.epistemic.any()
    assert "knows no epistemic uncertainty: epistemic is 0" in predictor().explain(x)


def test_fit_trains_a_plain_network():
    """As torch's own loop does: the same steps of the same optimizer on the same batches of all rows."""
    x, y = rows()
    q, own = vbdl.Deterministic(network()), network().train()
    vbdl.fit(q, (x, y), vbdl.Categorical(), epochs=5, batch_size=ROWS, lr=1e-2, compile=False)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(own(x), y).backward()
        optimizer.step()
    for name, t in own.state_dict().items():
        # the order of the rows changes the order of sums, and Adam divides small gradients by their size
        torch.testing.assert_close(q.module.inner.state_dict()[name], t, rtol=1e-3, atol=1e-4)


def test_dropout_of_training_is_off_in_prediction():
    net = nn.Sequential(nn.Linear(FEATURES, 16), nn.Dropout(0.5), nn.Linear(16, CLASSES))
    q, (x, y) = vbdl.Deterministic(net), rows()
    first, second = (vbdl.fit(vbdl.Deterministic(net, seed=s), (x, y), vbdl.Categorical(), epochs=1) for s in (0, 1))
    assert first.train_loss != second.train_loss, "the masks of training did not change with the seed"
    p = vbdl.Predictor(q, vbdl.Categorical(), compile=False)(x)
    torch.testing.assert_close(p.probs, net.eval()(x).softmax(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("decision", [Referral("epistemic", 0.1), HandOver((1, 1), (2, 2), kind="epistemic")])
def test_a_decision_by_epistemic_uncertainty_is_refused(decision):
    with pytest.raises(ValueError, match="kind='epistemic'.* a single network .* use kind='total'"):
        vbdl.with_decision(predictor(), decision)
    with pytest.raises(ValueError, match="a single network"):
        uncertainty_of(predictor()(rows()[0]), "epistemic")


def test_anomalies_by_epistemic_uncertainty_are_refused_and_those_by_total_are_not():
    flags = AnomalyFlags(0.1).fit(torch.rand(100))
    with pytest.raises(ValueError, match="a single network"):
        vbdl.with_decision(predictor(), flags)
    by_total = AnomalyFlags(0.1, kind="total").fit(torch.rand(100))
    assert vbdl.with_decision(predictor(), by_total)(rows()[0]).action.shape == (ROWS,)


@pytest.mark.filterwarnings("error")
def test_calibrated_decided_saved_and_exported_without_a_warning(tmp_path):
    q, likelihood, (x, y) = vbdl.Deterministic(network()), vbdl.Categorical(), rows(1)
    vbdl.fit(q, rows(), likelihood, epochs=20, lr=1e-2, compile=False)
    predict = vbdl.Predictor(q, likelihood, tiles=8, compile=False)
    calibrated = vbdl.calibrate(predict, (x, y), vbdl.Temperature())
    sets = vbdl.calibrate(calibrated, rows(2), vbdl.ConformalSets(0.1))
    decided = vbdl.with_decision(sets, Referral("total", 0.5))
    decided.save(tmp_path / "model", example=x)
    loaded = vbdl.load(tmp_path / "model")
    p = loaded(x)
    assert torch.equal(p.probs, decided(x).probs) and torch.equal(p.action, decided(x).action)
    assert p.sets.shape == (ROWS, CLASSES) and type(loaded.posterior) is vbdl.Deterministic
    assert loaded(x, tolerance=0.01).n_samples == 1 and loaded(x, deadline=5.0).n_samples == 1


def test_a_package_of_it_is_exported(tmp_path):
    pytest.importorskip("onnxruntime")
    x, predict = rows()[0], predictor(tiles=8)
    package = predict.export(tmp_path / "package", backend="onnx", example=x)
    torch.testing.assert_close(package(x)["probs"], predict(x).probs, rtol=1e-4, atol=1e-5)


def test_an_ensemble_of_it_is_one_of_its_networks():
    x = rows()[0]
    nets = [network(), network()]
    nn.init.normal_(nets[1][-1].weight)
    q = vbdl.DeepEnsemble([vbdl.Deterministic(net) for net in nets])
    p = vbdl.Predictor(q, vbdl.Categorical(), compile=False)(x)
    expected = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile=False)(x)
    assert p.n_samples == 2
    torch.testing.assert_close(p.epistemic, expected.epistemic, rtol=1e-4, atol=1e-6)
