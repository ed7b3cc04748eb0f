r"""Covariances of a function of two correlated Gaussians, as a power series in their correlation."""

from functools import cached_property

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.polynomial.polynomial import polyval

from ctgate.meanfield.gaussian import Function, hermite_coefficients

# exp(-36) = 2e-16: what the series may leave out.
_DIGITS = 36.0
_LARGEST = 150.0


class Covariance:
    r"""What x and y of mean m, variance q and covariance C leave of f:

    .. math:: C_f(C) = \langle f(x) f(y)\rangle = \sum_{n\ge0} a_n^2\,(C/q)^n,\qquad
              a_n = \bigl\langle f(m + \sqrt q\,x)\,He_n(x)/\sqrt{n!}\,\bigr\rangle .

    All coefficients are positive, so sums lose no digits, a covariance stays a covariance, and derivatives
    and integrals by C are exact.

    Parameters:
        function: f, of arrays, analytic in the strip of half width ``strip`` around the real line.
        variance: q, positive.
        mean: m.
        strip: pi/2 for tanh, pi for the logistic function; for an entire function a width on which it does
            not grow.

    Source: THEORY.md 22; Price's theorem, Mehler's formula.
    """

    def __init__(
        self, function: Function, variance: float, mean: float = 0.0, strip: float = np.pi / 2
    ) -> None:
        if not 0.0 < variance <= _LARGEST:
            raise ValueError(
                f"Covariance(variance=...): it is {variance}; it must be positive, and at most {_LARGEST:g}, "
                "beyond which the series is too long"
            )
        self.variance = variance
        # |a_n| falls like exp(-sqrt(2 n) strip / sqrt(q)), faster where n is below q.
        order = 32 + int(_DIGITS + variance / 8.0 * (_DIGITS / strip) ** 2)
        self.coefficients = hermite_coefficients(function, variance, mean, order)
        self._series = np.square(self.coefficients)

    @property
    def mean_square(self) -> float:
        """<f>^2, what is left at C = 0."""
        return float(self._series[0])

    @property
    def first_slope(self) -> float:
        """<f'>^2, the derivative by C at C = 0."""
        return float(self._series[1] / self.variance)

    @cached_property
    def mean_slope(self) -> float:
        """<f'>."""
        return float(self.coefficients[1] / self.variance**0.5)

    def __call__(self, covariance: Float[ndarray, " lag"], order: int = 0) -> Float[ndarray, " lag"]:
        """C_f(C) without the terms below ``order``, which would cancel where they are taken off later."""
        return self._sum(self._series, covariance, order)

    def slope(self, covariance: Float[ndarray, " lag"], order: int = 0) -> Float[ndarray, " lag"]:
        """dC_f/dC = <f'(x) f'(y)>, again without the terms below ``order``."""
        powers = np.arange(1.0, len(self._series))
        return self._sum(powers * self._series[1:] / self.variance, covariance, order)

    def _sum(self, series: ndarray, covariance: ndarray, order: int) -> ndarray:
        ratio = covariance / self.variance
        square = ratio * ratio
        total = np.zeros_like(ratio)
        # An odd function has every other coefficient: half the work.
        for first in (order, order + 1):
            part = series[first::2]
            if part.max(initial=0.0) > 1e-30 * series.max():
                total += ratio**first * polyval(square, part)
        return total
