"""Benchmarks of speed: how fast against torch, torchdiffeq and diffrax, and is the result right?

``ctgate bench speed`` and the scripts in ``benchmarks/speed`` call :func:`run`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from ctgate.experiments.speed.lines import Line
from ctgate.experiments.speed.presets import PRESETS, Preset
from ctgate.experiments.speed.rows import ROWS, failure
from ctgate.experiments.speed.table import table, write

# One thread for everybody. Memory that was freed is kept by the process: touching fresh pages can cost more
# than the arithmetic, and would cost whoever happens to come first.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
_CHILD = "import sys; from ctgate.experiments.speed.rows import main; main(*sys.argv[1:])"


def run(
    preset: str,
    out: Path,
    device: str = "cpu",
    rows: Sequence[str] | None = None,
    progress: bool = True,
) -> int:
    """Measure rows, each in a process of its own on one thread; print a table, write ``speed.json`` to
    ``out``.

    Every result is held against a reference before it is timed. Ratios are medians over rounds in which ours
    and the other take turns.

    Parameters: ``preset``, ``quick`` (about three minutes) or ``full``; ``device``, ``cpu`` or a CUDA
    device, where some rows are not run; ``rows``, some of those in ``ROWS``, all by default; ``progress``,
    show a bar on a terminal.

    Returns: 1 if a result is wrong or a row came to nothing, else 0. A missed target is a verdict: times
    depend on the machine and on what else it does.

    Raises: ValueError for an unknown preset, row or device.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; it must be one of {', '.join(PRESETS)}")
    chosen = list(ROWS) if rows is None else list(rows)
    for row in chosen:
        if row not in ROWS:
            raise ValueError(f"rows has {row!r}; the rows are: {', '.join(ROWS)}")
    _check_device(device)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "speed.json"
    lines: list[Line] = []
    for row in tqdm(chosen, "rows", disable=None if progress else True, leave=False):
        lines += launch(row, PRESETS[preset], device)
        write(path, lines, preset, PRESETS[preset], device)
    print(table(lines))
    wrong = sum(line.wrong for line in lines)
    aimed = [line for line in lines if line.target is not None and not line.skipped]
    met = sum(line.verdict == "meets" for line in aimed)
    print(f"\n{met} of {len(aimed)} targets are met, ", end="")
    print(f"{wrong} of {len(lines)} results are WRONG; {path}" if wrong else f"all results are right; {path}")
    sys.stdout.flush()
    return 1 if wrong else 0


def launch(row: str, preset: Preset, device: str) -> list[Line]:
    """The lines of a row, measured in a process of its own; what it had when it broke down, and that."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, row, json.dumps(asdict(preset)), device],
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(os.environ),
        check=False,
    )
    lines = [Line.from_dict(json.loads(text)) for text in done.stdout.splitlines()]
    if done.returncode:
        lines.append(failure(row, f"its process ended with code {done.returncode}"))
    return lines


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    return {**given, **ENVIRONMENT}


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; it must be cpu or a CUDA device") from error
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device is {device!r}; it must be cpu, or cuda where torch finds a CUDA device")


def script(rows: Sequence[str], arguments: Sequence[str] | None = None) -> int:
    """Some rows from the command line, ``--preset quick|full``, ``--device`` and ``--out FOLDER``."""
    parser = argparse.ArgumentParser(description=f"Rows {', '.join(rows)} of ctgate's benchmark of speed.")
    parser.add_argument("--preset", choices=list(PRESETS), default="full", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("ctgate-bench/speed"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    return run(options.preset, options.out, options.device, rows)
