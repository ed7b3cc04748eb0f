"""What is asked of a Lyapunov spectrum, checked, and the steps that it means."""

from typing import Any

import numpy as np

from ctgate.algorithms import RK4, Euler, ExponentialEuler, FixedStepAlgorithm, Heun, Midpoint
from ctgate.integrators.grid import FixedSteps, intervals, time_resolution
from ctgate.problem import ODEProblem

WHAT = "lyapunov_spectrum"
_METHODS = (RK4, Euler, ExponentialEuler, Midpoint, Heun)
# Steps per shortest time constant, where no method is given.
_STEPS = 20


class Plan:
    """The arguments of :func:`ctgate.dynamics.lyapunov_spectrum`, checked.

    Attributes:
        kind: "map" for the methods that are the discrete cells, "flow" for the others.
        volumes: whether what volumes grow by is wanted.
        steps: all of them; ``ends`` (step + 1,) are the times between.
        first, counted: numbers of the first step with tangents, and of the first that counts.
    """

    def __init__(
        self,
        prob: Any,
        alg: Any,
        k: Any,
        transient: Any,
        warmup: Any,
        interval: Any,
        blocks: Any,
        sum_rule: bool,
        seed: int,
    ) -> None:
        if not isinstance(prob, ODEProblem):
            raise TypeError(f"{WHAT}(prob=...): prob is {type(prob).__name__}; it must be a ct.ODEProblem")
        if prob.per_sample:
            raise ValueError(
                f"{WHAT}(prob=...): samples have times of their own; they must share tspan and the knots of "
                "the control"
            )
        if prob.h0.numel() == 0:
            raise ValueError(f"{WHAT}(prob=...): h0 has shape {tuple(prob.h0.shape)}; the batch is empty")
        size = prob.h0.shape[-1]
        self.prob, self.alg, self.seed = prob, _algorithm(prob, alg), seed
        self.kind = "map" if isinstance(self.alg, Euler | ExponentialEuler) else "flow"
        self.k = _integer("k", size if k is None else k, 1, size)
        self.interval = None if interval is None else _integer("interval", interval, 1)
        self.blocks = _integer("blocks", blocks, 2)
        self.volumes = bool(sum_rule) and self.k == size
        start, stop = prob.span
        self.length = stop - start
        self.transient = _time("transient", transient, self.length)
        self.warmup = _time("warmup", warmup, self.length)
        cuts = intervals(prob.control, start, stop)
        self.steps = FixedSteps(cuts, self.alg.dt, time_resolution(prob.control))
        self.ends = np.array([start, *(end for _, end in self.steps.ends())])
        slack = 1e-9 * self.length
        self.first, self.counted = (
            int(np.searchsorted(self.ends, start + t - slack))
            for t in (self.transient, self.transient + self.warmup)
        )
        if self.counted >= len(self.steps):
            raise ValueError(
                f"{WHAT}: transient {self.transient:g} and warmup {self.warmup:g} leave nothing of tspan, "
                f"{prob.tspan}, to measure"
            )


def _algorithm(prob: ODEProblem, alg: Any) -> FixedStepAlgorithm:
    if alg is None:
        return RK4(_shortest(prob) / _STEPS)
    if not isinstance(alg, _METHODS):
        names = ", ".join(f"{kind.__name__}(dt)" for kind in _METHODS)
        raise TypeError(f"{WHAT}(alg=...): alg is {alg!r}; it must be None or one of {names}")
    return alg


def _shortest(prob: ODEProblem) -> float:
    """The shortest time constant with open gates."""
    names = {name: name.rpartition(".")[2] for name, _ in prob.field.named_buffers()}
    buffers = dict(prob.field.named_buffers())
    taus = [buffers[name] for name, own in names.items() if own.startswith("fixed_tau")]
    for name, parameter in prob.named_parameters().items():
        if name.rpartition(".")[2].startswith("log_tau"):
            taus.append(parameter.detach().exp())
    if not taus:
        raise ValueError(
            f"{WHAT}(alg=...): alg is None and {type(prob.field).__name__} has no tau that a step could be "
            "chosen from; give alg=ct.RK4(dt)"
        )
    return min(float(tau.min()) for tau in taus)


def _integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{WHAT}({name}=...): {name} is {value!r}; it must be an integer")
    if value < least or (most is not None and value > most):
        above = f"at least {least}" if most is None else f"from {least} to {most}, the size of the state"
        raise ValueError(f"{WHAT}({name}=...): {name} is {value}; it must be {above}")
    return int(value)


def _time(name: str, value: Any, length: float) -> float:
    if value is None:
        return 0.1 * length
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{WHAT}({name}=...): {name} is {value!r}; it must be a float in the units of tau")
    if not 0.0 <= value < length:
        raise ValueError(
            f"{WHAT}({name}=...): {name} is {value}; it must not be negative and shorter than tspan, {length}"
        )
    return float(value)
