r"""The matched statistic: how much of a gradient comes from each lag, sample by sample."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from ctgate import __version__
from ctgate.fields import VectorField
from ctgate.kernels.linearization import check_directions
from ctgate.learnability.psi import KERNELS, Kernel, Steps, matched, samples_at_once
from ctgate.sensitivity.arguments import check_lags
from ctgate.sensitivity.labels import label
from ctgate.sensitivity.steps import cell_step
from ctgate.storage.dataset import array

Direction = Mapping[str, Tensor]
Array = np.ndarray[Any, np.dtype[np.float64]]


@torch.no_grad()
def matched_statistic(
    field: VectorField,
    readout: nn.Module,
    x: Float[Tensor, "time sample channel"],
    y: Float[Tensor, "time sample output"],
    lags: Sequence[int],
    order: Kernel = "leak",
    *,
    seed: int = 0,
    direction: Direction | None = None,
    batch: int = 128,
    held_out: float = 0.5,
    compare: int = 8,
    keep: bool = True,
    each: Callable[[Tensor], object] | None = None,
    progress: bool = False,
) -> xr.Dataset:
    r"""How much of a loss gradient along one direction v of the parameters comes from each lag,

    .. math:: \psi(t, l) = \sum_q \delta_q(t)\,\mu_q(t, t - l)\,b_q(t - l), \qquad
              \delta_t = \frac{\partial \ell_t}{\partial h_t}, \quad
              b_s = v_s - J_s v_{s-1}, \quad v_s = \frac{dh_s}{d\theta}\,v, \quad
              \ell_t = |\mathrm{readout}(h_t) - y_t|^2 ,

    in the discrete cell, Euler's map of step tau, with :math:`J_s = \partial h_s / \partial h_{s-1}`. b is
    what v does to the state in step s alone: with the whole transport in place of mu the sum over all lags is
    :math:`(d\ell_t/d\theta)\,v`. With v_s itself it would count early influences many times.

    A lag has one sign, that of the mean of psi over samples that are held out for it. The signal is the mean
    over the others, times the sign: a sign from the same numbers makes a signal of noise. The standard error
    takes the mean over time of a sample as one number, since its times hang together.

    Nothing is written to disk; beside psi, which ``keep=False`` leaves out, there is one batch at a time in
    memory.

    Parameters:
        field: a cell with one tau. readout: a module from its output to ``(..., output)``, time by time.
        x, y: inputs, of which entry t is held during the step that ends at the state compared with entry t of
            the targets.
        lags: increasing, from 0 to the number of steps less 1.
        order: mu. "leak": products of what the gates keep; "first": the coupling once beside them; "exact":
            the diagonal of the transport, for small systems; "full": no mu, but
            :math:`\delta_t^\top \Phi(t, t - l)\,b_{t-l}`. A state variable that keeps nothing, as the hidden
            state of an LSTM does, has no products: at "leak" and "first" the error on it goes back one whole
            step before mu takes over.
        seed: of the direction, normal in every entry and of length 1, and of who is held out.
        direction: v by the names of parameters, in their shapes, in its place; what is left out does not
            move.
        batch: how many samples are taken together. held_out: the share of samples that signs are from.
        compare: of how many samples "full" is taken too, for ``distance``.
        keep: whether psi itself is returned.
        each: called with the psi (lag, time, sample) of every batch, in the order of the samples: for what is
            made of all of psi while it passes.
        progress: a bar.

    Returns: Dataset with

    - ``psi`` (lag, time, sample), NaN where t < lag, and ``sample_mean`` (lag, sample), the mean over time;
    - ``sign``, ``signal``, ``standard_error`` (lag); ``held_out`` (sample);
    - ``envelope`` (lag), the mean of abs(mu) over times, samples and state variables, at "leak" and "first"
      those that keep something; NaN at "full";
    - ``distance`` (lag), the root mean square of psi less that at "full", over the root mean square of the
      latter; NaN with ``compare=0``;
    - ``finite`` (lag): whether all of psi is; where not there is a warning too.

    Raises: TypeError, ValueError for arguments that do not fit; :class:`ctgate.SolveError` for states that
    are not finite.

    Source: THEORY.md 27; after L. Livi, arXiv 2512.05790.
    """
    delays = _check(field, readout, x, y, lags, order)
    samples = x.shape[1]
    for name, number, least in (("batch", batch, 1), ("compare", compare, 0)):
        if number < least:
            raise ValueError(
                f"matched_statistic({name}=...): {name} is {number}; it must be at least {least}"
            )
    step = cell_step(field, "matched_statistic", "give all units the same tau")
    generator = torch.Generator().manual_seed(seed)
    along = _direction(field, direction, generator)
    signs_from = _drawn(samples, held_out, generator)
    size = min(batch, samples_at_once(order, len(x), field.initial_state().numel()))

    def steps(first: int, last: int) -> Steps:
        some = slice(first, last)
        return Steps(field, readout, x[:, some], y[:, some], along, step)

    psis, means = [], []
    envelope, loss = torch.zeros(len(delays), dtype=torch.float64, device=x.device), 0.0
    with tqdm(total=samples, desc="matched statistic", disable=None if progress else True) as bar:
        for first in range(0, samples, size):
            last = min(first + size, samples)
            found = matched(steps(first, last), delays, order)
            rows = zip(found.psi, delays, strict=True)
            means.append(torch.stack([row[lag:].double().mean(0) for row, lag in rows]))
            envelope += found.envelope * (last - first) / samples
            loss += found.loss * (last - first) / samples
            if each is not None:
                each(found.psi)
            if keep:
                psis.append(array(found.psi))
            bar.update(last - first)
    # One sample after the other: the whole transport is dear, and it is for few of them.
    compared = (steps(k, k + 1) for k in range(min(compare, samples)))
    mean = torch.cat(means, 1).cpu()
    signal = _signal(mean, signs_from)
    finite = mean.isfinite().all(1)
    if not bool(finite.all()):
        lost = [lag for lag, good in zip(delays, finite.tolist(), strict=True) if not good]
        warnings.warn(
            f"matched_statistic: psi is not finite at the lags {lost}; look at the weights, or take float64",
            stacklevel=3,
        )
    variables: dict[str, Any] = {
        "sample_mean": (("lag", "sample"), mean.numpy(), "mean over time of psi"),
        "sign": ("lag", signal[0], "sign of the mean over samples held out"),
        "signal": ("lag", signal[1], "mean over the other samples, times the sign"),
        "standard_error": ("lag", signal[2], "standard error of the signal, from means of samples"),
        "envelope": ("lag", array(envelope), "mean over times, samples and units of abs(mu)"),
        "distance": ("lag", _distance(compared, delays, order), "distance from the whole transport"),
        "finite": ("lag", finite.numpy(), "whether all of psi is finite"),
    }
    if keep:
        variables["psi"] = (("lag", "time", "sample"), np.concatenate(psis, -1), "matched statistic")
    units = dict.fromkeys(
        ("psi", "sample_mean", "signal", "standard_error"), "loss per unit of the direction"
    )
    return xr.Dataset(
        {
            name: (dims, values, label(text, units.get(name, "1")))
            for name, (dims, values, text) in variables.items()
        },
        coords={
            "lag": ("lag", np.array(delays), label("lag", "steps")),
            "time": ("time", np.arange(len(x)), label("step after which the error arises", "steps")),
            "held_out": ("sample", signs_from.numpy(), label("whether the signs are from it", "1")),
        },
        attrs={
            "ctgate_version": __version__,
            "order": order,
            "seed": seed,
            "direction": "random" if direction is None else "given",
            "loss": loss,
            "compared": min(compare, samples),
            "step": step,
            "dtype": str(x.dtype).removeprefix("torch."),
            "device": str(x.device),
        },
    )


def _signal(mean: Tensor, out: Tensor) -> tuple[Array, Array, Array]:
    """Sign, signal and its standard error, (lag,) each, from the means (lag, sample)."""
    sign = mean[:, out].mean(1).sign()
    rest = mean[:, ~out]
    error = rest.std(1) / math.sqrt(rest.shape[1])
    return sign.numpy(), (sign * rest.mean(1)).numpy(), error.numpy()


def _distance(compared: Iterable[Steps], lags: Sequence[int], order: Kernel) -> Array:
    """The root of the ratio of squares, psi less the whole one over the whole one, (lag,); NaN for none."""
    squares = np.zeros((2, len(lags)))
    for steps in compared:
        psi, whole = (matched(steps, lags, kernel).psi.double() for kernel in (order, "full"))
        squares += [array(part.square().nansum((1, 2))) for part in (psi - whole, whole)]
    apart, size = squares
    share: Array = np.divide(apart, size, out=np.full(len(lags), np.nan), where=size > 0.0)
    return np.sqrt(share, out=share)


def _drawn(samples: int, share: float, generator: torch.Generator) -> Tensor:
    """Which samples are held out, (sample,)."""
    count = round(share * samples)
    if not (0.0 < share < 1.0 and 0 < count < samples - 1):
        raise ValueError(
            f"matched_statistic(held_out=...): held_out is {share}, of {samples} samples; it must leave one "
            "sample or more for the signs and two or more for the signal"
        )
    out = torch.zeros(samples, dtype=torch.bool)
    out[torch.randperm(samples, generator=generator)[:count]] = True
    return out


def _direction(field: VectorField, given: Direction | None, generator: torch.Generator) -> Direction:
    """A tensor for every parameter of the field."""
    parameters = dict(field.named_parameters())
    if not parameters:
        raise ValueError("matched_statistic(field=...): the field has no parameters; nothing can move")
    if given is None:
        drawn = {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for name, p in parameters.items()
        }
        length = math.sqrt(math.fsum(float(value.square().sum()) for value in drawn.values()))
        return {name: (value / length).to(parameters[name]) for name, value in drawn.items()}
    check_directions(given, parameters)
    return {name: given.get(name, torch.zeros_like(p)).to(p) for name, p in parameters.items()}


def _check(
    field: object, readout: object, x: Tensor, y: Tensor, lags: Sequence[int], order: str
) -> list[int]:
    for name, value, kind in (("field", field, VectorField), ("readout", readout, nn.Module)):
        if not isinstance(value, kind):
            raise TypeError(
                f"matched_statistic({name}=...): {name} is {type(value).__name__}; it must be a "
                f"{kind.__name__}"
            )
    if x.ndim != 3 or y.ndim != 3 or x.shape[:2] != y.shape[:2] or 0 in x.shape[:2]:
        raise ValueError(
            f"matched_statistic: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; they must be (time, "
            "sample, channel) and (time, sample, output), with the same times and samples"
        )
    if order not in KERNELS:
        raise ValueError(
            f"matched_statistic(order=...): order is {order!r}; it must be one of {list(KERNELS)}"
        )
    delays = [int(lag) for lag in check_lags(lags, True, "matched_statistic").tolist()]
    if delays[-1] >= len(x):
        raise ValueError(
            f"matched_statistic(lags=...): the longest lag is {delays[-1]} of {len(x)} steps; it must be less"
        )
    return delays
