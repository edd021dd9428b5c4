"""The network of a posterior: described layer by layer, referred to by a name that can be imported, or left to the
caller of load.

A name is imported only where the caller allows it, because importing runs code; layers come from a list and run none.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.artifact import layers
from vbdl.artifact.manifest import Architecture, ArtifactError, Layers, Reference, Supplied, check_json
from vbdl.artifact.trust import import_named, is_trusted, untrusted
from vbdl.calling.stacking import state_of
from vbdl.nn.architecture import architecture as described_lines
from vbdl.nn.architecture import constants

_NUMBERED = "first_layer"  # of a Bayesian layer, which the posterior around it numbers


def describe(
    network: nn.Module,
    values: Mapping[str, Tensor],
    target: str | None,
    arguments: Mapping[str, Any],
) -> Architecture:
    """How to make the network again: by `target`, "module:name", where given, else by its layers, else not at all.

    values: its tensors by name, where its own are on the meta device. ValueError where `target` makes another network.
    """
    if target is not None:
        made = _import(target)(**arguments)
        check_same(made, settings(network), f"{target} makes", ValueError)
        return Reference(target, check_json(dict(arguments), "arguments"), settings(network))
    try:
        found = Layers(layers.describe(network, "", values), _ties(network))
        with torch.device("meta"):
            again = _layers(found)
        if _lines(again) == _lines(network):
            return found
    except (layers.Undescribed, ArtifactError):
        pass
    return Supplied(f"{type(network).__module__}.{type(network).__qualname__}", settings(network))


class Maker:
    """Makes the networks of an artifact, in the order of its architectures.

    module: networks for those that were not described. trust: top-level modules that may be imported from.
    """

    def __init__(self, module: nn.Module | Sequence[nn.Module] | None, trust: Sequence[str]):
        self._given = [module] if isinstance(module, nn.Module) else list(module or ())
        if isinstance(trust, str):
            raise TypeError('trust is a sequence of module names: ("mypackage",)')
        self._trust = tuple(trust)
        self._next = 0

    def make(self, architecture: Architecture) -> nn.Module:
        """A network, its weights of no importance."""
        if self._given:  # what the caller brings replaces what the artifact would make
            if self._next >= len(self._given):
                raise ArtifactError(f"the artifact has more architectures than the {len(self._given)} modules given")
            network = copy.deepcopy(self._given[self._next])
            self._next += 1
            if not isinstance(architecture, Layers):
                check_same(network, architecture.settings, "the module given has", ArtifactError)
            return network
        if isinstance(architecture, Layers):
            return _layers(architecture, self._trust)
        if isinstance(architecture, Supplied):
            raise ArtifactError(
                f"the network of this artifact is a {architecture.name}, which it does not describe: "
                f"load(folder, module=...) with such a network, or save it with architecture='module:function'"
            )
        self._check_trust(architecture.target)
        network = _import(architecture.target)(**architecture.arguments)
        if not isinstance(network, nn.Module):
            raise ArtifactError(f"{architecture.target} made a {type(network).__name__} and not a network")
        check_same(network, architecture.settings, f"{architecture.target} makes", ArtifactError)
        return network

    def _check_trust(self, target: str) -> None:
        path, _, name = target.partition(":")
        parts = path.split(".")
        if is_trusted(path, self._trust):
            return
        # layers of vbdl itself: classes of networks, whose constructors touch nothing outside
        if parts[0] == "vbdl" and not any(p.startswith("_") for p in [*parts, *name.split(".")]):
            found = _import(target)
            if isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == path:
                return
        raise untrusted(target, ", or give the network with module=")


@contextlib.contextmanager
def quiet_generator() -> Iterator[None]:
    """Making networks draws fresh weights; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


def _layers(description: Layers, trust: Sequence[str] = ()) -> nn.Module:
    made = layers.build(description.root, trust)
    for name, first in description.ties.items():
        owner, _, leaf = name.rpartition(".")
        try:
            shared = made.get_parameter(first)
            if made.get_parameter(name).shape != shared.shape:
                raise ArtifactError(f"{name} cannot be {first}: they differ in shape")
            setattr(made.get_submodule(owner), leaf, shared)
        except AttributeError as error:
            raise ArtifactError(f"{name} cannot be tied to {first}: {error}") from None
    return made


def _ties(network: nn.Module) -> dict[str, str]:
    first = {id(p): name for name, p in network.named_parameters()}
    every = network.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if first[id(p)] != name}


def _import(target: str) -> Any:
    maker = import_named(target)
    if not callable(maker):
        raise ArtifactError(f"{target[:120]!r} is not a function or class that makes a network")
    return maker


def settings(network: nn.Module) -> dict[str, str]:
    """The class of every module and, after a colon, its settings and constants: what equal tensors do not show."""
    found = {}
    for name, m in network.named_modules():
        found[name] = type(m).__qualname__
        for key, value in vars(m).items():
            if key.startswith("_") or key in ("training", _NUMBERED):
                continue
            if callable(value) and not isinstance(value, type):
                value = getattr(value, "__qualname__", None)
            if value is None or _is_plain(value):
                found[f"{name}:{key}"] = repr(value)
    return found | {f":{path}": value for path, value in constants(network, code=False).items()}


def check_same(network: nn.Module, expected: Mapping[str, str], who: str, error: type[ValueError]) -> None:
    """Raises where a class or a setting differs. Settings that one of them lacks come and go with versions of torch."""
    if not isinstance(network, nn.Module):
        raise error(f"{who} a {type(network).__name__} and not a network")
    own = settings(network)
    for key in [*expected, *own]:
        everywhere = key in own and key in expected
        if own.get(key) != expected.get(key) and (everywhere or ":" not in key):
            what = key.lstrip(":") or "the network"
            raise error(
                f"{who} another network: {what} is {own.get(key)}, and was {expected.get(key)} when it was saved"
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(v) for v in value)
    return isinstance(value, bool | int | float | str | type)


def _lines(network: nn.Module) -> list[str]:
    """What has to be equal; dtypes are those of the tensors that are put in."""
    shapes = {f"{name}: {tuple(t.shape)}" for name, t in state_of(network).items()}
    lines = [line for line in described_lines(network) if f".{_NUMBERED} = " not in line]
    return [bare if (bare := line.rpartition(" torch.")[0]) in shapes else line for line in lines]
