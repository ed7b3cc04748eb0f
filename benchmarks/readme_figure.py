"""The figure of README.md: a trained torch.nn.GRU as a flow, and its gates as time constants.

    python benchmarks/readme_figure.py [--out benchmarks/figures/gates_are_time_constants.png]

An nn.GRU learns to follow a signal while a second input says "write" and to hold it otherwise. Its update
gate has to open and close, which in continuous time is a time constant that falls and rises.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

import ctgate as ct

STEPS, UNITS, TAU = 60, 8, 1.0
INK, MUTED, BAND = "#22262e", "#9aa1ad", "#f3e3c3"
COLOURS = ("#0b6aa8", "#d1495b")
WINDOW = (14.0, 30.0)
SIZES = {TAU: 7.0, TAU / 2: 4.2, TAU / 4: 2.4}


def track_and_hold(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs (time, sample, [signal, write]) and the target: the signal last seen while write was on."""
    anchors = torch.randn(samples, 1, STEPS // 8 + 3, generator=generator)
    signal = nn.functional.interpolate(anchors, size=STEPS + 16, mode="linear")[:, 0, 8 : 8 + STEPS].tanh()
    write = torch.zeros(samples, STEPS)
    for row in write:
        start = int(torch.randint(0, 6, (), generator=generator))
        while start < STEPS:
            length, pause = (int(torch.randint(*span, (), generator=generator)) for span in ((4, 9), (6, 20)))
            row[start : start + length] = 1.0
            start += length + pause
    held, target = torch.zeros(samples), []
    for now, on in zip(signal.T, write.T, strict=True):
        held = torch.where(on > 0, now, held)
        target.append(held)
    return torch.stack([signal.T, write.T], -1), torch.stack(target)


def train(generator: torch.Generator, iterations: int = 800) -> nn.GRU:
    """A small nn.GRU that solves the task; a mean squared error below 1 % of the target's variance."""
    gru = ct.GRU(2, UNITS, generator=generator).to_torch()
    readout = nn.Linear(UNITS, 1)
    nn.init.normal_(readout.weight, std=UNITS**-0.5, generator=generator)
    nn.init.zeros_(readout.bias)
    parameters = [*gru.parameters(), *readout.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    for step in range(iterations):
        x, y = track_and_hold(32, generator)
        loss = (readout(gru(x)[0])[..., 0] - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == iterations - 1:
            print(f"iteration {step:4d}  mean squared error {loss.item():.2e}")
    return gru


def shade_writes(axes: Axes, write: Tensor) -> None:
    """A band wherever the network is told to write, with its name at the top."""
    edges = torch.diff(write, prepend=torch.zeros(1), append=torch.zeros(1)).nonzero()[:, 0].tolist()
    low, high = axes.get_xlim()
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        axes.axvspan(start * TAU, stop * TAU, color=BAND, lw=0, zorder=0)
    holds = zip([0, *edges[1::2]], [*edges[::2], len(write)], strict=True)
    for word, spans in (("write", zip(edges[::2], edges[1::2], strict=True)), ("hold", holds)):
        for start, stop in spans:
            left, right = max(start * TAU, low), min(stop * TAU, high)
            if right - left > 0.06 * (high - low):
                place = {"ha": "center", "va": "bottom", "transform": axes.get_xaxis_transform()}
                axes.text((left + right) / 2, 1.01, word, color=MUTED, fontsize=9.5, **place)


def draw(cells: dict[float, ct.Solution], flow: ct.Solution, write: Tensor, path: Path) -> None:
    plt.rcParams.update({"font.size": 11, "axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.0, 4.4), layout="constrained")
    fine = torch.linspace(0.0, STEPS * TAU, 4801, dtype=torch.float64)
    states = flow(fine)
    constants = flow.prob.field.time_constants(0.0, states, flow.prob.control(fine))[:, 0] / TAU
    by_range = (constants.max(0).values / constants.min(0).values).argsort(descending=True).tolist()
    coloured = dict(zip((by_range[0], by_range[UNITS // 2]), COLOURS, strict=True))

    left.set_xlim(*WINDOW)
    shade_writes(left, write)
    inside = (fine >= WINDOW[0]) & (fine <= WINDOW[1])
    for unit, colour in coloured.items():
        left.plot(fine[inside], states[inside, 0, unit], color=colour, lw=1.6)
        for dt, cell in cells.items():
            face = "white" if dt == TAU else colour
            left.plot(
                cell.ts, cell.hs[:, 0, unit], "o", color=colour, ms=SIZES[dt], mfc=face, mew=1.3, zorder=3
            )
    for dt, cell in cells.items():
        distance = (cell.hs - flow(cell.ts)).abs().max()
        name = {1.0: "step τ, torch.nn.GRU", 0.5: "step τ/2", 0.25: "step τ/4"}[dt / TAU]
        face = "white" if dt == TAU else INK
        left.plot(
            [],
            [],
            "o",
            color=INK,
            ms=SIZES[dt],
            mfc=face,
            mew=1.3,
            label=f"{name}: within {distance:.2f}",
        )
    left.plot([], [], color=INK, lw=1.6, label="the flow")
    left.legend(frameon=False, fontsize=9.5, handletextpad=0.4, handlelength=1.4, loc="center right")
    left.set(xlabel="time / τ", ylabel="hidden state of two units")
    left.set_title("A GRU is one discretisation of a flow", pad=20, loc="left", fontsize=12.5)

    right.set_xlim(0, STEPS)
    shade_writes(right, write)
    for unit in range(UNITS):
        colour, width = (coloured[unit], 2.2) if unit in coloured else (MUTED, 1.0)
        right.semilogy(
            fine / TAU, constants[:, unit], color=colour, lw=width, zorder=3 if unit in coloured else 2
        )
    right.set(xlabel="time / τ", ylabel="time constant / τ  =  1 / (1 - update gate)", ylim=(0.9, None))
    right.set_title("Its gates are time constants", pad=20, loc="left", fontsize=12.5)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "figures/gates_are_time_constants.png"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(arguments.seed)
    gru = train(generator)
    x, _ = track_and_hold(1, generator)

    field = ct.GRU.from_torch(gru, tau=TAU)
    edges = torch.arange(STEPS + 1) * TAU
    prob = ct.ODEProblem(
        field, field.initial_state((1,)), (0.0, STEPS * TAU), control=ct.ZeroOrderHold(edges, x)
    )
    with torch.no_grad():
        cells = {dt: ct.solve(prob, ct.Euler(dt=dt)) for dt in (TAU, TAU / 2, TAU / 4)}
        flow = ct.solve(prob, ct.Dopri5())
        print(f"largest |Euler(dt=tau) - nn.GRU| {(cells[TAU].output[1:] - gru(x)[0]).abs().max():.1e}")
        for dt, cell in cells.items():
            print(f"dt = {dt:5.3f} tau: largest |cell - flow| {(cell.hs - flow(cell.ts)).abs().max():.3f}")
        draw(cells, flow, x[:, 0, 1], arguments.out)


if __name__ == "__main__":
    main()
