"""The gated rate network, whose gates have dynamics of their own."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ctgate.fields.base import Gates, Time
from ctgate.fields.cell import Cell


class GatedRate(Cell):
    r"""A rate network with dynamic gates; the state is (h, z, r),

    .. math::
        \begin{aligned}
        \tau \frac{dh}{dt} &= \sigma(z) \odot \bigl(-h + J_h(\tanh(h) \odot \sigma(r)) + U_h u + b_h\bigr), \\
        \tau_z \frac{dz}{dt} &= -z + J_z \tanh(h) + U_z u + b_z, \\
        \tau_r \frac{dr}{dt} &= -r + J_r \tanh(h) + U_r u + b_r,
        \end{aligned}

    so the rates are :math:`(\sigma(z)/\tau, 1/\tau_z, 1/\tau_r)`. Here ``sigma(z)`` weighs the new value: an
    open update gate (z large) is a short time constant. Without both gates it is the classical network
    :math:`\tau\,dh/dt = -h + J \tanh(h) + U u + b`; a gate that is left out equals 1 and takes no place in
    the state.

    Gains and biases of the gates and of the firing rate live in the weights: a network written as
    :math:`\sigma(\alpha x + \beta)` with :math:`\tau_x \dot x = -x + J \varphi` is this one in the variable
    :math:`z = \alpha x + \beta`, with ``J_z = alpha * J`` and ``b_z = beta``.

    The row blocks of ``weight_hh`` (rows, hidden), ``weight_ih`` (rows, input) and ``bias`` (rows,) follow
    ``components``: hidden, update, reset.

    Parameters:
        tau, tau_z, tau_r: time constants of h, z and r [time], positive scalars or one value per unit; with
            ``learn_tau=True`` all are learnable through their logarithms.
        update_gate, reset_gate: whether z and r exist.
        input_size, hidden_size, bias, generator, device, dtype: as in the other cells.

    Gates: ``update`` (sigma(z)) and ``reset`` (sigma(r)), those that exist.

    Raises:
        ValueError, TypeError: sizes or time constants out of range.

    Source: THEORY.md 1; K. Krishnamurthy, T. Can and D. J. Schwab, Phys. Rev. X 12 (2022) 011011; without
    gates H. Sompolinsky, A. Crisanti and H. J. Sommers, Phys. Rev. Lett. 61 (1988) 259.
    """

    bias: Tensor | None
    fixed_tau_z: Tensor
    fixed_tau_r: Tensor
    log_tau_z: nn.Parameter | None
    log_tau_r: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        tau: float | int | Tensor = 1.0,
        tau_z: float | int | Tensor = 1.0,
        tau_r: float | int | Tensor = 1.0,
        update_gate: bool = True,
        reset_gate: bool = True,
        learn_tau: bool = False,
        bias: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        names = tuple(name for name, there in (("update", update_gate), ("reset", reset_gate)) if there)
        super().__init__(
            input_size,
            hidden_size,
            row_blocks=1 + len(names),
            state_blocks=1 + len(names),
            biases=("bias",),
            tau=tau,
            learn_tau=learn_tau,
            bias=bias,
            layernorm=False,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.gate_names = names
        if update_gate:
            self.register_time("tau_z", tau_z, learn_tau)
        if reset_gate:
            self.register_time("tau_r", tau_r, learn_tau)

    @property
    def components(self) -> dict[str, slice]:
        """``hidden``, then ``update`` and ``reset`` where they exist."""
        size = self.hidden_size
        return {name: slice(k * size, (k + 1) * size) for k, name in enumerate(("hidden", *self.gate_names))}

    @property
    def tau_z(self) -> Tensor:
        """The time constant of the update gate's variable [time]."""
        return self.fixed_tau_z if self.log_tau_z is None else self.log_tau_z.exp()

    @property
    def tau_r(self) -> Tensor:
        """The time constant of the reset gate's variable [time]."""
        return self.fixed_tau_r if self.log_tau_r is None else self.log_tau_r.exp()

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """((sigma(z)/tau, 1/tau_z, 1/tau_r), each times what its variable relaxes to)."""
        self.check_arguments(h, u)
        blocks = 1 + len(self.gate_names)
        x, *gate_variables = h.chunk(blocks, -1)
        gates = dict(zip(self.gate_names, map(torch.sigmoid, gate_variables), strict=True))
        firing = torch.tanh(x)
        weights, external = self.weight_hh.chunk(blocks), self.project_input(u, self.bias).chunk(blocks, -1)

        seen = firing * gates["reset"] if "reset" in gates else firing
        rate = gates["update"] / self.tau if "update" in gates else self.tau.reciprocal().expand(x.shape)
        rates, drives = [rate], [rate * (functional.linear(seen, weights[0]) + external[0])]
        for k, name in enumerate(self.gate_names, start=1):
            rate = (self.tau_z if name == "update" else self.tau_r).reciprocal().expand(x.shape)
            rates.append(rate)
            drives.append(rate * (functional.linear(firing, weights[k]) + external[k]))
        return torch.cat(rates, -1), torch.cat(drives, -1)

    def gates(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Gates:
        """``{"update": sigma(z), "reset": sigma(r)}``, those that exist."""
        self.check_arguments(h, u)
        return {name: torch.sigmoid(h[..., self.components[name]]) for name in self.gate_names}
