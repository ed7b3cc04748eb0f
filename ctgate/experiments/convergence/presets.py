"""How much is measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """The lengths of the series.

    ``sizes`` step sizes per fixed-step method, each half the one before; ``tolerances`` per adaptive method,
    half a decade apart; ``draws`` of weights, inputs and states over which the noise of the step-size
    controller is averaged; ``refinements`` of the discrete cell, each halving its step; ``cells``, its steps.
    """

    sizes: int
    tolerances: int
    draws: int
    refinements: int
    cells: int


PRESETS = {
    "quick": Preset(sizes=4, tolerances=7, draws=6, refinements=8, cells=8),
    "full": Preset(sizes=6, tolerances=9, draws=8, refinements=10, cells=16),
}
