"""Independent references: every cell written by hand in numpy from its equations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from ctgate.fields import (
    GRU,
    LSTM,
    LTC,
    Field,
    GatedRate,
    Leaky,
    MultiGate,
    ScalarGate,
    Stack,
    VectorField,
)

Array = np.ndarray
Parameters = dict[str, Array]


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def layernorm(p: Parameters, x: Array) -> Array:
    if "layernorm.weight" not in p:
        return x
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * p["layernorm.weight"] + p["layernorm.bias"]


def affine(p: Parameters, h: Array, u: Array, rows: slice) -> Array:
    """W h + U u + b for cells with one bias."""
    b = p["bias"][rows] if "bias" in p else 0.0
    return h @ p["weight_hh"][rows].T + u @ p["weight_ih"][rows].T + b


def torch_parts(p: Parameters, h: Array, u: Array, block: int) -> tuple[Array, Array]:
    """U u + b_ih and W h + b_hh of one row block of a torch cell."""
    size = p["weight_hh"].shape[1]
    rows = slice(block * size, (block + 1) * size)
    b_ih, b_hh = (p["bias_ih"][rows], p["bias_hh"][rows]) if "bias_ih" in p else (0.0, 0.0)
    return u @ p["weight_ih"][rows].T + b_ih, h @ p["weight_hh"][rows].T + b_hh


Reference = tuple[Array, Array, dict[str, Array]]


def leaky(p: Parameters, h: Array, u: Array, tau: Array) -> Reference:
    alpha = np.full_like(h, 0.3)
    target = np.tanh(layernorm(p, affine(p, h, u, slice(None))))
    return alpha / tau, alpha / tau * target, {"gate": alpha}


def scalar_gate(p: Parameters, h: Array, u: Array, tau: Array) -> Reference:
    gate = sigmoid(affine(p, h, u, slice(0, 1))) * np.ones_like(h)
    target = np.tanh(layernorm(p, affine(p, h, u, slice(1, None))))
    return gate / tau, gate / tau * target, {"gate": gate}


def multi_gate(p: Parameters, h: Array, u: Array, tau: Array) -> Reference:
    size = h.shape[-1]
    gate = sigmoid(affine(p, h, u, slice(0, size)))
    target = np.tanh(layernorm(p, affine(p, h, u, slice(size, None))))
    return gate / tau, gate / tau * target, {"gate": gate}


def gru_after(p: Parameters, h: Array, u: Array, tau: Array) -> Reference:
    r = sigmoid(sum(torch_parts(p, h, u, 0)))
    z = sigmoid(sum(torch_parts(p, h, u, 1)))
    outer, inner = torch_parts(p, h, u, 2)
    n = np.tanh(layernorm(p, outer + r * inner))
    return (1 - z) / tau, (1 - z) * n / tau, {"update": z, "reset": r}


def gru_before(p: Parameters, h: Array, u: Array, tau: Array) -> Reference:
    r = sigmoid(sum(torch_parts(p, h, u, 0)))
    z = sigmoid(sum(torch_parts(p, h, u, 1)))
    n = np.tanh(layernorm(p, sum(torch_parts(p, r * h, u, 2))))
    return (1 - z) / tau, (1 - z) * n / tau, {"update": z, "reset": r}


def lstm(p: Parameters, h: Array, u: Array, tau: Array) -> Reference:
    size = p["weight_hh"].shape[1]
    c, hidden = h[..., :size], h[..., size:]
    i, f, o = (sigmoid(sum(torch_parts(p, hidden, u, k))) for k in (0, 1, 3))
    g = np.tanh(layernorm(p, sum(torch_parts(p, hidden, u, 2))))
    rate = np.concatenate(((1 - f) / tau, np.ones_like(c) / tau), -1)
    drive = np.concatenate((i * g / tau, o * np.tanh(f * c + i * g) / tau), -1)
    return rate, drive, {"input": i, "forget": f, "output": o}


def ltc(p: Parameters, h: Array, u: Array, tau: Array) -> Reference:
    f = sigmoid(affine(p, h, u, slice(None)))
    return (1 + tau * f) / tau, f * p["reversal"], {"conductance": f}


def gated_rate(p: Parameters, h: Array, u: Array, tau: Array) -> Reference:
    """tau_z = 2 and tau_r = 0.7, as in the case below."""
    size = p["weight_hh"].shape[1]
    x, z, r = h[..., :size], h[..., size : 2 * size], h[..., 2 * size :]
    s_z, s_r = sigmoid(z), sigmoid(r)
    blocks = [slice(k * size, (k + 1) * size) for k in range(3)]
    one = np.ones_like(x)
    rate = np.concatenate((s_z / tau, one / 2.0, one / 0.7), -1)
    drive = np.concatenate(
        (
            s_z / tau * affine(p, np.tanh(x) * s_r, u, blocks[0]),
            affine(p, np.tanh(x), u, blocks[1]) / 2.0,
            affine(p, np.tanh(x), u, blocks[2]) / 0.7,
        ),
        -1,
    )
    return rate, drive, {"update": s_z, "reset": s_r}


def ungated_rate(p: Parameters, h: Array, u: Array, tau: Array) -> Reference:
    one = np.ones_like(h)
    return one / tau, affine(p, np.tanh(h), u, slice(None)) / tau, {}


def stacked(p: Parameters, h: Array, u: Array, tau: Array) -> Reference:
    """A GRU below an LSTM: the LSTM sees the GRU's Euler step of size tau."""
    parts = [
        {name.split(".", 2)[2]: value for name, value in p.items() if name.startswith(f"layers.{k}.")}
        for k in (0, 1)
    ]
    size = parts[0]["weight_hh"].shape[1]
    low, high = h[..., :size], h[..., size:]
    rate0, drive0, gates0 = gru_after(parts[0], low, u, tau)
    rate1, drive1, gates1 = lstm(parts[1], high, low + tau * (drive0 - rate0 * low), tau)
    gates = {f"layers.0.{k}": v for k, v in gates0.items()} | {f"layers.1.{k}": v for k, v in gates1.items()}
    return np.concatenate((rate0, rate1), -1), np.concatenate((drive0, drive1), -1), gates


@dataclass(frozen=True)
class Case:
    """A field, the reference for its rate, drive and gates, and what its constructor takes."""

    name: str
    build: Callable[..., VectorField]
    reference: Callable[[Parameters, Array, Array, Array], Reference]
    layernorm: bool


def build_stack(input_size: int, hidden: int, **options: Any) -> Stack:
    return Stack([GRU(input_size, hidden, **options), LSTM(hidden, hidden, **options)])


CASES = [
    Case("Leaky", lambda i, h, **k: Leaky(i, h, alpha=0.3, **k), leaky, True),
    Case("ScalarGate", ScalarGate, scalar_gate, True),
    Case("MultiGate", MultiGate, multi_gate, True),
    Case("GRU-after", GRU, gru_after, True),
    Case("GRU-before", lambda i, h, **k: GRU(i, h, reset="before", **k), gru_before, True),
    Case("LSTM", LSTM, lstm, True),
    Case("LTC", LTC, ltc, False),
    Case("GatedRate", lambda i, h, **k: GatedRate(i, h, tau_z=2.0, tau_r=0.7, **k), gated_rate, False),
    Case(
        "GatedRate-ungated",
        lambda i, h, **k: GatedRate(i, h, update_gate=False, reset_gate=False, **k),
        ungated_rate,
        False,
    ),
    Case("Stack", build_stack, stacked, True),
]


@pytest.fixture(scope="session", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@dataclass(frozen=True)
class Tools:
    """Random fields, states and inputs from explicit seeds, and numpy views of parameters."""

    def field(self, case: Case, input_size: int, hidden: int, seed: int = 0, **options: Any) -> VectorField:
        """The field of a case with parameters of order 1, layer norms included."""
        options.setdefault("dtype", torch.float64)
        generator = torch.Generator().manual_seed(seed)
        field = case.build(input_size, hidden, generator=generator, **options)
        with torch.no_grad():
            for parameter in field.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        return field

    def randn(self, *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    def numpy(self, field: VectorField) -> Parameters:
        return {name: p.detach().double().numpy() for name, p in field.named_parameters()}


@pytest.fixture(scope="session")
def tools() -> Tools:
    return Tools()


class Wrapped(torch.nn.Module):
    """An equation of somebody else, with a parameter and a dependence on time."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.full((4, 4), 0.3, dtype=torch.float64))

    def forward(self, t: torch.Tensor, h: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.cos(t) * torch.tanh(h @ self.matrix.T) - h + u.sum(-1, keepdim=True)


VARIANTS: list[tuple[str, Case | None, dict[str, Any]]] = [
    *((case.name, case, {}) for case in CASES),
    *(
        (f"{case.name}-learned-tau", case, {"learn_tau": True, "layernorm": True})
        for case in CASES
        if case.layernorm
    ),
    *((f"{case.name}-learned-tau", case, {"learn_tau": True}) for case in CASES if not case.layernorm),
    ("Field", None, {}),
]


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant[0])
def field(request: pytest.FixtureRequest, tools: Tools) -> VectorField:
    """Every kind of field, with 3 channels and 4 units; plain, and with all that can be learned."""
    _, case, options = request.param
    if case is None:
        return Field(Wrapped(), state_size=4, input_size=3)
    return tools.field(case, 3, 4, tau=0.6, **options)
