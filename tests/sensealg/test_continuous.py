"""Gradients of adjoint equations and of forward sensitivities against the discrete one and one another."""

import gc
import itertools
import math
import weakref

import pytest
import torch
from torch import Tensor

import ctgate as ct
from tests.sensealg.problems import FIELDS, SAVED, Case, apart, loss_of, saved_times

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
        (ct.Dopri5(), [1e-5, 1e-6, 1e-7, 1e-8, 1e-9]),
        (ct.Tsit5(), [1e-5, 1e-6, 1e-7, 1e-8, 1e-9]),
        (ct.Bosh3(), [1e-4, 1e-5, 1e-6, 1e-7]),
        (ct.Rosenbrock23(), [1e-3, 1e-4, 1e-5]),
    ],
)
def test_the_difference_of_two_gradients_falls_with_the_tolerance(
    alg: object, tolerances: list[float]
) -> None:
    """A slope, over random problems: that of the errors themselves, less 0.15 for what is not asymptotic."""
    logs: dict[str, list[list[float]]] = {}
    for seed in range(3):
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


@pytest.mark.parametrize("rate", [5.0, 10.0, 20.0])
@pytest.mark.parametrize("sensealg", [*CONTINUOUS, ct.GaussAdjoint(checkpoints=4)])
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
    options = {"saveat": [4.0], "dense": False}
    exact = ct.solve(prob, ct.Dopri5(), rtol=1e-12, atol=1e-14, **options)
    (reference,) = torch.autograd.grad(exact.hs[-1, 1], coupling)
    sol = ct.solve(prob, ct.Dopri5(), rtol=1e-6, sensealg=sensealg, **options)
    (mine,) = torch.autograd.grad(sol.hs[-1, 1], coupling)
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


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("control", ["held", "own times"])
@pytest.mark.parametrize("sensealg", [*CONTINUOUS, ct.ForwardSensitivity()])
def test_any_shape_of_the_batch(batch: tuple[int, ...], control: str, sensealg: object) -> None:
    if not batch and control == "own times":
        pytest.skip("without a batch there are no times per sample")
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


@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.Bosh3(), ct.RK4(dt=0.02)])
@pytest.mark.parametrize("number", [1, 3, 7])
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
    assert kept[4] < 4 + 6
    assert kept[4] < kept[16] < 16 + 6
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
def test_the_backward_pass_is_counted(sensealg: object) -> None:
    case = Case("GRU", "held")
    sol = ct.solve(case.problem(), ct.Dopri5(), sensealg=sensealg)
    assert sol.stats.sensealg == repr(sensealg)
    assert sol.stats.evaluations_backward == 0
    forward = sol.stats.evaluations
    torch.autograd.grad(sol.hs[-1].sum(), case.h0)
    assert sol.stats.evaluations_backward > 20
    assert sol.stats.evaluations == forward
