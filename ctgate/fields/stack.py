"""Layers on top of each other as one field."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ctgate.fields.base import Gates, Time, VectorField
from ctgate.fields.cell import Cell
from ctgate.fields.interop import TorchCell, module_from_layers
from ctgate.fields.jacobian import Jacobian
from ctgate.kernels import AnalyticLinearization, ChainLinearization, Linearization, Link


def _one_tau(layer: VectorField, derivative: Tensor) -> Tensor:
    """tau times the rows of the layer's output in a derivative (*batch, state, ...) of its dh/dt."""
    tau = layer.tau
    assert tau is not None  # the constructor saw to it
    return tau.unsqueeze(-1) * derivative[..., layer.output, :]


def _log_tau_of(layer: VectorField, prefix: str = "") -> str | None:
    if isinstance(layer, Stack):
        name = layer._log_tau()
    else:
        name = layer.present("log_tau") if isinstance(layer, Cell) else None
    return None if name is None else prefix + name


class Stack(VectorField):
    r"""Layers, each driven by the output of the layer below, as one field.

    Layer k sees the output of layer k-1 one ``tau`` ahead,

    .. math:: u_k = h_{k-1} + \tau_{k-1} \frac{dh_{k-1}}{dt}, \qquad u_0 = u,

    so that one Euler step of size ``tau`` is a stack of discrete cells, in which a layer reads what the layer
    below has just written. (For small gates :math:`u_k` is close to :math:`h_{k-1}`.) The state is the
    concatenation of the layers' states, in order.

    Parameters:
        layers: fields with a ``tau``; from the second on, ``input_size`` is the output size of the layer
            below. A stack can be a layer.

    Components are ``layers.0.hidden``, ``layers.1.cell``, ...; gates are ``layers.0.update``, ... ; the
    output is the last layer's. ``tau`` is the last layer's.

    Raises:
        ValueError: no layers, a layer without ``tau`` (such as ``Field``) or without sizes, or sizes that do
            not fit. TypeError: a layer that is not a field.

    Source: THEORY.md 1 and 2.
    """

    layers: nn.ModuleList

    def __init__(self, layers: Iterable[VectorField]) -> None:
        members = list(layers)
        if not members:
            raise ValueError("Stack(layers=...): layers is empty; it must hold at least one field")
        sizes = []
        for k, layer in enumerate(members):
            if not isinstance(layer, VectorField):
                raise TypeError(
                    f"Stack(layers=...): layer {k} is a {type(layer).__name__}; it must be a VectorField"
                )
            if layer.tau is None or layer.state_size is None or layer.input_size is None:
                raise ValueError(
                    f"Stack(layers=...): layer {k} is a {type(layer).__name__} without tau; a layer is "
                    "driven by the one below one tau ahead, so each needs its tau and fixed sizes"
                )
            if k > 0:
                below = members[k - 1].output
                width = below.stop - below.start
                if layer.input_size != width:
                    raise ValueError(
                        f"Stack(layers=...): layer {k} has input_size {layer.input_size} and layer {k - 1} "
                        f"has {width} outputs; they must be equal"
                    )
            sizes.append(layer.state_size)
        super().__init__(input_size=members[0].input_size, state_size=sum(sizes))
        self.layers = nn.ModuleList(members)
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        self._parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.autonomous = all(layer.autonomous for layer in members)
        self.gate_names = tuple(
            f"layers.{k}.{name}" for k, layer in enumerate(members) for name in layer.gate_names
        )

    @property
    def components(self) -> dict[str, slice]:
        """``layers.<k>.<component>`` of every layer."""
        return {
            f"layers.{k}.{name}": slice(part.start + where.start, part.start + where.stop)
            for k, (layer, part) in enumerate(zip(self._members(), self._parts, strict=True))
            for name, where in layer.components.items()
        }

    @property
    def output(self) -> slice:
        """The output of the last layer."""
        where, start = self._members()[-1].output, self._parts[-1].start
        return slice(start + where.start, start + where.stop)

    @property
    def tau(self) -> Tensor | None:
        """The unit of time of the last layer [time]."""
        return self._members()[-1].tau

    def _log_tau(self) -> str | None:
        """The name of the parameter that is the logarithm of the last layer's tau, None when it is fixed."""
        return _log_tau_of(self._members()[-1], f"layers.{len(self.layers) - 1}.")

    @property
    def unrolls(self) -> bool:
        """Whether every layer has a fused cell, and no two share a parameter."""
        members = self._members()
        own = sum(len(list(layer.parameters())) for layer in members)
        alone = own == len(list(self.parameters()))
        return type(self) is Stack and alone and all(layer.fusable for layer in members)

    def parts(self) -> list[tuple[VectorField, str, slice]]:
        """Each layer from below, the prefix of its parameters' names, and where its state lies."""
        return [
            (layer, f"layers.{k}.", part)
            for k, (layer, part) in enumerate(zip(self._members(), self._parts, strict=True))
        ]

    def _members(self) -> list[VectorField]:
        return [layer for layer in self.layers if isinstance(layer, VectorField)]

    def _sweep(
        self, t: Time, h: Tensor, u: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
        """Per layer, from the bottom: its state, its input, its rate and its drive."""
        self.check_arguments(h, u)
        levels: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []
        signal = u
        for layer, part in zip(self._members(), self._parts, strict=True):
            state = h[..., part]
            rate, drive = layer.rate_drive(t, state, signal)
            levels.append((state, signal, rate, drive))
            tau, out = layer.tau, layer.output
            if tau is not None:
                hidden = state[..., out]
                signal = hidden + tau * (drive[..., out] - rate[..., out] * hidden)
        return levels

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state"]]:
        """The layers' rates and drives, concatenated like the state."""
        levels = self._sweep(t, h, u)
        return torch.cat([level[2] for level in levels], -1), torch.cat([level[3] for level in levels], -1)

    def jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Jacobian:
        r"""Block lower triangular: with :math:`B_k` the layer's own Jacobian by its input :math:`u_k`,

        .. math::
            \frac{\partial \dot h_k}{\partial h_j} = B_k \frac{\partial u_k}{\partial h_j}
            \quad (j < k), \qquad
            \frac{\partial u_{k+1}}{\partial h_j} =
            \delta_{jk} I + \tau_k \frac{\partial \dot h_k}{\partial h_j} \quad (j \le k).
        """
        leaks: list[Tensor] = []
        rows: list[Tensor] = []
        answer: Tensor | None = None  # du_k/dh_j for all j below
        for layer, (state, signal, _, _) in zip(self._members(), self._sweep(t, h, u), strict=True):
            own = layer.jacobian(t, state, signal)
            below = [] if answer is None else [layer.input_jacobian(t, state, signal) @ answer]
            leaks.append(own.leak)
            rows.append(torch.cat([*below, own.coupling], -1))
            width = rows[-1].shape[-1]
            unit = torch.eye(width, dtype=h.dtype, device=h.device)[-state.shape[-1] :]
            answer = unit[layer.output] + _one_tau(layer, torch.cat([*below, own.full()], -1))
        coupling = torch.cat([functional.pad(row, (0, h.shape[-1] - row.shape[-1])) for row in rows], -2)
        return Jacobian(torch.cat(leaks, -1), coupling)

    def input_jacobian(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Float[Tensor, "*batch state channel"]:
        r"""The input reaches the layers above the first through :math:`\tau_k \dot h_k` below them."""
        rows: list[Tensor] = []
        answer: Tensor | None = None  # du_k/du
        for layer, (state, signal, _, _) in zip(self._members(), self._sweep(t, h, u), strict=True):
            own = layer.input_jacobian(t, state, signal)
            rows.append(own if answer is None else own @ answer)
            answer = _one_tau(layer, rows[-1])
        return torch.cat(rows, -2)

    def linearize(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Linearization:
        """The chain rule over the layers, as products with vectors.

        They are automatic if those of a layer are, or where layers share parameters.
        """
        self.check_arguments(h, u)
        links: list[Link] = []
        signal = u
        for layer, part in zip(self._members(), self._parts, strict=True):
            state = h[..., part]
            own, tau = layer.linearize(t, state, signal), layer.tau
            if not isinstance(own, AnalyticLinearization) or tau is None:
                return super().linearize(t, h, u)
            links.append(Link(own, part, layer.output, tau, _log_tau_of(layer)))
            signal = state[..., layer.output] + tau * own.slope[..., layer.output]
        parameters = dict(self.named_parameters())
        stated = ChainLinearization(h, links, parameters)
        return stated if stated.known == parameters.keys() else super().linearize(t, h, u)

    def gates(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Gates:
        """The layers' gates, named ``layers.<k>.<gate>``."""
        return {
            f"layers.{k}.{name}": gate
            for k, (layer, level) in enumerate(zip(self._members(), self._sweep(t, h, u), strict=True))
            for name, gate in layer.gates(t, level[0], level[1]).items()
        }

    def to_torch(self, batch_first: bool = False, cell: bool = False) -> nn.Module:
        """An ``nn.GRU`` or ``nn.LSTM`` with clones of these weights, in their dtype and on their device.

        Raises:
            ValueError: torch cannot hold a layer, or the layers differ in kind, hidden size, bias or tau;
                ``cell=True`` with more than one layer. TypeError: a layer is neither GRU nor LSTM.

        Source: THEORY.md 2.
        """
        cells: list[TorchCell] = []
        for k, layer in enumerate(self.layers):
            if not isinstance(layer, TorchCell):
                raise TypeError(
                    f"Stack.to_torch: layer {k} is a {type(layer).__name__}; torch holds GRU and LSTM"
                )
            cells.append(layer)
        return module_from_layers(cells, batch_first, cell)
