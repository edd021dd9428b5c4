"""Loading a predictor from an artifact: `vbdl.load`. It unpickles nothing and imports only trusted packages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from msgspec.structs import replace
from torch import Tensor, nn
from vbdl_kernels import CONTRACT

from vbdl.artifact import modules, networks, posteriors
from vbdl.artifact.files import locate, read_again, read_whole
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
    Single,
    decode,
)
from vbdl.artifact.saving import TRAINING_ROWS
from vbdl.artifact.tensors import DTYPES, read_share, read_tensors
from vbdl.engine.predictor import Predictor
from vbdl.engine.settings import INVARIANT_TILES, PredictorArguments, PredictorOptions, are_default
from vbdl.types import Likelihood, Posterior


class LoadOptions(PredictorArguments, total=False):
    """The keyword arguments of `vbdl.load`."""

    module: nn.Module | Sequence[nn.Module] | None
    trust: Sequence[str]


def load(
    folder: str | Path,
    *,
    module: nn.Module | Sequence[nn.Module] | None = None,
    trust: Sequence[str] = (),
    **settings: Unpack[PredictorArguments],
) -> Predictor:
    """Load the predictor that `Predictor.save` wrote; it makes the same draws and the same predictions.

    module: the network (or one for each architecture of an ensemble), needed if the artifact does not describe it; its
        weights are ignored.
    trust: packages from which the artifact may import its network and registered classes (`vbdl.register`). Importing
        runs code: name only packages you trust.
    settings: settings of Predictor that replace the saved ones (compile, device, n_samples, seed, tiles, ...);
        batch_invariant=True replaces default tiles by a single size, so that a row has the same bits in any batch.

    The predictor's `manifest` holds everything stored beside the tensors, with `extras`, `metrics` and `inputs`.
    Raises ArtifactError (a ValueError) with the reason if the folder is no artifact, damaged, hostile or of a newer
    format; nothing of the artifact has been executed then.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 4), vbdl.Categorical(), compile=False)
    >>> import tempfile
    >>> x = torch.randn(5, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     vbdl.save(predict, f"{folder}/model.vbdl").name
    ...     again = vbdl.load(f"{folder}/model.vbdl", compile=False)
    ...     torch.equal(again(x).probs, predict(x).probs)
    'model.vbdl'
    True
    """
    folder = Path(folder)
    return read_again(folder, lambda: load_files(locate(folder), module=module, trust=trust, **settings))


def load_files(
    files: Mapping[str, Path],
    *,
    module: nn.Module | Sequence[nn.Module] | None = None,
    trust: Sequence[str] = (),
    **settings: Unpack[PredictorArguments],
) -> Predictor:
    """Load a predictor like `load`, from the paths of its files by file name, which may lie in different folders."""
    networks.Maker(module, trust)  # raises for wrong arguments here, so that they are not blamed on the files
    try:
        parts = read_parts(files, module=module, trust=trust)
    except (ArtifactError, OSError, ModuleNotFoundError):
        raise
    except Exception as error:  # damaged files cause errors of any type
        message = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ArtifactError(f"the artifact cannot be read: {message}") from error
    options: PredictorArguments = {"n_samples": parts.n_samples, "seed": parts.seed, **parts.options, **settings}
    if options.pop("batch_invariant", False) and are_default(options.get("tiles")):
        options["tiles"] = INVARIANT_TILES
    try:
        predictor = Predictor(parts.posterior, parts.likelihood, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ArtifactError(f"Predictor does not accept the artifact's settings: {error}") from error
    predictor.manifest = parts.manifest
    return predictor


@dataclass
class Parts:
    """The parts of a stored predictor. members: those that the posterior holds, or None if it holds all."""

    posterior: Posterior
    likelihood: Likelihood
    n_samples: int
    seed: int
    options: PredictorOptions
    manifest: Manifest
    members: range | None


def read_parts(
    files: Mapping[str, Path],
    *,
    module: nn.Module | Sequence[nn.Module] | None = None,
    trust: Sequence[str] = (),
    share: Callable[[Manifest], range] | None = None,
) -> Parts:
    """Read and check an artifact and rebuild the parts of its predictor.

    share: returns the members to load of an ensemble of plain networks; the others are never held in memory. Other
        posteriors are loaded whole.
    """
    whole = decode(read_whole(files[MANIFEST], MAX_MANIFEST_BYTES))
    if whole.versions.noise != CONTRACT:
        raise ArtifactError(
            f"the artifact uses version {whole.versions.noise} of the noise generator, this vbdl version {CONTRACT}: "
            f"its predictions would differ. Load it with the vbdl that wrote it ({whole.versions.vbdl[:40]})"
        )
    members = share(whole) if share is not None and _is_plain_ensemble(whole.posterior) else None
    manifest = whole if members is None else _of_members(whole, members)
    posterior_entries = {n: e for n, e in manifest.tensors.items() if n.startswith("posterior.")}
    shapes = {n.removeprefix("posterior."): tuple(e.shape) for n, e in posterior_entries.items()}
    with networks.quiet_generator():
        if module is None and _is_ours(manifest.posterior):
            # first on the meta device, so that the description of a huge network is refused and not allocated
            with torch.device("meta"):
                _check_shapes(_posterior(manifest, None, trust), shapes)
        read = lambda: read_tensors(files[TENSORS], whole)
        tensors = read() if members is None else read_share(files[TENSORS], whole, _STACKED, members)
        posterior = _posterior(manifest, module, trust)
    _check_shapes(posterior, shapes)
    _fill(posterior, {n.removeprefix("posterior."): t for n, t in tensors.items() if n.startswith("posterior.")})
    fingerprints = tensors.get(TRAINING_ROWS)
    if fingerprints is not None:
        if fingerprints.dtype != torch.int64 or fingerprints.ndim != 1 or len(fingerprints) != manifest.training_rows:
            raise ArtifactError("the fingerprints of the training rows are not one int64 per row")
        posterior.training_rows = fingerprints
    elif manifest.training_rows:
        raise ArtifactError("the manifest counts training rows, but the file holds no fingerprints of them")
    likelihood = _likelihood(manifest, tensors, trust)
    settings = manifest.settings
    options: PredictorOptions = {
        "tiles": tuple(settings.tiles),
        "compile": settings.compile,
        "memory_budget": settings.memory_budget,
        "chunk_size": settings.chunk_size,
        "autocast": _dtype(settings.autocast),
        "joint": settings.joint,
    }
    return Parts(
        posterior=posterior,
        likelihood=likelihood,
        n_samples=settings.n_samples,
        seed=settings.seed,
        options=options,
        manifest=whole,
        members=members,
    )


_STACKED = "posterior.stacked_"  # prefix of the tensors whose first axis is the members


def _is_plain_ensemble(description: Single | Ensemble) -> bool:
    return (
        isinstance(description, Ensemble)
        and len(description.members) == 1
        and isinstance(description.members[0].member, Plain)
    )


def _of_members(manifest: Manifest, chosen: range) -> Manifest:
    """The manifest as if an ensemble of only these members had been saved."""
    assert isinstance(manifest.posterior, Ensemble)
    group = manifest.posterior.members[0]
    if not 0 <= chosen.start < chosen.stop <= group.count:
        raise ValueError(f"cannot load members {chosen.start} to {chosen.stop - 1} of an ensemble of {group.count}")
    tensors = dict(manifest.tensors)
    for name, entry in tensors.items():
        if name.startswith(_STACKED):
            if entry.shape[:1] != [group.count]:
                raise ArtifactError(f"{name[:120]!r} has shape {entry.shape}, but there are {group.count} members")
            tensors[name] = replace(entry, shape=[len(chosen), *entry.shape[1:]])
    members = [replace(group, count=len(chosen))]
    return replace(manifest, posterior=replace(manifest.posterior, members=members), tensors=tensors)


def _is_ours(description: Single | Ensemble) -> bool:
    """Whether the posterior is a class of vbdl and its networks are described by layers or made by vbdl."""
    singles = [group.member for group in description.members] if isinstance(description, Ensemble) else [description]
    return not any(isinstance(single, Registered) for single in singles) and all(
        isinstance(a, Layers) or (isinstance(a, Reference) and a.target.startswith("vbdl."))
        for a in posteriors.architectures(description)
    )


def _posterior(manifest: Manifest, module: nn.Module | Sequence[nn.Module] | None, trust: Sequence[str]) -> Posterior:
    maker = networks.Maker(module, trust)
    try:
        return posteriors.build(manifest.posterior, maker.make, trust)
    except ArtifactError:
        raise
    except Exception as error:  # constructors of networks and posteriors raise errors of any type
        raise ArtifactError(f"the posterior cannot be built as described: {error}") from error


def _check_shapes(posterior: nn.Module, stated: Mapping[str, tuple[int, ...]]) -> None:
    shapes = {n: tuple(t.shape) for n, t in _untied(posterior).items()}
    for name in [*shapes, *stated]:
        if shapes.get(name) != stated.get(name):
            raise ArtifactError(
                f"{name[:120]!r} has shape {shapes.get(name)} as described, {stated.get(name)} in the file"
            )


def _untied(module: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, t in module.state_dict(keep_vars=True).items():
        if id(t) not in seen:
            seen.add(id(t))
            tensors[name] = t
    return tensors


def _fill(posterior: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace the posterior's tensors by these, dtypes included; tied tensors stay tied."""
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(dtypes) == 1:  # cast tensors that are not in the file, too
        dtype = dtypes.pop()
        posterior._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)  # `to` would cast complex tensors
    for name, target in _untied(posterior).items():
        t = tensors[name]
        if t.is_floating_point() != target.is_floating_point() or (
            not t.is_floating_point() and t.dtype != target.dtype
        ):
            raise ArtifactError(f"{name} is {t.dtype} in the file and {target.dtype} in the described posterior")
        if t.is_floating_point() and not bool(t.isfinite().all()):
            bad = int((~t.isfinite()).sum())
            raise ArtifactError(f"{bad} of {t.numel()} values of {name} are not finite, so the posterior is unusable")
        target.data = t.clone()  # in memory that torch allocates and aligns


def _likelihood(manifest: Manifest, tensors: Mapping[str, Tensor], trust: Sequence[str]) -> Likelihood:
    state = {n.removeprefix("likelihood."): t for n, t in tensors.items() if n.startswith("likelihood.")}
    if len(state) + sum(n.startswith("posterior.") for n in tensors) + (TRAINING_ROWS in tensors) != len(tensors):
        raise ArtifactError("the file holds tensors that belong neither to the posterior nor to the likelihood")
    for name, t in state.items():
        if t.is_floating_point() and bool(t.isnan().any()):
            raise ArtifactError(f"likelihood.{name} holds NaN")
    try:
        described = modules.with_names_of_today(manifest.likelihood)
        likelihood = modules.rebuild(described, state, trust)
        if {n: tuple(t.shape) for n, t in likelihood.state_dict().items()} != {
            n: tuple(t.shape) for n, t in state.items()
        }:
            raise ArtifactError("the tensors of the described likelihood differ in name or shape from the file's")
        again = modules.describe(likelihood)
    except ArtifactError:
        raise
    except Exception as error:  # constructors raise errors of any type
        raise ArtifactError(f"the likelihood cannot be built as described: {error}") from error
    if again != described:
        raise ArtifactError("the likelihood built from its description describes itself differently")
    if not isinstance(likelihood, Likelihood):
        raise ArtifactError(f"the artifact's likelihood is a {type(likelihood).__name__}, which is not a likelihood")
    return likelihood


def _dtype(code: str | None) -> torch.dtype | None:
    if code is None:
        return None
    if code not in DTYPES or not DTYPES[code].is_floating_point:
        raise ArtifactError(f"autocast is {code[:40]!r}, which is not a floating-point dtype")
    return DTYPES[code]
