r"""The gradient of every sample's own loss, all samples at once."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ctgate.algorithms import Algorithm, Euler, ScipyAlgorithm
from ctgate.problem import ODEProblem, remake
from ctgate.sensitivity.injections import at_nodes, explicit
from ctgate.sensitivity.loss import Loss
from ctgate.sensitivity.propagators import nodes_of
from ctgate.sensitivity.reverse_map import in_one_piece, pull_back
from ctgate.solution import Solution
from ctgate.solve import solve
from ctgate.stacking import own_parameters

Rows = dict[str, Tensor]


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
    parameters for every sample, so that reverse differentiation leaves the rows in the copies; samples share
    its steps as they do without copies. ``ExponentialEuler`` of a gated cell, and ``Euler`` where all its
    steps are few enough, then take steps and derivatives with the one cell that all copies are. Other fields
    and methods go by ``torch.func.vmap`` over the copies, which takes the memory of the rows, and of what is
    kept for the reverse pass, several times over.

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
    if isinstance(alg, Euler) and not in_one_piece(prob, alg):
        with torch.no_grad():
            sol = solve(remake(prob, h0=prob.h0.detach()), alg, rtol=rtol, atol=atol, throw=True)
            rows, seen = _by_reverse_loop(sol, own, field)
    else:
        with torch.enable_grad():
            stacked, copies = own_parameters(prob, field)
            sol = solve(stacked, alg, rtol=rtol, atol=atol, throw=True)
            by = _by_nodes if isinstance(alg, Euler) else _by_copies
            rows, seen = by(sol, own, copies)
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


def _by_copies(sol: Solution, loss: Loss, copies: Rows) -> tuple[Rows, Rows]:
    seen = {} if loss.readout is None else dict(loss.readout.named_parameters())
    rows, count = _reached(loss(sol), [*copies.values(), *seen.values()]), len(copies)
    return dict(zip(copies, rows[:count], strict=True)), dict(zip(seen, rows[count:], strict=True))


def _by_nodes(sol: Solution, loss: Loss, copies: Rows) -> tuple[Rows, Rows]:
    with torch.no_grad():
        direct, seen = _slopes(sol, loss)
    rows = _reached(sol.hs, list(copies.values()), direct)
    return dict(zip(copies, rows, strict=True)), seen


def _by_reverse_loop(sol: Solution, loss: Loss, names: list[str]) -> tuple[Rows, Rows]:
    direct, seen = _slopes(sol, loss)
    rows = pull_back(sol, direct, by_sample=True).parameters
    return {name: rows[name] for name in names}, seen


def _slopes(sol: Solution, loss: Loss) -> tuple[Tensor, Rows]:
    given, seen = explicit(sol, loss)
    return at_nodes(sol, nodes_of(sol), given), seen


def _reached(value: Tensor, leaves: list[Tensor], slope: Tensor | None = None) -> Sequence[Tensor]:
    if not value.requires_grad:  # It sees nothing of them.
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(value, leaves, slope, materialize_grads=True)
