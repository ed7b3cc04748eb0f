"""How sums grow: stable laws at once, laws of finite variance in the end, correlated samples no faster."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.signal import lfilter
from scipy.stats import levy_stable

from ctgate.learnability import aggregation_index

BLOCKS = [1, 4, 16, 64]
Values = np.ndarray[Any, np.dtype[np.float64]]


def stable(alpha: float, shape: tuple[int, ...], seed: int) -> Values:
    return np.asarray(levy_stable.rvs(alpha, 0.0, size=shape, random_state=np.random.default_rng(seed)))


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8, 2.0])
def test_sums_of_stable_samples_keep_their_index(alpha: float) -> None:
    found = aggregation_index(stable(alpha, (40, 40_960), seed=1), BLOCKS)
    error = (found.alpha_unclipped - alpha) / found.standard_error
    # Student's t of 16 groups, and some more for a plateau that is chosen.
    assert float((abs(error) < 2.13).mean()) >= 0.85
    mean, deviation = float(found.alpha_unclipped.mean()), float(found.standard_error.mean())
    assert abs(mean - alpha) < 4.0 * deviation / 40**0.5
    assert float(found.valid.mean()) >= 0.9
    assert float((found.plateau_from == 1).mean()) >= 0.9
    assert (found.alpha <= 2.0).all()
    steps = np.abs(found.step_alpha - alpha) / found.step_standard_error
    assert float((steps < 2.13).mean()) > 0.9


def test_finite_variance_climbs_to_two() -> None:
    rng = np.random.default_rng(2)
    normal = rng.normal(size=(3, 409_600))
    laws = [normal.prod(0), rng.laplace(size=409_600), normal[0]]
    found = aggregation_index(np.stack(laws), [*BLOCKS, 256])
    triple, laplace, gauss = (found.isel(batch_0=k) for k in range(3))
    # In the words of a simulation: 1.05, 1.73, 2.03 and 1.59, 1.93, 1.97 between some blocks.
    assert triple.step_alpha[0] < 1.05
    assert (triple.step_alpha.diff("step")[:2] > 0.2).all()
    assert abs(triple.step_alpha[-1] - 2.0) < 3.0 * triple.step_standard_error[-1]
    assert laplace.step_alpha[0] == pytest.approx(1.48, abs=0.03)
    assert laplace.alpha == pytest.approx(1.95, abs=0.08)
    assert min(triple.plateau_from, laplace.plateau_from) >= 4
    assert gauss.plateau_from == 1
    assert abs(gauss.alpha_unclipped - 2.0) < 3.0 * gauss.standard_error


def test_widths_of_laplace_sums_are_those_of_their_law() -> None:
    """IQR = 2 ln 2 for one; for two the distribution is 1 - (2 + x) e^-x / 4, solved here by Newton."""
    x = 1.0
    for _ in range(30):
        x -= ((2.0 + x) * math.exp(-x) / 4.0 - 0.25) / (-(1.0 + x) * math.exp(-x) / 4.0)
    found = aggregation_index(np.random.default_rng(3).laplace(size=1_000_000), [1, 2])
    assert found.width.to_numpy() == pytest.approx([2.0 * math.log(2.0), 2.0 * x], rel=0.01)
    expected = math.log(2.0) / math.log(x / math.log(2.0))
    assert abs(float(found.step_alpha[0]) - expected) < 4.0 * float(found.step_standard_error[0])
    assert "one step" in str(found.reason.to_numpy())


def test_widths_are_those_of_sums_over_distant_samples() -> None:
    x = stable(1.4, (32 * 10 * 4,), seed=4)
    apart = len(x) // 4
    sums = [sum(x[j + i * apart] for i in range(4)) for j in range(apart)]
    pairs = [x[j] + x[j + 2 * apart] for j in range(2 * apart)]
    expected = [np.subtract(*np.quantile(one, [0.75, 0.25], method="hazen")) for one in (x, pairs, sums)]
    assert aggregation_index(x, [1, 2, 4]).width.to_numpy() == pytest.approx(expected, rel=1e-12)


def test_correlation_of_neighbours_is_no_tail() -> None:
    noise = np.random.default_rng(5).normal(size=(8, 409_600))
    found = aggregation_index(lfilter([1.0], [1.0, -0.95], noise), BLOCKS)
    assert (abs(found.alpha_unclipped - 2.0) < 4.0 * found.standard_error).all()
    assert found.valid.mean() > 0.7
    # Sums of neighbours would grow by almost m.
    late = lfilter([1.0], [1.0, -0.9999], noise[:, :40_960])
    found = aggregation_index(late, BLOCKS)
    assert not found.valid.any()
    assert "correlated" in str(found.reason[0].to_numpy())


def test_labels_tensors_and_what_has_no_index() -> None:
    x = stable(1.6, (3, 5120), seed=6)
    x[1, 7], x[2, :4000] = math.nan, 1.0
    found = aggregation_index(
        xr.DataArray(x, dims=("lag", "t"), coords={"lag": [2, 4, 8]}), [1, 2, 8], dim="t"
    )
    assert found.alpha.dims == ("lag",)
    assert found.step_alpha.dims == ("lag", "step")
    assert found.block_to.to_numpy().tolist() == [2, 8]
    assert found.lag.to_numpy().tolist() == [2, 4, 8]
    assert np.isnan(found.alpha).to_numpy().tolist() == [False, True, True]
    assert [str(r) for r in found.reason.to_numpy()][1:] == [
        "values are not finite",
        "more than half of the values are the same",
    ]
    tensor = aggregation_index(torch.tensor(x[0]), [1, 2, 8])
    assert tensor.alpha.dims == ()
    assert float(tensor.alpha) == float(found.alpha[0])
    for blocks in ([1], [4, 2], [2, 3], [0, 4]):
        with pytest.raises(ValueError, match="two or more increasing positive integers"):
            aggregation_index(x, blocks)
    with pytest.raises(ValueError, match="largest block is 64 of 5120 samples; it must be at most 16"):
        aggregation_index(x, [1, 64])
