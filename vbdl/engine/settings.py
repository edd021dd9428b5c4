"""The settings of a predictor: the arguments of `vbdl.Predictor` that say how it runs, checked once."""

import contextlib
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypedDict

import torch

from vbdl.types import Posterior

DEFAULT_SAMPLES = 32
DEFAULT_TILES = (1, 8, 32, 64)
INVARIANT_TILES = (64,)
_FORMER_DEFAULT_TILES = (1, 8, 64)  # stored in artifacts


class PredictorOptions(TypedDict, total=False):
    """The keyword-only arguments of `vbdl.Predictor`; see there for what each means."""

    tiles: int | Sequence[int] | None
    batch_invariant: bool
    compile: bool | str | None
    memory_budget: int
    chunk_size: int | None
    autocast: torch.dtype | None
    joint: bool
    estimator: str
    device: torch.device | str | None


class PredictorArguments(PredictorOptions, total=False):
    """The arguments of `vbdl.Predictor` besides the posterior and the likelihood."""

    n_samples: int | None
    seed: int


@dataclass(frozen=True)
class PredictorSettings:
    """The arguments of `vbdl.Predictor` that say how it runs; see there for what each means."""

    n_samples: int
    seed: int
    tiles: tuple[int, ...]  # ascending
    compile: bool | str  # "background": answer uncompiled until the graph is compiled
    memory_budget: int
    chunk_size: int | None
    autocast: torch.dtype | None
    joint: bool
    estimator: str

    @classmethod
    def checked(
        cls,
        posterior: Posterior,
        *,
        n_samples: int | None,
        seed: int,
        tiles: int | Sequence[int] | None,
        batch_invariant: bool,
        compile: bool | str | None,
        memory_budget: int,
        chunk_size: int | None,
        autocast: torch.dtype | None,
        joint: bool,
        estimator: str,
    ) -> "PredictorSettings":
        """Check the arguments and fill in defaults. Raises TypeError or ValueError that names the wrong argument."""
        available = posterior.n_draws
        if n_samples is None:
            n_samples = DEFAULT_SAMPLES if available is None else available
        n_samples, seed = whole_number("n_samples", n_samples, 1), whole_number("seed", seed)
        if available is not None and n_samples > available:
            raise ValueError(
                f"n_samples is {n_samples}, but this posterior has only {available} different draws: pass at most that"
            )
        if tiles is None:
            tiles = INVARIANT_TILES if batch_invariant else DEFAULT_TILES
        several = isinstance(tiles, tuple) or (isinstance(tiles, Iterable) and not isinstance(tiles, str))
        sizes: Any = tiles if several else [tiles]
        tiles = tuple(whole_number("each size in tiles", size, 1) for size in sizes)
        if not tiles:
            raise ValueError("tiles are batch sizes of at least 1, got none: pass at least one size")
        if batch_invariant and not is_invariant(tiles):
            raise ValueError(f"batch_invariant=True needs one tile size, 1 or a multiple of 64, got tiles={tiles}")
        memory_budget = whole_number("memory_budget", memory_budget)
        if chunk_size is not None:
            chunk_size = whole_number("chunk_size", chunk_size, 1)
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be torch.bfloat16, torch.float16 or None, got {autocast!r}")
        if compile is None:
            compile = _default_compile()
        if compile not in (True, False, "background"):
            raise ValueError(f"compile must be True, False or 'background', got {compile!r}")
        if estimator not in ("sampling", "moments"):
            raise ValueError(f"estimator must be 'sampling' or 'moments', got {estimator!r}")
        return cls(
            n_samples=n_samples,
            seed=seed,
            tiles=tuple(sorted(set(tiles))),
            compile=compile,
            memory_budget=memory_budget,
            chunk_size=chunk_size,
            autocast=autocast,
            joint=joint,
            estimator=estimator,
        )

    @property
    def largest_tile(self) -> int:
        """The number of rows of the largest tile."""
        return self.tiles[-1]

    @property
    def keeps_bits(self) -> bool:
        """Whether rows share tiles and must have the same bits at each place in them, which only the graph promises."""
        return is_invariant(self.tiles) and self.largest_tile > 1

    def tile_for(self, rows: int) -> int:
        """The size of the smallest tile that holds this many rows, or of the largest tile if none does."""
        return next((size for size in self.tiles if size >= rows), self.tiles[-1])


def _default_compile() -> bool | str:
    """What `compile` is if it is not given: "background", or what the variable VBDL_COMPILE says."""
    named = os.environ.get("VBDL_COMPILE", "background")
    choices: dict[str, bool | str] = {"background": "background", "first": True, "never": False}
    if named not in choices:
        raise ValueError(f"the variable VBDL_COMPILE must be one of {', '.join(choices)}, got {named!r}")
    return choices[named]


def are_default(tiles: Sequence[int] | int | None) -> bool:
    """True if these tiles are the default ones, of this version or of one before, which a user did not choose."""
    return isinstance(tiles, Sequence) and tuple(tiles) in (DEFAULT_TILES, _FORMER_DEFAULT_TILES)


def is_invariant(tiles: Sequence[int]) -> bool:
    """True if tiles of these sizes make a row's result identical bit for bit in every batch (on a CPU)."""
    return len(set(tiles)) == 1 and (tiles[0] == 1 or tiles[0] % 64 == 0)


def whole_number(name: str, value: object, least: int | None = None) -> int:
    """The value as an int. Raises TypeError if it is not a whole number, and ValueError if it is below `least`."""
    number = value if type(value) is int else None  # the check of a protocol takes as long as a small layer
    if number is None:
        with contextlib.suppress(TypeError):
            number = operator.index(value) if isinstance(value, SupportsIndex) and not isinstance(value, bool) else None
    if number is None:
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return number
