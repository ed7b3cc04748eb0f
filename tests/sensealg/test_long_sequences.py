"""Long sequences differentiate in the memory of a few of their steps, and to the same gradient."""

import subprocess
import sys

import pytest
import torch

import ctgate as ct

MIB = 2**20
# Linux counts the memory of the process that started another one towards the other's peak, and this one may
# be large: a small one stands between them.
BETWEEN = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
# What the process held once everything was imported, and at its worst, in bytes.
SCRIPT = """
import importlib.util, resource, sys
import torch
import ctgate as ct

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

torch.set_num_threads(1)
steps, hidden, checkpoints = map(int, sys.argv[1:])
if importlib.util.find_spec("numba"):
    import ctgate.kernels.compiled.gru
imported = peak()
generator = torch.Generator().manual_seed(0)
field = ct.GRU(1, hidden, generator=generator)
xs = torch.randn(steps, 8, 1, generator=generator)
control = ct.ZeroOrderHold(torch.arange(steps + 1), xs)
prob = ct.ODEProblem(field, field.initial_state((8,)), (0.0, float(steps)), control)
sensealg = ct.DiscreteAdjoint(checkpoints=checkpoints)
sol = ct.solve(prob, ct.Euler(dt=1.0), saveat=[float(steps)], dense=False, sensealg=sensealg)
sol.hs[-1].square().mean().backward()
assert sol.stats.evaluations == sol.stats.evaluations_backward == steps
assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in field.parameters())
print(imported, peak())
"""


def measured(steps: int, hidden: int, checkpoints: int) -> tuple[int, int]:
    """Peaks of a fresh process that differentiates the last state of a GRU: after imports, in the end."""
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN, sys.executable, "-c", SCRIPT]
        + [str(number) for number in (steps, hidden, checkpoints)],
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imported, peak = map(int, done.stdout.split())
    return imported, peak


def gradients(
    steps: int, dtype: torch.dtype, checkpoints: int | None, hidden: int = 64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    field = ct.GRU(1, hidden, dtype=dtype, generator=generator)
    xs = torch.randn(steps, 8, 1, dtype=dtype, generator=generator).requires_grad_()
    h0 = field.initial_state((8,)).requires_grad_()
    prob = ct.ODEProblem(field, h0, (0.0, float(steps)), ct.ZeroOrderHold(torch.arange(steps + 1), xs))
    sensealg = ct.DiscreteAdjoint(checkpoints=checkpoints)
    sol = ct.solve(prob, ct.Euler(dt=1.0), saveat=[float(steps)], dense=False, sensealg=sensealg)
    return list(torch.autograd.grad(sol.hs[-1].square().mean(), [*field.parameters(), h0, xs]))


def difference(steps: int, dtype: torch.dtype) -> float:
    """The largest difference that checkpoints make, relative to the largest entry of each gradient."""
    plain, again = (gradients(steps, dtype, number) for number in (None, round(steps**0.5)))
    scales = [float(p.abs().max()) for p in plain]
    return max(
        float((a - p).abs().max()) / scale for a, p, scale in zip(again, plain, scales, strict=True) if scale
    )


def test_memory_grows_with_the_input_and_not_with_the_graph() -> None:
    """Most of it is what torch loads when it first differentiates, and numba when it first compiles; a graph
    of all steps holds 300 MiB."""
    imported, peak = measured(7500, 16, 87)
    assert peak - imported < 200 * MIB


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hundred_thousand_steps_in_600_mib() -> None:
    _, peak = measured(100_000, 64, 316)
    assert peak < 600 * MIB


@pytest.mark.parametrize(
    "steps", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 5e-5)])
def test_checkpoints_do_not_change_the_gradient(steps: int, dtype: torch.dtype, rtol: float) -> None:
    assert difference(steps, dtype) < rtol
