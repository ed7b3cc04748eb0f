"""Which derivative ``solve`` computes: frozen records."""

from dataclasses import dataclass


def _check_checkpoints(owner: str, checkpoints: object) -> None:
    if checkpoints is not None and (
        isinstance(checkpoints, bool) or not isinstance(checkpoints, int) or checkpoints < 1
    ):
        raise ValueError(
            f"{owner}(checkpoints=...): checkpoints is {checkpoints!r}; it must be None or a positive integer"
        )


@dataclass(frozen=True)
class DiscreteAdjoint:
    """Differentiate the accepted steps: the exact gradient of the numerical solution. The default.

    The choice of the steps is outside the graph. Any tensor that the field uses receives its gradient,
    captured ones included; so do times per sample. Third derivatives are refused where steps are taken again.

    Parameters: ``checkpoints``, the number of states that the forward pass keeps. With None the graph of
    fixed-step methods and of Dopri8 is that of all their stages. The native adaptive ones (Bosh3, Dopri5,
    Tsit5, Rosenbrock23) keep the state between accepted steps, and compute the stages again in the backward
    pass. With a number, the steps between two checkpoints are taken again in the backward pass, so memory
    falls from all steps to (all steps)/checkpoints plus checkpoints; about the square root of the number
    of steps is best. Adaptive methods then choose their steps in a pass of its own. Where the field captures
    a tensor that requires grad beyond its parameters, or its input is computed from them, the graph keeps a
    light node for every operation besides.

    It is the derivative of the numbers that were computed. Where a system rests for many time constants an
    explicit adaptive method steps at the edge of its stability, the state stays right and its derivative need
    not: there take :class:`GaussAdjoint`, ``max_step``, or a stiff method (THEORY.md 6).

    Applicability: where steps are taken again the field must be deterministic, and the tensors that it reads
    must not change before the backward pass (RuntimeError if they do). The transforms of ``torch.func``
    (grad, vjp, jvp, jacrev, hessian) pass through fixed-step and native adaptive methods without
    ``checkpoints``, with the graph of all stages; torch refuses them with ``checkpoints``.
    ``torch.func.vmap`` does not pass through adaptive methods. What a plain function captures is not watched
    for changes. Reference: THEORY.md 6, 8 and, for gradients by times, 11.
    """

    checkpoints: int | None = None

    def __post_init__(self) -> None:
        _check_checkpoints("DiscreteAdjoint", self.checkpoints)


@dataclass(frozen=True)
class InterpolatingAdjoint:
    r"""Solve the adjoint equation backwards along the forward solution's continuous extension, together with
    the integral of the gradient,

    .. math:: \frac{da}{ds} = A^\top a, \qquad \frac{dq}{ds} = B^\top a, \qquad s = -t,

    with the algorithm and the tolerances of the forward solve, both a and q under error control. The state is
    never integrated backwards, so no rate is amplified.

    Every sample carries an integral of its own, as large as the parameters: for small systems. For networks
    take :class:`GaussAdjoint`.

    Parameters: ``checkpoints``, the number of pieces that the forward solution is kept in. With None all of
    its steps are kept. With a number, and with ``saveat`` and ``dense=False``, only the states at that many
    equally spaced times are, whatever ``saveat`` is, and each piece is solved again when the backward pass
    comes to it.

    Applicability: gradients by parameters, initial state and the control's values; times that require grad
    are refused, as are tensors that the field captures. ``atol`` of the backward solve counts in units of the
    largest derivative of the loss by a state. No second derivatives. Reference: THEORY.md 13.
    """

    checkpoints: int | None = None

    def __post_init__(self) -> None:
        _check_checkpoints("InterpolatingAdjoint", self.checkpoints)


@dataclass(frozen=True)
class GaussAdjoint:
    r"""Solve the adjoint equation backwards, for a(t) alone, and take the gradient's integral

    .. math:: \frac{dL}{d\theta} = \int B(t)^\top a(t)\,dt

    by Gauss-Legendre quadrature on each accepted step of it: parameters have no part in the step control,
    and all points are evaluated at once. The state is never integrated backwards, so no rate is amplified.

    Parameters, applicability: as :class:`InterpolatingAdjoint`. Reference: THEORY.md 13.
    """

    checkpoints: int | None = None

    def __post_init__(self) -> None:
        _check_checkpoints("GaussAdjoint", self.checkpoints)


@dataclass(frozen=True)
class ForwardSensitivity:
    r"""Carry the derivative of the state by every parameter along, :math:`dS/dt = A S + B`, as one system
    with the state, under the solve's error control; the backward pass is then a product.

    Cost and memory grow with the number of parameters (and of initial states that require grad): for small
    systems. Gradients by the control's values and by times are refused. Without ``saveat`` every step's
    sensitivities are kept. No second derivatives. Reference: THEORY.md 17.
    """


@dataclass(frozen=True)
class BacksolveAdjoint:
    r"""Integrate state and adjoint backwards in time (torchdiffeq's ``odeint_adjoint``), one call per knot
    interval.

    Memory does not grow with the number of steps, but the state is re-integrated backwards, which amplifies
    errors by :math:`\exp\int (r_{max} - r_{min})\,dt` between the times at which it is set right, the saved
    ones and the knots: with gates whose time constants differ the gradient is wrong. Two leaky units, rates 5
    and 0.5, the fast driving the slow over 4 time units, give a relative error of 2e-2 at rtol = 1e-6. It is
    here for comparison (THEORY.md 6). A field that captures a tensor requiring grad other than its
    parameters is refused.

    Parameters: ``tolerance``, what that factor (of the sample and the interval where it is largest), times
    rtol, may be; beyond it ``solve`` warns (RuntimeWarning), with the interval and how dense ``saveat`` must
    be. The product bounds what an error of rtol grows to, from above: in the table of THEORY.md 6 it is 100
    to 3000 times the error. With 1e-2 every entry that is wrong by more than 1e-5 warns, and no other.
    ``float("inf")`` never warns.

    The rates are those that the field gives, one evaluation per accepted step. A ``Field(fn)`` gives none, so
    nothing is known of it and nothing is said.

    Without ``saveat`` the solution is returned at the ends of tspan and at the knots.
    """

    tolerance: float = 1e-2

    def __post_init__(self) -> None:
        valid = isinstance(self.tolerance, int | float) and not isinstance(self.tolerance, bool)
        if not valid or not self.tolerance > 0.0:
            raise ValueError(
                f"BacksolveAdjoint(tolerance=...): tolerance is {self.tolerance!r}; it must be a positive "
                "number"
            )


ContinuousAdjoint = InterpolatingAdjoint | GaussAdjoint
SensitivityAlgorithm = DiscreteAdjoint | ContinuousAdjoint | ForwardSensitivity | BacksolveAdjoint
