"""A likelihood, with the calibration and the decision inside it, as JSON and tensors, and back.

Nothing of this runs code from a file: classes are looked up in a list, their arguments are plain values, and tensors
are put where the class has them.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import msgspec
from torch import Tensor, nn

from vbdl import calibration
from vbdl.arguments import check_arguments
from vbdl.decision.anomaly import AnomalyFlags
from vbdl.decision.cost import ExpectedCost
from vbdl.decision.deciding import DecidingLikelihood
from vbdl.decision.handover import HandOver
from vbdl.decision.path_risk import PathBounds
from vbdl.decision.referral import Certificate, Referral
from vbdl.decision.risk import Risk
from vbdl.likelihoods.bernoulli import Bernoulli
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.centered import Centered
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.likelihoods.heteroscedastic import HeteroscedasticGaussian

_KNOWN: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        *(v for v in vars(calibration).values() if inspect.isclass(v) and issubclass(v, nn.Module)),
        AnomalyFlags,
        ExpectedCost,
        HandOver,
        PathBounds,
        Referral,
        Risk,
        DecidingLikelihood,
        Bernoulli,
        Categorical,
        Centered,
        Gaussian,
        HeteroscedasticGaussian,
    )
}


def describe(module: nn.Module) -> dict[str, Any]:
    """What `rebuild` needs beside `module.state_dict()`: a dict that JSON can hold.

    ValueError for a module of a class that is not in the list, a decision of one's own for instance: such a
    predictor is saved without it, and the decision is put on again after loading.
    """
    name = type(module).__name__
    if _KNOWN.get(name) is not type(module):
        raise ValueError(f"{name} is not among what can be stored: {sorted(_KNOWN)}")
    arguments: dict[str, Any] = {}
    for argument in inspect.signature(type(module)).parameters:
        # what is not kept under its name has become a parameter or a buffer, which the state holds
        value = getattr(module, argument, None)
        if isinstance(value, nn.Module):
            arguments[argument] = {"module": describe(value)}
        elif isinstance(value, Tensor):
            arguments[argument] = {"tensor": argument}
        elif value is not None:
            arguments[argument] = _listed(value)
    found: dict[str, Any] = {"class": name, "arguments": arguments}
    certificate = getattr(module, "certificate", None)
    if certificate is not None:
        found["certificate"] = dataclasses.asdict(certificate)
    members = module.__dict__.get("n_members")
    if members is not None:
        found["n_members"] = members
    return found


def _listed(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    return [_listed(v) for v in value] if isinstance(value, tuple) else value


def rebuild(description: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The module of a description and a state dict. ValueError for an unknown class, argument or tensor."""
    name = description.get("class")
    if name not in _KNOWN:
        raise ValueError(f"{name!r} is not among what can be stored: {sorted(_KNOWN)}")
    cls = _KNOWN[name]
    allowed = inspect.signature(cls).parameters
    arguments: dict[str, Any] = {}
    for argument, value in description.get("arguments", {}).items():
        if argument not in allowed:
            raise ValueError(f"{name} has no argument {argument!r}")
        if isinstance(value, Mapping) and "module" in value:
            prefix = argument + "."
            inner = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            arguments[argument] = rebuild(value["module"], inner)
        elif isinstance(value, Mapping) and "tensor" in value:
            if argument not in state:
                raise ValueError(f"the state of {name} has no tensor {argument!r}")
            t = state[argument]
            arguments[argument] = t if t.ndim else t.item()
        else:
            arguments[argument] = value
    check_arguments(cls, {n: v for n, v in arguments.items() if not isinstance(v, Tensor | nn.Module)})
    module: Any = cls(**arguments)
    members = description.get("n_members")
    if members is not None:
        if type(members) is not int or members < 1:
            raise ValueError(f"n_members is a number of members, not {str(members)[:40]!r}")
        module.n_members = members
    own = {n for n in (*module._parameters, *module._buffers)}
    for n, t in state.items():
        if "." in n:
            continue
        if n not in own:
            raise ValueError(f"{name} has no tensor {n!r}")
        if n in module._parameters:
            setattr(module, n, nn.Parameter(t.clone(), requires_grad=t.is_floating_point()))
        else:
            module.register_buffer(n, t.clone())
    if "certificate" in description:
        module.certificate = msgspec.convert(description["certificate"], Certificate, strict=True)
    return module
