"""The tensor to predict from among the outputs of a network.

Tensor                                   the tensor itself
one tensor in a dict, tuple, dataclass   that tensor
several, one of them named "logits"      logits, as in Hugging Face's and torchvision's outputs
several, none of that name               the one that the posterior's `output=` chooses
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vbdl.types import Output

_FEW = 256  # numbers


def check_output(output: object) -> None:
    """Raise TypeError unless the choice of an output is a name, an index, a function or None."""
    if output is not None and (isinstance(output, bool) or not (isinstance(output, str | int) or callable(output))):
        raise TypeError(
            f"output must be the name or the index of an output, or a function of the outputs, got {output!r}"
        )


def pick(outputs: object, output: Output) -> Tensor:
    """The tensor among a network's outputs that `output` chooses, or that is found by itself if it is None.

    A name or an index chooses among several outputs; a single tensor is returned as it is. A function gets what the
    network returned. Raises TypeError, with the outputs there are, if the choice is not one tensor.
    """
    if callable(output):
        chosen = output(outputs)
        if not isinstance(chosen, Tensor):
            raise TypeError(
                f"the function output= returned {type(chosen).__name__} instead of one Tensor (batch, ...): return "
                f"one of the outputs{_listed(_parts(outputs))}"
            )
        return chosen
    if isinstance(outputs, Tensor):
        return outputs
    parts = _parts(outputs)
    if output is None:
        tensors = [leaf for leaf in leaves(outputs).values() if isinstance(leaf, Tensor)]
        chosen = parts.get("logits") if len(tensors) != 1 else tensors[0]
    else:
        chosen = _chosen(parts, output)
    if isinstance(chosen, Tensor):
        return chosen
    if not parts:
        raise TypeError(
            f"the module returned {type(outputs).__name__}, but vbdl needs one Tensor (batch, ...): give the posterior "
            f"a function that returns one, output=lambda outputs: ..."
        )
    choices = [name for name, part in parts.items() if isinstance(part, Tensor)]
    if not choices:
        how = "output=lambda outputs: ..., a function that returns one"
    else:
        how = f"output={choices[0]!r}" + (" or another of them" if len(choices) > 1 else "")
    what = "several outputs" if output is None else f"no tensor {output!r}"
    raise TypeError(
        f"the module returned {type(outputs).__name__} with {what}, but vbdl predicts from one Tensor (batch, ...)"
        f"{_listed(parts)}. Choose one in the posterior, like MCDropout(module, {how})"
    )


def _chosen(parts: Mapping[Any, object], name: str | int) -> object:
    """The output of this name or index, or None if there is none."""
    if isinstance(name, str):
        return parts.get(name)
    return list(parts.values())[name] if -len(parts) <= name < len(parts) else None


def named_part(outputs: object, name: str | int) -> Tensor:
    """The tensor of this name or index among several outputs. Raises TypeError, with the outputs, if there is none."""
    parts = _parts(outputs)
    chosen = _chosen(parts, name)
    if isinstance(chosen, Tensor):
        return chosen
    raise TypeError(
        f"the module returned {type(outputs).__name__} without a tensor {name!r} in training{_listed(parts)}: name one "
        f"of its outputs"
    )


def are_same(outputs: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether outputs of the same rows are equal up to a tolerance, relative to the largest expected output."""
    alike = outputs.shape == expected.shape and outputs.dtype == expected.dtype
    if alike and expected.numel() <= _FEW and not expected.is_complex():
        return _are_same_numbers(outputs.flatten().tolist(), expected.flatten().tolist(), tolerance)
    scale = float(expected.abs().nan_to_num(posinf=0.0).amax()) if expected.numel() else 0.0
    return torch.allclose(outputs, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def all_same(outputs: object, expected: object, tolerance: float) -> bool:
    """Return whether two outputs, however deep, hold the same tensors: `are_same`, or equal if they are no reals."""
    found, wanted = leaves(outputs), leaves(expected)
    if list(found) != list(wanted):
        return False
    for place, t in found.items():
        other = wanted[place]
        if not isinstance(t, Tensor) or not isinstance(other, Tensor):
            continue
        if t.shape != other.shape:
            return False
        if not (are_same(t, other, tolerance) if t.is_floating_point() else torch.equal(t, other)):
            return False
    return True


def _are_same_numbers(outputs: list[float], expected: list[float], tolerance: float) -> bool:
    """`are_same` of few numbers, for which torch's operators take longer than a small network."""
    scale = max((abs(b) for b in expected if math.isfinite(b)), default=0.0)
    near = lambda a, b: a == b or (a != a and b != b) or abs(a - b) <= tolerance * (scale + abs(b)) < math.inf
    return all(map(near, outputs, expected))


def leaves(outputs: object) -> dict[tuple, object]:
    """The tensors and other objects in a network's outputs, however deep, by their names and indices."""
    parts = _parts(outputs)
    if not parts:
        return {(): outputs}
    return {(name, *path): leaf for name, part in parts.items() for path, leaf in leaves(part).items()}


def _parts(outputs: object) -> dict[Any, object]:
    """The outputs by name or, in a tuple or a list, by index."""
    if isinstance(outputs, Mapping):  # before dataclasses: Hugging Face's outputs are both, the mapping without None
        return dict(outputs)
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return {f.name: vars(outputs)[f.name] for f in dataclasses.fields(outputs)}
    if isinstance(outputs, tuple) and "_fields" in vars(type(outputs)):  # a named tuple
        return dict(zip(vars(type(outputs))["_fields"], outputs, strict=True))
    return dict(enumerate(outputs)) if isinstance(outputs, tuple | list) else {}


def _listed(parts: Mapping[Any, object]) -> str:
    if not parts:
        return ""
    described = (f"{name}: {_described(part)}" for name, part in parts.items())
    return f"; there are {', '.join(described)}"


def _described(part: object) -> str:
    """The class of an output, with a tensor's shape of a row."""
    if not isinstance(part, Tensor):
        return type(part).__name__
    return f"Tensor ({', '.join(['batch', *map(str, part.shape[1:])])})" if part.ndim else "Tensor ()"
