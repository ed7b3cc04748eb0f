r"""What a point at which a field stands still, or is slowest, is like: its kind, its modes, its input."""

from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool
from torch import Tensor
from torch.linalg import matrix_norm, vector_norm

from ctgate.dynamics.bottleneck import Bowl
from ctgate.dynamics.descent import Inputs, Lanes, Standstill, States, remaining
from ctgate.dynamics.modes import Modes, attributes
from ctgate.sensitivity.labels import label
from ctgate.storage.dataset import array

# In the order in which they are listed.
KINDS = ("stable", "marginal", "saddle", "slow")


def describe(
    at: Standstill, h: States, u: Inputs, slow: Bool[Tensor, " lane"], step: float | None, block: int
) -> xr.Dataset:
    """The points of the flow, or of the map of a step, as :func:`ctgate.dynamics.fixed_points` returns them;
    ``slow`` says which are minima of the speed and no zeros, ``block`` how many are looked at at once.

    Source: THEORY.md 24.
    """
    parts = [
        _looked_at(at, h[part], None if u is None else u[part], slow[part], step)
        for part in (slice(k, k + block) for k in range(0, max(len(h), 1), block))
    ]
    data = xr.concat(parts, "point", combine_attrs="override") if len(parts) > 1 else parts[0]
    names = np.empty(h.shape[-1], dtype=object)
    for name, where in at.field.components.items():
        names[where] = name
    text = label("part of the state", "1")
    return data.assign_coords(component=("unit", names.astype(str), text))


def _looked_at(at: Standstill, h: States, u: Inputs, slow: Lanes, step: float | None) -> xr.Dataset:
    f, a = at.slope(h, u), at.jacobian(h, u)
    modes = Modes.of(a, step)
    # A change of A by its rounding moves eigenvalues by that much, and more where A is far from normal.
    rounding = h.shape[-1] * torch.finfo(h.dtype).eps * matrix_norm(a).unsqueeze(-1)
    index = (modes.growth > rounding).sum(-1)
    marginal = (modes.growth.abs() <= rounding).any(-1)
    kind = torch.where(index > 0, 2, marginal.long()).where(~slow, 3)
    left = remaining(at, h, u, torch.finfo(h.dtype).eps ** 0.5 * vector_norm(h, dim=-1))
    scale = modes.time_constants.abs().amax(-1)
    if bool(slow.any()):
        bowl = Bowl.of(at, h[slow], None if u is None else u[slow])
        left[slow], scale[slow] = vector_norm(bowl.step(), dim=-1), bowl.passage_time()
    variables: dict[str, Any] = {
        "state": (("point", "unit"), array(h), label("state of the point", "1")),
        "speed": ("point", array(vector_norm(f, dim=-1)), label("norm of dh/dt at the point", "1/time")),
        "kind": ("point", np.array(KINDS)[array(kind)], label("kind of the point", "1")),
        "index": ("point", array(index), label("modes that grow", "1")),
        "residual": (
            "point",
            array(left),
            label("length of the Newton step that is left", "1"),
        ),
        "time_scale": (
            "point",
            array(scale),
            label("longest time constant; of a slow point the time of a passage", "time"),
        ),
        **modes.variables(("point",)),
    }
    if u is not None:
        answer = at.field.input_jacobian(0.0, h, u)
        text, unit = ("dh/dt", "1/time") if step is None else ("the map", "1")
        variables["input_jacobian"] = (
            ("point", "unit", "channel"),
            array(answer if step is None else step * answer),
            label(f"derivative of {text} by the input", unit),
        )
    return xr.Dataset(variables, attrs=attributes(at.field, modes))
