"""What the adaptive loop steps through: one clock for the whole batch, or one for every sample.

The loop sees lanes, each with its own time, step size and error: a single one that all samples share, or as
many as there are samples. A frame turns lanes into steps and keeps what was accepted. THEORY.md 8 and 11.
"""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctgate.integrators.grid import Input, Interval, Step
from ctgate.integrators.lanes import Lanes, ManyLanes, Number, OneLane
from ctgate.integrators.recorder import AcceptedStep, Keep, Output
from ctgate.integrators.samples import Booleans, Floats, Integers, Plan, SampleGrid, slide
from ctgate.retcode import Halt, ReturnCode


class Move(NamedTuple):
    """Where a step goes: the interval, the times at its ends, and whether its first slope was evaluated anew,
    one per lane."""

    segment: Number
    start: Number
    stop: Number
    fresh: Number


class Frame(abc.ABC):
    """Lanes of time, and the steps that were accepted on them.

    ``jumps`` says whether dh/dt may jump at the ends of the knot intervals.
    ``tracked`` is set once a derivative wants to pass the steps: then the states are values only, and the
    steps are to be taken again in the graph.
    """

    jumps: bool
    tracked: bool = False

    @abc.abstractmethod
    def lanes(self) -> Lanes:
        """Every lane at its start."""

    def track(self) -> None:
        """A derivative wants to pass the steps."""
        self.tracked = True

    @abc.abstractmethod
    def step(self, move: Move) -> Step:
        """The step that takes each lane from start to stop inside its interval."""

    @abc.abstractmethod
    def norms(self, ratio: Tensor) -> Number:
        """What counts for each lane of a number per sample (*batch)."""

    @abc.abstractmethod
    def choose(self, lanes: Number, new: Tensor, old: Tensor) -> Tensor:
        """``new`` in these lanes, ``old`` in the others; both (*batch, state)."""

    @abc.abstractmethod
    def accept(self, lanes: Number, move: Move, step: Step, h: Tensor, following: Tensor) -> None:
        """The step was accepted in these lanes and leads from ``h`` to ``following``; may raise Halt."""

    @abc.abstractmethod
    def fail(self, lanes: Number, code: ReturnCode, details: Callable[[int], str]) -> None:
        """These lanes end here; may raise Halt."""


class SharedFrame(Frame):
    """One lane: all samples take the same steps.

    ``taken`` are the accepted steps, ``outputs`` what ``keep`` wants of them while they are not tracked, and
    ``nodes`` the states after them while they are, with ``remember``; an error is that of the worst sample,
    or with ``mean`` the root mean square over samples; ``observe(start, stop, h)`` sees each step and may
    raise Halt.
    """

    def __init__(
        self,
        cuts: Sequence[Interval],
        jumps: bool,
        keep: Keep,
        observe: Callable[[float, float, Tensor], None],
        remember: bool = False,
        mean: bool = False,
    ) -> None:
        self.cuts = cuts
        self.jumps = jumps
        self.taken: list[Step] = []
        self.outputs: list[Output] = []
        self.nodes: list[Tensor] = []
        self._remember = remember
        self._mean = mean
        self._segment = -1
        self._input: Input
        self._keep = keep
        self._observe = observe

    def lanes(self) -> OneLane:
        """One."""
        return OneLane(np.array([[self.cuts[0].start], *([cut.stop] for cut in self.cuts)]))

    def step(self, move: Move) -> Step:
        """A step in floats."""
        segment, begin, end, _ = move
        if segment != self._segment:
            self._segment, self._input = segment, self.cuts[segment].u
        return Step(begin, end, end - begin, self._input)

    def norms(self, ratio: Tensor) -> float:
        """The worst sample, or the root mean square over samples."""
        ratio = ratio.detach()
        if self._mean:
            return float(torch.linalg.vector_norm(ratio)) / math.sqrt(max(1, ratio.numel()))
        return ratio.max().item()

    def choose(self, lanes: bool, new: Tensor, old: Tensor) -> Tensor:
        """All or nothing."""
        return new if lanes else old

    def accept(self, lanes: bool, move: Move, step: Step, h: Tensor, following: Tensor) -> None:
        """Note the step and hand it on."""
        _, start, stop, fresh = move
        self.taken.append(step._replace(fresh=fresh))
        if not self.tracked:
            self.outputs.extend(self._keep(AcceptedStep(start, stop, h, following, step.u)))
        elif self._remember:
            self.nodes.append(following)
        self._observe(start, stop, following)

    def fail(self, lanes: bool, code: ReturnCode, details: Callable[[int], str]) -> None:
        """The whole solve ends."""
        raise Halt(code, details(0))


class SampleFrame(Frame):
    """A lane for every sample.

    ``observe(t, h, count, advance)`` sees time and state of all samples after each iteration that accepted a
    step, with the number of samples that moved and the mean time by which they did; it may raise Halt.
    """

    def __init__(
        self, grid: SampleGrid, h: Tensor, observe: Callable[[Tensor, Tensor, int, float], None]
    ) -> None:
        self.grid = grid
        self._edges = grid.numbers
        self.jumps = grid.jumps
        lanes = self._edges.shape[1]
        self.codes = [ReturnCode.SUCCESS] * lanes
        self.details = [ReturnCode.SUCCESS.message] * lanes
        self.states = [h]
        self._observe = observe
        self._taken: list[tuple[Booleans, Move]] = []
        self._segment: Integers | None = None
        self._input: Input

    def lanes(self) -> ManyLanes:
        """One per sample."""
        return ManyLanes(self._edges)

    def step(self, move: Move) -> Step:
        """A step in tensors (*batch); the input is looked up when a sample enters another interval."""
        segment = move.segment
        if self._segment is None or not np.array_equal(segment, self._segment):
            samples = np.arange(len(segment))
            left, right = self._edges[segment, samples], self._edges[segment + 1, samples]
            (self._input,) = self.grid.inputs(self.grid.tensor(left[None]), self.grid.tensor(right[None]))
            self._segment = segment.copy()
        begin, end = self.grid.tensor(move.start), self.grid.tensor(move.stop)
        return Step(begin, end, end - begin, self._input)

    def norms(self, ratio: Tensor) -> Floats:
        """Every sample counts for itself."""
        return np.array(ratio.detach().reshape(-1).tolist(), dtype=np.float64)

    def choose(self, lanes: Booleans, new: Tensor, old: Tensor) -> Tensor:
        """By a mask over samples."""
        return new if lanes.all() else torch.where(self.grid.tensor(lanes).unsqueeze(-1), new, old)

    def accept(self, lanes: Booleans, move: Move, step: Step, h: Tensor, following: Tensor) -> None:
        """Note who moved where."""
        self._taken.append((lanes, move))
        self.states.append(following)
        moved = ManyLanes.where(lanes, move.stop, move.start)
        advance = float(np.mean(moved - move.start))
        self._observe(self.grid.tensor(moved), following, int(lanes.sum()), advance)

    def fail(self, lanes: Booleans, code: ReturnCode, details: Callable[[int], str]) -> None:
        """These samples end with the code; the others go on."""
        for lane in np.flatnonzero(lanes):
            self.codes[lane] = code
            self.details[lane] = details(int(lane))

    def plan(self) -> tuple[Plan, Integers]:
        """The steps of every sample without the rejected ones in between, and for each node (step + 1,
        sample) the number of the state in ``states``."""
        lanes = self._edges.shape[1]
        taken = np.array([moving for moving, _ in self._taken], np.bool_).reshape(-1, lanes)
        counts = taken.sum(0)
        # Iterations in which a sample moved come first, in their order.
        order = np.argsort(~taken, axis=0, kind="stable")
        samples = np.arange(lanes)

        def compact(part: int, dtype: type) -> np.ndarray[tuple[int, ...], np.dtype[Any]]:
            rows: np.ndarray[tuple[int, ...], np.dtype[Any]] = np.array(
                [move[part] for _, move in self._taken], dtype
            )
            return rows.reshape(-1, lanes)[order, samples]

        segment, fresh = compact(0, np.int64), compact(3, np.bool_)
        start, stop = compact(1, np.float64), compact(2, np.float64)
        left, right = self._edges[segment, samples], self._edges[segment + 1, samples]
        whole = Plan(
            self.grid,
            segment,
            start,
            stop,
            stop - start,
            slide(start, left, right),
            slide(stop, left, right),
            fresh,
            counts,
        )
        plan = whole.truncated(counts)
        reached = np.concatenate([np.zeros((1, lanes), np.int64), order[: len(plan)] + 1])
        last = np.where(counts > 0, reached[counts, samples], 0)
        over = np.arange(len(plan) + 1)[:, None] > counts
        return plan, np.where(over, last, reached)
