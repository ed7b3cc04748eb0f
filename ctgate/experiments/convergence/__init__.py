"""Benchmarks of convergence: does every slope come out as theory says?

``ctgate bench convergence`` and the scripts in ``benchmarks/convergence`` call :func:`run`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ctgate.experiments.convergence import euler_to_flow, gradients, solver_order
from ctgate.experiments.convergence.figure import draw, require_matplotlib
from ctgate.experiments.convergence.presets import PRESETS
from ctgate.experiments.convergence.series import table, write

BENCHMARKS = {
    "solver_order": solver_order.measure,
    "euler_to_flow": euler_to_flow.measure,
    "gradients": gradients.measure,
}


def run(preset: str, out: Path, names: Sequence[str] | None = None, progress: bool = True) -> int:
    """Run benchmarks; print a table each and write ``NAME.nc`` and ``NAME.png`` to ``out``.

    Parameters: ``preset``, ``quick`` (about two minutes) or ``full``; ``names``, some of
    ``solver_order``, ``euler_to_flow`` and ``gradients``, all by default; ``progress``, show bars on a
    terminal.

    Returns: 0 if every slope is right, else 1.

    Raises: ValueError for an unknown preset or benchmark; ModuleNotFoundError without matplotlib.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; it must be one of {', '.join(PRESETS)}")
    chosen = list(BENCHMARKS) if names is None else list(names)
    for name in chosen:
        if name not in BENCHMARKS:
            raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    require_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    wrong = 0
    for name in chosen:
        result = BENCHMARKS[name](PRESETS[preset], progress)
        result.attrs["preset"] = preset
        files = [write(result, out / f"{name}.nc"), out / f"{name}.png"]
        draw(result).savefig(files[1], dpi=160)
        off = int((result.verdict != "right").sum())
        wrong += off
        print(table(result))
        print(
            f"{off} of {result.sizes['series']} slopes are off" if off else "all slopes are right", end="; "
        )
        print(f"{', '.join(str(file) for file in files)}\n")
        sys.stdout.flush()
    return 1 if wrong else 0


def script(name: str, arguments: Sequence[str] | None = None) -> int:
    """One benchmark from the command line, ``--preset quick|full`` and ``--out FOLDER``; the exit code."""
    parser = argparse.ArgumentParser(description=f"The benchmark {name} of ctgate.")
    parser.add_argument("--preset", choices=list(PRESETS), default="full", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("ctgate-bench/convergence"), help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    return run(options.preset, options.out, [name])
