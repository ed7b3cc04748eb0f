r"""Layer normalisation of a candidate's pre-activation, in both directions, on buffers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ctgate.kernels.fused.cell import Gradients, Parts, total


@dataclass(frozen=True)
class Norm:
    """Layer normalisation: weight, bias (hidden,) and eps.

    ``candidate`` are the candidate's parts, of one evaluation or of many: its value, its pre-activation and
    that one's mean and reciprocal deviation.
    """

    weight: Tensor
    bias: Tensor
    eps: float

    def activate(self, candidate: Parts) -> None:
        """Value, mean and reciprocal deviation from the pre-activation."""
        value, pre, mean, deviation = candidate
        seen, m, s = torch.native_layer_norm(pre, [pre.shape[-1]], self.weight, self.bias, self.eps)
        torch.tanh(seen, out=value)
        mean.copy_(m)
        deviation.copy_(s)

    def pull(self, y: Tensor, candidate: Parts) -> Tensor:
        """The cotangent of the pre-activation from that of the normalised value."""
        return _through(y, candidate, self.weight)

    def push(self, x: Tensor, candidate: Parts) -> Tensor:
        """The tangent of the normalised value from that of the pre-activation, the transpose of
        :meth:`pull`: but for the weight the derivative is symmetric."""
        return _through(x, candidate, None) * self.weight

    def gradients(self, y: Tensor, candidate: Parts, keep: int) -> Gradients:
        """Of weight and bias, from the cotangent of the normalised value (step, sample, hidden)."""
        _, pre, mean, deviation = candidate
        return {
            "layernorm.weight": total(y * (pre - mean) * deviation, keep),
            "layernorm.bias": total(y, keep),
        }

    def add_sources(self, direction: Mapping[str, Tensor], candidate: Parts, out: Tensor) -> None:
        """The transpose of :meth:`gradients`: adds to the tangent of the normalised value."""
        _, pre, mean, deviation = candidate
        weight, bias = (direction.get(f"layernorm.{name}") for name in ("weight", "bias"))
        if weight is not None:
            out.add_((pre - mean) * deviation * weight)
        if bias is not None:
            out.add_(bias)


def _through(y: Tensor, candidate: Parts, weight: Tensor | None) -> Tensor:
    """The normalisation's derivative, behind a product with ``weight``, times a vector or a block of them."""
    _, pre, mean, deviation = _as_often(candidate, y)
    passed: Tensor = torch.ops.aten.native_layer_norm_backward(
        y, pre, [pre.shape[-1]], mean, deviation, weight, None, [True, False, False]
    )[0]
    return passed


def _as_often(parts: Parts, vectors: Tensor) -> Parts:
    """The parts of one step, repeated for the vectors of a block: torch's kernel reads them as they lie."""
    if parts[0].ndim == vectors.ndim:
        return parts
    return tuple(part.expand(*vectors.shape[:-1], part.shape[-1]).contiguous() for part in parts)
