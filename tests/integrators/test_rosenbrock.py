"""The Rosenbrock pair: formula, orders, stability, gradients, and what it does when W has no inverse."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch.utils.checkpoint import checkpoint

from ctgate.controls import FunctionControl, LinearInterpolation, Piece, ZeroOrderHold
from ctgate.fields import GRU, LSTM, Field, Stack
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import NoInput, Step, intervals
from ctgate.integrators.recorder import Stats
from ctgate.integrators.rosenbrock import rosenbrock23_attempt, rosenbrock23_slopes
from ctgate.problem import ODEProblem

D = 1.0 / (2.0 + math.sqrt(2.0))


def make(field, h0, control=None, span=(0.0, 1.0)):
    return Dynamics(ODEProblem(field, h0, span, control=control), Stats("", "", ""))


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def one_step(dynamics, start, stop, h, estimate=True, slope=None):
    (cut,) = intervals(dynamics.prob.control, start, stop)
    return rosenbrock23_attempt(dynamics, Step(start, stop, stop - start, cut.u), h, slope, estimate)


def run(dynamics, dt, h, stop=1.0):
    """Steps of size dt, dh/dt handed on, and never across a knot."""
    (count,) = {round((cut.stop - cut.start) / dt) for cut in intervals(dynamics.prob.control, 0.0, stop)}
    for cut in intervals(dynamics.prob.control, 0.0, stop):
        slope = None
        for k in range(count):
            start = cut.start + k * dt
            attempt = rosenbrock23_attempt(dynamics, Step(start, start + dt, dt, cut.u), h, slope, True)
            h, slope = attempt.h, attempt.slope
    return h


def slope_of(sizes, errors):
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


def pendulum(t, h, u):
    """A pendulum in a field that turns, with friction that comes and goes."""
    x, v = h.unbind(-1)
    friction = (1.0 + 0.5 * torch.cos(3.0 * t)).to(h)
    return torch.stack((v, -torch.sin(x) * torch.exp(-0.3 * t).to(h) - friction * v * v.abs()), -1)


def pendulum_at(times, h0):
    def rhs(t, y):
        friction = 1.0 + 0.5 * math.cos(3.0 * t)
        return [y[1], -math.sin(y[0]) * math.exp(-0.3 * t) - friction * y[1] * abs(y[1])]

    done = solve_ivp(rhs, (0.0, max(times)), h0, method="DOP853", rtol=1e-13, atol=1e-14, t_eval=times)
    return torch.as_tensor(done.y.T)


def test_the_step_is_its_formula():
    """A Riccati equation with a forcing, where A and T are numbers and so is W."""
    t, dt, h = 0.3, 0.2, 0.7

    def f(t, h):
        return math.cos(t) - 2.0 * h * h

    a, by_time = -4.0 * h, -math.sin(t)
    w = 1.0 - D * dt * a
    k1 = (f(t, h) + D * dt * by_time) / w
    f1 = f(t + dt / 2, h + dt / 2 * k1)
    k2 = (f1 - k1) / w + k1
    new = h + dt * k2
    f2 = f(t + dt, new)
    k3 = (f2 - (6 + math.sqrt(2)) * (k2 - f1) - 2 * (k1 - f(t, h)) + D * dt * by_time) / w

    dynamics = make(Field(lambda t, h, u: torch.cos(t) - 2.0 * h * h), vector(h))
    own = one_step(dynamics, t, t + dt, vector(h))
    for value, wanted in ((own.h, new), (own.slope, f2), (own.error, dt / 6 * (k1 - 2 * k2 + k3))):
        assert value.item() == pytest.approx(wanted, rel=1e-13)
    bare = one_step(dynamics, t, t + dt, vector(h), estimate=False)
    assert bare.error is None
    assert torch.equal(bare.h, own.h)


def test_the_order_is_two_and_of_the_estimate_three():
    h0 = vector(1.2, -0.4)
    dynamics = make(Field(pendulum), h0)
    sizes = [1 / 16, 1 / 32, 1 / 64, 1 / 128]
    end = pendulum_at([1.0], h0)[0]
    errors = [float((run(dynamics, dt, h0) - end).norm()) for dt in sizes]
    assert slope_of(sizes, errors) == pytest.approx(2.0, abs=0.1)

    after = pendulum_at(sizes[::-1], h0).flip(0)
    steps = [one_step(dynamics, 0.0, dt, h0) for dt in sizes]
    local = [float((step.h - wanted).norm()) for step, wanted in zip(steps, after, strict=True)]
    assert slope_of(sizes, local) == pytest.approx(3.0, abs=0.1)
    estimates = [float(step.error.norm()) for step in steps]
    assert slope_of(sizes, estimates) == pytest.approx(3.0, abs=0.1)
    # The estimate is the error up to its next order, with the sign of new - exact or its opposite.
    ratio = estimates[-1] / local[-1]
    assert 0.5 < ratio < 2.0


@pytest.mark.parametrize("kind", ["function", "linear", "held"])
@pytest.mark.parametrize("cell", [GRU, LSTM])
def test_the_order_under_an_input(kind, cell):
    """Inputs that move inside a step, and knots between steps."""
    generator = torch.Generator().manual_seed(3)
    field = cell(2, 3, tau=0.5, dtype=torch.float64, generator=generator).requires_grad_(False)
    for parameter in field.parameters():
        parameter.mul_(2.0)
    ts = torch.linspace(0.0, 1.0, 3, dtype=torch.float64)
    xs = 3.0 * torch.randn(3, 4, 2, dtype=torch.float64, generator=generator)
    control = {
        "function": FunctionControl(lambda t: torch.stack((torch.sin(5 * t), torch.cos(4 * t))).expand(4, 2)),
        "linear": LinearInterpolation(ts, xs),
        "held": ZeroOrderHold(ts, xs[:2]),
    }[kind]
    h0 = 0.5 * torch.randn(4, field.state_size, dtype=torch.float64, generator=generator)
    dynamics = make(field, h0, control)

    state, start = h0, 0.0
    for cut in intervals(control, 0.0, 1.0):

        def rhs(t, y, u=cut.u):
            return field(t, torch.as_tensor(y).reshape(h0.shape), u(t)).numpy().ravel()

        done = solve_ivp(rhs, (start, cut.stop), state.ravel(), method="DOP853", rtol=1e-12, atol=1e-13)
        state, start = torch.as_tensor(done.y[:, -1]).reshape(h0.shape), cut.stop
    sizes = [1 / 32, 1 / 64, 1 / 128]
    errors = [float((run(dynamics, dt, h0) - state).norm()) for dt in sizes]
    assert slope_of(sizes, errors) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_moving_input_enters_the_time_derivative(per_sample):
    """A step of a stack under u(t) is that of the same equation with the input written into it."""
    generator = torch.Generator().manual_seed(5)
    options = {"dtype": torch.float64, "generator": generator}
    stack = Stack([GRU(2, 3, tau=0.01, layernorm=True, **options), LSTM(3, 2, tau=0.5, **options)])
    h = torch.randn(4, 7, dtype=torch.float64, generator=generator)

    def u(t):
        t = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1)
        return torch.cat((torch.sin(5.0 * t), torch.exp(-t)), -1).expand(4, 2)

    own = make(stack, h, FunctionControl(u))
    whole = make(Field(lambda t, h, _: stack(t, h, u(t))), h)
    start, dt = (vector(0.1, 0.2, 0.3, 0.4), vector(0.5, 0.1, 0.2, 0.3)) if per_sample else (0.2, 0.3)
    values = [
        rosenbrock23_attempt(dynamics, Step(start, start + dt, dt, v), h, None, True)
        for dynamics, v in ((own, Piece(u)), (whole, NoInput()))
    ]
    for value, wanted in zip(*values, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-13)


def test_the_continuous_extension_has_local_order_three():
    h0 = vector(1.2, -0.4)
    dynamics = make(Field(pendulum), h0)
    sizes = [1 / 32, 1 / 64, 1 / 128, 1 / 256]
    for theta in (0.25, 0.5, 0.8):
        wanted = pendulum_at([theta * dt for dt in sizes[::-1]], h0).flip(0)
        errors = []
        for dt, exact in zip(sizes, wanted, strict=True):
            step = Step(0.0, dt, dt, NoInput())
            left, right = rosenbrock23_slopes(dynamics, step, h0)
            end = one_step(dynamics, 0.0, dt, h0).h
            # Cubic Hermite in its Bernstein form, independent of the package's.
            points = [h0, h0 + dt * left / 3, end - dt * right / 3, end]
            powers = [(1 - theta) ** 3, 3 * theta * (1 - theta) ** 2, 3 * theta**2 * (1 - theta), theta**3]
            curve = sum(power * point for power, point in zip(powers, points, strict=True))
            # A quadratic: the chord is the mean of the slopes at both ends.
            torch.testing.assert_close(end - h0, dt * (left + right) / 2, rtol=1e-12, atol=1e-15)
            errors.append(float((curve - exact).norm()))
        assert slope_of(sizes, errors) == pytest.approx(3.0, abs=0.2)


@pytest.mark.parametrize("z", [-1e-3, -1.0, -30.0, -1e4, -1e9])
def test_the_stability_function(z):
    """R(z) = (1 + (1 - 2 d) z) / (1 - d z)^2, so a component that is infinitely fast is gone at once."""
    dynamics = make(Field(lambda t, h, u: z * h), vector(1.0))
    own = one_step(dynamics, 0.0, 1.0, vector(1.0)).h.item()
    assert own == pytest.approx((1 + (1 - 2 * D) * z) / (1 - D * z) ** 2, rel=1e-9)
    if z < -1e3:
        assert abs(own) < 6.0 / abs(z)


@pytest.mark.parametrize("rate", [1e4, 1e6, 1e8])
def test_stiff_accuracy(rate):
    """Prothero and Robinson, h' = -rate (h - cos t) - sin t. As rate dt grows the step from the slow solution
    ends dt^2 (1/2 - 1/(8 d)) cos t beside it, whatever was before: order 2 for every rate."""
    field = Field(lambda t, h, u: -rate * (h - torch.cos(t)) - torch.sin(t))
    dynamics = make(field, vector(1.0))
    for dt in (0.05, 0.025, 0.0125):
        error = run(dynamics, dt, vector(1.0)).item() - math.cos(1.0)
        wanted = dt**2 * (0.5 - 1.0 / (8.0 * D)) * math.cos(1.0)
        assert error == pytest.approx(wanted, rel=2.0 * dt + 10.0 / (rate * dt))
    far = run(dynamics, 0.05, vector(5.0)).item()
    assert far == pytest.approx(run(dynamics, 0.05, vector(1.0)).item(), abs=1e-12)


def test_samples_with_times_of_their_own_are_separate_steps():
    generator = torch.Generator().manual_seed(0)
    start, dt = torch.rand(2, 3, dtype=torch.float64, generator=generator), torch.full((2, 3), 0.1).double()
    dt = dt * (1.0 + torch.arange(6, dtype=torch.float64).reshape(2, 3))
    dt[1, 2] = 0.0
    h = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator)
    dynamics = make(Field(pendulum_in_columns), h)
    step = Step(start, start + dt, dt, NoInput())
    own, slopes = rosenbrock23_attempt(dynamics, step, h, None, True), rosenbrock23_slopes(dynamics, step, h)
    for i in range(2):
        for j in range(3):
            alone = make(Field(pendulum_in_columns), h[i, j])
            times = [float(x[i, j]) for x in (start, start + dt, dt)]
            single = Step(*times, NoInput())
            wanted = rosenbrock23_attempt(alone, single, h[i, j], None, True)
            for value, target in zip(own, wanted, strict=True):
                torch.testing.assert_close(value[i, j], target, rtol=1e-12, atol=1e-14)
            for value, target in zip(slopes, rosenbrock23_slopes(alone, single, h[i, j]), strict=True):
                torch.testing.assert_close(value[i, j], target, rtol=1e-12, atol=1e-14)
    assert torch.equal(own.h[1, 2], h[1, 2])


def pendulum_in_columns(t, h, u):
    x, v = h[..., :1], h[..., 1:]
    return torch.cat((v * torch.cos(t), -torch.sin(x) - (t * v) ** 2), -1)


@pytest.mark.parametrize("slope_given", [False, True])
def test_gradients_through_a_step(slope_given):
    """By state, times and weights, through Jacobian, T and the factorisation."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    weights = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    start, dt = vector(0.2, 0.5), vector(0.3, 0.7)

    def results(h, weights, start, dt):
        field = Field(lambda t, h, u: torch.tanh(h @ weights.T) * torch.cos(t) - 2.0 * h)
        dynamics = make(field, h.detach())
        step = Step(start, start + dt, dt, NoInput())
        slope = dynamics.rhs(step.u)(start, h) if slope_given else None
        attempt = rosenbrock23_attempt(dynamics, step, h, slope, True)
        return (*attempt, *rosenbrock23_slopes(dynamics, step, h))

    inputs = [x.clone().requires_grad_() for x in (h, weights, start, dt)]
    assert torch.autograd.gradcheck(results, inputs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["field", "constant field", "input", "constant input"])
def test_a_step_inside_a_checkpoint(kind):
    """Steps are taken again there, where torch.func does not differentiate. T is 0 for what is constant."""
    generator = torch.Generator().manual_seed(4)
    h = torch.randn(2, 3, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.randn(3, 3, dtype=torch.float64, generator=generator).requires_grad_()
    norm = torch.nn.LayerNorm(3, dtype=torch.float64)
    cell = GRU(1, 3, dtype=torch.float64, generator=generator)
    if kind.endswith("input"):
        moving = kind == "input"
        control = FunctionControl(
            lambda t: (
                torch.sin(weights[0, 0] * t).reshape(1) if moving else torch.ones(1, dtype=torch.float64)
            )
        )
        dynamics = make(cell, h.detach(), control)
    else:
        moving = kind == "field"
        field = Field(lambda t, h, u: norm(torch.tanh(h @ weights.T)) * (torch.cos(t) if moving else 1.0) - h)
        dynamics = make(field, h.detach())

    def run(h):
        return sum(part.square().sum() for part in one_step(dynamics, 0.2, 0.7, h))

    wanted = torch.autograd.grad(run(h), [h, weights], materialize_grads=True)
    repeated = checkpoint(run, h, use_reentrant=False)
    own = torch.autograd.grad(repeated, [h, weights], materialize_grads=True)
    for value, target in zip(own, wanted, strict=True):
        torch.testing.assert_close(value, target, rtol=1e-12, atol=1e-14)


def test_gradients_by_weights_of_a_gated_field():
    generator = torch.Generator().manual_seed(2)
    field = GRU(2, 3, tau=0.5, learn_tau=True, layernorm=True, dtype=torch.float64, generator=generator)
    h = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    control = LinearInterpolation(
        vector(0.0, 1.0), torch.randn(2, 2, 2, dtype=torch.float64, generator=generator)
    )
    names, values = zip(*field.named_parameters(), strict=True)

    def result(*values):
        prob = ODEProblem(
            field, h, (0.0, 1.0), control=control, parameters=dict(zip(names, values, strict=True))
        )
        return one_step(Dynamics(prob, Stats("", "", "")), 0.0, 0.6, h).h

    assert torch.autograd.gradcheck(result, [value.detach().requires_grad_() for value in values])
    batch = [torch.stack((value.detach(), 0.5 * value.detach())) for value in values]
    many = torch.func.vmap(result)(*batch)
    for k in range(2):
        torch.testing.assert_close(many[k], result(*(value[k] for value in batch)), rtol=1e-12, atol=1e-14)


def test_work_is_counted_and_a_known_slope_saves_some():
    generator = torch.Generator().manual_seed(2)
    field = GRU(0, 3, dtype=torch.float64, generator=generator)
    h = torch.zeros(3, dtype=torch.float64)
    dynamics = make(field, h)
    first = one_step(dynamics, 0.0, 0.5, h)
    assert dynamics.stats.evaluations == 3
    again = one_step(dynamics, 0.5, 1.0, first.h, slope=first.slope)
    assert dynamics.stats.evaluations == 5
    torch.testing.assert_close(again.h, one_step(dynamics, 0.5, 1.0, first.h).h, rtol=1e-14, atol=0.0)
    one_step(dynamics, 0.0, 0.5, h, estimate=False)
    assert dynamics.stats.evaluations == 10


@pytest.mark.parametrize("control", [ZeroOrderHold, LinearInterpolation])
def test_a_held_input_needs_no_time_derivative(control, monkeypatch):
    calls = []
    whole = GRU.input_jacobian
    monkeypatch.setattr(GRU, "input_jacobian", lambda *args: calls.append(args) or whole(*args))
    generator = torch.Generator().manual_seed(2)
    field = GRU(1, 3, dtype=torch.float64, generator=generator)
    h = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    held = control is ZeroOrderHold
    ts, xs = vector(0.0, 1.0), torch.ones(2, 2, 1, dtype=torch.float64)
    dynamics = make(field, h, control(ts, xs[:1] if held else xs))
    one_step(dynamics, 0.0, 0.5, h)
    own = control(vector(0.0, 1.0)[:, None].expand(2, 2), xs[:1] if held else xs)
    (piece,) = own.on_samples(vector(0.0, 0.1)[None], vector(0.5, 0.7)[None])
    step = Step(vector(0.0, 0.1), vector(0.5, 0.7), vector(0.5, 0.6), piece)
    rosenbrock23_attempt(dynamics, step, h, None, True)
    assert len(calls) == (0 if held else 2)
    beyond = control(ts, xs[:1] if held else xs, extrapolate="hold").on(2.0, 3.0)
    rosenbrock23_attempt(dynamics, Step(2.0, 3.0, 1.0, beyond), h, None, True)
    assert len(calls) == (0 if held else 2)


@pytest.mark.parametrize("solver", ["torch's", "one that skips zeros"])
def test_a_matrix_that_cannot_be_solved_spoils_its_sample_only(solver, monkeypatch):
    """W is 0 in the first sample and NaN in the last; neither raises, and neither passes as a result."""
    if solver != "torch's":
        exact = torch.linalg.lu_solve
        monkeypatch.setattr(torch.linalg, "lu_solve", lambda *args: exact(*args).nan_to_num(0.0, 0.0, 0.0))
    assert 1.0 - D * (1.0 / D) == 0.0
    rates = torch.tensor([[1.0 / D, 1.0 / D], [-1.0, -2.0], [0.0, math.nan]], dtype=torch.float64)
    h = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    dynamics = make(Field(lambda t, h, u: rates * h), h)
    own = one_step(dynamics, 0.0, 1.0, h, slope=torch.zeros_like(h))
    alone = make(Field(lambda t, h, u: rates[1] * h), h[1])
    wanted = one_step(alone, 0.0, 1.0, h[1], slope=torch.zeros_like(h[1]))
    for value, target in zip(own, wanted, strict=True):
        assert not torch.isfinite(value[[0, 2]]).any()
        torch.testing.assert_close(value[1], target, rtol=1e-12, atol=1e-15)
    assert torch.isfinite(one_step(dynamics, 0.0, 0.5, h).h[:2]).all()


@pytest.mark.parametrize("per_sample", [False, True])
def test_single_precision_stays_single(per_sample):
    generator = torch.Generator().manual_seed(2)
    field = GRU(1, 3, generator=generator)
    control = LinearInterpolation(torch.tensor([0.0, 1.0]), torch.tensor([[0.0], [2.0]]))
    h = torch.randn(4, 3, generator=generator)
    dynamics = make(field, h, control)
    (cut,) = intervals(control, 0.0, 1.0)
    ends = (vector(0.1, 0.2, 0.3, 0.4), vector(0.5, 0.5, 0.5, 0.5)) if per_sample else (0.1, 0.5)
    u = Piece(lambda t: 2.0 * t.to(h).unsqueeze(-1)) if per_sample else cut.u
    own = rosenbrock23_attempt(dynamics, Step(*ends, ends[1] - ends[0], u), h, None, True)
    assert {part.dtype for part in own} == {torch.float32}
    field64, h64 = field.double(), h.double()
    wide = make(field64, h64, LinearInterpolation(vector(0.0, 1.0), vector(0.0, 2.0).unsqueeze(-1)))
    u = Piece(lambda t: 2.0 * t.unsqueeze(-1)) if per_sample else intervals(wide.prob.control, 0.0, 1.0)[0].u
    wanted = rosenbrock23_attempt(wide, Step(*ends, ends[1] - ends[0], u), h64, None, True)
    torch.testing.assert_close(own.h.double(), wanted.h, rtol=1e-5, atol=1e-6)
