import pytest
import torch
from torch import nn

from vbdl.methods import METHODS
from vbdl.recommendation import recommend

# of a network that draws nothing by itself, with no augmentation known
_TRIED = [m.class_name for m in METHODS.values() if not (m.needs_own_noise or m.needs_augmentation)]


def _network(dropout=True):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 16), nn.ReLU(), *([nn.Dropout(0.1)] if dropout else []), nn.Linear(16, 2)]
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, generator=generator)
    return x, (x[:, 0] * x[:, 1] + 0.3 * torch.randn(300, generator=generator) > 0).long()


def test_measures_all_three_and_gives_a_reason(data):
    network = _network()
    before = [p.clone() for p in network.parameters()]
    found = recommend(network, data, budget=1.5)
    assert [m.method for m in found.table] == _TRIED
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    measured = {m.method: m for m in found.table}
    best = min(found.table, key=lambda m: m.nll.value)
    assert best.worse_by is None
    for m in found.table:
        assert m.nll.lower < m.nll.value < m.nll.upper and m.latency > 0 and m.epochs >= 1
        if m is not best:
            assert m.worse_by.value == pytest.approx(m.nll.value - best.nll.value, abs=1e-9)
    # the choice is not settled to be worse, and nothing as good is faster
    chosen = measured[found.method]
    several = [m for m in found.table if m.method != "Deterministic"]  # one network is only the measure of the others
    close = [m for m in several if m.worse_by is None or not m.worse_by.lower > 0]
    assert chosen in close and chosen.latency == min(m.latency for m in close)
    assert found.n_train == 210 and found.n_test == 60
    text = str(found)
    assert "recommend: " + found.method in text and all(m.method in text for m in found.table)


def test_a_network_without_dropout_leaves_the_others(data):
    found = recommend(_network(dropout=False), data, budget=1.5)
    dropout = found.table[0]
    assert dropout.nll is None and "not tried" in str(found)
    assert found.method != "MCDropout"


def test_a_method_that_fails_in_training_leaves_the_others(data, monkeypatch):
    def losses(self, x, y, likelihood, own_rows=False):
        return torch.full((1,), torch.inf, requires_grad=True) + 0 * sum(p.sum() for p in self.parameters())

    monkeypatch.setattr("vbdl.posteriors.mean_field.MeanField.losses", losses)
    found = recommend(_network(), data, budget=1.5)
    assert [m.method for m in found.table if m.nll is None] == ["MeanField"]
    assert "not tried: the loss of member 0 became inf" in str(found)


@pytest.mark.parametrize("dropout, rule", [(True, "MCDropout, since"), (False, "Laplace, since")])
def test_a_trained_network_is_used_as_it_is(dropout, rule, data):
    found = recommend(_network(dropout), data, trained=True)
    tried = {m.method for m in found.table if m.nll is not None}
    assert tried == {"Deterministic", "Laplace", *(["MCDropout"] if dropout else [])} and found.method in tried
    assert all(m.epochs == 0 for m in found.table)
    assert found.rule.startswith(rule) and "as it is" in found.rule


def test_a_trained_network_that_may_be_trained_is_where_training_starts(data):
    found = recommend(_network(dropout=False), data, trained=True, train=True, budget=4.0)
    epochs = {m.method: m.epochs for m in found.table if m.nll is not None}
    assert epochs.keys() == set(_TRIED) - {"MCDropout"}
    assert epochs["Deterministic"] == epochs["Laplace"] == 0 and epochs["SWAG"] >= 4 and epochs["Snapshots"] >= 4
    assert found.rule.startswith("SWAG, since")


def test_methods_that_are_too_slow_are_not_recommended(data):
    found = recommend(_network(), data, trained=True)
    times = sorted(m.latency for m in found.table)
    between = (times[0] * times[-1]) ** 0.5
    if times[-1] > 3 * times[0]:  # else this machine is too busy to tell them apart
        limited = recommend(_network(), data, trained=True, latency=between)
        chosen = next(m for m in limited.table if m.method == limited.method)
        assert chosen.latency <= between
        slow = [m for m in limited.table if m.latency > between]
        assert all("more than" in m.note for m in slow) and (not slow or "too slow" in str(limited))
    with pytest.raises(ValueError, match="no method predicts a row within 1e-06 ms, the fastest takes"):
        recommend(_network(), data, trained=True, latency=1e-9)


def test_regression_by_default_for_real_targets(data):
    x, _ = data
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))
    found = recommend(network, (x, x[:, 0] * 2), budget=1.5)
    assert all(m.nll is not None for m in found.table)
    # 210 rows: the rule leans on the prior
    assert found.rule.startswith("MeanField")


def test_refusals(data):
    x, y = data
    with pytest.raises(ValueError, match="at least 20"):
        recommend(_network(), (x[:10], y[:10]))
    with pytest.raises(ValueError, match="a network that is not trained must be trained"):
        recommend(_network(), data, train=False)
    with pytest.raises(ValueError, match="latency must be"):
        recommend(_network(), data, latency=0.0)
    with pytest.raises(ValueError, match="budget"):
        recommend(_network(), data, budget=0)
    with pytest.raises(TypeError, match="a network must be an nn.Module, got function"):
        recommend(lambda x: x, data)


def test_the_rows_of_each_part_are_those_given(data, monkeypatch):
    x, y = data
    rows = {"train": torch.arange(160), "validation": torch.arange(160, 200), "test": torch.arange(200, 300)}
    seen = []

    def measured(method, posterior, likelihood, parts, *rest):
        seen.append(parts)
        raise ValueError("enough")

    monkeypatch.setattr("vbdl.recommendation._measure", measured)
    with pytest.raises(ValueError, match="no method could be tried"):
        recommend(_network(), data, budget=1.5, rows=rows)
    for parts in seen:
        assert parts.keys() == rows.keys()
        assert all(torch.equal(parts[k][0], x[r]) and torch.equal(parts[k][1], y[r]) for k, r in rows.items())
    assert seen
    for wrong, said in (
        ({"train": rows["train"], "test": rows["test"]}, "parts train, validation, test"),
        (rows | {"test": torch.tensor([300])}, r"rows\['test'\] must be row numbers from 0 to 299"),
        (rows | {"test": torch.arange(150, 250)}, "a row is in two parts"),
    ):
        with pytest.raises(ValueError, match=said):
            recommend(_network(), data, budget=1.5, rows=wrong)


def test_every_method_trains_for_the_same_time(data, monkeypatch):
    """What happens once, in the first training of a method, is paid by all: none is left with one epoch."""
    import vbdl.recommendation as recommendation

    first: set[str] = set()

    def fit(posterior, rows, likelihood, epochs, **options):
        name = type(posterior).__name__
        now[0] += (5.0 if name == "MCDropout" and name not in first else 0.0) + 0.01 + 0.02 * epochs
        first.add(name)
        if "patience" in options:
            trained[name] = epochs
        return real(posterior, rows, likelihood, epochs=min(epochs, 4), **options)

    real, now, trained = recommendation.fit, [0.0], {}
    monkeypatch.setattr(recommendation, "fit", fit)
    monkeypatch.setattr(recommendation.time, "perf_counter", lambda: now[0])
    recommend(_network(), data, budget=12.0)
    assert len(trained) == len(_TRIED) and min(trained.values()) > 10
    assert max(trained.values()) - min(trained.values()) <= 1  # whole epochs of the same time


def test_the_reason_is_true_of_the_table():
    """The network alone is not among those that the fastest is chosen of, nor is a method that is worse."""
    from vbdl.metrics.estimate import Interval
    from vbdl.recommendation import Measured, _decide

    def row(name, latency):
        return Measured(name, Interval(0.5, 0.4, 0.6, 0.95), None, latency, 1.0, 5, "")

    scores = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    apart = {"MCDropout": scores, "Deterministic": scores + 1e-3 * torch.randn(50), "Laplace": scores + 5}
    measured = {"MCDropout": row("MCDropout", 0.3), "Deterministic": row("Deterministic", 0.2)}
    measured["Laplace"] = row("Laplace", 0.1)
    found = _decide(measured, apart, "a rule", 100, 50, None)
    assert found.method == "MCDropout" and "it alone of them knows epistemic uncertainty" in found.reason
    assert "fastest" not in found.reason and "rule of thumb, before measuring: a rule" in str(found)
    measured["SWAG"] = row("SWAG", 0.25)
    apart["SWAG"] = scores + 1e-3 * torch.randn(50)
    found = _decide(measured, apart, "a rule", 100, 50, None)
    assert found.method == "SWAG"
    assert "MCDropout and Deterministic, and of those of them that know epistemic" in found.reason
