"""Factors of a covariance: draws have it, its determinant and diagonal are right, and a network is drawn by them."""

import contextlib
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from vbdl_kernels import make_key

from vbdl.calling.copies import holding
from vbdl.calling.each import call_each
from vbdl.calling.stacking import call_stacked
from vbdl.calling.traversing import state_of
from vbdl.compiling.graph import trace
from vbdl.compiling.rewrite.linear import WholeLinears
from vbdl.nn.gaussian import Dense, Diagonal, Factor, GaussianNetwork, Kronecker, LowRank

DRAWS = 20_000


def spd(n: int, generator: torch.Generator) -> torch.Tensor:
    a = torch.randn(n, n + 2, generator=generator, dtype=torch.float64)
    return a @ a.mT / n


def parameters(module: nn.Module, *names: str) -> dict[str, torch.Tensor]:
    own = dict(module.named_parameters())
    return {n: own[n] for n in names or own}


def eigh(matrix: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor) -> None:
    found = torch.linalg.eigh(matrix)
    values.copy_(found.eigenvalues)
    vectors.copy_(found.eigenvectors)


def diagonal(module=None):
    """A factor with any curvature, and its covariance over the flattened parameters, built densely."""
    module = module or nn.Linear(3, 2).double()
    factor, generator = Diagonal(parameters(module)), torch.Generator().manual_seed(0)
    for name in factor.names:
        factor.curvature(name).copy_(torch.rand(factor.shapes[name], generator=generator) * 3)
    factor.prior_precision.fill_(0.5)
    flat = torch.cat([factor.curvature(n).flatten() for n in factor.names])
    return factor, torch.diag(1 / (flat + 0.5)).double()


def low_rank(module=None, rank=3):
    module = module or nn.Linear(3, 2).double()
    factor, generator = LowRank(parameters(module), rank), torch.Generator().manual_seed(0)
    for name in factor.names:
        factor.std(name).copy_(torch.rand(factor.shapes[name], generator=generator) + 0.1)
        factor.deviations(name).copy_(torch.randn(rank, *factor.shapes[name], generator=generator))
    std = torch.cat([factor.std(n).flatten() for n in factor.names]).double()
    d = torch.cat([factor.deviations(n).flatten(1) for n in factor.names], 1).double()
    return factor, torch.diag(std.square()) / 2 + d.mT @ d / (2 * (rank - 1))


def kronecker(module=None, bias=True):
    module = module or nn.Linear(3, 2, bias=bias).double()
    factor, generator = Kronecker(parameters(module)), torch.Generator().manual_seed(0)
    g, a = (spd(len(v), generator) for v in (factor.output_values, factor.input_values))
    eigh(g, factor.output_values, factor.output_vectors)
    eigh(a, factor.input_values, factor.input_vectors)
    factor.prior_precision.fill_(0.7)
    outputs, inputs = len(g), len(a)
    covariance = torch.linalg.inv(torch.kron(g, a) + 0.7 * torch.eye(outputs * inputs, dtype=torch.float64))
    index = torch.arange(outputs * inputs).view(outputs, inputs)
    order = index.flatten() if len(factor.names) == 1 else torch.cat([index[:, :-1].flatten(), index[:, -1]])
    return factor, covariance[order][:, order]


def dense(module=None):
    module = module or nn.Linear(3, 2).double()
    factor, generator = Dense(parameters(module)), torch.Generator().manual_seed(0)
    h = spd(factor.size, generator)
    eigh(h, factor.values, factor.vectors)
    factor.prior_precision.fill_(0.3)
    return factor, torch.linalg.inv(h + 0.3 * torch.eye(factor.size, dtype=torch.float64))


FACTORS = {
    "diagonal": diagonal,
    "low rank": low_rank,
    "kronecker": kronecker,
    "kronecker without bias": lambda: kronecker(bias=False),
    "kronecker of a convolution": lambda: kronecker(nn.Conv2d(2, 3, (2, 1)).double()),
    "dense": dense,
    "dense of a convolution": lambda: dense(nn.Conv1d(2, 2, 2).double()),
}


def flat(values: dict[str, torch.Tensor], factor: Factor, leading: int = 0) -> torch.Tensor:
    return torch.cat([values[n].flatten(leading) for n in factor.names], -1)


def drawn(factor: Factor, count: int, layer: int = 5) -> torch.Tensor:
    """(count, weights) draws of w - mean, flattened."""
    keys = make_key(3, range(count))
    mapped = torch.vmap(lambda key: factor.deviation(key, layer))(keys)
    return flat(mapped, factor, 1)


@pytest.mark.parametrize("name", FACTORS)
def test_draws_have_the_covariance(name):
    """Means and all second moments, z-tests at 5 standard errors of normal draws."""
    factor, covariance = FACTORS[name]()
    draws = drawn(factor, DRAWS)
    variance = covariance.diagonal()
    assert float((draws.mean(0) / (variance / DRAWS).sqrt()).abs().max()) < 5
    found = draws.mT @ draws / DRAWS
    error = ((variance[:, None] * variance + covariance.square()) / DRAWS).sqrt()
    assert float(((found - covariance) / error).abs().max()) < 5


@pytest.mark.parametrize("name", FACTORS)
def test_determinant_and_variances_are_those_of_the_covariance(name):
    factor, covariance = FACTORS[name]()
    torch.testing.assert_close(factor.log_det(), torch.logdet(covariance))
    torch.testing.assert_close(flat(factor.variances(), factor), covariance.diagonal())
    assert {n: v.shape for n, v in factor.variances().items()} == factor.shapes


@pytest.mark.parametrize("name", FACTORS)
def test_a_draw_is_a_function_of_key_and_layer(name):
    factor, _ = FACTORS[name]()
    one = lambda draw, layer: flat(factor.deviation(make_key(0, [draw])[0], layer), factor)
    assert torch.equal(one(1, 5), one(1, 5))
    assert not torch.equal(one(1, 5), one(2, 5))
    apart = one(1, 5 + factor.layers)  # the next factor: none of its noise is this one's
    assert not torch.isin(apart.float(), one(1, 5).float()).any()
    assert {n: d.shape for n, d in factor.deviation(make_key(0, [1])[0], 5).items()} == factor.shapes


@pytest.mark.parametrize("name", FACTORS)
def test_mapped_draws_of_one_or_many_factors_are_those_of_a_loop(name):
    """Draws mapped alone, with factors of members, and members within draws."""
    factor, _ = FACTORS[name]()
    keys = make_key(1, range(3))
    loop = torch.stack([flat(factor.deviation(k, 5), factor) for k in keys])
    torch.testing.assert_close(drawn_with(factor, {}, keys), loop, rtol=1e-12, atol=1e-12)
    state = state_of(factor)
    other = {n: t * 1.5 for n, t in state.items()}
    second = holding(factor, other)
    loop = torch.stack([flat(f.deviation(k, 5), factor) for f, k in zip((factor, second), keys[:2], strict=True)])
    stacked = {n: torch.stack([t, other[n]]) for n, t in state.items()}
    torch.testing.assert_close(drawn_with(factor, stacked, keys[:2]), loop, rtol=1e-12, atol=1e-12)
    some = {n: t for n, t in stacked.items() if "vectors" in n or "std" in n}
    each = [holding(factor, {n: t[i] for n, t in some.items()}) for i in range(2)]
    loop = torch.stack([torch.stack([flat(f.deviation(k, 5), factor) for k in keys]) for f in each])
    inside = lambda s: torch.vmap(lambda k: flat(functional_call(_Deviation(factor), prefixed(s), (k,)), factor))(keys)
    torch.testing.assert_close(torch.vmap(inside)(some) if some else loop, loop, rtol=1e-12, atol=1e-12)


class _Deviation(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, key):
        return self.factor.deviation(key, 5)


def prefixed(state):
    return {f"factor.{n}": t for n, t in state.items()}


def drawn_with(factor, stacked, keys):
    one = lambda state, key: flat(functional_call(_Deviation(factor), prefixed(state), (key,)), factor)
    return torch.vmap(one)(stacked, keys) if stacked else torch.vmap(lambda k: one({}, k))(keys)


@pytest.mark.parametrize("make", [Diagonal, LowRank, Dense])
def test_the_padding_row_of_a_table_is_never_drawn(make):
    table = nn.Embedding(4, 3, padding_idx=-2).double()
    extra = {"rank": 3} if make is LowRank else {}
    factor = make(parameters(table), padding={"weight": 2}, **extra)
    if isinstance(factor, LowRank):
        factor.std("weight").fill_(0.3)
        factor.deviations("weight").normal_()
    deviation = factor.deviation(make_key(0, [1])[0], 0)["weight"]
    assert torch.equal(deviation[2], torch.zeros(3)) and bool((deviation[[0, 1, 3]] != 0).all())
    variances = factor.variances()["weight"]
    assert torch.equal(variances[2], torch.zeros(3)) and bool((variances[[0, 1, 3]] > 0).all())
    assert math.isfinite(factor.log_det())
    if not isinstance(factor, LowRank):
        assert float(factor.log_det()) == 0.0  # nine variances of 1


def test_a_prior_can_be_changed_later():
    for make in (diagonal, kronecker, dense):
        factor, covariance = make()
        before = float(factor.prior_precision)
        factor.prior_precision.fill_(2.0)
        changed = torch.linalg.inv(torch.linalg.inv(covariance) + (2.0 - before) * torch.eye(len(covariance)))
        torch.testing.assert_close(flat(factor.variances(), factor), changed.diagonal())
        torch.testing.assert_close(factor.log_det(), torch.logdet(changed))


class Net(nn.Module):
    """A network of all kinds of layers, with outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.body, self.head = (
            nn.Conv1d(2, 3, 2),
            nn.LayerNorm(9),
            nn.Linear(9, 5),
            nn.Linear(5, 2),
        )

    def forward(self, x):
        hidden = torch.tanh(self.body(self.norm(self.conv(x).flatten(1))))
        return {"logits": self.head(hidden), "class": hidden.argmax(1), "name": "net"}


def network(linearized: bool, only_head: bool = False) -> GaussianNetwork:
    torch.manual_seed(0)
    net = Net().double()
    head, _ = kronecker(net.head)
    head = Kronecker({f"head.{n}": p for n, p in net.head.named_parameters()})
    head.load_state_dict(kronecker(net.head)[0].state_dict())
    factors: list[Factor] = [head]
    if not only_head:
        factors += [
            Kronecker(parameters(net, "conv.weight", "conv.bias")),
            Diagonal(parameters(net, "norm.weight", "norm.bias", "body.bias")),
            Dense(parameters(net, "body.weight")),
        ]
    return GaussianNetwork(net, factors, linearized).eval()


def test_a_network_is_its_inner_one_at_the_drawn_weights():
    q, x = network(False), torch.randn(4, 2, 4).double()
    outputs = []
    for s in range(2):
        q.key.copy_(make_key(0, [s])[0])
        found = q(x)
        expected = functional_call(q.inner, q.weights(), (x,))
        assert torch.equal(found["logits"], expected["logits"]) and found["name"] == "net"
        outputs.append(found["logits"])
    assert set(q.chosen) == {n for n, _ in q.inner.named_parameters()}
    assert not torch.equal(*outputs)


def test_a_linearized_network_is_its_taylor_expansion():
    """Against the whole Jacobian, by reverse mode."""
    q, x = network(True), torch.randn(4, 2, 4).double()
    q.key.copy_(make_key(0, [3])[0])
    means = {n: q.mean(n).detach() for n in q.chosen}
    jacobian = jacrev(lambda w: functional_call(q.inner, w, (x,))["logits"])(means)
    shift = sum((jacobian[n].flatten(2) @ d.flatten()) for n, d in q.deviations().items())
    found = q(x)
    torch.testing.assert_close(found["logits"], q.inner(x)["logits"] + shift)
    assert torch.equal(found["class"], q.inner(x)["class"]) and found["name"] == "net"


def test_the_last_layer_is_linear_already():
    linear, plain, x = network(True, only_head=True), network(False, only_head=True), torch.randn(4, 2, 4).double()
    for q in (linear, plain):
        q.key.copy_(make_key(0, [3])[0])
    torch.testing.assert_close(linear(x)["logits"], plain(x)["logits"])


@pytest.mark.parametrize("linearized", [False, True])
def test_stacked_draws_are_those_of_a_loop_and_can_be_traced(linearized):
    q, x = network(linearized), torch.randn(4, 2, 4).double()
    inner, q.inner.forward = q.inner.forward, lambda x: inner(x)["logits"]
    keys = {"key": make_key(0, range(3))}
    shared = {n: t for n, t in state_of(q).items() if n != "key"}
    with torch.no_grad():
        loop = call_each(q, keys, shared, x)
        torch.testing.assert_close(call_stacked(q, keys, shared, x), loop)
        for layers in (contextlib.nullcontext(), WholeLinears()):
            with layers:
                graph = trace(lambda k, x: call_stacked(q, {"key": k}, shared, x), keys["key"], x, aligned=False)
            torch.testing.assert_close(graph(make_key(0, range(3)), x), loop)
            other = graph(make_key(9, range(3)), 2 * x)
            torch.testing.assert_close(other, call_each(q, {"key": make_key(9, range(3))}, shared, 2 * x))


def test_threads_may_linearize_at_once():
    """torch's own jvp loses its level when another thread leaves one."""
    x = torch.randn(4, 2, 4).double()
    networks = [network(True) for _ in range(4)]
    expected = networks[0](x)["logits"]
    with ThreadPoolExecutor(4) as pool:
        each = pool.map(lambda q: [q(x)["logits"] for _ in range(30)], networks)
        assert all(torch.equal(found, expected) for outputs in each for found in outputs)


def test_kept_draws_are_used_again():
    for linearized in (False, True):
        q, x = network(linearized), torch.randn(4, 2, 4).double()
        q.kept = {}
        first = q(x)["logits"]
        q.key.copy_(make_key(0, [7])[0])
        assert torch.equal(q(x)["logits"], first)
        q.kept = None
        assert not torch.equal(q(x)["logits"], first)


def test_factors_that_do_not_fit_are_refused():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    own = dict(net.named_parameters())
    for make, message in (
        (lambda: Diagonal({}), "at least one parameter"),
        (lambda: Dense({"a": own["0.weight"], "b": own["0.weight"].double()}), "one dtype and device"),
        (lambda: Kronecker({"0.bias": own["0.bias"]}), "draws a weight"),
        (lambda: Kronecker({"a": nn.ConvTranspose1d(3, 2, 2).weight, "b": own["0.bias"]}), "draws a weight"),
        (lambda: LowRank(own, 1), "rank of at least 2"),
        (lambda: GaussianNetwork(net, []), "has no factor"),
        (lambda: GaussianNetwork(net, [Diagonal({"head": own["0.bias"]})]), "no parameter of the network"),
        (lambda: GaussianNetwork(net, [Diagonal({"0.bias": own["0.weight"]})]), "make the factor from"),
        (lambda: GaussianNetwork(net, [Diagonal(own), Kronecker({"0.weight": own["0.weight"]})]), "two factors"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
