"""Weights in from torch's recurrent modules and out to them, bit for bit."""

import abc
from collections.abc import Iterable, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ctgate.fields.cell import Cell

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class TorchCell(Cell, abc.ABC):
    """A cell with the parameters of one layer of a torch recurrent module."""

    torch_module: ClassVar[type[nn.GRU] | type[nn.LSTM]]
    torch_cell: ClassVar[type[nn.GRUCell] | type[nn.LSTMCell]]
    row_blocks: ClassVar[int]
    state_blocks: ClassVar[int]
    bias_ih: nn.Parameter | None
    bias_hh: nn.Parameter | None

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
            row_blocks=self.row_blocks,
            state_blocks=self.state_blocks,
            biases=("bias_ih", "bias_hh"),
            tau=tau,
            learn_tau=learn_tau,
            bias=bias,
            layernorm=layernorm,
            generator=generator,
            device=device,
            dtype=dtype,
        )

    def torch_obstacle(self) -> str | None:
        """What keeps torch from holding this cell, in words; None when it can."""
        if self.layernorm is not None:
            return "layernorm=True"
        if self.tau.numel() > 1:
            return "tau is one value per unit, and the discrete cell needs one tau"
        return None

    def to_torch(self, batch_first: bool = False, cell: bool = False) -> nn.Module:
        """A torch module with clones of these weights, on the same device and in the same dtype.

        One step of it is one Euler step of this field with ``dt = tau``, whatever ``tau`` is.

        Parameters:
            batch_first: layout of the module's input (a field has none). cell: give the ``...Cell`` module.

        Raises:
            ValueError: torch cannot hold the field (tau per unit, layernorm, ``reset="before"``, no input
                channels), or ``batch_first`` with ``cell``.

        Source: THEORY.md 2.
        """
        return module_from_layers([self], batch_first, cell)


Kind = TypeVar("Kind", bound=TorchCell)


def layers_from_torch(
    kind: type[Kind], module: nn.Module, tau: float | int | Tensor, learn_tau: bool
) -> list[Kind]:
    """One field per layer of ``module``, with clones of its weights."""
    owner = f"{kind.__name__}.from_torch"
    if isinstance(module, kind.torch_cell):
        suffixes = [""]
    elif isinstance(module, kind.torch_module):
        refuse_options(owner, module)
        suffixes = [f"_l{k}" for k in range(module.num_layers)]
    else:
        raise TypeError(
            f"{owner}: module is a {type(module).__name__}; it must be a "
            f"torch.nn.{kind.torch_module.__name__} or torch.nn.{kind.torch_cell.__name__}"
        )
    return [layer_from_torch(kind, module, suffix, tau, learn_tau) for suffix in suffixes]


def refuse_options(owner: str, module: nn.RNNBase) -> None:
    """Raise for what a stack of one-directional cells does not do."""
    if module.bidirectional:
        raise ValueError(f"{owner}: module has bidirectional=True; a flow in time has one direction")
    if module.proj_size:
        raise ValueError(f"{owner}: module has proj_size={module.proj_size}; projections are not supported")
    if module.dropout:
        raise ValueError(
            f"{owner}: module has dropout={module.dropout}, which a differential equation cannot hold; set "
            "module.dropout = 0 first if it is not needed"
        )


def layer_from_torch(
    kind: type[Kind], module: nn.Module, suffix: str, tau: float | int | Tensor, learn_tau: bool
) -> Kind:
    """The layer of ``module`` whose parameters end in ``suffix``."""
    bias = bool(module.bias)
    names = NAMES if bias else NAMES[:2]
    weights: dict[str, Tensor] = {name: getattr(module, name + suffix) for name in names}
    rows_in = weights["weight_ih"]
    layer = kind(
        rows_in.shape[1],
        weights["weight_hh"].shape[1],
        tau=tau,
        learn_tau=learn_tau,
        bias=bias,
        # the initial weights are overwritten: draw them without touching torch's global generator
        generator=torch.Generator(rows_in.device),
        device=rows_in.device,
        dtype=rows_in.dtype,
    )
    with torch.no_grad():
        for name, weight in weights.items():
            own = layer.get_parameter(name)
            own.copy_(weight)
            own.requires_grad_(weight.requires_grad)
    return layer


def module_from_layers(layers: Sequence[TorchCell], batch_first: bool, cell: bool) -> nn.Module:
    """The torch module that holds these layers."""
    first = layers[0]
    kind = type(first)
    refuse_layers(layers)
    has_bias = first.bias_ih is not None
    own = first.weight_hh
    # built on the meta device, so that torch's global generator is not touched
    if cell:
        if len(layers) > 1:
            raise ValueError(f"to_torch(cell=True): the stack has {len(layers)} layers; a torch cell has one")
        if batch_first:
            raise ValueError(
                "to_torch(cell=True, batch_first=True): a torch cell has no time axis; use batch_first=False"
            )
        sizes = (first.input_size, first.hidden_size)
        module: nn.Module = kind.torch_cell(*sizes, bias=has_bias, device="meta", dtype=own.dtype)
        suffixes = [""]
    else:
        module = kind.torch_module(
            first.input_size,
            first.hidden_size,
            num_layers=len(layers),
            bias=has_bias,
            batch_first=batch_first,
            device="meta",
            dtype=own.dtype,
        )
        suffixes = [f"_l{k}" for k in range(len(layers))]
    module.to_empty(device=own.device)
    with torch.no_grad():
        for layer, suffix in zip(layers, suffixes, strict=True):
            for name in NAMES if has_bias else NAMES[:2]:
                weight: Tensor = getattr(layer, name)
                target = module.get_parameter(name + suffix)
                target.copy_(weight)
                target.requires_grad_(weight.requires_grad)
    return module


def refuse_layers(layers: Iterable[TorchCell]) -> None:
    """Raise for layers that one torch module cannot hold together."""
    first, *others = layers
    for k, layer in enumerate((first, *others)):
        where = f"{type(layer).__name__}.to_torch" if not others else f"Stack.to_torch: layer {k}"
        obstacle = layer.torch_obstacle()
        if obstacle is not None:
            raise ValueError(f"{where}: torch cannot hold this field: {obstacle}")
        if not layer.input_size:
            raise ValueError(f"{where}: torch cannot hold this field: input_size is 0")
        for what, own, wanted in (
            ("kind", type(layer).__name__, type(first).__name__),
            ("hidden_size", layer.hidden_size, first.hidden_size),
            ("bias", layer.bias_ih is not None, first.bias_ih is not None),
            ("tau", layer.tau.item(), first.tau.item()),
            ("dtype", layer.weight_hh.dtype, first.weight_hh.dtype),
            ("device", layer.weight_hh.device, first.weight_hh.device),
        ):
            if own != wanted:
                raise ValueError(
                    f"{where} has {what} {own} and layer 0 has {wanted}; one torch module holds one value"
                )
