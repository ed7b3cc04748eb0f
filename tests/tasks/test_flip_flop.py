"""Each bit is the sign of its channel's last pulse."""

import pytest
import torch

from ctgate.tasks.flip_flop import flip_flop


def drawn(**changes) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = {"steps": 12, "samples": 3000, **changes}
    return flip_flop(generator=torch.Generator().manual_seed(0), **sizes)


def test_a_bit_is_what_the_last_pulse_said() -> None:
    inputs, target = drawn(samples=50)
    assert inputs.shape == target.shape == (12, 50, 3)
    for sample in range(50):
        for bit in range(3):
            state = None
            for x, y in zip(inputs[:, sample, bit].tolist(), target[:, sample, bit].tolist(), strict=True):
                state = x if x else state
                assert state == y


def test_pulses_come_at_their_rate_with_either_sign() -> None:
    inputs, target = drawn(rate=0.2)
    assert torch.equal(inputs.unique(), torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    assert bool((inputs[0] != 0).all())
    count = inputs[1:].numel()
    # Four standard deviations.
    assert abs(float((inputs[1:] != 0).double().mean()) - 0.2) < 4 * (0.16 / count) ** 0.5
    assert abs(float(inputs.mean())) < 4 * (0.3 / count) ** 0.5
    assert abs(float(target[0].mean())) < 4 * 9000**-0.5


def test_no_pulses_but_the_first() -> None:
    inputs, target = drawn(rate=0.0)
    assert bool((inputs[1:] == 0).all())
    assert torch.equal(target, inputs[:1].expand_as(target))


def test_a_seed_is_a_draw_and_dtype_is_as_asked() -> None:
    assert all(torch.equal(a, b) for a, b in zip(drawn(), drawn(), strict=True))
    assert {x.dtype for x in drawn(dtype=torch.float32)} == {torch.float32}


@pytest.mark.parametrize(("name", "size"), [("steps", 0), ("samples", 0), ("bits", 0)])
def test_sizes_that_are_too_small(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {size}; it must be at least 1"):
        drawn(**{name: size})


def test_a_rate_that_is_no_probability() -> None:
    with pytest.raises(ValueError, match=r"rate is 1\.5"):
        drawn(rate=1.5)
