"""What numbers forget: which date a time is, and what samples and channels are called."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

# The integer that pandas and numpy read as "not a time".
_NAT = np.iinfo(np.int64).min


@dataclasses.dataclass(frozen=True)
class TimeAxis:
    r"""The calendar of a time axis, :math:`t = (\text{datetime} - \text{origin}) / \text{unit}`.

    Parameters
    ----------
    origin: where t is 0, a ``pandas.Timestamp``, with or without a time zone, or, for an axis of durations, a
        ``pandas.Timedelta``; anything that ``pandas.Timestamp`` reads. Its time zone is that of the datetimes
        that come back.
    unit: what t = 1 means: a pandas unit of fixed length such as ``"s"``, ``"min"``, ``"h"`` or ``"D"``, or a
        ``pandas.Timedelta`` > 0. It is the unit of tau too.

    t is float64 and datetimes count nanoseconds. There and back is exact to the nanosecond up to
    :math:`2^{51}` ns = 26 days from the origin in any unit, and for whole numbers of units at any distance;
    further out a time moves by at most :math:`2^{-52} |t|` units (0.5 microseconds in 70 years): round what
    comes back, ``axis.to_datetimes(ts).round("ms")``.

    Raises: TypeError or ValueError for an origin that is no time or a unit that has no fixed length.
    """

    origin: Any
    unit: str | pd.Timedelta = "s"

    def __post_init__(self) -> None:
        if not isinstance(self.origin, pd.Timedelta):
            try:
                object.__setattr__(self, "origin", pd.Timestamp(self.origin))
            except (TypeError, ValueError) as error:
                raise TypeError(f"origin is {self.origin!r}; it must be a datetime or a Timedelta") from error
        if pd.isna(self.origin):
            raise ValueError(f"origin is {self.origin}; it must be a time")
        if self._size <= 0:
            raise ValueError(f"unit is {self.unit!r}; it must be a length of time > 0")

    def to_numbers(self, datetimes: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Datetimes (or durations, where the origin is one) as numbers ``(time,)`` float64; NaT becomes NaN.

        Raises: TypeError for what is no datetime, for datetimes without a time zone where the origin has one,
        and the other way round; ValueError beyond 292 years from the origin.
        """
        index = pd.Index(datetimes)
        wanted = pd.TimedeltaIndex if isinstance(self.origin, pd.Timedelta) else pd.DatetimeIndex
        if not isinstance(index, wanted):
            try:
                index = wanted(index)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"times are {index.dtype}; an axis whose origin is {self.origin} takes "
                    f"{'durations' if wanted is pd.TimedeltaIndex else 'datetimes'}"
                ) from error
        zone, own = getattr(index, "tz", None), getattr(self.origin, "tz", None)
        if (zone is None) != (own is None):
            raise TypeError(
                f"times have {f'the time zone {zone}' if zone else 'no time zone'} and the origin "
                f"{self.origin} has {f'{own}' if own else 'none'}; give both a time zone, or neither"
            )
        known = ~index.isna()
        nanoseconds = index.as_unit("ns").asi8[known]
        self._check_range(nanoseconds.astype(np.float64) - self._start)
        whole, rest = np.divmod(nanoseconds - self._start, self._size)
        numbers = np.full(len(index), np.nan)
        # The two parts are exact, and only their sum is rounded.
        numbers[known] = whole + rest / self._size
        return numbers

    def to_datetimes(self, ts: Any) -> pd.DatetimeIndex | pd.TimedeltaIndex:
        """Numbers ``(time,)`` as datetimes in the origin's time zone, or as durations; NaN becomes NaT.

        Raises: ValueError for ``ts`` of another shape, or beyond what nanoseconds can count.
        """
        numbers = _array(ts)
        if numbers.ndim != 1:
            raise ValueError(f"ts has shape {numbers.shape}; it must be (time,)")
        nanoseconds = self.nanoseconds(numbers)
        if isinstance(self.origin, pd.Timedelta):
            return pd.TimedeltaIndex(nanoseconds.view("m8[ns]"))
        index = pd.DatetimeIndex(nanoseconds.view("M8[ns]"))
        return index if self.origin.tz is None else index.tz_localize("UTC").tz_convert(self.origin.tz)

    def nanoseconds(self, ts: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Numbers of any shape as nanoseconds since 1970, UTC, or of duration, as pandas counts them."""
        numbers = _array(ts)
        known = np.isfinite(numbers)
        real = np.where(known, numbers, 0.0)
        self._check_range(real * self._size, real * self._size + self._start)
        whole = np.floor(real)
        rest = np.rint((real - whole) * self._size).astype(np.int64)
        return np.where(known, self._start + whole.astype(np.int64) * self._size + rest, _NAT)

    @property
    def _size(self) -> int:
        try:
            unit = self.unit if isinstance(self.unit, pd.Timedelta) else pd.Timedelta(1, unit=self.unit)
            return int(unit.as_unit("ns").value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"unit is {self.unit!r}; it must be a unit of fixed length such as 's', 'h' or 'D', or a "
                "Timedelta"
            ) from error

    @property
    def _start(self) -> int:
        return int(self.origin.as_unit("ns").value)

    def _check_range(self, *nanoseconds: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        if any((np.abs(part) >= 2.0**63).any() for part in nanoseconds):
            raise ValueError(
                f"a time lies more than 292 years from the origin {self.origin} or from 1970, which is what "
                "nanoseconds can count"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """What the tensors of a control came from, to label what comes back.

    Attributes
    ----------
    time: the calendar; None when times were numbers.
    batch: name and labels of each batch dimension, in order.
    channels: names of the channels.
    """

    time: TimeAxis | None = None
    batch: tuple[tuple[Hashable, pd.Index], ...] = ()
    channels: tuple[Hashable, ...] = ()


def batch_labels(labels: Labels, shape: tuple[int, ...]) -> tuple[tuple[Hashable, pd.Index], ...]:
    """Name and labels of the batch dimensions of a result, numbered where ``labels`` says nothing."""
    if not labels.batch:
        names = ["sample"] if len(shape) == 1 else [f"sample_{k}" for k in range(len(shape))]
        return tuple((name, pd.RangeIndex(size)) for name, size in zip(names, shape, strict=True))
    sizes = tuple(len(own) for _, own in labels.batch)
    if sizes != shape:
        raise ValueError(f"labels has {sizes} samples and hs {shape}; they must be as many")
    return labels.batch


def read_times(
    times: pd.Index, unit: str | pd.Timedelta, origin: Any
) -> tuple[np.ndarray[Any, np.dtype[Any]], TimeAxis | None]:
    """Times as numbers and their calendar, which starts at the earliest one unless ``origin`` is given."""
    if times.isna().all():
        raise ValueError(f"there are {len(times)} times, all of them missing; there must be one")
    if isinstance(times, (pd.DatetimeIndex, pd.TimedeltaIndex)):
        axis = TimeAxis(times.min() if origin is None else origin, unit)
        return axis.to_numbers(times), axis
    if times.dtype.kind not in "iuf":
        raise TypeError(
            f"times have dtype {times.dtype}; they must be datetimes, timedeltas or numbers: "
            "pandas.to_datetime reads strings"
        )
    if origin is not None:
        raise ValueError(f"origin is {origin!r} and times are numbers, which have no calendar; leave it out")
    return times.to_numpy(copy=True), None


def _array(ts: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(ts.detach().cpu() if isinstance(ts, Tensor) else ts, dtype=np.float64)
