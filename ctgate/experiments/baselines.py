"""What a forecast has to beat, from the same observations: a linear autoregression."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ctgate.tasks.co2 import hold


def lagged(
    observed: Float[Tensor, "time thinning"], lags: Sequence[int]
) -> Float[Tensor, "time thinning lag"]:
    """The record at each lag [rows] as far as it is known at each time.

    Between two observations that have been made it is their linear interpolation, after the last one it is
    held; NaN where the lag reaches back before the first row.
    """
    time, thinnings = observed.shape
    held, age = hold(observed)
    rows = torch.arange(time, dtype=observed.dtype, device=observed.device)
    values = observed.new_full((time, thinnings, len(lags)), torch.nan)
    for column in range(thinnings):
        seen = (~observed[:, column].isnan()).nonzero()[:, 0]
        between = _interpolate(rows, rows[seen], observed[seen, column])
        for number, lag in enumerate(lags):
            known = age[lag:, column] <= lag
            values[lag:, column, number] = torch.where(known, between[: time - lag], held[lag:, column])
    return values


class LinearAutoregression:
    r"""The change that a linear function of the past forecasts,

    .. math:: \hat y(s) = a + b\,\mathrm{age}(s) + \sum_j w_j\,(x(s - \ell_j) - x_{\mathrm{held}}(s)),

    with :math:`x` interpolated between the observations made until :math:`s` and the coefficients by least
    squares. The age of the last observation is among its inputs because a network that it is compared with
    sees it too.

    Parameters:
        lags: positive lags [rows].

    Raises:
        ValueError: no lags, or one that is not positive.
    """

    def __init__(self, lags: Sequence[int]) -> None:
        if not lags or min(lags) < 1:
            raise ValueError(f"lags is {list(lags)}; it must be positive integers")
        self.lags = tuple(lags)
        self.coefficients: Tensor | None = None

    def _design(self, observed: Tensor) -> Tensor:
        held, age = hold(observed)
        past = lagged(observed, self.lags) - held[..., None]
        return torch.cat([past, age[..., None], torch.ones_like(age)[..., None]], -1)

    def fit(
        self,
        observed: Float[Tensor, "time thinning"],
        change: Float[Tensor, "time thinning"],
        rows: Bool[Tensor, " time"],
    ) -> "LinearAutoregression":
        """Least squares over ``rows``, where the change and every lag exist.

        Raises:
            ValueError: fewer of them than coefficients.
        """
        design = self._design(observed)
        usable = rows[:, None] & ~change.isnan() & ~design.isnan().any(-1)
        if int(usable.sum()) < design.shape[-1]:
            raise ValueError(
                f"rows leaves {int(usable.sum())} cases for {design.shape[-1]} coefficients; "
                "it must leave more cases"
            )
        # gelsd is on the CPU only, and right where a column is zero (an age that never grows); the default,
        # gelsy, is not.
        cases, targets = design[usable].cpu(), change[usable][:, None].cpu()
        solution = torch.linalg.lstsq(cases, targets, driver="gelsd").solution[:, 0]
        self.coefficients = solution.to(design.device)
        return self

    def predict(self, observed: Float[Tensor, "time thinning"]) -> Float[Tensor, "time thinning"]:
        """The change forecast at every time; NaN where a lag reaches back before the first row.

        Raises:
            RuntimeError: before :meth:`fit`.
        """
        if self.coefficients is None:
            raise RuntimeError("this autoregression has no coefficients yet; call fit first")
        return self._design(observed) @ self.coefficients


def _interpolate(at: Tensor, times: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation, constant after the last time."""
    right = torch.searchsorted(times, at).clamp(1, max(len(times) - 1, 1))
    if len(times) == 1:
        return values.expand(len(at))
    left = right - 1
    weight = ((at - times[left]) / (times[right] - times[left])).clamp(0.0, 1.0)
    return torch.lerp(values[left], values[right], weight)
