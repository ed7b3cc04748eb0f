r"""The fused liquid time constant cell."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ctgate.kernels.fused.cell import (
    FusedCell,
    Gradients,
    Parts,
    Scale,
    add_product,
    begin,
    total,
    total_like,
    weight_gradients,
    weight_sources,
)
from ctgate.kernels.fused.rule import Rule


class LiquidCell(FusedCell):
    r"""Units that leak at the rate 1 / tau and are drawn to the reversal value A at the rate f.

    Together :math:`\tau\,\dot h = (1 + q)(n - h)` with :math:`q = \tau f` and :math:`n = q A / (1 + q)`.
    An evaluation keeps f alone.
    """

    kernels = "liquid"
    names = frozenset(("weight_ih", "weight_hh", "bias", "reversal", "log_tau"))

    def __init__(self, parameters: Mapping[str, Tensor], tau: Tensor, eps: float | None) -> None:
        super().__init__(parameters, tau, eps)
        self.own, self.into = parameters["weight_hh"], slice(None)
        self.reversal = parameters["reversal"]
        self.unit = 1.0 / self.pace if isinstance(self.pace, float) else tau
        self.fixed = (torch.cat((self.reversal, tau.expand(self.hidden))).unsqueeze(0),)

    def room(self, steps: int, samples: int) -> Parts:
        """f."""
        return (self.own.new_empty(steps, samples, self.hidden),)

    def start(self, parts: Parts, us: Tensor | None) -> None:
        """One product."""
        begin(self.parameters, us, parts[0])

    def views(self, parts: Parts) -> Parts:
        """f."""
        return parts

    def evaluate(self, views: Parts, h: Tensor) -> None:
        """Product and sigmoid."""
        views[0].addmm_(h, self.own.mT).sigmoid_()

    def advance(self, views: Parts, h: Tensor, scale: Scale, rule: Rule, out: Tensor) -> None:
        """Euler's step is h + scale (q (A - h) - h)."""
        (conductance,) = views
        if rule.exponential:
            gate, target = self._relaxation(conductance)
            torch.lerp(h, target, rule.weight(gate * scale), out=out)
            return
        torch.sub(self.reversal, h, out=out)
        if isinstance(scale, float) and isinstance(self.unit, float):
            out.mul_(conductance)
            if rule.keep:
                torch.add(h, out, alpha=scale * self.unit, out=out)
            else:
                out.mul_(scale * self.unit)
            out.sub_(h, alpha=scale)
        else:
            out.mul_(conductance * self.unit).sub_(h).mul_(scale)
            if rule.keep:
                out.add_(h)

    def factors(self, parts: Parts, h: Tensor, scale: Scale, rule: Rule) -> Parts:
        """What a cotangent is multiplied with on its way to h and to the pre-activation of f."""
        (conductance,) = parts
        opened = conductance * self.unit
        if rule.exponential:
            gate, target = self._relaxation(conductance)
            weight, bend = rule.weights(gate * scale)
            through = torch.addcmul(weight * (self.reversal - target), bend, target - h).div_(gate)
        else:
            weight, through = (opened + 1.0) * scale, (self.reversal - h) * scale
        through.mul_(opened)
        return rule.keep - weight, through.addcmul_(through, conductance, value=-1.0)

    def cotangents(self, steps: int, samples: int) -> Tensor:
        """Of the pre-activation of f."""
        return self.own.new_empty(steps, samples, self.hidden)

    def pull(self, factors: Parts, a: Tensor, pre: Tensor, out: Tensor) -> None:
        """Factors, then the product with the weights."""
        stay, through = factors
        torch.mul(a, through, out=pre)
        add_product(out.addcmul_(a, stay), pre, self.own)

    def push(self, factors: Parts, v: Tensor, pre: Tensor, out: Tensor) -> None:
        """The product with the weights, then factors."""
        stay, through = factors
        add_product(pre, v, self.own.mT)
        out.addcmul_(v, stay).addcmul_(pre, through)

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
        """One product per weight; a longer tau weakens the leak and leaves the conductance as it is."""
        found, inputs = weight_gradients(self.parameters, pre, h, us, keep, wants_input)
        drawn, slower = self._slopes(parts, h, scale, rule)
        found["reversal"] = total(a * drawn, keep)
        if "log_tau" in self.parameters:
            found["log_tau"] = total_like(a * slower, self.parameters["log_tau"], keep)
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
        weight_sources(pre, direction, self.parameters, h, us, dus)
        drawn, slower = self._slopes(parts, h, scale, rule)
        still = h.new_zeros(())
        along = drawn * direction.get("reversal", still) + slower * direction.get("log_tau", still)
        return pre, along

    def _slopes(self, parts: Parts, h: Tensor, scale: Scale, rule: Rule) -> tuple[Tensor, Tensor]:
        """The derivatives of what :meth:`advance` gave by the reversal value and by log tau."""
        if not rule.exponential:
            return parts[0] * self.unit * scale, h * scale
        gate, target = self._relaxation(parts[0])
        weight, bend = rule.weights(gate * scale)
        slower = torch.addcmul(weight * target, bend, h - target).div_(gate)
        return weight * (parts[0] * self.unit / gate), slower

    def stretch(self, parts: Parts, h: Tensor, scale: Scale, rule: Rule) -> Tensor:
        """x dw/dx (n - h)."""
        gate, target = self._relaxation(parts[0])
        _, bend = rule.weights(gate * scale)
        return bend * (target - h)

    def _relaxation(self, conductance: Tensor) -> tuple[Tensor, Tensor]:
        """rate * tau = 1 + q, and n."""
        opened = conductance * self.unit
        gate = opened + 1.0
        return gate, opened.mul_(self.reversal).div_(gate)
