"""Discrete cells: GRU and LSTM against torch's own, and dense output against torchdiffeq's Euler method."""

from collections.abc import Callable, Iterator

import torch
import torchdiffeq
from torch import Tensor, nn

import ctgate as ct
from ctgate.experiments.speed.compare import Found, checks, clock_of, timed
from ctgate.experiments.speed.lines import PER_STEP, Line
from ctgate.experiments.speed.pairing import paired
from ctgate.experiments.speed.peers import Flow, held, weights_of
from ctgate.experiments.speed.presets import Preset, target

CHANNELS = 16
# In float32 rounding grows with the number of steps that are added up in a gradient.
LIMITS = (1e-5, 1e-4)


class Sequences:
    """A batch of sequences, a cell of ctgate and the same cell of torch, and a fixed cotangent of all states.

    Parameters: ``kind``, ct.GRU or ct.LSTM; ``batch``, ``hidden``, ``steps``, one a tau; ``device``.
    """

    def __init__(
        self, kind: type[ct.GRU] | type[ct.LSTM], batch: int, hidden: int, steps: int, device: str
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.field = kind(CHANNELS, hidden, generator=generator).to(device)
        self.layer: nn.Module = self.field.to_torch()
        self.xs = torch.randn(steps, batch, CHANNELS, generator=generator).to(device)
        self.cotangent = torch.randn(steps, batch, hidden, generator=generator).to(device)
        self.ts = torch.arange(steps + 1, dtype=torch.float64)
        self.h0 = self.field.initial_state((batch,))
        self.sizes = f"H{hidden} T{steps} B{batch}"

    def problem(self) -> ct.ODEProblem:
        """The problem, its control made anew."""
        return ct.ODEProblem(self.field, self.h0, (0.0, len(self.xs)), ct.ZeroOrderHold(self.ts, self.xs))

    def solve(self) -> Tensor:
        """Our output after each step, (step, batch, hidden)."""
        return ct.solve(self.problem(), ct.Euler(dt=1.0)).output[1:]

    def torch(self) -> Tensor:
        """The output of torch's layer, (step, batch, hidden)."""
        states: Tensor = self.layer(self.xs)[0]
        return states

    def pulled(self, way: Callable[[], Tensor], module: nn.Module) -> Found:
        """The states of one way, and the gradients by the module's weights."""
        states = way()
        return Found(states.detach(), torch.autograd.grad(states, weights_of(module), self.cotangent))

    def ours(self) -> Found:
        """Forward and backward, ours."""
        return self.pulled(self.solve, self.field)

    def theirs(self) -> Found:
        """Forward and backward, torch's."""
        return self.pulled(self.torch, self.layer)


def only_output(case: Sequences) -> Tensor:
    """Our output where nothing but the hidden state is asked for, (step, batch, hidden)."""
    return ct.hidden_states(case.problem(), ct.Euler(dt=1.0), initial=False)


def gru(preset: Preset, device: str) -> Iterator[Line]:
    """Forward and backward of a GRU, the problem built from x each time, against ``torch.nn.GRU``."""
    for hidden, steps in preset.gru:
        case = Sequences(ct.GRU, preset.batch, hidden, steps, device)
        line = Line(
            "1",
            f"GRU fwd + bwd, {case.sizes}",
            "nn.GRU",
            target=target(device, "gru", hidden, steps),
            checks=checks(case.ours(), case.theirs(), LIMITS),
        )
        yield timed(line, case.ours, case.theirs, preset.rounds, device)


def lstm(preset: Preset, device: str) -> Iterator[Line]:
    """Forward and backward of an LSTM against ``torch.nn.LSTM``: all states, and the output alone."""
    for hidden, steps in preset.lstm:
        case = Sequences(ct.LSTM, preset.batch, hidden, steps, device)

        def output(case: Sequences = case) -> Found:
            return case.pulled(lambda: only_output(case), case.field)

        for name, ours in (("all of (c, h)", case.ours), ("h alone", output)):
            line = Line(
                "2",
                f"LSTM fwd + bwd, {name}, {case.sizes}",
                "nn.LSTM",
                target=target(device, "lstm", hidden, steps),
                checks=checks(ours(), case.theirs(), LIMITS),
            )
            yield timed(line, ours, case.theirs, preset.rounds, device)


def dense(preset: Preset, device: str) -> Iterator[Line]:
    """All states of a GRU against torchdiffeq's Euler method, and whether our time per step stays."""
    for steps in preset.dense:
        case = Sequences(ct.GRU, preset.batch, preset.hidden, steps, device)
        flow = Flow(case.field, held(case.xs))
        grid = case.ts.to(device, torch.float32)

        def euler(flow: Flow = flow, case: Sequences = case, grid: Tensor = grid) -> Found:
            def way() -> Tensor:
                states: Tensor = torchdiffeq.odeint(
                    flow, case.h0, grid, method="euler", options={"step_size": 1.0}
                )
                return states[1:]

            return case.pulled(way, flow)

        line = Line(
            "3",
            f"GRU fwd + bwd, every state, {case.sizes}",
            "torchdiffeq euler",
            target=target(device, "dense", preset.hidden, steps),
            checks=checks(case.ours(), euler(), LIMITS),
        )
        yield timed(line, case.ours, euler, preset.rounds, device)
    yield _per_step(preset, device)


def _per_step(preset: Preset, device: str) -> Line:
    """The time per step of a long sequence over that of a short one."""
    few, many = preset.per_step
    short, long = (Sequences(ct.GRU, preset.batch, preset.hidden, steps, device) for steps in (few, many))
    pairing = paired(short.ours, long.ours, preset.rounds, clock=clock_of(device))
    return Line(
        "3",
        f"GRU fwd + bwd, {long.sizes}",
        f"ours at T{few}",
        quantity=PER_STEP,
        ratios=tuple(ratio * few / many for ratio in pairing.ratios),
        target=target(device, "per step", preset.hidden, many),
        checks=checks(long.ours(), long.theirs(), LIMITS),
    )
