"""The type checker of the tests finds what jaxtyping's own decorator finds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from jaxtyping import jaxtyped as of_jaxtyping
from torch import Tensor

import ctgate as ct
from tests.typechecker import check, jaxtyped, unchecked

Row = Float[Tensor, "*batch state"]


def plain(x: Tensor, scale: float = 1.0) -> Tensor:
    return x if scale > 0.0 else scale


def shaped(x: Row, *others: Row, add: Row | None = None) -> Row:
    return x if add is None else add[..., :1]


def outer(x: Row, inner: Callable[..., Any], y: Row) -> Row:
    return inner(y)[..., : x.shape[-1]]


def named_for_static_checkers(x: Row, y: Row) -> "Elsewhere":
    return x + y


def sequence(xs: list[Row]) -> tuple[Row, Row]:
    return xs[0], xs[-1]


two, three = torch.zeros(4, 2), torch.zeros(4, 3)


@pytest.fixture(params=["ours", "jaxtyping's"])
def checked(request):
    return {"ours": jaxtyped, "jaxtyping's": of_jaxtyping}[request.param](typechecker=check)


def test_what_is_right_passes(checked):
    assert checked(plain)(two, scale=2) is two
    for x in (two, three):
        assert checked(shaped)(x, x) is x
    assert checked(outer)(two, checked(shaped), two).shape == (4, 2)
    assert checked(outer)(two[:, :1], checked(lambda y: y), two[:, :1]).shape == (4, 1)
    assert checked(sequence)([two, two])[1] is two
    assert checked(named_for_static_checkers)(two, two).shape == (4, 2)


@pytest.mark.parametrize(
    ("function", "arguments", "options"),
    [
        (plain, (1.0,), {}),
        (plain, (two, "1"), {}),
        (plain, (two,), {"scale": -1.0}),
        (shaped, (two.int(),), {}),
        (shaped, (torch.tensor(0.0),), {}),
        (shaped, (two, three), {}),
        (shaped, (two, two[:3]), {}),
        (shaped, (two,), {"add": three}),
        (shaped, (two,), {"add": two}),
        (outer, (two, lambda y: y[:3], two), {}),
        (outer, (two, lambda y: y, three), {}),
        (sequence, ([1.0],), {}),
        (named_for_static_checkers, (two, three), {}),
    ],
)
def test_what_is_wrong_is_a_type_error(checked, function, arguments, options):
    with pytest.raises(TypeCheckError):
        checked(function)(*arguments, **options)


def test_shapes_of_one_call_are_not_those_of_a_call_within(checked):
    inner = checked(shaped)
    assert checked(outer)(two[:, :1], lambda y: inner(three)[..., :1], two[:, :1]).shape == (4, 1)


def test_fields_of_a_record_are_checked(checked):
    @checked
    @dataclass
    class Record:
        x: Row
        y: Row

    assert Record(two, two).y is two
    with pytest.raises(TypeCheckError):
        Record(two, three)


def test_a_function_within_a_function_is_left_alone():
    def nested(x: Row) -> Row:
        return x

    assert jaxtyped(typechecker=check)(nested) is nested


def test_the_way_around():
    for function in (plain, shaped, named_for_static_checkers):
        assert unchecked(jaxtyped(typechecker=check)(function)) is function


def test_the_package_is_checked(request):
    if not request.config.getoption("jaxtyping_packages"):
        pytest.skip("the import hook is off")
    with pytest.raises(TypeCheckError):
        ct.GRU(2, 3, tau="1")
    field = ct.GRU(2, 3)
    with pytest.raises(TypeCheckError, match=r"(?s)forward.*channel"):
        field(0.0, torch.zeros(4, 3), torch.zeros(4, 2, dtype=torch.int64))
    assert unchecked(ct.solve) is not ct.solve
