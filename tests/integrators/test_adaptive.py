"""The adaptive loop with methods whose errors are written down beforehand; what it costs with real ones."""

import math

import numpy as np
import pytest
import torch
from torchdiffeq._impl import bosh3, dopri5

import ctgate as ct
from ctgate.integrators.adaptive import AdaptiveLoop, error_ratio
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.frames import SampleFrame, SharedFrame
from ctgate.integrators.grid import intervals
from ctgate.integrators.method import Attempt
from ctgate.integrators.recorder import Stats
from ctgate.integrators.runge_kutta import BOSH3, DOPRI5
from ctgate.integrators.samples import SampleGrid
from ctgate.kernels.switch import fast_paths
from ctgate.retcode import Halt, ReturnCode
from tests.saved_tensors import watched
from tests.typechecker import unchecked

STEADY = 0.9**5  # the ratio at which a fifth-order method keeps its size
TOLERANCE = 1.0  # with atol 1 and rtol 0 an error is its own ratio to the tolerance


class Scripted:
    """A method that moves nothing and reports errors from a list, by attempt."""

    def __init__(self, *ratios: float, then: float = STEADY):
        self.ratios = list(ratios)
        self.then = then
        self.attempts = []
        self.slopes = []

    def __call__(self, dynamics, step, h, slope, estimate):
        self.attempts.append((step.start, step.stop))
        self.slopes.append(slope)
        ratio = self.ratios.pop(0) if self.ratios else self.then
        return Attempt(h.clone(), torch.zeros_like(h), torch.full_like(h, ratio))


def shared(method, stop=10.0, control=None, alg=None, max_steps=math.inf):
    field = ct.Field(lambda t, h, u: torch.zeros_like(h))
    prob = ct.ODEProblem(field, torch.zeros(1, 1, dtype=torch.float64), (0.0, stop), control)
    jumps = control is not None and not control.continuous
    cuts = intervals(control, 0.0, stop)
    frame = SharedFrame(cuts, jumps, lambda step: (), lambda start, stop, h: None)
    alg = ct.Dopri5(first_step=1.0) if alg is None else alg
    dynamics = Dynamics(prob, Stats("", "", ""))
    loop = AdaptiveLoop(dynamics, alg, method, frame, (0.0, TOLERANCE), max_steps)
    return loop, prob, frame.taken, dynamics


def run(method, **options):
    loop, prob, taken, _ = shared(method, **options)
    loop.run(prob.h0)
    return loop, [(step.start, step.stop) for step in taken]


def test_a_rejected_step_is_tried_again_smaller():
    """0.9 * 32^(-1/5) = 0.45; the step after a rejection does not grow."""
    method = Scripted(32.0, 1e-5, 1e-5)
    loop, taken = run(method, stop=3.0)
    assert loop.rejected == 1
    assert method.attempts[:3] == [
        (0.0, 1.0),
        (0.0, pytest.approx(0.45)),
        (pytest.approx(0.45), pytest.approx(0.9)),
    ]
    # Then 0.9 * (1e-5)^(-1/5) = 9 times as long, which reaches the end.
    assert taken[-1] == (pytest.approx(0.9), 3.0)


@pytest.mark.parametrize(("ratio", "factor"), [(1e-30, 10.0), (0.0, 10.0), (1e-5, 9.0), (0.5, 0.9 * 2**0.2)])
def test_growth_is_limited(ratio, factor):
    method = Scripted(ratio)
    run(method, stop=100.0)
    assert method.attempts[1] == (1.0, pytest.approx(1.0 + factor))


@pytest.mark.parametrize("ratio", [1e9, math.inf, math.nan])
def test_shrinking_is_limited(ratio):
    method = Scripted(ratio)
    run(method, stop=3.0)
    assert method.attempts[1] == (0.0, pytest.approx(0.2))


def test_the_end_is_reached_exactly_and_without_a_sliver():
    """With ratio 0.9^5 the size stays 1: the step that would leave 0.005 goes to the end."""
    method = Scripted(then=STEADY)
    _, taken = run(method, stop=3.005)
    assert taken[-1][1] == 3.005
    assert len(taken) == 3
    _, taken = run(Scripted(then=STEADY), stop=3.2)
    assert len(taken) == 4


def test_max_step_is_never_passed():
    method = Scripted(then=0.0)
    _, taken = run(method, stop=3.005, alg=ct.Dopri5(first_step=0.3, max_step=0.5))
    sizes = np.diff([taken[0][0], *(stop for _, stop in taken)])
    assert sizes.max() <= 0.5 * (1 + 1e-12)
    assert taken[-1][1] == 3.005


def knots(kind):
    return kind(
        torch.tensor([0.0, 2.5, 5.0, 10.0]),
        torch.zeros(4 if kind is ct.LinearInterpolation else 3, 1).double(),
    )


def test_steps_land_on_knots_and_remember_their_size():
    """A step cut short by a knot does not shorten the next one."""
    method = Scripted(then=STEADY)
    _, taken = run(method, control=knots(ct.ZeroOrderHold))
    assert taken[:4] == [(0.0, 1.0), (1.0, 2.0), (2.0, 2.5), (2.5, 3.5)]
    assert {2.5, 5.0, 10.0} <= {stop for _, stop in taken}


def test_slopes_are_kept_where_the_input_is_continuous():
    """The last slope of a step is the first of the next, but after a jump; a rejection keeps it as well."""
    for kind, fresh in ((ct.LinearInterpolation, [0.0]), (ct.ZeroOrderHold, [0.0, 2.5, 5.0])):
        method = Scripted(9.0, then=STEADY)
        loop, prob, taken, dynamics = shared(method, control=knots(kind))
        loop.run(prob.h0)
        assert [step.start for step in taken if step.fresh] == fresh
        assert dynamics.stats.evaluations == len(fresh)
        assert loop.rejected == 1
        assert all(slope is not None for slope in method.slopes)


@pytest.mark.parametrize(
    ("method", "code", "message"),
    [
        (
            Scripted(then=math.nan),
            ReturnCode.UNSTABLE,
            "no step from t = 0 gives a finite state, however small",
        ),
        (Scripted(then=1e9), ReturnCode.DT_UNDERFLOW, "at t = 0 the tolerances ask for a step of"),
    ],
)
def test_a_step_too_small_ends_the_solve(method, code, message):
    with pytest.raises(Halt, match=message) as ended:
        run(method)
    assert ended.value.code is code


def test_attempts_are_limited():
    method = Scripted(9.0, 9.0, then=STEADY)
    with pytest.raises(Halt, match="5 steps were tried and t = ") as ended:
        run(method, max_steps=5)
    assert ended.value.code is ReturnCode.MAX_STEPS
    assert len(method.attempts) == 5


class ScriptedPerSample:
    """Errors by sample: those of sample 1 are large where it tries steps longer than 0.1."""

    def __init__(self):
        self.sizes = []

    def __call__(self, dynamics, step, h, slope, estimate):
        size = step.stop - step.start
        self.sizes.append(size.tolist())
        ratio = torch.where(size > 0.1, torch.tensor([0.5, 2.0, 0.5]), STEADY)
        return Attempt(h + size[:, None], torch.ones_like(h), ratio[:, None].expand_as(h).to(h))


def test_samples_accept_and_reject_on_their_own():
    field = ct.Field(lambda t, h, u: torch.ones_like(h))
    span = (torch.zeros(3), torch.tensor([2.0, 1.0, 0.0]))
    prob = ct.ODEProblem(field, torch.zeros(3, 1, dtype=torch.float64), span)
    seen = []
    frame = SampleFrame(
        SampleGrid(prob), prob.h0, lambda t, h, moved, advance: seen.append((t, h.clone(), moved))
    )
    method = ScriptedPerSample()
    alg = ct.Dopri5(first_step=0.5)
    loop = AdaptiveLoop(Dynamics(prob, Stats("", "", "")), alg, method, frame, (0.0, TOLERANCE), 100)
    loop.run(prob.h0)
    # Sample 2 has nothing to do; sample 1 shrinks while sample 0 goes on.
    assert method.sizes[0] == [0.5, 0.5, 0.0]
    assert method.sizes[1][1] == pytest.approx(0.5 * 0.9 * 2**-0.2)
    assert seen[0][0].tolist() == [0.5, 0.0, 0.0]
    plan, reached = frame.plan()
    times = np.concatenate([plan.start[:1], plan.stop])
    states = torch.stack(frame.states)[torch.as_tensor(reached), torch.arange(3)]
    # Everybody's nodes without the attempts in between, the end repeated; the state is the time here.
    assert np.abs(states[..., 0].numpy() - times).max() <= 1e-15
    assert times[-1].tolist() == [2.0, 1.0, 0.0]
    assert plan.counts[2] == 0
    assert (np.diff(times, axis=0) >= 0).all()
    assert np.array_equal(plan.dt > 0, np.arange(len(plan))[:, None] < plan.counts)
    assert sum(moved for *_, moved in seen) == plan.counts.sum()


def test_the_error_is_measured_per_sample_over_units():
    error = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    h = torch.tensor([[1.0, -10.0], [0.0, 0.0]], dtype=torch.float64)
    following = torch.tensor([[-3.0, 2.0], [1.0, math.inf]], dtype=torch.float64)
    ratio = error_ratio(error, h, following, rtol=0.1, atol=0.5)
    # scales 0.5 + 0.1 * (3, 10)
    assert ratio[0].item() == pytest.approx(math.sqrt(((3 / 0.8) ** 2 + (4 / 1.5) ** 2) / 2))
    assert math.isnan(ratio[1].item())


@pytest.mark.parametrize(("alg", "stages"), [(ct.Bosh3(), 3), (ct.Dopri5(), 6), (ct.Tsit5(), 6)])
def test_evaluations_are_what_the_stages_cost(alg, stages):
    """First step: two for its size; then one at the start and the stages but the first, for every attempt."""
    field = ct.MultiGate(0, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prob = ct.ODEProblem(field, torch.ones(2, 3, dtype=torch.float64), (0.0, 20.0))
    with torch.no_grad():
        stats = ct.solve(prob, alg).stats
    assert stats.engine == "native"
    assert stats.evaluations == 2 + 1 + stages * (stats.accepted + stats.rejected)


def test_a_graph_costs_its_steps_once_more_and_memory_of_the_states_only():
    """The stages are computed again in the backward pass; between forward and backward the graph keeps what
    lies between the steps."""
    field = ct.GRU(0, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prob = ct.ODEProblem(field, torch.ones(16, 32, dtype=torch.float64), (0.0, 10.0))
    with watched() as saved:
        sol = ct.solve(prob, ct.Dopri5(), saveat=[10.0], dense=False)
    stats = sol.stats
    state = prob.h0.numel() * prob.h0.element_size()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in field.parameters())
    # A state and a slope per step, where a graph of all stages would keep some 60 states.
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in saved())}
    assert (
        sum(storage.nbytes() for storage in storages.values())
        <= (4 * stats.accepted + 8) * state + 2 * weights
    )
    found, again = 3 + 6 * (stats.accepted + stats.rejected), 6 * stats.accepted
    # A fused cell's states need not be computed twice, nor the slope at the end.
    assert stats.evaluations == (found if fast_paths() else found + again + 1)
    sol.hs.sum().backward()
    assert stats.evaluations_backward == (again if fast_paths() else again + 1)


def test_nothing_is_taken_twice_without_a_gradient():
    """Autograd is on, but no tensor asks for a gradient."""
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: -h), torch.ones(2, 3, dtype=torch.float64), (0.0, 5.0))
    stats = ct.solve(prob, ct.Dopri5()).stats
    assert stats.evaluations == 3 + 6 * (stats.accepted + stats.rejected)


def test_a_gradient_that_appears_late_is_not_lost():
    """A field that uses a captured tensor only from t = 2 on."""
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def late(t, h, u):
        return -h * w if float(t) > 2.0 else -h

    for alg in (ct.Dopri5(), ct.Dopri5(per_sample=True)):
        prob = ct.ODEProblem(ct.Field(late), torch.ones(1, 1, dtype=torch.float64), (0.0, 3.0))
        if alg.per_sample:
            prob = ct.ODEProblem(ct.Field(lambda t, h, u: late(t.reshape(-1)[0], h, u)), prob.h0, prob.tspan)
        sol = ct.solve(prob, alg, rtol=1e-9, atol=1e-9, saveat=[3.0])
        (by_w,) = torch.autograd.grad(sol.hs.sum(), w)
        # h(3) = exp(-2) exp(-w): the step across t = 2 is resolved by the error control.
        assert by_w.item() == pytest.approx(-math.exp(-2.5), rel=1e-5)


@pytest.mark.parametrize("spacing", [0.1, 0.05, 0.025])
def test_no_sliver_where_the_longest_step_is_the_spacing_of_the_knots(spacing):
    knots = [k * spacing for k in range(41)]
    control = ct.ZeroOrderHold(knots, torch.zeros(40, 1, dtype=torch.float64))
    prob = ct.ODEProblem(
        ct.Field(lambda t, h, u: u - h), torch.ones(1, 1).double(), (0.0, knots[-1]), control
    )
    alg = ct.Dopri5(first_step=spacing, max_step=spacing)
    with torch.no_grad():
        sol = ct.solve(prob, alg)
    assert sol.stats.accepted == 40
    assert sol.ts.tolist() == knots


@pytest.mark.parametrize("name", ["first_step", "max_step"])
def test_a_step_below_the_resolution_of_time_is_refused_by_name(name):
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: -h), torch.ones(1, 1).double(), (0.0, 1.0))
    with pytest.raises(ValueError, match=rf"{name} is below what float64 can tell apart at these times"):
        ct.solve(prob, ct.Dopri5(**{name: 1e-17}))


def test_a_mean_over_samples_hides_one_in_many():
    """One sample of 16 moves. Its error counts whole with "max", a quarter of it in the mean, and with
    torchdiffeq's estimate a sixth: steps are those of "max" at six times the tolerance."""

    def steps(alg: ct.Dopri5, tolerance: float) -> int:
        h0 = torch.zeros(16, 1, dtype=torch.float64)
        h0[3] = 1.0
        prob = ct.ODEProblem(ct.Field(lambda t, h, u: -h * (1.0 + h.square())), h0, (0.0, 8.0))
        return ct.solve(prob, alg, rtol=1e-12, atol=tolerance).stats.accepted

    mean = steps(ct.Dopri5(norm="torchdiffeq"), 1e-6)
    assert mean < steps(ct.Dopri5(), 1e-6)
    # The first step is chosen by norms of states and slopes, in which the tolerance is no plain factor.
    assert abs(mean - steps(ct.Dopri5(), 6e-6)) <= 1


@pytest.mark.parametrize(
    ("alg", "ours", "theirs"),
    [
        (ct.Dopri5, DOPRI5, dopri5._DORMAND_PRINCE_SHAMPINE_TABLEAU),
        (ct.Bosh3, BOSH3, bosh3._BOGACKI_SHAMPINE_TABLEAU),
    ],
)
def test_the_estimate_is_torchdiffeq_s_where_it_is_asked_for(alg, ours, theirs):
    scaled = alg.mean_scale * torch.tensor(ours.error, dtype=torch.float64)
    # Their coefficients are differences of numbers below 1.
    torch.testing.assert_close(scaled, theirs.c_error, rtol=0.0, atol=1e-15)


def test_a_mean_over_samples_needs_a_common_clock():
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: -h), torch.ones(2, 1), (0.0, 1.0))
    with pytest.raises(ValueError, match=r"every sample takes steps of its own; norm must be 'max'"):
        ct.solve(prob, ct.Dopri5(per_sample=True, norm="torchdiffeq"))
    with pytest.raises(ValueError, match=r"norm is 'rms'; it must be 'max' or 'torchdiffeq'"):
        unchecked(ct.Dopri5)(norm="rms")
