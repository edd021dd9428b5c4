"""What an artifact says about itself: `manifest.json`, read strictly. Imports no torch.

Nothing in it is executed or imported on its own: classes are looked up in the registry (`vbdl.artifact.modules`) and in
the list of layers (`vbdl.artifact.layers`), the rest is numbers and names.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
from msgspec import Meta, Struct

FORMAT = 1
MANIFEST, TENSORS, CARD = "manifest.json", "model.safetensors", "README.md"

MAX_MANIFEST_BYTES = 16 * 2**20
MAX_TENSORS = 10_000
MAX_MEMBERS = 4096
MAX_AXES = 16


class ArtifactError(ValueError):
    """An artifact that is damaged, hostile, of another version, or not one at all; the message says which."""


Name = Annotated[str, Meta(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f]+$")]
Size = Annotated[int, Meta(ge=0, le=2**40)]
Count = Annotated[int, Meta(ge=1, le=2**40)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Rate = Annotated[float, Meta(ge=0.0, lt=1.0)]
Target = Annotated[str, Meta(max_length=512, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]  # "module:name"


class TensorEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor of the file beside the manifest."""

    dtype: str
    shape: Annotated[list[Size], Meta(max_length=MAX_AXES)]


class Layer(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A layer of torch.nn or of vbdl.nn by the name of its class, with the arguments of its constructor."""

    name: Name
    arguments: dict[str, Any] = {}
    children: dict[str, "Layer"] = {}


class Layers(Struct, frozen=True, forbid_unknown_fields=True, tag="layers", omit_defaults=True):
    """A network that is rebuilt from its description alone."""

    root: Layer
    ties: dict[str, str] = {}  # parameter -> the parameter that it is


class Reference(Struct, frozen=True, forbid_unknown_fields=True, tag="reference"):
    """A network that a function or class makes, `module:name`, imported only where the caller of load trusts it."""

    target: Target
    arguments: dict[str, Any]
    settings: dict[str, str]  # what has to be the same in the network that is made


class Supplied(Struct, frozen=True, forbid_unknown_fields=True, tag="supplied"):
    """A network that the caller of load has to give."""

    name: str
    settings: dict[str, str]


Architecture = Layers | Reference | Supplied


class Dropout(Struct, frozen=True, forbid_unknown_fields=True, tag="MCDropout"):
    """MC dropout: `vbdl.MCDropout` of the network with these arguments."""

    network: Architecture
    p: Rate | dict[str, Rate] | None
    deterministic: list[str]
    seed: Seed


class MeanField(Struct, frozen=True, forbid_unknown_fields=True, tag="MeanField"):
    """Mean-field variational inference: `vbdl.MeanField` of the network with these arguments."""

    network: Architecture
    n_data: Count
    priors: dict[str, list[float]] | None  # by parameter; None where the layers have them
    initial_std: float
    n_samples: Annotated[int, Meta(ge=1, le=2**20)]
    seed: Seed


class Registered(Struct, frozen=True, forbid_unknown_fields=True, tag="registered"):
    """A method of the user's own, by "module:Class": made as Class(network, **arguments), see `vbdl.register`."""

    name: Target
    network: Architecture
    arguments: dict[str, Any]


class Plain(Struct, frozen=True, forbid_unknown_fields=True, tag="network"):
    """A network as the member of an ensemble."""

    network: Architecture


Single = Dropout | MeanField | Registered


class Members(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Members of an ensemble of one architecture; shared: names of the entries that they hold together."""

    count: Annotated[int, Meta(ge=1, le=MAX_MEMBERS)]
    member: Plain | Single
    shared: list[str] = []


class Ensemble(Struct, frozen=True, forbid_unknown_fields=True, tag="DeepEnsemble"):
    """A deep ensemble: `vbdl.DeepEnsemble` of groups of members, one group for each architecture."""

    members: Annotated[list[Members], Meta(min_length=1, max_length=MAX_MEMBERS)]
    seed: Seed


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """How predictions are made."""

    n_samples: Annotated[int, Meta(ge=1, le=2**31)]
    seed: Seed
    tiles: Annotated[list[Annotated[int, Meta(ge=1, le=2**31)]], Meta(min_length=1, max_length=64)]
    compile: bool
    memory_budget: Count
    chunk_size: Count | None
    autocast: str | None
    joint: bool


class InputEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of a call; the shape is of one row."""

    name: str | None  # where the module takes it by keyword
    dtype: str
    shape: Annotated[list[Size], Meta(max_length=MAX_AXES)]


class Inputs(Struct, frozen=True, forbid_unknown_fields=True):
    """What rows look like: one tensor, several by position, or several by keyword."""

    layout: Annotated[str, Meta(pattern=r"^(tensor|positional|keyword)$")]
    tensors: Annotated[list[InputEntry], Meta(min_length=1, max_length=256)]


class Versions(Struct, frozen=True, forbid_unknown_fields=True):
    """What wrote the artifact."""

    vbdl: str
    torch: str
    noise: int  # of the counters that draws are made from, `vbdl_kernels.CONTRACT`


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything about a saved predictor but its tensors."""

    format: int
    versions: Versions
    posterior: Single | Ensemble
    likelihood: dict[str, Any]  # with the calibration and the decision in it, see vbdl.artifact.modules
    settings: Settings
    inputs: Inputs | None
    tensors: dict[Name, TensorEntry]
    file_bytes: Count
    file_sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    training_rows: Size  # rows whose fingerprints are in the file; 0 where training recorded none
    metrics: dict[str, Any]
    extras: dict[str, Any]  # whatever the caller of save put in: a schema of columns, preprocessing


def encode(manifest: Manifest) -> bytes:
    """JSON for people too: indented, keys in the order of the class."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode(data: bytes) -> Manifest:
    """The manifest, or ArtifactError: not JSON, twice the same key, another version, unknown or wrong fields."""
    found = _plain_json(data)
    version = found.get("format")
    if type(version) is not int:
        raise ArtifactError("the manifest has no format number: it is not an artifact of vbdl")
    if version > FORMAT:
        raise ArtifactError(
            f"the artifact has format {version}, and this vbdl reads up to {FORMAT}: install a newer vbdl"
        )
    if version < FORMAT:  # the first format has no older ones; those to come are migrated here, one step a version
        raise ArtifactError(f"the artifact has format {version}, which no vbdl has written")
    try:
        manifest = msgspec.convert(found, Manifest)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ArtifactError(f"the manifest does not fit its format: {error}") from None
    if len(manifest.tensors) > MAX_TENSORS:
        raise ArtifactError(f"the manifest names {len(manifest.tensors)} tensors, more than {MAX_TENSORS}")
    return manifest


def check_json(value: Any, what: str) -> dict[str, Any]:
    """A dict that JSON gives back as it is; ValueError for others, at save and not at load."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a dict that JSON can hold, got {type(value).__name__}")
    try:
        text = json.dumps(value, allow_nan=False)
        if json.loads(text) != value:
            raise ValueError("keys are strings, and lists are lists, not tuples")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not what JSON can hold: {error}") from None
    if len(text) > MAX_MANIFEST_BYTES // 2:
        raise ValueError(f"{what} takes {len(text)} characters, more than {MAX_MANIFEST_BYTES // 2}")
    return value


def strict_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: which of two would count depends on the reader."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ArtifactError(f"the key {key[:80]!r} stands there twice")
        found[key] = value
    return found


def _plain_json(data: bytes) -> dict[str, Any]:
    def refuse(text: str) -> NoReturn:
        raise ArtifactError(f"{text} is no number of JSON")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text)

    try:
        found = json.loads(
            data.decode("utf-8"), object_pairs_hook=strict_object, parse_constant=refuse, parse_float=number
        )
    except ArtifactError as error:
        raise ArtifactError(f"{MANIFEST}: {error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        raise ArtifactError(f"{MANIFEST} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{MANIFEST} holds a {type(found).__name__} and not an object")
    return found


def read(folder: str | Path) -> Manifest:
    """The manifest of an artifact, without its tensors. ArtifactError where it is not sound."""
    from vbdl.artifact.files import locate, read_whole

    return decode(read_whole(locate(Path(folder))[MANIFEST], MAX_MANIFEST_BYTES))
