r"""The flow in the plane in which states vary most."""

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ctgate.dynamics.modes import check_field
from ctgate.fields import VectorField
from ctgate.sensitivity.labels import label
from ctgate.storage.dataset import array


@torch.no_grad()
def principal_plane(
    field: VectorField,
    points: xr.Dataset,
    states: Float[Tensor, "time *batch state"] | None = None,
    *,
    input_number: int = 0,
    size: int = 21,
    margin: float = 0.15,
) -> xr.Dataset:
    r"""Points and states of a network in their first two principal components, and the flow in that plane.

    The flow is that at states in the plane, :math:`h = \mathrm{origin} + x e_1 + y e_2`, projected onto it:
    it is not zero below a point that lies off the plane.

    Parameters:
        field: the field. points: its points, from :func:`fixed_points`.
        states: trajectories ``(time, *batch, state)``, such as ``sol.hs``: the components are then theirs.
            None takes those of the points.
        input_number: under which input of ``points``.
        size: arrows in each direction. margin: of the plane around what it shows, relative.

    Returns: a Dataset with ``origin`` (unit), ``axis`` (component, unit), ``variance_share`` (component);
        ``position`` (point, component), ``distance`` (point) from the plane, ``kind``, ``index`` (point);
        ``velocity`` (y, x, component) and ``speed`` (y, x), the norm of all of dh/dt; with states also
        ``trajectory`` (time, batch, component).

    Raises: ValueError for an ``input_number`` that there is not, or states that do not span a plane.

    Source: THEORY.md 24.
    """
    check_field(field, "principal_plane")
    count = points.sizes["input"]
    if not 0 <= input_number < count:
        raise ValueError(
            f"principal_plane(input_number=...): it is {input_number} and the Dataset has {count} inputs; it "
            f"must be in 0 to {count - 1}"
        )
    own = points.isel(point=np.flatnonzero(points["input_number"] == input_number))
    found = torch.as_tensor(own["state"].values)
    u = torch.as_tensor(points["u"].values[input_number]) if "u" in points else None
    cloud = found if states is None else states.detach().cpu().reshape(-1, states.shape[-1]).to(found.dtype)
    origin = cloud.mean(0)
    _, spread, axes = torch.linalg.svd(cloud - origin, full_matrices=False)
    if len(spread) < 2 or not bool(spread[1] > 1e-6 * cloud.abs().max()):
        raise ValueError(
            f"principal_plane(states=...): {len(cloud)} states do not span a plane; give states of a "
            "trajectory, (time, *batch, state)"
        )
    axes = axes[:2]
    position, shown = (found - origin) @ axes.T, (cloud - origin) @ axes.T
    low, high = (edge(torch.cat([position, shown]), 0).values for edge in (torch.min, torch.max))
    low, high = low - margin * (high - low), high + margin * (high - low)
    x, y = (torch.linspace(float(low[k]), float(high[k]), size, dtype=found.dtype) for k in range(2))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    like = next(field.parameters(), found)
    there = (origin + grid.reshape(-1, 2) @ axes).to(like)
    slope = field(0.0, there, None if u is None else u.to(like).expand(len(there), -1)).to(found).cpu()
    data = xr.Dataset(
        {
            "origin": ("unit", array(origin), label("state at the origin of the plane", "1")),
            "axis": (("component", "unit"), array(axes), label("unit vectors of the plane", "1")),
            "variance_share": (
                "component",
                array((spread.square() / spread.square().sum())[:2]),
                label("share of the variance of the states", "1"),
            ),
            "position": (("point", "component"), array(position), label("point in the plane", "1")),
            "distance": (
                "point",
                array(torch.linalg.vector_norm(found - origin - position @ axes, dim=-1)),
                label("distance of the point from the plane", "1"),
            ),
            "kind": own["kind"].variable,
            "index": own["index"].variable,
            "velocity": (
                ("y", "x", "component"),
                array((slope @ axes.T).reshape(size, size, 2)),
                label("dh/dt in the plane", "1/time"),
            ),
            "speed": (
                ("y", "x"),
                array(torch.linalg.vector_norm(slope, dim=-1).reshape(size, size)),
                label("norm of dh/dt", "1/time"),
            ),
        },
        coords={
            "x": ("x", array(x), label("first principal component", "1")),
            "y": ("y", array(y), label("second principal component", "1")),
        },
        attrs={name: points.attrs[name] for name in ("kind", "dt", "field", "dtype", "ctgate_version")},
    )
    if states is not None:
        lines = array(shown.reshape(len(states), -1, 2))
        data["trajectory"] = (("time", "batch", "component"), lines, label("states in the plane", "1"))
    return data
