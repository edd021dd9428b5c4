import importlib

import pytest
import torch
import torch._dynamo.testing
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vbdl_kernels import make_key, normal, sample_weights, sampled_linear
from vbdl_kernels.philox import BIAS, WEIGHT

operator = importlib.import_module("vbdl_kernels.sampled_linear")  # the function has the module's name
LAYER = 3
HALF = [torch.bfloat16, torch.float16]
# samples, batch, in, out: one of everything, odd tails, whole tiles, one past a tile, an empty batch, no input
SHAPES = [
    (1, 1, 1, 1),
    (5, 3, 5, 7),
    (4, 16, 128, 64),
    (3, 17, 130, 65),
    (2, 70, 33, 129),
    (2, 130, 40, 8),
    (5, 0, 4, 4),
    (2, 3, 0, 4),
]


def problem(samples, batch, n_in, n_out, dtype=torch.float32, shared=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    x = draw(*(() if shared else (samples,)), batch, n_in)
    mean, std, bias_mean, bias_std = draw(n_out, n_in), draw(n_out, n_in).abs(), draw(n_out), draw(n_out).abs()
    draws = torch.randint(0, 2**32, (samples,), generator=generator)  # a list of draw numbers, in no order
    return x, mean, std, bias_mean, bias_std, make_key(2**40 + seed, draws)


def require_grad(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


# ---- the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_is_a_linear_layer_for_each_draw(shared):
    x, mean, std, bias_mean, bias_std, key = problem(4, 3, 150, 6, torch.float64, shared)
    y = sampled_linear(x, mean, std, key, LAYER, bias_mean, bias_std)
    for s in range(4):
        weight = mean + std * normal(key[s], LAYER, WEIGHT, 6, 150).double()
        bias = bias_mean + bias_std * normal(key[s], LAYER, BIAS, 1, 6)[0].double()
        expected = torch.nn.functional.linear(x if shared else x[s], weight, bias)
        torch.testing.assert_close(y[s], expected)
        torch.testing.assert_close(  # one draw
            sampled_linear(x if shared else x[s], mean, std, key[s], LAYER, bias_mean, bias_std), expected
        )


def test_the_bias_may_have_a_layer_number_of_its_own():
    x, mean, std, bias_mean, bias_std, key = problem(3, 2, 4, 5)
    bias = bias_std.requires_grad_()
    y = sampled_linear(x, mean, std, key, LAYER, bias_mean, bias, bias_layer=8)
    expected = sampled_linear(x, mean, std, key, LAYER) + sample_weights(bias_mean, bias_std, key, 8, BIAS)[:, None]
    torch.testing.assert_close(y, expected)
    (found,) = torch.autograd.grad(y.sum(), bias)
    torch.testing.assert_close(found, 2 * normal(key, 8, BIAS, 1, 5).sum((0, 1)))


def test_chunks_and_lists_of_draws_change_nothing():
    x, mean, std, *_ = problem(6, 5, 40, 9)
    whole = sampled_linear(x[0], mean, std, make_key(1, range(6)), LAYER)
    for chosen in ([0, 1], [5, 2, 2], [3]):
        assert torch.equal(sampled_linear(x[0], mean, std, make_key(1, chosen), LAYER), whole[chosen])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bias", [0, 1, 2])
def test_derivatives_of_first_and_second_order(shared, bias):
    x, mean, std, bias_mean, bias_std, key = problem(2, 3, 4, 3, torch.float64, shared)
    inputs = require_grad(x, mean, std, *(bias_mean, bias_std)[:bias])
    f = lambda x, mean, std, *biases: sampled_linear(x, mean, std, key, LAYER, *biases)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_operator_contracts():
    x, mean, std, bias_mean, bias_std, key = problem(3, 4, 5, 6)
    gradient = torch.randn(3, 4, 6)
    ops = torch.ops.vbdl
    torch.library.opcheck(ops.sampled_linear.default, (x, mean, std, bias_mean, bias_std, key, LAYER, "", 9))
    torch.library.opcheck(ops.sampled_linear.default, (x[0], mean, std, None, None, key, LAYER, "ieee", 0))
    torch.library.opcheck(ops.sampled_linear_input.default, (gradient, mean, std, key, LAYER, ""))
    torch.library.opcheck(ops.sampled_linear_parameters.default, (gradient, x, key, LAYER, ""))


def test_vmap_is_one_call_with_all_draws():
    x, mean, std, bias_mean, bias_std, key = problem(4, 3, 5, 6)
    f = lambda x, key: sampled_linear(x, mean, std, key, LAYER, bias_mean, bias_std)
    with CountCalls() as calls:
        assert torch.equal(torch.vmap(f)(x, key), f(x, key))
        assert torch.equal(torch.vmap(f, in_dims=(None, 0))(x[0], key), f(x[0], key))
        assert torch.equal(torch.vmap(f, in_dims=(2, 1))(x.permute(1, 2, 0), key.T), f(x, key))
    assert calls.names == ["vbdl.sampled_linear.default"] * 6
    # the same draws for several batches; draws of draws; images of shape (batch, tokens, in)
    torch.testing.assert_close(torch.vmap(f, in_dims=(0, None))(x, key[0]), torch.stack([f(a, key[0]) for a in x]))
    torch.testing.assert_close(torch.vmap(f, in_dims=(0, None))(x, key), torch.stack([f(a, key) for a in x]))
    keys = key.reshape(2, 2, 2)
    expected = torch.stack([f(x[i], keys[i]) for i in range(2)])
    torch.testing.assert_close(torch.vmap(f)(x[:2], keys), expected)
    torch.testing.assert_close(torch.vmap(torch.vmap(f, in_dims=(None, 0)))(x[:2], keys), expected)
    torch.testing.assert_close(torch.vmap(f, in_dims=(None, 0))(x, key), torch.stack([f(x, k) for k in key]))


def test_vmap_over_the_parameters_of_members():
    x, mean, std, bias_mean, bias_std, key = problem(3, 4, 5, 6)
    stack = lambda t: torch.stack((t, 2 * t))
    f = lambda mean, std, bias, key: sampled_linear(x, mean, std, key, LAYER, bias)
    keys = torch.stack((key, key + 1))
    mapped = torch.vmap(f)(stack(mean), stack(std), stack(bias_mean), keys)
    expected = torch.stack([f(mean, std, bias_mean, key), f(2 * mean, 2 * std, 2 * bias_mean, key + 1)])
    torch.testing.assert_close(mapped, expected)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_through_vmap_func_and_autograd_agree(shared):
    x, mean, std, bias_mean, bias_std, key = problem(4, 3, 5, 6, torch.float64, shared)
    leaves = require_grad(x, mean, std, bias_mean, bias_std)

    def loss(x, mean, std, bias_mean, bias_std):
        return sampled_linear(x, mean, std, key, LAYER, bias_mean, bias_std).square().sum()

    def mapped_loss(x, mean, std, bias_mean, bias_std):
        f = lambda x, key: sampled_linear(x, mean, std, key, LAYER, bias_mean, bias_std)
        return torch.vmap(f, in_dims=(None if shared else 0, 0))(x, key).square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    argnums = (0, 1, 2, 3, 4)
    for found in (
        torch.autograd.grad(mapped_loss(*leaves), leaves),
        torch.func.grad(loss, argnums)(*leaves),
        torch.func.grad(mapped_loss, argnums)(*leaves),
    ):
        torch.testing.assert_close(tuple(found), expected)


def test_a_gradient_for_each_draw():
    x, mean, std, bias_mean, bias_std, key = problem(4, 3, 5, 6, torch.float64)

    def loss(mean, std, x, key):
        return sampled_linear(x, mean, std, key, LAYER, bias_mean, bias_std).square().sum()

    found = torch.vmap(torch.func.grad(loss, (0, 1, 2)), in_dims=(None, None, 0, 0))(mean, std, x, key)
    expected = [torch.func.grad(loss, (0, 1, 2))(mean, std, x[s], key[s]) for s in range(4)]
    for a, b in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


def test_compiles_whole_with_vmap_and_gradients():
    x, mean, std, bias_mean, bias_std, key = problem(4, 3, 5, 6)

    def loss(mean, std, x, key):
        f = lambda key: sampled_linear(x, mean, std, key, LAYER, bias_mean, bias_std).relu()
        return torch.vmap(f)(key).square().mean()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for seed in (0, 1):
        leaves = require_grad(mean, std)
        key = make_key(seed, range(seed, seed + 4))
        value = compiled(*leaves, x[0], key)
        torch.testing.assert_close(value, loss(*leaves, x[0], key))
        torch.testing.assert_close(
            torch.autograd.grad(value, leaves), torch.autograd.grad(loss(*leaves, x[0], key), leaves)
        )
    assert counter.frame_count == 1
    grads = torch.compile(torch.func.grad(loss, (0, 1)), fullgraph=True)(mean, std, x[0], key)
    torch.testing.assert_close(grads, torch.func.grad(loss, (0, 1))(mean, std, x[0], key))


def test_traces_as_the_engine_does():
    """functionalize and make_fx refuse a mapped autograd.Function; prediction does not need one."""
    x, mean, std, bias_mean, bias_std, key = problem(4, 3, 5, 6)
    f = lambda x, key: torch.vmap(lambda k: sampled_linear(x, mean, std, k, LAYER, bias_mean, bias_std))(key)
    whole = torch.func.functionalize(f, remove="mutations")
    traced = make_fx(whole, tracing_mode="fake", _allow_non_fake_inputs=True)(x[0], key)
    assert [n.target for n in traced.graph.nodes if "sampled" in str(n.target)] == [
        torch.ops.vbdl.sampled_linear.default
    ]
    assert torch.equal(traced(x[0], key), f(x[0], key))


def test_a_gradient_inside_a_mapped_tensor_is_not_lost():
    x, mean, std, _, _, key = problem(4, 3, 5, 6)
    leaf = x.requires_grad_()
    torch.vmap(lambda x, k: sampled_linear(x, mean, std, k, LAYER))(leaf, key).sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0


def test_exports():
    x, mean, std, bias_mean, bias_std, key = problem(4, 3, 5, 6)

    class Layer(torch.nn.Module):
        def forward(self, x, key):
            return torch.vmap(lambda key: sampled_linear(x, mean, std, key, LAYER, bias_mean, bias_std))(key)

    program = torch.export.export(Layer(), (x[0], key))
    assert torch.equal(program.module()(x[0], key), Layer()(x[0], key))


def test_autocast_decides_the_dtype():
    x, mean, std, bias_mean, bias_std, key = problem(2, 3, 5, 6)
    leaves = require_grad(mean, std)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sampled_linear(x, *leaves, key, LAYER, bias_mean, bias_std)
    half = [t.bfloat16() for t in (x, mean, std, bias_mean, bias_std)]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, sampled_linear(*half[:3], key, LAYER, *half[3:]))
    y.float().sum().backward()
    assert leaves[0].grad.dtype == torch.float32  # the parameters', not autocast's


def test_forward_mode_is_refused_rather_than_wrong():
    x, mean, std, _, _, key = problem(2, 3, 5, 6)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(lambda mean: sampled_linear(x, mean, std, key, LAYER), (mean,), (mean,))


def arguments(**changed):
    x, mean, std, bias_mean, bias_std, key = problem(3, 4, 5, 6)
    given = dict(x=x, mean=mean, std=std, key=key, layer=LAYER, bias_mean=bias_mean, bias_std=bias_std)
    return given | changed


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(std=torch.ones(6, 4)), "mean and std differ"),
        (dict(std=torch.ones(6, 5).double()), "mean and std differ"),
        (dict(mean=torch.ones(6, 5, dtype=torch.int64), std=torch.ones(6, 5, dtype=torch.int64)), "floating"),
        (dict(key=torch.zeros(3, 2)), "key must be int64"),
        (dict(key=torch.zeros(3, 3, dtype=torch.int64)), "key must be int64"),
        (dict(key=make_key(0, range(2))), "x has 3 samples and key 2"),
        (dict(layer=2**28), "out of range"),
        (dict(x=torch.ones(4, 6)), "does not fit weights"),
        (dict(x=torch.ones(3, 4, 5, 5)), "batch, in"),
        (dict(x=torch.ones(4, 5).double()), "one dtype"),
        (dict(bias_mean=torch.ones(5)), "bias_mean"),
        (dict(bias_std=torch.ones(7)), "bias_std"),
        (dict(bias_mean=None), "bias_std without"),
        (dict(precision="fp8"), "precision"),
        (dict(mean=torch.ones(1, 1).expand(2**16, 2**15), std=torch.ones(1, 1).expand(2**16, 2**15)), "up to"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        sampled_linear(**arguments(**changed))


# ---- the kernel, in the interpreter ---------------------------------------------------------------------------


def tolerance(dtype, length):
    """Of float32 sums of `length` terms: sqrt(length) roundings of the operands' dtype, relative to the largest."""
    epsilon = torch.finfo(dtype).eps
    # the interpreter cuts float32 to bfloat16 where hardware rounds: twice the error, and it does not average out
    worst = 2 * length if dtype == torch.bfloat16 else 2 * length**0.5
    return min(worst * epsilon, 0.03) if dtype == torch.bfloat16 else worst * epsilon


def assert_equal_to(found, expected, dtype, length):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if not expected.numel():
        return
    scale = float(expected.double().abs().max()) or 1.0
    assert not found.isnan().any()
    assert float((found.double() - expected.double()).abs().max()) <= tolerance(dtype, max(length, 4)) * scale


# an input that all samples share is read with a stride of zero, at every shape alike: with and without whole tiles
@pytest.mark.interpreter
@pytest.mark.parametrize(
    "shape, shared",
    [(s, False) for s in SHAPES]
    + [(s, True) if s in SHAPES[1::4] else pytest.param(s, True, marks=pytest.mark.slow) for s in SHAPES],
)
def test_kernels_match_the_reference(shape, shared, poisoned, dtype=torch.float32):
    samples, batch, n_in, n_out = shape
    x, mean, std, bias_mean, bias_std, key = problem(*shape, dtype, shared)
    small = max(shape) < 10
    for biases in ((bias_mean, bias_std), (bias_mean, None), (None, None))[: 3 if small else 1]:
        given = (x, mean, std, *biases, key, LAYER, "ieee", 2**28 - 1)
        assert_equal_to(
            torch.ops.vbdl.sampled_linear(*given), operator.reference_sampled_linear(*given), dtype, n_in + 1
        )
    gradient = torch.randn(samples, batch, n_out, generator=torch.Generator().manual_seed(1)).to(dtype)
    given = (gradient, mean, std, key, LAYER, "ieee")
    assert_equal_to(torch.ops.vbdl.sampled_linear_input(*given), operator._reference_input(*given), dtype, n_out)
    given = (gradient, x, key, LAYER, "ieee")
    found = torch.ops.vbdl.sampled_linear_parameters(*given)
    for a, b in zip(found, operator._reference_parameters(*given), strict=True):
        assert_equal_to(a, b, dtype, samples * batch)


# in one tile; float32 is tried at all shapes, by the same kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [SHAPES[1], pytest.param(SHAPES[3], marks=pytest.mark.slow)])
def test_kernels_match_the_reference_in_half_precision(dtype, shape, poisoned):
    test_kernels_match_the_reference(shape, False, poisoned, dtype)


@pytest.mark.interpreter
def test_strides_are_followed(poisoned):
    x, mean, std, _, _, key = problem(3, 4, 20, 6)
    expected = operator.reference_sampled_linear(x, mean, std, None, None, key, LAYER)
    run = lambda x, mean, std, key: torch.ops.vbdl.sampled_linear(x, mean, std, None, None, key, LAYER, "ieee", 0)
    spaced = torch.empty(3, 8, 40)[:, ::2, 3:23].copy_(x)
    for strided in (x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1), spaced):
        assert not strided.is_contiguous()
        found = run(strided, mean.T.contiguous().T, std.T.contiguous().T, key.T.contiguous().T)
        assert_equal_to(found, expected, torch.float32, 20)
    one = torch.ones(1, 1, 1)
    gradient = one.expand(3, 4, 6)  # what a sum's gradient is: every stride zero
    found = torch.ops.vbdl.sampled_linear_parameters(gradient, x, key, LAYER, "ieee")
    expected = operator._reference_parameters(gradient.contiguous(), x, key, LAYER, "ieee")
    for a, b in zip(found, expected, strict=True):
        assert_equal_to(a, b, torch.float32, 12)


# half precision rounds the same weights: against the reference above, and by both ways in test_regime.py
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_the_same_weights_in_all_kernels_to_the_bit(dtype):
    """The identity in place of the input, or of the gradient, reads the weights out of the fused kernels."""
    _, mean, std, bias_mean, bias_std, key = problem(3, 1, 70, 66, dtype)
    weights = sample_weights(mean, std, key, LAYER)
    forward = sampled_linear(torch.eye(70, dtype=dtype), mean, std, key, LAYER, precision="ieee")
    assert torch.equal(forward.mT, weights)
    eye = torch.eye(66, dtype=dtype).expand(3, -1, -1)
    assert torch.equal(torch.ops.vbdl.sampled_linear_input(eye, mean, std, key, LAYER, "ieee"), weights)
    nothing = sampled_linear(torch.zeros(1, 70, dtype=dtype), mean, std, key, LAYER, bias_mean, bias_std)
    assert torch.equal(nothing[:, 0], sample_weights(bias_mean, bias_std, key, LAYER, BIAS))


@pytest.mark.interpreter
def test_autograd_runs_the_kernels():
    x, mean, std, bias_mean, bias_std, key = problem(3, 5, 7, 6)
    leaves = require_grad(x, mean, std, bias_mean, bias_std)
    f = lambda run, x, mean, std, *biases: run(x, mean, std, *biases, key).square().sum()
    fused = lambda x, mean, std, a, b, key: sampled_linear(x, mean, std, key, LAYER, a, b, "ieee")
    plain = lambda *given: operator.reference_sampled_linear(*given, LAYER)
    with CountCalls() as calls:
        found = torch.autograd.grad(f(fused, *leaves), leaves)
    assert set(calls.names) == {
        "vbdl.sampled_linear.default",
        "vbdl.sampled_linear_input.default",
        "vbdl.sampled_linear_parameters.default",
    }
    expected = torch.autograd.grad(f(plain, *leaves), leaves)
    for a, b in zip(found, expected, strict=True):
        assert_equal_to(a, b, torch.float32, 15 * 7)


# ---- memory: no tensor of samples x out x in -------------------------------------------------------------------


class CountCalls(TorchDispatchMode):
    """The names of our operators, in the order they ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("vbdl.sampled"):
            self.names.append(str(function))
        return function(*args, **kwargs or {})


class NothingLarger(TorchDispatchMode):
    """Fails on any tensor with as many elements as the weights of all draws, also inside our operators."""

    def __init__(self, elements):
        super().__init__()
        self.elements = elements

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() >= self.elements:
                raise MemoryError(f"{function} made {tuple(leaf.shape)}")
        return result


def train_step(run):
    samples, batch, n_in, n_out = 16, 2, 40, 48
    x, mean, std, bias_mean, bias_std, key = problem(samples, batch, n_in, n_out, shared=True)
    leaves = require_grad(x, mean, std, bias_mean, bias_std)
    # in bytes, so that half precision would be caught too: 16 * 40 * 48 elements of one byte
    with NothingLarger(samples * n_in * n_out):
        torch.autograd.grad(run(*leaves, key).square().sum(), leaves)


# test_allocations.py looks at every allocation of the same step by default
@pytest.mark.slow
@pytest.mark.interpreter
def test_no_tensor_of_all_draws_of_the_weights():
    import vbdl_kernels.sampled_linear_gradient_kernel as gradients
    import vbdl_kernels.sampled_linear_kernel as forward

    with pytest.MonkeyPatch.context() as patch:
        # a mode does not see inside an operator: call the launches themselves under it
        for name in ("sampled_linear", "sampled_linear_input", "sampled_linear_parameters"):
            launch = getattr(forward if name == "sampled_linear" else gradients, name)
            patch.setattr(torch.ops.vbdl, name, launch)
        train_step(lambda x, mean, std, a, b, key: sampled_linear(x, mean, std, key, LAYER, a, b))


def test_the_memory_check_catches_the_reference():
    with pytest.raises(MemoryError, match="16, 48, 40|16, 40, 48"):
        train_step(lambda x, mean, std, a, b, key: operator.reference_sampled_linear(x, mean, std, a, b, key, LAYER))
