"""Stiff methods on the stiff problems of the literature and on gates whose time constants span decades.

The reference is scipy's Radau at 1e-10 with right-hand sides and Jacobians written apart. The error is the
largest over components and about ten times, in units of atol + rtol |reference|.
"""

import functools
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import ctgate as ct
from ctgate.algorithms import Algorithm
from tests.reference.compare import in_tolerances, solved, stiff_by_scipy
from tests.reference.stiff import GATED, PROBLEMS, StiffProblem

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "convergence" / "stiff.py"
METHODS = (ct.Rosenbrock23(), ct.Radau(), ct.BDF(), ct.LSODA())
GATES = tuple(problem for problem in PROBLEMS if problem.name.startswith("gates"))

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)


@functools.cache
def reference(problem: StiffProblem) -> np.ndarray:
    return stiff_by_scipy(problem, problem.saveat)


@every_problem
def test_both_right_hand_sides_and_both_jacobians_are_the_same_functions(problem):
    prob = problem.problem()
    generator = np.random.default_rng(0)
    for k in range(5):
        t = float(generator.uniform(0.0, problem.stop))
        h = torch.from_numpy(reference(problem)[k] * generator.uniform(0.8, 1.2, len(problem.start)))
        u = None if prob.control is None else prob.control(t)

        def rhs(h: torch.Tensor, t: float = t, u: torch.Tensor | None = u) -> torch.Tensor:
            return prob.field(torch.tensor(t, dtype=torch.float64), h, u)

        slope = problem.rhs(t, h.numpy())
        np.testing.assert_allclose(rhs(h).detach(), slope, rtol=1e-12, atol=1e-12 * np.abs(slope).max())
        matrix = problem.jacobian(t, h.numpy())
        jacobian = torch.autograd.functional.jacobian(rhs, h)
        np.testing.assert_allclose(jacobian, matrix, rtol=1e-12, atol=1e-12 * np.abs(matrix).max())


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.end], ids=lambda problem: problem.name)
def test_reference_ends_at_the_printed_state(problem):
    """Of the Test Set for IVP Solvers, to 1e-9 in every component; Robertson's at 1e11, where y2 is 8e-14."""
    atol = 1e-20 if problem.name == "Robertson" else None
    state = stiff_by_scipy(problem, [problem.end_time], atol=atol)[-1]
    np.testing.assert_allclose(state, problem.end, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("problem", GATES, ids=lambda problem: problem.name)
@torch.no_grad()
def test_time_constants_span_four_decades(problem):
    prob = problem.problem()
    assert prob.control is not None
    constants = torch.stack(
        [
            prob.field.time_constants(t, torch.from_numpy(state), prob.control(t))
            for t, state in zip(problem.saveat, reference(problem), strict=True)
        ]
    )
    assert float(constants.max() / constants.min()) > 1e4
    assert float((constants.amax(-1) / constants.amin(-1)).min()) > 1e3
    assert GATED.tau.max() / GATED.tau.min() == pytest.approx(1e4)


@every_problem
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_stiff_method_keeps_its_tolerance(problem, method):
    done = solved(problem.problem(), method, problem.saveat, rtol=problem.rtol, atol=problem.atol)
    assert in_tolerances(done.states, reference(problem), problem.rtol, problem.atol) <= problem.limit


@pytest.mark.parametrize("problem", GATES, ids=lambda problem: problem.name)
def test_exponential_midpoint_needs_a_quarter_of_the_evaluations_at_moderate_accuracy(problem):
    """Relative error 1e-2. An explicit method needs dt below 3.3 / rate for all of the span, whatever its
    tolerance; the exponential one needs steps that follow the input and the slow units."""
    prob = problem.problem()
    largest = np.abs(reference(problem)).max()

    def run(method: Algorithm, **tolerances: float) -> tuple[float, int]:
        done = solved(prob, method, problem.saveat, **tolerances)
        return float(np.abs(done.states - reference(problem)).max() / largest), done.evaluations

    error, evaluations = run(ct.ExponentialMidpoint(dt=0.125))
    tries = (run(ct.Dopri5(), rtol=10.0**-k, atol=10.0**-k) for k in range(1, 7))
    explicit_error, explicit = next(one for one in tries if one[0] <= 1e-2)
    print(
        f"{problem.name}: ExponentialMidpoint {evaluations} evaluations, error {error:.1e}; "
        f"Dopri5 {explicit}, error {explicit_error:.1e}"
    )
    assert error <= 1e-2
    assert evaluations <= explicit / 4


def test_an_explicit_method_that_gives_up_says_what_to_take():
    prob = next(problem for problem in PROBLEMS if problem.name == "Van der Pol").problem()
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=r"MAX_STEPS.*to try: .*Rosenbrock23"):
        sol = ct.solve(prob, ct.Dopri5(), max_steps=5000, dense=False)
    assert sol.retcode is ct.ReturnCode.MAX_STEPS
    assert sol.ts[-1] < prob.tspan[1]


def test_benchmark_finds_what_is_not_as_it_should_be():
    script = runpy.run_path(str(SCRIPT))
    robertson, gates = PROBLEMS[0], GATES[1]
    result = script["measure"]((1e-4,), (robertson, gates))
    assert script["misses"](result) == []
    text = script["table"](result)
    assert all(
        name in text for name in ("Robertson", "gates, held", "LSODA", "Dopri5", "ExponentialMidpoint")
    )
    assert len(script["draw"](result).axes) == 6

    def spoilt(problem: StiffProblem, method: str, **factors: float) -> list[str]:
        chosen = (result.problem == problem.name) & (result.method == method)
        changes = {
            name: result[name].where(~chosen, factor * result[name]) for name, factor in factors.items()
        }
        return script["misses"](result.assign(changes))

    (miss,) = spoilt(robertson, "BDF", error=1e3)
    assert miss.startswith("Robertson, BDF")
    (miss,) = spoilt(gates, "ExponentialMidpoint", evaluations=3.0)
    assert "ExponentialMidpoint" in miss
    (miss,) = spoilt(gates, "ExponentialMidpoint", relative=1e3)
    assert "ExponentialMidpoint" in miss
