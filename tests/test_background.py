"""compile="background": the network as it is answers at once, the compiled graph takes over, with the same draws."""

import copy
import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import vbdl
from vbdl.engine import background as engine
from vbdl.engine import plain
from vbdl.engine.execution import Execution
from vbdl.engine.predictor import Predictor
from vbdl.engine.traced import Traced

ROUNDING = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture
def held(monkeypatch):
    """Compiling waits until the event is set; compiled graphs run as they were traced."""
    release = threading.Event()

    def compile_graph(graph, inputs):
        assert release.wait(60)
        return graph

    monkeypatch.setattr("vbdl.engine.program.compile_graph", compile_graph)
    yield release
    release.set()


def network():
    return nn.Sequential(nn.Linear(3, 11), nn.ReLU(), nn.Dropout(0.3), nn.Linear(11, 5))


def background(q=None, **settings):
    q = vbdl.MCDropout(network()) if q is None else q
    return Predictor(q, vbdl.Categorical(), compile="background", **settings)


def strategy(predict):
    return next(iter(predict.executions.by_shape.values()))[0].plan.strategy


@pytest.mark.parametrize("method", [vbdl.MCDropout, lambda m: vbdl.MeanField(m, 9), lambda m: vbdl.DeepEnsemble(m, 3)])
def test_the_first_answer_does_not_wait(method, held):
    q, x = method(network()), torch.randn(4, 3)
    predict = background(q)
    first = predict(x)
    assert "being compiled" in predict.explain()
    held.set()
    predict.wait()
    assert strategy(predict) == "stacked" and "being compiled" not in predict.explain()
    now, expected = predict(x), Predictor(q, vbdl.Categorical(), compile=False)(x)
    for field in ("probs", "total", "aleatoric", "epistemic", "standard_error"):
        torch.testing.assert_close(getattr(first, field), getattr(expected, field), **ROUNDING)
        torch.testing.assert_close(getattr(now, field), getattr(expected, field), **ROUNDING)


@pytest.mark.parametrize("method", [vbdl.MCDropout, lambda m: vbdl.MeanField(m, 9), lambda m: vbdl.DeepEnsemble(m, 3)])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_buffer_that_is_filled_anew_meanwhile_is_no_fault(method, rows, held):
    """The background checks the network on the rows of the first call, which the caller has overwritten by then."""
    q, buffer = method(network()), torch.randn(rows, 3)
    predict = background(q)
    predict(buffer)
    buffer.copy_(5 * torch.randn(rows, 3))
    held.set()
    predict.wait()
    expected = Predictor(q, vbdl.Categorical(), compile=False)(buffer)
    torch.testing.assert_close(predict(buffer).probs, expected.probs, **ROUNDING)


def test_calls_that_are_not_compiled_yet_are_answered_too(held):
    predict, x = background(), torch.randn(4, 3)
    expected = Predictor(predict.posterior, vbdl.Categorical(), compile=False)
    torch.testing.assert_close(predict(x, samples=True).samples, expected(x, samples=True).samples, **ROUNDING)
    torch.testing.assert_close(predict(x, deadline=1e6).probs, expected(x).probs, **ROUNDING)
    y = torch.arange(4)
    torch.testing.assert_close(predict.log_prob(x, y), expected.log_prob(x, y), **ROUNDING)


@pytest.mark.parametrize("method", [vbdl.MCDropout, lambda m: vbdl.MeanField(m, 9)])
def test_other_calls_are_answered_too_until_they_are_compiled(method, held):
    predict, x = background(method(network())), torch.randn(4, 3)
    expected = Predictor(predict.posterior, vbdl.Categorical(), compile=False)
    predict(x)
    held.set()
    predict.wait()
    held.clear()
    execution = next(iter(predict.executions.by_shape.values()))[0]
    for ready in (False, True):
        torch.testing.assert_close(predict(x, samples=True).samples, expected(x, samples=True).samples, **ROUNDING)
        torch.testing.assert_close(predict(x, deadline=1e6).probs, expected(x).probs, **ROUNDING)
        assert execution.compiling == (not ready)
        held.set()
        for job in execution._later.values():
            job.result(60)
    assert set(execution._later) == {"parameters", "steps of 8"}
    predict.warm_up((4,), example=x, samples=True, adaptive=True)
    torch.testing.assert_close(predict(x, samples=True).samples, expected(x, samples=True).samples, **ROUNDING)


def test_warm_up_waits_for_other_calls(held):
    predict, x = background(), torch.randn(4, 3)
    predict(x)
    held.set()
    predict.wait()
    held.clear()
    predict(x, samples=True)
    threading.Timer(0.3, held.set).start()
    predict.warm_up((4,), example=x, samples=True)
    assert not next(iter(predict.executions.by_shape.values()))[0].compiling


class Convolves(nn.Module):
    """Its convolution of drawn weights is timed, and has no outputs to draw in place of them."""

    def __init__(self):
        super().__init__()
        self.body, self.drop = nn.Conv1d(3, 4, 2), nn.Dropout(0.3)

    def forward(self, x):
        return self.body(self.drop(x)).flatten(1)


@pytest.mark.parametrize("method", [lambda m: vbdl.MeanField(m, 9), lambda m: vbdl.DeepEnsemble(m, 3)])
def test_both_ways_are_timed_in_the_background_after_one_trace(method, held, monkeypatch):
    """No answer waits for the compiler, and weights that might have given drawn outputs are traced once."""
    probed, probe = [], Traced.probe
    monkeypatch.setattr(Traced, "probe", lambda self: probed.append(self) or probe(self))
    predict, x = background(method(Convolves())), torch.randn(4, 3, 2)
    first = predict(x).probs
    torch.testing.assert_close(predict(x).probs, first)
    held.set()
    predict.wait()
    assert len(probed) == 1 and "so both were timed" in predict.explain()
    torch.testing.assert_close(predict(x).probs, first, **ROUNDING)


def test_shared_convolutions_are_not_timed(held):
    held.set()
    predict = background(vbdl.MCDropout(Convolves()))
    predict(torch.randn(4, 3, 2))
    assert "timed" not in predict.wait().explain()


def test_warm_up_waits_and_seals(held):
    predict, x = background(tiles=(4,)), torch.randn(4, 3)
    threading.Timer(0.2, held.set).start()
    predict.warm_up((4,), example=x, samples=True, adaptive=True)
    assert held.is_set() and predict.sealed and strategy(predict) == "stacked"
    predict(x, samples=True)
    predict(x, tolerance=0.01)
    with pytest.raises(RuntimeError, match="not warmed up"):
        predict(torch.randn(4, 2))


def test_warm_up_runs_nothing_that_the_background_ran(held, monkeypatch):
    held.set()
    x, runs = torch.randn(4, 3), []
    predict = background(tiles=(4,), n_samples=6, chunk_size=2)
    predict(x)
    predict.wait()
    original = Execution.fields
    monkeypatch.setattr(Execution, "fields", lambda *args: runs.append(args) or original(*args))
    predict.warm_up((4,), example=x)
    assert strategy(predict) == "stacked" and not runs
    predict(x)
    assert runs


@pytest.mark.parametrize("masks", [0, 2**24])
def test_the_network_as_it_is_keeps_few_masks_and_none_once_a_graph_answers(masks, held, monkeypatch):
    monkeypatch.setattr(plain, "_MASKS", masks)
    predict, x = background(tiles=(1,), n_samples=6), torch.randn(1, 3)
    first = predict(x).probs
    (execution,) = next(iter(predict.executions.by_shape.values()))
    assert bool(execution._plain._kept) is (masks > 0)
    torch.testing.assert_close(predict(x).probs, first, **ROUNDING)
    held.set()
    predict.wait()
    assert not execution._plain._kept
    torch.testing.assert_close(predict(x).probs, first, **ROUNDING)


def test_a_row_that_is_predicted_meanwhile_is_the_same(held):
    """Threads predict while the graph takes over."""
    predict, x = background(), torch.randn(4, 3)
    expected, wrong, ended = predict(x).probs, [], threading.Event()

    def ask():
        while not ended.is_set():
            if not torch.allclose(predict(x).probs, expected, **ROUNDING):
                wrong.append(x)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for t in threads:
        t.start()
    held.set()
    predict.wait()
    predict(x)
    ended.set()
    for t in threads:
        t.join()
    assert not wrong and strategy(predict) == "stacked"


def test_what_must_not_be_predicted_is_said_when_it_is_known():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = network()

        def forward(self, x):
            self.inside(x)
            return self.inside[0](x)

    predict = background(vbdl.MCDropout(Beside()))
    with pytest.raises(ValueError, match="nothing random reaches the output"):
        predict.warm_up(example=torch.randn(2, 3))
    with pytest.raises(ValueError, match="nothing random reaches the output"):
        predict(torch.randn(2, 3))


def test_a_graph_that_cannot_be_compiled_leaves_the_network_as_it_is(monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("the compiler broke")

    monkeypatch.setattr("vbdl.engine.program.compile_graph", broken)
    predict, x = background(), torch.randn(2, 3)
    first = predict(x).probs
    predict.wait()
    torch.testing.assert_close(predict(x).probs, first, rtol=0, atol=0)
    assert "the compiler broke" in predict.explain()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_has_a_thread_of_its_own():
    engine.submit(engine, lambda owner: None).result(30)
    worker = engine._worker
    assert worker is not None and worker.is_alive()
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            alive = worker.is_alive()
            engine.submit(engine, lambda owner: None).result(30)
            os.write(write, b"no" if alive or engine._worker is worker else b"ok")
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert os.read(read, 2) == b"ok"
    os.close(read)


def test_what_nobody_holds_is_not_compiled(held):
    first, x = background(), torch.randn(2, 3)
    first(x)  # keeps the thread busy
    second = background()
    second(x)
    gone = weakref.ref(next(iter(second.executions.by_shape.values()))[0])
    del second
    gc.collect()
    assert gone() is None
    held.set()
    first.wait()
    assert strategy(first) == "stacked"


def test_what_nobody_holds_any_more_is_traced_at_most(monkeypatch):
    """A script that makes a predictor after the other does not compile for those that are gone."""
    compiled, traced, release = [], threading.Event(), threading.Event()

    def compile_graph(graph, inputs):
        compiled.append(graph)
        return graph

    def chosen(execution, choose=Execution._chosen):
        way = choose(execution)
        traced.set()
        assert release.wait(60)
        return way

    monkeypatch.setattr("vbdl.engine.program.compile_graph", compile_graph)
    monkeypatch.setattr(Execution, "_chosen", chosen)
    predict = background()
    predict(torch.randn(2, 3))
    assert traced.wait(60)
    job = next(iter(predict.executions.by_shape.values()))[0]._job
    del predict
    gc.collect()
    release.set()
    job.result(60)
    assert not compiled


def test_a_copy_compiles_for_itself(held):
    predict, x = background(), torch.randn(2, 3)
    probs = predict(x).probs
    again = copy.deepcopy(predict)
    torch.testing.assert_close(again(x).probs, probs)
    held.set()
    again.wait()
    assert strategy(again) == "stacked"


def test_it_is_the_default_and_has_a_variable(monkeypatch):
    q = vbdl.MCDropout(network())
    monkeypatch.delenv("VBDL_COMPILE")
    assert Predictor(q, vbdl.Categorical()).settings.compile == "background"
    for name, value in {"first": True, "never": False}.items():
        monkeypatch.setenv("VBDL_COMPILE", name)
        assert Predictor(q, vbdl.Categorical()).settings.compile is value
    monkeypatch.setenv("VBDL_COMPILE", "soon")
    with pytest.raises(ValueError, match="VBDL_COMPILE must be one of background, first, never"):
        Predictor(q, vbdl.Categorical())
    with pytest.raises(ValueError, match="compile must be"):
        Predictor(q, vbdl.Categorical(), compile="soon")


@pytest.mark.parametrize("seconds", [0, 0.5, 2, 4])
def test_a_process_ends_while_something_is_compiled(seconds):
    program = (
        "import time, torch, vbdl; from torch import nn; "
        "q = vbdl.MCDropout(nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 2))); "
        "print(vbdl.Predictor(q, vbdl.Categorical(), compile='background')(torch.randn(2, 3)).probs.shape); "
        f"time.sleep({seconds})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "[2, 2]" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr and "terminate" not in done.stderr, done.stderr


class Counted(nn.Sequential):
    calls = 0

    def forward(self, x):
        Counted.calls += 1
        return super().forward(x)


def test_the_first_row_of_an_ensemble_takes_one_forward_more_than_members(held):
    Counted.calls, x = 0, torch.randn(1, 3)
    q = vbdl.DeepEnsemble(Counted(nn.Linear(3, 11), nn.Tanh(), nn.Linear(11, 5)), 4)
    first = background(q)(x)
    assert Counted.calls <= 4 + 1 + 1  # and one, if the background is as fast
    torch.testing.assert_close(first.probs, Predictor(q, vbdl.Categorical(), compile=False)(x).probs, **ROUNDING)


class Mixing(nn.Linear):
    def forward(self, x):
        return super().forward(x) - x.mean()


def test_a_network_that_mixes_rows_is_refused_after_a_row_alone(monkeypatch):
    """A row alone has its answer; what the background finds is raised from then on."""
    answered, behind = threading.Event(), Execution._compile_behind

    def compile_behind(self):
        assert answered.wait(60)
        behind(self)

    monkeypatch.setattr(Execution, "_compile_behind", compile_behind)
    nets = [Mixing(3, 5).eval() for _ in range(3)]
    predict, x = background(vbdl.DeepEnsemble(nets)), torch.randn(1, 3)
    expected = torch.stack([net(x).softmax(-1) for net in nets]).mean(0)
    torch.testing.assert_close(predict(x).probs, expected, **ROUNDING)
    answered.set()
    for _ in range(2):
        with pytest.raises(ValueError, match="depends on the other rows"):
            predict.wait()
    with pytest.raises(ValueError, match="depends on the other rows"):
        predict(torch.randn(2, 3))


class Remembering(nn.Linear):
    def forward(self, x):
        self.last = getattr(self, "last", 0.0) + super().forward(x).detach().sum()
        return super().forward(x) + self.last


def test_a_network_that_keeps_a_state_is_refused_at_its_first_row(monkeypatch):
    monkeypatch.setattr(Execution, "_begin", lambda self: None)  # not by what the background finds
    q = vbdl.DeepEnsemble([Remembering(3, 5).eval() for _ in range(3)])
    with pytest.raises(ValueError, match="keeps a tensor in an attribute"):
        background(q)(torch.randn(1, 3))


def test_a_network_that_writes_into_a_row_is_refused_at_once():
    class Writing(nn.Linear):
        def forward(self, x):
            x -= 1.0
            return super().forward(x)

    q = vbdl.DeepEnsemble([Writing(3, 5).eval() for _ in range(3)])
    with pytest.raises(ValueError, match="writes into its inputs"):
        background(q)(torch.randn(1, 3))
