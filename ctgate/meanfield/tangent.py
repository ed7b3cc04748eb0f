r"""The largest Lyapunov exponent from the linearised lag equation."""

import numpy as np
from numpy import ndarray
from scipy.optimize import brentq

from ctgate.meanfield.stationary import Profile, filtered

_SWEEPS = 2000
_TOLERANCE = 1e-13


def growth_rate(solution: Profile) -> float:
    r"""lambda_1 [1/time] of a network whose autocorrelations are these.

    Two trajectories that differ by :math:`\delta x` in one network have
    :math:`\langle\delta x(t)\,\delta x(t')\rangle = e^{\lambda(t+t')} k(t-t')` with

    .. math:: P_\lambda\,\hat k = a^2\,\widehat{\bigl(C_\varphi' C_s\,k + C_\varphi C_s'\,k_r\bigr)},
              \qquad R_\lambda\,\hat k_r = a_r^2\,\widehat{C_\varphi' k},

    where P and R are the symbols of the relaxations for solutions that grow like :math:`e^{\lambda t}`
    (``Relaxation.resistance``). The operator keeps positive definite functions so, and lambda is where its
    Perron eigenvalue is 1. For a flow without reset gate that is the ground state of a Schroedinger operator.

    Source: THEORY.md 22.
    """
    network, gated = solution.network, solution.gated
    frequency, reset = solution.frequency, solution.network.reset
    # As in the stationary equation, the part that survives at long lags stands on the left.
    direct = solution.gain_squared * gated.slope_rest
    indirect = solution.gain_squared * gated.firing * gated.seen_slope
    points = len(frequency) - 1
    start = np.exp(-np.arange(points + 1) * 12.0 / points)

    def perron(growth: float) -> float:
        resistance = network.relaxation.resistance(frequency, growth) + solution.gap
        back: ndarray | None = None
        if reset is not None and reset.gain:
            delay = 0.0 if reset.relaxation is None else reset.relaxation.resistance(frequency, growth)
            back = np.broadcast_to(reset.gain**2 / (1.0 + delay), frequency.shape)
        k, value = start, 0.0
        for _ in range(_SWEEPS):
            source = direct * k
            if back is not None:
                source += indirect * filtered(gated.firing_slope * k, back)
            new = filtered(source, 1.0 / resistance)
            last, value = value, float(new[0])
            k = new / value
            if abs(value - last) < _TOLERANCE * value:
                return value
        raise ArithmeticError(f"the tangent's eigenvalue has not settled after {_SWEEPS} sweeps: {value}")

    # Near the onset of chaos lambda is 1.5 gaps.
    low, high = 0.0, solution.gap * network.relaxation.rate
    while perron(high) > 1.0:
        low, high = high, 2.0 * high
    return float(brentq(lambda growth: perron(growth) - 1.0, low, high, xtol=1e-13 * high, rtol=1e-13))
