"""Layers as class names with constructor arguments, and back: layers of torch.nn, of vbdl.nn and registered ones.

The arguments are read from the attributes that have the names of the constructor's parameters. `vbdl.artifact.networks`
verifies this on saving: it rebuilds the network and compares.
"""

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vbdl.artifact import modules
from vbdl.artifact.arguments import check_arguments
from vbdl.artifact.manifest import ArtifactError, Layer
from vbdl.nn.layers import BayesianConv1d, BayesianConv2d, BayesianConv3d, BayesianLinear
from vbdl.nn.priors import Normal, Prior, ScaleMixture
from vbdl.nn.sampled import SampledNetwork
from vbdl.types import Json

_PLAIN = """
Identity Flatten Unflatten
Linear Bilinear
Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d
LayerNorm RMSNorm GroupNorm LocalResponseNorm
Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout
ReLU ReLU6 LeakyReLU PReLU RReLU ELU CELU SELU GELU SiLU Mish GLU Tanh Tanhshrink Sigmoid LogSigmoid Softplus Softsign
Softshrink Hardshrink Hardtanh Hardsigmoid Hardswish Threshold Softmax Softmin LogSoftmax Softmax2d
MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d
AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d
ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d
Upsample PixelShuffle PixelUnshuffle ChannelShuffle Embedding EmbeddingBag
"""
PLAIN: dict[str, type[nn.Module]] = {n: getattr(nn, n) for n in _PLAIN.split()}
BAYESIAN = {c.__name__: c for c in (BayesianLinear, BayesianConv1d, BayesianConv2d, BayesianConv3d)}
_MADE_BY_TORCH = ("device", "dtype")


class Undescribed(Exception):
    """Raised for a layer whose class is unknown here or whose state its constructor cannot reproduce."""


def describe(module: nn.Module, prefix: str, values: Mapping[str, Tensor]) -> Layer:
    """The description of a layer and its descendants; raises Undescribed if one of them cannot be described.

    prefix: the layer's path in the network with a trailing dot, or "". values: tensors by full name, used instead of
    the module's own, which may be on the meta device.
    """
    name = type(module).__name__
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise Undescribed(f"{prefix or 'the network'} has hooks or a replaced forward method")
    if type(module) is nn.Sequential:
        inside = {n: describe(m, f"{prefix}{n}.", values) for n, m in module._modules.items() if m is not None}
        return Layer("Sequential", children=inside)
    if PLAIN.get(name) is type(module):
        return Layer(name, _arguments(module, type(module)))
    if isinstance(module, SampledNetwork) and BAYESIAN.get(name) is type(module):
        return Layer(name, _bayesian_arguments(module, prefix, values))
    if type(module) is nn.TransformerEncoderLayer:
        return Layer(name, _transformer_arguments(module))
    if modules.is_registered(type(module)):
        arguments = {n: _to_json(v) for n, v in modules.arguments_of(module).items()}
        return Layer(modules.registered_name(type(module)), arguments)
    raise Undescribed(f"{type(module).__module__}.{type(module).__qualname__} is not a known layer of torch.nn")


def build(layer: Layer, trust: Sequence[str] = ()) -> nn.Module:
    """Build a layer with freshly initialized weights.

    trust: packages from which the class of a registered layer may be imported.
    Raises ArtifactError for an unknown class or for arguments that its constructor does not accept.
    """
    if layer.name == "Sequential":
        if layer.arguments:
            raise ArtifactError("a Sequential takes no arguments")
        sequential = nn.Sequential()
        for name, child in layer.children.items():
            try:
                sequential.add_module(name, build(child, trust))
            except (KeyError, TypeError) as error:
                raise ArtifactError(f"{name!r} is not a valid name of a layer: {error}") from None
        return sequential
    if layer.children:
        raise ArtifactError(f"a {layer.name[:80]} is described with layers inside, which only a Sequential has")
    if ":" in layer.name:
        return _registered(modules.registered_class(layer.name, trust), layer)
    kind = {**PLAIN, **BAYESIAN, "TransformerEncoderLayer": nn.TransformerEncoderLayer}.get(layer.name)
    if kind is None:
        raise ArtifactError(f"{layer.name[:80]!r} is not among the layers that an artifact may name")
    # a Bayesian layer passes its options on to the plain one
    plain = PLAIN[layer.name.removeprefix("Bayesian")] if layer.name in BAYESIAN else kind
    accepted = {*inspect.signature(plain).parameters} - {*_MADE_BY_TORCH}
    remaining = dict(layer.arguments)
    prior = remaining.pop("prior_std", None) if layer.name in BAYESIAN else None
    initial = remaining.pop("initial_std", None) if layer.name in BAYESIAN else None
    if odd := sorted(remaining.keys() - accepted):
        raise ArtifactError(f"{layer.name} has no argument {odd[0][:80]!r}")
    arguments = {n: _from_json(v) for n, v in remaining.items()}
    if layer.name in BAYESIAN:
        arguments |= {"prior": prior_of(prior), "initial_std": initial}
    try:
        check_arguments(plain, {n: v for n, v in arguments.items() if n in remaining})
        return kind(**arguments)
    except Exception as error:  # constructors raise errors of any type
        raise ArtifactError(f"{layer.name} cannot be built from these arguments: {error}") from None


def _registered(cls: type[nn.Module], layer: Layer) -> nn.Module:
    """Build a layer of a registered class with freshly initialized weights."""
    try:
        return cls(**modules.decode(cls, {n: _from_json(v) for n, v in layer.arguments.items()}, {}, ()))
    except Exception as error:  # constructors raise errors of any type
        raise ArtifactError(f"{layer.name} cannot be built from these arguments: {error}") from error


def prior_of(constants: object) -> Prior:
    """The prior with the constants that `Prior.constants` returned: 1 for Normal, 3 for ScaleMixture."""
    if not isinstance(constants, list) or not all(isinstance(c, int | float) for c in constants):
        raise ArtifactError(f"a prior is a list of numbers, not {str(constants)[:80]}")
    if len(constants) not in (1, 3):
        raise ArtifactError(f"a prior has 1 or 3 constants, not {len(constants)}")
    try:
        return Normal(*constants) if len(constants) == 1 else ScaleMixture(*constants)
    except ValueError as error:
        raise ArtifactError(str(error)) from None


def _arguments(module: nn.Module, kind: type[nn.Module]) -> Json:
    arguments = {}
    for name in inspect.signature(kind).parameters:
        if name in _MADE_BY_TORCH or name.startswith("_") or not hasattr(module, name):
            continue
        value = getattr(module, name)
        if name == "bias":
            value = value is not None and value is not False
        arguments[name] = _to_json(value)
    return arguments


def _bayesian_arguments(module: SampledNetwork, prefix: str, values: Mapping[str, Tensor]) -> Json:
    plain = PLAIN[type(module).__name__.removeprefix("Bayesian")]
    if type(module.inner) is not plain or module.n_data != 1:
        raise Undescribed(f"{prefix} was changed after its construction")
    arguments = _arguments(module.inner, plain)
    arguments["prior_std"] = values[f"{prefix}prior_0"].tolist()
    arguments["initial_std"] = _exp(module.log_std.initial)
    return arguments


def _exp(logarithm: float) -> float:
    return float(torch.tensor(logarithm, dtype=torch.float64).exp())


_ACTIVATIONS = {torch.nn.functional.relu: "relu", torch.nn.functional.gelu: "gelu"}


def _transformer_arguments(module: nn.TransformerEncoderLayer) -> Json:
    attention = module.self_attn
    activation = _ACTIVATIONS.get(module.activation)  # type: ignore[arg-type]
    if activation is None:
        raise Undescribed("the activation of a TransformerEncoderLayer is neither relu nor gelu")
    return {
        "d_model": attention.embed_dim,
        "nhead": attention.num_heads,
        "dim_feedforward": module.linear1.out_features,
        "dropout": module.dropout.p,
        "activation": activation,
        "layer_norm_eps": module.norm1.eps,
        "batch_first": attention.batch_first,
        "norm_first": module.norm_first,
        "bias": module.linear1.bias is not None,
    }


def _to_json(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_to_json(v) for v in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise Undescribed(f"an argument is a {type(value).__name__}, which JSON cannot hold")


def _from_json(value: object) -> object:
    """The argument with lists turned back into tuples, which the constructors keep."""
    if isinstance(value, list):
        return tuple(_from_json(v) for v in value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ArtifactError(f"an argument of a layer is a {type(value).__name__}; numbers, strings and lists are allowed")
