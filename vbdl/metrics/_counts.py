"""Numbers of rows from a rate, computed as if the rate were the decimal number that was meant.

In binary 1 - 0.9 is 0.09999999999999998 and 10 * (1 - 0.7) is 3.0000000000000004, so rounding them up or down may be
one row off. Every count that a statistical guarantee depends on is computed here.
"""

import math
from fractions import Fraction

# largest difference of a rate from the decimal that was meant: a few roundings of a number below one, 1 - (1 - 0.9)
_ROUNDING = Fraction(1, 2**48)


def at_most(rate: float, n: int) -> int:
    """The largest k with k <= rate * n, in exact arithmetic, tolerating the rounding of the rate."""
    return math.floor((Fraction(float(rate)) + _ROUNDING) * n)


def at_least(rate: float, n: int) -> int:
    """The smallest k with k >= rate * n, in exact arithmetic, tolerating the rounding of the rate."""
    return math.ceil((Fraction(float(rate)) - _ROUNDING) * n)
