"""The lines as text and as JSON."""

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ctgate import __version__
from ctgate.experiments.speed.lines import SPEED, Line
from ctgate.experiments.speed.presets import Preset

_PACKAGES = ("torch", "torchdiffeq", "diffrax", "jax", "numpy", "scipy")
_HEADS = ("row", "workload", "against", "ratio", "quartiles", "target", "verdict")


def table(lines: Sequence[Line]) -> str:
    """A line each, and below it the reason of the verdict and what else was found: times, errors, checks."""
    rows = [_HEADS, *map(_cells, lines)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(_HEADS))]

    def text(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    body = []
    for line, row in zip(lines, rows[1:], strict=True):
        body.append(text(row))
        if details := _details(line):
            body.append(" " * (widths[0] + 4) + details)
    return "\n".join([text(rows[0]), "  ".join("-" * width for width in widths), *body])


def _cells(line: Line) -> tuple[str, ...]:
    low, median, high = (_number(value) for value in line.quartiles)
    return (
        line.row,
        line.workload if line.quantity == SPEED else f"{line.workload}: {line.quantity}",
        line.against,
        median if line.ratios else "",
        f"{low} to {high}" if len(line.ratios) > 1 else "",
        "" if line.target is None else str(line.target),
        line.verdict.partition(": ")[0],
    )


def _details(line: Line) -> str:
    numbers = [f"{name} {_number(value)}" for name, value in line.numbers.items()]
    why = line.verdict.partition(": ")[2]
    return ", ".join(filter(None, [why, line.note, *numbers, *(str(check) for check in line.checks)]))


def _number(value: float) -> str:
    return f"{value:.3g}" if value == 0.0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def write(path: Path, lines: Sequence[Line], name: str, preset: Preset, device: str) -> Path:
    """Write the lines, the sizes and the machine; the file appears whole or not at all."""
    stored = {
        "benchmark": "speed",
        "preset": name,
        "sizes": asdict(preset),
        "machine": machine(device),
        "lines": [line.to_dict() for line in lines],
    }
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(_finite(stored), indent=1) + "\n")
    os.replace(partial, path)
    return path


def machine(device: str) -> dict[str, Any]:
    """Versions, processor and threads."""
    versions = {"ctgate": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    found = {"device": device, "processor": _processor(), "threads": 1, "cores": os.cpu_count()}
    if device != "cpu":
        found["device_name"] = torch.cuda.get_device_name(device)
    return {**found, "versions": versions}


def _processor() -> str:
    """The name of the processor, as far as the system tells."""
    try:
        information = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in information.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
