"""What dh/dt is: gated networks as vector fields dh/dt = -rate * h + drive."""

from ctgate.fields.base import VectorField, jacobian
from ctgate.fields.gated import MultiGate, ScalarGate
from ctgate.fields.gru import GRU
from ctgate.fields.jacobian import Jacobian
from ctgate.fields.leaky import Leaky
from ctgate.fields.liquid import LTC
from ctgate.fields.lstm import LSTM
from ctgate.fields.rate import GatedRate
from ctgate.fields.stack import Stack
from ctgate.fields.wrapped import Field

__all__ = [
    "GRU",
    "LSTM",
    "LTC",
    "Field",
    "GatedRate",
    "Jacobian",
    "Leaky",
    "MultiGate",
    "ScalarGate",
    "Stack",
    "VectorField",
    "jacobian",
]
