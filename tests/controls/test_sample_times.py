"""Times of its own for every sample: ragged grids, pieces per sample, evaluation at each sample's time."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, vmap

from ctgate.controls import CubicHermite, LinearInterpolation, ZeroOrderHold

SAMPLED = [ZeroOrderHold, LinearInterpolation, CubicHermite]
SMOOTH = [LinearInterpolation, CubicHermite]
each = pytest.mark.parametrize("make", SAMPLED)
smooth = pytest.mark.parametrize("make", SMOOTH)
gaps = pytest.mark.parametrize("gaps", [False, True], ids=["complete", "gaps"])
held = pytest.mark.parametrize("extrapolate", [None, "hold"])
close = {"rtol": 1e-13, "atol": 1e-13}

# (batch, time, channel), with sizes that can be confused for one another
LAYOUTS = [((), 4, 2), ((4,), 4, 4), ((2, 1), 4, 3)]


def samples(batch) -> Iterator[tuple[int, ...]]:
    return iter(np.ndindex(*batch))


def own(tensor, sample):
    """(time, ...) of one sample."""
    return tensor[(slice(None), *sample)]


@pytest.fixture
def ragged(irregular, normal, rng):
    """Times (time, *batch) with padding, values with rubbish beside it, and what is left of each sample."""

    def series(batch, count, channels, gaps=False, extra=0):
        ts = irregular(count + extra, *batch)
        xs = normal(count, *batch, channels)
        if not batch:
            xs[1, 0] = torch.nan if gaps else 0.0
            return ts, xs, {(): (ts, xs)}
        alone = {}
        for k, sample in enumerate(samples(batch)):
            length = (count, count - 1, 2, count)[k]
            values = own(xs, sample)[:length]
            if gaps and length > 2:
                values = values.clone()
                values[int(torch.randint(1, length - 1, (), generator=rng)), 0] = torch.nan
            alone[sample] = (own(ts, sample)[: length + extra].clone(), values)
            own(ts, sample)[length + extra :] = torch.nan
            own(xs, sample)[:length] = values
            rubbish = torch.tensor([torch.nan, torch.inf, 1e300], dtype=torch.float64)
            own(xs, sample)[length:] = rubbish[torch.arange(count - length) % 3, None]
        return ts, xs, alone

    return series


def ends_of(make, times, values):
    """First and last knot of one sample."""
    last = times[-1]
    if make is ZeroOrderHold and len(times) == len(values):
        last = 2.0 * times[-1] - times[-2]
    return times[0], last


def grid(make, alone, sample, count, rng, beyond=0.0):
    """Times of one sample: its knots and some between them, the last one repeated up to ``count``."""
    times, values = alone[sample]
    low, high = ends_of(make, times, values)
    inside = low + (high - low) * torch.rand(5, generator=rng, dtype=torch.float64)
    cuts = torch.cat([times, low[None], high[None], inside])
    if beyond:
        cuts = torch.cat([cuts, (low - beyond)[None], (high + beyond)[None]])
    cuts = cuts.unique()
    return torch.cat([cuts, cuts[-1:].expand(count - len(cuts))])


def grids(make, alone, batch, rng, beyond=0.0, count=20):
    cuts = torch.stack([grid(make, alone, sample, count, rng, beyond) for sample in samples(batch)], 1)
    return cuts.reshape(count, *batch)


@each
@gaps
@held
@pytest.mark.parametrize(("batch", "count", "channels"), LAYOUTS)
def test_each_sample_is_read_at_its_own_times(
    make, batch, count, channels, gaps, extrapolate, ragged, reference, rng
):
    ts, xs, alone = ragged(batch, count, channels, gaps)
    control = make(ts, xs, extrapolate=extrapolate)
    assert control.batch_shape == batch
    times = grids(make, alone, batch, rng, beyond=0.5 if extrapolate else 0.0)
    for side in ("left", "right"):
        found = control(times, side)
        assert found.shape == (len(times), *batch, channels)
        for sample in samples(batch):
            expected = reference(make.__name__, *alone[sample], own(times, sample), side)
            torch.testing.assert_close(own(found, sample), expected, **close)
    assert torch.equal(control(times.tolist()), found)
    assert torch.equal(control(times.numpy()), found)


@each
@gaps
@held
@pytest.mark.parametrize(("batch", "count", "channels"), LAYOUTS)
def test_pieces_of_samples_are_the_control_inside_and_its_limits_at_the_ends(
    make, batch, count, channels, gaps, extrapolate, ragged, reference, rng
):
    ts, xs, alone = ragged(batch, count, channels, gaps)
    control = make(ts, xs, extrapolate=extrapolate)
    cuts = grids(make, alone, batch, rng, beyond=0.5 if extrapolate else 0.0)
    pieces = control.on_samples(cuts[:-1], cuts[1:])
    middle = 0.5 * (cuts[:-1] + cuts[1:])
    found = {
        "right": torch.stack([piece(t) for piece, t in zip(pieces, cuts[:-1], strict=True)]),
        "left": torch.stack([piece(t) for piece, t in zip(pieces, cuts[1:], strict=True)]),
        "middle": torch.stack([piece(t) for piece, t in zip(pieces, middle, strict=True)]),
    }
    asked = {"right": cuts[:-1], "left": cuts[1:], "middle": middle}
    for sample in samples(batch):
        # Where an interval is empty both ends are the end of the data, which has one limit.
        empty = own(cuts, sample)[:-1] == own(cuts, sample)[1:]
        assert empty.any()
        for side, times in asked.items():
            expected = reference(
                make.__name__, *alone[sample], own(times, sample), side.replace("middle", "right")
            )
            limit = reference(make.__name__, *alone[sample], own(times, sample), "left")
            expected = torch.where(empty[:, None], limit, expected)
            torch.testing.assert_close(own(found[side], sample), expected, **close)


def test_edges_may_be_ragged_too(ragged, reference, rng):
    ts, xs, alone = ragged((4,), 6, 2, extra=1)
    control = ZeroOrderHold(ts, xs)
    times = grids(ZeroOrderHold, alone, (4,), rng)
    found = control(times)
    for sample in samples((4,)):
        expected = reference("ZeroOrderHold", *alone[sample], own(times, sample))
        torch.testing.assert_close(own(found, sample), expected, **close)
        assert control.sample_support[1][sample] == alone[sample][0][-1]


def test_the_last_held_interval_is_as_long_as_the_one_before_it_in_each_sample():
    nan = torch.nan
    ts = torch.tensor([[0.0, 1.0], [1.0, 3.0], [1.5, nan], [3.5, nan]])
    control = ZeroOrderHold(ts, torch.arange(8.0).reshape(4, 2, 1))
    expected = [[0.0, 1.0], [1.0, 3.0], [1.5, 5.0], [3.5, 5.0], [5.5, 5.0]]
    assert control.sample_knots.tolist() == expected
    assert [end.tolist() for end in control.sample_support] == [[0.0, 1.0], [5.5, 5.0]]
    assert control.support == (1.0, 5.0)
    assert control(4.9).tolist() == [[6.0], [3.0]]


@smooth
def test_what_is_known_of_each_sample(make):
    ts = torch.tensor([[0.0, 1.0], [1.0, 3.0], [1.5, torch.nan]], requires_grad=True)
    control = make(ts, torch.zeros(3, 2, 1))
    assert not control.shared
    assert control.sample_knots.dtype == torch.float64
    assert control.sample_knots.tolist() == [[0.0, 1.0], [1.0, 3.0], [1.5, 3.0]]
    assert [end.tolist() for end in control.sample_support] == [[0.0, 1.0], [1.5, 3.0]]
    (gradient,) = torch.autograd.grad(control.sample_knots.sum(), ts)
    # The repeated end is the same time again.
    assert gradient.tolist() == [[1.0, 1.0], [1.0, 2.0], [1.0, 0.0]]
    low, high = make(ts, torch.zeros(3, 2, 1), extrapolate="hold").sample_support
    assert low.tolist() == [-np.inf] * 2
    assert high.tolist() == [np.inf] * 2
    shared = make([0.0, 1.0], torch.zeros(2, 3, 1))
    assert shared.sample_knots.tolist() == [0.0, 1.0]
    assert [(end.shape, end.dtype, end.item()) for end in shared.sample_support] == [
        ((), torch.float64, 0.0),
        ((), torch.float64, 1.0),
    ]


@smooth
def test_one_time_in_some_sample_is_a_constant_when_held(make, normal):
    ts = torch.tensor([[0.0, 0.5], [1.0, torch.nan]])
    xs = normal(2, 2, 3)
    control = make(ts, xs, extrapolate="hold")
    times = torch.tensor([[0.0, -7.0], [1.0, 0.5], [9.0, 9.0]], dtype=torch.float64)
    assert torch.equal(control(times)[:, 1], xs[:1, 1].expand(3, 3))
    assert torch.equal(control(times)[[0, 2], 0], xs[:, 0])
    start = torch.tensor([[0.0, -2.0], [0.5, 0.5], [1.0, 3.0]], dtype=torch.float64)
    stop = torch.tensor([[0.5, 0.5], [1.0, 0.5], [2.0, 4.0]], dtype=torch.float64)
    for piece, t in zip(control.on_samples(start, stop), stop, strict=True):
        assert torch.equal(piece(t)[1], xs[0, 1])


@each
@gaps
@pytest.mark.parametrize(
    ("batch", "target"), [((), (3,)), ((), ()), ((1,), (3,)), ((3,), (3,)), ((3,), (2, 3)), ((2, 1), (2, 3))]
)
def test_shared_times_serve_every_batch(
    make, gaps, batch, target, irregular, normal, with_gaps, reference, rng
):
    ts, xs = irregular(6), normal(6, *batch, 2)
    xs = with_gaps(xs) if gaps else xs
    control = make(ts, xs)
    alone = dict.fromkeys(samples(target), (ts, xs))
    cuts = grids(make, alone, target, rng)
    whole = xs.reshape(6, *(1,) * (len(target) - len(batch)), *batch, 2).expand(6, *target, 2)
    pieces = control.on_samples(cuts[:-1], cuts[1:])
    values = torch.stack([piece(0.5 * (a + b)) for piece, a, b in zip(pieces, cuts, cuts[1:], strict=False)])
    assert values.shape == (len(cuts) - 1, *target, 2)
    for sample in samples(target):
        times = own(0.5 * (cuts[:-1] + cuts[1:]), sample)
        side = "left" if make is ZeroOrderHold else "right"
        expected = reference(make.__name__, ts, own(whole, sample), times, side)
        torch.testing.assert_close(own(values, sample), expected, **close)
        if target:
            found = own(control(0.5 * (cuts[:-1] + cuts[1:]), side), sample)
            torch.testing.assert_close(found, expected, **close)


@each
def test_a_batch_of_one_serves_times_of_many(make, ragged, reference, rng):
    ts, xs, alone = ragged((1,), 5, 2)
    control = make(ts, xs)
    cuts = torch.cat([grid(make, alone, (0,), 20, rng)[:, None] for _ in range(3)], 1)
    found = control(cuts)
    pieces = control.on_samples(cuts[:-1], cuts[1:])
    for k in range(3):
        expected = reference(make.__name__, *alone[0,], cuts[:, k])
        torch.testing.assert_close(found[:, k], expected, **close)
        torch.testing.assert_close(
            torch.stack([p(t)[k] for p, t in zip(pieces, cuts, strict=False)])[:8], expected[:8]
        )


@each
def test_a_piece_takes_one_time_for_all_as_well(make, irregular, normal):
    control = make(irregular(5), normal(5, 3, 2))
    start, stop = control.knots[1:3]
    ends = (torch.full((1, 3), end, dtype=torch.float64) for end in (start, stop))
    (piece,) = control.on_samples(*ends)
    middle = 0.5 * (start + stop)
    for t in (
        middle,
        torch.tensor(middle, dtype=torch.float64),
        torch.full((3,), middle, dtype=torch.float64),
    ):
        torch.testing.assert_close(piece(t), control(middle), **close)


@each
def test_rounding_of_a_time_cannot_select_the_neighbour(make, normal):
    # Knots that float32 cannot hold: stage times computed in float32 fall on either side of them.
    ts = (torch.arange(9, dtype=torch.float64) * 0.1 + 1000.0)[:, None] + torch.tensor([0.0, 0.03])
    control = make(ts, normal(9, 2, 2))
    pieces = control.on_samples(ts[:-1], ts[1:])
    for j, piece in enumerate(pieces):
        for times, side in ((ts[j], "right"), (ts[j + 1], "left")):
            rounded = times.float()
            # Held values do not move at all; the others move with their slope, the knots being 0.1 apart.
            bound = 0.0 if make is ZeroOrderHold else 50.0 * float((rounded - times).abs().max())
            assert (piece(rounded) - control(times[None], side)[0]).abs().max() <= bound


@each
@gaps
def test_dtype_and_batch_first(make, gaps, ragged):
    ts, xs, _ = ragged((4,), 5, 3, gaps)
    control = make(ts, xs)
    single = xs.clamp(max=1e30).float()
    other = make(ts.movedim(0, -1), single.movedim(0, -2), batch_first=True)
    low, high = control.sample_support
    times = low + (high - low) * torch.linspace(0.0, 1.0, 7, dtype=torch.float64)[:, None]
    found = other(times)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), control(times), rtol=1e-5, atol=1e-5)
    (piece,) = other.on_samples(low[None], (low + 1e-3)[None])
    assert piece(low).dtype == torch.float32
    assert other.sample_knots.dtype == torch.float64


@each
def test_empty_batches_and_no_intervals(make):
    for ts in (torch.zeros(3, 0), [0.0, 1.0, 2.0]):
        control = make(ts, torch.zeros(3, 0, 2))
        ends = torch.zeros(4, 0, dtype=torch.float64)
        pieces = control.on_samples(ends, ends)
        assert [piece(ends[0]).shape for piece in pieces] == [(0, 2)] * 4
        assert control(ends).shape == (4, 0, 2)
        assert [end.shape for end in control.sample_support] == [(0,) if ts != [0.0, 1.0, 2.0] else ()] * 2
    control = make(torch.arange(3.0)[:, None].expand(3, 4), torch.zeros(3, 4, 2))
    assert control.on_samples(*torch.zeros(2, 0, 4, dtype=torch.float64)) == []
    assert control(torch.zeros(0, 4)).shape == (0, 4, 2)
    assert make([0.0, 1.0], torch.zeros(2, 2))(torch.zeros(0, 4)).shape == (0, 4, 2)


def leaves(ts, xs):
    """The entries of both that are real, and a function that puts them back."""
    seen_ts = ~ts.isnan()
    real = (torch.arange(len(xs)).reshape(-1, *(1,) * (ts.ndim - 1)) < seen_ts.sum(0)).unsqueeze(-1)
    seen_xs = real & ~xs.isnan()

    def back(times, values):
        whole = torch.where(seen_ts, torch.zeros_like(ts).masked_scatter(seen_ts, times), ts)
        return whole, torch.where(seen_xs, torch.zeros_like(xs).masked_scatter(seen_xs, values), xs)

    return ts[seen_ts].clone().requires_grad_(), xs[seen_xs].clone().requires_grad_(), back


@each
@gaps
@held
def test_gradients_in_values_times_and_t(make, gaps, extrapolate, ragged, rng):
    ts, xs, alone = ragged((3,), 5, 2, gaps)
    xs = torch.where(xs.abs() < 1e3, xs, torch.nan)
    times, values, back = leaves(ts, xs)
    beyond = 0.4 if extrapolate else 0.0
    cuts = grids(make, alone, (3,), rng, beyond)
    asked = (cuts[:-1] + 0.3 * (cuts[1:] - cuts[:-1]))[(cuts[1:] > cuts[:-1]).all(1)].clone().requires_grad_()

    def called(times, values, t):
        return make(*back(times, values), extrapolate=extrapolate)(t)

    assert gradcheck(called, (times, values, asked))
    assert gradgradcheck(lambda *args: called(*args).square(), (times, values, asked), fast_mode=True)

    def pieces(times, values, t):
        control = make(*back(times, values), extrapolate=extrapolate)
        # The intervals are the numbers that they are; a knot that moves past one of their ends would not do.
        low, high = asked.detach() - 1e-3, asked.detach() + 1e-3
        return torch.stack([piece(own) for piece, own in zip(control.on_samples(low, high), t, strict=True)])

    far = (asked.detach()[:, None] - cuts[None]).abs().amin((1, 2)) > 5e-3
    asked = asked.detach()[far].clone().requires_grad_()
    assert len(asked) > 2
    assert gradcheck(pieces, (times, values, asked), fast_mode=True)
    assert gradgradcheck(lambda *args: pieces(*args).square(), (times, values, asked), fast_mode=True)


def test_the_gradient_in_a_time_is_its_closed_form(irregular, normal):
    ts, xs = irregular(5, 3).requires_grad_(), normal(5, 3, 1)
    start, stop = ts.detach()[1:2], ts.detach()[2:3]
    (piece,) = LinearInterpolation(ts, xs).on_samples(start, stop)
    w = 0.3
    (gradient,) = torch.autograd.grad(piece((1.0 - w) * start[0] + w * stop[0]).sum(), ts)
    slope = ((xs[2] - xs[1]) / (stop - start).T)[:, 0]
    expected = torch.zeros_like(gradient)
    expected[1], expected[2] = -(1.0 - w) * slope, -w * slope
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@each
@gaps
def test_padding_and_missing_entries_get_exactly_zero(make, gaps, ragged, rng):
    ts, xs, alone = ragged((3,), 5, 2, gaps)
    times, leaf = ts.clone().requires_grad_(), xs.clone().requires_grad_()
    control = make(times, leaf)
    cuts = grids(make, alone, (3,), rng)
    pieces = control.on_samples(cuts[:-1], cuts[1:])
    by_piece = torch.stack([piece(t) for piece, t in zip(pieces, cuts, strict=False)])
    real = torch.zeros_like(xs, dtype=torch.bool)
    for sample, (_, values) in alone.items():
        own(real, sample)[: len(values)] = ~values.isnan()
    for value in (control(cuts), by_piece):
        gradients = torch.autograd.grad(
            value.square().sum(), (leaf, times), allow_unused=make is ZeroOrderHold
        )
        for gradient, unread in zip(gradients, (~real, ts.isnan()), strict=True):
            if gradient is not None:
                assert gradient.isfinite().all()
                assert torch.equal(gradient[unread], torch.zeros_like(gradient[unread]))
                assert gradient[~unread].abs().max() > 0.0


@each
@gaps
def test_torch_func_agrees_with_autograd(make, gaps, ragged, rng):
    ts, xs, alone = ragged((3,), 5, 2, gaps)
    cuts = grids(make, alone, (3,), rng)

    def read(values):
        control = make(ts, values)
        pieces = control.on_samples(cuts[:-1], cuts[1:])
        return control(cuts)[1:] + torch.stack([piece(t) for piece, t in zip(pieces, cuts, strict=False)])

    def loss(values):
        return read(values).square().sum()

    leaf = xs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad(loss)(xs), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jacfwd(read)(xs), jacrev(read)(xs), rtol=1e-12, atol=1e-12)
    many = torch.stack([xs, 2.0 * xs])
    torch.testing.assert_close(vmap(read)(many), torch.stack([read(one) for one in many]))


@each
# Inside vmap torch alone decides how the batch lies in memory.
@pytest.mark.filterwarnings("ignore:torch.searchsorted")
def test_samples_with_padding_may_be_a_vmap(make, ragged, rng):
    ts, xs, alone = ragged((3,), 5, 2)
    xs = torch.where(xs.abs() < 1e3, xs, torch.nan)
    cuts = grids(make, alone, (3,), rng)

    def read(ts, xs, cuts):
        control = make(ts[:, None], xs[:, None])
        pieces = control.on_samples(cuts[:-1, None], cuts[1:, None])
        return (
            control(cuts[:, None])[1:] + torch.stack([p(t[None]) for p, t in zip(pieces, cuts, strict=False)])
        )[:, 0]

    expected = torch.stack([read(*(own(part, (k,)) for part in (ts, xs, cuts))) for k in range(3)], 1)
    torch.testing.assert_close(vmap(read, in_dims=1, out_dims=1)(ts, xs, cuts), expected, **close)


@each
@gaps
def test_coefficients_carry_the_whole_gradient_of_a_piece(make, gaps, ragged, rng):
    ts, xs, alone = ragged((3,), 5, 2, gaps)
    ts.requires_grad_()
    control = make(ts, xs.requires_grad_())
    cuts = grids(make, alone, (3,), rng)
    for piece, a, b in zip(control.on_samples(cuts[:-1], cuts[1:]), cuts, cuts[1:], strict=False):
        value = piece(0.3 * a + 0.7 * b).square().sum()
        whole = torch.autograd.grad(
            value, (xs, ts), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        parts = torch.autograd.grad(value, piece.coefficients, allow_unused=True, materialize_grads=True)
        collected = torch.autograd.grad(
            piece.coefficients, (xs, ts), parts, allow_unused=True, materialize_grads=True
        )
        for one, other in zip(collected, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@each
@gaps
def test_several_solves_may_each_be_differentiated(make, gaps, ragged, rng):
    ts, xs, alone = ragged((3,), 5, 2, gaps)
    ts.requires_grad_()
    control = make(ts, xs.requires_grad_())
    cuts = grids(make, alone, (3,), rng)
    pieces = control.on_samples(cuts[:-1], cuts[1:])
    gradients = []
    for read in (pieces, pieces, control.on_samples(cuts[:-1], cuts[1:])):
        loss = sum(piece(t).square().sum() for piece, t in zip(read, cuts, strict=False))
        gradients.append(torch.autograd.grad(loss, (xs, ts), allow_unused=True, materialize_grads=True))
    for others in gradients[1:]:
        for one, other in zip(gradients[0], others, strict=True):
            assert torch.equal(one, other)


def graph(value):
    """Every node behind a value."""
    nodes, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return nodes


@each
@gaps
def test_all_pieces_come_from_one_gather(make, gaps, normal, with_gaps):
    # One gather for each piece would make the backward pass quadratic.
    count = 400
    steps = torch.arange(count + 1, dtype=torch.float64)[:, None] * torch.tensor([1.0, 1.1])
    xs = normal(count, 2, 3)
    xs = (with_gaps(xs) if gaps else xs).requires_grad_()
    control = make(steps[:-1], xs, extrapolate="hold")
    cuts = steps[:-1] + 0.25
    pieces = control.on_samples(cuts, cuts + 0.5)
    value = torch.stack([piece(t) for piece, t in zip(pieces, cuts, strict=True)]).sum()
    names = [node.name() for node in graph(value)]
    assert sum("Take" in name for name in names) == 1
    assert sum("Unbind" in name for name in names) == 1
    assert not any("Select" in name or "Index" in name or "Slice" in name for name in names)
    assert len(names) < 20 * count
    value.backward()
    assert xs.grad is not None
    # u is a weighted mean of the values at any time.
    assert abs(xs.grad.sum().item() - count * 6) < 1e-6


@st.composite
def ragged_series(draw):
    """Samples of different lengths on a grid of 1/8, and five times for each on a grid of 1/16: all exact."""
    lengths = draw(st.lists(st.integers(2, 6), min_size=1, max_size=4))
    ts = np.full((max(lengths), len(lengths)), np.nan)
    xs = np.full((max(lengths), len(lengths), 1), np.nan)
    times = np.empty((5, len(lengths)))
    for k, length in enumerate(lengths):
        steps = draw(st.lists(st.integers(1, 12), min_size=length, max_size=length))
        ts[:length, k] = np.cumsum(steps) / 8.0 + draw(st.integers(-100, 100)) / 8.0
        xs[:length, k, 0] = draw(st.lists(st.floats(-1e3, 1e3), min_size=length, max_size=length))
        offsets = draw(st.lists(st.integers(-20, 16 * 12), min_size=5, max_size=5))
        times[:, k] = ts[0, k] + np.sort(offsets) / 16.0
    return *map(torch.from_numpy, (ts, xs, times)), lengths


@pytest.mark.parametrize("make", SAMPLED)
@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_batch_is_its_samples(make, reference, data):
    ts, xs, times, lengths = data.draw(ragged_series())
    control = make(ts, xs, extrapolate="hold")
    for side in ("left", "right"):
        found = control(times, side)
        for k, length in enumerate(lengths):
            expected = reference(make.__name__, ts[:length, k], xs[:length, k], times[:, k], side)
            torch.testing.assert_close(found[:, k], expected, rtol=1e-12, atol=1e-9)


@each
def test_nan_between_times(make):
    ts = torch.tensor([[0.0, 0.0], [1.0, torch.nan], [2.0, 2.0]])
    message = r"ts\[1, 1\] is nan; times must be finite: sample \(1,\) has later ones.* pad the end"
    with pytest.raises(ValueError, match=message):
        make(ts, torch.zeros(3, 2, 1))
    with pytest.raises(ValueError, match=message):
        make(ts.T, torch.zeros(2, 3, 1), batch_first=True)
    with pytest.raises(ValueError, match=r"ts\[2\] is nan; times must be finite$"):
        make([0.0, 1.0, float("nan")], torch.zeros(3, 1))


@each
def test_a_sample_with_too_few_times(make):
    ts = torch.tensor([[0.0, 0.0], [1.0, torch.nan], [2.0, torch.nan]])
    hint = "" if make is ZeroOrderHold else ', or 1 with extrapolate="hold"'
    with pytest.raises(ValueError, match=rf"sample \(1,\) of ts has 1 time.* must have at least 2{hint}"):
        make(ts, torch.zeros(3, 2, 1))
    if make is ZeroOrderHold:
        with pytest.raises(ValueError, match=r"sample \(1,\) of ts has 1 time"):
            make(ts, torch.zeros(2, 2, 1), extrapolate="hold")
    ts[0, 1] = torch.nan
    with pytest.raises(ValueError, match=r"sample \(1,\) of ts has 0 time"):
        make(ts, torch.zeros(3, 2, 1), extrapolate="hold")


@each
def test_values_before_the_padding_are_still_checked(make):
    ts = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, torch.nan]])
    xs = torch.zeros(4, 2, 1)
    xs[3, 1] = torch.inf
    make(ts, xs)
    xs[2, 1] = torch.inf
    with pytest.raises(ValueError, match=r"xs\[2, 1, 0\] is inf"):
        make(ts, xs)
    xs[2, 1] = torch.nan
    if make is ZeroOrderHold:
        assert make(ts, xs)(2.5).tolist() == [[0.0], [0.0]]
    else:
        with pytest.raises(ValueError, match=r"sample \(1,\), is NaN after time index 1 \(t = 1\.0\)"):
            make(ts, xs)


@each
def test_times_outside_one_sample(make):
    control = make(torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, torch.nan]]), torch.zeros(3, 2, 1))
    end = float(control.sample_support[1][1])
    message = rf"t\[1, 1\] is 2\.5 and {make.__name__} is known on \[0\.0, {end}\] in sample \(1,\); .*hold"
    with pytest.raises(ValueError, match=message):
        control([[0.0, 0.0], [2.5, 2.5]])
    ends = torch.tensor([[[0.0, 0.0]], [[0.5, 2.5]]], dtype=torch.float64)
    with pytest.raises(ValueError, match=message.replace(r"t\[1, 1\]", r"stop\[0, 1\]")):
        control.on_samples(*ends)
    with pytest.raises(ValueError, match=r"start\[0, 0\] is -1\.0 and .* in sample \(0,\)"):
        control.on_samples(ends[0] - 1.0, ends[0])
    with pytest.raises(ValueError, match=r"t\[0, 1\] is nan"):
        control([[0.0, float("nan")]])


@each
def test_shapes_and_intervals_that_do_not_fit(make):
    control = make(torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]), torch.zeros(3, 2, 1))
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"t has shape \(2, 3\).* must broadcast with that of .*, \(2,\)"):
        control(zeros)
    with pytest.raises(ValueError, match=r"start has shape \(2, 3\).* must broadcast .*, \(2,\)"):
        control.on_samples(zeros, zeros)
    with pytest.raises(ValueError, match=r"start has shape \(2, 1\)"):
        control.on_samples(zeros[:, :1], zeros[:, :1])
    with pytest.raises(
        ValueError, match=r"start has shape \(2, 3\) and stop \(2,\); both must be \(n, \*batch\)"
    ):
        control.on_samples(zeros, zeros[:, 0])
    start, stop = torch.tensor([[0.0, 0.5]]), torch.tensor([[0.5, 2.5]])
    message = (
        r"interval 0 of sample \(1,\) is \(0\.5, 2\.5\) and has the knot 2\.0 inside; cut .*sample_knots"
    )
    with pytest.raises(ValueError, match=message):
        control.on_samples(start, stop)
    with pytest.raises(
        ValueError, match=r"start\[0, 0\] is 0\.5 and stop 0\.0; start must not be after stop"
    ):
        control.on_samples(stop, start)


@each
def test_intervals_of_held_samples_may_not_have_an_end_of_the_data_inside(make):
    control = make(torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1, 1), extrapolate="hold")
    end = float(control.sample_knots[-1])
    with pytest.raises(ValueError, match=r"has the knot 0\.0 inside"):
        control.on_samples(torch.tensor([[-9.0]]), torch.tensor([[0.5]]))
    with pytest.raises(ValueError, match=rf"has the knot {end} inside"):
        control.on_samples(torch.tensor([[end - 0.5]]), torch.tensor([[end + 9.0]]))
