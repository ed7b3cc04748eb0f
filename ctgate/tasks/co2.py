"""Weekly atmospheric CO2 at Mauna Loa with its gaps, and forecasts of it from irregular samples."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    import xarray as xr

SOURCE = (
    "C. D. Keeling and T. P. Whorf (2004), Atmospheric CO2 concentrations derived from flask air samples at "
    "sites in the SIO network, in Trends: A Compendium of Data on Global Change, Carbon Dioxide Information "
    "Analysis Center, Oak Ridge National Laboratory; as shipped in statsmodels.datasets.co2"
)
LICENCE = "public domain"

YEAR = 365.2425 / 7
"""One year in weeks."""


def load() -> "xr.Dataset":
    """The weekly record of CO2 in the air [ppm] at Mauna Loa, Hawaii, from March 1958 to December 2001.

    Returns: a Dataset with ``co2(time)``, NaN in the 59 of 2284 weeks without a value, ``time`` in weeks
    since the first sample, and the calendar date as a second coordinate.

    The data are in the public domain and ship with statsmodels (BSD-3-Clause), in the extra ``report``.

    Raises:
        ModuleNotFoundError: statsmodels is not installed.

    Source: C. D. Keeling and T. P. Whorf (2004), Carbon Dioxide Information Analysis Center, Oak Ridge
    National Laboratory.
    """
    import xarray as xr

    try:
        co2 = importlib.import_module("statsmodels.datasets.co2")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the CO2 record comes with statsmodels, and {error.name} is missing; "
            "install the extra: pip install 'ctgate[report]'",
            name=error.name,
        ) from error
    column = co2.load().data["co2"]
    dates = column.index.to_numpy().astype("datetime64[ns]")
    weeks = (dates - dates[0]).astype("timedelta64[D]").astype("float64") / 7.0
    return xr.Dataset(
        {
            "co2": (
                "time",
                column.to_numpy().astype("float64"),
                {"long_name": "atmospheric CO2, weekly mean, Mauna Loa", "units": "ppm"},
            )
        },
        coords={
            "time": ("time", weeks, {"long_name": "time since the first sample", "units": "weeks"}),
            "date": ("time", dates, {"long_name": "end of the week"}),
        },
        attrs={"source": SOURCE, "licence": LICENCE},
    )


def thin(
    values: Float[Tensor, " time"], keep: float, count: int, generator: torch.Generator
) -> Float[Tensor, "time thinning"]:
    """``count`` irregular samples of ``values``: each value is kept with probability ``keep``, else NaN.

    The first value is kept in all of them, so that there is something to hold.

    Raises:
        ValueError: ``keep`` outside (0, 1], ``count`` below 1, or the first value missing.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep is {keep!r}; it must be a probability in (0, 1]")
    if count < 1:
        raise ValueError(f"count is {count!r}; it must be at least 1")
    if bool(values[0].isnan()):
        raise ValueError("values[0] is nan; the first value must be there, to be held")
    kept = torch.rand(len(values), count, generator=generator, dtype=torch.float64) < keep
    kept[0] = True
    return torch.where(kept.to(values.device), values[:, None], torch.nan)


def hold(
    observed: Float[Tensor, "time thinning"],
) -> tuple[Float[Tensor, "time thinning"], Float[Tensor, "time thinning"]]:
    """(the last value observed, its age in rows) at every time; NaN entries are not observed.

    Raises:
        ValueError: a column without a first value.
    """
    last = _last_row(~observed.isnan())
    rows = torch.arange(len(observed), device=observed.device)[:, None]
    return observed.gather(0, last), (rows - last).to(observed.dtype)


def anomaly(observed: Float[Tensor, "time thinning"], window: int) -> Float[Tensor, "time thinning"]:
    """Each observed value minus the mean of the values observed in the ``window`` rows that end with it."""
    seen = ~observed.isnan()
    total, number = observed.nan_to_num().cumsum(0), seen.cumsum(0)
    mean = (total - _delayed(total, window)) / (number - _delayed(number, window)).clamp(min=1)
    return torch.where(seen, observed - mean, torch.nan)


def ahead(values: Float[Tensor, " time"], horizon: int) -> Float[Tensor, " time"]:
    """The value ``horizon`` rows later, NaN where there is none."""
    return torch.cat([values[horizon:], values.new_full((min(horizon, len(values)),), torch.nan)])


@dataclass(frozen=True)
class Histories:
    """Thinned histories of one record on its weekly grid, and what is to be forecast from each week.

    Everything at a week is known in that week, but for ``change``. NaN is "not observed", for a control to
    hold across.

    Attributes:
        held: the last observation [ppm].
        inputs: channel 0, the anomaly of an observation from the mean of its past year, NaN where there is
            none; channel 1, the time since the last observation. Both in units of their ``Scales``.
        first: ``inputs`` with the anomaly held: the first row of a window that begins between observations.
        change: the record ``horizon`` weeks later minus ``held``, in units of its scale; NaN where the record
            has a gap.
    """

    held: Float[Tensor, "time thinning"]
    inputs: Float[Tensor, "time thinning channel=2"]
    first: Float[Tensor, "time thinning channel=2"]
    change: Float[Tensor, "time thinning"]

    def window(
        self, starts: Int[Tensor, " batch"], thinnings: Int[Tensor, " batch"], length: int
    ) -> tuple[Float[Tensor, "window batch channel"], Float[Tensor, "window batch"]]:
        """(inputs, change) of windows of ``length`` weeks, each with its own start and its own thinning."""
        rows = starts + torch.arange(length, device=starts.device)[:, None]
        inputs = self.inputs[rows, thinnings]
        beginning = self.first[starts, thinnings]
        return torch.cat([beginning[None], inputs[1:]]), self.change[rows, thinnings]


@dataclass(frozen=True)
class Scales:
    """Units in which a network sees the record, from its training years only.

    Attributes:
        anomaly: root mean square of the observed anomalies [ppm]. change: that of what persistence misses
            [ppm]. age: mean time between observations [weeks].
    """

    anomaly: float
    change: float
    age: float


@dataclass(frozen=True)
class Forecasting:
    """Forecast CO2 ``horizon`` weeks ahead, in every week, from a record of which few weeks were observed.

    Parameters:
        record: the weekly record [ppm], NaN where it has gaps. horizon: weeks ahead.
        split: the first held-out week. Training sees nothing from it on, targets included.
        keep: the probability with which a week is observed.

    Raises:
        ValueError: ``horizon`` below 1, or ``split`` that leaves no week to train or to test on.
    """

    record: Float[Tensor, " time"]
    horizon: int
    split: int
    keep: float

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"horizon is {self.horizon!r}; it must be at least 1 week")
        if not self.horizon < self.split < len(self.record) - self.horizon:
            raise ValueError(
                f"split is {self.split!r}; it must leave more than horizon = {self.horizon} of the "
                f"{len(self.record)} weeks on either side"
            )

    def thinnings(self, count: int, generator: torch.Generator) -> Float[Tensor, "time thinning"]:
        """``count`` irregular samples of the record."""
        return thin(self.record, self.keep, count, generator)

    def scales(self, observed: Float[Tensor, "time thinning"]) -> Scales:
        """The units of the training years of these samples."""
        held, _ = hold(observed)
        training = slice(0, self.split - self.horizon)
        missed = (ahead(self.record, self.horizon)[:, None] - held)[training]
        return Scales(
            anomaly=_root_mean_square(anomaly(observed, round(YEAR))[training]),
            change=_root_mean_square(missed),
            age=1.0 / self.keep,
        )

    def histories(self, observed: Float[Tensor, "time thinning"], scales: Scales) -> Histories:
        """Inputs and targets of these samples."""
        held, age = hold(observed)
        deviation = anomaly(observed, round(YEAR)) / scales.anomaly
        held_deviation, _ = hold(deviation)
        waiting = age / scales.age
        return Histories(
            held=held,
            inputs=torch.stack([deviation, waiting], -1),
            first=torch.stack([held_deviation, waiting], -1),
            change=(ahead(self.record, self.horizon)[:, None] - held) / scales.change,
        )

    def origins(self, since: int, until: int) -> Bool[Tensor, " time"]:
        """The weeks in [since, until) whose target is before ``until`` and in the record."""
        weeks = torch.arange(len(self.record), device=self.record.device)
        inside = (weeks >= since) & (weeks + self.horizon < until)
        return inside & ~ahead(self.record, self.horizon).isnan()


def _last_row(seen: Bool[Tensor, "time thinning"]) -> Int[Tensor, "time thinning"]:
    """The row of the last true entry at or above each entry."""
    if not bool(seen[0].all()):
        raise ValueError("observed has a nan in its first row; the first value must be there, to be held")
    rows = torch.arange(len(seen), device=seen.device)[:, None]
    return torch.where(seen, rows, -1).cummax(0).values


def _delayed(sums: Tensor, rows: int) -> Tensor:
    return torch.cat([torch.zeros_like(sums[:rows]), sums[:-rows]])


def _root_mean_square(values: Tensor) -> float:
    return float(values[~values.isnan()].square().mean().sqrt())
