"""The network of a posterior as an architecture, and back: described by layers, named, or supplied on loading.

Importing a name runs code, so it needs the caller's trust; layers are built from a fixed list of classes.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
import torch
from torch import Tensor, nn

from vbdl.artifact import layers, libraries
from vbdl.artifact.manifest import Architecture, ArtifactError, Layers, Library, Reference, Supplied, check_json
from vbdl.artifact.trust import import_named, is_trusted, untrusted
from vbdl.calling.traversing import state_of
from vbdl.nn.architecture import architecture as described_lines
from vbdl.nn.architecture import constants
from vbdl.types import Json

_OF_POSTERIOR = ("first_layer", "row_estimator")  # attributes of Bayesian layers, set by the posterior around them


def describe(
    network: nn.Module,
    values: Mapping[str, Tensor],
    target: str | None,
    arguments: Json,
) -> Architecture:
    """Describe how to rebuild a network: by `target` ("module:name") if given, else by its layers or its library.

    What none of them describes is Supplied.

    values: tensors by name, used instead of the network's own, which may be on the meta device.
    Raises ValueError if `target` builds a different network.
    """
    if target is not None:
        rebuilt = _import(target)(**arguments)
        check_same(rebuilt, settings(network), f"{target} builds", ValueError)
        return Reference(target, check_json(dict(arguments), "arguments"), settings(network))
    try:
        layered = Layers(layers.describe(network, "", values), _ties(network))
        with torch.device("meta"):
            relayered = _layers(layered)
        if _lines(relayered) == _lines(network):
            return layered
    except (layers.Undescribed, ArtifactError):
        pass
    for call in libraries.calls(network, _described):
        if _builds(call, network):
            return msgspec.structs.replace(call, settings=settings(network))
    return Supplied(f"{type(network).__module__}.{type(network).__qualname__}", settings(network))


def _described(network: nn.Module) -> Architecture | None:
    found = describe(network, state_of(network), None, {})
    return None if isinstance(found, Supplied) else found


def _builds(call: Library, network: nn.Module) -> bool:
    """Whether the call of a library builds this network, up to the values of its parameters."""
    try:
        with torch.device("meta"):
            rebuilt = _of_library(call, _make)
        check_same(rebuilt, settings(network), "the library builds", ArtifactError)
    except Exception:  # libraries raise errors of any type
        return False
    return _structure(rebuilt) == _structure(network)


def _structure(network: nn.Module) -> list[object]:
    """List the modules in order with their hooks, replaced forwards, and the shapes of parameters and buffers."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    modules = [
        (name, [of for kind in hooks for hook in vars(m)[kind].values() for of in [getattr(hook, "__qualname__", "")]])
        for name, m in network.named_modules()
    ]
    replaced = [name for name, m in network.named_modules() if "forward" in vars(m)]
    return [*modules, *replaced, *((name, t.shape) for name, t in state_of(network).items())]


def _of_library(call: Library, make: Callable[[Architecture], nn.Module]) -> nn.Module:
    return libraries.build(call, None if call.base is None else make(call.base))


def _make(architecture: Architecture) -> nn.Module:
    """Build a network that is described by its layers or by a library."""
    if isinstance(architecture, Layers):
        return _layers(architecture)
    assert isinstance(architecture, Library)
    return _of_library(architecture, _make)


class Maker:
    """Builder of an artifact's networks, in the order of its architectures.

    module: networks that replace those of the artifact, one for each architecture.
    trust: packages from which the artifact's names may be imported.
    """

    def __init__(self, module: nn.Module | Sequence[nn.Module] | None, trust: Sequence[str]):
        self._given = [module] if isinstance(module, nn.Module) else list(module or ())
        if isinstance(trust, str):
            raise TypeError('trust must be a sequence of package names, e.g. ("mypackage",), not a string')
        self._trust = tuple(trust)
        self._next = 0

    def make(self, architecture: Architecture) -> nn.Module:
        """Build the network of the next architecture; its weights are arbitrary."""
        if self._given:  # the caller's networks replace the artifact's
            if self._next >= len(self._given):
                raise ArtifactError(
                    f"the artifact has more architectures than module= has networks ({len(self._given)}); pass one for "
                    f"each"
                )
            network = copy.deepcopy(self._given[self._next])
            self._next += 1
            if not isinstance(architecture, Layers):
                check_same(network, architecture.settings, "module= is", ArtifactError)
            return network
        return self._build(architecture)

    def _build(self, architecture: Architecture) -> nn.Module:
        if isinstance(architecture, Layers):
            return _layers(architecture, self._trust)
        if isinstance(architecture, Supplied):
            raise ArtifactError(
                f"this artifact does not describe its network, a {architecture.name}: pass such a network to "
                f"load(folder, module=...), or save it with architecture='module:function'"
            )
        if isinstance(architecture, Library):
            packages = architecture.packages
            if not all(is_trusted(package, self._trust) for package in packages):
                target = f"{architecture.library}:{architecture.name}"
                raise untrusted(target, ", or pass the network as module=", packages)
            network, who = _of_library(architecture, self._build), f"{architecture.library} builds"
        else:
            self._check_trust(architecture.target)
            made, who = _import(architecture.target)(**architecture.arguments), f"{architecture.target} builds"
            if not isinstance(made, nn.Module):
                raise ArtifactError(f"{architecture.target} returned a {type(made).__name__}, not an nn.Module")
            network = made
        check_same(network, architecture.settings, who, ArtifactError)
        return network

    def _check_trust(self, target: str) -> None:
        path, _, name = target.partition(":")
        parts = path.split(".")
        if is_trusted(path, self._trust):
            return
        # public nn.Module classes of vbdl need no trust: their constructors have no side effects
        if parts[0] == "vbdl" and not any(p.startswith("_") for p in [*parts, *name.split(".")]):
            kind = _import(target)
            if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == path:
                return
        raise untrusted(target, ", or pass the network as module=")


@contextlib.contextmanager
def quiet_generator() -> Iterator[None]:
    """Restore torch's generator on exit, because building networks draws their initial weights from it."""
    with torch.random.fork_rng(devices=[]):
        yield


def _layers(description: Layers, trust: Sequence[str] = ()) -> nn.Module:
    network = layers.build(description.root, trust)
    for name, first in description.ties.items():
        owner, _, leaf = name.rpartition(".")
        try:
            shared = network.get_parameter(first)
            if network.get_parameter(name).shape != shared.shape:
                raise ArtifactError(f"{name} cannot be tied to {first}: their shapes differ")
            setattr(network.get_submodule(owner), leaf, shared)
        except AttributeError as error:
            raise ArtifactError(f"{name} cannot be tied to {first}: {error}") from None
    return network


def _ties(network: nn.Module) -> dict[str, str]:
    first = {id(p): name for name, p in network.named_parameters()}
    every = network.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if first[id(p)] != name}


def _import(target: str) -> Callable[..., object]:
    maker = import_named(target)
    if not callable(maker):
        raise ArtifactError(f"{target[:120]!r} is not a function or class that builds a network")
    return maker


def settings(network: nn.Module) -> dict[str, str]:
    """The properties that equal tensors do not show: {path: class} and {"path:name": setting or constant}."""
    properties = {}
    for name, m in network.named_modules():
        properties[name] = type(m).__qualname__
        for key, value in vars(m).items():
            if key.startswith("_") or key in ("training", *_OF_POSTERIOR):
                continue
            if callable(value) and not isinstance(value, type):
                value = getattr(value, "__qualname__", None)
            if value is None or _is_plain(value):
                properties[f"{name}:{key}"] = repr(value)
    found = constants(network, code=False)  # the device that a layer remembers may be another on loading
    return properties | {f":{path}": value for path, value in found.items() if not value.startswith("device(")}


def check_same(network: object, expected: Mapping[str, str], who: str, error: type[ValueError]) -> None:
    """Raise `error` if a class or setting of the network differs from `expected`, made by `settings`.

    A setting that only one of the two has is ignored: versions of torch add and remove them.
    who: subject and verb of the message, like "module= is".
    """
    if not isinstance(network, nn.Module):
        raise error(f"{who} a {type(network).__name__} instead of a network")
    actual = settings(network)
    for key in [*expected, *actual]:
        everywhere = key in actual and key in expected
        if actual.get(key) != expected.get(key) and (everywhere or ":" not in key):
            what = key.lstrip(":") or "the network"
            raise error(
                f"{who} a different network: {what} is {actual.get(key)} and was {expected.get(key)} when saved"
            )


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(v) for v in value)
    return isinstance(value, bool | int | float | str | type)


def _lines(network: nn.Module) -> list[str]:
    """The lines that must be equal for two architectures to be the same; dtypes are left out."""
    shapes = {f"{name}: {tuple(t.shape)}" for name, t in state_of(network).items()}
    lines = [line for line in described_lines(network) if not any(f".{key} = " in line for key in _OF_POSTERIOR)]
    return [bare if (bare := line.rpartition(" torch.")[0]) in shapes else line for line in lines]
