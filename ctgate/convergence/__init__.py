"""Does a method converge at its order, and what does an accuracy cost?

:func:`test_convergence` measures the order of fixed-step methods on a problem, :func:`work_precision`
errors against cost for states and gradients, :func:`check_tableau` verifies the order conditions of a
Runge-Kutta method.
"""

from ctgate.convergence.measure import make_reference
from ctgate.convergence.order import test_convergence
from ctgate.convergence.slope import Slope, fit_slope
from ctgate.convergence.tableau import check_tableau
from ctgate.convergence.work import work_precision

__all__ = ["Slope", "check_tableau", "fit_slope", "make_reference", "test_convergence", "work_precision"]
