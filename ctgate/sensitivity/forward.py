r"""How a solution moves with its parameters and its initial state, found on the way forwards."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ctgate.algorithms import Algorithm, ScipyAlgorithm
from ctgate.dense import Dense, live_dense
from ctgate.fields.base import broadcasts_to
from ctgate.guard import Unchanged
from ctgate.problem import ODEProblem
from ctgate.sensealg.forward import INITIAL, Unpack, augmented, augmented_along
from ctgate.solution import Solution
from ctgate.solve import solve

if TYPE_CHECKING:
    import xarray as xr

Times = float | Sequence[float] | Tensor
_OPTIONS = ("saveat", "rtol", "atol", "max_steps", "progress", "throw", "dense")


@dataclasses.dataclass(frozen=True, eq=False)
class Sensitivity:
    """A solution and its derivatives by parameters, at the same times.

    Attributes:
        solution: that of the problem, on the steps that state and derivatives took together.
        derivatives: dh/dtheta by the parameter's name at ``solution.ts``, ``(time, *batch, state, *shape)``
            [state per unit of the parameter]; under ``h0`` that by the sample's own initial state,
            ``(time, *batch, state, state)``.

    Called with times, like the solution, it gives the derivatives there; ``sensitivity[name]`` is one.
    """

    solution: Solution
    derivatives: Mapping[str, Tensor]
    joint: Solution = dataclasses.field(repr=False)
    unpack: Unpack = dataclasses.field(repr=False)

    def __getitem__(self, name: str) -> Tensor:
        """dh/dtheta for one parameter; raises KeyError with the names that there are."""
        if name not in self.derivatives:
            raise KeyError(f"{name!r} is not among the derivatives; they are {sorted(self.derivatives)}")
        return self.derivatives[name]

    def __call__(self, t: Times) -> dict[str, Tensor]:
        """The derivatives at one time, ``(*batch, state, *shape)``, or at several, ``(time, ...)``.

        Raises: as :class:`ctgate.Solution`.
        """
        return self.unpack(self.joint(t))[1]

    def to_xarray(self) -> "xr.Dataset":
        """``state`` and ``sensitivity`` (time, batch, unit, entry), the parameters' entries one after the
        other, and ``initial_sensitivity`` where derivatives by h0 are there."""
        from ctgate.sensitivity.labels import sensitivity_dataset

        return sensitivity_dataset(self.solution, self.derivatives)


@dataclasses.dataclass(frozen=True, eq=False)
class DirectedSensitivity:
    """A solution and its derivative along one direction, at the same times.

    Attributes:
        solution: that of the problem, on the steps that state and tangent took together.
        tangent: S v at ``solution.ts``, ``(time, *batch, state)`` [state per unit of the direction].

    Called with times, like the solution, it gives the tangent there.
    """

    solution: Solution
    tangent: Float[Tensor, "time *batch state"]
    joint: Solution = dataclasses.field(repr=False)
    unpack: Unpack = dataclasses.field(repr=False)

    def __call__(self, t: Times) -> Tensor:
        """The tangent at one time, ``(*batch, state)``, or at several, ``(time, *batch, state)``.

        Raises: as :class:`ctgate.Solution`.
        """
        return self.unpack(self.joint(t))[1]["tangent"]


@torch.no_grad()
def sensitivity(
    prob: ODEProblem,
    alg: Algorithm | None = None,
    *,
    parameters: Sequence[str] | None = None,
    h0: bool = False,
    **options: Any,
) -> Sensitivity:
    r"""The whole derivative of a solution by its parameters, as an equation of its own beside the state's,

    .. math:: \frac{dS}{dt} = A S + B, \qquad S = \frac{\partial h}{\partial\theta}, \quad
              A = \frac{\partial f}{\partial h}, \quad B = \frac{\partial f}{\partial\theta}, \qquad
              S(t_0) = 0,

    and :math:`dS/dt = AS`, :math:`S(t_0) = 1` for the derivative by :math:`h_0`.

    The tolerances hold for h and S together (the RMS over all entries). With ``Euler`` and the Runge-Kutta
    methods of fixed step S is the exact derivative of the discrete solution; else that of the flow to the
    method's order. A sample carries state * P numbers for P parameter entries, so this is for small systems:
    :func:`ctgate.sensitivity_jvp` takes one direction at any size, and :func:`ctgate.adjoint` all of them for
    one loss.

    Parameters:
        prob: a :class:`ctgate.ODEProblem`, with all its controls, times per sample and parameters.
        alg: as in :func:`ctgate.solve`, but for scipy's methods.
        parameters: names among ``prob.named_parameters()``; None for all.
        h0: whether to take the derivative by the initial state too.
        options: ``saveat``, ``rtol``, ``atol``, ``max_steps``, ``progress``, ``throw``, ``dense`` of solve.

    Returns: :class:`Sensitivity`, without a graph.

    Raises: TypeError, ValueError for arguments that do not fit, naming them.

    Source: THEORY.md 17.
    """
    _check("sensitivity", prob, alg, options)
    names = _checked_names(prob, parameters, h0)
    big, unpack = augmented(prob, names, h0)
    joint, solution = _solve_jointly(prob, big, alg, options)
    return Sensitivity(solution, unpack(joint.hs)[1], joint, unpack)


@torch.no_grad()
def sensitivity_jvp(
    prob: ODEProblem, alg: Algorithm | None = None, *, direction: Mapping[str, Tensor], **options: Any
) -> DirectedSensitivity:
    r"""The derivative of a solution along one direction :math:`(v, w)` of parameters and initial state,

    .. math:: \frac{ds}{dt} = A s + B v, \qquad s(t_0) = w, \qquad
              s = \frac{\partial h}{\partial\theta}\,v + \frac{\partial h}{\partial h_0}\,w .

    No matrix is formed: the cost is a few evaluations of the field, whatever the number of parameters. All
    else is as in :func:`ctgate.sensitivity`.

    Parameters:
        direction: tensors by the names of parameters, in their shapes, and by ``h0``, which broadcasts to
            ``(*batch, state)``; what is left out does not move.

    Returns: :class:`DirectedSensitivity`, without a graph.

    Raises: TypeError, ValueError for arguments that do not fit, naming them.

    Source: THEORY.md 17.
    """
    _check("sensitivity_jvp", prob, alg, options)
    _check_direction(prob, direction)
    big, unpack = augmented_along(prob, direction)
    joint, solution = _solve_jointly(prob, big, alg, options)
    return DirectedSensitivity(solution, unpack(joint.hs)[1]["tangent"], joint, unpack)


def _solve_jointly(
    prob: ODEProblem, big: ODEProblem, alg: Algorithm | None, options: Mapping[str, Any]
) -> tuple[Solution, Solution]:
    """The solution of the augmented problem, and the problem's own part of it."""
    joint = solve(big, alg, **options)
    size = prob.h0.shape[-1]
    unchanged = Unchanged(prob)
    dense = joint.dense
    if isinstance(dense, Dense):
        # The same steps of the same method, in which the state does not see its derivatives.
        dense = live_dense(prob, joint.alg, dense.ts, dense.hs[..., :size], unchanged)
    solution = dataclasses.replace(
        joint,
        hs=joint.hs[..., :size],
        prob=prob,
        components=prob.field.components,
        output_slice=prob.field.output,
        dense=dense,
        unchanged=unchanged,
    )
    return joint, solution


def _check(who: str, prob: object, alg: object, options: Mapping[str, Any]) -> None:
    if not isinstance(prob, ODEProblem):
        raise TypeError(f"{who}(prob=...): prob is {type(prob).__name__}; it must be a ct.ODEProblem")
    if isinstance(alg, ScipyAlgorithm):
        raise ValueError(
            f"{who}(alg=...): alg is {alg}; scipy's methods do not carry derivatives: use Rosenbrock23(), "
            "which is stiff, or another native method"
        )
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"{who} got {name!r}; of the options of solve it takes {_OPTIONS}")


def _checked_names(prob: ODEProblem, parameters: object, h0: bool) -> list[str]:
    known = prob.named_parameters()
    if isinstance(parameters, str) or not (parameters is None or isinstance(parameters, Sequence)):
        raise TypeError(
            f"sensitivity(parameters=...): parameters is {parameters!r}; it must be a list of names or None"
        )
    names = list(known if parameters is None else parameters)
    for number, name in enumerate(names):
        if name not in known:
            raise ValueError(
                f"sensitivity(parameters=...): parameters has {name!r}, which the field lacks; its "
                f"parameters are {sorted(known)}"
            )
        if name in names[:number]:
            raise ValueError(f"sensitivity(parameters=...): parameters has {name!r} twice")
    if INITIAL in names:
        raise ValueError(
            f"sensitivity(parameters=...): a parameter of the field is named {INITIAL!r}, which names the "
            "initial state here; rename it, or leave it out"
        )
    if not names and not h0:
        raise ValueError(
            "sensitivity: there is nothing to differentiate by; name parameters or ask for h0=True"
        )
    return names


def _check_direction(prob: ODEProblem, direction: object) -> None:
    who = "sensitivity_jvp(direction=...)"
    if not isinstance(direction, Mapping):
        raise TypeError(
            f"{who}: direction is {type(direction).__name__}; it must be a dict of tensors by name"
        )
    if not direction:
        raise ValueError(f"{who}: direction is empty; it must name a parameter or {INITIAL!r}")
    known = prob.named_parameters()
    if INITIAL in known and INITIAL in direction:
        raise ValueError(f"{who}: {INITIAL!r} names the initial state and a parameter of the field alike")
    for name, value in direction.items():
        if name not in known and name != INITIAL:
            raise ValueError(
                f"{who}: direction has {name!r}, which the field lacks; it may have {INITIAL!r} and the "
                f"parameters {sorted(known)}"
            )
        like = known.get(name, prob.h0)
        if not isinstance(value, Tensor) or value.dtype != like.dtype or value.device != like.device:
            kind = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"{who}: direction[{name!r}] is {kind}; it must be a tensor of {like.dtype} on {like.device}"
            )
        fits = broadcasts_to(value.shape, like.shape) if name == INITIAL else value.shape == like.shape
        if not fits:
            raise ValueError(
                f"{who}: direction[{name!r}] has shape {tuple(value.shape)}; it must be {tuple(like.shape)}"
            )
