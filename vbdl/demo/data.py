"""The data sets of the demo, with their splits, networks and out-of-distribution inputs.

Three come with scikit-learn (breast cancer, digits, diabetes); the 1-d curve is made here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from vbdl.data.splitting import split
from vbdl.demo import networks
from vbdl.likelihoods.bernoulli import Bernoulli
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.types import Likelihood

INSTALL = "the demo needs scikit-learn and matplotlib: pip install 'vbdl[demo]'"


@dataclass(frozen=True)
class Task:
    """A data set with the network, the likelihood and the training options for it. Inputs are standardized."""

    name: str
    x: dict[str, Tensor]  # "train", "validation", "test", "ood": (batch, ...) float32
    y: dict[str, Tensor]  # "train", "validation", "test": class numbers, 0 | 1, or standardized targets
    ood: str  # what the out-of-distribution inputs are
    network: Callable[[float], nn.Module]  # dropout rate -> a fresh network
    likelihood: Callable[[], Likelihood]
    unit: str = "nats"  # unit of the uncertainties
    y_std: float = 1.0  # standard deviation of the targets before standardization
    epochs: int = 100  # largest number of epochs

    @property
    def regression(self) -> bool:
        """Whether targets are real numbers."""
        return self.y["train"].is_floating_point()


def _sklearn() -> ModuleType:
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(INSTALL) from error
    return datasets


_SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


def _parts(values: Tensor, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values[of] for name, of in rows.items()}


def _standardized(values: np.ndarray, train: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The values standardized by the training rows, and the training rows' mean and std."""
    x = torch.from_numpy(np.asarray(values, dtype=np.float32))
    mean, std = x[train].mean(0), x[train].std(0).clamp_min(1e-6)
    return (x - mean) / std, mean, std


def breast_cancer(seed: int = 0) -> Task:
    """The breast cancer data: 569 biopsies with 30 measurements of cell nuclei, benign (1) or malignant (0)."""
    data = _sklearn().load_breast_cancer()
    y = torch.from_numpy(data.target).to(torch.int64)
    rows = split(len(y), _SHARES, stratify=y, seed=seed)
    values, _, _ = _standardized(data.data, rows["train"])
    x = _parts(values, rows)
    generator = torch.Generator().manual_seed(seed)
    columns = [x["test"][torch.randperm(len(x["test"]), generator=generator), j] for j in range(values.shape[1])]
    x["ood"] = torch.stack(columns, dim=1)
    return Task(
        name="breast cancer",
        x=x,
        y=_parts(y, rows),
        ood="test rows with every feature shuffled on its own",
        network=lambda p: networks.mlp(30, 1, width=64, dropout=p),
        likelihood=Bernoulli,
    )


def digits(seed: int = 0) -> Task:
    """The digits data: 1797 handwritten digits of 8 x 8 pixels."""
    data = _sklearn().load_digits()
    y = torch.from_numpy(data.target).to(torch.int64)
    rows = split(len(y), _SHARES, stratify=y, seed=seed)
    images = torch.from_numpy(data.images.astype(np.float32) / 16).unsqueeze(1)
    x = _parts(images, rows)
    x["ood"] = x["test"].rot90(1, (2, 3)).contiguous()
    return Task(
        name="digits",
        x=x,
        y=_parts(y, rows),
        ood="test images turned by 90 degrees",
        network=lambda p: networks.cnn(10, dropout=p),
        likelihood=Categorical,
        epochs=40,
    )


def diabetes(seed: int = 0) -> Task:
    """The diabetes data: 442 patients with 10 measurements; disease progression after a year, a score of 25 to 346."""
    data = _sklearn().load_diabetes(scaled=False)
    rows = split(len(data.target), _SHARES, seed=seed)
    values, _, _ = _standardized(data.data, rows["train"])
    target, _, std = _standardized(data.target, rows["train"])
    x = _parts(values, rows)
    x["ood"] = 3 * x["test"]
    return Task(
        name="diabetes",
        x=x,
        y=_parts(target, rows),
        ood="test rows, three times as far from the training mean",
        network=lambda p: networks.mlp(10, 1, width=50, dropout=p),
        likelihood=Gaussian,
        unit="score",
        y_std=float(std),
    )


CURVE_NOISE = 0.15  # standard deviation of the noise, in target units


def curve(seed: int = 0) -> Task:
    """Noisy points on a 1-d curve with a gap in the middle."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(160, 1, generator=generator) * 3.4 - 1.7
    x = torch.where(x > 0, x + 0.9, x - 0.9)
    noise = torch.randn(x.shape, generator=generator) * CURVE_NOISE
    rows = split(len(x), {"train": 0.8, "validation": 0.1, "test": 0.1}, seed=seed)
    return Task(
        name="curve",
        x=_parts(x, rows) | {"ood": torch.linspace(-4.5, 4.5, 256).unsqueeze(1)},
        y=_parts(curve_mean(x) + noise, rows),
        ood="left of, between and right of the training points",
        network=lambda p: networks.curve(50, dropout=p),
        likelihood=lambda: Gaussian(std=0.3),
        unit="target",
        epochs=1000,
    )


def curve_mean(x: Tensor) -> Tensor:
    """The curve without the noise."""
    return torch.sin(1.6 * x) + 0.3 * x


TASKS: dict[str, Callable[[int], Task]] = {"breast cancer": breast_cancer, "digits": digits, "diabetes": diabetes}
