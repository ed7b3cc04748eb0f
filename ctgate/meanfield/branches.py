"""Which decaying autocorrelations a gain has, and the smallest gain that has one."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from ctgate.meanfield.stationary import GaussianNetwork, Profile, profile

# A branch that first turns to smaller gains, away from rest, is told by its gain at this variance.
_SMALL = 1e-4


@dataclass(frozen=True)
class Onset:
    """The smallest a^2 with a decaying solution; its variance is 0 where chaos grows out of rest."""

    gain_squared: float
    variance: float


class _Branch:
    """Solutions by the logarithm of their variance; each begins at the one before."""

    def __init__(self, network: GaussianNetwork) -> None:
        self.network = network
        self.last: Profile | None = None

    def at(self, log_variance: float) -> Profile:
        self.last = profile(self.network, float(np.exp(log_variance)), self.last)
        return self.last

    def gain(self, log_variance: float) -> float:
        """a^2."""
        return self.at(log_variance).gain_squared

    def root(self, gain_squared: float, low: float, high: float) -> Profile:
        """The solution of this gain between two variances, at which gains lie on both sides of it."""
        return self.at(brentq(lambda at: self.gain(at) - gain_squared, low, high, xtol=1e-13, rtol=1e-13))


def solutions(network: GaussianNetwork, gain_squared: float) -> list[Profile]:
    """The decaying autocorrelations at this gain, in falling order of variance; none where there is rest.

    Beyond a discontinuous transition there are two until rest loses its stability. The one of larger
    variance attracts, the other separates it from rest.
    """

    branch = _Branch(network)
    # A filter of unit weight does not raise the variance, and |phi| and s are below 1.
    top = np.log(1.0001 * gain_squared) if gain_squared else 0.0
    if gain_squared * network.rest_factor > 1.0:
        low = top - 1.0
        while branch.gain(low) >= gain_squared:
            top, low = low, low - 1.0
        return [branch.root(gain_squared, low, top)]
    if network.reset is None or not network.reset.gain:
        return []
    fold = onset(network)
    if not fold.variance or gain_squared <= fold.gain_squared:
        return []
    middle = np.log(fold.variance)
    found = [branch.root(gain_squared, middle, top)]
    # Below _SMALL the lower branch is a straight line to rest.
    if branch.gain(np.log(_SMALL)) > gain_squared:
        found.append(branch.root(gain_squared, np.log(_SMALL), middle))
    return found


def onset(network: GaussianNetwork) -> Onset:
    """Where chaos begins: where rest loses its stability, or at a fold before.

    The gain is known in closed form of a solution whose variance is given, so the fold is a minimum over one
    variable, to 1e-9 in the gain.
    """

    gain = _Branch(network).gain
    rest = 1.0 / network.rest_factor
    if network.reset is None or not network.reset.gain or gain(np.log(_SMALL)) >= rest:
        return Onset(rest, 0.0)
    variances = [np.log(_SMALL), np.log(_SMALL) + 0.7]
    gains = [gain(at) for at in variances]
    while gains[-1] <= gains[-2]:
        variances.append(variances[-1] + 0.7)
        gains.append(gain(variances[-1]))
    # The fold may lie before the last but one, or before the first step.
    bounds = (variances[max(len(variances) - 3, 0)], variances[-1])
    found = minimize_scalar(gain, bounds=bounds, method="bounded", options={"xatol": 1e-5})
    return Onset(float(found.fun), float(np.exp(found.x)))
