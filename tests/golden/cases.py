"""Small predictors of every method, likelihood, calibration and decision, with weights from a seeded NumPy generator.

Nothing here depends on training or on torch's initialisation, so that the same predictors can be built by any version
of vbdl, in its own names. Each case is a function that returns a predictor; `RECORDED` says how each is called.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import vbdl
from vbdl import calibration, decision

CLASSES, FEATURES, ROWS, CALIBRATION_ROWS, DRAWS, MEMBERS = 3, 7, 9, 120, 6, 3
SETTINGS: dict[str, Any] = {"compile": False, "tiles": (64,), "seed": 11}


def numbers(*shape: int, seed: int) -> torch.Tensor:
    """Standard normal numbers, float32."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def with_weights(network: nn.Module, seed: int) -> nn.Module:
    """The network with its weights and running statistics drawn by NumPy: every layer's output is of order 1."""
    generator = np.random.default_rng(seed)
    tensors = {n: p.data for n, p in network.named_parameters() if "log_std" not in n}
    tensors |= {n: b for n, b in network.named_buffers() if "running" in n}
    for name, tensor in tensors.items():
        drawn = torch.from_numpy(generator.standard_normal(tuple(tensor.shape)).astype(np.float32))
        if "running_var" in name:
            drawn = 0.5 + drawn.abs()
        elif tensor.ndim > 1:
            drawn = drawn * float(tensor[0].numel()) ** -0.5
        else:
            drawn = 0.2 * drawn + (1.0 if name.endswith("weight") else 0.0)
        tensor.copy_(drawn)
    return network


# -- networks: a function of the number of outputs and of a seed, and the shape of a row


def mlp(outputs: int = CLASSES, seed: int = 1) -> nn.Module:
    return with_weights(
        nn.Sequential(nn.Linear(FEATURES, 12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, outputs)), seed
    )


def deep(outputs: int = CLASSES, seed: int = 1) -> nn.Module:
    layers = (nn.Linear(FEATURES, 10), nn.LayerNorm(10), nn.Tanh(), nn.Dropout(0.2), nn.Linear(10, 9), nn.GELU())
    return with_weights(nn.Sequential(*layers, nn.Dropout(0.4), nn.Linear(9, outputs)), seed)


def cnn(outputs: int = CLASSES, seed: int = 1) -> nn.Module:
    layers = (nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.3), nn.MaxPool2d(2))
    return with_weights(nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, outputs)), seed)


def transformer(outputs: int = CLASSES, seed: int = 1) -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 13, dropout=0.2, activation="gelu", batch_first=True)
    return with_weights(nn.Sequential(layer, nn.Flatten(), nn.Linear(30, outputs)), seed)


def layered(outputs: int = CLASSES, seed: int = 1) -> nn.Module:
    """Bayesian layers and a plain one."""
    mixture = vbdl.ScaleMixture(0.4, 1.5, 0.01)
    first = vbdl.BayesianLinear(FEATURES, 8, prior=0.7, initial_std=0.1)
    last = vbdl.BayesianLinear(8, outputs, False, prior=mixture, initial_std=0.2)
    return with_weights(nn.Sequential(first, nn.ReLU(), nn.Linear(8, 8), last), seed)


def layered_cnn(outputs: int = CLASSES, seed: int = 1) -> nn.Module:
    convolution = vbdl.BayesianConv2d(2, 3, 3, padding=1, initial_std=0.1)
    return with_weights(nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(3 * 6 * 4, outputs)), seed)


def frozen_backbone(seed: int) -> nn.Module:
    """Members differ in their heads only."""
    backbone = with_weights(nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU()), 40)
    backbone.requires_grad_(False)
    return nn.Sequential(backbone, with_weights(nn.Linear(16, CLASSES), seed))


ROW_SHAPE = {cnn: (2, 6, 4), layered_cnn: (2, 6, 4), transformer: (5, 6)}


def rows_for(name: str, count: int = ROWS, seed: int = 2) -> torch.Tensor:
    shape = next((shape for network, shape in ROW_SHAPE.items() if f" {network.__name__}" in f" {name}"), (FEATURES,))
    return numbers(count, *shape, seed=seed)


# -- methods


def sampled(posterior: nn.Module, likelihood: nn.Module | None = None, **settings: Any) -> vbdl.Predictor:
    n_samples: Any = DRAWS if posterior.n_draws is None else posterior.n_draws
    return vbdl.Predictor(posterior, likelihood or vbdl.Categorical(), n_samples, **{**SETTINGS, **settings})  # type: ignore[arg-type]


def mean_field(network: nn.Module, **options: Any) -> nn.Module:
    return vbdl.MeanField(network, 101, **{"prior": 0.8, "initial_std": 0.1, **options})


def ensemble(make: Callable[[int], nn.Module]) -> nn.Module:
    return vbdl.DeepEnsemble([make(20 + m) for m in range(MEMBERS)])


METHODS: dict[str, Callable[[], vbdl.Predictor]] = {
    "mc-dropout mlp": lambda: sampled(vbdl.MCDropout(mlp(), seed=3)),
    "mc-dropout deep": lambda: sampled(vbdl.MCDropout(deep())),
    "mc-dropout cnn": lambda: sampled(vbdl.MCDropout(cnn())),
    "mc-dropout transformer": lambda: sampled(vbdl.MCDropout(transformer())),
    "mc-dropout rates": lambda: sampled(vbdl.MCDropout(deep(), p={"3": 0.5}, deterministic=("6", nn.Tanh))),
    "mc-dropout chunks": lambda: sampled(vbdl.MCDropout(mlp()), chunk_size=2),
    "mc-dropout autocast": lambda: sampled(vbdl.MCDropout(mlp()), autocast=torch.bfloat16),
    "mean-field mlp": lambda: sampled(mean_field(mlp())),
    "mean-field mlp joint": lambda: sampled(mean_field(mlp()), joint=True),
    "mean-field cnn": lambda: sampled(mean_field(cnn())),
    "mean-field transformer": lambda: sampled(mean_field(transformer())),
    "mean-field mixture": lambda: sampled(
        mean_field(deep(), prior=vbdl.ScaleMixture(), parameters=[nn.Linear], n_samples=2)
    ),
    "mean-field some": lambda: sampled(mean_field(deep(), prior={"": 1.0, "7": 0.2}, parameters=["4", "7"])),
    "mean-field layered": lambda: sampled(vbdl.MeanField(layered(), 101)),
    "mean-field layered joint": lambda: sampled(vbdl.MeanField(layered(), 101), joint=True),
    "mean-field layered_cnn": lambda: sampled(vbdl.MeanField(layered_cnn(), 101)),
    "ensemble mlp": lambda: sampled(ensemble(lambda s: mlp(seed=s))),
    "ensemble cnn": lambda: sampled(ensemble(lambda s: cnn(seed=s))),
    "ensemble frozen": lambda: sampled(ensemble(frozen_backbone)),
    "ensemble two architectures": lambda: sampled(vbdl.DeepEnsemble([mlp(seed=20), mlp(seed=21), deep(seed=22)])),
    "ensemble of mc-dropout": lambda: sampled(ensemble(lambda s: vbdl.MCDropout(mlp(seed=s)))),
    "ensemble of mean-field": lambda: sampled(ensemble(lambda s: mean_field(mlp(seed=s)))),
    "ensemble of mean-field layered": lambda: sampled(ensemble(lambda s: vbdl.MeanField(layered(seed=s), 101))),
    "ensemble autocast": lambda: sampled(ensemble(lambda s: deep(seed=s)), autocast=torch.bfloat16),
}


# -- likelihoods

LIKELIHOODS: dict[str, Callable[[], vbdl.Predictor]] = {
    "categorical": lambda: sampled(vbdl.MCDropout(mlp())),
    "bernoulli": lambda: sampled(vbdl.MCDropout(mlp(1)), vbdl.Bernoulli()),
    "bernoulli of several": lambda: sampled(vbdl.MCDropout(mlp(4)), vbdl.Bernoulli()),
    "gaussian": lambda: sampled(vbdl.MCDropout(mlp(2)), vbdl.Gaussian(2, std=0.3)),
    "gaussian covariance": lambda: sampled(vbdl.MCDropout(mlp(2)), vbdl.Gaussian(2, std=0.3, covariance=True)),
    "gaussian fixed": lambda: sampled(vbdl.MCDropout(mlp(1)), vbdl.Gaussian(1, std=0.3, learned=False)),
    "heteroscedastic": lambda: sampled(vbdl.MCDropout(mlp(4)), vbdl.HeteroscedasticGaussian(beta=0.5)),
    "heteroscedastic unit": lambda: sampled(
        vbdl.MCDropout(mlp(4)), vbdl.HeteroscedasticGaussian(beta=0.5, covariance=True, unit=250.0)
    ),
    "gaussian moments": lambda: sampled(vbdl.MCDropout(mlp(2)), vbdl.Gaussian(2, std=0.3), estimator="moments"),
    "categorical moments": lambda: sampled(mean_field(mlp()), estimator="moments"),
}


def noise_of_each_member() -> vbdl.Predictor:
    """Trained, because only training gives each member a noise of its own: the stored artefact says what it became."""
    posterior, likelihood = ensemble(lambda s: mlp(1, seed=s)), vbdl.Gaussian(1, std=0.4)
    x = numbers(40, FEATURES, seed=5)
    vbdl.fit(posterior, (x, x[:, :1]), likelihood, epochs=1, batch_size=20, compile=False)
    return sampled(posterior, likelihood)


# -- calibrations and decisions


def classes() -> vbdl.Predictor:
    return sampled(ensemble(lambda s: mlp(seed=s)))


def binary() -> vbdl.Predictor:
    return sampled(vbdl.MCDropout(mlp(1)), vbdl.Bernoulli())


def regression(outputs: int = 1) -> vbdl.Predictor:
    return sampled(vbdl.MCDropout(mlp(2 * outputs)), vbdl.HeteroscedasticGaussian())


def labels(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, count, CALIBRATION_ROWS))


def calibrated(predictor: vbdl.Predictor, method: nn.Module) -> vbdl.Predictor:
    """Fitted to labels that are right more often than not, or to targets about the mean."""
    x = numbers(CALIBRATION_ROWS, FEATURES, seed=6)
    p = predictor(x)
    if getattr(p, "probs", None) is not None:  # regressions had no such field in 0.1
        flipped = torch.from_numpy(np.random.default_rng(7).random(p.label.shape) < 0.3)
        n_classes = 2 if p.probs.ndim == p.total.ndim else CLASSES
        y = torch.where(flipped, (p.label + 1) % n_classes, p.label)
        y = y.float() if n_classes == 2 else y
    else:
        y = p.mean + 1.7 * p.std * numbers(*p.mean.shape, seed=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the form of arguments that 361ba7c takes
        return vbdl.calibrate(predictor, x, y, method)


CALIBRATIONS: dict[str, Callable[[], vbdl.Predictor]] = {
    "temperature": lambda: calibrated(classes(), calibration.Temperature()),
    "temperature of probs": lambda: calibrated(classes(), calibration.Temperature("probs")),
    "temperature of yes or no": lambda: calibrated(binary(), calibration.Temperature()),
    "ensemble temperature": lambda: calibrated(classes(), calibration.EnsembleTemperature()),
    "vector scaling": lambda: calibrated(classes(), calibration.VectorScaling()),
    "matrix scaling": lambda: calibrated(classes(), calibration.MatrixScaling(0.3)),
    "dirichlet": lambda: calibrated(classes(), calibration.Dirichlet(0.3)),
    "platt": lambda: calibrated(binary(), calibration.Platt(False)),
    "beta": lambda: calibrated(classes(), calibration.Beta()),
    "histogram": lambda: calibrated(classes(), calibration.Histogram(5)),
    "histogram of equal mass": lambda: calibrated(binary(), calibration.Histogram(6, "mass")),
    "isotonic": lambda: calibrated(classes(), calibration.Isotonic()),
    "bbq": lambda: calibrated(classes(), calibration.BBQ()),
    "conformal sets": lambda: calibrated(classes(), calibration.ConformalSets(0.2)),
    "conformal sets aps": lambda: calibrated(
        classes(), calibration.ConformalSets(0.2, calibration.APS(), never_empty=True)
    ),
    "conformal sets raps": lambda: calibrated(
        classes(), calibration.ConformalSets(0.2, calibration.RAPS(0.02, 1), per_class=True)
    ),
    "std scaling": lambda: calibrated(regression(2), calibration.StdScaling()),
    "std scaling of all": lambda: calibrated(regression(2), calibration.StdScaling(per_output=False)),
    "cdf recalibration": lambda: calibrated(regression(), calibration.CDFRecalibration()),
    "absolute intervals": lambda: calibrated(regression(), calibration.AbsoluteIntervals(0.2)),
    "normalised intervals": lambda: calibrated(regression(2), calibration.NormalizedIntervals(0.2)),
    "cqr": lambda: calibrated(regression(), calibration.CQR(0.2)),
    "temperature and sets": lambda: calibrated(
        calibrated(classes(), calibration.Temperature()), calibration.ConformalSets(0.1, calibration.APS())
    ),
}


def decided(predictor: vbdl.Predictor, how: nn.Module) -> vbdl.Predictor:
    return vbdl.with_decision(predictor, how)


def referral() -> decision.Referral:
    uncertainty = torch.linspace(0, 1, 200, dtype=torch.float64)
    return decision.Referral("total").for_risk(uncertainty, uncertainty > 0.8, 0.2, 0.1)


DECISIONS: dict[str, Callable[[], vbdl.Predictor]] = {
    "referral": lambda: decided(classes(), decision.Referral("epistemic", 0.1)),
    "referral with a certificate": lambda: decided(classes(), referral()),
    "expected cost": lambda: decided(
        calibrated(classes(), calibration.Temperature()), decision.ExpectedCost(1 - torch.eye(CLASSES), 0.4)
    ),
    "anomaly flags": lambda: decided(
        classes(), decision.AnomalyFlags(0.2).fit(classes()(numbers(CALIBRATION_ROWS, FEATURES, seed=6)).epistemic)
    ),
    "hand over": lambda: decided(
        classes(), decision.HandOver((0.6, 0.5), (0.9, 0.8), dwell=3, deadline=0.5, kind="epistemic")
    ),
    "hand over on a path": lambda: decided(
        regression(4),
        decision.HandOver((0.6, 0.3), (0.9, 0.5), bounds=decision.PathBounds(-1.5, torch.linspace(1.0, 2.0, 4))),
    ),
    "risk": lambda: decided(regression(2), decision.Risk(0.975, fraction=0.5, limit=0.3, max_var=0.8)),
    "risk of a scaled regression": lambda: decided(
        calibrated(regression(2), calibration.StdScaling()), decision.Risk(0.95)
    ),
}

CASES: dict[str, Callable[[], vbdl.Predictor]] = {
    **{f"methods/{n}": make for n, make in METHODS.items()},
    **{f"likelihoods/{n}": make for n, make in LIKELIHOODS.items()},
    **{f"calibrations/{n}": make for n, make in CALIBRATIONS.items()},
    **{f"decisions/{n}": make for n, make in DECISIONS.items()},
    "likelihoods/gaussian of members": noise_of_each_member,
}
STORED_ONLY = ("likelihoods/gaussian of members",)  # depends on training: only the artefact is compared

_RISKS = ("risk", "risk of a scaled regression")
# Numbers that are others on purpose since 361ba7c, of cases built anew or loaded from their artefacts. Today's are
# in changed.safetensors, by make.py.
_FROZEN = "6700611: frozen layers are held once and computed once for all members, in another order of sums (rounding)"
_SMOOTH = "1bf7e8b: fitted as a smooth curve, because the slope of the empirical distribution is no density"
_FLOAT64 = "1bf7e8b: maps of 0.1 are read by the arithmetic of the smooth ones (rounding)"
_MIXTURE = "7d0385f: VaR and ES are those of the calibrated mixture of draws, no longer of a normal of its moments"
CHANGED = {
    "built:methods/ensemble frozen": _FROZEN,
    "built:calibrations/cdf recalibration": _SMOOTH,
    "stored:calibrations/cdf recalibration": _FLOAT64,
    **{f"{how}:decisions/{name}": _MIXTURE for how in ("built", "stored") for name in _RISKS},
}


def predict(name: str, predictor: vbdl.Predictor) -> dict[str, np.ndarray]:
    """The fields of the case's prediction; of methods each draw's parameters too; of regressions two quantiles."""
    each_draw = name.startswith("methods/")
    p = predictor(rows_for(name), samples=each_draw or name.endswith("cdf recalibration"))
    fields = {n: t for n, t in vars(p).items() if isinstance(t, torch.Tensor)}
    if name.endswith("cdf recalibration"):
        fields |= {"quantile 0.1": p.quantile(0.1), "quantile 0.7": p.quantile(0.7)}
    if name == "methods/mc-dropout chunks":
        settled = predictor(rows_for(name), tolerance=0.08)
        fields |= {"adaptive probs": settled.probs, "adaptive draws": torch.as_tensor(settled.n_samples)}
    return {n: t.detach().numpy() for n, t in fields.items()}


# -- training: the step's draws, minibatches, regularisers and optimiser


def trained(posterior: nn.Module, likelihood: nn.Module | None = None, **options: Any) -> dict[str, np.ndarray]:
    """The posterior's parameters after two epochs."""
    likelihood = likelihood or vbdl.Categorical()
    x = numbers(40, FEATURES, seed=5)
    y = x[:, :1] if isinstance(likelihood, vbdl.Gaussian) else labels(CLASSES, 9)[:40]
    vbdl.fit(posterior, (x, y), likelihood, **{"epochs": 2, "batch_size": 16, "seed": 4, "compile": False, **options})
    tensors = {**dict(posterior.named_parameters()), **{f"likelihood.{n}": p for n, p in likelihood.named_parameters()}}
    return {n.replace("/", "."): t.detach().numpy() for n, t in tensors.items()}


TRAINING: dict[str, Callable[[], dict[str, np.ndarray]]] = {
    "mc-dropout": lambda: trained(vbdl.MCDropout(mlp(), seed=3)),
    "mean-field": lambda: trained(mean_field(mlp(), n_samples=2, seed=3)),
    "mean-field layered": lambda: trained(vbdl.MeanField(layered(), 40, seed=3)),
    "ensemble": lambda: trained(ensemble(lambda s: mlp(1, seed=s)), vbdl.Gaussian(1, std=0.4)),
    "ensemble of mean-field": lambda: trained(ensemble(lambda s: mean_field(mlp(seed=s)))),
}
