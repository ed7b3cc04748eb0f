"""The slope of a straight line through points on logarithmic axes, with its confidence interval."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t


class Slope(NamedTuple):
    """A fitted slope, the ends of its confidence interval, and the number of points behind it.

    Without two points the slope is NaN; with exactly two nothing is left over to judge it by and the
    interval is the whole line.
    """

    value: float
    low: float
    high: float
    points: int

    def verdict(self, expected: float, tolerance: float) -> str:
        """``right`` within ``tolerance`` of what is expected, else ``low`` or ``high``.

        ``undetermined`` from fewer than three points.
        """
        if self.points < 3:
            return "undetermined"
        if abs(self.value - expected) <= tolerance:
            return "right"
        return "low" if self.value < expected else "high"


def fit_slope(x: Sequence[float], y: Sequence[float], *, confidence: float = 0.95) -> Slope:
    r"""Least squares of :math:`\log y = \alpha + p \log x`.

    The interval is :math:`p \pm t_{n-2}\, s_p` with Student's t and the standard error :math:`s_p` from the
    residuals, so it measures the scatter about a straight line and, where the points bend, the bend.

    Parameters: ``x``, ``y``, positive and of one length; ``confidence``, the coverage of the interval.

    Raises: ValueError for lengths that differ, values that are not positive, or a confidence outside (0, 1).
    """
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} values and y has {len(y)}; they must be paired")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence!r}; it must be between 0 and 1")
    for name, values in (("x", x), ("y", y)):
        if not all(value > 0.0 and math.isfinite(value) for value in values):
            raise ValueError(
                f"{name} is {list(values)}; its values must be positive and finite to have logarithms"
            )
    count = len(x)
    if count < 2:
        return Slope(math.nan, math.nan, math.nan, count)
    log_x, log_y = np.log(x), np.log(y)
    centred = log_x - log_x.mean()
    spread = float(centred @ centred)
    if spread == 0.0:
        raise ValueError(f"x is {list(x)}; a slope needs at least two different values")
    value = float(centred @ log_y) / spread
    if count == 2:
        return Slope(value, -math.inf, math.inf, count)
    residual = log_y - log_y.mean() - value * centred
    error = math.sqrt(float(residual @ residual) / (count - 2) / spread)
    reach = float(student_t.ppf(0.5 * (1.0 + confidence), count - 2)) * error
    return Slope(value, value - reach, value + reach, count)
