"""What has no target, and where others may be faster."""

import itertools
from collections.abc import Iterator

import torch

import ctgate as ct
from ctgate.experiments.speed.adaptive import against_compiled
from ctgate.experiments.speed.compare import Found, checks, timed
from ctgate.experiments.speed.discrete import LIMITS, Sequences
from ctgate.experiments.speed.lines import Line
from ctgate.experiments.speed.presets import Preset

_TINY = (4, 10)


def record(preset: Preset, device: str) -> Iterator[Line]:
    """Forward alone, a tiny problem, and a loop that is compiled as a whole."""
    if not preset.records:
        return
    hidden, steps = preset.lstm[-1]
    yield from itertools.chain.from_iterable(
        _forward_alone(kind, hidden, steps, preset, device) for kind in (ct.GRU, ct.LSTM)
    )
    hidden, steps = _TINY
    case = Sequences(ct.GRU, 1, hidden, steps, device)
    line = Line(
        "record",
        f"GRU fwd + bwd, a tiny problem, {case.sizes}",
        "nn.GRU",
        checks=checks(case.ours(), case.theirs(), LIMITS),
    )
    yield timed(line, case.ours, case.theirs, preset.rounds, device)
    yield from against_compiled(preset, device)


def _forward_alone(
    kind: type[ct.GRU] | type[ct.LSTM], hidden: int, steps: int, preset: Preset, device: str
) -> Iterator[Line]:
    """Without gradients, against torch's layer."""
    case = Sequences(kind, preset.batch, hidden, steps, device)

    @torch.no_grad()
    def ours() -> Found:
        return Found(case.solve())

    @torch.no_grad()
    def theirs() -> Found:
        return Found(case.torch())

    name = kind.__name__
    line = Line("record", f"{name} fwd, {case.sizes}", f"nn.{name}", checks=checks(ours(), theirs(), LIMITS))
    yield timed(line, ours, theirs, preset.rounds, device)
