"""The flip-flop task: bits that pulses set, and that are remembered in between."""

import torch
from jaxtyping import Float
from torch import Tensor


def flip_flop(
    steps: int,
    samples: int,
    generator: torch.Generator,
    *,
    bits: int = 3,
    rate: float = 0.1,
    dtype: torch.dtype = torch.float64,
) -> tuple[Float[Tensor, "time sample bit"], Float[Tensor, "time sample bit"]]:
    """Pulses of 1 and -1 on channels of their own, and the sign of the last pulse of each channel.

    The first step has a pulse on every channel; at each later one a channel has a pulse with probability
    ``rate``, of either sign, and 0 else. The target at a step counts the pulse of that step.

    Parameters:
        steps: the length of a sequence, at least 1. samples: how many.
        generator: the source of the pulses; the result is on its device.
        bits: the number of channels, at least 1: 2^bits states are to be told apart.
        rate: of pulses, in [0, 1]. dtype: of both results.

    Returns: inputs and targets ``(time, sample, bit)``.

    Raises: ValueError for sizes that are too small or a rate that is no probability.

    Source: D. Sussillo and O. Barak, Neural Comput. 25 (2013) 626.
    """
    for name, size in (("steps", steps), ("samples", samples), ("bits", bits)):
        if size < 1:
            raise ValueError(f"flip_flop({name}=...): {name} is {size}; it must be at least 1")
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"flip_flop(rate=...): rate is {rate!r}; it must be a probability in [0, 1]")
    shape, device = (steps, samples, bits), generator.device
    signs = 1.0 - 2.0 * torch.randint(0, 2, shape, generator=generator, device=device).to(dtype)
    pulse = torch.rand(shape, generator=generator, dtype=torch.float64, device=device) < rate
    pulse[0] = True
    numbers = torch.arange(steps, device=device).reshape(-1, 1, 1)
    last = torch.where(pulse, numbers, 0).cummax(0).values
    return torch.where(pulse, signs, 0.0), signs.gather(0, last)
