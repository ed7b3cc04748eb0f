r"""Fits of symmetric stable laws to samples in memory."""

from collections.abc import Hashable

import numpy as np

from ctgate.learnability.stable_ecf import fit_characteristic, sample_characteristic_function
from ctgate.learnability.stable_fit import (
    Method,
    Samples,
    StableFit,
    as_samples,
    check_confidence,
    check_method,
)
from ctgate.learnability.stable_quantiles import PROBABILITIES, fit_quantiles, rough_units, sample_quantiles


def fit_stable(
    x: Samples, method: Method = "ecf", *, dim: Hashable = "sample", confidence: float = 0.95
) -> StableFit:
    r"""Fit a symmetric alpha-stable law to each sample of a batch.

    - "mcculloch" (after McCulloch, 1986): the widths of the middle 50 and 90 % of the samples, and of 98 %,
      which tell most near 2, by generalised least squares. The table of the law's own widths is computed, by
      inversion of the characteristic function.
    - "ecf" (after Koutrouvelis, 1981): the straight line :math:`\ln(-\ln|\hat\varphi(t)|) = \alpha\ln t +
      \alpha\ln c` by generalised least squares at :math:`t c \approx 0.2, 0.4, \dots, 1`, weights and fit
      iterated. The more precise one above 1.5, by a factor of 4 at 2; below it is about as precise.

    Intervals are those of large samples (delta method from the covariance of quantiles or of
    :math:`\hat\varphi`), by inversion of the test, which is right at :math:`\alpha = 2` too: an interval is
    cut off there. Samples are taken as independent: of correlated ones the intervals are too narrow.

    What a fit does not say: both methods read the body of the distribution. Products and mixtures of finite
    variance look stable with :math:`\alpha < 2` to them, which ``misfit_p`` shows where samples are many. How
    means concentrate is read from :func:`aggregation_index`.

    Parameters:
        x: (*batch, sample), a tensor (any device; the fit is made on the CPU), array or DataArray. Sums are
            in double precision whatever the dtype.
        method: "ecf" or "mcculloch".
        dim: of a DataArray, the dimension of the samples; others are the batch.
        confidence: of the intervals, in (0, 1).

    Returns: :class:`StableFit`. Not reliable, with the reason, are fits of fewer than 500 samples, and of
        values that are lopsided or that no stable law has. No estimate at all, NaN, have values that are not
        finite (with a warning) or mostly one and the same, and indices below 0.5.

    Raises: TypeError or ValueError for arguments that do not fit, or fewer than 20 samples.

    Source: J. H. McCulloch, Commun. Stat. Simul. Comput. 15 (1986) 1109; I. A. Koutrouvelis, Commun. Stat.
    Simul. Comput. 10 (1981) 17; THEORY.md 26.
    """
    check_method(method, "fit_stable")
    check_confidence(confidence)
    values, batch = as_samples(x, dim, "fit_stable")
    n = values.shape[-1]
    if method == "mcculloch":
        return fit_quantiles(sample_quantiles(values, PROBABILITIES), n, confidence, batch)
    location, scale = rough_units(sample_quantiles(values, (0.25, 0.5, 0.75)))
    # Values that are not finite are no error here, and leave NaN.
    with np.errstate(invalid="ignore"):
        phi = sample_characteristic_function(values, location, scale)
    return fit_characteristic(phi, location, scale, n, confidence, batch)
