"""Work against precision of the stiff methods, on the problems of the literature and on stiff gates.

    python benchmarks/convergence/stiff.py [--preset quick|full] [--out FOLDER]

Prints a table per problem, writes stiff.nc and stiff.png, and exits with 1 when a method misses the tolerance
of a problem by more than allowed, or the exponential midpoint needs more than a quarter of the evaluations
of Dopri5 for a relative error of 1e-2 on the gates. The problems and the limits are those of tests/reference,
so it runs in a checkout.

Errors are the largest over components and times, relative to |reference| + atol / rtol of the problem.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
import torch
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

import ctgate as ct
from ctgate.algorithms import Algorithm
from ctgate.experiments.convergence.series import write

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.reference.compare import Solved, in_tolerances, solved, stiff_by_scipy
from tests.reference.stiff import PROBLEMS, StiffProblem

METHODS: tuple[Algorithm, ...] = (ct.Rosenbrock23(), ct.Radau(), ct.BDF(), ct.LSODA())
# Tighter ones would take a method of order 2 too many steps.
TIGHTEST = {"Rosenbrock23": 1e-5}
STEPS = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)
PRESETS = {"quick": (1e-3, 1e-4), "full": (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)}
INK, COLOURS, MARKERS = (
    "#22262e",
    ("#0b6aa8", "#d1495b", "#3a8f5c", "#b8860b", "#7a4fa3", "#22262e"),
    "os^DvP",
)


class Row(NamedTuple):
    """One run: what was asked for, and what it gave and cost."""

    problem: str
    method: str
    setting: float
    error: float
    relative: float
    evaluations: int
    jacobians: int
    seconds: float


def runs(problem: StiffProblem, tolerances: tuple[float, ...]) -> Iterator[Row]:
    """Every method on one problem at every setting: rtol, or dt for the exponential midpoint on gates."""
    reference = stiff_by_scipy(problem, problem.saveat)
    prob = problem.problem()

    def row(alg: Algorithm, setting: float, done: Solved) -> Row:
        absolute = problem.atol / problem.rtol
        return Row(
            problem.name,
            type(alg).__name__,
            setting,
            in_tolerances(done.states, reference, 1.0, absolute),
            float(np.abs(done.states - reference).max() / np.abs(reference).max()),
            done.evaluations,
            -1 if done.jacobians is None else done.jacobians,
            done.seconds,
        )

    gates = problem.name.startswith("gates")
    for alg in (*METHODS, *([ct.Dopri5()] if gates else [])):
        for rtol in tolerances:
            if rtol >= TIGHTEST.get(type(alg).__name__, 0.0):
                atol = rtol * problem.atol / problem.rtol
                yield row(alg, rtol, solved(prob, alg, problem.saveat, rtol=rtol, atol=atol))
    for dt in STEPS if gates else ():
        alg = ct.ExponentialMidpoint(dt=dt)
        yield row(alg, dt, solved(prob, alg, problem.saveat))


def measure(tolerances: tuple[float, ...], problems: tuple[StiffProblem, ...] = PROBLEMS) -> xr.Dataset:
    """All runs as one Dataset over ``run``."""
    rows = [row for problem in problems for row in runs(problem, tolerances)]
    names = {
        "problem": ("problem", "1"),
        "method": ("method", "1"),
        "setting": ("rtol, or dt of the exponential midpoint", "1 or units of tau"),
        "error": ("largest error of a component, relative to |reference| + atol / rtol", "1"),
        "relative": ("largest error of a component, relative to the largest component", "1"),
        "evaluations": ("evaluations of the field", "1"),
        "jacobians": ("evaluations of the Jacobian, -1 where they are not counted", "1"),
        "seconds": ("wall time", "s"),
    }
    return xr.Dataset(
        {
            name: ("run", [getattr(row, name) for row in rows], {"long_name": text, "units": units})
            for name, (text, units) in names.items()
        },
        coords={"run": ("run", np.arange(len(rows)), {"long_name": "number of the run", "units": "1"})},
        attrs={
            "benchmark": "stiff",
            "reference": "scipy Radau, rtol = 1e-10",
            "dtype": "float64",
            "device": "cpu",
            "ctgate_version": ct.__version__,
            "scipy_version": scipy.__version__,
            "torch_version": str(torch.__version__),
        },
    )


def measured(result: xr.Dataset) -> list[StiffProblem]:
    """The problems that the result has."""
    return [problem for problem in PROBLEMS if problem.name in result.problem.values]


def table(result: xr.Dataset) -> str:
    """The runs as text, a block per problem, with the error in units of what was asked for."""
    lines = []
    for problem in measured(result):
        lines += [
            f"{problem.name}, t = 0 to {problem.stop:g}",
            f"{'method':<22}{'setting':>9}{'error':>10}{'/ rtol':>9}"
            f"{'evaluations':>13}{'Jacobians':>11}{'seconds':>10}",
        ]
        for run in np.flatnonzero(result.problem.values == problem.name):
            one = result.isel(run=run)
            setting, error = float(one.setting), float(one.error)
            multiple = "" if one.method.item() == "ExponentialMidpoint" else f"{error / setting:.2f}"
            jacobians = "" if int(one.jacobians) < 0 else int(one.jacobians)
            lines.append(
                f"{one.method.item():<22}{setting:>9.3g}{error:>10.1e}"
                f"{multiple:>9}{int(one.evaluations):>13}{jacobians:>11}{float(one.seconds):>10.3f}"
            )
        lines.append("")
    return "\n".join(lines)


def misses(result: xr.Dataset) -> list[str]:
    """What is not as it should be, in words."""
    wrong = []
    for problem in measured(result):
        part = result.isel(run=result.problem.values == problem.name)
        for alg in METHODS:
            chosen = (part.method.values == type(alg).__name__) & (part.setting.values == problem.rtol)
            for error in part.error.values[chosen] / problem.rtol:
                if not error <= problem.limit:
                    wrong.append(f"{problem.name}, {type(alg).__name__}: {error:.1f} x tolerance")
        if problem.name.startswith("gates"):
            explicit, exponential = (_cheapest(part, name) for name in ("Dopri5", "ExponentialMidpoint"))
            share = exponential / explicit
            if not share <= 0.25:
                wrong.append(f"{problem.name}: ExponentialMidpoint takes {share:.2f} of Dopri5's evaluations")
    return wrong


def _cheapest(part: xr.Dataset, method: str) -> float:
    """The fewest evaluations for a relative error of 1e-2; infinite if no run is that good."""
    good = (part.method.values == method) & (part.relative.values <= 1e-2)
    return float(part.evaluations.values[good].min()) if good.any() else math.inf


def draw(result: xr.Dataset) -> Figure:
    """Error against evaluations, one panel per problem."""
    figure = Figure(figsize=(13.5, 7.8), layout="constrained")
    FigureCanvasAgg(figure)
    methods = list(dict.fromkeys(result.method.values.tolist()))
    for axes, problem in zip(figure.subplots(2, 3).ravel(), measured(result), strict=False):
        part = result.isel(run=result.problem.values == problem.name)
        for method, colour, marker in zip(methods, COLOURS, MARKERS, strict=True):
            one = part.isel(run=part.method.values == method)
            if one.sizes["run"]:
                axes.plot(
                    one.evaluations, one.error, marker=marker, ms=4.5, lw=1.2, color=colour, label=method
                )
        axes.set(xscale="log", yscale="log", xlabel="evaluations of the field", ylabel="error")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(problem.name, loc="left", fontsize=11, color=INK)
        axes.grid(True, color="#e6e8ec", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(
        "Stiff problems: error relative to |reference| + atol / rtol, against work",
        x=0.01, ha="left", color=INK, fontsize=12.5,
    )  # fmt: skip
    return figure


def main(preset: str, out: Path) -> int:
    """Run it; 0 if every method keeps its tolerances."""
    out.mkdir(parents=True, exist_ok=True)
    result = measure(PRESETS[preset])
    result.attrs["preset"] = preset
    files = [write(result, out / "stiff.nc"), out / "stiff.png"]
    draw(result).savefig(files[1], dpi=160)
    print(table(result))
    wrong = misses(result)
    print(f"{'; '.join(wrong) if wrong else 'all tolerances are kept'}; {', '.join(map(str, files))}")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="full")
    parser.add_argument("--out", type=Path, default=Path("ctgate-bench/convergence"))
    options = parser.parse_args()
    raise SystemExit(main(options.preset, options.out))
