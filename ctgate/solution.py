"""What a solve returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctgate.algorithms import Algorithm
from ctgate.controls.base import concrete
from ctgate.controls.times import FLOAT64_EPS, as_float64, first_index, rounding_of
from ctgate.dense import Extension, evaluate
from ctgate.fields.base import broadcasts_to
from ctgate.guard import Unchanged
from ctgate.integrators.recorder import Stats
from ctgate.problem import ODEProblem
from ctgate.retcode import ReturnCode

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, eq=False)
class Solution:
    """A trajectory with its labels.

    Attributes
    ----------
    ts: times ``(time,)``, float64, in the units of tau; ``(time, *batch)`` where samples have their own. A
        sample with fewer steps than others then repeats its last one, so ``hs[-1]`` is everybody's last.
    hs: states ``(time, *batch, state)`` at those times, differentiable as ``sensealg`` says; NaN at saved
        times that a sample did not reach, or where its ``saveat`` is NaN.
    retcode: a :class:`ctgate.ReturnCode`; ``message`` says more about this solve. Where samples were
        integrated on their own it is SUCCESS if all succeeded, else the first failure's.
    retcodes, messages: the code of each sample, and more about it, object arrays ``(*batch,)``; None where
        all took the same steps. Messages are not kept in files.
    stats: evaluations, steps and wall time.
    prob, alg: what was solved and how; ``prob`` is None in a solution that was loaded from a file.
    tolerances: (rtol, atol), None for a fixed-step method.
    components: the slices of the state by name; ``output_slice`` is that of the output.
    """

    ts: Float[Tensor, " time"] | Float[Tensor, "time *batch"]
    hs: Float[Tensor, "time *batch state"]
    retcode: ReturnCode
    message: str
    stats: Stats
    alg: Algorithm
    prob: ODEProblem | None
    tolerances: tuple[float, float] | None
    components: Mapping[str, slice]
    output_slice: slice
    dense: Extension | str = field(repr=False)
    retcodes: np.ndarray[Any, np.dtype[np.object_]] | None = None
    messages: np.ndarray[Any, np.dtype[np.object_]] | None = None
    unchanged: Unchanged | None = field(default=None, repr=False)
    stored: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def output(self) -> Float[Tensor, "time *batch hidden"]:
        """The hidden state of the last layer at ``ts``: ``output[1:]`` is ``torch.nn.GRU(x)[0]``."""
        return self.hs[..., self.output_slice]

    def __getitem__(self, name: str) -> Tensor:
        """A gate or a component of the state by name, at ``ts``: ``(time, *batch, unit)``.

        At a jump of the input a gate has its value after the jump; at the end of the input's data, before it.
        Raises: KeyError with the names that there are.
        """
        if name in self.components:
            return self.hs[..., self.components[name]]
        gates = self.gates()
        if name not in gates:
            raise KeyError(f"{name!r} is not in this solution; it has {[*self.components, *gates]}")
        return gates[name]

    def gates(self) -> dict[str, Tensor]:
        """Every gate at ``ts``, by name: ``(time, *batch, unit)``."""
        if self.prob is None:
            return dict(self.stored)
        followed = self.unchanged is None or self.unchanged.followed
        if self.unchanged is not None:
            self.unchanged.check("sol[gate]", "read gates before the update")
        # Without a graph to the states, one from them to the gates would be half a gradient.
        with torch.set_grad_enabled(torch.is_grad_enabled() and followed):
            gates = at_known(self.prob, "gates", self.ts, self.hs)
        if isinstance(gates, Tensor):
            raise TypeError("the field's gates(t, h, u) must return a dict of named gates")
        return gates

    def __call__(self, t: float | Sequence[float] | Tensor) -> Tensor:
        """The state at any time of the solution, by the method's continuous extension.

        Parameters: ``t``, a time (gives ``(*batch, state)``), or several (give ``(time, *batch, state)``):
        ``(time,)``, or with times per sample ``(time, *batch)``.

        The local error is O(dt^(dense_order + 1)), see the algorithm: order 4 for Dopri5 and Tsit5, 3 for
        Bosh3, 2 for Rosenbrock23; Hermite interpolation for fixed steps, with further derivatives inside
        the step for RK4 and Dopri8. Steps do not cross knots, so no jump of the input is smoothed over.

        Raises: ValueError outside the solution; RuntimeError where there is no dense output, with the fix.

        Source: THEORY.md 9 and 11.
        """
        if isinstance(self.dense, str):
            raise RuntimeError(f"sol(t): {self.dense}")
        times = as_float64(t, "t")[0].to(self.hs.device)
        batch = self.hs.shape[1:-1]
        if times.ndim > 1 and (times.ndim != 1 + len(batch) or not broadcasts_to(times.shape[1:], batch)):
            raise ValueError(
                f"sol(t): t has shape {tuple(times.shape)}; it must be one time, (time,), or per sample "
                f"(time, *batch) with batch {tuple(batch)}"
            )
        flat = times.reshape(-1) if times.ndim <= 1 else times
        start, stop = self.dense.span
        wanted = flat.detach().reshape(*flat.shape, *(1,) * (start.ndim + 1 - flat.ndim))
        low, high = start.detach(), stop.detach()
        early = wanted < low - rounding_of(low, FLOAT64_EPS)
        outside = first_index(early | (wanted > high + rounding_of(high, FLOAT64_EPS)) | wanted.isnan())
        if outside is not None:
            number, *sample = outside
            place = tuple(sample) if low.ndim else ()
            whose = f" for sample {tuple(sample)}" if sample else ""
            value = (
                float(wanted.expand(len(flat), *low.shape)[tuple(outside)])
                if low.ndim
                else float(wanted[number])
            )
            raise ValueError(
                f"sol(t): t is {value}; it must be in [{float(low[place])}, {float(high[place])}]{whose}"
            )
        # By rounding only, with its gradient.
        inside = wanted.clamp(low, high) + (flat - flat.detach()).reshape(wanted.shape)
        states = self.dense(inside)
        return states[0] if times.ndim == 0 else states

    def to_xarray(self) -> "xr.Dataset":
        """This solution as a labelled Dataset: components, gates, inputs and time constants over time."""
        from ctgate.storage import to_dataset

        return to_dataset(self)

    def save(self, path: str | Path) -> None:
        """Write to netCDF (``.nc``) or Zarr (``.zarr``), dense output included; see :func:`ctgate.load`."""
        from ctgate.storage import save

        save(self, path)


def at_known(prob: ODEProblem, method: str, ts: Tensor, hs: Tensor) -> Tensor | dict[str, Tensor]:
    """A method of the field at the times and states of a solution; NaN where a sample has no state.

    There the field sees the sample's initial value in its place, so that no NaN reaches a gradient.
    """
    known = ~hs.detach().isnan().any(-1, keepdim=True)
    if concrete(known.all()) != 0.0:
        return evaluate(prob, method, ts, hs)
    values = evaluate(prob, method, known_times(prob, ts), torch.where(known, hs, prob.h0))
    if isinstance(values, Tensor):
        return torch.where(known, values, torch.nan)
    return {name: torch.where(known, value, torch.nan) for name, value in values.items()}


def known_times(prob: ODEProblem, ts: Tensor) -> Tensor:
    """Times ``(time,)`` or ``(time, *batch)`` at which a control can be asked: a sample's start where NaN."""
    if not ts.isnan().any():
        return ts
    start, _ = prob.sample_spans()
    own = ts.reshape(*ts.shape, *(1,) * (1 + start.ndim - ts.ndim))
    return torch.where(own.isnan(), start, own)
