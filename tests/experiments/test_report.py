"""The main job, once whole in its small preset: its files, its numbers, and that a resumed run is the run."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import ctgate as ct
from ctgate.experiments import heldout, report
from ctgate.experiments.checks import TorchAgreement, compare_with_torch, discrete_limit
from ctgate.experiments.forecast import PRESETS, Forecaster, held
from ctgate.training import TrainingStatus

FILES = {
    "report.md",
    "report.nc",
    "checkpoint.pt",
    "forecast.png",
    "gates.png",
    "time_constants.png",
    "coupling.png",
    "discrete_limit.png",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out"
    assert report.run(out, preset="quick", seed=3, progress=False) == 0
    return out


@pytest.fixture(scope="module")
def tree(folder: Path) -> xr.DataTree:
    with xr.open_datatree(folder / "report.nc", engine="h5netcdf") as stored:
        return stored.load()


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """A real Ctrl-C during one of the training's steps."""
    read, count = Forecaster.read, 0

    def reading(self: Forecaster, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, *arguments)

    monkeypatch.setattr(Forecaster, "read", reading)


def test_control_c_keeps_what_is_done_and_resume_goes_on(
    tree: xr.DataTree,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The interrupted and resumed run ends with the bits of the other one, in every variable."""
    before = torch.random.get_rng_state()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert report.run(tmp_path, preset="quick", seed=3, progress=False) == 130
    out = capsys.readouterr().out
    assert "3 of 6 steps are done" in out
    assert (
        f"ctgate report --out {tmp_path} --seed 3 --device cpu --preset quick --dtype float64 --resume" in out
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]

    with monkeypatch.context() as patch:
        patch.setattr(heldout, "evaluate", interrupted)
        assert report.run(tmp_path, preset="quick", seed=3, resume=True, progress=False) == 130
    assert "What is done is kept" in capsys.readouterr().out

    assert report.run(tmp_path, preset="quick", seed=3, resume=True, progress=False) == 0
    with xr.open_datatree(tmp_path / "report.nc", engine="h5netcdf") as stored:
        for group in tree.groups:
            xr.testing.assert_identical(stored[group].to_dataset(), tree[group].to_dataset())
    assert torch.equal(torch.random.get_rng_state(), before)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_folder_holds_what_it_should(folder: Path, tree: xr.DataTree) -> None:
    assert {entry.name for entry in folder.iterdir()} == FILES
    text = (folder / "report.md").read_text()
    for name in FILES - {"checkpoint.pt", "report.md"}:
        assert name in text
    assert "Licence: public domain" in text
    assert "Keeling" in text
    assert "{" not in text
    assert "preset quick, seed 3" in " ".join(text.split())
    for group in tree.subtree:
        for name, variable in group.to_dataset().data_vars.items():
            assert {"long_name", "units"} <= set(variable.attrs), name
    assert {"ctgate", "torch", "seed", "dtype", "device", "algorithm", "evaluation_rtol"} <= set(tree.attrs)


def test_it_says_which_engine_took_the_steps(folder: Path, tree: xr.DataTree) -> None:
    assert tree.attrs["evaluation_engine"] == "native"
    assert tree["discrete_limit"].attrs["reference_engine"] == "torchdiffeq"
    text = " ".join((folder / "report.md").read_text().split())
    steps = tree.attrs["evaluation_steps"]
    assert f"on the native loop: {steps:,} steps" in text
    assert text.count("engine, held-out years (Dopri5) native") == 1
    # a first stage per week, where the input jumps, and six stages per attempt
    attempts = steps + tree.attrs["evaluation_steps_rejected"]
    weeks = tree["forecast"].sizes["time"] + PRESETS["quick"].run_up - 1
    evaluations = int(tree["checks"]["evaluations_heldout"])
    assert 6 * attempts + weeks <= evaluations <= 6 * attempts + weeks + 2


def test_the_printed_numbers(tree: xr.DataTree) -> None:
    """An untrained discrete cell is torch's, whatever it has learnt."""
    checks = {str(name): float(value) for name, value in tree["checks"].data_vars.items()}
    assert checks["states"] < 1e-14
    assert checks["gradient_autograd"] < 1e-12
    assert checks["gradient_differences"] < 1e-8
    assert checks["gradient_training"] < 1e-8
    # Heun takes two evaluations a week
    assert checks["evaluations_training"] == 6 * 2 * (PRESETS["quick"].window - 1)
    # Dopri5 takes six evaluations a step, and at least a step a week in the 156 weeks from the run-up on
    assert checks["evaluations_heldout"] > 6 * 156
    assert float(tree["discrete_limit"]["slope"]) == pytest.approx(1.0, abs=0.15)


def test_errors_are_those_of_the_stored_forecasts(tree: xr.DataTree) -> None:
    forecast = tree["forecast"]
    target = forecast["co2"].to_numpy()[13:]
    assert np.array_equal(forecast["target"].to_numpy()[:-13], target, equal_nan=True)
    for model in forecast["model"].to_numpy():
        made = forecast["forecast"].sel(model=model).to_numpy()[:-13]
        assert np.isfinite(made).all()
        error = (made - target[:, None])[~np.isnan(target)]
        assert float(forecast["rmse"].sel(model=model)) == pytest.approx(
            np.sqrt((error**2).mean()), rel=1e-12
        )
        assert error.size == forecast.attrs["test_points"]
    persistence = forecast["forecast"].sel(model=heldout.PERSISTENCE).to_numpy()
    observed = forecast["observed"].to_numpy()
    seen = ~np.isnan(observed)
    assert np.array_equal(persistence[seen], observed[seen])
    rmse = {str(name): float(forecast["rmse"].sel(model=name)) for name in forecast["model"].to_numpy()}
    assert rmse[heldout.AUTOREGRESSION] < 0.4 * rmse[heldout.PERSISTENCE]
    assert rmse[heldout.FLOW] < 0.9 * rmse[heldout.PERSISTENCE], "six steps of training are not for nothing"
    assert float(forecast["rmse_every_week"]) < rmse[heldout.AUTOREGRESSION]


def test_a_time_constant_is_tau_over_one_minus_z(tree: xr.DataTree) -> None:
    gates = tree["gates"]
    assert np.allclose(gates["time_constant"], 1.0 / (1.0 - gates["update"]), rtol=1e-9)
    spread = tree["time_constants"]["time_constant"]
    assert (spread.diff("quantile") >= 0).all()
    assert abs(spread.sel(stage="before training") - spread.sel(stage="after training")).max() > 0.01


def test_the_coupling_of_this_run(folder: Path, tree: xr.DataTree) -> None:
    """Its groups agree with one another, and its table and text say their numbers."""
    rates, gradient, adjoint = (tree[name] for name in ("effective_rates", "gradient_by_lag", "adjoint"))
    for part in (rates, gradient, adjoint):
        assert part["stage"].to_numpy().tolist() == tree["time_constants"]["stage"].to_numpy().tolist()
        assert part.attrs["samples"] == 2
    assert np.allclose(rates["envelope"].sel(lag=0), 1.0, rtol=1e-12)
    assert rates["lag"].attrs["units"] == "weeks"
    assert float(rates["lag"][-1]) == PRESETS["quick"].warmup
    # A gate's rate is at most 1 / tau.
    assert (rates["envelope"].sel(order="leak") >= np.exp(-rates["lag"]) * (1 - 1e-9)).all()
    for stage in range(2):
        share = gradient["share"].to_numpy()[stage]
        assert share.sum() == pytest.approx(1.0, rel=1e-12)
        held_up_to = [
            last for last, total in zip(gradient["last_lag"], share.cumsum(), strict=True) if total >= 0.9
        ]
        assert float(gradient["reach"][stage]) == float(held_up_to[0])
        assert float(gradient["autograd_difference"][stage]) < 1e-3
    assert np.allclose(adjoint["relative_norm"].isel(time=-1), 1.0)
    text = (folder / "report.md").read_text()
    after = rates["envelope"].sel(stage="after training", lag=6.0)
    values = ", ".join(f"{float(after.sel(order=order)):.2g}" for order in ("leak", "first", "exact"))
    assert f"effective rates at lag 6, after training: gates, first order, exact  {values:>20}".split() == [
        word
        for line in text.splitlines()
        if line.startswith("effective rates at lag 6, after")
        for word in line.split()
    ]
    assert f"within {float(gradient['reach'][1]):g} weeks after it" in " ".join(text.split())


def test_a_checkpoint_of_another_run_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"was written with seed = 3 and this training has 4"):
        report.run(folder, preset="quick", seed=4, resume=True, progress=False)


def test_a_training_that_diverges_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = Forecaster.read
    monkeypatch.setattr(Forecaster, "read", lambda self, *arguments: read(self, *arguments) * float("nan"))
    assert report.run(tmp_path, preset="quick", progress=False) == 1
    assert TrainingStatus.DIVERGED.message in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_solve_that_fails_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ct.SolveError("unit 3 has left the numbers", ct.ReturnCode.UNSTABLE)

    monkeypatch.setattr(report, "train", fail)
    assert report.run(tmp_path, preset="quick", progress=False) == 1
    assert "no report was written: unit 3 has left the numbers" in capsys.readouterr().out


def window(
    weeks: int = 12, dtype: torch.dtype = torch.float64
) -> tuple[Forecaster, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = Forecaster(5, generator=generator, dtype=dtype)
    with torch.no_grad():
        model.weight.normal_(generator=generator)
    inputs = torch.randn(weeks, 3, 2, generator=generator, dtype=torch.float64)
    inputs[1:, :, 0][torch.rand(weeks - 1, 3, generator=generator) < 0.7] = torch.nan
    change = torch.randn(weeks, 3, generator=generator, dtype=torch.float64)
    change[4] = torch.nan
    return model, inputs, change


def agreement(model: Forecaster, inputs: torch.Tensor, change: torch.Tensor) -> TorchAgreement:
    return compare_with_torch(model, inputs, change, entries=3, generator=torch.Generator().manual_seed(1))


def test_the_checks_notice_a_wrong_state_and_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, change = window()
    right = agreement(model, inputs, change)
    assert max(right.states, right.autograd) < 1e-13
    assert max(right.differences, right.training) < 1e-9
    solve = Forecaster.solve

    class Scaled(torch.autograd.Function):
        """The identity, with a gradient one part in 10^5 too large."""

        @staticmethod
        def forward(states: torch.Tensor) -> torch.Tensor:
            return states.clone()

        @staticmethod
        def setup_context(*_: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * (1 + 1e-5)

    class Wrong:
        def __init__(self, output: torch.Tensor) -> None:
            self.output = output

    with monkeypatch.context() as patch:
        patch.setattr(Forecaster, "solve", lambda *a, **b: Wrong(Scaled.apply(solve(*a, **b).output)))
        wrong = agreement(model, inputs, change)
        assert wrong.states == right.states
        assert min(wrong.autograd, wrong.differences, wrong.training) > 1e-6
    with monkeypatch.context() as patch:
        patch.setattr(Forecaster, "solve", lambda *a, **b: Wrong(solve(*a, **b).output + 1e-6))
        assert agreement(model, inputs, change).states > 9e-7


def test_the_checks_in_single_precision() -> None:
    """States and gradients are single, what they are compared with where it is a difference is double."""
    close = agreement(*window(dtype=torch.float32))
    assert 1e-12 < close.states < 2e-6
    assert max(close.autograd, close.differences, close.training) < 1e-5


def test_the_checks_leave_the_model_alone() -> None:
    model, inputs, change = window()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    agreement(model, inputs, change)
    discrete_limit(model, inputs, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"refinements is 1; it must be at least 2"):
        discrete_limit(model, inputs, 1)


def test_the_cell_is_where_the_discrete_limit_starts() -> None:
    model, inputs, _ = window()
    limit = discrete_limit(model, inputs, 6)
    assert float(limit["difference"][0]) == pytest.approx(float(limit["torch_difference"]), rel=1e-10)
    assert float(limit["slope"]) == pytest.approx(1.0, abs=0.1)
    assert float(limit["training_difference"]) < float(limit["torch_difference"])


def test_held_inputs_against_a_loop() -> None:
    _, inputs, _ = window()
    filled = held(inputs)
    for k in range(len(inputs)):
        for b in range(3):
            for c in range(2):
                value = inputs[k, b, c]
                expected = filled[k - 1, b, c] if value.isnan() else value
                assert filled[k, b, c] == expected


@pytest.mark.slow
def test_the_full_job_beats_the_baselines(tmp_path: Path) -> None:
    assert report.run(tmp_path, progress=False) == 0
    with xr.open_datatree(tmp_path / "report.nc", engine="h5netcdf") as stored:
        rmse = stored["forecast"]["rmse"].load()
    flow = float(rmse.sel(model=heldout.FLOW))
    assert flow < 0.25 * float(rmse.sel(model=heldout.PERSISTENCE))
    assert flow < float(rmse.sel(model=heldout.AUTOREGRESSION))
