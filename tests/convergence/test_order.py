"""Observed orders: against errors in closed form, and on methods and references that are wrong on purpose."""

import dataclasses
import math
from functools import partial

import pytest
import torch

import ctgate as ct
from ctgate.convergence import test_convergence as measure_order
from ctgate.convergence.measure import Target, measure
from ctgate.integrators import steppers
from ctgate.integrators.runge_kutta import RK4, explicit_attempt
from tests.convergence.problems import TAU, decay, driven, driven_solution, euler_decay
from tests.typechecker import unchecked

FIXED = [ct.Euler, ct.ExponentialEuler, ct.ExponentialMidpoint, ct.Heun, ct.Midpoint, ct.RK4]
MIXED = [ct.ExponentialMidpoint, ct.Heun, ct.RK4]
DTS = [0.25, 0.125, 0.0625, 0.03125]


def test_it_is_not_collected_as_a_test():
    assert measure_order.__test__ is False


def test_errors_are_those_of_the_closed_form():
    result = measure_order(decay(), ct.Euler, DTS, reference=lambda t: math.exp(-t / TAU) * decay().h0)
    for dt in DTS:
        expected = 3.0 * abs(
            euler_decay(dt) - math.exp(-2.0 / TAU)
        )  # the sample that starts at 3 is the worst
        assert float(result.error.sel(algorithm="Euler", dt=dt)) == pytest.approx(expected, rel=1e-10)
        assert int(result.evaluations.sel(algorithm="Euler", dt=dt)) == round(2.0 / dt)
    assert list(result.dt.values) == sorted(DTS, reverse=True)


def test_all_fixed_step_methods_have_their_order_on_the_textbook_problem():
    result = measure_order(driven(), FIXED, DTS, reference=driven_solution, saveat=[0.5, 1.0, 1.5, 2.0])
    orders = result.order.to_series()
    for method in FIXED:
        assert orders[method.__name__] == pytest.approx(method.order, abs=0.15)
    assert list(result.expected_order.values) == [1, 1, 2, 2, 2, 4]
    assert set(result.verdict.values) == {"right"}
    assert bool((result.order_low <= result.order).all())
    assert bool((result.order <= result.order_high).all())


def test_between_the_steps_the_order_stays():
    times = [0.371, 1.018, 1.903]
    result = measure_order(driven(), MIXED, DTS, reference=driven_solution, saveat=times)
    assert set(result.verdict.values) == {"right"}


def test_self_reference_finds_the_errors_that_the_exact_solution_finds():
    exact = measure_order(driven(), [ct.Heun, ct.RK4], DTS, reference=driven_solution)
    own = measure_order(driven(), [ct.Heun, ct.RK4], DTS)
    torch.testing.assert_close(
        torch.tensor(own.error.values), torch.tensor(exact.error.values), rtol=1e-4, atol=0
    )
    assert own.attrs["reference"].startswith("self: Dopri8")
    assert 0.0 < own.attrs["reference_doubt"] < 1e-12


def test_states_as_reference():
    times = [1.0, 2.0]
    states = torch.stack([driven_solution(t) for t in times])
    given = measure_order(driven(), ct.Heun, DTS, reference=states, saveat=times)
    function = measure_order(driven(), ct.Heun, DTS, reference=driven_solution, saveat=times)
    assert given.order.equals(function.order)
    at_end = measure_order(driven(), ct.Heun, DTS, reference=driven_solution(2.0))
    assert at_end.verdict.item() == "right"


def test_points_at_rounding_level_are_left_out_and_say_so():
    """In single precision, where it comes early."""
    result = measure_order(
        driven(torch.float32), [ct.Euler, ct.RK4], [1.0, 0.5, *DTS], reference=driven_solution
    )
    assert result.attrs["dtype"] == "float32"
    assert set(result.status.sel(algorithm="Euler").values) == {"used"}
    assert result.verdict.sel(algorithm="Euler").item() == "right"
    rk4 = result.sel(algorithm="RK4")
    assert list(rk4.status.values) == ["used"] * 3 + ["at rounding level"] * 3
    assert rk4.order.item() > 3.5
    fine = measure_order(driven(torch.float32), ct.RK4, DTS[1:], reference=driven_solution)
    assert fine.verdict.item() == "undetermined"
    assert math.isnan(fine.order.item())


def test_points_below_the_reference_s_own_error_are_left_out_and_say_so():
    prob = driven()
    exact = Target([2.0], driven_solution(2.0)[None], {}, state_doubt=0.0, gradient_doubt=0.0, source="exact")
    doubtful = dataclasses.replace(exact, state_doubt=1.0)
    for target, status in ((exact, "used"), (doubtful, "at the reference's own error")):
        assert measure(prob, ct.Euler(dt=0.25), [2.0], target, 0.25).status == status


def test_a_failed_solve_is_left_out():
    steep = ct.Field(lambda t, h, u: -20.0 * torch.sinh(h), state_size=1)
    prob = ct.ODEProblem(steep, torch.tensor([1.0], dtype=torch.float64), (0.0, 1.5))
    result = measure_order(prob, ct.Euler, [0.5, 0.02, 0.01, 0.005], saveat=[0.02])
    assert list(result.status.values[0]) == ["UNSTABLE", "used", "used", "used"]
    assert math.isnan(result.error.values[0, 0])
    assert math.isfinite(result.order.item())


@pytest.mark.parametrize(
    "parts",
    [
        {"b": (1 / 6, 1 / 3, 1 / 3, 1 / 5)},
        {"b": (1 / 6, 1 / 3, 1 / 6, 1 / 3)},
        {"a": ((), (1 / 2,), (1 / 2, 0.0), (0.0, 0.0, 1.0))},
        {"c": (0.0, 1 / 2, 1 / 2, 0.9)},
    ],
    ids=["b sums to 31/30", "b swapped", "a misplaced", "c"],
)
def test_a_broken_method_is_called_low(monkeypatch, parts):
    broken = partial(explicit_attempt, dataclasses.replace(RK4, **parts))
    monkeypatch.setitem(steppers._METHODS, ct.RK4, broken)
    result = measure_order(driven(), ct.RK4, DTS, reference=driven_solution)
    assert result.verdict.item() == "low"
    assert result.order.item() < 3.2


def test_result_is_labelled():
    result = measure_order(driven(), ct.Heun(dt=17.0), DTS, reference=driven_solution)
    for variable in result.variables.values():
        assert {"long_name", "units"} <= set(variable.attrs)
    assert {"tspan", "dtype", "device", "torch_version", "ctgate_version", "reference"} <= set(result.attrs)


@pytest.mark.parametrize(
    ("algs", "dts", "options", "error", "message"),
    [
        (ct.Dopri5, DTS, {}, TypeError, r"it must be a fixed-step method such as ct.RK4"),
        ([ct.Dopri5()], DTS, {}, TypeError, r"algs has Dopri5.*use ct.convergence.work_precision"),
        ([ct.Euler, ct.Euler(dt=0.1)], DTS, {}, ValueError, r"algs has Euler twice"),
        ([], DTS, {}, ValueError, r"algs is empty"),
        (ct.Euler, [0.1, 0.2], {}, ValueError, r"dts is \[0.1, 0.2\]; it must have at least three different"),
        (ct.Euler, [0.1, 0.2, 0.1], {}, ValueError, r"at least three different step sizes"),
        (ct.Euler, [0.1, 0.2, -0.1], {}, ValueError, r"dt is -0.1; it must be positive"),
        (
            ct.Euler,
            DTS,
            {"reference": torch.zeros(2)},
            ValueError,
            r"reference gives shape \(2,\); it must be",
        ),
        (ct.Euler, DTS, {"confidence": 2.0}, ValueError, r"confidence is 2.0"),
    ],
)
def test_bad_arguments(algs, dts, options, error, message):
    with pytest.raises(error, match=message):
        unchecked(measure_order)(driven(), algs, dts, **{"reference": driven_solution, **options})


def test_a_reference_that_fails_is_an_error_of_its_own():
    empty = ct.Field(lambda t, h, u: h * math.nan, state_size=1)
    prob = ct.ODEProblem(empty, torch.tensor([1.0], dtype=torch.float64), (0.0, 2.0))
    with pytest.raises(ct.SolveError, match=r"dh/dt is not finite at t = 0"):
        measure_order(prob, ct.Euler, DTS)
