"""A cost model of the ways to execute drawn layers on a GPU: it predicts seconds and chooses the cheapest.

It computes with the constants of `card.py`.

    estimates, choose    one layer: local reparameterization, fused, sampler and product, weights drawn before
    of_network           a small network: one launch for all of it, or layer by layer
    of_masks             dropout of what all draws share: in the product, or on the activations
    is_launch_bound      whether a call is to be replayed as a CUDA graph
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from vbdl_kernels.card import Card, device_card


def is_exact(element_size: int) -> bool:
    """Whether products of this dtype do without tensor cores, by torch's own setting."""
    return element_size == 4 and torch.get_float32_matmul_precision() == "highest"


def flops_of(card: Card, element_size: int, exact: bool = False) -> float:
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
    """Seconds of a forward call by each strategy.

    "local": `local_reparameterized_linear` (the same law for one example, not a joint draw over examples);
    "fused": the kernel of `sampled_linear`;  "sampler": `sample_weights` and a batched product;  "drawn": the product
    alone, with weights drawn and kept before, samples x out x in of them.
    """
    card = card or device_card()
    weights, outputs = samples * n_in * n_out, samples * batch * n_out
    flops = flops_of(card, element_size, exact)
    tile = max(batch, 16)  # a product of fewer columns costs as much
    product = 2 * weights * tile / flops
    noise = weights / card.normals
    repeated = noise * -(-batch // (128 if element_size == 2 else 64))  # a fused program draws for its rows alone
    parameters = 2 * n_in * n_out * element_size / card.bytes
    stored = weights * element_size / card.bytes
    written = outputs * element_size / card.bytes
    products = 1 if shared else samples
    overlap = 1.0 if exact else card.overlap  # without tensor cores both use the same units
    return {
        "local": card.launch
        + products * 2 * (2 * n_in * n_out * tile) / flops
        + (parameters if shared else parameters + samples * batch * n_in * element_size / card.bytes)
        + max(outputs / card.normals, written),
        # noise and product use different units but do not overlap entirely
        "fused": card.launch + max(repeated, product) + overlap * min(repeated, product) + parameters + written,
        # it waits for nothing, and draws faster than a product does
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
    """The cheapest of "local", "fused", "sampler" and "drawn" that gives what is asked for and fits.

    joint: rows are to be draws of one function, which the local reparameterization does not give. memory_budget: bytes
    the sampler may hold; over it, the fused kernel is chosen even where it is slower. kept: many batches are to come,
    so that weights may be drawn once, where they fit. A measured crossover decides between the kernel and the sampler.
    """
    card = card or device_card()
    found = estimates(samples, batch, n_in, n_out, element_size, shared, card, exact)
    fits = samples * n_in * n_out * element_size <= memory_budget
    rows = card.half_rows if element_size == 2 else 0.0 if exact else card.float_rows
    faster = batch <= rows if rows else found["fused"] < found["sampler"]
    allowed = ["fused" if faster or not fits else "sampler"]
    if not joint:
        allowed.append("local")
    if kept and fits:
        allowed.append("drawn")
    return min(allowed, key=found.__getitem__)


_forced: str | None = None


@contextlib.contextmanager
def always(strategy: str) -> Iterator[None]:
    """For measurements: inside, `sampled_linear` executes by this strategy, "fused" or "sampler", in every thread."""
    global _forced
    before, _forced = _forced, strategy
    try:
        yield
    finally:
        _forced = before


_CHUNK = 2**26  # bytes of weights that `sampled_linear` holds at once where it draws them before its product


def draws_at_once(samples: int, batch: int, n_in: int, n_out: int, element_size: int, precision: str) -> int:
    """Of a call of `sampled_linear`: how many draws' weights it makes before their product; 0 for the fused kernel.

    A few, so that what it holds does not grow with the draws. precision: as the operator's.
    """
    exact = is_exact(element_size)
    if precision and element_size == 4 and (precision == "ieee") != exact:
        return 0  # the library's product follows torch's setting
    at_once = max(1, min(samples, _CHUNK // max(n_in * n_out * element_size, 1)))
    found = _forced or choose(samples, batch, n_in, n_out, element_size, memory_budget=2**62, exact=exact)
    return at_once if found == "sampler" else 0


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
    """Seconds of a forward call of a small network with weights of its own for every sample.

    "whole": `ensemble_mlp`, weights from memory;  "whole drawn", if `drawn`: `bayesian_mlp`;  "layers": a batched
    product a layer, and a pass over its outputs for the activation, weights from memory.
    """
    card = card or device_card()
    pairs = list(zip(widths, widths[1:], strict=False))
    flops = flops_of(card, element_size, exact)
    weights = samples * sum(i * o for i, o in pairs)
    stored = weights * element_size / card.bytes
    product = 2 * weights * max(batch, 16) / flops
    tiles = -(-batch // 64)
    waves = -(-samples * tiles // int(card.programs))
    # one program computes with a warp group alone: a quarter of the card's rate where all are busy
    inside = card.launch + max(waves * len(pairs) * card.step, 4 * product)
    if exact and max(widths) > 64:  # scalar products of this width do not fit the registers: 569 us on an H100 for 26
        inside = math.inf
    hidden = sum(o for _, o in pairs[:-1])
    layers = len(pairs) * card.launch + max(product, stored)
    layers += (len(pairs) - 1) * card.launch + 2 * samples * batch * hidden * element_size / card.bytes
    found = {"whole": max(inside, card.launch + tiles * stored / 4), "layers": layers}  # tiles find weights in L2
    if drawn:
        found["whole drawn"] = inside + tiles * weights / card.normals
    return found


def of_masks(
    samples: int, batch: int, n_in: int, n_out: int, element_size: int = 2, *, exact: bool = False, card=None
) -> dict[str, float]:
    """Seconds of dropout and the linear layer after it on an input that all draws share.

    "masked": `masked_linear`, which makes a draw's mask in the product;  "activations": the masked input of every draw
    written and read again, and one product with the rows of all draws.
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


# measured on an H100 at 4096 x 4096 and 32 draws (`benchmarks/results`): the masked product at 256 rows against the
# library's, and what comes from L2 against main memory
_MASKED, _CACHE = 3.0, 1.5


def is_launch_bound(work: float, bytes: float, launches: int, element_size: int = 4, card: Card | None = None) -> bool:
    """Whether starting the kernels of a call takes the host longer than the kernels take.

    work: multiplications and additions; bytes: read and written.
    """
    card = card or device_card()
    return launches > 1 and launches * card.dispatch > work / flops_of(card, element_size) + bytes / card.bytes
