"""The schema of `manifest.json`, which describes an artifact, and its strict reader. Imports no torch.

Reading a manifest executes and imports nothing: it holds numbers and names, and names of classes are looked up in the
registry (`vbdl.artifact.modules`) and in the list of layers (`vbdl.artifact.layers`).
"""

import json
import math
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import msgspec
from msgspec import Meta, Struct

from vbdl import former
from vbdl.types import Json

FORMAT = 1
MANIFEST, TENSORS, CARD = "manifest.json", "model.safetensors", "README.md"

MAX_MANIFEST_BYTES = 16 * 2**20
MAX_TENSORS = 10_000
MAX_MEMBERS = 4096
MAX_AXES = 16


class ArtifactError(ValueError):
    """Raised if a folder is no artifact or a damaged, hostile or incompatible one; the message says which."""


Name = Annotated[str, Meta(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f]+$")]
Size = Annotated[int, Meta(ge=0, le=2**40)]
Count = Annotated[int, Meta(ge=1, le=2**40)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Rate = Annotated[float, Meta(ge=0.0, lt=1.0)]
Target = Annotated[str, Meta(max_length=512, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]  # "module:name"


class TensorEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """The dtype (code of safetensors) and shape of one tensor in model.safetensors."""

    dtype: str
    shape: Annotated[list[Size], Meta(max_length=MAX_AXES)]


class Layer(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A layer of torch.nn or vbdl.nn as the name of its class and the arguments of its constructor."""

    name: Name
    arguments: Json = {}
    children: dict[str, "Layer"] = {}


class Layers(Struct, frozen=True, forbid_unknown_fields=True, tag="layers", omit_defaults=True):
    """A network described layer by layer, so that it is rebuilt from the description alone."""

    root: Layer
    ties: dict[str, str] = {}  # name of a tied parameter -> name of the parameter it is tied to


class Reference(Struct, frozen=True, forbid_unknown_fields=True, tag="reference"):
    """A network built by a function or class "module:name", imported only if the caller of `vbdl.load` trusts it."""

    target: Target
    arguments: Json
    settings: dict[str, str]  # classes, settings and constants that the built network must have


class Library(Struct, frozen=True, forbid_unknown_fields=True, tag="library", omit_defaults=True):
    """A network that a library builds, imported only if the caller of `vbdl.load` trusts it."""

    library: Literal["peft", "timm", "torchvision", "transformers"]
    name: Annotated[str, Meta(max_length=256, pattern=r"^[\w.]+$")]  # a class of transformers or peft, a model's name
    arguments: Json
    settings: dict[str, str]  # classes, settings and constants that the built network must have
    base: "Architecture | None" = None  # the network that adapters of peft are on

    @property
    def packages(self) -> list[str]:
        """The packages that are imported to build it."""
        return [self.library, *(self.base.packages if isinstance(self.base, Library) else [])]


class Supplied(Struct, frozen=True, forbid_unknown_fields=True, tag="supplied"):
    """A network that the caller of `vbdl.load` must pass as module=."""

    name: str
    settings: dict[str, str]


Architecture = Layers | Reference | Library | Supplied


class OutputFunction(Struct, frozen=True, forbid_unknown_fields=True, tag="function"):
    """The function "module:name" that takes a network's outputs and returns the one to predict from."""

    target: Target


Output = Annotated[str, Meta(max_length=1024)] | Annotated[int, Meta(ge=-1024, le=1024)] | OutputFunction | None
"""The choice of a network's output, `output=` of the posteriors."""


class Dropout(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="MCDropout"):
    """An MC dropout posterior: `vbdl.MCDropout` with this network and these arguments."""

    network: Architecture
    p: Rate | dict[str, Rate] | None
    deterministic: list[str]
    seed: Seed
    output: Output = None


class MeanField(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="MeanField"):
    """A mean-field posterior: `vbdl.MeanField` with this network and these arguments."""

    network: Architecture
    n_data: Count
    priors: dict[str, list[float]] | None  # constants by parameter; None if the layers hold their priors
    initial_std: float
    n_samples: Annotated[int, Meta(ge=1, le=2**20)]
    seed: Seed
    output: Output = None
    estimator: Literal["shared", "local", "flipout"] = "shared"


class Registered(Struct, frozen=True, forbid_unknown_fields=True, tag="registered"):
    """A registered method "module:Class", rebuilt as Class(network, **arguments); see `vbdl.register`."""

    name: Target
    network: Architecture
    arguments: Json


class Plain(Struct, frozen=True, forbid_unknown_fields=True, tag="network"):
    """A deterministic network as a member of an ensemble."""

    network: Architecture


Single = Dropout | MeanField | Registered


class Members(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The members of an ensemble with one architecture; shared: names of the tensors that all of them share."""

    count: Annotated[int, Meta(ge=1, le=MAX_MEMBERS)]
    member: Plain | Single
    shared: list[str] = []


class Ensemble(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="DeepEnsemble"):
    """A deep ensemble (`vbdl.DeepEnsemble`): a group of members for each architecture."""

    members: Annotated[list[Members], Meta(min_length=1, max_length=MAX_MEMBERS)]
    seed: Seed
    output: Output = None


class StoredSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of a predictor that are stored: draws, seed, tiles, compilation, memory and precision."""

    n_samples: Annotated[int, Meta(ge=1, le=2**31)]
    seed: Seed
    tiles: Annotated[list[Annotated[int, Meta(ge=1, le=2**31)]], Meta(min_length=1, max_length=64)]
    compile: bool
    memory_budget: Count
    chunk_size: Count | None
    autocast: str | None
    joint: bool


class InputEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One input tensor of the network: its dtype and the shape of one row."""

    name: str | None  # keyword of the module's forward, or None if passed by position
    dtype: str
    shape: Annotated[list[Size], Meta(max_length=MAX_AXES)]


class Inputs(Struct, frozen=True, forbid_unknown_fields=True):
    """The inputs of the network: one tensor, several by position, or several by keyword."""

    layout: Annotated[str, Meta(pattern=r"^(tensor|positional|keyword)$")]
    tensors: Annotated[list[InputEntry], Meta(min_length=1, max_length=256)]


class Versions(Struct, frozen=True, forbid_unknown_fields=True):
    """The versions of the software that wrote the artifact."""

    vbdl: str
    torch: str
    noise: int  # version of the noise generator, `vbdl_kernels.CONTRACT`; equal versions make equal draws


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The description of a saved predictor: everything except its tensors."""

    format: int
    versions: Versions
    posterior: Single | Ensemble
    likelihood: Json  # with its calibration and decision, see vbdl.artifact.modules
    settings: StoredSettings
    inputs: Inputs | None
    tensors: dict[Name, TensorEntry]
    file_bytes: Count
    file_sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    training_rows: Size  # number of fingerprints in the file; 0 if training recorded none
    metrics: Json
    extras: Json  # the caller's own data, e.g. a schema of columns, preprocessing, or the names of the classes
    fitted: list[Annotated[str, Meta(max_length=4096)]] = []  # what calibrators and decisions were fitted to, in words


def encode(manifest: Manifest) -> bytes:
    """The manifest as indented JSON with keys in the order of the class's fields."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode(data: bytes) -> Manifest:
    """Parse a manifest; ArtifactError for invalid JSON, a repeated key, another format, unknown or wrong fields."""
    raw = _plain_json(data)
    version = raw.get("format")
    if type(version) is not int:
        raise ArtifactError("the manifest has no format number, so this is no vbdl artifact")
    if version > FORMAT:
        raise ArtifactError(
            f"the artifact has format {version}, and this vbdl reads up to {FORMAT}: install a newer vbdl"
        )
    if version < FORMAT:  # migrations from older formats go here, one step per version; format 1 is the first
        raise ArtifactError(f"the artifact has format {version}, which no version of vbdl writes")
    try:
        manifest = msgspec.convert(raw, Manifest)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ArtifactError(f"the manifest does not match its schema: {error}") from None
    if len(manifest.tensors) > MAX_TENSORS:
        raise ArtifactError(f"the manifest names {len(manifest.tensors)} tensors; at most {MAX_TENSORS} are allowed")
    return manifest


def check_json(value: object, what: str) -> Json:
    """Return `value` if it is a dict that survives a round trip through JSON; else raise ValueError, already on saving.

    what: name of the value in the error.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a dict that JSON can hold, got {type(value).__name__}")
    try:
        text = json.dumps(value, allow_nan=False)
        if json.loads(text) != value:
            raise ValueError("keys must be strings; use lists instead of tuples")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be stored as JSON: {error}") from None
    if len(text) > MAX_MANIFEST_BYTES // 2:
        raise ValueError(f"{what} takes {len(text)} characters; at most {MAX_MANIFEST_BYTES // 2} are allowed")
    return value


def class_names(extras: Json) -> list[str | int | bool] | None:
    """The names of the classes in an artifact's extras, in the order of the network's outputs, or None."""
    named = extras.get("classes")
    return named if isinstance(named, list) and all(isinstance(n, str | int | bool) for n in named) else None


def strict_object(pairs: list[tuple[str, object]]) -> Json:
    """A JSON object from its pairs; ArtifactError for a repeated key, which JSON readers resolve differently."""
    unique: Json = {}
    for key, value in pairs:
        if key in unique:
            raise ArtifactError(f"the key {key[:80]!r} occurs twice")
        unique[key] = value
    return unique


def _plain_json(data: bytes) -> Json:
    def refuse(text: str) -> NoReturn:
        raise ArtifactError(f"{text} is not a valid number in JSON")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text)

    try:
        parsed = json.loads(
            data.decode("utf-8"), object_pairs_hook=strict_object, parse_constant=refuse, parse_float=number
        )
    except ArtifactError as error:
        raise ArtifactError(f"{MANIFEST}: {error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        raise ArtifactError(f"{MANIFEST} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ArtifactError(f"{MANIFEST} holds a {type(parsed).__name__} instead of an object")
    return parsed


def read(folder: str | Path) -> Manifest:
    """Read the manifest of an artifact without its tensors; ArtifactError if the artifact or manifest is invalid."""
    from vbdl.artifact.files import locate, read_whole

    return decode(read_whole(locate(Path(folder))[MANIFEST], MAX_MANIFEST_BYTES))


__getattr__ = former.names(__name__, {"Settings": "StoredSettings"})
