"""Every refusal says what was given, where, and what it must be."""

import numpy as np
import pytest
import torch

from ctgate.controls import CubicHermite, LinearInterpolation, ZeroOrderHold

SAMPLED = [ZeroOrderHold, LinearInterpolation, CubicHermite]
SMOOTH = [LinearInterpolation, CubicHermite]
each = pytest.mark.parametrize("make", SAMPLED)
smooth = pytest.mark.parametrize("make", SMOOTH)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


@each
def test_times_that_do_not_increase(make):
    with pytest.raises(
        ValueError, match=r"ts\[2\] = 1\.0 does not exceed ts\[1\] = 1\.0; times must be strictly"
    ):
        make([0.0, 1.0, 1.0, 0.5], zeros(4, 1))
    ts = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 1.5]])
    with pytest.raises(ValueError, match=r"ts\[2, 1\] = 1\.5 does not exceed ts\[1, 1\] = 2\.0"):
        make(ts, zeros(3, 2, 1))
    with pytest.raises(ValueError, match=r"ts\[1, 2\] = 1\.5 does not exceed ts\[1, 1\] = 2\.0"):
        make(ts.T, zeros(2, 3, 1), batch_first=True)


@each
def test_times_that_low_precision_made_equal(make):
    ts = torch.tensor([1000.0, 1000.1, 1000.2], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"ts\[1\] = 1000\.0 .* low precision .* give float64"):
        make(ts, zeros(3, 1))


@each
def test_times_that_are_not_finite(make):
    with pytest.raises(ValueError, match=r"ts\[1\] is nan; times must be finite"):
        make([0.0, float("nan"), 2.0], zeros(3, 1))
    with pytest.raises(ValueError, match=r"ts\[2\] is inf; times must be finite"):
        make([0.0, 1.0, float("inf")], zeros(3, 1))


@each
def test_times_that_are_no_numbers(make):
    with pytest.raises(TypeError, match=r"ts has dtype torch\.bool; times must be real numbers"):
        make(torch.tensor([False, True]), zeros(2, 1))
    with pytest.raises(TypeError, match=r"ts has dtype datetime64.*in the units of tau"):
        make(np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[D]"), zeros(2, 1))
    with pytest.raises(ValueError, match="ts is not rectangular; its rows must have one length"):
        make([[0.0, 1.0], [2.0]], zeros(2, 2, 1))


@each
def test_shared_times_that_require_grad(make):
    with pytest.raises(
        ValueError, match=r"ts requires grad; shared times never carry gradients: pass ts\.detach"
    ):
        make(torch.tensor([0.0, 1.0], requires_grad=True), zeros(2, 1))


@each
def test_shapes_that_do_not_fit(make):
    with pytest.raises(
        ValueError, match=r"xs has shape \(3,\); it must be \(time, \*batch, channel\).*xs\[:, None\]"
    ):
        make([0.0, 1.0, 2.0], zeros(3))
    with pytest.raises(ValueError, match=r"ts has shape \(\) and xs.*ts must be \(time,\)"):
        make(torch.tensor(0.0), zeros(3, 1))
    message = r"ts has shape \(3, 2\) and xs.*\(3, 4, 1\); .*per sample \(time, \*batch\) with batch \(4,\)"
    with pytest.raises(ValueError, match=message):
        make([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]], zeros(3, 4, 1))
    with pytest.raises(ValueError, match=r"per sample \(\*batch, time\) with batch \(4,\)"):
        make([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]], zeros(4, 3, 1), batch_first=True)
    with pytest.raises(ValueError, match=r"ts has shape \(0,\) and xs \(0, 1\); there must be a time"):
        make([], zeros(0, 1))


@each
def test_the_batch_is_never_taken_for_time(make):
    # 5 samples of 3 steps: 3 and 5 are told apart by their place, and no other reading is tried.
    message = r"ts has 3 times and xs, read as \(time, \*batch, channel\), 5; .*batch_first=True takes"
    with pytest.raises(ValueError, match=message):
        make([0.0, 1.0, 2.0], zeros(5, 3, 2))
    assert make([0.0, 1.0, 2.0], zeros(5, 3, 2), batch_first=True).batch_shape == (5,)


def test_numbers_of_times_and_values():
    with pytest.raises(
        ValueError, match=r"4 times and xs.* 2; there must be 2 times \(left edges\) or 3 \(edges\)"
    ):
        ZeroOrderHold([0.0, 1.0, 2.0, 3.0], zeros(2, 1))
    with pytest.raises(ValueError, match=r"one value needs two edges"):
        ZeroOrderHold([0.0], zeros(1, 1))
    for make in SMOOTH:
        with pytest.raises(
            ValueError, match=r"3 times and xs.* 2; there must be 2 times; batch_first=True takes"
        ):
            make([0.0, 1.0, 2.0], zeros(2, 1))
        with pytest.raises(
            ValueError, match=r'nothing to interpolate; give at least two, or .*extrapolate="hold"'
        ):
            make([0.0], zeros(1, 1))


@each
def test_values_that_are_no_floats(make):
    with pytest.raises(TypeError, match=r"xs has dtype torch\.int64; it must be floating point"):
        make([0.0, 1.0], torch.zeros(2, 1, dtype=torch.int64))


@each
def test_infinite_values(make):
    xs = zeros(3, 2, 4)
    xs[1, 0, 3] = -torch.inf
    with pytest.raises(
        ValueError, match=r"xs\[1, 0, 3\] is -inf; values must be finite, or NaN where missing"
    ):
        make([0.0, 1.0, 2.0], xs)
    with pytest.raises(ValueError, match=r"xs\[0, 1, 3\] is -inf"):
        make([0.0, 1.0, 2.0], xs.movedim(0, 1), batch_first=True)


@each
def test_values_that_cannot_be_read(make):
    with pytest.raises(RuntimeError, match="meta"):
        make([0.0, 1.0], torch.empty(2, 1, device="meta"))


@each
def test_missing_at_the_start(make):
    xs = zeros(4, 2, 3)
    xs[:2, 1, 2] = torch.nan
    message = r'channel 2 of xs, sample \(1,\), is NaN before time index 2 \(t = 2\.5\).*extrapolate="hold"'
    with pytest.raises(ValueError, match=message):
        make([0.0, 1.0, 2.5, 3.0], xs)
    with pytest.raises(ValueError, match=r"channel 0 of xs is NaN before time index 1 \(t = 1\.0\)"):
        make([0.0, 1.0], torch.tensor([[torch.nan], [1.0]]))
    own = torch.tensor([[0.0, 0.5], [1.0, 1.5], [2.0, 2.75], [3.0, 3.5]])
    with pytest.raises(ValueError, match=r"sample \(1,\), is NaN before time index 2 \(t = 2\.75\)"):
        make(own, xs)


@smooth
def test_missing_at_the_end(make):
    xs = zeros(4, 2, 3)
    xs[2:, 0, 1] = torch.nan
    message = r'channel 1 of xs, sample \(0,\), is NaN after time index 1 \(t = 1\.0\).*extrapolate="hold"'
    with pytest.raises(ValueError, match=message):
        make([0.0, 1.0, 2.5, 3.0], xs)
    ZeroOrderHold([0.0, 1.0, 2.5, 3.0], xs)


@each
@pytest.mark.parametrize("extrapolate", [None, "hold"])
def test_nothing_observed(make, extrapolate):
    xs = zeros(3, 2)
    xs[:, 1] = torch.nan
    with pytest.raises(ValueError, match="channel 1 of xs has no value at all, every one is NaN"):
        make([0.0, 1.0, 2.0], xs, extrapolate=extrapolate)


@each
def test_outside_the_support(make):
    control = make([0.0, 1.0, 2.0], zeros(3, 1))
    low, high = control.support
    message = rf't is 3\.5 and {make.__name__} is known on \[{low}, {high}\]; .*extrapolate="hold"'
    for t in (3.5, torch.tensor(3.5), [1.0, 3.5], torch.tensor([1.0, 3.5])):
        with pytest.raises(ValueError, match=message):
            control(t)
    with pytest.raises(ValueError, match=r"t is -0\.5 and"):
        control.on(-0.5, 0.5)
    with pytest.raises(ValueError, match=r"t is 4\.5 and"):
        control.on(high, 4.5)


@each
def test_outside_the_support_of_one_sample(make):
    ts = torch.tensor([[0.0, 0.5], [1.0, 1.5], [4.0, 4.5]])
    control = make(ts, zeros(3, 2, 1))
    assert control.support[0] == 0.5
    with pytest.raises(
        ValueError, match=r"t is 0\.25 .*common to all samples; sample \(1,\) is not known there"
    ):
        control(0.25)


@each
@pytest.mark.parametrize("extrapolate", [None, "hold"])
def test_a_time_that_is_nan(make, extrapolate):
    control = make([0.0, 1.0, 2.0], zeros(3, 1), extrapolate=extrapolate)
    for t in (float("nan"), torch.tensor(torch.nan), [0.0, float("nan")]):
        with pytest.raises(ValueError, match="t is nan"):
            control(t)


@each
def test_arguments_of_a_call(make):
    control = make([0.0, 1.0, 2.0], zeros(3, 1))
    with pytest.raises(ValueError, match='side is \'middle\'; it must be "left" or "right"'):
        control(0.5, "middle")
    with pytest.raises(TypeError, match="t has dtype <U1; times must be real numbers"):
        control("a")
    with pytest.raises(ValueError, match="extrapolate is 'linear'; it must be None or \"hold\""):
        make([0.0, 1.0, 2.0], zeros(3, 1), extrapolate="linear")


@each
def test_intervals_that_are_none(make):
    control = make([0.0, 1.0, 2.0], zeros(3, 1))
    with pytest.raises(ValueError, match=rf"{make.__name__}\.on\(1\.0, 1\.0\): start must be before stop"):
        control.on(1.0, 1.0)
    with pytest.raises(ValueError, match=r"on\(0\.5, 1\.5\): the knot 1\.0 lies inside; cut it at \.knots"):
        control.on(0.5, 1.5)
    with pytest.raises(ValueError, match=r"the knot [23]\.0 lies inside"):
        make([0.0, 1.0, 2.0], zeros(3, 1), extrapolate="hold").on(1.5, 9.0)
    with pytest.raises(ValueError, match=r"the knot 0\.0 lies inside"):
        make([0.0, 1.0, 2.0], zeros(3, 1), extrapolate="hold").on(-9.0, 0.5)


@each
def test_per_sample_times_have_no_common_knots(make):
    control = make(torch.tensor([[0.0, 0.5], [1.0, 1.5]]), zeros(2, 2, 1))
    message = (
        r"\.{}: its times are per sample \(time, \*batch\), and {} needs times shared.*union of the grids"
    )
    with pytest.raises(ValueError, match=message.format("knots", "knots")):
        _ = control.knots
    with pytest.raises(ValueError, match=message.format("on", "on")):
        control.on(0.5, 1.0)
