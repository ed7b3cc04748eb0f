r"""A gated cell on buffers: its evaluations one after the other, its derivatives many at a time.

What a field says once, this says in an order that costs little. Forwards the input's part of all
pre-activations is one matrix product, and an evaluation is one more and a few operations in place on what is
kept of it. Backwards everything elementwise is evaluated for many steps at once, a step is left with a
product with these factors and one with the weights, and the gradient of a weight is one matrix product over
all steps.

Nothing here has a graph: :mod:`ctgate.kernels.fused.node` gives it one.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ctgate.kernels.fused.rule import Rule

# Tensors of many evaluations, (step, sample, ...), or of one.
Parts = tuple[Tensor, ...]
# dt / tau: a number, or a tensor that broadcasts against (sample, hidden), or (step, sample, hidden).
Scale = float | Tensor
Gradients = dict[str, Tensor]
# Rows of an input that are projected at once.
_PIECE = 1024
# The least columns that batched products are good at, and what their number should be a multiple of.
_COLUMNS, _MULTIPLE = 16, 8
# Numbers in both factors of a batched product that are brought together at once.
_GROUPED = 2**18


def pace_of(tau: Tensor) -> float | Tensor:
    """1 / tau, as a number where reading it costs nothing."""
    return 1.0 / tau.item() if tau.ndim == 0 and tau.device.type == "cpu" else tau.reciprocal()


def scaled(x: Tensor, scale: Scale) -> Tensor:
    """x * scale; x itself where the scale is the number 1."""
    return x if isinstance(scale, float) and scale == 1.0 else x * scale


def per_step(parts: Sequence[Tensor]) -> Iterator[Parts]:
    """The parts of each step."""
    return zip(*(part.unbind(0) for part in parts), strict=True)


class FusedCell(abc.ABC):
    """One cell with its parameters, prepared for many evaluations.

    Shapes: ``hidden`` units, states (sample, state), the batch flattened to one dimension. An evaluation
    keeps what :meth:`buffers` made room for.

    Parameters: the field's, by name, without a graph, ``tau``, and the eps of its layer normalisation, None
    without.

    Attributes:
        names: the field's own parameters, some of which it may set to None; torch's unless a class says
            otherwise.
        kernels: the module of :mod:`ctgate.kernels.compiled` that does the elementwise part, empty for none.
            The columns of the state that are ``shown`` meet the weights ``own``; that is added ``into``
            these columns of the first part, and of the cotangents.
        fixed: what its kernels need besides the parts, (1, ...) each.
        within: whether the cotangents may take the place of the first part: they are as many, and nothing
            else that is wanted is made of it.
    """

    kernels: str = ""
    fixed: Parts = ()
    within: bool = False
    own: Tensor
    into: slice
    shown: slice
    names: ClassVar[frozenset[str]] = frozenset(("weight_ih", "weight_hh", "bias_ih", "bias_hh", "log_tau"))
    hidden: int
    state: int

    def __init__(self, parameters: Mapping[str, Tensor], tau: Tensor, eps: float | None) -> None:
        self.parameters = parameters
        self.tau = tau
        self.pace = pace_of(tau)
        self.hidden = self.state = parameters["weight_hh"].shape[-1]
        self.shown = slice(None)

    def products(self, parts: Parts, h: Tensor) -> list[tuple[Tensor, Tensor, Tensor, str]]:
        """The products of compiled evaluations, in turn: what each is added to, (step, ...), what meets the
        weights, these, and the kernel that follows."""
        return [(parts[0][..., self.into], h[..., self.shown], self.own.mT, "forward")]

    def products_back(self, pre: Tensor) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        """The products of compiled steps back but for the last: the kernel before each, what it is added to,
        (step, ...), what meets the weights, and these."""
        return []

    def buffers(self, us: Tensor | None, steps: int, samples: int) -> Parts:
        """Room for as many evaluations, in which the input's part of the pre-activations is filled in; ``us``
        is (step, sample, channel)."""
        parts = self.room(steps, samples)
        self.start(parts, us)
        return parts

    @abc.abstractmethod
    def room(self, steps: int, samples: int) -> Parts:
        """Room for as many evaluations, (step, sample, ...) each."""

    @abc.abstractmethod
    def start(self, parts: Parts, us: Tensor | None) -> None:
        """Fill in the input's part of the pre-activations; ``us`` is (step, sample, channel)."""

    @abc.abstractmethod
    def views(self, parts: Parts) -> Parts:
        """The parts, and parts of them, that :meth:`evaluate` and :meth:`advance` work on, (step, ...)."""

    @abc.abstractmethod
    def evaluate(self, views: Parts, h: Tensor) -> None:
        """One evaluation: add the state's part of the pre-activations, make gates of them, in place."""

    @abc.abstractmethod
    def advance(self, views: Parts, h: Tensor, scale: Scale, rule: Rule, out: Tensor) -> None:
        """The state after one step, or the slope, from an evaluation; ``scale`` = dt / tau."""

    @abc.abstractmethod
    def factors(self, parts: Parts, h: Tensor, scale: Scale, rule: Rule) -> Parts:
        """All that :meth:`pull` needs, for many steps at once, (step, ...)."""

    @abc.abstractmethod
    def cotangents(self, steps: int, samples: int) -> Tensor:
        """Room for the cotangents of what the weights multiply, (step, sample, ...)."""

    @abc.abstractmethod
    def pull(self, factors: Parts, a: Tensor, pre: Tensor, out: Tensor) -> None:
        """One step back: the cotangent ``a`` of what :meth:`advance` gave adds to ``out``, that of the state
        before; ``pre`` is written, the cotangents of the pre-activations.

        All three may have a block of vectors in front, (block, sample, ...), here and in :meth:`push`.
        """

    @abc.abstractmethod
    def push(self, factors: Parts, v: Tensor, pre: Tensor, out: Tensor) -> None:
        """One step forward, the transpose of :meth:`pull`: the tangent ``v`` of the state before adds to
        ``out``, that of what :meth:`advance` gave. ``pre`` has what the tangents of pre-activations get from
        parameters and input, laid out as their cotangents, and is overwritten."""

    @abc.abstractmethod
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
        """The sum over steps and samples of what makes the cotangents of parameters, by names that
        :meth:`named` knows, and the cotangents of the input, (step, sample, channel), None where they are not
        wanted.

        ``a`` are the cotangents of what the steps gave, ``pre`` what :meth:`pull` wrote, ``h`` the states
        before, all (step, sample, ...). With ``keep`` = k > 0 the samples are k groups, and each keeps its
        own sum, as the first dimension.
        """

    def named(self, sums: Gradients) -> Gradients:
        """The cotangents of parameters, by name, from :meth:`sums`, added up over pieces of time."""
        return sums

    @abc.abstractmethod
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
        """The transpose of :meth:`sums`: what pre-activations get, as :meth:`push` takes it, (step,
        sample, rows), and what the steps' results get besides, (step, sample, state), None for 0, from a
        direction of some of the parameters, by name, and of the input, (step, sample, channel) or None."""

    @abc.abstractmethod
    def stretch(self, parts: Parts, h: Tensor, scale: Scale, rule: Rule) -> Tensor:
        """The derivative of what :meth:`advance` gave by the logarithm of dt, (step, sample, state); that by
        log tau is its negative unless a class says otherwise."""

    def by_size(self, parts: Parts, a: Tensor, h: Tensor, dts: Tensor, rule: Rule) -> Tensor:
        """The cotangents of the steps' sizes, (step, sample): 0 where a sample takes no step."""
        moving = dts != 0.0
        sizes = torch.where(moving, dts, 1.0)
        along = a * self.stretch(parts, h, dts.unsqueeze(-1) * self.pace, rule)
        return torch.where(moving, along.sum(-1) / sizes, 0.0)


def project(us: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out`` (step, sample, rows) = us weight^T + bias."""
    rows, room = us.flatten(0, 1), out.view(-1, out.shape[-1])
    # Piece by piece a product of few columns takes little more than half the time.
    for first in range(0, len(rows), _PIECE):
        seen, piece = (
            (rows, room) if len(rows) <= _PIECE else (x[first : first + _PIECE] for x in (rows, room))
        )
        if bias is None:
            torch.mm(seen, weight.mT, out=piece)
        else:
            torch.addmm(bias, seen, weight.mT, out=piece)


def fill(out: Tensor, bias: Tensor | None) -> None:
    """``out`` (step, sample, rows) = bias, or 0."""
    if bias is None:
        out.zero_()
    else:
        out.copy_(bias)


def begin(parameters: Mapping[str, Tensor], us: Tensor | None, out: Tensor) -> None:
    """``out`` (step, sample, rows) = the input's part of pre-activations with one bias."""
    if us is None:
        fill(out, parameters.get("bias"))
    else:
        project(us, parameters["weight_ih"], parameters.get("bias"), out)


def add_product(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """``out`` (..., rows) += x weight."""
    if out.ndim == 2:
        out.addmm_(x, weight)
    else:
        out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight)


def begin_along(
    out: Tensor,
    us: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    own: Tensor,
    dus: Tensor | None,
) -> None:
    """``out`` (step, sample, rows) = us weight^T + bias + dus own^T, without what is None."""
    if us is None or weight is None:
        fill(out, bias)
    else:
        project(us, weight, bias, out)
    if dus is not None:
        add_product(out, dus, own.mT)


def outer(pre: Tensor, seen: Tensor, keep: int) -> Tensor:
    """The sum over steps and samples of pre seen^T: (rows, columns), or (keep, rows, columns)."""
    if keep:
        return outer_by_group(pre, (seen,), keep, ones=0)[0]
    # The transpose is faster where there are few columns, and as fast elsewhere.
    return (seen.flatten(0, 1).mT @ pre.flatten(0, 1)).mT


def outer_by_group(pre: Tensor, seen: Sequence[Tensor], keep: int, ones: int) -> list[Tensor]:
    """:func:`outer` with each of ``seen`` for so many groups of samples, and last with so many columns of
    ``ones``, by one batched product."""
    steps, samples, rows = pre.shape
    each, widths = samples // keep, [*(x.shape[-1] for x in seen), ones]
    # Such a product is many times slower with few columns or odd numbers of them, and with factors that lie
    # far apart in memory: those of some groups are brought together, where they stay in the cache.
    columns = max(_COLUMNS, -(-sum(widths) // _MULTIPLE) * _MULTIPLE)
    size = keep if pre.is_cuda else max(1, min(keep, _GROUPED // max(1, steps * each * (rows + columns))))
    left, right = pre.new_empty(size, steps, each, rows), pre.new_ones(size, steps, each, columns)
    found = [pre.new_empty(keep, rows, width) for width in widths]
    for first in range(0, keep, size):
        count = min(size, keep - first)
        for room, x in zip((left, *parted(right, widths[:-1])), (pre, *seen), strict=True):
            part = x[:, first * each : (first + count) * each]
            room[:count] = part.view(steps, count, each, x.shape[-1]).movedim(1, 0)
        pair = left[:count].flatten(1, 2), right[:count].flatten(1, 2)
        for row, product in zip(found, parted(torch.bmm(pair[0].mT, pair[1]), widths), strict=True):
            row[first : first + count] = product
    return found


def parted(x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """The first columns of ``x``, so many after the other."""
    return torch.split(x[..., : sum(widths)], list(widths), -1)


def total(x: Tensor, keep: int) -> Tensor:
    """The sum over steps and samples: (rows,), or (keep, rows)."""
    steps, samples, rows = x.shape
    return x.reshape(steps, keep, samples // keep, rows).sum((0, 2)) if keep else x.sum((0, 1))


def weight_gradients(
    parameters: Mapping[str, Tensor],
    pre: Tensor,
    h: Tensor,
    us: Tensor | None,
    keep: int,
    wants_input: bool,
) -> tuple[Gradients, Tensor | None]:
    """What :meth:`FusedCell.gradients` gives of weights, input and the one bias, where all rows meet the same
    state and input; ``pre`` (step, sample, rows)."""
    seen = h.new_empty(*h.shape[:-1], 0) if us is None else us
    if keep:
        *weights, bias = outer_by_group(pre, (h, seen), keep, ones=1)
    else:
        weights = [outer(pre, h, 0), outer(pre, seen, 0)]
    found = dict(zip(("weight_hh", "weight_ih"), weights, strict=True))
    if "bias" in parameters:
        found["bias"] = bias.squeeze(-1) if keep else total(pre, 0)
    return found, pre @ parameters["weight_ih"] if wants_input else None


def weight_sources(
    pre: Tensor,
    direction: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    h: Tensor,
    us: Tensor | None,
    dus: Tensor | None,
) -> None:
    """The transpose of :func:`weight_gradients`: writes ``pre`` (step, sample, rows)."""
    begin_along(pre, us, direction.get("weight_ih"), direction.get("bias"), parameters["weight_ih"], dus)
    if "weight_hh" in direction:
        add_product(pre, h, direction["weight_hh"].mT)


def total_like(x: Tensor, parameter: Tensor, keep: int) -> Tensor:
    """:func:`total`, over units as well where the parameter is a scalar."""
    summed = total(x, keep)
    return summed.sum(-1) if parameter.ndim == 0 else summed
