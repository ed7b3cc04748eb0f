"""Order of the state between the steps, against scipy: inside one step, at knots, and over whole solves.

An extension of order q has a local error O(dt^(q + 1)) inside a step from an exact state. Errors are root
mean squares over samples, units and places inside the step, so that no zero of one error constant bends the
slope. Right-hand sides and inputs of the references are numpy's.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import ctgate as ct
from ctgate.algorithms import AdaptiveAlgorithm
from ctgate.integrators.runge_kutta import DOPRI5
from ctgate.integrators.steppers import TABLEAUS

Array = np.ndarray
Input = Callable[[float], Array]
RightHandSide = Callable[[float, Array, Array], Array]

ORDERS = [(ct.Bosh3, 3), (ct.Dopri5, 4), (ct.Tsit5, 4), (ct.Rosenbrock23, 2)]
WITHIN = 0.25
HUGE = {"rtol": 1e6, "atol": 1e6}
PLACES = (0.13, 0.31, 0.5, 0.68, 0.87)
# In the asymptotic range of every method, with errors above the references' own.
SIZES = (2.0**-4, 2.0**-5, 2.0**-6)
EDGES = np.arange(5.0)


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def draw(*shape: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


STATES = 0.6 * draw(6, 3, seed=1)
VALUES = draw(len(EDGES), 2, seed=4)


class TimedProblem:
    """h' = -h + tanh(1.2 W h + sin(1.7 t) v) + cos(t) / 2, which reads the time; no input."""

    weight, drive = draw(3, 3, seed=2), draw(3, seed=3)

    def torch_problem(self, start: float, stop: float) -> ct.ODEProblem:
        weight, drive = torch.from_numpy(self.weight), torch.from_numpy(self.drive)

        def rhs(t: float | torch.Tensor, h: torch.Tensor, u: torch.Tensor | None) -> torch.Tensor:
            t = torch.as_tensor(t, dtype=torch.float64)
            return -h + torch.tanh(1.2 * h @ weight.T + torch.sin(1.7 * t) * drive) + 0.5 * torch.cos(t)

        return ct.ODEProblem(ct.Field(rhs, state_size=3), torch.from_numpy(STATES), (start, stop))

    def numpy_rhs(self, t: float, h: Array, u: Array) -> Array:
        return -h + np.tanh(1.2 * h @ self.weight.T + math.sin(1.7 * t) * self.drive) + 0.5 * math.cos(t)

    def numpy_input(self, interval: int) -> Input:
        return lambda t: np.zeros(2)


class GatedProblem:
    """A GRU under an input that is smooth, jumps (``held``) or kinks (``linear``) at integer times, or jumps
    without saying so (``blind``)."""

    tau = np.array([0.5, 1.0, 1.6])

    def __init__(self, control: str) -> None:
        self.control = control
        self.w_ih, self.w_hh, self.b = draw(9, 2, seed=5), draw(9, 3, seed=6), draw(9, seed=7)

    def torch_problem(self, start: float, stop: float) -> ct.ODEProblem:
        field = ct.GRU(2, 3, tau=torch.from_numpy(self.tau), dtype=torch.float64).requires_grad_(False)
        with torch.no_grad():
            field.weight_ih.copy_(torch.from_numpy(self.w_ih))
            field.weight_hh.copy_(torch.from_numpy(self.w_hh))
            field.bias_ih.copy_(torch.from_numpy(self.b))
            field.bias_hh.zero_()
        return ct.ODEProblem(field, torch.from_numpy(STATES), (start, stop), self._torch_control())

    def _torch_control(self) -> ct.Control:
        ts, xs = torch.from_numpy(EDGES), torch.from_numpy(VALUES)
        if self.control == "held":
            return ct.ZeroOrderHold(ts, xs[:-1])
        if self.control == "linear":
            return ct.LinearInterpolation(ts, xs)
        if self.control == "blind":
            return ct.FunctionControl(lambda t: xs[torch.as_tensor(t).floor().long()], channels=2)

        def smooth(t: float | torch.Tensor) -> torch.Tensor:
            t = torch.as_tensor(t, dtype=torch.float64)
            return torch.stack([torch.sin(2.0 * t), torch.cos(1.3 * t)], -1)

        return ct.FunctionControl(smooth, channels=2)

    def numpy_rhs(self, t: float, h: Array, u: Array) -> Array:
        own_r, own_z, own_n = np.split(h @ self.w_hh.T, 3, -1)
        in_r, in_z, in_n = np.split(u @ self.w_ih.T + self.b, 3, -1)
        candidate = np.tanh(in_n + sigmoid(in_r + own_r) * own_n)
        return (1.0 - sigmoid(in_z + own_z)) * (candidate - h) / self.tau

    def numpy_input(self, interval: int) -> Input:
        if self.control == "smooth":
            return lambda t: np.array([math.sin(2.0 * t), math.cos(1.3 * t)])
        left, right = VALUES[interval], VALUES[interval + 1]
        if self.control == "linear":
            return lambda t: left + (t - EDGES[interval]) * (right - left)
        return lambda t: left


Problem = TimedProblem | GatedProblem
TIMED = TimedProblem()
SMOOTH, HELD, LINEAR, BLIND = map(GatedProblem, ("smooth", "held", "linear", "blind"))


def integrate(rhs: RightHandSide, u: Input, start: float, stop: float, state: Array) -> Array:
    """The state at ``stop`` by DOP853, on one piece of the input."""
    shape = state.shape
    done = solve_ivp(
        lambda t, h: rhs(t, h.reshape(shape), u(t)).ravel(),
        (start, stop),
        state.ravel(),
        "DOP853",
        rtol=1e-13,
        atol=1e-14,
    )
    assert done.success, done.message
    return done.y[:, -1].reshape(shape)


@functools.cache
def exact(problem: Problem, start: float, times: tuple[float, ...]) -> Array:
    """The solution from STATES at ``start``, at increasing times (time, sample, unit); knots at integers."""
    state, t, states = STATES, start, []
    for time in times:
        while t < time:
            stop = min(time, math.floor(t) + 1.0)
            state = integrate(problem.numpy_rhs, problem.numpy_input(math.floor(t)), t, stop, state)
            t = stop
        states.append(state)
    return np.stack(states)


def solve(
    problem: Problem, kind: type[AdaptiveAlgorithm], start: float, stop: float, dt: float
) -> ct.Solution:
    """Steps of constant size, whatever their errors."""
    with torch.no_grad():
        sol = ct.solve(
            problem.torch_problem(start, stop), kind(first_step=dt, max_step=dt), throw=True, **HUGE
        )
    assert sol.stats.engine == "native"
    assert sol.ts.diff().numpy() == pytest.approx(np.full(round((stop - start) / dt), dt), rel=1e-12)
    return sol


def root_mean_square(difference: Array) -> float:
    return float(np.sqrt((difference**2).mean()))


def slope(errors: Sequence[float], sizes: Sequence[float] = SIZES) -> float:
    assert min(errors) > 1e-13, "the reference's own error must not show"
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


def slope_inside_a_step(problem: Problem, kind: type[AdaptiveAlgorithm], starts: Sequence[float]) -> float:
    """One step of each size from an exact state at each start."""
    errors = []
    for start, dt in zip(starts, SIZES, strict=True):
        sol = solve(problem, kind, start, start + dt, dt)
        times = tuple(start + place * dt for place in PLACES)
        errors.append(root_mean_square(sol(times).numpy() - exact(problem, start, times)))
    return slope(errors)


@pytest.mark.parametrize(("kind", "order"), ORDERS)
@pytest.mark.parametrize("problem", [TIMED, SMOOTH], ids=["time", "gated"])
def test_order_inside_one_step(problem, kind, order):
    assert slope_inside_a_step(problem, kind, [0.4] * 3) == pytest.approx(order + 1, abs=WITHIN)


@pytest.mark.parametrize(("kind", "order"), ORDERS)
@pytest.mark.parametrize("problem", [HELD, LINEAR], ids=["held", "linear"])
def test_order_in_the_steps_that_end_and_begin_at_a_knot(problem, kind, order):
    """Two steps, the knot between them: what one knows of the input must not leak into the other. The second
    begins with the error of the first, which is of no lower order than what is measured."""
    knot, before, after = 2.0, [], []
    for dt in SIZES:
        sol = solve(problem, kind, knot - dt, knot + dt, dt)
        times = tuple(knot + (place - side) * dt for side in (1, 0) for place in PLACES)
        difference = sol(times).numpy() - exact(problem, knot - dt, times)
        before.append(root_mean_square(difference[: len(PLACES)]))
        after.append(root_mean_square(difference[len(PLACES) :]))
    assert slope(before) == pytest.approx(order + 1, abs=WITHIN)
    assert slope(after) == pytest.approx(order + 1, abs=WITHIN)


def test_a_jump_inside_a_step_shows():
    """What the knots are for, and that the measurement sees it: order 0 where the input hides its jump."""
    starts = [2.0 - 0.4 * dt for dt in SIZES]
    assert slope_inside_a_step(BLIND, ct.Dopri5, starts) == pytest.approx(1.0, abs=WITHIN)


def test_an_extension_with_wrong_weights_shows(monkeypatch):
    wrong = dataclasses.replace(DOPRI5, bubble=tuple(0.9 * weight for weight in DOPRI5.bubble))
    monkeypatch.setitem(TABLEAUS, ct.Dopri5, wrong)
    found = slope_inside_a_step(SMOOTH, ct.Dopri5, [0.4] * 3)
    assert found == pytest.approx(4.0, abs=WITHIN)


@pytest.mark.parametrize(("kind", "order"), ORDERS)
@pytest.mark.parametrize("problem", [HELD, LINEAR], ids=["held", "linear"])
def test_order_between_the_nodes_of_a_whole_solve(problem, kind, order):
    """Constant steps over two knots, read at times that are no nodes: the error of the nodes, O(dt^order),
    and that of the extension, O(dt^(q + 1))."""
    sizes = [2.0 * dt for dt in SIZES]
    times = tuple(np.sort(np.random.default_rng(8).uniform(0.0, 3.0, 20)).tolist())
    states = exact(problem, 0.0, times)
    errors = [root_mean_square(solve(problem, kind, 0.0, 3.0, dt)(times).numpy() - states) for dt in sizes]
    assert slope(errors, sizes) >= min(kind.order, order + 1) - WITHIN
