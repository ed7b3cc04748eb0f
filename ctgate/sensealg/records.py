"""Which derivative ``solve`` computes: frozen records."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DiscreteAdjoint:
    """Differentiate the accepted steps: the exact gradient of the numerical solution. The default.

    The choice of the steps is outside the graph. Any tensor that the field uses receives its gradient,
    captured ones included; so do times per sample.

    Parameters: ``checkpoints``, the number of states that the forward pass keeps. With None the graph of
    fixed-step methods and of Dopri8 is that of all their stages. The native adaptive ones (Bosh3, Dopri5,
    Tsit5, Rosenbrock23) keep the state between accepted steps, and compute the stages again in the backward
    pass. With a number, the steps between two checkpoints are taken again in the backward pass, so memory
    falls from all steps to (all steps)/checkpoints plus checkpoints; about the square root of the number
    of steps is best. Adaptive methods then choose their steps in a pass of its own.

    Applicability: where steps are taken again the field must be deterministic, and the tensors that it reads
    must not change before the backward pass (RuntimeError if they do). The transforms of ``torch.func``
    (grad, vjp, jvp, jacrev, hessian) pass through fixed-step and native adaptive methods without
    ``checkpoints``, with the graph of all stages; torch refuses them with ``checkpoints``.
    ``torch.func.vmap`` does not pass through adaptive methods. What a plain function captures is not watched
    for changes. Reference: THEORY.md 6, 8 and, for gradients by times, 11.
    """

    checkpoints: int | None = None

    def __post_init__(self) -> None:
        if self.checkpoints is not None and (
            isinstance(self.checkpoints, bool)
            or not isinstance(self.checkpoints, int)
            or self.checkpoints < 1
        ):
            raise ValueError(
                f"DiscreteAdjoint(checkpoints=...): checkpoints is {self.checkpoints!r}; "
                "it must be None or a positive integer"
            )


@dataclass(frozen=True)
class BacksolveAdjoint:
    r"""Integrate state and adjoint backwards in time (torchdiffeq's ``odeint_adjoint``), one call per knot
    interval.

    Memory does not grow with the number of steps, but the state is re-integrated backwards, which
    amplifies errors by :math:`\exp\int (r_{max} - r_{min})\,dt` over each interval between saved times: with
    gates whose time constants differ it is wrong without a word. Two leaky units, rates 5 and 0.5, the
    fast driving the slow over 4 time units, give a relative gradient error of order 1 at rtol = 1e-6.
    It is here for comparison (THEORY.md 6). A field that captures a tensor requiring grad other than its
    parameters is refused.

    Without ``saveat`` the solution is returned at the ends of tspan and at the knots.
    """


SensitivityAlgorithm = DiscreteAdjoint | BacksolveAdjoint
