"""From the discrete cell, Euler at dt = tau, to the flow: states and what the gates retain.

    python benchmarks/convergence/euler_to_flow.py [--preset quick|full] [--out FOLDER]

Prints a table, writes euler_to_flow.nc and euler_to_flow.png, and exits with 1 when a slope is off. The same
as ``ctgate bench convergence``, which runs all three.
"""

from pathlib import Path

from ctgate.experiments.convergence import run, script


def main(preset: str, out: Path) -> int:
    """Run it; 0 if every slope is right."""
    return run(preset, out, ["euler_to_flow"])


if __name__ == "__main__":
    raise SystemExit(script("euler_to_flow"))
