"""Evaluations of a cell one after the other, forwards and back: by torch, or compiled (extra ``fast``)."""

import abc
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctgate.kernels.compiled import kernels
from ctgate.kernels.fused.cell import FusedCell, Parts, per_step
from ctgate.kernels.fused.rule import Rule
from ctgate.kernels.fused.scales import Scales


def forwards(
    cell: FusedCell, parts: Parts, h: Tensor, out: Tensor, scales: Scales, rule: Rule
) -> Callable[[int], None]:
    """A function of k that makes evaluation k at ``h[k]`` and puts what the step, or the slope, makes of it
    into ``out[k]``, both (step, sample, state)."""
    module = _compiled(cell, scales, rule, (*parts, h, out))
    if module is not None:
        return _Forwards(module, cell, parts, h, out, scales, rule)
    each = list(zip(per_step(cell.views(parts)), scales.each, h.unbind(0), out.unbind(0), strict=True))

    def step(k: int) -> None:
        views, scale, before, after = each[k]
        cell.evaluate(views, before)
        cell.advance(views, before, scale, rule, after)

    return step


def backwards(
    cell: FusedCell,
    parts: Parts,
    h: Tensor,
    a: Tensor,
    pre: Tensor,
    out: Tensor,
    scales: Scales,
    rule: Rule,
    at_once: int,
) -> "Backwards":
    """Pulls the cotangent ``a[k]`` back through step k, from ``h[k]``; the factors of so many steps up to k
    are made ``at_once``. ``pre`` may be the first part, of as many steps, where the cell allows it."""
    module = _compiled(cell, scales, rule, (*parts, h, a, pre, out))
    if module is not None:
        return _Compiled(module, cell, parts, h, a, pre, out, scales, rule)
    return _Factored(cell, parts, h, a, pre, out, scales, rule, at_once)


def onwards(
    cell: FusedCell, parts: Parts, h: Tensor, vs: Tensor, pre: Tensor, scales: Scales, rule: Rule
) -> Callable[[int], None]:
    """A function of k that carries the tangents ``vs[k]`` ([block], sample, state) over step k, from
    ``h[k]``, and adds them to ``vs[k + 1]``; ``pre[k]`` is what :meth:`FusedCell.push` takes."""
    along, rows = vs.unbind(0), pre.unbind(0)
    module = _compiled(cell, scales, rule, (*parts, h, vs, pre))
    kernel = getattr(module, "push", None)
    if kernel is not None:
        numbers = _numbers(scales, h)
        hidden, keep = cell.hidden, numbers.dtype.type(rule.keep)
        arrays = (numbers, *map(_array, (h, vs[:-1], pre, vs[1:], *parts, *cell.fixed)))
        shown = [v.flatten(0, -2)[:, cell.shown] for v in along[:-1]]
        met = [row.view(len(v), -1)[:, cell.into] for row, v in zip(rows, shown, strict=True)]

        def push(k: int) -> None:
            met[k].addmm_(shown[k], cell.own.mT)
            kernel(hidden, k, keep, *arrays)

        return push
    factors = list(per_step(cell.factors(parts, h, scales.together, rule)))
    return lambda k: cell.push(factors[k], along[k], rows[k], along[k + 1])


class Backwards(abc.ABC):
    """A function of k and j that writes ``pre[k]`` and adds to ``out[j]``, or, unless it ``adds``, writes
    that as well."""

    adds: bool = True

    @abc.abstractmethod
    def __call__(self, k: int, j: int) -> None:
        """One step back."""

    @abc.abstractmethod
    def begin(self) -> None:
        """What follows is for other evaluations, in the same place."""


class _Factored(Backwards):
    """One step back after the other with factors that are made for many of them."""

    def __init__(
        self,
        cell: FusedCell,
        parts: Parts,
        h: Tensor,
        a: Tensor,
        pre: Tensor,
        out: Tensor,
        scales: Scales,
        rule: Rule,
        at_once: int,
    ) -> None:
        self._cell, self._parts, self._h, self._scales, self._rule = cell, parts, h, scales, rule
        self._rows = list(zip(a.unbind(0), pre.unbind(0), strict=True))
        self._out = out.unbind(0)
        self._size = at_once
        self.begin()

    def begin(self) -> None:
        """Factors of before count no more."""
        self._start = 0
        self._factors: list[Parts] = []

    def __call__(self, k: int, j: int) -> None:
        if not self._start <= k < self._start + len(self._factors):
            self._start = max(0, k + 1 - self._size)
            which = slice(self._start, k + 1)
            made = self._cell.factors(
                tuple(part[which] for part in self._parts),
                self._h[which],
                self._scales.part(which),
                self._rule,
            )
            self._factors = list(per_step(made))
        a, pre = self._rows[k]
        self._cell.pull(self._factors[k - self._start], a, pre, self._out[j])


class _Forwards:
    """A product, then all that is elementwise, compiled; some cells have two of both."""

    def __init__(
        self,
        module: ModuleType,
        cell: FusedCell,
        parts: Parts,
        h: Tensor,
        out: Tensor,
        scales: Scales,
        rule: Rule,
    ) -> None:
        self._passes = [
            (rows.unbind(0), seen.unbind(0), weight, getattr(module, name))
            for rows, seen, weight, name in cell.products(parts, h)
        ]
        numbers = _numbers(scales, h)
        self._hidden, self._keep = cell.hidden, numbers.dtype.type(rule.keep)
        self._arrays = (numbers, *map(_array, (h, out, *parts, *cell.fixed)))

    def __call__(self, k: int) -> None:
        for rows, seen, weight, kernel in self._passes:
            rows[k].addmm_(seen[k], weight)
            kernel(self._hidden, k, self._keep, *self._arrays)


class _Compiled(Backwards):
    """All that is elementwise, compiled, then a product; some cells have two of both."""

    def __init__(
        self,
        module: ModuleType,
        cell: FusedCell,
        parts: Parts,
        h: Tensor,
        a: Tensor,
        pre: Tensor,
        out: Tensor,
        scales: Scales,
        rule: Rule,
    ) -> None:
        rows = pre.flatten(2)[..., cell.into]
        self._rows, self._out, self._weight = rows.unbind(0), out[..., cell.shown].unbind(0), cell.own
        self._before = [
            (getattr(module, name), rows.unbind(0), along.unbind(0), weight)
            for name, rows, along, weight in cell.products_back(pre)
        ]
        numbers = _numbers(scales, h)
        self._hidden, self._keep = cell.hidden, numbers.dtype.type(rule.keep)
        within = pre.data_ptr() == parts[0].data_ptr()
        self._kernel = module.backward_within if within else module.backward
        self.adds, written = not within, (out,) if within else (pre, out)
        self._arrays = (numbers, *map(_array, (h, a, *written, *parts, *cell.fixed)))

    def begin(self) -> None:
        """Nothing is kept from one step to the next."""

    def __call__(self, k: int, j: int) -> None:
        for kernel, rows, along, weight in self._before:
            kernel(self._hidden, k, j, self._keep, *self._arrays)
            rows[k].addmm_(along[k], weight)
        self._kernel(self._hidden, k, j, self._keep, *self._arrays)
        self._out[j].addmm_(self._rows[k], self._weight)


def _compiled(cell: FusedCell, scales: Scales, rule: Rule, tensors: Sequence[Tensor]) -> ModuleType | None:
    """The cell's kernels, where they know what is asked of them."""
    known = (
        cell.kernels
        and not rule.exponential
        and scales.numbers
        and tensors[0].dtype in (torch.float32, torch.float64)
        and all(x.device.type == "cpu" and x.dtype == tensors[0].dtype and x.is_contiguous() for x in tensors)
    )
    return kernels(cell.kernels) if known else None


def _array(x: Tensor) -> NDArray[np.floating]:
    """(step, the rest)."""
    return x.detach().flatten(1).numpy()


def _numbers(scales: Scales, like: Tensor) -> NDArray[np.floating]:
    return like.new_tensor(scales.each).numpy()
