"""Theory of large random networks: fixed points, spectra and chaos from a few averages."""

from ctgate.meanfield.complexity import complexity
from ctgate.meanfield.dynamic import dmft, max_lyapunov, onset
from ctgate.meanfield.network import RandomNetwork
from ctgate.meanfield.phase import phase_diagram, saddle_node
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
    "complexity",
    "dmft",
    "eigenvalue_fraction",
    "max_lyapunov",
    "onset",
    "phase_diagram",
    "pinched_radius",
    "saddle_node",
    "slow_mode_fraction",
    "spectral_boundary",
    "spectral_radius",
    "static",
    "support_level",
    "vanilla",
]
