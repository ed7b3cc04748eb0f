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
    outers,
    project,
    total,
)
from ctgate.kernels.fused.relaxing import RelaxingCell
from ctgate.kernels.fused.rule import Rule

# Parameters whose rows belong to r, z and n.
TURNED = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def turned(rows: Tensor, dim: int = -1) -> Tensor:
    """The rows of z, along ``dim``, with the opposite sign; also back."""
    r, z, n = rows.chunk(3, dim)
    return torch.cat((r, -z, n), dim)


class GRUAfter(RelaxingCell):
    """r, 1 - z and what r multiplies come from one product of the state with the weights.

    The rows of z have the opposite sign here: their sigmoid is 1 - z to the last digit.
    """

    def __init__(self, parameters: Mapping[str, Tensor], tau: Tensor, eps: float | None) -> None:
        super().__init__(parameters, tau, eps)
        self.own = turned(parameters["weight_hh"], -2)
        self.own_blocks, self.own_columns = self.own.chunk(3), self.own.mT
        self.external = turned(parameters["weight_ih"], -2)
        bias_ih, bias_hh = parameters.get("bias_ih"), parameters.get("bias_hh")
        self.gate_bias = self.seen_bias = self.own_bias = None
        if bias_ih is not None and bias_hh is not None:
            gates = 2 * self.hidden
            self.gate_bias = turned(bias_ih + bias_hh)[:gates]
            self.seen_bias, self.own_bias = bias_ih[gates:], bias_hh[gates:]

    def room(self, steps: int, samples: int) -> Parts:
        """(r, 1 - z, what r multiplies) together, then the candidate's."""
        own = self.own.new_empty(steps, samples, 3 * self.hidden)
        return (own, *self.candidate_room(own, steps, samples))

    def start(self, parts: Parts, us: Tensor | None) -> None:
        """Gates and candidate in two products: what r multiplies sees no input."""
        gates, own, before = 2 * self.hidden, parts[0], self.before(parts)
        if us is None:
            fill(own[..., :gates], self.gate_bias)
            fill(before, self.seen_bias)
        else:
            project(us, self.external[:gates], self.gate_bias, own[..., :gates])
            project(us, self.external[gates:], self.seen_bias, before)
        fill(own[..., gates:], self.own_bias)

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
        own, gates, r, seen, *rest, _, target = views
        own.addmm_(h, self.own_columns)
        gates.sigmoid_()
        if self.norm is None:
            target.addcmul_(r, seen).tanh_()
        else:
            candidate = (target, *rest)
            self.before(candidate).addcmul_(r, seen)
            self.activate(candidate)

    def factors(self, parts: Parts, h: Tensor, scale: Scale, rule: Rule) -> Parts:
        """What a cotangent is multiplied with on its way to h, and to r, z, what r multiplies and n; with
        layer normalisation r and what it multiplies are reached from n, behind it."""
        own, *candidate = parts
        r, gate, seen = own.chunk(3, -1)
        blocks = self._blocks(4, *own.shape[:-1])
        to_r, to_z, to_seen, to_n = blocks.unbind(-2)
        stay, opening, _ = self.slopes(parts, h, scale, rule, to_n)
        if self.norm is None:
            torch.mul(to_n, r, out=to_seen)
        else:
            to_seen.copy_(r)
        torch.mul(to_seen, seen, out=to_r)
        to_r.addcmul_(to_r, r, value=-1.0)
        torch.addcmul(opening, opening, gate, value=-1.0, out=to_z)
        return (blocks, stay) if self.norm is None else (blocks, stay, *candidate)

    def _blocks(self, count: int, steps: int, samples: int) -> Tensor:
        """(step, sample, block, hidden), in memory block after block: what all blocks are multiplied with is
        then read without gaps."""
        return self.own.new_empty(count, steps, samples, self.hidden).permute(1, 2, 0, 3)

    def cotangents(self, steps: int, samples: int) -> Tensor:
        """Of r, z, what r multiplies, n's pre-activation, and with layer normalisation its argument."""
        return self._blocks(4 if self.norm is None else 5, steps, samples)

    def pull(self, factors: Parts, a: Tensor, pre: Tensor, out: Tensor) -> None:
        """Factors, then the product with the weights."""
        blocks, stay, *candidate = factors
        if self.norm is None:
            torch.mul(a.unsqueeze(-2), blocks, out=pre)
        else:
            torch.mul(a.unsqueeze(-2), blocks, out=pre[..., :4, :])
            pre[..., 4, :] = pre[..., 3, :]
            n = self.through_norm(pre[..., 4, :].contiguous(), tuple(candidate))
            pre[..., 3, :] = n
            torch.mul(n.unsqueeze(-2), blocks[..., ::2, :], out=pre[..., :3:2, :])
        out.addcmul_(a, stay)
        for rows, weight in zip(pre.unbind(-2), self.own_blocks, strict=False):
            add_product(out, rows, weight)

    def push(self, factors: Parts, v: Tensor, pre: Tensor, out: Tensor) -> None:
        """The product with the weights, then factors."""
        blocks, stay, *candidate = factors
        for rows, weight in zip(pre.unbind(-2), self.own_blocks, strict=False):
            add_product(rows, v, weight.mT)
        if self.norm is not None:
            pre[..., :3:2, :] *= blocks[..., ::2, :]
            n = pre[..., 0, :] + pre[..., 2, :] + pre[..., 3, :]
            torch.add(pre[..., 4, :], self.norm.push(n, tuple(candidate)), out=pre[..., 3, :])
            pre, blocks = pre[..., 1:4:2, :], blocks[..., 1::2, :]
        out.addcmul_(v, stay).add_(pre.mul_(blocks).sum(-2))

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
        """A product per block of rows; the biases are weights of an input that is 1."""
        r, z, own, n, *y = pre.unbind(-2)
        found = {"weight_hh": self._turn(outers((r, z, own), h, keep))}
        one = h.new_ones(()).expand(*h.shape[:-1], 1)
        seen = one if us is None else torch.cat((us, one), -1)
        external = self._turn(outers((r, z, n), seen, keep))
        found["weight_ih"] = external[..., :-1]
        if self.own_bias is not None:
            bias = external[..., -1]
            found["bias_ih"] = bias
            cut = bias[..., : 2 * self.hidden]
            found["bias_hh"] = torch.cat((cut, total(own, keep)), -1)
        if self.norm is not None:
            found |= self.norm_gradients(y[0], parts, keep)
        found |= self.tau_gradients(parts, a, h, scale, rule, keep)
        if not wants_input:
            return found, None
        weights = self.external.chunk(3)
        return found, r @ weights[0] + z @ weights[1] + n @ weights[2]

    def _turn(self, rows: Tensor) -> Tensor:
        """:func:`turned` back, in place: rows of new gradients (..., rows, columns)."""
        rows.chunk(3, -2)[1].neg_()
        return rows

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
        """A product per block of rows."""
        along = {name: turned(x, 0).chunk(3) for name, x in direction.items() if name in TURNED}
        pre = self.cotangents(*h.shape[:2])
        r, z, own, n, *y = pre.unbind(-2)
        still = (self.own.new_zeros(self.hidden),) * 3
        seen, kept = (along.get(name, still) for name in ("bias_ih", "bias_hh"))
        biases = (seen[0] + kept[0], seen[1] + kept[1], seen[2])
        weights, through = along.get("weight_ih", (None,) * 3), self.external.chunk(3)
        for rows, weight, bias, own_weight in zip((r, z, n), weights, biases, through, strict=True):
            begin_along(rows, us, weight, bias, own_weight, dus)
        fill(own, kept[2])
        for rows, weight in zip((r, z, own), along.get("weight_hh", ()), strict=False):
            add_product(rows, h, weight.mT)
        if self.norm is not None:
            self.norm_sources(direction, parts, y[0])
        return pre, self.tau_sources(direction, parts, h, scale, rule)
