"""A loss is the number that its parts say, with their derivatives."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import ctgate as ct
from tests.sensealg.problems import SPAN, Case
from tests.typechecker import unchecked

DOUBLE = torch.float64
# What cannot be checked by the type checker's annotations is checked by the class.
make = unchecked(ct.Loss)


def costs(t: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return torch.exp(-torch.as_tensor(t).squeeze(-1)) * h.square().sum(-1)


@pytest.mark.parametrize("control", ["held", "own times"])
@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.RK4(0.05), ct.Rosenbrock23()])
def test_a_running_cost_is_the_integral_along_the_solution(alg: object, control: str) -> None:
    """Gauss-Legendre points of an order that leaves nothing, between the nodes of sol(t)."""
    case = Case("GRU", control)
    with torch.no_grad():
        sol = ct.solve(case.problem(), alg, **({"rtol": 1e-4} if alg.adaptive else {}))
        value = float(ct.Loss(running=costs)(sol))
        expected = 0.0
        place, share = np.polynomial.legendre.leggauss(12)
        for sample in (0, 1):
            nodes = sol.dense.nodes if sol.dense.nodes.ndim == 1 else sol.dense.nodes[:, sample]
            for start, stop in itertools.pairwise(nodes.unique().tolist()):
                times = torch.from_numpy(start + 0.5 * (place + 1.0) * (stop - start))
                own = times[:, None].expand(-1, 2).clamp(*sol.dense.span)
                values = costs(times[:, None], sol(own)[:, sample])
                expected += 0.5 * (stop - start) * float((torch.from_numpy(share) * values).sum())
    assert value == pytest.approx(expected, rel=1e-8)


def test_a_running_cost_of_a_map_is_what_euler_makes_of_it() -> None:
    """The state that Euler would carry along for it."""
    case = Case("GRU", "held")
    with torch.no_grad():
        sol = ct.solve(case.problem(), ct.Euler(0.1))
        steps = sol.ts.diff()
        expected = sum(float(dt * costs(t, h).sum()) for dt, t, h in zip(steps, sol.ts, sol.hs, strict=False))
        assert float(ct.Loss(running=costs)(sol)) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("shared", [True, False])
def test_the_parts_add_up(shared: bool) -> None:
    case = Case("LSTM", "held")
    times = [0.25, 0.7] if shared else torch.tensor([[0.25, 0.1], [0.7, 0.7]], dtype=DOUBLE)
    parts = {
        "terminal": lambda h: h.sum(-1),
        "running": costs,
        "at": (times, lambda k, h: (k + 1) * h.square().sum(-1)),
    }
    with torch.no_grad():
        sol = ct.solve(case.problem(), ct.Dopri5())
        whole = float(ct.Loss(**parts)(sol))
        each = [float(ct.Loss(**{name: part})(sol)) for name, part in parts.items()]
        states = sol(times)
        expected = sum((k + 1) * float(h.square().sum()) for k, h in enumerate(states))
    assert whole == pytest.approx(sum(each), rel=1e-13)
    assert each[0] == pytest.approx(float(sol.hs[-1].sum()), rel=1e-13)
    assert each[2] == pytest.approx(expected, rel=1e-13)


def test_saved_states_are_taken_as_they_are() -> None:
    """With dense=False too; per sample if the saved times are."""
    case = Case("GRU", "held")
    for saves in ([0.2, 0.8], torch.tensor([[0.2, 0.1], [0.8, 0.8]], dtype=DOUBLE)):
        sol = ct.solve(case.problem(), ct.Dopri5(), saveat=saves, sensealg=ct.GaussAdjoint())
        value = ct.Loss(terminal=lambda h: h.sum(-1), at=(saves, lambda k, h: h.sum(-1)))(sol)
        assert float(value.detach()) == pytest.approx(float((sol.hs.sum() + sol.hs[-1].sum()).detach()))
    sol = ct.solve(case.problem(), ct.Dopri5(), saveat=[0.2], dense=False)
    with pytest.raises(RuntimeError, match="dense=True"):
        ct.Loss(terminal=lambda h: h.sum(-1))(sol)


def test_a_readout_sees_the_output_of_the_last_layer() -> None:
    case = Case("LSTM", "held")
    readout = nn.Linear(2, 3).double()
    target = torch.randn(2, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    sol = ct.solve(case.problem(), ct.Dopri5())
    loss = ct.Loss(terminal=lambda y: (y - target).square().sum(-1), readout=readout)
    hidden = sol.hs[-1][:, case.field.components["hidden"]]
    expected = (hidden @ readout.weight.mT + readout.bias - target).square().sum()
    value = loss(sol)
    assert torch.equal(value, expected) or float((value - expected).detach().abs()) < 1e-13
    one = torch.autograd.grad(value, [*readout.parameters(), case.h0], retain_graph=True)
    other = torch.autograd.grad(expected, [*readout.parameters(), case.h0])
    for mine, theirs in zip(one, other, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-14)
    readout.weight.requires_grad_(False)
    state = sol.hs[-1].detach()
    slope = loss.terminal_slope(state, sol.output_slice)
    assert list(slope.readout) == ["bias"]
    assert torch.allclose(slope.readout["bias"], other[1], rtol=1e-12, atol=1e-14)
    # Closed form: 2 W^T (W h + b - y) on the hidden units, nothing on the cell.
    closed = 2 * (state[:, 2:] @ readout.weight.mT + readout.bias - target) @ readout.weight
    assert torch.allclose(slope.state[:, 2:], closed.detach(), rtol=1e-12, atol=1e-14)
    assert (slope.state[:, :2] == 0).all()
    assert not slope.state.requires_grad


def test_slopes_of_each_kind() -> None:
    h = torch.randn(2, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    whole = slice(0, 3)
    loss = ct.Loss(running=costs, at=([0.5], lambda k, h: h.pow(3).sum(-1)), terminal=lambda h: h.new_ones(2))
    t = torch.tensor(0.3, dtype=DOUBLE)
    running = loss.running_slope(t, h, whole)
    assert torch.allclose(running.state, 2 * np.exp(-0.3) * h)
    assert float(running.value) == pytest.approx(float(np.exp(-0.3) * h.square().sum()))
    assert torch.allclose(loss.slope_at(0, h, whole).state, 3 * h.square())
    constant = loss.terminal_slope(h, whole)
    assert float(constant.value) == 2.0
    assert (constant.state == 0).all()


def test_times() -> None:
    assert ct.Loss(terminal=torch.sum).times.shape == (0,)
    loss = ct.Loss(at=([0.0, 0.5, 0.5], lambda k, h: h.sum(-1)))
    assert loss.times.tolist() == [0.0, 0.5, 0.5]
    assert loss.times.dtype == DOUBLE


@pytest.mark.parametrize(
    ("parts", "error", "match"),
    [
        ({}, ValueError, "Loss() has no cost"),
        ({"terminal": 1.0}, TypeError, "terminal is float; it must be callable"),
        ({"running": "x"}, TypeError, "running is str; it must be callable"),
        ({"at": [0.5]}, TypeError, "at must be a pair (times, l)"),
        ({"at": ([0.5], 1.0)}, TypeError, "at must be a pair (times, l)"),
        ({"at": ([], torch.sum)}, ValueError, "with one time at least"),
        ({"at": (torch.tensor(0.5), torch.sum)}, ValueError, "times has shape ()"),
        ({"at": ([0.5, 0.2], torch.sum)}, ValueError, "times[1] is 0.2 after 0.5; times must not decrease"),
        ({"at": ([0.5, float("nan")], torch.sum)}, ValueError, "times[1] is nan; it must be finite"),
        ({"terminal": torch.sum, "readout": torch.sum}, TypeError, "it must be an nn.Module"),
    ],
)
def test_what_is_no_loss_is_refused(parts: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error) as caught:
        make(**parts)
    assert match in str(caught.value)


def test_costs_of_another_shape_are_refused() -> None:
    """Where they would be summed up with the wrong weights, or per unit."""
    case = Case("GRU", "held")
    sol = ct.solve(case.problem(), ct.Dopri5())
    per_unit = {"terminal": lambda h: h, "running": lambda t, h: h, "at": ([0.2], lambda k, h: h)}
    for name, part in per_unit.items():
        with pytest.raises(ValueError, match=rf"Loss\({name}=...\): the cost returned shape \(2, 2\)"):
            ct.Loss(**{name: part})(sol)
        with pytest.raises(ValueError, match=r"the cost returned shape \(2, 2\)"):
            ct.adjoint(sol, ct.Loss(**{name: part}))
    own = Case("GRU", "own times")
    sol = ct.solve(own.problem(), ct.Dopri5())
    assert ct.Loss(terminal=torch.sum)(sol).shape == ()
    with pytest.raises(ValueError, match=r"one number per sample, \(2,\), whose steps are their own"):
        ct.Loss(running=lambda t, h: h.sum())(sol)


def test_solutions_that_have_no_loss(tmp_path: object) -> None:
    case = Case("GRU", "held")
    loss = ct.Loss(terminal=lambda h: h.sum(-1))
    sol = ct.solve(case.problem(), ct.Dopri5())
    sol.save(tmp_path / "run.nc")
    with pytest.raises(RuntimeError, match="loaded from a file"):
        loss(ct.load(tmp_path / "run.nc"))
    with pytest.warns(RuntimeWarning, match="MAX_STEPS"):
        failed = ct.solve(case.problem(), ct.Dopri5(), max_steps=2)
    with pytest.raises(ValueError, match="ended with MAX_STEPS"):
        loss(failed)
    ended = ct.solve(case.problem(), ct.Dopri5(max_step=0.1), callback=lambda t, h: t > 0.3)
    with pytest.raises(ValueError, match=r"Loss\(terminal=\.\.\.\): .*before the end of tspan"):
        loss(ended)
    with pytest.raises(ValueError, match="it must be in"):
        ct.Loss(at=([SPAN + 1.0], lambda k, h: h.sum(-1)))(sol)


def test_slopes_are_there_in_inference_mode() -> None:
    loss = ct.Loss(terminal=lambda h: h.square().sum(-1))
    with torch.inference_mode():
        h = torch.arange(3.0, dtype=torch.float64)
        slope = loss.terminal_slope(h, slice(0, 3))
    assert slope.state.tolist() == [0.0, 2.0, 4.0]
