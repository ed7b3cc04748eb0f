"""What transport is asked for: lags, and orders of the coupling."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ctgate.controls.times import as_float64

Order = Literal["leak", "first", "exact"]
ORDERS: tuple[str, ...] = get_args(Order)
Lags = Sequence[float] | Tensor | np.ndarray[Any, np.dtype[Any]]


def check_order(order: object, what: str) -> None:
    """Raise ValueError unless ``order`` is one."""
    if order not in ORDERS:
        raise ValueError(f"{what}(order=...): order is {order!r}; it must be one of {list(ORDERS)}")


def check_lags(lags: Lags, discrete: bool, what: str, device: torch.device | None = None) -> Tensor:
    """Lags (lag,): numbers of steps, int64, of a map, times, float64, of a flow.

    Raises: ValueError unless they increase from 0 or more, in whole steps of a map; TypeError for what are no
    real numbers.
    """
    name = f"{what}(lags=...): lags"
    values = as_float64(lags, name)[0].detach().to(device)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; it must be (lag,), with one lag at least")
    increasing = bool((values.diff() > 0.0).all()) and bool((values >= 0.0).all())
    if not increasing or not bool(values.isfinite().all()):
        raise ValueError(f"{name} is {values.tolist()}; lags must be finite, not negative, and increase")
    if not discrete:
        return values
    if bool((values != values.round()).any()):
        raise ValueError(f"{name} is {values.tolist()}; lags of a map (Euler) are whole numbers of steps")
    return values.to(torch.int64)
