"""What every test shares: one thread per worker, subprocesses that import the tree under test, a type checker
that is not in the way, and a Ctrl-C that raises."""

import os
import signal
from pathlib import Path

import jaxtyping

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
