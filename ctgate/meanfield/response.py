r"""What each unit of a network does to what the random weights bring it, at one state.

Around a state, with perturbations that grow like :math:`e^{\lambda t}`, the random blocks :math:`U_k` bring a
unit the noise :math:`n_k = (U_k s_{b(k)})` of what they see, and the unit answers with what is seen of it,

.. math:: s_b = \sum_k H_{bk}(\lambda)\,n_k, \qquad
          H_{bk} = \frac{1}{1 + \lambda \tau_k}
                   \Bigl(\frac{\alpha_{bk}}{\lambda - p} + \beta_{bk}\Bigr).

:math:`\det(\lambda - A)` is that of the poles times :math:`\det(1 - H U)`: all that a theory of the spectrum
needs of a network is how :math:`(p, \alpha, \beta)` are distributed over its units.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from ctgate.meanfield.equations import Array

Values = Mapping[str, Array]
Rows = Sequence[Sequence[ArrayLike]]


class State(NamedTuple):
    """Pre-activations by block, state and time constants of the units, as arrays that broadcast.

    ``h`` is the hidden state, the cell state of an LSTM. ``own`` is what the reset gate multiplies: W h + b
    for "GRU after". In GatedRate the gates' variables stand in ``pre``, with what h relaxes to as "h".
    ``alpha`` is the constant gate of Leaky.
    """

    pre: Values
    h: Array
    tau: Array
    own: Array | None = None
    alpha: float = 1.0


class Response(NamedTuple):
    """The pole p (*unit) [1/time], and alpha, beta (*unit, seen, block) as ``through`` and ``aside``."""

    pole: Array
    through: Array
    aside: Array


class Wiring(NamedTuple):
    """The blocks of a network in the order of H's columns, which quantity each sees, and which of the time
    constants ``tau``, ``tau_z``, ``tau_r`` delays it, if any."""

    blocks: tuple[str, ...]
    sees: tuple[int, ...]
    delays: tuple[str | None, ...]

    @property
    def kept(self) -> tuple[str, ...]:
        """The time constants of states besides the one with the pole."""
        return tuple(name for name in self.delays if name)


def wiring_of(kind: str, blocks: tuple[str, ...]) -> Wiring:
    """That of a kind of network with these row blocks."""
    if kind in ("Leaky", "ScalarGate"):
        return Wiring(("h",), (0,), (None,))
    if kind == "MultiGate":
        return Wiring(("h", "z"), (0, 0), (None, None))
    if kind == "GRU after":
        return Wiring(("h", "z", "r"), (0, 0, 0), (None, None, None))
    if kind == "GRU before":
        return Wiring(("h", "z", "r"), (1, 0, 0), (None, None, None))
    if kind == "LSTM":
        return Wiring(("i", "f", "g", "o"), (0, 0, 0, 0), (None, None, None, "tau"))
    delays = {"h": None, "z": "tau_z", "r": "tau_r"}
    sees = tuple(int(block != "h") for block in blocks) if "r" in blocks else (0,) * len(blocks)
    return Wiring(blocks, sees, tuple(delays[block] for block in blocks))


def respond(kind: str, state: State) -> Response:
    """The answer of units in such a state."""
    if kind == "LSTM":
        return _lstm(state)
    if kind == "GatedRate":
        return _gated_rate(state)
    return _gru(kind, state) if kind.startswith("GRU") else _one_gate(kind, state)


def _one_gate(kind: str, state: State) -> Response:
    pre, tau = state.pre, state.tau
    target = np.tanh(pre["h"])
    gate = np.asarray(state.alpha) if kind == "Leaky" else expit(pre["z"])
    rows = [gate * (1.0 - target**2) / tau]
    if kind == "MultiGate":  # a gate that all share adds one direction among many
        rows.append((target - state.h) * gate * expit(-pre["z"]) / tau)
    return _response(-gate / tau, [rows])


def _gru(kind: str, state: State) -> Response:
    pre, tau = state.pre, state.tau
    r, open_ = expit(pre["r"]), expit(-pre["z"]) / tau
    target = np.tanh(pre["h"])
    candidate = open_ * (1.0 - target**2)
    update = (state.h - target) * open_ * expit(pre["z"])
    if kind == "GRU after":
        assert state.own is not None
        bend = candidate * state.own * r * expit(-pre["r"])
        return _response(-open_, [[candidate * r, update, bend]])
    nothing = np.zeros_like(r)
    return _response(
        -open_,
        [[candidate, update, nothing], [r * candidate, r * update, nothing]],
        [[nothing, nothing, nothing], [nothing, nothing, state.h * r * expit(-pre["r"])]],
    )


def _lstm(state: State) -> Response:
    pre, tau, cell = state.pre, state.tau, state.h
    i, f, o = (expit(pre[k]) for k in "ifo")
    shut, g = expit(-pre["f"]), np.tanh(pre["g"])
    ahead = np.tanh(f * cell + i * g)
    shown = o * (1.0 - ahead**2) / tau
    kicks = [g * i * expit(-pre["i"]), cell * f * shut, i * (1.0 - g**2)]
    nothing = np.zeros_like(ahead)
    return _response(
        -shut / tau,
        [[*(shown * kick for kick in kicks), nothing]],
        [[nothing, nothing, nothing, ahead * o * expit(-pre["o"])]],
    )


def _gated_rate(state: State) -> Response:
    pre, h = state.pre, state.h
    firing = np.tanh(h)
    slope, one = 1.0 - firing**2, np.ones_like(h)
    gate = (expit(pre["z"]) if "z" in pre else one) / state.tau
    moved = [gate]
    if "z" in pre:
        moved.append((pre["h"] - h) * gate * expit(-pre["z"]))
    if "r" not in pre:
        return _response(-gate, [[slope * way for way in moved]])
    r, nothing = expit(pre["r"]), np.zeros_like(h)
    none = [nothing] * len(moved)
    return _response(
        -gate,
        [[*(r * slope * way for way in moved), nothing], [*(slope * way for way in moved), nothing]],
        [[*none, firing * r * expit(-pre["r"])], [*none, nothing]],
    )


def _response(pole: ArrayLike, through: Rows, aside: Rows | None = None) -> Response:
    every = [np.asarray(entry) for rows in (through, aside or []) for row in rows for entry in row]
    shape = np.broadcast_shapes(np.shape(pole), *(entry.shape for entry in every))

    def stacked(rows: Rows) -> Array:
        return np.stack([np.stack([np.broadcast_to(x, shape) for x in row], -1) for row in rows], -2)

    full = stacked(through)
    return Response(
        np.broadcast_to(pole, shape), full, np.zeros_like(full) if aside is None else stacked(aside)
    )
