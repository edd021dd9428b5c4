"""Every network that a plain loop trains is trained by `fit`: together under `vmap`, or one after the other."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import vbdl

ROWS, FEATURES, CLASSES = 24, 4, 3
LR, STEPS = 0.1, 4


class Network(nn.Module):
    """Two layers; each subclass computes its hidden values in another way."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def hidden(self, x):
        raise NotImplementedError

    def forward(self, x):
        return self.head(self.hidden(x))


class Columns(Network):
    """Joins columns by an operation that vmap has no rule for, as TabM does."""

    def hidden(self, x):
        h = self.body(x)
        return torch.column_stack([h[:, :4].tanh(), h[:, 4:].relu()])


class Checkpointed(Network):
    reentrant = False

    def hidden(self, x):
        return checkpoint(torch.tanh, self.body(x), use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class Cell(Network):
    kind: type[nn.Module] = nn.LSTMCell

    def __init__(self):
        super().__init__()
        self.cell = self.kind(1, 8)

    def hidden(self, x):
        state = None
        for t in range(FEATURES):
            state = self.cell(x[:, t : t + 1], state)
        return state[0] if isinstance(state, tuple) else state


class GatedCell(Cell):
    kind = nn.GRUCell


class CumulativeStatistics(Network):
    """Batch normalization whose statistics are an average over all batches."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8, momentum=None)

    def hidden(self, x):
        return self.norm(self.body(x)).relu()


class Spectral(Network):
    """Multiplies Fourier coefficients by complex weights, as a Fourier neural operator does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FEATURES // 2 + 1, dtype=torch.cfloat))

    def hidden(self, x):
        return self.body(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=FEATURES)).tanh()


class Graph(Network):
    """Sums over the edges of a graph, whose self-loops are removed by a boolean index."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(1, 8)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 0]]))

    def hidden(self, x):
        source, target = self.edges[:, self.edges[0] != self.edges[1]].unbind()
        h = self.body(x.unsqueeze(-1))
        return (h + torch.zeros_like(h).index_add(1, target, h[:, source])).relu().mean(1)


class Experts(Network):
    """Sends each row to one expert, which sees its rows only."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(FEATURES, 8) for _ in range(3))
        self.gate = nn.Linear(FEATURES, 3)

    def hidden(self, x):
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        h = self.body(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            if len(rows):
                h = h.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return h


class Condition(Network):
    """Computes something else where a value is large."""

    def hidden(self, x):
        h = self.body(x)
        return h.relu() if self.body.weight.abs().max() < 10 else h


class Gradient(Network):
    """Computes with the derivative of a network by its inputs."""

    def __init__(self):
        super().__init__()
        self.body, self.energy = nn.Linear(FEATURES, 8), nn.Linear(8, 1)
        self.head = nn.Linear(FEATURES, CLASSES)

    def hidden(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.energy(self.body(x).tanh()).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]


class Packed(Network):
    """A recurrent layer on packed sequences."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(1, 8, batch_first=True)

    def hidden(self, x):
        lengths = (x > -0.5).sum(1).clamp_min(1)
        packed = nn.utils.rnn.pack_padded_sequence(x.unsqueeze(-1), lengths, batch_first=True, enforce_sorted=False)
        return self.recurrent(packed)[1][0]


TRACED = [Columns, Checkpointed, Reentrant, Cell, GatedCell, CumulativeStatistics, Spectral]
UNTRACED = [Graph, Experts, Condition, Gradient, Packed]


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, FEATURES, generator=generator), torch.randint(CLASSES, (ROWS,), generator=generator)


def networks(kind):
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(kind())
    return made


def trained_by_a_loop(network, x, y):
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval()


def fit(q, data, **options):
    likelihood = vbdl.Categorical()
    sgd = lambda ps: torch.optim.SGD(ps, lr=LR)  # noqa: E731
    history = vbdl.fit(q, data, likelihood, epochs=STEPS, batch_size=ROWS, optimizer=sgd, compile=False, **options)
    return likelihood, history


def members_of_a_loop(kind, x, y, q):
    """The members of a loop over plain networks, compared with those of a trained ensemble."""
    plain = [trained_by_a_loop(network, x, y) for network in networks(kind)]
    for number, network in enumerate(plain):
        for name, t in q.member(number).items():
            torch.testing.assert_close(t, network.state_dict()[name], rtol=1e-5, atol=1e-5)
    return plain


@pytest.mark.parametrize("kind", [*TRACED, *UNTRACED])
def test_members_are_trained_as_by_a_loop(kind, data):
    x, y = data
    q = vbdl.DeepEnsemble(networks(kind))
    likelihood, _ = fit(q, data)
    plain = members_of_a_loop(kind, x, y, q)
    samples = vbdl.Predictor(q, likelihood, compile=False)(x, samples=True).samples
    with torch.no_grad():
        expected = torch.stack([network(x) for network in plain])
    torch.testing.assert_close(samples.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-5)


def test_complex_weights_are_trained_by_the_default_optimizer(data):
    q = vbdl.DeepEnsemble(networks(Spectral))
    before = q.stacked()["weight"].detach().clone()
    vbdl.fit(q, data, vbdl.Categorical(), epochs=2, batch_size=8, clip_norm=1.0, compile=False)
    after = q.stacked()["weight"].detach()
    assert after.is_complex() and bool((after != before).all())


@pytest.mark.parametrize("kind", [Columns, Cell, CumulativeStatistics])
def test_training_one_by_one_is_said_in_words(kind, data, caplog):
    with caplog.at_level(logging.INFO, logger="vbdl"):
        _, history = fit(vbdl.DeepEnsemble(networks(kind)), data)
    assert history.one_by_one and "please" not in history.one_by_one and "vmap" not in history.one_by_one
    assert f"one after the other, which is slower than together: {history.one_by_one}" in caplog.text


def test_training_together_says_nothing(data, caplog):
    with caplog.at_level(logging.INFO, logger="vbdl"):
        _, history = fit(vbdl.DeepEnsemble(networks(Checkpointed)), data)
    assert history.one_by_one == "" and "one after the other" not in caplog.text


class Depth(Network):
    """Leaves out its block in training by chance, for each row: stochastic depth, as torchvision and timm write it."""

    per_row = True

    def __init__(self):
        super().__init__()
        self.block, self.drop = nn.Linear(8, 8), nn.Dropout(0.1)

    def hidden(self, x):
        h = self.body(x)
        return self.drop(h + self.kept(self.block(h).relu()))

    def kept(self, branch):
        if not self.training:
            return branch
        noise = branch.new_empty([len(branch) if self.per_row else 1, 1]).bernoulli_(0.5)
        return branch * noise.div_(0.5)


class DepthOfABatch(Depth):
    per_row = False


class LayerDrop(Depth):
    """Leaves out a layer in training, decided by a value, as Hugging Face's speech networks do."""

    def kept(self, branch):
        return branch * 0 if self.training and torch.rand([]) < 0.5 else branch


@pytest.mark.parametrize("kind", [Depth, DepthOfABatch, LayerDrop])
@pytest.mark.parametrize("method", ["MC dropout", "mean-field", "ensemble"])
def test_stochastic_depth_is_on_in_training_and_off_in_prediction(method, kind, data):
    q = {
        "MC dropout": lambda n: vbdl.MCDropout(n[0]),
        "mean-field": lambda n: vbdl.MeanField(n[0], ROWS),
        "ensemble": lambda n: vbdl.DeepEnsemble(n),
    }[method](networks(kind))
    likelihood, _ = fit(q, data)
    n_samples = None if method == "ensemble" else 2
    samples, again = (
        vbdl.Predictor(q, likelihood, n_samples, compile=False)(data[0], samples=True).samples for _ in range(2)
    )
    assert torch.equal(samples, again)
    if method == "ensemble":
        for number, network in enumerate(networks(kind)):
            network.load_state_dict(q.member(number))
            with torch.no_grad():
                torch.testing.assert_close(samples[number], network.eval()(data[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        vbdl.MCDropout,
        lambda n: vbdl.MeanField(n, ROWS),
        lambda n: vbdl.DeepEnsemble([n]),
        lambda n: vbdl.Stochastic(n, noisy=[nn.Dropout]),
    ],
    ids=["dropout", "mean-field", "ensemble", "stochastic"],
)
@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda n: torch.compile(n, backend="eager")], ids=["rows", "compiled"]
)
def test_a_wrapped_network_is_the_network_inside(wrap, method, data):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, CLASSES))
    results = []
    for one in (network, wrap(network), nn.DataParallel(wrap(network))):
        q = method(one)
        likelihood, _ = fit(q, data)
        results.append(vbdl.Predictor(q, likelihood, 1, compile=False)(data[0]).probs)
    assert all(torch.equal(result, results[0]) for result in results)
    assert vbdl.inspect(wrap(network)).type == "Sequential"


def test_a_scripted_network_is_trained():
    net = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    q, x, y = vbdl.DeepEnsemble([net, net]), torch.randn(24, 3), torch.randint(2, (24,))
    before = [p.clone() for p in q.parameters()]
    vbdl.fit(q, (x, y), vbdl.Categorical(), epochs=1, progress=False, compile=False)
    assert all(not torch.equal(a, b) for a, b in zip(before, q.parameters(), strict=True))
