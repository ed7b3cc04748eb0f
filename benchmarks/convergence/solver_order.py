"""The order of every method on driven gated fields, smooth and held input, on, between and inside the steps.

    python benchmarks/convergence/solver_order.py [--preset quick|full] [--out FOLDER]

Prints a table, writes solver_order.nc and solver_order.png, and exits with 1 when a slope is off. The same as
``ctgate bench convergence``, which runs all three.
"""

from pathlib import Path

from ctgate.experiments.convergence import run, script


def main(preset: str, out: Path) -> int:
    """Run it; 0 if every slope is right."""
    return run(preset, out, ["solver_order"])


if __name__ == "__main__":
    raise SystemExit(script("solver_order"))
