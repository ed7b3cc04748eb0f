"""Many steps of a cell as one node of the graph.

The node's backward pass is a node again, whose own derivatives are those of the field's plain steps: second
and higher ones are right, and as slow as without a fused cell. Under ``torch.func.vmap`` the mapped dimension
joins the samples while the parameters are shared, and the gradients of the parameters are kept apart;
parameters that are mapped themselves are taken one after the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from ctgate.kernels.fused.cell import FusedCell
from ctgate.kernels.fused.rule import Rule
from ctgate.kernels.fused.unroll import run, run_back

Named = Mapping[str, Tensor]
# (parameters, us, h0, dts) to the states of all steps, by plain operations.
Plain = Callable[[Named, Tensor | None, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class Stretch:
    """Steps to take: how a cell is made of parameters, their names, what a step makes of a rate, the sizes of
    steps where they are numbers, and the same steps by plain operations. With ``copies`` = k > 0 the
    parameters are k copies of the same, in front, one for each of k groups of samples."""

    fuse: Callable[[Named], FusedCell]
    names: tuple[str, ...]
    rule: Rule
    dts: Sequence[float] | None
    plain: Plain
    copies: int = 0

    def cell(self, parameters: Sequence[Tensor]) -> FusedCell:
        """The cell with these parameters."""
        return self.fuse(dict(zip(self.names, parameters, strict=True)))

    def sizes(self, dts: Tensor | None) -> Sequence[float] | Tensor:
        """The sizes of the steps."""
        sizes = self.dts if dts is None else dts
        assert sizes is not None
        return sizes


def unroll(
    stretch: Stretch, us: Tensor | None, h0: Tensor, dts: Tensor | None, parameters: Sequence[Tensor]
) -> Tensor:
    """The states (step + 1, sample, state) of these steps from ``h0``; ``us`` (step, sample, channel), and
    ``dts`` (step, sample) where samples have steps of their own."""
    states: Tensor = _Unroll.apply(stretch, us, h0, dts, *parameters)[0]  # type: ignore[no-untyped-call]
    return states


class _Unroll(torch.autograd.Function):
    """States, and what the evaluations keep for the way back."""

    @staticmethod
    def forward(
        stretch: Stretch, us: Tensor | None, h0: Tensor, dts: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        hs, parts = run(stretch.cell(parameters), us, h0, stretch.sizes(dts), stretch.rule)
        return hs, *parts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.stretch = inputs[0]
        ctx.count = len(inputs) - 4
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, *parts: None) -> tuple[Any, ...]:
        if cotangent is None:
            return (None, None, None, None, *(None for _ in range(ctx.count)))
        us, h0, dts, *rest = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:4]
        found: tuple[Any, ...] = _Reverse.apply(  # type: ignore[no-untyped-call]
            ctx.stretch, wanted, ctx.stretch.copies, ctx.count, cotangent, us, h0, dts, *rest
        )
        return (None, *found)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], stretch: Stretch, *tensors: Any) -> Any:
        count, dims = info.batch_size, in_dims[1:]
        if any(dim is not None for dim in dims[3:]):
            rows = [_Unroll.apply(stretch, *_slice(tensors, dims, k)) for k in range(count)]  # type: ignore[no-untyped-call]
            outputs = tuple(torch.stack(column) for column in zip(*rows, strict=True))
            return outputs, (0,) * len(outputs)
        us, h0, dts = _fold(tensors[:3], dims[:3], count, (1, 0, 1))
        outputs = _Unroll.apply(stretch, us, h0, dts, *tensors[3:])  # type: ignore[no-untyped-call]
        return tuple(_unfold(output, count, 1) for output in outputs), (1,) * len(outputs)


class _Reverse(torch.autograd.Function):
    """The cotangents of input, initial state, sizes and parameters; with ``keep`` = k > 0 the samples are k
    groups, each with its own cotangents of the parameters."""

    @staticmethod
    def forward(
        stretch: Stretch,
        wanted: Sequence[bool],
        keep: int,
        count: int,
        cotangent: Tensor,
        us: Tensor | None,
        h0: Tensor,
        dts: Tensor | None,
        *rest: Tensor,
    ) -> tuple[Tensor | None, ...]:
        parameters, (hs, *parts) = rest[:count], rest[count:]
        cell, sizes = stretch.cell(parameters), stretch.sizes(dts)
        a, found, inputs = run_back(
            cell, us, hs, tuple(parts), sizes, stretch.rule, cotangent, keep, wanted[0], dts is not None
        )
        slopes = None
        if dts is not None and wanted[2]:
            slopes = cell.by_size(tuple(parts), a[1:], hs[:-1], dts, stretch.rule)
        return inputs, a[0].clone(), slopes, *(found[name] for name in stretch.names)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.stretch, _, ctx.keep, ctx.count = inputs[:4]
        ctx.total = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[4 : 8 + ctx.count])

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        there = [k for k, tensor in enumerate(tensors) if tensor is not None]
        asked = [k for k, tangent in enumerate(tangents) if tangent is not None]
        if not asked:
            return tuple(None for _ in range(ctx.total))

        def gradients(*values: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = [None] * len(tensors)
            for k, value in zip(there, values, strict=True):
                full[k] = value
            found: tuple[Any, ...] = _plain_gradients(ctx.stretch, ctx.keep, *full)
            return tuple(found[k] for k in asked)

        pull: Any = vjp(gradients, *(tensors[k] for k in there))[1]
        result: list[Any] = [None] * (ctx.total - 4)
        for k, gradient in zip(there, pull(tuple(tangents[k] for k in asked)), strict=True):
            result[k] = gradient
        return None, None, None, None, *result

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        stretch: Stretch,
        wanted: Sequence[bool],
        keep: int,
        count: int,
        *tensors: Any,
    ) -> Any:
        size, dims = info.batch_size, in_dims[4:]
        shared = all(dim is None for dim in dims[4 : 4 + count])
        if not shared:
            rows = [
                _Reverse.apply(stretch, wanted, keep, count, *_slice(tensors, dims, k))  # type: ignore[no-untyped-call]
                for k in range(size)
            ]
            columns = list(zip(*rows, strict=True))
            outputs = tuple(None if column[0] is None else torch.stack(column) for column in columns)
            return outputs, tuple(None if output is None else 0 for output in outputs)
        places = (1, 1, 0, 1)
        folded = _fold(tensors[:4], dims[:4], size, places)
        kept = _fold(tensors[4 + count :], dims[4 + count :], size, (1,) * (len(tensors) - 4 - count))
        inputs, start, slopes, *found = _Reverse.apply(  # type: ignore[no-untyped-call]
            stretch, wanted, size * max(keep, 1), count, *folded, *tensors[4 : 4 + count], *kept
        )
        opened: list[tuple[Tensor | None, int | None]] = [
            (None, None) if x is None else (_unfold(x, size, place), place)
            for x, place in ((inputs, 1), (start, 0), (slopes, 1))
        ]
        opened += [(_unfold(row, size, 0) if keep else row, 0) for row in found]
        return tuple(zip(*opened, strict=True))


def _plain_gradients(
    stretch: Stretch,
    keep: int,
    cotangent: Tensor,
    us: Tensor | None,
    h0: Tensor,
    dts: Tensor | None,
    *parameters: Tensor,
) -> tuple[Tensor | None, ...]:
    """What :class:`_Reverse` gives, by plain operations."""
    there = [tensor is not None for tensor in (us, h0, dts)]

    def states(*values: Tensor) -> Tensor:
        given = iter(values)
        own = [next(given) if present else None for present in there]
        assert own[1] is not None
        named = dict(zip(stretch.names, given, strict=True))
        return stretch.plain(named, own[0], own[1], own[2])

    def pulled(cotangent: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return vjp(states, *values)[1](cotangent)  # type: ignore[no-any-return]

    values = [tensor for tensor in (us, h0, dts) if tensor is not None]
    if keep and not stretch.copies:
        places = [place for place, present in zip((1, 0, 1), there, strict=True) if present]
        grouped = [_unfold(value, keep, place) for value, place in zip(values, places, strict=True)]
        none = [None] * len(parameters)
        found = vmap(pulled, (1, *places, *none), (*places, *(0 for _ in parameters)))(
            _unfold(cotangent, keep, 1), *grouped, *parameters
        )
        own = [x.flatten(place, place + 1) for x, place in zip(found, places, strict=False)]
        found = (*own, *found[len(own) :])
    else:
        found = pulled(cotangent, *values, *parameters)
    given = iter(found)
    return *(next(given) if present else None for present in there), *given


def _slice(tensors: Sequence[Any], dims: Sequence[int | None], k: int) -> list[Any]:
    """Sample k of each."""
    return [
        tensor if dim is None else tensor.select(dim, k) for tensor, dim in zip(tensors, dims, strict=True)
    ]


def _fold(tensors: Sequence[Any], dims: Sequence[int | None], size: int, places: Sequence[int]) -> list[Any]:
    """The vmapped dimension merged into that of the samples, in front of it."""
    folded = []
    for tensor, dim, place in zip(tensors, dims, places, strict=True):
        if tensor is not None:
            grown = tensor.unsqueeze(place) if dim is None else tensor.movedim(dim, place)
            tensor = grown.expand(*grown.shape[:place], size, *grown.shape[place + 1 :])
            tensor = tensor.flatten(place, place + 1)
        folded.append(tensor)
    return folded


def _unfold(tensor: Tensor, size: int, place: int) -> Tensor:
    shape = tensor.shape
    return tensor.reshape(*shape[:place], size, shape[place] // size, *shape[place + 1 :])
