"""Which way of executing a sampled linear layer is cheapest: a cost model, and measured constants where there are any.

The constants below are those of a model of one card (H200; kernels/README.md says how they were derived), not
measurements. `measured.py` measures a device's own, which are used from then on.
"""

from dataclasses import dataclass

from vbdl_kernels.measured import constants


@dataclass(frozen=True)
class Card:
    """What a card does a second, and what a launch costs. Defaults: an H200 at 85 % of its limits."""

    normals: float = 1.6e12  # drawn in registers: the special-function units are the limit
    half_flops: float = 0.65 * 989e12  # tensor cores, bfloat16 and float16
    float_flops: float = 0.65 * 494e12  # tensor cores, tf32
    bytes: float = 0.9 * 4.8e12  # of main memory
    launch: float = 4e-6  # seconds; about half in a CUDA graph
    overlap: float = 0.35  # of noise and product, the part of the shorter that the longer does not hide


def device_card() -> Card:
    """The constants measured on the current device, or the defaults."""
    return Card(**(constants(tuple(Card.__dataclass_fields__)) or {}))


def estimates(
    samples: int,
    batch: int,
    n_in: int,
    n_out: int,
    element_size: int = 2,
    shared: bool = True,
    card: Card | None = None,
) -> dict[str, float]:
    """Seconds of a forward call by each strategy.

    "local": `local_reparameterised_linear` (the same law for one example, not a joint draw over examples);
    "fused": `sampled_linear`;  "sampler": `sample_weights` and a batched product;  "drawn": the product alone, with
    weights drawn and kept before, samples x out x in of them.
    """
    card = card or device_card()
    weights, outputs = samples * n_in * n_out, samples * batch * n_out
    flops = card.half_flops if element_size == 2 else card.float_flops
    tile = max(batch, 16)  # a product of fewer columns costs as much
    product = 2 * weights * tile / flops
    noise = weights / card.normals
    repeated = noise * -(-batch // (128 if element_size == 2 else 64))  # a fused program draws for its rows alone
    parameters = 2 * n_in * n_out * element_size / card.bytes
    stored = weights * element_size / card.bytes
    written = outputs * element_size / card.bytes
    products = 1 if shared else samples
    return {
        "local": card.launch
        + products * 2 * (2 * n_in * n_out * tile) / flops
        + (parameters if shared else parameters + samples * batch * n_in * element_size / card.bytes)
        + max(outputs / card.normals, written),
        # noise and product use different units but do not overlap entirely
        "fused": card.launch + max(repeated, product) + card.overlap * min(repeated, product) + parameters + written,
        "sampler": 2 * card.launch + max(noise, stored) + max(product, stored) + parameters + written,
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
    card: Card | None = None,
) -> str:
    """The cheapest of "local", "fused" and "sampler" that gives what is asked for and fits.

    joint: rows are to be draws of one function, which the local reparameterisation does not give. memory_budget: bytes
    the sampler may hold; over it, the fused kernel is chosen even where it is slower.
    """
    found = estimates(samples, batch, n_in, n_out, element_size, shared, card)
    allowed = ["fused"]
    if not joint:
        allowed.append("local")
    if samples * n_in * n_out * element_size <= memory_budget:
        allowed.append("sampler")
    return min(allowed, key=found.__getitem__)
