"""The run-time type checker of the tests, and the way around it where an error message of our own is tested.

The import hook that ``--jaxtyping-packages`` switches on decorates every function with
``jaxtyping.jaxtyped``, whose wrapper binds the arguments of every call by name and looks at them twice: steps
of small systems take five times as long. ``conftest.py`` puts ``jaxtyped`` of this module in its place, which
finds the same errors.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ForwardRef, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

# An int is a float to every static checker (PEP 484), so it is one here. What is wrong is a TypeError, as is
# what a call without a checker makes of it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))

_of_jaxtyping = jaxtyping.jaxtyped


def jaxtyped(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """A decorator of functions and classes: arguments and results are of their types and, within one call,
    of shapes that agree.

    A function within another one is left as it is. It is made anew at each call, and to compile its check
    takes longer than most of them run.
    """

    def decorate(function: Any) -> Any:
        if inspect.isclass(function):
            return _of_jaxtyping(function, typechecker=typechecker)
        if "<locals>" in function.__qualname__:
            return function
        hints = [part for hint in function.__annotations__.values() for part in _parts(hint)]
        if any(isinstance(hint, str | ForwardRef) for hint in hints):
            # It knows what to do with names that are there for static checkers only.
            return _of_jaxtyping(function, typechecker=typechecker)
        checked = typechecker(function)
        if not any(inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray) for hint in hints):
            return checked

        @functools.wraps(function)
        def with_shapes(*args: Any, **kwargs: Any) -> Any:
            with _of_jaxtyping("context"):
                return checked(*args, **kwargs)

        return with_shapes

    return decorate


def _parts(hint: Any) -> list[Any]:
    """An annotation and all that it is made of."""
    inner = hint if isinstance(hint, list) else get_args(hint)
    return [hint, *(part for one in inner for part in _parts(one))]


def unchecked(function: Any) -> Callable[..., Any]:
    """The function, or the constructor of a class, as users run it: without the type checker in front."""
    if not inspect.isclass(function):
        return inspect.unwrap(function)

    def construct(*args: Any, **kwargs: Any) -> Any:
        instance = object.__new__(function)
        inspect.unwrap(function.__init__)(instance, *args, **kwargs)
        return instance

    return construct
