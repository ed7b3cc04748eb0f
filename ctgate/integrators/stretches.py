"""Steps of one evaluation each, many at a time, where the field has a fused cell.

The states are those of the plain steps to rounding. Whatever the fused cell does not know is left to them:
other fields and dtypes, forward-mode derivatives, autocast, and states that are not finite, which end a solve
by rules of their own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from ctgate.controls import ZeroOrderHold
from ctgate.controls.base import concrete
from ctgate.fields import Stack, VectorField
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.exponential import relax
from ctgate.integrators.grid import FixedSteps, Step
from ctgate.integrators.recorder import Keep, Output, Rows, every_node, kept_of
from ctgate.kernels.fused import Rule, Stretch
from ctgate.kernels.switch import fast_paths
from ctgate.problem import Method, ODEProblem

# Numbers that the evaluations of a stretch may keep, about, and the most steps.
_ROOM, _STEPS = 2**24, 1024


def longest(prob: ODEProblem) -> int:
    """How many steps are taken together."""
    weights = (p for name, p in prob.field.named_parameters() if name.endswith("weight_hh"))
    rows = next(weights).shape[-2]
    return max(1, min(_STEPS, _ROOM // max(1, 2 * rows * prob.h0[..., 0].numel())))


def fusable(prob: ODEProblem) -> bool:
    """Whether a problem's field can be evaluated by its fused cell here and now."""
    return prob.field.fusable and _ready(prob)


def unrolls(prob: ODEProblem) -> bool:
    """Whether many steps of one evaluation can be taken together here and now."""
    return prob.field.unrolls and _ready(prob)


def _ready(prob: ODEProblem) -> bool:
    kind = prob.h0.device.type
    return (
        fast_paths()
        and prob.h0.dtype in (torch.float32, torch.float64)
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled(kind)
    )


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def take_fused(
    dynamics: Dynamics, rule: Rule, steps: Sequence[Step], h: Tensor, keep: Keep
) -> tuple[Tensor, Sequence[Output]] | None:
    """Take these steps from ``h``; return the last state and what ``keep`` wants of each step, or None where
    they are left to the plain ones."""
    prob, field = dynamics.prob, dynamics.prob.field
    if len(steps) < 2 or not unrolls(prob):
        return None
    ends, dts, own = _sizes(steps, h)
    if isinstance(field, Stack) and not _discrete(field, rule, dts):
        return None
    us = _inputs(prob, steps, ends, h)
    flat, named = h.reshape(-1, h.shape[-1]), prob.named_parameters()
    if isinstance(field, Stack):
        states = _layer_by_layer(field, rule, dts, us, flat, named)
    else:
        states = _unroll(field, rule, dts, us, flat, own, named)
    # What is not finite once stays so.
    if concrete(torch.isfinite(states[-1].detach()).all()) == 0.0:
        return None
    dynamics.count(len(steps))
    states = states.view(len(states), *h.shape)
    if keep is every_node:
        return states[-1], Rows([stop for _, stop in ends], states[1:], states)
    spans = ((start, stop, None) for start, stop in ends)
    return states[-1].clone(), kept_of(spans, h, states[1:], keep)


def _unroll(
    field: VectorField,
    rule: Rule,
    dts: Sequence[float] | None,
    us: Tensor | None,
    h: Tensor,
    own: Tensor | None,
    named: Mapping[str, Tensor],
) -> Tensor:
    """The states (step + 1, sample, state) of one layer, with the parameters ``named``."""
    stretch = Stretch(field.fuse, tuple(named), rule, dts, PlainSteps(field, rule, dts))
    return field.unroll(stretch, us, h, own, list(named.values()))


def _discrete(stack: Stack, rule: Rule, dts: Sequence[float] | None) -> bool:
    """Whether these steps are those of a stack of discrete cells: then a layer reads the states that the one
    below has reached, and all steps of one layer come before those of the next."""
    if rule.exponential or dts is None or any(dt != dts[0] for dt in dts):
        return False
    taus = [layer.tau for layer, _, _ in stack.parts()]
    return all(
        tau is not None
        and tau.ndim == 0
        and not tau.requires_grad
        and tau.item() == torch.tensor(dts[0], dtype=tau.dtype).item()
        for tau in taus
    )


def _layer_by_layer(
    stack: Stack,
    rule: Rule,
    dts: Sequence[float] | None,
    us: Tensor | None,
    h: Tensor,
    named: Mapping[str, Tensor],
) -> Tensor:
    """The states of all layers, (step + 1, sample, state)."""
    states: list[Tensor] = []
    for layer, prefix, part in stack.parts():
        own = {name: named[prefix + name] for name, _ in layer.named_parameters()}
        states.append(_unroll(layer, rule, dts, us, h[..., part], None, own))
        us = states[-1][1:, ..., layer.output]
    return torch.cat(states, -1)


def _sizes(
    steps: Sequence[Step], h: Tensor
) -> tuple[list[tuple[Any, Any]], list[float] | None, Tensor | None]:
    """The ends of the steps, and their sizes as numbers or as a tensor (step, sample)."""
    if isinstance(steps, FixedSteps):
        return steps.ends(), steps.sizes(), None
    ends = [(step.start, step.stop) for step in steps]
    if not isinstance(steps[0].dt, Tensor):
        return ends, [float(step.dt) for step in steps], None
    own = [torch.as_tensor(step.dt, dtype=h.dtype, device=h.device) for step in steps]
    return ends, None, torch.stack([size.expand(h.shape[:-1]).reshape(-1) for size in own])


def _inputs(
    prob: ODEProblem, steps: Sequence[Step], ends: Sequence[tuple[Any, Any]], h: Tensor
) -> Tensor | None:
    """u at the start of each step, (step, sample, channel)."""
    if prob.control is None:
        return None
    us = None
    if isinstance(steps, FixedSteps):
        starts = [start for start, _ in ends]
        if isinstance(prob.control, ZeroOrderHold):
            us = prob.control.held_from(starts)
        if us is None:
            times = torch.tensor(starts, dtype=torch.float64, device=h.device)
            us = prob.control(times, "right")
    else:
        us = torch.stack([u for step in steps if (u := step.u(step.start)) is not None])
    batch = h.shape[:-1]
    us = us.reshape(len(us), *(1,) * (len(batch) + 2 - us.ndim), *us.shape[1:])
    return us.expand(len(us), *batch, us.shape[-1]).reshape(len(us), -1, us.shape[-1])


class PlainSteps:
    """The same steps by plain operations, which higher derivatives are made of."""

    def __init__(self, field: VectorField, rule: Rule, dts: Sequence[float] | None) -> None:
        self._field, self._rule, self._dts = field, rule, dts

    def __call__(
        self, named: Mapping[str, Tensor], us: Tensor | None, h0: Tensor, dts: Tensor | None
    ) -> Tensor:
        """The states (step + 1, sample, state)."""
        sizes: Sequence[Any] = self._dts if dts is None else dts.unsqueeze(-1)  # type: ignore[assignment]
        method = Method(self._field, "rate_drive")
        overrides = {f"field.{name}": value for name, value in named.items()}
        states = [h0]
        for k in range(len(sizes)):
            h = states[-1]
            rate, drive = functional_call(method, overrides, (0.0, h, None if us is None else us[k]))
            if self._rule.exponential:
                states.append(relax(h, rate, drive, sizes[k]))
            else:
                states.append(h + sizes[k] * (drive - rate * h))
        return torch.stack(states)
