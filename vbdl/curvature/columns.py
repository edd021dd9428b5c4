"""The vectors v of the backward passes J^T R v, whose outer products add up to J^T H J with H = R R^T."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from vbdl_kernels import make_key, normal
from vbdl_kernels.philox import WEIGHT

from vbdl.types import OutputHessian

MOST_COLUMNS = 100  # outputs of a row up to which each gets a backward pass of its own
SAMPLES = 32  # backward passes for more outputs, each with random signs or normals


def columns(hessian: OutputHessian, rows: int, outputs: int, samples: int | None, seed: int) -> Iterator[Tensor]:
    """Yield the vectors R v, (rows, outputs), of a batch; their outer products add up to H of each row.

    Exactly, by one vector for each output, if there are at most 100 outputs and `samples` is None. If H consists of
    blocks of at most 100 columns (a softmax for each pixel), one for each column of all blocks, with a random sign for
    each block; otherwise `samples` (32) standard normals, the Monte Carlo estimate of the Fisher information. Both have
    the mean H.

    seed: of the counters that random numbers are drawn from, of its own for each batch.
    """
    like = hessian.diagonal()
    if samples is None and outputs <= MOST_COLUMNS:
        for number in range(outputs):
            one = like.new_zeros(rows, outputs)
            one[:, number] = 1
            yield hessian.root(one)
        return
    key = make_key(seed, [0], device=like.device)[0]
    draw = lambda number, width: normal(key, number, WEIGHT, rows, width).to(like.dtype)
    size = outputs // hessian.groups
    if samples is None and size <= MOST_COLUMNS:
        for number in range(size):
            signs = torch.where(draw(number, hessian.groups) < 0, -1.0, 1.0).to(like.dtype)
            yield hessian.root(hessian.column(number, signs))
        return
    count = SAMPLES if samples is None else samples
    for number in range(count):
        yield hessian.root(draw(number, outputs)) / math.sqrt(count)
