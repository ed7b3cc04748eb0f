"""pandas: rows at irregular times into a control, and a solution into a table."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ctgate.adapters.labels import Labels, batch_labels, read_times
from ctgate.adapters.sequences import checked_kind, to_sequences
from ctgate.controls import Control, ZeroOrderHold


def from_pandas(
    frame: pd.DataFrame | pd.Series,
    kind: type[Control] = ZeroOrderHold,
    *,
    time: Hashable = None,
    by: Hashable = None,
    unit: str | pd.Timedelta = "s",
    origin: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> tuple[Control, Labels]:
    """A control from a table with one row per time, and the labels that lead back.

    Parameters
    ----------
    frame: numeric columns are channels, NaN (or NA) is a missing value; a Series is one channel.
    kind: :class:`ctgate.ZeroOrderHold` (rows are left edges), ``LinearInterpolation`` or ``CubicHermite``.
    time: column or index level with the times; None for the index. Datetimes, with or without a time zone,
        timedeltas, or numbers in the units of tau.
    by: column or index level whose groups are samples, in the order in which they appear; each has times of
        its own, and the rows of a group need not be next to each other. None for a single sample.
    unit, origin: of the :class:`ctgate.TimeAxis` that turns datetimes into numbers; ``origin=None`` is the
        earliest time of all. Numbers are taken as they are.
    dtype, device: of the values; float64 if not given, but float32 where every column is.
    options: ``extrapolate="hold"``.

    Returns ``(control, labels)``: the control has batch shape ``()``, or ``(group,)`` with ``by``;
    ``labels.time``, ``labels.batch`` and ``labels.channels`` say what its tensors mean, and
    :func:`to_pandas` takes them.

    Raises: TypeError or ValueError naming the column, or the row whose time is missing, repeated or earlier
    than that of the row before, and what the control itself refuses.
    """
    make = checked_kind(kind, options)
    table = frame.to_frame() if isinstance(frame, pd.Series) else frame
    index, used = _times_of(table, time, by)
    groups, column = (None, None) if by is None else _named(table, by, "by")
    keep = [k for k in range(table.shape[1]) if k not in (used, column)]
    values = _numeric(table.iloc[:, keep])
    channels = tuple(table.columns[keep])
    numbers, axis = read_times(index, unit, origin)
    codes, keys = _codes(groups, len(table))
    order = np.argsort(codes, kind="stable")
    _check_order(index, numbers, codes, order, keys)
    if keys is None:
        ts, xs = numbers, values
    else:
        counts = np.bincount(codes, minlength=len(keys))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        floating = numbers.dtype if numbers.dtype.kind == "f" else np.float64
        ts = np.full((counts.max(), len(keys)), np.nan, dtype=floating)
        xs = np.full((*ts.shape, len(keep)), np.nan, dtype=values.dtype)
        ts[rank, codes], xs[rank, codes] = numbers, values
    control = make(ts, torch.tensor(xs, dtype=dtype, device=device), **options)
    return control, Labels(axis, () if keys is None else ((by, keys),), channels)


def to_pandas(
    ts: Tensor, hs: Tensor, labels: Labels | None = None, names: Sequence[Hashable] | None = None
) -> pd.DataFrame:
    """A solution as a table: one row per time, one column per component of the state.

    ``ts`` is ``(time,)`` or ``(time, *batch)`` and ``hs`` ``(time, *batch, state)``, such as ``sol.ts`` and
    ``sol.hs``. The index is the time, in batches a MultiIndex (sample, time) in which each sample has its own
    rows alone, without padding. ``labels``, from :func:`from_pandas` or :func:`from_xarray`, gives datetimes
    and the names of samples; ``names`` are those of the columns.

    Raises: ValueError for shapes or numbers of names that do not fit.
    """
    labels = labels or Labels()
    sequences = to_sequences(ts.detach().cpu(), hs.detach().cpu())
    columns = check_names(names, hs.shape[-1])
    batch = batch_labels(labels, tuple(hs.shape[1:-1]))
    counts = [len(times) for times, _ in sequences]
    if sequences:
        numbers, values = (torch.cat(parts).numpy() for parts in zip(*sequences, strict=True))
    else:
        numbers, values = ts.new_empty(0).cpu().numpy(), hs.new_empty(0, hs.shape[-1]).cpu().numpy()
    index = pd.Index(numbers) if labels.time is None else labels.time.to_datetimes(numbers)
    if batch:
        places = np.unravel_index(np.repeat(np.arange(len(counts)), counts), hs.shape[1:-1])
        levels = [own.take(place) for (_, own), place in zip(batch, places, strict=True)]
        index = pd.MultiIndex.from_arrays([*levels, index], names=[*(name for name, _ in batch), "time"])
    else:
        index = index.rename("time")
    return pd.DataFrame(values, index=index, columns=columns)


def check_names(names: Sequence[Hashable] | None, size: int) -> pd.Index:
    """The names of the state's components, their numbers if there are none."""
    columns = pd.RangeIndex(size) if names is None else pd.Index(list(names))
    if len(columns) != size:
        raise ValueError(f"names has {len(columns)} names and hs {size} components; they must be as many")
    return columns


def _times_of(table: pd.DataFrame, time: Hashable, by: Hashable) -> tuple[pd.Index, int | None]:
    """The times, and the number of the column that they are."""
    if time is not None:
        return _named(table, time, "time")
    levels = [name for name in table.index.names if by is None or name != by]
    if table.index.nlevels > 1 and len(levels) == 1:
        return table.index.get_level_values(levels[0]), None
    if len(levels) != 1 or table.index.nlevels > 1:
        raise ValueError(
            f"time is None, by is {by!r} and the index has the levels {list(table.index.names)}; one level "
            "must be left for the times, or time must name them"
        )
    return table.index, None


def _named(table: pd.DataFrame, name: Hashable, what: str) -> tuple[pd.Index, int | None]:
    """A column or an index level, and the number of the column."""
    columns = np.flatnonzero(table.columns == name)
    levels = [k for k, level in enumerate(table.index.names) if level is not None and level == name]
    if len(columns) + len(levels) != 1:
        raise ValueError(
            f"{what} is {name!r}, the name of {len(columns)} columns and {len(levels)} index levels; it must "
            f"be one of the columns {list(table.columns)} or of the index levels {list(table.index.names)}"
        )
    if levels:
        return table.index.get_level_values(levels[0]), None
    return pd.Index(table.iloc[:, columns[0]]), int(columns[0])


def _numeric(table: pd.DataFrame) -> np.ndarray[Any, np.dtype[Any]]:
    """The columns as (row, column), NaN where missing."""
    for name, dtype in zip(table.columns, table.dtypes, strict=True):
        if not pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_complex_dtype(dtype):
            raise TypeError(f"column {name!r} has dtype {dtype}; channels must be real numbers")
    if table.shape[1] == 0:
        raise ValueError("frame has no column left for a channel; there must be one")
    low = all(dtype == np.float32 for dtype in table.dtypes)
    values: np.ndarray[Any, np.dtype[Any]] = table.to_numpy(
        dtype=np.float32 if low else np.float64, na_value=np.nan
    )
    return values


def _codes(groups: pd.Index | None, rows: int) -> tuple[np.ndarray[Any, np.dtype[np.intp]], pd.Index | None]:
    """The number of each row's sample, and the samples' labels."""
    if groups is None:
        return np.zeros(rows, dtype=np.intp), None
    codes, keys = pd.factorize(groups)
    if (codes < 0).any():
        raise ValueError(f"row {np.flatnonzero(codes < 0)[0]} has no group: by has a missing value there")
    return codes, pd.Index(keys)


def _check_order(
    index: pd.Index,
    numbers: np.ndarray[Any, np.dtype[Any]],
    codes: np.ndarray[Any, np.dtype[np.intp]],
    order: np.ndarray[Any, np.dtype[np.intp]],
    keys: pd.Index | None,
) -> None:
    """Raise ValueError unless the times of each sample increase."""
    missing = np.flatnonzero(np.asarray(index.isna()))
    if len(missing):
        raise ValueError(f"row {missing[0]} has no time: it is {index[missing[0]]}")
    same = codes[order][1:] == codes[order][:-1]
    # Datetimes are compared as they are: two that differ may be one number.
    late = np.flatnonzero(same & np.asarray(index[order][1:] <= index[order][:-1]))
    if len(late):
        before, row = order[late[0]], order[late[0] + 1]
        what = "repeats the time of" if index[row] == index[before] else "is earlier than"
        whose = "" if keys is None else f" of sample {keys[codes[row]]!r}"
        raise ValueError(
            f"row {row} ({index[row]}){whose} {what} row {before} ({index[before]}); times must increase: "
            "sort them with sort_index() or sort_values(), and aggregate rows of one time"
        )
