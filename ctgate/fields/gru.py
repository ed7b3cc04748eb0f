"""The gated recurrent unit."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ctgate.fields.base import Gates, Time
from ctgate.fields.interop import TorchCell, layers_from_torch
from ctgate.fields.jacobian import Jacobian, scale_columns, scale_rows
from ctgate.fields.stack import Stack
from ctgate.kernels import Edge, Linearization, Own, Product, Scale
from ctgate.kernels.fused import FusedCell, GRUAfter, GRUBefore


class GRU(TorchCell):
    r"""The gated recurrent unit as a flow,

    .. math::
        \tau \frac{dh}{dt} = (1 - z) \odot (n - h), \qquad
        \begin{aligned}
        r &= \sigma(W_r h + U_r u + b_r), \qquad z = \sigma(W_z h + U_z u + b_z), \\
        n &= \tanh\bigl(U_n u + b_{in} + r \odot (W_n h + b_{hn})\bigr) && \text{reset="after"}, \\
        n &= \tanh\bigl(U_n u + b_{in} + W_n (r \odot h) + b_{hn}\bigr) && \text{reset="before"},
        \end{aligned}

    so ``rate * tau = 1 - z`` and ``drive * tau = (1 - z) * n``. The convention is torch's: ``z`` keeps the
    old state. ``reset="after"`` is ``torch.nn.GRU``, ``reset="before"`` is the cell of Cho et al. and of
    GRU-ODE-Bayes. One Euler step of size ``tau`` is :math:`z h + (1 - z) n`, the discrete cell. The rate is
    evaluated as :math:`\sigma(-\cdot)`, so a gate closed to 1e-20 still has its time constant.

    Weights are torch's: ``weight_ih`` (3 hidden, input), ``weight_hh`` (3 hidden, hidden), ``bias_ih``,
    ``bias_hh`` (3 hidden,), row blocks in the order r, z, n.

    Parameters:
        reset: where the reset gate acts, "after" the recurrent product or "before" it.
        input_size, hidden_size, tau, learn_tau, bias, layernorm, generator, device, dtype: ``tau`` is a
            positive scalar or one value per unit [time], learnable through its logarithm; ``layernorm`` acts
            on the argument of the tanh.

    Gates: ``update`` (z) and ``reset`` (r).

    Raises:
        ValueError: ``reset`` not one of the two, sizes or ``tau`` out of range. TypeError: ``tau`` no number.

    Source: THEORY.md 1 and 2; K. Cho et al., arXiv 1406.1078; E. De Brouwer, J. Simm, A. Arany and Y. Moreau,
    arXiv 1905.12374; T. Can, K. Krishnamurthy and D. J. Schwab, arXiv 2002.00025.
    """

    gate_names = ("update", "reset")
    torch_module = nn.GRU
    torch_cell = nn.GRUCell
    row_blocks = 3
    state_blocks = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        tau: float | int | Tensor = 1.0,
        reset: str = "after",
        learn_tau: bool = False,
        bias: bool = True,
        layernorm: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if reset not in ("after", "before"):
            raise ValueError(
                f'GRU(reset=...): reset is {reset!r}; it must be "after" (torch) or "before" (Cho et al.)'
            )
        super().__init__(
            input_size,
            hidden_size,
            tau=tau,
            learn_tau=learn_tau,
            bias=bias,
            layernorm=layernorm,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.reset = reset

    @classmethod
    def from_torch(
        cls, module: nn.Module, tau: float | int | Tensor = 1.0, *, learn_tau: bool = False
    ) -> "GRU | Stack":
        """The flow whose Euler step of size ``tau`` is ``module``, with clones of its weights.

        More than one layer gives a :class:`Stack`. ``batch_first`` modules are accepted: a field has no
        layout. Gradients of frozen weights stay off, device and dtype are the module's.

        Raises:
            TypeError: ``module`` is neither ``nn.GRU`` nor ``nn.GRUCell``. ValueError: it is bidirectional or
                has dropout; ``tau`` out of range.

        Source: THEORY.md 2.
        """
        layers = layers_from_torch(cls, module, tau, learn_tau)
        return layers[0] if len(layers) == 1 else Stack(layers)

    def torch_obstacle(self) -> str | None:
        """What keeps torch from holding this cell, in words; None when it can."""
        if self.reset == "before":
            return 'reset="before", and torch resets after the product'
        return super().torch_obstacle()

    def _evaluate(self, h: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pre-activations of reset gate, update gate and candidate; what the reset gate multiplies."""
        self.check_arguments(h, u)
        in_r, in_z, in_n = self.project_input(u, self.bias_ih).chunk(3, -1)
        if self.reset == "after":
            own_r, own_z, own_n = functional.linear(h, self.weight_hh, self.bias_hh).chunk(3, -1)
            reset = in_r + own_r
            return reset, in_z + own_z, in_n + torch.sigmoid(reset) * own_n, own_n
        cut = 2 * self.hidden_size
        weight, bias = self.weight_hh, self.bias_hh
        own_r, own_z = functional.linear(h, weight[:cut], None if bias is None else bias[:cut]).chunk(2, -1)
        reset = in_r + own_r
        seen = torch.sigmoid(reset) * h
        own_n = functional.linear(seen, weight[cut:], None if bias is None else bias[cut:])
        return reset, in_z + own_z, in_n + own_n, h

    def _coupling(self, h: Tensor, u: Tensor | None, wrt_input: bool) -> tuple[Tensor, Tensor]:
        """The rate, and dh/dt by the input, or by the state with the leak aside."""
        reset, update, pre, gated = self._evaluate(h, u)
        r, rate = torch.sigmoid(reset), torch.sigmoid(-update) / self.tau
        target = torch.tanh(self.candidate(pre))
        to_r, to_z, to_n = (self.weight_ih if wrt_input else self.weight_hh).chunk(3)
        bend = gated * r * torch.sigmoid(-reset)
        if self.reset == "after":
            direct = to_n if wrt_input else scale_rows(r, to_n)
            through_pre = direct + scale_rows(bend, to_r)
        else:
            own = self.weight_hh[2 * self.hidden_size :]
            direct = to_n if wrt_input else scale_columns(to_n, r)
            through_pre = direct + scale_columns(own, bend) @ to_r
        return rate, (
            scale_rows(rate * (1.0 - target.square()), self.candidate_jacobian(pre, through_pre))
            + scale_rows((h - target) * rate * torch.sigmoid(update), to_z)
        )

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """((1 - z) / tau, (1 - z) / tau * n)."""
        _, update, pre, _ = self._evaluate(h, u)
        # sigmoid(-x), not 1 - sigmoid(x): the difference loses every digit of a slow mode
        rate = torch.sigmoid(-update) / self.tau
        return rate, rate * torch.tanh(self.candidate(pre))

    def jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Jacobian:
        """(1 - z) / tau leaks; the candidate, its reset gate and the update gate couple."""
        return Jacobian(*self._coupling(h, u, wrt_input=False))

    def input_jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state channel"]:
        """The answer of candidate, reset gate and update gate to the input."""
        return self._coupling(h, u, wrt_input=True)[1]

    def linearize(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Linearization:
        """Leak, candidate, reset gate and update gate as products with vectors."""
        reset, update, pre, gated = self._evaluate(h, u)
        r, rate = torch.sigmoid(reset), torch.sigmoid(-update) / self.tau
        target = torch.tanh(self.candidate(pre))
        slope = rate * (target - h)
        argument, normalise = self.candidate_edges("n", pre)
        edges: list[Edge] = [
            self.input_edge(u, dict.fromkeys("rzn", self.hidden_size), "bias_ih"),
            *self._own_edges(h, r, gated * r * torch.sigmoid(-reset)),
            *normalise,
            Scale(argument, "hidden'", rate * (1.0 - target.square())),
            Scale("z", "hidden'", -slope * torch.sigmoid(update)),
            Scale("hidden", "hidden'", -rate),
        ]
        if self.log_tau is not None:
            edges.append(Own("log_tau", "hidden'", -slope))
        return self.products(t, h, u, slope, edges)

    def _own_edges(self, h: Tensor, r: Tensor, bend: Tensor) -> list[Edge]:
        """From the state to the pre-activations r, z, n; ``bend`` is the derivative of what r multiplies."""
        weight, bias, size = self.weight_hh, self.present("bias_hh"), self.hidden_size
        if self.reset == "after":
            rows = dict.fromkeys(("r", "z", "own n"), size)
            return [
                Product("weight_hh", "hidden", rows, weight, h, bias),
                Scale("r", "n", bend),
                Scale("own n", "n", r),
            ]
        gates, candidate = weight[: 2 * size], weight[2 * size :]
        return [
            Product("weight_hh", "hidden", {"r": size, "z": size}, gates, h, bias),
            Scale("r", "seen", bend),
            Scale("hidden", "seen", r),
            Product("weight_hh", "seen", {"n": size}, candidate, r * h, bias),
        ]

    @property
    def fused_cell(self) -> type[FusedCell]:
        """By the reset convention."""
        return GRUAfter if self.reset == "after" else GRUBefore

    def gates(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Gates:
        """``{"update": z, "reset": r}``; z keeps the old state."""
        reset, update, _, _ = self._evaluate(h, u)
        return {"update": torch.sigmoid(update), "reset": torch.sigmoid(reset)}

    def extra_repr(self) -> str:
        """Sizes, time unit and reset convention, for ``print(field)``."""
        return f"{super().extra_repr()}, reset={self.reset!r}"
