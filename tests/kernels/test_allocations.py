"""No tensor of samples x out x in elements: every allocation of a forward and backward pass is looked at.

torch's allocator is asked, through its profiler, so that what an operator makes inside is seen too. In the interpreter
the kernels themselves run; on a GPU the peak of the allocator says it (`test_gpu.py`).
"""

import contextlib

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from vbdl_kernels import bayesian_mlp, local_reparameterized_linear, make_key, masked_linear, sampled_linear
from vbdl_kernels.sampled_linear import reference_sampled_linear

import vbdl
from vbdl.nn import drawn

SAMPLES, BATCH, WIDTH = 8, 3, 64


@contextlib.contextmanager
def no_allocation_of(elements):
    """Fails on any single allocation of as many elements, were they of one byte each."""
    # acc_events: torch 2.11 asks for it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        yield
    sizes = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    assert sizes, "the profiler saw no allocation"
    largest = max(sizes)
    assert largest < elements, f"{largest} bytes at once, {elements} elements are the weights of all draws"


def problem(shared):
    torch.manual_seed(0)
    x = torch.randn(*(() if shared else (SAMPLES,)), BATCH, WIDTH)
    mean, std = torch.randn(WIDTH, WIDTH), torch.rand(WIDTH, WIDTH)
    bias = torch.randn(WIDTH), torch.rand(WIDTH)
    return [t.requires_grad_() for t in (x, mean, std, *bias)]


def test_the_mode_sees_what_an_operator_makes_inside():
    """The reference does make the weights, so it fails; and so does a plain draw."""
    x, mean, std, *_ = problem(True)
    key = make_key(0, range(SAMPLES))
    with pytest.raises(AssertionError, match="weights of all draws"), no_allocation_of(SAMPLES * WIDTH * WIDTH):
        reference_sampled_linear(x.detach(), mean.detach(), std.detach(), None, None, key, 1)
    with pytest.raises(AssertionError, match="weights of all draws"), no_allocation_of(SAMPLES * WIDTH * WIDTH):
        torch.randn(SAMPLES, WIDTH, WIDTH)


# an input of each draw's own is part of what is allocated before: the training step below has one in its second layer
@pytest.mark.interpreter
@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sampled_linear_forward_and_backward(shared):
    leaves = problem(shared)
    x, mean, std, *bias = leaves
    key = make_key(0, range(SAMPLES))
    with no_allocation_of(SAMPLES * WIDTH * WIDTH):
        y = sampled_linear(x, mean, std, key, 1, *bias)
        found = torch.autograd.grad(y.square().sum(), leaves)
    double = [t.detach().double().requires_grad_() for t in leaves]  # runs the reference
    y = sampled_linear(*double[:3], key, 1, *double[3:])
    for a, b in zip(found, torch.autograd.grad(y.square().sum(), double), strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.interpreter
def test_the_other_operators():
    x, mean, std, *bias = leaves = problem(True)
    key = make_key(0, range(SAMPLES))
    with no_allocation_of(SAMPLES * WIDTH * WIDTH):
        y = local_reparameterized_linear(x, mean, std, key, 1, *bias) + masked_linear(x, mean, key, 1, 0.5)
        torch.autograd.grad(y.square().sum(), leaves)
    with no_allocation_of(SAMPLES * WIDTH * WIDTH), torch.no_grad():
        bayesian_mlp(x, [mean] * 2, [std] * 2, [bias[0]] * 2, [bias[1]] * 2, key, [0, 1])


@pytest.mark.interpreter
def test_a_training_step(monkeypatch):
    """`MeanField.loss` of five draws, forward and backward, kernels and all: with the draws of plain operations."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    x, y = torch.randn(BATCH, WIDTH), torch.randint(0, WIDTH, (BATCH,))
    found = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(drawn, "DEVICES", devices)
        q = vbdl.MeanField(network, n_data=100, n_samples=5)
        # in bytes more than the gradients of one draw, four an element
        limit = 5 * WIDTH * WIDTH if devices else 2**62
        with no_allocation_of(limit):
            loss = q.loss(x, y, vbdl.Categorical())
            loss.backward()
        found.append((loss.detach(), [p.grad for p in q.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    for a, b in zip(found[1][1], found[0][1], strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())
