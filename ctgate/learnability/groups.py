"""The spread of an estimate by leaving out one group of samples after the other."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def jackknife(value: float, without: ArrayLike, *, confidence: float = 0.95) -> Interval:
    r"""The delete-a-group jackknife: :math:`x \pm t_{G-1}\,\bigl[\tfrac{G-1}{G}\sum_g (x_{-g} - \bar x)^2
    \bigr]^{1/2}`.

    Samples may depend on each other within a group, not between groups.

    Parameters: ``value`` x, the estimate from all groups; ``without`` (group,), the estimates
        :math:`x_{-g}` from all but one, NaN where there is none.

    Returns: the interval, NaN where one estimate is.

    Raises: ValueError for fewer than two groups or a confidence outside (0, 1).

    Source: THEORY.md 28.
    """
    parts = np.asarray(without, np.float64)
    count = parts.size
    if parts.ndim != 1 or count < 2:
        raise ValueError(
            f"jackknife(without=...): the shape is {parts.shape}; it must be (group,), 2 or more"
        )
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"jackknife(confidence=...): confidence is {confidence}; it must be in (0, 1)")
    error = math.sqrt((count - 1) * float(parts.var()))
    reach = float(student_t.ppf(0.5 * (1.0 + confidence), count - 1)) * error
    return Interval(value, value - reach, value + reach)
