"""Flows with adaptive steps: against torchdiffeq and diffrax, in time, memory and error."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torchdiffeq
from torch import Tensor

import ctgate as ct
from ctgate.experiments.speed.compare import Found, checks, relative, timed
from ctgate.experiments.speed.dopri5 import along
from ctgate.experiments.speed.driven import Driven
from ctgate.experiments.speed.lines import ERROR, MEMORY, Check, Line
from ctgate.experiments.speed.memory import peaks
from ctgate.experiments.speed.peers import NAMES, Diffrax, missing, weights_of
from ctgate.experiments.speed.presets import Preset, target

# Errors per step add up to some tens of tolerances, those of gradients to more; beyond this it is a mistake.
_STATE, _GRADIENT = 100.0, 1000.0
# Tolerances to choose from where errors are to be equal: four a decade, loosest first.
_TOLERANCES = tuple(10.0 ** (-k / 4) for k in range(8, 29))
EXACT_RTOL = 1e-6
# What the tolerance is asked of, where it is not what it is to the others.
_OF = {"torchdiffeq": "", "max": " of the worst sample"}


def flow(preset: Preset, device: str) -> Iterator[Line]:
    """Forward, gradient and peak memory under a smooth input at the same tolerance."""
    case = Driven(preset.hidden, preset.batch, preset.span, device=device)
    for rtol in preset.tolerances:
        yield from _both("4", case, rtol, preset, device, ("flow forward", "flow gradient"))
        yield _memory(case, rtol, preset, device)
    if not preset.records:
        return
    worst = Driven(preset.hidden, preset.batch, preset.span, device=device, norm="max")
    yield from _both("4", worst, preset.tolerances[0], preset, device, ("", ""))


def knots(preset: Preset, device: str) -> Iterator[Line]:
    """Forward and gradient under an input of straight lines, torchdiffeq told of their ends, or not told."""
    case = Driven(preset.hidden, preset.batch, preset.span, knots=True, device=device)
    rtol = preset.knot_tolerance
    places = torch.arange(1.0, case.span, device=device)
    yield from _both("5", case, rtol, preset, device, ("knots", ""), step_t=places)
    if preset.records:
        yield next(_both("5", case, rtol, preset, device, ("", "")))


def _both(
    row: str,
    case: Driven,
    rtol: float,
    preset: Preset,
    device: str,
    keys: tuple[str, str],
    **options: Tensor,
) -> Iterator[Line]:
    """Forward, and forward with gradient, of both at one tolerance; for the record where there is no key."""
    ways: tuple[tuple[str, str, Callable[[], Found], Callable[[], Found]], ...] = (
        (
            "fwd",
            keys[0],
            lambda: case.forward(rtol),
            lambda: case.their_forward(rtol, **options),
        ),
        (
            "fwd + bwd",
            keys[1],
            lambda: case.gradient(rtol),
            lambda: case.their_gradient(rtol, **options),
        ),
    )
    for name, key, ours, theirs in ways:
        if not key and not preset.records:
            continue
        size = (preset.hidden, preset.span) + ((rtol,) if key == "knots" else ())
        line = _with_errors(
            Line(
                row if key else "record",
                f"dopri5 {name}, rtol {rtol:.0e}{_OF[case.alg.norm]}, {case.sizes}",
                "torchdiffeq" + "".join(f" + {option}" for option in options),
                target=target(device, key, *size),
            ),
            case.reference,
            ours(),
            theirs(),
            rtol,
        )
        yield timed(line, ours, theirs, preset.rounds, device)


def _with_errors(line: Line, reference: Found, ours: Found, theirs: Found, rtol: float) -> Line:
    """The line with the errors of both, and whether ours are what the tolerance promises."""
    states = [relative([found.states], [reference.states]) for found in (ours, theirs)]
    numbers = dict(zip(("our error", "their error"), states, strict=True))
    if ours.gradients:
        found = [relative(one.gradients, reference.gradients) for one in (ours, theirs)]
        numbers |= dict(zip(("our gradient error", "their gradient error"), found, strict=True))
    return dataclasses.replace(
        line,
        checks=checks(ours, reference, (_STATE * rtol, _GRADIENT * rtol)),
        errors=(states[0], states[1]),
        numbers=numbers,
    )


def _memory(case: Driven, rtol: float, preset: Preset, device: str) -> Line:
    """The peak memory of forward and backward, each in a process of its own."""
    ours, theirs = peaks(preset, rtol, device)
    return Line(
        "4",
        f"dopri5 fwd + bwd, rtol {rtol:.0e}, {case.sizes}",
        "torchdiffeq",
        quantity=MEMORY,
        ratios=(ours / theirs,),
        target=target(device, "flow memory", preset.hidden, preset.span),
        numbers={"ours [MiB]": ours / 2**20, "theirs [MiB]": theirs / 2**20},
    )


def equal_error(preset: Preset, device: str) -> Iterator[Line]:
    """Gradients where both make the error in the final state that torchdiffeq makes at a tolerance."""
    workload = f"dopri5 fwd + bwd, {preset.span} tau, H{preset.hidden} B{preset.batch}"
    if skip := _without_diffrax(device):
        yield Line("6", workload, "diffrax jit", skipped=skip)
        return
    case = Driven(preset.hidden, preset.batch, preset.span)
    other = diffrax_of(case)

    def their_error(tolerance: float) -> float:
        return relative([_tensor(other.forward(case.span, tolerance))], [case.reference.states])

    def our_error(tolerance: float) -> float:
        return relative([case.forward(tolerance).states], [case.reference.states])

    for rtol in preset.tolerances:
        level = relative([case.their_forward(rtol).states], [case.reference.states])
        mine, its = (_loosest(error, level) for error in (our_error, their_error))
        name = f"{workload}, error {level:.1e} (torchdiffeq's at rtol {rtol:.0e})"
        if mine is None:
            yield Line("6", name, "diffrax jit", failed="no tolerance gives this error")
            continue
        if its is None:
            yield Line("6", name, "diffrax jit", skipped="diffrax gives this error at no tolerance")
            continue
        state, by_name = other.gradient(case.span, its)
        found = Found(_tensor(state), [_tensor(by_name[weight]) for weight in NAMES])
        line = _with_errors(
            Line("6", name, "diffrax jit", target=target(device, "equal error", preset.hidden, preset.span)),
            case.reference,
            case.gradient(mine),
            found,
            mine,
        )
        # Both are within the level, which is what "equal" asks for; which of them is below by more is chance.
        numbers = {**line.numbers, "our rtol": mine, "their rtol": its}
        line = dataclasses.replace(line, errors=None, numbers=numbers)
        yield timed(
            line,
            partial(case.gradient, mine),
            partial(other.gradient, case.span, its),
            preset.rounds,
            device,
        )


def against_compiled(preset: Preset, device: str) -> Iterator[Line]:
    """Forward at the looser tolerance against diffrax, compiled as a whole."""
    rtol = preset.tolerances[0]
    workload = (
        f"dopri5 fwd, rtol {rtol:.0e}, smooth input, {preset.span} tau, H{preset.hidden} B{preset.batch}"
    )
    if skip := _without_diffrax(device):
        yield Line("record", workload, "diffrax jit", skipped=skip)
        return
    case = Driven(preset.hidden, preset.batch, preset.span)
    other = diffrax_of(case)
    theirs = Found(_tensor(other.forward(case.span, rtol)))
    line = _with_errors(
        Line("record", workload, "diffrax jit"), case.reference, case.forward(rtol), theirs, rtol
    )
    yield timed(
        line, lambda: case.forward(rtol), lambda: other.forward(case.span, rtol), preset.rounds, device
    )


def exact_gradient(preset: Preset, device: str) -> Iterator[Line]:
    """Our gradient of the final state against that of the same steps taken by plain torch in float64, and
    what torchdiffeq's continuous adjoint, which integrates the contracting flow backwards, makes of it."""
    case = Driven(preset.hidden, max(1, preset.batch // 4), preset.span, device=device, dtype=torch.float64)
    sol = ct.solve(case.problem(), ct.Dopri5(), rtol=EXACT_RTOL, atol=EXACT_RTOL, throw=True)
    ours = torch.autograd.grad(sol.hs[-1], weights_of(case.field), case.cotangent)
    same = along(case.flow, case.h0, sol.ts.tolist())
    exact = torch.autograd.grad(same, weights_of(case.flow), case.cotangent)
    workload = f"dopri5 gradient, rtol {EXACT_RTOL:.0e}, {case.sizes}"
    yield Line(
        "7",
        f"{workload}, float64",
        "the same steps in plain torch",
        quantity=ERROR,
        ratios=(relative(ours, exact),),
        target=target(device, "exact gradient"),
        checks=(Check("states", relative([sol.hs[-1].detach()], [same.detach()]), 1e-9),),
        numbers={
            "steps": sol.stats.accepted,
            "error against the flow's gradient": relative(ours, case.reference.gradients),
        },
    )
    if not preset.records:
        return
    single = Driven(preset.hidden, max(1, preset.batch // 4), preset.span, device=device)
    error, end = _continuous(single, 4 * sol.stats.accepted, case.reference.gradients)
    yield Line(
        "record",
        f"{workload}, float32, odeint_adjoint's",
        "float64",
        quantity=ERROR,
        ratios=() if error is None else (error,),
        note=end,
    )


def _continuous(case: Driven, limit: int, exact: Sequence[Tensor]) -> tuple[float | None, str]:
    """The error of torchdiffeq's continuous adjoint, None where it comes to nothing, and why."""
    try:
        state = torchdiffeq.odeint_adjoint(
            case.flow,
            case.h0,
            case.ends,
            rtol=EXACT_RTOL,
            atol=EXACT_RTOL,
            method="dopri5",
            adjoint_options={"max_num_steps": limit},
        )[-1]
        found = torch.autograd.grad(state, weights_of(case.flow), case.cotangent)
    except AssertionError as error:
        return None, f"it gives up on the way back: {error}"
    if not all(bool(part.isfinite().all()) for part in found):
        return None, "it is not finite"
    return relative(found, exact), ""


def diffrax_of(case: Driven) -> Diffrax:
    """The same problem for diffrax."""
    weights = dict(zip(NAMES, weights_of(case.field), strict=True))
    return Diffrax(weights, case.h0, case.speed, case.phase, case.cotangent)


def _without_diffrax(device: str) -> str:
    """Why diffrax is not run; empty if it is."""
    return "diffrax is timed on a CPU only" if device != "cpu" else missing("diffrax", "jax")


def _tensor(array: object) -> Tensor:
    """A copy of an array of jax."""
    import numpy as np

    return torch.from_numpy(np.array(array))


def _loosest(error: Callable[[float], float], level: float) -> float | None:
    """The loosest tolerance whose error is within the level."""
    return next((tolerance for tolerance in _TOLERANCES if error(tolerance) <= level), None)
