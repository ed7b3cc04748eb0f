"""The liquid time constant network."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ctgate.fields.base import Gates, Time
from ctgate.fields.cell import Cell
from ctgate.fields.jacobian import Jacobian, scale_rows
from ctgate.kernels import Linearization, Own, Product, Scale
from ctgate.kernels.fused import FusedCell, LiquidCell


class LTC(Cell):
    r"""A liquid time constant network,

    .. math::
        \frac{dh}{dt} = -\Bigl(\frac{1}{\tau} + f\Bigr) \odot h + f \odot A, \qquad
        f = \sigma(W h + U u + b) \in (0, 1),

    so ``rate * tau = 1 + tau * f`` and ``drive * tau = tau * f * A``: the conductance ``f`` [1/time] opens a
    path towards the reversal value ``A`` and shortens the time constant, which stays between ``tau / (1 +
    tau)`` and ``tau``. ``W`` is ``weight_hh`` (hidden, hidden), ``U`` is ``weight_ih`` (hidden, input), ``b``
    is ``bias`` (hidden,), ``A`` is ``reversal`` (hidden,), initially uniform on (-1, 1).

    Parameters:
        input_size, hidden_size, tau, learn_tau, bias, generator, device, dtype: ``tau`` is a positive scalar
            or one value per unit [time], learnable through its logarithm; ``bias=False`` leaves out b and
            keeps A.

    Gates: ``conductance`` (f, [1/time]).

    Raises:
        ValueError, TypeError: sizes or ``tau`` out of range.

    Source: THEORY.md 1; R. Hasani, M. Lechner, A. Amini, D. Rus and R. Grosu, arXiv 2006.04439.
    """

    gate_names = ("conductance",)
    bias: Tensor | None
    reversal: nn.Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        tau: float | int | Tensor = 1.0,
        learn_tau: bool = False,
        bias: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            row_blocks=1,
            biases=("bias",),
            tau=tau,
            learn_tau=learn_tau,
            bias=bias,
            layernorm=False,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.reversal = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        with torch.no_grad():
            self.reversal.uniform_(-1.0, 1.0, generator=generator)

    def _evaluate(self, h: Tensor, u: Tensor | None) -> Tensor:
        """Pre-activation of the conductance."""
        self.check_arguments(h, u)
        return self.project_input(u, self.bias) + functional.linear(h, self.weight_hh)

    def _coupling(self, h: Tensor, pre: Tensor, weight: Tensor) -> Tensor:
        slope = torch.sigmoid(pre) * torch.sigmoid(-pre)
        return scale_rows((self.reversal - h) * slope, weight)

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """(1 / tau + f, f * A)."""
        conductance = torch.sigmoid(self._evaluate(h, u))
        return self.tau.reciprocal() + conductance, conductance * self.reversal

    def jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Jacobian:
        """1 / tau + f leaks, (A - h) f (1 - f) W couples."""
        pre = self._evaluate(h, u)
        rate = self.tau.reciprocal() + torch.sigmoid(pre)
        return Jacobian(rate, self._coupling(h, pre, self.weight_hh))

    def input_jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state channel"]:
        """(A - h) f (1 - f) U."""
        return self._coupling(h, self._evaluate(h, u), self.weight_ih)

    def linearize(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Linearization:
        """The leak and (A - h) f (1 - f) times W and U as products with vectors."""
        pre = self._evaluate(h, u)
        f, pace = torch.sigmoid(pre), self.tau.reciprocal()
        pull = f * (self.reversal - h)
        rows = {"pre": self.hidden_size}
        edges = [
            Product("weight_hh", "hidden", rows, self.weight_hh, h, None),
            self.input_edge(u, rows),
            Scale("pre", "hidden'", pull * torch.sigmoid(-pre)),
            Scale("hidden", "hidden'", -(pace + f)),
            Own("reversal", "hidden'", f),
        ]
        if self.log_tau is not None:
            edges.append(Own("log_tau", "hidden'", pace * h))
        return self.products(t, h, u, pull - pace * h, edges)

    @property
    def fused_cell(self) -> type[FusedCell]:
        """One product."""
        return LiquidCell

    def gates(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Gates:
        """``{"conductance": f}`` [1/time]."""
        return {"conductance": torch.sigmoid(self._evaluate(h, u))}
