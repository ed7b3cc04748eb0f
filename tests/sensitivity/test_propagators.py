"""Transport over intervals: the map against autograd and naive products, the flow against scipy and closed
forms."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from torch import Tensor

import ctgate as ct
from ctgate.sensitivity.magnus import exponentials
from ctgate.sensitivity.propagators import propagators
from tests.typechecker import unchecked

F64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


class Wrapped(torch.nn.Module):
    """An equation of somebody else, which reads the time."""

    def forward(self, t: Tensor, h: Tensor, u: Tensor) -> Tensor:
        pull = torch.cos(t) * torch.tanh(h.flip(-1))
        return pull - h * (1.0 + 0.3 * torch.sin(t)) + u.sum(-1, keepdim=True)


KNOTS = torch.tensor([0.0, 0.8, 1.9, 2.6, 4.0], dtype=F64)
OPTIONS: dict[str, Any] = {"dtype": F64, "tau": 0.7}
FIELDS = {
    "Leaky": lambda: ct.Leaky(2, 3, alpha=0.6, generator=seeded(0), **OPTIONS),
    "Leaky-layernorm": lambda: ct.Leaky(2, 3, alpha=0.6, layernorm=True, generator=seeded(0), **OPTIONS),
    "ScalarGate": lambda: ct.ScalarGate(2, 3, generator=seeded(0), **OPTIONS),
    "MultiGate": lambda: ct.MultiGate(2, 3, generator=seeded(0), **OPTIONS),
    "GRU-after": lambda: ct.GRU(2, 3, generator=seeded(0), **OPTIONS),
    "GRU-before": lambda: ct.GRU(2, 3, reset="before", generator=seeded(0), **OPTIONS),
    "LSTM": lambda: ct.LSTM(2, 2, generator=seeded(0), **OPTIONS),
    "LTC": lambda: ct.LTC(2, 3, generator=seeded(0), **OPTIONS),
    "GatedRate": lambda: ct.GatedRate(2, 2, tau_z=2.0, tau_r=0.7, generator=seeded(0), **OPTIONS),
    "Stack": lambda: ct.Stack([cell(2, 2, generator=seeded(0), **OPTIONS) for cell in (ct.GRU, ct.LSTM)]),
    "Field": lambda: ct.Field(Wrapped(), state_size=3, input_size=2),
}


@pytest.fixture(params=FIELDS, ids=str)
def prob(request: pytest.FixtureRequest) -> ct.ODEProblem:
    """Three units of input, held, over 4 time units; two samples, weights of order 1."""
    return problem(FIELDS[request.param]())


def problem(field: ct.VectorField, control: ct.Control | None = None) -> ct.ODEProblem:
    with torch.no_grad():
        for number, parameter in enumerate(field.parameters()):
            if parameter.ndim:
                parameter.copy_(randn(*parameter.shape, seed=number + 5))
    h0 = 0.5 * randn(2, field.state_size or 3, seed=1)
    held = ct.ZeroOrderHold(KNOTS, randn(4, 2, 2, seed=2))
    return ct.ODEProblem(field, h0, (0.0, 4.0), control=held if control is None else control)


def autograd(function: Any, h: Tensor) -> Tensor:
    """d function(h) / dh (batch, state, state), samples being independent."""
    return torch.autograd.functional.jacobian(lambda x: function(x).sum(0), h).movedim(1, 0)


def naive_step(prob: ct.ODEProblem, t: float, dt: float, h: Tensor) -> Tensor:
    assert prob.control is not None
    return h + dt * prob.field(t, h, prob.control(t))


def steps_of(prob: ct.ODEProblem, sol: ct.Solution) -> list[tuple[float, float]]:
    ts = sol.ts.tolist()
    return [(a, b - a) for a, b in pairwise(ts)]


def test_the_map_is_what_autograd_finds_of_naive_steps(prob: ct.ODEProblem) -> None:
    sol = ct.solve(prob, ct.Euler(dt=0.5))
    edges = [0, 1, 4, len(sol.ts) - 1]
    found = propagators(sol, edges)
    assert found.discrete
    torch.testing.assert_close(found.times, sol.ts[edges], rtol=0.0, atol=0.0)
    steps = steps_of(prob, sol)
    for number, (first, last) in enumerate(pairwise(edges)):

        def several(h: Tensor, first: int = first, last: int = last) -> Tensor:
            for t, dt in steps[first:last]:
                h = naive_step(prob, t, dt, h)
            return h

        expected = autograd(several, sol.hs[first].detach())
        torch.testing.assert_close(found.phi[number], expected, rtol=1e-12, atol=1e-13)


def test_leak_and_coupling_add_up_to_the_jacobian_of_the_map(prob: ct.ODEProblem) -> None:
    """Of a wrong split the remainder would still be of second order: this is the test that can fail."""
    sol = ct.solve(prob, ct.Euler(dt=0.5))
    found = propagators(sol)
    both = torch.diag_embed(found.leak) + found.first
    for number, (t, dt) in enumerate(steps_of(prob, sol)):
        h = sol.hs[number].detach()
        expected = autograd(lambda x, t=t, dt=dt: naive_step(prob, t, dt, x), h)
        torch.testing.assert_close(both[number], expected, rtol=1e-13, atol=1e-13)
        assert prob.control is not None
        rate = prob.field.rate_drive(t, h, prob.control(t))[0].detach()
        torch.testing.assert_close(found.leak[number], 1.0 - dt * rate, rtol=1e-13, atol=1e-13)


def test_the_first_order_of_the_map_is_the_naive_sum(prob: ct.ODEProblem) -> None:
    sol = ct.solve(prob, ct.Euler(dt=0.5))
    steps = steps_of(prob, sol)
    parts = []
    for number, (t, dt) in enumerate(steps):
        h = sol.hs[number].detach()
        assert prob.control is not None
        leak = torch.diag_embed(1.0 - dt * prob.field.rate_drive(t, h, prob.control(t))[0].detach())
        full = autograd(lambda x, t=t, dt=dt: naive_step(prob, t, dt, x), h)
        parts.append((leak, full - leak))
    total = torch.zeros_like(parts[0][0])
    for chosen in range(len(parts)):
        product = torch.eye(total.shape[-1], dtype=F64)
        for number, (leak, coupling) in enumerate(parts):
            product = (coupling if number == chosen else leak) @ product
        total = total + product
    found = propagators(sol, [0, len(steps)])
    torch.testing.assert_close(found.first[0], total, rtol=1e-12, atol=1e-13)
    zeroth = torch.stack([leak for leak, _ in parts]).prod(0).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found.leak[0], zeroth, rtol=1e-12, atol=1e-14)


CONTROLS = {
    "held": None,
    "linear": ct.LinearInterpolation(KNOTS, randn(5, 2, 2, seed=2)),
    "cubic": ct.CubicHermite(KNOTS, randn(5, 2, 2, seed=2)),
}


@pytest.mark.parametrize("name", FIELDS, ids=str)
def test_the_flow_is_what_autograd_finds_of_a_tight_solve(name: str) -> None:
    control = list(CONTROLS.values())[list(FIELDS).index(name) % len(CONTROLS)]
    prob = problem(FIELDS[name](), control)
    tight = {"rtol": 1e-8, "atol": 1e-10}
    with torch.no_grad():
        sol = ct.solve(prob, ct.Dopri5(), **tight)
    found = propagators(sol, [0.3, 0.7, 1.0])

    def end(h: Tensor) -> Tensor:
        return ct.solve(ct.remake(prob, h0=h, tspan=(0.3, 1.0)), ct.Dopri5(), **tight).hs[-1]

    expected = autograd(end, sol(0.3))
    torch.testing.assert_close(found.phi[1] @ found.phi[0], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["MultiGate", "LSTM", "Field"])
def test_orders_of_the_flow_solve_their_equations(name: str) -> None:
    """dX_0/dt = -gamma X_0 and dX_1/dt = -gamma X_1 + R X_0 by scipy, from one knot to the next."""
    prob = problem(FIELDS[name]())
    with torch.no_grad():
        sol = ct.solve(prob, ct.Dopri5(), rtol=1e-6, atol=1e-8)
    found = propagators(sol, [0.5, 0.8, 1.1])
    n = prob.h0.shape[-1]
    for number, (start, stop) in enumerate([(0.5, 0.8), (0.8, 1.1)]):
        assert prob.control is not None
        u = prob.control(0.5 * (start + stop))

        def rhs(t: float, y: np.ndarray, u: Tensor = u) -> np.ndarray:
            h = sol(t)
            rate, _ = prob.field.rate_drive(t, h, u)
            full = autograd(lambda x: prob.field(t, x, u), h)
            gamma = rate[0].detach().numpy()
            coupling = full[0].numpy() + np.diag(gamma)
            zeroth, first = y[:n], y[n:].reshape(n, n)
            change = -gamma[:, None] * first + coupling @ np.diag(zeroth)
            return np.concatenate([-gamma * zeroth, change.reshape(-1)])

        y0 = np.concatenate([np.ones(n), np.zeros(n * n)])
        end = solve_ivp(rhs, (start, stop), y0, method="DOP853", rtol=1e-8, atol=1e-10).y[:, -1]
        np.testing.assert_allclose(found.leak[number, 0].numpy(), end[:n], rtol=1e-7)
        np.testing.assert_allclose(found.first[number, 0].numpy().reshape(-1), end[n:], rtol=0.0, atol=1e-7)


def test_constant_coefficients_are_exact() -> None:
    """Leak and coupling against the exponential of a block matrix, on steps that are long."""
    field = ct.Leaky(
        1, 3, alpha=0.8, phi=lambda x: x, tau=torch.tensor([0.1, 1.0, 5.0], dtype=F64), dtype=F64
    )
    weight = randn(3, 3, seed=3)
    with torch.no_grad():
        field.weight_hh.copy_(weight)
    control = ct.ZeroOrderHold(torch.tensor([0.0, 1.0, 3.0]), randn(2, 1, seed=4))
    sol = ct.solve(ct.ODEProblem(field, randn(3, seed=5), (0.0, 3.0), control=control), ct.RK4(dt=1.0))
    found = propagators(sol, [0.2, 2.9])
    gamma = np.diag(0.8 / np.array([0.1, 1.0, 5.0]))
    coupling = gamma @ weight.numpy()
    block = expm(2.7 * np.block([[-gamma, coupling], [np.zeros((3, 3)), -gamma]]))
    np.testing.assert_allclose(found.phi[0].numpy(), expm(2.7 * (coupling - gamma)), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.first[0].numpy(), block[:3, 3:], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.leak[0].numpy(), np.exp(-2.7 * np.diag(gamma)), rtol=1e-12)


def rotating(t: Tensor) -> Tensor:
    """A matrix that commutes with itself at no two times."""
    rows = [1.0 + torch.sin(t), 1.5 * torch.cos(2.0 * t), 0.7 * t, 0.5 + torch.cos(t) ** 2]
    return torch.stack(rows).reshape(2, 2)


class Turning(ct.VectorField):
    """dh/dt = -gamma(t) h + R(t) h."""

    autonomous = False

    def __init__(self) -> None:
        super().__init__(input_size=0, state_size=2)

    def rate_drive(self, t: Any, h: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t, dtype=F64)
        return (torch.stack([1.0 + t**2, 2.0 + torch.cos(t)]).expand(h.shape), h @ rotating(t).T)


def test_one_exponential_is_of_order_six() -> None:
    """The error of one stretch falls as its length to the seventh, of the whole and of its first order."""
    sol = ct.solve(ct.ODEProblem(Turning(), torch.zeros(2, dtype=F64), (0.0, 2.0)), ct.RK4(dt=1.0))
    lengths = np.array([0.2, 0.15, 0.11])
    stops = torch.from_numpy(0.3 + lengths)
    assert sol.prob is not None
    assert not isinstance(sol.dense, str)
    found = exponentials(sol.prob, sol.dense, 1.0, torch.full_like(stops, 0.3), stops)

    def rhs(t: float, y: np.ndarray) -> np.ndarray:
        gamma = np.array([1.0 + t**2, 2.0 + np.cos(t)])
        coupling = rotating(torch.tensor(t, dtype=F64)).numpy()
        zeroth, first, exact = y[:4].reshape(2, 2), y[4:8].reshape(2, 2), y[8:].reshape(2, 2)
        parts = (-gamma[:, None] * zeroth, coupling @ zeroth - gamma[:, None] * first)
        return np.concatenate([x.reshape(-1) for x in (*parts, (coupling - np.diag(gamma)) @ exact)])

    errors = []
    for k, length in enumerate(lengths):
        y0 = np.concatenate([np.eye(2).reshape(-1), np.zeros(4), np.eye(2).reshape(-1)])
        y = solve_ivp(rhs, (0.3, 0.3 + length), y0, method="DOP853", rtol=1e-13, atol=1e-15).y[:, -1]
        np.testing.assert_allclose(np.diag(found.leak[k].numpy()).reshape(-1), y[:4], rtol=0.0, atol=1e-10)
        errors.append([np.abs(found.first[k].numpy().reshape(-1) - y[4:8]).max()])
        errors[-1].append(np.abs(found.phi[k].numpy().reshape(-1) - y[8:]).max())
    slopes = np.polyfit(np.log(lengths), np.log(errors), 1)[0]
    assert (slopes > 6.4).all()


def test_a_step_is_cut_where_the_rate_moves_inside_it() -> None:
    r"""exp(-\int (1 + cos 20 t) dt) over steps of length 1: the oscillation is finer than the steps."""
    field = ct.Field(lambda t, h, u: -(1.0 + torch.cos(20.0 * t)) * h, state_size=1)
    sol = ct.solve(ct.ODEProblem(field, torch.ones(1, dtype=F64), (0.0, 2.0)), ct.RK4(dt=1.0))
    found = propagators(sol, [0.1, 2.0]).phi.item()
    exact = np.exp(-1.9 - (np.sin(40.0) - np.sin(2.0)) / 20.0)
    assert abs(found - exact) < 1e-8 * exact


def test_a_jump_that_no_control_told_of_is_found() -> None:
    field = ct.Field(lambda t, h, u: torch.where(t < 1.0 / 3.0, -1.0, -2.0) * h, state_size=1)
    sol = ct.solve(ct.ODEProblem(field, torch.ones(1, dtype=F64), (0.0, 1.0)), ct.RK4(dt=1.0))
    assert abs(propagators(sol, [0.0, 1.0]).phi.item() - np.exp(-5.0 / 3.0)) < 1e-7


def test_a_jacobian_that_is_not_finite_is_told() -> None:
    field = ct.Field(lambda t, h, u: -torch.sqrt(h) * 0.0, state_size=1)
    sol = ct.solve(ct.ODEProblem(field, torch.zeros(1, dtype=F64), (0.0, 1.0)), ct.RK4(dt=1.0))
    with pytest.raises(RuntimeError, match=r"the transport over \[0.0, 1.0\] is not finite"):
        propagators(sol)


def test_a_fast_unit_that_is_slaved_to_a_slow_one() -> None:
    """Rates 200 and 1 on Rosenbrock's long steps, against scipy's stiff solver."""
    field = ct.Leaky(0, 2, alpha=1.0, tau=torch.tensor([0.005, 1.0], dtype=F64), bias=True, dtype=F64)
    with torch.no_grad():
        field.weight_hh.copy_(torch.tensor([[0.2, 1.5], [0.3, 0.4]]))
    prob = ct.ODEProblem(field, torch.tensor([0.3, -0.8], dtype=F64), (0.0, 0.3))
    with torch.no_grad():
        sol = ct.solve(prob, ct.Rosenbrock23(), rtol=1e-5, atol=1e-7)
        tight = ct.solve(prob, ct.Radau(), rtol=1e-8, atol=1e-10)
    found = propagators(sol, [0.0, 0.3])

    def rhs(t: float, y: np.ndarray) -> np.ndarray:
        full = autograd(lambda x: field(t, x), tight(t)[None])[0]
        return (full.numpy() @ y.reshape(2, 2)).reshape(-1)

    expected = solve_ivp(rhs, (0.0, 0.3), np.eye(2).reshape(-1), method="Radau", rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.phi[0].numpy().reshape(-1), expected.y[:, -1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.leak[0, 1].item(), np.exp(-0.3), rtol=1e-12, atol=0.0)


def per_sample() -> ct.ODEProblem:
    ts = torch.tensor([[0.0, 0.1], [1.0, 0.9], [2.1, 2.2], [3.0, float("nan")]], dtype=F64)
    control = ct.LinearInterpolation(ts, randn(4, 2, 2, seed=6))
    field = ct.GRU(2, 3, generator=seeded(0), **OPTIONS)
    return ct.ODEProblem(field, 0.4 * randn(2, 3, seed=7), control.sample_support, control=control)


@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.LSODA(), ct.Euler(dt=0.25)], ids=repr)
def test_samples_with_times_of_their_own_are_what_they_are_alone(alg: Any) -> None:
    prob = per_sample()
    tight = {} if isinstance(alg, ct.Euler) else {"rtol": 1e-11, "atol": 1e-12}
    with torch.no_grad():
        sol = ct.solve(prob, alg, **tight)
    start, stop = prob.sample_spans()
    if isinstance(alg, ct.Euler):
        edges = torch.tensor([[0, 0], [3, 5], [len(sol.ts) - 1] * 2])
    else:
        edges = torch.stack([start, start + torch.tensor([0.4, 1.3]), stop])
    found = propagators(sol, edges)
    for sample in (0, 1):
        ts = prob.control.ts[:, sample]  # type: ignore[union-attr]
        ts = ts[: 4 - sample]
        control = ct.LinearInterpolation(ts, randn(4, 2, 2, seed=6)[: len(ts), sample])
        alone = ct.ODEProblem(prob.field, prob.h0[sample], (float(ts[0]), float(ts[-1])), control=control)
        with torch.no_grad():
            one = ct.solve(alone, alg, **tight)
        own = edges[:, sample].clamp(max=len(one.ts) - 1) if isinstance(alg, ct.Euler) else edges[:, sample]
        expected = propagators(one, own)
        for name in ("phi", "leak", "first"):
            torch.testing.assert_close(
                getattr(found, name)[:, sample], getattr(expected, name), rtol=1e-9, atol=1e-10
            )


def test_shared_steps_may_be_asked_at_times_per_sample() -> None:
    prob = problem(FIELDS["GRU-after"]())
    with torch.no_grad():
        sol = ct.solve(prob, rtol=1e-9, atol=1e-10)
    edges = torch.tensor([[0.5, 1.0], [2.0, 3.5]], dtype=F64)
    found = propagators(sol, edges)
    for sample in (0, 1):
        alone = propagators(sol, edges[:, sample])
        torch.testing.assert_close(found.phi[:, sample], alone.phi[:, sample], rtol=1e-9, atol=1e-11)
    steps = ct.solve(prob, ct.Euler(dt=0.5))
    numbers = torch.tensor([[0, 2], [5, 3]])
    mapped = propagators(steps, numbers)
    assert mapped.times.tolist() == [[0.0, float(steps.ts[2])], [float(steps.ts[5]), float(steps.ts[3])]]
    for sample in (0, 1):
        alone = propagators(steps, numbers[:, sample])
        torch.testing.assert_close(mapped.phi[:, sample], alone.phi[:, sample], rtol=1e-13, atol=1e-14)


def test_strength_scales_the_coupling_alone() -> None:
    sol = ct.solve(problem(FIELDS["MultiGate"]()), ct.Euler(dt=0.5))
    one, half, none = (propagators(sol, strength=strength) for strength in (1.0, 0.5, 0.0))
    torch.testing.assert_close(half.first, 0.5 * one.first)
    torch.testing.assert_close(half.leak, one.leak)
    torch.testing.assert_close(half.phi, torch.diag_embed(one.leak) + 0.5 * one.first)
    torch.testing.assert_close(none.phi, torch.diag_embed(one.leak))


def test_saved_times_do_not_matter() -> None:
    prob = problem(FIELDS["GRU-after"]())
    every, some = (ct.solve(prob, ct.Euler(dt=0.5), saveat=saveat) for saveat in (None, [0.3, 2.2]))
    torch.testing.assert_close(propagators(every).phi, propagators(some).phi, rtol=0.0, atol=0.0)


def test_single_precision_and_many_batch_dimensions() -> None:
    field = ct.GRU(2, 3, generator=seeded(0))
    h0 = randn(2, 2, 3, seed=1).float()
    control = ct.ZeroOrderHold(torch.arange(4.0), randn(3, 2, seed=2).float())
    prob = ct.ODEProblem(field, h0, (0.0, 3.0), control=control)
    double = ct.GRU(2, 3, dtype=F64)
    double.load_state_dict({name: value.double() for name, value in field.state_dict().items()})
    wide = ct.ZeroOrderHold(torch.arange(4.0), randn(3, 2, seed=2))
    for alg in (ct.Euler(dt=1.0), ct.Dopri5()):
        found = propagators(ct.solve(prob, alg))
        assert found.phi.dtype == torch.float32
        assert not found.phi.requires_grad
        exact = ct.solve(ct.ODEProblem(double, h0.double(), (0.0, 3.0), control=wide), alg)
        ends = [0, 3] if found.discrete else [0.0, 3.0]
        torch.testing.assert_close(
            propagators(ct.solve(prob, alg), ends).phi.double(),
            propagators(exact, ends).phi,
            rtol=2e-4,
            atol=2e-4,
        )


def test_long_trajectories_are_taken_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    from ctgate.sensitivity import segments

    prob = problem(FIELDS["LSTM"]())
    with torch.no_grad():
        sols = [ct.solve(prob, ct.Euler(dt=0.1)), ct.solve(prob, rtol=1e-8, atol=1e-9)]
    asked = [[0, 3, 30], [0.0, 0.4, 3.1]]
    whole = [propagators(sol, edges) for sol, edges in zip(sols, asked, strict=True)]
    monkeypatch.setattr(segments, "_BUDGET", 100)
    for sol, edges, expected in zip(sols, asked, whole, strict=True):
        found = propagators(sol, edges)
        torch.testing.assert_close(found.phi, expected.phi, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found.first, expected.first, rtol=1e-12, atol=1e-13)


def test_what_cannot_be_asked(tmp_path: Any) -> None:
    prob = problem(FIELDS["GRU-after"]())
    steps, flow = ct.solve(prob, ct.Euler(dt=0.5)), ct.solve(prob)
    ask = unchecked(propagators)
    with pytest.raises(TypeError, match="asked by step numbers, integers"):
        ask(steps, [0.0, 1.0])
    with pytest.raises(ValueError, match=r"between 0 and 99; they must be in 0 to"):
        ask(steps, [0, 99])
    with pytest.raises(ValueError, match=r"edges has 4.5; it must be in \[0.0, 4.0\]"):
        ask(flow, [0.0, 4.5])
    with pytest.raises(ValueError, match="must not decrease"):
        ask(flow, [1.0, 0.5])
    with pytest.raises(ValueError, match=r"edges has shape \(2, 5\)"):
        ask(flow, torch.zeros(2, 5))
    with pytest.raises(RuntimeError, match="dense"):
        ask(ct.solve(prob, ct.Euler(dt=0.5), dense=False))
    steps.save(tmp_path / "sol.nc")
    with pytest.raises(RuntimeError, match="loaded from a file"):
        ask(ct.load(tmp_path / "sol.nc"))
    with pytest.warns(RuntimeWarning, match="MAX_STEPS"):
        failed = ct.solve(prob, rtol=1e-9, max_steps=2)
    with pytest.raises(ValueError, match="ended with MAX_STEPS"):
        ask(failed)
    with torch.no_grad():
        prob.field.weight_hh.mul_(0.5)  # type: ignore[operator,union-attr]
    with pytest.raises(RuntimeError, match="weight_hh was changed since the solve"):
        ask(steps)
