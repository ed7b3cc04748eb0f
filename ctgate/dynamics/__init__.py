"""What a given network does: Lyapunov spectra, fixed and slow points, spectra of its Jacobian."""

__all__: list[str] = []
