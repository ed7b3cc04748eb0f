r"""Sums over units of what a product over time carries from t - lag to t, for all lags in one pass.

With multipliers :math:`a_j` between neighbouring steps,

.. math:: \psi(t, t - l) = \sum_q \delta_q(t) \Bigl(\prod_{j = t - l + 1}^{t} a_{q,j}\Bigr) b_q(t - l)

factorises at any r between t - l and t: the product from r to t belongs to :math:`\delta`, that from t - l to
r to b, and the rest is a product of two matrices, a row for each t and a column for each source. Time is cut
into blocks of 1, 2, 4, ... steps. Where two of them meet, the rows of the later one reach back to its start
and the columns of the earlier one on to its end: every pair of times is met once, with r between the two.
Both factors are then parts of the product that they stand for. With :math:`|a| \le 1` neither overflows, and
where one vanishes the product does; a multiplier may be 0 or negative. Nothing is divided, and no logarithm
is taken.

THEORY.md 27.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

# The longest block, a power of two.
_BLOCK = 64
# Numbers in one array of the samples that are taken together.
_ROOM = 2**19
# The share of a dtype's exponents that a product over one block may use up where multipliers exceed 1.
_SHARE = 0.25


@torch.no_grad()
def banded_product(
    delta: Float[Tensor, "time sample unit"],
    b: Float[Tensor, "time sample unit"],
    leak: Float[Tensor, "time sample unit"],
    lags: Sequence[int],
    gain: Float[Tensor, "time sample unit"] | None = None,
) -> Float[Tensor, "lag time sample"]:
    r"""The sum over units of :math:`\mu_q(t, t - l)\,\delta_q(t)\,b_q(t - l)` for all lags l, where

    .. math:: \mu_q(t, s) = \prod_{j = s + 1}^{t} a_{q,j} \qquad\text{or, with gains g,}\qquad
              \mu_q(t, s) = \prod_j a_{q,j} + \sum_j g_{q,j} \prod_{i \ne j} a_{q,i} ,

    what :math:`\prod (a + g)` is to first order in g, carried along as dual numbers.

    It takes a matrix product along a band as wide as the longest lag, two with gains, and some passes over
    the arrays; beside the result it holds copies of the arrays of a few samples.

    Parameters:
        delta, b: what stands at t and at t - l.
        leak: a; entry j leads from step j - 1 to step j, and the first one is not used.
        lags: increasing, >= 0 [steps].
        gain: g, of the same steps; None for the products alone.

    Returns: NaN where t - l is before the first step.

    Raises: ValueError for shapes that differ, or lags that do not increase.

    Source: THEORY.md 27; in chunks as gated linear attention, S. Yang et al., arXiv 2312.06635.
    """
    given = {"delta": delta, "b": b, "leak": leak} | ({} if gain is None else {"gain": gain})
    _check(given, lags)
    steps, samples, _ = delta.shape
    longest = min(lags[-1], steps - 1)
    length = _length(leak, longest)
    room = -(-steps // length) * length
    out = delta.new_full((len(lags), samples, room), math.nan)
    at_once = max(1, _ROOM // max(1, room * delta.shape[-1]))
    for first in range(0, samples, at_once):
        some = slice(first, first + at_once)
        blocks = _Blocks(*(_by_sample(x[:, some], room) for x in given.values()))
        _fill(out[:, some], blocks, length, lags)
    return out[..., :steps].mT


class _Blocks:
    r"""Steps in blocks of equal length: rows :math:`\delta_t \prod_{j \le t} a_j` from the start of their
    block on, columns :math:`b_s \prod_{j > s} a_j` to the end of theirs, (sample, time, unit), and products
    over whole blocks, (sample, block, unit).

    A list of two tensors is the dual number of both; of one, where there are no gains, a number.
    """

    def __init__(self, delta: Tensor, b: Tensor, leak: Tensor, gain: Tensor | None = None) -> None:
        steps = [leak] if gain is None else [leak, gain]
        self.length = 1
        self.rows = [delta * step for step in steps]
        self.columns = [b] if gain is None else [b, torch.zeros_like(b)]
        self.whole = steps
        self.here = (delta * b).sum(-1)

    def join(self) -> Tensor:
        """Make one block of each two, (sample, block, later, earlier): how those two meet."""
        rows, columns = (
            [_cut(part, 1, -1, 2, self.length) for part in parts] for parts in (self.rows, self.columns)
        )
        later, earlier = [part[:, :, 1] for part in rows], [part[:, :, 0] for part in columns]
        met = _meet(later, earlier)
        early, late = ([part[:, half::2] for part in self.whole] for half in (0, 1))
        _multiply(later, [part.unsqueeze(2) for part in early])
        _multiply(earlier, [part.unsqueeze(2) for part in late])
        self.whole = [part.clone() for part in early]
        _multiply(self.whole, late)
        self.length *= 2
        return met

    def apart(self, most: int) -> Iterator[Tensor]:
        """How blocks meet that are 1, 2, ..., ``most`` apart, each (sample, later block, later, earlier);
        done once, for the columns are used up."""
        rows, columns = (
            [_cut(part, 1, -1, self.length) for part in parts] for parts in (self.rows, self.columns)
        )
        count = rows[0].shape[1]
        for distance in range(1, most + 1):
            reached = [part[:, : count - distance] for part in columns]
            if distance > 1:
                # Past the block that lies between, once more.
                between = [part[:, distance - 1 : count - 1].unsqueeze(2) for part in self.whole]
                _multiply(reached, between)
            yield _meet([part[:, distance:] for part in rows], reached)


def _multiply(parts: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Multiply in place (x + e y)(v + e w) = xv + e (yv + xw), or plain numbers."""
    if len(parts) > 1:
        parts[1].mul_(others[0]).addcmul_(parts[0], others[1])
    parts[0].mul_(others[0])


def _meet(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """The sum over units of the products, zeroth and first part together, (..., row, column)."""
    if len(rows) == 1:
        return rows[0] @ columns[0].mT
    return rows[0] @ (columns[0] + columns[1]).mT + rows[1] @ columns[0].mT


def _fill(out: Tensor, blocks: _Blocks, length: int, lags: Sequence[int]) -> None:
    """Lags of some samples, (lag, sample, time)."""
    samples, room = out.shape[1:]
    inside = out.new_zeros(samples, room // length, length, length)
    inside.diagonal(dim1=-2, dim2=-1).copy_(_cut(blocks.here, 1, -1, length))
    while blocks.length < length:
        half = blocks.length
        met = _cut(blocks.join(), 1, room // length, -1)
        pairs = _cut(_cut(inside, -1, -1, 2, half), 2, -1, 2, half)
        # (sample, block, later, earlier, pair), of which met has the pair in the third place.
        pairs[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).copy_(met.movedim(2, -1))
    most = min(-(-lags[-1] // length), room // length - 1)
    for distance, met in enumerate(chain([inside], blocks.apart(most))):
        for target, lag in zip(_cut(out, -1, -1, length), lags, strict=True):
            # The pairs of one lag lie on one diagonal of blocks as far apart as the lag, or one further.
            offset = lag - distance * length
            if abs(offset) < length:
                rows = slice(max(offset, 0), length + min(offset, 0))
                target[:, distance:, rows] = met.diagonal(-offset, -2, -1)


def _cut(x: Tensor, dim: int, *sizes: int) -> Tensor:
    """One dimension as several, a view."""
    view: Tensor = x.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return view


def _by_sample(x: Tensor, room: int) -> Tensor:
    """(time, sample, unit) as (sample, time, unit) of its own, with zeros at the end of time."""
    own = x.new_zeros(x.shape[1], room, x.shape[2])
    own[:, : len(x)] = x.transpose(0, 1)
    return own


def _length(leak: Tensor, longest: int) -> int:
    """The length of the longest blocks: no more than lags need, and so short that products over one stay far
    inside the range of the dtype where multipliers exceed 1."""
    largest = max(abs(float(end)) for end in leak.aminmax())
    most = min(_BLOCK, longest + 1)
    if largest > 1.0:
        reach = _SHARE * math.log(torch.finfo(leak.dtype).max)
        most = min(most, max(1, int(reach / math.log(largest))))
    return 1 << (most.bit_length() - 1)


def _check(given: Mapping[str, Tensor], lags: Sequence[int]) -> None:
    shape = given["delta"].shape
    for name, value in given.items():
        if value.shape != shape:
            raise ValueError(
                f"banded_product({name}=...): {name} has shape {tuple(value.shape)} and delta "
                f"{tuple(shape)}; all must be (time, sample, unit)"
            )
    if len(shape) != 3 or 0 in shape:
        raise ValueError(
            f"banded_product(delta=...): delta has shape {tuple(shape)}; it must be (time, sample, unit), "
            "none of them 0"
        )
    if not lags or lags[0] < 0 or sorted(set(lags)) != list(lags):
        raise ValueError(
            f"banded_product(lags=...): lags are {list(lags)}; they must increase from 0 or more, and there "
            "must be one at least"
        )
