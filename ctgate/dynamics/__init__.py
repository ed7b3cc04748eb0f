"""What a given network does: Lyapunov spectra, fixed and slow points, spectra of its Jacobian."""

from ctgate.dynamics.fixed_points import fixed_points
from ctgate.dynamics.lyapunov import lyapunov_spectrum
from ctgate.dynamics.modes import eigenvalues, slow_mode_fraction
from ctgate.dynamics.plane import principal_plane
from ctgate.dynamics.spectrum import jacobian_spectrum

__all__ = [
    "eigenvalues",
    "fixed_points",
    "jacobian_spectrum",
    "lyapunov_spectrum",
    "principal_plane",
    "slow_mode_fraction",
]
