r"""What a fit of a symmetric stable law says: index, scale, how sure, and whether anything speaks against."""

import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import xarray as xr
from scipy.special import ndtr, ndtri
from torch import Tensor

from ctgate.learnability.stable_law import SMALLEST

Array = np.ndarray[Any, np.dtype[np.float64]]
Method = Literal["mcculloch", "ecf"]
Samples = Tensor | np.ndarray[Any, np.dtype[Any]] | xr.DataArray

# A fit to fewer samples is not called reliable: its intervals are those of large samples.
FEWEST = 500
# A departure is called one where a stable sample shows it once in 10^5.
UNLIKELY = 1e-5


class Batch(NamedTuple):
    """What the samples are samples of: the shape, and the names where it was a labelled array."""

    shape: tuple[int, ...]
    dims: tuple[Hashable, ...] = ()
    coords: Mapping[Hashable, Any] = {}


@dataclass(frozen=True)
class StableFit:
    r"""Symmetric stable laws :math:`\varphi(t) = e^{i\delta t - |ct|^\alpha}` fitted to samples.

    A Gaussian of standard deviation s has :math:`\alpha = 2` and :math:`c = s/\sqrt2`. All are arrays of the
    samples' batch shape, NaN where there is no estimate.

    Attributes:
        method: "mcculloch" or "ecf".
        alpha: the index, at most 2.
        alpha_unclipped: the estimate before it is held to at most 2: the one to average over fits, since
            the mean of clipped ones lies below 2 where alpha is 2.
        scale: c, in the units of x, at ``alpha``.
        location: delta, in the units of x.
        alpha_interval: (*batch, 2), lower and upper end of the indices in [0.5, 2] that the estimate does not
            reject; ends at 2 where it rejects none below.
        scale_interval: (*batch, 2).
        confidence: of both.
        gaussian_p: how often a Gaussian sample has an index estimated this low, or lower.
        misfit_p, asymmetry_p: how often a symmetric stable sample departs this far from the law, or from its
            symmetry. "mcculloch" sees a misfit in the 0.99 quantiles, "ecf" in the shape of ln|phi|.
        reliable, reason: whether nothing speaks against the fit, and what does.
        n: samples of each fit.
        dims, coords: of the batch, where it was a labelled array.
    """

    method: Method
    alpha: Array
    alpha_unclipped: Array
    scale: Array
    location: Array
    alpha_interval: Array
    scale_interval: Array
    confidence: float
    gaussian_p: Array
    misfit_p: Array
    asymmetry_p: Array
    reliable: np.ndarray[Any, np.dtype[Any]]
    reason: np.ndarray[Any, np.dtype[Any]]
    n: int
    dims: tuple[Hashable, ...] = ()
    coords: Mapping[Hashable, Any] = field(default_factory=dict)

    def to_dataset(self) -> xr.Dataset:
        """All of it as variables over the batch, with ``bound`` the ends of intervals."""
        dims = self.dims or tuple(f"batch_{k}" for k in range(self.alpha.ndim))
        meaning = {
            "alpha": "index of stability",
            "alpha_unclipped": "index of stability before it is held to at most 2",
            "scale": "scale c of exp(-|c t|^alpha)",
            "location": "centre of symmetry",
            "gaussian_p": "probability of an index this low from a Gaussian sample",
            "misfit_p": "probability of a departure this large from a stable sample",
            "asymmetry_p": "probability of an asymmetry this large from a symmetric stable sample",
            "reliable": "whether nothing speaks against the fit",
            "reason": "what speaks against the fit",
        }
        units = {"scale": "units of x", "location": "units of x"}
        data = {
            name: (dims, getattr(self, name), {"long_name": text, "units": units.get(name, "1")})
            for name, text in meaning.items()
        }
        for name in ("alpha_interval", "scale_interval"):
            data[name] = (
                (*dims, "bound"),
                getattr(self, name),
                {"long_name": f"{self.confidence:.0%} interval", "units": units.get(name[:5], "1")},
            )
        return xr.Dataset(
            data,
            {**self.coords, "bound": ["lower", "upper"]},
            {"method": self.method, "confidence": self.confidence, "samples": self.n},
        )


def check_method(method: str, where: str) -> None:
    """Raises: ValueError where it is neither."""
    if method not in get_args(Method):
        raise ValueError(f"{where}(method={method!r}): method must be one of {get_args(Method)}")


def check_confidence(confidence: float) -> None:
    """Raises: ValueError outside (0, 1)."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1, both excluded")


def as_samples(x: Samples, dim: Hashable, where: str) -> tuple[np.ndarray[Any, np.dtype[Any]], Batch]:
    """Samples (batch, sample) of floating point on the CPU, and what the batch was.

    Raises: TypeError for other things than real numbers. ValueError for a dimension that is not there, or
    fewer than 20 samples.
    """
    dims: tuple[Hashable, ...] = ()
    coords: dict[Hashable, Any] = {}
    if isinstance(x, xr.DataArray):
        if dim not in x.dims:
            raise ValueError(f"{where}(dim={dim!r}): x has dimensions {x.dims}; dim must be one of them")
        dims = tuple(name for name in x.dims if name != dim)
        coords = {name: c for name, c in x.coords.items() if dim not in c.dims}
        values = x.transpose(*dims, dim).to_numpy()
    elif isinstance(x, Tensor):
        values = x.detach().to("cpu", torch.float32 if x.dtype == torch.bfloat16 else x.dtype).numpy()
    else:
        values = np.asarray(x)
    if values.dtype.kind not in "fiu":
        raise TypeError(f"{where}: x has dtype {values.dtype}; it must hold real numbers")
    if values.size == 0 or values.ndim == 0 or values.shape[-1] < 20:
        raise ValueError(
            f"{where}: x has shape {values.shape}; it must be (*batch, sample) with at least 20 samples"
        )
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    return values.reshape(-1, values.shape[-1]), Batch(values.shape[:-1], dims, coords)


@dataclass(frozen=True)
class Estimates:
    """What both methods find, (batch,) each, before it is judged.

    Attributes: ``alpha`` unclipped; ``log_scale`` at the clipped alpha; ``location``; ``deviation`` of alpha,
    times sqrt(n), as a function of alpha, and ``factor`` on it by batch member; ``log_scale_deviation`` times
    sqrt(n); ``misfit_p``, ``asymmetry_p``; ``refused``, reasons for having no estimate.
    """

    alpha: Array
    log_scale: Array
    location: Array
    deviation: Callable[[Array], Array]
    factor: Array
    log_scale_deviation: Array
    misfit_p: Array
    asymmetry_p: Array
    refused: np.ndarray[Any, np.dtype[Any]]


def judge(
    method: Method,
    found: Estimates,
    n: int,
    confidence: float,
    batch: Batch,
) -> StableFit:
    """Intervals, probabilities and reasons for doubt."""
    check_confidence(confidence)
    half = ndtri(0.5 + 0.5 * confidence)
    below = (found.refused == "") & (found.alpha < SMALLEST)
    refused = np.where(below, f"the index lies below {SMALLEST}", found.refused)
    missing = refused != ""

    def known(values: Array) -> Array:
        return np.where(missing, np.nan, values).reshape(batch.shape)

    deviation_of_two = found.factor * found.deviation(np.asarray(2.0)) / np.sqrt(n)
    interval = _not_rejected(found, half / np.sqrt(n))
    spread = half * found.log_scale_deviation / np.sqrt(n)
    log_ends = found.log_scale - spread, found.log_scale + spread
    gaussian = (found.alpha - 2.0) / deviation_of_two
    doubts = (
        (~missing & (n < FEWEST), f"{n} samples are fewer than {FEWEST}"),
        (ndtr(-gaussian) < UNLIKELY, "tails are lighter than a Gaussian's"),
        (found.asymmetry_p < UNLIKELY, "the samples are not symmetric"),
        (found.misfit_p < UNLIKELY, "the samples follow no stable law"),
    )
    reason = refused.astype(object)
    for doubt, text in doubts:
        # A comparison with NaN is False: where there is no estimate, that is the one reason.
        reason = np.where(doubt & ~missing, np.where(reason == "", text, reason + "; " + text), reason)
    return StableFit(
        method,
        known(np.minimum(found.alpha, 2.0)),
        known(found.alpha),
        known(np.exp(found.log_scale)),
        known(found.location),
        np.stack([known(end) for end in interval], -1),
        np.stack([known(np.exp(end)) for end in log_ends], -1),
        confidence,
        known(ndtr(gaussian)),
        known(found.misfit_p),
        known(found.asymmetry_p),
        np.asarray(reason == "", np.bool_).reshape(batch.shape),
        reason.astype(np.str_).reshape(batch.shape),
        n,
        batch.dims,
        batch.coords,
    )


def _not_rejected(found: Estimates, half: float) -> list[Array]:
    """The ends (batch,) of {a in [0.5, 2]: |estimate - a| <= half * deviation(a)}, by bisection."""
    ends = []
    for sign in (1.0, -1.0):
        lower = np.full(found.alpha.shape, SMALLEST)
        upper = np.full(found.alpha.shape, 2.0)
        for _ in range(50):
            middle = 0.5 * (lower + upper)
            below = middle + sign * half * found.factor * found.deviation(middle) < found.alpha
            lower, upper = np.where(below, middle, lower), np.where(below, upper, middle)
        ends.append(0.5 * (lower + upper))
    return ends


def refusals(finite: Any, constant: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Why batch members can have no estimate; warns where values are not finite."""
    if not finite.all():
        warnings.warn(
            f"fit_stable: {int((~finite).sum())} of {finite.size} samples hold values that are not finite; "
            "they have no estimate",
            RuntimeWarning,
            stacklevel=4,
        )
    reason = np.where(constant, "more than half of the values are the same", "")
    return np.where(finite, reason, "values are not finite").astype(object)
