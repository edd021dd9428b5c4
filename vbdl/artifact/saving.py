"""Saving a predictor as an artifact: `vbdl.save`."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn
from vbdl_kernels import CONTRACT

import vbdl
from vbdl.artifact import modules, networks, posteriors
from vbdl.artifact.card import card
from vbdl.artifact.files import locate, write_folder
from vbdl.artifact.manifest import (
    CARD,
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    TENSORS,
    Architecture,
    Ensemble,
    InputEntry,
    Inputs,
    Manifest,
    Reference,
    Single,
    StoredSettings,
    Supplied,
    Versions,
    check_json,
    encode,
)
from vbdl.artifact.tensors import CODES, entries, to_bytes
from vbdl.calibration.calibrated import CalibratedLikelihood
from vbdl.calling.inputs import TENSOR, Container
from vbdl.calling.lending import only_reading
from vbdl.calling.traversing import is_sparse
from vbdl.decision.deciding import DecidingLikelihood
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.around import layers
from vbdl.types import Decision, Json, Likelihood, Posterior
from vbdl.types import Inputs as Batch

TRAINING_ROWS = "training_rows"
_log = logging.getLogger("vbdl")


class SaveOptions(TypedDict, total=False):
    """The keyword arguments of `save` that say what an artifact holds besides the predictor."""

    extras: Json | None
    metrics: Json | None
    classes: Sequence[str | int | bool] | None
    example: Batch | None
    architecture: str | Sequence[str | None] | None
    arguments: Json | Sequence[Json] | None


def save(
    predictor: Predictor,
    folder: str | Path,
    *,
    extras: Json | None = None,
    metrics: Json | None = None,
    classes: Sequence[str | int | bool] | None = None,
    example: Batch | None = None,
    architecture: str | Sequence[str | None] | None = None,
    arguments: Json | Sequence[Json] | None = None,
    overwrite: bool = False,
) -> Path:
    """Save the predictor as a folder of safetensors, a JSON manifest and a model card; return the folder.

    extras: your own data about the model, e.g. a schema of columns or preprocessing, as a dict that JSON can hold;
        read back as `vbdl.load(folder).manifest.extras`. A predictor that was loaded, or derived from a loaded one,
        keeps its extras, architecture and arguments unless new ones are given.
    metrics: metrics for the model card, {"accuracy": 0.97, ...}, as a dict that JSON can hold.
    classes: the names of the classes in the order of the network's outputs, by which a service answers; stored as
        extras["classes"], which does the same.
    example: one batch of inputs, from which the shapes of a row are recorded, as `vbdl serve` needs them; default: the
        inputs of an earlier call of this predictor, or of the one it was made from. If there are none, the log says so.
    architecture: "module:name" of a function or class that returns the network when called with `arguments`. Not
        needed for networks of torch.nn's layers and registered classes (`vbdl.register`); other networks are saved
        without it, too, with a warning in the log, but `load` then needs module=, and they cannot be served. For an
        ensemble of several architectures a sequence, with None for those that need no name.
    overwrite: replace an existing artifact.

    The folder appears complete or not at all. Raises ValueError if a tensor is not finite or something cannot be
    stored, FileExistsError if the folder exists and is not empty.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 4), vbdl.Categorical(), compile=False)
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saved = vbdl.save(predict, f"{folder}/model.vbdl", metrics={"accuracy": 0.9})
    ...     sorted(path.name for path in saved.iterdir())
    ['README.md', 'manifest.json', 'model.safetensors']
    """
    folder = Path(folder)
    files = contents(
        predictor,
        extras=extras,
        metrics=metrics,
        classes=classes,
        example=example,
        architecture=architecture,
        arguments=arguments,
    )
    write_folder(folder, files, locate if overwrite else None)
    return folder


def contents(
    predictor: Predictor,
    *,
    extras: Json | None = None,
    metrics: Json | None = None,
    classes: Sequence[str | int | bool] | None = None,
    example: Batch | None = None,
    architecture: str | Sequence[str | None] | None = None,
    arguments: Json | Sequence[Json] | None = None,
) -> dict[str, bytes]:
    """The bytes of the artifact's files by file name; arguments as for `save`."""
    if predictor.estimator != "sampling":
        raise ValueError(
            "an artifact predicts by sampling: save predictor.replace(estimator='sampling'), and call "
            "replace(estimator='moments') after loading"
        )
    before = predictor.manifest
    if extras is None and before is not None:
        extras = before.extras
    if classes is not None:
        extras = {**(extras or {}), "classes": list(classes)}
    if architecture is None and arguments is None and before is not None:
        known = posteriors.architectures(before.posterior)
    else:
        known = [None] * len(predictor.posterior.parts)
    description = _describe(predictor.posterior, architecture, arguments, known)
    for described, earlier in zip(posteriors.architectures(description), known, strict=True):
        if isinstance(described, Supplied) and earlier is None:
            _log.warning(
                "the artifact does not describe its network, a %s: load needs module=network, and vbdl serve cannot "
                "load it. Save it with architecture='module:function' of a function that builds the network, or put "
                "@vbdl.register above the class",
                described.name,
            )
            break
    inputs = inputs_of(predictor, example)
    if inputs is None:
        _log.warning(
            "the artifact does not say what a row looks like, which vbdl serve needs: save it with example=x, one batch"
        )
    tensors = {f"posterior.{n}": t for n, t in _state(predictor.posterior).items()}
    tensors |= {f"likelihood.{n}": t for n, t in _state(predictor.likelihood).items()}
    for name, t in tensors.items():
        if is_sparse(t):
            raise ValueError(
                f"nothing was saved: {name} is a sparse tensor, which an artifact cannot hold. Register its indices "
                f"and values as two buffers, and make the sparse tensor of them in forward"
            )
        # thresholds of a likelihood may be infinite, weights may not
        sound = t.isfinite() if name.startswith("posterior.") else ~t.isnan()
        if t.is_floating_point() and not bool(sound.all()):
            raise ValueError(f"nothing was saved: {int((~sound).sum())} of {t.numel()} values of {name} are not finite")
    fingerprints = training_rows(predictor.posterior)
    if fingerprints is not None:
        tensors[TRAINING_ROWS] = fingerprints
    data = to_bytes(tensors)
    manifest = Manifest(
        format=FORMAT,
        versions=Versions(vbdl.__version__, str(torch.__version__), CONTRACT),
        posterior=description,
        likelihood=check_json(json.loads(json.dumps(modules.describe(predictor.likelihood))), "the likelihood"),
        settings=_settings(predictor),
        inputs=inputs,
        tensors=entries(tensors),
        file_bytes=len(data),
        file_sha256=hashlib.sha256(data).hexdigest(),
        training_rows=0 if fingerprints is None else len(fingerprints),
        metrics=check_json(dict(metrics or {}), "metrics"),
        extras=check_json(dict(extras or {}), "extras"),
        fitted=_fitted(predictor.likelihood),
    )
    encoded = encode(manifest)
    if len(encoded) > MAX_MANIFEST_BYTES:
        raise ValueError(f"the manifest has {len(encoded)} bytes, more than {MAX_MANIFEST_BYTES}; pass fewer extras")
    return {MANIFEST: encoded, TENSORS: data, CARD: card(manifest).encode()}


def _describe(
    posterior: Posterior,
    architecture: str | Sequence[str | None] | None,
    arguments: Json | Sequence[Json] | None,
    known: Sequence[Architecture | None],
) -> Single | Ensemble:
    """Describe a posterior for the manifest.

    known: the architecture of each part in the artifact that the posterior was loaded from, or None.
    """
    if not (architecture is None or isinstance(architecture, Sequence)):
        raise TypeError(
            f'architecture must be "module:name" of a function or class that returns the network, got {architecture!r}'
        )
    targets = [architecture] if architecture is None or isinstance(architecture, str) else list(architecture)
    each_arguments = [arguments or {}] if arguments is None or isinstance(arguments, Mapping) else list(arguments)
    parts = len(posterior.parts)
    if architecture is None:
        targets = [None] * parts
    each_arguments = each_arguments * parts if len(each_arguments) == 1 else each_arguments
    if len(targets) != parts or len(each_arguments) != parts:
        raise ValueError(
            f"the posterior has {parts} architectures, but architecture= has {len(targets)} entries and arguments= "
            f"{len(each_arguments)}"
        )
    remaining = iter(zip(targets, each_arguments, known, strict=True))

    def network(module: nn.Module, values: Mapping[str, Tensor]) -> Architecture:
        target, called_with, before = next(remaining)
        if isinstance(before, Reference):
            # not imported again: a caller of load who does not trust the name may have passed the network as module=
            return Reference(before.target, before.arguments, networks.settings(module))
        return networks.describe(module, values, target, called_with)

    with networks.quiet_generator():
        return posteriors.describe(posterior, network)


def _fitted(likelihood: Likelihood) -> list[str]:
    """What the calibrators and the decision inside a likelihood were fitted to, in words, the first fitted first."""
    texts = []
    for layer in reversed(list(layers(likelihood))):
        if isinstance(layer, CalibratedLikelihood):
            rows, overlap = (int(layer.get_buffer(name)) for name in ("n_rows", "n_overlap"))
            seen = f", {overlap:,} of which training has seen" if overlap else ""
            texts.append(f"{type(layer.method).__name__}: {layer.method.fitted_in_words}, on {rows:,} rows{seen}")
        elif (
            isinstance(layer, DecidingLikelihood)
            and isinstance(layer.decision, Decision)
            and layer.decision.fitted_in_words
        ):
            texts.append(f"{type(layer.decision).__name__}: {layer.decision.fitted_in_words}")
    return [text[:4096] for text in texts]


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors by name; a tied tensor appears once, under its first name."""
    tensors, seen = {}, set()
    with only_reading(stacks=True):
        state = module.state_dict(keep_vars=True)
    for name, t in state.items():
        if not isinstance(t, Tensor):
            raise ValueError(f"the module cannot be saved: {name} of its state is a {type(t).__name__}, not a tensor")
        if id(t) not in seen:
            seen.add(id(t))
            tensors[name] = t.detach()
    return tensors


def training_rows(posterior: Posterior) -> Tensor | None:
    """The fingerprints of the rows the posterior was trained on, (rows,) int64 sorted, or None if not recorded."""
    recorded = [p.training_rows for p in (posterior, *posterior.parts)]
    known = [t.cpu() for t in recorded if t is not None]
    return torch.cat(known).unique() if known else None


def _settings(predictor: Predictor) -> StoredSettings:
    s = predictor.settings
    autocast = None if s.autocast is None else CODES[s.autocast]
    tiles = list(predictor.tiles)
    return StoredSettings(
        predictor.n_samples, predictor.seed, tiles, bool(s.compile), s.memory_budget, s.chunk_size, autocast, s.joint
    )


def inputs_of(predictor: Predictor, example: Batch | None) -> Inputs | None:
    """The inputs of the network: from the example, an earlier prediction of this predictor or of the one it was made
    from, or the artifact it came from."""
    if example is not None:
        flat = predictor.check(example)
        structure, rows = flat.structure, [(tuple(t.shape), t.dtype) for t in flat.tensors]
    elif (known := next(iter(predictor.executions.by_shape), predictor.known_inputs)) is not None:
        structure, rows = known
    else:
        return None if predictor.manifest is None else predictor.manifest.inputs
    if isinstance(structure, Container) and any(part != TENSOR for part in structure.parts):
        if example is None:
            return None
        raise ValueError(
            "the example must be a tensor, a tuple of tensors or a dict of tensors; a network whose inputs are nested "
            "otherwise is saved without an example"
        )
    names = structure.names if isinstance(structure, Container) else None
    layout = "keyword" if names else "positional" if isinstance(structure, Container) else "tensor"
    each = [
        InputEntry(names[i] if names else None, CODES[dtype], list(shape[1:])) for i, (shape, dtype) in enumerate(rows)
    ]
    return Inputs(layout, each)
