"""The adjoint as a solution to look at: against torch's own cells, scipy, and what it integrates to."""

import itertools

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.integrate import solve_ivp
from torch import Tensor, nn

import ctgate as ct
from tests.sensealg.problems import SAVED, SPAN, Case, apart, loss_of, saved_times
from tests.typechecker import unchecked

DOUBLE = torch.float64


def torch_network(kind: str, layers: int, seed: int = 0) -> nn.RNNBase:
    """A torch module with weights of order 1."""
    module = {"GRU": nn.GRU, "LSTM": nn.LSTM}[kind](2, 3, num_layers=layers).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=DOUBLE, generator=generator))
    return module


def cell_of(module: nn.RNNBase) -> nn.RNNCellBase:
    """torch's cell with the weights of its one-layer module."""
    cell = (nn.GRUCell if isinstance(module, nn.GRU) else nn.LSTMCell)(2, 3).double()
    cell.load_state_dict({name[:-3]: value for name, value in module.state_dict().items()})
    return cell


def unrolled_cell(cell: nn.RNNCellBase, state: Tensor, x: Tensor) -> list[Tensor]:
    """Every state (c, h) or h from ``state`` on, by torch's cell."""
    states = [state]
    for row in x:
        if isinstance(cell, nn.GRUCell):
            states.append(cell(row, states[-1]))
        else:
            c, h = states[-1].split(3, -1)
            h, c = cell(row, (h, c))
            states.append(torch.cat((c, h), -1))
    return states


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_euler_is_backpropagation_through_torch_s_cell(kind: str, tau: float) -> None:
    """dL/dh_t at every step, by autograd through torch's cell from a state at t that is a leaf."""
    module = torch_network(kind, 1)
    field = getattr(ct, kind).from_torch(module, tau=tau)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 2, 2, dtype=DOUBLE, generator=generator).requires_grad_()
    weights = torch.randn(7, 2, 3, dtype=DOUBLE, generator=generator)
    start = torch.zeros(2, field.state_size, dtype=DOUBLE)
    times = tau * torch.arange(7, dtype=DOUBLE)
    prob = ct.ODEProblem(field, start, (0.0, 6 * tau), ct.ZeroOrderHold(times, x))
    sol = ct.solve(prob, ct.Euler(tau))
    # The output is the last three units of the state, all of it for the GRU.
    loss = ct.Loss(
        terminal=lambda h: h[..., -3:].square().sum(-1),
        at=(times[1:], lambda k, h: (weights[k + 1] * h[..., -3:]).sum(-1)),
    )

    def of_outputs(states: list[Tensor], first: int) -> Tensor:
        later = [(weights[k] * h[..., -3:]).sum() for k, h in enumerate(states, first) if k]
        return sum(later) + states[-1][..., -3:].square().sum()

    flow = ct.adjoint(sol, loss)
    cell = cell_of(module)
    states = unrolled_cell(cell, start, x)
    for t in range(7):
        leaf = states[t].detach().requires_grad_()
        value = of_outputs(unrolled_cell(cell, leaf, x[t:]), t)
        (expected,) = torch.autograd.grad(value, leaf)
        assert (flow.a[t] - expected).abs().max() < 1e-12 * max(1.0, float(expected.abs().max())), t
    output = module(x)[0]
    value = (weights[1:] * output).sum() + output[-1].square().sum()
    grads = torch.autograd.grad(value, [*module.parameters(), x])
    names = [name.removeprefix("layers.0.") for name in flow.gradient]
    mine = dict(zip(names, flow.gradient.values(), strict=True))
    assert float(flow.value) == pytest.approx(float(value.detach()), rel=1e-13)
    for (name, _), expected in zip(module.named_parameters(), grads, strict=False):
        found = mine[name.removesuffix("_l0")]
        assert (found - expected).abs().max() < 1e-12 * float(expected.abs().max()), name
    assert (flow.control[0] - grads[-1]).abs().max() < 1e-12 * float(grads[-1].abs().max())


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_euler_has_torch_s_gradient_through_two_layers(kind: str) -> None:
    module = torch_network(kind, 2)
    field = getattr(ct, kind).from_torch(module)
    x = torch.randn(5, 2, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    prob = ct.ODEProblem(
        field, field.initial_state((2,)), (0.0, 5.0), ct.ZeroOrderHold(torch.arange(6.0, dtype=DOUBLE), x)
    )
    readout = nn.Linear(3, 1).double()
    loss = ct.Loss(terminal=lambda y: y.squeeze(-1).square(), readout=readout)
    flow = ct.adjoint(ct.solve(prob, ct.Euler(1.0)), loss)
    value = readout(module(x)[0][-1]).square().sum()
    grads = torch.autograd.grad(value, [*module.parameters(), *readout.parameters()])
    expected = {name: grad for (name, _), grad in zip(module.named_parameters(), grads, strict=False)}
    assert len(flow.gradient) == len(expected)
    for name, found in flow.gradient.items():
        _, layer, weight = name.split(".")
        assert (found - expected[f"{weight}_l{layer}"]).abs().max() < 1e-12
    for found, other in zip(flow.readout.values(), grads[-2:], strict=True):
        assert (found - other).abs().max() < 1e-12


def loss_by_scipy(case: Case, t: float, state: np.ndarray, loss: ct.Loss, stop: float) -> float:
    """Terminal, running and sampled costs after t, from ``state`` at t on, by scipy's DOP853."""
    shape = case.h0.shape
    cuts = [t, *(knot for knot in (0.3, 0.5) if t < knot), stop]

    def slope(s: float, y: np.ndarray, middle: float) -> np.ndarray:
        h = torch.from_numpy(y[:-1].reshape(shape))
        u = case.control(middle)
        cost = loss.running(torch.tensor(s, dtype=DOUBLE), h).sum()
        return np.append(case.field(s, h, u).numpy().reshape(-1), float(cost))

    y, total = np.append(state.reshape(-1), 0.0), 0.0
    for start, end in itertools.pairwise(cuts):
        looks = [k for k, at in enumerate(SAVED) if start < at <= end]
        options = {"rtol": 1e-12, "atol": 1e-13, "dense_output": True, "args": (0.5 * (start + end),)}
        run = solve_ivp(slope, (start, end), y, "DOP853", **options)
        for k in looks:
            total += float(loss.at[1](k, torch.from_numpy(run.sol(SAVED[k])[:-1].reshape(shape))).sum())
        y = run.y[:, -1]
    end = torch.from_numpy(y[:-1].reshape(shape))
    return total + float(loss.terminal(end).sum()) + y[-1]


@pytest.mark.parametrize("kind", ["GRU", "Field"])
def test_a_of_t_is_the_derivative_of_the_loss_by_the_state_there(kind: str) -> None:
    """Central differences over solves by scipy that begin at t."""
    case = Case(kind, "held", seed=1)
    loss = loss_of("all", case)
    with torch.no_grad():
        sol = ct.solve(case.problem(), ct.Dopri5(), rtol=1e-10)
        flow = ct.adjoint(sol, loss)
        for t in (0.0, 0.45):
            state = sol(t).numpy()
            found = flow(t).numpy()
            for place in np.ndindex(*state.shape):
                step = np.zeros_like(state)
                step[place] = 1e-4
                ends = [loss_by_scipy(case, t, state + sign * step, loss, SPAN) for sign in (1, -1)]
                expected = (ends[0] - ends[1]) / 2e-4
                assert found[place] == pytest.approx(expected, rel=1e-6, abs=1e-6), (t, place)


@pytest.mark.parametrize("control", ["held", "cubic", "own times"])
def test_the_density_integrates_to_the_gradient(control: str) -> None:
    """By numpy's Gauss-Legendre points between the knots and the looks of the loss."""
    case = Case("GRU", control, seed=2)
    loss = loss_of("all", case)
    with torch.no_grad():
        sol = ct.solve(case.problem(), ct.Dopri5(), rtol=1e-10)
        flow = ct.adjoint(sol, loss)
        looks = torch.as_tensor(saved_times(case), dtype=DOUBLE)
        breaks = torch.cat([part.reshape(-1) for part in (case.control.sample_knots, looks, sol.dense.nodes)])
        breaks = np.unique(breaks[~breaks.isnan()].numpy())
        place, share = np.polynomial.legendre.leggauss(6)
        total = {name: torch.zeros_like(value) for name, value in flow.gradient.items()}
        for start, stop in itertools.pairwise(breaks):
            if stop - start < 1e-12:
                continue
            times = torch.from_numpy(start + 0.5 * (place + 1.0) * (stop - start))
            for name, rows in flow.density(times).items():
                assert rows.shape == (6, *total[name].shape)
                total[name] += torch.tensordot(torch.from_numpy(0.5 * (stop - start) * share), rows, 1)
    assert apart(list(total.values()), list(flow.gradient.values())) < 1e-8


def test_the_density_of_a_map_sums_up_to_the_gradient() -> None:
    for control in ("held", "own times"):
        case = Case("LSTM", control, seed=3)
        terminal = ct.Loss(terminal=lambda h: h.square().sum(-1))
        sol = ct.solve(case.problem(), ct.Euler(0.1))
        flow = ct.adjoint(sol, terminal)
        sums = [rows.sum(0) for rows in flow.density().values()]
        assert apart(sums, list(flow.gradient.values())) < 1e-13
        grads = torch.autograd.grad(terminal(sol), case.wanted)
        assert apart([flow.initial, *flow.gradient.values(), *flow.control], list(grads)) < 1e-13
        with pytest.raises(ValueError, match="t is None"):
            flow.density([0.1])


@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.Euler(0.1)])
def test_a_jumps_where_the_loss_looks(alg: object) -> None:
    case = Case("GRU", "held", seed=4)
    loss = ct.Loss(at=([0.4], lambda k, h: h.square().sum(-1)))
    sol = ct.solve(case.problem(), alg)
    flow = ct.adjoint(sol, loss)
    with torch.no_grad():
        assert torch.allclose(flow(0.4), 2 * sol(0.4), rtol=0, atol=1e-12)
        assert (flow(0.5 if isinstance(alg, ct.Euler) else 0.4 + 1e-9) == 0).all()
    assert (flow.a[sol.ts > 0.45] == 0).all()
    assert (flow(SPAN) == 0).all()
    several = flow([0.0, 0.4])
    assert torch.equal(several[0], flow.initial)
    assert several.shape == (2, *case.h0.shape)


@pytest.mark.parametrize("kind", ["GRU", "Stack", "Field"])
def test_a_at_saved_times_of_a_flow(kind: str) -> None:
    """The loss's gradient by h0 of the problem that begins at t with the state there."""
    case = Case(kind, "held", seed=5)
    loss = ct.Loss(terminal=lambda h: h.square().sum(-1))
    sol = ct.solve(case.problem(), ct.Dopri5(), rtol=1e-9, saveat=[0.0, 0.4, 0.8])
    flow = ct.adjoint(sol, loss)
    assert torch.equal(flow.ts, sol.ts)
    for k, t in enumerate((0.0, 0.4)):
        state = sol.hs[k].detach().requires_grad_()
        later = ct.solve(case.problem(h0=state, tspan=(t, SPAN)), ct.Dopri5(), rtol=1e-9)
        (expected,) = torch.autograd.grad(loss(later), state)
        assert apart([flow.a[k]], [expected]) < 1e-6
    assert torch.allclose(flow.a[2], 2 * sol.hs[2], rtol=0, atol=1e-12)


def test_other_ways_to_solve_the_adjoint_s_equation() -> None:
    case = Case("GRU", "held", seed=6)
    loss = loss_of("all", case)
    sol = ct.solve(case.problem(), ct.RK4(0.01))
    reference = list(torch.autograd.grad(loss(sol), case.wanted))
    evaluations = sol.stats.evaluations_backward
    for options, bound in (
        ({}, 1e-6),
        ({"alg": ct.Dopri5(), "rtol": 1e-9}, 1e-6),
        ({"alg": ct.Radau(), "rtol": 1e-7}, 1e-4),
        ({"alg": ct.Rosenbrock23(), "rtol": 1e-5}, 1e-2),
        ({"alg": ct.ExponentialMidpoint(0.01)}, 1e-3),
    ):
        flow = ct.adjoint(sol, loss, **options)
        mine = [flow.initial, *flow.gradient.values(), *flow.control]
        assert apart(mine, reference) < bound, options
        assert sol.stats.evaluations_backward > evaluations
        evaluations = sol.stats.evaluations_backward
    with pytest.raises(ValueError, match="a fixed-step method has no tolerances"):
        ct.adjoint(sol, loss, rtol=1e-6)
    with pytest.raises(TypeError, match="alg is 'Dopri5'"):
        unchecked(ct.adjoint)(sol, loss, "Dopri5")


@pytest.mark.parametrize("alg", [ct.Radau(), ct.Dopri5(per_sample=True)])
def test_along_solutions_with_steps_of_each_sample(alg: object) -> None:
    """The running cost knows its samples apart."""
    case = Case("GRU", "held", seed=7)
    targets = torch.tensor([[0.3, -0.1], [1.0, 2.0]], dtype=DOUBLE)
    loss = ct.Loss(running=lambda t, h: (h - targets).square().sum(-1), terminal=lambda h: h.sum(-1))
    exact = ct.solve(case.problem(), ct.Dopri5(), rtol=1e-11)
    reference = list(torch.autograd.grad(loss(exact), case.wanted))
    with torch.no_grad():
        sol = ct.solve(case.problem(), alg, rtol=1e-7)
    flow = ct.adjoint(sol, loss)
    assert apart([flow.initial, *flow.gradient.values(), *flow.control], reference) < 1e-5
    assert flow.a.shape == sol.hs.shape
    if isinstance(alg, ct.Radau):
        with pytest.raises(ValueError, match="differentiates sol"):
            ct.adjoint(sol, loss, ct.Rosenbrock23())


def test_times_of_each_sample_in_the_loss_alone() -> None:
    """The solve has one clock, the loss looks at each sample when it likes; as many times as samples."""
    case = Case("GRU", "held", seed=8)
    times = torch.tensor([[0.2, 0.1], [0.5, 0.7]], dtype=DOUBLE)
    loss = ct.Loss(at=(times, lambda k, h: (k + 1) * h.square().sum(-1)))
    sol = ct.solve(case.problem(), ct.Dopri5(per_sample=False), rtol=1e-9)
    flow = ct.adjoint(sol, loss)
    grads = torch.autograd.grad(loss(sol), case.wanted)
    assert apart([flow.initial, *flow.gradient.values(), *flow.control], list(grads)) < 1e-7
    for t in (0.15, 0.6):
        both = flow([t, t])
        for sample in (0, 1):
            alone = Case("GRU", "held", seed=8)
            control = ct.ZeroOrderHold(alone.control.ts, alone.inputs[0][:, sample : sample + 1])
            prob = ct.ODEProblem(alone.field, alone.h0[sample : sample + 1], (0.0, SPAN), control)
            own = ct.adjoint(
                ct.solve(prob, ct.Dopri5(), rtol=1e-9),
                ct.Loss(at=(times[:, sample], lambda k, h: (k + 1) * h.square().sum(-1))),
            )
            assert (both[:, sample] - own(t)).abs().max() < 1e-6


def test_a_map_is_listed_at_its_nodes() -> None:
    """Also where the saved times are as many as the nodes, and not they."""
    case = Case("GRU", "held", seed=9)
    loss = ct.Loss(terminal=lambda h: h.square().sum(-1))
    whole = ct.solve(case.problem(), ct.Euler(0.4))
    saves = torch.linspace(0.05, 0.75, len(whole.ts), dtype=DOUBLE).tolist()
    sol = ct.solve(case.problem(), ct.Euler(0.4), saveat=[*saves[:-1], 0.8])
    flow = ct.adjoint(sol, loss)
    assert torch.equal(flow.ts, whole.ts)
    assert torch.equal(flow.a, ct.adjoint(whole, loss).a)
    with pytest.raises(ValueError, match="between two steps of Euler"):
        flow(0.05)


def test_a_terminated_solve_has_its_running_cost() -> None:
    case = Case("GRU", "held", seed=10)
    loss = ct.Loss(running=lambda t, h: h.square().sum(-1))
    sol = ct.solve(case.problem(), ct.Dopri5(max_step=0.05), rtol=1e-9, callback=lambda t, h: t > 0.4)
    flow = ct.adjoint(sol, loss)
    grads = torch.autograd.grad(loss(sol), case.wanted)
    assert apart([flow.initial, *flow.gradient.values(), *flow.control], list(grads)) < 1e-7
    with pytest.raises(ValueError, match="in the solution's span"):
        flow(0.7)
    with pytest.raises(ValueError, match="before the end of tspan"):
        ct.adjoint(sol, ct.Loss(terminal=lambda h: h.sum(-1)))


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("alg", [ct.Euler(0.1), ct.Dopri5()])
def test_labels(alg: object, batch: tuple[int, ...], tmp_path: object) -> None:
    case = Case("GRU", "held", batch=batch)
    flow = ct.adjoint(ct.solve(case.problem(), alg), loss_of("terminal", case))
    data = flow.to_xarray()
    samples = int(np.prod(batch))
    assert data["adjoint"].dims == ("time", "batch", "unit")
    assert data["adjoint"].shape == (len(flow.ts), samples, 2)
    assert np.array_equal(data["adjoint"].values.reshape(flow.a.shape), flow.a.numpy())
    assert np.allclose(data["adjoint_norm"], np.linalg.norm(data["adjoint"], axis=-1))
    assert list(data["parameter"].values) == list(case.parameters)
    assert data.sizes["entry"] == sum(value.numel() for value in case.parameters.values())
    rows = flow.density()
    assert np.allclose(data["density_norm"].sel(parameter="bias_ih"), rows["bias_ih"].norm(dim=1))
    for variable in data.variables.values():
        assert {"long_name", "units"} <= set(variable.attrs)
    assert data.attrs["ctgate_version"] == ct.__version__
    assert "dtype" in data.attrs
    data.to_netcdf(tmp_path / "adjoint.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "adjoint.nc", engine="h5netcdf") as back:
        xr.testing.assert_equal(back, data)


@pytest.mark.parametrize("alg", [ct.Euler(0.1), ct.Dopri5()])
def test_labels_where_samples_have_times_of_their_own(alg: object) -> None:
    case = Case("GRU", "own times", seed=11)
    flow = ct.adjoint(ct.solve(case.problem(), alg), ct.Loss(terminal=lambda h: h.sum(-1)))
    data = flow.to_xarray()
    assert data["t"].dims == ("time", "batch")
    assert np.isfinite(data["density_norm"]).all()


def test_what_is_kept_does_not_follow_the_parameters() -> None:
    case = Case("GRU", "held", seed=12)
    sol = ct.solve(case.problem(), ct.Dopri5())
    flow = ct.adjoint(sol, ct.Loss(terminal=lambda h: h.square().sum(-1)))
    before = flow(0.31)
    with torch.no_grad():
        case.field.weight_hh.mul_(2.0)
    assert torch.equal(flow(0.31), before)
    with pytest.raises(RuntimeError, match="weight_hh was changed since the solve"):
        flow.density()
    with pytest.raises(RuntimeError, match="weight_hh was changed since the solve"):
        ct.adjoint(sol, ct.Loss(terminal=lambda h: h.square().sum(-1)))


def test_frozen_parameters_and_replaced_ones() -> None:
    case = Case("GRU", "held", seed=13)
    for parameter in case.field.parameters():
        parameter.requires_grad_(False)
    weight = torch.randn(6, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(3)).requires_grad_()
    prob = case.problem(parameters={"weight_hh": weight})
    sol = ct.solve(prob, ct.Dopri5(), rtol=1e-9)
    loss = ct.Loss(terminal=lambda h: h.square().sum(-1))
    flow = ct.adjoint(sol, loss)
    assert set(flow.gradient) == set(case.parameters)
    (expected,) = torch.autograd.grad(loss(sol), weight)
    assert apart([flow.gradient["weight_hh"]], [expected]) < 1e-7
    assert float(flow.gradient["bias_ih"].abs().max()) > 0.0


def test_what_has_no_adjoint_says_why(tmp_path: object) -> None:
    case = Case("GRU", "held")
    loss = ct.Loss(terminal=lambda h: h.sum(-1))
    sol = ct.solve(case.problem(), ct.Dopri5())
    with pytest.raises(TypeError, match=r"adjoint: sol is ODEProblem; it must be a ct\.Solution"):
        unchecked(ct.adjoint)(case.problem(), loss)
    with pytest.raises(TypeError, match=r"adjoint: loss is function; it must be a ct\.Loss"):
        unchecked(ct.adjoint)(sol, lambda h: h.sum())
    sol.save(tmp_path / "run.nc")
    with pytest.raises(RuntimeError, match="loaded from a file"):
        ct.adjoint(ct.load(tmp_path / "run.nc"), loss)
    with pytest.raises(RuntimeError, match="dense=True"):
        ct.adjoint(ct.solve(case.problem(), ct.Dopri5(), saveat=[0.8], dense=False), loss)
    with pytest.raises(ValueError, match="alg, rtol and atol are for flows"):
        ct.adjoint(ct.solve(case.problem(), ct.Euler(0.1)), loss, rtol=1e-5)
    with pytest.raises(ValueError, match="between two steps of Euler"):
        ct.adjoint(ct.solve(case.problem(), ct.Euler(0.1)), ct.Loss(at=([0.15], lambda k, h: h.sum(-1))))
    with pytest.raises(ValueError, match="not finite"):
        ct.adjoint(sol, ct.Loss(terminal=lambda h: h.sum(-1) / 0.0))
    with pytest.raises(ValueError, match="in the solution's span"):
        ct.adjoint(sol, loss)(0.9)
    with pytest.warns(RuntimeWarning, match="MAX_STEPS"):
        failed = ct.solve(case.problem(), ct.Dopri5(), max_steps=2)
    with pytest.raises(ValueError, match="ended with MAX_STEPS"):
        ct.adjoint(failed, loss)


@pytest.mark.parametrize("sensealg", [ct.GaussAdjoint(), ct.ForwardSensitivity()])
def test_along_solutions_that_have_gradients_of_their_own(sensealg: object) -> None:
    case = Case("GRU", "held", seed=14)
    case.hold_inputs()
    loss = ct.Loss(terminal=lambda h: h.square().sum(-1))
    sol = ct.solve(case.problem(), ct.Dopri5(), rtol=1e-9, saveat=[0.8], sensealg=sensealg)
    flow = ct.adjoint(sol, loss)
    grads = torch.autograd.grad(loss(sol), case.wanted)
    assert apart([flow.initial, *flow.gradient.values()], list(grads)) < 1e-7


@pytest.mark.parametrize("input_size", [0, 2])
def test_a_map_without_steps_has_the_slope_of_the_loss_and_no_gradient(input_size: int) -> None:
    field = ct.GRU(input_size, 3, dtype=torch.float64)
    span = torch.zeros(2, dtype=torch.float64)
    control = None
    if input_size:
        values = torch.ones(4, 2, input_size, dtype=torch.float64, requires_grad=True)
        control = ct.ZeroOrderHold(torch.arange(5.0, dtype=torch.float64), values)
    h0 = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    sol = ct.solve(ct.ODEProblem(field, h0, (span, span), control=control), ct.Euler(0.5))
    flow = ct.adjoint(sol, ct.Loss(terminal=lambda h: h.square().sum(-1)))
    torch.testing.assert_close(flow.initial, 2.0 * h0, rtol=0.0, atol=0.0)
    assert {name: block.shape for name, block in flow.gradient.items()} == {
        name: parameter.shape for name, parameter in field.named_parameters()
    }
    assert not any(bool(block.any()) for block in [*flow.gradient.values(), *flow.control])
