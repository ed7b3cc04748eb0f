"""What an integrator reports while it runs: accepted steps, the states to keep, the counts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from ctgate.controls.base import concrete
from ctgate.integrators.grid import Input
from ctgate.retcode import Halt, ReturnCode

Callback = Callable[[float | Tensor, Tensor], bool | None]


@dataclass
class Stats:
    """What a solve cost.

    Where every sample takes steps of its own, ``accepted`` and ``rejected`` are sums over samples.
    ``evaluations`` counts the integrator's calls of the field in the forward pass (interpolation has its own,
    which are not counted); ``evaluations_backward`` those of the
    backward pass (steps taken again, or an adjoint solve), and grows when ``backward()`` runs. ``jacobians``
    counts evaluations of the field's Jacobian, in either. ``wall_time`` is that of the forward pass [s].
    """

    algorithm: str
    engine: str
    sensealg: str
    evaluations: int = 0
    evaluations_backward: int = 0
    accepted: int = 0
    rejected: int = 0
    jacobians: int = 0
    wall_time: float = 0.0


class Output(NamedTuple):
    """A state that the solve keeps, at a time or at a time for every sample ``(*batch)``."""

    t: float | Tensor
    h: Tensor


class AcceptedStep(NamedTuple):
    """One accepted step: its ends in time, the states there, and the input on it, None where many steps were
    taken together."""

    start: float | Tensor
    stop: float | Tensor
    left: Tensor
    right: Tensor
    u: Input | None


Keep = Callable[[AcceptedStep], Iterable[Output]]


class Recorder:
    """Collects a solve's outputs and lets the callback and the progress bar see each accepted step."""

    def __init__(
        self,
        stats: Stats,
        keep: Keep,
        callback: Callback | None,
        advance_bar: Callable[[float], object],
        max_steps: int | None,
    ) -> None:
        self.stats = stats
        self.keep = keep
        self.outputs: list[Output] = []
        self.last_step: tuple[float, float] | None = None
        self.last_good: Output | None = None
        self.max_steps = max_steps
        self._callback = callback
        self._advance_bar = advance_bar

    @property
    def watched(self) -> bool:
        """Whether a callback wants to see each step as it is accepted."""
        return self._callback is not None

    def accept(self, step: AcceptedStep) -> None:
        """One accepted step of an adaptive method."""
        self.outputs.extend(self.keep(step))
        self.observe(float(step.start), float(step.stop), step.right)

    def observe(self, start: float, stop: float, h: Tensor) -> None:
        """Count a step and show its end to the callback and the bar, without keeping it as an output."""
        self.stats.accepted += 1
        self.last_step = (start, stop)
        self.last_good = Output(stop, h)
        self._advance_bar(stop - start)
        if self._callback is not None and self._callback(stop, h.detach().clone()):
            raise Halt(ReturnCode.TERMINATED, f"the callback ended the solve at t = {stop:.9g}")

    def observe_samples(self, t: float | Tensor, h: Tensor, moved: int, advance: float) -> None:
        """``moved`` samples accepted a step; times and states of all go to the callback, their mean advance
        to the bar."""
        self.stats.accepted += moved
        self._advance_bar(advance)
        if self._callback is not None and self._callback(t, h.detach().clone()):
            raise Halt(ReturnCode.TERMINATED, "the callback ended the solve")

    def extend(self, ends: Sequence[tuple[float, float]], outputs: Sequence[Output], h: Tensor) -> None:
        """Several accepted steps of a fixed-step method at once; ``h`` is the state after the last."""
        broken = concrete(torch.isfinite(h).all()) == 0.0
        if broken:
            outputs = list(takewhile(lambda output: bool(torch.isfinite(output.h).all()), outputs))
        if self._callback is None:
            self.outputs.extend(outputs)
            if not broken:
                self.stats.accepted += len(ends)
                self.last_step, self.last_good = ends[-1], Output(ends[-1][1], h)
                self._advance_bar(ends[-1][1] - ends[0][0])
        else:
            # A callback makes every step an output; what follows the step that it ends at is dropped.
            for (start, stop), output in zip(ends, outputs, strict=False):
                self.outputs.append(output)
                self.observe(start, stop, output.h)
        if broken:
            self._break_off(ends, outputs)

    def _break_off(self, ends: Sequence[tuple[float, float]], outputs: Sequence[Output]) -> None:
        if outputs:
            self.last_good = outputs[-1]
        reached = ends[0][0] if self.last_good is None else max(ends[0][0], float(self.last_good.t))
        if self._callback is None:
            self.stats.accepted += sum(stop <= reached for _, stop in ends)
        self.last_step = next((end for end in ends if end[1] > reached), ends[-1])
        raise Halt(ReturnCode.UNSTABLE, f"the state is not finite after t = {reached:.9g}")
