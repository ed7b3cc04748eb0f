"""solve: what it returns, how it ends, what it refuses."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
import torch

import ctgate as ct
from tests.typechecker import unchecked

FIXED = [ct.Euler, ct.ExponentialEuler, ct.ExponentialMidpoint, ct.Midpoint, ct.Heun, ct.RK4]
ADAPTIVE = [ct.Bosh3, ct.Dopri5, ct.Dopri8]


def cosine(t, h, u):
    """y' = -y + cos t: y = (cos t + sin t)/2 + c e^{-t}."""
    return -h + torch.cos(t)


def exact(t):
    return (math.cos(t) + math.sin(t)) / 2 + 0.5 * math.exp(-t)


def cosine_problem(stop=3.0, dtype=torch.float64):
    return ct.ODEProblem(ct.Field(cosine), torch.ones(1, 1, dtype=dtype), (0.0, stop))


def gated_problem(dtype=torch.float64, steps=6, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    field = ct.GRU(2, 5, tau=0.7, dtype=dtype, generator=generator)
    xs = torch.randn(steps, batch, 2, dtype=dtype, generator=generator)
    ts = torch.cat([torch.zeros(1), torch.rand(steps, generator=generator).cumsum(0) + 0.3]).double()
    h0 = torch.randn(batch, 5, dtype=dtype, generator=generator) * 0.3
    return ct.ODEProblem(field, h0, (0.0, float(ts[-1])), ct.ZeroOrderHold(ts, xs))


def by_scipy(prob, times):
    """The held gated problem by scipy's DOP853, one knot interval at a time, with numpy's own gates."""
    field = prob.field
    weights = {name: value.detach().numpy() for name, value in field.named_parameters()}
    xs, knots = prob.control.xs.detach().numpy(), np.asarray(prob.control.knots)
    batch, size = prob.h0.shape
    sigma = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731

    def rhs(t, flat, u):
        h = flat.reshape(batch, size)
        i = np.split(u @ weights["weight_ih"].T + weights["bias_ih"], 3, -1)
        r = np.split(h @ weights["weight_hh"].T + weights["bias_hh"], 3, -1)
        z = sigma(i[1] + r[1])
        n = np.tanh(i[2] + sigma(i[0] + r[0]) * r[2])
        return ((1 - z) * (n - h) / 0.7).ravel()

    states, h = {}, prob.h0.numpy().ravel()
    for k, (a, b) in enumerate(pairwise(knots)):
        part = scipy.integrate.solve_ivp(
            rhs, (a, b), h, "DOP853", rtol=1e-13, atol=1e-14, dense_output=True, args=(xs[k],)
        )
        states.update({t: part.sol(t).reshape(batch, size) for t in times if a <= t <= b})
        h = part.y[:, -1]
    return np.stack([states[t] for t in times])


@pytest.mark.parametrize("alg", [kind() for kind in ADAPTIVE])
def test_adaptive_against_scipy(alg):
    prob = gated_problem()
    times = np.linspace(*prob.tspan, 23)
    reference = torch.from_numpy(by_scipy(prob, times))
    sol = ct.solve(prob, alg, rtol=1e-8, atol=1e-10, saveat=times)
    assert sol.retcode is ct.ReturnCode.SUCCESS
    assert (sol.hs[-1] - reference[-1]).abs().max() < 1e-7
    assert (sol.hs - reference).abs().max() < 1e-7


@pytest.mark.parametrize("kind", FIXED)
def test_fixed_steps_never_cross_a_knot(kind):
    prob = gated_problem()
    sol = ct.solve(prob, kind(dt=0.25))
    times = sol.ts.tolist()
    assert set(prob.control.knots) <= set(times)
    assert max(b - a for a, b in pairwise(times)) <= 0.25 * (1 + 1e-12)
    fine = torch.from_numpy(by_scipy(prob, [prob.tspan[1]]))
    assert (ct.solve(prob, kind(dt=1e-2)).hs[-1] - fine[0]).abs().max() < 1e-2


@pytest.mark.parametrize("alg", [kind(dt=0.2) for kind in FIXED] + [kind() for kind in ADAPTIVE])
def test_saveat_never_changes_the_steps(alg):
    prob = gated_problem()
    plain = ct.solve(prob, alg)
    times = torch.linspace(*prob.tspan, 17, dtype=torch.float64)
    saved = ct.solve(prob, alg, saveat=times)
    assert saved.stats.accepted == plain.stats.accepted == len(plain.ts) - 1
    assert saved.stats.evaluations == plain.stats.evaluations
    assert torch.equal(saved.hs, plain(times))
    assert torch.equal(saved.hs[-1], plain.hs[-1])
    sparse = ct.solve(prob, alg, saveat=times, dense=False)
    assert torch.allclose(sparse.hs, saved.hs, rtol=0, atol=1e-13)
    assert torch.equal(sparse.ts, times)


@pytest.mark.parametrize("alg", [kind(dt=0.2) for kind in FIXED] + [kind() for kind in ADAPTIVE])
def test_every_step_is_returned_from_the_start_to_the_end(alg):
    prob = gated_problem()
    sol = ct.solve(prob, alg)
    assert float(sol.ts[0]) == prob.tspan[0]
    assert float(sol.ts[-1]) == prob.tspan[1]
    assert torch.equal(sol.hs[0], prob.h0)
    assert bool((sol.ts.diff() > 0).all())
    assert torch.equal(sol(sol.ts), sol.hs)


def test_adaptive_lands_on_knots_and_honours_them():
    prob = gated_problem()
    sol = ct.solve(prob, ct.Dopri5(), rtol=1e-6, atol=1e-8)
    assert set(prob.control.knots) <= set(sol.ts.tolist())
    reference = torch.from_numpy(by_scipy(prob, [prob.tspan[1]]))[0]
    assert (sol.hs[-1] - reference).abs().max() < 10 * (1e-6 + 1e-8)


def test_withheld_knots_are_worse_or_dearer():
    """The same jumps through a FunctionControl that does not tell its knots."""
    prob = gated_problem(steps=12)
    blind = ct.remake(prob, control=ct.FunctionControl(lambda t: prob.control(t), support=prob.tspan))
    reference = torch.from_numpy(by_scipy(prob, [prob.tspan[1]]))[0]
    told = ct.solve(prob, ct.Dopri5(), rtol=1e-6, atol=1e-8)
    untold = ct.solve(blind, ct.Dopri5(), rtol=1e-6, atol=1e-8)
    error, blind_error = ((sol.hs[-1] - reference).abs().max() for sol in (told, untold))
    assert error < 10 * 1e-6
    assert untold.stats.rejected > told.stats.rejected
    assert blind_error > 2 * error or untold.stats.evaluations > 1.2 * told.stats.evaluations


def test_times_stay_exact_in_float32():
    """Far from t = 0 a float32 time has a resolution of 0.03: the phase of the drive would be lost."""
    start = 2.0**19
    field = ct.Field(lambda t, h, u: (torch.cos(t - start) - h).to(h.dtype))
    prob = ct.ODEProblem(field, torch.ones(1, 1), (start, start + 3.0))
    for alg in (ct.Dopri5(), ct.RK4(dt=0.01)):
        sol = ct.solve(prob, alg)
        assert sol.hs.dtype == torch.float32
        assert abs(float(sol.hs[-1]) - exact(3.0)) < 2e-4


@pytest.mark.parametrize("sensealg", [ct.DiscreteAdjoint(), ct.BacksolveAdjoint()])
def test_a_short_span_far_from_zero(sensealg):
    """A span of 5e-6 at t = 1e6, where float64 resolves 1e-10: short first steps are no underflow."""
    prob = gated_problem()
    far = ct.ZeroOrderHold(1e6 + 1e-6 * torch.arange(7.0, dtype=torch.float64), prob.control.xs)
    sol = ct.solve(ct.remake(prob, control=far, tspan=(1e6, 1e6 + 6e-6)), sensealg=sensealg)
    assert sol.retcode is ct.ReturnCode.SUCCESS
    slope = prob.field(0.0, prob.h0, prob.control.xs.mean(0)).detach()
    assert torch.allclose(sol.hs[-1], prob.h0 + 6e-6 * slope, rtol=0, atol=2e-6)
    assert (sol.hs[-1] - prob.h0).abs().max() > 1e-7


def test_the_worst_sample_sets_the_step():
    """Error per sample does not depend on how many easy samples share the batch."""
    field = ct.Field(lambda t, h, u: h * 8.0 * torch.cos(8.0 * t))
    hard = torch.ones(1, 3, dtype=torch.float64)
    easy = torch.zeros(200, 3, dtype=torch.float64)
    alone = ct.solve(ct.ODEProblem(field, hard, (0.0, 3.0)), ct.Dopri5())
    crowd = ct.solve(ct.ODEProblem(field, torch.cat([hard, easy]), (0.0, 3.0)), ct.Dopri5())
    assert crowd.stats.accepted == alone.stats.accepted
    assert torch.allclose(crowd.hs[-1, :1], alone.hs[-1], rtol=0, atol=1e-12)


def test_default_algorithm_is_written_down():
    assert "Dopri5" in ct.solve(cosine_problem()).stats.algorithm
    assert "Bosh3" in ct.solve(cosine_problem(), rtol=1e-3).stats.algorithm


def test_tolerances_default_by_dtype():
    assert ct.solve(cosine_problem()).tolerances == (1e-6, 1e-8)
    assert ct.solve(cosine_problem(dtype=torch.float32)).tolerances == (1e-4, 1e-6)
    assert ct.solve(cosine_problem(), ct.RK4(dt=0.1)).tolerances is None
    assert ct.solve(cosine_problem(), rtol=1e-4).tolerances == pytest.approx((1e-4, 1e-6))
    assert ct.solve(cosine_problem(), atol=1e-5).tolerances == (1e-6, 1e-5)


@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.RK4(dt=0.1)])
def test_callback_sees_each_step_and_may_stop(alg):
    seen = []

    def stop_after_one(t, h):
        seen.append((t, float(h)))
        return t >= 1.0

    sol = ct.solve(cosine_problem(), alg, callback=stop_after_one)
    assert sol.retcode is ct.ReturnCode.TERMINATED
    assert seen[-1][0] >= 1.0 > seen[-2][0]
    assert sol.ts.tolist() == [0.0, *[t for t, _ in seen]]
    assert sol.hs[1:].flatten().tolist() == [h for _, h in seen]
    assert abs(float(sol(0.5)) - exact(0.5)) < 1e-4
    with pytest.raises(ValueError, match=r"t is 2.5; it must be in \[0.0"):
        sol(2.5)


def test_max_steps_returns_the_good_part():
    for alg, count in ((ct.Dopri5(), 3), (ct.RK4(dt=0.1), 7)):
        with pytest.warns(RuntimeWarning, match="MAX_STEPS.*raise max_steps"):
            sol = ct.solve(cosine_problem(), alg, max_steps=count)
        assert sol.retcode is ct.ReturnCode.MAX_STEPS
        assert sol.retcode.message == "The solve used up max_steps before the end of tspan."
        assert 1 < len(sol.ts) <= count + 1
        assert abs(float(sol.hs[-1]) - exact(float(sol.ts[-1]))) < 1e-4


def test_blow_up_returns_the_good_part():
    """h' = h^2 from 1 is 1/(1 - t): the adaptive solve stops before t = 1, the fixed one when it "
    "overflows."""
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: h * h), torch.ones(1, 1, dtype=torch.float64), (0.0, 2.0))
    with pytest.warns(RuntimeWarning, match="dh/dt = .*to try"):
        sol = ct.solve(prob, ct.Dopri5())
    assert sol.retcode in (ct.ReturnCode.DT_UNDERFLOW, ct.ReturnCode.UNSTABLE)
    assert 0.999 < float(sol.ts[-1]) < 1.001
    early = int((sol.ts < 0.9).sum()) - 1
    assert float(sol.hs[early]) == pytest.approx(1 / (1 - float(sol.ts[early])), rel=1e-4)
    with pytest.warns(RuntimeWarning, match="UNSTABLE"):
        fixed = ct.solve(prob, ct.RK4(dt=0.01))
    assert fixed.retcode is ct.ReturnCode.UNSTABLE
    assert bool(torch.isfinite(fixed.hs).all())
    assert 0.9 < float(fixed.ts[-1]) < 1.2
    assert fixed.stats.accepted < 200


def test_a_step_that_is_not_finite_is_tried_again_smaller():
    """sqrt of a negative number inside a too long first step must not end the solve."""
    field = ct.Field(lambda t, h, u: -torch.sqrt(h - 0.5) * 5.0)
    prob = ct.ODEProblem(field, torch.ones(1, 1, dtype=torch.float64), (0.0, 0.2))
    sol = ct.solve(prob, ct.Dopri5(first_step=0.2), rtol=1e-8, atol=1e-10)
    assert sol.retcode is ct.ReturnCode.SUCCESS
    root = math.sqrt(0.5) - 5.0 * 0.2 / 2
    assert float(sol.hs[-1]) == pytest.approx(0.5 + root**2, abs=1e-8)


def test_nan_field_is_unstable_at_once():
    prob = ct.ODEProblem(
        ct.Field(lambda t, h, u: h * torch.nan), torch.ones(1, 1, dtype=torch.float64), (0.0, 1.0)
    )
    for alg in (ct.Dopri5(), ct.Dopri5(first_step=0.1), ct.Heun(dt=0.1)):
        with pytest.warns(RuntimeWarning, match="UNSTABLE"):
            sol = ct.solve(prob, alg)
        assert sol.retcode is ct.ReturnCode.UNSTABLE
        assert sol.ts.tolist() == [0.0]


def test_throw_names_time_step_unit_rate_and_the_way_out():
    def fn(t, h, u):
        return torch.stack([-h[..., 0], h[..., 1] ** 2], dim=-1)

    prob = ct.ODEProblem(ct.Field(fn), torch.ones(2, 2, dtype=torch.float64), (0.0, 2.0))
    pattern = r"t = 1\.000?.*step .*unit 1 of hidden of sample \(0,\).*dh/dt = .*rate = 0 .*to try"
    with pytest.raises(ct.SolveError, match=pattern) as caught:
        ct.solve(prob, ct.Dopri5(), throw=True)
    assert caught.value.retcode in (ct.ReturnCode.DT_UNDERFLOW, ct.ReturnCode.UNSTABLE)


def test_the_unit_that_is_not_finite_is_the_worst():
    field = ct.Field(lambda t, h, u: h * torch.tensor([1e3, torch.nan, 1.0], dtype=h.dtype))
    prob = ct.ODEProblem(field, torch.ones(2, 3, dtype=torch.float64), (0.0, 1.0))
    with pytest.raises(
        ct.SolveError, match=r"worst is unit 1 of hidden of sample \(0,\): h = 1, dh/dt = nan"
    ):
        ct.solve(prob, throw=True)


def test_interruption_keeps_the_good_part():
    def impatient(t, h):
        if t > 1.0:
            raise KeyboardInterrupt

    for alg in (ct.Dopri5(), ct.RK4(dt=0.1)):
        with pytest.warns(RuntimeWarning, match="INTERRUPTED"):
            sol = ct.solve(cosine_problem(), alg, callback=impatient)
        assert sol.retcode is ct.ReturnCode.INTERRUPTED
        assert 1.0 < float(sol.ts[-1]) < 3.0
        with pytest.raises(KeyboardInterrupt):
            ct.solve(cosine_problem(), alg, callback=impatient, throw=True)


def test_empty_batch_calls_no_solver():
    def never(t, h, u):
        raise AssertionError("the field was called")

    prob = ct.ODEProblem(ct.Field(never), torch.ones(0, 3, dtype=torch.float64), (0.0, 1.0))
    assert ct.solve(prob, ct.Euler(dt=0.25)).hs.shape == (5, 0, 3)
    assert ct.solve(prob, ct.Dopri5()).hs.shape == (2, 0, 3)
    sol = ct.solve(prob, saveat=[0.0, 0.5, 1.0])
    assert sol.hs.shape == (3, 0, 3)
    assert sol.retcode is ct.ReturnCode.SUCCESS


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3)])
def test_batch_shapes(batch):
    generator = torch.Generator().manual_seed(3)
    field = ct.MultiGate(2, 5, dtype=torch.float64, generator=generator)
    xs = torch.randn(4, *batch, 2, dtype=torch.float64, generator=generator)
    h0 = torch.randn(*batch, 5, dtype=torch.float64, generator=generator)
    prob = ct.ODEProblem(
        field, h0, (0.0, 4.0), ct.LinearInterpolation(torch.arange(5.0), torch.cat([xs, xs[:1]]))
    )
    for alg in (ct.Dopri5(), ct.Heun(dt=0.5)):
        sol = ct.solve(prob, alg, saveat=[0.0, 1.5, 4.0])
        assert sol.hs.shape == (3, *batch, 5)
        assert sol["gate"].shape == (3, *batch, 5)
        assert sol(0.3).shape == (*batch, 5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"alg": "dopri5"}, TypeError, "alg is 'dopri5'; it must be one of ctgate's algorithms"),
        ({"sensealg": "adjoint"}, TypeError, "sensealg is 'adjoint'"),
        (
            {"alg": ct.RK4(dt=0.1), "sensealg": ct.BacksolveAdjoint()},
            ValueError,
            "backsolve needs an adaptive",
        ),
        ({"alg": ct.RK4(dt=0.1), "rtol": 1e-3}, ValueError, "a fixed-step method has no tolerances"),
        ({"rtol": -1.0}, ValueError, "rtol is -1.0; it must be positive"),
        ({"atol": "small"}, TypeError, "atol is 'small'"),
        ({"max_steps": 0}, ValueError, "max_steps is 0; it must be a positive integer"),
        ({"saveat": [0.0, 0.0]}, ValueError, r"saveat\[1\] is 0.0 after 0.0; the times must increase"),
        ({"saveat": [0.0, 4.0]}, ValueError, r"saveat\[1\] is 4.0; it must be inside tspan"),
        ({"saveat": []}, ValueError, r"saveat has shape \(0,\)"),
        ({"callback": 3}, TypeError, "callback is int"),
        ({"stepsize": 0.1}, TypeError, "stepsize"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        unchecked(ct.solve)(cosine_problem(), **options)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ct.Euler(dt=0.0), ValueError, "dt is 0.0; it must be positive"),
        (lambda: ct.RK4(dt=-0.1), ValueError, "dt is -0.1"),
        (lambda: ct.Heun(dt=math.inf), ValueError, "dt is inf; it must be finite"),
        (lambda: ct.Heun(dt=math.nan), ValueError, "dt is nan"),
        (lambda: unchecked(ct.Euler)(dt="0.1"), TypeError, "dt is '0.1'; it must be a Python float"),
        (lambda: ct.Euler(), TypeError, "dt"),
        (lambda: ct.Dopri5(first_step=-1.0), ValueError, "first_step is -1.0"),
        (lambda: ct.Dopri5(max_step=0.0), ValueError, "max_step is 0.0"),
        (lambda: ct.Dopri5(tolerance=0.1), TypeError, "tolerance"),
        (lambda: ct.DiscreteAdjoint(checkpoints=0), ValueError, "checkpoints is 0"),
    ],
)
def test_bad_algorithms(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("fn", "error", "match"),
    [
        (lambda t, h, u: h.sum(-1), ValueError, r"shape \(2,\); it must have the state's, \(2, 3\)"),
        (lambda t, h, u: h.float(), ValueError, "as torch.float32; it must have the state's dtype"),
        (lambda t, h, u: h.to("meta"), ValueError, "on meta; h0 is on cpu"),
    ],
)
@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.Heun(dt=0.1)])
def test_a_field_that_returns_the_wrong_thing(fn, error, match, alg):
    prob = ct.ODEProblem(ct.Field(fn), torch.ones(2, 3, dtype=torch.float64), (0.0, 1.0))
    with pytest.raises(error, match=match):
        ct.solve(prob, alg)


def test_a_field_that_returns_nothing():
    class Silent(ct.VectorField):
        def __init__(self):
            super().__init__(input_size=None, state_size=3)

        def rate_drive(self, t, h, u=None):
            return None, None

        def forward(self, t, h, u=None):
            return None

    prob = ct.ODEProblem(Silent(), torch.ones(2, 3, dtype=torch.float64), (0.0, 1.0))
    for alg in (ct.Dopri5(), ct.Heun(dt=0.1), ct.ExponentialEuler(dt=0.1)):
        with pytest.raises(TypeError, match="returned NoneType for"):
            ct.solve(prob, alg)


def test_max_step_is_kept():
    sol = ct.solve(cosine_problem(), ct.Dopri5(max_step=0.1))
    assert float(sol.ts.diff().max()) <= 0.1 * (1 + 1e-12)


def test_no_warning_and_nothing_global_changes():
    dtype, threads, state = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ct.solve(gated_problem(), ct.Dopri5())
        ct.solve(gated_problem(), ct.ExponentialMidpoint(dt=0.1), progress=True)
    assert torch.get_default_dtype() == dtype
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
