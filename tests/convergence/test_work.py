"""Work against precision: errors and gradients in closed form, costs that can be counted by hand."""

import math

import numpy as np
import pytest
import torch

import ctgate as ct
from ctgate.convergence import make_reference, work_precision
from tests.convergence.problems import TAU, decay, driven, driven_solution, euler_decay
from tests.typechecker import unchecked

DTS = [0.25, 0.125, 0.0625, 0.03125]
TOLS = [1e-4, 1e-5, 1e-6, 1e-7, 1e-8]


def total(sol: ct.Solution) -> torch.Tensor:
    return sol.hs[-1].sum()


def test_states_and_costs_of_a_fixed_step_method():
    result = work_precision(
        decay(), [ct.Euler, ct.Heun], dts=DTS, reference=lambda t: math.exp(-t / TAU) * decay().h0
    ).sel(algorithm="Euler")
    for k, dt in enumerate(DTS):
        expected = 3.0 * abs(euler_decay(dt) - math.exp(-2.0 / TAU))
        assert float(result.setting[k]) == dt
        assert float(result.error[k]) == pytest.approx(expected, rel=1e-10)
        assert int(result.steps[k]) == int(result.evaluations[k]) == round(2.0 / dt)
    assert result.verdict.item() == "right"
    assert result.expected_slope.item() == 1.0
    assert result.setting_kind.item() == "dt"
    assert bool((result.wall_time > 0).all())
    assert "gradient_error" not in result


def test_gradients_of_a_fixed_step_method():
    """d h(2) / dh0 = (1 - dt/tau)^n; the weights see no input and no recurrence."""
    prob = decay(samples=1)
    prob.field.weight_hh.requires_grad_(False)
    result = work_precision(prob, ct.Euler, dts=DTS, loss=total)
    exact = math.exp(-2.0 / TAU)
    for k, dt in enumerate(DTS):
        # The input is zero, so is its weights' gradient; the one of h0 is what is left.
        assert float(result.gradient_error[0, k]) == pytest.approx(
            abs(euler_decay(dt) / exact - 1.0), rel=1e-8
        )
    assert result.gradient_verdict.item() == "right"
    assert result.attrs["sensealg"] == "DiscreteAdjoint(checkpoints=None)"


def test_a_tensor_that_is_small_is_not_hidden_by_a_large_one():
    """The gradients of h0 and of a weight differ by 1e6; each is measured against itself."""
    prob = driven()
    result = work_precision(prob, ct.Heun, dts=DTS, loss=lambda sol: 1e6 * sol.hs[-1].sum())
    same = work_precision(prob, ct.Heun, dts=DTS, loss=total)
    np.testing.assert_allclose(result.gradient_error, same.gradient_error, rtol=1e-6)


@pytest.mark.parametrize("method", [ct.Bosh3, ct.Dopri5, ct.Dopri8])
def test_error_is_proportional_to_tolerance(method):
    result = work_precision(driven(), method(), TOLS, reference=driven_solution)
    assert result.setting_kind.item() == "tolerance"
    assert result.slope.item() == pytest.approx(1.0, abs=0.35)  # one problem: the controller's noise is in it
    evaluations = result.evaluations.values[0]
    assert bool((np.diff(evaluations) >= 0).all())
    assert evaluations[-1] > evaluations[0]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (ct.Tsit5, 1.0),
        (ct.Rosenbrock23, 2.0 / 3.0),
        (ct.Radau, 5.0 / 4.0),
        (ct.BDF, 5.0 / 6.0),
        (ct.LSODA, 5.0 / 6.0),
    ],
)
def test_what_follows_from_a_tolerance_follows_from_the_method(method, expected):
    """The error estimate is O(dt^q) and the error O(dt^p), so the error follows tol^(p/q)."""
    result = work_precision(driven(), method, TOLS[:4], reference=driven_solution)
    assert result.algorithm.item() == method.__name__
    assert result.expected_slope.item() == pytest.approx(expected)
    assert result.slope.item() == pytest.approx(expected, abs=0.25)
    assert result.verdict.item() == "right"


@pytest.mark.parametrize(("method", "expected"), [(ct.Tsit5, 1.0), (ct.Rosenbrock23, 2.0 / 3.0)])
def test_gradients_of_the_native_methods_follow_the_tolerance(method, expected):
    result = work_precision(driven(), method(), TOLS[:4], loss=total)
    assert result.gradient_slope.item() == pytest.approx(expected, abs=0.25)
    assert result.gradient_verdict.item() == "right"


def test_scipy_s_methods_beside_others_and_without_a_gradient():
    result = work_precision(driven(), [ct.Radau, ct.Dopri5()], TOLS[:3], reference=driven_solution)
    assert list(result.algorithm.values) == ["Radau", "Dopri5"]
    with pytest.raises(ValueError, match=r"alg is Radau\(.*no gradient passes through scipy's steps"):
        work_precision(driven(), ct.Radau, TOLS, loss=total)


def test_backsolve_counts_its_reverse_pass():
    result = work_precision(driven(), ct.Dopri5, TOLS, loss=total, sensealg=ct.BacksolveAdjoint())
    assert bool((result.evaluations_backward > 0).all())
    assert bool((result.gradient_error > 0).all())
    assert result.gradient_slope.item() == pytest.approx(1.0, abs=0.4)
    assert result.attrs["sensealg"] == "BacksolveAdjoint(tolerance=0.01)"


def test_the_discrete_adjoint_takes_the_accepted_steps_again_and_no_others():
    """Seven stages, of which the last is the next step's first."""
    result = work_precision(driven(), ct.Dopri5, TOLS, loss=total)
    np.testing.assert_array_equal(result.evaluations_backward, 1 + 6 * result.steps)


def test_methods_with_different_numbers_of_settings_are_padded():
    result = work_precision(driven(), [ct.Dopri5(), ct.RK4], TOLS, dts=DTS[:3], reference=driven_solution)
    assert result.sizes == {"algorithm": 2, "point": 5}
    assert list(result.status.sel(algorithm="RK4").values[3:]) == ["absent", "absent"]
    assert np.isnan(result.setting.sel(algorithm="RK4").values[3:]).all()
    assert list(result.expected_slope.values) == [1.0, 4.0]
    assert result.verdict.sel(algorithm="RK4").item() == "right"


def test_parameters_of_the_problem_are_the_ones_used():
    prob = driven()
    replaced = ct.remake(prob, parameters={"weight_ih": torch.zeros_like(prob.field.weight_ih)})
    result = work_precision(replaced, ct.RK4, dts=DTS, reference=lambda t: math.exp(-t) * prob.h0)
    assert result.verdict.item() == "right"
    assert prob.field.weight_ih.grad is None


def test_repeats_take_the_shortest_time():
    once = work_precision(driven(), ct.RK4, dts=[0.05], reference=driven_solution, repeats=2)
    assert once.attrs["repeats"] == 2
    assert once.verdict.item() == "undetermined"
    assert float(once.wall_time[0, 0]) > 0.0


def test_result_is_labelled():
    result = work_precision(driven(), [ct.Dopri5], TOLS, loss=total)
    for variable in result.variables.values():
        assert {"long_name", "units"} <= set(variable.attrs)
    assert {"tspan", "dtype", "device", "torch_version", "ctgate_version"} <= set(result.attrs)


@pytest.mark.parametrize(
    ("algs", "options", "error", "message"),
    [
        (ct.Dopri5, {}, ValueError, r"tols is None and algs has Dopri5, which needs it"),
        (ct.RK4, {"tols": TOLS}, ValueError, r"dts is None and algs has RK4, which needs it"),
        (
            ct.Dopri5,
            {"tols": [1e-3, 1e-3]},
            ValueError,
            r"tols is \[0.001, 0.001\]; it must be different positive",
        ),
        (
            ct.RK4,
            {"dts": [0.1, 0.0]},
            ValueError,
            r"dts is \[0.1, 0.0\]; it must be different positive numbers",
        ),
        (ct.RK4, {"dts": []}, ValueError, r"dts is \[\]"),
        ("rk4", {"dts": DTS}, TypeError, r"algs has 'rk4'; it must be a method such as ct.Dopri5\(\)"),
        ([ct.RK4, ct.RK4(dt=0.1)], {"dts": DTS}, ValueError, r"algs has RK4 twice"),
        ([], {"dts": DTS}, ValueError, r"algs is empty"),
        (ct.RK4, {"dts": DTS, "repeats": 0}, ValueError, r"repeats is 0; it must be a positive integer"),
        (
            ct.RK4,
            {"dts": DTS, "loss": lambda sol: sol.hs},
            ValueError,
            r"loss gives a tensor of shape \(1, 2, 1\)",
        ),
        (
            ct.RK4,
            {"dts": DTS, "loss": lambda sol: torch.tensor(1.0)},
            ValueError,
            r"requires_grad=False; it must be a scalar that depends on the solution",
        ),
    ],
)
def test_bad_arguments(algs, options, error, message):
    with pytest.raises(error, match=message):
        unchecked(work_precision)(driven(), algs, **options)


def test_a_reference_can_be_made_once():
    prob = driven()
    reference = make_reference(prob, saveat=[1.0, 2.0], loss=total)
    given = work_precision(prob, ct.Heun, dts=DTS, loss=total, saveat=[1.0, 2.0], reference=reference)
    own = work_precision(prob, ct.Heun, dts=DTS, loss=total, saveat=[1.0, 2.0])
    assert given.gradient_error.equals(own.gradient_error)
    assert given.error.equals(own.error)
    with pytest.raises(
        ValueError, match=r"reference was made for saveat = \[1.0, 2.0\]; it must be for \[2.0\]"
    ):
        work_precision(prob, ct.Heun, dts=DTS, reference=reference)
    stateless = make_reference(prob)
    with pytest.raises(ValueError, match=r"reference was made without loss"):
        work_precision(prob, ct.Heun, dts=DTS, reference=stateless, loss=total)
    with pytest.raises(ValueError, match=r"reference gives shape \(1, 2, 1\)"):
        work_precision(decay(), ct.Heun, dts=DTS, reference=stateless)


def test_a_given_solution_serves_the_states_and_the_gradient_is_solved_for():
    given = work_precision(driven(), ct.Heun, dts=DTS, loss=total, reference=driven_solution)
    own = work_precision(driven(), ct.Heun, dts=DTS, loss=total)
    assert given.gradient_error.equals(own.gradient_error)
    assert given.attrs["reference_doubt"] == 0.0 < own.attrs["reference_doubt"]
