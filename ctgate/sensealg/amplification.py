"""How much a state that is integrated backwards amplifies errors, measured along the forward solve.

Backwards a unit that forgets at rate r grows at rate r, and what counts is how the fastest outgrows the
slowest. THEORY.md 6.
"""

import math
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.recorder import AcceptedStep


class Amplification:
    r""":math:`\exp\int (r_{max} - r_{min})\,dt` between neighbouring ``resets``, of the sample where it is
    largest; the field's rates at the ends of accepted steps, linear in time between them.

    Costs one evaluation of the rates per step, and one at the start of each knot interval.
    """

    def __init__(self, dynamics: Dynamics, resets: Sequence[float]) -> None:
        self._dynamics = dynamics
        self._resets = resets
        self._u: object = None
        self._spread = torch.empty(0)
        self._since = -math.inf
        self._integral: Tensor | float = 0.0
        # The logarithm of the largest one so far, and the interval that it belongs to.
        self.largest = 0.0
        self.interval = (math.nan, math.nan)

    @torch.no_grad()
    def see(self, step: AcceptedStep) -> None:
        """One accepted step, after the one before it."""
        time, stop = float(step.start), float(step.stop)
        if step.u is not self._u:
            self._u, self._spread = step.u, self._spread_at(step, step.start, step.left)
        left, right = self._spread, self._spread_at(step, step.stop, step.right)
        if self._since == -math.inf:
            self._since = time
        # Resets inside the step end their interval there.
        inside = self._resets[bisect_right(self._resets, time) : bisect_left(self._resets, stop)]
        slope = (right - left) / (stop - time)
        for end in (*inside, stop):
            middle = left + slope * (0.5 * (time + end) - float(step.start))
            self._integral = self._integral + (end - time) * middle
            time = end
            self._note(float(self._integral.max()), end)
            if end < stop or self._is_reset(stop):
                self._since, self._integral = end, 0.0
        self._spread = right

    def _is_reset(self, t: float) -> bool:
        place = bisect_left(self._resets, t)
        return place < len(self._resets) and self._resets[place] == t

    def _note(self, logarithm: float, end: float) -> None:
        if logarithm > self.largest:
            self.largest, self.interval = logarithm, (self._since, end)

    def _spread_at(self, step: AcceptedStep, t: float | Tensor, h: Tensor) -> Tensor:
        assert step.u is not None
        rate, _ = self._dynamics.rate_drive(step.u)(t, h)
        return (rate.amax(-1) - rate.amin(-1)).to(torch.float64)

    def warn(self, rtol: float, tolerance: float, stacklevel: int) -> None:
        """Warn if the largest amplification, times ``rtol``, is above the tolerance."""
        allowed = math.log(tolerance) - math.log(rtol)
        if self.largest <= allowed:
            return
        start, stop = self.interval
        factor = f"{math.exp(self.largest):.4g}" if self.largest < 700.0 else f"exp({self.largest:.4g})"
        remedy = "use GaussAdjoint() or DiscreteAdjoint()"
        if allowed > 0.0:
            spacing = (stop - start) * allowed / self.largest
            remedy += f", or saveat with times at most {spacing:.3g} apart there"
        warnings.warn(
            f"BacksolveAdjoint: between t = {start:.9g} and t = {stop:.9g} integrating the state backwards "
            f"amplifies errors by {factor}, the exponential of the integral of the fastest rate minus the "
            f"slowest; times rtol = {rtol:.3g} that is above the tolerance of {tolerance:.3g}, and gradients "
            f"may be wrong: {remedy}",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )
