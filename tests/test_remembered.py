"""What a process finds out about the fastest way to run, and a later one uses without finding it out again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import vbdl
from vbdl.compiling import cache
from vbdl.engine import remembered
from vbdl.engine.execution import Execution
from vbdl.engine.plain import Plain
from vbdl.engine.predictor import Predictor
from vbdl.engine.traced import Traced

ROUNDING = {"rtol": 1e-5, "atol": 2e-6}
LOAD = remembered.load


class Convolves(nn.Module):
    """A convolution whose weights differ between members, so that both ways to run are timed."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.width = width
        self.body, self.head = nn.Conv1d(3, width, 2), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean(-1).relu())


@pytest.fixture
def remembers(monkeypatch, tmp_path, traced_only) -> Callable[[], None]:
    """Memories are kept in a folder of this test; a call of the fixture makes every timing say that the graph lost."""
    monkeypatch.setattr(cache, "folder", lambda: str(tmp_path))
    monkeypatch.setattr(remembered, "load", LOAD)
    return lambda: monkeypatch.setattr("vbdl.engine.execution._CLEARLY", 0.0)


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """How often a network was traced, and both ways timed."""
    counts = {"traced": 0, "timed": 0}
    cut, faster = Traced._cut, Execution._faster

    def count(what: str, function: Callable) -> Callable:
        def called(*arguments: Any) -> Any:
            counts[what] += 1
            return function(*arguments)

        return called

    monkeypatch.setattr(Traced, "_cut", count("traced", cut))
    monkeypatch.setattr(Execution, "_faster", count("timed", faster))
    return counts


def ensemble(make: Callable[[], nn.Module] = Convolves, members: int = 3, **settings: Any) -> Predictor:
    torch.manual_seed(0)
    nets = [make().eval() for _ in range(members)]
    return Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), tiles=4, **settings)


@pytest.mark.parametrize("compile", [True, "background"])
@pytest.mark.parametrize("plain", [False, True])
def test_the_winner_is_not_timed_again(plain, compile, remembers, counted):
    if plain:
        remembers()
    x, answers = torch.randn(4, 3, 5), []
    for _ in range(2):
        predict = ensemble(compile=compile)
        predict(x)
        answers.append(predict.wait()(x).probs)
        (execution,) = next(iter(predict.executions.by_shape.values()))
        assert execution.plan.strategy == ("plain" if plain else "stacked")
    assert counted == {"traced": 1 if plain else 2, "timed": 1}
    assert "so both were timed" in predict.explain() and "in an earlier process" in predict.explain()
    torch.testing.assert_close(answers[1], answers[0], **ROUNDING)


def test_a_network_of_several_calls_is_traced_once_by_the_second_process(remembers, counted):
    x = torch.randn(4, 3, 5)
    for traced in (2, 3):  # 12 members: eight are traced first, then as many as fit into a call
        predict = ensemble(lambda: Convolves(64), members=12, compile=True)
        predict(x)
        assert counted["traced"] == traced
    assert counted["timed"] == 1


class Slower(Convolves):
    """The same tensors and settings, and another forward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean(-1).tanh())


class Set(Convolves):
    """The same tensors and code, and another setting."""

    def __init__(self):
        super().__init__()
        self.width = 5


@pytest.mark.parametrize(
    "make, settings, rows",
    [
        (Slower, {}, (3, 5)),
        (Set, {}, (3, 5)),
        (lambda: Convolves(6), {}, (3, 5)),
        (Convolves, {}, (3, 6)),
        (Convolves, {"memory_budget": 2**20}, (3, 5)),
    ],
)
def test_another_network_input_or_setting_is_not_that_network(make, settings, rows, remembers, counted):
    ensemble(compile=True)(torch.randn(4, 3, 5))
    ensemble(make, compile=True, **settings)(torch.randn(4, *rows))
    assert counted["timed"] == 2


def test_another_seed_is_the_same_network(remembers, counted):
    for seed in (0, 1):
        ensemble(compile=True, seed=seed)(torch.randn(4, 3, 5))
    assert counted["timed"] == 1


@pytest.mark.parametrize("text", ["", "{}", '{"chunk": 2, "plain": null, "words": ""}', '{"chunk": 99}'])
def test_a_wrong_memory_changes_no_answer(text, remembers, tmp_path):
    x = torch.randn(4, 3, 5)
    expected = ensemble(compile=True)(x).probs
    (file,) = tmp_path.glob("vbdl/**/*.json")
    file.write_text(text)
    torch.testing.assert_close(ensemble(compile=True)(x).probs, expected, **ROUNDING)


def test_nothing_is_remembered_where_nothing_is_compiled_or_cached(remembers, monkeypatch, tmp_path):
    ensemble(compile=False)(torch.randn(4, 3, 5))
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    ensemble(compile=True)(torch.randn(4, 3, 5))
    assert not list(tmp_path.rglob("*.json"))


def test_members_are_held_once_their_network_stays_as_it_is(remembers, monkeypatch):
    """What a draw's entries are made of takes as long as many a layer, and members do not change."""
    remembers()
    x = torch.randn(4, 3, 5)
    predict = ensemble(compile=True)
    first = predict(x).probs
    monkeypatch.setattr(Plain, "entries", lambda *_: pytest.fail("a member's entries were made again"))
    torch.testing.assert_close(predict(x).probs, first, rtol=0, atol=0)
    with torch.no_grad():  # what is held are parts of the posterior's own tensors
        next(iter(predict.posterior.stacked().values())).zero_()
    assert not torch.equal(predict(x).probs, first)


def test_warm_up_does_not_repeat_an_answer_of_the_network_as_it_is(remembers, monkeypatch):
    remembers()
    x = torch.randn(4, 3, 5)
    predict = ensemble(compile="background")
    predict(x)
    predict.wait()
    monkeypatch.setattr(Plain, "each", lambda *_: pytest.fail("the network ran again"))
    predict.warm_up(4, example=x)
