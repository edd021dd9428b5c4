"""How batches are cut into tiles: by the sizes of the settings, and by sizes of their own for batches that come often.

A few sizes hold any batch, padded, so that a new batch size compiles nothing. Padding and several calls cost time: a
batch size that comes again gets a tile of its own, compiled in the background, if that turns out to be faster.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from time import perf_counter

from vbdl.calling.inputs import Flat
from vbdl.data.tiles import pad
from vbdl.engine.executions import Executions, Row, row_of
from vbdl.engine.settings import PredictorSettings, are_default
from vbdl.nn.stochastic import StochasticNetwork
from vbdl.types import Posterior

_OFTEN = 3  # calls with a batch size after which it gets a tile of its own
_MOST_ROWS, _MOST_SIZES = 512, 4  # of an own tile, and the number of own tiles, which all hold draws
_MOST_TRIALS = 8  # of own tiles, most of which are faster: rows of ever new lengths must not compile for ever
_WASTE = 1.1  # rows of the tiles for a row of the batch, up to which padding is left alone
_ROUNDS = 5  # of timing both ways to cut a batch


class Tiling:
    """The sizes of the tiles that the batches of a predictor are cut into.

    learns: whether batch sizes may get tiles of their own: not beside sizes that the user chose, and not if the noise
        of a row depends on its place in its tile.
    """

    def __init__(self, settings: PredictorSettings, posterior: Posterior):
        self.sizes = settings.tiles
        compiles = settings.estimator == "sampling" and bool(settings.compile)
        by_place = any(isinstance(p.module, StochasticNetwork) and p.module.per_row for p in posterior.parts)
        self.learns = are_default(settings.tiles) and compiles and not by_place
        self._own: dict[Row, set[int]] = {}
        self._trials = 0
        self._calls: Counter[tuple[Row, int]] = Counter()

    def cut(self, flat: Flat, warmed: Collection[int] | None = None) -> list[int]:
        """The sizes of the tiles that hold these rows, in turn; of no rows, one tile.

        warmed: the sizes that are compiled if nothing else may be; otherwise None.
        """
        rows, own = flat.rows, self._own.get(row_of(flat), ()) if self._own else ()
        if rows in own:
            return [rows]
        full, rest = divmod(rows, self.sizes[-1])
        if full and not rest:
            return [self.sizes[-1]] * full
        sizes = sorted({*self.sizes, *own})
        if warmed and max(warmed) >= rest:
            sizes = sorted(warmed)
        return [self.sizes[-1]] * full + [next(size for size in sizes if size >= rest)]

    def tiles(self, flat: Flat, sizes: list[int]) -> Iterator[tuple[Flat, int]]:
        """Cut the inputs into tiles of these sizes, pad the last, and yield each with the number of its own rows."""
        start = 0
        for size in sizes:
            yield pad(flat, start, size), max(1, min(size, flat.rows - start))  # of no rows one runs too
            start += size

    def could_be_faster(self, rows: int, sizes: list[int]) -> bool:
        """Whether a tile of its own would save a batch padding or calls; sizes: of the tiles that it is cut into."""
        if not self.learns or not 1 < rows <= _MOST_ROWS or self._is_full:
            return False
        return len(sizes) > 1 or sum(sizes) > _WASTE * rows

    @property
    def _is_full(self) -> bool:
        return self._trials >= _MOST_TRIALS or sum(map(len, self._own.values())) >= _MOST_SIZES

    def comes_often(self, flat: Flat, sizes: list[int]) -> bool:
        """Count a call with this batch, and return True once: when it is worth a tile of its own.

        sizes: of the tiles that it is cut into.
        """
        if not self.could_be_faster(flat.rows, sizes):
            return False
        key = row_of(flat), flat.rows
        self._calls[key] += 1
        return self._calls[key] == _OFTEN

    def own(self, flat: Flat) -> list[int]:
        """The sizes of the tiles of their own that rows like these have."""
        return sorted(self._own.get(row_of(flat), ()))

    def learn(self, flat: Flat, executions: Executions, run: Callable[[Flat], object]) -> None:
        """Compile a tile for batches of as many rows as these, and cut them into it from now on if that is faster.

        run: predicts a tile.
        """
        if self._is_full:  # since the size was submitted
            return
        self._trials += 1
        tiles = [tile for tile, _ in self.tiles(flat, self.cut(flat))]
        if len(tiles) == 1 and all(e.stays_as_it_is for e in executions.drawing(tiles[0])):
            return  # the network as it is takes any number of rows
        executions.make_behind(flat)
        times: list[tuple[float, float]] = []
        for _ in range(_ROUNDS):
            begun = perf_counter()
            for tile in tiles:
                run(tile)
            middle = perf_counter()
            run(flat)
            times.append((middle - begun, perf_counter() - middle))
        in_tiles, own = (min(each) for each in zip(*times, strict=True))
        if own < in_tiles:
            self._own.setdefault(row_of(flat), set()).add(flat.rows)
        else:
            executions.forget(flat)
