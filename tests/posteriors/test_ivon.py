"""IVON: the paper's algorithm step by step, its fixed point on quadratic losses, and training it like any method."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from vbdl_kernels import make_key

import vbdl
from vbdl.nn.drawn import noise
from vbdl.nn.objective import training_keys
from vbdl.posteriors.ivon import IVON
from vbdl.types import Likelihood

ROWS, FEATURES, CLASSES = 60, 4, 3


def network(norm: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(FEATURES, 8), *middle, nn.Tanh(), nn.Linear(8, CLASSES)).to(dtype)


@pytest.fixture(scope="module")
def data():
    x = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0))
    return x, x[:, :CLASSES].argmax(1)


def fitted(q, data, likelihood=None, **options):
    likelihood = vbdl.Categorical() if likelihood is None else likelihood
    settings = {"epochs": 6, "batch_size": 20, "compile": False, "progress": False}
    return q, likelihood, vbdl.fit(q, data, likelihood, **{**settings, **options})


def assert_equal_states(a, b):
    for name, t in a.state_dict().items():
        assert torch.equal(t, b.state_dict()[name]), name


# -- the algorithm


def by_the_paper(net, data, steps, lr, *, n, delta, h0, beta1, beta2, draws=1, radius=math.inf, rescale=True, seed=0):
    """Algorithm 1 of the paper, line by line in float64, with full batches and the draws of the posterior."""
    m = {name: p.detach().clone() for name, p in net.named_parameters()}
    h = {name: torch.full_like(p, h0) for name, p in m.items()}
    g = {name: torch.zeros_like(p) for name, p in m.items()}
    rate = lr * (h0 + delta) if rescale else lr
    for t in range(1, steps + 1):
        (key,) = training_keys(seed, 1, torch.tensor((t - 1) * draws))
        std = {name: 1 / (n * (h[name] + delta)).sqrt() for name in m}
        g_hat = {name: torch.zeros_like(p) for name, p in m.items()}
        h_hat = {name: torch.zeros_like(p) for name, p in m.items()}
        for k in range(draws):
            theta = {
                name: (p + std[name] * noise(key + key.new_tensor([0, k]), layer, p)).requires_grad_()
                for layer, (name, p) in enumerate(m.items())
            }
            loss = F.cross_entropy(functional_call(net, theta, (data[0],)), data[1])
            for name, gradient in zip(m, torch.autograd.grad(loss, list(theta.values())), strict=True):
                g_hat[name] += gradient / draws
                h_hat[name] += gradient * (theta[name].detach() - m[name]) / std[name] ** 2 / draws
        for name in m:
            g[name] = beta1 * g[name] + (1 - beta1) * g_hat[name]
            correction = (1 - beta2) ** 2 * (h[name] - h_hat[name]) ** 2 / (h[name] + delta) / 2
            h[name] = beta2 * h[name] + (1 - beta2) * h_hat[name] + correction
            direction = (g[name] / (1 - beta1**t) + delta * m[name]) / (h[name] + delta)
            m[name] = m[name] - rate * direction.clamp(-radius, radius)
    return m, {name: 1 / (n * (h[name] + delta)).sqrt() for name in m}


@pytest.mark.parametrize("draws, radius, rescale", [(1, None, True), (3, None, False), (1, 0.01, True)])
def test_a_step_is_that_of_the_paper(draws, radius, rescale, data):
    """In float64, after 8 steps: the rounding of 1e-16 grows with each."""
    numbers = {"beta1": 0.8, "beta2": 0.95}
    rows = (data[0].double(), data[1])
    q = IVON(
        network(dtype=torch.float64), n_data=ROWS, weight_decay=1e-2, hess_init=0.7, clip_radius=radius,
        rescale_lr=rescale, n_samples=draws, seed=5, **numbers,
    )  # fmt: skip
    fitted(q, rows, epochs=8, batch_size=ROWS, lr=0.2)
    mean, std = by_the_paper(
        network(dtype=torch.float64), rows, 8, 0.2, n=ROWS, delta=1e-2, h0=0.7, draws=draws, rescale=rescale, seed=5,
        radius=math.inf if radius is None else radius, **numbers,
    )  # fmt: skip
    (factor,) = q.module.factors
    for name, p in q.module.inner.named_parameters():
        torch.testing.assert_close(p.detach(), mean[name], rtol=1e-9, atol=1e-11, msg=name)
        torch.testing.assert_close(factor.std(name).detach(), std[name], rtol=1e-9, atol=1e-11, msg=name)


class Outputs(nn.Module):
    """A network whose outputs are its weights, for every row."""

    def __init__(self, count: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, dtype=torch.float64))

    def forward(self, x):
        return self.weight.expand(len(x), -1)


class Quadratic(Likelihood):
    """-log p(y | w) = sum_i a_i (w_i - y_i)^2 / 2, for networks whose outputs are their weights."""

    def __init__(self, curvature: torch.Tensor):
        super().__init__()
        self.register_buffer("curvature", curvature)

    def forward(self, outputs):
        return outputs

    def nll(self, parameters, y):
        return (self.curvature * (parameters - y).square()).sum(-1) / 2

    training_loss = nll


def test_a_quadratic_loss_has_its_exact_posterior():
    """The posterior is N(a c / (a + delta), 1 / (n (a + delta))), c the mean target, for every curvature a.

    The estimate of h, a e^2 + a (mean - c) e / std with e standard normal, has the variance
    v = a^2 (2 + n delta^2 c^2 / (a + delta)) where the mean is the optimum, so a running mean of 1 / (1 - b) of them
    varies by (1 - b) v / 2; the positivity correction moves its mean by (1 - b) v / (2 (a + delta)). Averages over the
    weights of a curvature must be within 5 standard errors of that. The rates of a cosine's last t steps sum to
    rate pi^2 t^3 / (12 T^2): where that is 1, t draws are averaged, and means differ from the optimum by std / sqrt t.
    """
    each, n, delta, beta2, rate, steps = 600, 100, 0.05, 0.998, 0.2, 4000
    curvatures = torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)
    a = curvatures.repeat_interleave(each)
    torch.manual_seed(0)
    y = 1.0 + torch.randn(4, 3 * each, dtype=torch.float64)
    q = IVON(Outputs(3 * each), n, weight_decay=delta, beta2=beta2)
    net = q.module
    objective = Quadratic(a)
    optimizer = q.own_optimizer(dict(net.named_parameters()), [], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        q.losses(torch.zeros(4, 1), y, objective).sum().backward()
        optimizer.step()
        schedule.step()
    (factor,) = net.factors
    h, mean, center = factor.hessian("weight").detach(), net.mean("weight").detach(), y.mean(0)
    exact = a * center / (a + delta)
    exact_std = 1 / (n * (a + delta)).sqrt()
    averaged = (12 * steps**2 / (rate * math.pi**2)) ** (1 / 3)
    distance = (mean - exact) / exact_std
    assert float(distance.square().mean().sqrt()) < 1.2 / math.sqrt(averaged)
    assert abs(float(distance.mean())) < 5 / math.sqrt(averaged * 3 * each)
    for number, curvature in enumerate(curvatures.tolist()):
        own = h[number * each : (number + 1) * each]
        of_center = float(center[number * each : (number + 1) * each].square().mean())
        variance = curvature**2 * (2 + n * delta**2 * of_center / (curvature + delta))
        bias = (1 - beta2) * variance / (2 * (curvature + delta))
        spread = math.sqrt((1 - beta2) * variance / 2)
        assert abs(float(own.mean()) - curvature - bias) < 5 * spread / math.sqrt(each) + 0.1 * bias
        assert float(own.std()) == pytest.approx(spread, rel=0.1)
        std = factor.std("weight").detach()[number * each : (number + 1) * each]
        assert float(std.mean()) == pytest.approx(1 / math.sqrt(n * (curvature + delta)), rel=0.006)


def test_linear_regression_has_the_mean_field_optimum():
    """The best factorized normal has the precisions n (E x_i^2 / s^2 + delta), the diagonal of the exact one's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator, dtype=torch.float64) @ torch.tensor(
        [[1.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 2.0]], dtype=torch.float64
    )
    y = x @ torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64) + 0.5 * torch.randn(
        200, generator=generator, dtype=torch.float64
    )
    net = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    q = IVON(net, 200, weight_decay=0.01, beta2=0.998, n_samples=2)

    class Unit(Quadratic):
        def nll(self, parameters, y):
            return (parameters.squeeze(-1) - y).square() * self.curvature / 2

        training_loss = nll

    objective = Unit(torch.tensor(4.0, dtype=torch.float64))
    optimizer = q.own_optimizer(dict(q.module.named_parameters()), [], 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2_000)
    for _ in range(2_000):
        optimizer.zero_grad()
        q.losses(x, y, objective).sum().backward()
        optimizer.step()
        schedule.step()
    precision = 4.0 * x.mT @ x / 200 + 0.01 * torch.eye(3, dtype=torch.float64)
    exact = torch.linalg.solve(precision, 4.0 * x.mT @ y / 200)
    std = (200 * precision.diagonal()).rsqrt()
    (factor,) = q.module.factors
    assert bool(((q.module.mean("weight")[0] - exact).abs() < 0.1 * std).all())
    # Hessian: relative spread sqrt((1 - b) / 2 * 2 / 2 draws) = 3 % by the diagonal alone, twice it with the others;
    # half of it in the std
    torch.testing.assert_close(factor.std("weight")[0].detach(), std, rtol=0.1, atol=0)


# -- training


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ensemble", [False, True])
def test_a_resumed_training_is_an_uninterrupted_one(ensemble, compiled, data, tmp_path):
    """Its counter, momenta and Hessians are part of the checkpoint: equal in every bit."""
    make = lambda: IVON(network(norm=True), ROWS, beta2=0.99)
    wrap = (lambda: vbdl.DeepEnsemble(make(), 2)) if ensemble else make
    options = {"schedule": "cosine", "compile": compiled, "epochs": 6}
    whole, _, _ = fitted(wrap(), data, vbdl.Categorical(), **options)

    class Stop(Exception):
        pass

    interrupted, calls = wrap(), []

    def stop(epoch):
        calls.append(epoch)
        if len(calls) == 4:
            raise Stop

    object.__setattr__(interrupted, "after_epoch", stop)
    checkpoint = {"checkpoint": tmp_path / "checkpoint", "checkpoint_every": 1}
    with pytest.raises(Stop):
        fitted(interrupted, data, **options, **checkpoint)
    resumed, _, history = fitted(wrap(), data, **options, **checkpoint)
    assert history.epochs == 6
    assert_equal_states(whole, resumed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_the_rule_is_loaded_in_its_bits(dtype, data):
    """Torch loads a state in the dtype of its parameter: the momenta of narrow means must not lose digits."""
    q = IVON(network(dtype=dtype), ROWS)
    optimizer = q.own_optimizer(dict(q.module.named_parameters()), [], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        q.losses(data[0].to(dtype), data[1], vbdl.Categorical()).sum().backward()
        optimizer.step()
    other = q.own_optimizer(dict(q.module.named_parameters()), [], 0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["done"] == 3
    for p, state in optimizer.state.items():
        assert state["momentum"].dtype == torch.float32
        assert torch.equal(other.state[p]["momentum"], state["momentum"])


def test_compiled_and_eager_steps_agree(data):
    """Up to rounding of 6e-8, which 18 steps enlarge."""
    eager, _, _ = fitted(IVON(network(), ROWS, beta2=0.9), data)
    compiled, _, history = fitted(IVON(network(), ROWS, beta2=0.9), data, compile=True)
    assert history.compile_seconds > 0
    for name, t in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], t, rtol=1e-4, atol=1e-5, msg=name)


def test_members_of_an_ensemble_are_trained_as_alone(data):
    nets = [network(seed=s) for s in range(2)]
    q, _, _ = fitted(vbdl.DeepEnsemble([IVON(net, ROWS, beta2=0.95) for net in nets]), data)
    for member, net in enumerate(nets):
        alone, _, _ = fitted(IVON(net, ROWS, beta2=0.95, seed=member), data, seed=member)
        for name, t in alone.module.state_dict().items():
            torch.testing.assert_close(q.member(member)[name], t, rtol=1e-4, atol=1e-5, msg=name)


def test_a_learned_likelihood_is_trained_by_adam(data):
    """At a hundredth of the rate, with the steps of torch.optim.Adam."""
    y = data[0][:, 0] + 0.1 * data[0][:, 1]
    net = nn.Linear(FEATURES, 1)
    q, likelihood, _ = fitted(IVON(net, ROWS), (data[0], y), vbdl.Gaussian(std=1.0), epochs=200, lr=0.5)
    assert float(likelihood.noise_std) < 0.5

    q = IVON(net, ROWS, parameters=["weight"])
    optimizer = q.own_optimizer(dict(q.module.named_parameters()), [], 0.3)
    p = nn.Parameter(net.bias.detach().clone())
    adam = torch.optim.Adam([p], lr=0.003)
    for step in range(5):
        q.module.inner.bias.grad = p.grad = torch.tensor([math.sin(step)])
        optimizer.step()
        adam.step()
        torch.testing.assert_close(q.module.inner.bias, p)


def test_frozen_parameters_stay_and_are_not_drawn(data):
    net = network(norm=True).eval()
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    q, likelihood, _ = fitted(IVON(net, ROWS), data)
    assert q.module.chosen == ("3.weight", "3.bias")
    for name in ("0.weight", "1.weight", "1.running_mean"):
        assert torch.equal(q.module.inner.state_dict()[name], net.state_dict()[name]), name
    assert bool((vbdl.Predictor(q, likelihood, compile=False)(data[0]).epistemic > 0).all())


class Unused(nn.Module):
    """With a weight that its output does not depend on."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(FEATURES, CLASSES), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_weight_without_gradient_returns_to_the_prior(compiled, data):
    torch.manual_seed(0)
    q, _, _ = fitted(IVON(Unused(), ROWS, weight_decay=0.1, beta2=0.9), data, epochs=100, compile=compiled, lr=0.5)
    (factor,) = q.module.factors
    torch.testing.assert_close(factor.std("unused.weight"), torch.full((2, 2), (0.1 * ROWS) ** -0.5), rtol=0.01, atol=0)
    assert float(q.module.mean("unused.weight").detach().abs().max()) < 0.01


def test_a_padding_row_is_not_drawn():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3, padding_idx=2), nn.Flatten(), nn.Linear(6, CLASSES))
    x = torch.randint(5, (40, 2))
    q, likelihood, _ = fitted(IVON(net, 40), (x, x[:, 0] % CLASSES), likelihood=vbdl.Categorical())
    (factor,) = q.module.factors
    assert bool((factor.std("0.weight")[2] == 0).all()) and bool((factor.std("0.weight")[1] > 0).all())
    assert torch.equal(q.module.mean("0.weight")[2], net[0].weight[2])


def test_a_trained_network_is_where_it_begins(data):
    trained, likelihood, _ = fitted(vbdl.Deterministic(network()), data, epochs=30, lr=1e-2)
    q = IVON(trained.module, ROWS)
    for name, p in trained.module.named_parameters():
        assert torch.equal(q.module.mean(name), p)
    _, _, history = fitted(q, data, likelihood, epochs=10)
    _, _, fresh = fitted(IVON(network(), ROWS), data, vbdl.Categorical(), epochs=10)
    assert history.train_loss[0][0] < 0.7 * fresh.train_loss[0][0]


def test_a_draw_is_the_network_at_drawn_weights(data):
    q, likelihood, _ = fitted(IVON(network(), ROWS, beta2=0.9), data)
    kept = vbdl.Predictor(q, likelihood, n_samples=5, compile=False, joint=True)(data[0], samples=True).samples
    (factor,) = q.module.factors
    for number in range(5):
        deviation = factor.deviation(make_key(0, [number])[0], 0)
        weights = {n: p.detach() + deviation[n] for n, p in q.module.inner.named_parameters()}
        torch.testing.assert_close(kept[number], functional_call(network(), weights, (data[0],)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ensemble", [False, True])
def test_a_saved_predictor_predicts_the_same(ensemble, data, tmp_path):
    make = lambda: IVON(network(norm=True), ROWS, parameters=["0", "3"], beta2=0.9)
    q, likelihood, _ = fitted(vbdl.DeepEnsemble(make(), 2) if ensemble else make(), data)
    predict = vbdl.Predictor(q, likelihood, compile=False)
    predict.save(tmp_path / "model", example=data[0])
    assert torch.equal(vbdl.load(tmp_path / "model")(data[0]).probs, predict(data[0]).probs)


def test_it_learns_like_adam_with_a_better_likelihood():
    """On handwritten digits: about the accuracy of AdamW, and a lower negative log-likelihood, in each of two runs."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]
    train, test = (x[:600], y[:600]), (x[600:], y[600:])

    def net(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    for seed in range(2):
        found = {}
        for name, q, lr in (("adam", vbdl.Deterministic(net(seed)), 3e-3), ("ivon", IVON(net(seed), 600), 1.0)):
            options = {"epochs": 60, "batch_size": 50, "schedule": "cosine", "lr": lr, "seed": seed}
            _, likelihood, _ = fitted(q, train, vbdl.Categorical(), **options)
            p = vbdl.Predictor(q, likelihood, n_samples=q.n_draws or 64, compile=False)(test[0])
            found[name] = float(p.label.eq(test[1]).float().mean()), -float(p.log_prob(test[1]).mean())
        assert found["ivon"][0] > found["adam"][0] - 0.01, found
        assert found["ivon"][1] < found["adam"][1], found


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ({"n_data": 0}, {}, "n_data must be"),
        ({"weight_decay": 0.0}, {}, "weight_decay must be positive"),
        ({"hess_init": -1.0}, {}, "hess_init must be positive"),
        ({"beta1": 1.0}, {}, "beta1 is the weight of the past"),
        ({"beta2": 1.0}, {}, "beta2 is the weight of the past"),
        ({"clip_radius": 0.0}, {}, "clip_radius must be positive"),
        ({"n_samples": 0}, {}, "n_samples must be"),
        ({"parameters": ["nowhere"]}, {}, "no trainable parameter belongs to 'nowhere'"),
        ({}, {"optimizer": torch.optim.Adam}, "takes no optimizer: leave optimizer= out"),
        ({}, {"weight_decay": 0.1}, "takes no weight_decay"),
        ({}, {"clip_norm": 1.0}, "takes no clip_norm"),
        ({}, {"lr": -1.0}, "lr must be"),
    ],
)
@pytest.mark.parametrize("ensemble", [False, True])
def test_arguments_that_cannot_work_are_refused(arguments, options, message, ensemble, data):
    with pytest.raises(ValueError, match=message):
        q = IVON(network(), **{"n_data": ROWS, **arguments})
        fitted(vbdl.DeepEnsemble(q, 2) if ensemble else q, data, **options)


def test_bayesian_layers_are_refused():
    with pytest.raises(ValueError, match="has Bayesian layers"):
        IVON(nn.Sequential(vbdl.BayesianLinear(4, 3)), 10)
