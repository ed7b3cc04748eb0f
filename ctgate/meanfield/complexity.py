r"""How many fixed points a random network has."""

import numpy as np
from numpy.polynomial.legendre import leggauss

from ctgate.meanfield.density import expansion_rate
from ctgate.meanfield.fixed_population import fixed_point, sampled
from ctgate.meanfield.network import RandomNetwork
from ctgate.meanfield.support import level

_NODES = 24


def complexity(network: RandomNetwork, *, solution: int = -1) -> float:
    r"""A lower bound of the exponent with which the mean number of fixed points grows with N, from those with
    the statistics of one mean-field solution,

    .. math:: \Sigma = \frac1N \bigl\langle \ln|\det(1 - M)| \bigr\rangle
                     = \int_0^1 \frac{p(t)}{t}\,dt,
              \qquad p(t) = \frac{d}{d \ln t} \frac1N \ln|\det(1 - t H(0) U)| .

    M is the linearised map to the target, the Jacobian without its leak; the gate on the rate drops out. p is
    the :math:`\sum_b s_b g_b` of the density's equations for t H(0) in place of H, and 0 until 1 is inside
    the support of t M. For weights of one variance, :math:`\Sigma = \ln\rho - 1/2 + 1/(2\rho^2)`. It is 0
    for :math:`\rho \le 1`: fixed points may still be many there, with other statistics.

    Parameters: ``solution`` as in :func:`ctgate.meanfield.spectral_boundary`. The average over units is that
    of 4096 Sobol points, right to about 1e-3 of :math:`\Sigma` and 1e-4.

    Raises: as :func:`ctgate.meanfield.spectral_boundary`.

    Source: THEORY.md 20; G. Wainrib and J. Touboul, Phys. Rev. Lett. 110 (2013) 118101, for networks without
    gates.
    """
    population = sampled(fixed_point(network, "density", "complexity", solution))
    # T grows with t squared.
    span = 0.5 * np.log(float(level(population, np.zeros(1))[0]))
    if not span > 0.0:
        return 0.0
    x, weight = leggauss(_NODES)
    log_t = -0.5 * span * (1.0 - x)
    return float(0.5 * span * weight @ expansion_rate(population, np.exp(log_t)))
