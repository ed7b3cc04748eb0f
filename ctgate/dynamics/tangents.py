r"""Tangents beside a trajectory: the derivative of every discrete step, on blocks of vectors.

With :math:`h' = S(h)` one step of the method, :math:`M = \partial S/\partial h` acts on a block of vectors
stage by stage: an explicit Runge-Kutta method applied to :math:`\dot v = A(t, h(t))\,v` at the stages of the
state is that derivative, to the last digit and not only to the order of the method. How A acts is chosen for
speed: as products with vectors, as one dense matrix, or as the matrices M of many steps at once.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from ctgate.algorithms import Euler, ExponentialEuler, FixedStepAlgorithm
from ctgate.fields import Jacobian
from ctgate.fields.jacobian import pullback, unit_vectors
from ctgate.integrators.exponential import phi1, relax
from ctgate.integrators.fused_runge_kutta import inputs_at
from ctgate.integrators.grid import Step
from ctgate.integrators.runge_kutta import Tableau
from ctgate.integrators.steppers import TABLEAUS
from ctgate.integrators.stretches import fusable
from ctgate.kernels import AnalyticLinearization
from ctgate.kernels.fused import EULER, EXPONENTIAL, Rule, push_block, run
from ctgate.kernels.fused.scales import Scales
from ctgate.problem import ODEProblem

# Systems up to this size: the matrices of many steps are evaluated together, since calls cost more than
# arithmetic.
_SMALL = 48
# Numbers in the matrices, or in the states, of the steps that are taken together.
_ROOM = 2**22
# Numbers in the tangents that a fused cell moves together.
_CACHED = 2**16
# What the step of a map starts from: time, state, input.
Start = tuple[Any, Tensor, Tensor | None]


class Tangents(abc.ABC):
    r"""Takes states ``(*batch, state)`` and tangents ``(k, *batch, state)`` over steps.

    With ``volumes`` it also adds up, per sample, what volumes grow by: for the flow
    :math:`\int \mathrm{tr} A\,dt`, by the method's own quadrature, and for maps (Euler, exponential Euler)
    :math:`\sum \log|\det M|`.
    """

    def __init__(self, prob: ODEProblem, volumes: bool) -> None:
        self.prob = prob
        self.volumes = volumes
        self.volume = torch.zeros(prob.h0.shape[:-1], dtype=torch.float64, device=prob.h0.device)

    @abc.abstractmethod
    def advance(self, steps: Sequence[Step], h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """State and tangents after the steps."""


class StageTangents(Tangents):
    """Stage by stage: the field is linearized at each stage, and tangents go through the same formula.

    With ``dense`` A is a matrix, else its products with vectors are all that is formed.
    """

    def __init__(self, prob: ODEProblem, tableau: Tableau, dense: bool, volumes: bool) -> None:
        super().__init__(prob, volumes)
        self.tableau = tableau
        self.dense = dense

    def advance(self, steps: Sequence[Step], h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """State and tangents after the steps."""
        for step in steps:
            h, v = self._step(step, h, v)
        return h, v

    def _step(self, step: Step, h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        prob, tableau, dt = self.prob, self.tableau, step.dt
        maps: list[Callable[[Tensor], Tensor]] = []
        jacobians: list[Jacobian] = []

        def slope(stage: int, x: Tensor) -> Tensor:
            t = step.start + tableau.c[stage] * dt
            where = (t, x, step.u(t))
            if self.dense or self.volumes:
                jacobians.append(prob.call("jacobian", *where))
            if self.dense:
                maps.append(_rows_map(jacobians[-1]))
                value: Tensor = prob.call("forward", *where)
                return value
            around = prob.call("linearize", *where)
            maps.append(around.jvp)
            # Stated derivatives come with dh/dt itself.
            value = (
                around.slope if isinstance(around, AnalyticLinearization) else prob.call("forward", *where)
            )
            return value

        following = _stages(tableau, dt, h, slope)
        if self.volumes:
            self._add_volumes(jacobians, dt)
        start = v.movedim(0, -2) if self.dense else v
        if self.dense and tableau.stages == 1:
            return following, (start @ _euler_matrix(jacobians[0], dt).mT).movedim(-2, 0)
        moved = _stages(tableau, dt, start, lambda stage, x: maps[stage](x))
        return following, moved.movedim(-2, 0) if self.dense else moved

    def _add_volumes(self, jacobians: Sequence[Jacobian], dt: Any) -> None:
        if self.tableau.stages == 1:
            self.volume += torch.linalg.slogdet(_euler_matrix(jacobians[0], dt))[1].double()
            return
        for weight, jacobian in zip(self.tableau.b, jacobians, strict=True):
            self.volume += weight * dt * _trace(jacobian).double()


class StepMatrices(Tangents):
    """The matrices M of many steps at once, applied one after the other.

    ``tableau`` is that of the method, None for exponential Euler.
    """

    def __init__(self, prob: ODEProblem, tableau: Tableau | None, volumes: bool) -> None:
        super().__init__(prob, volumes)
        self.tableau = tableau
        size = prob.h0.shape[-1]
        stages = 1 if tableau is None else tableau.stages
        self._at_once = max(1, _ROOM // (stages * prob.h0.numel() * size))
        self._vmappable = True

    def advance(self, steps: Sequence[Step], h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """State and tangents after the steps."""
        rows = v.movedim(0, -2)
        for first in range(0, len(steps), self._at_once):
            piece = list(steps[first : first + self._at_once])
            h, matrices = self._exponential(piece, h) if self.tableau is None else self._stages(piece, h)
            for matrix in matrices:
                rows = rows @ matrix.mT
        return h, rows.movedim(-2, 0)

    def _stages(self, steps: Sequence[Step], h: Tensor) -> tuple[Tensor, Tensor]:
        prob, tableau = self.prob, self.tableau
        assert tableau is not None
        starts: list[list[Start]] = [[] for _ in tableau.c]
        for step in steps:

            def slope(stage: int, x: Tensor, step: Step = step) -> Tensor:
                t = step.start + tableau.c[stage] * step.dt
                starts[stage].append((t, x, step.u(t)))
                value: Tensor = prob.call("forward", *starts[stage][-1])
                return value

            h = _stages(tableau, step.dt, h, slope)
        sizes = _column([step.dt for step in steps], h)
        stages = [sizes * self.many(self._jacobian, rows) for rows in starts]
        unit = _identity_like(stages[0])
        matrices = _stages(tableau, 1.0, unit, lambda stage, x: stages[stage] @ x)
        if self.volumes and tableau.stages == 1:
            self.volume += torch.linalg.slogdet(matrices)[1].double().sum(0)
        elif self.volumes:
            for weight, stage in zip(tableau.b, stages, strict=True):
                self.volume += weight * stage.diagonal(dim1=-2, dim2=-1).double().sum((0, -1))
        return h, matrices

    def _exponential(self, steps: Sequence[Step], h: Tensor) -> tuple[Tensor, Tensor]:
        starts: list[Start] = []
        for step in steps:
            starts.append((step.start, h, step.u(step.start)))
            rate, drive = self.prob.call("rate_drive", *starts[-1])
            h = relax(h, rate, drive, step.dt)
        matrices = self.exponential(steps, starts)
        if self.volumes:
            self.volume += torch.linalg.slogdet(matrices)[1].double().sum(0)
        return h, matrices

    def exponential(self, steps: Sequence[Step], starts: Sequence[Start]) -> Tensor:
        """The matrices (step, *batch, state, state) of steps of exponential Euler."""
        sizes = sorted({float(step.dt) for step in steps})
        if len(sizes) == 1:
            return self.many(lambda t, x, u: self._relaxing(sizes[0], t, x, u), starts)
        rows = [self._relaxing(float(step.dt), *start) for step, start in zip(steps, starts, strict=True)]
        return torch.stack(rows)

    def _relaxing(self, dt: float, t: Any, h: Tensor, u: Tensor | None) -> Tensor:
        r"""The derivative of :math:`h e^{-x} + d\,dt\,\varphi_1(x)`, :math:`x = r\,dt`, for rate r and drive
        d: a row per unit of the pulled back pair, and the decay on the diagonal."""
        (rate, drive), pull = pullback(lambda x: self.prob.call("rate_drive", t, x, u), h)
        exponent = rate * dt
        mean, bend = torch.func.jvp(phi1, (exponent,), (torch.ones_like(exponent),))[:2]
        decay = torch.exp(-exponent)
        by_rate, by_drive = dt * (dt * drive * bend - h * decay), dt * mean
        rows: Tensor = vmap(lambda unit: pull((by_rate * unit, by_drive * unit)))(unit_vectors(h))
        return rows.movedim(0, -2) + torch.diag_embed(decay)

    def _jacobian(self, t: Any, h: Tensor, u: Tensor | None) -> Tensor:
        jacobian: Jacobian = self.prob.call("jacobian", t, h, u)
        return jacobian.full()

    def many(self, function: Callable[..., Tensor], starts: Sequence[Start]) -> Tensor:
        """A function of (t, h, u) at many starts, in one call where the field allows that, else by vmap, or
        one by one where what the field does depends on numbers."""
        field, (_, like, seen) = self.prob.field, starts[0]
        hs = torch.stack([h for _, h, _ in starts])
        us = None
        if seen is not None:
            us = torch.stack([u for _, _, u in starts if u is not None])
        ts = torch.tensor([t for t, _, _ in starts], dtype=torch.float64, device=like.device)
        if field.autonomous or field.broadcasts_time:
            if us is not None:
                us = us.reshape(len(us), *(1,) * (hs.ndim - us.ndim), *us.shape[1:])
            return function(0.0 if field.autonomous else ts.reshape(-1, *(1,) * (hs.ndim - 1)), hs, us)
        if self._vmappable and len(starts) > 1:
            try:
                found: Tensor = vmap(function, in_dims=(0, 0, None if us is None else 0))(ts, hs, us)
                return found
            except RuntimeError:
                self._vmappable = False
        return torch.stack([function(*start) for start in starts])


class FusedTangents(Tangents):
    """Steps of one evaluation on the buffers of a fused cell: all states first, the elementwise derivatives
    of all steps together, and then a product a step."""

    def __init__(self, prob: ODEProblem, rule: Rule, volumes: bool) -> None:
        super().__init__(prob, volumes)
        self.rule = rule
        self.cell = prob.field.fuse({name: p.detach() for name, p in prob.named_parameters().items()})
        self._at_once = max(1, _ROOM // (16 * prob.h0.numel()))
        self._dense = StepMatrices(prob, None if rule.exponential else TABLEAUS[Euler], volumes)
        self.volume = self._dense.volume

    def advance(self, steps: Sequence[Step], h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """State and tangents after the steps."""
        batch, cell, rule = h.shape, self.cell, self.rule
        h, v = h.reshape(-1, h.shape[-1]), v.reshape(len(v), -1, v.shape[-1])
        for first in range(0, len(steps), self._at_once):
            piece = list(steps[first : first + self._at_once])
            dts = [float(step.dt) for step in piece]
            us = inputs_at(piece, (0.0,), batch[:-1])
            hs, parts = run(cell, None if us is None else us[:, 0], h, dts, rule)
            scale = Scales(dts, cell.pace, h).together
            v = self._push(cell.factors(parts, hs[:-1], scale, rule), v)
            if self.volumes:
                self._dense.advance(piece, h.view(batch), v[:0].view(0, *batch))
            h = hs[-1]
        return h.reshape(batch), v.reshape(len(v), *batch)

    def _push(self, factors: Sequence[Tensor], v: Tensor) -> Tensor:
        """As many samples at a time as stay in the cache, all steps of them."""
        samples, size = v.shape[1], max(1, _CACHED // max(1, len(v) * v.shape[2]))
        if samples <= size:
            return push_block(self.cell, tuple(factors), v)
        moved = torch.empty_like(v, memory_format=torch.contiguous_format)
        for first in range(0, samples, size):
            some = slice(first, first + size)
            own = tuple(part[:, some] if part.shape[1] == samples else part for part in factors)
            moved[:, some] = push_block(self.cell, own, v[:, some])
        return moved


def tangents_of(prob: ODEProblem, alg: FixedStepAlgorithm, k: int, volumes: bool) -> Tangents:
    """What carries ``k`` tangents of this problem fastest."""
    if isinstance(alg, ExponentialEuler):
        return (
            FusedTangents(prob, EXPONENTIAL, volumes) if fusable(prob) else StepMatrices(prob, None, volumes)
        )
    tableau, size = TABLEAUS[type(alg)], prob.h0.shape[-1]
    if size <= _SMALL:
        return StepMatrices(prob, tableau, volumes)
    dense = _dense_is_faster(prob, k)
    if isinstance(alg, Euler) and fusable(prob) and not dense:
        return FusedTangents(prob, EULER, volumes)
    return StageTangents(prob, tableau, dense, volumes)


def _dense_is_faster(prob: ODEProblem, k: int) -> bool:
    """Whether a product of A with k vectors is cheaper with the matrix. Making it costs as much as some
    dozens of products with a vector, or, by reverse differentiation, as many as it has rows; where the
    weights have no more rows than A, products cost no more than with A and share one matrix among samples."""
    size = prob.h0.shape[-1]
    rows = [p.shape[0] for name, p in prob.named_parameters().items() if name.endswith("weight_hh")]
    return 2 * k >= size and (not rows or sum(rows) > size)


def _stages(tableau: Tableau, dt: Any, x: Tensor, slope: Callable[[int, Tensor], Tensor]) -> Tensor:
    """One step of the method from x, with as few passes over the memory as there are slopes."""
    slopes: list[Tensor] = []
    for stage, row in enumerate(tableau.a):
        slopes.append(slope(stage, _added(x, dt, row, slopes)))
    return _added(x, dt, tableau.b, slopes)


def _added(x: Tensor, dt: Any, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    total = x
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            scale = dt * weight
            total = torch.add(x, slope, alpha=scale) if total is x else total.add_(slope, alpha=scale)
    return total


def _rows_map(jacobian: Jacobian) -> Callable[[Tensor], Tensor]:
    """A on rows (*batch, k, state)."""
    transposed, leak = jacobian.coupling.mT, jacobian.leak.unsqueeze(-2)
    return lambda rows: (rows @ transposed).addcmul_(rows, leak, value=-1.0)


def _euler_matrix(jacobian: Jacobian, dt: Any) -> Tensor:
    """M = 1 + dt A."""
    matrix: Tensor = dt * jacobian.coupling
    matrix.diagonal(dim1=-2, dim2=-1).add_(1.0 - dt * jacobian.leak)
    return matrix


def _trace(jacobian: Jacobian) -> Tensor:
    return jacobian.coupling.diagonal(dim1=-2, dim2=-1).sum(-1) - jacobian.leak.sum(-1)


def _identity_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)


def _column(sizes: Sequence[Any], h: Tensor) -> Tensor:
    """Sizes of steps, shaped to multiply matrices (step, *batch, state, state)."""
    return torch.tensor(sizes, dtype=h.dtype, device=h.device).reshape(-1, *(1,) * (h.ndim + 1))
