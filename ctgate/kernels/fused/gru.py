"""The fused GRU whose reset gate acts after the product, torch's."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

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
TURNED = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def turned(rows: Tensor, dim: int = -1) -> Tensor:
    """The rows of z, along ``dim``, with the opposite sign; also back."""
    r, z, n = rows.chunk(3, dim)
    return torch.cat((r, -z, n), dim)


class GRUAfter(RelaxingCell):
    r"""r, 1 - z and what r multiplies come from one product of the state with the weights.

    The rows of all pre-activations lie in the order n, r, z, what r multiplies: the input meets the first
    three of them, the state the last three. Those of z have the opposite sign: their sigmoid is 1 - z to the
    last digit.
    """

    kernels = "gru"

    def __init__(self, parameters: Mapping[str, Tensor], tau: Tensor, eps: float | None) -> None:
        super().__init__(parameters, tau, eps)
        size = self.hidden
        self.own, self.external = turned(parameters["weight_hh"], -2), _ahead(parameters["weight_ih"], -2)
        self.into, self.outer_rows = slice(size, 4 * size), slice(3 * size)
        bias_ih, bias_hh = parameters.get("bias_ih"), parameters.get("bias_hh")
        self.within = self.norm is None and "log_tau" not in parameters
        self.bias = None
        if bias_ih is not None and bias_hh is not None:
            kept, own = bias_hh[: 2 * size], bias_hh[2 * size :]
            self.bias = torch.cat((_ahead(bias_ih + functional.pad(kept, (0, size)), 0), own))

    def room(self, steps: int, samples: int) -> Parts:
        """n, r, 1 - z and what r multiplies together; with layer normalisation n's pre-activation in its
        place, and its value, mean and reciprocal deviation apart."""
        own = self.own.new_empty(steps, samples, 4 * self.hidden)
        widths = () if self.norm is None else (self.hidden, 1, 1)
        return (own, *(own.new_empty(steps, samples, width) for width in widths))

    def start(self, parts: Parts, us: Tensor | None) -> None:
        """One product; what r multiplies sees no input."""
        if us is None:
            fill(parts[0], self.bias)
            return
        size = 3 * self.hidden
        outer, inner = (None, None) if self.bias is None else (self.bias[:size], self.bias[size:])
        project(us, self.external, outer, parts[0][..., :size])
        fill(parts[0][..., size:], inner)

    def candidate_parts(self, parts: Parts) -> Parts:
        """The first rows of the product among them."""
        own, *normalised = parts
        pre = own[..., : self.hidden]
        return (pre,) if self.norm is None else (normalised[0], pre, *normalised[1:])

    def views(self, parts: Parts) -> Parts:
        """What the state adds to, both gates, r, what r multiplies, the rest of the candidate's parts, gate
        and candidate."""
        own, (candidate, *rest) = parts[0], self.candidate_parts(parts)
        _, r, gate, seen = own.chunk(4, -1)
        return (own[..., self.into], own[..., self.hidden : 3 * self.hidden], r, seen, *rest, gate, candidate)

    def gate(self, parts: Parts) -> Tensor:
        """1 - z."""
        return parts[0].chunk(4, -1)[2]

    def evaluate(self, views: Parts, h: Tensor) -> None:
        """Product, gates, candidate."""
        own, gates, r, seen, *rest, _, target = views
        own.addmm_(h, self.own.mT)
        gates.sigmoid_()
        candidate = (target, *rest)
        self.before(candidate).addcmul_(r, seen)
        self.activate(candidate)

    def factors(self, parts: Parts, h: Tensor, scale: Scale, rule: Rule) -> Parts:
        """What a cotangent is multiplied with on its way to h, and to n, r, z and what r multiplies; with
        layer normalisation r and what it multiplies are reached from n, behind it."""
        _, r, gate, seen = parts[0].chunk(4, -1)
        blocks = self.own.new_empty(*h.shape[:-1], 4, self.hidden)
        to_n, to_r, to_z, to_seen = blocks.unbind(-2)
        stay, opening, _ = self.slopes(parts, h, scale, rule, to_n)
        if self.norm is None:
            torch.mul(to_n, r, out=to_seen)
        else:
            to_seen.copy_(r)
        torch.mul(to_seen, seen, out=to_r)
        to_r.addcmul_(to_r, r, value=-1.0)
        torch.addcmul(opening, opening, gate, value=-1.0, out=to_z)
        return (blocks, stay) if self.norm is None else (blocks, stay, *self.candidate_parts(parts))

    def cotangents(self, steps: int, samples: int) -> Tensor:
        """Of n's pre-activation, r, z, what r multiplies, and with layer normalisation n's argument."""
        return self.own.new_empty(steps, samples, 4 if self.norm is None else 5, self.hidden)

    def pull(self, factors: Parts, a: Tensor, pre: Tensor, out: Tensor) -> None:
        """Factors, then the product with the weights."""
        blocks, stay, *candidate = factors
        if self.norm is None:
            torch.mul(a.unsqueeze(-2), blocks, out=pre)
        else:
            torch.mul(a.unsqueeze(-2), blocks, out=pre[..., :4, :])
            pre[..., 4, :] = pre[..., 0, :]
            n = self.through_norm(pre[..., 4, :].contiguous(), tuple(candidate))
            pre[..., 0, :] = n
            torch.mul(n.unsqueeze(-2), blocks[..., 1::2, :], out=pre[..., 1:4:2, :])
        add_product(out.addcmul_(a, stay), pre[..., 1:4, :].flatten(-2), self.own)

    def push(self, factors: Parts, v: Tensor, pre: Tensor, out: Tensor) -> None:
        """The product with the weights, then factors."""
        blocks, stay, *candidate = factors
        add_product(pre[..., 1:4, :].flatten(-2), v, self.own.mT)
        if self.norm is not None:
            pre[..., 1:4:2, :] *= blocks[..., 1::2, :]
            n = pre[..., 0, :] + pre[..., 1, :] + pre[..., 3, :]
            torch.add(pre[..., 4, :], self.norm.push(n, tuple(candidate)), out=pre[..., 0, :])
            pre, blocks = pre[..., :3:2, :], blocks[..., ::2, :]
        out.addcmul_(v, stay).add_(pre.mul_(blocks).sum(-2))

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
        """A product per weight; the biases are weights of an input that is 1."""
        rows = pre.flatten(-2)
        one = h.new_ones(()).expand(*h.shape[:-1], 1)
        seen = one if us is None else torch.cat((us, one), -1)
        found = {
            "own": outer(rows[..., self.into], h, keep),
            "external": outer(rows[..., self.outer_rows], seen, keep),
        }
        if self.bias is not None:
            found["inside"] = total(pre[..., 3, :], keep)
        if self.norm is not None:
            found |= self.norm_gradients(pre[..., 4, :], parts, keep)
        found |= self.tau_gradients(parts, a, h, scale, rule, keep)
        return found, rows[..., self.outer_rows] @ self.external if wants_input else None

    def named(self, sums: Gradients) -> Gradients:
        """Weights and biases apart, torch's rows."""
        found = dict(sums)
        found["weight_hh"], external = turned(found.pop("own"), -2), _behind(found.pop("external"), -2)
        found["weight_ih"] = external[..., :-1]
        if self.bias is not None:
            found["bias_ih"] = bias = external[..., -1]
            found["bias_hh"] = torch.cat((bias[..., : 2 * self.hidden], found.pop("inside")), -1)
        return found

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
        """A product per weight."""
        size = self.hidden
        pre = self.cotangents(*h.shape[:2])
        rows = pre.flatten(-2)
        still = self.own.new_zeros(3 * size)
        seen, kept = (direction.get(name, still) for name in ("bias_ih", "bias_hh"))
        bias = _ahead(seen + functional.pad(kept[: 2 * size], (0, size)), 0)
        weight = direction.get("weight_ih")
        ahead = None if weight is None else _ahead(weight, -2)
        begin_along(rows[..., self.outer_rows], us, ahead, bias, self.external, dus)
        pre[..., 3, :] = kept[2 * size :]
        if "weight_hh" in direction:
            add_product(rows[..., self.into], h, turned(direction["weight_hh"], -2).mT)
        if self.norm is not None:
            self.norm_sources(direction, parts, pre[..., 4, :])
        return pre, self.tau_sources(direction, parts, h, scale, rule)


def _ahead(rows: Tensor, dim: int) -> Tensor:
    """torch's rows r, z, n in the order n, r, z, those of z with the opposite sign."""
    r, z, n = rows.chunk(3, dim)
    return torch.cat((n, r, -z), dim)


def _behind(rows: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`_ahead`."""
    n, r, z = rows.chunk(3, dim)
    return torch.cat((r, -z, n), dim)
