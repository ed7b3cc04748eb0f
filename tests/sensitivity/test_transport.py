"""Transport between two times and by lag: exact cases, published mistakes, and the first-order expansion."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.linalg import expm
from torch import Tensor

import ctgate as ct
from ctgate.sensitivity.propagators import propagators
from tests.typechecker import unchecked

F64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


def held(steps: int, channels: int = 2, batch: int = 2) -> ct.ZeroOrderHold:
    return ct.ZeroOrderHold(torch.arange(steps + 1, dtype=F64), randn(steps, batch, channels, seed=3))


def problem(field: ct.VectorField, steps: int = 12, batch: int = 2) -> ct.ODEProblem:
    h0 = 0.5 * randn(batch, field.state_size or 1, seed=4)
    return ct.ODEProblem(field, h0, (0.0, float(steps)), control=held(steps, batch=batch))


def gated(size: int = 3) -> ct.MultiGate:
    return ct.MultiGate(2, size, dtype=F64, generator=seeded(0))


def solved(prob: ct.ODEProblem, alg: Any = None, **options: Any) -> ct.Solution:
    with torch.no_grad():
        return ct.solve(prob, alg, **options)


# Exact cases.

WEIGHTS = {
    "zero": torch.zeros(2, 2, dtype=F64),
    "random": randn(2, 2, seed=5),
    "non-normal": torch.tensor([[0.5, 3.0], [0.0, 0.5]], dtype=F64),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("alg", [None, ct.RK4(dt=0.7)], ids=repr)
def test_a_linear_leaky_integrator_is_the_matrix_exponential(weight: Tensor, alg: Any) -> None:
    field = ct.Leaky(2, 2, alpha=0.3, phi=lambda x: x, tau=0.8, dtype=F64)
    with torch.no_grad():
        field.weight_hh.copy_(weight)
    sol = solved(problem(field), alg)
    found = ct.transition(sol, 11.3, 1.9)
    exact = expm(9.4 * 0.3 / 0.8 * (weight.numpy() - np.eye(2)))
    for sample in found.numpy():
        np.testing.assert_allclose(sample, exact, rtol=0.0, atol=1e-12 * np.abs(exact).max())


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_the_map_of_a_linear_leaky_integrator_is_the_matrix_power(weight: Tensor) -> None:
    field = ct.Leaky(2, 2, alpha=0.3, phi=lambda x: x, tau=0.8, dtype=F64)
    with torch.no_grad():
        field.weight_hh.copy_(weight)
    sol = solved(problem(field), ct.Euler(dt=0.5))
    found = ct.transition(sol, 11.0, 2.5)
    exact = np.linalg.matrix_power(np.eye(2) + 0.5 * 0.3 / 0.8 * (weight.numpy() - np.eye(2)), 17)
    for sample in found.numpy():
        np.testing.assert_allclose(sample, exact, rtol=0.0, atol=1e-12 * np.abs(exact).max())


@pytest.mark.parametrize("alg", [ct.Euler(dt=0.5), ct.Tsit5()], ids=repr)
def test_transport_composes_and_starts_at_one(alg: Any) -> None:
    sol = solved(problem(gated()), alg)
    whole = ct.transition(sol, 9.5, 1.0)
    parts = ct.transition(sol, 9.5, 4.5) @ ct.transition(sol, 4.5, 1.0)
    torch.testing.assert_close(parts, whole, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ct.transition(sol, 4.5, 4.5), torch.eye(3, dtype=F64).expand(2, 3, 3))
    torch.testing.assert_close(ct.transition(sol, torch.tensor(9.5), 1), whole, rtol=0.0, atol=0.0)


def test_times_of_each_sample() -> None:
    for alg in (ct.Euler(dt=0.5), ct.Dopri5()):
        sol = solved(problem(gated()), alg)
        t, s = torch.tensor([3.0, 8.5], dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)
        found = ct.transition(sol, t, s)
        for sample in (0, 1):
            alone = ct.transition(sol, float(t[sample]), float(s[sample]))[sample]
            torch.testing.assert_close(found[sample], alone, rtol=1e-8, atol=1e-10)
        mixed = ct.transition(sol, t, 1.0)
        torch.testing.assert_close(mixed[0], found[0], rtol=1e-8, atol=1e-10)


# What published scripts of effective learning rates do otherwise (theory.md F of the sources).


def steps_by_autograd(prob: ct.ODEProblem, sol: ct.Solution, states: Tensor) -> list[Tensor]:
    """The Jacobian of each Euler step at given states (time, batch, n), by autograd."""
    assert prob.control is not None
    found = []
    for (start, stop), h in zip(pairwise(sol.ts.tolist()), states, strict=False):
        u = prob.control(start)

        def step(x: Tensor, u: Tensor = u, t: float = start, dt: float = stop - start) -> Tensor:
            return (x + dt * prob.field(t, x, u)).sum(0)

        found.append(torch.autograd.functional.jacobian(step, h).movedim(1, 0))
    return found


class TwoFactors(torch.nn.Module):
    """A map whose two steps are linear, J1 = [[0, 1], [0, 0]] and then J2 = [[1, 0], [0, 0]]."""

    def forward(self, t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
        first = torch.stack([h[..., 1], torch.zeros_like(h[..., 0])], -1)
        second = torch.stack([h[..., 0], torch.zeros_like(h[..., 0])], -1)
        return torch.where(t < 0.5, first, second) - h


def test_later_factors_stand_on_the_left() -> None:
    """|J2 J1| = 1 and |J1 J2| = 0."""
    prob = ct.ODEProblem(ct.Field(TwoFactors(), state_size=2), torch.ones(2, dtype=F64), (0.0, 2.0))
    sol = solved(prob, ct.Euler(dt=1.0))
    found = ct.transition(sol, 2.0, 0.0)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64))
    profile = ct.sensitivity_profile(sol, [1, 2])
    assert profile.norm.sel(lag=2, time=2.0).item() == 1.0
    one, two = (ct.transition(sol, t + 1.0, t) for t in (0.0, 1.0))
    assert float(torch.linalg.matrix_norm(one @ two, 2)) == 0.0


def test_a_product_in_the_wrong_order_is_another_matrix() -> None:
    prob = problem(gated(), steps=8)
    sol = solved(prob, ct.Euler(dt=1.0))
    factors = steps_by_autograd(prob, sol, sol.hs[:-1])
    right = wrong = torch.eye(3, dtype=F64)
    for factor in factors:
        right, wrong = factor @ right, wrong @ factor

    def run(h: Tensor) -> Tensor:
        return ct.solve(ct.remake(prob, h0=h), ct.Euler(dt=1.0)).hs[-1].sum(0)

    truth = torch.autograd.functional.jacobian(run, prob.h0).movedim(1, 0)
    found = ct.transition(sol, 8.0, 0.0)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)
    size = torch.linalg.matrix_norm
    assert bool((size(found - wrong) > 0.05 * size(found)).all())


def test_the_state_before_the_step_is_the_one_that_counts() -> None:
    """J = diag(1 - g) + diag(g phi') W + diag((phi - h) g (1 - g)) W_g: with the state after the step in
    place of h the last term is smaller by the factor 1 - g, exactly, since phi - h' = (1 - g)(phi - h)."""
    field = gated()
    prob = problem(field, steps=6)
    sol = solved(prob, ct.Euler(dt=1.0))
    assert prob.control is not None
    before, after, u = sol.hs[:-1], sol.hs[1:], prob.control(sol.ts[:-1])
    gate_rows, rows = (field.weight_hh.detach()[part] for part in (slice(0, 3), slice(3, 6)))
    with torch.no_grad():
        gate, drive = field.rate_drive(0.0, before, u)
    phi = drive / gate

    def gate_term(h: Tensor) -> Tensor:
        return torch.diag_embed((phi - h) * gate * (1.0 - gate)) @ gate_rows

    rest = torch.diag_embed(1.0 - gate) + torch.diag_embed(gate * (1.0 - phi**2)) @ rows
    found = propagators(sol).phi
    torch.testing.assert_close(found, rest + gate_term(before), rtol=1e-12, atol=1e-14)
    shrunk = torch.diag_embed(1.0 - gate) @ (found - rest)
    torch.testing.assert_close(gate_term(after), shrunk, rtol=1e-12, atol=1e-14)
    assert float((found - rest - gate_term(after)).abs().max()) > 1e-2


def test_norms_are_exact_where_a_power_iteration_is_not() -> None:
    """[[.5, 1], [0, .5]]: the norm is 1.207, five steps of v <- P v give 0.592 or so."""
    matrix = torch.tensor([[0.5, 1.0], [0.0, 0.5]], dtype=F64)
    field = ct.Leaky(0, 2, alpha=1.0, phi=lambda x: x, dtype=F64)
    with torch.no_grad():
        field.weight_hh.copy_(matrix)
    sol = solved(ct.ODEProblem(field, torch.zeros(2, dtype=F64), (0.0, 1.0)), ct.Euler(dt=1.0))
    norm = ct.sensitivity_profile(sol, [1]).norm.sel(time=1.0).item()
    assert abs(norm - (1.0 + 2.0**0.5) / 2.0) < 1e-14
    v = torch.ones(2, dtype=F64) / 2.0**0.5
    for _ in range(5):
        v = matrix @ v
        v = v / v.norm()
    published = float((matrix @ v).norm())
    assert published < 0.6


def test_the_gate_on_the_new_value_forgets_by_one_minus_gate() -> None:
    """With alpha on the new value and no recurrence h_k = (1 - alpha)^k h_0, not alpha^k."""
    field = ct.Leaky(2, 2, alpha=0.8, dtype=F64)
    with torch.no_grad():
        field.weight_hh.zero_()
    sol = solved(problem(field, steps=8), ct.Euler(dt=1.0))
    profile = ct.sensitivity_profile(sol, [1, 8], order="leak")
    np.testing.assert_allclose(profile.norm.sel(time=8.0).T, [[0.2, 0.2**8]] * 2, rtol=1e-12)
    gate = gated()
    sol = solved(problem(gate, steps=8), ct.Euler(dt=1.0))
    expected = (1.0 - sol["gate"][:8]).prod(0)
    found = ct.expansion(sol, 8.0, 0.0).zeroth
    torch.testing.assert_close(found, torch.diag_embed(expected.detach()), rtol=1e-12, atol=0.0)


# The first-order expansion.

FIELDS: dict[str, Callable[[], ct.VectorField]] = {
    "Leaky": lambda: ct.Leaky(2, 4, alpha=0.4, dtype=F64, generator=seeded(1)),
    "ScalarGate": lambda: ct.ScalarGate(2, 4, dtype=F64, generator=seeded(1)),
    "MultiGate": lambda: gated(4),
    "GRU": lambda: ct.GRU(2, 4, dtype=F64, generator=seeded(1)),
    "LSTM": lambda: ct.LSTM(2, 2, dtype=F64, generator=seeded(1)),
    "LTC": lambda: ct.LTC(2, 4, dtype=F64, generator=seeded(1)),
    "GatedRate": lambda: ct.GatedRate(2, 2, dtype=F64, generator=seeded(1)),
}


@pytest.mark.parametrize("name", FIELDS, ids=str)
@pytest.mark.parametrize("alg", [ct.Euler(dt=0.25), ct.Dopri5()], ids=["map", "flow"])
def test_the_remainder_is_of_second_order_in_the_coupling(name: str, alg: Any) -> None:
    sol = solved(problem(FIELDS[name](), steps=3), alg)
    strengths = np.array([1e-3, 3e-3, 1e-2])
    sizes = []
    for strength in strengths:
        zeroth, first, exact = ct.expansion(sol, 2.5, 0.5, strength=float(strength))
        sizes.append(float(torch.linalg.matrix_norm(exact - zeroth - first).max()))
    slope = np.polyfit(np.log(strengths), np.log(sizes), 1)[0]
    assert abs(slope - 2.0) < 0.05


@pytest.mark.parametrize("name", FIELDS, ids=str)
def test_the_remainder_at_full_coupling_grows_with_the_lag(name: str) -> None:
    sol = solved(problem(FIELDS[name](), steps=8), ct.Euler(dt=0.25))
    data = ct.expansion_error(sol, [0, 1, 4, 16, 32])
    assert dict(data.sizes) == {"lag": 5, "time": 33, "batch": 2, "quantile": 3}
    assert data.attrs["algorithm"] == "Euler(dt=0.25)"
    zeroth, first, exact = ct.expansion(sol, 8.0, 4.0)
    norm = torch.linalg.matrix_norm
    for variable, part in (("zeroth", zeroth), ("first", zeroth + first)):
        expected = norm(exact - part) / norm(exact)
        np.testing.assert_allclose(data[variable].sel(lag=16, time=8.0), expected, rtol=1e-10)
    middle = data.first_quantile.sel(quantile=0.5).values
    assert middle[0] == 0.0
    assert middle[1] < 1e-14
    assert 0.0 < middle[2] < middle[3] < middle[4]
    assert (data.first_quantile < data.zeroth_quantile)[:, 1:4].all()


@pytest.mark.parametrize("norm", ["fro", 2, 1, float("inf")])
def test_the_remainder_is_bounded(norm: Any) -> None:
    r"""|Phi - X0 - X1| <= exp(-g L) (exp(rho L) - 1 - rho L), g the least rate and rho the largest |R|."""
    prob = problem(gated(12), steps=4)
    sol = solved(prob, rtol=1e-8, atol=1e-10)
    assert prob.control is not None
    for start, stop in ((0.0, 0.5), (0.5, 2.5), (0.0, 4.0)):
        ts = torch.linspace(start, stop, 4001, dtype=F64)[:-1] + 1e-9
        split = prob.field.jacobian(0.0, sol(ts), prob.control(ts))
        rho = torch.linalg.matrix_norm(split.coupling.detach(), norm).amax(0)
        slowest = split.leak.detach().amin((0, -1))
        span = stop - start
        bound = (-slowest * span).exp() * ((rho * span).exp() - 1.0 - rho * span)
        zeroth, first, exact = ct.expansion(sol, stop, start)
        assert bool((torch.linalg.matrix_norm(exact - zeroth - first, norm) <= bound * (1 + 1e-6)).all())


def test_the_bound_is_reached_by_one_unit_with_constant_coupling() -> None:
    field = ct.Leaky(0, 1, alpha=0.5, phi=lambda x: x, dtype=F64)
    with torch.no_grad():
        field.weight_hh.fill_(0.6)
    sol = solved(ct.ODEProblem(field, torch.ones(1, dtype=F64), (0.0, 3.0)))
    zeroth, first, exact = ct.expansion(sol, 3.0, 0.0)
    bound = np.exp(-1.5) * (np.exp(0.9) - 1.0 - 0.9)
    assert abs((exact - zeroth - first).item() - bound) < 1e-12


def test_the_map_tends_to_the_flow_at_first_order() -> None:
    prob = problem(gated(), steps=2)
    flow = ct.expansion(solved(prob, rtol=1e-9, atol=1e-11), 2.0, 0.0)
    steps = (0.05, 0.025, 0.0125)
    maps = [ct.expansion(solved(prob, ct.Euler(dt=dt)), 2.0, 0.0) for dt in steps]
    for order in range(3):
        errors = [float((one[order] - flow[order]).abs().max()) for one in maps]
        slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
        assert abs(slope - 1.0) < 0.1


# Profiles by lag.


@pytest.mark.parametrize("order", ["leak", "first", "exact"])
@pytest.mark.parametrize("alg", [ct.Euler(dt=0.5), ct.Dopri5()], ids=["map", "flow"])
def test_a_profile_is_made_of_singular_values(order: Any, alg: Any) -> None:
    sol = solved(problem(gated(), steps=6), alg)
    discrete = isinstance(alg, ct.Euler)
    times = [1.0, 3.0, 4.5, 6.0]
    lags = [0, 1, 4, 7] if discrete else [0.0, 0.5, 2.0, 3.5]
    data = ct.sensitivity_profile(sol, lags, times, order=order, directions=2)
    assert data.norm.dims == ("lag", "time", "batch")
    assert data.attrs["order"] == order
    assert data.attrs["directions"] == 2
    for lag, back in zip(lags, [0.0, 0.5, 2.0, 3.5], strict=True):
        for time in times:
            here = data.sel(lag=lag, time=time)
            if back > time:
                assert bool(
                    here[["norm", "log_norm", "anisotropy", "concentration"]].to_array().isnull().all()
                )
                continue
            zeroth, first, exact = ct.expansion(sol, time, time - back)
            matrix = {"leak": zeroth, "first": zeroth + first, "exact": exact}[order]
            values = np.linalg.svd(matrix.numpy(), compute_uv=False)
            np.testing.assert_allclose(here.norm, values[:, 0], rtol=1e-7)
            np.testing.assert_allclose(here.log_norm, np.log(values[:, 0]), rtol=0.0, atol=1e-7)
            np.testing.assert_allclose(here.anisotropy, values[:, 0] / values[:, 1], rtol=1e-6)
            share = (values[:, :2] ** 2).sum(-1) / (values**2).sum(-1)
            np.testing.assert_allclose(here.concentration, share, rtol=1e-7)
    known = data.norm.sel(lag=lags[2]).values
    known = np.sort(known[~np.isnan(known)])
    assert data.norm_median.sel(lag=lags[2]).item() == pytest.approx(known[(len(known) - 1) // 2], rel=1e-12)
    assert all({"long_name", "units"} <= set(data[name].attrs) for name in data.variables)


@pytest.mark.parametrize("alg", [ct.Euler(dt=1.0), ct.RK4(dt=1.0)], ids=["map", "flow"])
@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_long_lags_neither_underflow_nor_overflow(weight: float, alg: Any) -> None:
    field = ct.Leaky(0, 2, alpha=0.8, phi=lambda x: x, bias=False, dtype=torch.float32)
    with torch.no_grad():
        field.weight_hh.copy_(weight * torch.eye(2))
    sol = solved(ct.ODEProblem(field, torch.zeros(2), (0.0, 200.0)), alg)
    if weight == 0.0:
        assert float(ct.transition(sol, 200.0, 0.0).abs().max()) == 0.0
    per_step = np.log(0.2 + 0.8 * weight) if isinstance(alg, ct.Euler) else 0.8 * (weight - 1.0)
    found = ct.sensitivity_profile(sol, [10, 199], [200.0])
    np.testing.assert_allclose(found.log_norm.values.reshape(-1), per_step * np.array([10, 199]), rtol=1e-5)
    leak = ct.sensitivity_profile(sol, [199], [200.0], order="leak").log_norm.item()
    slowest = np.log(0.2) if isinstance(alg, ct.Euler) else -0.8
    assert leak == pytest.approx(199 * slowest, rel=1e-5)
    if weight == 0.0:
        assert ct.expansion_error(sol, [199], [200.0]).zeroth.item() < 1e-4


def test_what_is_gone_for_good_has_no_norm_and_no_anisotropy() -> None:
    """The product [[0, 1], [0, 0]]^2 is zero."""
    field = ct.Leaky(0, 2, alpha=1.0, phi=lambda x: x, dtype=F64)
    with torch.no_grad():
        field.weight_hh.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    sol = solved(ct.ODEProblem(field, torch.zeros(2, dtype=F64), (0.0, 3.0)), ct.Euler(dt=1.0))
    data = ct.sensitivity_profile(sol, [1, 2, 3], [3.0])
    assert data.norm.values.reshape(-1).tolist() == [1.0, 0.0, 0.0]
    assert data.log_norm.values.reshape(-1).tolist() == [0.0, -np.inf, -np.inf]
    assert bool(data.anisotropy.isnull().all())
    assert data.norm_quantile.sel(lag=2).values.tolist() == [0.0] * 3


def test_an_lstm_is_carried_with_cell_and_hidden_state() -> None:
    sol = solved(problem(ct.LSTM(2, 2, dtype=F64, generator=seeded(0)), steps=4), ct.Euler(dt=1.0))
    assert ct.transition(sol, 4.0, 0.0).shape == (2, 4, 4)


def test_profiles_of_samples_with_times_of_their_own() -> None:
    ts = torch.tensor([[0.0, 0.1], [1.0, 0.9], [2.1, 2.2], [3.0, float("nan")]], dtype=F64)
    control = ct.LinearInterpolation(ts, randn(4, 2, 2, seed=6))
    prob = ct.ODEProblem(gated(), 0.4 * randn(2, 3, seed=7), control.sample_support, control=control)
    for alg, lags in ((ct.Euler(dt=0.25), [1, 3]), (ct.Dopri5(), [0.3, 0.9])):
        sol = solved(prob, alg)
        data = ct.sensitivity_profile(sol, lags)
        assert data.t.dims == ("time", "batch")
        for sample in (0, 1):
            own = data.isel(batch=sample)
            for time in range(data.sizes["time"]):
                t = own.t[time].item()
                known = ~own.norm.isel(time=time).isnull().values
                if np.isnan(t):
                    assert not known.any()
                    continue
                for number, lag in enumerate(lags):
                    s = float(sol.ts[max(time - lag, 0), sample]) if isinstance(lag, int) else t - lag
                    start = float(ts[0, sample])
                    assert known[number] == (time >= lag if isinstance(lag, int) else t - lag >= start)
                    if not known[number] or time % 3:
                        continue
                    at = [sol.dense.nodes[0].clone() for _ in range(2)]
                    at[0][sample], at[1][sample] = t, s
                    exact = ct.transition(sol, *at)[sample]
                    norm = np.linalg.norm(exact.numpy(), 2)
                    assert own.norm.isel(lag=number, time=time).item() == pytest.approx(norm, rel=1e-6)


def test_batches_are_flattened_and_need_not_be() -> None:
    control = ct.ZeroOrderHold(torch.arange(4.0), randn(3, 2, seed=1))
    for shape in ((), (2, 2)):
        prob = ct.ODEProblem(gated(), randn(*shape, 3, seed=1), (0.0, 3.0), control=control)
        data = ct.sensitivity_profile(solved(prob, ct.Euler(dt=1.0)), [1, 2])
        assert data.sizes["batch"] == max(1, int(np.prod(shape)))
        assert isinstance(ct.expansion_error(solved(prob), [0.5], [1.0, 2.0]), xr.Dataset)


# Errors.


def test_times_that_a_map_does_not_have() -> None:
    sol = solved(problem(gated(), steps=4), ct.Euler(dt=0.5))
    with pytest.raises(ValueError, match=r"t is 2.7; .* end of a step, and the nearest are 2.5 and 3.0"):
        ct.transition(sol, 2.7, 0.0)
    with pytest.raises(ValueError, match=r"s is 0.1; .* the nearest are 0.0 and 0.5"):
        ct.expansion(sol, 2.5, 0.1)
    with pytest.raises(ValueError, match=r"times is 0.7; "):
        ct.sensitivity_profile(sol, [1], [0.7])
    with pytest.raises(ValueError, match=r"t is 2.7; .* are 2.5 and 3.0 for sample \(1,\)"):
        ct.transition(sol, torch.tensor([2.5, 2.7], dtype=F64), 0.0)


def test_what_cannot_be_asked() -> None:
    steps, flow = (solved(problem(gated(), steps=4), alg) for alg in (ct.Euler(dt=0.5), None))
    with pytest.raises(ValueError, match=r"t is 1.0 and s is 2.0; t must be >= s"):
        ct.transition(flow, 1.0, 2.0)
    with pytest.raises(ValueError, match=r"t has 5.0; it must be in \[0.0, 4.0\]"):
        ct.transition(flow, 5.0, 2.0)
    with pytest.raises(ValueError, match="finite, not negative, and increase"):
        ct.sensitivity_profile(flow, [2.0, 1.0])
    with pytest.raises(ValueError, match="one lag at least"):
        ct.expansion_error(flow, [])
    with pytest.raises(ValueError, match="whole numbers of steps"):
        ct.sensitivity_profile(steps, [0.5])
    profile = unchecked(ct.sensitivity_profile)
    with pytest.raises(ValueError, match="order is 'second'"):
        profile(flow, [1.0], order="second")
    with pytest.raises(ValueError, match="directions is 0"):
        profile(flow, [1.0], directions=0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        profile(flow, [1.0], quantiles=(2.0,))
    with pytest.raises(RuntimeError, match="dense"):
        ct.transition(ct.solve(problem(gated()), dense=False), 1.0, 0.5)
