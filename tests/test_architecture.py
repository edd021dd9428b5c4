"""What members compute with beside parameters and buffers is their own, and a network given to load has the same."""

import functools
import types

import numpy as np
import pytest
import torch
from torch import nn

import vbdl
from vbdl.architecture import architecture, constants
from vbdl.artefact.manifest import ArtefactError


class Scaler:
    def __init__(self, k):
        self.mean_ = np.full(3, k)

    def __call__(self, x):
        return x - torch.from_numpy(self.mean_).to(x)


class Slotted:
    __slots__ = ("k",)

    def __init__(self, k):
        self.k = k

    def __call__(self, x):
        return x - self.k


class Net(nn.Module):
    def __init__(self, shift, name="shift"):
        super().__init__()
        self.lin = nn.Linear(3, 1)
        self.name = name
        setattr(self, name, shift)

    def forward(self, x):
        shift = getattr(self, self.name)
        if isinstance(shift, dict | list):
            shift = shift["a"][0] if isinstance(shift, dict) else shift[-1]
        if isinstance(shift, np.ndarray):
            shift = torch.from_numpy(shift)
        return self.lin(shift(x) if callable(shift) else x - shift)


def class_in_a_function(k):
    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 1)

        def forward(self, x):
            return self.lin(x - k)

    return Made()


def hooked(k):
    net = nn.Sequential(nn.Linear(3, 1))
    net[0].register_forward_pre_hook(lambda m, i: (i[0] - k,))
    return net


def patched(k):
    net = nn.Sequential(nn.Linear(3, 1))
    net.forward = types.MethodType(lambda self, x: self[0](x - k), net)
    return net


def unregistered(k):
    return Net([0.0, nn.Linear(3, 3)])  # every one has weights of its own, that nothing trains


def minus(k, x):
    return x - k


KINDS = {
    "tensor": lambda k: Net(torch.full((3,), float(k))),
    "private tensor": lambda k: Net(torch.full((3,), float(k)), "_shift"),
    "array": lambda k: Net(np.full(3, k, np.float32)),
    "number": lambda k: Net(float(k)),
    "private number": lambda k: Net(float(k), "_shift"),
    "dict of tensors": lambda k: Net({"a": [torch.tensor(float(k))]}),
    "list": lambda k: Net([0.0, torch.tensor(float(k))]),
    "scaler": lambda k: Net(Scaler(k)),
    "slots": lambda k: Net(Slotted(k)),
    "closure": lambda k: Net(lambda x: x - k),
    "closure of a tensor": lambda k: Net((lambda t: lambda x: x - t)(torch.tensor(float(k)))),
    "default": lambda k: Net(eval(f"lambda x, k={k}: x - k")),
    "code": lambda k: Net(eval(f"lambda x: x - {k}")),
    "partial": lambda k: Net(functools.partial(minus, k)),
    "bound method": lambda k: Net(Scaler(k).__call__),
    "distribution": lambda k: Net((lambda d: lambda x: x - d.mean)(torch.distributions.Normal(float(k), 1.0))),
    "class made in a function": class_in_a_function,
    "hook": hooked,
    "patched forward": patched,
    "unregistered module": unregistered,
}


@pytest.mark.parametrize("kind", KINDS)
def test_members_compute_with_their_own(kind):
    nets = [KINDS[kind](k).eval() for k in (0, 100, 0)]
    x = torch.randn(5, 3)
    right = torch.stack([net(x).detach() for net in nets])
    found = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Gaussian(), compile=False)(x, samples=True)
    torch.testing.assert_close(found.samples[..., 0], right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unregistered module"])
def test_copies_of_one_network_are_one_architecture(kind):
    assert len(vbdl.DeepEnsemble(KINDS[kind](3), 4).parts) == 1
    assert architecture(KINDS[kind](3)) == architecture(KINDS[kind](3))


def test_what_a_forward_has_kept_is_no_constant():
    net = Net(0.0)
    net.kept = net.lin(torch.randn(2, 3))
    assert constants(net) == {}


def test_members_with_dropout_and_other_constants_are_refused_by_name():
    make = lambda k: nn.Sequential(Net(torch.full((3,), float(k))), nn.Dropout(0.1))
    with pytest.raises(ValueError, match="member 1 has.*0.shift"):
        vbdl.DeepEnsemble([vbdl.MCDropout(make(0)), vbdl.MCDropout(make(1))])


@pytest.mark.parametrize("kind", ["tensor", "array", "scaler", "closure of a tensor", "hook", "private number"])
def test_a_network_given_to_load_has_the_same_constants(kind, tmp_path):
    p = vbdl.Predictor(vbdl.DeepEnsemble([KINDS[kind](1), KINDS[kind](1)]), vbdl.Gaussian(), compile=False)
    x = torch.randn(5, 3)
    right = p(x).mean
    folder = p.save(tmp_path / "m")
    assert torch.equal(vbdl.load(folder, module=KINDS[kind](1), compile=False)(x).mean, right)
    with pytest.raises(ArtefactError, match="another network"):
        vbdl.load(folder, module=KINDS[kind](2), compile=False)
