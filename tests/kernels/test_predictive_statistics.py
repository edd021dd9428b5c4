import importlib

import pytest
import torch
from vbdl_kernels import predictive_statistics

reference = importlib.import_module("vbdl_kernels.predictive_statistics").reference_predictive_statistics


def problem(samples, batch, classes, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(samples, batch, classes, generator=generator, dtype=torch.float64) * scale).to(dtype)


def check(found, logits, tolerance=1e-6):
    """Against float64 from the definitions."""
    probs = torch.softmax(logits.double(), -1)
    entropy = lambda p: -torch.xlogy(p, p).sum(-1)
    mean = probs.mean(0)
    expected = mean, ((probs - mean) ** 2).mean(0), entropy(mean), entropy(probs).mean(0)
    for a, b in zip(found, expected, strict=True):
        # probabilities below 1, entropies below log(classes): a few float32 roundings
        torch.testing.assert_close(a.double(), b, rtol=5 * tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_is_the_definition(dtype):
    logits = problem(9, 5, 7, dtype)
    check(predictive_statistics(logits), logits)


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_logits(scale):
    logits = problem(4, 5, 6, scale=scale)
    logits[0, 0, 1] = -torch.inf
    found = predictive_statistics(logits)
    assert all(torch.isfinite(t).all() for t in found)
    check(found, logits)


def test_the_same_member_twice_knows_no_epistemic_uncertainty():
    found = predictive_statistics(problem(1, 50, 10).expand(8, -1, -1))
    torch.testing.assert_close(found.total, found.aleatoric, rtol=0, atol=1e-6)
    assert found.variance.max() < 1e-13


def test_vmap_gradient_and_compile():
    logits = problem(6, 4, 3)
    mapped = torch.vmap(predictive_statistics, in_dims=1)(logits[:, :, None])
    for a, b in zip(mapped, predictive_statistics(logits), strict=True):
        torch.testing.assert_close(a[:, 0], b)
    inputs = problem(3, 2, 4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: tuple(predictive_statistics(logits)), inputs)
    torch.library.opcheck(torch.ops.vbdl.predictive_statistics.default, (logits,))
    compiled = torch.compile(predictive_statistics, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(logits), predictive_statistics(logits), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 4)])
def test_what_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match="samples >= 1"):
        predictive_statistics(torch.zeros(shape))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (9, 5, 7), (3, 130, 10), (100, 2, 20), (5, 9, 43), (2, 3, 100), (2, 3, 511), (2, 3, 1000), (4, 0, 3)],
)
def test_kernel_is_the_definition(shape, dtype, poisoned):
    logits = problem(*shape, dtype)
    check(torch.ops.vbdl.predictive_statistics(logits), logits)


@pytest.mark.interpreter
def test_kernel_on_extreme_logits_and_strides(poisoned):
    logits = problem(4, 5, 6, scale=1e4)
    logits[0, 0, 1] = -torch.inf
    for strided in (logits, logits.permute(2, 0, 1).contiguous().permute(1, 2, 0), logits[::2, 1:4]):
        found = torch.ops.vbdl.predictive_statistics(strided)
        assert all(torch.isfinite(t).all() for t in found)
        check(found, strided)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_hides_no_nan(dtype, poisoned):
    """A diverged network is seen: NaN logits, and a row where no class is possible, are NaN as in the reference."""
    logits = problem(3, 4, 6, dtype)
    logits[1, 0, 2] = torch.nan
    logits[2, 2] = -torch.inf
    found = torch.ops.vbdl.predictive_statistics(logits)
    assert [t.isnan().flatten(1).any(1).tolist() if t.ndim > 1 else t.isnan().tolist() for t in found] == [
        [True, False, True, False]
    ] * 4
    check([t[1::2] for t in found], logits[:, 1::2])
    assert reference(logits)[0].isnan().any(1).tolist() == [True, False, True, False]
