"""What a solve returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ctgate.algorithms import Algorithm
from ctgate.controls.times import FLOAT64_EPS, rounding_of
from ctgate.dense import Dense, evaluate
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
    ts: times ``(time,)``, float64, in the units of tau.
    hs: states ``(time, *batch, state)`` at those times, differentiable as ``sensealg`` says.
    retcode: a :class:`ctgate.ReturnCode`; ``message`` says more about this solve.
    stats: evaluations, steps and wall time.
    prob, alg: what was solved and how; ``prob`` is None in a solution that was loaded from a file.
    tolerances: (rtol, atol), None for a fixed-step method.
    components: the slices of the state by name; ``output_slice`` is that of the output.
    """

    ts: Float[Tensor, " time"]
    hs: Float[Tensor, "time *batch state"]
    retcode: ReturnCode
    message: str
    stats: Stats
    alg: Algorithm
    prob: ODEProblem | None
    tolerances: tuple[float, float] | None
    components: Mapping[str, slice]
    output_slice: slice
    dense: Dense | str = field(repr=False)
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
        if self.unchanged is not None:
            self.unchanged.check("sol[gate]", "read gates before the update")
        gates = evaluate(self.prob, "gates", self.ts, self.hs, "right")
        if isinstance(gates, Tensor):
            raise TypeError("the field's gates(t, h, u) must return a dict of named gates")
        return gates

    def __call__(self, t: float | Sequence[float] | Tensor) -> Tensor:
        """The state at any time of the solution, from the states and derivatives at the accepted steps.

        Parameters: ``t``, a time (gives ``(*batch, state)``), or several (give ``(time, *batch, state)``).

        Hermite interpolation, with further derivatives inside the step for methods of order 4 and higher:
        the error is O(dt^4), for RK4 O(dt^5), for Dopri5 O(dt^6), for Dopri8 O(dt^8). Steps do not cross
        knots, so nothing is smoothed over a jump of the input.

        Raises: ValueError outside the solution; RuntimeError where there is no dense output, with the fix.
        """
        if isinstance(self.dense, str):
            raise RuntimeError(f"sol(t): {self.dense}")
        times = torch.as_tensor(t, dtype=torch.float64, device=self.hs.device)
        flat = times.reshape(-1)
        start, stop = float(self.dense.ts[0]), float(self.dense.ts[-1])
        early = flat < start - rounding_of(start, FLOAT64_EPS)
        outside = early | (flat > stop + rounding_of(stop, FLOAT64_EPS)) | flat.isnan()
        if bool(outside.any()):
            raise ValueError(f"sol(t): t is {float(flat[outside][0])}; it must be in [{start}, {stop}]")
        states = self.dense(flat.clamp(start, stop))
        return states[0] if times.ndim == 0 else states

    def to_xarray(self) -> "xr.Dataset":
        """This solution as a labelled Dataset: components, gates, inputs and time constants over time."""
        from ctgate.storage import to_dataset

        return to_dataset(self)

    def save(self, path: str | Path) -> None:
        """Write to netCDF (``.nc``) or Zarr (``.zarr``), dense output included; see :func:`ctgate.load`."""
        from ctgate.storage import save

        save(self, path)
