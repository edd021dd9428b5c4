"""Fingerprints of rows: hashes that tell whether a row was seen before without storing the row."""

import torch
from torch import Tensor

from vbdl.calling.inputs import tensors
from vbdl.data.rows import blocks
from vbdl.types import Inputs

_ODD = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, the golden ratio


def _mix(v: Tensor) -> Tensor:
    """Mix the bits of each int64 by a bijection (splitmix64's rounds; int64 arithmetic wraps)."""
    v = (v ^ (v >> 30)) * -4658895280553007687
    v = (v ^ (v >> 27)) * -7723592293110705685
    return v ^ (v >> 31)


def fingerprints(x: Inputs) -> Tensor:
    """Hash each row of the inputs to one int64, (batch,).

    Equal rows have equal hashes; two different rows have equal hashes with a probability of about 2^-64. Floats are
    hashed as float32, and -0.0 as 0.0. Targets are not hashed.
    """
    inputs = tensors(x)
    if not inputs:
        raise ValueError("there is no input to fingerprint")
    # a block at a time, because hashing takes several times its memory, and into one tensor, because small ones that
    # are kept between large ones that are freed scatter the memory
    hashes = torch.empty(len(inputs[0]), dtype=torch.int64)
    for rows in blocks(x, len(hashes)):
        hashes[rows.start : rows.stop] = _hashes([t[rows.start : rows.stop] for t in inputs])
    return hashes


def _hashes(inputs: list[Tensor]) -> Tensor:
    """The hashes of a block of rows."""
    total = torch.zeros((), dtype=torch.int64)
    for number, t in enumerate(inputs):
        flat = t.detach().flatten(1) if t.ndim > 1 else t.detach().unsqueeze(1)
        if flat.is_floating_point():
            # adding 0.0 turns -0.0 into 0.0
            words = (flat.to(torch.float32) + 0.0).contiguous().view(torch.int32).to(torch.int64)
        else:
            words = flat.to(torch.int64)
        place = torch.arange(1, words.shape[1] + 1, device=words.device) * _ODD
        # mixed with their place before the sum, so that rows with values exchanged or shifted differ
        hashes = _mix(_mix(words) + place).sum(dim=1)
        total = _mix(total) * 31 + hashes if number else hashes
    return _mix(total).cpu()
