"""The UCI regression data sets on the standard splits."""

from functools import partial

import numpy as np

from vbdl.bench.datasets.splits import regression, standard_splits
from vbdl.bench.networks import one_hidden
from vbdl.bench.protocols import OWN, SETS, protocol, published
from vbdl.bench.registry import dataset
from vbdl.bench.source import Source
from vbdl.bench.task import Task

# names on OpenML of the data sets that it has in the published shape
_OPENML = {"boston": "boston", "kin8nm": "kin8nm", "wine": "wine-quality-red", "concrete": "Concrete_Data"}

_ABOUT = {
    "boston": "house prices, in thousands of dollars",
    "concrete": "compressive strength of concrete, MPa",
    "energy": "heating load of buildings",
    "kin8nm": "distance of a robot arm's end",
    "naval": "decay of a ship's compressor",
    "power": "output of a power plant, MW",
    "protein": "deviation of protein structures, angstrom",
    "wine": "quality of red wine, 3 to 8",
    "yacht": "resistance of a yacht's hull",
}


def _load(name: str, source: Source, year: str = "2016") -> Task:
    of, path, notes = SETS[name], f"uci_regression/{name}.npz", ()
    arrays = source.arrays(path)
    if arrays is None:
        x, y = source.openml(name, _OPENML.get(name), (of.rows, of.features), path)
        x, y, per_split = np.asarray(x, np.float64), np.asarray(y, np.float64), {}
        order, n_train = standard_splits(of.rows, of.splits), round(0.9 * of.rows)
        notes = ("rows in OpenML's order, which may not be the published one: the splits may be others",)
    else:
        x, y, order, n_train = arrays["X"], arrays["y"], arrays["perm"].astype(np.int64), int(arrays["n_train"])
        per_split = {
            "rmse": tuple(arrays["gal2018_test_rmse_mc"].tolist()),
            "ll": tuple(arrays["gal2018_test_ll"].tolist()),
        }
    if len(np.unique(x, axis=0)) < len(x):
        notes += ("some rows occur twice, so that test rows may be training rows: part of the benchmark",)
    return regression(
        name,
        x,
        y,
        order,
        n_train,
        network=partial(one_hidden, of.features, of.hidden),
        protocol=None if year == OWN else protocol(year, name),
        published=() if year == OWN else published(name, year, per_split),
        shuffle=year == OWN,
        about=_ABOUT[name],
        notes=notes,
    )


for _name, _of in SETS.items():
    _make = partial(_load, _name)
    _make.__module__ = __name__  # type: ignore[attr-defined]
    _make.__doc__ = f"{_ABOUT[_name]}: {_of.rows} rows, {_of.features} features, {_of.splits} splits"
    dataset(_name, suite="uci")(_make)
