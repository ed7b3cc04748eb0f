r"""Rooted trees, and what a Runge-Kutta method makes of each of them.

The Taylor series of a solution and that of a Runge-Kutta step have one term per rooted tree. They agree up to
order p if and only if :math:`\Phi(t) = 1/\gamma(t)` for every tree of at most p nodes.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

from ctgate.integrators.runge_kutta import Tableau


@dataclass(frozen=True)
class Tree:
    """A root and the subtrees on it.

    ``time`` makes it a leaf that stands for the time of a stage: it has the weight c_i, where a leaf of the
    state has sum_j a_ij. The two are the same in most methods.
    """

    branches: tuple["Tree", ...] = ()
    time: bool = False

    @functools.cached_property
    def order(self) -> int:
        """Number of nodes."""
        return 1 + sum(branch.order for branch in self.branches)

    @functools.cached_property
    def density(self) -> int:
        r""":math:`\gamma(t)`: the number of nodes times the densities of the subtrees."""
        return self.order * math.prod(branch.density for branch in self.branches)

    @functools.cached_property
    def notation(self) -> str:
        """Butcher's brackets: ``τ`` is a node without branches, ``[τ,[τ]]`` a root with two."""
        inner = ",".join(branch.notation for branch in self.branches)
        return f"[{inner}]" if inner else "t" if self.time else "τ"


@functools.cache
def trees(nodes: int, *, timed: bool = False) -> tuple[Tree, ...]:
    """All rooted trees with so many nodes; with ``timed`` every leaf below the root is of either kind."""
    found = {Tree(forest) for forest in _forests(nodes - 1, nodes - 1, timed)}
    return tuple(sorted(found, key=lambda tree: tree.notation))


def _forests(nodes: int, largest: int, timed: bool) -> Iterator[tuple[Tree, ...]]:
    """Every multiset of subtrees of at most ``largest`` nodes with ``nodes`` nodes together."""
    if nodes == 0:
        yield ()
        return
    for size in range(min(largest, nodes), 0, -1):
        shapes = trees(size, timed=timed)
        if timed and size == 1:
            shapes = (*shapes, Tree(time=True))
        for count in range(1, nodes // size + 1):
            for first in combinations_with_replacement(shapes, count):
                for rest in _forests(nodes - count * size, size - 1, timed):
                    yield (*first, *rest)


def weight(tree: Tree, tableau: Tableau) -> tuple[float, float]:
    r"""The elementary weight :math:`\Phi(t)`, and the same sum with all terms made positive.

    The second is the scale against which rounding of the coefficients has to be judged.
    """
    a = np.zeros((tableau.stages, tableau.stages))
    for i, row in enumerate(tableau.a):
        a[i, :i] = row
    b, c = np.array(tableau.b), np.array(tableau.c)
    return (
        float(b @ _stages(tree, a, c)),
        float(np.abs(b) @ _stages(tree, np.abs(a), np.abs(c))),
    )


def _stages(tree: Tree, a: NDArray[np.float64], c: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per stage, the product over the branches of a tree."""
    product = np.ones(len(c))
    for branch in tree.branches:
        product = product * (c if branch.time else a @ _stages(branch, a, c))
    return product
