"""Products with the parameters: gradients of single samples, and the tangent along a direction."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn import functional

import ctgate as ct
from ctgate.experiments.speed.compare import Found, relative, timed
from ctgate.experiments.speed.discrete import LIMITS, Sequences
from ctgate.experiments.speed.lines import Check, Line
from ctgate.experiments.speed.peers import NAMES, Weights, gru_loop, weights_of
from ctgate.experiments.speed.presets import Preset, target

_INPUTS = 6
_GATED = ("weight_ih", "weight_hh", "bias")
_READOUT = ("weight", "bias")


class Samples:
    """A network with a gate per unit, read out at the end of each sequence, a squared error per sample, and
    their gradients: the anisotropy experiment of L. Livi, arXiv 2508.12121, has these sizes."""

    def __init__(self, samples: int, hidden: int, steps: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.field = ct.MultiGate(_INPUTS, hidden, generator=generator).to(device)
        self.readout = nn.Linear(hidden, 1, device=device)
        with torch.no_grad():
            for parameter in self.readout.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / hidden**0.5)
        self.xs = torch.randn(steps, samples, _INPUTS, generator=generator).to(device)
        self.y = torch.randn(samples, generator=generator).to(device)
        self.ts = torch.arange(steps + 1, dtype=torch.float64)

    def ours(self) -> list[Tensor]:
        """Rows by parameter, (sample, *shape)."""
        control = ct.ZeroOrderHold(self.ts, self.xs)
        h0 = self.field.initial_state(self.y.shape)
        prob = ct.ODEProblem(self.field, h0, (0.0, len(self.xs)), control)
        loss = ct.Loss(terminal=lambda seen: (seen[..., 0] - self.y).square(), readout=self.readout)
        rows = ct.per_sample_gradients(prob, loss, ct.Euler(dt=1.0))
        return [rows[name] for name in (*_GATED, *(f"readout.{name}" for name in _READOUT))]

    def loop(self, count: int) -> list[Tensor]:
        """The same for the first samples, one loop over time and one reverse pass after the other."""
        weights = dict(self.field.named_parameters())
        parameters = [*(weights[name] for name in _GATED), *self.readout.parameters()]
        h0 = self.field.initial_state((1,))
        found = []
        for k in range(count):
            seen = self.readout(gated_end(weights, h0, self.xs[:, k : k + 1]))
            found.append(torch.autograd.grad((seen[0, 0] - self.y[k]).square(), parameters))
        return [torch.stack(rows) for rows in zip(*found, strict=True)]

    def mapped(self) -> list[Tensor]:
        """The same by vmap(grad) of the same loop."""
        cell = {name: weight.detach() for name, weight in self.field.named_parameters()}
        outside = {name: p.detach() for name, p in self.readout.named_parameters()}
        h0 = self.field.initial_state()

        def cost(parameters: tuple[Weights, Weights], xs: Tensor, y: Tensor) -> Tensor:
            h = gated_end(parameters[0], h0, xs)
            seen = functional.linear(h, parameters[1]["weight"], parameters[1]["bias"])
            return (seen[0] - y).square()

        inside, read = vmap(grad(cost), in_dims=(None, 1, 0))((cell, outside), self.xs, self.y)
        return [*(inside[name] for name in _GATED), *(read[name] for name in _READOUT)]


def gated_end(weights: Weights, h: Tensor, xs: Tensor) -> Tensor:
    """The last state of the discrete cell with a gate per unit over ``xs`` (step, ..., channel)."""
    for u in xs:
        pre = functional.linear(u, weights["weight_ih"], weights["bias"])
        gate, candidate = (pre + functional.linear(h, weights["weight_hh"])).chunk(2, -1)
        h = h + torch.sigmoid(gate) * (torch.tanh(candidate) - h)
    return h


def samples(preset: Preset, device: str) -> Iterator[Line]:
    """The gradients of single samples against a loop and against vmap(grad)."""
    count, steps, few = preset.samples, preset.sample_steps, preset.sample_loop
    case = Samples(count, preset.sample_hidden, steps, device)
    workload = f"gradients of {count} samples, gate per unit, H{preset.sample_hidden} T{steps}"
    rows = case.ours()

    line = Line(
        "8",
        workload,
        f"loop over samples ({few} x {count / few:g})",
        target=target(device, "samples loop", count, steps),
        checks=(Check("gradients", relative([row[:few] for row in rows], case.loop(few)), LIMITS[1]),),
    )
    yield timed(line, case.ours, lambda: case.loop(few), preset.rounds, device, scale=count / few)
    line = Line(
        "8",
        workload,
        "vmap(grad)",
        target=target(device, "samples vmap", count, steps),
        checks=(Check("gradients", relative(rows, case.mapped()), LIMITS[1]),),
    )
    yield timed(line, case.ours, case.mapped, preset.rounds, device)


def tangent(preset: Preset, device: str) -> Iterator[Line]:
    """States and their tangent along one direction of all weights, against forward mode of the loop."""
    case = Sequences(ct.GRU, preset.batch, preset.hidden, preset.tangent_steps, device)
    weights = {name: p.detach() for name, p in zip(NAMES, weights_of(case.field), strict=True)}
    generator = torch.Generator().manual_seed(1)
    direction = {
        name: torch.randn(weight.shape, generator=generator).to(device) for name, weight in weights.items()
    }

    def ours() -> Found:
        found = ct.sensitivity_jvp(case.problem(), ct.Euler(dt=1.0), direction=direction)
        return Found(found.solution.hs, [found.tangent])

    @torch.no_grad()
    def theirs() -> Found:
        states, along = jvp(lambda w: gru_loop(w, case.h0, case.xs), (weights,), (direction,))[:2]
        return Found(states, [along])

    first, second = ours(), theirs()
    line = Line(
        "11",
        f"GRU forward + tangent, {case.sizes}",
        "torch.func.jvp of the loop",
        target=target(device, "tangent", preset.hidden, preset.tangent_steps),
        checks=(
            Check("states", relative([first.states], [second.states]), LIMITS[0]),
            Check("tangent", relative(first.gradients, second.gradients), LIMITS[1]),
        ),
    )
    yield timed(line, ours, theirs, preset.rounds, device)
