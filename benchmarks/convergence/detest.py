"""Dopri5 of ctgate and RK45 of scipy on the 25 problems of DETEST: errors, their ratio, evaluations.

    python benchmarks/convergence/detest.py [--preset quick|full] [--out FOLDER]

Prints a table per tolerance, writes detest.nc and detest.png, and exits with 1 when an error at t = 20 is
further above scipy's than allowed. The problems and the limits are those
of tests/reference, so it runs in a checkout.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy
import torch
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import ctgate as ct
from ctgate.experiments.convergence.series import write

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.reference.compare import LIMITS, MEDIAN, TIMES, by_ctgate, by_scipy
from tests.reference.detest import PROBLEMS, Problem

SOLVERS = ("ctgate Dopri5", "scipy RK45")
PRESETS = {"quick": (1e-3, 1e-6), "full": tuple(LIMITS)}
INK = "#22262e"


def measure(tolerances: Sequence[float], problems: Sequence[Problem] = PROBLEMS) -> xr.Dataset:
    """Both solvers on every problem at every tolerance, against DOP853 at 1e-13."""
    dims = ("problem", "rtol", "solver")
    shape = (len(problems), len(tolerances), len(SOLVERS))
    end, path, evaluations = np.empty(shape), np.empty(shape), np.empty(shape, dtype=int)
    for p, problem in enumerate(problems):
        exact = by_scipy(problem, "DOP853", 1e-13, TIMES).states
        for k, tolerance in enumerate(tolerances):
            both = (
                by_ctgate(problem, ct.Dopri5(), tolerance, TIMES),
                by_scipy(problem, "RK45", tolerance, TIMES),
            )
            for s, one in enumerate(both):
                error = np.abs(one.states - exact).max(-1)
                end[p, k, s], path[p, k, s], evaluations[p, k, s] = error[-1], error.max(), one.evaluations

    def labelled(values: np.ndarray, name: str) -> tuple[tuple[str, ...], np.ndarray, dict[str, str]]:
        return dims[: values.ndim], values, {"long_name": name, "units": "1"}

    return xr.Dataset(
        {
            "end_error": labelled(end, "largest error of a component at t = 20"),
            "path_error": labelled(path, "largest error of a component at t = 1, 2, ..., 20"),
            "end_ratio": labelled(end[..., 0] / end[..., 1], "error at t = 20, ctgate over scipy"),
            "path_ratio": labelled(path[..., 0] / path[..., 1], "error over the path, ctgate over scipy"),
            "evaluations": labelled(evaluations, "evaluations of the right-hand side"),
            "title": ("problem", [one.title for one in problems], {"long_name": "problem", "units": "1"}),
        },
        coords={
            "problem": ("problem", [one.name for one in problems], {"long_name": "problem", "units": "1"}),
            "rtol": ("rtol", list(tolerances), {"long_name": "rtol = atol", "units": "1"}),
            "solver": ("solver", list(SOLVERS), {"long_name": "solver", "units": "1"}),
        },
        attrs={
            "benchmark": "detest",
            "reference": "scipy DOP853, rtol = atol = 1e-13",
            "dtype": "float64",
            "device": "cpu",
            "ctgate_version": ct.__version__,
            "scipy_version": scipy.__version__,
            "torch_version": str(torch.__version__),
        },
    )


def table(result: xr.Dataset) -> str:
    """The numbers as text, a block per tolerance."""
    lines = []
    for tolerance in result.rtol.values:
        part = result.sel(rtol=tolerance)
        lines += [
            f"rtol = atol = {tolerance:g}",
            f"{'problem':<24}{'error at 20':>12}{'RK45':>10}{'ratio':>8}"
            f"{'over path':>12}{'RK45':>10}{'ratio':>8}{'evaluations':>14}{'RK45':>7}",
        ]
        for name in result.problem.values:
            one = part.sel(problem=name)
            ours, theirs = (one.sel(solver=solver) for solver in SOLVERS)
            lines.append(
                f"{name + '  ' + str(one.title.item()):<24}"
                f"{float(ours.end_error):>12.1e}{float(theirs.end_error):>10.1e}{float(one.end_ratio):>8.2f}"
                f"{float(ours.path_error):>12.1e}{float(theirs.path_error):>10.1e}{float(one.path_ratio):>8.2f}"
                f"{int(ours.evaluations):>14}{int(theirs.evaluations):>7}"
            )
        lines += [
            f"{'median':<24}{'':>22}{float(part.end_ratio.median()):>8.2f}"
            f"{'':>22}{float(part.path_ratio.median()):>8.2f}",
            f"{'largest':<24}{'':>22}{float(part.end_ratio.max()):>8.2f}"
            f"{'':>22}{float(part.path_ratio.max()):>8.2f}",
            f"{'allowed':<24}{'':>22}{LIMITS[float(tolerance)]:>8.2f}, median {MEDIAN:g}",
            "",
        ]
    return "\n".join(lines)


def too_large(result: xr.Dataset) -> int:
    """How many ratios at t = 20, of a problem or in the median, are above what is allowed."""
    limits = xr.DataArray([LIMITS[float(t)] for t in result.rtol.values], dims="rtol")
    problems = int((result.end_ratio > limits).sum())
    return problems + int((result.end_ratio.median("problem") > MEDIAN).sum())


def draw(result: xr.Dataset) -> Figure:
    """Error against evaluations, one panel per class, one line per problem and solver."""
    figure = Figure(figsize=(15.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    # What lies below is larger and hollow, so that both are seen where they agree.
    styles = (
        {"color": "#0b6aa8", "marker": "o", "ms": 3.0, "lw": 1.0, "zorder": 3},
        {"color": "#d1495b", "marker": "s", "ms": 6.5, "lw": 0.0, "mfc": "none", "zorder": 2},
    )
    for axes, kind in zip(figure.subplots(1, 5, sharey=True), "ABCDE", strict=True):
        part = result.sel(problem=[name for name in result.problem.values if name.startswith(kind)])
        for name in part.problem.values:
            for solver, style in zip(SOLVERS, styles, strict=True):
                one = part.sel(problem=name, solver=solver)
                axes.plot(
                    one.evaluations, one.end_error, **style, label=solver if name == part.problem[0] else None
                )
            last = part.sel(problem=name, solver=SOLVERS[0]).isel(rtol=-1)
            axes.annotate(
                str(name), (float(last.evaluations), float(last.end_error)), xytext=(6, -3),
                textcoords="offset points", fontsize=7.5, color=INK,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="evaluations", xlim=(20.0, 8000.0))
        axes.set_title(f"class {kind}", loc="left", fontsize=11, color=INK)
        axes.grid(True, color="#e6e8ec", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("largest error of a component at t = 20")
    figure.axes[0].legend(frameon=False, fontsize=8.5, loc="upper right")
    tolerances = ", ".join(f"{float(t):g}" for t in result.rtol.values)
    figure.suptitle(f"DETEST at rtol = atol = {tolerances}", x=0.01, ha="left", color=INK, fontsize=12.5)
    return figure


def main(preset: str, out: Path) -> int:
    """Run it; 0 if every ratio is as small as it should be."""
    out.mkdir(parents=True, exist_ok=True)
    result = measure(PRESETS[preset])
    result.attrs["preset"] = preset
    files = [write(result, out / "detest.nc"), out / "detest.png"]
    draw(result).savefig(files[1], dpi=160)
    print(table(result))
    wrong = too_large(result)
    verdict = f"{wrong} ratios are too large" if wrong else "all ratios are within their limits"
    print(f"{verdict}; {', '.join(map(str, files))}")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="full")
    parser.add_argument("--out", type=Path, default=Path("ctgate-bench/convergence"))
    options = parser.parse_args()
    raise SystemExit(main(options.preset, options.out))
