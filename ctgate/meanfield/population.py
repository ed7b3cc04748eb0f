"""The units of a network as a theory of its spectrum sees them, and those of a field at a state."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from ctgate.fields import GRU, GatedRate, Leaky, VectorField
from ctgate.fields.cell import Cell
from ctgate.meanfield.equations import Array
from ctgate.meanfield.network import BLOCKS
from ctgate.meanfield.response import State, Wiring, respond, wiring_of


@dataclass(frozen=True)
class Population:
    r"""Units and their response (see :mod:`ctgate.meanfield.response`), with the random blocks between them.

    Attributes:
        weight: of each unit (unit,), 1 in all.
        pole: p [1/time], (unit,).
        through, aside: alpha and beta, (unit, seen, block).
        wiring: what each block sees.
        lag: by which each block is delayed [time], (block,).
        variance: a_k^2, N times that of an entry, (block,).
        extent: the lowest and the highest pole of the distribution that the units stand for.
    """

    weight: Array
    pole: Array
    through: Array
    aside: Array
    wiring: Wiring
    lag: Array
    variance: Array
    extent: tuple[float, float]

    @property
    def states(self) -> int:
        """State variables per unit."""
        return 1 + len(self.wiring.kept)


class Times(NamedTuple):
    """The time constants, h's one value or one per unit."""

    tau: Array
    tau_z: float
    tau_r: float

    def lags(self, wiring: Wiring, owner: str) -> Array:
        """Of the blocks. Raises: ValueError where a delay differs from unit to unit."""
        if "tau" in wiring.kept and self.tau.size > 1:
            raise ValueError(f"{owner}: tau has one value per unit; the theory of an LSTM needs one for all")
        values = {"tau": float(self.tau.flat[0]), "tau_z": self.tau_z, "tau_r": self.tau_r}
        return np.array([values[name] if name else 0.0 for name in wiring.delays])


def at_state(field: VectorField, h: Tensor, u: Tensor | None, owner: str) -> Population:
    r"""The units of a field at the state ``h`` (state,) under the input ``u`` (channel,).

    The gains are those that its weights have, :math:`a_k^2 = \sum_{ij} W_{k,ij}^2 / N`.

    Raises: TypeError for a field without a theory; ValueError for a state that does not fit, layer
    normalisation, time constants that differ from unit to unit where they delay a block, or a phi other than
    tanh.
    """
    if type(field) not in BLOCKS or not isinstance(field, Cell):
        known = ", ".join(kind.__name__ for kind in BLOCKS)
        raise TypeError(f"{owner}: the field is {type(field).__name__}; there is a theory of {known}")
    if field.layernorm is not None or (isinstance(field, Leaky) and field.phi is not torch.tanh):
        raise ValueError(f"{owner}: there is a theory without layernorm and with phi=torch.tanh only")
    if h.shape != (field.state_size,):
        raise ValueError(f"{owner}(h=...): h has shape {tuple(h.shape)}; it must be ({field.state_size},)")
    field.check_arguments(h, u)
    size = field.hidden_size
    blocks = BLOCKS[type(field)]
    if isinstance(field, GatedRate):
        blocks = tuple(k for k in blocks if k == "h" or k in field.components)
    kind = f"GRU {field.reset}" if isinstance(field, GRU) else type(field).__name__
    wiring = wiring_of(kind, blocks)
    weights = _split(field.weight_hh, blocks, size)
    variance = [float((weights[k] ** 2).sum()) / size for k in wiring.blocks]
    response = respond(kind, _state_of(field, kind, blocks, weights, h, u))
    constants = [
        one(getattr(field, name), name, owner) if name in wiring.kept else 0.0 for name in ("tau_z", "tau_r")
    ]
    times = Times(_numbers(field.tau), *constants)
    return Population(
        np.full(size, 1.0 / size),
        *response,
        wiring,
        times.lags(wiring, owner),
        np.array(variance),
        (float(response.pole.min()), float(response.pole.max())),
    )


def _state_of(
    field: Cell, kind: str, blocks: tuple[str, ...], weights: dict[str, Array], h: Tensor, u: Tensor | None
) -> State:
    """Pre-activations from the weights, in double precision."""
    size = field.hidden_size
    parameters = dict(field.named_parameters())
    rows: Array = np.zeros(sum(len(weight) for weight in weights.values()))
    if u is not None:
        rows = rows + _numbers(field.weight_ih) @ _numbers(u)
    for name in ("bias", "bias_ih"):
        rows = rows + (_numbers(parameters[name]) if name in parameters else 0.0)
    own_bias = _numbers(parameters["bias_hh"]) if "bias_hh" in parameters else np.zeros_like(rows)
    outer, inner = _split(rows, blocks, size), _split(own_bias, blocks, size)
    state = _numbers(h)
    parts = {name: state[place] for name, place in field.components.items()}
    tau = _numbers(field.tau)
    hidden = parts["hidden"]
    if kind == "GatedRate":
        firing = np.tanh(hidden)
        variables = {k: parts[k] for k in "zr" if k in parts}
        seen = firing * expit(variables["r"]) if "r" in variables else firing
        return State({**variables, "h": weights["h"] @ seen + outer["h"]}, hidden, tau)
    gates = [k for k in blocks if k != "h"]
    pre = {k: weights[k] @ hidden + inner[k] + outer[k] for k in gates}
    if kind == "LSTM":
        return State(pre, parts["cell"], tau)
    own = None
    if kind == "GRU before":
        pre["h"] = weights["h"] @ (expit(pre["r"]) * hidden) + inner["h"] + outer["h"]
    elif kind == "GRU after":
        own = weights["h"] @ hidden + inner["h"]
        pre["h"] = expit(pre["r"]) * own + outer["h"]
    else:
        pre["h"] = weights["h"] @ hidden + outer["h"]
    alpha = float(field.alpha) if isinstance(field, Leaky) else 1.0
    return State({k: np.broadcast_to(x, hidden.shape) for k, x in pre.items()}, hidden, tau, own, alpha)


def _split(rows: Tensor | Array, blocks: tuple[str, ...], size: int) -> dict[str, Array]:
    """By row block; the first has one row where a gate is shared."""
    values = _numbers(rows)
    cuts = np.cumsum([len(values) - size * (len(blocks) - 1), *[size] * (len(blocks) - 2)])
    return dict(zip(blocks, np.split(values, cuts[: len(blocks) - 1]), strict=True))


def one(value: object, name: str, owner: str) -> float:
    """A time constant that all units share. Raises: ValueError for one per unit."""
    values = _numbers(value)
    if values.size > 1 and np.ptp(values) > 0.0:
        raise ValueError(f"{owner}: {name} differs from unit to unit; the theory needs one value for all")
    return float(values.flat[0])


def _numbers(values: object) -> Array:
    if isinstance(values, Tensor):
        return np.asarray(values.detach().cpu().numpy(), dtype=np.float64)
    return np.asarray(values, dtype=np.float64)
