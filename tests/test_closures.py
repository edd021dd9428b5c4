"""Functions that a network holds and that read its modules: copies of the network have functions of their own."""

import copy
import functools
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vbdl
from vbdl.calling.copies import blueprint, copied


class Reads(nn.Module):
    """A network one of whose functions reads a module of the network, in this form."""

    def __init__(self, form: str):
        super().__init__()
        self.a, self.b, self.f = nn.Linear(6, 8), nn.Linear(8, 2), torch.sin
        FORMS[form](self)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.f(self.a(x)))


def scaled(layer: nn.Linear, x: Tensor) -> Tensor:
    return (layer.weight.sum() * x).sin()


class Holder:
    """An object that is no module, and holds one or a function."""

    def __init__(self, held: object):
        self.held = held

    def call(self, x: Tensor) -> Tensor:
        return scaled(self.held, x)  # type: ignore[arg-type]


def by_closure(net: Reads) -> None:
    net.f = lambda x: scaled(net.a, x)


def by_closure_over_a_layer(net: Reads) -> None:
    a = net.a
    net.f = lambda x: scaled(a, x)


def by_default(net: Reads) -> None:
    net.f = lambda x, a=net.a: scaled(a, x)


def by_keyword_default(net: Reads) -> None:
    def f(x: Tensor, *, a: nn.Linear = net.a) -> Tensor:
        return scaled(a, x)

    net.f = functools.partial(f)


def by_partial(net: Reads) -> None:
    net.f = functools.partial(scaled, net.a)


def by_function_inside(net: Reads) -> None:
    inner = lambda x: net.a.weight.sum() * x
    net.f = lambda x: inner(x).sin()


def by_list(net: Reads) -> None:
    net.fs = [lambda x: scaled(net.a, x)]
    net.f = lambda x: net.fs[0](x)


def by_table(net: Reads) -> None:
    layers = {"a": net.a}
    net.f = lambda x: scaled(layers["a"], x)


def by_method(net: Reads) -> None:
    net.f = Holder(net.a).call


def by_object(net: Reads) -> None:
    net.held = Holder(lambda x: scaled(net.a, x))
    net.f = lambda x: net.held.held(x)


def by_hook(net: Reads) -> None:
    net.a.register_forward_hook(lambda module, args, output: output * net.b.weight.sum())


def by_pre_hook(net: Reads) -> None:
    net.a.register_forward_pre_hook(lambda module, args: (args[0] * net.b.weight.sum(),))


def by_forward(net: Reads) -> None:
    a = net.a
    a.forward = lambda x: F.linear(x, a.weight, a.bias).sin()


def by_global(net: Reads) -> None:
    namespace = {"net": net, "scaled": scaled}  # as the module-level code of a script or a notebook has them
    net.f = eval("lambda x: scaled(net.a, x)", namespace)


FORMS: dict[str, Callable[[Reads], None]] = {
    name.removeprefix("by_"): f for name, f in list(globals().items()) if name.startswith("by_")
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compiled", [False, True])
def test_each_member_calls_its_own_layers(form, compiled):
    members = [Reads(form).eval() for _ in range(3)]
    x = torch.randn(5, 6)
    with torch.no_grad():
        expected = torch.stack([net(x) for net in members]).mean(0)
    predict = vbdl.Predictor(vbdl.DeepEnsemble(members), vbdl.Gaussian(2), compile=compiled)
    members[0].a.weight.data.zero_()  # the ensemble has a copy
    torch.testing.assert_close(predict(x).mean, expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_reads_nothing_of_the_network_it_was_made_from(form):
    net = Reads(form).eval()
    x = torch.randn(5, 6)
    expected = net(x)
    made = copied(net)
    for p in net.parameters():
        p.data.zero_()
    torch.testing.assert_close(made(x), expected)
    torch.testing.assert_close(copied(made)(x), expected)
    for p in made.parameters():
        p.data.zero_()
    assert not made(x).any()


@pytest.mark.parametrize("form", FORMS)
def test_drawn_weights_reach_the_functions(form):
    torch.manual_seed(1)
    net, x = Reads(form).eval(), torch.randn(2, 6)
    q = vbdl.MeanField(net, n_data=10, initial_std=0.1)
    p = vbdl.Predictor(q, vbdl.Gaussian(2), n_samples=2000, compile=False, joint=True)(x, samples=True)
    means = {n: t.clone() for n, t in net.state_dict().items()}
    torch.manual_seed(2)
    outputs = []
    with torch.no_grad():
        for _ in range(2000):
            for n, t in net.named_parameters():
                t.copy_(means[n] + 0.1 * torch.randn_like(t))
            outputs.append(net(x))
    expected = torch.stack(outputs).var(0)
    # the relative error of a variance of 2,000 draws is near 0.04, and draws of products have heavier tails
    torch.testing.assert_close(p.samples[..., 0].var(0), expected, rtol=0.3, atol=0.0)


def test_functions_that_share_a_variable_still_share_it():
    net = nn.Linear(2, 2)
    calls = []

    def hooks(module: nn.Module) -> tuple[Callable, Callable]:
        state = {"module": module}

        def put(value: nn.Module) -> None:
            nonlocal module
            module = value

        return put, lambda: (module, state["module"])

    net.put, net.get = hooks(net)
    made = copied(net)
    assert made.get() == (made, made) and net.get() == (net, net)
    made.put(calls)
    assert made.get()[0] is calls and net.get()[0] is net


def test_functions_that_read_no_module_are_the_same_in_copies():
    net, scale = nn.Linear(2, 2), torch.ones(2)
    net.f, net.g = torch.nn.functional.relu, lambda x: x * scale
    assert copied(net).f is net.f and copied(net).g is net.g


def test_a_structure_keeps_the_numbers_that_a_function_holds():
    net = Reads("partial")
    weight = net.a.weight
    net.f = lambda x: x * weight.sum()
    assert blueprint(net).f(1.0) == weight.sum()
    made = copied(net)
    assert made.f(1.0) == weight.sum()
    made.a.weight.data.fill_(0.0)
    assert made.f(1.0) == 0.0  # its own parameter, as in the network


def test_members_whose_functions_hold_a_parameter_predict_and_are_not_trained():
    def holding() -> Reads:
        net = Reads("partial")
        weight = net.a.weight
        net.f = lambda x: (x * weight.sum()).sin()
        return net.eval()

    members, x = [holding() for _ in range(3)], torch.randn(5, 6)
    with torch.no_grad():
        expected = torch.stack([net(x) for net in members]).mean(0)
    q = vbdl.DeepEnsemble(members)
    torch.testing.assert_close(vbdl.Predictor(q, vbdl.Gaussian(2), compile=False)(x).mean, expected)
    with pytest.raises(ValueError, match="keeps a parameter itself"):
        vbdl.fit(q, (x, torch.randn(5, 2)), vbdl.Gaussian(2), epochs=1, progress=False)


@pytest.mark.parametrize("form", ["closure", "hook", "forward"])
def test_python_copies_functions_as_they_are(form):
    """What `copy.deepcopy` does, unlike vbdl: should Python change it, `vbdl.calling.closures` can go."""
    net = Reads(form).eval()
    made, x = copy.deepcopy(net), torch.randn(5, 6)
    expected = net(x)
    for p in net.parameters():
        p.data.zero_()
    assert not torch.allclose(made(x), expected)


class Holds(nn.Module):
    """A network that reads a weight that it holds beside its modules, in one of these ways."""

    def __init__(self, how: str):
        super().__init__()
        self.a, self.inside, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        weight = self.inside.weight
        self.listed, self.table = [weight] if how == "listed" else [], {"weight": weight} if how == "table" else {}
        self.of = functools.partial(F.linear, weight=weight, bias=self.inside.bias) if how == "of" else None
        self.f = (lambda h: h @ weight) if how == "f" else None
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.how in ("of", "f"):
            return self.b((self.of or self.f)(h))
        return self.b(h @ (self.listed[0] if self.listed else self.table["weight"]))


@pytest.mark.parametrize("how", ["listed", "table", "of", "f"])
def test_weights_that_are_held_beside_modules_are_refused_where_they_are_drawn(how):
    with pytest.raises(
        ValueError, match=f"the attribute '(inner.)?{how}' holds the parameter '.*inside.weight' itself"
    ):
        q = vbdl.MeanField(Holds(how), n_data=10)
        vbdl.Predictor(q, vbdl.Gaussian(2), joint=True, compile=False)(torch.randn(3, 6))
    vbdl.MCDropout(nn.Sequential(nn.Dropout(0.1), Holds(how)))  # replaces no weight
    vbdl.Laplace(Holds(how))  # of the last layer


def test_lists_that_the_forward_does_not_read_are_taken():
    members, x = [Reads("partial").eval() for _ in range(2)], torch.randn(3, 6)
    for net in members:
        net.groups = [{"params": [net.a.weight], "lr": 1e-3}, {"params": list(net.b.parameters())}]
    with torch.no_grad():
        expected = torch.stack([net(x) for net in members]).mean(0)
    found = vbdl.Predictor(vbdl.DeepEnsemble(members), vbdl.Gaussian(2), compile=False)(x).mean
    torch.testing.assert_close(found, expected)
    vbdl.Predictor(vbdl.MeanField(members[0], n_data=10), vbdl.Gaussian(2), compile=False)(x)


@pytest.mark.parametrize("how", ["listed", "table", "of"])
def test_members_that_hold_weights_beside_modules_are_refused(how):
    predict = vbdl.Predictor(vbdl.DeepEnsemble([Holds(how), Holds(how)]), vbdl.Gaussian(2), compile=False)
    with pytest.raises(ValueError, match=f"the attribute '{how}' holds the parameter 'inside.weight' itself"):
        predict(torch.randn(3, 6))
    if how == "of":
        with pytest.raises(ValueError, match="the attribute 'of' holds the parameter 'inside.weight' itself"):
            q = vbdl.DeepEnsemble(Holds(how), 2)
            vbdl.fit(q, (torch.randn(8, 6), torch.randn(8, 2)), vbdl.Gaussian(2), epochs=1, progress=False)


def test_weak_references_are_to_the_modules_of_the_copy():
    class Refers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)
            self.reference = weakref.ref(self.a)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.reference()(x))

    members, x = [Refers().eval() for _ in range(3)], torch.randn(4, 6)
    with torch.no_grad():
        expected = torch.stack([net(x) for net in members]).mean(0)
    found = vbdl.Predictor(vbdl.DeepEnsemble(members), vbdl.Gaussian(2), compile=False)(x).mean
    torch.testing.assert_close(found, expected)
    assert copied(members[0]).reference() is not members[0].a


def test_a_compiled_function_keeps_its_own_attributes_in_a_copy():
    net = nn.Linear(3, 2)
    inside = torch.compile(lambda x: net.weight.sum() * x, backend="eager")
    inside.scale = 2.0
    net.inside = inside  # type: ignore[assignment]
    other = copied(net)
    assert other.inside.scale == 2.0 and other.inside is not inside
