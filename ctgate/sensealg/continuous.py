r"""The gradient as an integral along the adjoint: a(t) backwards in time, and what it collects on its way.

.. math:: -\frac{da}{dt} = A^\top a + \frac{\partial\ell}{\partial h}, \qquad
          \frac{dL}{d\theta} = \int B^\top a\,dt, \qquad \frac{dL}{dh_0} = a(t_0),

with a jump of a wherever the loss looks at the state. THEORY.md 13.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ctgate.algorithms import Algorithm, NativeAdaptiveAlgorithm
from ctgate.controls import Control, FunctionControl
from ctgate.controls.reversal import Reversed
from ctgate.controls.sampled import SampledControl
from ctgate.controls.times import FLOAT64_EPS, rounding_of
from ctgate.dense import Dense, Extension
from ctgate.integrators.recorder import Stats
from ctgate.problem import ODEProblem
from ctgate.retcode import ReturnCode, SolveError
from ctgate.sensealg.reverse import Adjoint, AugmentedAdjoint, Source

# States, times and units that a quadrature evaluates at once.
_CHUNK = 1 << 21
# A step this many times the rounding of a time is a hint for the first one of the next stretch.
_WORTH = 16.0


class Solved(Protocol):
    """What a solve gives, as far as an adjoint needs it."""

    @property
    def hs(self) -> Tensor: ...

    @property
    def ts(self) -> Tensor: ...

    @property
    def dense(self) -> Extension | str: ...

    @property
    def retcode(self) -> ReturnCode: ...

    @property
    def message(self) -> str: ...

    @property
    def stats(self) -> Stats: ...


Solver = Callable[..., Solved]


@dataclass
class Jump:
    """Where the loss looks at the state: a time, or one per sample ``(*batch)``, and dl/dh there."""

    t: float | Tensor
    cotangent: Tensor


@dataclass
class Stretch:
    """The adjoint on one stretch: ``nodes`` (s = -t) and the extension in s; its states are a, or (a, q)."""

    nodes: Tensor
    dense: Extension


@dataclass
class Pulled:
    """A gradient: by the initial state, by parameter name, by each of the control's tensors."""

    state: Tensor
    parameters: dict[str, Tensor]
    inputs: list[Tensor]
    stretches: list[Stretch] = field(default_factory=list)


def control_tensors(prob: ODEProblem) -> list[Tensor]:
    """The tensors that the control is made of and that want a gradient."""
    control = prob.control
    if isinstance(control, SampledControl):
        return [control.xs] if control.xs.requires_grad else []
    if isinstance(control, FunctionControl) and isinstance(control.fn, nn.Module):
        return [parameter for parameter in control.fn.parameters() if parameter.requires_grad]
    return []


class ReversePass:
    """One backward pass: the adjoint from the last jump to the start, and the integrals along it.

    Parameters: ``names`` of the parameters whose gradients are wanted; ``inputs``, the control's tensors;
    ``augmented`` puts the parameter integral into the equation, otherwise it is taken by quadrature;
    ``solver`` solves an ODEProblem; ``max_steps`` is its limit on each stretch between two jumps; with
    ``keep`` the stretches are kept. Attribute ``scale`` is the unit of ``atol``.
    """

    def __init__(
        self,
        prob: ODEProblem,
        alg: Algorithm,
        tolerances: tuple[float, float] | None,
        solver: Solver,
        names: Sequence[str],
        inputs: Sequence[Tensor],
        augmented: bool,
        stats: Stats,
        source: Source | None = None,
        keep: bool = False,
        max_steps: int | None = None,
    ) -> None:
        self.prob = prob
        self.alg = alg
        self.tolerances = tolerances
        self.solver = solver
        self.names = list(names)
        self.inputs = list(inputs)
        self.augmented = augmented and bool(names)
        self.stats = stats
        self.source = source
        self.keep = keep
        self.max_steps = max_steps
        self.scale = 1.0
        self._control: Control | None = None if prob.control is None else Reversed(prob.control)
        self._last_step: float | None = None
        zeros = prob.h0.new_zeros(prob.h0.shape)
        parameters = prob.named_parameters()
        self.result = Pulled(
            zeros,
            {name: torch.zeros_like(parameters[name]) for name in names},
            [torch.zeros_like(x) for x in inputs],
        )

    @torch.no_grad()
    def run(self, path: Extension, start: float | Tensor, jumps: Sequence[Jump]) -> None:
        """Carry the adjoint over ``jumps`` (the latest first) and on to ``start``, along ``path``.

        The adjoint goes on from where the call before left it.
        """
        a = self.result.state
        for here, following in zip(jumps, [*(jump.t for jump in jumps[1:]), start], strict=True):
            a = self._carry(path, a + here.cotangent, here.t, following)
        self.result.state = a

    def _carry(self, path: Extension, a: Tensor, late: float | Tensor, early: float | Tensor) -> Tensor:
        """The adjoint from ``late`` back to ``early``."""
        still = late <= early
        if bool(still.all()) if isinstance(still, Tensor) else still:
            return a
        equation: Adjoint
        if self.augmented:
            equation = AugmentedAdjoint(self.prob, path, self.names, self.source)
            begin = torch.cat((a, a.new_zeros(*a.shape[:-1], equation.integral_size)), -1)
        else:
            equation = Adjoint(self.prob, path, self.source)
            begin = a
        problem = ODEProblem(equation, begin, (-late, -early), control=self._control)
        options: dict[str, Any] = {"max_steps": self.max_steps}
        if self.tolerances is not None:
            rtol, atol = self.tolerances
            options |= {"rtol": rtol, "atol": atol * self.scale}
        run = self.solver(problem, self._algorithm(late, early), **options)
        self.stats.evaluations_backward += run.stats.evaluations
        self.stats.jacobians += run.stats.jacobians
        if run.retcode is ReturnCode.INTERRUPTED:
            raise KeyboardInterrupt(run.message)
        if not run.retcode.good:
            raise SolveError(f"the adjoint's solve ended with {run.retcode.name}: {run.message}", run.retcode)
        dense = run.dense
        assert not isinstance(dense, str)
        self._last_step = float(dense.nodes.diff(dim=0).max())
        if self.keep and isinstance(dense, Dense):
            # What is kept must not follow the parameters when they change.
            dense = dense.frozen()
        stretch = Stretch(dense.nodes, dense)
        if self.keep:
            self.result.stretches.append(stretch)
        end = run.hs[-1]
        size = a.shape[-1]
        if self.augmented:
            self._collect(end[..., size:])
        if self.inputs or (self.names and not self.augmented):
            self._integrate(stretch, path)
        return end[..., :size]

    def _algorithm(self, late: float | Tensor, early: float | Tensor) -> Algorithm:
        """The method, with the first step that the last stretch suggests."""
        alg = self.alg
        if not isinstance(alg, NativeAdaptiveAlgorithm):
            return alg
        if isinstance(late, Tensor) or isinstance(early, Tensor):
            # Times of each sample, also where the forward solve had one clock.
            alg = replace(alg, per_sample=True)
        reach = max(float(abs(t).max()) if isinstance(t, Tensor) else abs(t) for t in (late, early))
        if self._last_step and self._last_step > _WORTH * rounding_of(reach, FLOAT64_EPS):
            alg = replace(alg, first_step=min(self._last_step, alg.max_step))
        return alg

    def _collect(self, integral: Tensor) -> None:
        """Add the samples' integrals to the gradient."""
        total = integral.reshape(-1, integral.shape[-1]).sum(0)
        parameters = self.prob.named_parameters()
        blocks = torch.split(total, [parameters[name].numel() for name in self.names])
        for name, block in zip(self.names, blocks, strict=True):
            self.result.parameters[name] += block.reshape(parameters[name].shape)

    def _integrate(self, stretch: Stretch, path: Extension) -> None:
        r"""Add the integral of B^T a, and of C^T a through the control, over a stretch."""
        for t, weight, a in quadrature_of(stretch, self.alg.dense_order, self.prob.h0.shape):
            weighted = weight.to(a.dtype) * a
            pull = ParameterPull(self.prob, path, t, weighted)
            if self.names and not self.augmented:
                for name, block in pull.parameters(self.names).items():
                    self.result.parameters[name] += block
            if self.inputs:
                for total, part in zip(self.result.inputs, pull.inputs(self.inputs), strict=True):
                    total += part


def quadrature_of(
    stretch: Stretch, dense_order: int, shape: torch.Size
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Gauss-Legendre points of the steps of a stretch, in chunks: forward times ``(m,)`` or ``(m, *batch)``,
    weights that multiply states, and the adjoint ``(m, *batch, state)``."""
    points = dense_order // 2 + 1
    place, weight = np.polynomial.legendre.leggauss(points)
    nodes = stretch.nodes
    theta = torch.from_numpy(0.5 * (place + 1.0)).to(nodes.device)
    portion = torch.from_numpy(0.5 * weight).to(nodes.device)
    steps = max(1, _CHUNK // (points * max(1, shape.numel())))
    column = (1, -1, *(1,) * (nodes.ndim - 1))
    for first in range(0, len(nodes) - 1, steps):
        part = nodes[first : first + steps + 1]
        start, size = part[:-1].unsqueeze(1), part.diff(dim=0).unsqueeze(1)
        s = (start + theta.reshape(column) * size).flatten(0, 1)
        weights = (portion.reshape(column) * size).flatten(0, 1)
        a = stretch.dense(s)[..., : shape[-1]]
        yield -s, weights.reshape(*weights.shape, *(1,) * (len(shape) + 1 - weights.ndim)), a


class ParameterPull:
    """B^T a and C^T a at many times at once, along a path. Times ``(m,)`` or ``(m, *batch)``, a with its
    weight ``(m, *batch, state)``."""

    def __init__(self, prob: ODEProblem, path: Extension, t: Tensor, a: Tensor) -> None:
        self.t = t
        self.a = a
        self.prob = prob
        equation = Adjoint(prob, path)
        hs = path(t)
        us = None
        if prob.control is not None:
            us = prob.control(t)
            us = us.reshape(len(t), *(1,) * (hs.ndim - us.ndim), *us.shape[1:])
        column = t.reshape(*t.shape, *(1,) * (hs.ndim - t.ndim))
        self.around = equation.linearized(column, hs, us)

    def _rows(self) -> Iterator[tuple[Any, Tensor]]:
        if len(self.around) == 1 and self.around[0].h.ndim == self.a.ndim:
            return iter([(self.around[0], self.a)])
        return zip(self.around, self.a.unbind(0), strict=True)

    def parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The sum over times and samples of B^T a, by name."""
        total: dict[str, Tensor] = {}
        for lin, a in self._rows():
            blocks = lin.parameter_vjp(a)
            for name in names:
                total[name] = total[name] + blocks[name] if name in total else blocks[name]
        return total

    def inputs(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The sum of C^T a through the control, by each of its tensors."""
        rows = [lin.input_vjp(a) for lin, a in self._rows()]
        slopes = rows[0] if rows[0].ndim == self.a.ndim else torch.stack(rows)
        control = self.prob.control
        assert control is not None
        with torch.enable_grad():
            us = control(self.t)
            us = us.reshape(len(self.t), *(1,) * (slopes.ndim - us.ndim), *us.shape[1:]).expand_as(slopes)
            return torch.autograd.grad(us, list(tensors), slopes, materialize_grads=True)
