"""Theory of large random networks: fixed points, spectra and chaos from a few averages."""

from ctgate.meanfield.network import RandomNetwork
from ctgate.meanfield.random_matrix import (
    eigenvalue_fraction,
    pinched_radius,
    slow_mode_fraction,
    spectral_boundary,
    spectral_radius,
    support_level,
)
from ctgate.meanfield.static import static
from ctgate.meanfield.theories import THEORIES
from ctgate.meanfield.vanilla import vanilla

__all__ = [
    "THEORIES",
    "RandomNetwork",
    "eigenvalue_fraction",
    "pinched_radius",
    "slow_mode_fraction",
    "spectral_boundary",
    "spectral_radius",
    "static",
    "support_level",
    "vanilla",
]
