"""Theory of large random networks: fixed points, spectra and chaos from a few averages."""

from ctgate.meanfield.network import RandomNetwork

__all__ = ["RandomNetwork"]
