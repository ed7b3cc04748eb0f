"""What a benchmark measures: error against setting, one series per method, and what its slope should be."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xarray as xr

from ctgate import __version__
from ctgate.convergence import Slope, fit_slope

STEP, TOLERANCE, CELL = "step size dt", "tolerance rtol", "step size dt / tau (1: the discrete cell)"
UNITS = {STEP: "units of tau", TOLERANCE: "1", CELL: "1"}
STEP_TOLERANCE, TOL_TOLERANCE, DENSE_TOLERANCE = 0.15, 0.25, 0.25
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Series:
    """One method on one problem: settings, errors, which of them count, and the slope they should have.

    What the points cost, where it was counted: ``evaluations`` of the field and ``wall_time`` [s], forward.
    """

    panel: str
    method: str
    setting: str
    quantity: str
    x: Sequence[float]
    error: Sequence[float]
    status: Sequence[str]
    expected: float
    tolerance: float
    evaluations: Sequence[float] = ()
    wall_time: Sequence[float] = ()

    @property
    def slope(self) -> Slope:
        """The slope over the points that count."""
        used = [k for k, status in enumerate(self.status) if status == "used"]
        return fit_slope([self.x[k] for k in used], [self.error[k] for k in used], confidence=_CONFIDENCE)


def fixed_step_series(result: xr.Dataset, panel: str, quantity: str = "") -> list[Series]:
    """The series of a Dataset from ``test_convergence`` or ``work_precision``.

    With ``quantity="gradient_"`` those of its gradients.
    """
    orders = "expected_slope" if "expected_slope" in result else "expected_order"
    return [
        Series(
            panel=panel,
            method=name,
            setting=STEP,
            quantity="relative error of the gradient" if quantity else "error of the state",
            x=(one.setting if "setting" in one else one.dt).values.tolist(),
            error=one[f"{quantity}error"].values.tolist(),
            status=one[f"{quantity}status"].values.tolist(),
            expected=float(one[orders]),
            tolerance=STEP_TOLERANCE,
            evaluations=one.evaluations.values.tolist(),
        )
        for name, one in ((str(name), result.sel(algorithm=name)) for name in result.algorithm.values)
    ]


def mean_series(results: Sequence[xr.Dataset], panel: str, method: str, quantity: str = "") -> Series:
    """The mean log error of several problems against the tolerance; points count that do in all of them."""
    errors = np.array([result[f"{quantity}error"].values[0] for result in results])
    statuses = np.array([result[f"{quantity}status"].values[0] for result in results])
    return Series(
        panel=panel,
        method=method,
        setting=TOLERANCE,
        quantity="relative error of the gradient" if quantity else "error of the state",
        x=results[0].setting.values[0].tolist(),
        error=np.exp(np.log(errors).mean(0)).tolist(),
        status=[next((s for s in column if s != "used"), "used") for column in statuses.T.tolist()],
        expected=float(results[0].expected_slope[0]),
        tolerance=TOL_TOLERANCE,
        evaluations=np.mean([result.evaluations.values[0] for result in results], 0).tolist(),
        wall_time=np.median([result.wall_time.values[0] for result in results], 0).tolist(),
    )


def collect(name: str, title: str, series: Sequence[Series], attrs: dict[str, object]) -> xr.Dataset:
    """All series of a benchmark as one Dataset over ``series`` and ``point``."""
    width = max(len(one.x) for one in series)
    slopes = [one.slope for one in series]

    def padded(part: str, fill: object) -> list[list[object]]:
        rows = [getattr(one, part) for one in series]
        return [[*row, *[fill] * (width - len(row))] for row in rows]

    def per(values: object, long_name: str) -> tuple[str, object, dict[str, str]]:
        return "series", values, {"long_name": long_name, "units": "1"}

    table_dims = ("series", "point")
    return xr.Dataset(
        {
            "x": (table_dims, padded("x", np.nan), {"long_name": "setting", "units": "as `setting` says"}),
            "error": (
                table_dims,
                padded("error", np.nan),
                {"long_name": "error, as `quantity` says", "units": "1"},
            ),
            "status": (
                table_dims,
                padded("status", "absent"),
                {"long_name": "use in the slope", "units": "1"},
            ),
            "evaluations": (
                table_dims,
                padded("evaluations", np.nan),
                {"long_name": "evaluations of the field, forward, mean over problems", "units": "1"},
            ),
            "wall_time": (
                table_dims,
                padded("wall_time", np.nan),
                {"long_name": "wall time, median over problems", "units": "s"},
            ),
            "panel": per([one.panel for one in series], "problem"),
            "method": per([one.method for one in series], "method"),
            "setting": per([one.setting for one in series], "what x is"),
            "quantity": per([one.quantity for one in series], "what the error is of"),
            "slope": per([s.value for s in slopes], "slope of log error against log setting"),
            "slope_low": per([s.low for s in slopes], f"lower end of the {_CONFIDENCE:.0%} interval"),
            "slope_high": per([s.high for s in slopes], f"upper end of the {_CONFIDENCE:.0%} interval"),
            "expected_slope": per([one.expected for one in series], "expected slope"),
            "slope_tolerance": per(
                [one.tolerance for one in series], "allowed distance from the expected slope"
            ),
            "verdict": per(
                [s.verdict(one.expected, one.tolerance) for s, one in zip(slopes, series, strict=True)],
                "verdict",
            ),
        },
        coords={
            "series": per([f"{one.panel}: {one.method}" for one in series], "problem and method"),
            "point": ("point", list(range(width)), {"long_name": "number of the setting", "units": "1"}),
        },
        attrs={
            "benchmark": name,
            "title": title,
            "error_norm": "maximum over times and samples of the root mean square over units",
            "dtype": "float64",
            "device": "cpu",
            "ctgate_version": __version__,
            **{f"{package}_version": version(package) for package in ("torch", "torchdiffeq", "xarray")},
            **attrs,
        },
    )


def table(result: xr.Dataset) -> str:
    """The slopes as text."""
    rows = [("problem", "method", "slope", "95 % interval", "expected", "verdict", "points left out")]
    for name in result.series.values:
        one = result.sel(series=name)
        out = [str(status) for status in one.status.values if status not in ("used", "absent")]
        rows.append(
            (
                str(one.panel.item()),
                str(one.method.item()),
                f"{float(one.slope):.3f}",
                f"{float(one.slope_low):.3f} to {float(one.slope_high):.3f}",
                f"{float(one.expected_slope):.3g} ± {float(one.slope_tolerance):g}",
                str(one.verdict.item()),
                f"{len(out)} {', '.join(sorted(set(out)))}" if out else "",
            )
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    rule = "  ".join("-" * width for width in widths)
    notes = [*result.attrs["notes"].splitlines(), ""] if result.attrs.get("notes") else []
    return "\n".join(
        [f"{result.attrs['benchmark']}: {result.attrs['title']}", "", lines[0], rule, *lines[1:], "", *notes]
    )


def write(result: xr.Dataset, path: Path) -> Path:
    """Write netCDF; the file appears whole or not at all."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    result.to_netcdf(partial, engine="h5netcdf")
    os.replace(partial, path)
    return path
