"""Networks that a user changed from outside, by hooks and by functions in place of methods, against a loop."""

import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.nn.modules.module as torchs
from torch import nn

import vbdl
from vbdl.nn.may_drop import has_only_its_forward

ROUNDING: dict = {"rtol": 0.0, "atol": 1e-6}  # float32 sums of a few dozen terms of order 1


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.inner, self.out = nn.Conv2d(2, 4, 3), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(self.conv(x).mean((2, 3)))))


def on_inner(change):
    """The change as a hook of all modules that acts on one layer."""
    return lambda module, inputs, *output: change((*output, *inputs)[0]) if module.__class__ is nn.Linear else None


ATTACHED: dict[str, Callable] = {  # change -> network -> handles of global hooks
    "hook": lambda change: lambda net: net.inner.register_forward_hook(lambda m, i, out: change(out) + m.bias),
    "hook before": lambda change: lambda net: net.inner.register_forward_pre_hook(lambda m, i: change(i[0])),
    "method": lambda change: (
        lambda net: setattr(
            net.inner,
            "forward",
            types.MethodType(lambda self, x: change(F.linear(x, self.weight * 2, self.bias)), net.inner),
        )
    ),
    "inner method": lambda change: (
        lambda net: setattr(
            net.conv,
            "_conv_forward",
            types.MethodType(lambda self, x, weight, bias: change(F.conv2d(x, weight * 2, bias)), net.conv),
        )
    ),
    "whole method": lambda change: (
        lambda net: setattr(
            net, "forward", types.MethodType(lambda self, x: change(type(self).forward(self, x)) + self.out.bias, net)
        )
    ),
    "global hook": lambda change: lambda net: torchs.register_module_forward_hook(on_inner(change)),
    "global hook before": lambda change: lambda net: torchs.register_module_forward_pre_hook(on_inner(change)),
}


@pytest.fixture
def attach():
    """Attach to networks by name; global hooks are attached once, and removed after the test."""
    handles = []

    def attach(name, nets, change):
        for net in nets[:1] if "global" in name else nets:
            handles.append(ATTACHED[name](change)(net))

    yield attach
    for handle in handles:
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("name", ATTACHED)
def test_what_is_attached_changes_predictions_as_it_does_in_a_loop(name, attach):
    torch.manual_seed(0)
    nets, x = [Network().eval() for _ in range(3)], torch.randn(4, 2, 5, 5)
    before = torch.stack([net(x).softmax(-1) for net in nets]).mean(0)
    attach(name, nets, lambda t: t * 3)
    loop = torch.stack([net(x).softmax(-1) for net in nets]).mean(0)
    assert not torch.allclose(before, loop, atol=1e-3)
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile=False)
    torch.testing.assert_close(predict(x).probs, loop, **ROUNDING)


def test_compiled_predictions_have_what_is_attached(attach):
    torch.manual_seed(0)
    nets, x = [Network().eval() for _ in range(2)], torch.randn(4, 2, 5, 5)
    for name in ATTACHED:
        attach(name, nets, lambda t: t * 1.5)
    loop = torch.stack([net(x).softmax(-1) for net in nets]).mean(0)
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile=True)
    for _ in range(2):
        torch.testing.assert_close(predict(x).probs, loop, **ROUNDING)


@pytest.mark.parametrize("name", [name for name in ATTACHED if "global" not in name])
def test_members_that_differ_in_what_is_attached_are_the_loop(name, attach):
    torch.manual_seed(0)
    nets, x = [Network().eval() for _ in range(3)], torch.randn(4, 2, 5, 5)
    attach(name, nets[1:2], lambda t: t * 3)
    loop = torch.stack([net(x).softmax(-1) for net in nets]).mean(0)
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile=False)
    torch.testing.assert_close(predict(x).probs, loop, **ROUNDING)


@pytest.mark.parametrize("name", ATTACHED)
def test_dropout_that_is_attached_is_drawn(name, attach):
    """On layers of torch alone, in whose code there is no dropout to be found."""
    net, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 3)).eval(), torch.randn(4, 2, 5, 5)
    holder = types.SimpleNamespace(conv=net[0], inner=net[2], out=net[2])
    if name == "whole method":
        change = types.MethodType(lambda self, x: F.dropout(nn.Sequential.forward(self, x), 0.5, True), net)
        net.forward = change
    else:
        attach(name, [holder], lambda t: F.dropout(t, 0.5, True))
    assert not all(has_only_its_forward(m) for m in net.modules())
    predict = vbdl.Predictor(vbdl.MCDropout(net), vbdl.Categorical(), 6, compile=False)
    p = predict(x)
    assert bool((p.epistemic > 0).all())
    torch.testing.assert_close(predict(x).probs, p.probs, rtol=0.0, atol=0.0)
