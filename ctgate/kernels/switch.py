"""The one switch for all fast paths."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# CTGATE_PLAIN=1 in the environment when ctgate is imported: for a whole process, such as a run of the tests.
_PLAIN: ContextVar[bool] = ContextVar("plain", default=os.environ.get("CTGATE_PLAIN", "0") not in ("", "0"))


def fast_paths() -> bool:
    """Whether fused kernels may be used here."""
    return not _PLAIN.get()


@contextmanager
def plain_paths(plain: bool = True) -> Iterator[None]:
    """Within it every solve and every product is made of plain torch operations, one evaluation of the field
    after the other: slower, with the same numbers to rounding. With ``plain=False`` fast paths are on again.

    For a whole process set ``CTGATE_PLAIN=1`` in its environment.
    """
    token = _PLAIN.set(plain)
    try:
        yield
    finally:
        _PLAIN.reset(token)
