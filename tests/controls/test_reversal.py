"""An input read backwards is the input, mirrored: values, limits, knots, pieces."""

import pytest
import torch

import ctgate as ct
from ctgate.controls.reversal import Reversed

DOUBLE = torch.float64
TIMES = torch.tensor([0.0, 0.4, 1.0, 1.7], dtype=DOUBLE)


def values(rows: int, *batch: int) -> torch.Tensor:
    return torch.randn(rows, *batch, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


def holes() -> torch.Tensor:
    xs = values(4, 2)
    xs[1, 0, 1] = torch.nan
    return xs


def own_times() -> torch.Tensor:
    """The second sample has one time fewer."""
    ts = TIMES[:, None] + torch.tensor([0.0, 0.1], dtype=DOUBLE)
    ts[3, 1] = torch.nan
    return ts


CONTROLS = {
    "held": lambda: ct.ZeroOrderHold(TIMES, values(3, 2)),
    "linear": lambda: ct.LinearInterpolation(TIMES, values(4)),
    "cubic": lambda: ct.CubicHermite(TIMES, values(4, 2)),
    "holes": lambda: ct.LinearInterpolation(TIMES, holes()),
    "extrapolated": lambda: ct.ZeroOrderHold(TIMES, values(4, 2), extrapolate="hold"),
    "function": lambda: ct.FunctionControl(
        lambda t: torch.stack([torch.sin(t), torch.sign(t - 0.4)]), knots=[0.4], support=(0.0, 1.7)
    ),
    "own times": lambda: ct.LinearInterpolation(own_times(), values(4, 2)),
    "own times held": lambda: ct.ZeroOrderHold(own_times(), values(4, 2)[:3]),
}
SHARED = [name for name in CONTROLS if "own" not in name]


@pytest.mark.parametrize("name", SHARED)
def test_values_and_limits_are_mirrored(name: str) -> None:
    control = CONTROLS[name]()
    back = Reversed(control)
    times = [0.0, 0.2, 0.4, 0.7, 1.0, 1.3, 1.7]
    for t in times:
        assert torch.equal(back(-t), control(t, "left"))
        assert torch.equal(back(-t, "left"), control(t, "right"))
    many = torch.tensor(times, dtype=DOUBLE)
    assert torch.equal(back(-many), control(many, "left"))
    # Between knots, against the function itself: no limit is needed.
    assert torch.equal(Reversed(back)(0.7), control(0.7))
    with pytest.raises(ValueError, match="side"):
        back(-0.5, "up")


@pytest.mark.parametrize("name", SHARED)
def test_knots_and_support_are_mirrored(name: str) -> None:
    control = CONTROLS[name]()
    back = Reversed(control)
    assert back.knots == tuple(sorted(-knot for knot in control.knots))
    assert back.sample_knots.tolist() == list(back.knots)
    low, high = control.support
    assert back.support == (-high, -low)
    assert [float(end) for end in back.sample_support] == [-high, -low]
    for name in ("channels", "batch_shape", "shared", "continuous", "resolution"):
        assert getattr(back, name) == getattr(control, name)


@pytest.mark.parametrize("name", SHARED)
def test_pieces_are_those_of_the_forward_interval(name: str) -> None:
    """At both ends the limit from inside, with the same tensors to differentiate by."""
    control = CONTROLS[name]()
    back = Reversed(control)
    for start, stop in ((0.0, 0.4), (0.4, 1.0), (1.0, 1.7), (1.1, 1.2)):
        piece, mirrored = control.on(start, stop), back.on(-stop, -start)
        for t in (start, 0.5 * (start + stop), stop):
            assert torch.equal(mirrored(-t), piece(t))
            assert torch.equal(mirrored(torch.tensor(-t, dtype=DOUBLE)), piece(t))
        assert mirrored.held == piece.held
        assert len(mirrored.coefficients) == len(piece.coefficients)
    with pytest.raises(ValueError, match="knot"):
        back.on(-0.5, -0.3)


@pytest.mark.parametrize("name", ["own times", "own times held"])
def test_times_of_each_sample(name: str) -> None:
    control = CONTROLS[name]()
    back = Reversed(control)
    low, high = control.sample_support
    assert torch.equal(torch.stack(back.sample_support), torch.stack((-high, -low)))
    knots = back.sample_knots
    assert (knots.diff(dim=0) >= 0).all()
    for sample in (0, 1):
        expected = sorted(-t for t in own_times()[:, sample].tolist() if t == t)
        assert knots[:, sample].unique().tolist() == expected
    t = torch.tensor([[0.2, 0.6], [0.4, 0.5], [1.7, 1.1]], dtype=DOUBLE)
    assert torch.equal(back(-t), control(t, "left"))
    start, stop = torch.tensor([[0.4, 0.5]], dtype=DOUBLE), torch.tensor([[0.9, 1.1]], dtype=DOUBLE)
    (piece,), (mirrored,) = control.on_samples(start, stop), back.on_samples(-stop, -start)
    for place in (start[0], 0.5 * (start + stop)[0], stop[0]):
        assert torch.equal(mirrored(-place), piece(place))


@pytest.mark.parametrize("name", list(CONTROLS))
def test_a_solve_backwards_returns_to_where_it_began(name: str) -> None:
    """dh/ds = -u(-s) after dh/dt = u(t): the integral there and back, over every knot."""
    control = CONTROLS[name]()
    if name == "function":
        control = ct.FunctionControl(control.fn, knots=[0.4])
    h0 = torch.randn(2, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    own = not control.shared
    start, stop = control.sample_support if own else (0.0, 1.7)
    with torch.no_grad():
        field = ct.Field(lambda t, h, u: u.expand_as(h))
        there = ct.solve(ct.ODEProblem(field, h0, (start, stop), control), rtol=1e-9)
        field = ct.Field(lambda t, h, u: -u.expand_as(h))
        prob = ct.ODEProblem(field, there.hs[-1], (-stop, -start), Reversed(control))
        back = ct.solve(prob, rtol=1e-9)
    assert (there.hs[-1] - h0).abs().max() > 0.1
    assert (back.hs[-1] - h0).abs().max() < 1e-7


def test_gradients_reach_the_values() -> None:
    xs = values(4, 2).requires_grad_()
    control = ct.CubicHermite(TIMES, xs)
    t = torch.tensor([0.2, 0.9], dtype=DOUBLE)
    (mine,) = torch.autograd.grad(Reversed(control)(-t).square().sum(), xs)
    (expected,) = torch.autograd.grad(control(t).square().sum(), xs)
    assert torch.equal(mine, expected)
