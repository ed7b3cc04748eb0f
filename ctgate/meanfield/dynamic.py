r"""Dynamic mean-field theory of random gated networks: autocorrelations, exponents, the onset of chaos."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import xarray as xr
from numpy import ndarray
from tqdm import tqdm

from ctgate import __version__
from ctgate.algorithms import Euler
from ctgate.meanfield import branches
from ctgate.meanfield.network import RandomNetwork
from ctgate.meanfield.path_tangent import Exponent, exponents
from ctgate.meanfield.paths import Effort, Grid, Sampled, enlarged, stationary_paths
from ctgate.meanfield.reduction import Reduction, reduce
from ctgate.meanfield.stationary import Profile, Relaxation
from ctgate.meanfield.tangent import growth_rate
from ctgate.sensitivity.labels import label

_Any = TypeVar("_Any")

# A circle of times is at least so many relaxation times long, and at most so many times.
_CIRCLE, _MOST_POINTS = 20.0, 2**15
# Of a sampled exponent.
_REPLICAS = 4
# A sampled signal that has shrunk to this part of the first guess is on its way to rest.
_RESTING = 1e-5


def dmft(
    network: RandomNetwork,
    alg: Any = None,
    *,
    adiabatic: bool = False,
    paths: int = 64,
    sweeps: int = 300,
    tolerance: float = 0.01,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    r"""The autocorrelations of the chaotic state of a large random network.

    Where the rate of h is constant (no update gate, or one of gain 0) and h has no bias and no input, h of a
    GatedRate is Gaussian, and :math:`P\,\hat C_h = a_h^2\,\widehat{C_\varphi C_s}` is solved to rounding; so
    are Leaky, and MultiGate and GRU without gains of the gates, through the pre-activation. Elsewhere h is
    not Gaussian: paths of one unit are sampled in the Gaussian input that they give one another.

    Parameters:
        network: of a class that ``THEORIES`` gives a "dmft".
        alg: None for the flow, ``ct.Euler(dt)`` for the map, whose state is another one.
        adiabatic: the limit tau_r -> 0 of a GatedRate, whose reset gate then follows at once.
        paths, sweeps, tolerance: where paths are sampled: how many per sweep, at most how many sweeps, and
            the relative standard error of the signal's variance at which to stop.
        seed: of the paths. progress: a bar over sweeps.

    Returns: a Dataset over ``lag`` [time; steps for a map] of

    - ``C_h``: <h h'>, and ``variance``, its first value;
    - ``C_phi``: <tanh tanh'> of h (GatedRate) or of its pre-activation (other cells);
    - ``C_z``, ``C_r``: of the gates' variables about their means, where gates fluctuate;
    - ``relaxation_time`` [time]: of the last stretch of C_h (sampled: of its fall from 30 % to 5 %).

    All are 0 where rest is the only state. ``attrs``: ``method`` "exact" or "sampled"; ``residual``, the
    largest deviation from the lag equation relative to the variance, and ``residual_error``, its sampling
    error; ``standard_error``, relative, of the variance of the signal; ``bistable``, whether rest is stable
    beside; ``separatrix``, the variance of the unstable state between the two; ``converged``.

    Raises: ValueError, TypeError for arguments out of range and networks without this theory, by name.
    KeyboardInterrupt ends sampling early: what there is comes back, not converged.

    Source: THEORY.md 22; K. Krishnamurthy, T. Can and D. J. Schwab, Phys. Rev. X 12 (2022) 011011.
    """
    effort = _effort("dmft", paths, sweeps, tolerance)
    reduced = reduce(network, alg, adiabatic, "dmft")
    state = _state(reduced, effort, np.random.default_rng(seed), progress)
    return _dataset(reduced, state).assign_attrs(_described(network, alg, adiabatic, seed))


def max_lyapunov(
    network: RandomNetwork,
    alg: Any = None,
    *,
    adiabatic: bool = False,
    paths: int = 64,
    sweeps: int = 300,
    tolerance: float = 0.01,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    r"""The largest Lyapunov exponent of a large random network, from the tangents of its mean field.

    Parameters: those of :func:`dmft`; sampling stops at three times the tolerance, of the exponent.

    Returns: a Dataset of ``lambda_1`` [1/time, for maps too] and its ``standard_error``, 0 where it is exact,
    from four repetitions, autocorrelations included, where it is sampled. At rest it is the edge of the
    spectrum. ``attrs`` as in :func:`dmft`. Networks of 1000 units lie below, by a tenth and more where chaos
    is weak.

    Raises: as :func:`dmft`.

    Source: THEORY.md 22.
    """
    effort = _effort("max_lyapunov", paths, sweeps, tolerance)
    reduced = reduce(network, alg, adiabatic, "max_lyapunov")
    generator = np.random.default_rng(seed)
    state = _state(reduced, effort, generator, progress)
    if state.chaotic is None:
        found = Exponent(_rest_exponent(reduced), 0.0, 0, state.converged)
    elif isinstance(state.chaotic, Profile):
        found = Exponent(growth_rate(state.chaotic), 0.0, 0, True)
    else:
        found = _replicated(state.chaotic, effort, generator, progress)
    variables = {
        "lambda_1": ((), found.value, label("largest Lyapunov exponent", "1 / time")),
        "standard_error": ((), found.standard_error, label("standard error of lambda_1", "1 / time")),
    }
    attrs = {**state.attributes(), "converged": int(state.converged and found.settled)}
    if not found.settled:
        warnings.warn(
            f"max_lyapunov: after {found.sweeps} sweeps the standard error is {found.standard_error:.1e}; "
            "give more sweeps or paths",
            RuntimeWarning,
            stacklevel=2,
        )
    return xr.Dataset(variables, attrs={**attrs, **_described(network, alg, adiabatic, seed)})


def onset(network: RandomNetwork, alg: Any = None, *, adiabatic: bool = False) -> xr.Dataset:
    r"""The gain of the candidate, "gains.h", at which chaos begins, everything else as it is.

    Without fluctuations of the reset gate chaos grows out of rest where rest loses its stability. Strong
    ones make it appear before, at a finite variance: from there to the instability of rest the network has
    both states.

    Parameters: ``network``, whose own "gains.h" does not matter; ``alg`` and ``adiabatic`` are those of
    :func:`dmft`.

    Returns: a Dataset of ``gain``, ``rest_gain`` (where rest loses its stability), ``variance`` (C_h(0) at
    the onset) and ``discontinuous``.

    Raises: ValueError where the lag equation is not closed: an update gate that fluctuates, a bias of h, an
    input, the reset gate of a GRU; otherwise as :func:`dmft`.

    Source: THEORY.md 22.
    """
    reduced = reduce(network, alg, adiabatic, "onset")
    if reduced.gaussian is None:
        raise ValueError(
            f"onset: the lag equation of this {network.field.__name__} is not closed; it is without bias of "
            "h and input, with gains.z = 0, and gains.r = 0 but for GatedRate"
        )
    found = branches.onset(reduced.gaussian)
    gain = found.gain_squared**0.5 / reduced.reset_level
    scale = found.gain_squared if reduced.preactivation else 1.0
    rest = reduced.gaussian.rest_factor**-0.5 / reduced.reset_level
    variables = {
        "gain": ((), gain, label("gains.h at the onset of chaos", "1")),
        "rest_gain": ((), rest, label("gains.h at which rest loses its stability", "1")),
        "variance": ((), found.variance / scale, label("variance of h at the onset", "1")),
        "discontinuous": ((), found.variance > 0.0, label("whether chaos appears at a finite variance", "1")),
    }
    return xr.Dataset(variables, attrs=_described(network, alg, adiabatic, None))


@dataclass(frozen=True)
class _State:
    """What the network settles in: None is rest."""

    chaotic: Profile | Sampled | None
    converged: bool
    bistable: bool = False
    separatrix: float = np.nan

    def attributes(self) -> dict[str, Any]:
        state = self.chaotic
        sampled = isinstance(state, Sampled)
        return {
            "state": "rest" if state is None else "chaos",
            "method": "sampled" if sampled else "exact",
            "residual": 0.0 if state is None else state.residual,
            "residual_error": state.residual_error if isinstance(state, Sampled) else 0.0,
            "standard_error": state.standard_error if isinstance(state, Sampled) else 0.0,
            "sweeps": state.sweeps if isinstance(state, Sampled) else 0,
            "bistable": int(self.bistable),
            "separatrix": self.separatrix,
            "converged": int(self.converged),
        }


def _state(reduced: Reduction, effort: Effort, generator: np.random.Generator, progress: bool) -> _State:
    if reduced.gaussian is None:
        return _sampled_state(reduced, effort, generator, progress)
    found = branches.solutions(reduced.gaussian, reduced.gain_squared)
    if not found:
        return _State(None, True)
    found[0].warn("dmft")
    scale = reduced.gain_squared if reduced.preactivation else 1.0
    bistable = reduced.gain_squared * reduced.gaussian.rest_factor < 1.0
    separatrix = found[1].variance / scale if len(found) > 1 else np.nan
    return _State(found[0], found[0].converged, bistable, separatrix)


def _sampled_state(
    reduced: Reduction, effort: Effort, generator: np.random.Generator, progress: bool
) -> _State:
    unit = reduced.unit
    clocks = [unit.rate, *(own.rate for own in (unit.relaxation_z, unit.relaxation_r) if own is not None)]
    spacing = unit.step or 0.1 / max(clocks)
    time = 10.0 / (unit.rate * (0.5 if unit.update else 1.0))
    grid = Grid(2 ** int(np.ceil(np.log2(_CIRCLE * time / spacing))), spacing)
    # Strong and fast: where rest and chaos are both stable, this leads to chaos.
    signal = 0.5 / np.cosh(grid.lags / time)
    while True:
        found = _last(stationary_paths(unit, grid, signal, effort, generator), effort, progress)
        if found.signal[0] < _RESTING:
            return _State(None, True)
        fits = _CIRCLE * _fall(grid.lags, found.state) <= grid.points * grid.spacing
        if fits or grid.points >= _MOST_POINTS:
            break
        signal, grid = enlarged(found.signal, grid)
    if not (found.settled and fits):
        warnings.warn(
            f"dmft: after {found.sweeps} sweeps the variance has a standard error of "
            f"{found.standard_error:.1e} of itself, the lag equation a residual of {found.residual:.1e} +- "
            f"{found.residual_error:.1e}, and "
            f"a time of {grid.points * grid.spacing:g} is simulated where correlations last for "
            f"{_fall(grid.lags, found.state):g}; give more sweeps or paths",
            RuntimeWarning,
            stacklevel=4,
        )
    return _State(found, found.settled and fits)


def _replicated(state: Sampled, effort: Effort, generator: np.random.Generator, progress: bool) -> Exponent:
    """From as many states with noise of their own; the first has found the way for all."""
    values, errors, sweeps, settled = [], [], 0, True
    for number in range(_REPLICAS):
        again = stationary_paths(state.network, state.grid, state.signal, effort, generator)
        own = state if number == 0 else _last(again, effort, progress)
        found = _last(exponents(own, effort, generator), effort, progress)
        values.append(found.value)
        errors.append(found.standard_error)
        sweeps, settled = sweeps + found.sweeps, settled and own.settled and found.settled
    scatter = max(float(np.std(values, ddof=1)), float(np.mean(errors)))
    return Exponent(float(np.mean(values)), scatter / _REPLICAS**0.5, sweeps, settled)


def _last(found: Iterator[_Any], effort: Effort, progress: bool) -> _Any:
    """The first that has settled, or the last one."""
    latest: Any = None
    with tqdm(total=effort.sweeps, disable=None if progress else True, unit="sweep", leave=False) as bar:
        try:
            for latest in found:
                bar.update(latest.sweeps - bar.n)
                if latest.settled:
                    break
        except KeyboardInterrupt:
            if latest is None:
                raise
    result: _Any = latest
    return result


def _fall(lags: ndarray, covariance: ndarray) -> float:
    """The time constant of the fall from 30 % to 5 % of the first value, above the last."""
    share = (covariance - covariance[-1]) / (covariance[0] - covariance[-1])
    first, last = (int(np.argmax(share < level)) for level in (0.3, 0.05))
    if last - first < 3:
        return float(lags[max(last, 1)] / 3.0)
    slope = np.polyfit(lags[first:last], np.log(share[first:last]), 1)[0]
    return float(-1.0 / slope)


def _rest_exponent(reduced: Reduction) -> float:
    """The edge of the spectrum at rest."""
    unit = reduced.unit
    level = 1.0 if "r" not in unit.gains else float(1.0 / (1.0 + np.exp(-unit.biases["r"])))
    gate = 1.0 if not unit.update else float(1.0 / (1.0 + np.exp(-unit.update * unit.biases["z"])))
    edges = [Relaxation(unit.rate * gate, unit.step).edge(unit.gains["h"] * level)]
    edges += [own.edge(0.0) for own in (unit.relaxation_z, unit.relaxation_r) if own is not None]
    return max(edges)


def _dataset(reduced: Reduction, state: _State) -> xr.Dataset:
    unit, found = reduced.unit, state.chaotic
    covariances: dict[str, ndarray]
    if found is None:
        lags, time = np.zeros(1), np.nan
        covariances = dict.fromkeys(["C_h", "C_phi", *(f"C_{name}" for name in unit.gains)], np.zeros(1))
    else:
        lags, time, covariances = _chaos(reduced, found)
    texts = {
        "C_h": "autocorrelation of h",
        "C_phi": "autocorrelation of the firing rate",
        "C_z": "autocorrelation of the update gate's variable, about its mean",
        "C_r": "autocorrelation of the reset gate's variable, about its mean",
    }
    variables: dict[str, Any] = {
        name: (("lag",), covariances[name], label(text, "1"))
        for name, text in texts.items()
        if name in covariances
    }
    variables["variance"] = ((), covariances["C_h"][0], label("mean square of h", "1"))
    variables["relaxation_time"] = ((), time, label("relaxation time of C_h", "time"))
    lag = ("lag", np.round(lags / unit.step), label("lag", "steps")) if unit.step else None
    coordinates = {"lag": lag or ("lag", lags, label("lag", "time"))}
    return xr.Dataset(variables, coords=coordinates, attrs=state.attributes())


def _chaos(reduced: Reduction, found: Profile | Sampled) -> tuple[ndarray, float, dict[str, ndarray]]:
    """Lags, the relaxation time, and autocorrelations by name."""
    unit = reduced.unit
    if isinstance(found, Profile):
        lags, time, gated = found.lags, found.relaxation_time, found.gated
        scale = reduced.gain_squared if reduced.preactivation else 1.0
        covariances = {"C_h": found.covariance / scale, "C_phi": gated.firing}
        if "r" in unit.gains:
            covariances["C_r"] = gated.variable
        return lags, time, covariances
    lags = found.grid.lags
    firing = found.target if reduced.preactivation else found.signal
    covariances = {"C_h": found.state, "C_phi": firing}
    for block in ("z", "r"):
        if block in unit.gains:
            drive = unit.covariance(block, found.signal, found.grid.frequency)
            covariances[f"C_{block}"] = drive + unit.static(block)
    return lags, _fall(lags, found.state), covariances


def _effort(owner: str, paths: int, sweeps: int, tolerance: float) -> Effort:
    for name, value, least in (("paths", paths, 2), ("sweeps", sweeps, 40)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{owner}({name}=...): {name} is {value!r}; it must be an integer >= {least}")
    if not tolerance > 0.0:
        raise ValueError(f"{owner}(tolerance=...): tolerance is {tolerance}; it must be positive")
    return Effort(paths, sweeps, float(tolerance))


def _described(
    network: RandomNetwork, alg: Euler | None, adiabatic: bool, seed: int | None
) -> dict[str, Any]:
    attrs = {
        "ctgate_version": __version__,
        "field": network.field.__name__,
        "gains": str(dict(network.gains)),
        "biases": str(dict(network.biases)),
        "reset": network.reset or "",
        "input_variance": network.input_variance,
        "algorithm": "flow" if alg is None else repr(alg),
        "adiabatic": int(adiabatic),
        "dtype": "float64",
    }
    return attrs if seed is None else {**attrs, "seed": seed}
