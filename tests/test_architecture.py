"""What members compute with beside parameters and buffers is their own, and a network given to load has the same."""

import array
import collections
import datetime
import decimal
import fractions
import functools
import types

import numpy as np
import pandas
import pytest
import torch
from torch import nn

import vbdl
from vbdl.artifact.manifest import ArtifactError
from vbdl.nn.architecture import architecture, are_alike, constants


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
    with pytest.raises(ArtifactError, match="a different network"):
        vbdl.load(folder, module=KINDS[kind](2), compile=False)


class Holder:
    def __init__(self, k):
        self._mode = "double" if k else "plain"

    def __call__(self, x):
        return x * 2 if self._mode == "double" else x


class Scaled(nn.Module):
    """Computes with its own value of `held`, by a function of it."""

    def __init__(self, held, read):
        super().__init__()
        self.lin, self._held, self.read = nn.Linear(3, 1), held, read

    def forward(self, x):
        return self.lin(x - float(self.read(self._held)))


PRIVATE = {
    "flag": lambda k: Scaled(bool(k), float),
    "text": lambda k: Scaled("a" * (1 + int(k > 0)), len),
    "dict": lambda k: Scaled({"act": str(k)}, lambda d: float(d["act"])),
    "object": lambda k: Net(Holder(k)),
    "deque": lambda k: Scaled(collections.deque([torch.tensor(float(k))]), lambda d: d[0]),
    "array": lambda k: Scaled(array.array("d", [k]), lambda a: a[0]),
    "Decimal": lambda k: Scaled(decimal.Decimal(k), float),
    "Fraction": lambda k: Scaled(fractions.Fraction(k, 3), float),
    "timedelta": lambda k: Scaled(datetime.timedelta(seconds=k), lambda t: t.total_seconds()),
    "frame": lambda k: Scaled(pandas.DataFrame({"a": [float(k)]}), lambda f: f["a"][0]),
    "cached closure": lambda k: Net(functools.lru_cache(lambda x: x - k)),
}


@pytest.mark.parametrize("kind", PRIVATE)
def test_what_a_class_keeps_for_itself_is_compared_too(kind, tmp_path):
    nets = [PRIVATE[kind](k).eval() for k in (0, 100)]
    x = torch.randn(5, 3)
    right = torch.stack([net(x).detach() for net in nets])
    found = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Gaussian(), compile=False)(x, samples=True)
    torch.testing.assert_close(found.samples[..., 0], right, rtol=1e-5, atol=1e-5)
    assert len(vbdl.DeepEnsemble([PRIVATE[kind](1), PRIVATE[kind](1)]).parts) == 1
    p = vbdl.Predictor(vbdl.DeepEnsemble([PRIVATE[kind](1)] * 2), vbdl.Gaussian(), compile=False)
    p(x)
    folder = p.save(tmp_path / "m")
    vbdl.load(folder, module=PRIVATE[kind](1), compile=False)
    with pytest.raises(ArtifactError, match="a different network"):
        vbdl.load(folder, module=PRIVATE[kind](0), compile=False)


def test_two_classes_of_one_name_are_two():
    def again(k):  # as a cell of a notebook that is run again
        scope = {"nn": nn, "__name__": __name__}
        exec(
            f"class Net(nn.Module):\n    def __init__(self):\n        super().__init__(); self.lin = nn.Linear(3, 1)\n"
            f"    def forward(self, x):\n        return self.lin(x - {k})\n",
            scope,
        )
        return scope["Net"]()

    by_type = lambda k: type("Net", (Keyed,), {"k": k})()
    for make in (again, by_type):
        nets, x = [make(k).eval() for k in (0, 50)], torch.randn(5, 3)
        right = torch.stack([net(x).detach() for net in nets])
        found = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Gaussian(), compile=False)(x, samples=True)
        torch.testing.assert_close(found.samples[..., 0], right, rtol=1e-5, atol=1e-4)


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 1)

    def forward(self, x):
        return self.lin(x - self.k)


def test_members_that_freeze_other_layers_train_by_their_own_flags():
    a, b = (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(2))
    a[0].requires_grad_(False)
    for nets in ([a, b], [b, a]):
        q = vbdl.DeepEnsemble(nets)
        before = [q.member(m)["0.weight"] for m in range(2)]
        vbdl.fit(q, (torch.randn(20, 3), torch.arange(20) % 2), vbdl.Categorical(), epochs=2, lr=0.1, progress=False)
        moved = [not torch.equal(q.member(m)["0.weight"], t) for m, t in enumerate(before)]
        assert moved == [net is b for net in nets]


def test_a_hook_of_a_gradient_is_refused_where_it_would_be_lost():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 2))
    net[0].weight.register_hook(lambda g: g * 0)
    data = torch.randn(20, 3), torch.arange(20) % 2
    for q in (vbdl.MCDropout(net), vbdl.MeanField(net, 20), vbdl.DeepEnsemble([net, net])):
        with pytest.raises(ValueError, match="'.*0.weight' has a gradient hook"):
            vbdl.fit(q, data, vbdl.Categorical(), epochs=1, progress=False)


def test_a_tensor_kept_from_call_to_call_is_named():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.mean = nn.Linear(3, 2), torch.zeros(2)

        def forward(self, x):
            out = self.lin(x)
            self.mean = 0.9 * self.mean + 0.1 * out.mean(0)
            return out - self.mean

    with pytest.raises(ValueError, match="keeps a tensor in an attribute.*register_buffer"):
        vbdl.fit(
            vbdl.DeepEnsemble(Keeping(), 2), (torch.randn(20, 3), torch.arange(20) % 2), vbdl.Categorical(), epochs=2,
            progress=False,
        )  # fmt: skip


class Configuration:
    """Settings as networks of transformers keep them: one object that many modules hold."""

    def __init__(self, **settings):
        self.names, self.kinds, self.dtype = {0: "a", 1: "b"}, {"x", "y"}, torch.float32
        self.inner: object = None
        vars(self).update(settings)


def _configured(**settings):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    config = Configuration(inner=Configuration(**settings))
    config.itself = config
    for layer in net:
        layer.config = config
    return net


class Counted(torch.Tensor):
    """A class of tensors of a user's, whose numbers are no attributes."""


SAME = {
    "configuration": _configured,
    "layers": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2)),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16),
}


def _tied():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    return nn.Sequential(first, second)


OTHER = {
    "rate": (lambda: nn.Dropout(0.1), lambda: nn.Dropout(0.2)),
    "kind": (lambda: nn.Sequential(nn.ReLU()), lambda: nn.Sequential(nn.Tanh())),
    "shape": (lambda: nn.Linear(3, 4), lambda: nn.Linear(3, 5)),
    "bias": (lambda: nn.Linear(3, 4), lambda: nn.Linear(3, 4, bias=False)),
    "tied": (_tied, lambda: nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))),
    "frozen": (lambda: nn.Linear(3, 4), lambda: nn.Linear(3, 4).requires_grad_(False)),
    "dtype": (lambda: nn.Linear(3, 4), lambda: nn.Linear(3, 4).double()),
    "directions": (lambda: nn.LSTM(3, 4), lambda: nn.LSTM(3, 4, bidirectional=True)),
    "configuration": (_configured, lambda: _configured(width=4)),
    "key of a setting": (lambda: _configured(names={0: "a"}), lambda: _configured(names={True: "a"})),
    "tensor of a setting": (lambda: _configured(t=torch.ones(2)), lambda: _configured(t=torch.zeros(2))),
    "tensor of a class": (
        lambda: _configured(t=torch.ones(2).as_subclass(Counted)),
        lambda: _configured(t=torch.zeros(2).as_subclass(Counted)),
    ),
    "array of a setting": (lambda: _configured(t=np.ones(2)), lambda: _configured(t=np.zeros(2))),
    "function of a setting": (lambda: _configured(f=lambda x: x), lambda: _configured(f=lambda x: 2 * x)),
    "more": (lambda: nn.Sequential(nn.ReLU()), lambda: nn.Sequential(nn.ReLU(), nn.ReLU())),
    "activation": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16), lambda: nn.TransformerEncoderLayer(8, 2, 16, activation="gelu"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("network", SAME)
def test_networks_of_one_architecture_are_alike(network):
    a, b = SAME[network](), SAME[network]()
    assert are_alike(a, b)
    assert architecture(a) == architecture(b)


def test_ensembles_hold_objects_of_classes_written_in_c_and_nested_tensors():
    """They have no attributes, or numbers, that could be compared one by one."""
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    nets = [_configured(interval=pandas.Interval(0, 1), nested=nested.clone()) for _ in range(2)]
    assert vbdl.DeepEnsemble(nets).n_members == 2
    assert not are_alike(nets[0], _configured(interval=pandas.Interval(0, 2)))


@pytest.mark.parametrize("other", OTHER)
def test_networks_that_differ_are_not_alike(other):
    a, b = (make() for make in OTHER[other])
    assert not are_alike(a, b)
