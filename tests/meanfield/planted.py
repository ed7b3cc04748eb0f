"""Networks in numpy with a known fixed point: Gaussian weights but for what keeps a state in place."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import ctgate as ct

Array = NDArray[np.float64]


class Planted(NamedTuple):
    """Row blocks of the weights (N, N) by name, biases by name, and the state: h, and c of an LSTM."""

    weights: dict[str, Array]
    biases: dict[str, float]
    h: Array
    cell: Array | None = None


def logistic(y: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-y))


def conditioned(rng: np.random.Generator, gain: float, seen: Array, wanted: Array) -> Array:
    """N(0, gain^2 / N) entries, given that the matrix takes ``seen`` to ``wanted``: a change of rank one."""
    matrix = gain * rng.normal(size=(len(seen), len(seen))) / len(seen) ** 0.5
    return matrix + np.outer(wanted - matrix @ seen, seen) / (seen @ seen)


def gru(
    size: int, q: float, gains: dict[str, float], biases: dict[str, float], reset: str, seed: int
) -> Planted:
    """A GRU at a fixed point with the statistics of variance q: pre-activations drawn, weights fitted."""
    rng = np.random.default_rng(seed)
    gate = {k: rng.normal(biases.get(k, 0.0), gains[k] * q**0.5, size) for k in "zr"}
    r = logistic(gate["r"])
    if reset == "before":
        probe = logistic(rng.normal(biases.get("r", 0.0), gains["r"] * q**0.5, 10**6))
        own = rng.normal(0.0, gains["h"] * (q * (probe**2).mean()) ** 0.5, size)
        h = np.tanh(own)
        seen = r * h
    else:
        own = rng.normal(0.0, gains["h"] * q**0.5, size)
        h = np.tanh(r * own)
        seen = h
    weights = {"h": conditioned(rng, gains["h"], seen, own)}
    weights |= {k: conditioned(rng, gains[k], h, gate[k] - biases.get(k, 0.0)) for k in "zr"}
    return Planted(weights, {k: biases.get(k, 0.0) for k in "hzr"}, h)


def lstm(size: int, q: float, gains: dict[str, float], biases: dict[str, float], seed: int) -> Planted:
    """An LSTM at a fixed point with the statistics of variance q."""
    rng = np.random.default_rng(seed)
    pre = {k: rng.normal(biases.get(k, 0.0), gains[k] * q**0.5, size) for k in "ifgo"}
    i, f, o = (logistic(pre[k]) for k in "ifo")
    cell = i * np.tanh(pre["g"]) / (1.0 - f)
    h = o * np.tanh(cell)
    weights = {k: conditioned(rng, gains[k], h, pre[k] - biases.get(k, 0.0)) for k in "ifgo"}
    return Planted(weights, {k: biases.get(k, 0.0) for k in "ifgo"}, h, cell)


def gru_jacobian(planted: Planted, reset: str) -> Array:
    """dh'/dh of the discrete cell."""
    w, b, h = planted.weights, planted.biases, planted.h
    z, r = logistic(w["z"] @ h + b["z"]), logistic(w["r"] @ h + b["r"])
    if reset == "before":
        n = np.tanh(w["h"] @ (r * h) + b["h"])
        inner = w["h"] @ (np.diag(r) + (h * r * (1 - r))[:, None] * w["r"])
    else:
        own = w["h"] @ h
        n = np.tanh(r * own + b["h"])
        inner = r[:, None] * w["h"] + (own * r * (1 - r))[:, None] * w["r"]
    return np.diag(z) + ((1 - z) * (1 - n**2))[:, None] * inner + ((h - n) * z * (1 - z))[:, None] * w["z"]


def lstm_jacobian(planted: Planted) -> Array:
    """d(c', h')/d(c, h) of the discrete cell."""
    w, b, h, c = planted.weights, planted.biases, planted.h, planted.cell
    assert c is not None
    i, f, o = (logistic(w[k] @ h + b[k]) for k in "ifo")
    g = np.tanh(w["g"] @ h + b["g"])
    t = np.tanh(f * c + i * g)
    to_cell = (
        (c * f * (1 - f))[:, None] * w["f"]
        + (g * i * (1 - i))[:, None] * w["i"]
        + (i * (1 - g**2))[:, None] * w["g"]
    )
    e = o * (1 - t**2)
    to_hidden = e[:, None] * to_cell + (t * o * (1 - o))[:, None] * w["o"]
    return np.block([[np.diag(f), to_cell], [np.diag(e * f), to_hidden]])


def field_of(planted: Planted, reset: str = "before") -> tuple[ct.GRU | ct.LSTM, torch.Tensor]:
    """The field with these weights, and the state: (h,) or (c, h)."""
    size, cell = len(planted.h), planted.cell
    field: ct.GRU | ct.LSTM
    if cell is None:
        field, order = ct.GRU(0, size, reset=reset, dtype=torch.float64), "rzh"
    else:
        field, order = ct.LSTM(0, size, dtype=torch.float64), "ifgo"
    assert field.bias_ih is not None
    assert field.bias_hh is not None
    with torch.no_grad():
        field.weight_hh.copy_(torch.from_numpy(np.concatenate([planted.weights[k] for k in order])))
        field.bias_ih.copy_(torch.from_numpy(np.repeat([planted.biases[k] for k in order], size)))
        field.bias_hh.zero_()
    return field, torch.from_numpy(planted.h if cell is None else np.concatenate([cell, planted.h]))
