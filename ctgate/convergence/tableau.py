"""The order that a tableau has, from its coefficients alone."""

import numpy as np
import xarray as xr

from ctgate import __version__
from ctgate.convergence.trees import trees, weight
from ctgate.integrators.runge_kutta import Tableau


def check_tableau(tableau: Tableau, *, tolerance: float = 1e-13) -> xr.Dataset:
    r"""Verify the order conditions of a Runge-Kutta method, tree by tree.

    .. math:: \Phi(t) = \sum_i b_i \prod_{\text{branches}} (\dots) = \frac{1}{\gamma(t)}
              \quad\text{for every rooted tree } t \text{ of at most } p \text{ nodes},

    up to one order more than ``tableau.order`` says, so that an order that is claimed too low shows as
    well. This is exact where a measured slope is not: a wrong coefficient that a test problem does not feel
    is found.

    Where the nodes :math:`c_i` are not the row sums of :math:`a_{ij}`, a time and a state that grow alike
    are told apart: every leaf is counted in both kinds, and the order holds for problems that depend on
    time.

    Parameters: ``tolerance``, how far a condition may be off, relative to the sum of the sizes of its
    terms. The default fits coefficients in double precision.

    Returns: a Dataset over ``tree`` with ``nodes``, ``density`` (gamma), ``weight`` (Phi), ``residual``
    (Phi - 1/gamma) and ``satisfied``; attributes ``order_claimed``, ``order_reached`` (never above
    ``order_claimed + 1``, where the check ends), ``verdict`` (``right``, ``low``, ``high``), and
    ``row_sum_defect``, the largest :math:`|c_i - \sum_j a_{ij}|`. There are 37 trees up to order 6 and 486
    up to 9.

    Raises: ValueError for a tolerance that is not positive.

    Source: J. C. Butcher, J. Austral. Math. Soc. 3 (1963) 185; E. Hairer, S. P. Norsett, G. Wanner, Solving
    Ordinary Differential Equations I, section II.2.
    """
    if not tolerance > 0.0:
        raise ValueError(f"tolerance is {tolerance!r}; it must be positive")
    defect = float(max(abs(node - sum(row)) for node, row in zip(tableau.c, tableau.a, strict=True)))
    timed = bool(defect > tolerance * max(1.0, *(abs(node) for node in tableau.c)))
    all_trees = [tree for nodes in range(1, tableau.order + 2) for tree in trees(nodes, timed=timed)]
    nodes = np.array([tree.order for tree in all_trees])
    densities = np.array([tree.density for tree in all_trees])
    weights, scales = np.array([weight(tree, tableau) for tree in all_trees]).T
    residual = weights - 1.0 / densities
    satisfied = np.abs(residual) <= tolerance * scales
    reached = int(min(nodes[~satisfied], default=tableau.order + 2)) - 1
    verdict = "right" if reached == tableau.order else "low" if reached < tableau.order else "high"
    return xr.Dataset(
        {
            "nodes": (
                "tree",
                nodes,
                {"long_name": "number of nodes, the order of the condition", "units": "1"},
            ),
            "density": ("tree", densities, {"long_name": "density gamma", "units": "1"}),
            "weight": ("tree", weights, {"long_name": "elementary weight Phi", "units": "1"}),
            "residual": ("tree", residual, {"long_name": "Phi - 1/gamma", "units": "1"}),
            "satisfied": ("tree", satisfied, {"long_name": "condition satisfied", "units": "1"}),
        },
        coords={
            "tree": (
                "tree",
                [tree.notation for tree in all_trees],
                {"long_name": "rooted tree", "units": "1"},
            )
        },
        attrs={
            "tableau": tableau.name,
            "stages": tableau.stages,
            "order_claimed": tableau.order,
            "order_reached": reached,
            "verdict": verdict,
            "row_sum_defect": defect,
            "tolerance": tolerance,
            "ctgate_version": __version__,
        },
    )
