"""What to tell a person whose solve failed."""

import torch
from torch import Tensor

from ctgate.integrators.dynamics import beside
from ctgate.integrators.recorder import Recorder
from ctgate.problem import ODEProblem
from ctgate.retcode import ReturnCode
from ctgate.sensealg.samples import SampleRun

_ADVICE = {
    ReturnCode.MAX_STEPS: (
        "raise max_steps, loosen rtol and atol, or, where one rate is far above the others (a stiff "
        "problem), take Rosenbrock23(), Radau() or ExponentialMidpoint(dt)"
    ),
    ReturnCode.DT_UNDERFLOW: (
        "loosen rtol and atol, solve in float64, or look for a singularity of the field there"
    ),
    ReturnCode.UNSTABLE: (
        "take a smaller dt (explicit steps need dt * rate below about 2), take an exponential method, or "
        "look for weights or inputs that are too large"
    ),
    ReturnCode.INTERRUPTED: "call solve again, or use the part that is there",
}


@torch.no_grad()
def describe_failure(prob: ODEProblem, recorder: Recorder, code: ReturnCode, detail: str) -> str:
    """Time, step, worst unit and its rate at the last good state, and what to try."""
    t, h = recorder.last_good or (prob.span[0], prob.h0)
    assert not isinstance(t, Tensor)
    u = None if prob.control is None else prob.control(t)
    rate, drive = prob.call("rate_drive", t, h, u)
    speed = (drive - rate * h).abs()
    unit = int(speed.nan_to_num(nan=torch.inf).argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(unit), h.shape)]
    step = "" if recorder.last_step is None else f", step {recorder.last_step[1] - recorder.last_step[0]:.3g}"
    worst = _worst(prob, where, h, rate, drive)
    return f"{detail} (good until t = {t:.9g}{step}; {worst}); to try: {_ADVICE[code]}"


@torch.no_grad()
def describe_failures(prob: ODEProblem, run: SampleRun) -> str:
    """How many samples failed, and for the first of them what :func:`describe_failure` says."""
    failed = [lane for lane, code in enumerate(run.codes) if not code.good]
    lane = failed[0]
    t, h = run.ts[-1], run.hs[-1]
    u = None if prob.control is None else prob.control(t.expand(h.shape[:-1])[None])[0]
    rate, drive = prob.call("rate_drive", beside(t), h, u)
    speed = (drive - rate * h).abs().reshape(len(run.codes), -1)[lane]
    sample = [int(i) for i in torch.unravel_index(torch.tensor(lane), h.shape[:-1])]
    where = [*sample, int(speed.nan_to_num(nan=torch.inf).argmax())]
    many = f"{len(failed)} of {len(run.codes)} samples; the first: " if len(run.codes) > 1 else ""
    return (
        f"{many}{run.details[lane]} (good until t = {float(t.reshape(-1)[lane]):.9g}; "
        f"{_worst(prob, where, h, rate, drive)}); to try: {_ADVICE[run.codes[lane]]}"
    )


def _worst(prob: ODEProblem, where: list[int], h: Tensor, rate: Tensor, drive: Tensor) -> str:
    sample = f" of sample {tuple(where[:-1])}" if len(where) > 1 else ""
    return (
        f"worst is {_unit_name(prob, where[-1])}{sample}: h = {_at(h, where):.4g}, "
        f"dh/dt = {_at(drive - rate * h, where):.4g}, rate = {_at(rate, where):.4g} per unit time"
    )


def _at(x: Tensor, where: list[int]) -> float:
    return float(x[tuple(where)])


def _unit_name(prob: ODEProblem, index: int) -> str:
    for name, part in prob.field.components.items():
        positions = range(*part.indices(prob.h0.shape[-1]))
        if index in positions:
            return f"unit {positions.index(index)} of {name}"
    return f"unit {index}"
