"""Ensembles: serial and batched agree, hooks, failures, gradients."""

import dataclasses
import math
import sys
import warnings

import numpy as np
import pytest
import torch

import ctgate as ct
from ctgate.ensembles import (
    EnsembleBatched,
    EnsembleProblem,
    EnsembleSerial,
    solve_ensemble,
)
from tests.typechecker import unchecked

SIZE, CHANNELS, COUNT = 3, 2, 4
F64 = {"dtype": torch.float64}
FIXED = (ct.RK4(dt=0.2), ct.ExponentialMidpoint(dt=0.2), ct.Euler(dt=0.15))
ADAPTIVE = (ct.Dopri5(), ct.Bosh3(), ct.Tsit5(), ct.Rosenbrock23())


def quiet(prob, alg, **options):
    """A solve that says nothing when it fails, at loose tolerances: batching must not matter at any."""
    if alg.adaptive:
        options = {"rtol": 1e-2, "atol": 1e-4, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return ct.solve(prob, alg, **options)


def run(eprob, alg, ensemble, **options):
    return solve_ensemble(eprob, alg, ensemble, quiet, **options)


@pytest.fixture
def prob():
    generator = torch.Generator().manual_seed(1)
    field = ct.MultiGate(CHANNELS, SIZE, tau=0.3, generator=generator, **F64).requires_grad_(False)
    xs = torch.randn(4, CHANNELS, generator=generator, **F64)
    h0 = torch.randn(SIZE, generator=generator, **F64)
    return ct.ODEProblem(field, h0, (0.0, 1.0), ct.ZeroOrderHold([0.0, 0.25, 0.5, 0.9, 1.0], xs))


def draw(like, ctx):
    return torch.randn(like.shape, generator=ctx.generator, dtype=like.dtype)


def vary_states(prob, ctx):
    return ct.remake(prob, h0=draw(prob.h0, ctx))


def vary_parameters(prob, ctx):
    weights = prob.field.weight_hh.detach()
    return ct.remake(
        prob, parameters={"weight_hh": weights + 0.3 * draw(weights, ctx)}, h0=draw(prob.h0, ctx)
    )


def vary_fields(prob, ctx):
    field = ct.MultiGate(CHANNELS, SIZE, tau=0.2 + 0.1 * ctx.index, generator=ctx.generator, **F64)
    return ct.remake(prob, field=field.requires_grad_(False))


def vary_inputs(prob, ctx):
    xs = draw(prob.control.xs, ctx)
    return ct.remake(prob, control=ct.ZeroOrderHold(prob.control.ts, xs))


def vary_times(prob, ctx):
    """Inputs with different numbers of knots and different ends."""
    stop = 0.6 + 0.1 * ctx.index
    ts = torch.linspace(0.0, stop, 3 + ctx.index, **F64)
    xs = torch.randn(2 + ctx.index, CHANNELS, generator=ctx.generator, **F64)
    return ct.remake(prob, control=ct.ZeroOrderHold(ts, xs), tspan=(0.01 * ctx.index, stop))


def vary_everything(prob, ctx):
    return vary_parameters(vary_times(prob, ctx), ctx)


VARIATIONS = (vary_states, vary_parameters, vary_fields, vary_inputs, vary_times, vary_everything)


def assert_same(one, other, atol=1e-12):
    assert one.retcodes == other.retcodes
    for sol, twin in zip(one, other, strict=True):
        assert sol.ts.shape == twin.ts.shape
        torch.testing.assert_close(sol.ts, twin.ts, rtol=0.0, atol=atol)
        torch.testing.assert_close(sol.hs, twin.hs, rtol=0.0, atol=atol)
        assert sol.retcode is twin.retcode
        middle = 0.5 * (sol.ts[0] + sol.ts[-1])
        torch.testing.assert_close(sol(middle), twin(middle), rtol=0.0, atol=10 * atol)


@pytest.mark.parametrize("vary", VARIATIONS)
@pytest.mark.parametrize("alg", [FIXED[0], ADAPTIVE[0]], ids=str)
def test_batching_does_not_matter(prob, vary, alg):
    eprob = EnsembleProblem(prob, vary, COUNT)
    serial = run(eprob, alg, EnsembleSerial())
    # Each trajectory as a person would solve it alone, not through the ensemble.
    alone = [quiet(vary(prob, eprob.context(index)), alg) for index in range(COUNT)]
    for sol, single in zip(serial, alone, strict=True):
        torch.testing.assert_close(sol.hs, single.hs, rtol=0.0, atol=1e-12)
    assert len({float(sol.hs[-1, 0]) for sol in serial}) == COUNT
    for size in (1, 3, None):
        batched = run(eprob, alg, EnsembleBatched(size))
        assert len(batched.solves) == -(-COUNT // (size or COUNT))
        assert_same(serial, batched)


@pytest.mark.parametrize("alg", [*FIXED[1:], *ADAPTIVE[1:]], ids=str)
def test_every_method(prob, alg):
    eprob = EnsembleProblem(prob, vary_everything, 3)
    assert_same(run(eprob, alg, EnsembleSerial()), run(eprob, alg, EnsembleBatched()), atol=1e-11)


def test_float32():
    field = ct.GRU(CHANNELS, SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    control = ct.CubicHermite([0.0, 0.3, 1.0], torch.randn(3, CHANNELS, generator=torch.Generator()))
    prob = ct.ODEProblem(field, torch.zeros(SIZE), (0.0, 1.0), control)

    def vary(prob, ctx):
        weights = prob.field.weight_hh
        control = ct.CubicHermite([0.0, 0.4 + 0.1 * ctx.index, 1.0], draw(prob.control.xs, ctx))
        return ct.remake(prob, parameters={"weight_hh": weights + draw(weights, ctx)}, control=control)

    eprob = EnsembleProblem(prob, vary, 3)
    batched = run(eprob, FIXED[0], EnsembleBatched())
    assert batched[0].hs.dtype == torch.float32
    assert_same(run(eprob, FIXED[0], EnsembleSerial()), batched, atol=2e-6)


@pytest.mark.parametrize("alg", [FIXED[0], ADAPTIVE[0]], ids=str)
def test_trajectories_with_a_batch_of_their_own(prob, alg):
    def vary(prob, ctx):
        return ct.remake(
            vary_parameters(prob, ctx), h0=torch.randn(2, 4, SIZE, generator=ctx.generator, **F64)
        )

    eprob = EnsembleProblem(prob, vary, 3)
    serial, batched = run(eprob, alg, EnsembleSerial()), run(eprob, alg, EnsembleBatched())
    for sol, twin in zip(serial, batched, strict=True):
        assert sol.ts.shape == twin.ts.shape
        torch.testing.assert_close(sol.ts, twin.ts, rtol=0.0, atol=1e-12)
        torch.testing.assert_close(sol.hs, twin.hs, rtol=0.0, atol=1e-12)
        assert sol.hs.shape[1:] == (2, 4, SIZE)


@pytest.mark.parametrize("alg", [FIXED[0], ADAPTIVE[0]], ids=str)
@pytest.mark.parametrize("dense", [True, False])
def test_saveat(prob, alg, dense):
    eprob = EnsembleProblem(prob, vary_everything, 3)
    options = {"saveat": [0.1, 0.33, 0.5], "dense": dense}
    serial = run(eprob, alg, EnsembleSerial(), **options)
    batched = run(eprob, alg, EnsembleBatched(), **options)
    for sol, twin in zip(serial, batched, strict=True):
        assert sol.ts.tolist() == twin.ts.tolist() == options["saveat"]
        torch.testing.assert_close(sol.hs, twin.hs, rtol=0.0, atol=1e-12)
        assert isinstance(sol.dense, str) == isinstance(twin.dense, str) == (not dense)


def test_a_plain_function_sees_what_it_sees_alone():
    """No batch dimension and a 0-dim time, so functions written for one state work."""
    shapes = set()

    def fn(t, h, u):
        shapes.add((tuple(h.shape), tuple(t.shape)))
        x, v = h
        return torch.stack([v, -x + torch.sin(t) * u[0]])

    prob = ct.ODEProblem(ct.Field(fn), torch.zeros(2, **F64), (0.0, 1.0))

    push = ct.FunctionControl(lambda t: t.sin()[None], knots=[0.35])
    prob = ct.remake(prob, control=push)

    def vary(prob, ctx):
        return ct.remake(prob, h0=draw(prob.h0, ctx), tspan=(0.0, 1.0 + ctx.index))

    eprob = EnsembleProblem(prob, vary, 3)
    assert_same(run(eprob, ct.RK4(dt=0.1), EnsembleSerial()), run(eprob, ct.RK4(dt=0.1), EnsembleBatched()))
    assert shapes == {((2,), ())}


@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.Rosenbrock23()], ids=str)
def test_a_module_inside_a_field_may_differ(alg):
    """Its parameters require grad, and Rosenbrock23 differentiates such a field inside the graph."""

    class Net(torch.nn.Module):
        def __init__(self, generator):
            super().__init__()
            self.inner = torch.nn.Linear(2, 2, **F64)
            with torch.no_grad():
                self.inner.weight.normal_(generator=generator)
                self.inner.bias.normal_(generator=generator)

        def forward(self, t, h, u):
            return torch.tanh(self.inner(h)) - h * torch.cos(t)

    def make(generator):
        return ct.Field(Net(generator))

    prob = ct.ODEProblem(make(torch.Generator()), torch.ones(2, **F64), (0.0, 1.0))
    eprob = EnsembleProblem(prob, lambda prob, ctx: ct.remake(prob, field=make(ctx.generator)), 4)
    batched = run(eprob, alg, EnsembleBatched())
    assert len(batched.solves) == 1
    assert batched[3].hs.requires_grad
    assert_same(run(eprob, alg, EnsembleSerial()), batched)


@pytest.mark.parametrize("kind", [ct.LinearInterpolation, ct.CubicHermite])
def test_missing_values_and_held_ends(prob, kind):
    def vary(prob, ctx):
        count = 4 + ctx.index
        ts = torch.linspace(0.1 * ctx.index, 0.8, count, **F64)
        xs = torch.randn(count, CHANNELS, generator=ctx.generator, **F64)
        xs[1, 0] = torch.nan
        return ct.remake(prob, control=kind(ts, xs, extrapolate="hold"))

    eprob = EnsembleProblem(prob, vary, 3)
    batched = run(eprob, ct.Dopri5(), EnsembleBatched())
    assert len(batched.solves) == 1
    assert_same(run(eprob, ct.Dopri5(), EnsembleSerial()), batched)


def test_what_cannot_be_stacked_goes_into_batches_of_its_own(prob):
    def vary(prob, ctx):
        if ctx.index == 1:
            return ct.remake(prob, field=ct.GRU(CHANNELS, SIZE, generator=ctx.generator, **F64))
        if ctx.index == 2:
            return ct.remake(
                prob, field=ct.GRU(CHANNELS, SIZE, reset="before", generator=ctx.generator, **F64)
            )
        if ctx.index == 3:
            field = ct.MultiGate(CHANNELS, SIZE + 1, generator=ctx.generator, **F64)
            return ct.remake(prob, field=field, h0=torch.zeros(SIZE + 1, **F64))
        if ctx.index == 4:
            held = ct.LinearInterpolation([0.0, 1.0], prob.control.xs[:2])
            return ct.remake(prob, control=held)
        if ctx.index == 5:
            return ct.remake(
                prob, control=ct.FunctionControl(lambda t: torch.stack([t, t.cos()]), knots=[0.3])
            )
        return vary_states(prob, ctx)

    eprob = EnsembleProblem(prob, vary, 8)
    batched = run(eprob, ct.Dopri5(), EnsembleBatched())
    assert len(batched.solves) == 6
    assert_same(run(eprob, ct.Dopri5(), EnsembleSerial()), batched)


def test_draws_depend_on_seed_and_index_alone(prob):
    eprob = EnsembleProblem(prob, vary_states, 1000, seed=3)
    firsts = [torch.rand((), generator=eprob.context(index).generator).item() for index in range(1000)]
    assert len(set(firsts)) > 990
    assert abs(np.mean(firsts) - 0.5) < 4 / np.sqrt(12 * 1000)
    neighbours = np.corrcoef(firsts[:-1], firsts[1:])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(1000)
    assert torch.rand((), generator=eprob.context(7).generator).item() == firsts[7]
    other = EnsembleProblem(prob, vary_states, 1000, seed=4)
    assert torch.rand((), generator=other.context(7).generator).item() != firsts[7]


@pytest.mark.parametrize("alg", [ct.RK4(dt=0.05), ct.Dopri5()], ids=str)
def test_a_diverging_trajectory_leaves_the_others_alone(alg):
    def vary(prob, ctx):
        return ct.remake(prob, h0=torch.full((1,), 4.0 if ctx.index == 1 else -1.0 - ctx.index, **F64))

    def growing_to_eight(t, h, u):
        return torch.where(h > 8.0, torch.nan, h)

    prob = ct.ODEProblem(ct.Field(growing_to_eight), torch.zeros(1, **F64), (0.0, 1.0))
    eprob = EnsembleProblem(prob, vary, 4)
    with pytest.warns(RuntimeWarning, match="1 of 4 trajectories failed, first number 1"):
        batched = run(eprob, alg, EnsembleBatched())
    with pytest.warns(RuntimeWarning, match="1 of 4 trajectories failed"):
        serial = run(eprob, alg, EnsembleSerial())
    assert batched.failed == serial.failed == (1,)
    assert batched.retcodes == serial.retcodes
    for index in (0, 2, 3):
        assert batched.retcodes[index] is ct.ReturnCode.SUCCESS
        torch.testing.assert_close(batched[index].hs, serial[index].hs, rtol=0.0, atol=1e-12)
    assert torch.isfinite(batched[1].hs).all()
    assert 0.5 < batched[1].ts[-1] < np.log(2.0)
    with pytest.raises(ct.SolveError, match="trajectory 1") as raised:
        run(eprob, alg, EnsembleBatched(), throw=True)
    assert raised.value.retcode is batched.retcodes[1]


@pytest.mark.parametrize("kind", [ct.ZeroOrderHold, ct.LinearInterpolation])
@pytest.mark.parametrize("alg", [ct.RK4(dt=0.2), ct.Dopri5(), ct.Rosenbrock23()], ids=str)
def test_gradients_flow_to_parameters_states_and_inputs(prob, alg, kind):
    weights = torch.stack([prob.field.weight_hh.detach() * (1 + 0.1 * k) for k in range(3)])
    h0 = torch.stack([prob.h0 * (k - 1.0) for k in range(3)])
    xs = torch.stack([prob.control.xs[[0, 1, 2, 3, 0]] * (1 + k) for k in range(3)])
    tensors = [tensor.requires_grad_() for tensor in (weights, h0, xs, prob.field.bias)]

    def vary(prob, ctx):
        k = ctx.index
        control = kind([0.0, 0.2 + 0.1 * k, 0.5, 0.7, 1.0], xs[k])
        return ct.remake(prob, parameters={"weight_hh": weights[k]}, h0=h0[k], control=control)

    eprob = EnsembleProblem(prob, vary, 3)

    def gradients(ensemble):
        solution = run(eprob, alg, ensemble)
        loss = sum((k + 1) * (sol.hs[-1].square().sum() + sol(0.4).sum()) for k, sol in enumerate(solution))
        own = torch.autograd.grad(loss, tensors)
        return own, solution.stats

    serial, _ = gradients(EnsembleSerial())
    batched, stats = gradients(EnsembleBatched())
    assert stats.evaluations > 0
    for one, other in zip(serial, batched, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_output_func_and_indexing(prob):
    def output(sol, ctx):
        return ctx.index, float(sol.hs[-1].sum()), float(torch.rand((), generator=ctx.generator))

    eprob = EnsembleProblem(prob, vary_states, 4, output_func=output)
    serial, batched = run(eprob, FIXED[0], EnsembleSerial()), run(eprob, FIXED[0], EnsembleBatched(3))
    assert len(serial) == 4
    assert serial[2][0] == 2
    np.testing.assert_allclose(serial.outputs, batched.outputs, rtol=1e-12)
    with pytest.raises(TypeError, match="output 0 is tuple"):
        serial.to_xarray()


def test_reduction_stops_early(prob):
    seen = []

    def reduction(u, outputs, indices):
        seen.append(indices)
        total = u + sum(outputs)
        return total, len(seen) == 2

    eprob = EnsembleProblem(
        prob, vary_states, 7, output_func=lambda sol, ctx: ctx.index + 1, reduction=reduction, u_init=0
    )
    solution = run(eprob, FIXED[0], EnsembleBatched(3))
    assert seen == [range(0, 3), range(3, 6)]
    assert solution.outputs == 21
    assert solution.converged
    assert len(solution.retcodes) == 6
    with pytest.raises(TypeError, match="was reduced"):
        len(solution)
    seen.clear()
    whole = EnsembleProblem(
        prob,
        vary_states,
        2,
        output_func=lambda sol, ctx: 1,
        reduction=lambda u, o, i: (u + sum(o), False),
        u_init=0,
    )
    serial = run(whole, FIXED[0], EnsembleSerial())
    assert (serial.outputs, serial.converged) == (2, False)


def test_labels(prob):
    eprob = EnsembleProblem(prob, vary_states, 3)
    data = run(eprob, FIXED[0], EnsembleBatched(), saveat=[0.0, 0.5, 1.0]).to_xarray()
    assert data["hidden"].dims[:2] == ("trajectory", "time")
    assert data["hidden"].shape == (3, 3, SIZE)
    assert data["trajectory"].values.tolist() == [0, 1, 2]
    for index in range(3):
        alone = ct.solve(vary_states(prob, eprob.context(index)), FIXED[0], saveat=[0.0, 0.5, 1.0])
        np.testing.assert_allclose(data["hidden"][index], alone.hs, atol=1e-12)
        np.testing.assert_allclose(data["gate"][index], alone["gate"], atol=1e-12)
    ragged = run(EnsembleProblem(prob, vary_times, 2), FIXED[0], EnsembleSerial())
    with pytest.raises(ValueError, match="trajectories 0 and 1 are known at different times"):
        ragged.to_xarray()


def test_stats_are_summed(prob):
    eprob = EnsembleProblem(prob, vary_states, 3)
    serial = run(eprob, FIXED[0], EnsembleSerial())
    assert serial.stats.accepted == sum(sol.stats.accepted for sol in serial)
    assert serial.stats.evaluations == 3 * serial[0].stats.evaluations
    batched = run(eprob, FIXED[0], EnsembleBatched())
    assert batched.stats.accepted == serial.stats.accepted
    assert batched.stats.evaluations < serial.stats.evaluations


def test_ctrl_c_returns_what_is_there(prob):
    def vary(prob, ctx):
        if ctx.index == 3:
            raise KeyboardInterrupt
        return vary_states(prob, ctx)

    eprob = EnsembleProblem(prob, vary, 6)
    for ensemble, count in ((EnsembleSerial(), 3), (EnsembleBatched(2), 2)):
        with pytest.warns(RuntimeWarning, match=f"interrupted; {count} of 6 trajectories"):
            solution = run(eprob, FIXED[0], ensemble)
        assert solution.interrupted
        assert len(solution) == count
        with pytest.raises(KeyboardInterrupt):
            run(eprob, FIXED[0], ensemble, throw=True)


@pytest.mark.parametrize("ensemble", [EnsembleSerial(), EnsembleBatched()], ids=str)
def test_ctrl_c_inside_a_solve(ensemble):
    calls = 0

    def fn(t, h, u):
        nonlocal calls
        calls += 1
        if calls == 50:
            raise KeyboardInterrupt
        return -h

    prob = ct.ODEProblem(ct.Field(fn), torch.ones(1, **F64), (0.0, 1.0))
    eprob = EnsembleProblem(prob, vary_states, 3)
    with pytest.warns(RuntimeWarning, match="interrupted"):
        solution = run(eprob, ct.Dopri5(max_step=0.05), ensemble)
    assert solution.interrupted
    assert solution.failed == tuple(range(len(solution)))
    assert solution.retcodes[0] is ct.ReturnCode.INTERRUPTED
    assert 0.1 < solution[0].ts[-1] < 0.9
    calls = 0
    with pytest.raises(KeyboardInterrupt, match="trajectory 0"):
        run(eprob, ct.Dopri5(max_step=0.05), ensemble, throw=True)


def test_ctrl_c_stops_the_batches_that_follow():
    solved = []

    def fn(t, h, u):
        solved.append(len(h))
        if len(solved) == 10:
            raise KeyboardInterrupt
        return -h

    field = ct.Field(fn)

    def vary(prob, ctx):
        return ct.remake(prob, h0=torch.ones(1 + ctx.index % 2, **F64))

    prob = ct.ODEProblem(field, torch.ones(1, **F64), (0.0, 1.0))
    with pytest.warns(RuntimeWarning, match="0 of 4 trajectories are there"):
        run(EnsembleProblem(prob, vary, 4), ct.RK4(dt=0.1), EnsembleBatched())
    assert set(solved) == {1}


def test_no_bar_where_there_is_no_terminal(prob, capsys):
    eprob = EnsembleProblem(prob, vary_states, 2)
    assert not sys.stderr.isatty()
    run(eprob, FIXED[0], EnsembleSerial(), progress=True)
    assert capsys.readouterr().err == ""


def test_methods_without_control_per_sample(prob):
    eprob = EnsembleProblem(prob, vary_states, 2)
    for alg in (ct.Dopri8(), ct.Radau()):
        with torch.no_grad():
            serial = run(eprob, alg, EnsembleSerial())
        assert len(serial) == 2
        with pytest.raises(ValueError, match="use ensemble=EnsembleSerial"):
            run(eprob, alg, EnsembleBatched())
    with pytest.raises(ValueError, match="per_sample=False"):
        run(eprob, ct.Dopri5(per_sample=False), EnsembleBatched())
    with pytest.raises(ValueError, match="BacksolveAdjoint"):
        run(eprob, ct.Dopri5(), EnsembleBatched(), sensealg=ct.BacksolveAdjoint())
    backsolved = run(eprob, ct.Dopri5(), EnsembleSerial(), sensealg=ct.BacksolveAdjoint(), saveat=[1.0])
    assert len(backsolved) == 2
    with pytest.raises(ValueError, match="callback sees one trajectory"):
        run(eprob, ct.Dopri5(), EnsembleBatched(), callback=lambda t, h: False)


def test_a_field_that_vmap_cannot_pass(prob):
    def fn(t, h, u):
        return -h if float(h.sum()) > 0 else h

    lone = ct.ODEProblem(ct.Field(fn), torch.ones(1, **F64), (0.0, 1.0))
    with pytest.raises(TypeError, match=r"vmap, which does not pass through Field"):
        run(EnsembleProblem(lone, vary_states, 2), FIXED[0], EnsembleBatched())


def test_wrong_arguments(prob):
    build = unchecked(EnsembleProblem)
    for changes, error, text in (
        ({"prob": 3}, TypeError, "prob is int"),
        ({"prob_func": None}, TypeError, "prob_func is None"),
        ({"output_func": 1}, TypeError, "output_func is 1"),
        ({"reduction": "sum"}, TypeError, "reduction is 'sum'"),
        ({"trajectories": 0}, ValueError, "trajectories is 0"),
        ({"seed": -1}, ValueError, "seed is -1"),
    ):
        arguments = {"prob": prob, "prob_func": vary_states, "trajectories": 2, **changes}
        with pytest.raises(error, match=text):
            build(**arguments)
    with pytest.raises(ValueError, match="batch_size is 0"):
        EnsembleBatched(0)
    eprob = EnsembleProblem(prob, vary_states, 2)
    with pytest.raises(TypeError, match="3"):
        unchecked(solve_ensemble)(eprob, FIXED[0], 3, quiet)
    with pytest.raises(TypeError, match="NoneType"):
        run(EnsembleProblem(prob, lambda prob, ctx: None, 2), FIXED[0], EnsembleSerial())
    with pytest.raises(TypeError, match="return"):
        run(dataclasses.replace(eprob, reduction=lambda u, o, i: 1), FIXED[0], EnsembleSerial())


def test_saved_times_that_end_early_keep_their_rows():
    """NaN in one sample's times says nothing of the other samples of a trajectory."""
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: -h), torch.ones(2, 1, dtype=torch.float64), (0.0, 2.0))
    saves = torch.tensor([[0.0, 0.0], [0.3, 0.4], [torch.nan, 2.0]], dtype=torch.float64)
    for how in (ct.EnsembleSerial(), ct.EnsembleBatched()):
        ensemble = ct.solve(
            ct.EnsembleProblem(prob, lambda prob, ctx: prob, 2), ct.RK4(dt=0.1), ensemble=how, saveat=saves
        )
        for sol in ensemble:
            assert sol.hs.shape == (3, 2, 1)
            assert sol.hs[2, 1].item() == pytest.approx(math.exp(-2.0), rel=1e-5)
            assert bool(sol.hs[2, 0].isnan())


def test_every_failure_keeps_its_own_message():
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: h * h), torch.zeros(2, 1, dtype=torch.float64), (0.0, 2.0))

    def start(prob, ctx):
        return ct.remake(prob, h0=torch.tensor([[0.1], [0.1 + ctx.index]], dtype=torch.float64))

    with pytest.warns(RuntimeWarning):
        ensemble = ct.solve(ct.EnsembleProblem(prob, start, 3), ct.Dopri5())
    # The poles of 1 / (1/h0 - t).
    assert "t = 0.9090" in ensemble[1].message
    assert "t = 0.4761" in ensemble[2].message
    assert ensemble[0].message == ct.ReturnCode.SUCCESS.message
