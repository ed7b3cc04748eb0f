"""Order conditions: counts of trees from the literature, methods of known order, wrong coefficients."""

import dataclasses

import numpy as np
import pytest
from scipy import integrate

from ctgate.convergence import check_tableau
from ctgate.convergence.trees import Tree, trees
from ctgate.integrators.runge_kutta import BOSH3, DOPRI5, EULER, HEUN, MIDPOINT, RK4, TSIT5, Tableau


def from_scipy(solver: type, claimed: int) -> Tableau:
    stages = len(solver.B)
    rows = tuple(tuple(float(x) for x in solver.A[i, :i]) for i in range(stages))
    return Tableau(
        solver.__name__, tuple(map(float, solver.C[:stages])), rows, tuple(map(float, solver.B)), claimed
    )


KNOWN = [
    (EULER, 1),
    (MIDPOINT, 2),
    (HEUN, 2),
    (RK4, 4),
    (BOSH3, 3),
    (DOPRI5, 5),
    (TSIT5, 5),
    (from_scipy(integrate.RK23, 3), 3),
    (from_scipy(integrate.RK45, 5), 5),
    (from_scipy(integrate.DOP853, 8), 8),
]


def test_there_are_as_many_trees_as_there_should_be():
    """OEIS A000081; with both kinds of leaves, the numbers of elementary differentials of y' = f(t, y)."""
    assert [len(trees(n)) for n in range(1, 11)] == [1, 1, 2, 4, 9, 20, 48, 115, 286, 719]
    # f; f_t, f_y f; f_tt, f_ty f, f_yy f f, f_y f_t, f_y f_y f.
    assert [len(trees(n, timed=True)) for n in (1, 2, 3)] == [1, 2, 5]


def test_densities_of_the_trees_of_order_four():
    """Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, table II.2.1."""
    found = {tree.notation: tree.density for tree in trees(4)}
    assert found == {"[τ,τ,τ]": 4, "[[τ],τ]": 8, "[[τ,τ]]": 12, "[[[τ]]]": 24}
    assert all(tree.order == 4 for tree in trees(4))
    assert Tree((Tree(time=True), Tree((Tree(time=True),)))).density == 8


@pytest.mark.parametrize(("tableau", "expected"), KNOWN, ids=[tableau.name for tableau, _ in KNOWN])
def test_known_methods_have_their_order(tableau, expected):
    result = check_tableau(tableau)
    assert result.attrs["order_reached"] == expected
    assert result.attrs["verdict"] == "right"
    kept = result.nodes <= expected
    assert bool(result.satisfied[kept].all())
    assert not bool(result.satisfied[~kept].all())


def test_conditions_are_the_textbook_ones():
    """The eight conditions up to order 4, written out, on a method that satisfies few of them."""
    generator = np.random.default_rng(0)
    a = np.tril(generator.standard_normal((4, 4)), -1)
    b, c = generator.standard_normal(4), a.sum(1)
    tableau = Tableau("random", tuple(c), tuple(tuple(a[i, :i]) for i in range(4)), tuple(b), 3)
    weight = check_tableau(tableau).weight.to_series()
    expected = {
        "τ": b.sum(),
        "[τ]": b @ c,
        "[τ,τ]": b @ c**2,
        "[[τ]]": b @ a @ c,
        "[τ,τ,τ]": b @ c**3,
        "[[τ],τ]": b @ (c * (a @ c)),
        "[[τ,τ]]": b @ a @ c**2,
        "[[[τ]]]": b @ a @ a @ c,
    }
    assert set(weight.index) == set(expected)
    for tree, value in expected.items():
        assert weight[tree] == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("parts", "reached"),
    [
        ({"b": (1 / 6, 1 / 3, 1 / 3, 1 / 6 + 1e-10)}, 0),
        ({"b": (1 / 6, 1 / 3, 1 / 6, 1 / 3)}, 1),
        ({"a": ((), (1 / 2,), (1 / 2, 0.0), (0.0, 0.0, 1.0))}, 2),
        # The state sees the right nodes, the time does not: an autonomous test problem would pass.
        ({"c": (0.0, 1 / 2, 1 / 2, 0.9)}, 1),
        ({"c": (0.0, 0.0, 0.0, 0.0)}, 1),
    ],
)
def test_one_wrong_coefficient_is_found(parts, reached):
    result = check_tableau(dataclasses.replace(RK4, **parts))
    assert result.attrs["order_reached"] == reached
    assert result.attrs["verdict"] == "low"


def test_each_coefficient_of_rk4_matters():
    assert check_tableau(RK4).attrs["order_reached"] == 4
    for i in range(4):
        for part in ("b", "c"):
            values = list(getattr(RK4, part))
            values[i] += 1e-9
            assert check_tableau(dataclasses.replace(RK4, **{part: tuple(values)})).attrs["verdict"] == "low"
        for j in range(i):
            rows = [list(row) for row in RK4.a]
            rows[i][j] += 1e-9
            broken = dataclasses.replace(RK4, a=tuple(map(tuple, rows)))
            assert check_tableau(broken).attrs["verdict"] == "low"


def test_an_order_claimed_too_low_shows():
    result = check_tableau(dataclasses.replace(RK4, order=3))
    assert result.attrs["order_reached"] == 4
    assert result.attrs["verdict"] == "high"


def test_row_sum_defect():
    assert check_tableau(RK4).attrs["row_sum_defect"] == 0.0
    broken = dataclasses.replace(RK4, c=(0.0, 1 / 2, 1 / 2, 0.9))
    result = check_tableau(broken)
    assert result.attrs["row_sum_defect"] == pytest.approx(0.1)
    assert {"[t]", "[τ]"} <= set(result.tree.values)


def test_result_is_labelled():
    result = check_tableau(RK4)
    assert result.sizes == {"tree": 1 + 1 + 2 + 4 + 9}
    for variable in result.variables.values():
        assert {"long_name", "units"} <= set(variable.attrs)
    assert result.attrs["tableau"] == "RK4"
    assert result.attrs["ctgate_version"]


def test_tolerance_must_be_positive():
    with pytest.raises(ValueError, match=r"tolerance is 0.0; it must be positive"):
        check_tableau(RK4, tolerance=0.0)
