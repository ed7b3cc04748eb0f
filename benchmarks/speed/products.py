"""Gradients of single samples, tangents, and the evaluations that stiff gates take.

    python benchmarks/speed/products.py [--preset quick|full] [--device cpu|cuda] [--out FOLDER]

Prints a table, writes speed.json, and exits with 1 when a result is wrong. The same rows as
``ctgate bench speed --rows 8,11,15``.
"""

from ctgate.experiments.speed import script

ROWS = (
    "8",
    "11",
    "15",
)

if __name__ == "__main__":
    raise SystemExit(script(ROWS))
