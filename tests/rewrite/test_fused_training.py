"""Training through the kernels' operators, forced on a CPU, where they run their references: the same draws."""

import importlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vbdl
from vbdl.nn import drawn
from vbdl.training.step import Losses, Step

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 6, generator=GENERATOR)
LABELS = torch.randint(0, 3, (24,), generator=GENERATOR)
NAMES = ("sampled_linear", "sampled_linear_input", "sampled_linear_parameters", "sample_weights")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Tied(nn.Module):
    """One parameter in two layers, and looked at from outside a layer."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        hidden = torch.tanh(self.two(torch.tanh(self.one(x)))) @ self.one.weight.T
        return self.last(hidden) * self.last.weight.new_ones(()) + self.last.weight.shape[0]


def network(kind):
    torch.manual_seed(1)
    if kind == "normalized":  # with buffers that a step changes, and dropout
        first = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 8, bias=False)]
        return nn.Sequential(*first, nn.Tanh(), nn.Linear(8, 3))
    if kind == "tokens":
        return nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 8), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    if kind == "convolution":
        return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    if kind == "attention":
        return nn.Sequential(nn.Unflatten(1, (2, 3)), Attention(), nn.Flatten(), nn.Linear(6, 3))
    if kind == "layers":
        return nn.Sequential(
            vbdl.BayesianLinear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), vbdl.BayesianLinear(8, 3)
        )
    return Tied()


# linear layers with drawn weights, and those of them whose input needs a gradient
LAYERS = {
    "normalized": (3, 2), "tokens": (2, 1), "convolution": (1, 1), "attention": (2, 2), "layers": (2, 1), "tied": (3, 2)
}  # fmt: skip


def posterior(kind, **settings):
    q = vbdl.MeanField(network(kind), n_data=24, **settings)
    with torch.no_grad():  # means of their own, so that a mixed-up parameter is seen
        for i, p in enumerate(q.parameters()):
            p.add_(0.01 * torch.sin(torch.arange(p.numel()) + i).view(p.shape))
    return q


@pytest.fixture
def forced(monkeypatch):
    """Training as on an accelerator, and what it called of the operators."""
    called = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "vbdl":
                called.append(func._opname)
            return func(*args, **(kwargs or {}))

    def force():
        monkeypatch.setattr(drawn, "DEVICES", ("cpu",))
        return Log(), called

    return force


def gradients(q, likelihood):
    return {n: p.grad.clone() for n, p in [*q.named_parameters(), *likelihood.named_parameters()] if p.grad is not None}


def close(found, expected):
    assert found.keys() == expected.keys() and len(found) > 0
    for name, gradient in expected.items():
        scale = float(gradient.abs().max()) or 1.0
        # float32, products of other shapes: some roundings of the largest entry
        assert float((found[name] - gradient).abs().max()) <= 2e-5 * scale, name


@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_loss_and_its_gradients(kind, n_samples, forced):
    expected, likelihood = posterior(kind, n_samples=n_samples), vbdl.Categorical()
    loss = expected.loss(X, LABELS, likelihood)
    loss.backward()
    mode, called = forced()
    found = posterior(kind, n_samples=n_samples)
    with mode:
        other = found.loss(X, LABELS, likelihood)
        other.backward()
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-5)
    close(gradients(found, likelihood), gradients(expected, likelihood))
    for a, b in zip(found.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    layers, hidden = LAYERS[kind]
    assert called.count("sampled_linear") == called.count("sampled_linear_parameters") == layers * n_samples
    assert called.count("sampled_linear_input") == hidden * n_samples  # none for the data
    # what is not a linear layer: convolution, normalization and projections of attention, a tied parameter
    others = {"normalized": 2, "convolution": 2, "attention": 2, "tied": 1}.get(kind, 0)
    assert called.count("sample_weights") == called.count("sample_weights_gradient") == others * n_samples


@pytest.mark.parametrize("kind", ["normalized", "convolution"])
def test_the_traced_step(kind, forced, monkeypatch):
    """The step that is compiled: differentiated before mutations are removed, buffers changed all the same."""
    graphs = []
    module = importlib.import_module("vbdl.training.takeover")
    monkeypatch.setattr(module, "compile_graph", lambda graph, inputs, whole: graphs.append(graph) or graph)
    steps = []
    for kernels in (False, True):
        if kernels:
            forced()
        q, likelihood = posterior(kind, n_samples=2), vbdl.Gaussian(n_outputs=3)
        step = Step(Losses(q, likelihood, False), compiled=True)
        losses = [step(X, X[:, :3]) for _ in range(2)]  # the second with the buffers and the draws of the first
        steps.append((losses, gradients(q, likelihood), dict(q.named_buffers())))
    (losses, expected, buffers), (others, found, changed) = steps
    torch.testing.assert_close(others, losses, rtol=1e-5, atol=1e-5)
    close(found, expected)
    for name, value in buffers.items():
        torch.testing.assert_close(changed[name], value, rtol=1e-5, atol=1e-6)
    assert int(changed["steps"]) == 2
    names = lambda graph: [getattr(n.target, "_opname", "") for n in graph.graph.nodes]
    assert "sampled_linear" not in names(graphs[0])
    layers = 6 if kind == "normalized" else 2
    assert names(graphs[1]).count("sampled_linear") == names(graphs[1]).count("sampled_linear_parameters") == layers


def test_fit_with_no_change_in_user_code(forced):
    def trained():
        q, likelihood = posterior("tokens", n_samples=2), vbdl.Categorical()
        history = vbdl.fit(q, (X, LABELS), likelihood, epochs=3, batch_size=10, lr=1e-2, validation=0.25, compile=False)
        return q, history

    expected, history = trained()
    mode, called = forced()
    with mode:
        found, other = trained()
    assert called.count("sampled_linear") == 2 * 2 * 2 * 3  # layers, draws, batches, epochs; none in the validation
    assert other.train_loss == [[pytest.approx(v, rel=1e-5) for v in row] for row in history.train_loss]
    assert other.validation_nll == [[pytest.approx(v, rel=1e-4) for v in row] for row in history.validation_nll]
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_the_kernels_do_not_take_is_as_it_was(forced):
    """Ensembles map over parameters, float64 and forward mode have no kernel: plain operations, the same answers."""
    double = lambda: posterior("tokens").double()
    ensemble = lambda: vbdl.DeepEnsemble([vbdl.MeanField(network("tokens"), n_data=24) for _ in range(2)])
    for make, x in ((double, X.double()), (ensemble, X)):
        expected = make().loss(x, LABELS, vbdl.Categorical())
        mode, called = forced()
        with mode:
            found = make().loss(x, LABELS, vbdl.Categorical())
            found.backward()
        torch.testing.assert_close(found, expected)
        assert called and not set(called) & set(NAMES)
    q = posterior("tokens")
    tangents = tuple(torch.ones_like(t) for t in (X,))
    torch.func.jvp(lambda x: q.module(x), (X,), tangents)


def test_autocast(forced):
    expected = posterior("normalized").loss(X, LABELS, vbdl.Categorical())
    mode, called = forced()
    q = posterior("normalized")
    with mode, torch.autocast("cpu", torch.bfloat16):
        found = q.loss(X, LABELS, vbdl.Categorical())
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)  # three layers in bfloat16
    assert called.count("sampled_linear") == 3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in q.parameters())


def test_nothing_that_grows_with_the_draws_is_kept_for_the_backward_pass(forced):
    """Not the noise, not the weights, not the stds: a draw adds its activations."""

    def kept(n_samples):
        torch.manual_seed(0)
        q = vbdl.MeanField(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), 24, n_samples=n_samples)
        x, y = torch.randn(4, 64), torch.randint(0, 64, (4,))
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            keeping.append(tensor)
            return tensor

        keeping = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = q.loss(x, y, vbdl.Categorical())
        loss.backward()
        return sum(sizes.values())

    weights = 64 * 64 * 4
    assert kept(9) - kept(1) > 8 * weights  # in plain operations the noise of every draw is
    forced()
    assert kept(9) - kept(1) < 8 * weights / 4
