"""What a process found out about how a model runs fastest, for later processes on the same machine.

Tracing shows how many draws fit into one call, and two ways to run all draws are timed where no rule tells them apart.
Both take seconds. They are kept in a small file beside the compiled code (`vbdl.compiling.stored`), named after
the network's modules with their settings and code, the shapes of its tensors and inputs, the predictor's settings, and
what compiled code depends on. Results are equal to rounding in every way to run, so a wrong memory costs only time.
"""

import hashlib
import json
import logging
import marshal
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vbdl.calling.inputs import Flat
from vbdl.calling.lending import only_reading
from vbdl.calling.traversing import state_of
from vbdl.compiling import stored
from vbdl.engine.settings import PredictorSettings
from vbdl.model import Model

logger = logging.getLogger("vbdl")

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True)
class Memory:
    """What is known of a model on one shape of input."""

    chunk: int  # draws in one call of the graph
    plain: bool | None = None  # whether the network as it is was faster than the graph; None: they were not timed
    words: str = ""  # the times


def name_of(model: Model, tile: Flat, settings: PredictorSettings, n_samples: int) -> str | None:
    """The name of a model on tiles of this shape; None if nothing may be kept."""
    try:
        return stored.named(lambda: _lines(model, tile, settings, n_samples))
    except Exception as error:  # of a method of the user's modules
        logger.debug("what is found out about this network is not kept: %s", error)
        return None


def _lines(model: Model, tile: Flat, settings: PredictorSettings, n_samples: int) -> Iterator[str]:
    yield f"way {n_samples} {replace(settings, seed=0)} {tile.structure}"
    for t in tile.tensors:
        yield _described(t)
    posterior = model.posterior
    yield f"{type(posterior)} {posterior.n_draws}"
    for name, module in model.named_modules():
        values = {key: value for key, value in sorted(vars(module).items()) if _is_plain(value)}
        yield f"{name} {type(module)} {module.extra_repr()} {values} {_code(type(module).forward)}"
    with only_reading():
        for name, t in sorted({**state_of(posterior), **state_of(model.likelihood)}.items()):
            yield f"{name} {_described(t)}"


def _described(t: Tensor) -> str:
    return repr((t.dtype, t.device.type, tuple(t.shape), t.stride()))


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) in (tuple, list) and all(map(_is_plain, value)))


def _code(function: Any) -> str:
    """The digest of a function's code."""
    code = getattr(function, "__code__", None)
    return hashlib.sha256(marshal.dumps(_placeless(code))).hexdigest() if code is not None else ""


def _placeless(code: types.CodeType) -> tuple:
    """A code without the places of its lines."""
    return code.co_code, code.co_names, code.co_varnames, [_constant(c) for c in code.co_consts]


def _constant(value: object) -> object:
    if isinstance(value, types.CodeType):
        return _placeless(value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def load(name: str) -> Memory | None:
    """What is known under this name, or None."""
    try:
        return Memory(**json.loads(_file(name).read_text()))
    except FileNotFoundError:
        return None
    except Exception as error:  # a file that was cut off
        logger.debug("what an earlier process found out could not be read: %s", error)
        return None


def store(name: str, memory: Memory) -> None:
    """Keep what is known under this name."""
    try:
        stored.write(_file(name), json.dumps(asdict(memory)))
    except OSError as error:  # then the next process finds it out again
        logger.debug("what was found out cannot be kept: %s", error)


def _file(name: str) -> Path:
    return stored.file(f"{name}.json")
