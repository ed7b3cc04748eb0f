"""A static phase diagram in one computation, against the solver of a point in a loop."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

import ctgate as ct
from ctgate.experiments.speed.compare import timed
from ctgate.experiments.speed.lines import Check, Line
from ctgate.experiments.speed.presets import Preset, target
from ctgate.meanfield import RandomNetwork, phase_diagram, static

Array = NDArray[np.float64]
_DIFFERENCE, _RESIDUAL = 1e-8, 1e-14


class Diagram:
    """A GRU, reset before the product, over the gains of candidate and reset gate: all three regions.

    Parameters: ``side``, the number of values of each; ``few``, how many of the cells the loop has.
    """

    def __init__(self, side: int, few: int) -> None:
        gains = {"h": 1.0, "z": 5.0, "r": 1.0}
        self.network = RandomNetwork(ct.GRU, 100, gains, reset="before")
        self.along_h, self.along_r = np.linspace(1.2, 4.0, side), np.linspace(0.5, 12.0, side)
        self.cells = [divmod(int(k), side) for k in np.linspace(0, side * side - 1, few)]

    def ours(self) -> tuple[Array, Array]:
        """q and residual (r, h, solution)."""
        data = phase_diagram(self.network, ("gains.h", self.along_h), ("gains.r", self.along_r))
        return data["q"].to_numpy(), data["residual"].to_numpy()

    def loop(self) -> list[tuple[Array, Array]]:
        """q and residual of single cells."""
        found = []
        for row, column in self.cells:
            network = self.network.at("gains.r", float(self.along_r[row]))
            data = static(network.at("gains.h", float(self.along_h[column])))
            found.append((data["q"].to_numpy(), data["residual"].to_numpy()))
        return found


def phase(preset: Preset, device: str) -> Iterator[Line]:
    """All fixed points over a grid."""
    side, few = preset.phase, preset.phase_loop
    case = Diagram(side, few)
    (q, residual), points = case.ours(), case.loop()
    differences, residuals = [0.0], [float(np.nanmax(np.abs(residual)))]
    for cell, (at, left) in zip(case.cells, points, strict=True):
        here = q[cell][np.isfinite(q[cell])]
        differences.append(float(np.abs(here - at).max()) if here.shape == at.shape else np.inf)
        residuals.append(float(np.abs(left).max()))
    line = Line(
        "phase",
        f"static phase diagram, GRU, {side} x {side}",
        f"static in a loop ({few} x {side * side / few:g})",
        target=target(device, "phase", side),
        checks=(
            Check("solutions", max(differences), _DIFFERENCE),
            Check("residual", max(residuals), _RESIDUAL),
        ),
    )
    yield timed(line, case.ours, case.loop, preset.rounds, device, scale=side * side / few)
