"""Rules by distance and several rules in one decision: in the predictor, in the artifact and in the service."""

import time

import pytest
import torch
from starlette.testclient import TestClient
from torch import nn

import vbdl
from vbdl.decision import REFER, AnyOf, ExpectedCost, OutOfDistribution, Referral, Risk
from vbdl.ood import KNN, Mahalanobis
from vbdl.serve import Model, app


def network(outputs: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 16), nn.ReLU(),
        nn.Linear(16, outputs),
    )  # fmt: skip


POSTERIORS = {
    "deterministic": lambda: vbdl.Deterministic(network()),
    "laplace": lambda: vbdl.Laplace(network()),
    "laplace of all": lambda: vbdl.Laplace(network(), parameters="all"),
    "dropout": lambda: vbdl.MCDropout(network()),
    "mean-field": lambda: vbdl.MeanField(network(), n_data=120),
    "ensemble": lambda: vbdl.DeepEnsemble([network() for _ in range(3)]),
    "ensemble of dropout": lambda: vbdl.DeepEnsemble([vbdl.MCDropout(network()) for _ in range(2)]),
    "swag": lambda: vbdl.SWAG(network(), rank=2),
    "shared weights": lambda: vbdl.BatchEnsemble(network(), 2),
    "ivon": lambda: vbdl.IVON(network(), n_data=120),
}


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    make = lambda n: torch.randn(n, 1, 8, 8, generator=generator)
    return {"train": make(120), "familiar": make(100), "new": make(70), "far": 30 + make(5)}


def fitted(name, rows, likelihood=None, **settings):
    torch.manual_seed(1)
    q, likelihood = POSTERIORS[name](), likelihood or vbdl.Categorical()
    y = torch.arange(120) % 3
    epochs = 0 if name.startswith("laplace") else 2
    vbdl.fit(q, (rows["train"], y), likelihood, epochs=epochs, progress=False, compile=False)
    return vbdl.Predictor(q, likelihood, **{"compile": False, "n_samples": None, **settings})


def both(predict, rows, detector=None) -> AnyOf:
    guard = OutOfDistribution(detector or KNN(k=3, normalize=False))
    guard.fit(predict, rows["train"], rows["familiar"], share=0.1)
    return AnyOf([Referral("total", float(predict(rows["new"]).total.median())), guard])


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_distance_is_that_of_the_trained_network_whatever_the_draws(name, rows, tmp_path):
    predict = fitted(name, rows)
    rules = both(predict, rows)
    decide, x = vbdl.with_decision(predict, rules), torch.cat((rows["new"], rows["far"]))
    p, before, guard = decide(x), predict(x), rules.rules[1]
    assert torch.equal(p.probs, before.probs) and torch.equal(p.epistemic, before.epistemic)
    # by hand: the penultimate features of the first network, one pass of plain torch
    members = predict.posterior.member(0) if "ensemble" in name else None
    if name in ("deterministic", "laplace", "laplace of all", "ensemble"):
        plain = network()
        inner = predict.posterior.user_network
        plain.load_state_dict(members if members is not None else inner.state_dict())
        near = vbdl.ood.features(plain, "7", [rows["train"]])
        distance = KNN(k=3, normalize=False).fit(near)(vbdl.ood.features(plain, "7", [x]))
        torch.testing.assert_close(p.distance.double(), distance, rtol=1e-5, atol=1e-5)
    assert guard.layer == "7"
    unsure = p.total >= rules.rules[0].threshold
    far = p.distance.double() > guard.threshold
    assert torch.equal(p.action == REFER, unsure | far) and bool(far[-5:].all()) and not bool(far[:70].all())
    assert torch.equal(p.action[p.action != REFER], before.label[p.action != REFER])
    assert torch.equal(p.reason, torch.where(unsure, 1, torch.where(far, 2, 0)))
    assert torch.equal(guard.refers(predict, x), far)
    # samples, single rows, steps, a stored copy
    assert decide(x[:4], samples=True).samples.shape == (decide.n_samples, 4, 3)
    torch.testing.assert_close(decide(x[-1:]).distance, p.distance[-1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decide(x, tolerance=1e-9).distance, p.distance, rtol=1e-5, atol=1e-5)
    assert decide.log_prob(x[:4], torch.zeros(4, dtype=torch.int64)).equal(
        predict.log_prob(x[:4], torch.zeros(4, dtype=torch.int64))
    )
    again = vbdl.load(decide.save(tmp_path / "model"), compile=False)(x)
    for field in ("probs", "distance", "reason", "action"):
        assert torch.equal(getattr(again, field), getattr(p, field)), field


@pytest.mark.slow
@pytest.mark.parametrize("name", ["laplace", "ensemble"])
def test_the_compiled_distance_is_the_same(name, rows):
    predict = fitted(name, rows)
    decide = vbdl.with_decision(predict, both(predict, rows))
    compiled, x = decide.replace(compile=True), rows["new"]
    torch.testing.assert_close(compiled(x).distance, decide(x).distance, rtol=1e-5, atol=1e-5)
    assert torch.equal(compiled(x[:9]).reason, compiled(x).reason[:9])


@pytest.mark.parametrize(
    "likelihood, outputs", [(vbdl.Bernoulli(), 1), (vbdl.Gaussian(), 1), (vbdl.HeteroscedasticGaussian(), 2)]
)
def test_a_distance_travels_beside_parameters_of_any_shape(likelihood, outputs, rows):
    predict = vbdl.Predictor(vbdl.Deterministic(network(outputs)), likelihood, compile=False)
    guard = OutOfDistribution(Mahalanobis()).fit(predict, rows["train"], rows["familiar"], share=0.1)
    p = vbdl.with_decision(predict, guard)(rows["far"])
    torch.testing.assert_close(p.distance.double(), guard.distances(predict, rows["far"]), rtol=1e-5, atol=1e-5)
    assert torch.equal(p.mean, predict(rows["far"]).mean) and bool((p.action == REFER).all())


def test_the_threshold_keeps_its_share_and_refuses_what_cannot(rows):
    predict = fitted("deterministic", rows)
    guard = OutOfDistribution(KNN(normalize=False)).fit(predict, rows["train"], rows["familiar"], share=0.1)
    assert float(guard.refers(predict, rows["familiar"]).float().mean()) <= 0.1
    with pytest.raises(ValueError, match=r"2 of 5 familiar rows were trained on \(rows 1, 3\).*vbdl.unseen"):
        mixed = rows["new"][:5].clone()
        mixed[[1, 3]] = rows["train"][[7, 9]]
        OutOfDistribution().fit(predict, rows["train"], mixed)
    with pytest.raises(ValueError, match="20 familiar rows are too few for share=0.05: give at least 59"):
        OutOfDistribution().fit(predict, rows["train"], rows["familiar"][:20])
    with pytest.raises(RuntimeError, match="has not been fitted"):
        vbdl.with_decision(predict, OutOfDistribution())
    few = OutOfDistribution(KNN(normalize=False))
    few.fit(predict, rows["train"], rows["familiar"], share=0.1, most_rows=50)
    assert few.detector.rows.shape[0] == 50
    several = vbdl.DeepEnsemble([network(), nn.Sequential(network())])
    with pytest.raises(ValueError, match="several architectures"):
        vbdl.with_decision(vbdl.Predictor(several, vbdl.Categorical(), compile=False), guard)
    with pytest.raises(ValueError, match="needs estimator='sampling'"):
        laplace = fitted("laplace", rows)
        vbdl.with_decision(laplace, guard).replace(estimator="moments")(rows["new"])


def test_a_package_for_onnx_has_the_distance_and_the_reason(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    x = torch.randn(200, 5)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 3), vbdl.Categorical(), compile=False, tiles=4)
    guard = OutOfDistribution(Mahalanobis()).fit(predict, x[:100], x[100:], share=0.1)
    decide = vbdl.with_decision(predict, AnyOf([Referral("total", 1.09), guard]))
    rows = torch.cat((x[100:106], 30 + x[:1]))
    fields, p = decide.export(tmp_path / "package", backend="onnx", example=rows)(rows), decide(rows)
    torch.testing.assert_close(fields["distance"], p.distance, rtol=1e-4, atol=1e-4)
    assert torch.equal(fields["reason"], p.reason) and torch.equal(fields["action"], p.action)
    with pytest.raises(ValueError, match="ONNX has no operation"):
        near = OutOfDistribution(KNN()).fit(predict, x[:100], x[100:], share=0.1)
        vbdl.with_decision(predict, near).export(tmp_path / "knn", backend="onnx", example=rows)


def test_which_rules_can_be_combined():
    with pytest.raises(ValueError, match="at least one rule"):
        AnyOf([])
    with pytest.raises(ValueError, match="one OutOfDistribution"):
        AnyOf([OutOfDistribution(), OutOfDistribution()])
    with pytest.raises(ValueError, match="refer by the action -1"):
        AnyOf([Risk()])
    with pytest.raises(TypeError, match="a list of rules"):
        AnyOf(Referral())
    rules = AnyOf([ExpectedCost(1 - torch.eye(3), 0.6), Referral("epistemic", 0.1)])
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nn.Linear(4, 3), 4), vbdl.Categorical(), compile=False)
    p = vbdl.with_decision(predict, rules)(torch.randn(50, 4))
    first = ExpectedCost(1 - torch.eye(3), 0.6)(p.probs)
    assert torch.equal(p.action, torch.where(p.epistemic >= 0.1, REFER, first))
    with pytest.raises(ValueError, match="knows no epistemic"):
        one = vbdl.Predictor(vbdl.Deterministic(nn.Linear(4, 3)), vbdl.Categorical(), compile=False)
        vbdl.with_decision(one, rules)


def test_the_service_says_why_in_words_and_names_the_classes(rows, tmp_path):
    predict = fitted("laplace", rows)
    x, y = rows["new"], torch.where(torch.arange(70) % 4 == 0, 0, predict(rows["new"]).label)
    calibrated = vbdl.calibrate(predict, (x, y), vbdl.Temperature("probs"))
    decide = vbdl.with_decision(calibrated, both(calibrated, rows))
    folder = decide.save(tmp_path / "xray", classes=["normal", "viral", "bacterial"])
    asked = torch.cat((rows["new"][:20], rows["far"]))
    expected = vbdl.load(folder, compile=False, batch_invariant=True)(asked)
    with TestClient(app(Model(folder, compile=False))) as client:
        while (ready := client.get("/ready")).status_code != 200:
            assert "failed" not in ready.text
            time.sleep(0.02)
        answer = client.post("/v1/predict", json={"inputs": asked.tolist()}).json()
        about, described = client.get("/v1/model").json(), client.get("/openapi.json").json()
    assert answer["classes"] == about["classes"] == ["normal", "viral", "bacterial"]
    reasons = [None, *decide.likelihood.decision.reasons]
    for k, row in enumerate(answer["predictions"]):
        assert row["label"] == answer["classes"][int(expected.label[k])] and row["action"] == int(expected.action[k])
        assert row["decision"] == ("refer" if row["action"] == REFER else "answer")
        assert row["reason"] == reasons[int(expected.reason[k])] and "standard_error" not in row
        assert row["distance"] == pytest.approx(float(expected.distance[k]), rel=1e-6)
    assert {row["reason"] for row in answer["predictions"]} == set(reasons)
    fields = described["components"]["schemas"]["Prediction"]["properties"]
    assert {"decision", "reason", "distance"} <= fields.keys() and "person" in fields["action"]["description"]
    # what was fitted can be seen, in words
    assert about["method"] == "Laplace approximation" and "deciding by AnyOf" in about["likelihood"]
    temperature, rules = about["fitted"]
    assert f"temperature {float(calibrated.likelihood.method.temperature):.6g}, on 70 rows" in temperature
    assert f"{float(decide.likelihood.decision.rules[0].threshold):.6g}" in rules and "10.0%" in rules
    assert temperature in about["card"] and "different rows" in about["card"] and "p.reason" in about["card"]


def test_names_of_too_few_classes_are_refused(rows, tmp_path):
    folder = fitted("deterministic", rows).save(tmp_path / "m", classes=["a", "b"], example=rows["new"])
    with pytest.raises(ValueError, match="names 2 classes, but the model predicts 3"):
        Model(folder, compile=False).warm_up()
