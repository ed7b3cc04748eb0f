"""What an integrator reports while it runs: accepted steps, the states to keep, the counts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import NamedTuple, overload

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


def every_node(step: AcceptedStep) -> list[Output]:
    """The ends of all steps."""
    return [Output(step.stop, step.right)]


class Rows(Sequence[Output]):
    """Outputs whose states are one tensor, ``(output, *batch, state)``; ``whole`` has the state before them
    in front, where there is one."""

    def __init__(self, times: Sequence[float | Tensor], states: Tensor, whole: Tensor | None = None) -> None:
        self.times = times
        self.states = states
        self.whole = whole

    def __len__(self) -> int:
        return len(self.times)

    @overload
    def __getitem__(self, number: int) -> Output: ...

    @overload
    def __getitem__(self, number: slice) -> "Rows": ...

    def __getitem__(self, number: int | slice) -> "Output | Rows":
        """One output, or those of a slice."""
        if isinstance(number, slice):
            return Rows(self.times[number], self.states[number])
        return Output(self.times[number], self.states[number])

    def __iter__(self) -> Iterator[Output]:
        return map(Output, self.times, self.states.unbind(0))


def kept_of(
    spans: Iterable[tuple[float | Tensor, float | Tensor, Input | None]],
    h0: Tensor,
    states: Tensor,
    keep: Keep,
) -> list[Output]:
    """What ``keep`` wants of steps that were taken together: their ends and inputs, the state before them and
    those after each (step, *batch, state).

    The states are copies: a row would hold all of them in memory.
    """
    rows = states.unbind(0)
    return [
        Output(output.t, output.h.clone())
        for (start, stop, u), left, right in zip(spans, (h0, *rows[:-1]), rows, strict=True)
        for output in keep(AcceptedStep(start, stop, left, right, u))
    ]


class Outputs:
    """What a solve keeps, in order; rows that came together stay together."""

    def __init__(self) -> None:
        self._blocks: list[Rows | list[Output]] = []

    def __len__(self) -> int:
        return sum(map(len, self._blocks))

    def __iter__(self) -> Iterator[Output]:
        return chain.from_iterable(self._blocks)

    @property
    def last(self) -> Output:
        """The latest one."""
        return self._blocks[-1][-1]

    def append(self, output: Output) -> None:
        """One more."""
        self.extend([output])

    def extend(self, outputs: Iterable[Output]) -> None:
        """Several more."""
        if isinstance(outputs, Rows):
            if outputs.whole is not None and len(self) == 1:
                # What is kept already is the state before them.
                outputs = Rows([self.last.t, *outputs.times], outputs.whole)
                self._blocks.clear()
            self._blocks.append(outputs)
        elif self._blocks and isinstance(last := self._blocks[-1], list):
            last.extend(outputs)
        elif some := list(outputs):
            self._blocks.append(some)

    def replace(self, outputs: Sequence[Output]) -> None:
        """These instead of all."""
        self._blocks = [list(outputs)] if outputs else []

    def stacked(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shared times (output,) in float64, and states (output, *batch, state); ``like`` is a state."""
        rows = [block if isinstance(block, Rows) else _together(block) for block in self._blocks]
        times = torch.tensor([t for block in rows for t in block.times], dtype=torch.float64)
        if len(rows) == 1:
            return times.to(like.device), rows[0].states
        hs = torch.cat([block.states for block in rows]) if rows else like.new_empty(0, *like.shape)
        return times.to(like.device), hs


def _together(outputs: Sequence[Output]) -> Rows:
    return Rows([output.t for output in outputs], torch.stack([output.h for output in outputs]))


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
        self.outputs = Outputs()
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
