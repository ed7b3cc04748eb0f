"""GRU and LSTM against torch, and dense output against torchdiffeq's Euler method.

    python benchmarks/speed/discrete.py [--preset quick|full] [--device cpu|cuda] [--out FOLDER]

Prints a table, writes speed.json, and exits with 1 when a result is wrong. The same rows as
``ctgate bench speed --rows 1,2,3``.
"""

from ctgate.experiments.speed import script

ROWS = (
    "1",
    "2",
    "3",
)

if __name__ == "__main__":
    raise SystemExit(script(ROWS))
