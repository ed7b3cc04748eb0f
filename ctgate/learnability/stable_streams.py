r"""Stable laws fitted to samples that are seen once, in chunks."""

from collections.abc import Hashable, Sequence
from typing import Any, final

import numpy as np

from ctgate.learnability.stable_ecf import characteristic_function, fit_characteristic
from ctgate.learnability.stable_fit import Array, Batch, Method, Samples, StableFit, as_samples, check_method
from ctgate.learnability.stable_quantiles import PROBABILITIES, fit_quantiles, rough_units, sample_quantiles

_QUARTILES = (0.25, 0.5, 0.75)
# Bins equally wide in arsinh of (x - location) / scale, up to e^22 / 2 scales.
_BINS, _REACH = 2**16, 22.0
# Samples that are taken in at once: they stay in cache, and are many against bins.
_PIECE = 2**16


@final
class StableStream:
    r"""Samples seen once, in a histogram: quantiles, the characteristic function and both fits come from it.

    65536 bins are equally wide in :math:`\operatorname{arsinh}((x - l)/s)`: 0.0007 s in the middle and 0.07 %
    of x in the tails, out to :math:`10^9 s`. Within a bin values are taken as equally spread; fits agree with
    those of :func:`fit_stable` to some :math:`10^{-4}` in alpha, whatever the order of samples. 512 KiB by
    batch member, however many samples.

    Parameters: ``location`` l and ``scale`` s > 0, (*batch,), both or neither; by default the median and the
        interquartile range over 1.95 of the first chunk, which should hold some hundred samples of each batch
        member. Streams that are to be merged share them.

    Attributes: ``n``, samples seen by batch member.

    Raises: ValueError for units that do not fit.

    Example::

        stream = StableStream()
        for chunk in chunks:  # (lag, sample)
            stream.update(chunk)
        stream.fit("ecf").alpha  # (lag,)

    Source: THEORY.md 26.
    """

    def __init__(self, location: Array | None = None, scale: Array | None = None) -> None:
        self._units: tuple[Array, Array] | None = None
        if (location is None) != (scale is None):
            raise ValueError("StableStream: give location and scale, or neither")
        if location is not None and scale is not None:
            units = np.asarray(location, np.float64), np.asarray(scale, np.float64)
            if units[0].shape != units[1].shape:
                raise ValueError(
                    f"StableStream: location has shape {units[0].shape} and scale {units[1].shape}; both "
                    "must be (*batch,)"
                )
            if not (np.isfinite(units).all() and bool((units[1] > 0.0).all())):
                raise ValueError("StableStream: location and scale must be finite, and scale above 0")
            self._units = units
        self._counts: np.ndarray[Any, np.dtype[np.int64]] | None = None
        self._finite: np.ndarray[Any, np.dtype[np.bool_]] = np.ones(0, np.bool_)
        self._batch = Batch(())
        self.n = 0

    @property
    def units(self) -> tuple[Array, Array]:
        """Location and scale (*batch,), for streams that are to be merged with this one.

        Raises: ValueError before the first chunk, where none were given.
        """
        if self._units is None:
            raise ValueError("StableStream: there are no units before the first chunk; call update first")
        return self._units

    def update(self, x: Samples, *, dim: Hashable = "sample") -> "StableStream":
        """Take in a chunk (*batch, sample) of at least 20 samples, and return the stream.

        A batch member that holds a value that is not finite takes in no more, and will have no fit.

        Raises: TypeError, ValueError as :func:`fit_stable`, and for another batch shape.
        """
        values, batch = as_samples(x, dim, "StableStream.update")
        if self._units is None:
            location, scale = rough_units(sample_quantiles(values, _QUARTILES))
            self._units = location.reshape(batch.shape), scale.reshape(batch.shape)
        if batch.shape != self._units[0].shape:
            raise ValueError(
                f"StableStream.update: the batch is {batch.shape}; it must be {self._units[0].shape}"
            )
        if self._counts is None:
            self._batch = batch
            self._counts = np.zeros((len(values), _BINS), np.int64)
            self._finite = np.ones(len(values), np.bool_)
        self._finite &= np.isfinite(values).all(-1)
        shift, unit = (value.ravel().tolist() for value in self._units)
        for index in np.flatnonzero(self._finite):
            for start in range(0, values.shape[-1], _PIECE):
                piece = values[index, start : start + _PIECE]
                piece = piece.astype(np.promote_types(piece.dtype, np.float32), copy=False) - shift[index]
                # Single precision places a value to 1/100 of its bin, in half the time.
                with np.errstate(over="ignore"):
                    piece /= unit[index]
                    place = piece.astype(np.float32, copy=False)
                np.arcsinh(place, out=place)
                place += _REACH
                place *= _BINS / (2.0 * _REACH)
                # What lies further out counts as lying at the end.
                bins = np.clip(place, 0.0, _BINS - 1.0, out=place).astype(np.int32)
                found = np.bincount(bins)
                self._counts[index, : len(found)] += found
        self.n += values.shape[-1]
        return self

    def merge(self, other: "StableStream") -> "StableStream":
        """Take in what another stream with the same units has seen, and return this one.

        Raises: ValueError where units differ, or either has seen nothing.
        """
        if not all(np.array_equal(mine, its) for mine, its in zip(self.units, other.units, strict=True)):
            raise ValueError(
                "StableStream.merge: location and scale differ; make one stream with the `units` of the other"
            )
        self._counts = self._seen() + other._seen()
        self._finite = self._finite & other._finite
        self.n += other.n
        return self

    def quantiles(self, levels: Sequence[float]) -> Array:
        """Quantiles (*batch, level) at levels in (0, 1); NaN where values were not finite.

        Raises: ValueError where nothing was seen, or for other levels.
        """
        if not all(0.0 < level < 1.0 for level in levels):
            raise ValueError(f"StableStream.quantiles: levels are {levels}; each must lie between 0 and 1")
        return self._quantiles(levels).reshape(*self._batch.shape, len(levels))

    def fit(self, method: Method = "ecf", confidence: float = 0.95) -> StableFit:
        """The fit to all that was seen; see :func:`ctgate.learnability.fit_stable`.

        Raises: ValueError where nothing was seen, or for arguments that do not fit.
        """
        check_method(method, "StableStream.fit")
        if method == "mcculloch":
            return fit_quantiles(self._quantiles(PROBABILITIES), self.n, confidence, self._batch)
        location, scale = rough_units(self._quantiles(_QUARTILES))
        middles = np.sinh((np.arange(_BINS) + 0.5) * (2.0 * _REACH / _BINS) - _REACH)
        start, unit = (value.ravel() for value in self.units)
        phi = []
        for index, counts in enumerate(self._seen()):
            used = np.flatnonzero(counts)
            x = start[index] + unit[index] * middles[used]
            phi.append(characteristic_function((x - location[index]) / scale[index], counts[used]))
        mean = np.where(self._finite[:, None], np.stack(phi) / self.n, np.nan)
        return fit_characteristic(mean, location, scale, self.n, confidence, self._batch)

    def _seen(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        if self._counts is None:
            raise ValueError("StableStream: nothing was seen; call update first")
        return self._counts

    def _quantiles(self, levels: Sequence[float]) -> Array:
        """Quantiles (batch, level)."""
        counts = self._seen()
        location, scale = (unit.ravel() for unit in self.units)
        edges = np.sinh(np.linspace(-_REACH, _REACH, _BINS + 1))
        # The k-th smallest of n is the quantile of (k - 1/2) / n, as of samples in memory.
        position = np.clip(np.asarray(levels) * self.n + 0.5, 1.0, self.n)
        first = np.floor(position)
        order = np.stack([first, np.minimum(first + 1.0, self.n)])
        found = np.full((len(location), len(levels)), np.nan)
        for index in np.flatnonzero(self._finite):
            reached = np.concatenate([[0], np.cumsum(counts[index])])
            upper = np.searchsorted(reached, order)
            lower = upper - 1
            share = (order - 0.5 - reached[lower]) / (reached[upper] - reached[lower])
            low, high = edges[lower] + share * (edges[upper] - edges[lower])
            found[index] = location[index] + scale[index] * (low + (position - first) * (high - low))
        return found
