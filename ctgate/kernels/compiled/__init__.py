"""What fused cells do elementwise, compiled by numba: the extra ``fast``, with the same numbers to rounding.

Everything elementwise of a step is one pass over its numbers, which stay in the first level of cache.
Matrix products stay torch's. The modules here need numba, and are compiled where they are first used; machine
code is kept beside them, or where numba keeps what users compile, or nowhere if neither can be written to.
"""

import importlib
from functools import cache
from types import ModuleType


@cache
def available() -> bool:
    """Whether numba is there, fits the numpy that is, and compiles (NUMBA_DISABLE_JIT is not set)."""
    try:
        numba = importlib.import_module("numba")
    except ImportError:
        return False
    return not numba.config.DISABLE_JIT


def kernels(name: str) -> ModuleType | None:
    """The kernels of one cell, None without numba."""
    return importlib.import_module(f"{__name__}.{name}") if available() else None
