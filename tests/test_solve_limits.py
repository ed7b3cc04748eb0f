"""solve at the limits: coarse times, long spans, overflow, changed tensors, inference mode."""

import numpy as np
import pytest
import torch

import ctgate as ct


def integral(ts, alg, **options):
    """h' = u = 1 from 0, in the control's own times: h at the end is the length of the span."""
    field = ct.Field(lambda t, h, u: u.expand(h.shape).to(h))
    control = ct.ZeroOrderHold(ts, torch.ones(len(ts) - 1, 1, dtype=torch.float64))
    span = (float(ts[0]), float(ts[-1]))
    return ct.solve(
        ct.ODEProblem(field, torch.zeros(1, 1, dtype=torch.float64), span, control), alg, **options
    )


@pytest.mark.parametrize(
    ("ts", "dt"),
    [
        (torch.arange(1e6, 1e6 + 6, dtype=torch.float32), 0.25),
        (99990 + torch.arange(0, 5, 0.03, dtype=torch.float32), 0.03),
        (torch.logspace(-5, 3, 40, dtype=torch.float32), 0.5),
        (torch.arange(0, 5, 0.1, dtype=torch.float32), 0.1),
    ],
)
def test_coarse_times_lose_no_time(ts, dt):
    sol = integral(ts, ct.RK4(dt=dt))
    span = float(ts[-1]) - float(ts[0])
    assert float(sol.hs[-1]) == pytest.approx(span, rel=1e-3)
    assert float(sol.ts.diff().max()) <= dt * 1.001


def test_saved_times_near_an_end_in_low_precision():
    ts = torch.linspace(0, 100, 5, dtype=torch.float32)
    sol = integral(ts, ct.RK4(dt=0.5), saveat=[0.0, 4e-5, 1.0])
    assert sol.ts.tolist() == [0.0, 4e-5, 1.0]
    assert sol.hs.flatten().tolist() == pytest.approx([0.0, 4e-5, 1.0], rel=1e-6)
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: -h), torch.ones(1, 1), (0.0, 0.1))
    assert float(ct.solve(prob, saveat=np.array([0.0, 0.1], dtype=np.float32)).ts[-1]) == 0.1


def test_time_is_not_float32_in_a_long_span():
    """One interval from 0 to 2^20 + 10, where float32 resolves 0.125; h = sin^2(t - 2^20) at its end."""
    centre = 2.0**20

    def late(t, h, u):
        return torch.where(t > centre, torch.sin(2 * (t - centre)), 0.0).to(h.dtype).expand(h.shape)

    prob = ct.ODEProblem(ct.Field(late), torch.zeros(1, 1), (0.0, centre + 10.0))
    sol = ct.solve(prob)
    assert float(sol.hs[-1]) == pytest.approx(np.sin(10.0) ** 2, abs=1e-3)
    near = ct.solve(ct.remake(prob, tspan=(centre - 1.0, centre + 10.0)))
    assert sol.stats.accepted < 3 * near.stats.accepted


@pytest.mark.parametrize(
    "alg", [ct.Bosh3(first_step=0.5), ct.Dopri5(first_step=0.5), ct.Dopri8(first_step=0.5)]
)
@pytest.mark.parametrize("stop", [2.0, 20.0])
def test_overflow_is_unstable_and_not_kept(alg, stop):
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: torch.full_like(h, 2e38)), torch.zeros(1, 1), (0.0, stop))
    with pytest.warns(RuntimeWarning, match="UNSTABLE"):
        sol = ct.solve(prob, alg)
    assert sol.retcode is ct.ReturnCode.UNSTABLE
    assert bool(torch.isfinite(sol.hs).all())


def test_a_singular_start_is_unstable():
    prob = ct.ODEProblem(
        ct.Field(lambda t, h, u: 1 / (h - 1)), torch.ones(1, 1, dtype=torch.float64), (0.0, 1.0)
    )
    with pytest.warns(RuntimeWarning, match="dh/dt is not finite at t = 0"):
        sol = ct.solve(prob)
    assert sol.retcode is ct.ReturnCode.UNSTABLE


def test_step_underflow():
    """The derivative switches sign at h = 1/2 and pins the state there: no step is small enough."""
    field = ct.Field(lambda t, h, u: torch.where(h < 0.5, 1.0, -1.0).to(h))
    prob = ct.ODEProblem(field, torch.zeros(1, 1, dtype=torch.float64), (1e5, 1e5 + 2))
    with pytest.warns(RuntimeWarning, match="DT_UNDERFLOW.*loosen rtol"):
        sol = ct.solve(prob, rtol=1e-13, atol=1e-15)
    assert sol.retcode is ct.ReturnCode.DT_UNDERFLOW
    assert float(sol.hs[-1]) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("alg", [ct.Euler(dt=0.01), ct.RK4(dt=0.01)])
def test_the_good_part_of_a_divergence_is_finite_everywhere(alg):
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: h * h), torch.ones(1, 1, dtype=torch.float64), (0.0, 2.0))
    with pytest.warns(RuntimeWarning, match="UNSTABLE"):
        sol = ct.solve(prob, alg)
    times = torch.linspace(0.0, float(sol.ts[-1]), 301, dtype=torch.float64)
    assert bool(torch.isfinite(sol(times)).all())
    assert bool(torch.isfinite(sol.hs).all())
    assert sol.stats.accepted <= len(sol.ts) + 3
    with pytest.warns(RuntimeWarning, match="UNSTABLE"):
        saved = ct.solve(prob, alg, saveat=torch.linspace(0, 2, 50, dtype=torch.float64))
    assert bool(torch.isfinite(saved.hs).all())
    with pytest.warns(RuntimeWarning, match=r"good until t = (0\.[3-9]|1\.)"):
        sparse = ct.solve(prob, alg, saveat=[0.1, 0.2, 1.9], dense=False)
    assert sparse.ts.tolist() == [0.1, 0.2]


def test_at_rest_in_unix_time():
    field = ct.GRU(0, 3, bias=False, dtype=torch.float64)
    prob = ct.ODEProblem(field, torch.zeros(1, 3, dtype=torch.float64), (1.7e9, 1.7e9 + 1))
    sol = ct.solve(prob)
    assert sol.retcode is ct.ReturnCode.SUCCESS
    assert float(sol.hs.detach().abs().max()) == 0.0


def changed(change):
    field = ct.GRU(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    xs = torch.randn(4, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prob = ct.ODEProblem(
        field, torch.zeros(1, 3, dtype=torch.float64), (0.0, 4.0), ct.ZeroOrderHold(torch.arange(5.0), xs)
    )
    sol = ct.solve(prob)
    with torch.no_grad():
        change(prob)
    return sol


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda prob: prob.field.weight_hh.mul_(2), "the field's weight_hh"),
        (
            lambda prob: setattr(prob.field, "bias_hh", torch.nn.Parameter(torch.zeros(9).double())),
            "the field's bias_hh",
        ),
        (lambda prob: prob.control.xs.mul_(2), "the control's xs"),
    ],
)
def test_what_changed_since_the_solve_is_noticed(change, name):
    sol = changed(change)
    for read in (lambda: sol(0.5), lambda: sol["update"], sol.to_xarray):
        with pytest.raises(RuntimeError, match=f"{name} was changed since the solve"):
            read()
    assert sol["hidden"].shape == (len(sol.ts), 1, 3)


@pytest.mark.parametrize(
    "sensealg", [ct.DiscreteAdjoint(), ct.DiscreteAdjoint(checkpoints=2), ct.BacksolveAdjoint()]
)
def test_inference_mode(sensealg):
    with torch.inference_mode():
        field = ct.GRU(0, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prob = ct.ODEProblem(field, torch.ones(2, 3, dtype=torch.float64), (0.0, 4.0))
    with torch.inference_mode():
        sol = ct.solve(prob, sensealg=sensealg)
    outside = sol["update"], sol(1.5)
    with torch.inference_mode():
        assert torch.equal(outside[0], sol["update"])
        assert torch.equal(outside[1], sol(1.5))


def test_a_default_device_moves_nothing():
    xs = torch.zeros(2, 1, dtype=torch.float64)
    with torch.device("meta"):
        control = ct.ZeroOrderHold([0.0, 1.0, 2.0], xs)
    assert control.xs.device.type == "cpu"


def test_integers_of_numpy_and_subclasses_of_algorithms():
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: -h), torch.ones(1, 1, dtype=torch.float64), (0.0, 1.0))
    assert ct.solve(prob, ct.Heun(dt=0.5), max_steps=int(np.int64(5))).retcode is ct.ReturnCode.SUCCESS

    class Mine(ct.Euler):
        pass

    with pytest.raises(TypeError, match="it must be one of ctgate's algorithms"):
        ct.solve(prob, Mine(dt=0.1))
