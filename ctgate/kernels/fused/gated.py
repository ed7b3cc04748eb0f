"""The fused cells with one gate: constant, shared by all units, or one per unit."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ctgate.kernels.fused.cell import (
    Gradients,
    Parts,
    Scale,
    add_product,
    begin,
    scaled,
    weight_gradients,
    weight_sources,
)
from ctgate.kernels.fused.relaxing import RelaxingCell
from ctgate.kernels.fused.rule import Rule


class OneGateCell(RelaxingCell):
    """Gate and candidate come from one product of the state with the weights. Their first rows are those of
    the gate: one, or one per unit, or none where it is 1 and ``tau`` alone says how fast the units are.

    The candidate's pre-activation stays where the product put it.
    """

    kernels = "gated"
    names = frozenset(("weight_ih", "weight_hh", "bias", "log_tau"))

    def __init__(self, parameters: Mapping[str, Tensor], tau: Tensor, eps: float | None) -> None:
        super().__init__(parameters, tau, eps)
        self.own, self.into = parameters["weight_hh"], slice(None)
        self.rows = len(self.own)
        self.gates = self.rows - self.hidden
        self.open = self.own.new_ones(1, 1, 1)

    def room(self, steps: int, samples: int) -> Parts:
        """Gate and candidate together; with layer normalisation the candidate's pre-activation in its place,
        and its value, mean and reciprocal deviation apart."""
        own = self.own.new_empty(steps, samples, self.rows)
        widths = () if self.norm is None else (self.hidden, 1, 1)
        return (own, *(own.new_empty(steps, samples, width) for width in widths))

    def start(self, parts: Parts, us: Tensor | None) -> None:
        """Gate and candidate in one product."""
        begin(self.parameters, us, parts[0])

    def candidate_parts(self, parts: Parts) -> Parts:
        """The last rows of the product among them."""
        own, *normalised = parts
        pre = own[..., self.gates :]
        return (pre,) if self.norm is None else (normalised[0], pre, *normalised[1:])

    def views(self, parts: Parts) -> Parts:
        """All, the rest of the candidate's parts, gate and candidate."""
        candidate, *rest = self.candidate_parts(parts)
        return (parts[0], *rest, self.gate(parts).expand(len(parts[0]), -1, -1), candidate)

    def gate(self, parts: Parts) -> Tensor:
        """g, (step, sample, hidden or 1)."""
        return parts[0][..., : self.gates] if self.gates else self.open

    def evaluate(self, views: Parts, h: Tensor) -> None:
        """Product, gate, candidate."""
        own, *rest, gate, candidate = views
        own.addmm_(h, self.own.mT)
        if self.gates:
            gate.sigmoid_()
        self.activate((candidate, *rest))

    def factors(self, parts: Parts, h: Tensor, scale: Scale, rule: Rule) -> Parts:
        """What a cotangent is multiplied with on its way to n's argument, to h, and to the gate's."""
        candidate = self.candidate_parts(parts)
        if not self.gates:
            weight, target = rule.weight(scaled(self.open, scale)), candidate[0]
            through = torch.addcmul(weight, weight * target, target, value=-1.0)
            return (through, (rule.keep - weight).expand(len(h), -1, -1), *candidate)
        stay, opening, through = self.slopes(parts, h, scale, rule)
        to_gate = opening.addcmul_(opening, self.gate(parts), value=-1.0)
        return (through, stay, to_gate, *candidate)

    def cotangents(self, steps: int, samples: int) -> Tensor:
        """Of the pre-activations, and with layer normalisation of the candidate's argument."""
        extra = 0 if self.norm is None else self.hidden
        return self.own.new_empty(steps, samples, self.rows + extra)

    def pull(self, factors: Parts, a: Tensor, pre: Tensor, out: Tensor) -> None:
        """Factors, then the product with the weights."""
        through, stay, *others = factors
        own = pre if self.norm is None else pre[..., : self.rows]
        argument = torch.mul(a, through, out=pre[..., -self.hidden :])
        if self.gates == self.hidden:
            torch.mul(a, others.pop(0), out=pre[..., : self.gates])
        elif self.gates:
            torch.sum(a * others.pop(0), -1, keepdim=True, out=pre[..., :1])
        if self.norm is not None:
            own[..., self.gates :] = self.through_norm(argument, tuple(others))
        add_product(out.addcmul_(a, stay), own, self.own)

    def push(self, factors: Parts, v: Tensor, pre: Tensor, out: Tensor) -> None:
        """The product with the weights, then factors."""
        through, stay, *others = factors
        own = pre if self.norm is None else pre[..., : self.rows]
        add_product(own, v, self.own.mT)
        out.addcmul_(v, stay)
        if self.gates:
            out.addcmul_(own[..., : self.gates], others.pop(0))
        argument = own[..., self.gates :]
        if self.norm is not None:
            argument = self.norm.push(argument, tuple(others)).add_(pre[..., self.rows :])
        out.addcmul_(argument, through)

    def sums(
        self,
        parts: Parts,
        a: Tensor,
        pre: Tensor,
        h: Tensor,
        us: Tensor | None,
        scale: Scale,
        rule: Rule,
        keep: int,
        wants_input: bool,
    ) -> tuple[Gradients, Tensor | None]:
        """One product per weight."""
        own = pre[..., : self.rows]
        found, inputs = weight_gradients(self.parameters, own, h, us, keep, wants_input)
        found |= self.norm_gradients(pre[..., self.rows :], parts, keep)
        found |= self.tau_gradients(parts, a, h, scale, rule, keep)
        return found, inputs

    def sources(
        self,
        direction: Mapping[str, Tensor],
        parts: Parts,
        h: Tensor,
        us: Tensor | None,
        dus: Tensor | None,
        scale: Scale,
        rule: Rule,
    ) -> tuple[Tensor, Tensor | None]:
        """One product per weight."""
        pre = self.cotangents(*h.shape[:2])
        weight_sources(pre[..., : self.rows], direction, self.parameters, h, us, dus)
        self.norm_sources(direction, parts, pre[..., self.rows :])
        return pre, self.tau_sources(direction, parts, h, scale, rule)
