"""One multiplicative gate: shared by all units, or one per unit."""

import abc
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ctgate.fields.base import Gates, Time
from ctgate.fields.cell import Cell
from ctgate.fields.jacobian import Jacobian, scale_rows
from ctgate.kernels import Linearization, Own, Product, Scale, Spread
from ctgate.kernels.fused import FusedCell, OneGateCell


class OneGate(Cell, abc.ABC):
    """What :class:`ScalarGate` and :class:`MultiGate` share; they differ in the number of gate rows."""

    gate_names = ("gate",)
    gate_per_unit: ClassVar[bool]
    bias: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        tau: float | int | Tensor = 1.0,
        learn_tau: bool = False,
        bias: bool = True,
        layernorm: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            row_blocks=2 if self.gate_per_unit else 1,
            extra_rows=0 if self.gate_per_unit else 1,
            biases=("bias",),
            tau=tau,
            learn_tau=learn_tau,
            bias=bias,
            layernorm=layernorm,
            generator=generator,
            device=device,
            dtype=dtype,
        )

    def _evaluate(self, h: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
        """Pre-activations of the gate and of the candidate."""
        self.check_arguments(h, u)
        pre = self.project_input(u, self.bias) + functional.linear(h, self.weight_hh)
        size = self.hidden_size
        return pre[..., :-size], pre[..., -size:]

    def _coupling(self, h: Tensor, u: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The rate, and dh/dt by an x that reaches gate and candidate through ``weight``."""
        opening, pre = self._evaluate(h, u)
        gate, size = torch.sigmoid(opening), self.hidden_size
        target = torch.tanh(self.candidate(pre))
        rate = (gate / self.tau).expand(h.shape)
        through_target = self.candidate_jacobian(pre, weight[-size:])
        return rate, (
            scale_rows(rate * (1.0 - target.square()), through_target)
            + scale_rows((target - h) * rate * torch.sigmoid(-opening), weight[:-size])
        )

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """(g / tau, g / tau * tanh(W h + U u + b))."""
        opening, pre = self._evaluate(h, u)
        rate = (torch.sigmoid(opening) / self.tau).expand(h.shape)
        return rate, rate * torch.tanh(self.candidate(pre))

    def jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Jacobian:
        """g / tau leaks; the candidate and the gate couple."""
        return Jacobian(*self._coupling(h, u, self.weight_hh))

    def input_jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state channel"]:
        """The candidate's answer to the input and the gate's."""
        return self._coupling(h, u, self.weight_ih)[1]

    def linearize(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Linearization:
        """Leak, candidate and gate as products with vectors."""
        opening, pre = self._evaluate(h, u)
        rate = torch.sigmoid(opening) / self.tau
        target = torch.tanh(self.candidate(pre))
        slope = rate * (target - h)
        rows = {"gate": opening.shape[-1], "pre": self.hidden_size}
        argument, normalise = self.candidate_edges("pre", pre)
        gate = Scale if self.gate_per_unit else Spread
        edges = [
            Product("weight_hh", "hidden", rows, self.weight_hh, h, None),
            self.input_edge(u, rows),
            *normalise,
            Scale(argument, "hidden'", rate * (1.0 - target.square())),
            gate("gate", "hidden'", slope * torch.sigmoid(-opening)),
            Scale("hidden", "hidden'", -rate),
        ]
        if self.log_tau is not None:
            edges.append(Own("log_tau", "hidden'", -slope))
        return self.products(t, h, u, slope, edges)

    @property
    def fused_cell(self) -> type[FusedCell]:
        """One product for gate and candidate."""
        return OneGateCell

    def gates(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Gates:
        """``{"gate": g}``, broadcast to ``(*batch, hidden)``."""
        return {"gate": torch.sigmoid(self._evaluate(h, u)[0]).expand(h.shape)}


class ScalarGate(OneGate):
    r"""A recurrent network whose units share one gate, that is, one time constant,

    .. math::
        \tau \frac{dh}{dt} = g\,\bigl(-h + \tanh(W h + U u + b)\bigr), \qquad
        g = \sigma(w_g \cdot h + u_g \cdot u + b_g) \in (0, 1),

    so ``rate * tau = g`` and ``drive * tau = g * tanh(W h + U u + b)``. The gate weighs the new value. Row 0
    of ``weight_hh`` (1 + hidden, hidden), ``weight_ih`` (1 + hidden, input) and ``bias`` (1 + hidden,)
    belongs to the gate, the others to the candidate.

    Parameters:
        input_size, hidden_size, tau, learn_tau, bias, layernorm, generator, device, dtype: ``tau`` is a
            positive scalar or one value per unit [time], learnable through its logarithm; ``layernorm`` acts
            on the candidate's pre-activation only.

    Gates: ``gate``, the same value for all units.

    Raises:
        ValueError, TypeError: sizes or ``tau`` out of range.

    Source: THEORY.md 1; the scalar-gate network of L. Livi, arXiv 2508.12121.
    """

    gate_per_unit = False


class MultiGate(OneGate):
    r"""A recurrent network with one gate, that is, one time constant, per unit,

    .. math::
        \tau \frac{dh}{dt} = g \odot \bigl(-h + \tanh(W h + U u + b)\bigr), \qquad
        g = \sigma(W_g h + U_g u + b_g) \in (0, 1)^{hidden},

    so ``rate * tau = g`` and ``drive * tau = g * tanh(W h + U u + b)``. The gate weighs the new value. The
    first ``hidden`` rows of ``weight_hh`` (2 hidden, hidden), ``weight_ih`` (2 hidden, input) and ``bias``
    (2 hidden,) belong to the gate, the others to the candidate.

    Parameters:
        input_size, hidden_size, tau, learn_tau, bias, layernorm, generator, device, dtype: ``tau`` is a
            positive scalar or one value per unit [time], learnable through its logarithm; ``layernorm`` acts
            on the candidate's pre-activation only.

    Gates: ``gate``.

    Raises:
        ValueError, TypeError: sizes or ``tau`` out of range.

    Source: THEORY.md 1; the multi-gate network of L. Livi, arXiv 2508.12121.
    """

    gate_per_unit = True
