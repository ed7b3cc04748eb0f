r"""The gradient of every sample's own loss, all samples at once."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ctgate.algorithms import Algorithm, Euler, ScipyAlgorithm
from ctgate.controls.times import FLOAT64_EPS, rounding_of
from ctgate.integrators.dynamics import beside
from ctgate.integrators.grid import time_resolution
from ctgate.kernels import Linearization
from ctgate.problem import ODEProblem, remake
from ctgate.sensitivity.loss import Loss, Slope, quadrature
from ctgate.solution import Solution
from ctgate.solve import solve
from ctgate.stacking import own_parameters

Rows = dict[str, Tensor]
# State variables in one call of the field on a piece of the trajectory: tens of megabytes of intermediates.
_CALL = 2**20


def per_sample_gradients(
    prob: ODEProblem,
    loss: Loss,
    alg: Algorithm,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> Rows:
    r"""The gradient :math:`g_i = \partial L_i / \partial\theta` of every sample's loss.

    No loop goes over samples, and the rows are exact gradients of the numerical solution. ``Euler`` has a
    reverse loop over its steps of its own, on all samples,

    .. math:: a_k = a_{k+1} + dt_k A_k^\top a_{k+1} + \frac{\partial L}{\partial h_k}, \qquad
              g_i = \sum_k dt_k\, B_{k,i}^\top a_{k+1,i},

    whose products with :math:`B^\top` are kept by sample. Any other method is solved with a copy of the
    parameters for every sample (``torch.func.vmap`` over them in the field), so that reverse differentiation
    leaves the rows in the copies; samples share its steps as they do without copies.

    Parameters:
        prob: the problem, states ``(sample, state)``. Its graph is not followed.
        loss: costs that return one number per sample, ``(sample,)``, each of its own sample's state only.
        alg: a method that gradients pass.
        rtol, atol: as for :func:`ctgate.solve`.

    Returns: ``(sample, *shape)`` by parameter, those of the field that require grad, then those of the
        readout as ``readout.<name>``.

    Raises: TypeError for parts of the wrong kind, or a readout that vmap does not pass; ValueError for states
        without a batch of one dimension, nothing that requires grad, a cost that is not one number per
        sample, scipy's methods, or, with Euler, a time of ``at`` between two steps; SolveError if the solve
        fails.

    Source: THEORY.md 16.
    """
    _check(prob, loss, alg)
    field = [name for name, tensor in prob.named_parameters().items() if tensor.requires_grad]
    own = loss_of_samples(loss, len(prob.h0))
    readout = own.readout
    if not field and (readout is None or not list(readout.parameters())):
        raise ValueError("per_sample_gradients: no parameter of the field or of the readout requires grad")
    if isinstance(alg, Euler):
        with torch.no_grad():
            sol = solve(remake(prob, h0=prob.h0.detach()), alg, rtol=rtol, atol=atol, throw=True)
            rows, seen = _by_reverse_loop(sol, own, field)
    else:
        with torch.enable_grad():
            stacked, copies = own_parameters(prob, field)
            sol = solve(stacked, alg, rtol=rtol, atol=atol, throw=True)
            rows, seen = _by_copies(own(sol), copies, readout)
    if isinstance(readout, OwnReadout):
        rows |= {f"readout.{readout.names[key]}": row for key, row in seen.items()}
    return rows


class OwnReadout(nn.Module):
    """A readout with a copy of its parameters for every sample: ``(sample, *shape)``, under the names p0, p1,
    ... of ``names``, those of the readout's that require grad."""

    def __init__(self, readout: nn.Module, count: int) -> None:
        super().__init__()
        # In a tuple, so that the readout's own parameters are not taken for this module's.
        self._template = (readout,)
        wanted = [(name, p) for name, p in readout.named_parameters() if p.requires_grad]
        self.names = {f"p{number}": name for number, (name, _) in enumerate(wanted)}
        for key, (_, parameter) in zip(self.names, wanted, strict=True):
            self.register_parameter(key, nn.Parameter(parameter.detach().expand(count, *parameter.shape)))

    def forward(self, h: Float[Tensor, "sample hidden"]) -> Tensor:
        """What the readout makes of every sample with that sample's parameters."""
        template = self._template[0]
        own: Rows = {self.names[key]: parameter for key, parameter in self.named_parameters()}

        def read(parameters: Rows, one: Tensor) -> Tensor:
            value: Tensor = functional_call(template, parameters, (one.unsqueeze(0),))
            return value.squeeze(0)

        try:
            seen: Tensor = vmap(read, in_dims=(0 if own else None, 0))(own, h)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise TypeError(
                "for gradients of single samples the readout is evaluated under torch.func.vmap, which does "
                f"not pass through {type(template).__name__}: {error}"
            ) from error
        return seen


def loss_of_samples(loss: Loss, count: int) -> Loss:
    """The same loss with a copy of the readout's parameters for each of ``count`` samples, whose costs raise
    ValueError unless they return one number per sample."""

    def checked(name: str, cost: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def one_each(*args: Any) -> Tensor:
            value = cost(*args)
            if not isinstance(value, Tensor) or value.shape != (count,):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"Loss({name}=...): the cost returned {shape}; for gradients of single samples it must "
                    f"return one number per sample, ({count},), not their sum or mean"
                )
            return value

        return one_each

    terminal = None if loss.terminal is None else checked("terminal", loss.terminal)
    running = None if loss.running is None else checked("running", loss.running)
    at = None if loss.at is None else (loss.at[0], checked("at", loss.at[1]))
    readout = None if loss.readout is None else OwnReadout(loss.readout, count)
    return dataclasses.replace(loss, terminal=terminal, running=running, at=at, readout=readout)


def _check(prob: object, loss: object, alg: object) -> None:
    for name, value, kind in (
        ("prob", prob, ODEProblem), ("loss", loss, Loss), ("alg", alg, Algorithm),
    ):  # fmt: skip
        if not isinstance(value, kind):
            raise TypeError(
                f"per_sample_gradients: {name} is {type(value).__name__}; it must be a ct.{kind.__name__}"
            )
    assert isinstance(prob, ODEProblem)
    if isinstance(alg, ScipyAlgorithm):
        raise ValueError(f"per_sample_gradients: alg is {alg}, which gradients do not pass; use a native one")
    if prob.h0.ndim != 2:
        raise ValueError(
            f"per_sample_gradients: h0 has shape {tuple(prob.h0.shape)}; it must be (sample, state)"
        )


def _by_copies(total: Tensor, copies: Rows, readout: nn.Module | None) -> tuple[Rows, Rows]:
    seen = {} if readout is None else dict(readout.named_parameters())
    rows = torch.autograd.grad(total, [*copies.values(), *seen.values()], materialize_grads=True)
    count = len(copies)
    return dict(zip(copies, rows[:count], strict=True)), dict(zip(seen, rows[count:], strict=True))


def _by_reverse_loop(sol: Solution, loss: Loss, names: list[str]) -> tuple[Rows, Rows]:
    assert sol.prob is not None
    direct, seen = direct_slopes(sol, loss)
    weights = reverse_weights(sol, direct)
    rows = parameter_rows(sol, weights)
    return {name: rows[name] for name in names}, seen


def direct_slopes(sol: Solution, loss: Loss) -> tuple[Tensor, Rows]:
    """dL/dh at every node of an Euler solution, ``(node, *batch, state)``, as the costs see it without any
    dynamics, and the gradient by the readout's parameters."""
    out = sol.output_slice
    direct = torch.zeros_like(sol.hs)
    seen: Rows = {}

    def add(slope: Slope) -> Tensor:
        for name, row in slope.readout.items():
            seen[name] = seen[name] + row if name in seen else row
        return slope.state

    if loss.terminal is not None:
        direct[-1] += add(loss.terminal_slope(sol.hs[-1], out))
    for k, time in enumerate(loss.times.to(sol.ts.device)):
        node = _node(sol.ts, time, k).expand(sol.hs.shape[1:-1])
        index = node[None, ..., None].expand(1, *sol.hs.shape[1:])
        h = sol.hs.gather(0, index)[0]
        direct.scatter_add_(0, index, add(loss.slope_at(k, h, out))[None])
    if loss.running is not None:
        for k, (t, h, weight) in enumerate(quadrature(sol)):
            cost, size = loss.running, weight.to(h.dtype)

            def share(y: Tensor, t: Tensor = t, cost: Any = cost, size: Tensor = size) -> Tensor:
                value: Tensor = size * cost(t, y)
                return value

            direct[k] += add(loss.slope(share, h, out))
    return direct, seen


def _node(ts: Tensor, time: Tensor, k: int) -> Tensor:
    """The number of the node at a time, one for each sample where they have their own."""
    distance = (ts - time).abs()
    near, node = distance.min(0)
    if not bool((near <= rounding_of(time, FLOAT64_EPS)).all()):
        raise ValueError(
            f"Loss(at=...): times[{k}] is {time.tolist()}, which is between two steps of Euler; its states "
            "are those at the ends of its steps"
        )
    return node


def reverse_weights(sol: Solution, direct: Tensor) -> Tensor:
    r""":math:`dt_k a_{k+1}` of every step of an Euler solution, ``(step, *batch, state)``, from dL/dh without
    dynamics at every node: what :math:`B_k^\top` is to be multiplied with."""
    assert sol.prob is not None
    prob = sol.prob
    sizes = step_sizes(sol)
    us = None if prob.control is None else prob.control(sol.ts[:-1])
    weights = torch.empty_like(sol.hs[:-1])
    a = direct[-1]
    for k in range(len(sizes) - 1, -1, -1):
        weights[k] = sizes[k] * a
        at = prob.call("linearize", beside(sol.ts[k]), sol.hs[k], None if us is None else us[k])
        a = a + at.vjp(weights[k]) + direct[k]
    return weights


def step_sizes(sol: Solution) -> Tensor:
    """The steps that Euler took, shaped to multiply states: ``(step, ..., 1)``."""
    assert sol.prob is not None
    assert isinstance(sol.alg, Euler)
    ts, dt = sol.ts.detach(), sol.alg.dt
    # As the solver has it: a step within rounding of dt is dt.
    reach = torch.maximum(ts[:-1].abs(), ts[1:].abs()).clamp(min=dt)
    slack = rounding_of(reach, time_resolution(sol.prob.control)).clamp(max=1e-3 * dt)
    sizes = ts.diff(dim=0)
    sizes = torch.where((sizes - dt).abs() <= slack, dt, sizes).to(sol.hs.dtype)
    return sizes.reshape(*sizes.shape, *(1,) * (sol.hs.ndim - sizes.ndim))


def parameter_rows(sol: Solution, weights: Tensor) -> Rows:
    """The sum over steps of B_k^T weights_k, by name, ``(*batch, *shape)``."""
    keep = sol.hs.ndim - 2
    rows: Rows = {}
    for piece, at in _linearizations(sol):
        for name, row in at.parameter_vjp(weights[piece], keep=keep).items():
            rows[name] = rows[name] + row if name in rows else row
    return rows


def _linearizations(sol: Solution) -> Iterator[tuple[slice | int, Linearization]]:
    """The field around the start of every step: many steps at once where it does not read the time."""
    assert sol.prob is not None
    prob, starts, states = sol.prob, sol.ts[:-1], sol.hs[:-1]
    control = prob.control
    if not prob.field.autonomous:
        for k, (t, h) in enumerate(zip(starts, states, strict=True)):
            u = None if control is None else control(starts[k : k + 1])[0]
            yield k, prob.call("linearize", beside(t), h, u)
        return
    length = max(1, _CALL // max(1, states[0].numel()))
    for first in range(0, len(starts), length):
        piece = slice(first, first + length)
        us = None
        if control is not None:
            us = control(starts[piece])
            us = us.reshape(len(us), *(1,) * (states.ndim - us.ndim), *us.shape[1:])
        yield piece, prob.call("linearize", 0.0, states[piece], us)
