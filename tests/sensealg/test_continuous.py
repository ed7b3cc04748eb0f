"""Gradients of adjoint equations and of forward sensitivities against the discrete one and one another."""

import gc
import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import ctgate as ct
from tests.sensealg.problems import FIELDS, SAVED, Case, apart, loss_of, saved_times
from tests.typechecker import unchecked

CONTROLS = ["smooth", "held", "own times"]
LOSSES = ["terminal", "running", "saved"]
CONTINUOUS = [ct.GaussAdjoint(), ct.InterpolatingAdjoint()]


def gradient(
    case: Case, loss: ct.Loss, sensealg: object, alg: object = None, wanted: object = None, **options: object
) -> list[Tensor]:
    """The loss's gradient by all that wants one, through solve."""
    sol = ct.solve(case.problem(), alg or ct.Dopri5(), sensealg=sensealg, throw=True, **options)
    return list(
        torch.autograd.grad(loss(sol), wanted or case.wanted, allow_unused=True, materialize_grads=True)
    )


def all_gradients(case: Case, kind: str, **options: object) -> dict[str, list[Tensor]]:
    """The gradient by each of the ways to it; forward sensitivities have no inputs."""
    loss = loss_of(kind, case)
    saves = {"saveat": saved_times(case)} if kind == "saved" else {}
    found = {"discrete": gradient(case, loss, ct.DiscreteAdjoint(), **saves, **options)}
    for sensealg in CONTINUOUS:
        found[type(sensealg).__name__] = gradient(case, loss, sensealg, **saves, **options)
    flow = ct.adjoint(ct.solve(case.problem(), ct.Dopri5(), **options), loss)
    names = case.parameters
    found["adjoint"] = [flow.initial, *(flow.gradient[name] for name in names), *flow.control]
    case.hold_inputs()
    found["forward"] = gradient(case, loss, ct.ForwardSensitivity(), **saves, **options)
    return found


def agree(kind: str, control: str, loss: str) -> None:
    found = all_gradients(Case(kind, control), loss, rtol=1e-10)
    for one, other in itertools.combinations(found, 2):
        shared = min(len(found[one]), len(found[other]))
        error = apart(found[one][:shared], found[other][:shared])
        assert error < 1e-8, (one, other, error)


# Every field once, with every pair of a control and a loss.
_PAIRS = list(itertools.product(CONTROLS, LOSSES))


@pytest.mark.parametrize(
    ("kind", "control", "loss"), [(kind, *_PAIRS[k % len(_PAIRS)]) for k, kind in enumerate(FIELDS)]
)
def test_all_ways_to_a_gradient_agree(kind: str, control: str, loss: str) -> None:
    agree(kind, control, loss)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("control", [*CONTROLS, "cubic"])
@pytest.mark.parametrize("loss", LOSSES)
def test_all_ways_agree_for_every_field_input_and_loss(kind: str, control: str, loss: str) -> None:
    agree(kind, control, loss)


def expected_slope(alg: ct.algorithms.Algorithm) -> float:
    """How the difference of two gradients follows the tolerance: as the error does, tol^(order/error_order),
    or as the continuous extension, O(dt^(dense_order + 1)), where that is coarser."""
    steps = 1.0 / alg.error_order
    return min(alg.order, alg.dense_order + 1) * steps


@pytest.mark.parametrize(
    ("alg", "tolerances"),
    [
        (ct.Dopri5(), [1e-6, 1e-7, 1e-8]),
        pytest.param(ct.Dopri5(), [1e-5, 1e-6, 1e-7, 1e-8, 1e-9], marks=pytest.mark.slow),
        (ct.Bosh3(), [1e-4, 1e-5, 1e-6]),
        pytest.param(ct.Tsit5(), [1e-5, 1e-6, 1e-7, 1e-8, 1e-9], marks=pytest.mark.slow),
        pytest.param(ct.Bosh3(), [1e-5, 1e-6, 1e-7, 1e-8], marks=pytest.mark.slow),
        pytest.param(ct.Rosenbrock23(), [1e-3, 1e-4, 1e-5], marks=pytest.mark.slow),
    ],
)
def test_the_difference_of_two_gradients_falls_with_the_tolerance(
    alg: object, tolerances: list[float]
) -> None:
    """A slope, over random problems: that of the errors themselves, less 0.15 for what is not asymptotic."""
    logs: dict[str, list[list[float]]] = {}
    for seed in range(2):
        for sensealg in (*CONTINUOUS, ct.ForwardSensitivity()):
            case = Case("GRU", "cubic", seed)
            if isinstance(sensealg, ct.ForwardSensitivity):
                case.hold_inputs()
            loss = loss_of("terminal", case)
            row = []
            for tol in tolerances:
                pair = [
                    gradient(case, loss, kind, alg, rtol=tol, atol=tol)
                    for kind in (sensealg, ct.DiscreteAdjoint())
                ]
                row.append(apart(*pair))
            logs.setdefault(type(sensealg).__name__, []).append(row)
    for name, rows in logs.items():
        means = torch.tensor(rows, dtype=torch.float64).log10().mean(0)
        places = torch.tensor(tolerances, dtype=torch.float64).log10()
        places = places - places.mean()
        slope = float((places * means).sum() / places.square().sum())
        assert slope >= expected_slope(alg) - 0.15, (name, means)


def two_units_by_scipy(rate: float) -> np.ndarray:
    """d h_2(4) / d W for dh/dt = -(rate, 1/2) h + W tanh(h), by the tangent equations."""
    rates, coupling = np.array([rate, 0.5]), np.array([[0.0, 0.0], [1.0, 0.0]])

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        h, tangents = y[:2], y[2:].reshape(2, 4)
        jacobian = -np.diag(rates) + coupling * (1.0 - np.tanh(h) ** 2)
        pushed = jacobian @ tangents + np.kron(np.eye(2), np.tanh(h))
        return np.concatenate((-rates * h + coupling @ np.tanh(h), pushed.reshape(-1)))

    start = np.concatenate(([1.0, 0.5], np.zeros(8)))
    return solve_ivp(slope, (0.0, 4.0), start, "DOP853", rtol=1e-11, atol=1e-13).y[6:, -1].reshape(2, 2)


@pytest.mark.parametrize(
    ("sensealg", "rate"),
    [
        (ct.GaussAdjoint(), 5.0),
        (ct.GaussAdjoint(), 10.0),
        (ct.GaussAdjoint(), 20.0),
        (ct.InterpolatingAdjoint(), 5.0),
        (ct.InterpolatingAdjoint(), 10.0),
        (ct.InterpolatingAdjoint(), 20.0),
        (ct.GaussAdjoint(checkpoints=4), 20.0),
    ],
)
def test_a_fast_unit_that_drives_a_slow_one(sensealg: object, rate: float) -> None:
    """THEORY.md 6, where backsolve is wrong by up to 300 %."""
    rates = torch.tensor([rate, 0.5], dtype=torch.float64)
    coupling = torch.nn.Parameter(torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64))

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coupling = coupling

        def forward(self, t: object, h: Tensor, u: object) -> Tensor:
            return -rates * h + torch.tanh(h) @ self.coupling.mT

    prob = ct.ODEProblem(ct.Field(Two()), torch.tensor([1.0, 0.5], dtype=torch.float64), (0.0, 4.0))
    sol = ct.solve(prob, ct.Dopri5(), rtol=1e-6, saveat=[4.0], dense=False, sensealg=sensealg)
    (mine,) = torch.autograd.grad(sol.hs[-1, 1], coupling)
    reference = torch.from_numpy(two_units_by_scipy(rate))
    assert (mine - reference).abs().max() < 1e-5 * reference.abs().max()


REFERENCE = {"rtol": 1e-11, "atol": 1e-13}


@pytest.mark.parametrize("control", ["held", "cubic"])
@pytest.mark.parametrize(
    "kind", [ct.Euler, ct.ExponentialEuler, ct.Midpoint, ct.Heun, ct.ExponentialMidpoint, ct.RK4]
)
def test_fixed_steps_reach_the_flow_s_gradient_at_their_order(kind: type, control: str) -> None:
    case = Case("GRU", control, seed=1)
    loss = loss_of("saved", case)
    exact = gradient(case, loss, ct.DiscreteAdjoint(), saveat=SAVED, **REFERENCE)
    sizes = [0.1, 0.05, 0.025] if kind is ct.RK4 else [0.025, 0.0125, 0.00625]
    errors = [
        apart(gradient(case, loss, ct.GaussAdjoint(), kind(dt=dt), saveat=SAVED), exact) for dt in sizes
    ]
    slopes = [math.log2(one / other) for one, other in itertools.pairwise(errors)]
    assert all(slope > kind.order - 0.25 for slope in slopes), (errors, slopes)


@pytest.mark.parametrize(
    ("alg", "bound"),
    [
        (ct.Dopri8(), 1e-7),
        (ct.Rosenbrock23(), 1e-3),
        (ct.Dopri5(per_sample=True), 1e-6),
        (ct.Radau(), 1e-5),
        (ct.BDF(), 1e-5),
        (ct.LSODA(), 1e-5),
    ],
)
@pytest.mark.parametrize("kind", ["GRU", "Field"])
def test_every_engine_carries_the_adjoint(alg: object, bound: float, kind: str) -> None:
    """scipy's methods have no discrete gradient; theirs is held against that of Dopri5."""
    case = Case(kind, "held", seed=2)
    loss = loss_of("saved", case)
    exact = gradient(case, loss, ct.DiscreteAdjoint(), saveat=SAVED, **REFERENCE)
    mine = gradient(case, loss, ct.GaussAdjoint(), alg, saveat=SAVED, rtol=1e-7)
    assert apart(mine, exact) < bound


@pytest.mark.parametrize("sensealg", [ct.InterpolatingAdjoint(), ct.ForwardSensitivity()])
@pytest.mark.parametrize("alg", [ct.Radau(), ct.Rosenbrock23()])
def test_stiff_methods_carry_parameters_along(alg: object, sensealg: object) -> None:
    case = Case("GRU", "held", seed=3)
    case.hold_inputs()
    loss = loss_of("saved", case)
    exact = gradient(case, loss, ct.DiscreteAdjoint(), saveat=SAVED, **REFERENCE)
    mine = gradient(case, loss, sensealg, alg, saveat=SAVED, rtol=1e-6)
    assert apart(mine, exact) < 1e-3


# Without a batch there are no times per sample.
@pytest.mark.parametrize(
    ("batch", "control"),
    [((), "held"), *((batch, control) for batch in ((1,), (2, 3)) for control in ("held", "own times"))],
)
@pytest.mark.parametrize("sensealg", [*CONTINUOUS, ct.ForwardSensitivity()])
def test_any_shape_of_the_batch(batch: tuple[int, ...], control: str, sensealg: object) -> None:
    case = Case("GRU", control, batch=batch)
    if isinstance(sensealg, ct.ForwardSensitivity):
        case.hold_inputs()
    loss = loss_of("saved", case)
    options = {"saveat": saved_times(case), "rtol": 1e-8}
    reference = gradient(case, loss, ct.DiscreteAdjoint(), **options)
    mine = gradient(case, loss, sensealg, **options)
    assert [part.shape for part in mine] == [part.shape for part in case.wanted]
    assert apart(mine, reference) < 1e-6


@pytest.mark.parametrize("sensealg", [*CONTINUOUS, ct.ForwardSensitivity()])
def test_single_precision(sensealg: object) -> None:
    wide, narrow = Case("LSTM", "held"), Case("LSTM", "held", dtype=torch.float32)
    with torch.no_grad():
        for one, other in zip(narrow.wanted, wide.wanted, strict=True):
            one.copy_(other)
    if isinstance(sensealg, ct.ForwardSensitivity):
        wide.hold_inputs()
        narrow.hold_inputs()
    reference = gradient(wide, loss_of("terminal", wide), ct.DiscreteAdjoint(), **REFERENCE)
    mine = gradient(narrow, loss_of("terminal", narrow), sensealg, rtol=1e-5)
    assert all(part.dtype == torch.float32 for part in mine)
    assert apart([part.double() for part in mine], reference) < 1e-4


@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.RK4(dt=0.02)])
@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("sensealg", [ct.GaussAdjoint, ct.InterpolatingAdjoint])
def test_pieces_solved_again_give_the_same_gradient(sensealg: type, number: int, alg: object) -> None:
    case = Case("GRU", "held", seed=4)
    loss = loss_of("saved", case)
    tolerances = {"rtol": 1e-7} if alg.adaptive else {}
    whole = gradient(case, loss, sensealg(), alg, saveat=SAVED, **tolerances)
    sol = ct.solve(case.problem(), alg, saveat=SAVED, dense=False, sensealg=sensealg(number), **tolerances)
    assert sol.ts.tolist() == SAVED
    grads = list(torch.autograd.grad(loss(sol), case.wanted))
    # To the error of the steps, which begin anew at every piece.
    assert apart(grads, whole) < (1e-5 if alg.adaptive else 1e-6)
    with pytest.raises(RuntimeError, match="dense=True"):
        sol(0.4)


def living_numbers() -> int:
    gc.collect()
    alive = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) is Tensor
    }
    return sum(alive.values())


def test_checkpoints_are_all_that_is_kept() -> None:
    """Between the passes: with n pieces, n states beside the saved ones."""
    case = Case("GRU", "held", batch=(50,))
    state = case.h0.numel() * 8
    kept = {}
    for number in (4, 16, None):
        before = living_numbers()
        sol = ct.solve(
            case.problem(),
            ct.RK4(dt=0.01),
            saveat=[0.8],
            dense=False,
            sensealg=ct.GaussAdjoint(checkpoints=number),
        )
        kept[number] = (living_numbers() - before) / state
        assert sol.hs.requires_grad
        del sol
    assert 4 <= kept[4] < 4 + 4
    assert 16 <= kept[16] < 16 + 4
    assert kept[None] > 80


@pytest.mark.parametrize("sensealg", [*CONTINUOUS, ct.GaussAdjoint(2), ct.ForwardSensitivity()])
@pytest.mark.parametrize("backward", [True, False])
def test_a_solve_leaves_nothing_behind(sensealg: object, backward: bool) -> None:
    case = Case("GRU", "held")
    case.hold_inputs()
    gone = []
    for _ in range(10):
        h0 = case.h0.clone()
        prob = case.problem(h0=h0)
        sol = ct.solve(prob, ct.Dopri5(), saveat=[0.0, 0.8], dense=False, sensealg=sensealg)
        if backward:
            sol.hs.sum().backward()
        gone.append((weakref.ref(h0), weakref.ref(sol.hs)))
        del sol, h0, prob
    gc.collect()
    assert sum(reference() is not None for pair in gone for reference in pair) == 0


@pytest.mark.parametrize("sensealg", CONTINUOUS)
def test_a_loss_times_a_constant_takes_the_same_steps(sensealg: object) -> None:
    case = Case("GRU", "held")
    found = []
    for factor in (1.0, 2.0**-40):
        sol = ct.solve(case.problem(), ct.Dopri5(), saveat=[0.3, 0.8], sensealg=sensealg)
        grads = torch.autograd.grad(factor * sol.hs.square().sum(), case.wanted)
        found.append(([part / factor for part in grads], sol.stats.evaluations_backward))
    assert found[0][1] == found[1][1]
    assert apart(found[1][0], found[0][0]) < 1e-12


def test_parameters_have_a_part_in_the_steps_of_one_adjoint_only() -> None:
    """A parameter whose integrand is large and fast."""

    class Shaken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, t: float | Tensor, h: Tensor, u: object) -> Tensor:
            time = torch.as_tensor(t, dtype=torch.float64)
            return -h + 1e3 * self.w * torch.sin(30.0 * time)

    fn = Shaken()
    h0 = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    counts = {}
    for kind in CONTINUOUS:
        for wanted in (True, False):
            fn.w.requires_grad_(wanted)
            prob = ct.ODEProblem(ct.Field(fn), h0, (0.0, 2.0))
            sol = ct.solve(prob, ct.Dopri5(), saveat=[2.0], sensealg=kind)
            sol.hs.sum().backward()
            counts[type(kind).__name__, wanted] = sol.stats.evaluations_backward
    assert counts["GaussAdjoint", True] == counts["GaussAdjoint", False]
    assert counts["InterpolatingAdjoint", False] == counts["GaussAdjoint", False]
    assert counts["InterpolatingAdjoint", True] > 2 * counts["GaussAdjoint", True]


@pytest.mark.parametrize("sensealg", CONTINUOUS)
def test_the_backward_pass_is_counted(sensealg: object) -> None:
    case = Case("GRU", "held")
    sol = ct.solve(case.problem(), ct.Dopri5(), sensealg=sensealg)
    assert sol.stats.sensealg == repr(sensealg)
    assert sol.stats.evaluations_backward == 0
    forward = sol.stats.evaluations
    torch.autograd.grad(sol.hs[-1].sum(), case.h0)
    assert sol.stats.evaluations_backward > 20
    assert sol.stats.evaluations == forward


class Square(torch.nn.Module):
    """dh/dt = w h^2, which is infinite at t = 1 / (w h0)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, t: object, h: Tensor, u: object) -> Tensor:
        return self.w * h * h


EVERY = [*CONTINUOUS, ct.ForwardSensitivity()]


@pytest.mark.parametrize(
    ("sensealg", "alg"),
    [
        (ct.GaussAdjoint(), ct.Dopri5()),
        (ct.InterpolatingAdjoint(), ct.Dopri5()),
        (ct.GaussAdjoint(3), ct.Dopri5()),
        (ct.ForwardSensitivity(), ct.Bosh3()),
        (ct.GaussAdjoint(), ct.Dopri5(per_sample=True)),
        (ct.GaussAdjoint(3), ct.Dopri5(per_sample=True)),
    ],
)
def test_the_good_part_of_a_blow_up_has_its_gradient(sensealg: object, alg: ct.Dopri5 | ct.Bosh3) -> None:
    fn = Square()
    h0 = torch.tensor([[1.0], [0.25]], dtype=torch.float64)
    prob = ct.ODEProblem(ct.Field(fn), h0, (0.0, 2.0))
    if alg.per_sample and sensealg == ct.GaussAdjoint(3):
        with pytest.raises(ValueError, match="pieces need one clock"):
            ct.solve(prob, alg, saveat=[0.5], sensealg=sensealg, dense=False)
        return
    options = {"saveat": [0.0, 0.25, 0.5, 1.5], "dense": False, "rtol": 1e-6}
    if isinstance(alg, ct.Bosh3):
        options["max_steps"] = 150
    with pytest.warns(RuntimeWarning, match="solve ended with"):
        sol = ct.solve(prob, alg, sensealg=sensealg, **options)
    value = torch.where(sol.hs.isnan(), 0.0, sol.hs).sum()
    (gradient,) = torch.autograd.grad(value, fn.w)
    # h = h0 / (1 - w h0 t), so dh/dw = t h^2; only the second sample goes on alone to t = 1.5.
    times, starts = torch.tensor([0.25, 0.5, 1.5], dtype=torch.float64), h0.squeeze(1)
    closed = times[:, None] * (starts / (1 - starts * times[:, None])) ** 2
    closed[2, 0] = 0.0
    if not alg.per_sample:
        closed[2] = 0.0
    assert float(gradient) == pytest.approx(float(closed.sum()), rel=1e-3)


@pytest.mark.parametrize("sensealg", [*EVERY, ct.GaussAdjoint(2)])
def test_a_solve_that_gets_nowhere_still_has_its_start(sensealg: object) -> None:
    case = Case("GRU", "held")
    case.hold_inputs()
    with pytest.warns(RuntimeWarning, match="MAX_STEPS"):
        sol = ct.solve(
            case.problem(), ct.Dopri5(first_step=1e-6), saveat=[0.0, 0.8], sensealg=sensealg, max_steps=1,
            dense=False,
        )  # fmt: skip
    assert sol.ts.tolist() == [0.0]
    (gradient,) = torch.autograd.grad(sol.hs.square().sum(), case.h0)
    assert torch.allclose(gradient, 2 * case.h0, rtol=0, atol=1e-15)


@pytest.mark.parametrize("sensealg", EVERY)
def test_a_callback_ends_at_its_step_and_sees_the_state_alone(sensealg: object) -> None:
    case = Case("LSTM", "held", seed=5)
    case.hold_inputs()
    seen = []

    def callback(t: float, h: Tensor) -> bool:
        seen.append(h.shape)
        return t > 0.4

    pair = []
    for kind in (sensealg, ct.DiscreteAdjoint()):
        sol = ct.solve(case.problem(), ct.RK4(dt=0.02), sensealg=kind, callback=callback)
        assert sol.retcode is ct.ReturnCode.TERMINATED
        assert float(sol.ts[-1]) == pytest.approx(0.42)
        pair.append(list(torch.autograd.grad(sol.hs[-1].square().sum(), case.wanted)))
    assert apart(*pair) < 1e-6
    assert set(seen) == {case.h0.shape}


@pytest.mark.parametrize("sensealg", EVERY)
@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.RK4(dt=0.05)])
def test_saved_times_of_each_sample(sensealg: object, alg: object) -> None:
    """On one clock too; NaN where a sample has no further time."""
    case = Case("GRU", "held", seed=6)
    case.hold_inputs()
    saves = torch.tensor([[0.2, 0.1], [0.5, 0.8], [0.7, torch.nan]], dtype=torch.float64)
    tolerances = {"rtol": 1e-8} if alg.adaptive else {}
    pair = []
    for kind in (sensealg, ct.DiscreteAdjoint()):
        sol = ct.solve(case.problem(), alg, saveat=saves, sensealg=kind, **tolerances)
        value = torch.where(sol.hs.isnan(), 0.0, sol.hs).square().sum()
        pair.append(list(torch.autograd.grad(value, case.wanted)))
    assert apart(*pair) < (1e-6 if alg.adaptive else 1e-4)


def test_saved_times_of_each_sample_need_a_clock_for_each() -> None:
    case = Case("GRU", "held")
    saves = torch.tensor([[0.2, 0.1]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"alg is Dopri8.*times of each sample"):
        ct.solve(case.problem(), ct.Dopri8(), saveat=saves, sensealg=ct.GaussAdjoint())


@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.Radau(), ct.RK4(dt=0.02)])
def test_two_times_apart_by_rounding(alg: object) -> None:
    """The step over them says nothing about the next one."""
    case = Case("GRU", "held")
    pair = []
    for saves, weights in (([0.4, math.nextafter(0.4, 1.0), 0.8], [1.0, 1.0, 1.0]), ([0.4, 0.8], [2.0, 1.0])):
        sol = ct.solve(case.problem(), alg, saveat=saves, sensealg=ct.GaussAdjoint())
        value = sum(weight * h.sum() for weight, h in zip(weights, sol.hs, strict=True))
        pair.append(list(torch.autograd.grad(value, case.wanted)))
    assert apart(*pair) < 1e-5


@pytest.mark.parametrize("sensealg", CONTINUOUS)
def test_a_cotangent_that_is_not_finite(sensealg: object) -> None:
    """NaN comes out as NaN, wherever in time it went in."""
    case = Case("GRU", "held")
    sol = ct.solve(case.problem(), ct.Dopri5(), saveat=[0.3, 0.8], sensealg=sensealg)
    weights = torch.tensor([torch.nan, 1.0], dtype=torch.float64).reshape(2, 1, 1)
    grads = torch.autograd.grad((weights * sol.hs).sum(), case.wanted)
    assert all(bool(part.isnan().all()) for part in grads)


@pytest.mark.parametrize("sensealg", CONTINUOUS)
def test_a_loss_that_does_not_look(sensealg: object) -> None:
    case = Case("GRU", "held")
    sol = ct.solve(case.problem(), ct.Dopri5(), saveat=[0.8], sensealg=sensealg)
    grads = torch.autograd.grad((0.0 * sol.hs).sum(), case.wanted)
    assert all(bool((part == 0).all()) for part in grads)
    assert sol.stats.evaluations_backward == 0


@pytest.mark.parametrize("sensealg", EVERY)
def test_captured_tensors_are_refused(sensealg: object) -> None:
    matrix = torch.eye(2, dtype=torch.float64, requires_grad=True)
    prob = ct.ODEProblem(
        ct.Field(lambda t, h, u: h @ matrix), torch.ones(1, 2, dtype=torch.float64), (0.0, 1.0)
    )
    with pytest.raises(ValueError, match=rf"{type(sensealg).__name__}: the field uses .*'matrix'"):
        ct.solve(prob, sensealg=sensealg)
    size = torch.ones(1, dtype=torch.float64, requires_grad=True)
    control = ct.FunctionControl(lambda t: size * torch.sin(t))
    prob = ct.ODEProblem(
        ct.Field(lambda t, h, u: u - h), torch.ones(1, 1, dtype=torch.float64), (0.0, 1.0), control
    )
    with pytest.raises(ValueError, match=r"captured tensor .*requires grad|its gradient would be lost"):
        ct.solve(prob, sensealg=sensealg)


@pytest.mark.parametrize("sensealg", EVERY)
def test_times_that_require_grad_are_refused(sensealg: object) -> None:
    case = Case("GRU", "held")
    case.hold_inputs()
    saves = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="no gradients by times: use DiscreteAdjoint"):
        ct.solve(case.problem(), saveat=saves, sensealg=sensealg)
    stop = torch.tensor([0.5, 0.8], dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="no gradients by times: use DiscreteAdjoint"):
        ct.solve(case.problem(tspan=(torch.zeros(2, dtype=torch.float64), stop)), sensealg=sensealg)


def test_forward_sensitivities_by_the_input_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ForwardSensitivity\(\) and the control requires grad"):
        ct.solve(Case("GRU", "held").problem(), sensealg=ct.ForwardSensitivity())


@pytest.mark.parametrize("sensealg", EVERY)
def test_second_derivatives_are_refused(sensealg: object) -> None:
    """Also where the cotangent does not depend on the state, and torch alone would drop terms in silence."""
    case = Case("GRU", "held")
    case.hold_inputs()
    for loss in (torch.sum, lambda h: h.square().sum()):
        sol = ct.solve(case.problem(), ct.Dopri5(), sensealg=sensealg)
        with pytest.raises(RuntimeError, match=rf"{type(sensealg).__name__} has no second derivatives"):
            torch.autograd.grad(loss(sol.hs[-1]), case.h0, create_graph=True)


@pytest.mark.parametrize("sensealg", EVERY)
def test_torch_func_is_refused_by_name(sensealg: object) -> None:
    case = Case("GRU", "held")
    case.hold_inputs()

    def value(h0: Tensor) -> Tensor:
        return ct.solve(case.problem(h0=h0), ct.Dopri5(), sensealg=sensealg).hs.sum()

    with pytest.raises(TypeError, match=rf"do not pass through {type(sensealg).__name__}; use Discrete"):
        torch.func.grad(value)(case.h0.detach())


@pytest.mark.parametrize("sensealg", [*CONTINUOUS, ct.GaussAdjoint(2)])
@pytest.mark.parametrize("what", ["weight_hh", "xs", "h0"])
def test_what_the_solve_read_must_not_change_before_backward(sensealg: object, what: str) -> None:
    case = Case("GRU", "held")
    sol = ct.solve(case.problem(), ct.Dopri5(), saveat=[0.8], dense=False, sensealg=sensealg)
    with torch.no_grad():
        {"weight_hh": case.parameters["weight_hh"], "xs": case.inputs[0], "h0": case.h0}[what].mul_(1.1)
    with pytest.raises(RuntimeError, match=rf"{what} was changed since the solve"):
        sol.hs.sum().backward()


def test_an_adjoint_that_cannot_be_solved_says_so() -> None:
    """The input is finite and its slope is not: forwards nothing shows it."""

    class Root(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, t: object, h: Tensor, u: object) -> Tensor:
            return -self.w * torch.sqrt(h.abs()) * 0.0

    prob = ct.ODEProblem(ct.Field(Root()), torch.zeros(1, 1, dtype=torch.float64), (0.0, 1.0))
    sol = ct.solve(prob, ct.Dopri5(), saveat=[1.0], sensealg=ct.GaussAdjoint())
    with pytest.raises(ct.SolveError, match="the adjoint's solve ended with"):
        sol.hs.sum().backward()


def test_the_states_between_are_numbers_and_say_so(tmp_path: object) -> None:
    case = Case("GRU", "held")
    sol = ct.solve(case.problem(), ct.Dopri5(), saveat=[0.8], sensealg=ct.GaussAdjoint())
    with pytest.raises(RuntimeError, match="GaussAdjoint differentiates only the saved states"):
        sol(0.5)
    with torch.no_grad():
        inside = sol(0.5)
    sol.save(tmp_path / "run.nc")
    assert torch.allclose(ct.load(tmp_path / "run.nc")(0.5), inside, rtol=0, atol=1e-12)
    whole = ct.solve(case.problem(), ct.Dopri5(), rtol=1e-9, sensealg=ct.GaussAdjoint())
    reference = ct.solve(case.problem(), ct.Dopri5(), rtol=1e-9)
    pair = [list(torch.autograd.grad(s(0.55).square().sum(), case.wanted)) for s in (whole, reference)]
    assert apart(*pair) < 1e-6


@pytest.mark.parametrize("sensealg", CONTINUOUS)
def test_inputs_with_holes(sensealg: object) -> None:
    case = Case("GRU", "cubic", seed=7)
    xs = case.inputs[0].detach().clone()
    xs[1, 0, 0] = torch.nan
    xs.requires_grad_()
    case.control = ct.LinearInterpolation(case.control.ts, xs)
    case.inputs = [xs]
    loss = loss_of("terminal", case)
    pair = [gradient(case, loss, kind, rtol=1e-9) for kind in (sensealg, ct.DiscreteAdjoint())]
    assert apart(*pair) < 1e-7
    assert float(pair[0][-1][1, 0, 0]) == 0.0


@pytest.mark.parametrize("sensealg", CONTINUOUS)
def test_a_function_with_a_jump_as_input(sensealg: object) -> None:
    class Switched(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size = torch.nn.Parameter(torch.tensor([0.7], dtype=torch.float64))

        def forward(self, t: Tensor) -> Tensor:
            return torch.where(t < 0.4, self.size, -2.0 * self.size * torch.cos(t))

    case = Case("GRU", "held", seed=8)
    switch = Switched()
    case.control, case.inputs = ct.FunctionControl(switch, knots=[0.4]), [switch.size]
    loss = loss_of("saved", case)
    saves = [0.2, 0.4, 0.7]
    loss = ct.Loss(at=(saves, lambda k, h: (k + 1.0) * h.square().sum(-1)))
    pair = [gradient(case, loss, kind, saveat=saves, rtol=1e-9) for kind in (sensealg, ct.DiscreteAdjoint())]
    assert apart(*pair) < 1e-7


@pytest.mark.parametrize("sensealg", EVERY)
def test_parameters_frozen_replaced_shared_and_behind_h0(sensealg: object) -> None:
    case = Case("GRU", "held", seed=9)
    case.hold_inputs()
    case.field.bias_hh.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 2, dtype=torch.float64, generator=generator).requires_grad_()
    start = torch.nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
    pair = []
    for kind in (sensealg, ct.DiscreteAdjoint()):
        h0 = torch.tanh(start + weight[:2, 0]).expand(2, 2)
        prob = case.problem(h0=h0, parameters={"weight_hh": weight})
        sol = ct.solve(prob, ct.Dopri5(), rtol=1e-8, sensealg=kind)
        grads = torch.autograd.grad(
            sol.hs[-1].square().sum(), [weight, start, case.field.weight_ih, case.field.bias_ih]
        )
        pair.append(list(grads))
    assert apart(*pair) < 1e-6
    one = torch.randn(6, 1, dtype=torch.float64, generator=generator).requires_grad_()
    both = {"weight_ih": one, "weight_hh": one.expand(6, 2)}
    pair = []
    for kind in (sensealg, ct.DiscreteAdjoint()):
        sol = ct.solve(case.problem(parameters=both), ct.Dopri5(), rtol=1e-8, sensealg=kind)
        pair.append(list(torch.autograd.grad(sol.hs[-1].square().sum(), [one])))
    assert apart(*pair) < 1e-6


@pytest.mark.parametrize("saveat", [None, [0.3, 0.8]])
def test_ensembles(saveat: list[float] | None) -> None:
    case = Case("GRU", "held", seed=10)
    case.hold_inputs()
    weights = [
        torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(k)).requires_grad_()
        for k in range(3)
    ]
    ensemble = ct.EnsembleProblem(
        case.problem(), lambda prob, ctx: ct.remake(prob, parameters={"weight_hh": weights[ctx.index]}), 3
    )
    options = {"saveat": saveat, "rtol": 1e-8}
    pair = []
    for kind in (ct.GaussAdjoint(), ct.DiscreteAdjoint()):
        sols = ct.solve(ensemble, ct.Dopri5(), sensealg=kind, **options)
        value = sum((k + 1) * sol.hs[-1].square().sum() for k, sol in enumerate(sols))
        pair.append(list(torch.autograd.grad(value, [*weights, case.field.bias_hh])))
        with torch.no_grad():
            assert sols[1](0.4).shape == case.h0.shape
    assert apart(*pair) < 1e-6
    for kind in (ct.InterpolatingAdjoint(), ct.ForwardSensitivity()):
        with pytest.raises(ValueError, match=r"use GaussAdjoint\(\) or ensemble=EnsembleSerial"):
            ct.solve(ensemble, ct.Dopri5(), sensealg=kind, **options)


def test_an_empty_batch() -> None:
    case = Case("GRU", "smooth", batch=(0,))
    sol = ct.solve(case.problem(), ct.Dopri5(), sensealg=ct.GaussAdjoint())
    grads = torch.autograd.grad(sol.hs.sum(), case.wanted, allow_unused=True, materialize_grads=True)
    assert all(bool((part == 0).all()) for part in grads)


def test_checkpoints_are_positive_integers() -> None:
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"GaussAdjoint\(checkpoints=\.\.\.\)"):
            unchecked(ct.GaussAdjoint)(wrong)
