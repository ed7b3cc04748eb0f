"""Look whether a result is right, then time it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctgate.experiments.speed.lines import Check, Line
from ctgate.experiments.speed.pairing import Clock, paired


class Found(NamedTuple):
    """States, and gradients or whatever else was asked for, in the same order from everybody."""

    states: Tensor
    gradients: Sequence[Tensor] = ()


def relative(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest difference of a tensor from its reference, relative to the largest entry of that; NaN if
    any is, 0 of none."""
    errors = [
        float((one.double() - other.double()).abs().max() / other.double().abs().max())
        for one, other in zip(found, reference, strict=True)
    ]
    # numpy's maximum keeps a NaN, which Python's may drop.
    return float(np.max(errors, initial=0.0))


def checks(found: Found, reference: Found, limits: tuple[float, float]) -> tuple[Check, ...]:
    """States, and gradients where there are any, against a reference."""
    parts = [Check("states", relative([found.states], [reference.states]), limits[0])]
    if found.gradients:
        parts.append(Check("gradients", relative(found.gradients, reference.gradients), limits[1]))
    return tuple(parts)


def clock_of(device: str) -> Clock:
    """A clock [s] that waits for the device."""
    if not device.startswith("cuda"):
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def timed(
    line: Line,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    device: str,
    *,
    scale: float = 1.0,
) -> Line:
    """The line with its ratios, unless a check says that our result is wrong.

    Parameters: ``scale``, how many times the other's call is to be counted.
    """
    if line.wrong:
        return line
    pairing = paired(ours, theirs, rounds, clock=clock_of(device))
    mine, other = (sorted(seconds)[len(seconds) // 2] for seconds in (pairing.ours, pairing.theirs))
    return dataclasses.replace(
        line,
        ratios=tuple(scale * ratio for ratio in pairing.ratios),
        numbers={**line.numbers, "ours [s]": mine, "theirs [s]": scale * other},
    )
