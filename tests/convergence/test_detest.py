"""Dopri5 on the 25 non-stiff problems of DETEST against scipy's RK45, the same pair of formulas.

The reference is scipy's DOP853 at 1e-13 with right-hand sides written apart. Errors are global, in the
maximum norm over components: at t = 20, and the largest over t = 1, 2, ..., 20, which sees the continuous
extension as well.
"""

import functools
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import ctgate as ct
from tests.reference.compare import LIMITS, MEDIAN, TIMES, by_ctgate, by_scipy
from tests.reference.detest import PROBLEMS, SPAN, Problem

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "convergence" / "detest.py"

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)


@functools.cache
def reference(problem: Problem) -> np.ndarray:
    return by_scipy(problem, "DOP853", 1e-13, TIMES).states


@functools.cache
def ratios(problem: Problem, tolerance: float) -> tuple[float, float]:
    """Error of ctgate over that of scipy: at t = 20, and the largest over all times."""
    ours, theirs = (
        np.abs(solved.states - reference(problem)).max(-1)
        for solved in (
            by_ctgate(problem, ct.Dopri5(), tolerance, TIMES),
            by_scipy(problem, "RK45", tolerance, TIMES),
        )
    )
    return float(ours[-1] / theirs[-1]), float(ours.max() / theirs.max())


def test_there_are_five_problems_in_each_of_five_classes():
    assert [problem.name for problem in PROBLEMS] == [f"{kind}{k}" for kind in "ABCDE" for k in range(1, 6)]


@every_problem
def test_both_right_hand_sides_are_the_same_function(problem):
    """In a batch, with one time for all samples and with one per sample."""
    generator = np.random.default_rng(0)
    states = np.array(problem.start) + generator.uniform(0.1, 1.0, (6, len(problem.start)))
    times = generator.uniform(*SPAN, 6)
    for shared in (True, False):
        t = torch.tensor(times[0]) if shared else torch.from_numpy(times)[:, None]
        slopes = problem.rhs(t, torch.from_numpy(states), None)
        assert slopes.shape == states.shape
        for k, slope in enumerate(slopes):
            expected = problem.numpy_rhs(times[0 if shared else k], states[k])
            np.testing.assert_allclose(slope, expected, rtol=1e-13, atol=1e-15)


@every_problem
def test_reference_ends_at_the_printed_state(problem):
    """As Enright and Pryce print it."""
    np.testing.assert_allclose(reference(problem)[-1], problem.end, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "problem", [p for p in PROBLEMS if p.exact is not None], ids=lambda problem: problem.name
)
def test_reference_is_the_closed_form(problem):
    """To 1e-11, but for the thin orbit, whose perihelion magnifies errors a thousandfold."""
    assert problem.exact is not None
    np.testing.assert_allclose(problem.exact(0.0), problem.start, rtol=1e-14, atol=1e-14)
    exact = np.array([problem.exact(t) for t in TIMES])
    tolerance = {"D3": 1e-10, "D4": 1e-10, "D5": 1e-8}.get(problem.name, 2e-11)
    np.testing.assert_allclose(reference(problem), exact, rtol=0.0, atol=tolerance)


@every_problem
@pytest.mark.parametrize("tolerance", LIMITS)
def test_error_is_near_that_of_another_code(problem, tolerance):
    assert max(ratios(problem, tolerance)) <= LIMITS[tolerance]


@pytest.mark.parametrize("tolerance", LIMITS)
def test_median_error_is_that_of_another_code(tolerance):
    assert max(np.median([ratios(problem, tolerance) for problem in PROBLEMS], axis=0)) <= MEDIAN


def test_benchmark_finds_a_ratio_that_is_too_large():
    script, some = runpy.run_path(str(SCRIPT)), PROBLEMS[::5]
    result = script["measure"]([1e-3], some)
    for problem in some:
        one = result.sel(problem=problem.name, rtol=1e-3)
        expected = pytest.approx(ratios(problem, 1e-3), rel=1e-12)
        assert (float(one.end_ratio), float(one.path_ratio)) == expected
    assert script["too_large"](result) == 0
    assert all(problem.title in script["table"](result) for problem in some)
    assert len(script["draw"](result).axes) == 5
    result.end_ratio.loc[{"problem": "C1"}] = 8.1
    assert script["too_large"](result) == 1
    assert script["too_large"](result.assign(end_ratio=2.1 + 0.0 * result.end_ratio)) == 1
