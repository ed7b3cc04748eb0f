"""Recurrent layers of any origin, with their gates by name."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ctgate.fields import GRU, LSTM, GatedRate, ScalarGate, Stack, VectorField
from ctgate.meanfield.network import BLOCKS


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        kind: the field class that it is.
        blocks: the rows of each gate and of the candidate ("h", or "g" of an LSTM), by name.
        weight: recurrent, (rows, hidden).
        bias, twin: (rows,); torch has two, which add up, other fields have one, and both may be None.
    """

    kind: type[VectorField]
    blocks: dict[str, slice]
    weight: Tensor
    bias: Tensor | None
    twin: Tensor | None

    def bias_of(self, block: str) -> Tensor:
        """The sum of the biases of a block, (rows of the block,)."""
        rows = self.blocks[block]
        found = self.weight.new_zeros(rows.stop - rows.start)
        for bias in (self.bias, self.twin):
            if bias is not None:
                found = found + bias.detach()[rows]
        return found

    def set_bias(self, block: str, values: Tensor | float) -> None:
        """Set a block's bias and clear its twin."""
        assert self.bias is not None
        self.bias[self.blocks[block]] = values
        if self.twin is not None:
            self.twin[self.blocks[block]] = 0.0


def layers(module: nn.Module, caller: str) -> Iterator[Layer]:
    """The layers of a field, or of ``torch.nn.GRU``, ``LSTM`` or one of their cells, both directions.

    Raises: TypeError for other modules, or a part without gates and candidate of their own (``LTC``,
    ``Field``); ValueError for an LSTM with projections.
    """
    if isinstance(module, Stack):
        for part, _, _ in module.parts():
            yield from layers(part, caller)
    elif isinstance(module, VectorField) and type(module) in BLOCKS:
        weights = dict(module.named_parameters())
        bias = weights.get("bias", weights.get("bias_ih"))
        blocks = BLOCKS[type(module)]
        if isinstance(module, GatedRate):
            blocks = ("h", *list(module.components)[1:])
        yield _layer(type(module), blocks, weights["weight_hh"], bias, weights.get("bias_hh"))
    elif isinstance(module, (nn.GRU, nn.LSTM, nn.GRUCell, nn.LSTMCell)):
        kind: type[VectorField] = GRU if isinstance(module, (nn.GRU, nn.GRUCell)) else LSTM
        if getattr(module, "proj_size", 0):
            raise ValueError(f"{caller}(module=...): module projects its hidden states; proj_size must be 0")
        weights = dict(module.named_parameters())
        for name, weight in weights.items():
            if name.startswith("weight_hh"):
                end = name.removeprefix("weight_hh")
                bias, twin = weights.get(f"bias_ih{end}"), weights.get(f"bias_hh{end}")
                yield _layer(kind, BLOCKS[kind], weight, bias, twin)
    else:
        known = ", ".join([kind.__name__ for kind in BLOCKS] + ["Stack", "torch's GRU, LSTM and their cells"])
        raise TypeError(f"{caller}(module=...): module is {type(module).__name__}; it must be one of {known}")


def _layer(
    kind: type[VectorField],
    names: tuple[str, ...],
    weight: Tensor,
    bias: Tensor | None,
    twin: Tensor | None,
) -> Layer:
    blocks, at = {}, 0
    for name in names:
        size = 1 if kind is ScalarGate and name == "z" else weight.shape[1]
        blocks[name] = slice(at, at + size)
        at += size
    return Layer(kind, blocks, weight, bias, twin)
