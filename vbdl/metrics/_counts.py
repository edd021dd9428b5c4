"""Whole numbers of rows from a rate, of the decimal that the rate was meant to be.

In binary 1 - 0.9 is 0.09999999999999998 and 10 * (1 - 0.7) is 3.0000000000000004: rounded up or down as they stand they
are one row off. Every count that a promise rests on is made here.
"""

import math
from fractions import Fraction

# how far a rate may be from what was meant: a few roundings of a number below one, 1 - (1 - 0.9) or 9 times 0.1
_ROUNDING = Fraction(1, 2**48)


def at_most(rate: float, n: int) -> int:
    """The largest k with k <= rate * n, in exact arithmetic but for the rounding of the rate itself."""
    return math.floor((Fraction(float(rate)) + _ROUNDING) * n)


def at_least(rate: float, n: int) -> int:
    """The smallest k with k >= rate * n, in exact arithmetic but for the rounding of the rate itself."""
    return math.ceil((Fraction(float(rate)) - _ROUNDING) * n)
