"""Work against precision, of states and of gradients: ctgate, torchdiffeq and diffrax.

    python benchmarks/speed/work_precision.py [--hidden N] [--batch N] [--span N] [--repeats N] [--out FOLDER]

The flow of a GRU under a smooth input, float32, one thread on one core, the final state and the gradient of a
random projection of it by all weights. For each solver the tolerance runs over decades; time is the shortest
of some repeats, taken in turns, errors are relative, against float64. diffrax is compiled, and compiling is
not timed; it is left out where it is not installed. Writes work_precision.nc and work_precision.png.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import ctgate as ct
from ctgate.experiments.convergence.series import write
from ctgate.experiments.speed.adaptive import diffrax_of
from ctgate.experiments.speed.compare import Found, relative
from ctgate.experiments.speed.driven import Driven
from ctgate.experiments.speed.peers import NAMES, missing

TOLERANCES = tuple(10.0 ** (-k / 2) for k in range(4, 14))
COLOURS = {"ctgate": "#0b6aa8", "torchdiffeq": "#d1495b", "diffrax": "#6b7f3f"}
MARKERS = {"ctgate": "o", "torchdiffeq": "s", "diffrax": "^"}
WHAT = ("state", "gradient")
Way = Callable[[float], Found]


def ways(case: Driven) -> dict[str, tuple[Way, Way]]:
    """Forward alone, and forward with backward, by solver."""
    found: dict[str, tuple[Way, Way]] = {
        "ctgate": (case.forward, case.gradient),
        "torchdiffeq": (case.their_forward, case.their_gradient),
    }
    if not missing("diffrax", "jax"):
        other = diffrax_of(case)

        def tensor(array: object) -> Tensor:
            return torch.from_numpy(np.array(array))

        def forward(rtol: float) -> Found:
            return Found(tensor(other.forward(case.span, rtol)))

        def gradient(rtol: float) -> Found:
            state, by_name = other.gradient(case.span, rtol)
            return Found(tensor(state), [tensor(by_name[name]) for name in NAMES])

        found["diffrax"] = forward, gradient
    return found


def measure(case: Driven, repeats: int) -> xr.Dataset:
    """Seconds and errors by solver, tolerance and what is asked for."""
    solvers = ways(case)
    shape = (len(solvers), len(TOLERANCES), len(WHAT))
    seconds, errors = np.full(shape, np.inf), np.zeros(shape)
    for k, rtol in enumerate(TOLERANCES):
        for turn in range(repeats + 1):
            for s, pair in enumerate(solvers.values()):
                for w, way in enumerate(pair):
                    begun = time.perf_counter()
                    found = way(rtol)
                    # The first turn compiles and warms up.
                    if turn:
                        seconds[s, k, w] = min(seconds[s, k, w], time.perf_counter() - begun)
                    elif WHAT[w] == "state":
                        errors[s, k, w] = relative([found.states], [case.reference.states])
                    else:
                        errors[s, k, w] = relative(found.gradients, case.reference.gradients)
        took = (f"{name} {row[k, 1]:.3f} s" for name, row in zip(solvers, seconds, strict=True))
        print(f"rtol {rtol:.0e}: {', '.join(took)}")
    dims = ("solver", "tolerance", "what")
    return xr.Dataset(
        {
            "seconds": (dims, seconds, {"long_name": "time", "units": "s"}),
            "error": (dims, errors, {"long_name": "relative error against float64", "units": "1"}),
        },
        coords={"solver": list(solvers), "tolerance": list(TOLERANCES), "what": list(WHAT)},
        attrs={
            "ctgate_version": ct.__version__,
            "torch_version": str(torch.__version__),
            "workload": f"dopri5, {case.sizes}, float32, {torch.get_num_threads()} thread",
        },
    )


def figure(data: xr.Dataset) -> Figure:
    """Time against error, states left, gradients right."""
    drawn = Figure(figsize=(9.0, 3.8), layout="constrained")
    FigureCanvasAgg(drawn)
    titles = {"state": "final state", "gradient": "gradient by all weights"}
    for axes, what in zip(drawn.subplots(1, 2), WHAT, strict=True):
        for solver in data["solver"].values:
            line = data.sel(solver=solver, what=what)
            axes.loglog(
                line["error"],
                line["seconds"] * 1e3,
                marker=MARKERS[solver],
                color=COLOURS[solver],
                markersize=5,
                label=str(solver) + (" (compiled)" if solver == "diffrax" else ""),
            )
        axes.set_title(titles[what], loc="left")
        axes.set_xlabel("relative error")
        axes.grid(which="major", color="#e4e6eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    left = drawn.axes[0]
    left.set_ylabel("time [ms]")
    left.legend(frameon=False)
    drawn.suptitle(data.attrs["workload"], fontsize=9, x=0.01, ha="left", color="#5a606b")
    return drawn


def main(options: argparse.Namespace) -> int:
    """Measure, write, draw."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        # jax has no other way to one thread that covers all of it.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    options.out.mkdir(parents=True, exist_ok=True)
    data = measure(Driven(options.hidden, options.batch, options.span), options.repeats)
    files = [write(data, options.out / "work_precision.nc"), options.out / "work_precision.png"]
    figure(data).savefig(files[1], dpi=160)
    print(", ".join(map(str, files)))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("hidden", 128), ("batch", 64), ("span", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("ctgate-bench/work_precision"))
    raise SystemExit(main(parser.parse_args()))
