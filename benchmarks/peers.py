"""The other libraries in `benchmarks/speed.py`, called as their documentation says; skipped if not installed.

They can be installed in a second environment that uses the packages of vbdl's, whose versions then stay unchanged.

    python -m venv .venv-peers
    echo "import site; site.addsitedir('$PWD/.venv/lib/python3.11/site-packages')" \
        > .venv-peers/lib/python3.11/site-packages/vbdl.pth
    .venv-peers/bin/pip install --no-deps torch-uncertainty bayesian-torch laplace-torch posteriors \
        blitz-bayesian-pytorch baal lightning-uq-box    # and, also with --no-deps, their dependencies
    .venv-peers/bin/python benchmarks/speed.py

Every function takes vbdl's posterior and gives the peer the same networks, rates, means and stds.
"""

import contextlib
import importlib
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import workloads
from torch import Tensor, nn

from vbdl import DeepEnsemble, MCDropout, MeanField

Samples = Callable[[], Tensor]
Build = Callable[[Any, Tensor, int], Samples]

PEERS = {  # distribution: module to import
    "torch-uncertainty": "torch_uncertainty",
    "bayesian-torch": "bayesian_torch",
    "laplace-torch": "laplace",
    "posteriors": "posteriors",
    "blitz-bayesian-pytorch": "blitz",
    "baal": "baal",
    "lightning-uq-box": "lightning_uq_box",
}


def absent() -> dict[str, str]:
    """The libraries that are not installed."""
    return {name: "not installed" for name, module in PEERS.items() if importlib.util.find_spec(module) is None}


def versions() -> dict[str, str]:
    """The versions of the libraries that are installed, by name."""
    installed = {}
    for name in PEERS:
        with contextlib.suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def contenders(q: Any, x: Tensor, n_samples: int) -> dict[str, Callable[[], Samples]]:
    """name -> what builds it and gives its outputs, (samples, batch, outputs), for this posterior."""
    missing = absent()
    mine = BUILDERS[type(q)]
    chosen = {name: build for name, (peer, build) in mine.items() if peer not in missing}

    def quietly(build: Build) -> Callable[[], Samples]:
        def make() -> Samples:
            with _importable(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                return build(q, x, n_samples)

        return make

    return {name: quietly(build) for name, build in chosen.items()}


_library: list[torch.library.Library] = []


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """torchvision, which several peers import, may be a build for CUDA whose library does not load beside a CPU build
    of torch. None of its operators is used: declaring those it asks for at import is enough."""
    if not _library and importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except (RuntimeError, ImportError):
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                with contextlib.suppress(RuntimeError):  # declared by what did load
                    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _library.append(library)
    yield


def _network(q: Any) -> nn.Module:
    """The network of a dropout posterior, with separate dropout layers."""
    return workloads.networks(q)[0].eval()


def _normals(q: MeanField) -> tuple[nn.Sequential, dict[str, tuple[Tensor, Tensor]]]:
    """The network of the means, and the (mean, std) of each parameter by name."""
    network = workloads.plain(q)
    assert isinstance(network, nn.Sequential)
    return network, {n: (mean.detach(), log_std.detach().exp()) for n, mean, log_std in q.module.normals()}


def _rho(std: Tensor) -> Tensor:
    """The number whose softplus is this std."""
    return torch.log(torch.expm1(std))


# -- MC dropout


def _torch_uncertainty_dropout(on_batch: bool) -> Build:
    def build(q: MCDropout, x: Tensor, n_samples: int) -> Samples:
        from torch_uncertainty.methods import mc_dropout

        model = mc_dropout(_network(q), num_estimators=n_samples, on_batch=on_batch).eval()
        return lambda: model(x).unflatten(0, (n_samples, len(x)))

    return build


def _baal_dropout(caching: bool) -> Build:
    def build(q: MCDropout, x: Tensor, n_samples: int) -> Samples:
        from baal.bayesian.caching_utils import MCCachingModule
        from baal.bayesian.dropout import MCDropoutModule
        from baal.modelwrapper import ModelWrapper, TrainingArgs

        model = MCDropoutModule(_network(q))
        model = MCCachingModule(model) if caching else model
        wrapper = ModelWrapper(model, TrainingArgs(replicate_in_memory=not caching, use_cuda=False))
        wrapper.eval()
        return lambda: wrapper.predict_on_batch(x, iterations=n_samples).movedim(-1, 0)

    return build


def _uq_box_dropout(q: MCDropout, x: Tensor, n_samples: int) -> Samples:
    from lightning_uq_box.uq_methods import MCDropoutClassification

    model = MCDropoutClassification(_network(q), n_samples, nn.CrossEntropyLoss())
    return lambda: model.predict_step(x)["logits"].movedim(-1, 0)


# -- mean-field


def _replaced(network: nn.Sequential, make: Callable[[str, nn.Linear], nn.Module]) -> nn.Sequential:
    for name, m in list(network.named_children()):
        if isinstance(m, nn.Linear):
            setattr(network, name, make(name, m))
    return network


def _torch_uncertainty_mean_field(q: MeanField, x: Tensor, n_samples: int) -> Samples:
    from torch_uncertainty.layers.bayesian import BayesLinear
    from torch_uncertainty.methods.stochastic import StochasticModel

    network, normals = _normals(q)

    def make(name: str, m: nn.Linear) -> nn.Module:
        layer = BayesLinear(m.in_features, m.out_features)
        for part in ("weight", "bias"):
            mean, std = normals[f"{name}.{part}"]
            getattr(layer, f"{part}_mu").copy_(mean)
            getattr(layer, f"{part}_sigma").copy_(_rho(std))
        return layer

    model = StochasticModel(_replaced(network, make), n_samples).eval()
    return lambda: model(x).unflatten(0, (n_samples, len(x)))


def _bayesian_torch(q: MeanField, x: Tensor, n_samples: int) -> Samples:
    from bayesian_torch.layers import LinearReparameterization

    network, normals = _normals(q)

    def make(name: str, m: nn.Linear) -> nn.Module:
        layer = LinearReparameterization(m.in_features, m.out_features)
        layer.dnn_to_bnn_flag = True  # as its converter sets it: no KL in prediction
        for part in ("weight", "bias"):
            mean, std = normals[f"{name}.{part}"]
            getattr(layer, f"mu_{part}").copy_(mean)
            getattr(layer, f"rho_{part}").copy_(_rho(std))
        return layer

    model = _replaced(network, make).eval()
    return lambda: torch.stack([model(x) for _ in range(n_samples)])


def _blitz(q: MeanField, x: Tensor, n_samples: int) -> Samples:
    from blitz.modules import BayesianLinear

    network, normals = _normals(q)

    def make(name: str, m: nn.Linear) -> nn.Module:
        layer = BayesianLinear(m.in_features, m.out_features)
        for part in ("weight", "bias"):
            mean, std = normals[f"{name}.{part}"]
            sampler = getattr(layer, f"{part}_sampler")
            sampler.mu.copy_(mean)
            sampler.rho.copy_(_rho(std))
        return layer

    model = _replaced(network, make).eval()
    return lambda: torch.stack([model(x) for _ in range(n_samples)])


def _posteriors(q: MeanField, x: Tensor, n_samples: int) -> Samples:
    import posteriors
    from torch.func import functional_call, vmap

    network, normals = _normals(q)
    state = posteriors.vi.diag.VIDiagState(
        params={n: mean for n, (mean, _) in normals.items()},
        log_sd_diag={n: std.log() for n, (_, std) in normals.items()},
        opt_state=None,
    )
    one = lambda weights: functional_call(network, weights, (x,))
    return lambda: vmap(one)(posteriors.vi.diag.sample(state, (n_samples,)))


def _laplace(q: MeanField, x: Tensor, n_samples: int) -> Samples:
    """Its diagonal posterior with this mean and std, sampled through the network (pred_type "nn")."""
    from laplace import DiagLaplace

    network, normals = _normals(q)
    la = DiagLaplace(network, "classification", prior_precision=1e-6)
    la.mean = torch.cat([mean.flatten() for mean, _ in normals.values()])
    la.H = torch.cat([std.flatten() ** -2 for _, std in normals.values()])
    la.n_outputs = 10
    return lambda: la.functional_samples(x, pred_type="nn", n_samples=n_samples)


# -- ensembles


def _torch_uncertainty_ensemble(q: DeepEnsemble, x: Tensor, n_samples: int) -> Samples:
    from torch_uncertainty.methods import deep_ensembles

    model = deep_ensembles(workloads.networks(q), reset_model_parameters=False).eval()
    return lambda: model(x).unflatten(0, (n_samples, len(x)))


def _baal_ensemble(q: DeepEnsemble, x: Tensor, n_samples: int) -> Samples:
    from baal.ensemble import EnsembleModelWrapper
    from baal.modelwrapper import TrainingArgs

    wrapper = EnsembleModelWrapper(workloads.q_network(q).eval(), TrainingArgs(use_cuda=False))
    for m in range(q.n_members):
        wrapper.model.load_state_dict(q.member(m))
        wrapper.add_checkpoint()
    return lambda: wrapper.predict_on_batch(x).movedim(-1, 0)


def _uq_box_ensemble(q: DeepEnsemble, x: Tensor, n_samples: int) -> Samples:
    """It reads every member from disk in each call; that is its interface."""
    from lightning_uq_box.uq_methods.deep_ensemble import DeepEnsembleClassification

    folder = tempfile.TemporaryDirectory()
    members = []
    for m in range(q.n_members):
        path = Path(folder.name) / f"{m}.ckpt"
        torch.save({"state_dict": q.member(m)}, path)
        members.append({"base_model": workloads.q_network(q), "ckpt_path": str(path)})
    outputs = q.member(0)[list(q.member(0))[-1]].shape[0]
    model = DeepEnsembleClassification(members, num_classes=max(outputs, 2))
    model.folder = folder  # lives as long as the model
    return lambda: model(x).movedim(-1, 0)


BUILDERS: dict[type, dict[str, tuple[str, Build]]] = {
    MCDropout: {
        "torch-uncertainty": ("torch-uncertainty", _torch_uncertainty_dropout(on_batch=True)),
        "torch-uncertainty-loop": ("torch-uncertainty", _torch_uncertainty_dropout(on_batch=False)),
        "baal": ("baal", _baal_dropout(caching=False)),
        "baal-caching": ("baal", _baal_dropout(caching=True)),
        "lightning-uq-box": ("lightning-uq-box", _uq_box_dropout),
    },
    MeanField: {
        "torch-uncertainty": ("torch-uncertainty", _torch_uncertainty_mean_field),
        "bayesian-torch": ("bayesian-torch", _bayesian_torch),
        "blitz": ("blitz-bayesian-pytorch", _blitz),
        "posteriors": ("posteriors", _posteriors),
        "laplace-torch": ("laplace-torch", _laplace),
    },
    DeepEnsemble: {
        "torch-uncertainty": ("torch-uncertainty", _torch_uncertainty_ensemble),
        "baal": ("baal", _baal_ensemble),
        "lightning-uq-box": ("lightning-uq-box", _uq_box_ensemble),
    },
}
