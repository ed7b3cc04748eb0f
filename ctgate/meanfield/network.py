r"""Networks with random weights, as theory and simulation both see them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ctgate.fields import GRU, LSTM, GatedRate, Leaky, MultiGate, ScalarGate, VectorField

# Row blocks of the weights, in their order.
BLOCKS: dict[type[VectorField], tuple[str, ...]] = {
    Leaky: ("h",),
    ScalarGate: ("z", "h"),
    MultiGate: ("z", "h"),
    GRU: ("r", "z", "h"),
    LSTM: ("i", "f", "g", "o"),
    GatedRate: ("h", "z", "r"),
}


@dataclass(frozen=True)
class RandomNetwork:
    r"""A network of N units whose weights are independent Gaussians: with the gain :math:`a_k` of block k,

    .. math:: W_k \sim \mathcal N(0,\,a_k^2/N), \qquad U_k \sim \mathcal N(0,\,a_k^2/N),

    and one bias per block.

    An input of N channels with independent values of variance v then adds :math:`a_k^2 v` to the variance of
    the pre-activations of k.

    The blocks are "h" (the candidate), "z" and "r" (update and reset gate) of GRU and GatedRate, "z" and "h"
    of ScalarGate and MultiGate, "h" of Leaky, and "i", "f", "g", "o" of the LSTM. Signs are the field's: z
    keeps the old state in a GRU and lets the new one in elsewhere.

    Parameters:
        field: the class.
        size: N.
        gains: by block, not negative; every block of the field.
        biases: by block; those left out are 0. The candidate's stands outside the reset gate.
        reset: "before" or "after" the product; GRU only, None is torch's, "after".
        input_variance: v, 0 for no input.
        seed: of the weights.
        options: other arguments of the field, such as ``tau``, ``tau_z``, ``update_gate``.

    Raises: ValueError for blocks that the field does not have or that are missing, values out of range.
    TypeError for a class that is none of the above.

    Source: T. Can, K. Krishnamurthy and D. J. Schwab, arXiv 2002.00025; THEORY.md 20.
    """

    field: type[VectorField]
    size: int
    gains: Mapping[str, float]
    biases: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reset: str | None = None
    input_variance: float = 0.0
    seed: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.field not in BLOCKS:
            known = ", ".join(kind.__name__ for kind in BLOCKS)
            raise TypeError(f"RandomNetwork(field=...): field is {self.field!r}; it must be one of {known}")
        if self.size < 1:
            raise ValueError(f"RandomNetwork(size=...): size is {self.size}; it must be positive")
        if self.reset is not None and (self.field is not GRU or self.reset not in ("before", "after")):
            raise ValueError(
                f"RandomNetwork(reset=...): reset is {self.reset!r} and the field {self.field.__name__}; it "
                "must be 'before' or 'after', for a GRU"
            )
        for name, values in (("gains", self.gains), ("biases", self.biases)):
            if unknown := sorted(set(values) - set(self.blocks)):
                raise ValueError(
                    f"RandomNetwork({name}=...): {self.field.__name__} has no {unknown[0]!r}; it has "
                    f"{', '.join(self.blocks)}"
                )
        if missing := [block for block in self.blocks if block not in self.gains]:
            raise ValueError(f"RandomNetwork(gains=...): the gain of {missing[0]!r} is missing")
        for block, gain in self.gains.items():
            if not gain >= 0.0:
                raise ValueError(
                    f"RandomNetwork(gains=...): that of {block!r} is {gain}; it must not be negative"
                )
        if not self.input_variance >= 0.0:
            raise ValueError(
                f"RandomNetwork(input_variance=...): it is {self.input_variance}; it must not be negative"
            )

    @property
    def blocks(self) -> tuple[str, ...]:
        """The row blocks that the field has, in their order."""
        left_out = {"z": "update_gate", "r": "reset_gate"} if self.field is GatedRate else {}
        return tuple(block for block in BLOCKS[self.field] if self.options.get(left_out.get(block, ""), True))

    def bias(self, block: str) -> float:
        """That of one block."""
        return float(self.biases.get(block, 0.0))

    def at(self, parameter: str, value: float) -> "RandomNetwork":
        """The same network with another value of "gains.h", "biases.z", "input_variance" or the like."""
        name, _, block = parameter.partition(".")
        changes: dict[str, Any] = {name: {**getattr(self, name), block: value} if block else value}
        return dataclasses.replace(self, **changes)

    def draw(self, *, seed: int | None = None, dtype: torch.dtype = torch.float64) -> VectorField:
        """A field with such weights; ``seed`` in place of the network's own."""
        channels = self.size if self.input_variance else 0
        options = dict(self.options)
        if self.field is GRU:
            options["reset"] = self.reset or "after"
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        # The weights that the field starts with, all replaced, are not drawn from torch's global generator.
        options.setdefault("generator", torch.Generator())
        drawn: VectorField = self.field(channels, self.size, dtype=dtype, **options)  # type: ignore[call-arg]
        parameters = dict(drawn.named_parameters())
        rows = {block: 1 if self.field is ScalarGate and block == "z" else self.size for block in self.blocks}
        gains, biases = (
            torch.cat(
                [torch.full((count,), value(block), dtype=torch.float64) for block, count in rows.items()]
            )
            for value in (self.gains.__getitem__, self.bias)
        )
        with torch.no_grad():
            for name in ("weight_hh", "weight_ih"):
                weight = parameters[name]
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.copy_(gains.unsqueeze(-1) * noise / self.size**0.5)
            parameters["bias_ih" if "bias_ih" in parameters else "bias"].copy_(biases)
            if "bias_hh" in parameters:
                parameters["bias_hh"].zero_()
        return drawn

    def draw_input(
        self, batch: tuple[int, ...] = (), *, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "*batch channel"] | None:
        """A constant input with independent values, (*batch, N); None where ``input_variance`` is 0."""
        if not self.input_variance:
            return None
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((*batch, self.size), generator=generator, dtype=torch.float64)
        return noise.mul_(self.input_variance**0.5).to(dtype)
