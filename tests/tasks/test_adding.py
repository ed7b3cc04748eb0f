"""Two marks, one in each half, and the sum of what stands under them."""

import pytest
import torch

from ctgate.tasks.adding import BASELINE, adding


def drawn(**changes: int) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = {"steps": 7, "samples": 4000, **changes}
    return adding(generator=torch.Generator().manual_seed(0), **sizes)


def test_the_target_is_the_sum_under_the_marks() -> None:
    inputs, target = drawn(channels=4)
    assert inputs.shape == (7, 4000, 4)
    assert target.shape == (4000, 1)
    marks = inputs[..., -1]
    assert torch.equal(marks.unique(), torch.tensor([0.0, 1.0], dtype=torch.float64))
    for half in (marks[:3], marks[3:]):
        assert torch.equal(half.sum(0), torch.ones(4000, dtype=torch.float64))
    torch.testing.assert_close((marks * inputs[..., 0]).sum(0), target[:, 0], rtol=0.0, atol=0.0)


def test_marks_and_numbers_are_uniform() -> None:
    inputs, target = drawn()
    share = inputs[..., -1].mean(1)
    expected = torch.tensor([1 / 3] * 3 + [1 / 4] * 4, dtype=torch.float64)
    # Four standard deviations of a share of 4000.
    assert bool(((share - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all())
    assert abs(float(target.mean()) - 1.0) < 4 * (BASELINE / 4000) ** 0.5
    # The fourth central moment of the sum is 1/15: its variance estimate has the variance (1/15 - 1/36)/n.
    assert abs(float(target.var()) - BASELINE) < 4 * ((1 / 15 - 1 / 36) / 4000) ** 0.5


def test_a_seed_is_a_draw() -> None:
    assert all(torch.equal(a, b) for a, b in zip(drawn(), drawn(), strict=True))


def test_dtype_is_as_asked() -> None:
    inputs, target = adding(4, 3, torch.Generator().manual_seed(0), dtype=torch.float32)
    assert inputs.dtype == target.dtype == torch.float32


@pytest.mark.parametrize(("name", "size"), [("steps", 1), ("samples", 0), ("channels", 1)])
def test_sizes_that_are_too_small(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {size}; it must be at least"):
        drawn(**{name: size})
