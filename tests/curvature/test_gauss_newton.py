"""The curvature of every kind of layer against Jacobians made row by row; all in float64, so equal to 1e-9."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from vbdl.curvature.blocks import BiasBlock, DenseBlock, DiagonalBlock, KroneckerBlock
from vbdl.curvature.gauss_newton import GaussNewton
from vbdl.likelihoods.bernoulli import Bernoulli
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.centered import Centered
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.likelihoods.heteroscedastic import HeteroscedasticGaussian
from vbdl.types import Likelihood

ROWS, CLASSES = 7, 3
EXACT = {"rtol": 1e-9, "atol": 1e-10}


class Sequence(nn.Module):
    """Tokens -> classes: embedding, a position of its own, attention and normalization; the batch axis is second."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 6, padding_idx=0)
        self.position = nn.Parameter(torch.randn(5, 1, 6))
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, ids):
        h = self.tokens(ids.T) + self.position
        return self.head(self.encoder(h).mean(0))


class Twice(nn.Module):
    """One layer that is applied twice to each row."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class EachRow(nn.Module):
    """A layer that is called for one row after the other, and one for all rows."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(torch.stack([torch.tanh(self.inner(row)) for row in x]))


class Scaled(nn.Module):
    """Parameters without axes: a scale of the outputs, as of contrastive networks, and one inside."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Linear(6, CLASSES)
        self.inside, self.scale = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x) * self.inside)) * self.scale.exp()


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(CLASSES))


def trained_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(norm.weight)
    return norm


FLOATS = lambda *shape: lambda: torch.randn(ROWS, *shape)
CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)), FLOATS(4)),
    "applied twice": (Twice, FLOATS(5)),
    "each row": (EachRow, FLOATS(5)),
    "tokens": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Flatten(), nn.Linear(30, CLASSES)), FLOATS(5, 4)),
    "conv": (
        lambda: images(nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=2), trained_norm(), nn.ReLU()),
        FLOATS(2, 7, 6),
    ),
    "in place": (
        lambda: nn.Sequential(
            nn.Linear(4, 6),
            nn.ReLU(inplace=True),
            nn.Linear(6, 6),
            nn.ReLU(inplace=True),
            nn.Linear(6, CLASSES),
        ),
        FLOATS(4),
    ),
    "conv of groups": (
        lambda: images(nn.Conv2d(2, 4, (3, 1), groups=2, padding="same"), nn.GroupNorm(2, 4), nn.Tanh()),
        FLOATS(2, 5, 4),
    ),
    "conv in 1 dimension": (lambda: images(nn.Conv1d(2, 4, 3, padding="valid"), nn.Tanh()), FLOATS(2, 7)),
    "conv in 3 dimensions": (lambda: images(nn.Conv3d(1, 2, 2), nn.Tanh()), FLOATS(1, 3, 3, 4)),
    "layer norm": (lambda: images(nn.LayerNorm([3, 4]), nn.Tanh()), FLOATS(3, 4)),
    "scaled": (Scaled, FLOATS(4)),
    "transformer": (Sequence, lambda: torch.randint(0, 11, (ROWS, 5))),
}


def case(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    make, inputs = CASES[name]
    x = inputs()
    net = make()
    net(x)
    x = x.double() if x.is_floating_point() else x
    return net.double().eval(), x, torch.randint(0, CLASSES, (ROWS,))


def curvature(net, likelihood, blocks, x, y, batches=(3, 4), **options):
    pass_ = GaussNewton(net, likelihood, blocks, **options)
    start = 0
    for count in batches:
        pass_.add(x[start : start + count], y[start : start + count])
        start += count
    return pass_


def jacobians(net: nn.Module, x) -> dict[str, torch.Tensor]:
    """The Jacobian of each row's outputs, flattened, in each parameter: (rows, outputs, *shape)."""
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    one = lambda ps, row: functional_call(net, ps, (row.unsqueeze(0),)).flatten()
    with sdpa_kernel(SDPBackend.MATH):  # the only one that torch differentiates under vmap
        rows = [jacrev(one, chunk_size=1)(parameters, row) for row in x]
    return {n: torch.stack([row[n] for row in rows]) for n in parameters}


def softmax_hessians(net, x) -> torch.Tensor:
    p = net(x).detach().softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


@pytest.mark.parametrize("name", CASES)
def test_the_diagonal_is_that_of_the_jacobians(name):
    net, x, y = case(name)
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    block = DiagonalBlock(parameters)
    curvature(net, Categorical(), [block], x, y)
    h = softmax_hessians(net, x)
    for n, j in jacobians(net, x).items():
        flat = j.reshape(*j.shape[:2], -1)
        expected = torch.einsum("nki,nkl,nli->i", flat, h, flat).view(parameters[n].shape)
        torch.testing.assert_close(block.finish()[n], expected, **EXACT, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_the_whole_matrix_is_that_of_the_jacobians(name):
    net, x, y = case(name)
    padding = {"tokens.weight": 0} if name == "transformer" else {}
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    block = DenseBlock(parameters, padding)
    curvature(net, Categorical(), [block], x, y)
    j = {n: t if n not in padding else t[:, :, 1:] for n, t in jacobians(net, x).items()}
    flat = torch.cat([t.reshape(*t.shape[:2], -1) for t in j.values()], dim=2)
    expected = torch.einsum("nki,nkl,nlj->ij", flat, softmax_hessians(net, x), flat)
    values = block.finish()
    matrix = values["vectors"] @ values["values"].diag() @ values["vectors"].mT
    torch.testing.assert_close(matrix, expected, **EXACT)


@pytest.mark.parametrize("kind", ["kronecker", "dense", "diagonal"])
def test_a_layer_that_is_the_output_needs_no_backward_pass(kind):
    """Its closed form equals the backward passes through a network that returns a copy of the same outputs."""

    class Copied(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).clone()

    net, x, y = case("linear")
    cls = {"kronecker": KroneckerBlock, "dense": DenseBlock, "diagonal": DiagonalBlock}[kind]
    of = lambda prefix: {f"{prefix}2.{n}": p.detach() for n, p in net[2].named_parameters()}
    direct, through = cls(of("")), cls(of("inner."))
    curvature(net, Categorical(), [direct], x, y)
    curvature(Copied(net), Categorical(), [through], x, y)
    for name, expected in direct.finish().items():
        if "vectors" not in name:
            torch.testing.assert_close(
                through.finish()[f"inner.{name}" if kind == "diagonal" else name], expected, **EXACT
            )


def test_kronecker_factors_are_sums_over_positions():
    """G x A = (sum g g^T) x (sum a a^T) / positions, and the bias is an input 1."""
    net, x, y = case("tokens")
    block = KroneckerBlock({n: p.detach() for n, p in net.named_parameters() if n.startswith("0.")})
    alone = BiasBlock({"0.bias": net[0].bias.detach()})
    curvature(net, Categorical(), [block, alone], x, y)
    a = torch.cat([x, torch.ones(*x.shape[:2], 1, dtype=x.dtype)], -1).flatten(0, 1)
    p = net(x).softmax(-1)
    g = 0
    for k in range(CLASSES):
        root = p.sqrt()[:, k, None] * (torch.eye(CLASSES)[k] - p)
        hidden = net[0](x).detach().requires_grad_()
        (one,) = torch.autograd.grad((net[1:](hidden) * root.detach()).sum(), hidden)
        g = g + one.flatten(0, 1).mT @ one.flatten(0, 1)
    values = block.finish()
    back = lambda v, u: u @ v.diag() @ u.mT
    torch.testing.assert_close(back(values["input_values"], values["input_vectors"]), a.mT @ a / len(a), **EXACT)
    torch.testing.assert_close(back(values["output_values"], values["output_vectors"]), g, **EXACT)
    of_bias = alone.finish()
    torch.testing.assert_close(back(of_bias["values"], of_bias["vectors"]), g, **EXACT)


def test_a_parameter_without_a_linear_layer_has_no_kronecker_product():
    net = Sequence().eval()
    block = KroneckerBlock({"encoder.self_attn.out_proj.weight": net.encoder.self_attn.out_proj.weight.detach()})
    with pytest.raises(ValueError, match="out_proj.weight' is used by other operations.*structure='diagonal'"):
        curvature(net, Categorical(), [block], torch.ones(3, 5, dtype=torch.int64), torch.zeros(3).long(), (3,))


# -- many outputs


class Pixels(nn.Module):
    """(batch, 2, 4, 4) -> a class for each pixel, (batch, classes, 4, 4)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def test_random_columns_have_the_mean_of_the_exact_ones():
    """Over 400 seeds the mean of each diagonal entry is within five standard errors of the exact one."""
    torch.manual_seed(0)
    net, x, y = Pixels().double().eval(), torch.randn(2, 2, 4, 4).double(), torch.zeros(2, 4, 4).long()
    likelihood = Categorical(class_axis=1)

    def diagonal(**options):
        block = DiagonalBlock({n: p.detach() for n, p in net.named_parameters()})
        curvature(net, likelihood, [block], x, y, (2,), **options)
        return torch.cat([t.flatten() for t in block.finish().values()])

    exact = diagonal()  # 64 outputs: a column for each
    normals = torch.stack([diagonal(samples=4, seed=1000 * s) for s in range(400)])
    errors = (normals.mean(0) - exact).abs() / (normals.std(0) / math.sqrt(400))
    assert float(errors.max()) < 5


def test_pixels_beyond_the_exact_columns_use_signs(monkeypatch):
    monkeypatch.setattr("vbdl.curvature.columns.MOST_COLUMNS", 10)
    torch.manual_seed(0)
    net, x, y = Pixels().double().eval(), torch.randn(2, 2, 4, 4).double(), torch.zeros(2, 4, 4).long()
    found = []
    for seed in range(400):
        block = DiagonalBlock({"last.weight": net.last.weight.detach()})
        curvature(net, Categorical(class_axis=1), [block], x, y, (2,), seed=1000 * seed)
        found.append(block.finish()["last.weight"])
    monkeypatch.undo()
    block = DiagonalBlock({"last.weight": net.last.weight.detach()})
    curvature(net, Categorical(class_axis=1), [block], x, y, (2,))
    each = torch.stack(found)
    errors = (each.mean(0) - block.finish()["last.weight"]).abs() / (each.std(0) / math.sqrt(400))
    assert float(errors.max()) < 5


def test_no_array_grows_with_rows_or_with_outputs_times_weights():
    """A head of 1000 classes on 200 features: nothing larger than classes x classes or rows x classes is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not result._is_view():
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    net = nn.Sequential(nn.Linear(50, 200), nn.ReLU(), nn.Linear(200, 1000)).eval()
    block = KroneckerBlock({f"2.{n}": p.detach() for n, p in net[2].named_parameters()})
    x, y = torch.randn(512, 50), torch.randint(0, 1000, (512,))
    with Largest():
        curvature(net, Categorical(), [block], x, y, (128,) * 4)
    assert largest <= 8 * 1000 * 1000


# -- Hessians of likelihoods

OUTPUTS = torch.tensor([[0.3, -1.2, 0.8, 2.0], [1.5, 0.1, -0.4, -1.0]], dtype=torch.float64)
LIKELIHOODS = {
    "categorical": (lambda: Categorical(), OUTPUTS, torch.tensor([1, 3])),
    "pixels": (lambda: Categorical(class_axis=1), OUTPUTS.view(2, 2, 2), torch.tensor([[1, 0], [0, 1]])),
    "bernoulli": (lambda: Bernoulli(), OUTPUTS, torch.tensor([[0.0, 1, 1, 0], [1, 0, 1, 0]])),
    "one bernoulli": (lambda: Bernoulli(), OUTPUTS[:, :1], torch.tensor([0.0, 1.0])),
    "gaussian": (lambda: Gaussian(4, std=0.7).double(), OUTPUTS, OUTPUTS.flip(0)),
    "gaussian channels": (
        lambda: Gaussian(2, std=0.7, channel_axis=1).double(), OUTPUTS.view(2, 2, 2), OUTPUTS.view(2, 2, 2).flip(0),
    ),
    "centered": (lambda: Centered(Gaussian(4, std=0.7).double(), 1e6), OUTPUTS, OUTPUTS.flip(0) + 1e6),
}  # fmt: skip


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_hessians_are_second_derivatives(name):
    make, outputs, y = LIKELIHOODS[name]
    likelihood = make()
    one = lambda flat, target: likelihood.nll(likelihood(flat.view(1, *outputs.shape[1:])), target[None]).sum()
    expected = torch.stack([hessian(one)(o.flatten(), t) for o, t in zip(outputs, y, strict=True)])
    found = likelihood.hessian(outputs, y)
    torch.testing.assert_close(found.matrices(), expected, **EXACT)
    torch.testing.assert_close(found.diagonal(), expected.diagonal(dim1=1, dim2=2), **EXACT)
    torch.testing.assert_close(found.total(), expected.sum(0), **EXACT)
    identity = torch.eye(expected.shape[1]).double()
    root = torch.stack([found.root(e.expand(2, -1)) for e in identity], dim=-1)
    torch.testing.assert_close(root @ root.mT, expected, **EXACT)
    columns = [found.column(i, torch.ones(2, found.groups).double()) for i in range(expected.shape[1] // found.groups)]
    assert torch.equal(torch.stack(columns).sum(0), torch.ones(2, expected.shape[1]).double())


def test_the_hessian_of_any_other_likelihood_is_differentiated():
    """Poisson targets: exp(output) on the diagonal; where nll is linear in the outputs it is 0."""

    class Poisson(Likelihood):
        def forward(self, outputs):
            return outputs

        def nll(self, parameters, y):
            return (parameters.exp() - y * parameters).flatten(1).sum(1)

    class Flat(Poisson):
        def nll(self, parameters, y):
            return (y * parameters).flatten(1).sum(1)

    y = torch.ones_like(OUTPUTS)
    torch.testing.assert_close(Poisson().hessian(OUTPUTS, y).matrices(), torch.diag_embed(OUTPUTS.exp()), **EXACT)
    assert not Flat().hessian(OUTPUTS, y).matrices().any()


def test_heteroscedastic_curvature_is_the_fisher_information():
    """1 / variance and 1 / 2, the mean of the Hessian over y: by the two points mean +- std, which have its moments."""
    likelihood = HeteroscedasticGaussian()
    outputs = torch.tensor([[0.5, -1.0, 0.2, 50.0]], dtype=torch.float64)  # the last log-variance is clamped
    found = likelihood.hessian(outputs, torch.zeros(1, 2)).matrices()[0]
    std = (0.5 * outputs[0, 2:].clamp(max=40)).exp()
    one = lambda flat, y: likelihood.nll(likelihood(flat[None]), y[None]).sum()
    expected = sum(hessian(one)(outputs[0], outputs[0, :2] + s * std) for s in (-1, 1)) / 2
    torch.testing.assert_close(found, expected, **EXACT)
