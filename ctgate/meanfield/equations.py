r"""The self-consistent equations of fixed points: the variance q that a network with variance q produces.

All of it is elementwise over arrays of parameters, so one call serves a point as well as a phase diagram.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from ctgate.meanfield.gaussian import average, rule
from ctgate.meanfield.network import RandomNetwork

Array = NDArray[np.floating[Any]]
Curve = Callable[["Setting", Array], Array]
# At most so many values of an integrand at once: 64 MB.
_AT_ONCE, _CELL = 2**23, 50 * 100 * 200


class Setting(NamedTuple):
    """Gains, biases and input variance by block, as arrays that broadcast against q."""

    gains: Mapping[str, Array]
    biases: Mapping[str, Array]
    input_variance: Array

    def seen(self, block: str, q: Array) -> tuple[Array, Array]:
        """Mean and variance of what a gate sees: b_k and a_k^2 (q + v)."""
        return self.biases[block], np.asarray(self.gains[block] ** 2 * (q + self.input_variance))

    def take(self, index: Any) -> "Setting":
        """The setting at some of the places of its arrays."""
        gains, biases = ({k: x[index] for k, x in part.items()} for part in (self.gains, self.biases))
        return Setting(gains, biases, self.input_variance[index])

    def over(self, q: Array) -> "Setting":
        """The setting repeated in the shape of q."""
        gains, biases = (
            {k: np.broadcast_to(x, q.shape) for k, x in part.items()} for part in (self.gains, self.biases)
        )
        return Setting(gains, biases, np.broadcast_to(self.input_variance, q.shape))

    def with_gain(self, block: str, gain: Array) -> "Setting":
        """Another gain of one block."""
        return self._replace(gains={**self.gains, block: gain})


class Equations(NamedTuple):
    r"""Of one kind of network, each a function of (setting, q), elementwise.

    ``map`` is F, whose fixed points q = F(q) are the solutions; ``gain`` is :math:`\rho`, the radius of the
    Jacobian's random part at zero growth rate: a fixed point is stable where it is below 1; ``candidate`` the
    block whose gain drives the transition.
    """

    map: Curve
    gain: Curve
    candidate: str


def setting_of(network: RandomNetwork, changes: Mapping[str, ArrayLike] | None = None) -> Setting:
    """Gains, biases and input variance of a network, some of them replaced by arrays that broadcast.

    ``changes`` is by name, as :meth:`RandomNetwork.at` takes them: "gains.h", "biases.z", "input_variance".
    """
    values = {"input_variance": np.asarray(network.input_variance, dtype=np.float64)}
    values |= {f"gains.{k}": np.asarray(network.gains[k], dtype=np.float64) for k in network.blocks}
    values |= {f"biases.{k}": np.asarray(network.bias(k), dtype=np.float64) for k in network.blocks}
    values |= {k: np.asarray(x, dtype=np.float64) for k, x in (changes or {}).items()}
    full = dict(zip(values, np.broadcast_arrays(*values.values()), strict=True))
    gains, biases = ({k: full[f"{part}.{k}"] for k in network.blocks} for part in ("gains", "biases"))
    return Setting(gains, biases, full["input_variance"])


def gate_moments(setting: Setting, block: str, q: Array) -> tuple[Array, Array]:
    r""":math:`E\sigma(y)` and :math:`E\sigma(y)^2` of the gate of a block."""
    mean, variance = setting.seen(block, q)
    y, weight = rule(np.sqrt(variance), mean)
    opened = _sigma(y)
    weight = weight * opened
    return np.asarray(weight.sum(-1)), np.asarray((weight * opened).sum(-1))


def reset_factors(setting: Setting, q: Array) -> tuple[Array, Array]:
    r""":math:`C_r = E\sigma(y_r)^2` and :math:`C_r + a_r^2\,q\,E\sigma'(y_r)^2`; 1 without a reset gate."""
    if "r" not in setting.gains:
        return np.ones_like(q), np.ones_like(q)
    mean, variance = setting.seen("r", q)
    y, weight = rule(np.sqrt(variance), mean)
    r = expit(y)
    opened = (weight * r * r).sum(-1)
    bend = (weight * (r * (1.0 - r)) ** 2).sum(-1)
    return opened, opened + setting.gains["r"] ** 2 * q * bend


def candidate_variance(setting: Setting, q: Array) -> Array:
    r""":math:`a_h^2\,(q\,C_r + v)`, of the candidate's pre-activation where the reset gate acts before the
    product, or where there is none."""
    opened: Array | float = 1.0
    if "r" in setting.gains:
        mean, variance = setting.seen("r", q)
        opened = average(_sigma_squared, variance, mean)
    return np.asarray(setting.gains["h"] ** 2 * (q * opened + setting.input_variance))


def _map_before(setting: Setting, q: Array) -> Array:
    return average(_tanh_squared, candidate_variance(setting, q), setting.biases["h"])


def _gain_before(setting: Setting, q: Array) -> Array:
    opened, whole = reset_factors(setting, q)
    variance = setting.gains["h"] ** 2 * (q * opened + setting.input_variance)
    slope = average(_slope_squared, variance, setting.biases["h"])
    return np.asarray(setting.gains["h"] * np.sqrt(whole * slope))


def _after(setting: Setting, q: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Reset gate r (*shape, nodes) with its weights; candidate's mean (*shape, 1), and its variance and that
    of W h alone given r."""
    mean, variance = setting.seen("r", q)
    y, weight = rule(np.sqrt(variance), mean)
    r, gain = expit(y), setting.gains["h"][..., None] ** 2
    own = gain * q[..., None]
    given = gain * setting.input_variance[..., None] + r * r * own
    return r, weight, setting.biases["h"][..., None], given, np.broadcast_to(own, r.shape)


def _map_after(setting: Setting, q: Array) -> Array:
    _, weight, mean, given, _ = _after(setting, q)
    return np.asarray((average(_tanh_squared, given, mean) * weight).sum(-1))


def _gain_after(setting: Setting, q: Array) -> Array:
    r"""rho^2 = < phi'^2 (a_h^2 r^2 + a_r^2 s^2 (r (1 - r))^2) > with s = W h, y = b + r s + input."""
    r, weight, mean, given, own = _after(setting, q)
    y, inner = rule(np.sqrt(given), mean)
    slope = _slope_squared(y) * inner
    # s given y is Gaussian about share * (y - mean), with the rest of its variance.
    share = np.divide(r * own, given, out=np.zeros_like(own), where=given > 0.0)
    squared = (share[..., None] * (y - mean[..., None])) ** 2 + (own * (1.0 - r * share))[..., None]
    direct = setting.gains["h"][..., None] ** 2 * r * r * slope.sum(-1)
    bend = (setting.gains["r"][..., None] * r * (1.0 - r)) ** 2 * (slope * squared).sum(-1)
    return np.asarray(np.sqrt(((direct + bend) * weight).sum(-1)))


class CellNodes(NamedTuple):
    """The gates i, f, g of an LSTM on a grid (*shape, i, f, g), with the weights; ``shut`` is 1 - f."""

    i: Array
    f: Array
    shut: Array
    g: Array
    weight: Array

    @property
    def cell(self) -> Array:
        """c = i g / (1 - f), that of a fixed point."""
        return np.asarray(self.i * self.g / np.maximum(self.shut, 1e-300))


def cell_nodes(setting: Setting, q: Array, forget: tuple[Array, Array] | None = None) -> CellNodes:
    """The grid for one or several q; ``forget`` are nodes y_f and weights (*shape, f) in place of the rule's.

    tanh(c) turns where g is as small as (1 - f) / i, which the nodes of g follow.
    """
    (i, of_i), (y, of_f) = (
        rule(np.sqrt(variance), mean) for mean, variance in (setting.seen(k, q) for k in "if")
    )
    y, of_f = (y, of_f) if forget is None else forget
    into, keep, shut = expit(i)[..., :, None], expit(y)[..., None, :], expit(-y)[..., None, :]
    # Beyond e^20 less than 2e-9 of the units have a |g| that is not saturated.
    steepness = np.minimum(into / np.maximum(shut, 1e-300), np.exp(20.0))
    mean, variance = (part[..., None, None] for part in setting.seen("g", q))
    scaled, of_g = rule(steepness * np.sqrt(variance), steepness * mean)
    weight = (of_i[..., :, None] * of_f[..., None, :])[..., None] * of_g
    return CellNodes(
        into[..., None], keep[..., None], shut[..., None], np.tanh(scaled / steepness[..., None]), weight
    )


def _map_cell(setting: Setting, q: Array) -> Array:
    """q = E o^2 E tanh(c)^2."""
    return np.asarray(gate_moments(setting, "o", q)[1] * _in_parts(_shown, setting, q))


def _gain_cell(setting: Setting, q: Array) -> Array:
    r"""rho^2 = E o^2 < (1 - tanh(c)^2)^2 k^2 / (1 - f)^2 > + a_o^2 < tanh(c)^2 > < (o (1 - o))^2 >."""

    def inner(part: Setting, at: Array) -> Array:
        nodes = cell_nodes(part, at)
        shown = _slope_squared(nodes.cell)
        kicks = cell_kicks(part, nodes)
        return np.asarray((shown * sum(kicks) / nodes.shut**2 * nodes.weight).sum((-3, -2, -1)))

    mean, variance = setting.seen("o", q)
    bend = average(lambda y: (expit(y) * expit(-y)) ** 2, variance, mean)
    through_cell = gate_moments(setting, "o", q)[1] * _in_parts(inner, setting, q)
    through_output = setting.gains["o"] ** 2 * bend * _in_parts(_shown, setting, q)
    return np.asarray(np.sqrt(through_cell + through_output))


def _shown(setting: Setting, q: Array) -> Array:
    """E tanh(c)^2."""
    nodes = cell_nodes(setting, q)
    return np.asarray((_tanh_squared(nodes.cell) * nodes.weight).sum((-3, -2, -1)))


def cell_kicks(setting: Setting, nodes: CellNodes) -> tuple[Array, Array, Array]:
    """The variances with which i, f and g drive the cell at a fixed point, where c (1 - f) = i g."""
    a_i, a_f, a_g = (setting.gains[k][..., None, None, None] for k in "ifg")
    through_i = (a_i * nodes.g * nodes.i * (1.0 - nodes.i)) ** 2
    through_f = (a_f * nodes.i * nodes.g * nodes.f) ** 2
    return through_i, through_f, np.asarray((a_g * nodes.i * (1.0 - nodes.g**2)) ** 2)


def _in_parts(function: Curve, setting: Setting, q: Array) -> Array:
    """``function`` of a few places at a time: its integrand fills three dimensions more."""
    gains, biases = ({k: x.ravel() for k, x in part.items()} for part in (setting.gains, setting.biases))
    flat, values = Setting(gains, biases, setting.input_variance.ravel()), q.ravel()
    if not q.size:
        return np.zeros(q.shape)
    each = max(1, _AT_ONCE // _CELL)
    parts = [slice(k, k + each) for k in range(0, values.size, each)]
    return np.concatenate([function(flat.take(part), values[part]) for part in parts]).reshape(q.shape)


def _tanh_squared(y: Array) -> Array:
    return np.asarray(np.tanh(y) ** 2)


def _slope_squared(y: Array) -> Array:
    return np.asarray((1.0 - np.tanh(y) ** 2) ** 2)


def _sigma_squared(y: Array) -> Array:
    return np.asarray(_sigma(y) ** 2)


def _sigma(y: Array) -> Array:
    """The logistic function to 1e-16 of 1, not of itself as expit has it, at a third of the time."""
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * y))


_BEFORE = Equations(_map_before, _gain_before, "h")
# By the network's kind, see ``ctgate.meanfield.theories``. At a fixed point the gate on the rate drops out.
EQUATIONS: dict[str, Equations] = {
    "Leaky": _BEFORE,
    "ScalarGate": _BEFORE,
    "MultiGate": _BEFORE,
    "GatedRate": _BEFORE,
    "GRU before": _BEFORE,
    "GRU after": Equations(_map_after, _gain_after, "h"),
    "LSTM": Equations(_map_cell, _gain_cell, "g"),
}
