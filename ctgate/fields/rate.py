"""The gated rate network, whose gates have dynamics of their own."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ctgate.fields.base import Gates, Time
from ctgate.fields.cell import Cell
from ctgate.fields.jacobian import Jacobian, scale_columns, scale_rows
from ctgate.kernels import Edge, Linearization, Own, Product, Scale

# The part of the state whose sigmoid a gate is.
VARIABLES = {"update": "z", "reset": "r"}


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
    ``components``: hidden, z, r.

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
        """``hidden``, then ``z`` and ``r``, the variables of the update and the reset gate, where they
        exist."""
        size, names = self.hidden_size, ("hidden", *(VARIABLES[gate] for gate in self.gate_names))
        return {name: slice(k * size, (k + 1) * size) for k, name in enumerate(names)}

    @property
    def tau_z(self) -> Tensor:
        """The time constant of the update gate's variable [time]."""
        return self.fixed_tau_z if self.log_tau_z is None else self.log_tau_z.exp()

    @property
    def tau_r(self) -> Tensor:
        """The time constant of the reset gate's variable [time]."""
        return self.fixed_tau_r if self.log_tau_r is None else self.log_tau_r.exp()

    def _variables(self, h: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """h and the variables of the gates, by the gates' names."""
        x, *gate_variables = h.chunk(1 + len(self.gate_names), -1)
        return x, dict(zip(self.gate_names, gate_variables, strict=True))

    def _rates_and_targets(self, h: Tensor, u: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Per component, hidden first, its rate and what it relaxes to."""
        self.check_arguments(h, u)
        blocks = 1 + len(self.gate_names)
        x, variables = self._variables(h)
        gates = {name: torch.sigmoid(variable) for name, variable in variables.items()}
        firing = torch.tanh(x)
        weights, external = self.weight_hh.chunk(blocks), self.project_input(u, self.bias).chunk(blocks, -1)

        seen = firing * gates["reset"] if "reset" in gates else firing
        rate = gates["update"] / self.tau if "update" in gates else self.tau.reciprocal().expand(x.shape)
        rates, targets = [rate], [functional.linear(seen, weights[0]) + external[0]]
        for k, name in enumerate(self.gate_names, start=1):
            rates.append((self.tau_z if name == "update" else self.tau_r).reciprocal().expand(x.shape))
            targets.append(functional.linear(firing, weights[k]) + external[k])
        return rates, targets

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """((sigma(z)/tau, 1/tau_z, 1/tau_r), each times what its variable relaxes to)."""
        rates, targets = self._rates_and_targets(h, u)
        drives = [rate * target for rate, target in zip(rates, targets, strict=True)]
        return torch.cat(rates, -1), torch.cat(drives, -1)

    def jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Jacobian:
        """The 3 x 3 blocks of THEORY.md 3, those that exist."""
        rates, targets = self._rates_and_targets(h, u)
        x, variables = self._variables(h)
        firing = torch.tanh(x)
        slope = 1.0 - firing.square()
        weights = self.weight_hh.chunk(len(rates))
        reset = torch.sigmoid(variables["reset"]) if "reset" in variables else None

        seen = slope if reset is None else slope * reset
        rows = [[scale_rows(rates[0], scale_columns(weights[0], seen))]]
        if "update" in variables:
            shut = torch.sigmoid(-variables["update"])
            rows[0].append(torch.diag_embed((targets[0] - x) * rates[0] * shut))
        if reset is not None:
            bend = firing * reset * torch.sigmoid(-variables["reset"])
            rows[0].append(scale_rows(rates[0], scale_columns(weights[0], bend)))
        for rate, weight in zip(rates[1:], weights[1:], strict=True):
            block = scale_rows(rate, scale_columns(weight, slope))
            rows.append([block, *(torch.zeros_like(block) for _ in self.gate_names)])
        return Jacobian(torch.cat(rates, -1), torch.cat([torch.cat(row, -1) for row in rows], -2))

    def input_jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state channel"]:
        """Each component's rate times its block of ``weight_ih``."""
        rates, _ = self._rates_and_targets(h, u)
        return scale_rows(torch.cat(rates, -1), self.weight_ih)

    def linearize(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Linearization:
        """The blocks of THEORY.md 3 as products with vectors."""
        rates, targets = self._rates_and_targets(h, u)
        x, variables = self._variables(h)
        firing, size = torch.tanh(x), self.hidden_size
        parts = zip(rates, targets, h.chunk(len(rates), -1), strict=True)
        slopes = [rate * (target - part) for rate, target, part in parts]
        driven = [f"to {name}" for name in self.components]
        edges: list[Edge] = [
            self.input_edge(u, dict.fromkeys(driven, size)),
            Scale("hidden", "firing", 1.0 - firing.square()),
        ]
        if "reset" in variables:
            r, shut = torch.sigmoid(variables["reset"]), torch.sigmoid(-variables["reset"])
            seen, rest = firing * r, dict.fromkeys(driven[1:], size)
            edges += [
                Scale("firing", "seen", r),
                Scale(VARIABLES["reset"], "seen", seen * shut),
                Product("weight_hh", "seen", {driven[0]: size}, self.weight_hh[:size], seen, None),
                Product("weight_hh", "firing", rest, self.weight_hh[size:], firing, None),
            ]
        else:
            rows = dict.fromkeys(driven, size)
            edges.append(Product("weight_hh", "firing", rows, self.weight_hh, firing, None))
        if "update" in variables:
            shut = torch.sigmoid(-variables["update"])
            edges.append(Scale(VARIABLES["update"], "hidden'", slopes[0] * shut))
        clocks = {"hidden": "log_tau", "z": "log_tau_z", "r": "log_tau_r"}
        for name, rate, slope in zip(self.components, rates, slopes, strict=True):
            edges += [Scale(f"to {name}", f"{name}'", rate), Scale(name, f"{name}'", -rate)]
            if self.present(clocks[name]):
                edges.append(Own(clocks[name], f"{name}'", -slope))
        return self.products(t, h, u, torch.cat(slopes, -1), edges)

    def gates(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Gates:
        """``{"update": sigma(z), "reset": sigma(r)}``, those that exist."""
        self.check_arguments(h, u)
        return {name: torch.sigmoid(x) for name, x in self._variables(h)[1].items()}
