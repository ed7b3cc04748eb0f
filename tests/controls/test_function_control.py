"""A function as a control: what it is called with, and which side of a jump it is asked for."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import vmap

import ctgate as ct
from ctgate.controls import FunctionControl


def sine(t):
    return torch.stack([torch.sin(t), torch.cos(t)])


def step(t):
    """Counts the knot 0.3 itself to the right."""
    return torch.where(t < 0.3, -1.0, 1.0).reshape(1)


def step_closed(t):
    """Counts the knot 0.3 itself to the left."""
    return torch.where(t <= 0.3, -1.0, 1.0).reshape(1)


def test_it_is_the_function():
    control = FunctionControl(sine)
    assert (control.channels, control.shared, control.continuous) == (None, True, True)
    assert control.knots == ()
    assert control.support == (-math.inf, math.inf)
    assert control.batch_shape == torch.Size()
    assert control.resolution == 2.0**-52
    for t in (0.7, torch.tensor(0.7, dtype=torch.float64)):
        assert control(t).tolist() == [math.sin(0.7), math.cos(0.7)]
        assert control.on(-5.0, 5.0)(t).tolist() == [math.sin(0.7), math.cos(0.7)]
    times = torch.linspace(-2.0, 2.0, 7, dtype=torch.float64)
    expected = torch.stack([times.sin(), times.cos()], 1)
    torch.testing.assert_close(control(times), expected)
    torch.testing.assert_close(control(times.tolist(), "left"), expected)
    torch.testing.assert_close(vmap(control)(times), expected)


def test_it_is_called_with_a_float64_scalar():
    seen = []

    def fn(t):
        seen.append((t.dtype, t.shape))
        return torch.zeros(2, 3)

    control = FunctionControl(fn, knots=[0.0], support=(-1.0, 1.0))
    for t in (0, 0.5, torch.tensor(0.5), torch.tensor([0.5, 0.7]), [0.5]):
        assert control(t).shape[-2:] == (2, 3)
    for t in (0.5, torch.tensor(0.5)):
        control.on(0.0, 1.0)(t)
    assert set(seen) == {(torch.float64, torch.Size())}
    assert control(0.5).dtype == torch.float32


@pytest.mark.parametrize("fn", [step, step_closed])
@pytest.mark.parametrize("knot", [0.3, torch.tensor(0.3), 0.1 + 0.2], ids=["exact", "float32", "a sum"])
def test_both_limits_of_a_jump_whichever_side_the_function_counts_it_to(fn, knot):
    control = FunctionControl(
        fn, knots=[float(knot)] if isinstance(knot, float) else knot.reshape(1), channels=1
    )
    assert control.knots == (float(knot),)
    assert not control.continuous
    at = control.knots[0]
    for t in (at, torch.tensor(at, dtype=torch.float64)):
        assert control(t, "left").item() == -1.0
        assert control(t, "right").item() == 1.0
        assert control.on(-1.0, at)(t).item() == -1.0
        assert control.on(at, 1.0)(t).item() == 1.0
    assert control([0.2, at, 0.4], "left").flatten().tolist() == [-1.0, -1.0, 1.0]
    assert control([0.2, at, 0.4], "right").flatten().tolist() == [-1.0, 1.0, 1.0]
    # Stage times in float32, on either side of the knot.
    for rounded in (torch.tensor(at, dtype=torch.float32), at * (1 + 1e-7), at * (1 - 1e-7)):
        assert control.on(-1.0, at)(rounded).item() == -1.0
        assert control.on(at, 1.0)(rounded).item() == 1.0


@pytest.mark.parametrize("jump", [0.3, 0.7])
def test_a_knot_in_float32_stands_for_the_jump_that_it_was_rounded_from(jump):
    control = FunctionControl(
        lambda t: torch.where(t < jump, -1.0, 1.0).reshape(1), knots=torch.tensor([jump])
    )
    (knot,) = control.knots
    assert (knot < jump) == (jump == 0.7)
    for t in (knot, jump):
        assert [control(t, side).item() for side in ("left", "right")] == [-1.0, 1.0]
        assert control.on(-1.0, knot)(t).item() == -1.0
        assert control.on(knot, 1.0)(t).item() == 1.0


def test_a_jump_at_zero():
    control = FunctionControl(lambda t: torch.where(t < 0.0, -1.0, 1.0).reshape(1), knots=[0.0])
    assert control(0.0, "left").item() == -1.0
    assert control(0.0, "right").item() == 1.0
    assert control.on(-1.0, 0.0)(0.0).item() == -1.0


def test_knots_at_the_ends_of_the_support_have_one_side():
    control = FunctionControl(lambda t: torch.floor(t).reshape(1), knots=[0.0, 1.0, 2.0], support=(0.0, 2.0))
    assert control.support == (0.0, 2.0)
    assert [control(0.0, side).item() for side in ("left", "right")] == [0.0, 0.0]
    assert [control(2.0, side).item() for side in ("left", "right")] == [1.0, 1.0]
    assert [control(1.0, side).item() for side in ("left", "right")] == [0.0, 1.0]
    for (start, stop), value in zip(itertools.pairwise(control.knots), (0.0, 1.0), strict=True):
        piece = control.on(start, stop)
        assert [piece(t).item() for t in (start, 0.5 * (start + stop), stop)] == [value] * 3


def test_the_function_is_never_called_outside_its_support():
    def root(t):
        assert 0.0 <= t <= 0.3
        return torch.sqrt(t).reshape(1)

    control = FunctionControl(root, support=(0.0, 0.3))
    beyond = 0.1 + 0.2
    assert beyond > 0.3
    assert control(beyond).item() == control.on(0.1, beyond)(beyond).item() == math.sqrt(0.3)


def test_gradients_reach_what_the_function_captures_and_t():
    weight = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    control = FunctionControl(lambda t: weight * t**2)
    assert torch.autograd.gradcheck(lambda _: control([0.5, 1.5]), weight)
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(control, t)
    assert torch.autograd.gradcheck(control.on(0.0, 1.0), t)
    assert control.on(0.0, 1.0).coefficients == ()


def test_the_parameters_of_a_module_are_the_coefficients():
    class Ramp(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor([2.0]))

        def forward(self, t):
            return self.slope * t

    module = Ramp()
    (coefficient,) = FunctionControl(module).on(0.0, 1.0).coefficients
    assert coefficient is module.slope


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"knots": [1.0, 0.5]}, r"knots\[1\] = 0\.5 does not exceed knots\[0\] = 1\.0"),
        ({"knots": [[0.0, 1.0]]}, r"knots has shape \(1, 2\); it must be \(knot,\)"),
        (
            {"knots": torch.tensor([0.0], requires_grad=True)},
            "knots requires grad; knots never carry gradients",
        ),
        ({"channels": -1}, "channels is -1; it must be at least 0, or None"),
        ({"support": (1.0, 1.0)}, r"support is \(1\.0, 1\.0\); it must be \(low, high\), low < high"),
        ({"support": (math.nan, 1.0)}, r"support is \(nan, 1\.0\)"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FunctionControl(sine, **arguments)


def test_results_that_are_refused():
    with pytest.raises(TypeError, match="fn returned float; it must return a floating-point tensor"):
        FunctionControl(lambda t: 1.0)(0.0)
    with pytest.raises(TypeError, match=r"fn returned torch\.int64; it must return a floating-point tensor"):
        FunctionControl(lambda t: torch.zeros(2, dtype=torch.int64)).on(0.0, 1.0)(0.5)
    with pytest.raises(ValueError, match=r"fn returned shape \(\); it must be \(\*batch, channel\)"):
        FunctionControl(lambda t: t)(0.0)
    with pytest.raises(ValueError, match=r"fn returned shape \(2,\); it must be \(\*batch, 3\)"):
        FunctionControl(sine, channels=3)([0.0, 1.0])


def test_calls_that_are_refused():
    control = FunctionControl(sine, knots=[0.5], support=(0.0, 1.0))
    for t in (1.5, [0.5, 1.5], torch.tensor(1.5)):
        with pytest.raises(
            ValueError, match=r"t is 1\.5 and FunctionControl is known on \[0\.0, 1\.0\].*wider support="
        ):
            control(t)
    with pytest.raises(ValueError, match="t is nan and FunctionControl"):
        control(math.nan)
    with pytest.raises(ValueError, match="side is 'up'"):
        control(0.2, "up")
    for t in ([], torch.empty(0, 3)):
        with pytest.raises(ValueError, match=r"t has shape \(0.*\(time, \*batch\), with at least one time"):
            control(t)
    with pytest.raises(ValueError, match=r"FunctionControl\.on\(0\.4, 0\.6\): the knot 0\.5 lies inside"):
        control.on(0.4, 0.6)
    with pytest.raises(ValueError, match=r"on\(0\.4, 0\.4\): start must be before stop"):
        control.on(0.4, 0.4)
    with pytest.raises(ValueError, match=r"t is -1\.0 and FunctionControl"):
        control.on(-1.0, 0.4)


def scaled(t):
    """(sample, channel): each sample has a frequency of its own."""
    return torch.sin(torch.outer(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) * t, torch.ones(2)))


def test_each_sample_has_its_own_row_at_its_own_time():
    times = torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 4.0]], dtype=torch.float64)
    expected = torch.sin(times * torch.tensor([1.0, 2.0, 3.0])).unsqueeze(-1).expand(2, 3, 2)
    control = FunctionControl(scaled)
    torch.testing.assert_close(control(times), expected)
    (piece, last) = control.on_samples(times - 0.1, times + 0.1)
    torch.testing.assert_close(piece(times[0]), expected[0])
    torch.testing.assert_close(last(times[1]), expected[1])
    torch.testing.assert_close(piece(0.5), scaled(torch.tensor(0.5)))
    # Two dimensions of samples, of which fn knows the last.
    many = torch.stack([times, 2.0 * times], 1)
    found = control(many)
    assert found.shape == (2, 2, 3, 2)
    torch.testing.assert_close(
        found[:, 1], torch.sin(many[:, 1, :, None] * torch.tensor([[1.0], [2.0], [3.0]])).expand(2, 3, 2)
    )


def test_a_row_for_all_samples_is_read_at_each_ones_time():
    control = FunctionControl(sine)
    times = torch.tensor([[0.1, 0.7]], dtype=torch.float64)
    expected = torch.stack([sine(t) for t in times[0]])
    assert torch.equal(control(times), expected[None])
    (piece,) = control.on_samples(times, times)
    assert torch.equal(piece(times[0]), expected)
    (piece,) = control.on_samples(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert torch.equal(piece(times[0, 0]), expected[0])


def test_the_side_of_a_knot_is_chosen_in_each_sample():
    control = FunctionControl(lambda t: torch.floor(t).reshape(1), knots=[1.0, 2.0], support=(0.0, 2.0))
    assert control.sample_knots.tolist() == [1.0, 2.0]
    assert [(end.shape, end.item()) for end in control.sample_support] == [((), 0.0), ((), 2.0)]
    start = torch.tensor([[0.0, 1.0], [1.0, 1.5], [2.0, 1.0]], dtype=torch.float64)
    stop = torch.tensor([[1.0, 1.5], [2.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    pieces = control.on_samples(start, stop)
    for ends in (start, stop):
        values = [piece(t).flatten().tolist() for piece, t in zip(pieces, ends, strict=True)]
        assert values[:2] == [[0.0, 1.0], [1.0, 1.0]]
    times = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    assert control(times, "left").flatten().tolist() == [0.0, 0.0]
    assert control(times, "right").flatten().tolist() == [1.0, 0.0]


def test_gradients_in_the_time_of_each_sample():
    control = FunctionControl(scaled, knots=[0.5])
    t = torch.tensor([[0.1, 0.2, 0.9]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(control, t)
    (piece,) = control.on_samples(t - 0.01, t + 0.01)
    assert torch.autograd.gradcheck(piece, t[0])


def test_no_samples_at_all():
    control = FunctionControl(sine, support=(1.0, 3.0))
    empty = torch.zeros(2, 0, dtype=torch.float64)
    assert control(empty).shape == (2, 0, 2)
    assert [piece(empty[0]).shape for piece in control.on_samples(empty, empty)] == [(0, 2)] * 2


def test_samples_that_are_refused():
    control = FunctionControl(scaled, knots=[0.5], support=(0.0, 1.0))
    with pytest.raises(
        ValueError, match=r"returned shape \(3, 2\) and t has one time per sample of a batch \(2,\)"
    ):
        control(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"t is 1\.5 and FunctionControl is known"):
        control(torch.tensor([[0.0, 1.5, 0.0]]))
    zero = torch.zeros(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"stop\[0, 0\] is 1\.5 and .* in sample \(0,\); .*wider support="):
        control.on_samples(zero, zero + 1.5)
    with pytest.raises(ValueError, match=r"interval 0 of sample \(0,\) is .* has the knot 0\.5 inside"):
        control.on_samples(zero + 0.25, zero + 0.75)


def test_derivatives_by_time_pass_at_knots():
    """Where a time lies on a knot the value is taken beside it, and its derivative by time is fn's."""
    fn = FunctionControl(lambda t: torch.sin(3.0 * t).reshape(1), knots=[0.5, 1.0])
    t = torch.tensor([0.5, 0.7, 1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(fn(t).sum(), t)
    assert torch.allclose(slope, 3.0 * torch.cos(3.0 * t), rtol=1e-12)
    end = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(fn.on(0.5, 1.0)(end).sum(), end)
    assert slope.item() == pytest.approx(3.0 * math.cos(3.0), rel=1e-12)


@pytest.mark.parametrize("knots", [(), (0.5, 0.75, 0.9, 1.0, 1.25, 1.5)])
@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.RK4(dt=0.01)])
def test_gradients_by_the_span_do_not_depend_on_knots_at_which_nothing_happens(knots, alg):
    field = ct.Field(lambda t, h, u: u - h)
    start = torch.tensor([0.5, 0.2], dtype=torch.float64, requires_grad=True)
    stop = torch.tensor([1.5, 1.0], dtype=torch.float64, requires_grad=True)
    control = FunctionControl(lambda t: torch.sin(3.0 * t).reshape(1), knots=knots)
    h0 = torch.full((2, 1), 0.3, dtype=torch.float64)
    options = {"rtol": 1e-10, "atol": 1e-10} if alg.adaptive else {}
    sol = ct.solve(ct.ODEProblem(field, h0, (start, stop), control), alg, **options)
    by_start, by_stop = torch.autograd.grad(sol.hs[-1].sum(), (start, stop))
    last = sol.hs[-1, :, 0].detach()
    expected = torch.sin(3.0 * stop) - last
    assert torch.allclose(by_stop, expected, rtol=1e-6)
    # Starting later is starting elsewhere: minus the slope at the start, carried over by exp(-(t1 - t0)).
    expected = -torch.exp(start - stop) * (torch.sin(3.0 * start) - 0.3)
    assert torch.allclose(by_start, expected, rtol=1e-6)
