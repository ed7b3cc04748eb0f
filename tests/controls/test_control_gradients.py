"""Gradients in the values, in per-sample times and in t, also across gaps and under torch.func."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from ctgate.controls import CubicHermite, LinearInterpolation, ZeroOrderHold
from ctgate.controls.missing import Take

SAMPLED = [ZeroOrderHold, LinearInterpolation, CubicHermite]
SMOOTH = [LinearInterpolation, CubicHermite]
each = pytest.mark.parametrize("make", SAMPLED)
smooth = pytest.mark.parametrize("make", SMOOTH)
layout = pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
gaps = pytest.mark.parametrize("gaps", [False, True], ids=["complete", "gaps"])


@pytest.fixture
def data(irregular, normal, with_gaps):
    def series(per_sample, gaps, ends=False):
        ts = irregular(6, 2) if per_sample else irregular(6)
        xs = normal(6, 2, 2)
        xs = with_gaps(xs, ends) if gaps else xs
        low, high = float(ts[0].max()), float(ts[-1].min())
        return ts, xs, torch.linspace(low, high, 9, dtype=torch.float64)[1:-1]

    return series


def filled(xs, mask, values):
    """``xs`` with its observed entries taken from ``values``: gradcheck must not touch the missing ones."""
    places = (~mask).flatten().nonzero()[:, 0]
    return torch.full_like(xs, torch.nan).flatten().scatter(0, places, values).reshape(xs.shape)


@each
@layout
@gaps
def test_gradients_in_the_values(make, per_sample, gaps, data):
    ts, xs, times = data(per_sample, gaps)
    mask = xs.isnan()
    seen = xs[~mask].clone().requires_grad_()

    def vector(values):
        return make(ts, filled(xs, mask, values))(times)

    assert gradcheck(vector, seen)
    assert gradgradcheck(lambda values: vector(values).square(), seen, fast_mode=True)

    def piecewise(values):
        control = make(ts, filled(xs, mask, values))
        pieces = [control.on(a, b) for a, b in itertools.pairwise(control.knots)]
        return torch.stack(
            [piece(t) for piece, t in zip(pieces, itertools.cycle([0.3, times[2]]), strict=False)]
        )

    if not per_sample:
        assert gradcheck(piecewise, seen)
        assert gradgradcheck(lambda values: piecewise(values).square(), seen, fast_mode=True)


@each
@layout
@pytest.mark.parametrize("extrapolate", [None, "hold"])
def test_missing_entries_get_exactly_zero(make, per_sample, extrapolate, data):
    ts, xs, times = data(per_sample, True, ends=extrapolate == "hold")
    if extrapolate == "hold":
        times = torch.cat([ts[0].min().reshape(1) - 1.0, times, ts[-1].max().reshape(1) + 1.0])
    mask = xs.isnan()
    leaf = xs.clone().requires_grad_()
    control = make(ts, leaf, extrapolate=extrapolate)
    values = [control(times)]
    if not per_sample:
        values += [
            torch.stack([control.on(a, b)(0.5 * (a + b)) for a, b in itertools.pairwise(control.knots)])
        ]
    for value in values:
        (gradient,) = torch.autograd.grad(value.square().sum(), leaf)
        assert gradient.isfinite().all()
        assert torch.equal(gradient[mask], torch.zeros_like(gradient[mask]))
        assert gradient[~mask].abs().max() > 0.0


@each
@layout
def test_weights_of_the_values_add_up_to_one_where_held(make, per_sample, data):
    ts, xs, _ = data(per_sample, True, ends=True)
    leaf = xs.clone().requires_grad_()
    control = make(ts, leaf, extrapolate="hold")
    (gradient,) = torch.autograd.grad(control([-1000.0, 1000.0]).sum(), leaf)
    # Each entry is read once on either side of the data, from its first and its last observation.
    assert torch.equal(gradient.sum(0), torch.full((2, 2), 2.0, dtype=torch.float64))


@smooth
@gaps
@pytest.mark.parametrize("extrapolate", [None, "hold"])
def test_gradients_in_per_sample_times(make, gaps, extrapolate, data):
    ts, xs, times = data(True, gaps)
    if extrapolate == "hold":
        xs[0, 0, 0] = xs[-1, 1, 1] = torch.nan
        times = torch.cat([times, torch.tensor([-50.0, 50.0], dtype=torch.float64)])
    leaf = ts.clone().requires_grad_()
    assert gradcheck(lambda ts: make(ts, xs, extrapolate=extrapolate)(times), leaf)


def test_held_values_have_no_gradient_in_their_times(data):
    ts, xs, times = data(True, False)
    assert not ZeroOrderHold(ts.requires_grad_(), xs)(times).requires_grad


@smooth
@gaps
def test_gradients_in_t(make, gaps, data):
    ts, xs, times = data(False, gaps)
    control = make(ts, xs)
    assert gradcheck(control, times.clone().requires_grad_())
    start, stop = control.knots[2:4]
    middle = torch.tensor(0.3 * start + 0.7 * stop, dtype=torch.float64, requires_grad=True)
    assert gradcheck(control.on(start, stop), middle)
    assert gradcheck(control, middle)


@each
@layout
@gaps
def test_torch_func_agrees_with_autograd(make, per_sample, gaps, data, normal):
    ts, xs, times = data(per_sample, gaps)
    mask = xs.isnan()
    seen = xs[~mask].clone()

    def read(values):
        control = make(ts, filled(xs, mask, values))
        value = control(times)
        if not per_sample:
            start, stop = control.knots[2:4]
            value = value + control.on(start, stop)(0.5 * (start + stop)) + control(times[1])
        return value

    leaf = seen.clone().requires_grad_()
    expected = torch.autograd.functional.jacobian(read, leaf)
    torch.testing.assert_close(jacrev(read)(seen), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(jacfwd(read)(seen), expected, rtol=1e-13, atol=1e-13)
    direction = normal(len(seen))
    value, tangent = jvp(read, (seen,), (direction,))
    torch.testing.assert_close(value, read(seen))
    torch.testing.assert_close(tangent, expected @ direction, rtol=1e-12, atol=1e-12)
    loss = grad(lambda values: read(values).square().sum())
    (by_autograd,) = torch.autograd.grad(read(leaf).square().sum(), leaf)
    torch.testing.assert_close(loss(seen), by_autograd, rtol=1e-12, atol=1e-12)
    many = torch.stack([seen, 2.0 * seen, -seen])
    torch.testing.assert_close(vmap(read)(many), torch.stack([read(one) for one in many]))
    torch.testing.assert_close(vmap(loss)(many), torch.stack([loss(one) for one in many]))
    torch.testing.assert_close(jacfwd(loss)(seen), jacrev(loss)(seen), rtol=1e-12, atol=1e-12)


@each
@gaps
# Inside vmap torch alone decides how the batch lies in memory.
@pytest.mark.filterwarnings("ignore:torch.searchsorted")
def test_samples_may_be_a_vmap(make, gaps, data):
    ts, xs, times = data(False, gaps)
    whole = make(ts, xs)(times)
    for read in (
        lambda one: make(ts, one)(times),
        lambda one: torch.stack([make(ts, one)(t) for t in times.tolist()]),
    ):
        torch.testing.assert_close(vmap(read, in_dims=1, out_dims=1)(xs), whole, rtol=1e-13, atol=1e-13)
    own = ts[:, None] * torch.tensor([1.0, 1.1], dtype=torch.float64)
    spread = make(own, xs, extrapolate="hold")(times)
    # In each sample the times are per sample of a batch of one.
    read = vmap(
        lambda t, x: make(t[:, None], x[:, None], extrapolate="hold")(times)[:, 0], in_dims=1, out_dims=1
    )
    torch.testing.assert_close(read(own, xs), spread, rtol=1e-13, atol=1e-13)


@each
@gaps
def test_vmap_over_t(make, gaps, data):
    ts, xs, times = data(False, gaps)
    control = make(ts, xs)
    torch.testing.assert_close(vmap(control)(times), control(times), rtol=1e-13, atol=1e-13)
    start, stop = control.knots[2:4]
    inside = torch.linspace(start, stop, 5, dtype=torch.float64)
    expected = torch.stack([control.on(start, stop)(t) for t in inside])
    torch.testing.assert_close(vmap(control.on(start, stop))(inside).broadcast_to(expected.shape), expected)


@each
@gaps
@pytest.mark.parametrize("learned", [False, True], ids=["data", "learned"])
def test_a_transform_that_uses_the_control_first_leaves_no_trace(make, gaps, learned, data):
    ts, xs, _ = data(False, gaps)
    control = make(ts, xs.requires_grad_(learned))
    start, stop = control.knots[2:4]

    def scaled(p):
        return (p * control.on(start, stop)(start)).sum()

    p = torch.tensor(2.0, dtype=torch.float64)
    expected = make(ts, xs)(start).sum()
    for transform in (
        lambda: grad(scaled)(p),
        lambda: jvp(scaled, (p,), (torch.ones_like(p),))[1],
        lambda: vmap(grad(scaled))(p.expand(2))[1],
    ):
        torch.testing.assert_close(transform(), expected)
        value = control.on(start, stop)(start)
        assert all(row.requires_grad == learned for row in control.on(start, stop).coefficients)
        assert value.requires_grad == learned
        torch.testing.assert_close(value.sum(), expected)
        torch.testing.assert_close(transform(), expected)
        if learned:
            (gradient,) = torch.autograd.grad(value.sum(), xs)
            torch.testing.assert_close(gradient.sum().item(), 4.0)


def test_the_gather_of_observations_and_its_transpose(normal, rng):
    values = normal(4, 2, 3).requires_grad_()
    index = torch.randint(4, (6, 2, 3), generator=rng)
    assert torch.equal(Take.apply(values, index), values.detach().gather(0, index))
    assert gradcheck(Take.apply, (values, index), check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(
        Take.apply, (values, index), check_batched_grad=True, check_fwd_over_rev=True, check_rev_over_rev=True
    )
    stacked = torch.stack([index, index.flip(0)], 1)
    expected = torch.stack([values.detach().gather(0, index), values.detach().gather(0, index.flip(0))])
    assert torch.equal(vmap(Take.apply, in_dims=(None, 1))(values, stacked), expected)
    per_sample = vmap(grad(lambda v, i: Take.apply(v, i).square().sum()), in_dims=(None, 1))(values, stacked)
    for k in range(2):
        (one,) = torch.autograd.grad(values.gather(0, stacked[:, k]).square().sum(), values)
        torch.testing.assert_close(per_sample[k], one)
