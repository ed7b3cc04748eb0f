"""Two ways to do the same thing, timed in turns in one process."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]


@dataclass(frozen=True)
class Pairing:
    """Seconds per call of ours and of the other, one of each a round."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times as long the other takes, by round: what slows a whole round down cancels."""
        return tuple(theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True))


def paired(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    *,
    shortest: float = 0.02,
    clock: Clock = time.perf_counter,
) -> Pairing:
    """Time two callables in turns; each round begins with the one that the round before ended with.

    Both are called once before, to warm up and to see how many calls one timing needs.

    Parameters: ``rounds``, at least one; ``shortest`` time [s] of one timing, reached by repeated calls;
    ``clock`` [s], which waits for the device first where work is asynchronous.

    Raises: ValueError for ``rounds`` below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    ways = (ours, theirs)
    calls = [max(1, math.ceil(shortest / max(_seconds(way, 1, clock), 1e-9))) for way in ways]
    seconds: tuple[list[float], list[float]] = ([], [])
    order = (0, 1)
    for _ in range(rounds):
        for k in order:
            seconds[k].append(_seconds(ways[k], calls[k], clock))
        order = order[::-1]
    return Pairing(tuple(seconds[0]), tuple(seconds[1]))


def _seconds(way: Callable[[], object], calls: int, clock: Clock) -> float:
    """Seconds per call, with the garbage collector's turn outside the timing."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        begun = clock()
        for _ in range(calls):
            way()
        return (clock() - begun) / calls
    finally:
        if enabled:
            gc.enable()
