"""The units of a random network at a mean-field fixed point, as a theory of its spectrum sees them."""

from typing import NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.special import expit, ndtri
from scipy.stats import qmc

from ctgate.fields import GRU
from ctgate.meanfield.equations import (
    EQUATIONS,
    Array,
    Setting,
    candidate_variance,
    cell_kicks,
    cell_nodes,
    setting_of,
)
from ctgate.meanfield.gaussian import TAIL, rule
from ctgate.meanfield.network import RandomNetwork
from ctgate.meanfield.population import Population, Times, one
from ctgate.meanfield.response import Response, State, Wiring, respond, wiring_of
from ctgate.meanfield.static import solutions
from ctgate.meanfield.theories import require

# Nodes of the gate on the rate: close enough that the spectrum's edge is smooth near the real axis.
_FEWEST, _MOST, _APART = 3000, 60000, 0.02
# Sobol points: a share of eigenvalues is then right to about 1e-3.
_SAMPLES = 4096
# The rest of an LSTM's unit given its forget gate is interpolated between so many values of it.
_FEW = 240

Gaussians = dict[str, tuple[float, float]]


class FixedPoint(NamedTuple):
    """A mean-field fixed point of a network."""

    network: RandomNetwork
    kind: str
    q: float
    setting: Setting
    times: Times
    wiring: Wiring

    @property
    def alpha(self) -> float:
        """The constant gate of Leaky."""
        return float(self.network.options.get("alpha", 1.0))

    @property
    def gate(self) -> str:
        """The block of the gate on the rate."""
        return "f" if self.kind == "LSTM" else "z"

    def gaussians(self) -> Gaussians:
        """Mean and deviation of the independent variables of a unit; with a reset gate after the product
        "own" is what it multiplies and "h" the input and bias beside it."""
        q = np.asarray(self.q)
        found = {}
        for block in self.network.blocks:
            mean, variance = self.setting.seen(block, q)
            if block == "h":
                variance = candidate_variance(self.setting, q)
            found[block] = float(mean), float(np.sqrt(variance))
        if self.kind == "GRU after":
            gain, bias = float(self.setting.gains["h"]), float(self.setting.biases["h"])
            found["own"] = 0.0, gain * self.q**0.5
            found["h"] = bias, gain * float(self.setting.input_variance) ** 0.5
        if self.kind == "ScalarGate":  # one gate for all: its median
            found["z"] = found["z"][0], 0.0
        return found

    def respond(self, values: dict[str, Array]) -> Response:
        """The response of units at rest with these values of the Gaussians."""
        pre, own = {k: x for k, x in values.items() if k != "own"}, values.get("own")
        if self.kind == "LSTM":
            h = expit(pre["i"]) * np.tanh(pre["g"]) / np.maximum(expit(-pre["f"]), 1e-300)
        elif self.kind == "GatedRate":
            h = pre["h"]
        else:
            if own is not None:
                pre["h"] = pre["h"] + expit(pre["r"]) * own
            h = np.tanh(pre["h"])
        return respond(self.kind, State(pre, h, self.times.tau, own, self.alpha))

    def population(self, weight: Array, response: Response) -> Population:
        """Units with this response, whose poles are those of the whole distribution."""
        moving = self.gaussians().get(self.gate, (0.0, 0.0))[1] > 0.0
        poles = float(response.pole.min()), float(response.pole.max())
        extent = (-1.0 / float(self.times.tau), 0.0) if moving else poles
        variance = np.array([float(self.setting.gains[k]) ** 2 for k in self.wiring.blocks])
        lag = self.times.lags(self.wiring, "RandomNetwork")
        return Population(weight, *response, self.wiring, lag, variance, extent)


def fixed_point(network: RandomNetwork, theory: str, owner: str, solution: int = -1) -> FixedPoint:
    """One of the solutions of :func:`ctgate.meanfield.static`, by default that with the largest q.

    Raises: ValueError for a network without the theory, time constants that differ from unit to unit, or no
    such solution.
    """
    kind = require(network, theory, owner)
    setting = setting_of(network)
    q = solutions(EQUATIONS[kind], setting)
    if not -q.size <= solution < q.size:
        raise ValueError(f"{owner}(solution=...): solution is {solution}; the network has {q.size} of them")
    tau, tau_z, tau_r = (one(network.options.get(k, 1.0), k, owner) for k in ("tau", "tau_z", "tau_r"))
    times = Times(np.asarray(tau), tau_z, tau_r)
    return FixedPoint(network, kind, float(q[solution]), setting, times, wiring_of(kind, network.blocks))


def by_gate(point: FixedPoint) -> Population:
    """Units that differ in the gate on the rate alone: what else they are is averaged, as mean squares, which
    are all that the edge of the spectrum depends on."""
    gaussians = point.gaussians()
    if point.kind == "LSTM":
        return _cell_by_gate(point, gaussians)
    # With the gate open: at a fixed point it is a factor of all that goes through the pole.
    keeps = point.network.field is GRU
    open_ = {"z": np.asarray(-np.inf if keeps else np.inf)} if "z" in gaussians else {}
    values, weight = _product({k: at for k, at in gaussians.items() if k != "z"})
    opened = point.respond({**values, **open_})
    axes = tuple(range(weight.ndim))
    through, aside = (
        np.sqrt((weight[..., None, None] * part**2).sum(axes)) for part in (opened.through, opened.aside)
    )
    if "z" in gaussians:
        y, weight = _fine(*gaussians["z"])
        gate = expit(-y if keeps else y)
    else:
        gate, weight = np.ones(1), np.ones(1)
    response = Response(
        gate * opened.pole.flat[0],
        gate[:, None, None] * through,
        np.broadcast_to(aside, (gate.size, *aside.shape)),
    )
    return point.population(weight, response)


def _cell_by_gate(point: FixedPoint, gaussians: Gaussians) -> Population:
    """The output gate is independent of all else; the rest given f is a smooth function of its argument."""
    y, weight = _fine(*gaussians["f"])
    few = np.linspace(y[0], y[-1], min(_FEW, y.size))
    of_each = np.ones_like(few)
    nodes = cell_nodes(point.setting, np.asarray(point.q), (few, of_each))
    kicks, shown = cell_kicks(point.setting, nodes), 1.0 - np.tanh(nodes.cell) ** 2
    given_f = [(nodes.weight * shown**2 * kick).sum((0, 2)) for kick in kicks]
    given_f.append((nodes.weight * (1.0 - shown)).sum((0, 2)))
    out, of_out = rule(gaussians["o"][1], gaussians["o"][0])
    o = expit(out)
    open_, bend = (of_out * o**2).sum(), (of_out * (o * (1.0 - o)) ** 2).sum()
    # Gains are in the population's variances, not in the response.
    gains = [float(point.setting.gains[k]) for k in "ifg"]
    squares = [
        factor * np.divide(part, gain**2, out=np.zeros_like(part), where=np.asarray(gain > 0.0))
        for factor, part, gain in zip([open_] * 3 + [bend], given_f, [*gains, 1.0], strict=True)
    ]
    if few.size < y.size:
        squares = [np.exp(CubicSpline(few, np.log(np.maximum(part, 1e-300)))(y)) for part in squares]
    rms, nothing = np.sqrt(np.stack(squares, -1))[:, None], np.zeros((y.size, 1, 4))
    tau = float(point.times.tau)
    through, aside = nothing.copy(), nothing
    through[..., :3], aside[..., 3] = rms[..., :3] / tau, rms[..., 3]
    return point.population(weight, Response(-expit(-y) / tau, through, aside))


def sampled(point: FixedPoint, samples: int = _SAMPLES) -> Population:
    """Units at points of a Sobol sequence, the same at every call."""
    gaussians = point.gaussians()
    bits = max(1, int(np.ceil(np.log2(samples))))
    uniform = qmc.Sobol(len(gaussians), scramble=False).random_base2(bits) + 0.5 ** (bits + 1)
    values = {k: m + s * ndtri(x) for (k, (m, s)), x in zip(gaussians.items(), uniform.T, strict=True)}
    response = point.respond(values)
    shape = response.pole.shape
    return point.population(np.full(shape, 1.0 / shape[0]), response)


def _product(gaussians: Gaussians) -> tuple[dict[str, Array], Array]:
    """The product of their rules: the values of each along a dimension of its own, and the weights."""
    values, weight = {}, np.ones(())
    for k, (name, (mean, deviation)) in enumerate(gaussians.items()):
        y, own = rule(deviation, mean) if deviation else (np.array([mean]), np.ones(1))
        shape = (-1, *(1,) * (len(gaussians) - 1 - k))
        values[name], weight = y.reshape(shape), weight[..., None] * own
    return values, weight


def _fine(mean: float, deviation: float) -> tuple[Array, Array]:
    if deviation == 0.0:
        return np.array([mean]), np.ones(1)
    count = int(np.clip(2.0 * TAIL * deviation / _APART, _FEWEST, _MOST))
    x = np.linspace(-TAIL, TAIL, count)
    weight = np.exp(-0.5 * x * x)
    return mean + deviation * x, weight / weight.sum()
