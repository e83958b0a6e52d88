"""Student's t: how wide a 95 % interval over few chunks is. scipy, which has it too, is 143 MB."""

import math
from functools import cache

TINY, STEPS = 1e-300, 500


@cache
def quantile(freedom: int, p: float) -> float:
    """t with P(T <= t) = p, for p in (0.5, 1) and `freedom` degrees of freedom; to nine digits or more.

    P(|T| > t) is the regularized incomplete beta function at x = freedom / (freedom + t²) of (freedom / 2, 1/2); x is
    found by bisection.
    """
    low, high = 0.0, 1.0
    while (x := (low + high) / 2) not in (low, high):
        if _beta(freedom / 2, 0.5, x) < 2 * (1 - p):
            low = x
        else:
            high = x
    return math.sqrt(freedom * (1 - x) / x)


def _beta(a: float, b: float, x: float) -> float:
    """Regularized incomplete beta function, by its continued fraction (Press et al., Numerical Recipes, 6.4)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(b, a, 1 - x)
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or TINY)
    fraction = d
    for m in range(1, STEPS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for part in (even, odd):
            d = 1 / (1 + part * d or TINY)
            c = 1 + part / c or TINY
            fraction *= d * c
        if abs(d * c - 1) < 1e-16:
            break
    return math.exp(log) * fraction / a
