"""What only a GPU can show: the PTX paths, the real launches, the allocator's peak."""

import copy
import importlib

import pytest
import torch
from vbdl_kernels import (
    bayesian_mlp,
    ensemble_mlp,
    local_reparameterized_linear,
    make_key,
    masked_linear,
    normal,
    predictive_statistics,
    sample_weights,
    sampled_linear,
    words,
)
from vbdl_kernels.philox import BIAS, reference_normal, reference_words

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
LAYER = 3
SHAPES = [(1, 1, 1, 1), (5, 3, 5, 7), (4, 16, 128, 64), (3, 17, 130, 65), (7, 200, 300, 129), (2, 64, 512, 512)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(name):
    return getattr(importlib.import_module(f"vbdl_kernels.{name}"), f"reference_{name}")


def problem(samples, batch, n_in, n_out, dtype, shared=False):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to("cuda", dtype)
    x = draw(*(() if shared else (samples,)), batch, n_in)
    key = make_key(2**50, torch.randint(0, 2**32, (samples,), generator=generator)).cuda()
    return x, draw(n_out, n_in), draw(n_out, n_in).abs(), draw(n_out), draw(n_out).abs(), key


def close(found, expected, dtype, length):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if expected.numel():
        # the hardware's sine and logarithm are right to 1e-6; sums round once a term; half precision rounds operands
        bound = (1e-5 + 2 * length * 2.0**-24) if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        scale = float(expected.double().abs().max()) or 1.0
        assert float((found.double() - expected.double()).abs().max()) <= bound * scale


def test_words_to_the_bit_and_normals_to_rounding():
    key = make_key(2**62 + 5, [0, 7, 2**32 - 1])
    for shape in ((1, 1), (9, 129), (64, 512)):
        on_device = words(key.cuda(), 2**28 - 1, 4, *shape).cpu()
        assert torch.equal(on_device, reference_words(key, 2**28 - 1, 4, *shape))
        error = (normal(key.cuda(), 1, 0, *shape).cpu() - reference_normal(key, 1, 0, *shape)).abs()
        # lg2.approx is right to 2**-22 near 1, where the radius is its root: 5e-4 for one in a few million
        assert error.max() < 6e-4 and error.median() < 1e-6


def test_no_normal_is_not_a_number():
    """10^9 of them: the logarithm of a number just below 1 is where one could be."""
    total = squares = 0.0
    for start in range(0, 60, 4):
        n = normal(make_key(1, range(start, start + 4)).cuda(), 0, 0, 4096, 4096)
        assert torch.isfinite(n).all() and n.abs().max() < 6.8
        total, squares = total + float(n.double().sum()), squares + float(n.double().square().sum())
    count = 60 * 4096 * 4096
    assert abs(total) / count**0.5 < 4.5
    assert abs(squares - count) / (2 * count) ** 0.5 < 4.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_operators_match_their_references(shape, shared, dtype):
    samples, batch, n_in, n_out = shape
    x, mean, std, bias_mean, bias_std, key = problem(*shape, dtype, shared)
    given = (x, mean, std, bias_mean, bias_std, key, LAYER, "ieee")
    close(torch.ops.vbdl.sampled_linear(*given, 9), reference("sampled_linear")(*given, 9), dtype, n_in)
    expected = reference("local_reparameterized_linear")(*given)
    close(torch.ops.vbdl.local_reparameterized_linear(*given), expected, dtype, n_in)
    for side in ("input", "output"):
        given = (x, mean, bias_mean, key, LAYER, 0.3, side, "ieee")
        close(torch.ops.vbdl.masked_linear(*given), reference("masked_linear")(*given), dtype, n_in)
    module = importlib.import_module("vbdl_kernels.sampled_linear")
    gradient = torch.randn(samples, batch, n_out, device="cuda").to(dtype)
    given = (gradient, mean, std, key, LAYER, "ieee")
    close(torch.ops.vbdl.sampled_linear_input(*given), module._reference_input(*given), dtype, n_out)
    given = (gradient, x, key, LAYER, "ieee")
    for a, b in zip(
        torch.ops.vbdl.sampled_linear_parameters(*given), module._reference_parameters(*given), strict=True
    ):
        close(a, b, dtype, samples * batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_weights_in_all_kernels_to_the_bit(dtype):
    _, mean, std, bias_mean, bias_std, key = problem(3, 1, 300, 130, dtype)
    weights = sample_weights(mean, std, key, LAYER)
    forward = sampled_linear(torch.eye(300, dtype=dtype, device="cuda"), mean, std, key, LAYER, precision="ieee")
    assert torch.equal(forward.mT, weights)
    eye = torch.eye(130, dtype=dtype, device="cuda").expand(3, -1, -1)
    assert torch.equal(torch.ops.vbdl.sampled_linear_input(eye, mean, std, key, LAYER, "ieee"), weights)
    zero = torch.zeros(1, 300, dtype=dtype, device="cuda")
    drawn = sampled_linear(zero, mean, std, key, LAYER, bias_mean, bias_std)
    assert torch.equal(drawn[:, 0], sample_weights(bias_mean, bias_std, key, LAYER, BIAS))


STATISTICS = [(33, 130, 10), (100, 1, 10), (100, 3000, 10), (5, 300, 43), (100, 500, 16), (33, 130, 100), (9, 20, 1000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*STATISTICS, (100, 200_000, 10)])
def test_statistics_match_their_reference(shape, dtype):
    logits = (torch.randn(shape, device="cuda") * 4).to(dtype)
    for a, b in zip(predictive_statistics(logits), reference("predictive_statistics")(logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "widths, dtype, precision, tolerance",
    [
        ([6, 20, 33, 4], torch.float32, "highest", 1e-5),
        ([100, 128, 128, 10], torch.float32, "high", 5e-3),  # tf32: 2**-11 a factor, layer after layer
        ([100, 128, 128, 10], torch.bfloat16, "highest", 2e-2),
    ],
)
def test_networks_match_their_references(widths, dtype, precision, tolerance):
    module = importlib.import_module("vbdl_kernels.mlp")
    key = make_key(0, range(5)).cuda()
    pairs = list(zip(widths, widths[1:], strict=False))
    make = lambda *shape: torch.randn(shape, device="cuda").to(dtype)
    x, weights, biases = make(70, widths[0]), [make(5, o, i) / i**0.5 for i, o in pairs], [make(5, o) for _, o in pairs]
    means, stds, bias_means, bias_stds = (
        [t[0] for t in weights], [t[1].abs() for t in weights], [t[0] for t in biases], [t[1].abs() for t in biases]
    )  # fmt: skip
    drawn = (x, means, stds, bias_means, bias_stds, key, [1, 2, 3])
    expected = module.reference_ensemble_mlp(x, weights, biases, "tanh")
    expected_drawn = module.reference_bayesian_mlp(*drawn, [4, 5, 6], "relu")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found, found_drawn = ensemble_mlp(x, weights, biases, "tanh"), bayesian_mlp(*drawn, bias_layers=[4, 5, 6])
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in ((found, expected), (found_drawn, expected_drawn)):
        assert float((a.double() - b.double()).abs().max()) <= tolerance * float(b.double().abs().max())


def test_training_holds_no_weights_of_all_draws():
    samples, n = 64, 1024
    x, mean, std, *_ = problem(1, 16, n, n, torch.bfloat16, shared=True)
    leaves = [t.requires_grad_() for t in (x, mean, std)]
    key = make_key(0, range(samples)).cuda()

    def step():
        torch.autograd.grad(sampled_linear(*leaves, key, LAYER).float().square().sum(), leaves)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < samples * n * n  # bytes: half of the weights in bfloat16


@pytest.mark.parametrize("backend", ["inductor", "reduce-overhead"])
def test_compiled_and_mapped(backend):
    x, mean, std, bias_mean, bias_std, key = problem(4, 8, 64, 32, torch.float32)
    f = lambda x, key: torch.vmap(lambda x, k: sampled_linear(x, mean, std, k, LAYER, bias_mean, bias_std))(x, key)
    mode = {} if backend == "inductor" else {"mode": "reduce-overhead"}
    compiled = torch.compile(f, fullgraph=True, **mode)
    for seed in range(3):
        key = make_key(seed, range(4)).cuda()
        assert torch.equal(compiled(x, key).clone(), f(x, key))


def test_local_and_masked_gradients():
    x, mean, std, _, _, key = problem(4, 8, 64, 32, torch.float32, shared=True)
    for run in (
        lambda x, m, s: local_reparameterized_linear(x, m, s, key, LAYER, precision="ieee"),
        lambda x, m, s: masked_linear(x, m, key, LAYER, 0.3, precision="ieee") + s.sum() * 0,
        lambda x, m, s: sampled_linear(x, m, s, key, LAYER, precision="ieee"),
    ):
        leaves = [t.detach().clone().requires_grad_() for t in (x, mean, std)]
        found = torch.autograd.grad(run(*leaves).square().sum(), leaves)
        double = [t.detach().double().requires_grad_() for t in leaves]  # float64 runs the reference
        expected = torch.autograd.grad(run(*double).square().sum(), double)
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).abs().max()) <= 2e-4 * (float(b.abs().max()) or 1.0)


@pytest.mark.parametrize("joint", [True, False])
def test_a_predictor_uses_the_kernels(joint):
    """With no change in user code, and with the draws of the CPU."""
    vbdl = importlib.import_module("vbdl")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    q = vbdl.MeanField(network, n_data=1000)
    x = torch.randn(70, 64)
    # a budget that the weights of all draws do not fit, so that the fused kernel is the choice
    settings = dict(n_samples=64, joint=joint, memory_budget=2**21)
    expected = vbdl.Predictor(q, vbdl.Categorical(), compile=False, **settings)(x)
    predict = vbdl.Predictor(q, vbdl.Categorical(), device="cuda", **settings)
    found = predict(x)
    for name in ("probs", "total", "aleatoric", "standard_error"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), rtol=2e-3, atol=1e-4)
    assert ("sampled_linear" if joint else "local_reparameterized_linear") in predict.explain()
    gradient = lambda predict, x: torch.autograd.grad(predict(x).total.sum(), x)[0].cpu()
    expected = gradient(vbdl.Predictor(q, vbdl.Categorical(), compile=False, **settings), x.requires_grad_())
    found = gradient(predict, x.detach().cuda().requires_grad_())
    assert float((found - expected).abs().max()) <= 5e-3 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_of_sampled_linear_are_the_same_draws(dtype, monkeypatch):
    regime = importlib.import_module("vbdl_kernels.regime")
    monkeypatch.setattr(regime, "_CHUNK", 2 * 128 * 256 * dtype.itemsize)  # two draws at a time, of five
    x, mean, std, bias_mean, bias_std, key = problem(5, 300, 256, 128, dtype, shared=True)
    leaves = [t.requires_grad_() for t in (x, mean, std, bias_mean, bias_std)]
    found = []
    for strategy in ("fused", "sampler"):
        with regime.always(strategy):
            y = sampled_linear(x, mean, std, key, LAYER, bias_mean, bias_std)
            found.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for a, b in zip(*found, strict=True):
        close(a.detach(), b.detach(), dtype, 300)


def training(n_samples, width=256):
    vbdl = importlib.import_module("vbdl")
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, width)]
    q = vbdl.MeanField(torch.nn.Sequential(*layers), n_data=100, n_samples=n_samples)
    return vbdl, q, torch.randn(16, width), torch.randint(0, width, (16,))


def test_training_uses_the_kernels_with_the_draws_of_the_cpu():
    vbdl, q, x, y = training(3)
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        own, likelihood = copy.deepcopy(q).to(device), vbdl.Categorical().to(device)
        losses.append(own.loss(x.to(device), y.to(device), likelihood))
        losses[-1].backward()
        gradients.append([p.grad.cpu() for p in own.parameters()])
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-4, atol=1e-3)
    for a, b in zip(*reversed(gradients), strict=True):
        assert float((a - b).abs().max()) <= 1e-3 * float(b.abs().max())
    history = vbdl.fit(q.cuda(), (x, y), vbdl.Categorical().cuda(), epochs=3, compile=True)
    again = vbdl.fit(training(3)[1].cuda(), (x, y), vbdl.Categorical().cuda(), epochs=3, compile=False)
    assert again.train_loss[-1][0] == pytest.approx(history.train_loss[-1][0], rel=1e-3)


def test_training_memory_is_flat_in_the_draws():
    def peak(n_samples):
        vbdl, q, x, y = training(n_samples, width=1024)
        q, x, y, likelihood = q.cuda(), x.cuda(), y.cuda(), vbdl.Categorical().cuda()
        for _ in range(2):
            q.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            q.loss(x, y, likelihood).backward()
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    # two layers of 4 MiB: in plain operations 14 more draws keep their weights and their noise, 224 MiB
    assert peak(16) - peak(2) < 14 * 2**20


def test_small_predictions_are_replayed():
    vbdl = importlib.import_module("vbdl")
    replay = importlib.import_module("vbdl.compiling.replay")
    torch.manual_seed(0)
    make = lambda: torch.nn.Sequential(torch.nn.Linear(8, 200), torch.nn.ReLU(), torch.nn.Linear(200, 3))
    small = lambda: torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    for members, name in (([make() for _ in range(5)], ""), ([small() for _ in range(5)], "ensemble_mlp")):
        q = vbdl.DeepEnsemble(members)
        predict = vbdl.Predictor(q, vbdl.Categorical(), device="cuda")
        plain = vbdl.Predictor(q, vbdl.Categorical(), compile=False)
        kept = []
        for _ in range(5):
            x = torch.randn(64, 8)
            kept.append((predict(x.cuda()).probs, plain(x).probs))
        for found, expected in kept:  # also those that were handed out before later calls
            torch.testing.assert_close(found.cpu(), expected, rtol=2e-3, atol=1e-4)
        assert name in predict.explain()
        if not name:  # several kernels a call
            programs = [
                p
                for found in predict.executions.by_shape.values()
                for e in found
                for p in e.chunking(e.plan.chunk)._programs.values()
            ]
            calls = [p._call for p in programs if isinstance(p._call, replay.Replayed)]
            assert any(c._replay is not None for c in calls)


def test_what_was_measured_is_sound(monkeypatch, tmp_path):
    """The calibration on this device, on a small layer: written, read, and a crossover in it."""
    measured, regime = (importlib.import_module(f"vbdl_kernels.{n}") for n in ("measured", "regime"))
    from triton.testing import do_bench

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = measured.measure(lambda _, call: do_bench(call, warmup=2, rep=5, return_mode="median") * 1e-3, size=1024)
    measured.keep(measured.device_name(), found)
    assert regime.device_card() == regime.Card(**found)
    assert regime.device_card().half_rows >= 8
