"""The words of the report: the table on the terminal and report.md, from the labelled results only."""

import xarray as xr

from ctgate.experiments import coupling_text, heldout

_SOLVER = type(heldout.EVALUATION_ALGORITHM).__name__
_MODELS = {
    heldout.PERSISTENCE: "the last observation, kept",
    heldout.AUTOREGRESSION: (
        f"least squares on {len(heldout.LAGS)} lags over two years, interpolated between observations, "
        "and on the age of the last one"
    ),
    heldout.FLOW: f"the flow, by {_SOLVER} with rtol {heldout.EVALUATION_TOLERANCES['rtol']:g}",
    heldout.TRAINED: "the discretisation that was trained",
    heldout.CELL: "the discrete cell with the same weights, which nobody trained",
}

_TEXT = """# A continuous-time GRU on the weekly CO2 record

The record is the weekly mean of atmospheric CO2 at Mauna Loa, 1958 to 2001, with its gaps. It is nearly
regular, so the irregularity is made: a week is observed with probability {keep:g}, which leaves about one
value in {spacing:g} weeks, at irregular times, and nothing else is seen. From every week the task is the
record {horizon} weeks later.

A GRU, read as the flow tau dh/dt = (1 - z)(n - h) with tau = 1 week, is driven by two channels: the last
observation, as an anomaly from the mean of its past year and held until the next one, and the time since. A
linear readout of state and input gives the change. Training sees the years before {first} only, normalisation
included: {steps} steps of Adam through `{algorithm}`, each on windows with samples of their own. The years
from {first} on are held out.

```
{table}
```

| forecast | RMSE [ppm] | range over {samples} samples | what it is |
| --- | --- | --- | --- |
{rows}

All are judged on the same {points:,} points: {samples} samples of the same held-out years, in each week with
a value {horizon} weeks later. Neighbouring weeks, and samples of one record, are not independent, so the
number of points overstates what is known: by calendar year, the flow beats the autoregression in {wins} of
{years}. With every week observed, the same autoregression reaches {every_week:.3f} ppm: the task is hard
because the record is thinned. The sizes of the network and of the training were chosen on 1978 to 1985;
a first look at learning rate, tau and horizon had seen the held-out years.

## Figures

![Forecasts and record](forecast.png)

**Forecasts.** Above: the record, the weeks of one sample that the forecasts saw, and what was forecast
{horizon} weeks before the date at which it is drawn. Below: the error of each held-out year, all samples.

![Gates and time constants](gates.png)

**Gates are time constants.** The held input of one sample, the time constant tau / (1 - z) of every unit over
the same weeks, and the two gates of the slowest and of the fastest unit.

![Time constants before and after training](time_constants.png)

**Learned time constants.** Every unit by the rank of its median time constant; bars hold 90 % of the weeks.
Before training the medians lie between {before_low:.1f} and {before_high:.1f} weeks, after it between
{after_low:.1f} and {after_high:.1f}.

![States and parameters, coupled](coupling.png)

{coupling}

![The discrete limit](discrete_limit.png)

**The discrete limit.** The root mean square difference between the states of `Euler(dt)` and of the flow, for
dt = tau, tau/2, ...: it falls with order {slope:.3f}. At dt = tau it is `torch.nn.GRU` with the same weights,
{cell:.2g} away from the flow; the training's solver is {trained:.2g} away.

## Data

{data_source}. Licence: {data_licence}.

## How it was made

ctgate {ctgate}, Python {python}, torch {torch}, torchdiffeq {torchdiffeq}, statsmodels {statsmodels};
{dtype} on {device}, threads {threads}, preset {preset}, seed {seed}. The flow of the held-out years is
`{evaluation_algorithm}` on the {evaluation_engine} loop:
{evaluation_steps:,} steps, {evaluation_steps_rejected:,} rejected, {heldout_evaluations:,.0f} evaluations of
the field for all samples at once. The discrete limit's reference is `{limit_reference}`, on {limit_engine}.
`report.nc` holds every number:
`xarray.open_datatree("report.nc")`.
"""


def console_table(tree: xr.DataTree) -> str:
    """The short table that the job prints."""
    forecast, checks = _part(tree, "forecast"), _part(tree, "checks")
    wins, years = _years_won(forecast)
    lines = [(f"held-out RMSE [ppm], {name}", f"{value:.3f}") for name, value in _errors(forecast).items()]
    lines += [
        ("held-out years in which the flow beats the autoregression", f"{wins} of {years}"),
        ("field evaluations, training", f"{float(checks['evaluations_training']):,.0f}"),
        ("field evaluations, held-out years", f"{float(checks['evaluations_heldout']):,.0f}"),
        (f"engine, held-out years ({_SOLVER})", str(tree.attrs["evaluation_engine"])),
        ("largest difference, Euler(dt=tau) and torch.nn.GRU", f"{float(checks['states']):.1e}"),
        (
            "gradient, relative: and autograd through torch.nn.GRU",
            f"{float(checks['gradient_autograd']):.1e}",
        ),
        (
            "gradient, relative: and differences of torch.nn.GRU",
            f"{float(checks['gradient_differences']):.1e}",
        ),
        (
            "training's gradient, relative: and finite differences",
            f"{float(checks['gradient_training']):.1e}",
        ),
        (
            "order at which Euler(dt) approaches the flow",
            f"{float(_part(tree, 'discrete_limit')['slope']):.3f}",
        ),
        *coupling_text.rows(*_coupled(tree)),
    ]
    first, last = forecast["year"].to_numpy()[[0, -1]].tolist()
    title = (
        f"CO2 at Mauna Loa, {forecast.attrs['horizon_weeks']} weeks ahead, {first} to {last}, "
        f"{forecast.attrs['test_points']:,} forecasts"
    )
    left, right = (max(len(line[side]) for line in lines) for side in (0, 1))
    rule = "-" * (left + 2 + right)
    return "\n".join([title, rule, *(f"{name:<{left}}  {value:>{right}}" for name, value in lines)])


def markdown(tree: xr.DataTree, table: str) -> str:
    """The text of report.md."""
    forecast, limit = _part(tree, "forecast"), _part(tree, "discrete_limit")
    spread = forecast["rmse_by_thinning"]
    rows = [
        f"| {name} | {value:.3f} | {float(spread.sel(model=name).min()):.3f} to "
        f"{float(spread.sel(model=name).max()):.3f} | {_MODELS[name]} |"
        for name, value in _errors(forecast).items()
    ]
    medians = _part(tree, "time_constants")["time_constant"].sel(quantile=0.5)
    before, after = (medians.isel(stage=stage) for stage in (0, 1))
    wins, years = _years_won(forecast)
    keep = float(forecast.attrs["keep"])
    return _TEXT.format(
        **{str(name): value for name, value in tree.attrs.items()},
        table=table,
        rows="\n".join(rows),
        keep=keep,
        spacing=1.0 / keep,
        horizon=forecast.attrs["horizon_weeks"],
        points=forecast.attrs["test_points"],
        every_week=float(forecast["rmse_every_week"]),
        samples=forecast.sizes["thinning"],
        first=forecast["year"].to_numpy().tolist()[0],
        wins=wins,
        years=years,
        steps=_part(tree, "training").sizes["step"],
        before_low=float(before.min()),
        before_high=float(before.max()),
        after_low=float(after.min()),
        after_high=float(after.max()),
        coupling=coupling_text.paragraphs(*_coupled(tree), after),
        slope=float(limit["slope"]),
        heldout_evaluations=float(_part(tree, "checks")["evaluations_heldout"]),
        limit_reference=limit.attrs["reference"],
        limit_engine=limit.attrs["reference_engine"],
        cell=float(limit["torch_difference"]),
        trained=float(limit["training_difference"]),
    )


def _part(tree: xr.DataTree, name: str) -> xr.Dataset:
    return tree.children[name].to_dataset()


def _coupled(tree: xr.DataTree) -> tuple[xr.Dataset, xr.Dataset, xr.Dataset]:
    return _part(tree, "effective_rates"), _part(tree, "gradient_by_lag"), _part(tree, "adjoint")


def _errors(forecast: xr.Dataset) -> dict[str, float]:
    rmse = forecast["rmse"]
    return {str(name): float(rmse.sel(model=name)) for name in rmse["model"].to_numpy()}


def _years_won(forecast: xr.Dataset) -> tuple[int, int]:
    by_year = forecast["rmse_by_year"]
    won = by_year.sel(model=heldout.FLOW) < by_year.sel(model=heldout.AUTOREGRESSION)
    return int(won.sum()), won.size
