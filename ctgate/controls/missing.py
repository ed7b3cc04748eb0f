"""Missing values: which observations each entry reads, and a gather whose graph can be walked twice."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function


def observed_neighbours(observed: Tensor, pieces: int, reads: int) -> tuple[Tensor, ...]:
    """For every piece and entry, the indices of the observations around it.

    ``observed`` is (time, *batch, channel), True where there is a value; piece j starts at index j. Returns
    the first ``reads`` of: the last observation at or before j, the first one after j, and the last one
    before the former. Where there is none, its neighbour stands in, so that the two times coincide.
    """
    count = len(observed)
    rank = torch.arange(count, device=observed.device).reshape(-1, *(1,) * (observed.ndim - 1))
    last = torch.where(observed, rank, -1).cummax(0).values
    following = torch.where(observed, rank, count).flip(0).cummin(0).values.flip(0)
    # The clamp matters only where no check was possible: an entry without any observation, under vmap.
    left = torch.where(last >= 0, last, following).clamp(max=count - 1)
    if reads == 1:
        return (left[:pieces],)
    later = torch.cat([following[1:], torch.full_like(following[:1], count)])
    right = torch.where(later < count, later, left)
    earlier = torch.cat([torch.full_like(last[:1], -1), last[:-1]]).gather(0, left)
    before = torch.where(earlier >= 0, earlier, left)
    return tuple(table[:pieces] for table in (left, right, before)[:reads])


def lift(values: Tensor, ndim: int) -> Tensor:
    """``values`` (time, *entry) with as many ones after time as make ``ndim`` dimensions."""
    return values.reshape(len(values), *(1,) * (ndim - values.ndim), *values.shape[1:])


def rows_at(index: Tensor, values: Tensor) -> Tensor:
    """Rows of ``values`` (time, *entry) at ``index`` (n, ...), which broadcasts against an entry."""
    if math.prod(index.shape[1:]) == 1:
        return lift(values.index_select(0, index.reshape(-1)), index.ndim)
    return entries_at(index, values)


def entries_at(index: Tensor, values: Tensor) -> Tensor:
    """The same, by a gather whose graph can be walked twice."""
    shape = np.broadcast_shapes(index.shape[1:], values.shape[1:])
    own = lift(values, index.ndim).expand(len(values), *shape)
    return take(own, index.expand(len(index), *shape))


def take(values: Tensor, index: Tensor) -> Tensor:
    """``values.gather(0, index)``, differentiable as often as one likes."""
    taken: Tensor = Take.apply(values, index)  # type: ignore[no-untyped-call]
    return taken


def _put(rows: Tensor, index: Tensor, count: int) -> Tensor:
    put: Tensor = Put.apply(rows, index, count)  # type: ignore[no-untyped-call]
    return put


def _batch_last(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.unsqueeze(-1).expand(*tensor.shape, size) if dim is None else tensor.movedim(dim, -1)


class Take(Function):
    """``values.gather(0, index)``.

    The index is a plain attribute of the graph's node, so a backward pass does not free it: a control lives
    longer than one solve, and each solve may be differentiated.
    """

    @staticmethod
    def forward(values: Tensor, index: Tensor) -> Tensor:
        """Rows ``index`` of each entry."""
        return values.gather(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the index."""
        values, ctx.index = inputs
        ctx.count = len(values)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """The transpose of a gather is a scatter."""
        return _put(grad_outputs[0], ctx.index, ctx.count), None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        """The map is linear."""
        return take(grad_inputs[0], ctx.index)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], values: Tensor, index: Tensor) -> tuple[Tensor, int]:
        """Samples go last, where gather leaves dimensions alone."""
        values = _batch_last(values, in_dims[0], info.batch_size)
        index = _batch_last(index, in_dims[1], info.batch_size)
        taken = take(values, index)
        return taken, taken.ndim - 1


class Put(Function):
    """Adds rows to the ``count`` places ``index``, zero elsewhere: the transpose of :class:`Take`."""

    @staticmethod
    def forward(rows: Tensor, index: Tensor, count: int) -> Tensor:
        """Sum the rows by place."""
        return rows.new_zeros(count, *rows.shape[1:]).scatter_add(0, index, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the index."""
        _, ctx.index, ctx.count = inputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """The transpose of a scatter is a gather."""
        return take(grad_outputs[0], ctx.index), None, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        """The map is linear."""
        return _put(grad_inputs[0], ctx.index, ctx.count)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], rows: Tensor, index: Tensor, count: int
    ) -> tuple[Tensor, int]:
        """Samples go last, where scatter leaves dimensions alone."""
        rows = _batch_last(rows, in_dims[0], info.batch_size)
        index = _batch_last(index, in_dims[1], info.batch_size)
        put = _put(rows, index, count)
        return put, put.ndim - 1
