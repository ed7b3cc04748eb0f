"""The words on how states and parameters are coupled, from the labelled results only."""

import math
import textwrap

import xarray as xr

from ctgate.experiments.coupling import AFTER, BEFORE

_SYMBOLS = {"exponential": "T", "power": "b", "logarithmic": "p"}
# The reach of a leaky unit alone, whose rate is exp(-lag / T), in units of T.
_LEAKY_REACH = math.log(10.0)
_WIDTH = 110
_EXACT_AFTER = {"stage": AFTER, "order": "exact"}


def rows(rates: xr.Dataset, gradient: xr.Dataset, adjoint: xr.Dataset) -> list[tuple[str, str]]:
    """Lines of the table on the terminal: what, value."""
    middle = _middle(rates)
    found = []
    for stage in (BEFORE, AFTER):
        at = rates["envelope"].sel(stage=stage, lag=middle)
        values = ", ".join(f"{float(at.sel(order=order)):.2g}" for order in ("leak", "first", "exact"))
        found.append((f"effective rates at lag {middle:g}, {stage}: gates, first order, exact", values))
    scales = rates["shape"].sel(order="exact", law="exponential")
    return [
        *found,
        ("law of the exact rates by lag, after training", str(rates["best_law"].sel(_EXACT_AFTER).item())),
        ("time scale of the exact rates [weeks], before and after", _pair(scales, ".1f")),
        ("lags with 90 % of the gradient [weeks], before and after", _pair(gradient["reach"], "g")),
        (
            "gradient by lag, mean cosine: by gates, by first order",
            ", ".join(f"{_cosine(gradient, AFTER, order):.2f}" for order in ("leak", "first")),
        ),
        (
            "gradient by lag, relative: sum and autograd",
            f"{float(gradient['autograd_difference'].max()):.1e}",
        ),
        (
            f"adjoint {adjoint.attrs['warmup_weeks']} weeks before the loss, relative, before and after",
            _pair(_faded(adjoint).median("batch"), ".2g"),
        ),
    ]


def paragraphs(rates: xr.Dataset, gradient: xr.Dataset, adjoint: xr.Dataset, medians: xr.DataArray) -> str:
    """The text under the figure.

    Parameters: as :func:`ctgate.experiments.coupling.coupling` returns them; ``medians`` (unit), of the time
        constants after training.
    """
    return "\n\n".join(
        textwrap.fill(" ".join(part.split()), _WIDTH, break_long_words=False, break_on_hyphens=False)
        for part in (
            _setting(gradient),
            _envelopes(rates),
            _reach(gradient, medians),
            _predictions(gradient),
            _adjoints(adjoint),
        )
    )


def _setting(gradient: xr.Dataset) -> str:
    window, warmup, samples = (gradient.attrs[name] for name in ("window_weeks", "warmup_weeks", "samples"))
    return f"""**Time constants are learning rates.** The first {window} held-out weeks, seen as a window of
    the training is: the state starts at zero, the loss is the mean squared error of the weeks from {warmup}
    on, and {samples} samples are taken, solved with rtol {gradient.attrs["rtol"]:g}. Before training the
    readout is zero and passes no gradient; at both stages it is the trained one, so that what differs is the
    flow."""


def _envelopes(rates: xr.Dataset) -> str:
    longest, exact = float(rates["lag"][-1]), rates["envelope"].sel(order="exact")
    gates = rates["envelope"].sel(order="leak")
    ratio = float((exact / gates).sel(stage=AFTER).isel(lag=-1))
    further = "above" if ratio > 1.0 else "below"
    return f"""(a) An error changes what a unit did a lag earlier at the effective rate of the unit, the
    diagonal of the transport, times the learning rate. The mean over units, weeks and samples of its size
    falls over lags of 1 to {longest:g} weeks most like {_law(rates, BEFORE)} before training, and most like
    {_law(rates, AFTER)} after it; R^2 is that of the logarithm, and the other laws have
    {_others(rates, AFTER)}. At {longest:g} weeks {float(exact.sel(stage=AFTER)[-1]):.2g} is left after
    training and {float(exact.sel(stage=BEFORE)[-1]):.2g} before it. What the gates alone leave there after
    training is {float(gates.sel(stage=AFTER)[-1]):.2g}: the coupling, a unit's own included, keeps the rates
    {further} that."""


def _reach(gradient: xr.Dataset, medians: xr.DataArray) -> str:
    before, after = (float(gradient["reach"].sel(stage=stage)) for stage in (BEFORE, AFTER))
    warmup, window = gradient.attrs["warmup_weeks"], gradient.attrs["window_weeks"]
    alone = after / _LEAKY_REACH
    slower = int((medians > alone).sum())
    limit = f"""The loss looks at the weeks {warmup} to {window - 1}, so lags above {warmup} weeks are open
    to the later of them only; such lags hold {100.0 * _beyond(gradient, warmup):.1f} % of the sum after
    training."""
    return f"""(b) The gradient of the loss, split exactly by lag: of the sum over weekly bins of its norm,
    90 % lie within {before:g} weeks before training and within {after:g} weeks after it. {limit} In the
    terms of the figure of time constants: a leaky unit alone under a steady input has 90 % of its gradient
    within ln 10 = 2.3 time constants, so {after:g} weeks are the reach of a time constant of {alone:.1f}
    weeks; {slower or "none"} of the {medians.size} units are slower in the median, the slowest at
    {float(medians.max()):.1f} weeks."""


def _predictions(gradient: xr.Dataset) -> str:
    gates, first = (_cosine(gradient, AFTER, order) for order in ("leak", "first"))
    closer = "closer" if first > gates else "no closer"
    norms = [f"{100.0 * _norm(gradient, order):.0f} %" for order in ("leak", "first")]
    return f"""(c) In place of the exact transport, the effective rates of the gates alone predict the
    gradient of each lag with a cosine of {gates:.2f} after training
    ({_cosine(gradient, BEFORE, "leak"):.2f} before it), the mean over lags by their share, and with
    {norms[0]} of the sum of norms. The rates to first order in the coupling come {closer} in direction:
    {first:.2f} ({_cosine(gradient, BEFORE, "first"):.2f} before), with {norms[1]} of the sum. The exact
    parts, summed over lags, agree with autograd through the solver to
    {float(gradient["autograd_difference"].max()):.1g}, relative."""


def _adjoints(adjoint: xr.Dataset) -> str:
    faded = _faded(adjoint)
    ranges = [
        f"{float(own.min()):.2g} to {float(own.max()):.2g}"
        for own in (faded.sel(stage=stage) for stage in (BEFORE, AFTER))
    ]
    return f"""(d) The adjoint of a loss that looks only at the last week: its norm
    {adjoint.attrs["warmup_weeks"]} weeks earlier, in units of that at the loss, is {ranges[0]} over the
    samples before training, and {ranges[1]} after it."""


def _law(rates: xr.Dataset, stage: str) -> str:
    own = rates.sel(stage=stage, order="exact")
    name = str(own["best_law"].item())
    own = own.sel(law=name)
    article, unit = ("an", " weeks") if name == "exponential" else ("a", "")
    return (
        f"{article} {name} law ({_SYMBOLS[name]} = {float(own['shape']):.2g}{unit}, "
        f"R^2 {float(own['r_squared']):.3f})"
    )


def _others(rates: xr.Dataset, stage: str) -> str:
    own = rates.sel(stage=stage, order="exact")
    others = [law for law in _SYMBOLS if law != own["best_law"].item()]
    return " and ".join(f"{float(own['r_squared'].sel(law=law)):.3f} ({law})" for law in others)


def _middle(rates: xr.Dataset) -> float:
    return float(rates["lag"][(rates.sizes["lag"] - 1) // 2])


def _beyond(gradient: xr.Dataset, lag: float) -> float:
    own = gradient["share"].sel(stage=AFTER)
    return float(own[own["lag"].to_numpy() >= lag].sum())


def _cosine(gradient: xr.Dataset, stage: str, order: str) -> float:
    """Mean over lags by their share."""
    own = gradient.sel(stage=stage, order=order)
    return float((own["share"] * own["cosine"]).sum())


def _norm(gradient: xr.Dataset, order: str) -> float:
    """Sum of the norms that are predicted over that of the true ones, after training."""
    own = gradient.sel(stage=AFTER, order=order)
    return float((own["share"] * own["norm_ratio"]).sum())


def _faded(adjoint: xr.Dataset) -> xr.DataArray:
    """What is left of the adjoint a warm-up before the loss, (stage, batch)."""
    return adjoint["relative_norm"].isel(time=-1 - int(adjoint.attrs["warmup_weeks"]))


def _pair(values: xr.DataArray, form: str) -> str:
    return ", ".join(format(float(values.sel(stage=stage)), form) for stage in (BEFORE, AFTER))
