"""The cost model of matrix products on a CPU core, to choose between computations with the same result.

The constants are those of one core of a current server and fixed: alternatives differ by factors, and a choice by
timing would change the last bits of a prediction from one process to the next.
"""

FLOPS = 75e9  # float32 multiplications and additions per second in a large product
HALF_RATE_ROWS = 12  # rows at which a product reaches half of FLOPS; with fewer, reading weights takes most of the time
MEMORY = 12e9  # bytes per second of values that a call reads once: the weights of every draw
ACTIVATIONS = 16e9  # bytes per second of activations, which are written and read again


def product(samples: int, rows: int, inputs: int, outputs: int) -> float:
    """Seconds that `samples` products (rows, inputs) @ (inputs, outputs) take, without reading weights from memory."""
    rate = FLOPS * rows / (rows + HALF_RATE_ROWS)
    return 2 * samples * rows * inputs * outputs / rate


def weights(samples: int, inputs: int, outputs: int, size: int = 4) -> float:
    """Seconds that reading weights (samples, inputs, outputs) of `size` bytes each from memory takes."""
    return samples * inputs * outputs * size / MEMORY


def activations(samples: int, rows: int, width: int, size: int = 4) -> float:
    """Seconds that writing and reading activations (samples, rows, width) of `size` bytes each takes."""
    return 2 * samples * rows * width * size / ACTIVATIONS
