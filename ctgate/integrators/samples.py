"""Samples with times of their own: the knot intervals of each, and steps that they take side by side.

Sample i takes the steps that it would take alone. Step number j of the batch is step number j of every
sample, each with its own time and size; a sample that has no further steps stands still (a step of size 0).

THEORY.md 11.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ctgate.controls.base import differentiated
from ctgate.controls.times import rounding_of
from ctgate.integrators.grid import Input, NoInput, Step, time_resolution
from ctgate.problem import ODEProblem

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Booleans = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


class SampleGrid:
    """The knot intervals of every sample.

    ``edges`` (edge, *batch) float64, non-decreasing along the first dimension, with the graph of knots and
    spans; where a sample has fewer intervals than others, or knots outside its span, intervals have length
    zero. ``numbers`` are its values, (edge, sample), the batch flattened.
    """

    def __init__(self, prob: ODEProblem) -> None:
        self.prob = prob
        self.batch = prob.h0.shape[:-1]
        self.device = prob.h0.device
        self.resolution = time_resolution(prob.control)
        self.jumps = prob.control is not None and not prob.control.continuous
        self.edges = self._edges()
        # Whether a derivative with respect to times is wanted.
        self.moving = differentiated(self.edges)
        # As a list, which tensors under a torch.func transform can give and arrays they cannot.
        rows = self.edges.detach().reshape(len(self.edges), -1).tolist()
        self.numbers: Floats = np.array(rows, np.float64).reshape(len(rows), -1)

    def _edges(self) -> Tensor:
        start, stop = self.prob.sample_spans()
        ends = [start[None], stop[None]]
        if self.prob.control is not None and len(self.prob.control.sample_knots):
            knots = self.prob.control.sample_knots.to(self.device)
            missing = len(self.batch) - (knots.ndim - 1)
            knots = knots.reshape(len(knots), *(1,) * missing, *knots.shape[1:])
            # A knot within rounding of an end is that end; one outside leaves an interval without length.
            early = knots <= start + rounding_of(start.detach(), self.resolution)
            late = knots >= stop - rounding_of(stop.detach(), self.resolution)
            ends.insert(1, torch.where(early, start, torch.where(late, stop, knots)))
        return torch.cat([end.expand(len(end), *self.batch) for end in ends])

    def tensor(self, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
        """Numbers (..., sample) as a tensor (..., *batch)."""
        return torch.from_numpy(values).to(self.device).reshape((*values.shape[:-1], *self.batch))

    def inputs(self, start: Tensor, stop: Tensor) -> Sequence[Input]:
        """The inputs on intervals (n, *batch), each inside one knot interval of each sample."""
        if self.prob.control is None:
            return [NoInput()] * len(start)
        return self.prob.control.on_samples(start, stop)


@dataclass(frozen=True)
class Plan:
    """Steps of every sample, arrays (step, sample), on the intervals ``segment`` of the grid.

    ``start_slide``, ``stop_slide`` in [0, 1] say how a node moves with the two edges of its interval: as
    (1 - slide) left + slide right. That is what gradients with respect to times see; sizes are otherwise
    constants.
    """

    grid: SampleGrid
    segment: Integers
    start: Floats
    stop: Floats
    dt: Floats
    start_slide: Floats
    stop_slide: Floats
    fresh: Booleans
    counts: Integers

    def __len__(self) -> int:
        return len(self.start)

    @cached_property
    def steps(self) -> list[Step]:
        """The steps, with the graph of the edges, and the inputs on them."""
        grid = self.grid
        start, stop, dt = (grid.tensor(part) for part in (self.start, self.stop, self.dt))
        # A sample that stands still is evaluated when it began: it may stand before a pole.
        standing = dt == 0.0
        idle = (self.dt == 0.0).any(-1).tolist()
        begin = torch.where(standing, grid.edges[0].detach(), start)
        inputs = grid.inputs(begin, torch.where(standing, begin, stop))
        if grid.moving:
            segment = grid.tensor(self.segment)
            # Zero, with the graph of the edges.
            motion = grid.edges - grid.edges.detach()
            left, right = motion.gather(0, segment), motion.gather(0, segment + 1)
            start_motion = torch.lerp(left, right, grid.tensor(self.start_slide))
            stop_motion = torch.lerp(left, right, grid.tensor(self.stop_slide))
            begin, stop = begin + torch.where(standing, 0.0, start_motion), stop + stop_motion
            dt = dt + (stop_motion - start_motion)
        masks = [mask if some else None for mask, some in zip(standing.unbind(0), idle, strict=True)]
        fresh = [bool(row.any()) for row in self.fresh]
        movers: list[int] = np.argmax(self.dt > 0.0, axis=-1).tolist()
        parts = (begin.unbind(0), stop.unbind(0), dt.unbind(0), inputs, fresh, masks, movers)
        return [Step(*part) for part in zip(*parts, strict=True)]

    def truncated(self, counts: Integers) -> "Plan":
        """The first ``counts`` (sample,) steps of every sample; afterwards it stands still."""
        counts = np.minimum(counts, self.counts)
        if len(self) == 0:
            return replace(self, counts=counts)
        kept = max(int(counts.max(initial=0)), 0)
        over = np.arange(kept)[:, None] >= counts
        samples = np.arange(len(counts))
        last = np.maximum(counts - 1, 0)
        ended = counts > 0

        def held(at_stop: Floats, at_start: Floats) -> Floats:
            return np.where(ended, at_stop[last, samples], at_start[0])

        node, slide = held(self.stop, self.start), held(self.stop_slide, self.start_slide)
        return replace(
            self,
            segment=np.where(over, self.segment[last, samples], self.segment[:kept]),
            start=np.where(over, node, self.start[:kept]),
            stop=np.where(over, node, self.stop[:kept]),
            dt=np.where(over, 0.0, self.dt[:kept]),
            start_slide=np.where(over, slide, self.start_slide[:kept]),
            stop_slide=np.where(over, slide, self.stop_slide[:kept]),
            fresh=self.fresh[:kept] & ~over,
            counts=counts,
        )


def fixed_plan(grid: SampleGrid, dt: float) -> Plan:
    """Steps of size ``dt`` from the start of each interval of each sample, the last one shortened to land on
    its end: for each sample the steps of :class:`ctgate.integrators.grid.FixedSteps`.

    A node moves with the left edge of its interval, the last one with the right edge.
    """
    edges = grid.numbers
    lengths = np.diff(edges, axis=0)
    far = np.maximum(np.maximum(np.abs(edges[:-1]), np.abs(edges[1:])), dt)
    slack = np.minimum(rounding_of(1.0, grid.resolution) * far, 1e-3 * dt)
    counts = np.where(lengths > 0.0, np.maximum(np.ceil((lengths - slack) / dt), 1.0), 0.0).astype(np.int64)
    totals = counts.sum(0)
    shape = (int(totals.max(initial=0)), edges.shape[1])
    segment, index = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for sample, total in enumerate(totals):
        own = counts[:, sample]
        segment[:total, sample] = np.repeat(np.arange(len(own)), own)
        before = np.concatenate([[0], np.cumsum(own)[:-1]])
        index[:total, sample] = np.arange(total) - before[segment[:total, sample]]
    samples = np.arange(shape[1])
    left, right = edges[segment, samples], edges[segment + 1, samples]
    last = index == counts[segment, samples] - 1
    start = left + index * dt
    stop = np.where(last, right, left + (index + 1) * dt)
    size = np.where(np.abs(stop - start - dt) <= slack[segment, samples], dt, stop - start)
    whole = Plan(
        grid,
        segment,
        start,
        stop,
        size,
        np.zeros(shape),
        last.astype(np.float64),
        np.ones(shape, np.bool_),
        totals,
    )
    return whole.truncated(totals)


def slide(node: Floats, left: Floats, right: Floats) -> Floats:
    """Where in its interval a node is, from 0 to 1."""
    length = right - left
    return np.where(length > 0.0, (node - left) / np.where(length > 0.0, length, math.inf), 0.0)
