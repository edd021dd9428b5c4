"""Networks that call functions which torch.compile returned, and networks after Dynamo has been imported."""

import copy
import copyreg
import threading

import pytest
import torch
from torch import nn
from torch.fx._symbolic_trace import is_fx_tracing

import vbdl
from vbdl.calling.copies import copied
from vbdl.calling.duplicating import _copies_by_attributes

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler


@torch.compile(backend="eager")
def projected(x, w):
    return (x @ w).tanh()


class Function(nn.Module):
    """The forward calls a compiled function of the module's file."""

    def __init__(self):
        super().__init__()
        self.w, self.drop, self.last = nn.Parameter(torch.randn(6, 8)), nn.Dropout(0.3), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.drop(projected(x, self.w)))


class Method(nn.Module):
    """The network holds a compiled method of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3)
        self.inside = torch.compile(self.encoded, backend="eager")

    def encoded(self, x):
        return self.first(x).tanh()

    def forward(self, x):
        return self.last(self.drop(self.inside(x)))


class Noisy(Function):
    """The same with noise of its own."""

    def forward(self, x):
        h = projected(x, self.w)
        return self.last(h + 0.1 * torch.randn_like(h))


def rows() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 6)


def compiled_for(net: nn.Module) -> nn.Module:
    """The network after it has run with batches of several sizes, for which torch compiles with symbolic shapes."""
    net.eval()
    for n in (5, 3, 4):
        net(torch.randn(n, 6))
    return net


@pytest.mark.parametrize("compile", ["background", True, False])
@pytest.mark.parametrize("kind", [Function, Method])
def test_members_are_those_of_a_loop(kind, compile):
    nets, x = [compiled_for(kind()) for _ in range(3)], rows()
    predict = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile=compile)
    expected = torch.stack([net(x).softmax(-1) for net in nets]).mean(0)
    for _ in range(2):
        torch.testing.assert_close(predict(x).probs, expected, rtol=0.0, atol=1e-6)
        predict.wait()


@pytest.mark.parametrize("method", ["dropout", "mean-field", "stochastic", "laplace"])
@pytest.mark.parametrize("kind", [Function, Method])
def test_draws_are_those_of_the_network_as_it_was_written(kind, method):
    """Draws are functions of the seed, so that the same network without the compiler has the same ones."""
    if method == "stochastic":
        if kind is Method:
            pytest.skip("it has no noise")
        kind = Noisy
    torch.manual_seed(0)
    net, x = compiled_for(kind()), rows()
    plain = copy.deepcopy(net) if kind is not Method else kind().eval()
    if kind is Method:
        plain.load_state_dict(net.state_dict())
        setattr(plain, "inside", plain.encoded)  # noqa: B010
    probs = []
    for network in (net, plain):
        torch.manual_seed(1)
        q = {
            "dropout": vbdl.MCDropout,
            "mean-field": lambda n: vbdl.MeanField(n, n_data=100),
            "stochastic": vbdl.Stochastic,
            "laplace": lambda n: vbdl.Laplace(n, structure="diagonal"),
        }[method](network)
        if method == "laplace":
            vbdl.fit(q, (x, torch.tensor([0, 1, 2, 0, 1])), vbdl.Categorical(), epochs=0)
        with torch.compiler.set_stance("default" if network is net else "force_eager"):
            probs.append(vbdl.Predictor(q, vbdl.Categorical(), 8, compile=False)(x).probs)
    torch.testing.assert_close(*probs, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("kind", [Function, Method])
def test_a_copy_calls_its_own_layers(kind):
    net, x = compiled_for(kind()), rows()
    other = copied(copied(net))
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert bool((net(x) == 0).all()) and not bool((other(x) == 0).any())


def test_functions_of_the_user_are_compiled_afterwards_as_before():
    calls: list[int] = []

    def backend(graph, examples):
        calls.append(1)
        return graph

    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
    compiled(torch.randn(3))
    before = len(calls)
    vbdl.Predictor(vbdl.MCDropout(compiled_for(Function())), vbdl.Categorical(), 8)(rows())
    compiled(torch.randn(3, dtype=torch.float64))
    assert before == 1 and len(calls) == 2


class Waits(nn.Module):
    """The forward waits, while it is traced, for what another thread does."""

    def __init__(self):
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, x):
        self.inside.set()
        self.go_on.wait(60)
        return x + 1


def test_compiled_functions_of_the_user_run_while_another_thread_traces():
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager")
    nets = [Waits(), Waits()]
    threads = [threading.Thread(target=torch.fx.symbolic_trace, args=(net,)) for net in nets]
    for thread in threads:  # the second waits for the first
        thread.start()
    nets[0].inside.wait(60)
    for n in (3, 4):
        compiled(torch.randn(n))
    for net in nets:
        net.go_on.set()
    for thread in threads:
        thread.join()
    assert not is_fx_tracing()
    compiled(torch.randn(5))


def test_copies_stay_fast_once_dynamo_is_imported():
    """Dynamo replaces `nn.Module.__setstate__`, by which such copies know that a class adds nothing to it."""
    compiled_for(Function())
    for kind in (nn.Linear, nn.Conv2d, nn.MultiheadAttention, nn.BatchNorm1d, Function, vbdl.MCDropout):
        assert kind not in copyreg.dispatch_table and _copies_by_attributes(kind)
