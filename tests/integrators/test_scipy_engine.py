"""scipy's solvers on our fields: accuracy, knots, failures, counts."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm

import ctgate as ct
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import NoInput, intervals
from ctgate.integrators.recorder import Stats
from ctgate.integrators.scipy import evaluate, integrate_sample, numpy_closures
from ctgate.retcode import Halt, ReturnCode

METHODS = ("Radau", "BDF", "LSODA")
NONE = NoInput()


def run(method, rhs, jacobian, h0, *, cuts=((0.0, 1.0, NONE),), rtol=1e-6, atol=1e-8, **options):
    given = {"first_step": None, "max_step": float("inf"), "max_steps": 100_000, "on_step": lambda *_: None}
    return integrate_sample(
        method, rhs, jacobian, cuts, np.asarray(h0, dtype=np.float64), rtol, atol, **{**given, **options}
    )


def run_problem(prob, method, sample=(), **options):
    dynamics = Dynamics(prob, Stats(method, "scipy", ""))
    rhs, jacobian = numpy_closures(dynamics, sample)
    cuts = [tuple(cut) for cut in intervals(prob.control, *prob.tspan)]
    return run(method, rhs, jacobian, prob.h0[sample].numpy(), cuts=cuts, **options), dynamics.stats


# Eigenvalues -1, -30 and -1e4 in directions that are not orthogonal.
_BASIS = np.array([[1.0, 0.5, -0.2], [0.3, 1.0, 0.4], [-0.5, 0.2, 1.0]])
STIFF = _BASIS @ np.diag([-1.0, -30.0, -1e4]) @ np.linalg.inv(_BASIS)
START = np.array([1.0, -2.0, 0.5])


def stiff_rhs(u, t, h):
    return STIFF @ h


def stiff_jacobian(u, t, h):
    return STIFF


@pytest.mark.parametrize("method", METHODS)
def test_stiff_linear_system_against_the_matrix_exponential(method):
    result = run(method, stiff_rhs, stiff_jacobian, START)
    times = np.linspace(0.0, 1.0, 301)
    exact = np.stack([expm(STIFF * t) @ START for t in times])
    assert result.code is ReturnCode.SUCCESS
    assert result.ts[0] == 0.0
    assert result.ts[-1] == 1.0
    # Explicit steps would need 1e4 / 3.3; multistep methods lose a factor of some tens over the run.
    assert len(result.pieces) < 600
    assert np.abs(evaluate(result, times) - exact).max() < 100 * 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_one_interval_takes_the_steps_of_scipys_own_driver(method):
    limits = {"first_step": 1e-3, "max_step": 0.05}
    result = run(method, stiff_rhs, stiff_jacobian, START, **limits)
    own = solve_ivp(
        lambda t, y: STIFF @ y,
        (0.0, 1.0),
        START,
        method=method,
        jac=lambda t, y: STIFF,
        rtol=1e-6,
        atol=1e-8,
        dense_output=True,
        **limits,
    )
    np.testing.assert_array_equal(result.ts, own.t)
    np.testing.assert_allclose(result.hs, own.y.T, rtol=1e-12, atol=1e-15)
    times = np.linspace(0.0, 1.0, 77)
    np.testing.assert_allclose(evaluate(result, times), own.sol(times).T, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_robertson(method):
    def robertson(t, h, u):
        a, b, c = h.unbind(-1)
        loss, gain = -0.04 * a + 1e4 * b * c, 3e7 * b * b
        return torch.stack([loss, -loss - gain, gain], dim=-1)

    h0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    prob = ct.ODEProblem(ct.Field(robertson), h0, (0.0, 40.0))
    result, _ = run_problem(prob, method, rtol=1e-6, atol=1e-10)
    # Hairer and Wanner II, section IV.10: the values at t = 40.
    published = [0.7158270688, 9.185534765e-6, 0.2841637457]
    assert result.code is ReturnCode.SUCCESS
    np.testing.assert_allclose(result.hs[-1], published, rtol=2e-5)
    np.testing.assert_allclose(result.hs.sum(-1), 1.0, rtol=1e-9)


SIZE, CHANNELS = 3, 2


@pytest.fixture
def gated():
    """A batch of two GRU cells whose slowest and fastest units lie three decades apart, with jumps."""
    generator = torch.Generator().manual_seed(3)
    tau = torch.tensor([1e-3, 0.1, 1.0], dtype=torch.float64)
    field = ct.MultiGate(CHANNELS, SIZE, tau=tau, generator=generator, dtype=torch.float64)
    ts = [0.0, 0.4, 0.9, 1.7, 2.0]
    xs = 2.0 * torch.randn(4, 2, CHANNELS, generator=generator, dtype=torch.float64)
    h0 = torch.randn(2, SIZE, generator=generator, dtype=torch.float64)
    return ct.ODEProblem(field, h0, (0.0, 2.0), ct.ZeroOrderHold(ts, xs))


def gated_truth(prob, sample, times):
    """The same cell in numpy, integrated piece by piece."""
    weights = {name: value.detach().numpy() for name, value in prob.field.named_parameters()}
    recurrent, direct, bias = (weights[name] for name in ("weight_hh", "weight_ih", "bias"))
    tau = np.array([1e-3, 0.1, 1.0])
    edges = [0.0, 0.4, 0.9, 1.7, 2.0]
    xs = prob.control.xs.numpy()[:, sample]
    h, states = prob.h0[sample].numpy(), []
    for start, stop, x in zip(edges, edges[1:], xs, strict=False):

        def slope(t, h, x=x):
            pre = recurrent @ h + direct @ x + bias
            return (np.tanh(pre[SIZE:]) - h) / (1.0 + np.exp(-pre[:SIZE])) / tau

        inside = [t for t in times if start < t <= stop]
        wanted = sorted({*inside, stop})
        piece = solve_ivp(slope, (start, stop), h, method="Radau", rtol=1e-11, atol=1e-13, t_eval=wanted)
        states.extend(piece.y.T[: len(inside)])
        h = piece.y[:, -1]
    return np.array(states)


@pytest.mark.parametrize("method", METHODS)
def test_gated_cell_under_jumps(gated, method):
    result, stats = run_problem(gated, method, (1,))
    times = np.array([0.05, 0.4, 0.41, 1.0, 1.7, 1.7003, 2.0])
    assert result.code is ReturnCode.SUCCESS
    assert set(gated.control.knots) <= set(result.ts)
    np.testing.assert_allclose(evaluate(result, times), gated_truth(gated, 1, times), atol=5e-5, rtol=0)
    assert stats.evaluations > len(result.pieces)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_does_not_see_the_others(gated, method):
    alone = ct.remake(
        gated, h0=gated.h0[1:], control=ct.ZeroOrderHold(gated.control.ts, gated.control.xs[:, 1:])
    )
    together, _ = run_problem(gated, method, (1,), rtol=1e-4)
    single, _ = run_problem(alone, method, (0,), rtol=1e-4)
    np.testing.assert_array_equal(together.ts, single.ts)
    np.testing.assert_array_equal(together.hs, single.hs)


def test_an_input_is_shared_and_a_state_has_no_batch(gated):
    shared = ct.ZeroOrderHold(gated.control.ts, gated.control.xs[:, 0])
    batched, _ = run_problem(ct.remake(gated, control=shared), "Radau", (1,), rtol=1e-4)
    single, _ = run_problem(ct.remake(gated, control=shared, h0=gated.h0[1]), "Radau", rtol=1e-4)
    np.testing.assert_allclose(batched.hs[-1], single.hs[-1], rtol=1e-12)


@pytest.mark.parametrize("method", ["Radau", "BDF"])
def test_the_jacobian_saves_evaluations(gated, method):
    """Finite differences cost one evaluation per unit each time, which scipy does not even count."""
    calls = 0
    dynamics = Dynamics(gated, Stats(method, "scipy", ""))
    rhs, jacobian = numpy_closures(dynamics, (0,))

    def counted(u, t, h):
        nonlocal calls
        calls += 1
        return rhs(u, t, h)

    cuts = [tuple(cut) for cut in intervals(gated.control, *gated.tspan)]
    analytic = run(method, counted, jacobian, gated.h0[0].numpy(), cuts=cuts)
    with_jacobian, calls = calls, 0
    differences = run(method, counted, None, gated.h0[0].numpy(), cuts=cuts)
    np.testing.assert_allclose(analytic.hs[-1], differences.hs[-1], atol=1e-5)
    assert dynamics.stats.evaluations == with_jacobian + calls
    assert with_jacobian <= calls - SIZE * len(cuts)


def test_radau_goes_on_with_its_step_at_a_knot():
    """Thirty knots in a smooth problem: no cautious first step at each of them."""

    def slow(u, t, h):
        return -0.1 * h

    def matrix(u, t, h):
        return np.array([[-0.1]])

    edges = np.linspace(0.0, 30.0, 31)
    cuts = [(a, b, NONE) for a, b in itertools.pairwise(edges)]
    result = run("Radau", slow, matrix, [1.0], cuts=cuts, rtol=1e-4, atol=1e-6)
    assert len(result.pieces) < 30 + 5
    np.testing.assert_allclose(result.hs[-1], np.exp(-3.0), rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_float32(gated, method):
    half = ct.MultiGate(CHANNELS, SIZE, tau=torch.tensor([1e-3, 0.1, 1.0]), dtype=torch.float32)
    half.load_state_dict({name: value.float() for name, value in gated.field.state_dict().items()})
    control = ct.ZeroOrderHold(gated.control.ts, gated.control.xs.float())
    prob = ct.ODEProblem(half, gated.h0.float(), gated.tspan, control)
    result, _ = run_problem(prob, method, (0,), rtol=1e-4, atol=1e-6)
    assert result.code is ReturnCode.SUCCESS
    assert result.hs.dtype == np.float64
    times = np.array([0.4, 1.0, 2.0])
    np.testing.assert_allclose(evaluate(result, times), gated_truth(gated, 0, times), atol=1e-3, rtol=0)


def square(u, t, h):
    return h**2


def square_jacobian(u, t, h):
    return np.diag(2.0 * h)


@pytest.mark.parametrize("method", METHODS)
def test_a_pole_is_an_underflow_of_the_step(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(method, square, square_jacobian, [1.0], cuts=[(0.0, 2.0, NONE)])
    assert result.code is ReturnCode.DT_UNDERFLOW
    assert abs(result.ts[-1] - 1.0) < 1e-4
    assert np.isfinite(result.hs).all()
    assert len(result.ts) == len(result.hs) == len(result.pieces) + 1
    assert "that time cannot resolve" in result.detail


@pytest.mark.parametrize("method", METHODS)
def test_a_derivative_that_ends_is_unstable(method):
    """dh/dt = sqrt(1/2 - t) has no value after t = 1/2."""

    def ending(u, t, h):
        with np.errstate(invalid="ignore"):
            return np.sqrt(0.5 - t + 0.0 * h)

    result = run(method, ending, lambda u, t, h: np.zeros((1, 1)), [0.0])
    assert result.code is ReturnCode.UNSTABLE
    assert result.ts[-1] < 0.5 + 1e-12
    assert np.isfinite(result.hs).all()
    exact = (0.5**1.5 - (0.5 - result.ts.clip(max=0.5)) ** 1.5) / 1.5
    np.testing.assert_allclose(result.hs[:, 0], exact, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", ["dh/dt", "Jacobian"])
def test_what_is_not_finite_at_the_start_is_unstable(method, part):
    def rhs(u, t, h):
        return h * (np.nan if part == "dh/dt" else -1e4)

    result = run(method, rhs, lambda u, t, h: np.full((1, 1), np.nan), [1.0])
    if method == "LSODA" and part == "Jacobian":
        # It asks for the Jacobian when it has found the problem to be stiff.
        assert len(result.ts) > 1
    else:
        np.testing.assert_array_equal(result.ts, [0.0])
        np.testing.assert_array_equal(evaluate(result, np.array([0.0])), [[1.0]])
    assert result.code is ReturnCode.UNSTABLE
    assert f"{part} is not finite" in result.detail


@pytest.mark.parametrize("method", ["Radau", "BDF"])
def test_a_trial_beyond_the_domain_is_tried_again(method):
    """dh/dt = -sqrt(h) log h has no value below zero, where the first step asked for would lead."""

    def rhs(u, t, h):
        return -np.sqrt(h) * (1.0 + h**2)

    def jacobian(u, t, h):
        return np.diag(-0.5 / np.sqrt(h) * (1.0 + 5.0 * h**2))

    result = run(method, rhs, jacobian, [10.0], first_step=0.5, cuts=[(0.0, 0.5, NONE)])
    own = solve_ivp(lambda t, y: -np.sqrt(y) * (1.0 + y**2), (0.0, 0.5), [10.0], method="DOP853", rtol=1e-11)
    assert result.code is ReturnCode.SUCCESS
    np.testing.assert_allclose(result.hs[-1], own.y[:, -1], rtol=1e-4)


def test_max_steps():
    result = run("BDF", stiff_rhs, stiff_jacobian, START, max_steps=7)
    assert result.code is ReturnCode.MAX_STEPS
    assert len(result.pieces) == 7
    assert "7 steps" in result.detail
    with pytest.raises(ValueError, match=r"t is 1\.0; it must be in"):
        evaluate(result, np.array([0.0, 1.0]))


def test_an_interval_without_length_is_passed_over():
    cuts = [(0.0, 0.0, NONE), (0.0, 1e-3, NONE), (1e-3, 1e-3, NONE)]
    result = run("Radau", stiff_rhs, stiff_jacobian, START, cuts=cuts)
    whole = run("Radau", stiff_rhs, stiff_jacobian, START, cuts=cuts[1:2])
    np.testing.assert_array_equal(result.ts, whole.ts)
    still = run("LSODA", stiff_rhs, stiff_jacobian, START, cuts=cuts[:1])
    assert still.code is ReturnCode.SUCCESS
    np.testing.assert_array_equal(still.hs, START[None])


def test_the_watcher_sees_every_step_and_may_end_the_run():
    seen = []

    def on_step(start, stop, h):
        seen.append((start, stop, h.copy()))
        if len(seen) == 5:
            raise Halt(ReturnCode.TERMINATED, "enough")

    cuts = [(0.0, 1e-4, NONE), (1e-4, 1.0, NONE)]
    result = run("Radau", stiff_rhs, stiff_jacobian, START, cuts=cuts, on_step=on_step)
    assert result.code is ReturnCode.TERMINATED
    assert result.detail == "enough"
    np.testing.assert_array_equal([start for start, _, _ in seen], result.ts[:-1])
    np.testing.assert_array_equal([stop for _, stop, _ in seen], result.ts[1:])
    np.testing.assert_array_equal([h for _, _, h in seen], result.hs[1:])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["on_step", "rhs"])
def test_ctrl_c_returns_what_is_there(method, place):
    def interrupt(wanted, t):
        if place == wanted and t > 0.3:
            raise KeyboardInterrupt

    def rhs(u, t, h):
        interrupt("rhs", t)
        return STIFF @ h

    result = run(
        method, rhs, stiff_jacobian, START, on_step=lambda start, stop, h: interrupt("on_step", stop)
    )
    assert result.code is ReturnCode.INTERRUPTED
    assert 0.1 < result.ts[-1] < 1.0
    exact = expm(STIFF * result.ts[-1]) @ START
    np.testing.assert_allclose(result.hs[-1], exact, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_raised_tolerance_is_noted(method):
    result = run(method, lambda u, t, h: -h, lambda u, t, h: -np.eye(1), [1.0], rtol=1e-15, atol=1e-3)
    assert result.code is ReturnCode.SUCCESS
    assert result.detail.count("`rtol` is too small") == 1


def test_warnings_of_the_field_pass():
    def noisy(u, t, h):
        warnings.warn("listen", UserWarning, stacklevel=1)
        return -h

    with pytest.warns(UserWarning, match="listen"):
        result = run("Radau", noisy, lambda u, t, h: -np.eye(1), [1.0])
    assert result.detail == ReturnCode.SUCCESS.message


def test_times_in_any_order_and_exact_at_nodes():
    result = run("LSODA", stiff_rhs, stiff_jacobian, START)
    order = np.random.default_rng(0).permutation(len(result.ts))
    np.testing.assert_array_equal(evaluate(result, result.ts[order]), result.hs[order])
    times = np.sort(np.random.default_rng(1).uniform(0.0, 1.0, 50))
    np.testing.assert_array_equal(evaluate(result, times[::-1]), evaluate(result, times)[::-1])
    assert evaluate(result, np.array([])).shape == (0, 3)


def test_a_field_that_needs_its_whole_batch_is_told():
    weights = torch.ones(2, 1, dtype=torch.float64)
    h0 = torch.ones(2, 1, dtype=torch.float64)
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: -weights * h), h0, (0.0, 1.0))
    with pytest.raises(ValueError, match="scipy's methods integrate each sample alone"):
        run_problem(prob, "Radau", (0,))
    listed = ct.ODEProblem(ct.Field(lambda t, h, u: [0.0]), h0, (0.0, 1.0))
    with pytest.raises(TypeError, match=r"returned list for dh/dt|\[0\.0\]"):
        run_problem(listed, "Radau", (0,))
