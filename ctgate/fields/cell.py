"""The parameters that all gated cells share: weights in torch's layout, and the time unit tau."""

import abc
import math
from collections.abc import Mapping, Sequence
from types import NoneType

import torch
from torch import Tensor, nn
from torch.nn import functional

from ctgate.fields.base import Time, VectorField
from ctgate.fields.jacobian import scale_rows
from ctgate.kernels import BlockLinearization, Edge, Linearization, Normalise, Own, Product
from ctgate.kernels.fused import FusedCell


def _normalisation(layernorm: nn.LayerNorm, pre: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's weight over the deviation of ``pre``, and ``pre`` normalised."""
    centred = pre - pre.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + layernorm.eps).sqrt()
    return layernorm.weight / deviation, centred / deviation


def positive_time(
    owner: str, name: str, value: float | int | Tensor, size: int, dtype: torch.dtype
) -> Tensor:
    """``value`` as a tensor of ``dtype``, a scalar or ``(size,)``, checked to be positive and finite."""
    if isinstance(value, bool) or not isinstance(value, float | int | Tensor):
        raise TypeError(
            f"{owner}({name}=...): {name} is a {type(value).__name__}; it must be a float or a tensor [time]"
        )
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{owner}({name}=...): {name} requires grad, and the field would keep a copy that does not; "
            "detach it, and use learn_tau=True for a learnable time unit"
        )
    checked = torch.as_tensor(value, dtype=dtype).clone()
    if checked.shape not in (torch.Size(()), torch.Size((size,))):
        raise ValueError(
            f"{owner}({name}=...): {name} has shape {tuple(checked.shape)}; it must be a scalar or one value "
            f"per unit, ({size},)"
        )
    if not bool((torch.isfinite(checked) & (checked > 0)).all()):
        raise ValueError(f"{owner}({name}=...): {name} is {checked.tolist()}; it must be positive and finite")
    return checked


class Cell(VectorField, abc.ABC):
    r"""A field with weights ``weight_ih`` (rows, input), ``weight_hh`` (rows, hidden), biases and ``tau``.

    Weights and biases start uniform on :math:`\pm 1/\sqrt{hidden}`, as torch's recurrent cells do.

    Parameters:
        input_size, hidden_size: numbers of channels and of units; ``input_size`` may be 0.
        row_blocks, extra_rows: the weights have ``rows = row_blocks * hidden + extra_rows`` rows.
        state_blocks: state variables per unit.
        biases: names of the bias vectors, each ``(rows,)``; ``bias=False`` sets them to None.
        tau: unit of time [time], a positive scalar or one value per unit. A fixed ``tau`` is the buffer
            ``fixed_tau``; with ``learn_tau=True`` the parameter is ``log_tau`` and ``tau = exp(log_tau)``. It
            has the dtype of the weights: a field made in float32 and converted keeps tau to 7 digits only.
        layernorm: normalise the candidate's pre-activation (J. L. Ba, J. R. Kiros and G. E. Hinton,
            arXiv 1607.06450).
        generator: source of the initial weights; None draws from torch's global generator.

    Raises:
        ValueError: sizes that are not positive integers, ``tau`` not positive and finite or of a wrong shape.
        TypeError: ``tau`` neither number nor tensor.
    """

    input_size: int
    state_size: int
    weight_ih: nn.Parameter
    weight_hh: nn.Parameter
    fixed_tau: Tensor  # None when log_tau is set
    log_tau: nn.Parameter | None
    layernorm: nn.LayerNorm | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        row_blocks: int,
        state_blocks: int = 1,
        extra_rows: int = 0,
        biases: tuple[str, ...],
        tau: float | int | Tensor,
        learn_tau: bool,
        bias: bool,
        layernorm: bool,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if isinstance(hidden_size, bool) or not isinstance(hidden_size, int) or hidden_size < 1:
            raise ValueError(
                f"{type(self).__name__}(hidden_size=...): hidden_size is {hidden_size!r}; it must be an "
                "integer >= 1"
            )
        super().__init__(input_size=input_size, state_size=state_blocks * hidden_size)
        self.hidden_size = hidden_size
        rows = row_blocks * hidden_size + extra_rows
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size, device=device, dtype=dtype))
        for name in biases:
            vector = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
            self.register_parameter(name, vector)
        self.register_time("tau", tau, learn_tau)
        self.layernorm = nn.LayerNorm(hidden_size, device=device, dtype=dtype) if layernorm else None
        bound = 1.0 / math.sqrt(hidden_size)
        with torch.no_grad():
            for parameter in (
                self.weight_ih,
                self.weight_hh,
                *map(self.get_parameter, biases if bias else ()),
            ):
                parameter.uniform_(-bound, bound, generator=generator)

    def register_time(self, name: str, value: float | int | Tensor, learn: bool) -> None:
        """Keep a time constant as the buffer ``fixed_<name>`` or as the parameter ``log_<name>``."""
        like = self.weight_hh
        checked = positive_time(type(self).__name__, name, value, self.hidden_size, like.dtype).to(
            like.device
        )
        self.register_buffer(f"fixed_{name}", None if learn else checked)
        self.register_parameter(f"log_{name}", nn.Parameter(checked.log()) if learn else None)

    @property
    def tau(self) -> Tensor:
        """The unit of time of the rates [time], a scalar or one value per unit."""
        return self.fixed_tau if self.log_tau is None else self.log_tau.exp()

    def check_arguments(self, h: Tensor, u: Tensor | None) -> None:
        """Raise when the sizes, the dtype or the device of ``h`` or ``u`` do not fit the parameters."""
        super().check_arguments(h, u)
        own = self.weight_hh
        for name, value in (("h", h), ("u", u)):
            if value is not None and (value.dtype != own.dtype or value.device != own.device):
                raise TypeError(
                    f"{type(self).__name__}: {name} is {value.dtype} on {value.device} and the parameters "
                    f"are {own.dtype} on {own.device}; convert one of them with .to()"
                )

    def project_input(self, u: Tensor | None, bias: Tensor | None) -> Tensor:
        """``weight_ih u + bias``; without input channels what is left of it."""
        if u is not None:
            return functional.linear(u, self.weight_ih, bias)
        return self.weight_ih.new_zeros(self.weight_ih.shape[0]) if bias is None else bias

    def candidate(self, pre: Tensor) -> Tensor:
        """The candidate's pre-activation, normalised if the cell was asked to."""
        if self.layernorm is None:
            return pre
        normalised: Tensor = self.layernorm(pre)
        return normalised

    def candidate_jacobian(self, pre: Tensor, matrix: Tensor) -> Tensor:
        r"""The derivative of :meth:`candidate` at ``pre`` (*batch, hidden) times ``matrix`` (..., hidden, k).

        With :math:`\hat y` the normalised ``pre``, the derivative under layer normalisation is
        :math:`D_{\gamma/s} (I - \mathbf 1 \mathbf 1^\top / H - \hat y \hat y^\top / H)`, and 1 without.

        Source: THEORY.md 3.
        """
        if self.layernorm is None:
            return matrix
        gain, normalised = _normalisation(self.layernorm, pre)
        unit = normalised.unsqueeze(-1)
        along = matrix - matrix.mean(-2, keepdim=True) - unit * (unit * matrix).mean(-2, keepdim=True)
        return scale_rows(gain, along)

    def candidate_edges(self, name: str, pre: Tensor) -> tuple[str, list[Edge]]:
        """What :meth:`candidate` makes of the block ``name``, whose value is ``pre``: a block, and the edges
        to it."""
        if self.layernorm is None:
            return name, []
        gain, unit = _normalisation(self.layernorm, pre)
        target = f"{name} normalised"
        return target, [
            Normalise(name, target, gain, unit),
            Own("layernorm.weight", target, unit),
            Own("layernorm.bias", target, unit.new_ones(())),
        ]

    def input_edge(self, u: Tensor | None, rows: Mapping[str, int], bias: str = "bias") -> Product:
        """What :meth:`project_input` adds to blocks, by the number of their rows in ``weight_ih``."""
        seen = self.weight_ih.new_zeros(0) if u is None else u
        return Product("weight_ih", "u", rows, self.weight_ih, seen, self.present(bias))

    def present(self, name: str) -> str | None:
        """The parameter's name, None when it is left out."""
        return None if getattr(self, name) is None else name

    def products(
        self, t: Time, h: Tensor, u: Tensor | None, slope: Tensor, edges: Sequence[Edge]
    ) -> Linearization:
        """The products with the derivatives that ``edges`` state around ``slope`` = dh/dt.

        They are automatic where the field's parameters are not those that the edges know: one that a
        parametrization computes from others, or one of a nonlinearity's own.
        """
        parameters = dict(self.named_parameters())
        stated = BlockLinearization(h, slope, tuple(self.components), edges, parameters)
        return stated if stated.known == parameters.keys() else VectorField.linearize(self, t, h, u)

    @property
    def fusable(self) -> bool:
        """Whether the parameters are those that the fused cell knows, and no others: none made a buffer, used
        twice, or computed by a parametrization; all biases or none."""
        kind, norm = self.fused_cell, self.layernorm
        if kind is None or kind.names != self._parameters.keys():
            return False
        if type(norm) not in (NoneType, nn.LayerNorm):
            return False
        known = {name for name, parameter in self._parameters.items() if parameter is not None}
        if len({name in known for name in kind.names if name.startswith("bias")}) > 1:
            return False
        if norm is not None:
            known |= {"layernorm.weight", "layernorm.bias"}
        return known == {name for name, _ in self.named_parameters()}

    def fuse(self, parameters: Mapping[str, Tensor]) -> FusedCell:
        """The fused cell with these parameters."""
        kind = self.fused_cell
        assert kind is not None
        return kind(
            parameters, self.tau_of(parameters), None if self.layernorm is None else self.layernorm.eps
        )

    def tau_of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """:attr:`tau` with these parameters."""
        log_tau = parameters.get("log_tau")
        return self.fixed_tau if log_tau is None else log_tau.exp()

    def extra_repr(self) -> str:
        """Sizes and time unit, for ``print(field)``."""
        tau = self.tau.detach()
        shown = f"{tau.item():.6g}" if tau.ndim == 0 else "per unit"
        learned = "" if self.log_tau is None else ", learn_tau=True"
        return f"{self.input_size}, {self.hidden_size}, tau={shown}{learned}"
