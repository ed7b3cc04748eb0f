"""The run-time type checker of the tests, and the way around it where an error message of our own is "
"tested."""

import inspect
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# An int is a float to every static checker (PEP 484), so it is one here.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def unchecked(function: Any) -> Callable[..., Any]:
    """The function, or the constructor of a class, as users run it: without the type checker in front."""
    if not inspect.isclass(function):
        return inspect.unwrap(function)

    def construct(*args: Any, **kwargs: Any) -> Any:
        instance = object.__new__(function)
        inspect.unwrap(function.__init__)(instance, *args, **kwargs)
        return instance

    return construct
