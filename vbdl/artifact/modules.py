"""The registry of classes that an artifact may name, and modules as descriptions, and back.

A class of vbdl is stored by its name, "Temperature"; a user's class registered with `vbdl.register` by
"package.module:Class". The description of a module is data: the name of its class and its constructor's arguments
(numbers, strings, lists, other modules or tensors); its tensors are stored beside it. A user's class that this process
has not registered is imported only from the packages in `trust`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import msgspec
from torch import Tensor, nn

from vbdl import augmentations, calibration, methods
from vbdl.artifact.arguments import check_arguments
from vbdl.artifact.manifest import ArtifactError
from vbdl.artifact.trust import import_named, is_trusted, untrusted
from vbdl.decision.anomaly import AnomalyFlags
from vbdl.decision.any_of import AnyOf
from vbdl.decision.cost import ExpectedCost
from vbdl.decision.deciding import DecidingLikelihood
from vbdl.decision.handover import HandOver
from vbdl.decision.out_of_distribution import OutOfDistribution
from vbdl.decision.path_risk import PathBounds
from vbdl.decision.referral import Certificate, Referral
from vbdl.decision.risk import Risk
from vbdl.likelihoods.bernoulli import Bernoulli
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.centered import Centered
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.likelihoods.heteroscedastic import HeteroscedasticGaussian
from vbdl.ood.knn import KNN
from vbdl.ood.mahalanobis import Mahalanobis
from vbdl.types import Json, Posterior

_LIKELIHOODS = (Bernoulli, Categorical, Centered, Gaussian, HeteroscedasticGaussian)
_CALIBRATIONS = tuple(v for v in vars(calibration).values() if inspect.isclass(v) and issubclass(v, nn.Module))
_DECISIONS = (
    AnomalyFlags, AnyOf, DecidingLikelihood, ExpectedCost, HandOver, KNN, Mahalanobis, OutOfDistribution, PathBounds,
    Referral, Risk,
)  # fmt: skip
_AUGMENTATIONS = tuple(getattr(augmentations, name) for name in augmentations.__all__)
_OWN = (*_LIKELIHOODS, *_CALIBRATIONS, *_DECISIONS, *_AUGMENTATIONS)
# layers and posteriors of vbdl need more than plain arguments: see `vbdl.artifact.layers`, `vbdl.artifact.posteriors`
_BUILT_IN: dict[str, type[nn.Module]] = {c.__name__: c for c in _OWN}
_FORMER = {"NormalisedIntervals": "NormalizedIntervals"}  # names that version 0.1 stored
_REGISTERED: dict[str, type[nn.Module]] = {}  # by "module:Class"

Class = TypeVar("Class", bound=type[nn.Module])


@overload
def register(cls: Class) -> Class: ...


@overload
def register(*, name: str, **about: Any) -> Callable[[Class], Class]: ...


def register(cls: Class | None = None, *, name: str | None = None, **about: Any) -> Class | Callable[[Class], Class]:
    """Register your own class, so that predictors that contain it can be saved and loaded; use it as a decorator.

        @vbdl.register
        class Sharpened(vbdl.types.Calibrator):
            acts_on = "probs"
            def __init__(self, power: float = 2.0): ...

    cls: a posterior, likelihood, calibration, decision or layer: a subclass of `nn.Module` at the top level of a
        module. It is stored as its name and the arguments of its constructor: what its method `config()` returns, or
        without that method the attributes of the arguments' names. Its parameters and buffers are stored beside it.

    name: also make a posterior a method with this name for the commands (`vbdl fit --plugin FILE --method NAME`),
        `vbdl.VBDLClassifier(method=...)`, `vbdl.recommend` and `vbdl bench`.
    about: what they should know of the method, as for `vbdl.methods.add`: when, words, arguments, dropout, training.

        @vbdl.register(name="perturbed", when="the weights are certain up to a constant")
        class Perturbed(vbdl.types.Posterior): ...

    Another process loads such a predictor with `vbdl.load(folder, trust=("package",))`, which imports the class; a
    single file `perturbed.py` counts as the package "perturbed".
    Raises TypeError if cls is not a subclass of nn.Module, ValueError if it is defined inside a function or the name
    is taken.

    >>> @vbdl.register
    ... class Double(nn.Module):
    ...     def forward(self, x):
    ...         return 2 * x
    >>> Double.__name__  # can now be a layer of a saved network
    'Double'
    """
    if cls is None:
        if name is None:
            raise TypeError("register takes a class, or name= to make it a method of the commands too")
        return lambda decorated: _registered_as_method(decorated, name, about)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register takes a subclass of nn.Module, got {cls!r}")
    if "<locals>" in cls.__qualname__:
        raise ValueError(
            f"{cls.__qualname__} is defined inside a function, where load cannot import it: define it at the top level "
            f"of a module"
        )
    _REGISTERED[f"{cls.__module__}:{cls.__qualname__}"] = cls
    return cls


def _registered_as_method(cls: Class, name: str, about: Mapping[str, Any]) -> Class:
    if not issubclass(cls, Posterior):
        raise TypeError(f"name= is for methods, subclasses of vbdl.types.Posterior, and {cls.__name__} is none")
    register(cls)
    methods.add(cls, name, **about)
    return cls


def is_registered(cls: type) -> bool:
    """Whether this class itself, not only one of its bases, was registered with `register`."""
    return _REGISTERED.get(f"{cls.__module__}:{cls.__qualname__}") is cls


def registered_name(cls: type) -> str:
    """The name "module:Class" by which the class is stored; ValueError if it is not registered."""
    if not is_registered(cls):
        raise ValueError(
            f"{cls.__name__} cannot be stored because it is not registered: put @vbdl.register above the class"
        )
    return f"{cls.__module__}:{cls.__qualname__}"


def registered_class(name: str, trust: Sequence[str]) -> type[nn.Module]:
    """The class stored as "module:Class", imported if needed; ArtifactError if it is not trusted or not registered."""
    if name not in _REGISTERED:
        if not is_trusted(name.partition(":")[0], trust):
            raise untrusted(name)
        import_named(name)
        if name not in _REGISTERED:
            raise ArtifactError(f"{name[:120]!r} is not registered: put @vbdl.register above the class, and load again")
    return _REGISTERED[name]


def with_names_of_today(description: Mapping[str, object]) -> Json:
    """A copy of a description in which names of classes from vbdl 0.1 are replaced by today's names."""
    today = {key: _with_names_of_today(value) for key, value in description.items()}
    if isinstance(stored := today.get("class"), str):
        today["class"] = _FORMER.get(stored, stored)
    return today


def _with_names_of_today(value: object) -> object:
    if isinstance(value, Mapping):
        return with_names_of_today(value)
    return [_with_names_of_today(item) for item in value] if isinstance(value, list | tuple) else value


def describe(module: nn.Module) -> Json:
    """Describe a module as a dict that JSON can hold; `rebuild` needs it and `module.state_dict()`.

    Raises ValueError for a class that is not registered. A predictor with a decision of such a class can be saved
    without the decision, which is attached again after loading.
    """
    name = _stored_name(type(module))
    encoded = {argument: encode(value, argument) for argument, value in arguments_of(module).items()}
    description: Json = {"class": name, "arguments": {a: v for a, v in encoded.items() if v is not None}}
    if isinstance(module, Referral) and module.certificate is not None:
        # fields that vbdl 0.1 did not record are None and left out, so that its certificates keep their description
        description["certificate"] = {n: v for n, v in dataclasses.asdict(module.certificate).items() if v is not None}
    members = vars(module).get("n_members")
    if members is not None:
        description["n_members"] = members
    return description


def arguments_of(module: nn.Module) -> Json:
    """The constructor's arguments for this module by name: `config()`, or else the attributes of the parameters' names.

    Raises ValueError for a registered class without config() that does not keep one of its arguments.
    """
    # of the class: a method, not an attribute or a submodule of that name
    config: Callable[[nn.Module], Json] | None = getattr(type(module), "config", None)
    if callable(config):
        return dict(config(module))
    values: Json = {}
    for argument in inspect.signature(type(module)).parameters:
        try:
            values[argument] = getattr(module, argument)
        except AttributeError:
            # an argument that a class of vbdl does not keep as an attribute is held by its parameters or buffers
            if is_registered(type(module)):
                raise ValueError(
                    f"{type(module).__name__} does not keep the argument {argument!r} of its constructor, so it cannot "
                    f"be stored: set self.{argument}, or define config(), which returns the arguments by name"
                ) from None
    return values


def encode(value: object, name: str) -> object:
    """One constructor argument as JSON: a module as its description, a tensor as its name in the state dict."""
    if isinstance(value, nn.ModuleList):
        return {"modules": [describe(module) for module in value]}
    if isinstance(value, nn.Module):
        return {"module": describe(value)}
    if isinstance(value, Tensor):
        return {"tensor": name}
    return _lists(value)


def rebuild(description: Json, state: Mapping[str, Tensor], trust: Sequence[str] = ()) -> nn.Module:
    """Rebuild a module from its description and state dict; ValueError for an unknown class, argument or tensor."""
    cls = _class_named(description.get("class"), trust)
    arguments = decode(cls, description.get("arguments", {}), state, trust)
    module = cls(**arguments)
    if "n_members" in description:
        members = description["n_members"]
        if type(members) is not int or members < 1:
            raise ValueError(f"n_members must be a positive int, got {str(members)[:40]!r}")
        object.__setattr__(module, "n_members", members)  # an int, which nn.Module keeps as a plain attribute
    _fill(module, {n: t for n, t in state.items() if "." not in n})
    if "certificate" in description:
        if not isinstance(module, Referral):
            raise ValueError(f"a {cls.__name__} has no certificate: only a Referral does")
        module.certificate = msgspec.convert(description["certificate"], Certificate, strict=True)
    return module


def decode(cls: type[nn.Module], stored: Json, state: Mapping[str, Tensor], trust: Sequence[str]) -> Json:
    """The constructor arguments of `cls` from their JSON (`encode`), checked against its type annotations.

    state: the tensors of the module to be built, by name.
    """
    allowed = inspect.signature(cls).parameters
    arguments: Json = {}
    for argument, value in stored.items():
        if argument not in allowed:
            raise ValueError(f"{cls.__name__} has no argument {argument!r}")
        if isinstance(value, Mapping) and "module" in value:
            arguments[argument] = rebuild(value["module"], _inside(argument, state), trust)
        elif isinstance(value, Mapping) and isinstance(value.get("modules"), list):
            each = enumerate(value["modules"])
            arguments[argument] = nn.ModuleList(rebuild(m, _inside(f"{argument}.{i}", state), trust) for i, m in each)
        elif isinstance(value, Mapping) and "tensor" in value:
            if argument not in state:
                raise ValueError(f"the state of {cls.__name__} has no tensor {argument!r}")
            t = state[argument]
            arguments[argument] = t if t.ndim else t.item()
        else:
            arguments[argument] = value
    check_arguments(cls, {n: v for n, v in arguments.items() if not isinstance(v, Tensor | nn.Module)})
    return arguments


def _inside(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the submodule of this name, by their names in it."""
    return {n.removeprefix(f"{name}."): t for n, t in state.items() if n.startswith(f"{name}.")}


def _fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace the module's own parameters and buffers by these tensors, whose shapes may differ."""
    names = {*module._parameters, *module._buffers}
    for name, t in state.items():
        if name not in names:
            raise ValueError(f"{type(module).__name__} has no tensor {name!r}")
        if name in module._parameters:
            setattr(module, name, nn.Parameter(t.clone(), requires_grad=t.is_floating_point()))
        else:
            module.register_buffer(name, t.clone())


def _stored_name(cls: type) -> str:
    return cls.__name__ if _BUILT_IN.get(cls.__name__) is cls else registered_name(cls)


def _class_named(name: object, trust: Sequence[str]) -> type[nn.Module]:
    if isinstance(name, str) and name in _BUILT_IN:
        return _BUILT_IN[name]
    if isinstance(name, str) and ":" in name:
        return registered_class(name, trust)
    raise ValueError(f"{name!r} is not a class that can be stored: {sorted(_BUILT_IN)}, and registered classes")


def _lists(value: object) -> object:
    """The value with tuples turned into lists, as JSON returns them."""
    return [_lists(v) for v in value] if isinstance(value, tuple) else value
