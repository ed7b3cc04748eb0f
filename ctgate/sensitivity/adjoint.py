r"""The adjoint of a solution: how the loss depends on the state at every time, and what that makes of the
parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ctgate.algorithms import Algorithm, Euler
from ctgate.controls.times import as_float64
from ctgate.options import choose_algorithm
from ctgate.sensitivity.courses import Course, FlowCourse, MapCourse
from ctgate.sensitivity.injections import explicit
from ctgate.sensitivity.labels import attributes, label, parameter_coordinates, time_coordinate
from ctgate.sensitivity.loss import Loss
from ctgate.sensitivity.propagators import check_solution
from ctgate.solution import Solution, known_times

Times = float | Sequence[float] | Tensor


@dataclass(frozen=True, eq=False)
class AdjointFlow:
    r"""The adjoint :math:`a(t) = dL/dh(t)` of a solution, and the gradient that it carries.

    Attributes:
        ts, a: times ``(time,)`` or ``(time, *batch)``, those of ``sol.ts``, for a map the ends of its steps,
            and the adjoint there ``(time, *batch, state)``. Where the loss looks at h(t) its slope there is
            included; NaN where a time is.
        value: the loss.
        gradient: dL/dtheta by parameter name.
        initial: dL/dh0, ``(*batch, state)``.
        control: dL/d of the control's tensors that require grad (the values of a sampled control).
        readout: gradients by the readout's parameters.

    Called with times it gives a(t): for a flow anywhere in the span, for a map (``Euler``) at its nodes.

    Source: THEORY.md 13.
    """

    solution: Solution
    loss: Loss
    ts: Tensor
    a: Float[Tensor, "time *batch state"]
    value: Tensor
    readout: dict[str, Tensor]
    course: Course

    @property
    def gradient(self) -> dict[str, Tensor]:
        """dL/dtheta by name."""
        return self.course.gradient

    @property
    def initial(self) -> Tensor:
        """dL/dh0."""
        return self.course.initial

    @property
    def control(self) -> list[Tensor]:
        """dL/d of the control's tensors."""
        return self.course.control

    @torch.no_grad()
    def __call__(self, t: Times) -> Tensor:
        """a(t): ``(*batch, state)`` at one time, ``(time, *batch, state)`` at several.

        Raises: ValueError outside the solution, or between the nodes of a map.
        """
        times = as_float64(t, "t")[0].detach().to(self.a.device)
        values = self.course.at(times.reshape(1) if times.ndim == 0 else times)
        return values[0] if times.ndim == 0 else values

    @torch.no_grad()
    def density(self, t: Times | None = None) -> dict[str, Tensor]:
        r"""The gradient density :math:`B(t)^\top a(t)` by parameter name, ``(time, *shape)``, the sum over
        samples, whose integral over time is the gradient.

        Times are shared ``(time,)``; None takes those of ``sol.ts``, or where samples have their own as many
        from the first start to the last end. For a map it is what each step contributes,
        :math:`\Delta_k B_k^\top a_{k+1}`, so that the sum is the gradient, and t must be None.

        Raises: ValueError outside the solution; RuntimeError if a tensor was changed since the solve.
        """
        return self.course.density(None if t is None else as_float64(t, "t")[0].reshape(-1))[1]

    @torch.no_grad()
    def to_xarray(self) -> xr.Dataset:
        """adjoint (time, batch, unit) and its norm, the norm of the gradient density (density_time,
        parameter), the gradient (entry), the loss; the batch flattened to one dim."""
        steps, size = len(self.a), self.a.shape[-1]
        values = self.a.detach().cpu().numpy().reshape(steps, -1, size)
        parameters = {name: tuple(block.shape) for name, block in self.gradient.items()}
        variables: dict[str, Any] = {
            "adjoint": (
                ("time", "batch", "unit"),
                values,
                label("adjoint dL/dh(t)", "loss per state"),
            ),
            "adjoint_norm": (
                ("time", "batch"),
                np.linalg.norm(values, axis=-1),
                label("Euclidean norm of the adjoint", "loss per state"),
            ),
            "loss": ((), float(self.value), label("loss", "1")),
        }
        coordinates = time_coordinate(self.ts)
        if parameters:
            discrete = isinstance(self.solution.alg, Euler)
            per = "step" if discrete else "unit of tau"
            times, density = self.course.density(None)
            norms = [block.reshape(len(block), -1).norm(dim=1).cpu().numpy() for block in density.values()]
            variables["density_norm"] = (
                ("density_time", "parameter"),
                np.stack(norms, 1),
                label("norm of the gradient density", f"loss per unit of parameter and {per}"),
            )
            whole = torch.cat([block.reshape(-1) for block in self.gradient.values()]).cpu().numpy()
            variables["gradient"] = ("entry", whole, label("gradient", "loss per unit of parameter"))
            coordinates |= parameter_coordinates(parameters)
            steps_apart = discrete and self.ts.ndim > 1
            what = ("number of the step", "1") if steps_apart else ("time", "units of tau")
            coordinates["density_time"] = ("density_time", times.cpu().numpy(), label(*what))
            coordinates["parameter"] = ("parameter", list(parameters), label("parameter", "1"))
        return xr.Dataset(variables, coords=coordinates, attrs=attributes(self.solution))


@torch.no_grad()
def adjoint(
    sol: Solution,
    loss: Loss,
    alg: Algorithm | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> AdjointFlow:
    r"""The adjoint of a loss along a solution, and the gradient.

    For a flow, in reversed time along ``sol(t)``,

    .. math:: -\frac{da}{dt} = A^\top a + \frac{\partial\ell}{\partial h}, \qquad
              \frac{dL}{d\theta} = \int B^\top a\,dt, \qquad A = \frac{\partial f}{\partial h}, \quad
              B = \frac{\partial f}{\partial\theta},

    with the jump :math:`\partial\ell_k/\partial h` at :math:`t_k`; the integral by Gauss-Legendre quadrature
    on the accepted steps. A solution by ``Euler`` is a map, whose adjoint is the discrete one,
    :math:`a_k = (1 + \Delta_k A_k)^\top a_{k+1} + \partial\ell_k/\partial h`: backpropagation through time.

    Parameters:
        sol: a solution with its problem and ``dense=True``.
        loss: a :class:`ctgate.Loss`.
        alg, rtol, atol: how the adjoint equation is solved, by default as ``sol`` was; ``atol`` counts in
            units of the largest slope of the loss. Not for a map.

    The evaluations that it takes are added to ``sol.stats.evaluations_backward``. Parameters that do not
    require grad get their gradient as well, the control's values only where they do.

    Returns: :class:`ctgate.AdjointFlow`.

    Raises: TypeError for parts of the wrong kind; ValueError for a failed solve, a loss that does not fit or
        has no finite slope, or a cost between two nodes of a map; RuntimeError for a solution without its
        problem or dense output, or for tensors that changed since the solve; SolveError if the adjoint
        equation could not be solved.

    Source: THEORY.md 13.
    """
    if not isinstance(sol, Solution):
        raise TypeError(f"adjoint: sol is {type(sol).__name__}; it must be a ct.Solution")
    if not isinstance(loss, Loss):
        raise TypeError(f"adjoint: loss is {type(loss).__name__}; it must be a ct.Loss")
    check_solution(sol, "adjoint")
    value = loss(sol)
    course: Course
    if isinstance(sol.alg, Euler):
        if alg is not None or rtol is not None or atol is not None:
            raise ValueError("adjoint: alg, rtol and atol are for flows; a solution by Euler is a map")
        course = MapCourse(sol, loss)
    else:
        chosen = sol.alg if alg is None else choose_algorithm(alg, rtol)[0]
        course = FlowCourse(sol, loss, chosen, rtol, atol)
    assert sol.prob is not None
    ts = course.ts
    unknown = ts.isnan()
    if bool(unknown.any()):
        a = course.at(known_times(sol.prob, ts))
        a = torch.where(unknown.unsqueeze(-1), torch.nan, a)
    else:
        a = course.at(ts)
    readout = {} if loss.readout is None else explicit(sol, loss)[1]
    return AdjointFlow(sol, loss, ts, a, value, readout, course)
