import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from vbdl import metrics, ood


def _members(samples=5, batch=9, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, batch, classes, generator=generator, dtype=torch.float64) * 2


def test_scores_are_their_formulas():
    z = _members()
    p = z.softmax(2)
    mean, x = p.mean(0).numpy(), p.numpy()
    np.testing.assert_allclose(ood.msp(p.mean(0)), 1 - mean.max(1), rtol=1e-12)
    np.testing.assert_allclose(ood.max_logit(z), -z.numpy().max(2).mean(0), rtol=1e-12)
    expected = -np.log(np.exp(z.numpy() / 2).sum(2)).mean(0) * 2
    np.testing.assert_allclose(ood.energy(z, 2.0), expected, rtol=1e-12)
    np.testing.assert_allclose(ood.entropy(p.mean(0)), stats.entropy(mean, axis=1), rtol=1e-12)
    np.testing.assert_allclose(ood.expected_entropy(p), stats.entropy(x, axis=2).mean(0), rtol=1e-12)
    np.testing.assert_allclose(ood.variance(p), x.var(0).sum(1), rtol=1e-12)
    votes = [max(np.bincount(c, minlength=4)) / 5 for c in x.argmax(2).T]
    np.testing.assert_allclose(ood.variation_ratio(p), 1 - np.array(votes), rtol=1e-12)


def test_entropy_splits_into_two_parts():
    p = _members().softmax(2)
    parts = ood.expected_entropy(p) + ood.mutual_information(p)
    np.testing.assert_allclose(ood.entropy(p.mean(0)), parts, rtol=1e-12)
    same = p[:1].expand(4, -1, -1)
    assert float(ood.mutual_information(same).max()) < 1e-15
    sharp = torch.eye(4, dtype=torch.float64).unsqueeze(1)  # four members, four certain opinions
    assert float(ood.mutual_information(sharp)) == pytest.approx(math.log(4), rel=1e-12)


def test_one_set_of_logits_is_one_sample():
    z = _members(1)
    assert torch.equal(ood.energy(z), ood.energy(z[0]))
    assert float(ood.mutual_information(z[0].softmax(1)).max()) == 0.0
    np.testing.assert_allclose(ood.energy(torch.tensor([[1e4, -1e4]])), [-1e4])
    assert ood.msp(torch.zeros(0, 3)).shape == (0,)


def test_bad_scores_inputs():
    with pytest.raises(ValueError, match="NaN"):
        ood.energy(torch.tensor([[math.nan, 0.0]]))
    with pytest.raises(ValueError, match="sums to"):
        ood.mutual_information(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="samples, batch"):
        ood.epistemic_variance(torch.zeros(3))
    np.testing.assert_allclose(ood.epistemic_variance(torch.tensor([[[0.0, 1.0]], [[2.0, 1.0]]])), [1.0])


def _blobs(n, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=generator)
    centers = torch.tensor([[0.0, 0, 0, 0], [8, 0, 0, 0], [0, 8, 0, 0]], dtype=torch.float64)
    spread = torch.tensor([1.0, 2.0, 0.5, 1.0])
    return centers[y] + torch.randn(n, 4, generator=generator, dtype=torch.float64) * spread + shift, y


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_mahalanobis_is_the_definition_wherever_the_features_lie(offset):
    x, y = _blobs(500, 0)
    x = x + offset
    detector = ood.Mahalanobis(shrinkage=0.0).fit(x, y)
    means = np.stack([x[y == k].numpy().mean(0) for k in range(3)])
    residual = x.numpy() - means[y.numpy()]
    inverse = np.linalg.inv(residual.T @ residual / 500)
    difference = x.numpy()[:, None] - means
    expected = np.einsum("nki,ij,nkj->nk", difference, inverse, difference).min(1)
    np.testing.assert_allclose(detector(x), expected, rtol=1e-6)
    # chi-squared of four degrees of freedom, for rows of the blobs
    assert float(detector(_blobs(4000, 1)[0] + offset).mean()) == pytest.approx(4, abs=0.25)


def test_mahalanobis_and_knn_find_what_lies_elsewhere():
    x, y = _blobs(600, 0)
    label = torch.arange(600) >= 300
    # away from all rows, and between the classes: the relative distance is blind to the first
    for shift, detectors in (
        ([0.0, 0, 4, 0], (ood.Mahalanobis().fit(x, y), ood.KNN(5, normalize=False).fit(x))),
        ([4.0, 0, 0, 0], (ood.Mahalanobis().fit(x, y), ood.Mahalanobis(True).fit(x, y))),
    ):
        odd = _blobs(300, 2, shift=torch.tensor(shift))[0]
        both = torch.cat((_blobs(300, 1)[0], odd))
        for detector in detectors:
            assert metrics.auroc(detector(both), label) > 0.95


def test_mahalanobis_ends():
    x, y = _blobs(50, 0)
    constant = torch.cat((x, torch.ones(50, 1)), dim=1)
    assert bool(ood.Mahalanobis().fit(constant, y)(constant).isfinite().all())
    with pytest.raises(ValueError, match="no inverse"):
        ood.Mahalanobis(shrinkage=0.0).fit(constant, y)
    with pytest.raises(ValueError, match="constant"):
        ood.Mahalanobis().fit(torch.ones(5, 2))
    with pytest.raises(ValueError, match="class 1 has no row"):
        ood.Mahalanobis().fit(x, torch.where(y == 1, 2, y))
    with pytest.raises(RuntimeError, match="fit first"):
        ood.Mahalanobis()(x)
    assert ood.Mahalanobis().fit(x)(x[:0]).shape == (0,)


@pytest.mark.parametrize("normalize", [True, False])
def test_knn_is_sklearns(normalize):
    x, new = _blobs(300, 0)[0] + 1e4 * (not normalize), _blobs(40, 1)[0] + 1e4 * (not normalize)
    ours = ood.KNN(7, normalize).fit(x)(new)
    a, b = x.numpy(), new.numpy()
    if normalize:
        a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    expected = NearestNeighbors(n_neighbors=7).fit(a).kneighbors(b)[0][:, -1]
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="at least k"):
        ood.KNN(7).fit(x[:3])


@pytest.mark.parametrize("score", [ood.KNN(3), ood.Mahalanobis(), ood.Mahalanobis(relative=True)])
def test_features_of_another_width_are_refused(score):
    x = _blobs(50, 0)[0]
    score.fit(x)
    for wrong in (x[:, :1], x[0], x[None]):
        with pytest.raises(ValueError, match=r"must be \(batch, \d+\), as in fit, not \("):
            score(wrong)
    with pytest.raises(TypeError, match="not ndarray"):
        score(x.numpy())


def test_a_row_of_the_fit_has_distance_zero_to_itself():
    x = _blobs(50, 0)[0] + 1e5
    assert float(ood.KNN(1, normalize=False).fit(x)(x).max()) == 0.0


@pytest.mark.parametrize("n, rate", [(100, 0.1), (59, 0.05), (1000, 0.05), (40, 0.3)])
def test_threshold_bound_fails_as_seldom_as_promised(n, rate):
    failures, repeats = 0, 1000
    generator = torch.Generator().manual_seed(n)
    for _ in range(repeats):
        t = ood.threshold_at_fpr(torch.rand(n, generator=generator, dtype=torch.float64), rate)
        failures += 1 - t.value > rate  # uniform scores: the true rate above t is 1 - t
        assert t.bound <= rate + 1e-9
    assert failures <= stats.binom.ppf(1 - 1e-6, repeats, 0.05)
    # and it is the lowest such threshold: not far more careful than it must be
    rank = int(round((1 - t.flagged) * n))
    assert stats.binom.cdf(n - rank + 1, n, rate) > 0.05


def test_threshold_at_tpr_mirrors():
    generator = torch.Generator().manual_seed(0)
    failures = 0
    for _ in range(500):
        scores = torch.rand(100, generator=generator, dtype=torch.float64)
        t = ood.threshold_at_tpr(scores, 0.9)
        failures += 1 - t.value < 0.9
        assert t.flagged >= t.bound >= 0.9 - 1e-9
        assert float(t.flag(scores).double().mean()) == t.flagged
    assert failures <= stats.binom.ppf(1 - 1e-6, 500, 0.05)


def test_threshold_ends():
    few = ood.threshold_at_fpr(torch.rand(58), 0.05)
    assert few.value == math.inf and not bool(few.flag(torch.tensor([1e9])).any())
    enough = ood.threshold_at_fpr(torch.rand(59), 0.05)
    assert math.isfinite(enough.value) and enough.flagged == 0.0
    assert ood.threshold_at_tpr(torch.rand(58), 0.95).value == -math.inf
    # constant scores: nothing can be told apart, and nothing is flagged
    constant = ood.threshold_at_fpr(torch.zeros(500), 0.05)
    assert constant.value == 0.0 and constant.flagged == 0.0
    assert constant.flag(torch.tensor([0.0, math.nan])).tolist() == [False, True]
    with pytest.raises(ValueError, match="NaN"):
        ood.threshold_at_fpr(torch.tensor([math.nan]), 0.05)


def test_drift_false_alarms_stay_within_the_promise_over_a_long_stream():
    alarms, repeats = 0, 60
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(seed)
        monitor = ood.DriftMonitor(torch.randn(500, generator=generator), 0.1, false_alarm=0.05)
        alarms += monitor.update(torch.randn(3000, generator=generator))
    assert alarms <= stats.binom.ppf(1 - 1e-6, repeats, 0.05)


def test_drift_is_found_soon():
    delays = []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        monitor = ood.DriftMonitor(torch.randn(500, generator=generator), 0.1, 0.01)
        assert not monitor.update(torch.randn(3000, generator=generator))
        shifted = torch.randn(400, generator=generator) + 1.5
        delays.append(next(i for i, s in enumerate(shifted) if monitor.update(s.reshape(1))))
    assert np.mean(delays) < 60


def test_drift_fortune_is_fair_at_the_rate():
    # the expected factor of each bet at exactly the rate is one: a martingale
    monitor = ood.DriftMonitor(torch.randn(500, generator=torch.Generator().manual_seed(0)), 0.2)
    hit, miss = torch.tensor([math.inf]), torch.tensor([-math.inf])
    factors = []
    for outcome in (hit, miss):
        monitor.reset()
        monitor.update(outcome)
        factors.append(math.exp(monitor.log_fortune))
    assert 0.2 * factors[0] + 0.8 * factors[1] == pytest.approx(1.0, rel=1e-12)


def test_drift_state_and_ends():
    reference = torch.randn(300, generator=torch.Generator().manual_seed(0))
    a = ood.DriftMonitor(reference)
    a.update(torch.randn(50, generator=torch.Generator().manual_seed(1)))
    b = ood.DriftMonitor(reference).load(a.state())
    for monitor in (a, b):
        monitor.update(torch.full((40,), math.nan))
    assert a.state() == b.state() and a.alarm
    a.reset()
    assert not a.alarm and a.n == 0 and not a.update(reference[:0])
    with pytest.raises(ValueError, match="give at least"):
        ood.DriftMonitor(reference[:10])


def test_features_are_the_inputs_of_a_layer():
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    batches = [x[:4], x[4:]]  # whose sizes a product's last bits may depend on
    found = ood.features(network, "3", batches)
    with torch.no_grad():
        expected = torch.cat([network[1](network[0](b)) for b in batches])
    assert torch.equal(found, expected)  # dropout evaluates
    assert network.training and not network[3]._forward_pre_hooks
    distance = ood.KNN(3).fit(found)(ood.features(network, "3", [x + 30]))
    assert float(distance.min()) > 0
    for layer, said in (("9", "no layer '9'"), ("", "no layer")):
        with pytest.raises(ValueError, match=said):
            ood.features(network, layer, [x])
    with pytest.raises(ValueError, match="batches is empty"):
        ood.features(network, "3", [])
    assert torch.equal(ood.features(network, "3", [x.numpy()]), ood.features(network, "3", [x]))
    with pytest.raises(TypeError, match=r"\[x\] for one"):
        ood.features(network, "3", x)
    shared = torch.nn.Sequential(layer := torch.nn.Linear(3, 3), layer)
    with pytest.raises(ValueError, match="called 2 times"):
        ood.features(shared, "0", [x])


def test_the_british_argument_is_deprecated():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    with pytest.warns(DeprecationWarning, match="normalise= of KNN is called normalize= now"):
        old = ood.KNN(1, normalise=False)
    assert torch.equal(old.fit(x)(x + 1), ood.KNN(1, normalize=False).fit(x)(x + 1))
