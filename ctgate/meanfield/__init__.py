"""Theory of large random networks: fixed points, spectra and chaos from a few averages."""

from ctgate.meanfield.network import RandomNetwork
from ctgate.meanfield.static import static
from ctgate.meanfield.theories import THEORIES

__all__ = ["THEORIES", "RandomNetwork", "static"]
