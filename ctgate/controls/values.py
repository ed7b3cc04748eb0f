"""Values: shapes that fit the times, nothing infinite, and something observed in every entry."""

from torch import Tensor

from ctgate.controls.missing import rows_at
from ctgate.controls.times import first_index, label


def check_shapes(name: str, ts: Tensor, xs: Tensor, batch_first: bool) -> None:
    """Raise unless ``xs`` is (time, *batch, channel) and ``ts`` (time,) or (time, *batch) with any time."""
    layout, per_sample = "(time, *batch, channel)", "(time, *batch)"
    if batch_first:
        layout, per_sample = "(*batch, time, channel)", "(*batch, time)"
    if not xs.is_floating_point():
        raise TypeError(f"{name}: xs has dtype {xs.dtype}; it must be floating point")
    if xs.ndim < 2:
        raise ValueError(
            f"{name}: xs has shape {tuple(xs.shape)}; it must be {layout}: a lone channel is xs[:, None]"
        )
    batch = xs.shape[:-2] if batch_first else xs.shape[1:-1]
    own = ts.shape[:-1] if batch_first else ts.shape[1:]
    if ts.ndim == 0 or (ts.ndim > 1 and own != batch):
        raise ValueError(
            f"{name}: ts has shape {tuple(ts.shape)} and xs, read as {layout}, {tuple(xs.shape)}; ts must be "
            f"(time,), or per sample {per_sample} with batch {tuple(batch)}"
        )
    if 0 in (xs.shape[-2 if batch_first else 0], ts.shape[-1 if batch_first else 0]):
        raise ValueError(
            f"{name}: ts has shape {tuple(ts.shape)} and xs {tuple(xs.shape)}; there must be a time"
        )


def wrong_length(name: str, times: int, values: int, needed: str, batch_first: bool) -> ValueError:
    """What to raise when the numbers of times and values do not fit."""
    layout = "(*batch, time, channel)" if batch_first else "(time, *batch, channel)"
    hint = "" if batch_first else "; batch_first=True takes (*batch, time, channel)"
    return ValueError(
        f"{name}: ts has {times} times and xs, read as {layout}, {values}; there must be {needed}{hint}"
    )


def check_finite(name: str, xs: Tensor, real: Tensor, batch_first: bool) -> None:
    """Raise ValueError for an infinite value where it is ``real``, not padding."""
    place = first_index(xs.isinf() & real)
    if place is not None:
        raise ValueError(
            f"{name}: xs{label(place, batch_first, 1)} is {xs[tuple(place)].item()}; values must be finite, "
            "or NaN where missing"
        )


def check_observed(name: str, observed: Tensor, last: Tensor, ts: Tensor, ends: tuple[int, ...]) -> None:
    """Raise ValueError when an entry has no value at all, or none at one of the ``ends`` (0, -1).

    ``last`` (*batch) is the row at which a sample ends, or one for all.
    """
    empty = first_index(~observed.any(0))
    if empty is not None:
        raise ValueError(
            f"{name}: {_entry(empty)} has no value at all, every one is NaN; leave it out or fill it in"
        )
    for end in ends:
        row = rows_at(last.reshape(1, *last.shape, *(1,) * (observed.ndim - 1 - last.ndim)), observed)[0]
        entry = first_index(~(row if end else observed[0]))
        if entry is None:
            continue
        rank = int(observed.movedim(0, -1)[tuple(entry)].nonzero()[end])
        time = float(ts[rank] if ts.ndim == 1 else ts[(rank, *entry[:-1])])
        where = f"{'after' if end else 'before'} time index {rank} (t = {time})"
        raise ValueError(
            f"{name}: {_entry(entry)} is NaN {where} and has nothing to be read from there; fill it in, or "
            'construct with extrapolate="hold"'
        )


def _entry(entry: list[int]) -> str:
    *sample, channel = entry
    return f"channel {channel} of xs" + (f", sample {tuple(sample)}," if sample else "")
