r"""The derivatives of a gated cell, from a graph of its blocks: elementwise factors and matrix products."""

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ctgate.kernels.linearization import (
    Blocks,
    Directions,
    Linearization,
    check_directions,
    check_keep,
    check_vectors,
)

Nodes = dict[str, Tensor]  # a tangent, or a cotangent, for every block that has been reached


def _add(nodes: Nodes, name: str, value: Tensor) -> None:
    old = nodes.get(name)
    nodes[name] = value if old is None else old + value


def _add_product(nodes: Nodes, name: str, factor: Tensor, value: Tensor) -> None:
    """As :func:`_add`, in one pass over the memory."""
    old = nodes.get(name)
    nodes[name] = factor * value if old is None else torch.addcmul(old, factor, value)


class Edge(abc.ABC):
    """A linear map from one block to others, evaluated at one state per sample."""

    source: str

    @property
    @abc.abstractmethod
    def targets(self) -> tuple[str, ...]:
        """The blocks that it leads to."""

    @abc.abstractmethod
    def push(self, nodes: Nodes) -> None:
        """Add the map of the source's tangent to the targets'."""

    @abc.abstractmethod
    def pull(self, nodes: Nodes) -> None:
        """Add the transpose of the targets' cotangents to the source's."""


@dataclass(frozen=True)
class Scale(Edge):
    """target += factor * source, elementwise; the factor is ``(*batch, units)`` or broadcasts to it."""

    source: str
    target: str
    factor: Tensor

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def push(self, nodes: Nodes) -> None:
        _add_product(nodes, self.target, self.factor, nodes[self.source])

    def pull(self, nodes: Nodes) -> None:
        _add_product(nodes, self.source, self.factor, nodes[self.target])


class Spread(Scale):
    """A :class:`Scale` whose source is one number per sample that all units of the target share."""

    def pull(self, nodes: Nodes) -> None:
        _add(nodes, self.source, (self.factor * nodes[self.target]).sum(-1, keepdim=True))


class Own(Scale):
    """A :class:`Scale` whose source is a parameter, one value per unit or a scalar."""


@dataclass(frozen=True)
class Normalise(Edge):
    r"""target += :math:`D_{\mathrm{gain}}(I - \mathbf 1\mathbf 1^\top/H - \hat y\hat y^\top/H)` source.

    The derivative of layer normalisation: ``gain`` is the layer's weight over the deviation, ``unit`` is
    :math:`\hat y`, both ``(*batch, units)``.
    """

    source: str
    target: str
    gain: Tensor
    unit: Tensor

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def _project(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) - self.unit * (self.unit * x).mean(-1, keepdim=True)

    def push(self, nodes: Nodes) -> None:
        _add_product(nodes, self.target, self.gain, self._project(nodes[self.source]))

    def pull(self, nodes: Nodes) -> None:
        _add(nodes, self.source, self._project(self.gain * nodes[self.target]))


@dataclass(frozen=True)
class Product(Edge):
    """targets += weight source (+ bias), the rows divided among the targets in order.

    ``seen`` is the value of the source, ``(*batch, columns)`` or broadcasting to it. ``weight`` is the
    parameter ``name``, or rows of it where several products divide it among themselves, in order; likewise
    the parameter called ``bias``, None without one.
    """

    name: str
    source: str
    rows: Mapping[str, int]
    weight: Tensor
    seen: Tensor
    bias: str | None

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.rows)

    def divide(self, pre: Tensor, nodes: Nodes) -> None:
        """Add rows (..., rows) to the targets."""
        parts = torch.split(pre, list(self.rows.values()), -1)
        for target, part in zip(self.rows, parts, strict=True):
            _add(nodes, target, part)

    def join(self, nodes: Nodes) -> Tensor:
        """The targets' cotangents, (..., rows)."""
        parts = [nodes[target] for target in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def push(self, nodes: Nodes) -> None:
        self.divide(functional.linear(nodes[self.source], self.weight), nodes)

    def pull(self, nodes: Nodes) -> None:
        _add(nodes, self.source, self.join(nodes) @ self.weight)


class AnalyticLinearization(Linearization):
    """A linearization from stated derivatives.

    Attributes: ``slope``, dh/dt itself, ``(*batch, state)``; ``parameters``, those in force by name.
    """

    slope: Float[Tensor, "*batch state"]
    parameters: Mapping[str, Tensor]

    @property
    @abc.abstractmethod
    def known(self) -> set[str]:
        """The names of the parameters that the statement is about."""


class BlockLinearization(AnalyticLinearization):
    r"""dh/dt as a graph of blocks with ``units`` numbers per sample each: components of the state, the input,
    what the weights see, pre-activations, gates, and the components of dh/dt.

    A product with a vector carries it along the edges, a transposed one backwards along those that lead to
    what is asked for. Elementwise factors are evaluated when the edges are made; what is left is one matrix
    product per weight, and outer products for its gradient.

    Parameters:
        h, slope: the state and dh/dt, ``(*batch, state)``.
        components: names of the state's parts, of equal size; ``"x'"`` is the part of dh/dt of the part "x".
        edges: in such an order that all edges to a block stand before those from it. The input is "u".
        parameters: all that the field has, by name.

    Source: THEORY.md 3.
    """

    def __init__(
        self,
        h: Float[Tensor, "*batch state"],
        slope: Float[Tensor, "*batch state"],
        components: Sequence[str],
        edges: Sequence[Edge],
        parameters: Mapping[str, Tensor],
    ) -> None:
        self.h = h
        self.slope = slope
        self.parameters = parameters
        self._components = tuple(components)
        self._slopes = tuple(f"{name}'" for name in components)
        self._edges = tuple(edges)
        self._products = tuple(edge for edge in edges if isinstance(edge, Product))
        self._own = {edge.source for edge in edges if isinstance(edge, Own)}

    @property
    def known(self) -> set[str]:
        """The names of the parameters on the edges."""
        weights = {product.name for product in self._products}
        biases = {product.bias for product in self._products if product.bias is not None}
        return weights | biases | self._own

    def jvp(self, v: Float[Tensor, "*lead state"]) -> Float[Tensor, "*lead state"]:
        """A v."""
        check_vectors("jvp(v=...): v", v, self.h.shape[:-1], self.h.shape[-1])
        return self._push(self._split(v, self._components), v.shape)

    def vjp(self, a: Float[Tensor, "*lead state"]) -> Float[Tensor, "*lead state"]:
        """A^T a."""
        check_vectors("vjp(a=...): a", a, self.h.shape[:-1], self.h.shape[-1])
        nodes = self._pull(a, set(self._components))
        return self._join(nodes, self._components, a.shape)

    def input_jvp(self, w: Float[Tensor, "*lead channel"]) -> Float[Tensor, "*lead state"]:
        """C w."""
        check_vectors("input_jvp(w=...): w", w, self.h.shape[:-1], self._channels())
        return self._push({"u": w}, torch.Size((*w.shape[:-1], self.h.shape[-1])))

    def input_vjp(self, a: Float[Tensor, "*lead state"]) -> Float[Tensor, "*lead channel"]:
        """C^T a."""
        check_vectors("input_vjp(a=...): a", a, self.h.shape[:-1], self.h.shape[-1])
        return self._pull(a, {"u"})["u"]

    def parameter_jvp(self, direction: Directions) -> Float[Tensor, "*batch state"]:
        """B v."""
        check_directions(direction, self.parameters)
        nodes = {name: direction[name] for name in self._own if name in direction}
        used: dict[str, int] = {}
        for product in self._products:
            start = used.get(product.name, 0)
            stop = used[product.name] = start + sum(product.rows.values())
            if product.name in direction:
                product.divide(functional.linear(product.seen, direction[product.name][start:stop]), nodes)
            if product.bias is not None and product.bias in direction:
                product.divide(direction[product.bias][start:stop], nodes)
        return self._push(nodes, self.h.shape)

    def parameter_vjp(self, a: Float[Tensor, "*batch state"], keep: int = 0) -> Blocks:
        """B^T a by name; the gradient of a weight is one (batched) matrix product."""
        batch = self.h.shape[:-1]
        check_vectors("parameter_vjp(a=...): a", a, batch, self.h.shape[-1], lead=False)
        check_keep(keep, len(batch))
        wanted = self._own.union(*(product.targets for product in self._products))
        nodes = self._pull(a, wanted)

        rows: dict[str, list[Tensor]] = {}
        joined: dict[tuple[str, ...], Tensor] = {}
        for product in self._products:
            pre = joined.get(product.targets)
            if pre is None:
                pre = joined[product.targets] = _samples(product.join(nodes), batch, keep)
            rows.setdefault(product.name, []).append(_outer(pre, _samples(product.seen, batch, keep)))
            if product.bias is not None:
                rows.setdefault(product.bias, []).append(pre.sum(0))
        blocks: Blocks = {}
        for name, parameter in self.parameters.items():
            if name in rows:
                parts = rows[name]
                gradient = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
                blocks[name] = gradient.reshape(*batch[len(batch) - keep :], *parameter.shape)
            else:
                blocks[name] = sum_over_samples(nodes[name], parameter, keep)
        return blocks

    def _channels(self) -> int:
        return next(product.weight.shape[-1] for product in self._products if product.source == "u")

    def _split(self, vector: Tensor, names: tuple[str, ...]) -> Nodes:
        return dict(zip(names, vector.chunk(len(names), -1), strict=True))

    def _push(self, nodes: Nodes, shape: torch.Size) -> Tensor:
        for edge in self._edges:
            if edge.source in nodes:
                edge.push(nodes)
        return self._join(nodes, self._slopes, shape)

    def _pull(self, a: Tensor, wanted: set[str]) -> Nodes:
        reached = set(wanted)
        used: list[Edge] = []
        for edge in self._edges:
            if edge.source in reached:
                used.append(edge)
                reached.update(edge.targets)
        nodes = self._split(a, self._slopes)
        for edge in reversed(used):
            edge.pull(nodes)
        return nodes

    def _join(self, nodes: Nodes, names: tuple[str, ...], shape: torch.Size) -> Tensor:
        """Parts of a state next to each other; one that nothing leads to is zero."""
        part = (*shape[:-1], shape[-1] // len(names))
        parts = [
            nodes[name].expand(part) if name in nodes else self.h.new_zeros(()).expand(part) for name in names
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _samples(x: Tensor, batch: torch.Size, keep: int) -> Tensor:
    """(*batch, k), or what broadcasts to it, as (summed, kept, k)."""
    split = len(batch) - keep
    sizes = (math.prod(batch[:split]), math.prod(batch[split:]), x.shape[-1])
    return x.expand(*batch, x.shape[-1]).reshape(sizes)


def sum_over_samples(x: Tensor, like: Tensor, keep: int) -> Tensor:
    """(*batch, units) summed over all but the last ``keep`` dimensions of the batch, and over the units where
    the parameter ``like`` is a scalar."""
    split = x.ndim - 1 - keep
    summed = x.sum(tuple(range(split))) if split else x
    return summed.sum(-1) if like.ndim == 0 else summed


def _outer(pre: Tensor, seen: Tensor) -> Tensor:
    """The sum of outer products over the first dimension: (s, k, rows) and (s, k, columns) to (k, rows,
    columns)."""
    if pre.shape[1] == 1:
        return (pre[:, 0].mT @ seen[:, 0]).unsqueeze(0)
    if pre.shape[0] == 1:
        return pre[0].unsqueeze(-1) * seen[0].unsqueeze(-2)
    return torch.bmm(pre.permute(1, 2, 0), seen.permute(1, 0, 2))
