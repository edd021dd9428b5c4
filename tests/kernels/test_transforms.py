"""Every operator under every transform: compiled whole, mapped, differentiated, autocast, exported, traced."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from vbdl_kernels import (
    bayesian_mlp,
    ensemble_mlp,
    local_reparameterized_linear,
    make_key,
    masked_linear,
    predictive_statistics,
    sample_weights,
    sampled_linear,
)

LAYER, SAMPLES, BATCH, IN, HIDDEN, OUT = 3, 4, 3, 5, 6, 2


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, KEY = draw(SAMPLES, BATCH, IN), make_key(7, [3, 2**31, 0, 9])
MEAN, STD = draw(HIDDEN, IN), draw(HIDDEN, IN).abs()
BIAS, BIAS_STD = draw(HIDDEN), draw(HIDDEN).abs()
WIDTHS = ((IN, HIDDEN), (HIDDEN, OUT))
MEANS, STDS = [draw(o, i) for i, o in WIDTHS], [draw(o, i).abs() for i, o in WIDTHS]
BIASES, BIAS_STDS = [draw(o) for _, o in WIDTHS], [draw(o).abs() for _, o in WIDTHS]

# name -> f(x, key, parameters) for x (batch, in) or (samples, batch, in), and its parameters; one that takes no x or
# no key is made to depend on it, so that all can be mapped alike
OPERATORS = {
    "sample_weights": (
        lambda x, key, p: torch.einsum("...bi,...oi->...bo", x, sample_weights(p[0], p[1], key, LAYER)),
        (MEAN, STD),
    ),
    "sampled_linear": (
        lambda x, key, p: sampled_linear(x, p[0], p[1], key, LAYER, *p[2:]),
        (MEAN, STD, BIAS, BIAS_STD),
    ),
    "local_reparameterized_linear": (
        lambda x, key, p: local_reparameterized_linear(x, p[0], p[1], key, LAYER, *p[2:]),
        (MEAN, STD, BIAS, BIAS_STD),
    ),
    "masked_linear": (lambda x, key, p: masked_linear(x, p[0], key, LAYER, 0.4, p[1]), (MEAN, BIAS)),
    "bayesian_mlp": (
        lambda x, key, p: bayesian_mlp(x, *p, key.reshape(-1, 2), [1, 8], "tanh"),
        (MEANS, STDS, BIASES, BIAS_STDS),
    ),
    "ensemble_mlp": (
        lambda x, key, p: ensemble_mlp(x, *p, "silu"),
        ([torch.stack([w, -w, 2 * w, w + 1]) for w in MEANS], [torch.stack([b, -b, b, b]) for b in BIASES]),
    ),
    "predictive_statistics": (lambda x, key, p: predictive_statistics(x * p[0]), (draw(1),)),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


def loss(name):
    """A scalar of the parameters, mapped over draws inside where the operator takes single ones."""
    f, _ = OPERATORS[name]
    return lambda p, x: sum(t.square().sum() for t in tree_leaves(f(x, KEY, p)))


def close(found, expected):
    assert len(tree_leaves(found)) == len(tree_leaves(expected)) > 0
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


@every_operator
def test_compiled_whole(name):
    f, p = OPERATORS[name]
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    close(compiled(X, KEY, p), f(X, KEY, p))
    leaves = tree_map(lambda t: t.clone().requires_grad_(), p)
    compiled = torch.compile(loss(name), fullgraph=True, backend="aot_eager")
    close(
        torch.autograd.grad(compiled(leaves, X), tree_leaves(leaves), allow_unused=True),
        torch.autograd.grad(loss(name)(leaves, X), tree_leaves(leaves), allow_unused=True),
    )


@every_operator
def test_mapped(name):
    """Over the input, over draws, over both, over parameters; nested."""
    f, p = OPERATORS[name]
    stack = lambda function, *lists: tree_map(
        lambda *t: torch.stack(t), *[function(*a) for a in zip(*lists, strict=True)]
    )
    xs, keys = torch.stack((X, 2 * X, X - 1)), torch.stack((KEY, KEY + 5, KEY.flip(0)))
    params = tree_map(lambda t: torch.stack((t, 2 * t, t.abs())), p)
    each = [tree_map(lambda t, i=i: t[i], params) for i in range(3)]
    close(torch.vmap(f, in_dims=(0, None, None))(xs, KEY, p), stack(lambda x: f(x, KEY, p), xs))
    close(torch.vmap(f, in_dims=(0, 0, None))(xs, keys, p), stack(lambda x, k: f(x, k, p), xs, keys))
    close(torch.vmap(f, in_dims=(None, None, 0))(X, KEY, params), stack(lambda p: f(X, KEY, p), each))
    close(torch.vmap(f)(xs, keys, params), stack(lambda *a: f(*a), xs, keys, each))
    moved = torch.vmap(f, in_dims=(2, 1, None))(xs.movedim(0, 2), keys.movedim(0, 1), p)
    close(moved, stack(lambda x, k: f(x, k, p), xs, keys))
    if name not in ("ensemble_mlp", "predictive_statistics"):  # which take no key
        close(torch.vmap(f, in_dims=(None, 0, None))(X, keys, p), stack(lambda k: f(X, k, p), keys))
    inner = torch.vmap(f, in_dims=(0, None, None))
    close(torch.vmap(inner, in_dims=(None, None, 0))(xs, KEY, params), stack(lambda p: inner(xs, KEY, p), each))
    close(torch.compile(inner, fullgraph=True, backend="aot_eager")(xs, KEY, p), inner(xs, KEY, p))


@pytest.mark.parametrize("name", [n for n in OPERATORS if n not in ("predictive_statistics", "sample_weights")])
def test_mapped_shared_input(name):
    """x without a samples axis, which every draw or member shares; the two others take none."""
    f, p = OPERATORS[name]
    close(torch.vmap(f, in_dims=(0, None, None))(X, KEY, p), torch.stack([f(x, KEY, p) for x in X]))
    params = tree_map(lambda t: torch.stack((t, 2 * t, t, t)), p)
    each = [tree_map(lambda t, i=i: t[i], params) for i in range(4)]
    close(
        torch.vmap(f, in_dims=(0, None, 0))(X, KEY, params),
        torch.stack([f(x, KEY, q) for x, q in zip(X, each, strict=True)]),
    )
    close(torch.vmap(f, in_dims=(None, None, 0))(X[0], KEY, params), torch.stack([f(X[0], KEY, q) for q in each]))


@every_operator
def test_differentiated(name):
    """func.grad, mapped over draws of inputs, under the compiler, and of a mapped call."""
    _, p = OPERATORS[name]
    whole = loss(name)
    leaves = tree_map(lambda t: t.clone().requires_grad_(), (p, X))
    expected = torch.autograd.grad(whole(*leaves), tree_leaves(leaves), allow_unused=True)
    expected = [torch.zeros_like(t) if g is None else g for t, g in zip(tree_leaves(leaves), expected, strict=True)]
    assert sum(float(g.abs().sum()) > 0 for g in expected) == len(expected)
    gradient = torch.func.grad(whole, (0, 1))
    close(gradient(p, X), expected)
    close(torch.compile(gradient, fullgraph=True, backend="aot_eager")(p, X), expected)
    xs = torch.stack((X, 2 * X))
    close(
        torch.vmap(gradient, in_dims=(None, 0))(p, xs),
        tree_map(lambda *t: torch.stack(t), *[gradient(p, x) for x in xs]),
    )
    mapped = lambda p, xs: torch.vmap(whole, in_dims=(None, 0))(p, xs).sum()
    close(torch.func.grad(mapped)(p, xs), tree_map(lambda a, b: a + b, *[gradient(p, x)[0] for x in xs]))


@every_operator
def test_autocast(name):
    """As if the tensors had been cast; statistics stay float32."""
    f, p = OPERATORS[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tree_leaves(f(X, KEY, p))
    if name == "predictive_statistics":
        close(found, tree_leaves(f(X, KEY, p)))
        return
    half = tree_map(lambda t: t.bfloat16(), p)
    if name == "sample_weights":  # no product of its own: weights in their own dtype, then einsum under autocast
        half = p
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = tree_leaves(torch.einsum("sbi,soi->sbo", X, sample_weights(*p, KEY, LAYER)))
    else:
        expected = tree_leaves(f(X.bfloat16(), KEY, half))
    assert all(t.dtype == torch.bfloat16 for t in found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_operator
def test_exported_and_traced(name):
    f, p = OPERATORS[name]
    xs, keys = torch.stack((X, 2 * X)), torch.stack((KEY, KEY + 1))

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.leaves = torch.nn.ParameterList(tree_leaves(p)).requires_grad_(False)

        def forward(self, x, key, xs, keys):
            own = tree_unflatten(list(self.leaves), tree_flatten(p)[1])
            plain, both = f(x, key, own), torch.vmap(lambda x, k: f(x, k, own))(xs, keys)
            return tuple(tree_leaves((plain, both, torch.vmap(lambda x: f(x, key, own))(xs))))

    given = (X, KEY, xs, keys)
    close(torch.export.export(Layer(), given).module()(*given), Layer()(*given))
    mapped = torch.func.functionalize(torch.vmap(lambda x, k: f(x, k, p)), remove="mutations")
    traced = make_fx(mapped, tracing_mode="fake", _allow_non_fake_inputs=True)(xs, keys)
    assert sum(str(n.target).startswith("vbdl.") for n in traced.graph.nodes) == 1, "one call with everything mapped"
    close(traced(xs, keys), mapped(xs, keys))
