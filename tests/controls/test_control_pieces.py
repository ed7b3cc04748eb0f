"""What a solver asks of a control: knots, the piece on an interval, one-sided limits, causality."""

import copy
import io
import itertools

import pytest
import torch

from ctgate.controls import CubicHermite, LinearInterpolation, ZeroOrderHold

SAMPLED = [ZeroOrderHold, LinearInterpolation, CubicHermite]
SMOOTH = [LinearInterpolation, CubicHermite]
each = pytest.mark.parametrize("make", SAMPLED)
smooth = pytest.mark.parametrize("make", SMOOTH)
gaps = pytest.mark.parametrize("gaps", [False, True], ids=["complete", "gaps"])


@pytest.fixture
def data(irregular, normal, with_gaps):
    def series(gaps, batch=(3,)):
        xs = normal(9, *batch, 2)
        return irregular(9), with_gaps(xs) if gaps else xs

    return series


def unbinds(value):
    """How many times the values were taken apart in the graph of ``value``."""
    nodes, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return sum("Unbind" in node.name() for node in nodes), sum("Select" in node.name() for node in nodes)


@each
def test_knots_are_the_times(make, data):
    ts, xs = data(False)
    assert make(ts, xs).knots[:9] == tuple(ts.tolist())
    assert len(make(ts, xs).knots) == (10 if make is ZeroOrderHold else 9)
    assert make(ts, xs).support == (make(ts, xs).knots[0], make(ts, xs).knots[-1])
    edges = ZeroOrderHold(ts, xs[:-1])
    assert edges.knots == tuple(ts.tolist())


@each
@gaps
@pytest.mark.parametrize(
    "kind", [float, lambda t: torch.tensor(t, dtype=torch.float64)], ids=["float", "tensor"]
)
def test_a_piece_is_the_control_inside_and_its_limits_at_the_ends(make, gaps, kind, data):
    control = make(*data(gaps))
    for start, stop in itertools.pairwise(control.knots):
        piece = control.on(start, stop)
        inside = torch.linspace(start, stop, 7, dtype=torch.float64)[1:-1]
        for t in inside.tolist():
            torch.testing.assert_close(piece(kind(t)), control(t), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(piece(kind(start)), control(start, "right"), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(piece(kind(stop)), control(stop, "left"), rtol=1e-14, atol=1e-14)
        part = control.on(0.75 * start + 0.25 * stop, 0.5 * (start + stop))
        torch.testing.assert_close(part(kind(stop)), control(stop, "left"), rtol=1e-14, atol=1e-14)


@smooth
@gaps
def test_observed_values_are_met_exactly(make, gaps, data):
    ts, xs = data(gaps)
    control = make(ts, xs)
    for k, (start, stop) in enumerate(itertools.pairwise(control.knots)):
        piece = control.on(start, stop)
        for value, row in ((piece(start), xs[k]), (piece(stop), xs[k + 1]), (control(start), xs[k])):
            seen = ~row.isnan()
            assert torch.equal(value[seen], row[seen])


@each
@gaps
def test_on_beyond_the_data_is_held(make, gaps, data):
    ts, xs = data(gaps)
    control = make(ts, xs, extrapolate="hold")
    before, after = control.knots[0], control.knots[-1]
    for t in (before - 5.0, before - 1.0, before):
        assert torch.equal(control.on(before - 5.0, before)(t), xs[0])
    for t in (after, after + 1.0, after + 5.0):
        assert torch.equal(control.on(after, after + 5.0)(t), xs[-1])


@each
@gaps
def test_rounding_of_a_time_cannot_select_the_neighbour(make, gaps, data):
    # Knots that float32 cannot hold: stage times computed in float32 fall on either side of them.
    _, xs = data(gaps)
    ts = torch.arange(9, dtype=torch.float64) * 0.1 + 1000.0
    control = make(ts, xs)
    crossed = 0
    for start, stop in itertools.pairwise(control.knots):
        piece = control.on(start, stop)
        for t in (start, stop):
            rounded = torch.tensor(t, dtype=torch.float32)
            crossed += not start <= float(rounded) <= stop
            error = abs(float(rounded) - t)
            limit = control(t, "right" if t == start else "left")
            for value in (piece(rounded), piece(rounded.double()), piece(float(rounded))):
                # Held values do not move at all; the others move with their slope, the knots being 0.1 apart.
                bound = 0.0 if make is ZeroOrderHold else 50.0 * error
                assert (value - limit).abs().max() <= bound
    assert crossed > 0


@each
def test_a_time_within_rounding_of_a_knot_is_that_knot(make, data):
    _, xs = data(False)
    ts = torch.arange(9, dtype=torch.float64) * 0.1
    control = make(ts, xs)
    assert control.knots[3] != 0.3
    for t in (0.3, control.knots[3], 0.1 + 0.2):
        for ask in (t, torch.tensor(t, dtype=torch.float64), [t]):
            for side, row in (("right", 3), ("left", 2 if make is ZeroOrderHold else 3)):
                torch.testing.assert_close(control(ask, side).reshape(3, 2), xs[row], rtol=1e-13, atol=1e-13)


@each
def test_times_given_in_float32_have_the_rounding_of_float32(make, data):
    _, xs = data(False)
    ts = torch.arange(9, dtype=torch.float32) * 0.1
    control = make(ts, xs)
    assert control.knots[3] > 0.3
    torch.testing.assert_close(control(0.3), xs[3], rtol=1e-5, atol=1e-5)
    assert control.on(0.3, 0.4)(0.35).shape == (3, 2)
    assert control(0.8).shape == (3, 2)


@each
def test_sums_of_steps_do_not_leave_the_support(make, data):
    _, xs = data(False)
    control = make(torch.arange(9, dtype=torch.float64) * 0.1, xs)
    stop = control.knots[-1] * (1.0 + 4e-16)
    assert stop > control.knots[-1]
    torch.testing.assert_close(control(stop), control(control.knots[-1]), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(control([stop])[0], control(control.knots[-1]), rtol=1e-14, atol=1e-14)
    assert control.on(control.knots[-2], stop)(stop).shape == (3, 2)


@each
@gaps
def test_values_are_taken_apart_once(make, gaps, data):
    ts, xs = data(gaps)
    control = make(ts, xs.requires_grad_())
    pieces = [control.on(a, b) for a, b in itertools.pairwise(control.knots)]
    total = sum(piece(0.0) for piece in pieces).sum() + control(float(ts[4])).sum()
    kinds = {ZeroOrderHold: 1, LinearInterpolation: 2, CubicHermite: 3}[make] if gaps else 1
    assert unbinds(total) == (kinds, 0)


@each
@gaps
def test_coefficients_carry_the_whole_gradient_of_a_piece(make, gaps, data):
    ts, xs = data(gaps)
    control = make(ts, xs.requires_grad_())
    for start, stop in itertools.pairwise(control.knots):
        piece = control.on(start, stop)
        value = piece(0.3 * start + 0.7 * stop).square().sum()
        (whole,) = torch.autograd.grad(value, xs, retain_graph=True)
        parts = torch.autograd.grad(value, piece.coefficients)
        (collected,) = torch.autograd.grad(piece.coefficients, xs, parts)
        torch.testing.assert_close(collected, whole, rtol=1e-14, atol=1e-14)
    held = make(ts, xs, extrapolate="hold").on(control.knots[-1], 100.0)
    assert torch.equal(held(50.0), held.coefficients[0])


@each
@gaps
def test_pieces_can_be_made_first_without_gradients(make, gaps, data):
    ts, xs = data(gaps)
    xs.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        control = make(ts, xs)
        start, stop = control.knots[3:5]
        with mode():
            assert not control.on(start, stop)(0.5 * (start + stop)).requires_grad
            assert not control(start - 0.01).requires_grad
        value = control.on(start, stop)(0.5 * (start + stop)).square().sum()
        (found,) = torch.autograd.grad(value, xs)
        (expected,) = torch.autograd.grad(make(ts, xs)([0.5 * (start + stop)]).square().sum(), xs)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@each
@gaps
def test_several_solves_may_each_be_differentiated(make, gaps, data):
    ts, xs = data(gaps)
    control = make(ts, xs.requires_grad_())
    start, stop = control.knots[2:4]
    piece = control.on(start, stop)
    losses = [piece(start).square().sum(), piece(stop).square().sum(), control(start).square().sum()]
    for loss in losses:
        loss.backward()
    control.on(start, stop)(start).square().sum().backward()
    (expected,) = torch.autograd.grad(make(ts, xs)([start, stop, start, start]).square().sum(), xs)
    # The value from the left at `stop` belongs to the piece.
    if make is ZeroOrderHold:
        (expected,) = torch.autograd.grad(4.0 * make(ts, xs)([start]).square().sum(), xs)
    torch.testing.assert_close(xs.grad, expected, rtol=1e-12, atol=1e-12)


@each
@gaps
def test_values_changed_in_place_are_seen(make, gaps, data):
    ts, xs = data(gaps)
    control = make(ts, xs.requires_grad_())
    start, stop = control.knots[2:4]
    middle = 0.5 * (start + stop)
    old = control.on(start, stop)(middle).detach().clone()
    with torch.no_grad():
        xs.mul_(2.0)
    new = control.on(start, stop)(middle)
    torch.testing.assert_close(new, 2.0 * old, rtol=1e-14, atol=1e-14)
    assert unbinds(new) == unbinds(make(ts, xs).on(start, stop)(middle))
    (gradient,) = torch.autograd.grad(new.sum(), xs)
    torch.testing.assert_close(gradient.sum().item(), 6.0, rtol=1e-12, atol=1e-12)


@each
@gaps
def test_a_value_belongs_to_the_caller(make, gaps, data):
    ts, xs = data(gaps)
    control = make(ts, xs, extrapolate="hold")
    start, stop = control.knots[2:4]
    for read in (
        control.on(start, stop),
        control.on(-9.0, control.knots[0]),
        control,
        lambda t: control([t]),
    ):
        before = read(start).clone()
        read(start).add_(1.0)
        assert torch.equal(read(start), before)


@each
def test_values_made_in_inference_mode(make, data):
    ts, xs = data(True)
    with torch.inference_mode():
        values = xs.clone()
        control = make(ts, values)
        start, stop = control.knots[2:4]
        inside = control.on(start, stop)(start)
    torch.testing.assert_close(control.on(start, stop)(start), inside)


@each
@gaps
def test_a_used_control_can_be_copied_and_stored(make, gaps, data):
    ts, xs = data(gaps)
    control = make(ts, xs.requires_grad_())
    start, stop = control.knots[2:4]
    value = control.on(start, stop)(start)
    twin = copy.deepcopy(control)
    assert torch.equal(twin.on(start, stop)(start), value)
    twin.on(start, stop)(start).sum().backward()
    assert xs.grad is None
    assert twin.xs.grad is not None
    file = io.BytesIO()
    torch.save(control, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).on(start, stop)(start), value)


def changed(make, ts, xs, row, times):
    """At which times u changes when row ``row`` of the values does."""
    other = xs.clone()
    other[row] += 1.0
    return (make(ts, xs)(times) != make(ts, other)(times)).flatten(1).any(1)


@pytest.mark.parametrize("row", [3, 4, 8])
def test_zero_order_hold_reads_nothing_ahead(row, data):
    ts, xs = data(False)
    edges = ZeroOrderHold(ts, xs).knots
    times = torch.linspace(edges[0], edges[-1], 400, dtype=torch.float64)
    expected = (times >= edges[row]) & (times < edges[row + 1])
    expected[-1] = row == 8
    assert torch.equal(changed(ZeroOrderHold, ts, xs, row, times), expected)


@pytest.mark.parametrize(("make", "pieces"), [(LinearInterpolation, 1), (CubicHermite, 2)])
@pytest.mark.parametrize("row", [3, 6])
def test_interpolation_reads_one_observation_ahead(make, pieces, row, data):
    ts, xs = data(False)
    times = torch.linspace(float(ts[0]), float(ts[-1]), 400, dtype=torch.float64)
    expected = (times > ts[row - 1]) & (times < ts[row + pieces])
    assert torch.equal(changed(make, ts, xs, row, times), expected)
    # Nor does it change the value or the slope at the knot before, seen from the past.
    for quantity in range(2):
        t = ts[row - 1].clone().requires_grad_()
        values = make(ts, xs.requires_grad_())(t, "left")
        if quantity:
            (values,) = torch.autograd.grad(values.sum(), t, create_graph=True)
        (gradient,) = torch.autograd.grad(values.sum(), xs)
        assert gradient[row - 1].abs().min() > 0.0
        assert torch.equal(gradient[row:], torch.zeros_like(gradient[row:]))


def test_the_cubic_leaves_a_knot_with_the_slope_of_the_past(data):
    ts, xs = data(False)
    t = ts[4].clone().requires_grad_()
    (slope,) = torch.autograd.grad(
        CubicHermite(ts, xs.requires_grad_())(t, "right").sum(), t, create_graph=True
    )
    (gradient,) = torch.autograd.grad(slope, xs)
    assert gradient[5:].abs().max() < 1e-13 * gradient[4].abs().max()


@each
def test_across_a_gap_the_next_observation_is_read_only_from_the_last_one_on(make, data):
    ts, xs = data(False)
    xs[[4, 5], 1, 0] = torch.nan
    times = torch.linspace(float(ts[0]), float(ts[-1]), 400, dtype=torch.float64)
    other = xs.clone()
    other[6, 1, 0] += 1.0
    moved = make(ts, xs)(times) != make(ts, other)(times)
    assert not moved[:, [0, 2]].any()
    moved = moved[:, 1, 0]
    first = ts[6] if make is ZeroOrderHold else ts[3]
    assert not moved[times <= first - 1e-9].any()
    assert moved[(times > first) & (times < ts[7])].all()
