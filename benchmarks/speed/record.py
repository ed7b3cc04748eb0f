"""What has no target, and where others may be faster.

    python benchmarks/speed/record.py [--preset quick|full] [--device cpu|cuda] [--out FOLDER]

Prints a table, writes speed.json, and exits with 1 when a result is wrong. The same rows as
``ctgate bench speed --rows record``.
"""

from ctgate.experiments.speed import script

ROWS = ("record",)

if __name__ == "__main__":
    raise SystemExit(script(ROWS))
