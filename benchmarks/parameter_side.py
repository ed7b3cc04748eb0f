"""Gradients of single samples: all at once, against a loop over samples and against vmap over the parameters.

    python benchmarks/parameter_side.py [--preset quick|full] [--out FOLDER]

A GRU read by a linear layer, terminal squared error, ``Euler(dt=tau)``, float32, one thread. Three ways:
``ctgate.per_sample_gradients`` (a reverse loop over time whose products with the parameters are kept by
sample), a loop of solve and autograd, and ``torch.func.vmap(grad)`` of the same cell written out in torch.
Prints a table of the best of three times, writes parameter_side.nc and parameter_side.png, and exits with 1
when the three disagree beyond 1e-4 of the largest gradient.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import ctgate as ct
from ctgate.experiments.convergence.series import write

PRESETS = {"quick": ((8, 32), 50, 16), "full": ((8, 32, 128), 200, 64)}
INPUT = 2
WAYS = ("ctgate", "loop", "vmap")


class Case:
    """One batch, and its gradients by each of the three ways, as (sample, parameter)."""

    def __init__(self, samples: int, steps: int, hidden: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.field = ct.GRU(INPUT, hidden, generator=generator)
        self.readout = nn.Linear(hidden, 1)
        self.x = torch.randn(steps, samples, INPUT, generator=generator)
        self.y = torch.randn(samples, generator=generator)
        self.ts = torch.arange(steps + 1, dtype=torch.float64)

    def problem(self, samples: slice) -> tuple[ct.ODEProblem, ct.Loss]:
        x, y = self.x[:, samples], self.y[samples]
        control = ct.ZeroOrderHold(self.ts, x)
        prob = ct.ODEProblem(self.field, self.field.initial_state(x.shape[1:2]), control.support, control)
        return prob, ct.Loss(terminal=lambda seen: (seen[..., 0] - y).square(), readout=self.readout)

    def ctgate(self) -> Tensor:
        prob, loss = self.problem(slice(None))
        rows = ct.per_sample_gradients(prob, loss, ct.Euler(dt=1.0))
        return torch.cat([row.flatten(1) for row in rows.values()], 1)

    def loop(self) -> Tensor:
        parameters = [*self.field.parameters(), *self.readout.parameters()]
        rows = []
        for k in range(len(self.y)):
            prob, loss = self.problem(slice(k, k + 1))
            found = torch.autograd.grad(loss(ct.solve(prob, ct.Euler(dt=1.0))), parameters)
            rows.append(torch.cat([part.flatten() for part in found]))
        return torch.stack(rows)

    def vmap(self) -> Tensor:
        """The cell step by step: torch.nn.GRU itself does not pass vmap."""
        inside = {name: p.detach() for name, p in self.field.named_parameters()}
        outside = {name: p.detach() for name, p in self.readout.named_parameters()}

        def cost(parameters: tuple[dict[str, Tensor], dict[str, Tensor]], x: Tensor, y: Tensor) -> Tensor:
            h = self.field.initial_state()
            for u in x:
                h = h + functional_call(self.field, parameters[0], (0.0, h, u))
            seen: Tensor = functional_call(self.readout, parameters[1], (h,))
            return (seen[0] - y).square()

        blocks = vmap(grad(cost), in_dims=(None, 1, 0))((inside, outside), self.x, self.y)
        return torch.cat([row.flatten(1) for part in blocks for row in part.values()], 1)


def best(way: Callable[[], Tensor], repeats: int = 3) -> tuple[float, Tensor]:
    """The shortest of some times [s], and what came out."""
    shortest, rows = float("inf"), torch.empty(0)
    for _ in range(repeats):
        begun = time.perf_counter()
        rows = way()
        shortest = min(shortest, time.perf_counter() - begun)
    return shortest, rows


def measure(preset: str) -> xr.Dataset:
    """Times and disagreements by batch size and way."""
    sizes, steps, hidden = PRESETS[preset]
    seconds, errors = [], []
    for samples in sizes:
        case = Case(samples, steps, hidden)
        found = [best(way) for way in (case.ctgate, case.loop, case.vmap)]
        scale = found[1][1].abs().max()
        seconds.append([duration for duration, _ in found])
        errors.append([float((rows - found[1][1]).abs().max() / scale) for _, rows in found])
    dims = ("sample", "way")
    return xr.Dataset(
        {
            "seconds": (dims, seconds, {"long_name": "time for all gradients", "units": "s"}),
            "error": (dims, errors, {"long_name": "largest difference from the loop", "units": "1"}),
        },
        coords={"sample": list(sizes), "way": list(WAYS)},
        attrs={
            "ctgate_version": ct.__version__,
            "torch_version": str(torch.__version__),
            "steps": steps,
            "hidden": hidden,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
        },
    )


def figure(data: xr.Dataset) -> Figure:
    """Time against batch size."""
    drawn = Figure(figsize=(5.0, 3.4), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    for way in WAYS:
        axes.loglog(data["sample"], data["seconds"].sel(way=way), "o-", label=way)
    axes.set_xlabel("samples")
    axes.set_ylabel("time [s]")
    axes.set_title(f"gradients of single samples, {data.attrs['steps']} steps, H = {data.attrs['hidden']}")
    axes.legend(frameon=False)
    return drawn


def main(preset: str, out: Path) -> int:
    """Run it; 0 if the three agree."""
    out.mkdir(parents=True, exist_ok=True)
    data = measure(preset)
    heads = (*(f"{way} [s]" for way in WAYS), "loop/ctgate", "vmap/ctgate")
    print(f"{'samples':>8}" + "".join(f" {head:>12}" for head in heads))
    for samples in data["sample"].values:
        ours, loop, mapped = data["seconds"].sel(sample=samples).values
        times = "".join(f" {value:12.4f}" for value in (ours, loop, mapped))
        print(f"{samples:8d}{times} {loop / ours:12.1f} {mapped / ours:12.1f}")
    files = [write(data, out / "parameter_side.nc"), out / "parameter_side.png"]
    figure(data).savefig(files[1], dpi=160)
    worst = float(data["error"].max())
    print(f"largest difference {worst:.1e} of the largest gradient; {', '.join(map(str, files))}")
    return int(worst > 1e-4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="quick")
    parser.add_argument("--out", type=Path, default=Path("ctgate-bench"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    raise SystemExit(main(given.preset, given.out))
