"""The curvature of layers that act on parameters or mix rows, against Jacobians of each row; in float64, to 1e-9."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.curvature.test_gauss_newton import CLASSES, EXACT, ROWS, curvature, jacobians, softmax_hessians
from vbdl.curvature.blocks import DenseBlock, DiagonalBlock, KroneckerBlock
from vbdl.curvature.choosing import grouped
from vbdl.likelihoods.categorical import Categorical


class Hyper(nn.Module):
    """A linear layer whose weights another layer computes from a parameter, at a fixed or at each row's place."""

    def __init__(self, layer, shape, trained=True, each_row=False):
        super().__init__()
        self.layer, self.code = layer, nn.Parameter(torch.randn(shape), requires_grad=trained)
        self.each_row = each_row

    def forward(self, x):
        made = self.layer(self.code.expand(len(x), *self.code.shape) if self.each_row else self.code)
        made = made[0] if isinstance(made, tuple) else made
        return F.linear(x, (made.mean(0) if self.each_row else made).reshape(-1)[:12].view(CLASSES, 4))


class Called(nn.Module):
    """A forward from the parameters `w` (4, 4), `v` (3, 4) and `b` (4,)."""

    def __init__(self, forward):
        super().__init__()
        self.w, self.v, self.b = (nn.Parameter(torch.randn(shape)) for shape in ((4, 4), (CLASSES, 4), (4,)))
        self.of = forward

    def forward(self, x):
        return self.of(self, x)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient * w, (gradient * x).sum(0)

    @staticmethod
    def vmap(info, in_dims, x, w):
        return Product.apply(x, w), 0


class Tokens(nn.Module):
    """Layers that get the tokens of all rows on one axis, in the order of tokens or of rows."""

    def __init__(self, layer, tokens_first):
        super().__init__()
        self.layer, self.head, self.tokens_first = layer, nn.Linear(4, CLASSES), tokens_first

    def forward(self, x):
        h = torch.stack([x, x.square(), x.sin()], 0 if self.tokens_first else 1)
        flat = self.layer(h.flatten(0, 1)).unflatten(0, h.shape[:2])
        return self.head(flat.tanh().mean(0 if self.tokens_first else 1))


def norm():
    norm = nn.BatchNorm1d(4)
    nn.init.normal_(norm.weight)
    norm.running_var.uniform_(0.5, 2.0)
    return norm


class Pairs(nn.Bilinear):
    def forward(self, x):
        return super().forward(x, x)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 12), (5,)),
    "two linear": (lambda: nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 12)), (5,)),
    "linear of rows": (lambda: nn.Linear(6, 4), (3, 6)),
    "layer norm": (lambda: nn.LayerNorm(12), (12,)),
    "layer norm and linear": (lambda: nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 12)), (5,)),
    "RMS norm": (lambda: nn.RMSNorm(12), (12,)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (1, 4, 3)),
    "convolution": (lambda: nn.Conv2d(2, 2, 2), (2, 4, 4)),
    "convolution of a batch": (lambda: nn.Conv1d(2, 4, 2), (1, 2, 4)),
    "bilinear": (lambda: Pairs(5, 5, 12), (5,)),
}
CASES = {
    **{f"{name} of a parameter": lambda name=name: Hyper(LAYERS[name][0](), LAYERS[name][1]) for name in LAYERS},
    **{
        f"{name} of a {'parameter' if trained else 'constant'} for each row": lambda name=name, trained=trained: Hyper(
            LAYERS[name][0](), LAYERS[name][1], trained, True
        )
        for name in ("linear", "two linear", "linear of rows", "layer norm")
        for trained in (True, False)
    },
    "scale by a learned code": lambda: Called(lambda s, x: F.linear(x + F.linear(s.b, s.w) * x.square(), s.v)),
    "parameter as weight and input": lambda: Called(lambda s, x: F.linear(x + s.b, F.linear(s.w, s.w)[:3]) + x @ s.v.T),
    "parameter as weight of a parameter": lambda: Called(lambda s, x: F.linear(x + s.b, F.linear(s.v, s.w))),
    "computed weight, own bias": lambda: Called(lambda s, x: F.linear(F.linear(x, s.w.T, s.b), s.v)),
    "transposed by a property": lambda: Called(lambda s, x: F.linear((x @ s.w.T + s.b).tanh(), s.v)),
    "own function": lambda: Called(lambda s, x: F.linear(F.linear(Product.apply(x, s.b), s.w), s.v)),
    "weight of one axis": lambda: Called(lambda s, x: F.linear(F.linear(x, s.w), s.v) * F.linear(x, s.b)[:, None]),
    **{
        f"{name}, {'tokens' if first else 'rows'} first": lambda make=make, first=first: Tokens(make(), first)
        for name, make in {
            "linear": lambda: nn.Linear(4, 4),
            "layer norm": lambda: nn.LayerNorm(4),
            "norm": norm,
        }.items()
        for first in (True, False)
    },
}


@pytest.fixture(params=CASES)
def net_and_rows(request):
    torch.manual_seed(1)
    return CASES[request.param]().double().eval(), torch.randn(ROWS, 4).double(), torch.randint(0, CLASSES, (ROWS,))


def test_the_curvature_is_that_of_the_jacobians(net_and_rows):
    """The full matrix and the diagonal are sums of J^T H J over the rows."""
    net, x, y = net_and_rows
    parameters = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
    dense, diagonal = DenseBlock(parameters), DiagonalBlock(parameters)
    curvature(net, Categorical(), [dense], x, y)
    curvature(net, Categorical(), [diagonal], x, y)
    of_rows = jacobians(net, x)
    flat = torch.cat([of_rows[n].reshape(ROWS, CLASSES, -1) for n in parameters], dim=2)
    expected = torch.einsum("nki,nkl,nlj->ij", flat, softmax_hessians(net, x), flat)
    values = dense.finish()
    torch.testing.assert_close(values["vectors"] @ values["values"].diag() @ values["vectors"].mT, expected, **EXACT)
    torch.testing.assert_close(
        torch.cat([diagonal.finish()[n].flatten() for n in parameters]), expected.diagonal(), **EXACT
    )


def test_kronecker_factors_are_those_of_each_row_or_refused(net_and_rows):
    """Factors do not depend on which rows are passed together; layers without factors are refused."""
    net, x, y = net_and_rows

    def factors(batches):
        names = [n for n, p in net.named_parameters() if p.requires_grad]
        groups = [(g.kind, g.parameters) for g in grouped(net, names, "kronecker")]
        blocks = [KroneckerBlock(p) if kind == "kronecker" else DiagonalBlock(p) for kind, p in groups]
        curvature(net, Categorical(), blocks, x, y, batches)
        return [{n: t for n, t in block.finish().items() if "vectors" not in n} for block in blocks]

    with_factors = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    if isinstance(net, Hyper) and not net.each_row and with_factors:
        with pytest.raises(ValueError, match=r"layer.*is no Kronecker product: choose structure='diagonal'"):
            factors((3, 4))
        return
    for found, expected in zip(factors((3, 4)), factors((1,) * ROWS), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
