"""The Laplace approximation against closed forms, quadrature and laplace-torch, and what it refuses."""

import copy
import importlib.util
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from torch import nn
from torch.func import functional_call, jacrev

import vbdl
from vbdl.likelihoods.bernoulli import Bernoulli
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.nn.gaussian import Dense, Kronecker
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.laplace import Laplace

SETTINGS = {"compile": False, "tiles": (64,)}


def fit(q, rows, likelihood, **options):
    return vbdl.fit(q, rows, likelihood, **{"epochs": 0, "batch_size": 32, "progress": False, **options})


def covariance(q: Laplace) -> torch.Tensor:
    """C over all drawn parameters, flattened in the order of the network."""
    names = [n for n, _ in q.module.inner.named_parameters() if n in q.module.chosen]
    places, count = {}, 0
    for n in names:
        places[n] = torch.arange(count, count + q.module.mean(n).numel())
        count += len(places[n])
    c = torch.zeros(count, count, dtype=q.module.mean(names[0]).dtype)
    for factor in q.module.factors:
        at = torch.cat([places[n] for n in factor.names])
        if isinstance(factor, Kronecker):
            vectors = torch.kron(factor.output_vectors, factor.input_vectors)
            block = vectors @ (1 / factor.precision()).flatten().diag() @ vectors.mT
            shape = factor.shapes[factor.names[0]]
            joint = torch.arange(len(at)).view(shape[0], -1)
            order = torch.cat([joint[:, : shape[1:].numel()].flatten(), joint[:, shape[1:].numel() :].flatten()])
            block = block[order][:, order]
        elif isinstance(factor, Dense):
            block = factor.vectors @ (1 / factor.precision()).diag() @ factor.vectors.mT
        else:
            block = torch.cat([v.flatten() for v in factor.variances().values()]).diag()
        c[at[:, None], at] = block
    return c


def output_covariance(q: Laplace, x: torch.Tensor) -> torch.Tensor:
    """J C J^T of each row, (rows, outputs, outputs)."""
    inner, means = q.module.inner, {n: q.module.mean(n).detach() for n in q.module.chosen}
    names = [n for n, _ in inner.named_parameters() if n in q.module.chosen]
    one = lambda ps, row: functional_call(inner, ps, (row.unsqueeze(0),)).squeeze(0)
    rows = [jacrev(one)(means, row) for row in x]
    j = torch.stack([torch.cat([row[n].flatten(1) for n in names], 1) for row in rows])
    return j @ covariance(q) @ j.mT


# -- Bayesian linear regression: everything is known

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
PHI = torch.cat([X, torch.ones(40, 1, dtype=torch.float64)], 1)
NOISE = torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
Y = (X @ torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64) + 0.3 + 0.4 * NOISE)[:, None]


def exact_evidence(precision: float, std: float) -> float:
    c = std**2 * np.eye(40) + PHI.numpy() @ PHI.numpy().T / precision
    return float(multivariate_normal(np.zeros(40), c).logpdf(Y[:, 0].numpy()))


def exact_posterior(precision: float, std: float) -> tuple[torch.Tensor, torch.Tensor]:
    c = torch.linalg.inv(PHI.mT @ PHI / std**2 + precision * torch.eye(4).double())
    return c @ PHI.mT @ Y[:, 0] / std**2, c


def at_map(precision: float, std: float) -> nn.Module:
    net = nn.Linear(3, 1).double()
    mean, _ = exact_posterior(precision, std)
    with torch.no_grad():
        net.weight.copy_(mean[None, :3])
        net.bias.copy_(mean[3:])
    return net


@pytest.mark.parametrize("structure", ["full", "kronecker"])  # with one output they are the same
@pytest.mark.parametrize("linearized", [True, False])
def test_linear_regression_is_exact(structure, linearized):
    precision, std = 2.0, 0.35
    q = Laplace(at_map(precision, std), structure=structure, prior_precision=precision, linearized=linearized)
    likelihood = Gaussian(std=std, learned=False).double()
    fit(q, (X, Y), likelihood)
    mean, c = exact_posterior(precision, std)
    torch.testing.assert_close(covariance(q), c, rtol=1e-6, atol=1e-9)
    assert q.log_evidence() == pytest.approx(exact_evidence(precision, std), abs=1e-6)
    assert q.prior_precision == precision
    at = torch.randn(5, 3, dtype=torch.float64)
    p = vbdl.Predictor(q, likelihood, n_samples=4096, **SETTINGS)(at)
    phi = torch.cat([at, torch.ones(5, 1, dtype=torch.float64)], 1)
    epistemic = torch.einsum("ni,ij,nj->n", phi, c, phi)
    # 4096 draws: means within five standard errors, variances within five times sqrt(2 / 4096) of themselves
    assert bool(((p.mean[:, 0] - phi @ mean).abs() < 5 * (epistemic / 4096).sqrt()).all())
    torch.testing.assert_close(p.epistemic[:, 0], epistemic, rtol=5 * math.sqrt(2 / 4096), atol=0)
    torch.testing.assert_close(p.aleatoric, torch.full_like(p.aleatoric, std**2), rtol=1e-6, atol=0)


def test_the_evidence_is_largest_where_the_closed_form_says():
    """At the weights of the best precision, for a known noise and for the best noise.

    scipy finds the best of the exact evidence to 1e-4 in the log; the weights at it make the slopes agree.
    """
    std = 0.35
    best = minimize(lambda z: -exact_evidence(math.exp(z[0]), std), [0.0], tol=1e-10)
    q = Laplace(at_map(math.exp(best.x[0]), std), structure="full")
    fit(q, (X, Y), Gaussian(std=std, learned=False).double())
    assert math.log(q.prior_precision) == pytest.approx(best.x[0], abs=1e-3)
    assert q.log_evidence() == pytest.approx(-best.fun, abs=1e-5)

    both = minimize(lambda z: -exact_evidence(math.exp(z[0]), math.exp(z[1])), [0.0, 0.0], tol=1e-10)
    q, likelihood = Laplace(at_map(*np.exp(both.x)), structure="full"), Gaussian().double()
    fit(q, (X, Y), likelihood)
    assert math.log(q.prior_precision) == pytest.approx(both.x[0], abs=1e-3)
    assert math.log(float(likelihood.noise_std)) == pytest.approx(both.x[1], abs=1e-3)
    assert q.log_evidence() == pytest.approx(-both.fun, abs=1e-5)
    _, c = exact_posterior(q.prior_precision, float(likelihood.noise_std))
    torch.testing.assert_close(covariance(q), c, rtol=1e-6, atol=1e-9)


def test_a_given_precision_gets_the_noise_of_the_largest_evidence():
    precision = 3.0
    best = minimize(lambda z: -exact_evidence(precision, math.exp(z[0])), [0.0], tol=1e-10)
    q = Laplace(at_map(precision, math.exp(best.x[0])), structure="full", prior_precision=precision)
    likelihood = Gaussian().double()
    fit(q, (X, Y), likelihood)
    assert math.log(float(likelihood.noise_std)) == pytest.approx(best.x[0], abs=1e-3)
    assert q.log_evidence() == pytest.approx(-best.fun, abs=1e-5)


def test_several_outputs_learn_their_own_noise():
    """Residuals of 0.1 and 10: one factor for both would leave their ratio at 1."""
    y = torch.cat([Y, 100 * Y], 1)
    net = nn.Linear(3, 2).double()
    mean, _ = exact_posterior(1e-6, 0.4)
    with torch.no_grad():
        net.weight.copy_(torch.stack([mean[:3], 100 * mean[:3]]))
        net.bias.copy_(torch.stack([mean[3], 100 * mean[3]]))
    likelihood = Gaussian(n_outputs=2).double()
    fit(Laplace(net), (X, y), likelihood)
    first, second = likelihood.noise_std.tolist()
    assert second / first == pytest.approx(100, rel=1e-6) and 0.2 < first < 0.6


def test_diagonal_is_full_for_orthogonal_inputs():
    phi, _ = torch.linalg.qr(PHI)
    x = 3 * phi
    net = nn.Linear(4, 1, bias=False).double()
    likelihood = Gaussian(std=0.3, learned=False).double()
    found = []
    for structure in ("diagonal", "kronecker", "full"):
        q = Laplace(net, structure=structure)
        fit(q, (x, Y), likelihood)
        found.append((covariance(q), q.log_evidence()))
    for c, evidence in found[1:]:
        torch.testing.assert_close(c, found[0][0], rtol=1e-9, atol=1e-12)
        assert evidence == pytest.approx(found[0][1], abs=1e-9)


# -- logistic regression


def test_logistic_regression_is_near_the_exact_posterior():
    """By quadrature over two weights with 300 rows: probabilities differ by less than 0.01.

    Laplace's error is of the order 1 / rows; the Monte Carlo error of 4096 draws is below 0.005 (five of 0.001).
    """
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(300, 2, generator=generator, dtype=torch.float64)
    w = torch.tensor([1.0, -0.7], dtype=torch.float64)
    y = (torch.rand(300, generator=generator, dtype=torch.float64) < (x @ w).sigmoid()).double()
    precision = 1.0
    log_posterior = lambda v: (
        -(nn.functional.binary_cross_entropy_with_logits(x @ v, y, reduction="sum") + 0.5 * precision * v @ v)
    )
    v = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=100, tolerance_grad=1e-12)
    optimizer.step(lambda: (optimizer.zero_grad(), loss := -log_posterior(v), loss.backward())[1])
    net = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(v[None])
    q = Laplace(net, structure="full", prior_precision=precision)
    fit(q, (x, y), Bernoulli())
    at = torch.tensor([[0.5, 0.5], [3.0, 0.0], [0.0, -4.0], [6.0, 6.0]], dtype=torch.float64)
    grid = torch.linspace(-1.5, 1.5, 121, dtype=torch.float64)
    points = v.detach() + torch.cartesian_prod(grid, grid)
    logs = torch.stack([log_posterior(p) for p in points])
    weights = (logs - logs.max()).exp()
    exact = ((at @ points.mT).sigmoid() * weights).sum(1) / weights.sum()
    p = vbdl.Predictor(q, Bernoulli(), n_samples=4096, **SETTINGS)(at)
    torch.testing.assert_close(p.probs, exact, rtol=0, atol=0.01)
    # the evidence, by the same quadrature
    cell = float(grid[1] - grid[0]) ** 2
    log_prior_constant = 2 * 0.5 * math.log(precision / (2 * math.pi))
    exact_log = float(logs.logsumexp(0)) + math.log(cell) + log_prior_constant
    assert q.log_evidence() == pytest.approx(exact_log, abs=0.05)


# -- a small trained network


def trained(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval()


def moons(rows: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(7))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def mlp(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias))


@pytest.mark.parametrize("structure", ["kronecker", "diagonal", "full"])
@pytest.mark.parametrize("parameters", ["last", "all"])
def test_draws_of_outputs_have_the_covariance_of_the_linearized_network(parameters, structure):
    x, y = moons()
    q = Laplace(trained(mlp(), x, y), parameters=parameters, structure=structure)
    fit(q, (x, y), Categorical())
    expected = output_covariance(q, x[:6])
    samples = vbdl.Predictor(q, Categorical(), n_samples=4096, **SETTINGS)(x[:6], samples=True).samples
    centered = samples - q.module.inner(x[:6]).detach()
    found = torch.einsum("snk,snl->nkl", centered, centered) / 4096
    # a covariance of 4096 normal draws has a standard error of sqrt((c_kk c_ll + c_kl^2) / 4096)
    d = expected.diagonal(dim1=1, dim2=2)
    error = ((d[:, :, None] * d[:, None] + expected.square()) / 4096).sqrt()
    assert bool(((found - expected).abs() < 5 * error).all())


@pytest.mark.parametrize("structure", ["kronecker", "diagonal", "full"])
def test_moments_are_the_exact_gaussian_logits(structure):
    """Probabilities of normal logits with the exact covariance, averaged over 200,000 draws: within 0.003.

    256 fixed points stand for the distribution of the logits; a probability's standard error over the draws is 0.001.
    """
    x, y = moons()
    q = Laplace(trained(mlp(), x, y), structure=structure)
    fit(q, (x, y), Categorical())
    at = x[:6]
    c = output_covariance(q, at)
    noise = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(1))
    logits = q.module.inner(at).detach() + torch.einsum("nkl,sl->snk", torch.linalg.cholesky(c), noise)
    p = vbdl.Predictor(q, Categorical(), estimator="moments", **SETTINGS)(at)
    torch.testing.assert_close(p.probs, logits.softmax(-1).mean(0), rtol=0, atol=0.003)
    assert p.n_samples == 0


def test_the_network_stays_as_it_is():
    x, y = moons()
    net = trained(mlp(), x, y)
    before = copy.deepcopy(net.state_dict())
    q = Laplace(net)
    history = fit(q, (x, y), Categorical())
    for name, t in before.items():
        assert torch.equal(net.state_dict()[name], t) and torch.equal(q.module.inner.state_dict()[name], t)
    assert history.epochs == 0 and history.train_loss == []
    assert not q.training and int(q.module.rows) == 150
    assert q.training_rows is not None and len(q.training_rows) == 150


@pytest.mark.parametrize("loader", [False, True])
def test_batches_make_no_difference(loader):
    x, y = moons()
    net = trained(mlp(), x, y)
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 17) if loader else (x, y)
    one, other = Laplace(net, parameters="all"), Laplace(net, parameters="all")
    fit(one, (x, y), Categorical(), batch_size=150)
    fit(other, rows, Categorical(), batch_size=7)
    assert other.log_evidence() == pytest.approx(one.log_evidence(), rel=1e-4)
    assert len(other.training_rows) == 150


def test_the_prior_precision_can_be_changed_without_a_pass():
    x, y = moons()
    q = Laplace(trained(mlp(), x, y))
    fit(q, (x, y), Categorical())
    best, evidence = q.prior_precision, q.log_evidence()
    for other in (best * 1.3, best / 1.3):
        q.prior_precision = other
        assert q.prior_precision == pytest.approx(other) and q.log_evidence() < evidence
    spread = []
    for precision in (best, 100 * best):
        q.prior_precision = precision
        spread.append(vbdl.Predictor(q, Categorical(), 256, **SETTINGS)(x[:4]).epistemic)
    assert bool((spread[1] < spread[0]).all())
    q.prior_precision = "evidence"
    assert q.prior_precision == pytest.approx(best) and q.log_evidence() == pytest.approx(evidence)
    for wrong in (0.0, -1.0, math.nan, "most", True, {"2": 1.0}):
        with pytest.raises(ValueError, match="prior"):
            q.prior_precision = wrong


def test_each_layer_has_its_own_precision():
    x, y = moons()
    net = trained(mlp(), x, y)
    one, each = Laplace(net, parameters="all"), Laplace(net, parameters="all", per_layer=True)
    fit(one, (x, y), Categorical())
    fit(each, (x, y), Categorical())
    assert set(each.prior_precision) == {"0", "2"} and each.log_evidence() > one.log_evidence()
    best, evidence = each.prior_precision, each.log_evidence()
    for layer in best:
        for factor in (0.8, 1.25):
            each.prior_precision = {**best, layer: factor * best[layer]}
            assert each.log_evidence() < evidence
    with pytest.raises(ValueError, match="give one for each of"):
        each.prior_precision = {"0": 1.0}


def test_noise_and_layers_together_are_at_a_maximum():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    q, likelihood = Laplace(net, parameters="all", per_layer=True), Gaussian().double()
    fit(q, (X, Y), likelihood)
    best, evidence = q.prior_precision, q.log_evidence()
    for layer in best:
        for factor in (0.9, 1.1):
            q.prior_precision = {**best, layer: factor * best[layer]}
            assert q.log_evidence() < evidence
    for factor in (0.95, 1.05):
        noise = Gaussian(std=factor * float(likelihood.noise_std), learned=False).double()
        other = Laplace(net, parameters="all", per_layer=True)
        fit(other, (X, Y), noise)
        other.prior_precision = best
        assert other.log_evidence() < evidence


def test_validation_chooses_the_precision_with_the_best_likelihood():
    x, y = moons(300)
    net = trained(mlp(), x[:100], y[:100])
    q = Laplace(net, prior_precision="validation")
    with pytest.raises(ValueError, match=r"needs held-out rows: give vbdl.fit\(..., validation=0.1\)"):
        fit(q, (x[:100], y[:100]), Categorical())
    fit(q, (x[:100], y[:100]), Categorical(), validation=(x[200:], y[200:]))
    best = q.prior_precision

    def loss(precision):
        q.prior_precision = precision
        p = vbdl.Predictor(q, Categorical(), 512, **SETTINGS)(x[200:])
        return -float(p.log_prob(y[200:]).mean())

    assert loss(best) <= min(loss(best * 30), loss(best / 30)) + 0.005


# -- training first


def test_training_first_is_at_the_mean_and_with_the_prior():
    """To the optimum of the penalized loss: its gradient vanishes, precision * w + sum of the gradients of nll."""
    x, y = moons()
    q = Laplace(nn.Linear(5, 3), n_data=150, structure="diagonal", prior_precision=2.0)
    sgd = lambda ps: torch.optim.SGD(ps, lr=1.0)
    vbdl.fit(q, (x, y), Categorical(), epochs=400, batch_size=150, optimizer=sgd, compile=False, progress=False)
    net = q.module.inner
    loss = nn.functional.cross_entropy(net(x), y, reduction="sum")
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    for g, p in zip(gradients, [p.detach() for p in net.parameters()], strict=True):
        assert float((g + 2.0 * p).abs().max()) < 1e-3 * float(g.abs().max() + 1)
    assert q.prior_precision == 2.0 and int(q.module.rows) == 150


def test_training_with_a_prior_needs_the_number_of_rows():
    x, y = moons()
    with pytest.raises(ValueError, match=r"give Laplace\(net, n_data=len\(rows\)\)"):
        vbdl.fit(Laplace(mlp(), prior_precision=1.0), (x, y), Categorical(), epochs=1, compile=False, progress=False)


def test_validation_rows_see_the_network_at_its_mean():
    """Early stopping compares the trained network, and not draws of a posterior that is not fitted yet."""
    x, y = moons(300)
    q = Laplace(mlp())
    rows = (x[200:], y[200:])
    history = vbdl.fit(
        q, (x[:200], y[:200]), Categorical(), epochs=5, validation=rows, compile=False, progress=False, lr=1e-2
    )
    best = min(loss for (loss,) in history.validation_nll)
    expected = nn.functional.cross_entropy(q.module.inner(rows[0]), rows[1])
    assert best == pytest.approx(float(expected.detach()), abs=1e-4)


# -- ensembles


def test_an_ensemble_is_a_pass_for_each_member():
    x, y = moons()
    nets = [trained(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), x, y) for _ in range(3)]
    q = DeepEnsemble([Laplace(net) for net in nets])
    with pytest.raises(ValueError, match="has not seen the training rows"):
        vbdl.Predictor(q, Categorical())
    fit(q, (x, y), Categorical())
    for m, net in enumerate(nets):
        alone = Laplace(net)
        fit(alone, (x, y), Categorical())
        of_member = q.member(m)
        for name, t in alone.module.named_buffers():
            if name != "key" and "vectors" not in name:  # of whole eigenspaces, any basis is right
                torch.testing.assert_close(of_member[name], t, rtol=1e-4, atol=1e-4, msg=lambda s, n=name: f"{n}: {s}")
    assert bool((vbdl.Predictor(q, Categorical(), 30, **SETTINGS)(x).epistemic > 0).all())


def test_members_learn_their_own_noise():
    torch.manual_seed(0)
    q, likelihood = DeepEnsemble(Laplace(nn.Linear(3, 1)), 2), Gaussian()
    vbdl.fit(q, (X.float(), Y.float()), likelihood, epochs=3, compile=False, progress=False)
    assert likelihood.noise_std.shape == (2, 1) and likelihood.noise_std.unique().numel() == 2
    assert not torch.equal(q.stacked()["factors.0.prior_precision"], torch.ones(2))


# -- which layer, which output


class Headed(nn.Module):
    """The head is registered before the body, and there is a second output."""

    def __init__(self):
        super().__init__()
        self.head, self.body, self.other = nn.Linear(8, 3), nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return {"classes": self.head(h), "features": self.other(h)}


def test_a_layer_that_is_not_the_last_is_said_with_the_one_that_is():
    x, y = moons()
    q = Laplace(Headed(), output="classes")
    with pytest.raises(ValueError, match=r"layer 'other' was taken for the last.*parameters=\['head'\]"):
        fit(q, (x, y), Categorical())
    q = Laplace(Headed(), parameters=["head"], output="classes")
    fit(q, (x, y), Categorical())
    assert vbdl.Predictor(q, Categorical(), **SETTINGS)(x).probs.shape == (150, 3)


@pytest.mark.parametrize("compile", [False, "background"])  # in the background the network as it is answers first
def test_attention_is_linearized(compile):
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Flatten(), nn.Linear(24, 3)).eval()
    x, y = torch.randn(30, 3, 8), torch.arange(30) % 3
    q = Laplace(net, parameters="all", structure="diagonal", prior_precision=1.0)
    fit(q, (x, y), Categorical())
    predict = vbdl.Predictor(q, Categorical(), n_samples=512, compile=compile, tiles=(8,))
    samples = predict(x[:8], samples=True).samples
    variance = (samples - net(x[:8]).detach()).square().mean(0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = output_covariance(q, x[:8]).diagonal(dim1=1, dim2=2)
    # variances of 512 draws have a relative standard error of sqrt(2 / 512)
    torch.testing.assert_close(variance, expected, rtol=5 * math.sqrt(2 / 512), atol=0)
    if not compile:  # what still compiles in the background keeps them off
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.mha.get_fastpath_enabled()


def test_an_operation_without_a_forward_mode_is_said_with_what_to_do():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.EmbeddingBag(7, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.words(x).tanh())

    x, y = torch.randint(7, (20, 5)), torch.arange(20) % 2
    with pytest.raises(ValueError, match=r"^the network cannot be linearized.*use Laplace\(net, linearized=False\)$"):
        fit(Laplace(Bag(), parameters="all", structure="diagonal"), (x, y), Categorical())
    fit(Laplace(Bag()), (x, y), Categorical())
    fit(Laplace(Bag(), parameters="all", structure="diagonal", linearized=False), (x, y), Categorical())


class Sign(torch.autograd.Function):
    """A step with a straight-through gradient, which torch's transforms do not take."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class AfterSign(nn.Module):
    """A linear layer after something that has no forward mode; last: a function after it."""

    def __init__(self, last=lambda y: y):
        super().__init__()
        self.body, self.head, self.last = nn.Linear(3, 4), nn.Linear(4, 2), last

    def forward(self, x):
        return self.last(self.head(Sign.apply(self.body(x))))


@pytest.mark.parametrize("compile", [False, "background"])
def test_a_last_layer_after_an_operation_without_a_forward_mode_draws_weights(compile):
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    torch.manual_seed(0)
    net, samples = AfterSign(), []
    for linearized in (True, False):
        q = Laplace(net, linearized=linearized)
        fit(q, (x, y), Categorical())
        predict = vbdl.Predictor(q, Categorical(), n_samples=8, compile=compile, joint=True)
        samples.append(predict(x, samples=True).samples)
        predict.wait()
        samples.append(predict(x, samples=True).samples)
    for other in samples[1:]:
        torch.testing.assert_close(other, samples[0], rtol=1e-4, atol=1e-5)
    for bent in (torch.square, lambda y: torch.relu(y + 20)):  # a kink that no draw reaches
        with pytest.raises(
            ValueError, match=r"^the network cannot be linearized.*use Laplace\(net, linearized=False\)$"
        ):
            fit(Laplace(AfterSign(bent), parameters=["head"]), (x, y), Categorical())


def test_layers_that_get_parts_of_the_batch_are_refused_in_words():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(2))

        def forward(self, x):
            outputs = x.new_zeros(len(x), 2)
            for number, expert in enumerate(self.experts):
                chosen = ((x[:, 0] > 0) == bool(number)).nonzero().squeeze(-1)
                outputs = outputs.index_add(0, chosen, expert(x[chosen]))
            return outputs

    x, y = torch.randn(20, 3), torch.arange(20) % 2
    with pytest.raises(NotImplementedError, match="curvature of this network is not known.*parts of the batch.*SWAG"):
        fit(Laplace(Experts()), (x, y), Categorical())


def test_frozen_parameters_are_no_part_of_it():
    x, y = moons()
    net = trained(mlp(), x, y)
    net[0].requires_grad_(False)
    q = Laplace(net, parameters="all")
    assert q.module.chosen == ("2.weight", "2.bias")
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        Laplace(net)


def test_a_backbone_runs_once_for_a_batch_and_keeps_no_graph():
    x, y = moons()
    runs = []

    class Counted(nn.Linear):
        def forward(self, h):
            out = super().forward(h)
            runs.append((len(h), out.requires_grad))
            return out

    torch.manual_seed(0)
    net = nn.Sequential(Counted(5, 8), nn.Tanh(), nn.Linear(8, 3))
    q = Laplace(net)
    runs.clear()
    q.after_training(vbdl.model.Model(q, Categorical()), rows_of(x, y))
    assert [n for n, _ in runs if n > 3] == [50, 50, 50] and not any(graph for _, graph in runs[-3:])


class rows_of:
    own, validation = False, None

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        for start in range(0, len(self.y), 50):
            yield self.x[start : start + 50], self.y[start : start + 50]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"structure": "dense"}, "structure must be one of 'kronecker', 'diagonal', 'full'"),
        ({"parameters": "head"}, r"write \['head'\]"),
        ({"parameters": ["nowhere"]}, "no trainable parameter belongs to 'nowhere'"),
        ({"prior_precision": "best"}, "prior_precision must be"),
        ({"prior_precision": 0}, "prior_precision must be"),
        ({"n_data": 0}, "n_data must be"),
        ({"fisher_samples": 0}, "fisher_samples must be"),
        ({"per_layer": True, "structure": "full"}, "per_layer"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Laplace(mlp(), **arguments)


def test_a_matrix_too_large_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="is a matrix of .* GB: choose structure='diagonal'"):
        Laplace(nn.Linear(500, 200), structure="full")


def test_predicting_before_the_pass_says_to_fit():
    for q in (Laplace(mlp()), DeepEnsemble(Laplace(mlp()), 2)):
        with pytest.raises(ValueError, match=r"call vbdl.fit\(q, \(x, y\), likelihood, epochs=0\) first"):
            vbdl.Predictor(q, Categorical())
    with pytest.raises(ValueError, match="has not seen"):
        Laplace(mlp()).log_evidence()


def test_no_epochs_are_only_for_a_trained_network():
    x, y = moons()
    with pytest.raises(ValueError, match="epochs must be at least 1 for MeanField"):
        fit(vbdl.MeanField(mlp(), 150), (x, y), Categorical())


# -- artifacts


@pytest.mark.parametrize("arguments", [{}, {"parameters": "all", "structure": "diagonal", "per_layer": True}])
def test_it_is_saved_and_loaded(arguments, tmp_path):
    x, y = moons()
    q, likelihood = Laplace(trained(mlp(), x, y), **arguments), Categorical()
    fit(q, (x, y), likelihood)
    predict = vbdl.Predictor(q, likelihood, 16, **SETTINGS)
    vbdl.save(predict, tmp_path / "model.vbdl", example=x[:2])
    loaded = vbdl.load(tmp_path / "model.vbdl")
    assert torch.equal(loaded(x[:9]).probs, predict(x[:9]).probs)
    assert loaded.posterior.prior_precision == q.prior_precision
    assert loaded.posterior.log_evidence() == pytest.approx(q.log_evidence(), rel=1e-6)


# -- the library of the paper


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("laplace") is None, reason="needs laplace-torch, which is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize("parameters", ["last", "all"])
@pytest.mark.parametrize("structure", ["full", "kronecker", "diagonal"])
def test_it_is_that_of_laplace_torch(network, parameters, structure):
    """Covariances of the linearized outputs, evidence and probit probabilities, in float64: to 1e-5 and better, where
    the whole matrix of 450 parameters is inverted by other ways.

    And not linearized: the same covariance of the weights, of which both libraries draw.
    """
    from laplace import Laplace as Peer

    x, y = moons()
    net = mlp()
    if network == "cnn":
        x = torch.randn(150, 1, 8, 8)
        y = (x.mean((1, 2, 3)) > 0).long() + (x[:, 0, :4].mean((1, 2)) > 0.1).long()
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(24, 3),
        )  # fmt: skip
    net, x = trained(net, x, y).double(), x.double()
    of_peer = {"full": "full", "kronecker": "kron", "diagonal": "diag"}[structure]
    subset = {"last": "last_layer", "all": "all"}[parameters]
    peer = Peer(
        net, "classification", subset_of_weights=subset, hessian_structure=of_peer,
        prior_precision=torch.tensor(2.0, dtype=torch.float64),
    )  # fmt: skip
    peer.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 32))
    q = Laplace(net, parameters=parameters, structure=structure, prior_precision=2.0, joint_bias=False)
    fit(q, (x, y), Categorical())
    assert q.log_evidence() == pytest.approx(float(peer.log_marginal_likelihood()), abs=1e-6)
    mean, variance = peer._glm_predictive_distribution(x[:9])
    ours = output_covariance(q, x[:9])
    torch.testing.assert_close(ours, variance, rtol=1e-5, atol=1e-9)
    kappa = 1 / (1 + math.pi / 8 * ours.diagonal(dim1=1, dim2=2)).sqrt()
    probit = (net(x[:9]).detach() * kappa).softmax(-1)
    torch.testing.assert_close(probit, peer(x[:9], link_approx="probit"), rtol=0, atol=1e-6)
    # weight draws: the covariance of what they draw
    draws = peer.sample(20_000) - peer.mean
    c = covariance(q)
    found = draws.T @ draws / len(draws)
    error = ((c.diagonal()[:, None] * c.diagonal() + c.square()) / len(draws)).sqrt()
    assert float(((found - c).abs() / error).max()) < 6


def test_a_network_that_counts_its_calls_is_linearized():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.layer(x).tanh()

    torch.manual_seed(0)
    net, (x, y) = Counting(), moons()
    drawn = []
    for network in (net, nn.Sequential(net.layer, nn.Tanh())):
        q = Laplace(network, parameters="all", structure="diagonal", prior_precision=1.0)
        fit(q, (x, y), Categorical())
        for compile in (False, True):
            predict = vbdl.Predictor(q, Categorical(), n_samples=4, compile=compile, tiles=(8,))
            drawn.append(predict(x[:8], samples=True).samples)
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0])
