r"""The fused LSTM: a cell state with gates of its own, and a hidden state that shows it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ctgate.kernels.fused.cell import (
    FusedCell,
    Gradients,
    Parts,
    Scale,
    add_product,
    fill,
    outer,
    project,
    scaled,
    total_like,
)
from ctgate.kernels.fused.norm import Norm
from ctgate.kernels.fused.rule import Rule

# Below it the mean of s e^{-zs} is summed as a series, of as many terms as its last digit needs.
_SMALL = 1.0
_TERMS = 18


class LSTMCell(FusedCell):
    r"""With :math:`\bar f = 1 - f`, :math:`d = i g - \bar f c` and :math:`y = \tanh(c + d)` a step is

    .. math:: c' = \mathrm{keep}\,c + p\,d, \qquad h' = \mathrm{keep}\,h + q\,(o y - h),

    p = q = x with Euler and :math:`p = x \varphi_1(x \bar f)`, :math:`q = x \varphi_1(x)` with exponential
    Euler, x = dt / tau.

    The rows of all pre-activations lie in the order o, i, f, g here, and those of f have the opposite sign:
    their sigmoid is :math:`\bar f` to the last digit. Parts are these four, y, and with layer normalisation
    g's value, mean and reciprocal deviation; its pre-activation stays among the four.
    """

    kernels = "lstm"

    def __init__(self, parameters: Mapping[str, Tensor], tau: Tensor, eps: float | None) -> None:
        super().__init__(parameters, tau, eps)
        self.state = 2 * self.hidden
        self.norm = (
            None if eps is None else Norm(parameters["layernorm.weight"], parameters["layernorm.bias"], eps)
        )
        if self.norm is not None:
            self.kernels = ""
        self.own = _turned(parameters["weight_hh"])
        self.into, self.shown = slice(4 * self.hidden), slice(self.hidden, 2 * self.hidden)
        self.external = _turned(parameters["weight_ih"])
        bias_ih, bias_hh = parameters.get("bias_ih"), parameters.get("bias_hh")
        self.bias = None if bias_ih is None or bias_hh is None else _turned(bias_ih + bias_hh)

    def room(self, steps: int, samples: int) -> Parts:
        """All gates and g together, then y."""
        own = self.own.new_empty(steps, samples, 4 * self.hidden)
        widths = (self.hidden,) if self.norm is None else (self.hidden, self.hidden, 1, 1)
        return (own, *(own.new_empty(steps, samples, width) for width in widths))

    def start(self, parts: Parts, us: Tensor | None) -> None:
        """One product."""
        if us is None:
            fill(parts[0], self.bias)
        else:
            project(us, self.external, self.bias, parts[0])

    def views(self, parts: Parts) -> Parts:
        """All, the sigmoids, o, i, 1 - f, y, d, which all steps put in one place, and g's parts."""
        own, y = parts[:2]
        o, i, f = own[..., : 3 * self.hidden].chunk(3, -1)
        d = torch.empty_like(y[:1]).expand_as(y)
        return (own, own[..., : 3 * self.hidden], o, i, f, y, d, *self._candidate(parts))

    def _candidate(self, parts: Parts) -> Parts:
        """g, and with layer normalisation its pre-activation, mean and reciprocal deviation."""
        last = parts[0][..., 3 * self.hidden :]
        return (last,) if self.norm is None else (parts[2], last, *parts[3:])

    def evaluate(self, views: Parts, h: Tensor) -> None:
        """Product, gates, g, d, y."""
        own, gates, _, i, f, y, d, *candidate = views
        cell, hidden = h.chunk(2, -1)
        own.addmm_(hidden, self.own.mT)
        gates.sigmoid_()
        if self.norm is None:
            candidate[0].tanh_()
        else:
            self.norm.activate(tuple(candidate))
        torch.mul(i, candidate[0], out=d).addcmul_(f, cell, value=-1.0)
        torch.add(cell, d, out=y).tanh_()

    def advance(self, views: Parts, h: Tensor, scale: Scale, rule: Rule, out: Tensor) -> None:
        """Both states."""
        _, _, o, _, f, y, d, *_ = views
        (cell, hidden), (to_cell, to_hidden) = h.chunk(2, -1), out.chunk(2, -1)
        shown = torch.mul(o, y, out=to_hidden)
        if not rule.keep:
            torch.mul(d, scale, out=to_cell)
            shown.sub_(hidden).mul_(scale)
            return
        p, q, _ = _weights(f, scale, rule)
        if isinstance(p, float):
            torch.add(cell, d, alpha=p, out=to_cell)
        else:
            torch.addcmul(cell, d, p, out=to_cell)
        if not isinstance(q, float) or q != 1.0:
            torch.lerp(hidden, shown, q, out=to_hidden)

    def factors(self, parts: Parts, h: Tensor, scale: Scale, rule: Rule) -> Parts:
        r"""What the cotangents (a, b) of (c', h') are multiplied with.

        What c' and y share is d: there :math:`m = a + s b` arrives with :math:`s = o (1 - y^2) q / p`, and
        goes on with p times the slopes of d to i, f and g. Besides b goes to o, a and b to c, b to h unless
        the step forgets h at once, and with exponential Euler a to f, which p depends on.
        """
        # Each gate on its own: operations on many short pieces of rows cost three times as much.
        o, i, f, last = parts[0].reshape(*h.shape[:-1], 4, self.hidden).movedim(-2, 0).contiguous()
        g, y, cell = last if self.norm is None else parts[2], parts[1], h[..., : self.hidden].contiguous()
        p, q, ratio = _weights(f, scale, rule)
        shown = o * y
        shared = scaled(torch.addcmul(o, shown, y, value=-1.0), ratio)
        to_o = scaled(torch.addcmul(shown, shown, o, value=-1.0), q)
        blocks = o.new_empty(3, *o.shape)
        to_i, to_f, to_g = blocks
        written = torch.mul(i, g, out=shown)
        torch.addcmul(written, written, i, value=-1.0, out=to_i)
        bend = torch.addcmul(f, f, f, value=-1.0)
        torch.mul(bend, cell, out=to_f).neg_()
        torch.addcmul(i, written, g, value=-1.0, out=to_g)
        to_cell = scaled(torch.addcmul(shared, shared, f, value=-1.0), p)
        stay = torch.rsub(f, rule.keep, alpha=p) if isinstance(p, float) else rule.keep - f * p
        found = [shared, scaled(blocks, p).movedim(0, -2), to_o, stay, to_cell]
        if not isinstance(q, float) or q != rule.keep:
            rest = rule.keep - torch.as_tensor(q, dtype=o.dtype, device=o.device)
            found.append(rest.expand_as(o))
        if rule.exponential:
            d = written.addcmul_(f, cell, value=-1.0)
            found.append(d.mul_(bend).mul_(_reach_slope(f, scale)))
        return (*found, *(() if self.norm is None else self._candidate(parts)))

    def _split(self, factors: Parts) -> tuple[Parts, Parts, Parts]:
        """The factors that are always there, the others, and the parts of g for its normalisation."""
        stop = len(factors) if self.norm is None else -4
        return factors[:5], factors[5:stop], factors[stop:]

    def cotangents(self, steps: int, samples: int) -> Tensor:
        """Of o, i, f and g's pre-activations, and with layer normalisation of g's argument."""
        return self.own.new_empty(steps, samples, (4 if self.norm is None else 5) * self.hidden)

    def pull(self, factors: Parts, a: Tensor, pre: Tensor, out: Tensor) -> None:
        """Factors, then the product with the weights."""
        (shared, blocks, to_o, stay, through), others, candidate = self._split(factors)
        (cell, hidden), (to_cell, to_hidden) = a.chunk(2, -1), out.chunk(2, -1)
        rows = pre.view(*pre.shape[:-1], -1, self.hidden)
        m = torch.addcmul(cell, hidden, shared)
        torch.mul(m.unsqueeze(-2), blocks, out=rows[..., 1:4, :])
        torch.mul(hidden, to_o, out=rows[..., 0, :])
        to_cell.addcmul_(cell, stay).addcmul_(hidden, through)
        if others:
            to_hidden.addcmul_(hidden, others[0])
        if len(others) > 1:
            rows[..., 2, :].addcmul_(cell, others[1])
        if self.norm is not None:
            rows[..., 4, :] = rows[..., 3, :]
            rows[..., 3, :] = self.norm.pull(rows[..., 4, :], candidate)
        add_product(to_hidden, pre[..., : 4 * self.hidden], self.own)

    def push(self, factors: Parts, v: Tensor, pre: Tensor, out: Tensor) -> None:
        """The product with the weights, then factors."""
        (shared, blocks, to_o, stay, through), others, candidate = self._split(factors)
        (cell, hidden), (to_cell, to_hidden) = v.chunk(2, -1), out.chunk(2, -1)
        rows = pre.view(*pre.shape[:-1], -1, self.hidden)
        add_product(pre[..., : 4 * self.hidden], hidden, self.own.mT)
        if self.norm is not None:
            torch.add(rows[..., 4, :], self.norm.push(rows[..., 3, :], candidate), out=rows[..., 3, :])
        m = (rows[..., 1:4, :] * blocks).sum(-2)
        to_cell.addcmul_(cell, stay).add_(m)
        to_hidden.addcmul_(cell, through).addcmul_(m, shared).addcmul_(rows[..., 0, :], to_o)
        if others:
            to_hidden.addcmul_(hidden, others[0])
        if len(others) > 1:
            to_cell.addcmul_(rows[..., 2, :], others[1])

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
        """One product for weights and biases together: all rows meet the same hidden state, input and 1."""
        size, rows = self.hidden, pre[..., : 4 * self.hidden]
        seen = [h[..., size:], h.new_ones(*h.shape[:-1], 1), *([] if us is None else [us])]
        found = {"rows": outer(rows, torch.cat(seen, -1), keep)}
        if self.norm is not None:
            found |= self.norm.gradients(pre[..., 4 * size :], self._candidate(parts), keep)
        log_tau = self.parameters.get("log_tau")
        if log_tau is not None:
            along = a * self.stretch(parts, h, scale, rule)
            found["log_tau"] = -total_like(along[..., :size] + along[..., size:], log_tau, keep)
        return found, rows @ self.external if wants_input else None

    def named(self, sums: Gradients) -> Gradients:
        """Weights and biases apart, torch's rows."""
        found, size = dict(sums), self.hidden
        rows = _turned_back(found.pop("rows"))
        found |= {"weight_hh": rows[..., :size].contiguous(), "weight_ih": rows[..., size + 1 :].contiguous()}
        if self.bias is not None:
            found |= {name: rows[..., size].contiguous() for name in ("bias_ih", "bias_hh")}
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
        """One product per weight."""
        pre = self.cotangents(*h.shape[:2]).zero_()
        rows = pre[..., : 4 * self.hidden]
        along = {name: _turned(x) for name, x in direction.items() if name.startswith(("weight_", "bias_"))}
        for name in ("bias_ih", "bias_hh"):
            if name in along:
                rows += along[name]
        if "weight_hh" in along:
            add_product(rows, h[..., self.hidden :], along["weight_hh"].mT)
        if "weight_ih" in along and us is not None:
            add_product(rows, us, along["weight_ih"].mT)
        if dus is not None:
            add_product(rows, dus, self.external.mT)
        if self.norm is not None:
            self.norm.add_sources(direction, self._candidate(parts), pre[..., 4 * self.hidden :])
        log_tau = direction.get("log_tau")
        if log_tau is None:
            return pre, None
        units = log_tau.expand(self.hidden).repeat(2)
        return pre, -units * self.stretch(parts, h, scale, rule)

    def stretch(self, parts: Parts, h: Tensor, scale: Scale, rule: Rule) -> Tensor:
        """x d and x (o y - h), with exponential Euler behind the decay of the step."""
        _, _, o, i, f, y, _, g, *_ = self.views(parts)
        cell, hidden = h.chunk(2, -1)
        moves = torch.addcmul(i * g, f, cell, value=-1.0), o * y - hidden
        if not rule.exponential:
            return torch.cat([move * scale for move in moves], -1)
        decays = torch.exp(-f * scale), torch.exp(-torch.as_tensor(scale, dtype=f.dtype, device=f.device))
        return torch.cat([move * decay * scale for move, decay in zip(moves, decays, strict=True)], -1)


def _turned(rows: Tensor) -> Tensor:
    """torch's rows i, f, g, o, the first dimension, in the order and with the signs that they have here."""
    i, f, g, o = rows.chunk(4)
    return torch.cat((o, i, -f, g))


def _turned_back(rows: Tensor) -> Tensor:
    """The inverse of :func:`_turned`, of (..., rows, columns)."""
    o, i, f, g = rows.chunk(4, -2)
    return torch.cat((i, -f, g, o), -2)


def _weights(f: Tensor, scale: Scale, rule: Rule) -> tuple[Scale, Scale, Scale]:
    """p, q and q / p."""
    if not rule.exponential:
        return scale, scale, 1.0
    x = torch.as_tensor(scale, dtype=f.dtype, device=f.device)
    near, far = _decay_mean(x * f), _decay_mean(x)
    return x * near, x * far, far / near


def _reach_slope(f: Tensor, scale: Scale) -> Tensor:
    """dp/df with exponential Euler."""
    x = torch.as_tensor(scale, dtype=f.dtype, device=f.device)
    return _decay_moment(x * f) * -x.square()


def _decay_mean(x: Tensor) -> Tensor:
    """The mean of e^{-xs} over s in (0, 1), for x >= 0: (1 - e^{-x}) / x, accurate to the last digits."""
    x = x.clamp(min=torch.finfo(x.dtype).tiny)
    return -torch.expm1(-x) / x


def _decay_moment(x: Tensor) -> Tensor:
    """The mean of s e^{-xs} over s in (0, 1), for x >= 0: (1 - (1 + x) e^{-x}) / x^2, which cancels where x
    is small; there a series is summed."""
    near = x.clamp(max=_SMALL)
    series = torch.zeros_like(near)
    for k in range(_TERMS, -1, -1):
        series = 1.0 / (k + 2) - near / (k + 1) * series
    away = x.clamp(min=_SMALL)
    quotient = (-torch.expm1(-away) - away * torch.exp(-away)) / away.square()
    return torch.where(x < _SMALL, series, quotient)
