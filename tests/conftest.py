"""What every test shares: one thread per worker, subprocesses that import the tree under test, a type checker
that is not in the way, and a Ctrl-C that raises."""

import os
import signal
from pathlib import Path

import jaxtyping
import pytest

from tests import typechecker

ROOT = Path(__file__).resolve().parents[1]

# Read when torch is loaded, which no plugin does before this file. Workers share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("MPLBACKEND", "agg")

# Before the hook decorates anything: nothing imports ctgate earlier.
jaxtyping.jaxtyped = typechecker.jaxtyped

# A shell starts its background jobs with the signal ignored, and the tests that send it would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["by torch", "compiled"])
def both_ways(request, monkeypatch):
    """Runs a test twice: what is elementwise in the steps of fused cells by torch, and compiled. Without it a
    test takes what is installed."""
    from ctgate.kernels.fused import walk

    if request.param == "by torch":
        monkeypatch.setattr(walk, "kernels", lambda name: None)
    else:
        pytest.importorskip("numba", reason="the extra fast is not installed")
