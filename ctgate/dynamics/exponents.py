"""What growth over time says: exponents, their errors, dimension and entropy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Growth:
    """What tangents grew by in successive stretches of time.

    Attributes:
        times: the ends of the stretches and the start in front, (stretch + 1,) [time].
        logs: growth of each tangent beyond that of those before it, (stretch, sample, index), nats; NaN from
            where a sample was lost.
        volumes: what the whole volume grew by, (stretch, sample), found without the tangents; None if not.
    """

    times: Floats
    logs: Floats
    volumes: Floats | None

    @property
    def history(self) -> Floats:
        """The mean so far [1/time], (stretch, sample, index)."""
        mean: Floats = np.cumsum(self.logs, 0) / (self.times[1:] - self.times[0])[:, None, None]
        return mean

    @property
    def measured(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The number of good stretches of each sample, (sample,)."""
        count: np.ndarray[Any, np.dtype[np.int64]] = (~np.isnan(self.logs[..., 0])).sum(0)
        return count

    @property
    def exponents(self) -> Floats:
        """The mean over all good stretches [1/time], (sample, index); NaN where there is none."""
        return self._last(self.history)

    @property
    def volume_rate(self) -> Floats | None:
        """The mean growth of volumes over the same time [1/time], (sample,)."""
        if self.volumes is None:
            return None
        return self._last(np.cumsum(self.volumes, 0) / (self.times[1:] - self.times[0])[:, None])

    def _last(self, history: Floats) -> Floats:
        rows = np.concatenate([np.full((1, *history.shape[1:]), np.nan), history])
        last: Floats = rows[self.measured, np.arange(rows.shape[1])]
        return last

    def standard_error(self, blocks: int) -> Floats:
        r"""The error of the exponents [1/time], (sample, index), from means over ``blocks`` blocks of equal
        length: their deviation over the square root of their number. NaN for fewer than two.

        It is one where blocks are longer than what the growth rate remembers. That of a zero exponent is far
        smaller than the estimate: its growth is a difference between two ends.
        """
        sizes = np.diff(self.times)
        errors = np.full(self.logs.shape[1:], np.nan)
        for sample, count in enumerate(self.measured):
            parts = [part for part in np.array_split(np.arange(count), blocks) if len(part)]
            if len(parts) > 1:
                means = [self.logs[part, sample].sum(0) / sizes[part].sum() for part in parts]
                with np.errstate(invalid="ignore"):  # an exponent may be minus infinity
                    errors[sample] = np.std(means, 0, ddof=1) / len(parts) ** 0.5
        return errors


def kaplan_yorke(exponents: Sequence[float] | Floats, size: int) -> float:
    r"""The Kaplan-Yorke dimension,

    .. math:: D = j + \frac{\lambda_1 + \dots + \lambda_j}{|\lambda_{j+1}|},

    j the largest number for which the sum is not negative; 0 when all exponents are negative, ``size`` when
    the sum over all of that many is not. NaN where fewer are known and their sum is still not negative.

    Source: THEORY.md 23; J. Kaplan and J. Yorke, Lect. Notes Math. 730 (1979) 204.
    """
    ordered = np.sort(np.asarray(exponents, np.float64))[::-1]
    if np.isnan(ordered).any():
        return np.nan
    sums = np.cumsum(ordered)
    j = int(np.argmax(sums < 0.0)) if (sums < 0.0).any() else len(ordered)
    if j == len(ordered):
        return float(size) if j == size else np.nan
    return j + (float(sums[j - 1]) / abs(float(ordered[j])) if j else 0.0)


def entropy_rate(exponents: Sequence[float] | Floats, size: int) -> float:
    """The sum of the positive exponents [1/time], by Pesin's formula the entropy rate where the measure is
    smooth along unstable directions, and a bound from above elsewhere. NaN where fewer than ``size`` are
    known and all are positive.

    Source: THEORY.md 23; Ya. Pesin, Russ. Math. Surv. 32 (1977) 55; D. Ruelle, Bol. Soc. Bras. Mat. 9 (1978)
    83.
    """
    values = np.asarray(exponents, np.float64)
    if np.isnan(values).any() or (len(values) < size and bool((values > 0.0).all())):
        return np.nan
    return float(values[values > 0.0].sum())
