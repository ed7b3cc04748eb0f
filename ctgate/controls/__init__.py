"""The input u(t) of a field: data that is held or interpolated, or a function."""

from ctgate.controls.base import Control as Control
from ctgate.controls.base import Piece as Piece
from ctgate.controls.function import FunctionControl as FunctionControl
from ctgate.controls.interpolation import CubicHermite as CubicHermite
from ctgate.controls.interpolation import LinearInterpolation as LinearInterpolation
from ctgate.controls.interpolation import ZeroOrderHold as ZeroOrderHold
