"""Explicit Runge-Kutta steps on a fused cell, against loops written here over the same accepted steps."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from scipy.integrate import RK23, RK45
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import ctgate as ct
from ctgate.integrators import fused_stages, known
from ctgate.integrators.fused_stages import Measures
from ctgate.integrators.runge_kutta import HEUN, MIDPOINT, RK4, TSIT5
from ctgate.kernels.switch import fast_paths, plain_paths
from tests.saved_tensors import watched

KINDS = {
    "leaky": partial(ct.Leaky, alpha=0.6),
    "multi": ct.MultiGate,
    "gru after": ct.GRU,
    "gru before": partial(ct.GRU, reset="before"),
    "lstm": ct.LSTM,
    "ltc": ct.LTC,
}
# Nodes, stages, weights: by scipy where it has them.
TABLEAUS = {
    ct.Bosh3: (RK23.C.tolist(), RK23.A.tolist(), RK23.B.tolist()),
    ct.Dopri5: (RK45.C.tolist(), RK45.A.tolist(), RK45.B.tolist()),
    **{
        alg: (list(tableau.c), [list(row) for row in tableau.a], list(tableau.b))
        for alg, tableau in ((ct.Tsit5, TSIT5), (ct.Midpoint, MIDPOINT), (ct.Heun, HEUN), (ct.RK4, RK4))
    },
}
CONTROLS = [None, ct.ZeroOrderHold, ct.LinearInterpolation, ct.CubicHermite]
LOOSE = {"rtol": 1e-4, "atol": 1e-6}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def setting(
    kind=ct.GRU, control=ct.ZeroOrderHold, batch=(2,), channels=3, hidden=4, dtype=torch.float64, **options
):
    """A problem over (0, 3.5), and the tensors that want a gradient, by name."""
    generator = torch.Generator().manual_seed(0)
    channels = 0 if control is None else channels
    field = kind(channels, hidden, generator=generator, dtype=dtype, **options)
    h0 = draw(*batch, field.state_size, seed=1, dtype=dtype).requires_grad_()
    wanted = {**dict(field.named_parameters()), "h0": h0}
    u = None
    if control is not None:
        wanted["xs"] = xs = draw(5, *batch, channels, seed=2, dtype=dtype).requires_grad_()
        u = control(torch.arange(5.0), xs)
    if channels == 0:
        del wanted["weight_ih"]
    return ct.ODEProblem(field, h0, (0.0, 3.5), u), wanted


def walk(prob, alg, times: list[float]) -> Tensor:
    """The states at these nodes, (node, *batch, state), evaluated one after the other."""
    nodes, rows, weights = TABLEAUS[type(alg)]
    states = [prob.h0]
    for start, stop in pairwise(times):
        u = None if prob.control is None else prob.control.on(start, stop)
        slopes: list[Tensor] = []
        for c, row in zip(nodes, rows, strict=True):
            t = start + c * (stop - start)
            h = states[-1] + (stop - start) * sum(a * k for a, k in zip(row, slopes, strict=False))
            slopes.append(prob.field(t, h, None if u is None else u(t)))
        states.append(states[-1] + (stop - start) * sum(b * k for b, k in zip(weights, slopes, strict=False)))
    return torch.stack(states)


def weighed(hs: Tensor) -> Tensor:
    return (hs * torch.linspace(-1.0, 2.0, hs.numel(), dtype=hs.dtype).view(hs.shape)).sin().sum()


def assert_same(mine, reference, rtol=1e-11):
    for one, other in zip(mine, reference, strict=True):
        assert (one - other).abs().max() <= rtol * other.abs().max() + 1e-3 * rtol


def assert_fused(stats, stages):
    """That the states were computed once, and their stages once more in the backward pass."""
    if fast_paths():
        assert stats.evaluations_backward == stages * stats.accepted


def compare(prob, wanted, alg, stages, rtol=1e-11, **options):
    sol = ct.solve(prob, alg, **options)
    mine = torch.autograd.grad(weighed(sol.hs), list(wanted.values()))
    hs = walk(prob, alg, sol.ts.tolist())
    assert_same([sol.hs], [hs], rtol)
    assert_same(mine, torch.autograd.grad(weighed(hs), list(wanted.values())), rtol)
    assert_fused(sol.stats, stages)
    return sol


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_every_cell(kind, control):
    tau = torch.linspace(0.4, 1.0, 4, dtype=torch.float64)
    learn = {} if kind is ct.LTC else {"tau": tau, "learn_tau": True}
    compare(*setting(kind, control, **learn), ct.Dopri5(), 6, **LOOSE)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(("alg", "stages"), [(ct.Bosh3(), 3), (ct.Tsit5(), 6), (ct.Dopri5(max_step=0.3), 6)])
@pytest.mark.parametrize("layernorm", [False, True])
def test_every_adaptive_method(alg, stages, layernorm):
    compare(*setting(layernorm=layernorm), alg, stages, **LOOSE)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(("alg", "stages"), [(ct.Midpoint(0.3), 2), (ct.Heun(0.3), 2), (ct.RK4(0.3), 4)])
@pytest.mark.parametrize("control", [None, ct.ZeroOrderHold, ct.CubicHermite])
def test_steps_of_known_sizes(alg, stages, control):
    """0.3 does not divide the intervals: the last step in each is shorter."""
    compare(*setting(control=control), alg, stages)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize(("channels", "hidden"), [(1, 1), (2, 5)])
def test_sizes(batch, channels, hidden):
    compare(*setting(batch=batch, channels=channels, hidden=hidden), ct.Dopri5(), 6, **LOOSE)


def test_an_input_that_all_samples_share():
    prob, wanted = setting()
    xs = draw(5, 3, seed=3).requires_grad_()
    prob = ct.remake(prob, control=ct.LinearInterpolation(torch.arange(5.0), xs))
    compare(prob, {**wanted, "xs": xs}, ct.Dopri5(), 6, **LOOSE)


def test_a_function_of_time_as_the_input():
    """Without a gradient of its own; with one, the steps are the graph's as those of any field."""
    prob, wanted = setting(control=None)
    gain = draw(3, seed=3).requires_grad_()
    field = ct.GRU(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = {**dict(field.named_parameters()), "h0": wanted["h0"]}
    prob = ct.remake(prob, field=field, control=ct.FunctionControl(lambda t: torch.sin(t * gain.detach())))
    compare(prob, wanted, ct.Dopri5(), 6, **LOOSE)
    prob = ct.remake(prob, control=ct.FunctionControl(lambda t: torch.sin(t * gain)))
    sol = ct.solve(prob, ct.Dopri5(), **LOOSE)
    mine = torch.autograd.grad(weighed(sol.hs), gain)
    assert_same(mine, torch.autograd.grad(weighed(walk(prob, ct.Dopri5(), sol.ts.tolist())), gain))


@pytest.mark.parametrize(("hidden", "kept"), [(21, True), (20, False)])
@pytest.mark.parametrize("knots", [(), (1.3,)])
def test_an_input_that_takes_less_room_than_the_state_is_kept(hidden, kept, knots):
    """At seven stages: the backward pass does not ask for it again, nor a step where the last one did."""
    times: list[float] = []

    def fn(t: Tensor) -> Tensor:
        times.append(float(t))
        return torch.sin(t * frequencies) + (t < 1.3)

    frequencies = draw(3, seed=3)
    field = ct.GRU(3, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h0 = draw(2, hidden, seed=1).requires_grad_()
    wanted = {**dict(field.named_parameters()), "h0": h0}
    prob = ct.ODEProblem(field, h0, (0.0, 3.5), ct.FunctionControl(fn, knots=knots))
    sol = compare(prob, wanted, ct.Dopri5(), 6, **LOOSE)
    if fast_paths() and not knots:
        times.clear()
        again = ct.solve(prob, ct.Dopri5(), dense=False, **LOOSE)
        tried = sol.stats.accepted + sol.stats.rejected
        # Nodes 1 to 5; two more are those that the first step's size is chosen by, another its start.
        assert len(times) <= 5 * tried + 3
        times.clear()
        again.hs.sum().backward()
        assert (len(times) == 0) == kept


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("size", [1, 10**6])
@pytest.mark.parametrize("apart", [1, 10**6])
def test_steps_side_by_side_in_the_backward_pass(size, apart, monkeypatch):
    """One at a time, and all at once."""
    monkeypatch.setattr(known, "_CACHED", size)
    monkeypatch.setattr(fused_stages, "_APART", apart)
    for control in CONTROLS:
        compare(*setting(control=control), ct.Dopri5(), 6, **LOOSE)


def test_rejected_steps_leave_nothing():
    prob, wanted = setting()
    sol = compare(prob, wanted, ct.Dopri5(first_step=0.9), 6, rtol=1e-11, atol=1e-9)
    assert sol.stats.rejected > 0


@pytest.mark.parametrize("dense", [True, False])
def test_states_inside_steps(dense):
    """The interpolant between fused nodes is that between plain ones; the sizes of steps differ by the
    rounding of error estimates, which the tolerance makes small."""
    prob, wanted = setting(control=ct.CubicHermite)

    def run():
        sol = ct.solve(prob, ct.Dopri5(), saveat=[0.1, 0.77, 2.0, 3.3], dense=dense, rtol=1e-10, atol=1e-12)
        return [sol.hs, *torch.autograd.grad(weighed(sol.hs), list(wanted.values()))]

    mine = run()
    with plain_paths():
        assert_same(mine, run(), rtol=1e-9)


@pytest.mark.parametrize("own_knots", [True, False])
@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.RK4(0.4)])
def test_samples_with_steps_of_their_own(alg, own_knots):
    """Each sample by itself on its own nodes; one of them takes fewer steps and stands still."""
    prob, wanted = setting(control=ct.LinearInterpolation, batch=(3,))
    stops = torch.tensor([3.5, 1.2, 3.5], dtype=torch.float64)
    ts = torch.arange(5.0, dtype=torch.float64)
    if own_knots:
        ts = torch.stack([ts, 0.6 * ts, 0.9 * ts], 1)
    control = ct.LinearInterpolation(ts, wanted["xs"])
    options = LOOSE if alg.adaptive else {}
    sol = ct.solve(ct.remake(prob, control=control, tspan=(torch.zeros(3), stops)), alg, **options)
    mine = torch.autograd.grad(weighed(sol.hs), list(wanted.values()))
    columns = []
    for k in range(3):
        times = sol.ts[:, k].tolist()
        own = ct.LinearInterpolation(ts[:, k] if own_knots else ts, wanted["xs"][:, k])
        alone = ct.ODEProblem(prob.field, wanted["h0"][k], (0.0, float(stops[k])), own)
        rows = walk(alone, alg, sorted(set(times)))
        columns.append(torch.cat([rows, rows[-1:].expand(len(times) - len(rows), -1)]))
    assert len({len(set(sol.ts[:, k].tolist())) for k in range(3)}) > 1
    hs = torch.stack(columns, 1)
    assert_same([sol.hs], [hs])
    assert_same(mine, torch.autograd.grad(weighed(hs), list(wanted.values())))


@pytest.mark.parametrize("names", [("h0",), ("xs",), ("weight_hh",)])
def test_what_does_not_want_a_gradient_gets_none(names):
    prob, wanted = setting(control=ct.CubicHermite)
    for name, tensor in wanted.items():
        tensor.requires_grad_(name in names)
    compare(prob, {name: wanted[name] for name in names}, ct.Dopri5(), 6, **LOOSE)


@pytest.mark.usefixtures("both_ways")
def test_in_single_precision():
    """States and gradients to 1e-5 of those in float64 on the same nodes."""
    prob, wanted = setting(dtype=torch.float32, control=ct.LinearInterpolation)
    sol = ct.solve(prob, ct.Dopri5(), **LOOSE)
    mine = torch.autograd.grad(weighed(sol.hs), list(wanted.values()))
    double, exact = setting(control=ct.LinearInterpolation)
    double.field.load_state_dict(prob.field.state_dict())
    for name in ("h0", "xs"):
        exact[name].data.copy_(wanted[name].detach())
    hs = walk(double, ct.Dopri5(), sol.ts.tolist())
    assert_same([sol.hs], [hs], rtol=1e-5)
    assert_same(mine, torch.autograd.grad(weighed(hs), list(exact.values())), rtol=1e-5)


@pytest.mark.parametrize("control", [ct.ZeroOrderHold, ct.LinearInterpolation])
def test_second_derivatives(control):
    """Of the same steps; one tensor is made of another."""
    prob, wanted = setting(control=control)
    wanted["h0"] = root = prob.h0
    prob = ct.remake(prob, h0=root + wanted["xs"].sum() * root.square())
    tensors = list(wanted.values())
    sol = ct.solve(prob, ct.Dopri5(), **LOOSE)

    def second(hs):
        first = torch.autograd.grad(weighed(hs), tensors, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), tensors, retain_graph=True)]

    reference = second(walk(prob, ct.Dopri5(), sol.ts.tolist()))
    assert_same(second(sol.hs), reference, rtol=1e-10)


def test_derivatives_by_finite_differences():
    prob, wanted = setting(batch=(1,), channels=1, hidden=2, control=ct.LinearInterpolation)

    def last(h0, xs, *weights):
        parameters = dict(zip(names, weights, strict=True))
        control = ct.LinearInterpolation(torch.arange(5.0), xs)
        own = ct.remake(prob, h0=h0, control=control, parameters=parameters)
        return ct.solve(own, ct.RK4(0.5)).hs[-1]

    names = [name for name in wanted if name not in ("h0", "xs")]
    tensors = [wanted[name] for name in ("h0", "xs", *names)]
    assert gradcheck(last, tensors)
    assert gradgradcheck(last, tensors)


def test_many_cotangents_at_once():
    prob, wanted = setting()
    hs = ct.solve(prob, ct.Dopri5(), **LOOSE).hs[-1, 0]
    units = torch.eye(4, dtype=torch.float64)
    tensors = list(wanted.values())
    mine = torch.autograd.grad(hs, tensors, units, is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(hs, tensors, unit, retain_graph=True) for unit in units]
    assert_same(mine, [torch.stack(column) for column in zip(*rows, strict=True)])


def test_transforms_give_the_gradient():
    prob, wanted = setting()
    parameters = {name: p.detach() for name, p in prob.field.named_parameters()}

    def loss(parameters):
        return weighed(ct.solve(ct.remake(prob, parameters=parameters), ct.RK4(0.4)).hs)

    mine = torch.func.grad(loss)(parameters)
    hs = ct.solve(prob, ct.RK4(0.4)).hs
    expected = torch.autograd.grad(weighed(hs), [wanted[name] for name in mine])
    assert_same(list(mine.values()), expected)


def test_checkpoints_keep_fewer_states():
    prob, wanted = setting(control=ct.LinearInterpolation)
    results, held = [], []
    for sensealg in (ct.DiscreteAdjoint(), ct.DiscreteAdjoint(checkpoints=2)):
        with watched() as saved:
            sol = ct.solve(prob, ct.Dopri5(), saveat=[3.5], dense=False, sensealg=sensealg, **LOOSE)
        held.append(sum(tensor.numel() for tensor in saved()))
        results.append(torch.autograd.grad(weighed(sol.hs), list(wanted.values())))
    assert_same(*results)


def test_memory_of_one_state_per_accepted_step():
    prob, _ = setting(batch=(32,), hidden=16, control=ct.LinearInterpolation)
    prob.control.xs.requires_grad_(False)
    bytes_held = []
    for stop in (1.5, 3.5):
        with watched() as saved:
            sol = ct.solve(
                ct.remake(prob, tspan=(0.0, stop)), ct.Dopri5(), saveat=[stop], dense=False, **LOOSE
            )
        storages = {
            storage.data_ptr(): storage.nbytes() for storage in (x.untyped_storage() for x in saved())
        }
        bytes_held.append((sol.stats.accepted, sum(storages.values())))
    (few, small), (many, large) = bytes_held
    state = prob.h0.numel() * prob.h0.element_size()
    if fast_paths():
        assert large - small == (many - few) * state


def test_an_update_before_backward_is_noticed():
    prob, _ = setting()
    sol = ct.solve(prob, ct.Dopri5(), **LOOSE)
    with torch.no_grad():
        prob.field.weight_hh.mul_(1.1)
    with pytest.raises(
        RuntimeError, match=r"weight_hh was changed since the solve; backward\(\) takes the steps"
    ):
        sol.hs.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("state", [1, 5, 16, 33])
@pytest.mark.parametrize("own", [False, True])
def test_a_compiled_error_has_the_size_of_the_plain_one(dtype, state, own):
    module = pytest.importorskip("ctgate.kernels.compiled.errors")
    generator = torch.Generator().manual_seed(state)
    rows = torch.randn(4, 3, state, generator=generator, dtype=dtype)
    following = torch.randn(3, state, generator=generator, dtype=dtype)
    weights, rtol, atol = (0.3, 0.0, -1.7), 1e-3, 1e-2
    dt = torch.tensor([0.1, 2.0, 0.5], dtype=dtype) if own else 0.25
    measures = Measures(module, rows, weights)
    measures.resize(dt)
    sizes = dt if own else torch.full((3,), dt, dtype=dtype)
    error = sizes[:, None] * sum(w * row for w, row in zip(weights, rows[1:], strict=True))
    scale = atol + rtol * torch.maximum(rows[0].abs(), following.abs())
    expected = (error / scale).square().mean(-1).sqrt()
    found = measures(following, torch.Size([3]), rtol, atol)
    # Sums of at most 33 squares, and of three terms that may cancel.
    torch.testing.assert_close(found, expected, rtol=64 * torch.finfo(dtype).eps, atol=0.0)
    for spoilt in (math.nan, math.inf, -math.inf):
        following[1, state // 2] = spoilt
        found = measures(following, torch.Size([3]), rtol, atol)
        assert torch.isnan(found).tolist() == [False, True, False]
