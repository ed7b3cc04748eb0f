"""Does every method converge at its order, with smooth and with held input, on the steps and between them?"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import xarray as xr
from tqdm import tqdm

import ctgate as ct
from ctgate.algorithms import AdaptiveAlgorithm, FixedStepAlgorithm
from ctgate.convergence import make_reference, test_convergence, work_precision
from ctgate.convergence.measure import Reference
from ctgate.experiments.convergence import problems
from ctgate.experiments.convergence.inside_steps import inside_steps
from ctgate.experiments.convergence.presets import Preset
from ctgate.experiments.convergence.series import Series, collect, fixed_step_series, mean_series
from ctgate.sensealg import SensitivityAlgorithm

# Steps in the span of time at the coarsest: in the asymptotic regime, and far from rounding.
COARSEST: dict[type[FixedStepAlgorithm], int] = {
    ct.Euler: 64,
    ct.ExponentialEuler: 64,
    ct.ExponentialMidpoint: 32,
    ct.Heun: 32,
    ct.Midpoint: 32,
    ct.RK4: 32,
}
# Tight enough for more than a handful of steps.
LOOSEST: dict[type[AdaptiveAlgorithm], float] = {
    ct.Bosh3: 1e-3,
    ct.Dopri5: 1e-5,
    ct.Tsit5: 3e-6,
    ct.Dopri8: 1e-6,
    ct.Rosenbrock23: 1e-2,
}
ON_TORCHDIFFEQ = "Dopri5, torchdiffeq"
# Every method on its own engine, and Dopri5 on the other one as well.
ADAPTIVE: tuple[tuple[str, type[AdaptiveAlgorithm], SensitivityAlgorithm], ...] = (
    *((method.__name__, method, ct.DiscreteAdjoint()) for method in LOOSEST),
    (ON_TORCHDIFFEQ, ct.Dopri5, ct.BacksolveAdjoint()),
)
ON_STEPS, BETWEEN_STEPS = (1.0, 2.0, 3.0, 4.0), (0.777, 1.893, 2.718, 3.9)


def measure(preset: Preset, progress: bool) -> xr.Dataset:
    """Fixed-step methods on three problems, adaptive ones and single steps on the gated ones."""
    sizes = preset.sizes
    seeds = range(preset.draws)
    smooth, held = map(problems.smooth, seeds), map(problems.held, seeds)
    jobs = [
        partial(fixed, problems.smooth(0), "GRU, smooth input", sizes),
        # The LSTM's tau is 0.37, so the asymptotic order begins at finer steps.
        partial(fixed, problems.held(0), "LSTM, held input", sizes, finer=2),
        partial(fixed, problems.cosine(), "y' = -y + cos t", sizes, exact=problems.cosine_solution),
        partial(adaptive, list(smooth), "GRU, smooth input, adaptive", preset.tolerances),
        partial(adaptive, list(held), "LSTM, held input, adaptive", preset.tolerances),
        partial(inside_steps, problems.smooth(0), "GRU, smooth input, inside one step", 2.0**-4, sizes),
        partial(inside_steps, problems.held(0), "LSTM, held input, inside one step", 2.0**-5, sizes),
    ]
    bar = tqdm(jobs, "solver_order", disable=None if progress else True, leave=False)
    series = [one for job in bar for one in job()]
    return collect(
        "solver_order",
        "Order of every method on driven gated fields",
        series,
        {
            "times_on_steps": ON_STEPS,
            "times_between_steps": BETWEEN_STEPS,
            "seeds": list(seeds),
            "notes": _engines(series),
        },
    )


def fixed(
    prob: ct.ODEProblem,
    panel: str,
    sizes: int,
    *,
    finer: int = 1,
    exact: Reference | None = None,
) -> list[Series]:
    """Every fixed-step method at times on its steps, and RK4 at times between them."""
    start, stop = prob.tspan

    def dts(coarsest: int) -> list[float]:
        return [(stop - start) / (finer * coarsest * 2**k) for k in range(sizes)]

    on_steps = exact or make_reference(prob, saveat=ON_STEPS)
    between = exact or make_reference(prob, saveat=BETWEEN_STEPS)
    series = []
    for method, coarsest in COARSEST.items():
        result = test_convergence(prob, method, dts(coarsest), reference=on_steps, saveat=ON_STEPS)
        series += fixed_step_series(result, panel)
    result = test_convergence(prob, ct.RK4, dts(COARSEST[ct.RK4]), reference=between, saveat=BETWEEN_STEPS)
    series += fixed_step_series(result.assign_coords(algorithm=["RK4, between steps"]), panel)
    return series


def adaptive(probs: Sequence[ct.ODEProblem], panel: str, tolerances: int) -> list[Series]:
    """Error against tolerance, averaged over problems: one alone carries the noise of its controller."""
    references = [make_reference(prob) for prob in probs]
    series = []
    for name, method, sensealg in ADAPTIVE:
        tols = [LOOSEST[method] * 10.0 ** (-k / 2) for k in range(tolerances)]
        results = [
            work_precision(prob, method, tols, reference=reference, sensealg=sensealg)
            for prob, reference in zip(probs, references, strict=True)
        ]
        series.append(mean_series(results, panel, name))
    return series


def _engines(series: Sequence[Series]) -> str:
    """What Dopri5 is on the native loop beside torchdiffeq at equal tolerance, the median over tolerances."""
    other = {one.panel: one for one in series if one.method == ON_TORCHDIFFEQ}
    lines = []
    for one in series:
        if one.method == ct.Dopri5.__name__ and one.panel in other:
            pairs = {
                "error": (one.error, other[one.panel].error),
                "evaluations": (one.evaluations, other[one.panel].evaluations),
                "wall time": (one.wall_time, other[one.panel].wall_time),
            }
            ratios = {name: float(np.median(np.divide(*pair))) for name, pair in pairs.items()}
            text = ", ".join(f"{name} x {ratio:.2f}" for name, ratio in ratios.items())
            lines.append(f"{one.panel}: Dopri5 on the native loop against torchdiffeq's: {text}")
    return "\n".join(lines)
