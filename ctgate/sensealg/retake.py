"""Steps of which the graph keeps the first state only: they are taken again in the backward pass.

torch's own checkpoint drops what operations save, but its graph keeps a node for each of them, 25 kB for a
step of a GRU. Here a stretch of steps is one node, whatever it is made of. Such a node must name every tensor
that a gradient is to reach, so the graph of the stretch is looked through before it is let go. What the field
captures beyond its parameters shows there, and then stretches are left to torch's checkpoint, which misses
nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from ctgate.guard import Unchanged
from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import Step
from ctgate.integrators.method import Method
from ctgate.integrators.recorder import Keep, Output
from ctgate.integrators.steppers import run_steps
from ctgate.sensealg.probe import computed_from_one_another, distinct, reach_only

# The last state, dh/dt there or None, and the states that are kept.
States = tuple[Any, ...]
Run = Callable[..., States]


class Retaker:
    """Takes the steps of one solve so that they are taken again in the backward pass.

    Gradients reach the state and the slope at the start of a stretch, and whatever the field and the input
    read on it. Second derivatives are those of the same steps; third ones are refused.
    """

    def __init__(self, dynamics: Dynamics, method: Method, keep: Keep) -> None:
        self._dynamics = dynamics
        self._method = method
        self._keep = keep
        self._check = partial(
            Unchanged(dynamics.prob, with_state=True).check,
            "DiscreteAdjoint()",
            "backward() takes the steps again: call it before the update",
        )
        # Whether a stretch can be one node; None before the first one was looked at.
        self._closed: bool | None = None

    def take(
        self, part: Sequence[Step], h: Tensor, slope: Tensor | None
    ) -> tuple[Tensor, Tensor | None, list[Output]]:
        """Take these steps from ``h``; return the last state, dh/dt there where the method has it, and what
        is to be kept of each step.

        Raises (in the backward pass): RuntimeError if a tensor that the steps read was changed since.
        """
        dynamics, method, keep, check = self._dynamics, self._method, self._keep, self._check
        times: list[float | Tensor] = []

        def run(h: Tensor, slope: Tensor | None, steps: list[Step] | None = None) -> States:
            check()
            # As a list: the input is then read by the pieces of the steps, whose coefficients the node names.
            steps = list(part) if steps is None else steps
            last, ahead, outputs = run_steps(dynamics, method, steps, h, slope, keep)
            times[:] = [output.t for output in outputs]
            return last, ahead, *(output.h for output in outputs)

        states = self._as_one_node(part, run, h, slope)
        if states is None:
            states = checkpoint(run, h, slope, use_reentrant=False)
        end, ahead, *kept = states
        return end, ahead, [Output(t, state) for t, state in zip(times, kept, strict=True)]

    def _as_one_node(self, part: Sequence[Step], run: Run, h: Tensor, slope: Tensor | None) -> States | None:
        """The states of a stretch that is one node of the graph; None where it would miss a tensor."""
        if self._closed is False:
            return None
        # Steps may be made when they are looked at, and are then to be made once.
        steps = list(part)
        parameters = self._dynamics.prob.named_parameters().values()
        read = distinct([*parameters, *(c for step in steps for c in step.u.coefficients)])
        if self._closed is None:
            moving = isinstance(steps[0].dt, Tensor) and steps[0].dt.requires_grad
            self._closed = not moving and not computed_from_one_another(read)
            if not self._closed:
                return None
        stretch = _Stretch(run, self._check, read, h.device)
        start, begin = _cut(h), _cut(slope)
        states = run(start, begin, steps)
        self._closed = reach_only(states, [start, begin, *read])
        if not self._closed:
            return None
        values = tuple(None if state is None else state.detach() for state in states)
        still = [state is not None and not state.requires_grad for state in states]
        together: States = _Retaken.apply(stretch, values, still, h, slope, *read)  # type: ignore[no-untyped-call]
        return together


class _Stretch:
    """What it takes to take some steps again: the function that does, the tensors that it reads, and what
    operations depend on besides their arguments, random numbers and autocast, as they are now."""

    def __init__(
        self, run: Run, check: Callable[[], None], read: Sequence[Tensor], device: torch.device
    ) -> None:
        self._run = run
        self.check = check
        self._kind = device.type
        self._random = torch.get_rng_state()
        self._devices, self._states = get_device_states(torch.empty(0, device=device))
        self._autocast = (torch.is_autocast_enabled(self._kind), torch.get_autocast_dtype(self._kind))
        self.read = read

    def pull_back(
        self,
        h: Tensor,
        slope: Tensor | None,
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[bool],
        create_graph: bool = False,
    ) -> list[Tensor | None]:
        """Gradients of the states, weighed by ``cotangents``, by what is wanted of (h, slope, *read)."""
        with self._as_then():
            states = self._run(h, slope)
        return _gradients(states, cotangents, [h, slope, *self.read], wanted, create_graph)

    @contextmanager
    def _as_then(self) -> Iterator[None]:
        enabled, dtype = self._autocast
        with (
            torch.random.fork_rng(self._devices, device_type=self._kind if self._devices else "cuda"),
            torch.autocast(self._kind, dtype=dtype, enabled=enabled),
            torch.enable_grad(),
        ):
            torch.set_rng_state(self._random)
            set_device_states(self._devices, self._states, device_type=self._kind)
            yield


class _Retaken(torch.autograd.Function):
    """A stretch of steps as one node: the states are there, the steps are taken again for their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        stretch: _Stretch,
        values: States,
        still: Sequence[bool],
        h: Tensor,
        slope: Tensor | None,
        *read: Tensor,
    ) -> States:
        ctx.stretch = stretch
        ctx.save_for_backward(h, slope)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(v for v, fixed in zip(values, still, strict=True) if fixed))
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        ctx.stretch.check()
        h, slope = ctx.saved_tensors
        tensors = (h, slope, *ctx.stretch.read, *cotangents)
        gradients = _Pullback.apply(ctx.stretch, ctx.needs_input_grad[3:], *tensors)  # type: ignore[no-untyped-call]
        return None, None, None, *gradients


class _Pullback(torch.autograd.Function):
    """The gradients of a stretch, a function that can be differentiated once more."""

    @staticmethod
    def forward(ctx: Any, stretch: _Stretch, wanted: Sequence[bool], *tensors: Tensor | None) -> Any:
        ctx.stretch, ctx.wanted = stretch, wanted
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        start, begin = map(_cut, tensors[:2])
        return tuple(stretch.pull_back(start, begin, tensors[2 + len(stretch.read) :], wanted))

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "DiscreteAdjoint(checkpoints=...) has no third derivatives (create_graph=True in a second "
                "one); leave checkpoints out"
            )
        stretch: _Stretch = ctx.stretch
        tensors = ctx.saved_tensors
        first, last = 2, 2 + len(stretch.read)
        inputs = [*map(_cut, tensors[:first]), *stretch.read, *map(_cut, tensors[last:])]
        gradients = stretch.pull_back(inputs[0], inputs[1], inputs[last:], ctx.wanted, create_graph=True)
        found = _gradients(gradients, tangents, inputs, ctx.needs_input_grad[2:])
        return None, None, *found


def _gradients(
    outputs: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    inputs: Sequence[Any],
    wanted: Sequence[bool],
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Gradients of the outputs, weighed, by the inputs that are wanted; None where there is none."""
    weighed = [
        (output, weight)
        for output, weight in zip(outputs, weights, strict=True)
        if output is not None and weight is not None and output.requires_grad
    ]
    asked = [k for k, want in enumerate(wanted) if want]
    result: list[Tensor | None] = [None] * len(inputs)
    if weighed and asked:
        found = torch.autograd.grad(
            [output for output, _ in weighed],
            [inputs[k] for k in asked],
            [weight for _, weight in weighed],
            # A tensor that the field computed once and for all has a graph that the next stretch needs too.
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        for k, gradient in zip(asked, found, strict=True):
            result[k] = gradient
    return result


def _cut(tensor: Tensor | None) -> Any:
    """The same values as a leaf."""
    return None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)
