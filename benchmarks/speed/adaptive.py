"""Flows with adaptive steps against torchdiffeq and diffrax: time, memory, error, gradient.

    python benchmarks/speed/adaptive.py [--preset quick|full] [--device cpu|cuda] [--out FOLDER]

Prints a table, writes speed.json, and exits with 1 when a result is wrong. The same rows as
``ctgate bench speed --rows 4,5,6,7``.
"""

from ctgate.experiments.speed import script

ROWS = (
    "4",
    "5",
    "6",
    "7",
)

if __name__ == "__main__":
    raise SystemExit(script(ROWS))
