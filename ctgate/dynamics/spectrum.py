r"""Spectra of Jacobians, of flows and of maps, at states and along trajectories."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from ctgate.algorithms import Euler
from ctgate.dense import arguments
from ctgate.dynamics.modes import Modes, attributes, check_field, step_of
from ctgate.fields import Jacobian, VectorField
from ctgate.problem import ODEProblem
from ctgate.sensitivity.labels import label, time_coordinate
from ctgate.solution import Solution, known_times
from ctgate.storage.dataset import array, batch_dims

_Arguments = tuple[float | Tensor, Tensor, Tensor | None]
# Entries of the Jacobians that are held at once.
_ENTRIES = 2**24


@torch.no_grad()
def jacobian_spectrum(
    field: VectorField,
    h: Float[Tensor, "*batch state"] | Solution,
    u: Float[Tensor, "*#batch channel"] | None = None,
    alg: Euler | None = None,
    *,
    t: float = 0.0,
    progress: bool = False,
) -> xr.Dataset:
    r"""The eigenvalues of the Jacobian at given states: :math:`\lambda` of that of dh/dt for the flow,
    :math:`\mu = 1 + dt\,\lambda` for the Euler map, with their time constants and periods

    .. math:: T = -\frac{1}{\mathrm{Re}\,\lambda} \;\text{ or }\; -\frac{dt}{\log|\mu|}, \qquad
              P = \frac{2\pi}{|\mathrm{Im}\,\lambda|} \;\text{ or }\; \frac{2\pi\,dt}{|\arg\mu|} .

    Caution: away from a fixed point these are the modes of a field frozen at that state. What perturbations
    do in the long run is the Lyapunov spectrum, which may differ even in sign.

    Parameters
    ----------
    field: a ctgate field.
    h: states ``(*batch, state)``, or a :class:`ctgate.Solution` of this field: the spectrum is then that at
        its saved times, with its parameters and its input.
    u: inputs ``(*batch, channel)``, broadcasting; None without input, and for a solution.
    alg: None for the flow, ``Euler(dt)`` for the map, whatever a solution was solved with.
    t: the time, for a field that reads it; not for a solution.
    progress: show a bar (only on a terminal).

    Returns
    -------
    A Dataset over the batch (``batch``, or ``batch_0``, ...; ``time`` in front for a solution) and ``mode``,
    modes that grow fastest or decay slowest first: ``eigenvalue_real``, ``eigenvalue_imag`` (joined by
    :func:`eigenvalues`); ``growth_rate``, -1/T [1/time]; ``time_constant`` T [time], negative for a mode that
    grows, infinite for one that does neither; ``period`` P [time], infinite for one that does not turn. Over
    the batch alone ``spectral_abscissa``, the largest real part, and ``spectral_radius``. Attributes:
    ``kind`` ("flow" or "map"), ``dt``, and ``marginal``, the line between decay and growth.

    NaN at saved times without a state; a Jacobian that is not finite gives NaN and a RuntimeWarning.

    Raises: TypeError, ValueError for arguments that do not fit.

    Source: THEORY.md 3 and 21.
    """
    check_field(field, "jacobian_spectrum")
    step = step_of(alg, "jacobian_spectrum")
    pieces: Iterable[_Arguments]
    if isinstance(h, Solution):
        prob = _problem_of(h, field, u)
        known = ~h.hs.isnan().any(-1)
        states = torch.where(known[..., None], h.hs, prob.h0)
        _, pieces = arguments(prob, known_times(prob, h.ts), states)
        dims = ("time", *batch_dims(known.ndim - 1))
        coordinates = _times(h.ts, known, dims)
        rates = _rates(lambda *where: prob.call("jacobian", *where), pieces, step, progress)
    else:
        if not isinstance(h, Tensor) or not h.is_floating_point() or h.ndim == 0:
            kind = f"{h.dtype}, {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
            raise TypeError(
                f"jacobian_spectrum(h=...): h is {kind}; it must be a floating-point tensor (*batch, state) "
                "or a ct.Solution"
            )
        field.check_arguments(h, u)
        known = torch.ones(h.shape[:-1], dtype=torch.bool, device=h.device)
        dims, coordinates = tuple(batch_dims(h.ndim - 1)), {}
        rates = _rates(field.jacobian, [(t, h, u)], step, progress)
    rates = rates.reshape(*known.shape, rates.shape[-1])
    lost = int((known & rates.isnan().any(-1)).sum())
    if lost:
        warnings.warn(
            f"jacobian_spectrum: {lost} of {int(known.sum())} Jacobians are not finite; their modes are NaN",
            RuntimeWarning,
            stacklevel=3,
        )
    modes = Modes(torch.where(known[..., None], rates, torch.nan), step)
    values = modes.eigenvalues
    unit = "1/time" if step is None else "1"
    extremes = {
        "spectral_abscissa": (dims, array(values.real.amax(-1)), label("largest real part", unit)),
        "spectral_radius": (dims, array(values.abs().amax(-1)), label("largest absolute value", unit)),
    }
    return xr.Dataset(
        {**modes.variables(dims), **extremes}, coords=coordinates, attrs=attributes(field, modes)
    )


def _problem_of(sol: Solution, field: VectorField, u: Tensor | None) -> ODEProblem:
    if sol.prob is None:
        raise ValueError(
            "jacobian_spectrum(h=...): the solution was loaded from a file and has no problem; give its "
            "states and inputs, h=sol.hs and u="
        )
    if sol.prob.field is not field:
        raise ValueError(
            f"jacobian_spectrum(field=...): field is a {type(field).__name__} that the solution h is not "
            "of; it must be h.prob.field, or give states, h=sol.hs"
        )
    if u is not None:
        raise ValueError("jacobian_spectrum(u=...): u is given and h is a solution; its input is its own")
    return sol.prob


def _times(ts: Tensor, known: Tensor, dims: tuple[str, ...]) -> dict[str, Any]:
    if ts.ndim == 1:
        return time_coordinate(ts)
    own = ts.reshape(*ts.shape, *(1,) * (known.ndim - ts.ndim)).expand(known.shape)
    return {"t": (dims, array(own), label("time of each sample", "units of tau"))}


def _rates(
    evaluate: Callable[..., Jacobian], pieces: Iterable[_Arguments], step: float | None, progress: bool
) -> Tensor:
    """The modes of the Jacobians at all states of all pieces, (state number, mode)."""
    blocks = tqdm(_blocks(pieces), desc="spectra", disable=None if progress else True, leave=False)
    return torch.cat([Modes.of(evaluate(*where).full(), step).rates for where in blocks])


def _blocks(pieces: Iterable[_Arguments]) -> Iterator[_Arguments]:
    """The arguments again, the batch flat and cut so that the Jacobians fit into memory."""
    for t, h, u in pieces:
        batch, size = h.shape[:-1], h.shape[-1]
        states = h.reshape(-1, size)
        inputs = None if u is None else u.expand(*batch, u.shape[-1]).reshape(len(states), u.shape[-1])
        own = t.expand(*batch, 1).reshape(-1, 1) if isinstance(t, Tensor) and t.ndim else None
        count = max(1, _ENTRIES // size**2)
        for start in range(0, max(len(states), 1), count):
            part = slice(start, start + count)
            yield t if own is None else own[part], states[part], None if inputs is None else inputs[part]
