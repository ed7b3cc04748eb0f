"""Explicit Runge-Kutta steps between states that are known, as one node of the graph.

The node keeps the states, and of adaptive steps the input at the stages where that takes less room. Its
backward pass takes the steps again on the buffers of a fused cell, several side by side, and pulls the
cotangents back through their stages. The slope at the end of a step, which the next one begins with, is a
function of the state there, so steps depend on one another through the states alone.

Where the gradient is itself to be differentiated the steps are taken again by plain operations that autograd
follows: second and higher derivatives are right, and cost the memory of all stages. THEORY.md 8 and 19.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ctgate.controls.sampled import SampledControl
from ctgate.guard import Unchanged
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.fused_runge_kutta import FusedAttempts, inputs_at
from ctgate.integrators.fused_stages import Reverse
from ctgate.integrators.grid import Step
from ctgate.integrators.method import moving
from ctgate.integrators.recorder import Keep, Output, Rows, every_node, kept_of
from ctgate.integrators.runge_kutta import Tableau, explicit_stages
from ctgate.integrators.stretches import fusable, transformed
from ctgate.kernels.fused.cell import Gradients
from ctgate.problem import Method, ODEProblem

# Numbers in the states of the stages that a backward pass takes at once.
_CACHED = 131072


def known_steps(
    dynamics: Dynamics,
    tableau: Tableau,
    steps: Sequence[Step],
    h: Tensor,
    states: Tensor,
    inputs: Sequence[Tensor] = (),
) -> Tensor | None:
    """The states after these steps from ``h``, (step, *batch, state), whose values ``states`` are, with a
    graph to all that they depend on; None where a node would miss some of it: a function of time as the input
    that wants a gradient, times that do. ``inputs`` are those at the stages of each step, (stage, sample,
    channel), or none: then they are looked up again.

    Raises (in the backward pass): RuntimeError if a tensor that the steps read was changed since.
    """
    prob = dynamics.prob
    if not len(steps):
        return states
    seen = _input_with_graph(prob, steps)
    if seen is None or (isinstance(steps[0].dt, Tensor) and steps[0].dt.requires_grad):
        return None
    named = prob.named_parameters()
    check = partial(
        Unchanged(prob, with_state=True).check,
        "DiscreteAdjoint()",
        "backward() takes the steps again: call it before the update",
    )
    taken = Taken(prob, without_last(tableau), steps, tuple(named), dynamics.count, check, inputs)
    us = inputs_at(steps, taken.tableau.c, prob.h0.shape[:-1]) if seen else None
    flat = states.reshape(len(states), -1, states.shape[-1])
    h0 = h.reshape(flat.shape[1:])
    nodes: Tensor = _Known.apply(taken, [flat], us, h0, *named.values())  # type: ignore[no-untyped-call]
    return nodes.view_as(states)


def take_stages(
    dynamics: Dynamics, tableau: Tableau, steps: Sequence[Step], h: Tensor, keep: Keep
) -> tuple[Tensor, Sequence[Output]] | None:
    """Take these steps from ``h``; return the last state and what ``keep`` wants of each step, or None where
    they are left to plain ones: besides other fields, where states are not finite."""
    prob = dynamics.prob
    if len(steps) < 2 or transformed() or not fusable(prob):
        return None
    steps, followed = list(steps), torch.is_grad_enabled()
    attempts = FusedAttempts(prob, without_last(tableau))
    with torch.no_grad():
        rows = [h.detach()]
        for step in steps:
            rows.append(attempts.end(step, rows[-1]))
    if not bool(torch.isfinite(rows[-1]).all()):
        return None
    values = torch.stack(rows[1:])
    states = known_steps(dynamics, tableau, steps, h, values) if followed else values
    if states is None:
        return None
    dynamics.count(len(steps) * attempts.tableau.stages)
    return states[-1].clone(), outputs_of(steps, h, states, keep)


def outputs_of(steps: Sequence[Step], h0: Tensor, states: Tensor, keep: Keep) -> Sequence[Output]:
    """What ``keep`` wants of these steps, from ``h0`` to each of the ``states`` (step, *batch, state)."""
    if keep is every_node:
        return Rows([step.stop for step in steps], states)
    return kept_of(((step.start, step.stop, step.u) for step in steps), h0, states, keep)


def without_last(tableau: Tableau) -> Tableau:
    """The same method without a stage at the end of the step."""
    if not tableau.first_same_as_last:
        return tableau
    return replace(tableau, c=tableau.c[:-1], a=tableau.a[:-1], b=tableau.a[-1], error=(), bubble=())


def _input_with_graph(prob: ODEProblem, steps: Sequence[Step]) -> bool | None:
    """Whether a gradient wants to pass the input; None where that is not a matter of samples."""
    if prob.control is None:
        return False
    if isinstance(prob.control, SampledControl):
        return any(coefficient.requires_grad for step in steps for coefficient in step.u.coefficients)
    pieces = {id(step.u): step for step in steps}.values()
    return None if any(u is not None and u.requires_grad for u in (s.u(s.start) for s in pieces)) else False


@dataclass(frozen=True, eq=False)
class Taken:
    """Steps that were taken, of which problem and method, and the names of the problem's parameters;
    ``count`` notes evaluations, ``check`` raises where a tensor was changed since; ``seen`` is the input at
    the stages of each step, where it was kept."""

    prob: ODEProblem
    tableau: Tableau
    steps: Sequence[Step]
    names: tuple[str, ...]
    count: Callable[[int], None]
    check: Callable[[], None]
    seen: Sequence[Tensor] = ()

    def inputs(self, which: slice) -> Tensor | None:
        """u at the stages of some steps, as :func:`inputs_at` gives it."""
        if self.seen:
            return torch.stack([us[: self.tableau.stages] for us in self.seen[which]])
        return inputs_at(self.steps[which], self.tableau.c, self.prob.h0.shape[:-1])

    def sizes(self, which: slice) -> Sequence[float] | Tensor:
        """Sizes of some steps, numbers, or (step, sample)."""
        sizes = [step.dt for step in self.steps[which]]
        if isinstance(sizes[0], Tensor):
            return torch.stack([dt.reshape(-1) for dt in sizes if isinstance(dt, Tensor)])
        return [float(dt) for dt in sizes]

    def before(self, which: slice, h0: Tensor, states: Tensor) -> Tensor:
        """The states (step, sample, state) that some steps start from."""
        start, stop = which.start, which.stop
        rows = states[start - 1 : stop - 1] if start else torch.cat((h0[None], states[: stop - 1]))
        steps = self.steps[which]
        if all(step.standing is None for step in steps):
            return rows
        return torch.stack([moving(step, h) for step, h in zip(steps, rows.unbind(0), strict=True)])

    def plain(self, us: Tensor | None, h: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The states after the steps by plain operations, (step, sample, state)."""
        count, method = self.tableau.stages, Method(self.prob.field, "forward")
        overrides = {f"field.{name}": value for name, value in zip(self.names, parameters, strict=True)}
        states = []
        for k, step in enumerate(self.steps):
            own = self.inputs(slice(k, k + 1)) if us is None else us[k : k + 1]
            seen: Sequence[Tensor | None] = [None] * count
            if own is not None:
                seen = own[0].expand(count, -1, -1).unbind(0)
            rhs = partial(_evaluate, method, overrides, iter(seen))
            size = self.sizes(slice(k, k + 1))[0]
            following = explicit_stages(self.tableau, rhs, 0.0, size, moving(step, h))[0]
            if step.standing is not None:
                following = torch.where(step.standing.reshape(-1, 1), h, following)
            states.append(following)
            h = following
        self.count(count * len(self.steps))
        return torch.stack(states)


def _evaluate(
    method: Method, overrides: dict[str, Tensor], us: Iterator[Tensor | None], t: object, h: Tensor
) -> Tensor:
    slope: Tensor = functional_call(method, overrides, (0.0, h, next(us)))
    return slope


class _Known(torch.autograd.Function):
    """States that are known, and where they come from."""

    @staticmethod
    def forward(
        ctx: Any, taken: Taken, values: list[Tensor], us: Tensor | None, h0: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.taken = taken
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(us, h0, values[0], *parameters)
        return values[0]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> Any:
        if cotangent is None:
            return (None,) * len(ctx.needs_input_grad)
        ctx.taken.check()
        us, h0, states, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(cotangent):
            return None, None, *_plain_gradients(ctx.taken, cotangent, wanted, us, h0, *parameters)
        start, found, inputs = pull_back(
            ctx.taken, cotangent, us, h0, states, parameters, any(wanted[2:]), wanted[0]
        )
        return None, None, inputs, start, *(found.get(name) for name in ctx.taken.names)


def pull_back(
    taken: Taken,
    cotangent: Tensor,
    us: Tensor | None,
    h0: Tensor,
    states: Tensor,
    parameters: Sequence[Tensor],
    wants_parameters: bool,
    wants_input: bool,
) -> tuple[Tensor, Gradients, Tensor | None]:
    """The cotangents of the first state, of the parameters and of the input from those of ``states`` (step,
    sample, state)."""
    tableau, count = taken.tableau, len(states)
    cell = taken.prob.field.fuse(dict(zip(taken.names, parameters, strict=True)))
    a = torch.cat((torch.zeros_like(h0)[None], cotangent))
    size = max(1, _CACHED // max(1, tableau.stages * h0.numel()))
    total: Gradients = {}
    rows = []
    reverse: Reverse | None = None
    for stop in range(count, 0, -size):
        which = slice(max(0, stop - size), stop)
        steps = stop - which.start
        if reverse is None or reverse.steps != steps:
            reverse = Reverse(cell, tableau, steps, h0)
        own = taken.inputs(which) if us is None else us[which]
        if own is not None:
            own = own.expand(-1, tableau.stages, -1, -1).transpose(0, 1).flatten(1, 2)
        before = taken.before(which, h0, states)
        reverse.pull(before, taken.sizes(which), own, a[which.start : stop + 1])
        if not wants_parameters and not wants_input:
            continue
        found, inputs = reverse.sums(wants_input)
        for name, sum_of_steps in found.items():
            if name in total:
                total[name] += sum_of_steps
            else:
                total[name] = sum_of_steps
        if inputs is not None and us is not None:
            opened = inputs.view(tableau.stages, steps, len(h0), -1).transpose(0, 1)
            rows.append(opened.sum(1, keepdim=True) if us.shape[1] == 1 else opened)
    taken.count(tableau.stages * count)
    found = cell.named(total) if total else {}
    return a[0], found, torch.cat(rows[::-1]) if rows else None


def _plain_gradients(
    taken: Taken, cotangent: Tensor, wanted: Sequence[bool], *tensors: Tensor | None
) -> list[Tensor | None]:
    """The gradients as functions of the tensors and of the cotangent, by plain operations."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One may be made from another, whose gradient is not to count what passes by way of it.
        own: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        states = taken.plain(own[0], own[1], own[2:])
    asked = [k for k, want in enumerate(wanted) if want]
    found = torch.autograd.grad(
        states, [own[k] for k in asked], cotangent, create_graph=create_graph, allow_unused=True
    )
    result: list[Tensor | None] = [None] * len(own)
    for k, gradient in zip(asked, found, strict=True):
        result[k] = gradient
    return result
