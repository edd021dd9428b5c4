"""Outputs drawn in place of weights of Gaussian posteriors: the exact distribution of every row."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from vbdl import Categorical, Gaussian, Predictor
from vbdl.calling.inputs import flatten
from vbdl.engine.moments import MomentExecution
from vbdl.model import Model
from vbdl.nn.gaussian import Dense, Diagonal, Factor, GaussianNetwork, Kronecker, LowRank
from vbdl.nn.objective import KeyedPosterior
from vbdl.posteriors.ensemble import DeepEnsemble

DRAWS = 4000
OUTPUTS = "layers draw their outputs, not their weights"


class Normals(KeyedPosterior):
    """The posterior of a GaussianNetwork."""

    def __init__(self, network: GaussianNetwork):
        super().__init__()
        self.module, self.seed = network, 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def fill(factor: Factor) -> Factor:
    """Curvatures far from those of the identity."""
    generator = torch.Generator().manual_seed(1)
    for name, t in factor.named_buffers():
        if "vectors" in name:
            t.copy_(torch.linalg.qr(torch.randn(t.shape, generator=generator)).Q)
        elif "precision" not in name:
            t.copy_(torch.rand(t.shape, generator=generator) * 3 + 0.1)
    if hasattr(factor, "prior_precision"):
        factor.prior_precision.fill_(0.5)
    return factor


def of(net: nn.Module, *prefixes: str) -> dict[str, torch.Tensor]:
    return {n: p for n, p in net.named_parameters() if n.startswith(prefixes)}


def two_layers(inputs: int = 6, outputs: int = 2, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, inputs), nn.Tanh(), nn.Linear(inputs, outputs, bias=bias)).eval()


def head(make=Kronecker, linearized=False, bias=True, **sizes) -> Normals:
    net = two_layers(bias=bias, **sizes)
    return Normals(GaussianNetwork(net, [fill(make(of(net, "2")))], linearized)).eval()


def everything(make=Kronecker, linearized=True) -> Normals:
    net = two_layers()
    return Normals(GaussianNetwork(net, [fill(make(of(net, "0"))), fill(make(of(net, "2")))], linearized)).eval()


def drawn(q, x, n=DRAWS, **settings):
    """(samples, rows, outputs) means of the draws in float64, and the plan in words."""
    outputs = q.module(x[:1]).shape[-1] if q.n_members == 1 else 2
    predict = Predictor(q, Gaussian(outputs), **{"n_samples": n, "tiles": (64,), "compile": False, **settings})
    return predict(x, samples=True).samples[..., 0].double(), predict.explain()


def closed_form(q, x):
    """The mean (rows, outputs) and covariance (rows, outputs, outputs) of the network linear in all that is drawn."""
    network = q.module.double()
    means = {n: network.mean(n).detach() for n in network.chosen}
    jacobian = jacrev(lambda w: functional_call(network.inner, w, (x.double(),)))(means)
    covariance = 0.0
    for factor in network.factors:
        # C by a basis of directions: J U diag(1 / P) U^T J^T
        j = torch.cat([jacobian[n].flatten(2) for n in factor.names], -1)
        covariance = covariance + j @ dense_of(factor) @ j.mT
    mean = network.inner(x.double()).detach()
    q.float()
    return mean, covariance.detach()


def dense_of(factor) -> torch.Tensor:
    """The covariance of the flattened parameters of a factor, built densely."""
    if isinstance(factor, Kronecker):
        u = torch.kron(factor.output_vectors.contiguous(), factor.input_vectors.contiguous())
        full = u @ torch.diag(1 / factor.precision().flatten()) @ u.mT
        index = torch.arange(len(full)).view(factor.precision().shape)
        order = index.flatten() if len(factor.names) == 1 else torch.cat([index[:, :-1].flatten(), index[:, -1]])
        return full[order][:, order]
    if isinstance(factor, Dense):
        return factor.vectors @ torch.diag(1 / factor.precision()) @ factor.vectors.mT
    if isinstance(factor, Diagonal):
        return torch.diag(torch.cat([factor.std(n).square().flatten() for n in factor.names]))
    parts = [factor._parts(n) for n in factor.names]
    d = torch.cat([directions for _, directions in parts], 1)
    return torch.diag(torch.cat([std.flatten() for std, _ in parts]).square()) + d.mT @ d


def rank3(parameters):
    return LowRank(parameters, 3)


CASES = {
    "Kronecker head": (lambda: head(), "1 Kronecker-factored"),
    "Kronecker head without bias": (lambda: head(bias=False), "1 Kronecker-factored"),
    "linearized Kronecker head": (lambda: head(linearized=True), "1 Kronecker-factored"),
    "linearized Kronecker network": (lambda: everything(), "1 Kronecker-factored"),
    "diagonal head": (lambda: head(Diagonal), "1 mean-field"),
    "linearized diagonal head": (lambda: head(Diagonal, True), "1 mean-field"),
    "linearized diagonal network": (lambda: everything(Diagonal), "2 mean-field"),
    "dense head": (lambda: head(Dense), None),
    "linearized dense network": (lambda: everything(Dense), None),
    "low-rank head": (lambda: head(rank3), None),
    "linearized low-rank network": (lambda: everything(rank3), None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_has_the_mean_and_covariance_of_the_closed_form(name):
    """And so it has with drawn weights; z-tests at 5 standard errors of normal draws."""
    make, said = CASES[name]
    q, x = make(), torch.randn(5, 3)
    mean, covariance = closed_form(q, x)
    variance = covariance.diagonal(dim1=1, dim2=2)
    error = ((variance[:, :, None] * variance[:, None] + covariance.square()) / DRAWS).sqrt()
    for joint in (False, True):
        found, plan = drawn(q, x, joint=joint)
        assert (OUTPUTS in plan) == (said is not None and not joint)
        assert joint or said is None or said in plan
        assert float(((found.mean(0) - mean) / (variance / DRAWS).sqrt()).abs().max()) < 5
        centered = found - mean
        second = torch.einsum("sri,srj->rij", centered, centered) / DRAWS
        assert float(((second - covariance) / error).abs().max()) < 5


HEADS = [name for name in CASES if "head" in name]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_moments_of_a_last_layer_are_those_of_the_closed_form(name, compile):
    """And the predictive is that of the normal outputs with their covariance, by an integral."""
    q, x = CASES[name][0](), torch.randn(5, 3)
    mean, covariance = closed_form(q, x)
    predict = Predictor(q, Categorical(), 32, tiles=(64,), compile=compile, estimator="moments")
    execution = MomentExecution(Model(q, Categorical()), flatten(x), predict.settings, 32)
    found = execution.moments(flatten(x))
    torch.testing.assert_close(found[0].double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), covariance.diagonal(dim1=1, dim2=2), rtol=1e-5, atol=1e-5)
    joint = "diagonal" not in name  # its outputs are independent
    assert ("covariance of a row's outputs" in predict.explain(x)) == joint
    # of two classes: the integral of a logistic function over the normal difference of the logits
    difference = mean[:, 0] - mean[:, 1]
    std = (covariance * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).sum((1, 2)).sqrt()
    nodes, weights = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(64))
    expected = (torch.sigmoid(difference + std * nodes[:, None]) * weights[:, None]).sum(0) / weights.sum()
    # the error of 256 quasi-random points; independent outputs would be off by 0.003 to 0.04
    torch.testing.assert_close(predict(x).probs[:, 0].double(), expected, rtol=0, atol=2e-3)


def test_rows_are_drawn_jointly_if_asked():
    """Rows of orthogonal features: with drawn weights they are independent, with drawn outputs they are not."""
    net = nn.Linear(8, 2, bias=False)
    factor = Kronecker(of(net, "weight"))
    q, x = Normals(GaussianNetwork(net, [factor])).eval(), torch.eye(8)[:2]
    correlation = lambda s: float(s[:, :, 0].T.corrcoef()[0, 1])
    assert correlation(drawn(q, x)[0]) > 0.99
    assert abs(correlation(drawn(q, x, joint=True)[0])) < 5 / DRAWS**0.5


@pytest.mark.parametrize("inputs, outputs, said", [(64, 10, True), (256, 100, True), (512, 10, False), (10, 64, False)])
def test_the_shape_of_the_layer_decides(inputs, outputs, said):
    """And the number of draws does not: 3 draws are the first 3 of 7."""
    q, x = head(inputs=inputs, outputs=outputs), torch.randn(4, 3)
    few, plan = drawn(q, x, 3)
    many, _ = drawn(q, x, 7)
    assert (OUTPUTS in plan) == said and ("layers draw weights, which take fewer operations" in plan) == (not said)
    torch.testing.assert_close(few, many[:3], rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    """One layer that is called twice: its two outputs are dependent."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x) + self.head(x.square())


class Sequence(nn.Module):
    """One layer on two vectors of a row: their outputs are dependent."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x.unflatten(0, (-1, 1)).repeat(1, 2, 1)).sum(1)


class Whole(nn.Module):
    """A bias that is used without its weight too."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x) * self.head.bias


@pytest.mark.parametrize("make", [Twice, Sequence, Whole])
@pytest.mark.parametrize("linearized", [False, True])
def test_weights_that_are_used_more_than_once_are_drawn(make, linearized):
    net = make().eval()
    q = Normals(GaussianNetwork(net, [fill(Kronecker(of(net, "head")))], linearized)).eval()
    x = torch.randn(4, 3)
    found, plan = drawn(q, x, 7)
    assert OUTPUTS not in plan
    torch.testing.assert_close(found, drawn(q, x, 7, joint=True)[0])


@pytest.mark.parametrize("make", [Kronecker, Diagonal, Dense, rank3])
@pytest.mark.parametrize("linearized", [False, True])
def test_an_ensemble_of_them_draws_each_member_by_its_own_factor(make, linearized):
    members = []
    for scale in (1.0, 3.0):
        member = head(make, linearized)
        for factor in member.module.factors:
            for name, t in factor.named_buffers():
                t.mul_(1.0 if "vectors" in name else scale)
        with torch.no_grad():
            member.module.inner[2].weight.mul_(scale)
        members.append(member)
    q, x = DeepEnsemble(members), torch.randn(5, 3)
    found, plan = drawn(q, x, 6)
    for m, member in enumerate(members):
        alone, _ = drawn(member, x, 6, joint=True)
        torch.testing.assert_close(found[m::2], alone[m::2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Kronecker head", "linearized dense network"])
def test_compiled_draws_are_those_of_plain_operations(name):
    q, x = CASES[name][0](), torch.randn(5, 3)
    torch.testing.assert_close(drawn(q, x, 7, compile=True)[0], drawn(q, x, 7)[0], rtol=1e-5, atol=1e-5)
