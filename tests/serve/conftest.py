"""Models to serve: a table's classifier, an array's classifier that decides, a regression of several inputs."""

import pytest
import torch
from torch import nn

import vbdl
from vbdl.decision import Referral, with_decision
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.heteroscedastic import HeteroscedasticGaussian
from vbdl.posteriors.ensemble import DeepEnsemble


class Two(nn.Module):
    """Two inputs by name, one of them codes."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.out = nn.Embedding(5, 3), nn.Linear(5, 2)

    def forward(self, numbers: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat((numbers, self.code(code)), -1))


@pytest.fixture(scope="session")
def two():
    return Two


@pytest.fixture(scope="session")
def arrays_model(tmp_path_factory):
    """Rows of four numbers, three classes, a referral; not compiled."""
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)) for _ in range(4)]
    predictor = vbdl.Predictor(DeepEnsemble(members), Categorical(), compile=False)
    usual = predictor(torch.randn(99, 4)).total.median()
    predictor = with_decision(predictor, Referral("total", float(usual)))
    return predictor.save(tmp_path_factory.mktemp("arrays") / "signs", example=torch.zeros(1, 4))


@pytest.fixture(scope="session")
def draws_model(tmp_path_factory):
    """Rows of four numbers, MC dropout of 64 draws: eight steps, of which a deadline may take the first."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    predictor = vbdl.Predictor(vbdl.MCDropout(net), Categorical(), n_samples=64, compile=False)
    return predictor.save(tmp_path_factory.mktemp("draws") / "draws", example=torch.zeros(1, 4))


@pytest.fixture(scope="session")
def named_model(tmp_path_factory):
    """Two inputs by name; the network is not of torch's own layers, so it is given again."""
    torch.manual_seed(0)
    posterior = DeepEnsemble([Two() for _ in range(3)])
    predictor = vbdl.Predictor(posterior, HeteroscedasticGaussian(), compile=False)
    example = {"numbers": torch.zeros(1, 2), "code": torch.zeros(1, dtype=torch.int64)}
    return predictor.save(tmp_path_factory.mktemp("named") / "two", example=example)


@pytest.fixture(scope="session")
def table_model(tmp_path_factory):
    """Columns of every type, two classes by name."""
    import pyarrow as pa

    generator = torch.Generator().manual_seed(0)
    n = 600
    age = torch.randint(18, 90, (n,), generator=generator)
    income = torch.randn(n, generator=generator) * 20 + 50
    city = [("Porto", "Lisbon", "Faro")[k] for k in torch.randint(3, (n,), generator=generator).tolist()]
    member = torch.rand(n, generator=generator) < 0.5
    day = [f"2026-01-{d:02d}" for d in torch.randint(1, 29, (n,), generator=generator).tolist()]
    good = (income + 0.3 * age.float() + 10 * torch.randn(n, generator=generator)) > 65
    table = pa.table(
        {
            "age": age.numpy(),
            "income": [None if i % 50 == 0 else v for i, v in enumerate(income.tolist())],
            "city": city,
            "member": member.numpy(),
            "day": pa.array(day).cast(pa.date32()),
            "outcome": ["good" if g else "bad" for g in good.tolist()],
        }
    )
    from vbdl.tabular import TableOptions, fit_table

    fitted = fit_table(table, "outcome", TableOptions(n_members=3, epochs=5), kinds={"day": "date"}, progress=False)
    folder = tmp_path_factory.mktemp("table") / "loans"
    fitted.save(folder)
    return folder
