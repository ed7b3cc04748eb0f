r"""Dense output in a file: nodes, and the polynomial of each step as slopes at its ends and bubbles inside.

Every polynomial of degree 3 + k is a cubic Hermite interpolant plus k bubbles
:math:`\theta^2 (1 - \theta)^2 (2\theta - 1)^j`, so this holds all methods' extensions.
"""

from typing import Any

import numpy as np
import torch
import xarray as xr

from ctgate.algorithms import Algorithm
from ctgate.dense import Dense, Extension, Slopes
from ctgate.integrators import scipy
from ctgate.run_adjoint import Numbers
from ctgate.run_samples import ScipyDense
from ctgate.storage.dataset import array, batch_dims, tensor

# The highest degree of scipy's interpolants: Radau's cubic, BDF of order 5, Adams of order 12. All of them
# pass through the nodes at both ends of their step.
_DEGREES = {"Radau": 3, "BDF": 5, "LSODA": 12}


def dense_tree(dense: Extension, alg: Algorithm) -> xr.DataTree:
    """The group of a file that :func:`stored_dense` reads: ``node_time`` (node,) or, where samples have steps
    of their own, (node, *batch), ``node_state``, slopes ``left`` and ``right`` of each step, ``bubbles``."""
    if isinstance(dense, Numbers):
        dense = dense.extension
    if isinstance(dense, ScipyDense):
        dense = _hermite(dense, _DEGREES[type(alg).__name__])
    assert isinstance(dense, Dense)
    batch = batch_dims(dense.hs.ndim - 2)
    nodes, steps = ("node", *batch, "state"), ("step", *batch, "state")
    label = {"long_name": "time of the accepted node", "units": "units of tau"}
    variables: dict[str, Any] = {"node_time": (nodes[: dense.ts.ndim], array(dense.ts), label)}
    label = {"long_name": "state at the node", "units": "1"}
    variables["node_state"] = (nodes, array(dense.hs), label)
    if len(dense.ts) > 1:
        slopes = dense.all_slopes()
        for name, place, values in (("left", "start", slopes.left), ("right", "end", slopes.right)):
            label = {
                "long_name": f"slope of the dense output at the {place} of the step",
                "units": "1 / time",
            }
            variables[name] = (steps, array(values), label)
        label = {"long_name": "coefficients of the bubbles of the dense output", "units": "1"}
        variables["bubbles"] = (("bubble", *steps), array(slopes.bubbles), label)
    return xr.DataTree(xr.Dataset(variables))


def stored_dense(nodes: xr.Dataset) -> Dense:
    """Dense output from its group in a file."""
    parts = {str(name): tensor(nodes[name]) for name in nodes.data_vars}
    ts, hs = parts.pop("node_time"), parts.pop("node_state")
    # One node has no steps.
    return Dense.stored(ts, hs, Slopes(**parts) if parts else Slopes(hs[:0], hs[:0], hs[None, :0]))


def _hermite(dense: ScipyDense, degree: int) -> Dense:
    """scipy's interpolants, of this degree or a lower one, in the dtype of the states."""
    steps = max(len(run.pieces) for run in dense.runs)
    # Per sample: nodes, and (step, degree - 1, state) coefficients; a step without length stands still.
    ts, hs, inner = [], [], []
    for run in dense.runs:
        over = steps - len(run.pieces)
        ts.append(np.pad(run.ts, (0, over), mode="edge"))
        hs.append(np.pad(run.hs, ((0, over), (0, 0)), mode="edge"))
        own = np.zeros((steps, degree - 1, run.hs.shape[1]))
        for number in range(len(run.pieces)):
            own[number] = _coefficients(run, number, degree)
        inner.append(own)
    like, batch, size = dense.like, dense.batch, hs[0].shape[1]
    left, right, *bubbles = (
        torch.from_numpy(part).to(like).reshape(steps, *batch, size)
        for part in np.moveaxis(np.stack(inner, axis=1), 2, 0)
    )
    return Dense.stored(
        torch.from_numpy(np.stack(ts, axis=1)).to(like.device).reshape(steps + 1, *batch),
        torch.from_numpy(np.stack(hs, axis=1)).to(like).reshape(steps + 1, *batch, size),
        Slopes(left, right, torch.stack(bubbles) if bubbles else left.new_empty(0, *left.shape)),
    )


def _coefficients(run: scipy.SampleRun, number: int, degree: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Slopes at both ends and bubbles (degree - 1, state) of one step's interpolant, from its values at
    Chebyshev's extrema, where interpolation does not magnify rounding."""
    (start, stop), (left, right) = run.ts[number : number + 2], run.hs[number : number + 2]
    theta = 0.5 * (1.0 - np.cos(np.pi * np.arange(1, degree) / degree))
    values = run.pieces[number](start + theta * (stop - start)).T
    theta = theta[:, None]
    rest = 1.0 - theta
    cubic = rest**2 * (1.0 + 2.0 * theta) * left + theta**2 * (1.0 + 2.0 * rest) * right
    bubbles = (theta * rest) ** 2 * (theta - rest) ** np.arange(degree - 3)
    basis = np.concatenate([theta * rest**2, -(theta**2) * rest, bubbles], axis=1)
    inner: np.ndarray[Any, np.dtype[np.float64]] = np.linalg.solve(basis, values - cubic)
    inner[:2] /= stop - start
    return inner
