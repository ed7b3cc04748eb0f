"""Stiff gates: how many evaluations a relative error of 1e-2 takes."""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.integrate import solve_ivp

import ctgate as ct
from ctgate.experiments.speed.lines import EVALUATIONS, Check, Line
from ctgate.experiments.speed.presets import Preset, target

_ERROR = 1e-2
_UNITS, _SPAN = 16, 40.0
_SPEED, _PHASE = (0.3, 0.07), (0.2, 1.1)
_TIMES = tuple(np.arange(1, 11) * (_SPAN / 10))
_STEPS = tuple(2.0**-k for k in range(-2, 8))
_TOLERANCES = tuple(10.0 ** (-k / 4) for k in range(2, 21))


def gates(preset: Preset, device: str) -> Iterator[Line]:
    """The exponential midpoint with gates frozen over the step against Dopri5, at the same error."""
    prob, exact = _problem(device)
    found = {}
    for name, settings in (("ExponentialMidpoint", _STEPS), ("Dopri5", _TOLERANCES)):
        for setting in settings:
            error, evaluations = _solved(prob, exact, name, setting)
            if error <= _ERROR:
                found[name] = error, evaluations, setting
                break
    workload = f"MultiGate, tau 0.01 to 10, H{_UNITS}, error {_ERROR:g}"
    if len(found) < 2:
        yield Line("15", workload, "Dopri5", quantity=EVALUATIONS, failed=f"only {[*found]} reach the error")
        return
    (error, few, dt), (other, many, rtol) = found["ExponentialMidpoint"], found["Dopri5"]
    yield Line(
        "15",
        workload,
        "Dopri5",
        quantity=EVALUATIONS,
        ratios=(few / many,),
        target=target(device, "stiff gates"),
        checks=(Check("states", error, _ERROR), Check("Dopri5's states", other, _ERROR)),
        numbers={"ours": few, "Dopri5's": many, "dt": dt, "rtol": rtol},
    )


def _solved(
    prob: ct.ODEProblem, exact: np.ndarray[tuple[int, ...], np.dtype[np.float64]], name: str, setting: float
) -> tuple[float, int]:
    """The largest error relative to the largest component, and the evaluations."""
    with torch.no_grad():
        if name == "Dopri5":
            sol = ct.solve(prob, ct.Dopri5(), saveat=_TIMES, rtol=setting, atol=setting, throw=True)
        else:
            sol = ct.solve(prob, ct.ExponentialMidpoint(dt=setting), saveat=_TIMES, throw=True)
    error = np.abs(sol.hs[:, 0].cpu().numpy() - exact).max() / np.abs(exact).max()
    return float(error), sol.stats.evaluations


def _problem(device: str) -> tuple[ct.ODEProblem, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """The problem, and its solution by scipy's Radau of the same equation in numpy, (time, state)."""
    generator = np.random.default_rng(0)
    tau = np.logspace(-2.0, 1.0, _UNITS)
    recurrent = generator.normal(size=(2 * _UNITS, _UNITS)) / np.sqrt(_UNITS)
    outer, bias = generator.normal(size=(2 * _UNITS, 2)), generator.normal(size=2 * _UNITS)
    start = generator.uniform(-0.5, 0.5, _UNITS)

    def slope(t: float, y: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> object:
        gate, pre = np.split(recurrent @ y + outer @ np.sin(np.multiply(_SPEED, t) + _PHASE) + bias, 2)
        return (np.tanh(pre) - y) / (1.0 + np.exp(-gate)) / tau

    done = solve_ivp(slope, (0.0, _SPAN), start, method="Radau", rtol=1e-9, atol=1e-10, t_eval=_TIMES)
    field = ct.MultiGate(2, _UNITS, tau=torch.from_numpy(tau), dtype=torch.float64)
    assert field.bias is not None
    with torch.no_grad():
        for parameter, value in ((field.weight_hh, recurrent), (field.weight_ih, outer), (field.bias, bias)):
            parameter.copy_(torch.from_numpy(value))
    speed, phase = (torch.tensor(x, dtype=torch.float64, device=device) for x in (_SPEED, _PHASE))
    control = ct.FunctionControl(lambda t: torch.sin(speed * t + phase), channels=2)
    h0 = torch.from_numpy(start).unsqueeze(0).to(device)
    return ct.ODEProblem(field.to(device), h0, (0.0, _SPAN), control), done.y.T
