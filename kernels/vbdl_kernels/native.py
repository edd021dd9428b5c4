"""The random words of `philox.c`, where it was compiled when the package was installed."""

import ctypes
import warnings
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 2  # of the functions of philox.c and their arguments
PATH = Path(__file__).with_name("libphilox.so")

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64


class Library:
    """The functions of a compiled philox.c. Raises OSError for a file that is none, or that is another version's."""

    def __init__(self, path: Path):
        library: Any = ctypes.CDLL(str(path))
        try:
            library.vbdl_philox_version.restype = _LONG
            if library.vbdl_philox_version() != VERSION:
                warnings.warn(f"{path} is of another version, so NumPy draws noise: install vbdl again", stacklevel=2)
                raise OSError(f"{path} is not of version {VERSION}")
            self._words, self._pairs = library.vbdl_philox_words, library.vbdl_philox_pairs
            self._keep = library.vbdl_philox_keep
        except AttributeError as error:
            raise OSError(f"{path} lacks a function of philox.c: {error}") from error
        for function, outputs in ((self._words, 1), (self._pairs, 2)):
            function.argtypes = [_POINTER, ctypes.c_uint32, *[_LONG] * 5, *[_POINTER] * outputs]
            function.restype = None
        self._keep.argtypes, self._keep.restype = [_POINTER, ctypes.c_uint32, *[_LONG] * 6, _POINTER], None

    def words(self, keys: np.ndarray, last: int, first_row: int, rows: int, columns: int) -> np.ndarray:
        """Uniform 32-bit words, int64, (draws * rows, columns).

        keys: (draws, 2) int64 in one piece, the seed and the number of each draw. last: layer << 4 | stream.
        """
        lines = len(keys) * rows
        out = np.empty((lines, columns), np.int64)
        self._words(keys.ctypes.data, last, first_row, rows, columns, 0, lines, out.ctypes.data)
        return out

    def keep(
        self, keys: np.ndarray, last: int, first_row: int, rows: int, columns: int, threshold: int, out: int
    ) -> None:
        """Fill memory with whether each of these words is at least a threshold in [0, 2**32].

        out: the address of draws * rows * columns bytes.
        """
        self._keep(keys.ctypes.data, last, first_row, rows, columns, 0, len(keys) * rows, threshold, out)

    def pairs(
        self, keys: np.ndarray, last: int, rows: int, columns: int, lines: range, out: tuple[np.ndarray, np.ndarray]
    ) -> None:
        """Fill two float32 arrays in one piece with what makes pairs of normals.

        lines: some of the draws * rows lines. out: numbers in (0, 1] and angles in radians, (lines, pairs, width) each.
        """
        uniform, angle = out
        self._pairs(
            keys.ctypes.data, last, 0, rows, columns, lines.start, lines.stop, uniform.ctypes.data, angle.ctypes.data
        )


def load(path: Path) -> Library | None:
    """The library at this path; None if there is none that this processor and system can use."""
    try:
        return Library(path) if path.exists() else None
    except OSError:
        return None
