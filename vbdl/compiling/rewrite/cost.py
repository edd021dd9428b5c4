"""What a product costs on a CPU core, to choose between ways to the same numbers.

The constants are of one core of a current server: what is compared differs by factors, and a choice that changed with
a timing would make the last bits of a prediction change from one process to the next.
"""

FLOPS = 75e9  # float32 multiplications and additions a second in a large product
HALF_RATE_ROWS = 12  # rows at which a product runs at half that: below it reads weights more than it computes
MEMORY = 12e9  # bytes a second of what is read once in a call: weights of every draw
ACTIVATIONS = 16e9  # bytes a second of activations, written and read again


def product(samples: int, rows: int, inputs: int, outputs: int) -> float:
    """Seconds of `samples` products (rows, inputs) @ (inputs, outputs), without reading weights from memory."""
    rate = FLOPS * rows / (rows + HALF_RATE_ROWS)
    return 2 * samples * rows * inputs * outputs / rate


def weights(samples: int, inputs: int, outputs: int, size: int = 4) -> float:
    """Seconds of reading them from memory."""
    return samples * inputs * outputs * size / MEMORY


def activations(samples: int, rows: int, width: int, size: int = 4) -> float:
    """Seconds of writing and reading them."""
    return 2 * samples * rows * width * size / ACTIVATIONS
