"""Parameters by name as one vector, and back."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """The shapes of parameters by name, in the order in which their entries follow each other in a vector."""

    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Blocks":
        """The blocks of these tensors."""
        return cls({name: tensor.shape for name, tensor in tensors.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the blocks."""
        return tuple(self.shapes)

    @property
    def entries(self) -> int:
        """The length of the vector."""
        return sum(shape.numel() for shape in self.shapes.values())

    def pack(self, tensors: Mapping[str, Tensor], like: Tensor, lead: int = 0) -> Tensor:
        """``(*lead, entries)`` from ``(*lead, *shape)`` by name; in dtype and place of ``like``."""
        parts = [
            tensors[name].flatten(lead) if shape else tensors[name].unsqueeze(-1)
            for name, shape in self.shapes.items()
        ]
        return torch.cat(parts, -1) if parts else like.new_empty(0)

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """``(*lead, *shape)`` by name from ``(*lead, entries)``."""
        parts = torch.split(vector, [shape.numel() for shape in self.shapes.values()], -1)
        pairs = zip(self.shapes.items(), parts, strict=True)
        return {name: part.reshape((*part.shape[:-1], *shape)) for (name, shape), part in pairs}

    def norms(self, vectors: Tensor) -> Tensor:
        """The Euclidean norm of each block, ``(*lead, block)``."""
        blocks = self.unpack(vectors)
        return torch.stack(
            [blocks[name].reshape(*vectors.shape[:-1], -1).norm(dim=-1) for name in blocks], -1
        )
