import numpy as np
import pytest
import torch
import torch._dynamo.testing
from scipy import stats
from vbdl_kernels import philox
from vbdl_kernels.philox import make_key

MAX = 0xFFFFFFFF
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))

# Random123's tests/kat_vectors: rounds, counter, key, answer
KNOWN_ANSWERS = [
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (MAX,) * 4, (MAX,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (MAX,) * 4, (MAX,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
]


def block(counter, key, rounds=philox.ROUNDS):
    """The four words of one counter, as integers."""
    as_tensors = [tuple(torch.tensor([value]) for value in values) for values in (counter, key)]
    return tuple(int(word) for word in philox.philox4x32(*as_tensors, rounds))


@pytest.mark.parametrize("rounds, counter, key, answer", KNOWN_ANSWERS)
def test_random123_known_answers(rounds, counter, key, answer):
    assert block(counter, key, rounds) == answer


@pytest.mark.parametrize(
    "seed, draw, layer, stream, row, column",
    [
        (0, 0, 0, 0, 0, 0),
        (1, 2, 3, philox.BIAS, 0, 31),
        (-5, 7, 2**28 - 1, philox.DROPOUT, 4, 32),
        (2**63 - 1, MAX, 9, philox.SIGN, 2, 127),
        (0x299F31D0A4093822, 0x13198A2E, 12, philox.ACTIVATION, 3, 128),
        (-(2**63), 2**40 + 5, 12, philox.WEIGHT, 3, 300),
    ],
)
def test_an_element_is_the_word_of_its_counter(seed, draw, layer, stream, row, column):
    """The frozen layout, element by element, from the sentence that defines it."""
    words = philox.words(make_key(seed, [draw]), layer, stream, row + 1, column + 1)[0]
    counter = (row, (column // 128) * 32 + column % 32, draw & MAX, layer << 4 | stream)
    four = block(counter, (seed & MAX, (seed >> 32) & MAX))
    index = (column // 32) % 4
    assert int(words[row, column]) == four[index]

    pair = index // 2 * 2
    radius = np.sqrt(-2 * np.log((four[pair] + 0.5) / 2**32))
    angle = np.uint32(four[pair + 1]).astype(np.int32) * (2 * np.pi / 2**32)
    expected = radius * (np.cos(angle), np.sin(angle))[index % 2]
    normal = philox.normal(make_key(seed, [draw]), layer, stream, row + 1, column + 1)[0, row, column]
    assert float(normal) == pytest.approx(expected, rel=2e-6, abs=2e-6)  # float32: a few roundings of the angle


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 31), (5, 129), (2, 256), (33, 200), (0, 7), (4, 0)])
def test_numpy_is_the_reference(rows, columns):
    key = torch.stack((make_key(17, range(5)), make_key(-(2**40) - 3, [9, 2**31, 0, 4, 4])))
    arguments = (key, 11, philox.WEIGHT, rows, columns)
    assert torch.equal(philox.words(*arguments), philox.reference_words(*arguments))
    # numpy's and torch's float32 log, sin and cos are each a few units in the last place of values below 7
    torch.testing.assert_close(philox.normal(*arguments), philox.reference_normal(*arguments), rtol=2e-6, atol=2e-6)
    assert philox.normal(*arguments).shape == (2, 5, rows, columns)


def test_more_rows_columns_or_draws_change_nothing():
    whole = philox.normal(make_key(3, range(7)), 2, philox.WEIGHT, 40, 300)
    assert torch.equal(philox.normal(make_key(3, [5, 1]), 2, philox.WEIGHT, 13, 77), whole[[5, 1], :13, :77])


@pytest.mark.parametrize("name", ["words", "normal", "keep_mask"])
def test_mapped_and_compiled_are_eager(name):
    call = getattr(philox, name)
    f = (
        (lambda key: call(key, 5, 3, 70, 0.3))
        if name == "keep_mask"
        else lambda key: call(key, 5, philox.WEIGHT, 3, 70)
    )
    mapped = torch.vmap(f)
    keys = make_key(-1, [0, 8, 2**32 - 1])
    expected = f(keys)
    assert torch.equal(mapped(keys), expected)
    assert torch.equal(torch.vmap(mapped)(keys[None])[0], expected)
    assert torch.equal(torch.vmap(mapped, in_dims=1)(keys[:, None])[0], expected)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(mapped, fullgraph=True, backend=counter)
    assert torch.equal(compiled(keys), expected)
    assert torch.equal(compiled(make_key(99, [4, 5, 6])), f(make_key(99, [4, 5, 6])))
    assert counter.frame_count == 1  # a new seed is a new tensor value, never a recompile


def test_the_reference_survives_the_compiler():
    """Plain 64-bit products are silently wrong under some compilers; the split products are not."""
    keys = make_key(2**62 + 12345, range(4))
    call = lambda key: philox.reference_words(key, 3, philox.WEIGHT, 5, 130)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, fullgraph=True)(keys), philox.words(keys, 3, philox.WEIGHT, 5, 130))


@pytest.mark.parametrize("name", ["words", "normal"])
def test_operator_contract(name):
    torch.library.opcheck(getattr(torch.ops.vbdl, name).default, (make_key(1, range(3)), 4, 0, 5, 33))


@pytest.mark.parametrize("first", [0, 3, 2**32 - 2])
def test_a_mask_compares_the_words(first):
    arguments, threshold = (make_key(1, range(3)), 4, philox.DROPOUT, 5, 33), round(0.3 * 2**32)
    mask = philox.keep_mask(arguments[0], 4, 5, 33, 0.3, first=first)
    assert torch.equal(mask, philox.reference_keep(*arguments, threshold, first))
    torch.library.opcheck(torch.ops.vbdl.keep.default, (*arguments, threshold, first))


@pytest.mark.parametrize(
    "key", [torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64), torch.tensor(5)]
)
def test_a_wrong_key_is_refused(key):
    with pytest.raises(ValueError, match="key must be int64"):
        philox.words(key, 0, 0, 1, 1)


@pytest.mark.parametrize("layer, stream, rows", [(2**28, 0, 1), (-1, 0, 1), (0, 16, 1), (0, -1, 1), (0, 0, -1)])
def test_a_counter_out_of_range_is_refused(layer, stream, rows):
    with pytest.raises(ValueError, match="out of range"):
        philox.normal(make_key(0, [0]), layer, stream, rows, 1)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_seed_past_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="64 bits"):
        make_key(seed, [0])


# ---- dropout masks (RELIABILITY.md A5) ------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 1 / 3, 0.5, 0.999, 1.0])
def test_dropout_rate(p):
    key = make_key(21, range(10))
    words = philox.words(key, 4, philox.DROPOUT, 1000, 1000)
    keep = philox.keep_mask(key, 4, 1000, 1000, p)
    threshold = round(p * 2**32)
    assert abs(threshold / 2**32 - p) <= 2.0**-32
    assert torch.equal(keep, words >= threshold)  # the whole word decides: the rate is exact to 2**-32
    n = keep.numel()
    dropped = n - int(keep.sum())
    assert abs(dropped - n * p) <= 4 * np.sqrt(n * p * (1 - p))  # at 0 and 1: exactly none, exactly all


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(p):
    with pytest.raises(ValueError, match="probability"):
        philox.keep_mask(make_key(0, [0]), 0, 1, 1, p)


# ---- normals (RELIABILITY.md A6) ------------------------------------------------------------------------------


def test_normals_are_standard_normal():
    n = philox.normal(make_key(5, range(16)), 3, philox.WEIGHT, 512, 512).double().flatten()
    assert abs(n.mean()) * np.sqrt(n.numel()) < 4.5
    assert abs(n.square().mean() - 1) * np.sqrt(n.numel() / 2) < 4.5
    assert abs(n.pow(3).mean()) * np.sqrt(n.numel() / 15) < 4.5
    assert abs(n.pow(4).mean() - 3) * np.sqrt(n.numel() / 96) < 4.5
    assert stats.kstest(n[: 2**20].numpy(), "norm").pvalue > 1e-4
    expected = 2 * stats.norm.sf(4) * n.numel()
    assert abs(int((n.abs() > 4).sum()) - expected) < 4 * np.sqrt(expected)


@pytest.mark.slow
def test_normals_reach_the_tails():
    """Beyond 5 sigma within 4 sigma of Poisson, at 1e8."""
    count = total = 0
    for start in range(0, 100, 4):
        n = philox.normal(make_key(6, range(start, start + 4)), 1, philox.WEIGHT, 1000, 1000)
        count, total = count + int((n.abs() > 5).sum()), total + n.numel()
    expected = 2 * stats.norm.sf(5) * total
    assert abs(count - expected) < 4 * np.sqrt(expected)


def test_extreme_words_give_finite_normals():
    edge = torch.tensor([0, 1, 2**31 - 1, 2**31, MAX - 1, MAX])
    a, b = torch.meshgrid(edge, edge, indexing="ij")
    for n in philox.box_muller(a, b):
        assert torch.isfinite(n).all()
        assert n.abs().max() < 6.77  # sqrt(-2 log(2**-33))
    for n in philox._numpy_box_muller(a.numpy(), b.numpy()):
        assert np.isfinite(n).all()


# ---- our use of Philox: the battery (RELIABILITY.md A3) -------------------------------------------------------


def battery(w):
    """p-values of twelve tests of a stream of uint32 words that should be independent and uniform."""
    n, p = w.size, {}
    p["high byte"] = stats.chisquare(np.bincount(w >> 24, minlength=256)).pvalue
    p["low byte"] = stats.chisquare(np.bincount(w & 0xFF, minlength=256)).pvalue
    p["uniform"] = stats.kstest((w[: 2**20] + 0.5) / 2**32, "uniform").pvalue
    p["pairs"] = stats.chisquare(np.bincount(((w[:-1:2] >> 28) << 4) | (w[1::2] >> 28), minlength=256)).pvalue
    ones = np.bitwise_count(w)
    p["ones"] = two_sided((ones.sum(dtype=np.int64) - 16 * n) / np.sqrt(8 * n))
    x = w.astype(np.float32) * np.float32(2.0**-32) - np.float32(0.5)
    for lag in (1, 2, 32, 128, 256):
        p[f"lag {lag}"] = two_sided(12 * np.dot(x[:-lag], x[lag:]) / np.sqrt(n - lag))
    changed = np.bitwise_count(w[:-1] ^ w[1:]).astype(np.float32) - 16  # Hamming distance of neighbors, var 8
    p["flips mean"] = two_sided(changed.sum(dtype=np.float64) / np.sqrt(8 * changed.size))
    # 32 fair bits: the fourth central moment is 8 * (3 * 8 - 0.5), so the variance of the square is 188 - 64 = 124
    p["flips variance"] = two_sided((np.dot(changed, changed) - 8 * changed.size) / np.sqrt(124 * changed.size))
    return p


def two_sided(z):
    return 2 * stats.norm.sf(abs(float(z)))


def layers(layer_range, rows, columns):
    key = make_key(31, [3])
    return torch.cat([philox.words(key, layer, philox.WEIGHT, rows, columns) for layer in layer_range])


ORDERINGS = {
    "row-major": lambda: philox.words(make_key(7, range(16)), 3, philox.WEIGHT, 1024, 1024),
    "draw-inner": lambda: philox.words(make_key(8, range(64)), 3, philox.WEIGHT, 512, 512).permute(1, 2, 0),
    "row-inner": lambda: philox.words(make_key(9, range(16)), 3, philox.WEIGHT, 1024, 1024).mT,
    "adjacent seeds": lambda: philox.words(
        torch.cat([make_key(1000 + t, [5]) for t in range(64)]), 3, philox.WEIGHT, 512, 512
    ).permute(1, 2, 0),
    "adjacent layers": lambda: layers(range(64), 512, 512).permute(1, 2, 0),
}


def test_the_layout_passes_the_battery():
    found = {}
    for name, stream in ORDERINGS.items():
        w = stream().numpy().astype(np.uint32).ravel()
        assert w.size == 2**24
        found |= {(name, test): p for test, p in battery(w).items()}
    assert len(found) == 60
    worst = min(found, key=found.__getitem__)
    assert found[worst] > 1e-4 / 60, worst  # Bonferroni
    assert stats.kstest(list(found.values()), "uniform").pvalue > 1e-4


def test_the_battery_finds_too_few_rounds():
    """A test of the test: three rounds of the same generator on the same layout must fail it."""
    row, group = torch.meshgrid(torch.arange(512), torch.arange(128), indexing="ij")
    zero = torch.zeros_like(row)
    w = [philox.philox4x32((row, group, zero + draw, zero), (zero[:1, :1], zero[:1, :1]), 3) for draw in range(4)]
    w = torch.stack([torch.stack(words) for words in w]).permute(1, 2, 3, 0).numpy().astype(np.uint32).ravel()
    assert min(battery(w).values()) < 1e-12


def largest_correlation(streams):
    """The largest |z| of the correlations, and of those of the squares, between rows of standard normals."""
    worst = 0.0
    for values, scale in ((streams, 1.0), ((streams.square() - 1), 2.0)):
        gram = values @ values.T / (scale * streams.shape[1])
        gram.fill_diagonal_(0)
        worst = max(worst, float(gram.abs().max()) * streams.shape[1] ** 0.5)
    return worst


@pytest.mark.parametrize("varied", ["draw", "seed", "seed high", "seed bit", "layer", "layer bit", "stream"])
def test_neighboring_streams_are_uncorrelated(varied):
    def noise(seed=1000 + 7 * 2**32, draw=5, layer=3, stream=0):
        return philox.normal(make_key(seed, [draw]), layer, stream, 128, 512).flatten()

    streams = {
        "draw": [noise(draw=t) for t in range(64)],
        "seed": [noise(seed=1000 + t) for t in range(64)],
        "seed high": [noise(seed=1000 + t * 2**32) for t in range(64)],
        "seed bit": [noise(seed=1000 ^ (1 << t)) for t in range(62)],
        "layer": [noise(layer=t) for t in range(64)],
        "layer bit": [noise(layer=1 << t) for t in range(28)],
        "stream": [noise(stream=t) for t in range(5)],
    }[varied]
    # at most 2016 pairs, twice: |z| > 5.5 has probability below 2e-4 for independent streams
    assert largest_correlation(torch.stack(streams)) < 5.5


def test_avalanche():
    """Each bit of the counter and of the key flips half of the output, each bit with probability one half."""
    generator = torch.Generator().manual_seed(0)
    n = 4096
    inputs = torch.randint(0, 4096, (6, n), generator=generator)  # small numbers, as rows and draws are
    base = torch.stack(philox.philox4x32(tuple(inputs[:4]), tuple(inputs[4:])))
    bits = torch.arange(32)
    worst = 0.0
    for index in range(6):
        for bit in range(32):
            flipped = inputs.clone()
            flipped[index] ^= 1 << bit
            change = torch.stack(philox.philox4x32(tuple(flipped[:4]), tuple(flipped[4:]))) ^ base
            rate = ((change[..., None] >> bits) & 1).float().mean(1)  # (word, bit)
            worst = max(worst, float((rate - 0.5).abs().max()) * 2 * n**0.5)
    # 192 input bits x 128 output bits: the largest of 24,576 |z| is below 5.8 with probability 0.9998
    assert worst < 5.8


# ---- the kernel, in the interpreter ---------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize(  # whole tiles are easier than those one past them
    "rows, columns",
    [(1, 1), (3, 31), (9, 129), pytest.param(16, 256, marks=pytest.mark.slow), (2, 600), (0, 7), (4, 0)],
)
def test_kernel_words_are_the_reference_s_to_the_bit(rows, columns, poisoned):
    from vbdl_kernels import philox_kernel

    key = torch.stack((make_key(2**62 + 17, range(3)), make_key(-(2**40) - 3, [9, 2**31, 2**32 - 1])))
    for layer, stream in ((0, 0), (2**28 - 1, 15)):  # the last no longer fits a signed 32-bit argument
        arguments = (key, layer, stream, rows, columns)
        assert torch.equal(philox_kernel.words(*arguments), philox.reference_words(*arguments))
        torch.testing.assert_close(
            philox_kernel.normal(*arguments), philox.reference_normal(*arguments), rtol=2e-6, atol=2e-6
        )


@pytest.mark.interpreter
def test_kernel_words_are_random123_s():
    from vbdl_kernels import philox_kernel

    words = philox_kernel.words(make_key(0, [0]), 0, 0, 1, 128)
    assert words[0, 0, ::32].tolist() == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
