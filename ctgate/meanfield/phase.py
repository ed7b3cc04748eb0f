r"""Phase diagrams: all fixed points over a grid of two parameters at once, and the lines between regions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from tqdm import tqdm

from ctgate.meanfield.equations import EQUATIONS, Array, Equations, Setting, setting_of
from ctgate.meanfield.network import RandomNetwork
from ctgate.meanfield.roots import brackets, excess, solve_bracketed
from ctgate.meanfield.static import attributes, has_zero, in_marginal_band
from ctgate.meanfield.theories import require
from ctgate.sensitivity.labels import label

Index = NDArray[np.intp]
Axis = tuple[str, Sequence[float] | Array]
# Cells at a time: their integrands stay in the cache.
_CELLS = 256
# Of q along the branch of non-zero solutions, and of its minimum.
_LOWEST, _BRANCH, _NARROWINGS = 1e-4, 64, 40
_GOLDEN = (5.0**0.5 - 1.0) / 2.0
REGIONS = {
    0: "no fixed point at zero",
    1: "I: zero is the only mean-field fixed point, and stable",
    2: "II: zero is stable, and there are others",
    3: "III: zero is unstable",
}


def phase_diagram(network: RandomNetwork, x: Axis, y: Axis, *, progress: bool = False) -> xr.Dataset:
    r"""All mean-field fixed points of a network over two of its parameters, in one computation.

    Parameters:
        network: what the other parameters are.
        x, y: a parameter by name and its values, ``("gains.h", values)``, ``("biases.z", values)``,
            ``("input_variance", values)``.
        progress: a bar, for LSTMs, whose averages have three dimensions.

    Returns: Dataset over ``y``, ``x`` (named by the parameters, dots as underscores) and ``solution``, in the
    order of q and NaN where there are fewer, with ``number``, ``q``, ``residual``, ``rho``, ``stable``,
    ``marginal_band`` as in :func:`ctgate.meanfield.static`, and over ``y``, ``x``

    - ``region``: I, II, III (1, 2, 3), see ``attrs["regions"]``; 0 where a bias of the candidate or an input
      takes the fixed point at zero away;
    - ``critical_gain``: of the candidate, at which zero loses its stability with all else as it is
      (:math:`a_h \sigma(b_r) = 1` in a GRU, :math:`a_g\,i\,o = 1 - f` in an LSTM), NaN in region 0.

    Raises: ValueError for a network without the theory, a parameter that it does not have or values out of
    range.

    Source: THEORY.md 20.
    """
    equations = EQUATIONS[require(network, "static", "phase_diagram")]
    (name_x, along_x), (name_y, along_y) = (
        _axis(network, axis, which) for axis, which in ((x, "x"), (y, "y"))
    )
    if name_x == name_y:
        raise ValueError(f"phase_diagram: x and y are both {name_x!r}; they must differ")
    grid_x, grid_y = np.meshgrid(along_x, along_y)
    setting = setting_of(network, {name_x: grid_x.ravel(), name_y: grid_y.ravel()})
    count = grid_x.size
    parts = range(0, count, _CELLS)
    found = [
        _cells(network, equations, setting.take(slice(k, k + _CELLS)))
        for k in tqdm(parts, "phase diagram", disable=None if progress else True, leave=False)
    ]
    most = max((part["q"].shape[1] for part in found), default=0)
    rows = {
        key: np.concatenate([_widened(part[key], most) for part in found]).reshape(*grid_x.shape, -1)
        for key in found[0]
    }
    zero = has_zero(equations, setting).reshape(grid_x.shape)
    number = np.isfinite(rows["q"]).sum(-1)
    rho_at_zero = np.where(zero, rows["rho"][..., 0], np.nan)
    region = np.where(~zero, 0, np.where(rho_at_zero >= 1.0, 3, np.where(number > 1, 2, 1)))
    own = setting.gains[equations.candidate].reshape(grid_x.shape)
    critical = np.divide(own, rho_at_zero, out=np.full(own.shape, np.nan), where=rho_at_zero > 0.0)
    dims = (name_y.replace(".", "_"), name_x.replace(".", "_"))
    over = (*dims, "solution")
    variables: dict[str, Any] = {
        "number": (dims, number, label("number of fixed points", "1")),
        "q": (over, rows["q"], label("variance of the hidden state", "1")),
        "residual": (over, rows["residual"], label("F(q) - q", "1")),
        "rho": (over, rows["rho"], label("radius of the random part at zero growth rate", "1")),
        "stable": (over, rows["rho"] < 1.0, label("whether the fixed point is stable", "1")),
        "marginal_band": (
            over,
            rows["band"] == 1.0,
            label("whether closed gates pin the spectrum to the marginal line", "1"),
        ),
        "region": (dims, region, label("region of the phase diagram", "1")),
        "critical_gain": (dims, critical, label("candidate's gain where zero loses stability", "1")),
    }
    coordinates = {
        dims[1]: (dims[1], along_x, label(name_x, "1")),
        dims[0]: (dims[0], along_y, label(name_y, "1")),
        "solution": np.arange(most),
    }
    regions = "; ".join(f"{k}: {text}" for k, text in REGIONS.items())
    attrs = attributes(network) | {"x": dims[1], "y": dims[0], "regions": regions}
    return xr.Dataset(variables, coords=coordinates, attrs=attrs)


def saddle_node(network: RandomNetwork, along: Axis | None = None) -> xr.Dataset:
    r"""Where a pair of non-zero fixed points is born: the least gain of the candidate that has one,
    :math:`a_{SN} = \min_q a(q)` with a(q) the gain at which q is a solution.

    Parameters: ``along``, another parameter by name and its values; the network's own gain of the candidate
    does not enter.

    Returns: Dataset over that parameter with ``gain``, ``q`` and ``rho`` at the saddle-node, NaN where
    non-zero solutions grow from zero continuously; and ``critical_gain``, where zero loses its stability. The
    transition of a GRU is discontinuous where
    :math:`a_r > \sqrt{2/((1 - s)(2 - 3 s))}`, :math:`s = \sigma(b_r)`; so near that value that q is below
    1e-4 there it is taken as continuous.

    Raises: ValueError for a network without the theory or without a fixed point at zero.

    Source: THEORY.md 20.
    """
    equations = EQUATIONS[require(network, "static", "saddle_node")]
    name, values = ("", np.zeros(1)) if along is None else _axis(network, along, "along")
    block = equations.candidate
    setting = setting_of(network, {name: values} if name else {"input_variance": [network.input_variance]})
    if not has_zero(equations, setting).all():
        raise ValueError(
            f"saddle_node: the network has a bias of {block!r} or an input; zero must be a fixed point"
        )
    unit = setting.with_gain(block, np.ones(values.size))
    critical = 1.0 / equations.gain(unit, np.zeros(values.size))
    log_q = np.linspace(np.log(_LOWEST), np.log(0.95), _BRANCH)
    place = np.repeat(np.arange(values.size), _BRANCH)
    gains = _gain_of(equations, unit, place, np.tile(log_q, values.size)).reshape(-1, _BRANCH)
    least = gains.argmin(1)
    inner = np.flatnonzero((least > 0) & (least < _BRANCH - 1))
    low, high = log_q[least[inner] - 1], log_q[least[inner] + 1]
    for _ in range(_NARROWINGS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        at_left, at_right = (_gain_of(equations, unit, inner, point) for point in (left, right))
        low, high = np.where(at_left < at_right, low, left), np.where(at_left < at_right, right, high)
    found = np.full((3, values.size), np.nan)
    at = 0.5 * (low + high)
    best = _gain_of(equations, unit, inner, at)
    rho = equations.gain(unit.take(inner).with_gain(block, best), np.exp(at))
    found[:, inner] = best, np.exp(at), rho
    texts = ("least gain of the candidate with non-zero solutions", "variance there", "rho there")
    dim = name.replace(".", "_") or "point"
    variables: dict[str, Any] = {
        key: (dim, row, label(text, "1"))
        for key, row, text in zip(("gain", "q", "rho"), found, texts, strict=True)
    }
    variables["critical_gain"] = (dim, critical, label("gain where zero loses its stability", "1"))
    coordinates = {dim: (dim, values, label(name, "1"))} if name else {}
    data = xr.Dataset(variables, coords=coordinates, attrs=attributes(network) | {"candidate": block})
    return data if name else data.squeeze("point")


def _gain_of(equations: Equations, unit: Setting, place: Index, log_q: Array) -> Array:
    """The candidate's gain at which q is a solution, of the places ``place`` (n,) of a setting."""
    settings, q = unit.take(place), np.exp(log_q)

    def lacking(which: Index, log_gain: Array) -> Array:
        part = settings.take(which).with_gain(equations.candidate, np.exp(log_gain))
        return np.asarray(np.log(equations.map(part, q[which])) - log_q[which])

    every = np.arange(q.size)
    low, high = np.full(q.size, -2.0), np.full(q.size, 2.0)
    while (at_low := lacking(every, low)).max(initial=0.0) > 0.0:
        low = np.where(at_low > 0.0, low - 2.0, low)
    while (at_high := lacking(every, high)).min(initial=0.0) < 0.0:
        high = np.where(at_high < 0.0, high + 2.0, high)
    return np.exp(solve_bracketed(lacking, low, high, at_low, at_high))


def _cells(network: RandomNetwork, equations: Equations, setting: Setting) -> dict[str, Array]:
    """q, rho, residual and whether it is in the marginal band, (cell, solution), NaN where there is none."""
    count = setting.input_variance.size
    bracket = brackets(equations, setting)
    of = excess(equations, setting)
    root = np.exp(
        solve_bracketed(
            lambda which, at: of(bracket.place[which], at),
            bracket.low,
            bracket.high,
            bracket.at_low,
            bracket.at_high,
        )
    )
    zero = np.flatnonzero(has_zero(equations, setting))
    place = np.concatenate([zero, bracket.place])
    q = np.concatenate([np.zeros(zero.size), root])
    order = np.lexsort((q, place))
    place, q = place[order], q[order]
    slot = np.arange(place.size) - np.searchsorted(place, place)
    here = setting.take(place)
    rho = equations.gain(here, q)
    rows = {
        "q": q,
        "residual": equations.map(here, q) - q,
        "rho": rho,
        "band": in_marginal_band(network, here, q, rho).astype(np.float64),
    }
    width = int(slot.max(initial=-1)) + 1
    full = {}
    for key, values in rows.items():
        full[key] = np.full((count, width), np.nan)
        full[key][place, slot] = values
    return full


def _widened(values: Array, width: int) -> Array:
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=np.nan)


def _axis(network: RandomNetwork, axis: Axis, which: str) -> tuple[str, Array]:
    """The name and the values of an axis. Raises: ValueError for what the network does not have."""
    name, values = axis
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all():
        raise ValueError(f"{which}=({name!r}, ...): the values must be a list of finite numbers")
    for value in (numbers.min(), numbers.max()):
        part, _, block = name.partition(".")
        known = (part in ("gains", "biases") and block in network.blocks) or name == "input_variance"
        if not known:
            raise ValueError(
                f"{which}=({name!r}, ...): it must be 'gains.k' or 'biases.k' with k one of "
                f"{', '.join(network.blocks)}, or 'input_variance'"
            )
        network.at(name, float(value))
    return name, numbers
