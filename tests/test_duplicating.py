"""A duplicate of a module is what `copy.deepcopy` makes, in a fraction of its time."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vbdl
from vbdl.calling.copies import copied
from vbdl.calling.duplicating import duplicate
from vbdl.engine.execution import Execution


class Tied(nn.Module):
    """Layers that share a weight, a table that is still empty, and modules in a list, a tuple and an attribute."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.again = self.a
        self.register_buffer("scale", torch.ones(3))
        self.seen: dict[str, int] = {}
        for layer in (self.a, self.b):
            vars(layer)["seen"] = self.seen
        self.listed, self.hidden, self.nothing = [self.a], (nn.Linear(3, 3), self.b), None
        self.sizes, self.where = [1, [2, 3]], torch.device("cpu")

    def forward(self, x: Tensor) -> Tensor:
        self.seen["calls"] = self.seen.get("calls", 0) + 1
        return self.hidden[0](self.listed[0](x) + self.b(x)) * self.scale


class CopiesItself(nn.Linear):
    def __deepcopy__(self, memo):
        made = CopiesItself(3, 3)
        made.load_state_dict(self.state_dict())
        vars(made)["copied"] = True
        memo[id(self)] = made
        return made


class Restores(nn.Linear):
    def __setstate__(self, state):
        super().__setstate__(state)
        self.restored = True


class Slotted(nn.Linear):
    __slots__ = ("held",)

    def __init__(self):
        super().__init__(3, 3)
        self.held = [1]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "convolution": lambda: nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3), nn.Flatten(), nn.Softmax(-1)),
    "recurrent": lambda: nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3)),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, dropout=0.0),
    "a method of its own": lambda: nn.Sequential(CopiesItself(3, 3)),
    "a state of its own": lambda: nn.Sequential(Restores(3, 3)),
    "slots": lambda: nn.Sequential(Slotted()),
    "hooks": lambda: hooked(nn.Sequential(nn.Linear(3, 3))),
    "compiled in place": lambda: compiled(nn.Sequential(nn.Linear(3, 3))),
}


def hooked(network: nn.Module) -> nn.Module:
    network.register_forward_hook(lambda module, args, output: output)
    return network


def compiled(network: nn.Module) -> nn.Module:
    network.compile(backend="eager")
    return network


def described(value: object, seen: dict[int, int]) -> object:
    """A value as nested tuples: which objects are the same, of which classes, and with which contents."""
    if value is None or isinstance(value, bool | int | float | str | type | torch.device):
        return value
    if id(value) in seen:
        return "object", seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, Tensor):
        return type(value), value.requires_grad, value.tolist()
    if isinstance(value, dict):
        return type(value), [(k, described(v, seen)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [described(v, seen) for v in value]
    if isinstance(value, nn.Module):
        return type(value), [(k, described(v, seen)) for k, v in vars(value).items()], getattr(value, "held", None)
    return type(value)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_duplicate_is_what_deepcopy_makes(name):
    network = NETWORKS[name]()
    expected, made = copy.deepcopy(network), duplicate(network, {})
    assert described(made, {}) == described(expected, {})
    assert not {id(m) for m in made.modules()} & {id(m) for m in network.modules()}
    assert not {id(p) for p in made.parameters()} & {id(p) for p in network.parameters()}


def test_objects_with_a_copy_get_it():
    network = Tied()
    weight = nn.Parameter(torch.zeros(3, 3))
    made = duplicate(network, {id(network.a.weight): weight})
    assert made.a.weight is made.b.weight is weight
    assert made.listed[0] is made.again is made.a
    made(torch.ones(2, 3))
    assert vars(made.a)["seen"] == {"calls": 1} and network.seen == {}


def test_modules_of_torch_are_not_copied_by_deepcopy(monkeypatch):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))
    copies, of = [], copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", lambda value, memo: copies.append(value) or of(value, memo))
    duplicate(network, {})
    assert not copies


def views() -> nn.Module:
    """A network with tensors that share memory, are views of more, or are laid out otherwise."""
    network, memory = nn.Linear(3, 3), torch.arange(12.0)
    images = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    for name, t in {
        "whole": memory, "rows": memory.view(3, 4), "part": memory[3:5], "turned": memory.view(3, 4).t(),
        "repeated": torch.ones(1).expand(5), "images": images, "trained": torch.ones(2, requires_grad=True),
        "empty": torch.zeros(0, 3), "number": torch.tensor(3), "noted": torch.ones(2),
    }.items():  # fmt: skip
        network.register_buffer(name, t)
    network.noted.note = "a note"  # type: ignore[union-attr]
    network.also = network.rows
    network.weight.grad = torch.ones(3, 3)
    return network


def test_tensors_are_copied_as_deepcopy_does():
    network = views()
    expected, made = copy.deepcopy(network), duplicate(network, {})
    tensors = lambda m: {n: t for n, t in vars(m).items() if isinstance(t, Tensor)} | m._buffers | m._parameters
    seen = lambda m: {
        n: (t.tolist(), t.stride(), t.storage_offset(), t.untyped_storage().nbytes(), t.requires_grad, vars(t), t.grad)
        for n, t in tensors(m).items()
    }
    assert seen(made) == seen(expected)
    places = lambda m: [t.untyped_storage().data_ptr() for t in tensors(m).values() if t.numel()]
    shared = lambda m: [places(m).index(place) for place in places(m)]
    assert shared(made) == shared(expected) == shared(network)
    assert not set(places(made)) & set(places(network))


@pytest.mark.parametrize("rows", [1, 3])
def test_the_run_that_checks_a_network_is_a_part_of_the_first_answer(rows, monkeypatch):
    monkeypatch.setattr(Execution, "_begin", lambda self: None)  # the background runs it again, to check and to trace
    calls = []
    nets = [nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(3)]
    nets = [net.eval() for net in nets]
    nets[0][0].register_forward_hook(count := Counts(calls))
    for net in nets[1:]:
        net[0].register_forward_hook(count)
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile="background", tiles=(rows,))
    x = torch.randn(rows, 4)
    calls.clear()
    first = predict(x)
    assert len(calls) == 3 + (rows > 1)  # one more to check that rows are kept apart
    torch.testing.assert_close(first.probs, torch.stack([net(x).softmax(-1) for net in nets]).mean(0))


def test_a_run_on_a_changed_input_is_no_part_of_an_answer():
    nets = [nn.Linear(4, 3) for _ in range(2)]
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile="background", tiles=(1,))
    x = torch.randn(1, 4)
    predict.explain(x)
    x.numpy()[:] += 1.0
    torch.testing.assert_close(predict(x).probs, torch.stack([net(x).softmax(-1) for net in nets]).mean(0))


class Counts:
    """A forward hook that counts, and is the same object in every copy of a network."""

    def __init__(self, calls: list):
        self.calls = calls

    def __call__(self, module, args, output):
        self.calls.append(1)

    def __deepcopy__(self, memo):
        return self


def _doubled(module, inputs, output):
    return 2 * output


@pytest.mark.parametrize("place", ["attribute", "list", "table"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "state_dict"])
def test_handles_of_hooks_remove_those_of_the_copy(kind, place):
    net: Any = nn.Sequential(nn.Linear(4, 3))
    table = "_state_dict_hooks" if kind == "state_dict" else f"_{kind.removeprefix('full_')}_hooks"
    register = "_register_state_dict_hook" if kind == "state_dict" else f"register_{kind}_hook"
    handle = getattr(net[0], register)(_doubled)
    net.handle = handle if place == "attribute" else [handle] if place == "list" else {"first": handle}
    other = copied(copied(copied(net)))
    held = other.handle
    (held if place == "attribute" else held[0] if place == "list" else held["first"]).remove()
    assert len(getattr(net[0], table)) == 1
    assert len(getattr(other[0], table)) == 0


# -- functions of TorchScript, which cannot be copied

_SCRIPTED = "ignore:.*torch.jit"
PLACES_OF_FUNCTIONS: dict[str, Callable[[Any], tuple[Any, Callable[[Any], Any]]]] = {
    "attribute": lambda f: (f, lambda held: held),
    "list": lambda f: ([f], lambda held: held[0]),
    "table": lambda f: ({"of": (f,)}, lambda held: held["of"][0]),
    "partial": lambda f: (functools.partial(f), lambda held: held),
}
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "dropout": lambda net: vbdl.MCDropout(net, p=0.0001),
    "mean-field": lambda net: vbdl.MeanField(net, 10, initial_std=1e-6),
    "ensemble": lambda net: vbdl.DeepEnsemble([net, net]),
}


class CallsHeld(nn.Module):
    def __init__(self, function: Any, place: str):
        super().__init__()
        self.held, get = PLACES_OF_FUNCTIONS[place](function)
        vars(self)["_get"] = get
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self._get(self.held)(x, self.weight)))


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight).tanh()


@pytest.mark.filterwarnings(_SCRIPTED)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place, compile", [*((place, False) for place in PLACES_OF_FUNCTIONS), ("attribute", True)])
def test_a_network_may_hold_a_function_of_torchscript(place, compile, method):
    net, x = CallsHeld(torch.jit.script(_product), place).eval(), torch.randn(5, 6)
    predict = vbdl.Predictor(
        METHODS[method](net), vbdl.Gaussian(3), None if method == "ensemble" else 4, compile=compile
    )
    torch.testing.assert_close(predict(x).mean, net(x).double(), rtol=0, atol=1e-3, check_dtype=False)


@pytest.mark.filterwarnings(_SCRIPTED)
def test_a_function_of_torchscript_that_draws_is_refused_in_words():
    @torch.jit.script
    def draws(x: Tensor, weight: Tensor) -> Tensor:
        return torch.dropout(x @ weight, 0.3, True)

    for wrap in METHODS.values():
        with pytest.raises((NotImplementedError, ValueError), match="draws from torch's generator"):
            vbdl.Predictor(wrap(CallsHeld(draws, "attribute").eval()), vbdl.Gaussian(3), compile=False)(
                torch.randn(5, 6)
            )
