"""A leaky unit: one constant gate."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp
from torch.nn import functional

from ctgate.fields.base import Gates, Time
from ctgate.fields.cell import Cell
from ctgate.fields.jacobian import Jacobian, scale_rows
from ctgate.kernels import Linearization, Own, Product, Scale
from ctgate.kernels.fused import FusedCell, OneGateCell


class Leaky(Cell):
    r"""A leaky recurrent network,

    .. math:: \tau \frac{dh}{dt} = \alpha\,\bigl(-h + \varphi(W h + U u + b)\bigr),

    so ``rate * tau = alpha`` and ``drive * tau = alpha * phi(W h + U u + b)``. ``W`` is ``weight_hh``
    (hidden, hidden), ``U`` is ``weight_ih`` (hidden, input), ``b`` is ``bias`` (hidden,).

    One Euler step of size ``tau`` is :math:`(1-\alpha) h + \alpha\,\varphi(W h + U u + b)`.

    Parameters:
        alpha: the constant gate, in (0, 1]; it weighs the new value.
        phi: the nonlinearity, elementwise on tensors; ``torch.tanh`` by default.
        input_size, hidden_size, tau, learn_tau, bias, layernorm, generator, device, dtype: as in the other
            cells; ``tau`` is a positive scalar or one value per unit.

    Gates: ``gate``, alpha for every unit.

    Raises:
        ValueError: ``alpha`` outside (0, 1]; sizes or ``tau`` out of range.
        TypeError: ``phi`` not callable.

    Source: THEORY.md 1; leaky integrator units of H. Jaeger, M. Lukosevicius, D. Popovici and U. Siewert,
    Neural Networks 20 (2007) 335.
    """

    gate_names = ("gate",)
    alpha: Tensor
    bias: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        alpha: float = 1.0,
        phi: Callable[[Tensor], Tensor] = torch.tanh,
        tau: float | int | Tensor = 1.0,
        learn_tau: bool = False,
        bias: bool = True,
        layernorm: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0.0 < alpha <= 1.0:
            raise ValueError(f"Leaky(alpha=...): alpha is {alpha!r}; it must be in (0, 1]")
        if not callable(phi):
            raise TypeError(f"Leaky(phi=...): phi is {phi!r}; it must be a function of a tensor")
        super().__init__(
            input_size,
            hidden_size,
            row_blocks=1,
            biases=("bias",),
            tau=tau,
            learn_tau=learn_tau,
            bias=bias,
            layernorm=layernorm,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.phi = phi
        self.register_buffer("alpha", self.weight_hh.new_tensor(alpha))

    def _rate_and_pre(self, h: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
        self.check_arguments(h, u)
        pre = self.project_input(u, self.bias) + functional.linear(h, self.weight_hh)
        return (self.alpha / self.tau).expand(h.shape), pre

    def _target(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """phi and its derivative."""
        argument = self.candidate(pre)
        if self.phi is torch.tanh:  # without the overhead of torch.func
            target = torch.tanh(argument)
            return target, 1.0 - target.square()
        target, slope, *_ = jvp(self.phi, (argument,), (torch.ones_like(argument),))
        return target, slope

    def _coupling(self, rate: Tensor, pre: Tensor, weight: Tensor) -> Tensor:
        return scale_rows(rate * self._target(pre)[1], self.candidate_jacobian(pre, weight))

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """(alpha / tau, alpha / tau * phi(W h + U u + b))."""
        rate, pre = self._rate_and_pre(h, u)
        return rate, rate * self.phi(self.candidate(pre))

    def jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Jacobian:
        """alpha / tau leaks, alpha / tau * phi' W couples."""
        rate, pre = self._rate_and_pre(h, u)
        return Jacobian(rate, self._coupling(rate, pre, self.weight_hh))

    def input_jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state channel"]:
        """alpha / tau * phi' U."""
        rate, pre = self._rate_and_pre(h, u)
        return self._coupling(rate, pre, self.weight_ih)

    def linearize(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Linearization:
        """The leak and phi' W, phi' U as products with vectors."""
        rate, pre = self._rate_and_pre(h, u)
        target, bend = self._target(pre)
        slope = rate * (target - h)
        rows = {"pre": self.hidden_size}
        argument, normalise = self.candidate_edges("pre", pre)
        edges = [
            Product("weight_hh", "hidden", rows, self.weight_hh, h, None),
            self.input_edge(u, rows),
            *normalise,
            Scale(argument, "hidden'", rate * bend),
            Scale("hidden", "hidden'", -rate),
        ]
        if self.log_tau is not None:
            edges.append(Own("log_tau", "hidden'", -slope))
        return self.products(t, h, u, slope, edges)

    @property
    def fused_cell(self) -> type[FusedCell] | None:
        """Only with ``phi`` = ``torch.tanh``."""
        return OneGateCell if self.phi is torch.tanh else None

    def fuse(self, parameters: Mapping[str, Tensor]) -> FusedCell:
        """The fused cell without a gate, whose rate is that of a time unit tau / alpha."""
        eps = None if self.layernorm is None else self.layernorm.eps
        return OneGateCell(parameters, self.tau_of(parameters) / self.alpha, eps)

    def gates(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Gates:
        """``{"gate": alpha}``, broadcast to ``(*batch, hidden)``."""
        self.check_arguments(h, u)
        return {"gate": self.alpha.expand(h.shape)}
