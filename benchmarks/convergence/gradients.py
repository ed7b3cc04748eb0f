"""The gradient of the discrete solution against the flow's, by step size and by tolerance.

    python benchmarks/convergence/gradients.py [--preset quick|full] [--out FOLDER]

Prints a table, writes gradients.nc and gradients.png, and exits with 1 when a slope is off. The same as
``ctgate bench convergence``, which runs all three.
"""

from pathlib import Path

from ctgate.experiments.convergence import run, script


def main(preset: str, out: Path) -> int:
    """Run it; 0 if every slope is right."""
    return run(preset, out, ["gradients"])


if __name__ == "__main__":
    raise SystemExit(script("gradients"))
