"""Does the gradient of the discrete solution converge to the flow's, at the order of the method?"""

from collections.abc import Sequence
from functools import partial

import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

import ctgate as ct
from ctgate.algorithms import AdaptiveAlgorithm
from ctgate.convergence import make_reference, work_precision
from ctgate.convergence.measure import LossFunction
from ctgate.experiments.convergence import problems
from ctgate.experiments.convergence.presets import Preset
from ctgate.experiments.convergence.series import Series, collect, fixed_step_series, mean_series
from ctgate.experiments.convergence.solver_order import COARSEST, LOOSEST, ON_STEPS
from ctgate.sensealg import SensitivityAlgorithm

ADAPTIVE: tuple[tuple[type[AdaptiveAlgorithm], SensitivityAlgorithm], ...] = (
    (ct.Bosh3, ct.DiscreteAdjoint()),
    (ct.Dopri5, ct.DiscreteAdjoint()),
    (ct.Tsit5, ct.DiscreteAdjoint()),
    (ct.Dopri8, ct.DiscreteAdjoint()),
    (ct.Rosenbrock23, ct.DiscreteAdjoint()),
    # What it does at loose tolerances is what the figure shows.
    (ct.Dopri5, ct.BacksolveAdjoint(tolerance=float("inf"))),
)


def measure(preset: Preset, progress: bool) -> xr.Dataset:
    """Gradients by h0, all weights and, for the GRU, its time constants, of a readout's mean square."""
    seeds = range(preset.draws)
    smooth, held = map(problems.smooth, seeds), map(problems.held, seeds)
    jobs = [
        partial(fixed, problems.smooth(0), "GRU, smooth input", preset.sizes),
        partial(fixed, problems.held(0), "LSTM, held input", preset.sizes, finer=2),
        partial(adaptive, list(smooth), "GRU, smooth input, adaptive", preset.tolerances),
        partial(adaptive, list(held), "LSTM, held input, adaptive", preset.tolerances),
    ]
    bar = tqdm(jobs, "gradients", disable=None if progress else True, leave=False)
    return collect(
        "gradients",
        "Gradient of the discrete solution against the flow's",
        [one for job in bar for one in job()],
        {
            "error_norm": "maximum over the tensors of the largest error relative to the largest entry",
            "seeds": list(seeds),
        },
    )


def fixed(prob: ct.ODEProblem, panel: str, sizes: int, *, finer: int = 1) -> list[Series]:
    """Every fixed-step method, differentiated through its steps; the loss looks at several times."""
    start, stop = prob.tspan
    loss = readout(prob)
    reference = make_reference(prob, saveat=ON_STEPS, loss=loss)
    series = []
    for method, coarsest in COARSEST.items():
        dts = [(stop - start) / (finer * coarsest * 2**k) for k in range(sizes)]
        result = work_precision(prob, method, dts=dts, loss=loss, reference=reference, saveat=ON_STEPS)
        series += fixed_step_series(result, panel, "gradient_")
    return series


def adaptive(probs: Sequence[ct.ODEProblem], panel: str, tolerances: int) -> list[Series]:
    """Adaptive methods, a decade of tolerance between points, or half of one where each step differentiates a
    Jacobian; the loss looks at the end."""
    losses = [readout(prob) for prob in probs]
    references = [make_reference(prob, loss=loss) for prob, loss in zip(probs, losses, strict=True)]
    series = []
    for method, sensealg in ADAPTIVE:
        decades = 0.5 if method.stiff else 1.0
        tols = [LOOSEST[method] * 10.0 ** (-k * decades) for k in range((tolerances + 1) // 2)]
        results = [
            work_precision(prob, method, tols, loss=loss, sensealg=sensealg, reference=reference)
            for prob, loss, reference in zip(probs, losses, references, strict=True)
        ]
        kind = "backsolve" if isinstance(sensealg, ct.BacksolveAdjoint) else "discrete"
        series.append(mean_series(results, panel, f"{method.__name__}, {kind}", "gradient_"))
    return series


def readout(prob: ct.ODEProblem) -> LossFunction:
    """The mean over saved times and samples of the square of a fixed projection of the state."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(prob.h0.shape[-1], generator=generator, dtype=prob.h0.dtype)

    def loss(sol: ct.Solution) -> Tensor:
        return (sol.hs @ weights).square().mean()

    return loss
