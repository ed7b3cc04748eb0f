r"""The derivatives of layers on top of each other, from those of the layers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ctgate.kernels.blocks import AnalyticLinearization, sum_over_samples
from ctgate.kernels.linearization import Blocks, Directions, check_directions, check_keep, check_vectors


@dataclass(frozen=True)
class Link:
    """A layer of a chain: its derivatives, where its state lies in the chain's and its output in its own, its
    time unit and the name of the layer's parameter that is the logarithm of it, None when it is fixed."""

    own: AnalyticLinearization
    part: slice
    output: slice
    tau: Tensor
    log_tau: str | None


class ChainLinearization(AnalyticLinearization):
    r"""Layers of which each is driven by :math:`u_{k+1} = h_k + \tau_k \dot h_k` of the one below.

    A product carries :math:`\delta u_{k+1} = \delta h_k + \tau_k\,\delta\dot h_k + \dot h_k\,\delta\tau_k`
    upwards, a transposed one the cotangent of :math:`u_{k+1}` downwards; nothing else connects the layers.

    Parameters:
        h: the state of all layers, ``(*batch, state)``.
        links: the layers, from the bottom.
        parameters: all that the field has, by name: the layers' are ``layers.<k>.<name>``.

    Source: THEORY.md 3.
    """

    def __init__(
        self, h: Float[Tensor, "*batch state"], links: Sequence[Link], parameters: Mapping[str, Tensor]
    ) -> None:
        self.h = h
        self.slope = torch.cat([link.own.slope for link in links], -1)
        self.parameters = parameters
        self._links = tuple(links)

    @property
    def known(self) -> set[str]:
        """The names of the layers' parameters."""
        return {f"layers.{k}.{name}" for k, link in enumerate(self._links) for name in link.own.known}

    def jvp(self, v: Float[Tensor, "*lead state"]) -> Float[Tensor, "*lead state"]:
        """A v."""
        check_vectors("jvp(v=...): v", v, self.h.shape[:-1], self.h.shape[-1])
        slopes: list[Tensor] = []
        signal: Tensor | None = None
        for link in self._links:
            own = v[..., link.part]
            slope = link.own.jvp(own)
            if signal is not None:
                slope = slope + link.own.input_jvp(signal)
            signal = own[..., link.output] + link.tau * slope[..., link.output]
            slopes.append(slope)
        return torch.cat(slopes, -1)

    def vjp(self, a: Float[Tensor, "*lead state"]) -> Float[Tensor, "*lead state"]:
        """A^T a."""
        check_vectors("vjp(a=...): a", a, self.h.shape[:-1], self.h.shape[-1])
        rows: list[Tensor] = []
        for link, weights, above in self._down(a):
            row = link.own.vjp(weights)
            rows.append(row if above is None else row + _at_output(link, above))
        return torch.cat(rows[::-1], -1)

    def input_jvp(self, w: Float[Tensor, "*lead channel"]) -> Float[Tensor, "*lead state"]:
        """C w."""
        slopes: list[Tensor] = []
        signal = w
        for link in self._links:
            slopes.append(link.own.input_jvp(signal))
            signal = link.tau * slopes[-1][..., link.output]
        return torch.cat(slopes, -1)

    def input_vjp(self, a: Float[Tensor, "*lead state"]) -> Float[Tensor, "*lead channel"]:
        """C^T a."""
        check_vectors("input_vjp(a=...): a", a, self.h.shape[:-1], self.h.shape[-1])
        *_, (first, weights, _) = self._down(a)
        return first.own.input_vjp(weights)

    def parameter_jvp(self, direction: Directions) -> Float[Tensor, "*batch state"]:
        """B v."""
        check_directions(direction, self.parameters)
        slopes: list[Tensor] = []
        signal: Tensor | None = None
        for k, link in enumerate(self._links):
            prefix = f"layers.{k}."
            own = {
                name.removeprefix(prefix): value
                for name, value in direction.items()
                if name.startswith(prefix)
            }
            slope = link.own.parameter_jvp(own)
            if signal is not None:
                slope = slope + link.own.input_jvp(signal)
            signal = link.tau * slope[..., link.output]
            if link.log_tau in own:
                signal = signal + own[link.log_tau] * link.tau * link.own.slope[..., link.output]
            slopes.append(slope)
        return torch.cat(slopes, -1)

    def parameter_vjp(self, a: Float[Tensor, "*batch state"], keep: int = 0) -> Blocks:
        """B^T a by name."""
        check_vectors("parameter_vjp(a=...): a", a, self.h.shape[:-1], self.h.shape[-1], lead=False)
        check_keep(keep, self.h.ndim - 1)
        blocks: Blocks = {}
        for k, (link, weights, above) in zip(reversed(range(len(self._links))), self._down(a), strict=True):
            own = link.own.parameter_vjp(weights, keep)
            if above is not None and link.log_tau is not None:
                through = above * link.tau * link.own.slope[..., link.output]
                like = link.own.parameters[link.log_tau]
                own[link.log_tau] = own[link.log_tau] + sum_over_samples(through, like, keep)
            blocks.update({f"layers.{k}.{name}": block for name, block in own.items()})
        return {name: blocks[name] for name in self.parameters}

    def _down(self, a: Tensor) -> Iterator[tuple[Link, Tensor, Tensor | None]]:
        """Per layer from the top: it, the cotangent of its slope, that of the input of the layer above."""
        above: Tensor | None = None
        for link in reversed(self._links):
            weights = a[..., link.part]
            if above is not None:
                weights = weights + _at_output(link, link.tau * above)
            yield link, weights, above
            if link is not self._links[0]:
                above = link.own.input_vjp(weights)


def _at_output(link: Link, x: Tensor) -> Tensor:
    """What belongs to the layer's output, among zeros."""
    width = link.part.stop - link.part.start
    return functional.pad(x, (link.output.start, width - link.output.stop))
