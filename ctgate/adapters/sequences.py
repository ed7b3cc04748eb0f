"""Lists of sequences of different lengths into one control, and a padded solution into a list."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ctgate.controls import Control, ZeroOrderHold
from ctgate.controls.sampled import SampledControl


def from_sequences(
    times: Sequence[Any],
    values: Sequence[Any],
    kind: type[Control] = ZeroOrderHold,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Control:
    """One control with per-sample times from sequences of different lengths.

    Parameters
    ----------
    times: for each sample its times ``(time,)``, in the units of tau; tensors, arrays or lists.
    values: for each sample ``(time, channel)``, NaN where missing.
    kind: :class:`ctgate.ZeroOrderHold`, ``LinearInterpolation`` or ``CubicHermite``; a zero-order hold takes
        one time more than values (edges) from every sample, or as many (left edges).
    dtype, device: of the values; those of ``values`` if not given.
    options: ``extrapolate="hold"``.

    Sample k is ``control`` at batch index k; shorter ones are padded with NaN. Gradients reach the tensors in
    ``times`` and in ``values``.

    Raises: TypeError or ValueError that names the sample, and what the control itself refuses.
    """
    make = checked_kind(kind, options)
    if len(times) != len(values) or len(values) == 0:
        raise ValueError(
            f"times has {len(times)} sequences and values {len(values)}; they must be as many, at least one"
        )
    xs = _alike([_values(part).to(dtype=dtype, device=device) for part in values])
    ts = _alike([_times(part, k).to(xs[0].device) for k, part in enumerate(times)])
    edges = len(ts[0]) - len(xs[0]) if ts[0].ndim == 1 and xs[0].ndim == 2 else 0
    allowed = (0, 1) if kind is ZeroOrderHold else (0,)
    for k, (own, rows) in enumerate(zip(ts, xs, strict=True)):
        if own.ndim != 1 or rows.ndim != 2:
            raise ValueError(
                f"sample {k} has times {tuple(own.shape)} and values {tuple(rows.shape)}; they must be "
                "(time,) and (time, channel): a lone channel is x[:, None]"
            )
        if len(own) - len(rows) != edges or edges not in allowed:
            needed = "as many of both"
            if kind is ZeroOrderHold:
                needed += ", or in every sample one time more, the last edge"
            raise ValueError(
                f"sample {k} has {len(own)} times and {len(rows)} values; there must be {needed}"
            )
        if rows.shape[1] != xs[0].shape[1]:
            raise ValueError(
                f"sample {k} has {rows.shape[1]} channels and sample 0 {xs[0].shape[1]}; they must be as many"
            )
        bad = own.detach().isnan()
        if bad.any():
            raise ValueError(f"times of sample {k} are nan at {int(bad.nonzero()[0])}; leave such rows out")
    padded = (pad_sequence(parts, padding_value=torch.nan) for parts in (ts, xs))
    return make(*padded, **options)


def to_sequences(ts: Tensor, hs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The samples of a solution without padding: for each times ``(time,)`` and values ``(time, state)``.

    ``ts`` is ``(time,)`` or ``(time, *batch)``, ``hs`` ``(time, *batch, state)``. Padding is what has no time
    (NaN), or repeats a sample's last time, as in a :class:`ctgate.Solution`. Samples come in the order of the
    flattened batch. Gradients pass.

    Raises: ValueError for shapes that do not fit.
    """
    check_solution(ts, hs)
    count = math.prod(hs.shape[1:-1])
    states = hs.reshape(len(hs), count, hs.shape[-1]).unbind(1)
    own = ts.reshape(len(ts), count).unbind(1) if ts.ndim == hs.ndim - 1 else (ts,) * count
    return [(t[rows], h[rows]) for t, h in zip(own, states, strict=True) for rows in [_rows(t.detach())]]


def _rows(t: Tensor) -> Tensor:
    """The rows of a sample: those with a time, the last one once."""
    rows = (~t.isnan()).nonzero()[:, 0]
    known = t[rows]
    return rows[: 1 + int((known < known[-1]).sum())] if len(rows) else rows


def check_solution(ts: Tensor, hs: Tensor) -> None:
    """Raise ValueError unless the shapes are those of a solution."""
    if hs.ndim < 2 or ts.shape not in (hs.shape[:1], hs.shape[:-1]):
        raise ValueError(
            f"ts has shape {tuple(ts.shape)} and hs {tuple(hs.shape)}; they must be (time,) or "
            "(time, *batch), and (time, *batch, state)"
        )


def checked_kind(kind: object, options: dict[str, Any]) -> type[SampledControl]:
    """``kind``; TypeError unless it is a control of samples and its options leave the layout alone."""
    if not (isinstance(kind, type) and issubclass(kind, SampledControl)):
        raise TypeError(
            f"kind is {kind!r}; it must be ct.ZeroOrderHold, ct.LinearInterpolation or ct.CubicHermite"
        )
    if "batch_first" in options:
        raise TypeError("batch_first is no option here: the layout is that of the data")
    return kind


def _values(part: Any) -> Tensor:
    # An array is copied: a tensor that shares memory with one that must not be written to warns.
    return part if isinstance(part, Tensor) else torch.tensor(part)


def _times(part: Any, k: int) -> Tensor:
    """Times in the precision in which they came, integers in float64."""
    if isinstance(part, Tensor):
        return part if part.is_floating_point() else part.to(torch.float64)
    array = np.asarray(part)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"times of sample {k} have dtype {array.dtype}; they must be real numbers")
    return torch.tensor(array, dtype=None if array.dtype.kind == "f" else torch.float64)


def _alike(parts: list[Tensor]) -> list[Tensor]:
    """The tensors in the one dtype that holds them all."""
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    return [part.to(dtype) for part in parts]
