"""Posteriors as descriptions in the manifest, and back."""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence

import msgspec
from torch import Tensor, nn

from vbdl.artifact import modules
from vbdl.artifact.layers import prior_of
from vbdl.artifact.manifest import (
    Architecture,
    ArtifactError,
    Dropout,
    Ensemble,
    MeanField,
    Members,
    Output,
    OutputFunction,
    Plain,
    Registered,
    Single,
    check_json,
)
from vbdl.artifact.trust import import_named, is_trusted, untrusted
from vbdl.calling.traversing import state_of
from vbdl.posteriors.augmentation import TestTimeAugmentation
from vbdl.posteriors.batch_ensemble import BatchEnsemble
from vbdl.posteriors.deterministic import Deterministic
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.ivon import IVON
from vbdl.posteriors.laplace import Laplace
from vbdl.posteriors.masksembles import Masksembles
from vbdl.posteriors.mc_dropout import MCDropout
from vbdl.posteriors.mean_field import MeanField as MeanFieldPosterior
from vbdl.posteriors.snapshots import Snapshots
from vbdl.posteriors.stochastic import Stochastic
from vbdl.posteriors.swag import SWAG
from vbdl.types import Output as ChosenOutput
from vbdl.types import Posterior, is_posterior

Describe = Callable[[nn.Module, Mapping[str, Tensor]], Architecture]
Make = Callable[[Architecture], nn.Module]

for _method in (
    SWAG, IVON, BatchEnsemble, Deterministic, Laplace, Masksembles, Snapshots, Stochastic, TestTimeAugmentation,
):  # fmt: skip
    modules.register(_method)

_TYPE = "type:"  # prefix that marks the name of a class among the names of submodules


def describe(posterior: Posterior, network: Describe) -> Single | Ensemble:
    """Describe a posterior without its tensors; ValueError for a method that is not registered.

    network: describes a network, given its tensors by name.
    """
    if isinstance(posterior, DeepEnsemble):
        configs = [part.config() for part in posterior.parts]
        members = [
            Members(config["n_members"], _member(part, network), config["shared"])
            for config, part in zip(configs, posterior.parts, strict=True)
        ]
        return Ensemble(members, configs[0]["seed"] if len(members) == 1 else 0, _stored(posterior.output))
    return _single(posterior, state_of(posterior.module), network)


def _member(part: DeepEnsemble, network: Describe) -> Plain | Single:
    values = part.member(0)
    return Plain(network(part.module, values)) if part.base is None else _single(part.base, values, network)


def _single(posterior: Posterior, values: Mapping[str, Tensor], network: Describe) -> Single:
    """Describe a posterior that is no ensemble.

    values: tensors of posterior.module by name, used instead of its own, which may be on the meta device.
    """
    inner = {n.removeprefix("inner."): t for n, t in values.items() if n.startswith("inner.")}
    if type(posterior) is MCDropout:
        module, arguments = posterior.module, posterior.config()
        chosen = [d for d in arguments["deterministic"] if _names(module, d)]
        stays = [d if isinstance(d, str) else f"{_TYPE}{_type_name(d)}" for d in chosen]
        output = _stored(posterior.output)
        return Dropout(network(module.inner, inner), arguments["p"], stays, arguments["seed"], output)
    if type(posterior) is MeanFieldPosterior:
        arguments, priors = posterior.config(), None
        if "prior" in arguments:  # their constants as the tensors have them, which may have been loaded since
            priors = {name: values[f"prior_{i}"].tolist() for i, name in enumerate(arguments["prior"])}
        return MeanField(
            network(posterior.user_network, inner),
            arguments["n_data"],
            priors,
            arguments.get("initial_std", 1.0),
            arguments["n_samples"],
            arguments["seed"],
            _stored(posterior.output),
            posterior.estimator,
        )
    return _registered(posterior, values, network)


def _registered(posterior: Posterior, values: Mapping[str, Tensor], network: Describe) -> Registered:
    """Describe a registered method, which is rebuilt as class(network, **config())."""
    name = modules.registered_name(type(posterior))
    paths = [n for n, m in posterior.module.named_modules() if m is posterior.user_network]
    if not paths:
        raise ValueError(f"{name} cannot be stored: its network is not a submodule of its module; assign it as one")
    prefix = f"{paths[0]}." if paths[0] else ""
    inner = {n.removeprefix(prefix): t for n, t in values.items() if n.startswith(prefix)}
    try:
        arguments = dict(posterior.config())
    except NotImplementedError as error:
        raise ValueError(str(error)) from None
    if unknown := arguments.keys() - inspect.signature(type(posterior)).parameters:
        raise ValueError(
            f"config() of {name} returns {min(unknown)!r}, which its constructor does not take: define config() in the "
            f"class itself, to save it"
        )
    if tensors := [n for n, v in arguments.items() if isinstance(v, Tensor)]:
        raise ValueError(f"config() of {name} has the tensor {tensors[0]!r}: return numbers or lists of numbers")
    stored = _stored(posterior.output)
    if "output" in arguments and isinstance(stored, OutputFunction):
        arguments["output"] = {"function": stored.target}
    encoded = {n: modules.encode(v, n) for n, v in arguments.items()}
    return Registered(name, network(posterior.user_network, inner), check_json(encoded, f"config() of {name}"))


def build(description: Single | Ensemble, make: Make, trust: Sequence[str] = ()) -> Posterior:
    """Build a posterior from its description; its tensors are arbitrary until they are filled in.

    make: builds a network from its architecture.
    trust: packages from which the class of a registered method may be imported.
    """
    if not isinstance(description, Ensemble):
        return _build_single(description, make, trust)
    parts, output = [], _restored(description.output, trust)
    for group in description.members:
        one = (
            make(group.member.network) if isinstance(group.member, Plain) else _build_single(group.member, make, trust)
        )
        parts.append(DeepEnsemble([one] * group.count, seed=description.seed, shared=group.shared, output=output))
    return parts[0] if len(parts) == 1 else DeepEnsemble.joined(parts)


def _build_single(description: Single, make: Make, trust: Sequence[str]) -> Posterior:
    if isinstance(description, Registered):  # the class first, so that nothing is built if it is not trusted
        cls = modules.registered_class(description.name, trust)
        stored = dict(description.arguments)
        if isinstance(chosen := stored.get("output"), Mapping):
            stored["output"] = _restored(_function(chosen), trust)
        arguments = modules.decode(cls, stored, {}, trust)
        posterior = cls(make(description.network), **arguments)
        if not is_posterior(posterior):
            raise ArtifactError(f"{description.name[:120]!r} is not a posterior: it must inherit vbdl.types.Posterior")
        return posterior
    output = _restored(description.output, trust)
    network = make(description.network)
    if isinstance(description, Dropout):
        stays = [_type(network, d) if d.startswith(_TYPE) else d for d in description.deterministic]
        return MCDropout(network, description.p, stays, description.seed, output=output)
    if description.priors is None:
        return MeanFieldPosterior(
            network,
            description.n_data,
            n_samples=description.n_samples,
            seed=description.seed,
            estimator=description.estimator,
            output=output,
        )
    return MeanFieldPosterior(
        network,
        description.n_data,
        prior={n: prior_of(c) for n, c in description.priors.items()},
        parameters=list(description.priors),
        initial_std=description.initial_std,
        n_samples=description.n_samples,
        seed=description.seed,
        estimator=description.estimator,
        output=output,
    )


def _stored(output: ChosenOutput) -> Output:
    """The choice of an output as the manifest holds it; ValueError for a function that `load` could not import."""
    if not callable(output):
        return output
    kind = output if isinstance(output, types.FunctionType | type) else type(output)
    target = f"{kind.__module__}:{kind.__qualname__}"
    if kind.__module__ != "__main__" and "<" not in target and import_named(target) is output:
        return OutputFunction(target)
    raise ValueError(
        f"output= is a function that load cannot import ({target}): define it at the top level of a module, or choose "
        f"the output by its name or index"
    )


def _restored(output: Output, trust: Sequence[str]) -> ChosenOutput:
    """The choice of an output that the manifest holds; ArtifactError for a function outside the trusted packages."""
    if not isinstance(output, OutputFunction):
        return output
    if not is_trusted(output.target.partition(":")[0], trust):
        raise untrusted(output.target)
    function = import_named(output.target)
    if not callable(function):
        raise ArtifactError(f"{output.target[:120]!r} is not a function of a network's outputs")
    return function  # type: ignore[return-value]


def _function(stored: Mapping[str, object]) -> OutputFunction:
    """The function that chooses an output of a registered method, from {"function": "module:name"}."""
    try:
        return msgspec.convert({"type": "function", "target": stored.get("function")}, OutputFunction)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"output={str(stored)[:120]} names no function: {error}") from None


def architectures(description: Single | Ensemble) -> Sequence[Architecture]:
    """The architectures of the posterior's parts, in order."""
    if isinstance(description, Ensemble):
        return [group.member.network for group in description.members]
    return [description.network]


def _names(network: nn.Module, chosen: str | type) -> bool:
    """Whether a choice of deterministic modules has an effect: a name, or a class that a module is an instance of."""
    return isinstance(chosen, str) or any(isinstance(m, chosen) for m in network.modules())


def _type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _type(network: nn.Module, name: str) -> type[nn.Module]:
    """The class of this name among the classes and bases of the network's modules; nothing is imported."""
    name = name.removeprefix(_TYPE)
    for module in network.modules():
        for kind in type(module).__mro__:
            if _type_name(kind) == name and issubclass(kind, nn.Module):
                return kind
    raise ArtifactError(f"deterministic names the class {name[:120]!r}, but no module of the network is an instance")
