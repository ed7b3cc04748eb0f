"""The peak memory of one gradient, in a process of its own."""

import os
import subprocess
import sys

import torch

from ctgate.experiments.speed.presets import Preset

OURS, THEIRS = "ours", "theirs"
# Linux counts the memory of the process that started another one towards the other's peak, and this one may
# be large: a small one stands between them.
_BETWEEN = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
_CHILD = "import sys; from ctgate.experiments.speed.memory import main; main(*sys.argv[1:])"


def peaks(preset: Preset, rtol: float, device: str) -> tuple[float, float]:
    """Bytes of ours and of torchdiffeq's at their worst.

    Raises: RuntimeError if a process fails, with what it said.
    """
    ours, theirs = (_peak(way, rtol, preset, device) for way in (OURS, THEIRS))
    return ours, theirs


def _peak(way: str, rtol: float, preset: Preset, device: str) -> float:
    arguments = (way, rtol, preset.hidden, preset.batch, preset.span, device)
    done = subprocess.run(
        [sys.executable, "-c", _BETWEEN, sys.executable, "-c", _CHILD, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        # Memory that is given back must count as given back.
        env={name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")},
    )
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip()[-500:]}")
    return float(done.stdout)


def _held(device: str) -> int:
    """The most that the process, or on the device torch, has held so far, in bytes."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    # Not there on every system, which then can have all other rows.
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(way: str, *sizes: str) -> None:
    """Print how many bytes this process grows by over what it holds after its imports and a short problem;
    ``sizes`` are rtol, hidden, batch, span and the device."""
    from ctgate.experiments.speed.driven import Driven

    rtol, hidden, batch, span, device = float(sizes[0]), *map(int, sizes[1:4]), sizes[4]
    torch.set_num_threads(1)

    def once(span: int) -> None:
        case = Driven(hidden, batch, span, device=device)
        (case.gradient if way == OURS else case.their_gradient)(rtol)

    once(1)
    before = _held(device)
    once(span)
    print(_held(device) - before)
