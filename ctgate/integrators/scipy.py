"""scipy's stiff solvers, one sample at a time, with the field's own Jacobian.

A sample is integrated as if it were alone, one solver object per knot interval, so no step crosses a knot.
scipy computes in float64 whatever the dtype of the problem; the field computes in its own. The rounding of a
float32 field is noise to the Newton iterations, which do not converge for an rtol far below 1e-5: the solve
then ends with DT_UNDERFLOW. THEORY.md 10.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
import scipy.integrate
import torch
from jaxtyping import Float
from torch import Tensor

from ctgate.integrators.dynamics import Dynamics
from ctgate.integrators.grid import Input
from ctgate.problem import remake
from ctgate.retcode import Halt, ReturnCode

_SOLVERS = {
    "Radau": scipy.integrate.Radau,
    "BDF": scipy.integrate.BDF,
    "LSODA": scipy.integrate.LSODA,
}
# Whose warnings are notes about the solve: scipy's own, and those that it issues in the name of its caller.
_SCIPY = (f"{Path(scipy.__file__).parent}{os.sep}", __file__)

State = Float[np.ndarray, " state"]
Matrix = Float[np.ndarray, "state state"]
Slope = Callable[[Input, float, State], State]
SlopeMatrix = Callable[[Input, float, State], Matrix]


class SampleRun(NamedTuple):
    """One sample's trajectory.

    ``ts`` (node,) and ``hs`` (node, state), float64: the start and the end of every accepted step.
    ``pieces``: scipy's interpolant of each step, one fewer than nodes. ``code`` and ``detail`` say how the
    run ended; ``detail`` also carries what scipy warned of. After a failure there are the good nodes only.
    """

    ts: Float[np.ndarray, " node"]
    hs: Float[np.ndarray, "node state"]
    pieces: list[scipy.integrate.DenseOutput]
    code: ReturnCode
    detail: str


def integrate_sample(
    method: str,
    rhs: Slope,
    jacobian: SlopeMatrix | None,
    intervals: Sequence[tuple[float, float, Input]],
    h0: State,
    rtol: float,
    atol: float,
    first_step: float | None,
    max_step: float,
    max_steps: float,
    on_step: Callable[[float, float, State], object],
) -> SampleRun:
    """Integrate one sample over knot intervals that follow one another.

    Parameters
    ----------
    method: "Radau", "BDF" or "LSODA".
    rhs, jacobian: dh/dt (state,) and its derivative (state, state), row by output, at (u, t, h) in float64;
        ``jacobian=None`` leaves scipy to finite differences.
    intervals: at least one (start, stop, u), u the input that the two functions take; one without length is
        passed over.
    rtol, atol: of scipy: the error per step, RMS over units, relative to ``atol + rtol |h|`` (LSODA: each
        unit's). scipy raises rtol below 2.2e-14 to that, and the detail says so.
    first_step: of the first interval [time]; None lets scipy choose, as at every later knot, where Radau goes
        on with the step it had.
    max_step: [time], may be infinite.
    max_steps: the most steps accepted: scipy does not tell of those it rejects.
    on_step: called as ``on_step(start, stop, h)`` after each accepted step; may raise Halt.

    Returns: :class:`SampleRun`. Failures of the integration, Halt from ``on_step`` and Ctrl-C end it early.

    Source: scipy.integrate; for Radau E. Hairer, G. Wanner, Solving Ordinary Differential Equations II, IV.8;
    for BDF L. F. Shampine, M. W. Reichelt, SIAM J. Sci. Comput. 18 (1997) 1; for LSODA L. Petzold, SIAM J.
    Sci. Stat. Comput. 4 (1983) 136.
    """
    walk = _Walk(method, intervals[0][0], h0, on_step, max_steps)
    code, detail = ReturnCode.SUCCESS, ReturnCode.SUCCESS.message
    wish = first_step
    try:
        for start, stop, u in intervals:
            length = stop - start
            if length == 0.0:
                continue
            watch = _Watch(rhs, jacobian, u, method)
            options = {"rtol": rtol, "atol": atol, "max_step": max_step, "jac": watch.jacobian}
            first = None if wish is None else min(wish, length)
            with walk.listening():
                solver = _SOLVERS[method](watch.slope, start, walk.hs[-1], stop, first_step=first, **options)
            wish = walk.cross(solver, watch, stop, wish or 0.0)
    except Halt as halt:
        code, detail = halt.code, halt.detail
    except KeyboardInterrupt:
        code, detail = ReturnCode.INTERRUPTED, "the solve was interrupted"
    if walk.notes:
        detail = f"{detail} ({'; '.join(walk.notes)})"
    return SampleRun(np.array(walk.ts), np.stack(walk.hs), walk.pieces, code, detail)


class _Watch:
    """The two functions on one knot interval, seen by scipy, and whether their values were finite."""

    def __init__(self, rhs: Slope, jacobian: SlopeMatrix | None, u: Input, method: str) -> None:
        self._rhs = rhs
        self._jacobian = jacobian
        self._u = u
        # Radau and BDF take a slope that is not finite for an iteration that failed; LSODA accepts it.
        self._patient = method != "LSODA"
        self._last_matrix: np.ndarray[Any, np.dtype[Any]] | None = None
        self._at_start = True
        self.jacobian = None if jacobian is None else self._matrix
        self.finite = True
        self.broke = False

    def accepted(self) -> None:
        """Forget the attempts that led to a step."""
        self.broke = False

    def slope(self, t: float, h: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
        value = self._rhs(self._u, float(t), h)
        self.finite = bool(np.isfinite(value).all())
        self.broke = self.broke or not self.finite
        if not self.finite and (self._at_start or not self._patient):
            advice = "" if self._patient else ", from which LSODA cannot step back"
            raise Halt(ReturnCode.UNSTABLE, f"dh/dt is not finite at t = {t:.9g}{advice}")
        self._at_start = False
        return value

    def _matrix(self, t: float, h: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
        assert self._jacobian is not None
        value = self._jacobian(self._u, float(t), h)
        if np.isfinite(value).all():
            self._last_matrix = value
        elif self._last_matrix is None:
            raise Halt(ReturnCode.UNSTABLE, f"the Jacobian is not finite at t = {t:.9g}")
        else:
            # BDF asks at a predicted state. With the last matrix its iteration converges or the step shrinks.
            value = self._last_matrix
        # LSODA factorizes in place.
        return value.copy()


class _Walk:
    """The nodes of one sample as they come."""

    def __init__(
        self,
        method: str,
        start: float,
        h0: np.ndarray[Any, np.dtype[Any]],
        on_step: Callable[[float, float, State], object],
        max_steps: float,
    ) -> None:
        self.ts = [start]
        self.hs = [np.array(h0, dtype=np.float64)]
        self.pieces: list[scipy.integrate.DenseOutput] = []
        self.notes: list[str] = []
        self._method = method
        self._on_step = on_step
        self._max_steps = max_steps

    def cross(self, solver: Any, watch: _Watch, stop: float, wish: float) -> float | None:
        """Step to the end of one interval; returns the step to try in the next one, None to let scipy choose.

        ``wish`` is the step that was wanted in this one. The landing may cut the last step short, and what
        Radau proposes after it, so what it proposed before counts as well.
        """
        before = len(self.pieces)
        while solver.status == "running":
            if len(self.pieces) >= self._max_steps:
                raise Halt(
                    ReturnCode.MAX_STEPS,
                    f"{len(self.pieces)} steps were taken and t = {self.ts[-1]:.9g} was reached",
                )
            # Only Radau, a one-step method, can go on with the size that it had.
            planned = solver.h_abs if self._method == "Radau" else 0.0
            with self.listening():
                message = solver.step()
            if solver.status == "failed" or not solver.t > self.ts[-1]:
                raise self._failure(watch, message)
            if not (watch.finite and np.isfinite(solver.y).all()):
                raise Halt(
                    ReturnCode.UNSTABLE, f"the state or dh/dt is not finite after t = {self.ts[-1]:.9g}"
                )
            watch.accepted()
            self._accept(float(solver.t) if solver.status == "running" else stop, solver)
        if self._method != "Radau":
            return None
        return float(max(planned, solver.h_abs, wish if len(self.pieces) == before + 1 else 0.0))

    def _accept(self, stop: float, solver: Any) -> None:
        start, h = self.ts[-1], np.array(solver.y, dtype=np.float64)
        self.pieces.append(solver.dense_output())
        self.ts.append(stop)
        self.hs.append(h)
        self._on_step(start, stop, h)

    def _failure(self, watch: _Watch, message: str | None) -> Halt:
        t = self.ts[-1]
        if watch.broke:
            return Halt(ReturnCode.UNSTABLE, f"no step from t = {t:.9g} gives a finite dh/dt, however small")
        said = "" if message is None else f"; scipy says: {message}"
        return Halt(
            ReturnCode.DT_UNDERFLOW,
            f"at t = {t:.9g} the tolerances ask for a step that time cannot resolve{said}",
        )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep scipy's warnings as notes; the field's own pass. What overflows is seen by its result."""
        heard: list[warnings.WarningMessage] = []
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                yield
        finally:
            self._note(heard)

    def _note(self, heard: Sequence[warnings.WarningMessage]) -> None:
        for warning in heard:
            text = f"scipy warned: {warning.message}"
            if not warning.filename.startswith(_SCIPY):
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno, source=warning.source
                )
            elif text not in self.notes:
                self.notes.append(text)


def evaluate(run: SampleRun, t: Float[np.ndarray, " time"]) -> Float[np.ndarray, "time state"]:
    """The states at times inside the run, in any order, by scipy's interpolants; exact at the nodes.

    Raises: ValueError for a time outside.
    """
    outside = ~((t >= run.ts[0]) & (t <= run.ts[-1]))
    if outside.any():
        raise ValueError(f"t is {t[outside][0]}; it must be in [{run.ts[0]}, {run.ts[-1]}]")
    node = np.searchsorted(run.ts, t)
    states = run.hs[node]
    between = np.flatnonzero(t < run.ts[node])
    between = between[np.argsort(node[between], kind="stable")]
    changes = np.flatnonzero(np.diff(node[between])) + 1
    for group in np.split(between, changes) if between.size else ():
        states[group] = run.pieces[node[group[0]] - 1](t[group]).T
    return states


def numpy_closures(dynamics: Dynamics, sample: tuple[int, ...]) -> tuple[Slope, SlopeMatrix]:
    """The problem's dh/dt and Jacobian for sample number ``sample`` of the batch, as functions (u, t, h).

    The field sees a batch of one, (1, ..., 1, state) with as many dimensions as h0, in the dtype and on the
    device of h0, outside any graph. Evaluations are counted; those of the Jacobian are not among them.
    """
    field = _SampleField(dynamics, sample)
    return field.slope, field.jacobian


class _SampleField:
    """The field at one sample of the batch."""

    def __init__(self, dynamics: Dynamics, sample: tuple[int, ...]) -> None:
        self._dynamics = dynamics
        self._prob = dynamics.prob
        own = self._prob.field.of_sample(sample)
        if own is not self._prob.field:
            self._prob = remake(self._prob, field=own)
        self._sample = sample
        self._ones = (1,) * len(sample)

    @torch.no_grad()
    def slope(self, u: Input, t: float, h: State) -> State:
        self._dynamics.stats.evaluations += 1
        state = self._tensor(h)
        value = self._prob.call("forward", t, state, self._row(u, t))
        if not isinstance(value, Tensor):
            raise TypeError(f"the field returned {type(value).__name__} for dh/dt; it must return a tensor")
        if value.shape != state.shape:
            raise ValueError(
                f"the field returned dh/dt of shape {tuple(value.shape)} for a state of shape "
                f"{tuple(state.shape)}; scipy's methods integrate each sample alone, so the field must give "
                "one sample's dh/dt for one sample's state"
            )
        return _array(value.reshape(-1))

    @torch.no_grad()
    def jacobian(self, u: Input, t: float, h: State) -> Matrix:
        self._dynamics.stats.jacobians += 1
        value = self._prob.call("jacobian", t, self._tensor(h), self._row(u, t)).full()
        return _array(value.reshape(h.size, h.size))

    def _tensor(self, h: State) -> Tensor:
        h0 = self._dynamics.prob.h0
        return torch.tensor(h, dtype=h0.dtype, device=h0.device).reshape(*self._ones, -1)

    def _row(self, u: Input, t: float) -> Tensor | None:
        value = u(t)
        if value is None:
            return None
        batch = self._dynamics.prob.h0.shape[:-1]
        row = value.expand(*batch, value.shape[-1])[self._sample]
        return row.reshape(*self._ones, -1)


def _array(value: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    return np.asarray(value.detach().to("cpu", torch.float64).numpy())
