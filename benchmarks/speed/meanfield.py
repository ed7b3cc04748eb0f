"""A static phase diagram in one computation, against the solver of a point in a loop.

    python benchmarks/speed/meanfield.py [--preset quick|full] [--device cpu|cuda] [--out FOLDER]

Prints a table, writes speed.json, and exits with 1 when a result is wrong. The same rows as
``ctgate bench speed --rows phase``.
"""

from ctgate.experiments.speed import script

ROWS = ("phase",)

if __name__ == "__main__":
    raise SystemExit(script(ROWS))
