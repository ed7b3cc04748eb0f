"""The benchmarks of convergence: what they conclude from right and wrong series, and from a broken method."""

import dataclasses
import math
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import ctgate as ct
from ctgate.convergence import measure
from ctgate.experiments import convergence as bench
from ctgate.experiments.convergence import euler_to_flow, gradients, problems, solver_order
from ctgate.experiments.convergence.figure import draw
from ctgate.experiments.convergence.inside_steps import inside_steps
from ctgate.experiments.convergence.presets import PRESETS, Preset
from ctgate.experiments.convergence.series import (
    STEP,
    TOLERANCE,
    Series,
    collect,
    mean_series,
    table,
    write,
)
from ctgate.integrators import steppers
from ctgate.integrators.runge_kutta import DOPRI5, RK4, explicit_attempt

ROOT = Path(__file__).resolve().parents[2]
TINY = Preset(sizes=3, tolerances=3, draws=1, refinements=5, cells=2)
X = (0.1, 0.05, 0.025, 0.0125)


def power(slope: float, expected: float, method: str = "M", **changes: object) -> Series:
    parts = {
        "panel": "P",
        "method": method,
        "setting": STEP,
        "quantity": "error of the state",
        "x": X,
        "error": [3.0 * x**slope for x in X],
        "status": ["used"] * 4,
        "expected": expected,
        "tolerance": 0.15,
    }
    return Series(**{**parts, **changes})


def result_of(*series: Series) -> xr.Dataset:
    return collect("name", "Title", series, {"seeds": [0, 1]})


def test_verdicts():
    result = result_of(
        power(2.0, 2.0, "right"),
        power(1.0, 2.0, "low"),
        power(3.0, 2.0, "high"),
        power(2.0, 2.0, "undetermined", status=["used", "used", "at rounding level", "UNSTABLE"]),
    )
    assert list(result.verdict.values) == ["right", "low", "high", "undetermined"]
    np.testing.assert_allclose(result.slope, [2.0, 1.0, 3.0, 2.0], rtol=1e-12)


def test_points_that_do_not_count_do_not_count():
    bent = power(
        2.0, 2.0, error=[1.0, *(3.0 * x**2 for x in X[1:])], status=["coarse", "used", "used", "used"]
    )
    assert bent.slope.value == pytest.approx(2.0)
    assert bent.slope.points == 3


def test_series_of_different_lengths_are_padded_and_labelled(tmp_path):
    short = power(1.0, 1.0, "short", x=X[:3], error=list(X[:3]), status=["used"] * 3)
    result = result_of(power(2.0, 2.0, "long"), short)
    assert result.sizes == {"series": 2, "point": 4}
    assert result.status.values[1, 3] == "absent"
    assert np.isnan(result.error.values[1, 3])
    for variable in result.variables.values():
        assert {"long_name", "units"} <= set(variable.attrs)
    path = write(result, tmp_path / "result.nc")
    with xr.open_dataset(path, engine="h5netcdf") as stored:
        assert stored.load().identical(result)
    assert list(tmp_path.iterdir()) == [path]


def test_mean_over_problems_is_of_the_logarithm():
    def one(errors: list[float], statuses: list[str]) -> xr.Dataset:
        dims = ("algorithm", "point")
        return xr.Dataset(
            {
                "setting": (dims, [[1e-4, 1e-5, 1e-6]]),
                "error": (dims, [errors]),
                "status": (dims, [statuses]),
                "evaluations": (dims, [[errors[0] + k for k in range(3)]]),
                "wall_time": (dims, [[2.0] * 3]),
                "expected_slope": ("algorithm", [2.0 / 3.0]),
            }
        )

    used = ["used"] * 3
    series = mean_series(
        [one([1.0, 0.1, 0.01], used), one([4.0, 0.1, 0.04], [*used[:2], "failed"])], "P", "M"
    )
    assert series.error == pytest.approx([2.0, 0.1, 0.02])
    assert series.status == ["used", "used", "failed"]
    assert (series.setting, series.expected, series.tolerance) == (TOLERANCE, 2.0 / 3.0, 0.25)
    assert series.evaluations == [2.5, 3.5, 4.5]
    assert series.wall_time == [2.0] * 3


def test_table_says_what_was_found():
    text = table(result_of(
        power(2.0, 2.0, "Heun"), power(3.0, 4.0, "RK4", status=["coarse", "used", "used", "used"])
    ))  # fmt: skip
    lines = text.splitlines()
    assert lines[0] == "name: Title"
    heun, rk4 = (next(line for line in lines if f"  {name}" in line) for name in ("Heun", "RK4"))
    assert heun.split() == ["P", "Heun", "2.000", "2.000", "to", "2.000", "2", "±", "0.15", "right"]
    assert rk4.split() == [
        "P",
        "RK4",
        "3.000",
        "3.000",
        "to",
        "3.000",
        "4",
        "±",
        "0.15",
        "low",
        "1",
        "coarse",
    ]


@pytest.mark.parametrize(("slope", "code"), [(2.0, 0), (1.8, 1)])
def test_run_prints_writes_and_judges(monkeypatch, capsys, tmp_path, slope, code):
    monkeypatch.setattr(bench, "BENCHMARKS", {"name": lambda preset, progress: result_of(power(slope, 2.0))})
    out = tmp_path / "new" / "folder"
    assert bench.run("quick", out, progress=False) == code
    printed = capsys.readouterr().out
    assert f"{slope:.3f}" in printed
    assert ("1 of 1 slopes are off" if code else "all slopes are right") in printed
    assert sorted(path.name for path in out.iterdir()) == ["name.nc", "name.png"]
    assert (out / "name.png").read_bytes().startswith(b"\x89PNG")
    with xr.open_dataset(out / "name.nc", engine="h5netcdf") as stored:
        assert stored.attrs["preset"] == "quick"
        assert stored.verdict.item() == ("low" if code else "right")


def test_run_refuses_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"preset is 'fast'; it must be one of quick, full"):
        bench.run("fast", tmp_path)
    with pytest.raises(
        ValueError, match=r"no benchmark 'speed'; there are solver_order, euler_to_flow, gradients"
    ):
        bench.run("quick", tmp_path, ["speed"])


def test_without_matplotlib_it_says_what_to_install_before_it_works(monkeypatch, tmp_path):
    def never(preset: Preset, progress: bool) -> xr.Dataset:
        raise AssertionError("it measured first")

    monkeypatch.setattr(bench, "BENCHMARKS", {"name": never})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ctgate\[plot\]'"):
        bench.run("quick", tmp_path)


def test_figure_shows_every_series_and_panel():
    left = power(2.0, 2.0, "Heun")
    right = power(1.0, 1.0, "Dopri5", panel="Q", setting=TOLERANCE, status=["coarse", "used", "used", "used"])
    nothing = power(2.0, 2.0, "lost", panel="Q", status=["UNSTABLE"] * 4, error=[math.nan] * 4)
    figure = draw(result_of(left, right, nothing))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["P", "Q"]
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert legends == [["Heun: 2.00"], ["Dopri5: 1.00", "lost: nan undetermined"]]
    assert [axes.get_xlabel() for axes in figure.axes] == ["step size dt [units of tau]", "tolerance rtol"]
    assert "hollow" in figure.axes[1].get_legend().get_title().get_text()
    assert "hollow" not in figure.axes[0].get_legend().get_title().get_text()


def test_cosine_solution_solves_its_equation():
    prob = problems.cosine()
    torch.testing.assert_close(problems.cosine_solution(0.0), prob.h0)
    for t in (0.3, 2.0):
        slope = (problems.cosine_solution(t + 1e-5) - problems.cosine_solution(t - 1e-5)) / 2e-5
        expected = math.cos(t) - problems.cosine_solution(t)
        torch.testing.assert_close(slope, expected, rtol=1e-8, atol=1e-9)


def test_a_broken_method_is_found_among_right_ones(monkeypatch, capsys, tmp_path):
    broken = partial(explicit_attempt, dataclasses.replace(RK4, b=(1 / 6, 1 / 3, 1 / 6, 1 / 3)))
    monkeypatch.setitem(steppers._METHODS, ct.RK4, broken)
    prob, exact = problems.cosine(), problems.cosine_solution
    series = solver_order.fixed(prob, "P", 3, exact=exact)
    verdicts = dict(
        zip((one.method for one in series), result_of(*series).verdict.values.tolist(), strict=True)
    )
    assert verdicts == {
        "Euler": "right",
        "ExponentialEuler": "right",
        "ExponentialMidpoint": "right",
        "Heun": "right",
        "Midpoint": "right",
        "RK4": "low",
        "RK4, between steps": "low",
    }
    monkeypatch.setattr(bench, "BENCHMARKS", {"solver_order": lambda preset, progress: result_of(*series)})
    assert bench.run("quick", tmp_path) == 1
    assert "2 of 7 slopes are off" in capsys.readouterr().out


def test_a_broken_extension_is_found_among_right_ones(monkeypatch):
    broken = dataclasses.replace(DOPRI5, bubble=tuple(0.9 * weight for weight in DOPRI5.bubble))
    monkeypatch.setitem(steppers.TABLEAUS, ct.Dopri5, broken)
    result = result_of(*inside_steps(problems.smooth(0), "P", 2.0**-4, 3))
    verdicts = dict(zip(result.method.values.tolist(), result.verdict.values.tolist(), strict=True))
    assert verdicts == {"Bosh3": "right", "Dopri5": "low", "Tsit5": "right", "Rosenbrock23": "right"}
    assert list(result.expected_slope) == [4.0, 5.0, 5.0, 3.0]


def test_a_broken_adaptive_method_is_found(monkeypatch):
    """Weights that do not sum to one: its estimate knows nothing of it, so no tolerance helps."""
    weights = (*DOPRI5.b[:5], DOPRI5.b[5] + 1e-4, 0.0)
    broken = dataclasses.replace(DOPRI5, b=weights, a=(*DOPRI5.a[:6], weights[:6]))
    monkeypatch.setitem(steppers._METHODS, ct.Dopri5, partial(explicit_attempt, broken))
    monkeypatch.setattr(solver_order, "ADAPTIVE", (("Dopri5", ct.Dopri5, ct.DiscreteAdjoint()),))
    result = result_of(*solver_order.adaptive([problems.smooth(0)], "P", 5))
    assert result.verdict.item() == "low"


def test_both_engines_of_dopri5_are_held_side_by_side():
    names = ("Dopri5", "Dopri5, torchdiffeq")
    cost = {"evaluations": [10.0] * 4, "wall_time": [0.5] * 4}
    more = {"evaluations": [20.0] * 4, "wall_time": [2.0] * 4, "error": [6.0 * x for x in X]}
    series = [power(1.0, 1.0, names[0], **cost), power(1.0, 1.0, names[1], **more)]
    alone = power(1.0, 1.0, "Dopri5", panel="Q")
    notes = solver_order._engines([*series, alone])
    expected = "against torchdiffeq's: error x 0.50, evaluations x 0.50, wall time x 0.25"
    assert notes == f"P: Dopri5 on the native loop {expected}"
    result = collect("name", "Title", series, {"notes": notes})
    assert table(result).endswith(f"{expected}\n")
    np.testing.assert_array_equal(result.evaluations, [cost["evaluations"], more["evaluations"]])


def leaky(alpha: float, tau: float) -> ct.ODEProblem:
    field = ct.Leaky(
        1, 2, alpha=alpha, tau=tau, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    ts = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    control = ct.ZeroOrderHold(ts, torch.tensor([[1.0], [-1.0]], dtype=torch.float64))
    return ct.ODEProblem(field, torch.ones(3, 2, dtype=torch.float64), (0.0, 2.0), control)


def test_retention_of_a_constant_gate_is_known():
    prob = leaky(alpha=0.6, tau=1.5)
    kept = torch.full((3, 2), (1 - 0.25 * 0.6 / 1.5) ** 8, dtype=torch.float64)
    torch.testing.assert_close(euler_to_flow.euler_retention(prob, 0.25), kept, rtol=1e-13, atol=0)
    flow = torch.full((3, 2), math.exp(-2.0 * 0.6 / 1.5), dtype=torch.float64)
    torch.testing.assert_close(euler_to_flow.flow_retention(prob), flow, rtol=1e-10, atol=0)


def test_the_coarse_steps_of_the_cell_do_not_count():
    result = euler_to_flow.measure(TINY, False)
    assert result.sizes == {"series": 6, "point": 6}
    assert float(result.x.values[0, 0]) == 1.0
    assert list(result.status.values[0]) == ["coarser than tau / 8"] * 3 + ["used"] * 3
    assert set(result.verdict.values) == {"right"}


@pytest.mark.parametrize(
    ("benchmark", "count", "methods"),
    [
        (solver_order, 41, {"Euler", "RK4, between steps", "Bosh3", "Tsit5", "Dopri5, torchdiffeq"}),
        (gradients, 24, {"Euler", "Dopri8, discrete", "Rosenbrock23, discrete", "Dopri5, backsolve"}),
    ],
)
def test_a_short_run_measures_every_series(monkeypatch, benchmark, count, methods):
    """Small enough to be quick; whether the slopes are right is for the presets."""
    monkeypatch.setattr(measure, "_REFERENCE_ULPS", 1e7)
    monkeypatch.setattr(benchmark, "COARSEST", dict.fromkeys(solver_order.COARSEST, 4))
    result = benchmark.measure(TINY, False)
    assert result.sizes["series"] == count
    assert methods <= set(result.method.values)
    for x, error in zip(result.x.values, result.error.values, strict=True):
        settings, errors = x[np.isfinite(x)], error[np.isfinite(x)]
        assert settings[0] > settings[-1]
        assert errors[0] > errors[-1] > 0.0


@pytest.mark.parametrize("name", list(bench.BENCHMARKS))
def test_scripts_call_their_benchmark(monkeypatch, tmp_path, name):
    calls = []
    monkeypatch.setattr(bench, "run", lambda preset, out, names: calls.append((preset, out, names)) or 0)
    path = ROOT / "benchmarks" / "convergence" / f"{name}.py"
    assert runpy.run_path(str(path))["main"]("quick", tmp_path) == 0
    monkeypatch.setattr(sys, "argv", [str(path), "--preset", "quick", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0
    assert calls == [("quick", tmp_path, [name])] * 2


def test_presets_differ_in_length_only():
    assert set(PRESETS) == {"quick", "full"}
    for one, other in zip(
        dataclasses.astuple(PRESETS["quick"]), dataclasses.astuple(PRESETS["full"]), strict=True
    ):
        assert one < other


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_preset_finds_every_slope_right(tmp_path):
    """As users run it, without the type checker in every call."""
    program = (
        "from pathlib import Path; import sys; from ctgate.experiments.convergence import run; "
        f"sys.exit(run('quick', Path({str(tmp_path)!r}), progress=False))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all slopes are right") == 3
