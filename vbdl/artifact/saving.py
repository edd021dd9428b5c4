"""Saving a predictor as an artifact: `vbdl.save`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    InputEntry,
    Inputs,
    Manifest,
    Reference,
    Settings,
    Versions,
    check_json,
    encode,
)
from vbdl.artifact.tensors import CODES, entries, to_bytes
from vbdl.calling.inputs import TENSOR, Container
from vbdl.engine.predictor import Predictor

TRAINING_ROWS = "training_rows"


def save(
    predictor: Predictor,
    folder: str | Path,
    *,
    extras: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    example: Any = None,
    architecture: str | Sequence[str | None] | None = None,
    arguments: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the predictor as a folder of safetensors, JSON and a model card; returns the folder.

    extras: whatever belongs to the model and is not of vbdl, a schema of columns or preprocessing, as JSON holds it;
        read back as `vbdl.load(folder).manifest.extras`. Of a predictor that was loaded, or made of one that was, its
        own unless given; so are architecture and arguments.
    metrics: figures for the model card, {"accuracy": 0.97, ...}, as JSON holds them.
    example: one batch of inputs, of which the shape of a row is recorded; what was predicted before, unless given.
    architecture: "module:name" of what makes the network, called with `arguments`. Networks of torch.nn's own layers
        describe themselves. Another without this is saved too, and `load` then asks for module=. For an ensemble
        of several architectures one of each, None where it describes itself.
    overwrite: replace an artifact that is there.

    The folder appears whole or not at all. Raises ValueError where a tensor is not finite or something cannot be
    stored, FileExistsError where the folder is not empty.
    """
    folder = Path(folder)
    found = contents(
        predictor, extras=extras, metrics=metrics, example=example, architecture=architecture, arguments=arguments
    )
    write_folder(folder, found, locate if overwrite else None)
    return folder


def contents(
    predictor: Predictor,
    *,
    extras: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    example: Any = None,
    architecture: str | Sequence[str | None] | None = None,
    arguments: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, bytes]:
    """The files of the artifact by name, not written yet; arguments as for `save`."""
    if predictor.estimator != "sampling":
        raise ValueError(
            "an artifact predicts by sampling: save replace(estimator='sampling'), and after loading take "
            "replace(estimator='moments')"
        )
    before = predictor.manifest
    if extras is None and before is not None:
        extras = before.extras
    if architecture is None and arguments is None and before is not None:
        known = posteriors.architectures(before.posterior)
    else:
        known = [None] * len(predictor.posterior.parts)
    description = _describe(predictor.posterior, architecture, arguments, known)
    tensors = {f"posterior.{n}": t for n, t in _state(predictor.posterior).items()}
    tensors |= {f"likelihood.{n}": t for n, t in _state(predictor.likelihood).items()}
    for name, t in tensors.items():
        # a threshold may be infinite, a weight may not
        sound = t.isfinite() if name.startswith("posterior.") else ~t.isnan()
        if t.is_floating_point() and not bool(sound.all()):
            raise ValueError(f"{int((~sound).sum())} of {t.numel()} numbers of {name} are not finite: not saved")
    seen = training_rows(predictor.posterior)
    if seen is not None:
        tensors[TRAINING_ROWS] = seen
    data = to_bytes(tensors)
    manifest = Manifest(
        format=FORMAT,
        versions=Versions(vbdl.__version__, str(torch.__version__), CONTRACT),
        posterior=description,
        likelihood=check_json(json.loads(json.dumps(modules.describe(predictor.likelihood))), "the likelihood"),
        settings=_settings(predictor),
        inputs=inputs_of(predictor, example),
        tensors=entries(tensors),
        file_bytes=len(data),
        file_sha256=hashlib.sha256(data).hexdigest(),
        training_rows=0 if seen is None else len(seen),
        metrics=check_json(dict(metrics or {}), "metrics"),
        extras=check_json(dict(extras or {}), "extras"),
    )
    encoded = encode(manifest)
    if len(encoded) > MAX_MANIFEST_BYTES:
        raise ValueError(f"the manifest takes {len(encoded)} bytes, more than {MAX_MANIFEST_BYTES}: fewer extras")
    return {MANIFEST: encoded, TENSORS: data, CARD: card(manifest).encode()}


def _describe(posterior: Any, architecture: Any, arguments: Any, known: Sequence[Architecture | None]) -> Any:
    """known: how the artifact that the posterior was loaded from makes the network of each part, or None."""
    if not (architecture is None or isinstance(architecture, Sequence)):
        raise TypeError(f'architecture is the "module:name" of what makes the network, got {architecture!r}')
    targets = [architecture] if architecture is None or isinstance(architecture, str) else list(architecture)
    given = [arguments or {}] if arguments is None or isinstance(arguments, Mapping) else list(arguments)
    parts = len(posterior.parts)
    if architecture is None:
        targets = [None] * parts
    given = given * parts if len(given) == 1 else given
    if len(targets) != parts or len(given) != parts:
        raise ValueError(f"the posterior has {parts} architectures, and {len(targets)} were given")
    remaining = iter(zip(targets, given, known, strict=True))

    def network(module: nn.Module, values: Mapping[str, Tensor]) -> Any:
        target, called_with, before = next(remaining)
        if isinstance(before, Reference):
            # not imported again: the network may have come by module=, from somebody who does not trust the name
            return Reference(before.target, before.arguments, networks.settings(module))
        return networks.describe(module, values, target, called_with)

    with networks.quiet_generator():
        return posteriors.describe(posterior, network)


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Its tensors, a tied one once, under its first name."""
    found, seen = {}, set()
    for name, t in module.state_dict(keep_vars=True).items():
        if not isinstance(t, Tensor):
            raise ValueError(f"{name} is a {type(t).__name__} and not a tensor: such a module cannot be saved")
        if id(t) not in seen:
            seen.add(id(t))
            found[name] = t.detach()
    return found


def training_rows(posterior: Any) -> Tensor | None:
    """Fingerprints of the rows that it was trained on, (rows,) int64 sorted, or None where none were recorded."""
    found = [p.training_rows for p in (posterior, *posterior.parts)]
    known = [t.cpu() for t in found if t is not None]
    return torch.cat(known).unique() if known else None


def _settings(predictor: Predictor) -> Settings:
    s = predictor.settings
    autocast = None if s.autocast is None else CODES[s.autocast]
    tiles = list(predictor.tiles)
    return Settings(
        predictor.n_samples, predictor.seed, tiles, s.compile, s.memory_budget, s.chunk_size, autocast, s.joint
    )


def inputs_of(predictor: Predictor, example: Any) -> Inputs | None:
    """What rows look like, from the example, from what was predicted, or from the artifact it was loaded from."""
    if example is not None:
        flat = predictor.check(example)
        structure, rows = flat.structure, [(tuple(t.shape), t.dtype) for t in flat.tensors]
    elif predictor.executions.by_shape:
        structure, rows = next(iter(predictor.executions.by_shape))
    else:
        return None if predictor.manifest is None else predictor.manifest.inputs
    if isinstance(structure, Container) and any(part != TENSOR for part in structure.parts):
        if example is None:
            return None
        raise ValueError(
            "an artifact describes inputs that are one tensor, a tuple of tensors or a dict of tensors, and this "
            "example is nested in another way: save without an example"
        )
    names = structure.names if isinstance(structure, Container) else None
    layout = "keyword" if names else "positional" if isinstance(structure, Container) else "tensor"
    each = [
        InputEntry(names[i] if names else None, CODES[dtype], list(shape[1:])) for i, (shape, dtype) in enumerate(rows)
    ]
    return Inputs(layout, each)
