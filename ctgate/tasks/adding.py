"""The adding task: two marked numbers far apart, and their sum."""

import torch
from jaxtyping import Float
from torch import Tensor

BASELINE = 1.0 / 6.0
"""Mean squared error of the best constant answer, which is 1: the variance of two uniform numbers' sum."""


def adding(
    steps: int,
    samples: int,
    generator: torch.Generator,
    *,
    channels: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Float[Tensor, "time sample channel"], Float[Tensor, "sample 1"]]:
    """Sequences of numbers uniform on (0, 1), two of them marked, and the sum of those two.

    All channels but the last hold numbers, the last one the marks: 1 at one step of the first half and at one
    of the second, 0 elsewhere. The target is the sum of the first channel at the marks. Both halves must be
    remembered to do better than :data:`BASELINE`.

    Parameters:
        steps: the length of a sequence, at least 2. samples: how many.
        generator: the source of the numbers; the result is on its device.
        channels: of the input, at least 2. dtype: of both results.

    Returns: inputs ``(time, sample, channel)`` and targets ``(sample, 1)``.

    Raises: ValueError for sizes that are too small.

    Source: S. Hochreiter and J. Schmidhuber, Neural Comput. 9 (1997) 1735; with further channels of numbers,
    L. Livi, arXiv 2508.12121.
    """
    for name, size, least in (("steps", steps, 2), ("samples", samples, 1), ("channels", channels, 2)):
        if size < least:
            raise ValueError(f"adding({name}=...): {name} is {size}; it must be at least {least}")
    device = generator.device
    inputs = torch.rand(steps, samples, channels, generator=generator, dtype=dtype, device=device)
    half = steps // 2
    first = torch.randint(0, half, (samples,), generator=generator, device=device)
    second = torch.randint(half, steps, (samples,), generator=generator, device=device)
    everyone = torch.arange(samples, device=device)
    inputs[..., -1] = 0.0
    inputs[first, everyone, -1] = 1.0
    inputs[second, everyone, -1] = 1.0
    target = inputs[first, everyone, 0] + inputs[second, everyone, 0]
    return inputs, target.unsqueeze(-1)
