r"""Benettin's algorithm: tangents are carried along, and now and then a QR factorisation keeps them apart."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctgate.dynamics.exponents import Growth
from ctgate.dynamics.lyapunov_plan import Plan
from ctgate.dynamics.tangents import tangents_of
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.recorder import Stats
from ctgate.integrators.steppers import method_of, run_steps, stretch_length

# Stretches of time that are kept apart, and the most steps between two factorisations.
_STRETCHES, _LONGEST = 240, 1024


class Benettin:
    """State and tangents on their way, and what they grew by.

    ``bar`` is told how much time has passed. Attributes: ``lost`` (*batch), samples that are no longer
    finite; ``resolved`` (*batch, k), where no single factorisation hid a growth factor behind rounding;
    ``intervals``, the steps between factorisations.
    """

    def __init__(self, plan: Plan, bar: Any) -> None:
        prob = plan.prob
        self._plan, self._bar = plan, bar
        self._h = prob.h0.detach().clone()
        batch, size = self._h.shape[:-1], self._h.shape[-1]
        # The same for all samples, and the first k of those of the full spectrum.
        noise = torch.randn(
            size, size, generator=torch.Generator().manual_seed(plan.seed), dtype=torch.float64
        )
        unit = torch.linalg.qr(noise[:, : plan.k])[0].mT.to(self._h)
        self._unit = unit.reshape(plan.k, *(1,) * len(batch), size).expand(plan.k, *self._h.shape)
        self._v = self._unit.clone()
        self._tangents = tangents_of(prob, plan.alg, plan.k, plan.volumes)
        numbers = torch.finfo(self._h.dtype)
        self._eps = numbers.eps
        # How much shorter than itself a tangent's own part may become, as a logarithm, and a tangent.
        self._limit, self._range = -0.2 * math.log(numbers.eps), 0.25 * math.log(numbers.max)
        self._rate, self._length = 0.0, 1
        self._times: list[float] = [float(plan.ends[plan.counted])]
        self._logs: list[Tensor] = []
        self._volumes: list[Tensor] = []
        self.lost = torch.zeros(batch, dtype=torch.bool, device=self._h.device)
        self.resolved = torch.ones(*batch, plan.k, dtype=torch.bool, device=self._h.device)
        self.intervals: list[int] = []

    def settle(self) -> None:
        """Leave the transient behind: the state alone."""
        plan = self._plan
        method = method_of(plan.alg)
        dynamics = Dynamics(plan.prob, Stats(repr(plan.alg), "native", ""))
        piece = stretch_length(plan.prob, method)
        for first in range(0, plan.first, piece):
            last = min(first + piece, plan.first)
            self._h, _, _ = run_steps(
                dynamics, method, plan.steps[first:last], self._h, None, lambda step: ()
            )
            self._passed(first, last)
        self._replace(~self._h.isfinite().all(-1))

    def measure(self) -> None:
        """Carry the tangents through the warm-up and on to the end."""
        plan = self._plan
        total = len(plan.steps) - plan.counted
        longest = max(1, min(_LONGEST, total // (2 * plan.blocks)))
        self._carry(plan.first, plan.counted, longest)
        self._tangents.volume.zero_()
        # A stretch ends with the first factorisation past its mark.
        marks = plan.counted + np.unique(np.linspace(0, total, min(_STRETCHES, total) + 1).astype(int))[1:]
        number = plan.counted
        while number < len(plan.steps) and not bool(self.lost.all()):
            mark = int(marks[np.searchsorted(marks, number, side="right")])
            number, logs = self._carry(number, mark, longest, beyond=len(plan.steps))
            self._close(number, logs)

    def growth(self) -> Growth:
        """What is known, the batch flattened."""
        shape = (len(self._logs), self.lost.numel(), self._plan.k)
        logs = torch.stack(self._logs).cpu().numpy().reshape(shape) if self._logs else np.empty(shape)
        volumes = None
        if self._plan.volumes:
            rows = torch.stack(self._volumes).cpu().numpy() if self._volumes else np.empty(shape[:2])
            volumes = rows.reshape(shape[:2])
        return Growth(np.array(self._times), logs, volumes)

    def _carry(self, number: int, stop: int, longest: int, beyond: int | None = None) -> tuple[int, Tensor]:
        """Go from step ``number`` to ``stop``, or with the last factorisation as far as ``beyond``; return
        the number that was reached and the growth (*batch, k)."""
        plan, fixed = self._plan, self._plan.interval is not None
        logs = torch.zeros(*self.lost.shape, plan.k, dtype=torch.float64, device=self.lost.device)
        while number < stop:
            last = min(number + self._interval(longest), stop if beyond is None else beyond)
            before = self._h, self._v, self._tangents.volume.clone()
            self._h, self._v = self._tangents.advance(plan.steps[number:last], self._h, self._v)
            self._replace(~(self._h.isfinite().all(-1) & self._v.isfinite().all(-1).all(0)))
            q, r = torch.linalg.qr(self._v.movedim(0, -1))
            own, whole = r.diagonal(dim1=-2, dim2=-1).abs(), torch.linalg.vector_norm(r, dim=-2)
            left = (own / whole).nan_to_num(0.0)
            loss = min(-math.log(max(float(left.min()), 1e-300)), -math.log(self._eps))
            steps = last - number
            self._note(loss, whole, steps)
            if loss > 1.25 * self._limit and steps > 1 and not fixed:
                # Too far. Once more, in shorter pieces.
                self._h, self._v = before[:2]
                self._tangents.volume.copy_(before[2])
                continue
            self.resolved &= left > 100.0 * self._eps
            self.intervals.append(steps)
            self._v = q.movedim(-1, 0)
            logs += own.double().log()
            self._passed(number, last)
            number = last
        return number, logs

    def _interval(self, longest: int) -> int:
        """The number of steps after which a tangent will have lost what it may."""
        if self._plan.interval is not None:
            return self._plan.interval
        if self.intervals:
            wanted = int(self._limit / self._rate) if self._rate > 0.0 else longest
            self._length = max(1, min(wanted, 4 * self._length, longest))
        return self._length

    def _note(self, loss: float, whole: Tensor, steps: int) -> None:
        """How fast tangents lose digits, and how fast they grow or shrink, which counts where it is much."""
        sizes = whole[whole > 0.0].log().abs()
        size = float(sizes.max()) if len(sizes) else 0.0
        self._rate = max(loss / steps, size * self._limit / self._range / steps, 0.9 * self._rate)

    def _replace(self, lost: Tensor) -> None:
        """Samples that are no longer finite are given numbers that are, and count no more."""
        if not bool(lost.any()):
            return
        self.lost |= lost
        self._h = torch.where(lost.unsqueeze(-1), self._plan.prob.h0, self._h)
        self._v = torch.where(lost.unsqueeze(-1), self._unit, self._v)
        self._tangents.volume[lost] = 0.0

    def _close(self, number: int, logs: Tensor) -> None:
        """A stretch of time is over."""
        self._times.append(float(self._plan.ends[number]))
        self._logs.append(torch.where(self.lost.unsqueeze(-1), torch.nan, logs))
        if self._plan.volumes:
            self._volumes.append(torch.where(self.lost, torch.nan, self._tangents.volume))
            self._tangents.volume.zero_()

    def _passed(self, first: int, last: int) -> None:
        self._bar.update(float(self._plan.ends[last] - self._plan.ends[first]))
