"""The cost model for layers with drawn weights or masks on a GPU: estimates seconds and chooses the fastest way.

It uses the constants of `card.py`.

    estimates, choose    one layer: local reparameterization, fused kernel, sampler and product, or kept weights
    of_network           a small network: one kernel for all layers, or layer by layer
    of_masks             dropout of an input that all draws share: in the product, or on activations
    is_launch_bound      whether a call should be replayed as a CUDA graph
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from vbdl_kernels.card import Card, device_card


def is_exact(element_size: int) -> bool:
    """True if products of this dtype use no tensor cores, by `torch.set_float32_matmul_precision`.

    element_size: bytes of a number.
    """
    return element_size == 4 and torch.get_float32_matmul_precision() == "highest"


def flops_of(card: Card, element_size: int, exact: bool = False) -> float:
    """The flops per second of a large product; exact: float32 without tensor cores."""
    if element_size == 2:
        return card.half_flops
    return card.exact_flops if exact else card.float_flops


def estimates(
    samples: int,
    batch: int,
    n_in: int,
    n_out: int,
    element_size: int = 2,
    shared: bool = True,
    card: Card | None = None,
    exact: bool = False,
) -> dict[str, float]:
    """Estimate the seconds of a layer's forward pass by each strategy.

    "local": `local_reparameterized_linear` (the same distribution for one example, another one jointly over examples);
    "fused": the kernel of `sampled_linear`;  "sampler": `sample_weights`, then a batched product;  "drawn": a batched
    product with weights that were drawn and kept before, samples x out x in of them.
    """
    card = card or device_card()
    weights, outputs = samples * n_in * n_out, samples * batch * n_out
    flops = flops_of(card, element_size, exact)
    tile = max(batch, 16)  # a product with fewer than 16 rows takes as long as one with 16
    product = 2 * weights * tile / flops
    noise = weights / card.normals
    repeated = noise * -(-batch // (128 if element_size == 2 else 64))  # each fused program draws weights for its rows
    parameters = 2 * n_in * n_out * element_size / card.bytes
    stored = weights * element_size / card.bytes
    written = outputs * element_size / card.bytes
    products = 1 if shared else samples
    overlap = 1.0 if exact else card.overlap  # without tensor cores, noise and product use the same units
    return {
        "local": card.launch
        + products * 2 * (2 * n_in * n_out * tile) / flops
        + (parameters if shared else parameters + samples * batch * n_in * element_size / card.bytes)
        + max(outputs / card.normals, written),
        # noise and product use different units, but do not overlap entirely
        "fused": card.launch + max(repeated, product) + overlap * min(repeated, product) + parameters + written,
        # a kernel that only draws is faster at it than one that also multiplies
        "sampler": 2 * card.launch + max(0.75 * noise, stored) + max(product, stored) + parameters + written,
        "drawn": card.launch + max(product, stored) + written,
    }


def choose(
    samples: int,
    batch: int,
    n_in: int,
    n_out: int,
    element_size: int = 2,
    *,
    joint: bool = True,
    shared: bool = True,
    memory_budget: int = 2**30,
    kept: bool = False,
    exact: bool = False,
    card: Card | None = None,
) -> str:
    """Choose the fastest of the strategies "local", "fused", "sampler" and "drawn" that are allowed and fit.

    joint: all rows of a draw must be outputs of one network, which excludes "local".
    memory_budget: bytes of weights that "sampler" or "drawn" may hold; beyond it, "fused" is chosen even if it is
        slower.
    kept: many batches will follow, so weights may be drawn once ("drawn"), if they fit.

    If a crossover was measured on the device, it decides between "fused" and "sampler", otherwise the estimates do.
    """
    card = card or device_card()
    times = estimates(samples, batch, n_in, n_out, element_size, shared, card, exact)
    fits = samples * n_in * n_out * element_size <= memory_budget
    rows = card.half_rows if element_size == 2 else 0.0 if exact else card.float_rows
    faster = batch <= rows if rows else times["fused"] < times["sampler"]
    allowed = ["fused" if faster or not fits else "sampler"]
    if not joint:
        allowed.append("local")
    if kept and fits:
        allowed.append("drawn")
    return min(allowed, key=times.__getitem__)


_forced: str | None = None


@contextlib.contextmanager
def always(strategy: str) -> Iterator[None]:
    """A context in which `sampled_linear` uses a strategy, "fused" or "sampler", in all threads; for measurements."""
    global _forced
    before, _forced = _forced, strategy
    try:
        yield
    finally:
        _forced = before


_CHUNK = 2**26  # the most bytes of weights that `sampled_linear` holds at once if it draws them before the product


def draws_at_once(samples: int, batch: int, n_in: int, n_out: int, element_size: int, precision: str) -> int:
    """The number of draws whose weights `sampled_linear` makes before one product; 0 for the fused kernel.

    It is limited by `_CHUNK`, so that memory does not grow with the number of draws. precision: as in `sampled_linear`.
    """
    exact = is_exact(element_size)
    if precision and element_size == 4 and (precision == "ieee") != exact:
        return 0  # the library's product follows torch's setting, not `precision`
    at_once = max(1, min(samples, _CHUNK // max(n_in * n_out * element_size, 1)))
    strategy = _forced or choose(samples, batch, n_in, n_out, element_size, memory_budget=2**62, exact=exact)
    return at_once if strategy == "sampler" else 0


def of_network(
    samples: int,
    batch: int,
    widths: Sequence[int],
    element_size: int = 2,
    *,
    drawn: bool = False,
    exact: bool = False,
    card: Card | None = None,
) -> dict[str, float]:
    """Estimate the seconds of a forward pass of a small network with different weights for every sample.

    "whole": `ensemble_mlp`, with weights from memory;  "whole drawn", if `drawn`: `bayesian_mlp`;  "layers": for each
    layer a batched product, with weights from memory, and a pass over its outputs for the activation.
    """
    card = card or device_card()
    pairs = list(zip(widths, widths[1:], strict=False))
    flops = flops_of(card, element_size, exact)
    weights = samples * sum(i * o for i, o in pairs)
    stored = weights * element_size / card.bytes
    product = 2 * weights * max(batch, 16) / flops
    tiles = -(-batch // 64)
    waves = -(-samples * tiles // int(card.programs))
    # a program has one warp group, so that all programs together reach a quarter of the card's rate
    inside = card.launch + max(waves * len(pairs) * card.step, 4 * product)
    if exact and max(widths) > 64:  # scalar products of this width do not fit the registers: 569 us, not 26, on an H100
        inside = math.inf
    hidden = sum(o for _, o in pairs[:-1])
    layers = len(pairs) * card.launch + max(product, stored)
    layers += (len(pairs) - 1) * card.launch + 2 * samples * batch * hidden * element_size / card.bytes
    times = {"whole": max(inside, card.launch + tiles * stored / 4), "layers": layers}  # weights come from L2
    if drawn:
        times["whole drawn"] = inside + tiles * weights / card.normals
    return times


def of_masks(
    samples: int, batch: int, n_in: int, n_out: int, element_size: int = 2, *, exact: bool = False, card=None
) -> dict[str, float]:
    """Estimate the seconds of dropout and the linear layer after it, on an input that all draws share.

    "masked": `masked_linear`, which computes masks in the product;  "activations": every draw's masked input is written
    and read again, then there is one product with the rows of all draws.
    """
    card = card or device_card()
    flops = flops_of(card, element_size, exact)
    tiles = -(-batch // 64)
    product = 2 * samples * max(batch, 16) * n_in * n_out / flops
    weights = samples * tiles * n_in * n_out * element_size / (_CACHE * card.bytes)  # read for every draw
    masks = samples * n_in * -(-n_out // 64) * tiles / card.normals
    inputs, written = batch * n_in * element_size / card.bytes, samples * batch * n_out * element_size / card.bytes
    together = 2 * max(samples * batch, 16) * n_in * n_out / flops
    return {
        "masked": card.launch + max(_MASKED * product, weights, masks) + inputs + written,
        "activations": 2 * card.launch + inputs + samples * inputs + max(together, samples * inputs) + written,
    }


# measured on an H100 at 4096 x 4096 and 32 draws (`benchmarks/results`): the time of the masked product at 256 rows
# relative to the library's, and the speed of reading from L2 relative to main memory
_MASKED, _CACHE = 3.0, 1.5


def is_launch_bound(work: float, bytes: float, launches: int, element_size: int = 4, card: Card | None = None) -> bool:
    """True if the host takes longer to start the kernels of a call than the kernels take to run.

    work: multiplications and additions. bytes: read and written. launches: the number of kernels.
    """
    card = card or device_card()
    return launches > 1 and launches * card.dispatch > work / flops_of(card, element_size) + bytes / card.bytes
