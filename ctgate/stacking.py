"""Many problems as one, whose batch has a new leading dimension, and its solution taken apart again.

A tensor that all problems share stays one; parameters and buffers that differ are stacked, and the field is
evaluated by ``torch.func.vmap`` over them. Every problem keeps its own times, so one that fails stands still
and the others go on.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctgate.algorithms import FixedStepAlgorithm
from ctgate.controls import Control
from ctgate.controls.sampled import SampledControl
from ctgate.dense import Dense, live_dense
from ctgate.fields import VectorField
from ctgate.guard import Unchanged
from ctgate.problem import ODEProblem
from ctgate.retcode import ReturnCode
from ctgate.run_adjoint import Numbers
from ctgate.sensealg import ForwardSensitivity, InterpolatingAdjoint
from ctgate.solution import Solution
from ctgate.stacked_field import StackedField

# What every module has; hooks are not compared.
_MODULE = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (bool, int, float, str, slice, torch.dtype, torch.device)


def groups(probs: Sequence[ODEProblem]) -> list[list[int]]:
    """Numbers of the problems that :func:`stack` can make one of, in order of first appearance.

    Together go fields of one class, with equal sizes and options and equal shapes of parameters; states of
    one shape; and either one control that all share or sampled controls of one kind.
    """
    found: list[list[int]] = []
    for number, prob in enumerate(probs):
        own = next((members for members in found if _fit(probs[members[0]], prob)), None)
        if own is None:
            found.append([number])
        else:
            own.append(number)
    return found


def stack(probs: Sequence[ODEProblem]) -> ODEProblem:
    """One problem of problems that fit (:func:`groups`), with h0 ``(problem, *batch, state)`` and times per
    sample."""
    h0 = torch.stack([prob.h0 for prob in probs])
    spans = [prob.sample_spans() for prob in probs]
    start, stop = (torch.stack(times) for times in zip(*spans, strict=True))
    field, parameters = _stacked_field(probs)
    control = _stacked_control([prob.control for prob in probs], probs[0].h0.shape[:-1])
    return ODEProblem(field, h0, (start, stop), control, parameters)


def check_sensealg(sensealg: object, stacked: ODEProblem) -> None:
    """Raise ValueError where every sample would carry the parameters of all trajectories along."""
    if isinstance(sensealg, InterpolatingAdjoint | ForwardSensitivity) and isinstance(
        stacked.field, StackedField
    ):
        raise ValueError(
            f"sensealg is {sensealg}, whose equation holds the parameters, and trajectories that do not "
            "share them are solved in one batch; use GaussAdjoint() or ensemble=EnsembleSerial()"
        )


def split(sol: Solution, probs: Sequence[ODEProblem], saves: int) -> list[Solution]:
    """The solution of each problem out of that of ``stack(probs)``, as if each had been solved alone.

    ``saves`` is the number of dimensions of ``saveat``, 0 without it. Each has its own problem, codes and
    dense output; ``stats`` is that of all together.
    """
    return [_part(sol, number, prob, saves) for number, prob in enumerate(probs)]


def own_parameters(prob: ODEProblem, names: Sequence[str]) -> tuple[ODEProblem, dict[str, Tensor]]:
    """The same problem with a copy of the named parameters for every sample, and the copies by name,
    ``(sample, *shape)``, leaves of a new graph: what reaches them are the gradients of single samples.

    For states ``(sample, state)``.
    """
    count = len(prob.h0)
    copies = {
        name: tensor.detach().expand(count, *tensor.shape).requires_grad_()
        for name, tensor in prob.named_parameters().items()
        if name in names
    }
    tensors = {**{name: tensor.detach() for name, tensor in _tensors(prob).items()}, **copies}
    field = StackedField(prob.field, tensors, set(copies), 0, alike=True)
    parameters = dict(zip(field.keys(), tensors.values(), strict=True))
    return ODEProblem(field, prob.h0.detach(), prob.tspan, prob.control, parameters), copies


def _tensors(prob: ODEProblem) -> dict[str, Tensor]:
    """Parameters in force and buffers, by name; those of another dtype than the state stay out."""
    tensors = {**prob.named_parameters(), **dict(prob.field.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.dtype == prob.h0.dtype}


def _fit(one: ODEProblem, other: ODEProblem) -> bool:
    return (
        _alike(one.h0, other.h0)
        and _same_structure(one.field, other.field, one.h0.dtype)
        and _controls_fit(one.control, other.control)
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _same_structure(one: VectorField, other: VectorField, dtype: torch.dtype) -> bool:
    """Whether two fields differ in the values of their parameters and buffers only."""
    if one is other:
        return True
    modules, others = list(one.named_modules()), list(other.named_modules())
    if [(name, type(module)) for name, module in modules] != [
        (name, type(module)) for name, module in others
    ]:
        return False
    for (_, module), (_, twin) in zip(modules, others, strict=True):
        plain, own = (
            {key: value for key, value in vars(m).items() if key not in _MODULE} for m in (module, twin)
        )
        if not _equal(plain, own):
            return False
    tensors, twins = (
        {**dict(field.named_parameters()), **dict(field.named_buffers())} for field in (one, other)
    )
    return tensors.keys() == twins.keys() and all(
        _alike(tensor, twins[name]) and (tensor.dtype == dtype or tensor is twins[name])
        for name, tensor in tensors.items()
    )


def _equal(one: Any, other: Any) -> bool:
    """Equality of options; anything but plain values must be the same object."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return isinstance(one, _PLAIN) and bool(one == other)


def _controls_fit(one: Control | None, other: Control | None) -> bool:
    if one is other:
        return True
    return (
        isinstance(one, SampledControl)
        and isinstance(other, SampledControl)
        and type(one) is type(other)
        and one._hold == other._hold
        and one.channels == other.channels
        and one.resolution == other.resolution
        and (one.xs.dtype, one.xs.device) == (other.xs.dtype, other.xs.device)
    )


def _stacked_field(probs: Sequence[ODEProblem]) -> tuple[VectorField, dict[str, Tensor] | None]:
    first = probs[0]
    columns = [_tensors(prob) for prob in probs]
    tensors: dict[str, Tensor] = {}
    stacked = set()
    for name, tensor in columns[0].items():
        same = all(column[name] is tensor for column in columns)
        tensors[name] = tensor if same else torch.stack([column[name] for column in columns])
        if not same:
            stacked.add(name)
    if not stacked and first.field.autonomous:
        # Such a field takes any leading dimensions.
        return first.field, None if first.parameters is None else dict(first.parameters)
    field = StackedField(first.field, tensors, stacked, first.h0.ndim - 1)
    return field, dict(zip(field.keys(), tensors.values(), strict=True))


def _stacked_control(controls: Sequence[Control | None], batch: torch.Size) -> Control | None:
    """One control of all: the one that all share, or one with a sample for each."""
    first = controls[0]
    if all(control is first for control in controls):
        return first
    sampled = [control for control in controls if isinstance(control, SampledControl)]
    model = sampled[0]
    xs = [control.xs.expand(len(control.xs), *batch, control.channels) for control in sampled]
    rows = max(map(len, xs))
    values = torch.stack([_padded(x, rows, 0.0) for x in xs], dim=1)
    if all(control.shared and control.knots == model.knots for control in sampled):
        times = model.ts
    else:
        own = [_own_times(control, batch) for control in sampled]
        times = torch.stack([_padded(ts, max(map(len, own)), torch.nan) for ts in own], dim=1)
    joint = type(model)(times, values, extrapolate="hold" if model._hold else None)
    # Knots are kept in float64, in whatever precision they came.
    joint.resolution = model.resolution
    return joint


def _own_times(control: SampledControl, batch: torch.Size) -> Tensor:
    """The knots of each sample (knot, *batch), NaN where a sample repeats its last one."""
    knots = control.sample_knots
    repeated = torch.cat([knots[:1].isnan(), knots[1:] <= knots[:-1]])
    times = torch.where(repeated, torch.nan, knots)
    return times.reshape(len(times), *(1,) * (1 + len(batch) - times.ndim), *times.shape[1:]).expand(
        -1, *batch
    )


def _padded(rows: Tensor, count: int, value: float) -> Tensor:
    return torch.cat([rows, rows.new_full((count - len(rows), *rows.shape[1:]), value)])


def _part(sol: Solution, number: int, prob: ODEProblem, saves: int) -> Solution:
    # Alone, all samples of this problem would take the same steps.
    one_clock = isinstance(sol.alg, FixedStepAlgorithm) and not prob.per_sample
    codes = None if sol.retcodes is None else sol.retcodes[number, ...]
    code = sol.retcode
    if codes is not None:
        code = next((own for own in codes.reshape(-1).tolist() if not own.good), ReturnCode.SUCCESS)
    messages = None if sol.messages is None else sol.messages[number, ...]
    message = sol.message
    if codes is not None and messages is not None:
        pairs = zip(codes.reshape(-1).tolist(), messages.reshape(-1).tolist(), strict=True)
        message = next((own for ended, own in pairs if not ended.good), ReturnCode.SUCCESS.message)
    ts, hs = sol.ts if sol.ts.ndim == 1 else sol.ts[:, number], sol.hs[:, number]
    if not saves:
        ts, hs = _without_rest(ts, hs, one_clock)
    if saves == 1 and one_clock:
        reached = ~hs.detach().isnan().reshape(len(hs), -1).any(-1)
        ts, hs = ts[reached], hs[reached]
    unchanged = Unchanged(prob)
    dense = sol.dense
    together = dense.extension if isinstance(dense, Numbers) else dense
    if isinstance(together, Dense):
        nodes, states = _without_rest(together.ts[:, number], together.hs[:, number], one_clock)
        own = live_dense(prob, sol.alg, nodes, states, unchanged)
        dense = Numbers(own, dense.owner) if isinstance(dense, Numbers) else own
    return dataclasses.replace(
        sol,
        ts=ts,
        hs=hs,
        retcode=code,
        message=message,
        prob=prob,
        dense=dense,
        retcodes=None if one_clock else codes,
        messages=None if one_clock else messages,
        unchanged=unchanged,
    )


def _without_rest(ts: Tensor, hs: Tensor, one_clock: bool) -> tuple[Tensor, Tensor]:
    """Nodes without those at the end at which nobody moves; on one clock, at which somebody does not."""
    moves = (ts.detach()[1:] > ts.detach()[:-1]).reshape(len(ts) - 1, ts[0].numel())
    count = 1 + int((moves.all(-1) if one_clock else moves.any(-1)).sum())
    return (_first_column(ts) if one_clock else ts)[:count], hs[:count]


def _first_column(ts: Tensor) -> Tensor:
    return ts.reshape(len(ts), -1)[:, 0]
