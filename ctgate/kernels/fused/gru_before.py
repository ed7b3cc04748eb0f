"""The fused GRU whose reset gate acts before the product."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ctgate.kernels.fused.cell import (
    Gradients,
    Parts,
    Scale,
    add_product,
    begin_along,
    fill,
    outer,
    project,
    total,
)
from ctgate.kernels.fused.gru import TURNED, turned
from ctgate.kernels.fused.relaxing import RelaxingCell
from ctgate.kernels.fused.rule import Rule


class GRUBefore(RelaxingCell):
    """One product of the state gives r and 1 - z, a second one of r h what the candidate sees.

    The rows of z have the opposite sign here: their sigmoid is 1 - z to the last digit.
    """

    kernels = "gru_before"

    def __init__(self, parameters: Mapping[str, Tensor], tau: Tensor, eps: float | None) -> None:
        super().__init__(parameters, tau, eps)
        self.cut = 2 * self.hidden
        self.into = slice(self.cut)
        own = turned(parameters["weight_hh"], -2)
        self.own, self.to_seen = own[: self.cut], own[self.cut :]
        self.external = turned(parameters["weight_ih"], -2)
        bias_ih, bias_hh = parameters.get("bias_ih"), parameters.get("bias_hh")
        self.bias = None if bias_ih is None or bias_hh is None else turned(bias_ih + bias_hh, -1)

    def products(self, parts: Parts, h: Tensor) -> list[tuple[Tensor, Tensor, Tensor, str]]:
        """One before the gates, one before the candidate."""
        gates, seen, candidate = parts
        return [(gates, h, self.own.mT, "reset"), (candidate, seen, self.to_seen.mT, "forward")]

    def products_back(self, pre: Tensor) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        """From n to r h."""
        _, _, of_n, of_seen = pre.chunk(4, -1)
        return [("outside", of_seen, of_n, self.to_seen)]

    def room(self, steps: int, samples: int) -> Parts:
        """r and 1 - z together, r h, then the candidate's."""
        gates = self.own.new_empty(steps, samples, self.cut)
        seen = self.own.new_empty(steps, samples, self.hidden)
        return (gates, seen, *self.candidate_room(gates, steps, samples))

    def start(self, parts: Parts, us: Tensor | None) -> None:
        """Gates and candidate in two products."""
        for room, which in ((parts[0], slice(self.cut)), (self.before(parts), slice(self.cut, None))):
            bias = None if self.bias is None else self.bias[which]
            if us is None:
                fill(room, bias)
            else:
                project(us, self.external[which], bias, room)

    def views(self, parts: Parts) -> Parts:
        """Both gates, r, r h, the rest of the candidate's parts, gate and candidate."""
        gates, seen, candidate, *rest = parts
        r, gate = gates.chunk(2, -1)
        return (gates, r, seen, *rest, gate, candidate)

    def gate(self, parts: Parts) -> Tensor:
        """1 - z."""
        return parts[0][..., self.hidden :]

    def evaluate(self, views: Parts, h: Tensor) -> None:
        """Product, gates, product, candidate."""
        gates, r, seen, *rest = views[:-2]
        candidate = (views[-1], *rest)
        gates.addmm_(h, self.own.mT).sigmoid_()
        torch.mul(r, h, out=seen)
        self.before(candidate).addmm_(seen, self.to_seen.mT)
        self.activate(candidate)

    def factors(self, parts: Parts, h: Tensor, scale: Scale, rule: Rule) -> Parts:
        """What a cotangent is multiplied with on its way to h, and to z and n's argument; what that of r h is
        on its way to r and h."""
        gates, seen, *candidate = parts
        r, gate = gates.chunk(2, -1)
        stay, opening, through = self.slopes(parts, h, scale, rule)
        to_z = opening.addcmul_(opening, gate, value=-1.0)
        return (stay, to_z, through, torch.addcmul(seen, seen, r, value=-1.0), r, *candidate)

    def cotangents(self, steps: int, samples: int) -> Tensor:
        """Of r, z, n's pre-activation, r h, and with layer normalisation n's argument."""
        return self.own.new_empty(steps, samples, (4 if self.norm is None else 5) * self.hidden)

    def pull(self, factors: Parts, a: Tensor, pre: Tensor, out: Tensor) -> None:
        """Factors and the product with the weights, twice."""
        stay, to_z, through, to_r, r, *candidate = factors
        of_r, of_z, of_n, of_seen, *argument = pre.chunk(4 if self.norm is None else 5, -1)
        torch.mul(a, to_z, out=of_z)
        if self.norm is None:
            torch.mul(a, through, out=of_n)
        else:
            of_n.copy_(self.through_norm(torch.mul(a, through, out=argument[0]), tuple(candidate)))
        torch.matmul(of_n, self.to_seen, out=of_seen)
        torch.mul(of_seen, to_r, out=of_r)
        add_product(out.addcmul_(a, stay).addcmul_(of_seen, r), pre[..., : self.cut], self.own)

    def push(self, factors: Parts, v: Tensor, pre: Tensor, out: Tensor) -> None:
        """The product with the weights and factors, twice."""
        stay, to_z, through, to_r, r, *candidate = factors
        of_r, of_z, of_n, of_seen, *argument = pre.chunk(4 if self.norm is None else 5, -1)
        add_product(pre[..., : self.cut], v, self.own.mT)
        of_seen.addcmul_(of_r, to_r).addcmul_(v, r)
        add_product(of_n, of_seen, self.to_seen.mT)
        if self.norm is not None:
            of_n = self.norm.push(of_n, tuple(candidate)).add_(argument[0])
        out.addcmul_(v, stay).addcmul_(of_z, to_z).addcmul_(of_n, through)

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
        """One product per weight, two for the state's, whose rows meet different things."""
        own = pre[..., : self.cut + self.hidden]
        gates, n = own[..., : self.cut], own[..., self.cut :]
        external = h.new_empty(*h.shape[:-1], 0) if us is None else us
        weights = torch.cat((outer(gates, h, keep), outer(n, parts[1], keep)), -2)
        found = {
            "weight_hh": turned(weights, -2),
            "weight_ih": turned(outer(own, external, keep), -2),
        }
        if self.bias is not None:
            found["bias_ih"] = turned(total(own, keep), -1)
            found["bias_hh"] = found["bias_ih"].clone()
        found |= self.norm_gradients(pre[..., 4 * self.hidden :], parts, keep)
        found |= self.tau_gradients(parts, a, h, scale, rule, keep)
        return found, own @ self.external if wants_input else None

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
        """One product per weight, two for the state's, whose rows meet different things."""
        along = {name: turned(x, 0) for name, x in direction.items() if name in TURNED}
        still = self.own.new_zeros(self.cut + self.hidden)
        bias = along.get("bias_ih", still) + along.get("bias_hh", still)
        pre = self.cotangents(*h.shape[:2])
        own = pre[..., : self.cut + self.hidden]
        begin_along(own, us, along.get("weight_ih"), bias, self.external, dus)
        if "weight_hh" in along:
            for seen, which in ((h, slice(self.cut)), (parts[1], slice(self.cut, None))):
                add_product(own[..., which], seen, along["weight_hh"][which].mT)
        pre[..., self.cut + self.hidden :] = 0.0
        self.norm_sources(direction, parts, pre[..., 4 * self.hidden :])
        return pre, self.tau_sources(direction, parts, h, scale, rule)
