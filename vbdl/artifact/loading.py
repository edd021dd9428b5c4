"""A predictor from disk, with the same draws. No pickle, no code of the file, no import that was not allowed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn
from vbdl_kernels import CONTRACT

from vbdl.artifact import modules, networks, posteriors
from vbdl.artifact.files import locate, read_whole
from vbdl.artifact.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    TENSORS,
    ArtifactError,
    Ensemble,
    Layers,
    Manifest,
    Plain,
    Reference,
    Registered,
    decode,
)
from vbdl.artifact.saving import TRAINING_ROWS
from vbdl.artifact.tensors import DTYPES, read_share, read_tensors
from vbdl.engine.predictor import Predictor
from vbdl.engine.settings import DEFAULT_TILES, INVARIANT_TILES
from vbdl.types import Likelihood


def load(
    folder: str | Path,
    *,
    module: nn.Module | Sequence[nn.Module] | None = None,
    trust: Sequence[str] = (),
    **settings: Any,
) -> Predictor:
    """The predictor that `Predictor.save` wrote: same draws, same numbers.

    module: the network (or one for each architecture of an ensemble), where the artifact does not describe it; its
        weights are of no importance.
    trust: packages that an artifact may import its network from, and classes that were registered (`vbdl.register`).
        Importing runs code: name only your own.
    settings: other settings of Predictor than those saved (compile, device, n_samples, seed, tiles, ...);
        batch_invariant=True replaces tiles that nobody chose by one size, so that a row has the same bits in any batch.

    `manifest` of the predictor is what was read beside the tensors, with `extras`, `metrics` and `inputs`.
    Raises ArtifactError (a ValueError) for what is damaged, hostile, of a newer format or no artifact, with the
    reason; nothing of the artifact has been executed then.
    """
    folder = Path(folder)
    for _ in range(_READINGS):
        this = _identity(folder)
        try:
            return load_files(locate(folder), module=module, trust=trust, **settings)
        except ArtifactError:
            if _identity(folder) == this:
                raise
    raise ArtifactError(f"{folder} was replaced {_READINGS} times while it was read")


_READINGS = 50  # a busy machine may be slower in reading than another process in replacing


def _identity(folder: Path) -> tuple[int, int] | None:
    """Other numbers where another artifact has taken this one's place: the number alone is used again."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def load_files(
    files: Mapping[str, Path],
    *,
    module: nn.Module | Sequence[nn.Module] | None = None,
    trust: Sequence[str] = (),
    **settings: Any,
) -> Predictor:
    """`load` of files by name, for those that lie elsewhere than in one folder."""
    networks.Maker(module, trust)  # what the caller got wrong is no fault of the files
    try:
        found = read_parts(files, module=module, trust=trust)
    except (ArtifactError, OSError, ModuleNotFoundError):
        raise
    except Exception as error:  # damage shows itself in many ways
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ArtifactError(f"the artifact cannot be read: {said}") from error
    chosen = {**found.settings, **settings}
    if chosen.pop("batch_invariant", False) and chosen["tiles"] == DEFAULT_TILES:
        chosen["tiles"] = INVARIANT_TILES
    try:
        predictor = Predictor(found.posterior, found.likelihood, **chosen)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ArtifactError(f"the settings of the artifact do not fit: {error}") from error
    predictor.manifest = found.manifest
    return predictor


@dataclass
class Parts:
    """What a predictor is made of. own: the members that are in the posterior, None for all."""

    posterior: Any
    likelihood: Any
    settings: dict[str, Any]
    manifest: Manifest
    own: range | None


def read_parts(
    files: Mapping[str, Path],
    *,
    module: nn.Module | Sequence[nn.Module] | None = None,
    trust: Sequence[str] = (),
    share: Callable[[Manifest], range] | None = None,
) -> Parts:
    """An artifact, checked, as what a predictor is made of.

    share: which members of a plain ensemble to load; the others are not in memory at any time. Other posteriors are
    loaded whole.
    """
    whole = decode(read_whole(files[MANIFEST], MAX_MANIFEST_BYTES))
    if whole.versions.noise != CONTRACT:
        raise ArtifactError(
            f"the artifact draws by counters of version {whole.versions.noise}, this vbdl by {CONTRACT}: its "
            f"numbers would be others. Load it with the vbdl that wrote it ({whole.versions.vbdl[:40]})"
        )
    own = share(whole) if share is not None and _is_plain_ensemble(whole.posterior) else None
    manifest = whole if own is None else _of_members(whole, own)
    stated = {n: e for n, e in manifest.tensors.items() if n.startswith("posterior.")}
    shapes = {n.removeprefix("posterior."): tuple(e.shape) for n, e in stated.items()}
    with networks.quiet_generator():
        if module is None and _is_ours(manifest.posterior):
            # first without memory, so that a description of a huge network is refused and not allocated
            with torch.device("meta"):
                _check_shapes(_posterior(manifest, None, trust), shapes)
        read = lambda: read_tensors(files[TENSORS], whole)
        tensors = read() if own is None else read_share(files[TENSORS], whole, _STACKED, own)
        posterior = _posterior(manifest, module, trust)
    _check_shapes(posterior, shapes)
    _fill(posterior, {n.removeprefix("posterior."): t for n, t in tensors.items() if n.startswith("posterior.")})
    seen = tensors.get(TRAINING_ROWS)
    if seen is not None:
        if seen.dtype != torch.int64 or seen.ndim != 1 or len(seen) != manifest.training_rows:
            raise ArtifactError("the fingerprints of the training rows are not one int64 a row")
        posterior.training_rows = seen
    elif manifest.training_rows:
        raise ArtifactError("the fingerprints of the training rows are missing")
    likelihood = _likelihood(manifest, tensors, trust)
    given = manifest.settings
    saved = {
        "n_samples": given.n_samples,
        "seed": given.seed,
        "tiles": tuple(given.tiles),
        "compile": given.compile,
        "memory_budget": given.memory_budget,
        "chunk_size": given.chunk_size,
        "autocast": _dtype(given.autocast),
        "joint": given.joint,
    }
    return Parts(posterior, likelihood, saved, whole, own)


_STACKED = "posterior.stacked_"  # what has a members axis first


def _is_plain_ensemble(description: Any) -> bool:
    return (
        isinstance(description, Ensemble)
        and len(description.members) == 1
        and isinstance(description.members[0].member, Plain)
    )


def _of_members(manifest: Manifest, own: range) -> Manifest:
    """The manifest of an ensemble of these members only, as if it had been saved alone."""
    assert isinstance(manifest.posterior, Ensemble)
    group = manifest.posterior.members[0]
    if not 0 <= own.start < own.stop <= group.count:
        raise ValueError(f"members {own.start} to {own.stop} of an ensemble of {group.count}")
    tensors = dict(manifest.tensors)
    for name, entry in tensors.items():
        if name.startswith(_STACKED):
            if entry.shape[:1] != [group.count]:
                raise ArtifactError(f"{name[:120]!r} has shape {entry.shape} and there are {group.count} members")
            tensors[name] = replace(entry, shape=[len(own), *entry.shape[1:]])
    members = [replace(group, count=len(own))]
    return replace(manifest, posterior=replace(manifest.posterior, members=members), tensors=tensors)


def _is_ours(description: Any) -> bool:
    """Whether the posterior is one of vbdl, of networks whose classes are of torch or vbdl or registered."""
    singles = [group.member for group in description.members] if isinstance(description, Ensemble) else [description]
    return not any(isinstance(single, Registered) for single in singles) and all(
        isinstance(a, Layers) or (isinstance(a, Reference) and a.target.startswith("vbdl."))
        for a in posteriors.architectures(description)
    )


def _posterior(manifest: Manifest, module: Any, trust: Sequence[str]) -> Any:
    maker = networks.Maker(module, trust)
    try:
        return posteriors.build(manifest.posterior, maker.make, trust)
    except ArtifactError:
        raise
    except Exception as error:  # networks and posteriors refuse nonsense in many ways
        raise ArtifactError(f"the posterior cannot be made as described: {error}") from error


def _check_shapes(posterior: nn.Module, stated: Mapping[str, tuple[int, ...]]) -> None:
    own = {n: tuple(t.shape) for n, t in _untied(posterior).items()}
    for name in [*own, *stated]:
        if own.get(name) != stated.get(name):
            raise ArtifactError(
                f"the posterior described has {name[:120]!r} of shape {own.get(name)}, the file {stated.get(name)}"
            )


def _untied(module: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, t in module.state_dict(keep_vars=True).items():
        if id(t) not in seen:
            seen.add(id(t))
            found[name] = t
    return found


def _fill(posterior: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The tensors in place of its own, dtypes included, tied ones staying tied."""
    kinds = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(kinds) == 1:  # what is not in the file follows
        posterior.to(kinds.pop())
    for name, own in _untied(posterior).items():
        t = tensors[name]
        if t.is_floating_point() != own.is_floating_point() or (not t.is_floating_point() and t.dtype != own.dtype):
            raise ArtifactError(f"{name} is {t.dtype} in the file, and {own.dtype} in the posterior described")
        if t.is_floating_point() and not bool(t.isfinite().all()):
            bad = int((~t.isfinite()).sum())
            raise ArtifactError(f"{bad} of {t.numel()} numbers of {name} are not finite: this is no trained posterior")
        own.data = t.clone()  # in memory of its own, aligned as torch aligns


def _likelihood(manifest: Manifest, tensors: Mapping[str, Tensor], trust: Sequence[str]) -> Any:
    own = {n.removeprefix("likelihood."): t for n, t in tensors.items() if n.startswith("likelihood.")}
    if len(own) + sum(n.startswith("posterior.") for n in tensors) + (TRAINING_ROWS in tensors) != len(tensors):
        raise ArtifactError("the file holds tensors that are neither of the posterior nor of the likelihood")
    for name, t in own.items():
        if t.is_floating_point() and bool(t.isnan().any()):
            raise ArtifactError(f"likelihood.{name} holds NaN")
    try:
        described = modules.with_names_of_today(manifest.likelihood)
        likelihood = modules.rebuild(described, own, trust)
        if {n: tuple(t.shape) for n, t in likelihood.state_dict().items()} != {
            n: tuple(t.shape) for n, t in own.items()
        }:
            raise ArtifactError("the likelihood described has other tensors than the file")
        again = modules.describe(likelihood)
    except ArtifactError:
        raise
    except Exception as error:  # constructors refuse nonsense in many ways
        raise ArtifactError(f"the likelihood cannot be made as described: {error}") from error
    if again != described:
        raise ArtifactError("the likelihood described is not what its classes make of it")
    if not isinstance(likelihood, Likelihood):
        raise ArtifactError(f"a {type(likelihood).__name__} is not a likelihood")
    return likelihood


def _dtype(code: str | None) -> torch.dtype | None:
    if code is None:
        return None
    if code not in DTYPES or not DTYPES[code].is_floating_point:
        raise ArtifactError(f"autocast names {code[:40]!r}, which is no floating-point dtype")
    return DTYPES[code]
