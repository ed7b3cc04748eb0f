r"""Fixed and slow points of flows and maps, under constant inputs."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm
from tqdm import tqdm

from ctgate.algorithms import Euler
from ctgate.dynamics.bottleneck import settle
from ctgate.dynamics.descent import AtTarget, Standstill, descend, polish, remaining
from ctgate.dynamics.modes import check_field, step_of
from ctgate.dynamics.points import KINDS, describe
from ctgate.fields import VectorField
from ctgate.sensitivity.labels import label
from ctgate.storage.dataset import array

# How a start ends.
FIXED, SLOW, FAST, FLAT, UNFINISHED = range(5)
ENDS = ("fixed", "slow", "fast", "flat", "unfinished")

# Speeds [state/time] that count as zero, and distances, relative to the largest state, that tell two points
# apart.
_TOLERANCES = {torch.float64: (1e-12, 1e-6), torch.float32: (1e-5, 1e-3)}
# Entries of the Jacobians that are held at once.
_ENTRIES = 2**23
# Times at which a field that may read the time is compared with itself.
_TIMES = (0.618033988749895, 17.3, -41.9)


@torch.no_grad()
def fixed_points(
    field: VectorField,
    u: Float[Tensor, "*input channel"] | None = None,
    alg: Euler | None = None,
    *,
    starts: int | Float[Tensor, "*start state"] = 256,
    spread: float = 1.0,
    seed: int = 0,
    tolerance: float | None = None,
    slow: float = 1e-2,
    separation: float | None = None,
    max_steps: int = 500,
    progress: bool = False,
) -> xr.Dataset:
    r"""The states at which a field stands still, :math:`f = \dot h = 0`, and those at which it is slowest.

    From every start the distance to the target, drive/rate - h, is minimised by damped Gauss-Newton steps (of
    f itself where a rate is zero, as those of :class:`ctgate.Field` are): unlike f it does not vanish where
    gates close. Newton's method with the analytic Jacobian A then takes f to its rounding. Where that finds
    no zero but a speed below ``slow``, Newton's method for :math:`q = |f|^2/2` goes to its minimum. A point
    is

    - "stable": every mode decays, Re < 0 for the flow, absolute value < 1 for the map;
    - "saddle": ``index`` modes grow, all of them at a source;
    - "marginal": none grows, and one or more are on the line to rounding, as on a line of fixed points, of
      which every start then finds its own;
    - "slow": a local minimum of the speed that is no zero, a bottleneck that trajectories pass.

    The map ``h + dt f`` has the fixed points of the flow and not its stability: modes that turn or relax fast
    against dt grow.

    Parameters
    ----------
    field: a ctgate field whose dh/dt does not depend on the time.
    u: a constant input ``(channel,)``, or several ``(*input, channel)``, each with points of its own.
    alg: None for the flow, ``Euler(dt)`` for the map.
    starts: states to start from, ``(*start, state)``, such as ``sol.hs`` (for the points near what a network
        does), or how many are drawn.
    spread, seed: standard deviation of the states that are drawn, and their seed.
    tolerance: the speed [state/time], a Euclidean norm, below which a point is fixed; by default 1e-12 in
        float64 and 1e-5 in float32. Newton's steps go on to rounding whatever it is.
    slow: the speed below which a minimum of the speed is a slow point; 0 for none.
    separation: points nearer than this times the largest state, started from or found, are one; by default
        1e-6 in float64 and 1e-3 in float32.
    max_steps: the most steps tried from a start to a zero, and then to a minimum.
    progress: show a bar (only on a terminal).

    Returns
    -------
    A Dataset over ``point``, ordered by input, kind and index.

    - ``state`` (point, unit), ``speed`` |f|, ``kind``, ``index``; ``reached``, the number of starts that
      ended there; ``residual``, the length of the step that Newton's method would still take.
    - ``eigenvalue_real``, ``eigenvalue_imag``, ``growth_rate``, ``time_constant``, ``period`` (point, mode)
      as in :func:`jacobian_spectrum`.
    - ``time_scale`` [time]: of a fixed point its longest time constant, of a slow point the time that a
      trajectory takes through the bottleneck.
    - ``input_jacobian`` (point, unit, channel), where there is an input: that of dh/dt, and of the map's step
      dt times that. The coordinate ``input_number`` (point) counts the inputs ``u`` (input, channel).
    - ``ended`` (input, start): "fixed", "slow"; "fast", at rest at a speed above ``slow``; "flat", slower
      than the tolerance where Newton's method sees no zero, because gates are closed; "unfinished".
      ``found`` (input, start), the number of the point, -1 for none.

    Attributes: ``kind`` ("flow" or "map"), ``dt``, ``converged``, 1 where no start is flat or unfinished, and
    the settings above.

    Warns: RuntimeWarning where starts are flat or unfinished, and where there is no point.

    Raises: ValueError for a field that reads the time and for arguments that do not fit; TypeError for parts
    of the wrong kind.

    Source: THEORY.md 24; D. Sussillo and O. Barak, Neural Comput. 25 (2013) 626 (minimising q).
    """
    what = "fixed_points"
    check_field(field, what)
    step = step_of(alg, what)
    start = _states(field, starts, spread, seed)
    field.check_arguments(start[:1], None if u is None else u.reshape(-1, u.shape[-1])[:1])
    settings = _settings(start.dtype, tolerance, slow, separation, max_steps)
    inputs = None if u is None else u.detach().reshape(-1, u.shape[-1])
    count = 1 if inputs is None else len(inputs)
    h, us = start.repeat(count, 1), None if inputs is None else inputs.repeat_interleave(len(start), 0)
    _check_autonomous(field, h, us)

    at, scale = Standstill(field), float(vector_norm(start, dim=-1).max())
    ended = torch.full((len(h),), UNFINISHED, device=h.device)
    block = max(1, _ENTRIES // h.shape[-1] ** 2)
    with tqdm(total=len(h), desc="fixed points", disable=None if progress else True, leave=False) as bar:
        for part in (slice(k, k + block) for k in range(0, len(h), block)):
            own = None if us is None else us[part]
            h[part], ended[part] = _search(at, h[part], own, scale, settings, bar.update)
    number = torch.arange(count, device=h.device).repeat_interleave(len(start))
    first, found = _distinct(at.speed(h, us), h, ended, number, scale, settings.separation)
    _warn(at.speed(h, us), ended, settings)

    data = describe(at, h[first], None if us is None else us[first], ended[first] == SLOW, step, block)
    data = data.assign_coords(input_number=("point", array(number[first]), label("number of the input", "1")))
    kinds = [KINDS.index(kind) for kind in data["kind"].values]
    order = np.lexsort((data["index"].values, np.array(kinds), data["input_number"].values))
    # Where each point stands in that order; the last entry is for none.
    places = np.append(np.argsort(order), -1)[array(found)]
    reached = np.bincount(places[places >= 0], minlength=len(order))
    ends, over = np.array(ENDS)[array(ended)], ("input", "start")
    variables: dict[str, Any] = {
        "reached": ("point", reached, label("starts that ended at the point", "1")),
        "ended": (over, ends.reshape(count, -1), label("how a start ended", "1")),
        "found": (over, places.reshape(count, -1), label("point at which a start ended, -1 for none", "1")),
    }
    if inputs is not None:
        variables["u"] = (("input", "channel"), array(inputs), label("constant input", "1"))
    converged = int(not bool((ended >= FLAT).any()))
    attrs = {**dataclasses.asdict(settings), "converged": converged}
    return data.isel(point=order).assign(variables).assign_attrs(attrs)


@dataclasses.dataclass(frozen=True)
class _Settings:
    tolerance: float
    slow: float
    separation: float
    max_steps: int


def _settings(
    dtype: torch.dtype, tolerance: float | None, slow: float, separation: float | None, max_steps: int
) -> _Settings:
    what, eps = "fixed_points", torch.finfo(dtype).eps
    if dtype not in _TOLERANCES and (tolerance is None or separation is None):
        raise ValueError(f"{what}: tolerance and separation have no default for {dtype}; give both")
    defaults = _TOLERANCES.get(dtype, (0.0, 0.0))
    settings = _Settings(
        defaults[0] if tolerance is None else tolerance,
        slow,
        defaults[1] if separation is None else separation,
        max_steps,
    )
    if not settings.tolerance >= eps:
        raise ValueError(
            f"{what}(tolerance=...): tolerance is {settings.tolerance!r} and the states are {dtype}, whose "
            f"rounding is {eps:.2g}; it must be above that, or the states of another dtype"
        )
    if not (slow == 0.0 or settings.tolerance < slow < math.inf):
        raise ValueError(
            f"{what}(slow=...): slow is {slow!r}; it must be 0 or above the tolerance, {settings.tolerance!r}"
        )
    if not 0.0 < settings.separation < 1.0:
        raise ValueError(
            f"{what}(separation=...): separation is {settings.separation!r}; it must be between 0 and 1"
        )
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"{what}(max_steps=...): max_steps is {max_steps!r}; it must be a positive integer")
    return settings


def _states(field: VectorField, starts: int | Tensor, spread: float, seed: int) -> Tensor:
    """(start, state), a copy."""
    what = "fixed_points(starts=...): starts"
    if isinstance(starts, Tensor):
        if not starts.is_floating_point() or starts.ndim == 0 or not starts.numel():
            raise ValueError(
                f"{what} is {starts.dtype}, {tuple(starts.shape)}; it must be floating-point states "
                "(*start, state), one at least"
            )
        if not bool(starts.isfinite().all()):
            first = (~starts.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{what}{first} is {starts[tuple(first)].item()}; states must be finite")
        return starts.detach().reshape(-1, starts.shape[-1]).clone()
    if isinstance(starts, bool) or not isinstance(starts, int) or starts < 1:
        raise ValueError(f"{what} is {starts!r}; it must be a positive integer or states (*start, state)")
    if not 0.0 < spread < math.inf:
        raise ValueError(f"fixed_points(spread=...): spread is {spread!r}; it must be positive and finite")
    like = field.initial_state((starts,))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return (spread * noise).to(like)


def _check_autonomous(field: VectorField, h: Tensor, u: Tensor | None) -> None:
    """Raise ValueError for a field that reads the time: what it returns depends on it."""
    if field.autonomous:
        return
    few, own = h[:64], None if u is None else u[:64]
    now = field(0.0, few, own)
    for t in _TIMES:
        if not torch.allclose(field(t, few, own), now, rtol=0.0, atol=0.0, equal_nan=True):
            raise ValueError(
                f"fixed_points(field=...): dh/dt of {field} differs between t = 0 and t = {t}; a field that "
                "reads the time has no fixed points: freeze its time, ct.Field(lambda t, h, u: fn(t0, h, u))"
            )


def _search(
    at: Standstill,
    h: Tensor,
    u: Tensor | None,
    scale: float,
    settings: _Settings,
    tell: Callable[[int], object],
) -> tuple[Tensor, Tensor]:
    """Where every lane ends, and how."""

    def inputs(lanes: Tensor) -> Tensor | None:
        return None if u is None else u[lanes]

    tolerance = settings.tolerance
    near = math.sqrt(tolerance)
    gated = bool((at.field.rate_drive(0.0, h, u)[0] > 0.0).all())
    equation = AtTarget(at.field) if gated else at
    h, stalled = descend(equation, h, u, near, settings.max_steps, tell)
    close = vector_norm(equation.slope(h, u), dim=-1) <= near
    h[close] = polish(at, h[close], inputs(close))
    speed, slow = at.speed(h, u), torch.zeros_like(stalled)
    rest = (speed > tolerance) & (speed <= settings.slow)
    if bool(rest.any()):
        h[rest], slow[rest] = settle(at, h[rest], inputs(rest), tolerance, settings.max_steps)
        close = rest & ~slow
        h[close] = polish(at, h[close], inputs(close))
        speed = at.speed(h, u)
    ended = torch.full_like(stalled, UNFINISHED, dtype=torch.long)
    ended[stalled & (speed > settings.slow)] = FAST
    ended[slow] = SLOW
    zero = speed <= tolerance
    small = settings.separation * vector_norm(h[zero], dim=-1).clamp(min=scale)
    away = remaining(at, h[zero], inputs(zero), small) > small
    ended[zero] = torch.where(away, FLAT, FIXED)
    return h, ended


def _distinct(
    speed: Tensor, h: Tensor, ended: Tensor, number: Tensor, scale: float, separation: float
) -> tuple[Tensor, Tensor]:
    """The lanes whose states are the points, of each the one with the least speed, and of every lane the
    number of its point, -1 for none. ``number`` is that of the lane's input."""
    found = torch.full_like(number, -1)
    first: list[int] = []
    size = torch.cat([vector_norm(h[ended <= SLOW], dim=-1), speed.new_tensor([scale])]).max()
    for how in (FIXED, SLOW):
        for own in range(int(number.max()) + 1):
            lanes = ((ended == how) & (number == own)).nonzero().squeeze(-1)
            lanes = lanes[speed[lanes].argsort(stable=True)]
            while len(lanes):
                near = vector_norm(h[lanes] - h[lanes[0]], dim=-1) <= separation * size
                found[lanes[near]] = len(first)
                first.append(int(lanes[0]))
                lanes = lanes[~near]
    return torch.tensor(first, dtype=torch.long, device=h.device), found


def _warn(speed: Tensor, ended: Tensor, settings: _Settings) -> None:
    def tell(text: str) -> None:
        # Past this module and the wrapper that turns gradients off.
        warnings.warn(f"fixed_points: {text}", RuntimeWarning, stacklevel=5)

    lost, flat = speed[ended == UNFINISHED], int((ended == FLAT).sum())
    if len(lost):
        tell(
            f"{len(lost)} of {len(speed)} starts are unfinished, at speeds from {float(lost.min()):.3g} to "
            f"{float(lost.max()):.3g} (max_steps {settings.max_steps}, tolerance {settings.tolerance:.3g}); "
            "take larger ones, or float64"
        )
    if flat:
        tell(
            f"{flat} of {len(speed)} starts ended where dh/dt is below the tolerance, "
            f"{settings.tolerance:.3g}, and no zero is near: closed gates; take starts where they are open"
        )
    if not bool((ended <= SLOW).any()):
        tell(
            f"none of {len(speed)} starts led to a point, and the least speed is {float(speed.min()):.3g}; "
            "take other starts, such as states of a trajectory, or a larger slow"
        )
