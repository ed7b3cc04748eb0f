"""Which rows there are, and what the process that measures one of them does."""

import gc
import json
import os
import traceback
from collections.abc import Callable, Iterator

import torch

from ctgate.experiments.speed import adaptive, discrete, dynamics, meanfield, products, record, stiff
from ctgate.experiments.speed.lines import Line
from ctgate.experiments.speed.presets import Preset, preset_from

Row = Callable[[Preset, str], Iterator[Line]]
# By the numbers of the targets.
ROWS: dict[str, Row] = {
    "1": discrete.gru,
    "2": discrete.lstm,
    "3": discrete.dense,
    "4": adaptive.flow,
    "5": adaptive.knots,
    "6": adaptive.equal_error,
    "7": adaptive.exact_gradient,
    "8": products.samples,
    "11": products.tangent,
    "13": dynamics.spectrum,
    "15": stiff.gates,
    "phase": meanfield.phase,
    "record": record.record,
}


def measure(row: str, preset: Preset, device: str) -> Iterator[Line]:
    """The lines of a row; where something goes wrong, one that says so, after the traceback on stderr."""
    try:
        yield from ROWS[row](preset, device)
    except Exception as error:
        traceback.print_exc()
        yield failure(row, f"{type(error).__name__}: {' '.join(str(error).split())}")


def failure(row: str, why: str) -> Line:
    """The line of a row that came to nothing."""
    return Line(row, f"row {row}", "", failed=why)


def main(row: str, preset: str, device: str) -> None:
    """Measure a row in this process, which is there for nothing else: one thread, one core of a CPU.

    ``preset`` is JSON, and each line that is printed is.
    """
    torch.set_num_threads(1)
    # jax counts the cores that it may use; it is imported later.
    if device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    gc.freeze()
    for line in measure(row, preset_from(json.loads(preset)), device):
        print(json.dumps(line.to_dict()), flush=True)
