"""Calls replayed as CUDA graphs, with a recorder that stands for one: it runs what was recorded on what lies there."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from vbdl_kernels import flops as flops
from vbdl_kernels import make_key, sampled_linear

from vbdl.compiling import replay
from vbdl.compiling.graph import trace
from vbdl.compiling.replay import Replayed, is_bound_by_launches, is_worth_replaying


class Recorder:
    def __init__(self, fails=False):
        self.recorded, self.replayed, self.fails = 0, 0, fails

    def __call__(self, call, buffers):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        outputs = [t.clone() for t in call(*buffers)]

        def run():
            self.replayed += 1
            for mine, found in zip(outputs, call(*buffers), strict=True):
                mine.copy_(found)

        return run, outputs


def double(x, w):
    return x @ w, x.sum()


W = torch.randn(4, 3)


def check(call, x, w=W):
    found = call(x, w)
    assert all(torch.equal(a, b) for a, b in zip(found, double(x, w), strict=True))
    return found


def test_every_call_is_that_of_its_arguments():
    recorder = Recorder()
    call = Replayed(double, recorder)
    kept = [check(call, torch.randn(5, 4)) for _ in range(6)]
    assert (recorder.recorded, recorder.replayed) == (1, 5)
    assert len({t.data_ptr() for pair in kept for t in pair}) == 12  # none is overwritten by a later call


def test_what_lies_still_is_read_in_place():
    recorder, w = Recorder(), W.clone()
    call = Replayed(double, recorder)
    for _ in range(3):
        check(call, torch.randn(5, 4), w)
    w.mul_(2)  # as it is now, not as it was when recorded
    check(call, torch.randn(5, 4), w)
    assert recorder.recorded == 1 and call._fixed == [False, True] and call._buffers[1] is w
    check(call, torch.randn(5, 4), W.clone())  # another tensor: copied from now on
    check(call, torch.randn(5, 4), W.clone())
    assert recorder.recorded == 2 and call._fixed == [False, False]
    assert torch.equal(w, 2 * W)  # what was read in place was not written to


def test_one_tensor_again_and_again_and_then_another():
    recorder, x = Recorder(), torch.randn(5, 4)
    call = Replayed(double, recorder)
    for _ in range(3):
        check(call, x)
    for _ in range(3):
        check(call, torch.randn(5, 4))
    assert recorder.recorded == 2


@pytest.mark.parametrize("why", ["large", "fails"])
def test_where_it_cannot_be_it_is_not(why, monkeypatch, caplog):
    recorder = Recorder(fails=why == "fails")
    if why == "large":
        monkeypatch.setattr(replay, "_COPIED", 16)
    call = Replayed(double, recorder)
    for _ in range(4):
        check(call, torch.randn(5, 4))
    assert recorder.recorded == recorder.replayed == 0 and not call._buffers and not call._before
    assert ("could not be recorded" in caplog.text) == (why == "fails")


def test_several_threads():
    recorder, failed = Recorder(), []
    call = Replayed(double, recorder)

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            try:
                check(call, torch.randn(5, 4, generator=generator))
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failed and recorder.recorded == 1 and recorder.replayed == 199


def test_small_calls_only():
    def graph(width, rows):
        net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).requires_grad_(False)
        x = torch.randn(rows, width)
        return trace(lambda x: (net(x),), x), [x, *net.parameters()]

    assert is_bound_by_launches(*graph(32, 8))
    assert not is_bound_by_launches(*graph(2048, 4096))
    assert not is_worth_replaying(*graph(32, 8))  # not on a GPU


def test_the_operators_count_their_products():
    x, mean, std, key = torch.randn(5, 6), torch.randn(7, 6), torch.rand(7, 6), make_key(0, range(3))
    leaves = [t.requires_grad_() for t in (x, mean, std)]
    counter = FlopCounterMode(display=False)
    with counter:
        y = sampled_linear(*leaves, key, 1)
        forward = counter.get_total_flops()
        torch.autograd.grad(y.sum(), leaves)
    assert forward == 2 * 3 * 5 * 6 * 7 and counter.get_total_flops() == 3 * forward
    for name, arguments, expected in (
        ("local_reparameterized_linear", (x, mean, std, None, None, key, 1, ""), 4 * 5 * 6 * 7),
        ("masked_linear", (x, mean, None, key, 1, 0.5, "input", ""), 2 * 3 * 5 * 6 * 7),
        ("ensemble_mlp", (x, [mean.expand(3, 7, 6)], [torch.zeros(3, 7)], "relu"), 2 * 3 * 5 * 6 * 7),
    ):
        with counter, torch.no_grad():
            getattr(torch.ops.vbdl, name)(*arguments)
        assert counter.get_total_flops() == expected, name
