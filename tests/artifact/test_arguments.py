"""An artifact whose arguments are of other types is refused when it is loaded, and saves to one name may meet."""

import errno
import json
import os
import threading

import pytest
import torch
from torch import nn

import vbdl
from vbdl import calibration, decision
from vbdl.artifact import files
from vbdl.artifact.manifest import MANIFEST, ArtifactError

X = torch.randn(60, 4)
WRONG = ["Upsample", -1.5, True, [], {}, [["a"]], None]


def network(outputs, layer=None):
    return nn.Sequential(nn.Linear(4, 8), layer or nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, outputs))


def classes(**options):
    return vbdl.Predictor(vbdl.MCDropout(network(3)), vbdl.Categorical(**options), n_samples=3, compile=False)


def numbers():
    return vbdl.Predictor(vbdl.MCDropout(network(2)), vbdl.Gaussian(2), n_samples=3, compile=False)


def decided(made):
    predict = classes()
    y = torch.where(torch.arange(60) % 4 == 0, torch.arange(60) % 3, predict(X).probs.argmax(1))
    predict = vbdl.calibrate(predict, (X, y), calibration.Temperature("probs"))
    return vbdl.with_decision(predict, made)


MADE = {
    "classes": classes,
    "numbers": numbers,
    "sets": lambda: vbdl.calibrate(classes(), (X, torch.arange(60) % 3), calibration.ConformalSets(0.2)),
    "scaled": lambda: vbdl.calibrate(numbers(), (X, torch.randn(60, 2)), calibration.StdScaling()),
    "referral": lambda: decided(decision.Referral().for_risk(torch.linspace(0, 1, 60), torch.zeros(60), 0.2, 0.1)),
    "cost": lambda: decided(decision.ExpectedCost(1 - torch.eye(3), refer_cost=0.3)),
    "risk": lambda: vbdl.with_decision(numbers(), decision.Risk(0.9)),
    "layers": lambda: vbdl.Predictor(
        vbdl.MCDropout(network(3, nn.LayerNorm(8))), vbdl.Categorical(), n_samples=3, compile=False
    ),
}


def places(found, path=()):
    """Every argument in a manifest: where it is and what it is."""
    if isinstance(found, dict):
        for key, value in found.items():
            if key == "arguments" and isinstance(value, dict):
                yield from ((*path, key, name) for name in value)
            yield from places(value, (*path, key))
    elif isinstance(found, list):
        for index, value in enumerate(found):
            yield from places(value, (*path, index))


def changed(found, path, value):
    copy = json.loads(json.dumps(found))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


# the arguments of "classes" are among those of "sets", the ones of "numbers" among those of "scaled"
@pytest.mark.parametrize("name", MADE)
@pytest.mark.slow_where(cell=lambda p: p["name"] in ("classes", "numbers"))
def test_no_argument_of_another_type_is_loaded_and_fails_later(name, tmp_path):
    predict = MADE[name]()
    predict(X[:2])
    folder = predict.save(tmp_path / "m")
    text = (folder / MANIFEST).read_text()
    about = json.loads(text)
    refused = tried = 0
    for path in places(about):
        for value in WRONG:
            (folder / MANIFEST).write_text(json.dumps(changed(about, path, value)))
            tried += 1
            try:
                found = vbdl.load(folder, compile=False)
            except ArtifactError:
                refused += 1
                continue
            found(X[:5])  # what is loaded predicts
    assert tried > 0 and refused > tried / 2
    (folder / MANIFEST).write_text(text)
    assert torch.equal(vbdl.load(folder, compile=False)(X[:5]).total, predict(X[:5]).total)


def test_what_python_raises_of_damage_is_an_artifact_error(tmp_path, monkeypatch):
    folder = classes().save(tmp_path / "m", example=X)
    for error in (
        RecursionError("deep"),
        OverflowError("large"),
        KeyError("x"),
        UnicodeDecodeError("utf8", b"", 0, 1, ""),
    ):

        def fails(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr("vbdl.artifact.loading.decode", fails)
        with pytest.raises(ArtifactError, match="cannot be read"):
            vbdl.load(folder)
    monkeypatch.undo()
    with pytest.raises(TypeError, match="trust must be a sequence"):
        vbdl.load(folder, trust="mine")


@pytest.mark.parametrize("code", [errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT])
def test_a_save_that_another_one_overtakes_is_made_again(code, tmp_path, monkeypatch):
    mine, other = classes().replace(seed=1), classes().replace(seed=2)
    for predict in (mine, other):
        predict(X[:2])
    put, calls = files._put, []

    def overtaken(*args):
        calls.append(args)
        if len(calls) == 1:
            thread = threading.Thread(target=other.save, args=(tmp_path / "m",))
            thread.start()
            thread.join()
            raise OSError(code, "another one was there")
        return put(*args)

    monkeypatch.setattr(files, "_put", overtaken)
    mine.save(tmp_path / "m", overwrite=True)
    assert vbdl.load(tmp_path / "m", compile=False).seed == 1 and len(calls) == 3
    with pytest.raises(FileExistsError, match="exists already"):  # without overwrite the first one stays
        other.save(tmp_path / "m")


def test_saves_to_one_name_may_meet(tmp_path):
    predictors = [classes().replace(seed=seed) for seed in range(4)]
    for predict in predictors:
        predict(X[:2])
    errors = []

    def save(predict):
        try:
            for _ in range(5):
                predict.save(tmp_path / "m", overwrite=True)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(predict,)) for predict in predictors]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    assert vbdl.load(tmp_path / "m", compile=False).seed in range(4)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_save_lists_a_folder_again_that_another_save_replaced(tmp_path, monkeypatch):
    """The listing may see the previous artifact while its files are removed."""
    from vbdl.artifact import files

    first, second, third = (classes().replace(seed=seed) for seed in (1, 2, 3))
    for predict in (first, second, third):
        predict(X[:2])
    folder = first.save(tmp_path / "m")
    check, replaced = files._check_entry, []

    def check_and_replace(place, entry):
        check(place, entry)
        if not replaced:
            replaced.append(True)
            second.save(folder, overwrite=True)

    monkeypatch.setattr(files, "_check_entry", check_and_replace)
    real = os.scandir

    class One:  # of the old folder, as if the others were removed already
        def __init__(self, place):
            self.entries = real(place)

        def __enter__(self):
            return iter([next(self.entries)]) if not replaced else self.entries

        def __exit__(self, *error):
            self.entries.close()

    monkeypatch.setattr(files.os, "scandir", One)
    third.save(folder, overwrite=True)  # which lists the folder, to see that it holds an artifact
    assert replaced and vbdl.load(folder, compile=False).seed == 3
