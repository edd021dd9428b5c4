import dataclasses

import pytest
import torch
from vbdl_kernels import regime
from vbdl_kernels.regime import Card, choose, estimates, is_launch_bound, of_masks, of_network


def test_small_batches_are_fused_and_large_ones_are_not():
    assert choose(32, 16, 4096, 4096) == "fused"
    assert choose(32, 1024, 4096, 4096, memory_budget=2**33) == "sampler"
    # the batch at which one overtakes the other: 128 to 256 in the model behind the constants
    cross = next(b for b in range(16, 1024) if choose(32, b, 4096, 4096, memory_budget=2**33) == "sampler")
    assert 100 <= cross <= 300


def test_what_is_asked_for_comes_before_speed():
    assert choose(32, 1, 4096, 4096, joint=False) == "local"
    assert choose(32, 1, 4096, 4096, joint=True) != "local"
    assert choose(128, 1024, 4096, 4096, memory_budget=2**20) == "fused"


def test_a_card_that_draws_faster_moves_the_crossover_up():
    fast = dataclasses.replace(Card(), normals=4e12)
    slow = estimates(32, 256, 4096, 4096)
    assert estimates(32, 256, 4096, 4096, card=fast)["fused"] < slow["fused"]
    assert min(slow.values()) > 0


@pytest.mark.parametrize(
    "batch, joint, size, expected",
    [  # the regime map of the design: rows of a 4096 x 4096 layer under 32 draws
        (1, False, 2, "local"),
        (64, False, 2, "local"),
        (1, True, 2, "fused"),
        (16, True, 2, "fused"),
        (128, True, 2, "fused"),
        (512, True, 2, "sampler"),
        (4096, True, 2, "sampler"),
        (16, True, 4, "fused"),
        (512, True, 4, "sampler"),
    ],
)
def test_the_regime_map(batch, joint, size, expected):
    assert choose(32, batch, 4096, 4096, size, joint=joint, memory_budget=2**40) == expected


def test_weights_are_kept_where_they_fit_and_many_batches_come():
    assert choose(32, 16, 1024, 1024, kept=True) == "drawn"
    assert choose(32, 16, 4096, 4096, kept=True, memory_budget=2**29) == "fused"
    assert choose(32, 1, 4096, 4096, kept=True, joint=False, memory_budget=2**40) == "local"


def test_a_measured_crossover_decides():
    """Whatever the model says of these shapes."""
    late, early = dataclasses.replace(Card(), half_rows=1024.0), dataclasses.replace(Card(), half_rows=8.0)
    for batch, on_late, on_early in ((16, "fused", "sampler"), (512, "fused", "sampler"), (2048, "sampler", "sampler")):
        assert choose(32, batch, 4096, 4096, memory_budget=2**40, card=late) == on_late
        assert choose(32, batch, 4096, 4096, memory_budget=2**40, card=early) == on_early
    # that of half precision says nothing of float32
    assert choose(32, 16, 4096, 4096, 4, memory_budget=2**40, card=early) == "fused"


def test_products_without_tensor_cores_are_left_to_the_library_sooner():
    cross = lambda exact: next(
        b for b in range(1, 2048) if choose(32, b, 4096, 4096, 4, memory_budget=2**40, exact=exact) == "sampler"
    )
    assert cross(True) <= cross(False)


def test_small_networks_are_one_launch():
    best = lambda *shape, **options: min((t := of_network(*shape, **options)), key=t.__getitem__)
    for samples, batch in ((5, 1), (32, 1), (32, 64), (128, 16)):
        assert best(samples, batch, [64, 64, 64, 10]).startswith("whole")
        assert "whole" in best(samples, batch, [64, 64, 64, 10], drawn=True)
    # without tensor cores a program alone is slow, and past a width of 64 it does not fit the registers
    assert best(64, 65536, [64, 64, 64, 10], 4, exact=True) == "layers"
    assert best(5, 1, [128, 128, 10], 4, exact=True) == "layers" and best(5, 1, [128, 128, 10]) == "whole"


def test_masks_of_a_shared_input():
    """Made in the product where it is small: there a launch is saved. Else the library's product of all rows wins."""
    best = lambda *shape: min((t := of_masks(*shape)), key=t.__getitem__)
    assert best(100, 32, 512, 10) == "masked"
    assert best(32, 1, 4096, 4096) == best(32, 256, 4096, 4096) == "activations"
    slow = dataclasses.replace(Card(), normals=1e9)
    times = of_masks(100, 32, 512, 10, card=slow)
    assert times["activations"] < times["masked"]


def test_small_calls_are_replayed():
    small, large = dict(work=2e6, bytes=1e6, launches=6), dict(work=2e11, bytes=1e9, launches=6)
    assert is_launch_bound(**small) and not is_launch_bound(**large)
    assert not is_launch_bound(2e6, 1e6, 1)  # one kernel is one launch either way


def test_what_sampled_linear_holds_does_not_grow_with_the_draws():
    few, many = (regime.draws_at_once(s, 1024, 4096, 4096, 2, "") for s in (8, 256))
    assert few == many == 2 and few * 4096 * 4096 * 2 <= 2**26
    assert regime.draws_at_once(8, 16, 4096, 4096, 2, "") == 0
    assert regime.draws_at_once(8, 1024, 16384, 16384, 2, "") == 1  # at least one, whatever its size
    assert torch.get_float32_matmul_precision() == "highest"
    assert regime.draws_at_once(8, 4096, 4096, 4096, 4, "tf32") == 0  # torch's own product would be exact
    with regime.always("sampler"):
        assert regime.draws_at_once(8, 1, 64, 64, 2, "") == 8
    with regime.always("fused"):
        assert regime.draws_at_once(8, 4096, 4096, 4096, 2, "") == 0


@pytest.mark.interpreter
@pytest.mark.parametrize("shared, dtype", [(True, torch.float32), (False, torch.float16)])
def test_both_ways_of_sampled_linear_are_the_same_draws(shared, dtype, monkeypatch):
    from vbdl_kernels import make_key, sampled_linear

    monkeypatch.setattr(regime, "_CHUNK", 2 * 20 * 33 * dtype.itemsize)  # two draws at a time, of five
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(shape).to(dtype).requires_grad_()
    x, mean, std = make(*(() if shared else (5,)), 7, 33), make(20, 33), make(20, 33)
    bias_mean, bias_std = make(20), make(20)
    key = make_key(3, range(5))
    leaves = [x, mean, std, bias_mean, bias_std]
    found = {}
    for strategy in ("fused", "sampler"):
        for drawn_bias in (True, False):
            with regime.always(strategy):
                bias = (bias_mean, bias_std if drawn_bias else None)
                y = sampled_linear(x, mean, std, key, 1, *bias, bias_layer=2)
                grads = torch.autograd.grad(y.float().square().sum(), leaves, allow_unused=True)
            found[strategy, drawn_bias] = [y.detach(), *(g for g in grads if g is not None)]
    for drawn_bias in (True, False):
        for a, b in zip(found["fused", drawn_bias], found["sampler", drawn_bias], strict=True):
            scale = float(b.double().abs().max())
            assert float((a.double() - b.double()).abs().max()) <= 20 * torch.finfo(dtype).eps * scale
