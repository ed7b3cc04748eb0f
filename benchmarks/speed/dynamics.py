"""Lyapunov spectra of random networks, against a QR factorisation at every step.

    python benchmarks/speed/dynamics.py [--preset quick|full] [--device cpu|cuda] [--out FOLDER]

Prints a table, writes speed.json, and exits with 1 when a result is wrong. The same rows as
``ctgate bench speed --rows 13``.
"""

from ctgate.experiments.speed import script

ROWS = ("13",)

if __name__ == "__main__":
    raise SystemExit(script(ROWS))
