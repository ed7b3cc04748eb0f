r"""What an optimizer would have to do to imitate a sequence of gates: schedule, momentum, scaling by unit."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctgate import __version__
from ctgate.algorithms import Euler
from ctgate.sensitivity.labels import attributes
from ctgate.sensitivity.pieces import steps_in_pieces
from ctgate.sensitivity.propagators import check_solution, nodes_of
from ctgate.solution import Solution
from ctgate.storage.dataset import array

if TYPE_CHECKING:
    import xarray as xr

_DIMS = ("lag", "batch", "unit")
Gates = Solution | Float[Tensor, "step *batch unit"]


class Retentions(NamedTuple):
    """What the gates alone leave of a state over each step, ``(step, batch, unit)``; the time from the start
    of each step to the end of the sequence, ``(step,)`` or ``(step, batch)``, in steps for a map; whether it
    is one; and what there is to say about the source."""

    kept: Tensor
    ages: Tensor
    discrete: bool
    attributes: dict[str, Any]


@torch.no_grad()
def equivalent_schedule(gates: Gates, learning_rate: float = 1.0) -> "xr.Dataset":
    r"""The step-size schedule that a gate sequence amounts to, looking back from its end,

    .. math:: \eta(\mathrm{lag}) = \eta\, e^{-\int_{T-\mathrm{lag}}^T \gamma\,dt}, \qquad
              \text{for a map}\;\; \eta \prod_k (1 - dt\,\gamma_k) .

    With the coupling left out, the gradient of an error at T is the sum over lags of immediate gradients
    :math:`B(T - \mathrm{lag})^\top \delta`, each by its unit's weight: one schedule for all units under a
    scalar gate, one for each under a gate per unit. Lag is time along the sequence, not iterations: all
    lags act in the same update.

    Parameters:
        gates: a solution, or the gates of a discrete cell ``(step, *batch, unit)`` with dt = tau, the last
            step last: what remains over a step is 1 - gate.
        learning_rate: :math:`\eta`.

    Returns: Dataset with ``step_size`` (lag, batch, unit) and the lags from 0 to the whole sequence; where
        samples have times of their own, ``lag`` counts steps and ``age`` (lag, batch) is the time.

    Raises: TypeError for what is neither; ValueError for gates outside [0, 1] or of fewer than two
        dimensions; for solutions as :func:`ctgate.transition`.

    Source: THEORY.md 16.
    """
    import xarray as xr

    found = _retentions(gates)
    weights, coordinates = _by_lag(found)
    text = {"long_name": "step size of the equivalent schedule", "units": "parameter^2/loss"}
    return xr.Dataset(
        {"step_size": (_DIMS, array(learning_rate * weights), text)},
        coords=coordinates,
        attrs={**found.attributes, "learning_rate": learning_rate},
    )


@torch.no_grad()
def equivalent_momentum(gates: Gates) -> "xr.Dataset":
    r"""The momentum coefficient that each gate amounts to,

    .. math:: \beta = 1 - dt\,\gamma \;\text{(map)}, \qquad \beta = e^{-\int \gamma\,dt} \;\text{(flow, per
              step)}, \qquad \frac{1}{1-\beta} = \frac{\tau}{g\,dt} \;\text{steps}.

    A momentum filter :math:`v_k = \beta_k v_{k-1} + g_k` weighs what entered lag steps ago by the product of
    the coefficients since, as a leaky unit does; its horizon is the unit's time constant in steps.

    Parameters: ``gates`` as for :func:`equivalent_schedule`.

    Returns: Dataset with ``momentum`` and ``horizon`` (step, batch, unit); the horizon is infinite where a
        gate is closed.

    Raises: as :func:`equivalent_schedule`.

    Source: THEORY.md 16.
    """
    import xarray as xr

    found = _retentions(gates)
    dims = ("step", "batch", "unit")
    text = "momentum coefficient of the equivalent filter"
    variables: dict[str, Any] = {
        "momentum": (dims, array(found.kept), {"long_name": text, "units": "1"}),
        "horizon": (
            dims,
            array((1.0 - found.kept).reciprocal()),
            {"long_name": "horizon of the filter", "units": "steps"},
        ),
    }
    steps = ("step", np.arange(len(found.kept)), {"long_name": "step", "units": "1"})
    return xr.Dataset(variables, coords={"step": steps}, attrs=found.attributes)


@torch.no_grad()
def equivalent_adam(gates: Gates) -> "xr.Dataset":
    r"""The diagonal scaling by unit that a gate sequence amounts to at each lag, and the second moment that
    Adam would need for it,

    .. math:: s_q = \frac{\mu_q}{\bar\mu}, \qquad v_q \propto \mu_q^{-2}, \qquad
              \mu_q = e^{-\int_{T-\mathrm{lag}}^T \gamma_q\,dt},

    with the geometric mean :math:`\bar\mu` over units: what is left after the common schedule. Both act as a
    positive diagonal on the rows of a unit; but Adam's is the inverse scale of past gradients, for each
    parameter, and the gates' is a product of retentions that depends on the data and the lag.

    Parameters: ``gates`` as for :func:`equivalent_schedule`.

    Returns: Dataset by ``lag``, ``batch``: ``scale`` (unit); ``second_moment`` (unit), with geometric mean
        1; ``schedule``, the geometric mean; ``anisotropy``, largest over smallest scale. 1 and nothing to
        scale under a scalar gate. A unit that retains nothing, as the hidden state of a discrete LSTM, or
        less than that, has NaN and is left out of the rest.

    Raises: as :func:`equivalent_schedule`.

    Source: THEORY.md 16.
    """
    import xarray as xr

    found = _retentions(gates)
    mu, coordinates = _by_lag(found)
    known = mu > 0.0
    logs = torch.where(known, mu, 1.0).log()
    common = logs.sum(-1, keepdim=True) / known.sum(-1, keepdim=True)
    scale = torch.where(known, (logs - common).exp(), torch.nan)
    largest, smallest = scale.nan_to_num(-torch.inf).amax(-1), scale.nan_to_num(torch.inf).amin(-1)
    ratio = torch.where(known.any(-1), largest / smallest, torch.nan)
    values = {
        "scale": (_DIMS, scale, "step scale of a unit beside the common schedule"),
        "second_moment": (_DIMS, scale.square().reciprocal(), "second moment for which Adam scales alike"),
        "schedule": (_DIMS[:2], common.exp().squeeze(-1), "common schedule: geometric mean over units"),
        "anisotropy": (_DIMS[:2], ratio, "largest over smallest step scale"),
    }
    variables = {
        name: (dims, array(value), {"long_name": text, "units": "1"})
        for name, (dims, value, text) in values.items()
    }
    return xr.Dataset(variables, coords=coordinates, attrs=found.attributes)


def _by_lag(found: Retentions) -> tuple[Tensor, dict[str, Any]]:
    """What is left of a state after each lag, (lag, batch, unit), and the coordinates of the lags."""
    weights = torch.cat([torch.ones_like(found.kept[:1]), found.kept.flip(0).cumprod(0)])
    ages = torch.cat([torch.zeros_like(found.ages[:1]), found.ages.flip(0)])
    if ages.ndim == 1:
        units = "steps" if found.discrete else "units of tau"
        return weights, {"lag": ("lag", array(ages), {"long_name": "lag", "units": units})}
    counted = {"long_name": "lag, the steps of no length at a sample's end among them", "units": "steps"}
    age = {"long_name": "time from the start of the step to the sample's end", "units": "units of tau"}
    return weights, {
        "lag": ("lag", np.arange(len(ages)), counted),
        "age": (("lag", "batch"), array(ages), age),
    }


def _retentions(gates: object) -> Retentions:
    if isinstance(gates, Solution):
        check_solution(gates, "a gate sequence")
        discrete = isinstance(gates.alg, Euler)
        kept = torch.cat([piece.leak for piece in steps_in_pieces(gates)])
        nodes = nodes_of(gates)
        ages = nodes[-1:] - nodes[:-1]
        if discrete and ages.ndim == 1:
            ages = torch.arange(len(kept), 0, -1, device=kept.device)
        ages = ages if ages.ndim == 1 else ages.flatten(1)
        return Retentions(_flat(kept), ages, discrete, attributes(gates))
    if not isinstance(gates, Tensor):
        raise TypeError(f"gates is {type(gates).__name__}; it must be a ct.Solution or a tensor of gates")
    if gates.ndim < 2 or not gates.is_floating_point():
        raise ValueError(
            f"gates has shape {tuple(gates.shape)} and dtype {gates.dtype}; it must be real numbers (step, "
            "*batch, unit)"
        )
    if not bool(((gates >= 0.0) & (gates <= 1.0)).all()):
        raise ValueError(
            f"gates is in [{float(gates.min())}, {float(gates.max())}]; the gates of a "
            "discrete cell are in [0, 1]"
        )
    steps = torch.arange(len(gates), 0, -1, device=gates.device)
    described = {"ctgate_version": __version__, "algorithm": "gates as given", "dtype": _name(gates.dtype)}
    return Retentions(_flat(1.0 - gates.detach()), steps, True, described)


def _flat(kept: Tensor) -> Tensor:
    """(step, *batch, unit) with the batch as one dimension."""
    return kept.reshape(len(kept), kept.shape[1:-1].numel(), kept.shape[-1])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
