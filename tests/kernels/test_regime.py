import dataclasses

from vbdl_kernels.regime import Card, choose, estimates


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
