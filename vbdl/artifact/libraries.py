"""Networks of transformers, peft, timm and torchvision, described by how their library builds them.

Only a library that is already imported is asked on saving. On loading, the library is imported if the caller trusts it,
and builds classes of its own from arguments that are checked here: none of them loads weights, code or kernels.
"""

import copy
import dataclasses
import enum
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from vbdl.artifact.manifest import Architecture, ArtifactError, Library, check_json
from vbdl.types import Json

_ATTENTION = ("eager", "sdpa")  # other names of transformers' attention load kernels
_NOT_OF_A_CONFIG = re.compile(
    r"_.*|auto_map|quantization_config|.*backbone.*|.*attn_implementation|use_kernel.*|.*kernels|kernel_config|dtype"
    r"|architecture|model_args|.*pretrained.*|.*checkpoint.*|.*path|.*url|.*file.*|.*repo|trust_remote_code|timm.*",
    re.IGNORECASE,
)
_LORA = {
    "task_type", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias",
    "use_rslora", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "init_lora_weights", "runtime_config", "megatron_core", "qalora_group_size",
}  # fmt: skip
_TIMM = {"num_classes", "in_chans", "drop_rate", "drop_path_rate", "img_size", "global_pool"}
_TORCHVISION = {"num_classes", "dropout", "attention_dropout", "stochastic_depth_prob", "image_size", "aux_logits"}

Describe = Callable[[nn.Module], Architecture | None]


def calls(network: nn.Module, describe: Describe) -> Iterator[Library]:
    """Yield the calls of a library that may build this network, without settings; the caller compares.

    describe: the description of another network, which this one is built around, or None if there is none.
    """
    library = type(network).__module__.partition(".")[0]
    if library == "transformers":
        yield from (Library(library, *call, {}) for call in _transformers(network))
    if library == "timm":
        yield from (Library(library, *call, {}) for call in _timm(network))
    if library == "torchvision":
        yield from (Library(library, *call, {}) for call in _torchvision(network))
    if library == "peft":
        yield from _peft(network, describe)


def build(description: Library, base: nn.Module | None) -> nn.Module:
    """Build the network of a description; base: the network that it is built around, if the description names one.

    Raises ArtifactError for arguments that `calls` would not have described.
    """
    name, arguments = description.name, description.arguments
    try:
        module: Any = importlib.import_module(description.library)
    except ImportError as error:
        raise ArtifactError(
            f"the network is built by the package {description.library}, which cannot be imported: {error}"
        ) from None
    if description.library == "transformers":
        return _build_transformers(module, name, arguments)
    if description.library == "peft":
        if base is None:
            raise ArtifactError("the artifact names adapters of peft without the network that they are on")
        return _build_peft(module, name, arguments, base)
    allowed = _TIMM if description.library == "timm" else _TORCHVISION
    if unknown := set(arguments) - allowed:
        raise ArtifactError(f"{description.library} builds no network with the argument {sorted(unknown)[0][:60]!r}")
    if description.library == "timm":
        if not module.is_model(name) or ":" in name:
            raise ArtifactError(f"timm has no model {name[:60]!r}")
        return module.create_model(name, pretrained=False, **arguments)
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise ArtifactError(f"torchvision has no model {name[:60]!r}")
    backbone = {"weights_backbone": None} if "weights_backbone" in _parameters(models.get_model_builder(name)) else {}
    return models.get_model(name, weights=None, **backbone, **arguments)


# -- transformers


def _transformers(network: Any) -> Iterator[tuple[str, Json]]:
    name, config = type(network).__name__, getattr(network, "config", None)
    if getattr(sys.modules["transformers"], name, None) is not type(network) or config is None:
        return
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, *_ATTENTION):
        return
    held = {k: v for k, v in config.to_diff_dict().items() if k not in ("transformers_version", "architectures")}
    held = {k: v for k, v in held.items() if k not in ("dtype", "torch_dtype") and not k.startswith("_")}
    try:
        held = check_json(_plain(held), "the configuration")
        _check_config(held)
    except ValueError:
        return
    yield name, {"config": held} | ({"attention": attention} if attention else {})


def _build_transformers(library: Any, name: str, arguments: Json) -> nn.Module:
    kind = getattr(library, name, None)
    if not (isinstance(kind, type) and issubclass(kind, library.PreTrainedModel) and kind.config_class) or (
        "timm" in f"{kind.__module__} {name}".lower()  # it builds what its configuration names, and loads weights
    ):
        raise ArtifactError(f"transformers has no model {name[:60]!r}")
    config, attention = arguments.get("config"), arguments.get("attention")
    if set(arguments) - {"config", "attention"} or not isinstance(config, dict) or attention not in (None, *_ATTENTION):
        raise ArtifactError(f"{name[:60]} is built from a configuration, and attention= of {', '.join(_ATTENTION)}")
    _check_config(config)
    built = kind.config_class.from_dict(copy.deepcopy(config))
    if attention is not None:
        built._attn_implementation = attention
    return kind(built)


def _check_config(value: object) -> None:
    """Raise ArtifactError if a configuration, or one inside it, has an entry that may load code, weights or kernels."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if _NOT_OF_A_CONFIG.fullmatch(key) and inner not in (None, False):
                raise ArtifactError(f"a configuration with the entry {key[:60]!r} is not accepted from an artifact")
            if key == "model_type" and "timm" in str(inner).lower():
                raise ArtifactError("a configuration of a timm model is not accepted from an artifact")
            _check_config(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_config(inner)


# -- peft


def _peft(network: Any, describe: Describe) -> Iterator[Library]:
    configs = getattr(network, "peft_config", None)
    if not configs or getattr(sys.modules["peft"], type(network).__name__, None) is not type(network):
        return
    adapters = {}
    for adapter, config in configs.items():
        if type(config).__name__ != "LoraConfig":
            return
        changed = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        default = type(config)()
        changed = {k: v for k, v in changed.items() if k not in _WITHOUT_EFFECT and v and v != getattr(default, k)}
        if set(changed) - _LORA:
            return
        adapters[adapter] = _plain(changed)
    base = describe(copy.deepcopy(network).unload())
    if base is not None:
        yield Library("peft", type(network).__name__, check_json(adapters, "the adapters"), {}, base)


def _build_peft(library: Any, name: str, arguments: Json, base: nn.Module) -> nn.Module:
    network: Any = None
    for adapter, changed in arguments.items():
        if not isinstance(changed, dict) or set(changed) - _LORA or "." in adapter:
            raise ArtifactError(f"the artifact's adapter {adapter[:60]!r} is not one of LoRA as peft describes it")
        config = library.LoraConfig(**changed)
        if network is None:
            network = library.get_peft_model(base, config, adapter)
        else:
            network.add_adapter(adapter, config)
    if type(network).__name__ != name:
        raise ArtifactError(f"peft builds a {type(network).__name__} and not a {name[:60]}")
    return network


# -- timm and torchvision


def _timm(network: Any) -> Iterator[tuple[str, Json]]:
    library: Any = sys.modules["timm"]
    settings = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None) or {}
    name = settings.get("architecture")
    if not isinstance(name, str) or not library.is_model(name):
        return
    recorded = getattr(library.models, "get_model_args", None)  # older versions record nothing
    known: Json = (
        recorded(network) if recorded else {"num_classes": network.num_classes, "in_chans": _channels(network)}
    )
    arguments = {k: _plain(v) for k, v in known.items() if k in _TIMM and v is not None}
    if rate := getattr(network, "drop_rate", 0.0):
        arguments["drop_rate"] = rate
    if rate := max((getattr(m, "drop_prob", None) or 0.0 for m in network.modules()), default=0.0):
        arguments["drop_path_rate"] = round(rate, 6)  # the largest of a range in float32
    yield name, arguments


def _torchvision(network: Any) -> Iterator[tuple[str, Json]]:
    models = importlib.import_module("torchvision.models")
    arguments: Json = {}
    if (classes := _classes(network)) is not None:
        arguments["num_classes"] = classes
    attributes = {n: getattr(network, n, None) for n in _TORCHVISION & set(_parameters(type(network)))}
    held = {n: v for n, v in attributes.items() if isinstance(v, int | float) and not isinstance(v, bool)} | arguments
    for name in models.list_models():
        builder = models.get_model_builder(name)
        if builder.__module__ == type(network).__module__:
            yield name, arguments
            if held != arguments:
                yield name, held


def _parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


def _channels(network: nn.Module) -> int | None:
    """The channels of the inputs of the first convolution."""
    return next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)


def _classes(network: nn.Module) -> int | None:
    """The outputs of the last layer that has a number of outputs."""
    sizes = [getattr(m, "out_features", getattr(m, "out_channels", None)) for m in network.modules()]
    return next((size for size in reversed(sizes) if isinstance(size, int)), None)


def _plain(value: Any) -> Any:
    """A value as JSON holds it: keys as strings, sets as sorted lists, enumerations and dtypes by their value."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value).partition(".")[2]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
