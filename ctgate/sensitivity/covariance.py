r"""How the gradients of single samples are spread, and what Adam's diagonal sees of it."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ctgate import __version__
from ctgate.algorithms import Algorithm, Euler
from ctgate.controls import Control, ZeroOrderHold
from ctgate.fields import VectorField
from ctgate.problem import ODEProblem
from ctgate.sensitivity.loss import Loss
from ctgate.sensitivity.per_sample import Rows, per_sample_gradients
from ctgate.sensitivity.spectra import anisotropy, cosine
from ctgate.sensitivity.steps import cell_step

if TYPE_CHECKING:
    import xarray as xr

Batch = Control | Float[Tensor, "time sample channel"]
OptimizerState = torch.optim.Optimizer | Mapping[str, Tensor]
# What Adam adds to the root of its second moment.
ADAM_EPS = 1e-8


def gradient_covariance(
    field: VectorField,
    loss: Loss,
    batch: Batch,
    alg: Algorithm | None = None,
    h0: Float[Tensor, "sample state"] | Float[Tensor, " state"] | None = None,
    optimizer_state: OptimizerState | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> "xr.Dataset":
    r"""The spectrum of the gradients of single samples, about zero and about their mean.

    With the gradient of sample i as row i of G, ``(sample, parameter)``, and :math:`\sigma_k` the singular
    values of :math:`G/\sqrt n` (``moment="second"``, whose squares are the eigenvalues of
    :math:`\langle g g^\top\rangle`) and of :math:`(G - \bar g)/\sqrt{n-1}` (``moment="covariance"``):

    - ``anisotropy`` :math:`\sigma_1/\sigma_r`, r the numerical rank;
    - ``concentration`` :math:`\sum_{j\le k}\sigma_j^2/\sum_j\sigma_j^2`, whose first entry is how much of the
      gradient lies along one direction;
    - ``participation_ratio`` :math:`(\sum\sigma^2)^2/\sum\sigma^4`, how many directions share it;
    - ``mean_norm`` :math:`|\bar g|`, ``signal_to_noise`` :math:`|\bar g|/\sqrt{\mathrm{tr}\,C/n}`, the mean
      gradient over its standard error;
    - ``adam_alignment``, the cosine between the diagonal of the moment and Adam's v;
      ``adam_direction_alignment`` that of the squared components of its k-th direction and v (NaN beyond r);
      ``diagonality``, how much of the moment (Frobenius norm) is on its diagonal, where Adam can see it; and
      ``adam_anisotropy``, that of what Adam leaves, :math:`G\,\mathrm{diag}(\sqrt v + 10^{-8})^{-1}`.

    v is Adam's own where ``optimizer_state`` is given, corrected for its start. Without it v is the mean of
    the squares in this batch, which is what Adam's running mean comes to with batches of one sample; the
    cosine with the second moment's diagonal is then 1 by construction. ``attrs["adam_diagonal"]`` says which.

    Parameters:
        field: a :class:`ctgate.VectorField`; gradients are taken by its parameters that require grad.
        loss: a :class:`ctgate.Loss` whose costs return one number per sample, ``(sample,)``, each of its own
            sample alone. Parameters of its readout count too.
        batch: inputs, a control with values ``(sample, channel)`` on a finite support, or a tensor ``(time,
            sample, channel)`` each entry of which is held for one tau, as torch.nn.GRU reads it.
        alg: None is ``Euler(dt=tau)``, the discrete cell. Gradients are exact ones of the numerical solution.
        h0: initial states ``(sample, state)`` or one for all ``(state,)``; None is the field's own.
        optimizer_state: an Adam that has taken steps, or its ``exp_avg_sq`` by parameter name, a readout's as
            ``readout.<name>``.
        rtol, atol: as for :func:`ctgate.solve`.

    Returns: Dataset with dims ``moment``, ``rank`` and ``block`` (a named parameter; ``block_energy`` is its
        share of the energy).

    Raises: TypeError, ValueError for arguments that do not fit, among them fewer than two samples, a cost
        that is not one number per sample, and an optimizer without a second moment.

    Source: THEORY.md 16; the reading of singular values as anisotropy follows L. Livi, arXiv 2508.12121.
    """
    prob, chosen = _problem(field, batch, alg, h0)
    count = len(prob.h0)
    if count < 2:
        raise ValueError(f"gradient_covariance(batch=...): {count} sample; a spread needs two or more")
    rows = per_sample_gradients(prob, loss, chosen, rtol=rtol, atol=atol)
    moments, source = _adam_diagonal(rows, field, loss, optimizer_state)
    attributes = {
        "ctgate_version": __version__,
        "algorithm": str(chosen),
        "dtype": str(prob.h0.dtype).removeprefix("torch."),
        "samples": count,
        "parameters": sum(row[0].numel() for row in rows.values()),
        "adam_diagonal": source,
    }
    return _labelled(rows, moments, attributes)


def _problem(field: object, batch: object, alg: Algorithm | None, h0: object) -> tuple[ODEProblem, Algorithm]:
    if not isinstance(field, VectorField):
        raise TypeError(
            f"gradient_covariance(field=...): field is {type(field).__name__}; it must be a ctgate field"
        )
    if h0 is not None and not isinstance(h0, Tensor):
        raise TypeError(f"gradient_covariance(h0=...): h0 is {type(h0).__name__}; it must be a tensor")
    step = (
        cell_step(field, "gradient_covariance", "give alg and a ct.Control as batch")
        if alg is None or isinstance(batch, Tensor)
        else math.nan
    )
    chosen = Euler(dt=step) if alg is None else alg
    if isinstance(batch, Tensor):
        if batch.ndim != 3 or len(batch) == 0:
            raise ValueError(
                f"gradient_covariance(batch=...): batch has shape {tuple(batch.shape)}; it must be (time, "
                "sample, channel)"
            )
        times = step * torch.arange(len(batch) + 1, dtype=torch.float64)
        batch = ZeroOrderHold(times, batch.detach())
    if not isinstance(batch, Control):
        raise TypeError(
            f"gradient_covariance(batch=...): batch is {type(batch).__name__}; it must be a ct.Control or a "
            "tensor (time, sample, channel)"
        )
    if h0 is not None and h0.ndim not in (1, 2):
        raise ValueError(
            f"gradient_covariance(h0=...): h0 has shape {tuple(h0.shape)}; it must be (sample, "
            "state) or (state,)"
        )
    samples = batch.batch_shape if h0 is None or h0.ndim < 2 else h0.shape[:-1]
    if len(samples) != 1:
        raise ValueError(
            f"gradient_covariance(batch=...): its values have the batch shape {tuple(samples)}; it must be "
            "(sample,)"
        )
    start = field.initial_state(samples) if h0 is None else h0.detach().expand(*samples, h0.shape[-1])
    span: Any = batch.support if batch.shared else batch.sample_support
    if not all(bool(torch.as_tensor(end).isfinite().all()) for end in span):
        raise ValueError(
            f"gradient_covariance(batch=...): batch is a {type(batch).__name__} without an end; give a "
            "control that is not extrapolated, so that its support is the span of time"
        )
    return ODEProblem(field, start, span, batch), chosen


def _adam_diagonal(rows: Rows, field: VectorField, loss: Loss, state: object) -> tuple[Rows, str]:
    """Adam's v by parameter, and where it is from."""
    if state is None:
        return {name: row.square().mean(0) for name, row in rows.items()}, "mean of squares in this batch"
    if not isinstance(state, torch.optim.Optimizer | Mapping):
        what = type(state).__name__
        raise TypeError(
            f"gradient_covariance(optimizer_state=...): optimizer_state is {what}; it must be an Adam or a "
            "dict of tensors"
        )
    if isinstance(state, torch.optim.Optimizer):
        return _running_moments(rows, field, loss, state), f"exp_avg_sq of {type(state).__name__}"
    moments: Rows = {}
    for name, row in rows.items():
        given = state.get(name)
        if not isinstance(given, Tensor) or given.shape != row.shape[1:]:
            shape = "missing" if given is None else type(given).__name__
            shape = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else shape
            raise ValueError(
                f"gradient_covariance(optimizer_state=...): {name!r} is {shape}; it must be a tensor of "
                f"shape {tuple(row.shape[1:])}"
            )
        moments[name] = given.detach().to(row)
    return moments, "exp_avg_sq as given"


def _running_moments(rows: Rows, field: VectorField, loss: Loss, optimizer: torch.optim.Optimizer) -> Rows:
    """exp_avg_sq / (1 - beta_2^steps)."""
    parameters = dict(field.named_parameters())
    if loss.readout is not None:
        parameters |= {f"readout.{name}": tensor for name, tensor in loss.readout.named_parameters()}
    decay = {id(p): group.get("betas") for group in optimizer.param_groups for p in group["params"]}
    moments: Rows = {}
    for name, row in rows.items():
        own = optimizer.state.get(parameters[name], {})
        betas = decay.get(id(parameters[name]))
        if "exp_avg_sq" not in own or "step" not in own or betas is None:
            raise ValueError(
                f"gradient_covariance(optimizer_state=...): {type(optimizer).__name__} has no exp_avg_sq for "
                f"{name!r}; give an Adam that holds this parameter and has taken a step"
            )
        moments[name] = own["exp_avg_sq"].detach().to(row) / (1.0 - betas[1] ** float(own["step"]))
    return moments


def _labelled(rows: Rows, moments: Rows, attributes: dict[str, Any]) -> "xr.Dataset":
    import xarray as xr

    g = torch.cat([row.flatten(1) for row in rows.values()], dim=1)
    v = torch.cat([moment.flatten() for moment in moments.values()])
    mean = g.mean(0)
    parts = {
        "second": g / len(g) ** 0.5,
        "covariance": (g - mean) / (len(g) - 1) ** 0.5,
    }
    noise = parts["covariance"].square().sum()
    columns: dict[str, list[Tensor]] = {name: [] for name in _VARIABLES}
    sizes = [row[0].numel() for row in rows.values()]
    for part in parts.values():
        for name, value in _moment(part, v, sizes).items():
            columns[name].append(value)
    variables: dict[str, Any] = {
        name: (dims, torch.stack(columns[name]).cpu().numpy(), {"long_name": text, "units": units})
        for name, (dims, text, units) in _VARIABLES.items()
    }
    norm = torch.linalg.vector_norm(mean)
    for name, value, text, units in (
        ("mean_norm", norm, "norm of the mean gradient", "loss/parameter"),
        ("signal_to_noise", norm / (noise / len(g)).sqrt(), "mean gradient over its standard error", "1"),
    ):
        variables[name] = ((), float(value), {"long_name": text, "units": units})
    ranks = range(1, len(columns["singular_value"][0]) + 1)
    labels = {"moment": list(parts), "rank": list(ranks), "block": list(rows)}
    return xr.Dataset(variables, coords=labels, attrs=attributes)


_VARIABLES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "singular_value": (("moment", "rank"), "singular values of the scaled gradients", "loss/parameter"),
    "concentration": (("moment", "rank"), "share of the energy in the leading directions", "1"),
    "adam_direction_alignment": (("moment", "rank"), "cosine of a direction's squares with Adam's v", "1"),
    "anisotropy": (("moment",), "largest over smallest singular value within the rank", "1"),
    "numerical_rank": (("moment",), "singular values above rounding", "1"),
    "participation_ratio": (("moment",), "directions that share the energy", "1"),
    "adam_alignment": (("moment",), "cosine of the diagonal with Adam's v", "1"),
    "diagonality": (("moment",), "share of the Frobenius norm on the diagonal", "1"),
    "adam_anisotropy": (("moment",), "anisotropy of the gradients over sqrt(v) + 1e-8", "1"),
    "block_energy": (("moment", "block"), "share of the energy by parameter", "1"),
}


def _moment(g: Tensor, v: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    """What there is to say about G^T G, for rows that are scaled already."""
    _, sigma, directions = torch.linalg.svd(g, full_matrices=False)
    energies = sigma.square()
    total = energies.sum()
    diagonal = g.square().sum(0)
    shares = torch.zeros(len(sizes), dtype=g.dtype, device=g.device)
    owner = torch.arange(len(sizes), device=g.device).repeat_interleave(torch.tensor(sizes, device=g.device))
    ratio, rank = anisotropy(sigma, max(g.shape))
    known = torch.arange(len(sigma), device=sigma.device) < rank
    scaled = torch.linalg.svdvals(g / (v.sqrt() + ADAM_EPS))
    return {
        "singular_value": sigma,
        "concentration": energies.cumsum(0) / total,
        "adam_direction_alignment": torch.where(known, cosine(directions.square(), v), torch.nan),
        "anisotropy": ratio,
        "numerical_rank": rank,
        "participation_ratio": total.square() / energies.square().sum(),
        "adam_alignment": cosine(diagonal, v),
        "diagonality": torch.linalg.vector_norm(diagonal) / torch.linalg.vector_norm(energies),
        "adam_anisotropy": anisotropy(scaled, max(g.shape))[0],
        "block_energy": shares.index_add(0, owner, diagonal) / total,
    }
