"""The fused GRU whose reset gate acts after the product, torch's."""

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
from ctgate.kernels.fused.relaxing import RelaxingCell
from ctgate.kernels.fused.rule import Rule

# Parameters whose rows belong to r, z and n.
_TURNED = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class GRUAfter(RelaxingCell):
    """r, 1 - z and what r multiplies come from one product of the state with the weights.

    The rows of z have the opposite sign here: their sigmoid is 1 - z to the last digit.
    """

    def __init__(self, parameters: Mapping[str, Tensor], tau: Tensor, eps: float | None) -> None:
        super().__init__(parameters, tau, eps)
        self.own = self._turned(parameters["weight_hh"], -2)
        self.external = self._turned(parameters["weight_ih"], -2)
        bias_ih, bias_hh = parameters.get("bias_ih"), parameters.get("bias_hh")
        self.gate_bias = self.seen_bias = self.own_bias = None
        if bias_ih is not None and bias_hh is not None:
            gates = 2 * self.hidden
            self.gate_bias = self._turned(bias_ih + bias_hh)[:gates]
            self.seen_bias, self.own_bias = bias_ih[gates:], bias_hh[gates:]

    def _turned(self, rows: Tensor, dim: int = -1) -> Tensor:
        """The rows of z, along ``dim``, with the opposite sign; also back."""
        r, z, n = rows.chunk(3, dim)
        return torch.cat((r, -z, n), dim)

    def buffers(self, us: Tensor | None, steps: int, samples: int) -> Parts:
        """(r, 1 - z, what r multiplies) together, then the candidate's."""
        gates = 2 * self.hidden
        own = self.own.new_empty(steps, samples, 3 * self.hidden)
        parts = (own, *self.candidate_room(own, steps, samples))
        before = self.before(parts)
        if us is None:
            fill(own[..., :gates], self.gate_bias)
            fill(before, self.seen_bias)
        else:
            project(us, self.external[:gates], self.gate_bias, own[..., :gates])
            project(us, self.external[gates:], self.seen_bias, before)
        fill(own[..., gates:], self.own_bias)
        return parts

    def views(self, parts: Parts) -> Parts:
        """All, both gates, r, what r multiplies, the rest of the candidate's parts, gate and candidate."""
        own, candidate, *rest = parts
        r, gate, seen = own.chunk(3, -1)
        return (own, own[..., : 2 * self.hidden], r, seen, *rest, gate, candidate)

    def gate(self, parts: Parts) -> Tensor:
        """1 - z."""
        return parts[0].chunk(3, -1)[1]

    def evaluate(self, views: Parts, h: Tensor) -> None:
        """Product, gates, candidate."""
        own, gates, r, seen, *rest = views[:-2]
        candidate = (views[-1], *rest)
        own.addmm_(h, self.own.mT)
        gates.sigmoid_()
        self.before(candidate).addcmul_(r, seen)
        self.activate(candidate)

    def factors(self, parts: Parts, h: Tensor, scale: Scale, rule: Rule) -> Parts:
        """What a cotangent is multiplied with on its way to h, and to r, z, what r multiplies and n; with
        layer normalisation r and what it multiplies are reached from n, behind it."""
        own, *candidate = parts
        r, gate, seen = own.chunk(3, -1)
        stay, opening, through = self.slopes(parts, h, scale, rule)
        blocks = own.new_empty(*own.shape[:-1], 4, self.hidden)
        to_r, to_z, to_seen, to_n = blocks.unbind(-2)
        to_n.copy_(through)
        if self.norm is None:
            torch.mul(through, r, out=to_seen)
        else:
            to_seen.copy_(r)
        torch.mul(to_seen, seen, out=to_r)
        to_r.addcmul_(to_r, r, value=-1.0)
        torch.addcmul(opening, opening, gate, value=-1.0, out=to_z)
        return (blocks, stay) if self.norm is None else (blocks, stay, *candidate)

    def cotangents(self, steps: int, samples: int) -> Tensor:
        """Of r, z, what r multiplies, n's pre-activation, and with layer normalisation its argument."""
        return self.own.new_empty(steps, samples, (4 if self.norm is None else 5) * self.hidden)

    def pull(self, factors: Parts, a: Tensor, pre: Tensor, out: Tensor) -> None:
        """Factors, then the product with the weights."""
        blocks, stay, *candidate = factors
        rows = pre.view(*pre.shape[:-1], -1, self.hidden)
        torch.mul(a.unsqueeze(-2), blocks, out=rows[..., :4, :])
        if self.norm is not None:
            rows[..., 4, :] = rows[..., 3, :]
            n = self.through_norm(rows[..., 4, :], tuple(candidate))
            rows[..., 3, :] = n
            torch.mul(n.unsqueeze(-2), blocks[..., ::2, :], out=rows[..., :3:2, :])
        out.addcmul_(a, stay)
        add_product(out, pre[..., : 3 * self.hidden], self.own)

    def push(self, factors: Parts, v: Tensor, pre: Tensor, out: Tensor) -> None:
        """The product with the weights, then factors."""
        blocks, stay, *candidate = factors
        rows = pre.view(*pre.shape[:-1], -1, self.hidden)
        add_product(pre[..., : 3 * self.hidden], v, self.own.mT)
        if self.norm is not None:
            rows[..., :3:2, :] *= blocks[..., ::2, :]
            n = rows[..., 0, :] + rows[..., 2, :] + rows[..., 3, :]
            torch.add(rows[..., 4, :], self.norm.push(n, tuple(candidate)), out=rows[..., 3, :])
            rows, blocks = rows[..., 1:4:2, :], blocks[..., 1::2, :]
        out.addcmul_(v, stay).add_(rows.mul_(blocks).sum(-2))

    def gradients(
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
        """One product per weight, two for the input's, whose rows meet different things."""
        size, gates = self.hidden, 2 * self.hidden
        own, cut, n = pre[..., : 3 * size], pre[..., :gates], pre[..., 3 * size : 4 * size]
        found = {"weight_hh": self._turned(outer(own, h, keep), -2)}
        if self.own_bias is not None:
            sums = total(pre[..., : 4 * size], keep)
            found["bias_hh"] = self._turned(sums[..., : 3 * size])
            found["bias_ih"] = self._turned(torch.cat((sums[..., :gates], sums[..., 3 * size :]), -1))
        seen = h.new_empty(*h.shape[:-1], 0) if us is None else us
        found["weight_ih"] = self._turned(torch.cat((outer(cut, seen, keep), outer(n, seen, keep)), -2), -2)
        found |= self.norm_gradients(pre[..., 4 * size :], parts, keep)
        found |= self.tau_gradients(parts, a, h, scale, rule, keep)
        if not wants_input:
            return found, None
        return found, cut @ self.external[:gates] + n @ self.external[gates:]

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
        """One product per weight, two for the input's."""
        size, gates = self.hidden, 2 * self.hidden
        along = {name: self._turned(x, 0) for name, x in direction.items() if name in _TURNED}
        still = self.own.new_zeros(3 * size)
        bias_ih, bias_hh = (along.get(name, still) for name in ("bias_ih", "bias_hh"))
        weight = along.get("weight_ih")
        pre = self.cotangents(*h.shape[:2])
        for rows, which, bias in (
            (pre[..., :gates], slice(gates), (bias_ih + bias_hh)[:gates]),
            (pre[..., 3 * size : 4 * size], slice(gates, None), bias_ih[gates:]),
        ):
            own = None if weight is None else weight[which]
            begin_along(rows, us, own, bias, self.external[which], dus)
        fill(pre[..., gates : 3 * size], bias_hh[gates:])
        if "weight_hh" in along:
            add_product(pre[..., : 3 * size], h, along["weight_hh"].mT)
        self.norm_sources(direction, parts, pre[..., 4 * size :])
        return pre, self.tau_sources(direction, parts, h, scale, rule)
