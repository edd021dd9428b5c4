"""vbdl: a JIT-compiled functional ensemble engine for Bayesian deep learning in PyTorch.

    q = vbdl.DeepEnsemble(net, n_members=5)          # what is random: a posterior
    likelihood = vbdl.Categorical()                  # how targets are distributed
    vbdl.fit(q, (x, y), likelihood)
    predict = vbdl.Predictor(q, likelihood)          # one compiled function
    p = predict(x)                                   # p.probs, p.total = p.aleatoric + p.epistemic
    predict = vbdl.calibrate(predict, (x_new, y_new), vbdl.Temperature())

Posteriors:    MCDropout, MeanField, IVON, DeepEnsemble, BatchEnsemble, Masksembles, Snapshots, SWAG, Laplace,
               Stochastic, Deterministic, TestTimeAugmentation; augmentations
Likelihoods:   Categorical, Bernoulli, Gaussian, HeteroscedasticGaussian
Use:           fit, split, inspect, recommend, Predictor, adaptive
Afterwards:    calibrate, unseen, Temperature, StdScaling, ConformalSets, with_decision; calibration, decision, metrics,
               ood
Models:        save, load, register, artifact, export, predict_table, VBDLClassifier, VBDLRegressor
Layers:        BayesianLinear, BayesianConv1d, BayesianConv2d, BayesianConv3d, Normal, ScaleMixture

Public names are imported on first use, so that `vbdl --help` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vbdl import former
from vbdl.compiling.cache import give_place
from vbdl.methods import METHODS

give_place()
former.find_modules()

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vbdl import artifact as artifact
    from vbdl import augmentations as augmentations
    from vbdl import calibration as calibration
    from vbdl import decision as decision
    from vbdl import export as export
    from vbdl import metrics as metrics
    from vbdl import ood as ood
    from vbdl.artifact.loading import load as load
    from vbdl.artifact.modules import register as register
    from vbdl.artifact.saving import save as save
    from vbdl.batch.predicting import predict_table as predict_table
    from vbdl.calibration.calibrate import calibrate as calibrate
    from vbdl.calibration.conformal import ConformalSets as ConformalSets
    from vbdl.calibration.overlap import unseen as unseen
    from vbdl.calibration.std_scaling import StdScaling as StdScaling
    from vbdl.calibration.temperature import Temperature as Temperature
    from vbdl.data.splitting import split as split
    from vbdl.decision.deciding import with_decision as with_decision
    from vbdl.engine import adaptive as adaptive
    from vbdl.engine.predictor import Predictor as Predictor
    from vbdl.estimators.classifier import VBDLClassifier as VBDLClassifier
    from vbdl.estimators.regressor import VBDLRegressor as VBDLRegressor
    from vbdl.inspection import inspect as inspect
    from vbdl.likelihoods.bernoulli import Bernoulli as Bernoulli
    from vbdl.likelihoods.categorical import Categorical as Categorical
    from vbdl.likelihoods.gaussian import Gaussian as Gaussian
    from vbdl.likelihoods.heteroscedastic import HeteroscedasticGaussian as HeteroscedasticGaussian
    from vbdl.nn.layers import BayesianConv1d as BayesianConv1d
    from vbdl.nn.layers import BayesianConv2d as BayesianConv2d
    from vbdl.nn.layers import BayesianConv3d as BayesianConv3d
    from vbdl.nn.layers import BayesianLinear as BayesianLinear
    from vbdl.nn.priors import Normal as Normal
    from vbdl.nn.priors import ScaleMixture as ScaleMixture
    from vbdl.posteriors.augmentation import TestTimeAugmentation as TestTimeAugmentation
    from vbdl.posteriors.batch_ensemble import BatchEnsemble as BatchEnsemble
    from vbdl.posteriors.deterministic import Deterministic as Deterministic
    from vbdl.posteriors.ensemble import DeepEnsemble as DeepEnsemble
    from vbdl.posteriors.ivon import IVON as IVON
    from vbdl.posteriors.laplace import Laplace as Laplace
    from vbdl.posteriors.masksembles import Masksembles as Masksembles
    from vbdl.posteriors.mc_dropout import MCDropout as MCDropout
    from vbdl.posteriors.mean_field import MeanField as MeanField
    from vbdl.posteriors.snapshots import Snapshots as Snapshots
    from vbdl.posteriors.stochastic import Stochastic as Stochastic
    from vbdl.posteriors.swag import SWAG as SWAG
    from vbdl.recommendation import recommend as recommend
    from vbdl.training.fit import fit as fit

_HOME = {
    "Predictor": "engine.predictor",
    "load": "artifact.loading",
    "register": "artifact.modules",
    "save": "artifact.saving",
    "predict_table": "batch.predicting",
    "VBDLClassifier": "estimators.classifier",
    "VBDLRegressor": "estimators.regressor",
    "inspect": "inspection",
    "Bernoulli": "likelihoods.bernoulli",
    "Categorical": "likelihoods.categorical",
    "Gaussian": "likelihoods.gaussian",
    "HeteroscedasticGaussian": "likelihoods.heteroscedastic",
    "BayesianConv1d": "nn.layers",
    "BayesianConv2d": "nn.layers",
    "BayesianConv3d": "nn.layers",
    "BayesianLinear": "nn.layers",
    "Normal": "nn.priors",
    "ScaleMixture": "nn.priors",
    **{method.class_name: method.module.removeprefix("vbdl.") for method in METHODS.values()},
    "fit": "training.fit",
    "split": "data.splitting",
    "recommend": "recommendation",
    "calibrate": "calibration.calibrate",
    "ConformalSets": "calibration.conformal",
    "StdScaling": "calibration.std_scaling",
    "Temperature": "calibration.temperature",
    "unseen": "calibration.overlap",
    "with_decision": "decision.deciding",
}

_MODULES = {name: name for name in ("artifact", "augmentations", "calibration", "decision", "export", "metrics", "ood")}
_MODULES["adaptive"] = "engine.adaptive"

__all__ = sorted([*_HOME, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"vbdl.{_MODULES[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'vbdl' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vbdl.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
