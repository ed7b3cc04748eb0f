"""Lists, pandas and xarray into controls and back: what goes in comes out, and what is off is named."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from ctgate.adapters import (
    Labels,
    TimeAxis,
    from_pandas,
    from_sequences,
    from_xarray,
    to_pandas,
    to_sequences,
    to_xarray,
)
from ctgate.controls import CubicHermite, FunctionControl, LinearInterpolation, ZeroOrderHold

SAMPLED = [ZeroOrderHold, LinearInterpolation, CubicHermite]
each = pytest.mark.parametrize("make", SAMPLED)
NS_OF_26_DAYS = 2**51


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def series(rng, *lengths, channels=2):
    times = [np.cumsum(0.1 + rng.random(length)) + k for k, length in enumerate(lengths)]
    return times, [rng.normal(size=(length, channels)) for length in lengths]


# Sequences


@each
def test_sequences_of_different_lengths(make, rng):
    times, values = series(rng, 3, 2, 5, 5)
    control = from_sequences(times, values, make)
    assert isinstance(control, make)
    assert (control.batch_shape, control.channels, control.shared) == ((4,), 2, False)
    for k, (ts, xs) in enumerate(zip(times, values, strict=True)):
        # At its own knots each sample is its own data.
        asked = torch.tensor(ts)[:, None].expand(-1, 4)
        inside = asked.clamp(*control.sample_support)
        np.testing.assert_allclose(control(inside)[:, k], xs, rtol=1e-14)
    back = to_sequences(control.sample_knots[:5], control(control.sample_knots[:5], "left"))
    assert [len(ts) for ts, _ in back] == [
        4 if make is ZeroOrderHold else 3,
        3 if make is ZeroOrderHold else 2,
        5,
        5,
    ]


def test_there_and_back_is_the_same():
    times = [torch.tensor([0.0, 1.0, 2.5]), torch.tensor([0.5, 3.0])]
    values = [torch.arange(6.0).reshape(3, 2), torch.arange(4.0).reshape(2, 2)]
    control = from_sequences(times, values, LinearInterpolation)
    assert control.resolution == torch.finfo(torch.float32).eps
    ts = control.sample_knots
    for padded in (ts, torch.where(ts.diff(dim=0, prepend=ts[:1] - 1.0) > 0.0, ts, torch.nan)):
        back = to_sequences(padded, control(ts))
        for (t, x), own, xs in zip(back, times, values, strict=True):
            assert torch.equal(t, own.double())
            assert torch.equal(x, xs)


def test_one_edge_more_than_values():
    control = from_sequences([[0, 1, 2], [0, 5]], [[[1.0], [2.0]], [[3.0]]])
    assert isinstance(control, ZeroOrderHold)
    assert control.sample_support[1].tolist() == [2.0, 5.0]
    assert control([[1.5, 4.5]]).tolist() == [[[2.0], [3.0]]]


def test_dtypes_of_sequences():
    control = from_sequences([[0, 1], [0.0, 2.0]], [np.ones((2, 1)), np.zeros((2, 1), np.float32)])
    assert control(0.5).dtype == torch.float64
    control = from_sequences([[0, 1]], [np.ones((2, 1))], dtype=torch.float32)
    assert (control(0.5).dtype, control.sample_knots.dtype) == (torch.float32, torch.float64)
    assert from_sequences([[0, 1]], [[[1.0], [2.0]]])(0.5).dtype == torch.get_default_dtype()
    held = from_sequences(
        [[0.0], [0.0, 1.0]], [np.ones((1, 1)), np.ones((2, 1))], CubicHermite, extrapolate="hold"
    )
    assert held(torch.tensor([[5.0, 5.0]])).flatten().tolist() == [1.0, 1.0]


def test_gradients_reach_each_sequence(rng):
    times, values = series(rng, 3, 4)
    ts = [torch.tensor(own, requires_grad=True) for own in times]
    xs = [torch.tensor(own, requires_grad=True) for own in values]
    asked = torch.tensor([[own[1] + 0.05 for own in times]])

    def read(*parts):
        return from_sequences(parts[:2], parts[2:], LinearInterpolation)(asked)

    assert torch.autograd.gradcheck(read, (*ts, *xs))
    (gradient,) = torch.autograd.grad(read(*ts, *xs)[:, 1].sum(), xs[1])
    np.testing.assert_allclose(gradient.sum(0), 1.0, rtol=1e-14)


def test_a_solution_falls_apart_into_its_samples():
    ts, hs = torch.tensor([0.0, 1.0, 2.0]), torch.arange(36.0).reshape(3, 2, 3, 2).requires_grad_()
    parts = to_sequences(ts, hs)
    assert len(parts) == 6
    assert torch.equal(parts[4][1], hs[:, 1, 1])
    parts[4][1].sum().backward()
    assert hs.grad.sum() == 6.0
    ((t, h),) = to_sequences(ts, hs[:, 0, 0])
    assert (t.shape, h.shape) == ((3,), (3, 2))
    assert to_sequences(torch.zeros(3, 0), torch.zeros(3, 0, 2)) == []
    # Neither NaN nor a repeated last time is a row; NaN in the middle is a time that was not asked for.
    own = torch.tensor([[0.0, 0.0, 1.0], [1.0, torch.nan, 1.0], [1.0, 2.0, 1.0]])
    assert [len(t) for t, _ in to_sequences(own, torch.zeros(3, 3, 1))] == [2, 2, 1]


@pytest.mark.parametrize(
    ("times", "values", "options", "error", "message"),
    [
        ([[0.0, 1.0]], [], {}, ValueError, r"times has 1 sequences and values 0; .* at least one"),
        ([], [], {}, ValueError, r"at least one"),
        (
            [[0.0, 1.0], [0.0]],
            [np.ones((2, 1)), np.ones(1)],
            {},
            ValueError,
            r"sample 1 .*\(1,\).*x\[:, None\]",
        ),
        (
            [[0.0, 1.0], [0.0, 1.0, 2.0]],
            [np.ones((2, 1))] * 2,
            {},
            ValueError,
            r"sample 1 has 3 times and 2 values",
        ),
        (
            [[0.0, 1.0, 2.0]],
            [np.ones((2, 1))],
            {"kind": CubicHermite},
            ValueError,
            "sample 0 has 3 times and 2 values; there must be as many of both$",
        ),
        (
            [[0.0, 1.0]] * 2,
            [np.ones((2, 1)), np.ones((2, 3))],
            {},
            ValueError,
            "sample 1 has 3 channels and sample 0 1",
        ),
        ([[0.0, np.nan]], [np.ones((2, 1))], {}, ValueError, "times of sample 0 are nan at 1"),
        ([["a", "b"]], [np.ones((2, 1))], {}, TypeError, "times of sample 0 have dtype <U1"),
        (
            [[0.0, 1.0], [1.0, 1.0]],
            [np.ones((2, 1))] * 2,
            {},
            ValueError,
            r"ts\[1, 1\] = 1\.0 does not exceed",
        ),
        (
            [[0.0, 1.0], [1.0]],
            [np.ones((2, 1)), np.ones((1, 1))],
            {},
            ValueError,
            r"sample \(1,\) of ts has 1 time",
        ),
        (
            [[0.0, 1.0]],
            [np.ones((2, 1))],
            {"kind": FunctionControl},
            TypeError,
            "kind is .*FunctionControl.*must be",
        ),
        ([[0.0, 1.0]], [np.ones((2, 1))], {"batch_first": True}, TypeError, "batch_first is no option here"),
    ],
)
def test_sequences_that_are_refused(times, values, options, error, message):
    with pytest.raises(error, match=message):
        from_sequences(times, values, **options)


def test_solutions_that_are_refused():
    for convert in (to_sequences, to_pandas, to_xarray):
        with pytest.raises(
            ValueError, match=r"ts has shape \(2,\) and hs \(3, 4, 1\); they must be \(time,\) or"
        ):
            convert(torch.zeros(2), torch.zeros(3, 4, 1))


# Calendars


@pytest.mark.parametrize("unit", ["ns", "us", "ms", "s", "min", "h", "D", "W", pd.Timedelta("90min")])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin", "Asia/Kathmandu"])
def test_nanoseconds_survive_26_days(unit, zone, rng):
    origin = pd.Timestamp("2020-03-01 12:34:56.123456789", tz=zone)
    offsets = np.sort(rng.integers(-NS_OF_26_DAYS, NS_OF_26_DAYS, 500))
    index = origin + pd.to_timedelta(offsets, unit="ns")
    axis = TimeAxis(origin, unit)
    back = axis.to_datetimes(axis.to_numbers(index))
    assert back.equals(index.as_unit("ns"))
    assert str(back.tz) == str(index.tz)


def test_whole_units_are_exact_for_centuries_and_other_times_to_what_float64_holds(rng):
    axis = TimeAxis("1700-01-01", "D")
    index = pd.date_range("1700-01-01", "1980-01-01", freq="37D")
    numbers = axis.to_numbers(index)
    assert np.array_equal(numbers, np.arange(len(index)) * 37.0)
    assert axis.to_datetimes(numbers).equals(index.as_unit("ns"))
    late = index + pd.Timedelta("11:22:33.123456789")
    error = np.abs((axis.to_datetimes(axis.to_numbers(late)) - late.as_unit("ns")).asi8)
    assert 0 < error.max() <= 2.0**-52 * axis.to_numbers(late).max() * 86400e9 + 1.0
    assert axis.to_datetimes(axis.to_numbers(late)).round("ms").equals(late.as_unit("ns").round("ms"))


def test_numbers_are_elapsed_time_across_a_change_of_clocks():
    index = pd.DatetimeIndex(
        ["2021-03-28 01:30", "2021-03-28 03:30", "2021-10-31 02:30"], tz="Europe/Berlin", ambiguous=[True] * 3
    )
    hours = TimeAxis(index[0], "h").to_numbers(index)
    # The night lost an hour; in October 02:30 comes twice, and the first one is meant.
    assert hours.tolist() == [0.0, 1.0, 217 * 24.0]
    again = index.append(index[2:] + pd.Timedelta("1h"))
    hours = TimeAxis(index[0], "h").to_numbers(again)
    assert hours[-1] - hours[-2] == 1.0
    assert TimeAxis(index[0], "h").to_datetimes(hours).equals(again.as_unit("ns"))
    other = TimeAxis(index[0].tz_convert("Asia/Tokyo"), "h")
    assert other.to_numbers(again).tolist() == hours.tolist()
    assert str(other.to_datetimes(hours).tz) == "Asia/Tokyo"


def test_durations_and_missing_times():
    axis = TimeAxis(pd.Timedelta("1h"), "min")
    assert axis.to_numbers(pd.to_timedelta(["1h", "90min"])).tolist() == [0.0, 30.0]
    assert axis.to_datetimes([0.0, 30.0]).equals(pd.to_timedelta(["1h", "90min"]).as_unit("ns"))
    axis = TimeAxis("2020-01-01")
    numbers = axis.to_numbers(["2020-01-01 00:00:01", None])
    assert numbers[0] == 1.0
    assert np.isnan(numbers[1])
    assert axis.to_datetimes(torch.tensor(numbers)).isna().tolist() == [False, True]
    assert TimeAxis("2020-01-01", "h") == TimeAxis(pd.Timestamp("2020-01-01"), "h")


def test_calendars_that_are_refused():
    with pytest.raises(ValueError, match=r"unit is 'M'; it must be a unit of fixed length"):
        TimeAxis("2020-01-01", "M")
    with pytest.raises(ValueError, match="it must be a length of time > 0"):
        TimeAxis("2020-01-01", pd.Timedelta(0))
    with pytest.raises(TypeError, match="origin is 'tomorrowish'; it must be a datetime or a Timedelta"):
        TimeAxis("tomorrowish")
    with pytest.raises(ValueError, match="origin is NaT"):
        TimeAxis(pd.NaT)
    axis = TimeAxis("2020-01-01")
    with pytest.raises(
        TypeError, match=r"the time zone UTC and the origin .* has none; give both a time zone"
    ):
        axis.to_numbers(pd.DatetimeIndex(["2020-01-01"], tz="UTC"))
    with pytest.raises(TypeError, match="takes datetimes"):
        axis.to_numbers(pd.to_timedelta(["1h"]))
    with pytest.raises(ValueError, match="more than 292 years"):
        axis.to_datetimes([1e12])
    with pytest.raises(ValueError, match="more than 292 years"):
        TimeAxis("1700-01-01").to_numbers(pd.DatetimeIndex(["2200-01-01"]))
    with pytest.raises(ValueError, match=r"ts has shape \(1, 1\); it must be \(time,\)"):
        axis.to_datetimes([[0.0]])


# pandas


@pytest.fixture
def weather():
    index = pd.DatetimeIndex(
        ["2021-03-28 00:10", "2021-03-28 01:59:59.5", "2021-03-28 03:00", "2021-03-29 12:00"],
        tz="Europe/Berlin",
        name="when",
    )
    return pd.DataFrame({"rain": [0.0, 1.5, 2.0, 4.0], "wind": [3, 4, 5, 6]}, index=index)


@each
def test_a_table_with_irregular_dates(make, weather):
    control, labels = from_pandas(weather, make, unit="h")
    assert isinstance(control, make)
    assert (control.batch_shape, control.channels) == ((), 2)
    # At 2:00 the clock goes to 3:00, so 3:00 comes 110 minutes after 0:10.
    expected = [0.0, (109 * 60 + 59.5) / 3600, 110 / 60, 34 + 50 / 60]
    np.testing.assert_allclose(control.knots[:4], expected, rtol=1e-15)
    assert labels.channels == ("rain", "wind")
    assert labels.time == TimeAxis(weather.index[0], "h")
    ts = torch.tensor(control.knots[:4], dtype=torch.float64)
    back = to_pandas(ts, control(ts), labels, names=labels.channels)
    pd.testing.assert_frame_equal(back, weather.astype(float).rename_axis("time").set_axis(back.index))
    assert back.index.equals(weather.index.as_unit("ns"))
    assert str(back.index.tz) == "Europe/Berlin"


def test_other_ways_to_say_when(weather):
    expected, _ = from_pandas(weather, unit="h")
    column, labels = from_pandas(weather.reset_index(), time="when", unit="h")
    assert column.knots == expected.knots
    assert labels.channels == ("rain", "wind")
    level, labels = from_pandas(weather, time="when", unit="h", origin="2021-03-28 00:00+01:00")
    assert level.knots[0] == 10 / 60
    assert labels.time.origin == pd.Timestamp("2021-03-27 23:00", tz="UTC")
    lone, labels = from_pandas(weather["rain"], unit="h")
    assert (lone.channels, labels.channels) == (1, ("rain",))
    durations = weather.set_axis(weather.index - weather.index[0])
    control, labels = from_pandas(durations, unit="h")
    assert control.knots == expected.knots
    assert to_pandas(torch.tensor([0.0, 1.5]), torch.zeros(2, 1), labels).index.tolist() == [
        pd.Timedelta(0),
        pd.Timedelta("90min"),
    ]
    numbers, labels = from_pandas(weather.set_axis([0.0, 0.5, 2.0, 7.0]))
    assert numbers.knots[:4] == (0.0, 0.5, 2.0, 7.0)
    assert labels.time is None


def test_missing_values_are_missing(weather):
    weather.loc[weather.index[1], "rain"] = np.nan
    control, _ = from_pandas(weather, LinearInterpolation, unit="h")
    expected = np.interp(1.0, [0.0, 110 / 60], [0.0, 2.0])
    assert control(1.0)[0].item() == pytest.approx(expected, rel=1e-14)
    nullable, _ = from_pandas(
        weather.astype({"rain": "Float64", "wind": "Int64"}), LinearInterpolation, unit="h"
    )
    assert torch.equal(nullable(1.0), control(1.0))
    assert control(1.0).dtype == torch.float64
    assert from_pandas(weather.astype("float32"), LinearInterpolation)[0](1.0).dtype == torch.float32
    assert from_pandas(weather, LinearInterpolation, dtype=torch.float32)[0](1.0).dtype == torch.float32


@pytest.fixture
def patients():
    return pd.DataFrame(
        {
            "patient": ["b", "a", "b", "c", "a", "b", "c"],
            "time": pd.to_datetime(
                [
                    "2020-01-02",
                    "2020-01-01",
                    "2020-01-03",
                    "2020-01-01",
                    "2020-01-05",
                    "2020-01-04",
                    "2020-01-02",
                ]
            ),
            "pulse": [60.0, 70.0, 61.0, 80.0, 71.0, np.nan, 81.0],
        }
    )


def test_groups_are_samples(patients):
    control, labels = from_pandas(patients, time="time", by="patient", unit="D")
    assert (control.batch_shape, control.channels, control.shared) == ((3,), 1, False)
    ((name, keys),) = labels.batch
    assert (name, keys.tolist(), labels.channels) == ("patient", ["b", "a", "c"], ("pulse",))
    assert labels.time.origin == pd.Timestamp("2020-01-01")
    assert control.sample_knots.tolist() == [
        [1.0, 0.0, 0.0],
        [2.0, 4.0, 1.0],
        [3.0, 8.0, 2.0],
        [4.0, 8.0, 2.0],
    ]
    assert control([[3.5, 0.0, 1.0]]).flatten().tolist() == [61.0, 70.0, 81.0]
    indexed = patients.set_index(["patient", "time"])
    for frame, arguments in (
        (indexed, {"by": "patient"}),
        (indexed, {"by": "patient", "time": "time"}),
        (patients.set_index("time"), {"by": "patient"}),
        (patients.set_index("patient"), {"by": "patient", "time": "time"}),
    ):
        other, again = from_pandas(frame, unit="D", **arguments)
        assert torch.equal(other.sample_knots, control.sample_knots)
        assert again.batch[0][1].equals(keys)
        assert again.channels == ("pulse",)


def test_groups_come_back_as_rows(patients):
    control, labels = from_pandas(patients.dropna(), LinearInterpolation, time="time", by="patient", unit="D")
    ts = control.sample_knots
    back = to_pandas(ts, control(ts), labels, names=labels.channels)
    assert back.index.names == ["patient", "time"]
    expected = patients.dropna().set_index(["patient", "time"])
    pd.testing.assert_frame_equal(back.sort_index(), expected.sort_index(), check_index_type=False)
    shared = to_pandas(torch.tensor([0.0, 0.5]), torch.zeros(2, 3, 1), labels)
    assert len(shared) == 6
    assert shared.loc["a"].index.tolist() == [pd.Timestamp("2020-01-01"), pd.Timestamp("2020-01-01 12:00")]


def test_a_solution_without_labels_is_numbered():
    ts, hs = torch.tensor([0.0, 1.0, 2.0]), torch.arange(36.0).reshape(3, 2, 3, 2)
    table = to_pandas(ts, hs)
    assert table.index.names == ["sample_0", "sample_1", "time"]
    assert table.loc[1, 2, 1.0].tolist() == hs[1, 1, 2].tolist()
    assert to_pandas(ts, hs[:, 0]).index.names == ["sample", "time"]
    plain = to_pandas(ts, hs[:, 0, 0], names=["x", "y"])
    assert plain.index.name == "time"
    assert plain["y"].tolist() == hs[:, 0, 0, 1].tolist()
    assert to_pandas(ts, hs[:, :, :0]).empty
    with pytest.raises(ValueError, match="names has 3 names and hs 2 components"):
        to_pandas(ts, hs, names=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"labels has \(2,\) samples and hs \(2, 3\)"):
        to_pandas(ts, hs, Labels(batch=(("sample", pd.RangeIndex(2)),)))


def test_tables_that_are_refused(weather, patients):
    with pytest.raises(
        ValueError, match=r"row 2 \(2021-03-28 01:59:59.*\) repeats the time of row 1 .*sort_index"
    ):
        from_pandas(weather.iloc[[0, 1, 1, 2]])
    with pytest.raises(
        ValueError, match=r"row 2 \(2021-03-28 01:59.*\) is earlier than row 1 \(2021-03-28 03:00"
    ):
        from_pandas(weather.iloc[[0, 2, 1, 3]])
    swapped = patients.iloc[[0, 4, 2, 3, 1, 5, 6]]
    with pytest.raises(ValueError, match=r"row 4 \(2020-01-01.*\) of sample 'a' is earlier than row 1"):
        from_pandas(swapped, time="time", by="patient")
    with pytest.raises(ValueError, match="row 2 has no time: it is NaT"):
        from_pandas(
            patients.assign(time=patients["time"].where(patients.index != 2)), time="time", by="patient"
        )
    with pytest.raises(ValueError, match="row 3 has no group"):
        from_pandas(
            patients.assign(patient=patients["patient"].replace("c", None)), time="time", by="patient"
        )
    with pytest.raises(ValueError, match="there are 0 times"):
        from_pandas(weather.iloc[:0])
    with pytest.raises(TypeError, match=r"times have dtype .*pandas.to_datetime reads strings"):
        from_pandas(weather.set_axis(["a", "b", "c", "d"]))
    with pytest.raises(TypeError, match="column 'patient' has dtype"):
        from_pandas(patients, time="time")
    with pytest.raises(ValueError, match="no column left for a channel"):
        from_pandas(weather[[]])
    with pytest.raises(
        ValueError, match=r"time is 'date', the name of 0 columns and 0 index levels; .*'rain'.*'when'"
    ):
        from_pandas(weather, time="date")
    with pytest.raises(ValueError, match=r"time is 'when', the name of 1 columns and 1 index levels"):
        from_pandas(weather.assign(when=1.0), time="when")
    with pytest.raises(
        ValueError, match=r"time is None, by is None and the index has the levels \['patient', 'time'\]"
    ):
        from_pandas(patients.set_index(["patient", "time"]))
    with pytest.raises(ValueError, match="origin is 0 and times are numbers"):
        from_pandas(weather.set_axis([0.0, 1.0, 2.0, 3.0]), origin=0)
    for refused in (from_pandas, from_xarray):
        with pytest.raises(TypeError, match=r"kind is .*FunctionControl.* must be ct\.ZeroOrderHold"):
            refused(weather if refused is from_pandas else weather.to_xarray(), FunctionControl)


# xarray


@pytest.fixture
def field(rng):
    return xr.DataArray(
        rng.normal(size=(2, 4, 3, 5)),
        dims=("site", "time", "depth", "sensor"),
        coords={
            "time": pd.DatetimeIndex(["2020-01-01", "2020-01-02T12", "2020-01-04", "2020-01-07"]),
            "site": ["north", "south"],
            "sensor": list("abcde"),
        },
        name="heat",
    )


@each
def test_an_array_with_two_batch_dimensions(make, field):
    control, labels = from_xarray(field, make, channel="sensor", unit="D")
    assert isinstance(control, make)
    assert (control.batch_shape, control.channels) == ((2, 3), 5)
    assert control.knots[:4] == (0.0, 1.5, 3.0, 6.0)
    assert [name for name, _ in labels.batch] == ["site", "depth"]
    assert labels.batch[0][1].tolist() == ["north", "south"]
    assert labels.channels == tuple("abcde")
    ts = torch.tensor(control.knots[:4], dtype=torch.float64)
    back = to_xarray(ts, control(ts), labels, names=labels.channels)
    assert back.dims == ("time", "site", "depth", "unit")
    expected = field.transpose("time", "site", "depth", "sensor").rename(sensor="unit")
    np.testing.assert_array_equal(back.values, expected.values)
    for name in ("time", "site", "unit"):
        assert back.indexes[name].equals(expected.indexes[name])
    assert back.attrs == {"long_name": "state", "units": "1"}
    assert back.time.attrs["long_name"] == "time"
    table = to_pandas(ts, control(ts), labels, names=labels.channels)
    day = pd.Timestamp("2020-01-04")
    assert table.loc[("south", 2, day), "d"] == field.sel(site="south", time=day)[2, 3].item()


def test_one_channel_and_integers():
    array = xr.DataArray(np.arange(6).reshape(3, 2), dims=("time", "cell"), coords={"time": [0.0, 0.5, 3.0]})
    control, labels = from_xarray(array)
    assert (control.batch_shape, control.channels, labels.time) == ((2,), 1, None)
    assert control(0.6).tolist() == [[2.0], [3.0]]
    assert control(0.6).dtype == torch.float64
    assert from_xarray(array.astype("float32"))[0](0.6).dtype == torch.float32
    ts = torch.tensor([0.0, 1.0])
    back = to_xarray(ts, control(ts), labels)
    assert back.time.attrs == {"long_name": "time", "units": "units of tau"}
    assert back.dims == ("time", "cell", "unit")


def test_variables_of_a_dataset_are_channels(field):
    data = xr.Dataset(
        {"heat": field.isel(sensor=0, drop=True), "day": ("time", [1, 2, 3, 4])}, coords=field.coords
    )
    control, labels = from_xarray(data.drop_vars("sensor"), LinearInterpolation, unit="D")
    assert (control.batch_shape, control.channels) == ((2, 3), 2)
    assert labels.channels == ("heat", "day")
    torch.testing.assert_close(control(1.5)[..., 1], torch.full((2, 3), 2.0, dtype=torch.float64))
    np.testing.assert_array_equal(control(1.5)[..., 0], field.isel(time=1, sensor=0).values)


def test_missing_values_of_an_array_are_missing(field):
    field = field.where((field.time != field.time[1]) | (field.site != "south"))
    control, _ = from_xarray(field, LinearInterpolation, channel="sensor", unit="D")
    middle = 0.5 * (field.isel(time=0) + field.isel(time=2))
    np.testing.assert_allclose(control(1.5)[1], middle.values[1], rtol=1e-14)
    np.testing.assert_allclose(control(1.5)[0], field.isel(time=1).values[0], rtol=1e-14)


def test_times_of_each_sample_go_there_and_back(patients, tmp_path):
    control, labels = from_pandas(patients.dropna(), LinearInterpolation, time="time", by="patient", unit="D")
    ts = control.sample_knots
    hs = control(ts)
    ts = torch.where(torch.tensor([[True] * 3, [True] * 3]), ts, torch.nan)
    array = to_xarray(ts, hs, labels, names=labels.channels)
    assert array.dims == ("step", "patient", "unit")
    assert array.time.dims == ("step", "patient")
    again, other = from_xarray(array, LinearInterpolation, channel="unit", unit="D")
    assert torch.equal(again.sample_knots, control.sample_knots)
    assert torch.equal(again(ts), hs)
    assert other.time == labels.time
    padded = array.where(array.patient != "c").copy()
    padded["time"] = array.time.where((array.patient != "a") | (array.step == 0))
    held, _ = from_xarray(
        padded.sel(patient=["b", "a"]), LinearInterpolation, channel="unit", unit="D", extrapolate="hold"
    )
    assert held([[9.0, 9.0]]).flatten().tolist() == [61.0, 70.0]
    array.to_netcdf(tmp_path / "states.nc", engine="h5netcdf")
    with xr.open_dataarray(tmp_path / "states.nc", engine="h5netcdf") as stored:
        xr.testing.assert_allclose(stored, array)


def test_a_time_zone_is_said_in_words(weather):
    _, labels = from_pandas(weather, unit="h")
    array = to_xarray(torch.tensor([0.0, 1.0]), torch.zeros(2, 1), labels)
    assert (
        array.time.values.tolist()
        == pd.DatetimeIndex(["2021-03-27 23:10", "2021-03-28 00:10"]).as_unit("ns").asi8.tolist()
    )
    assert array.time.attrs["time_zone"] == "Europe/Berlin"
    assert "units" not in array.time.attrs
    _, labels = from_pandas(weather.set_axis(weather.index - weather.index[0]), unit="h")
    assert to_xarray(torch.tensor([1.5]), torch.zeros(1, 1), labels).time.values[0] == np.timedelta64(90, "m")


def test_arrays_that_are_refused(field):
    with pytest.raises(
        ValueError, match=r"time is 'date' and the coordinates are \['time', 'site', 'sensor'\]"
    ):
        from_xarray(field, time="date")
    with pytest.raises(
        ValueError, match=r"channel is 'unit' and the dimensions are \('site', 'time', 'depth', 'sensor'\)"
    ):
        from_xarray(field, channel="unit")
    with pytest.raises(ValueError, match="channel is 'sensor' and array a Dataset"):
        from_xarray(field.to_dataset(), channel="sensor")
    with pytest.raises(ValueError, match="Dataset without variables"):
        from_xarray(field.to_dataset().drop_vars("heat"))
    with pytest.raises(TypeError, match="variable 'heat' has dtype <U"):
        from_xarray(field.astype(str), channel="sensor")
    with pytest.raises(ValueError, match=r"the coordinate 'sensor' has dimensions \('sensor',\)"):
        from_xarray(field, time="sensor", channel="sensor")
    with pytest.raises(ValueError, match=r"ts\[1\] = 0\.0 does not exceed"):
        from_xarray(field.isel(time=[0, 0, 1, 2]), channel="sensor")
    with pytest.raises(TypeError, match="times have dtype"):
        from_xarray(field, time="site", channel="sensor")
