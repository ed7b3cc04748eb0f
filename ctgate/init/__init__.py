"""Weights and biases to start from, by theory."""

from ctgate.init.chrono import chrono_
from ctgate.init.critical import critical_

__all__ = ["chrono_", "critical_"]
