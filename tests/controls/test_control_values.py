"""Values against numpy and scipy: every class, every layout of batch and time, with and without gaps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctgate.controls import CubicHermite, LinearInterpolation, ZeroOrderHold

SAMPLED = [ZeroOrderHold, LinearInterpolation, CubicHermite]
SMOOTH = [LinearInterpolation, CubicHermite]
each = pytest.mark.parametrize("make", SAMPLED)
close = {"rtol": 1e-13, "atol": 1e-13}

# (batch, time, channel), with sizes that can be confused for one another
LAYOUTS = [((), 6, 2), ((1,), 6, 1), ((3,), 3, 3), ((6,), 6, 2), ((2, 6), 6, 6), ((4, 2), 5, 3)]


@each
@pytest.mark.parametrize("gaps", [False, True], ids=["complete", "gaps"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize(("batch", "count", "channels"), LAYOUTS)
def test_values_agree_with_the_reference(
    make, batch, count, channels, per_sample, gaps, irregular, normal, with_gaps, reference, rng
):
    ts = irregular(count, *batch) if per_sample else irregular(count)
    xs = normal(count, *batch, channels)
    if gaps:
        xs = with_gaps(xs)
    control = make(ts, xs)
    assert (control.channels, control.batch_shape) == (channels, torch.Size(batch))
    assert control.shared == (ts.ndim == 1)
    low, high = float(ts[0].max()), float(ts[-1].min())
    if low >= high:
        pytest.fail("the data of this test must overlap")
    times = low + (high - low) * torch.rand(20, generator=rng, dtype=torch.float64)
    expected = reference(make.__name__, ts, xs, times)
    torch.testing.assert_close(control(times), expected, **close)
    torch.testing.assert_close(control(times.tolist()), expected, **close)
    torch.testing.assert_close(control(times.numpy()), expected, **close)
    one_by_one = torch.stack([control(t) for t in times.tolist()])
    torch.testing.assert_close(one_by_one, expected, **close)
    torch.testing.assert_close(torch.stack([control(t) for t in times]), expected, **close)


@each
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
def test_limits_at_the_knots(make, side, per_sample, normal, with_gaps, reference):
    shared = torch.tensor([0.0, 0.25, 1.0, 1.5, 3.0], dtype=torch.float64)
    ts = torch.stack([shared, shared], 1) if per_sample else shared
    xs = with_gaps(normal(5, 2, 3))
    control = make(ts, xs)
    expected = reference(make.__name__, ts, xs, shared, side)
    torch.testing.assert_close(control(shared, side), expected, **close)
    torch.testing.assert_close(torch.stack([control(t, side) for t in shared.tolist()]), expected, **close)
    torch.testing.assert_close(torch.stack([control(t, side) for t in shared]), expected, **close)


@each
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
def test_held_outside_the_data_and_at_missing_ends(make, per_sample, normal, with_gaps, reference, irregular):
    ts = irregular(8, 3) if per_sample else irregular(8)
    xs = with_gaps(normal(8, 3, 2), ends=True)
    xs[0, 0, 0] = xs[1, 0, 0] = xs[-1, 1, 1] = torch.nan
    control = make(ts, xs, extrapolate="hold")
    assert control.support == (-np.inf, np.inf)
    times = torch.linspace(-3.0, 12.0, 61, dtype=torch.float64)
    expected = reference(make.__name__, ts, xs, times)
    torch.testing.assert_close(control(times), expected, **close)
    torch.testing.assert_close(torch.stack([control(t) for t in times.tolist()]), expected, **close)


@pytest.mark.parametrize("make", SMOOTH)
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
def test_one_value_is_a_constant_when_held(make, per_sample, normal):
    xs = normal(1, 3, 2)
    control = make(torch.full((1, 3), 0.5) if per_sample else [0.5], xs, extrapolate="hold")
    times = torch.tensor([-4.0, 0.5, 2.0])
    for side in ("left", "right"):
        assert torch.equal(control(times, side), xs.expand(3, 3, 2))
        assert all(torch.equal(control(t, side), xs[0]) for t in times.tolist())
    if not per_sample:
        assert control.knots == (0.5,)
        assert torch.equal(control.on(-1.0, 0.5)(0.0), xs[0])
        assert torch.equal(control.on(0.5, 3.0)(1.0), xs[0])


def test_one_held_value_between_two_edges(normal):
    xs = normal(1, 4, 2)
    control = ZeroOrderHold([0.0, 2.0], xs)
    assert control.support == (0.0, 2.0)
    assert torch.equal(control(2.0), xs[0])
    assert torch.equal(control(torch.tensor([0.0, 1.0, 2.0])), xs.expand(3, 4, 2))


def test_left_edges_repeat_the_last_length(normal):
    xs = normal(3, 2)
    control = ZeroOrderHold([0.0, 1.0, 1.5], xs)
    assert control.knots == (0.0, 1.0, 1.5, 2.0)
    assert control.support == (0.0, 2.0)
    assert torch.equal(control(1.9), xs[2])
    per_sample = ZeroOrderHold([[0.0, 0.0], [1.0, 2.0]], normal(2, 2, 1))
    assert per_sample.support == (0.0, 2.0)


def test_right_edges_may_be_given_per_sample(normal, reference, irregular):
    ts, xs = irregular(5, 3), normal(4, 3, 2)
    low, high = float(ts[0].max()), float(ts[-1].min())
    times = torch.linspace(low, high, 13, dtype=torch.float64)
    torch.testing.assert_close(
        ZeroOrderHold(ts, xs)(times), reference("ZeroOrderHold", ts, xs, times), **close
    )


@each
def test_batch_first(make, normal, irregular, reference):
    xs = normal(4, 5, 2)
    for ts in (irregular(5), irregular(5, 4)):
        control = make(ts if ts.ndim == 1 else ts.T, xs, batch_first=True)
        low, high = float(ts[0].max()), float(ts[-1].min())
        times = torch.linspace(low, high, 9, dtype=torch.float64)
        expected = reference(make.__name__, ts, xs.movedim(1, 0), times)
        torch.testing.assert_close(control(times), expected, **close)


@each
@pytest.mark.parametrize("gaps", [False, True], ids=["complete", "gaps"])
def test_values_keep_their_dtype_and_times_their_precision(make, gaps, normal, with_gaps, reference):
    # At t = 1e6 float32 resolves 0.06: float32 times would land on the wrong piece.
    ts = 1e6 + torch.arange(6, dtype=torch.float64) * 0.01
    xs = normal(6, 2, 3).float()
    if gaps:
        xs = with_gaps(xs)
    control = make(ts, xs)
    times = ts[:-1] + 0.0041
    expected = reference(make.__name__, ts, xs, times)
    for values in (
        control(times),
        torch.stack([control(t) for t in times]),
        torch.stack([control(t) for t in times.tolist()]),
        torch.stack(
            [control.on(a, b)(a + 0.0041) for a, b in zip(ts.tolist(), ts.tolist()[1:], strict=False)]
        ),
        torch.stack(
            [control.on(a, b)(t) for a, b, t in zip(ts.tolist(), ts.tolist()[1:], times, strict=False)]
        ),
    ):
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize(
    "ts",
    [
        [0, 1, 3],
        [0.0, 1.0, 3.0],
        range(0, 6, 2),
        np.array([0.0, 1.0, 3.0], dtype=np.float32),
        np.array([0, 1, 3]),
        torch.tensor([0, 1, 3]),
        torch.tensor([0.0, 1.0, 3.0], dtype=torch.float16),
    ],
    ids=["ints", "floats", "range", "float32 array", "int array", "int tensor", "half tensor"],
)
def test_times_of_every_kind_become_float64(make, ts, normal):
    control = make(ts, normal(3, 2))
    assert control.ts.dtype == torch.float64
    assert control.knots[:3] == tuple(float(t) for t in ts)
    assert all(type(knot) is float for knot in control.knots)
    assert control(0).shape == control(np.float32(0.0)).shape == (2,)


@each
def test_resolution_is_that_of_the_times_as_they_came(make, normal):
    xs = normal(3, 1)
    times = torch.tensor([0.0, 1.0, 2.0])
    assert make([0.0, 1.0, 2.0], xs).resolution == np.finfo(np.float64).eps
    assert make([0, 1, 2], xs).resolution == np.finfo(np.float64).eps
    assert make(times.double(), xs).resolution == np.finfo(np.float64).eps
    assert make(times.long(), xs).resolution == np.finfo(np.float64).eps
    assert make(times.float(), xs).resolution == np.finfo(np.float32).eps
    assert make(times.numpy(), xs).resolution == np.finfo(np.float32).eps
    assert make(times.to(torch.bfloat16), xs).resolution == 2.0**-7


@each
def test_arrays_are_values_too_and_later_edits_of_times_do_not_count(make):
    ts, xs = np.array([0.0, 1.0, 2.0]), np.array([[1.0], [2.0], [4.0]])
    control = make(ts, xs)
    ts += 100.0
    assert control(1.0).dtype == torch.float64
    assert control(1.0).item() == 2.0


@each
def test_empty_batch_and_empty_vector(make, normal):
    control = make([0.0, 1.0, 2.0], normal(3, 0, 2))
    assert control(0.5).shape == (0, 2)
    assert control(torch.tensor([0.5, 1.5])).shape == (2, 0, 2)
    per_sample = make(torch.zeros(3, 0), normal(3, 0, 2))
    assert per_sample(torch.tensor([0.5, 1.5])).shape == (2, 0, 2)
    assert per_sample.support == (-np.inf, np.inf)
    assert make([0.0, 1.0, 2.0], normal(3, 5, 2))(torch.empty(0)).shape == (0, 5, 2)


def test_continuity_is_what_it_says(normal):
    xs = normal(4, 2)
    knots = torch.tensor([1.0, 2.0])
    for make in SAMPLED:
        control = make([0.0, 1.0, 2.0, 3.0], xs)
        jump = (control(knots, "right") - control(knots, "left")).abs().min()
        assert control.continuous == bool(jump < 1e-12)


def test_the_slope_of_the_cubic_is_continuous_and_a_backward_difference(normal, irregular):
    ts, xs = irregular(6), normal(6, 2)
    control = CubicHermite(ts, xs)
    knots = ts[1:-1].clone().requires_grad_()
    slopes = {
        side: torch.stack(
            [torch.autograd.grad(control(knots, side)[:, c].sum(), knots)[0] for c in range(2)], -1
        )
        for side in ("left", "right")
    }
    expected = (xs[1:-1] - xs[:-2]) / (ts[1:-1] - ts[:-2])[:, None]
    torch.testing.assert_close(slopes["left"], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slopes["right"], expected, rtol=1e-12, atol=1e-12)


def test_a_line_with_gaps_is_read_as_a_line(irregular):
    ts = irregular(9)
    xs = (2.0 - 3.0 * ts)[:, None].clone()
    xs[[1, 2, 5]] = torch.nan
    times = torch.linspace(float(ts[0]), float(ts[-1]), 50, dtype=torch.float64)
    for make in SMOOTH:
        torch.testing.assert_close(make(ts, xs)(times), (2.0 - 3.0 * times)[:, None], **close)


@st.composite
def series(draw):
    """Times on a grid of 1/8, values with gaps, and times to ask for on a grid of 1/16: all exact."""
    count = draw(st.integers(2, 8))
    steps = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    ts = np.cumsum(steps) / 8.0 + draw(st.integers(-100, 100)) / 8.0
    value = st.one_of(st.just(np.nan), st.floats(-1e3, 1e3))
    xs = np.array(draw(st.lists(value, min_size=count, max_size=count)))
    xs[draw(st.integers(0, count - 1))] = draw(st.floats(-1e3, 1e3))
    offsets = draw(st.lists(st.integers(-20, 16 * 20), min_size=1, max_size=8))
    times = ts[0] + np.array(offsets) / 16.0
    return *map(torch.from_numpy, (ts, xs[:, None], times)), draw(st.sampled_from(["left", "right"]))


@pytest.mark.parametrize("make", SAMPLED)
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_series_agrees_with_the_reference(make, reference, data):
    ts, xs, times, side = data.draw(series())
    control = make(ts, xs, extrapolate="hold")
    expected = reference(make.__name__, ts, xs, times, side)
    torch.testing.assert_close(control(times, side), expected, rtol=1e-12, atol=1e-9)
    one_by_one = torch.stack([control(t, side) for t in times.tolist()])
    torch.testing.assert_close(one_by_one, expected, rtol=1e-12, atol=1e-9)


@each
def test_a_vector_of_a_hundred_thousand_times_is_one_pass(make, normal, rng):
    # Whoever looks each time up in turn, or walks back over the data for each, takes minutes here.
    count = 100_000
    ts = torch.arange(count, dtype=torch.float64) * 0.1
    xs = normal(count, 2).requires_grad_()
    times = torch.rand(count, generator=rng, dtype=torch.float64) * ts[-1]
    values = make(ts, xs)(times)
    nodes, stack = set(), [values.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack.extend(following for following, _ in node.next_functions)
    assert len(nodes) < 20
    values.sum().backward()
    assert xs.grad is not None
    assert abs(xs.grad.sum().item() - 2 * count) < 1e-6
