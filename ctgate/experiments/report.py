"""The main job: a continuous-time GRU on the weekly CO2 record, from the data to a folder with the report."""

import importlib.util
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import xarray as xr

import ctgate as ct
from ctgate import plotting
from ctgate.experiments import heldout
from ctgate.experiments.checks import TorchAgreement, compare_with_torch, discrete_limit
from ctgate.experiments.coupling import AFTER, BEFORE, coupling
from ctgate.experiments.forecast import PRESETS, TRAINING_ALGORITHM, Forecaster, Preset, train
from ctgate.experiments.report_text import console_table, markdown
from ctgate.integrators.recorder import Stats
from ctgate.tasks import co2
from ctgate.training import Setting, TrainingResult, TrainingStatus

HORIZON = 13
KEEP = 0.2
FIRST_HELD_OUT = np.datetime64("1986-01-01")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
FINISHED, FAILED, INTERRUPTED = 0, 1, 130
VERSIONS = ("torch", "torchdiffeq", "numpy", "xarray", "statsmodels")
COLOURS = {
    heldout.PERSISTENCE: plotting.ORANGE,
    heldout.AUTOREGRESSION: plotting.GREEN,
    heldout.FLOW: plotting.BLUE,
}


@dataclass(frozen=True)
class _Job:
    """What one call of :func:`run` was asked for."""

    out: Path
    seed: int
    device: torch.device
    dtype: torch.dtype
    preset_name: str
    resume: bool
    progress: bool

    @property
    def preset(self) -> Preset:
        return PRESETS[self.preset_name]

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def settings(self) -> dict[str, Setting]:
        """What a checkpoint depends on."""
        sizes: dict[str, Setting] = asdict(self.preset)
        chosen: dict[str, Setting] = {
            "seed": self.seed,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "preset": self.preset_name,
            "algorithm": str(TRAINING_ALGORITHM),
        }
        return chosen | sizes

    def generators(self) -> list[torch.Generator]:
        """Independent ones, all from the seed: training samples, test samples, weights, windows, checks."""
        root = torch.Generator().manual_seed(self.seed)
        seeds = torch.randint(2**62, (5,), generator=root).tolist()
        return [torch.Generator().manual_seed(seed) for seed in seeds]


def run(
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float64",
    preset: str = "full",
    resume: bool = False,
    progress: bool = True,
) -> int:
    """Train on irregular samples of the weekly CO2 record, write the report, print its table.

    Parameters:
        out: the folder for ``report.md``, ``report.nc``, figures and the checkpoint; made if needed.
        seed: of every random number. The same seed gives the same bits on one machine.
        device, dtype: of the network ("float64" or "float32").
        preset: "full" (a minute or two on two cores) or "quick" (seconds, for tests: it learns nothing).
        resume: go on from the checkpoint in ``out``. progress: bars, on a terminal only.

    Returns: the exit code: 0, or 130 after Ctrl-C (what is done is kept for ``resume``), or 1 if the training
    diverged.

    Raises:
        ValueError: an unknown ``dtype``, ``preset`` or ``device``, or a checkpoint of another run.
        ModuleNotFoundError: statsmodels or matplotlib is missing.

    Data: C. D. Keeling and T. P. Whorf (2004), public domain, from ``statsmodels.datasets.co2``.
    """
    begun = time.perf_counter()
    job = _checked(out, seed, device, dtype, preset, resume, progress)
    job.out.mkdir(parents=True, exist_ok=True)
    try:
        return _run(job, begun)
    except KeyboardInterrupt:
        print(f"Interrupted. {_how_to_go_on(job)}")
        return INTERRUPTED
    except ct.SolveError as error:
        print(f"A solve failed, and no report was written: {error}")
        return FAILED


def _checked(
    out: str | Path, seed: int, device: str, dtype: str, preset: str, resume: bool, progress: bool
) -> _Job:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {sorted(DTYPES)}")
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; it must be one of {sorted(PRESETS)}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; it must be in [0, 2^63)")
    for name in ("statsmodels", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"the report needs {name}, which is missing; install the extra: pip install 'ctgate[report]'",
                name=name,
            )
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {device!r}; it must be a device that is there ({reason})") from error
    return _Job(Path(out), seed, place, DTYPES[dtype], preset, resume, progress)


def _run(job: _Job, begun: float) -> int:
    record = co2.load()
    record = record.isel(time=record["date"] < np.datetime64(job.preset.until))
    values = torch.from_numpy(record["co2"].to_numpy()).to(job.device)
    dates = record["date"]
    task = co2.Forecasting(values, HORIZON, int(np.searchsorted(dates.to_numpy(), FIRST_HELD_OUT)), KEEP)
    for_training, for_test, for_weights, for_windows, for_checks = job.generators()
    training = task.thinnings(job.preset.thinnings, for_training)
    scales = task.scales(training)
    test = task.thinnings(job.preset.test_thinnings, for_test)
    sample = heldout.Sample(task, training, test, scales, job.preset.run_up)

    model = Forecaster(job.preset.hidden, generator=for_weights, dtype=job.dtype).to(job.device)
    untrained = Forecaster(job.preset.hidden, generator=job.generators()[2], dtype=job.dtype).to(job.device)
    result = train(
        model,
        task,
        task.histories(training, scales),
        job.preset,
        generator=for_windows,
        settings=job.settings(),
        checkpoint=job.checkpoint,
        resume=job.resume,
        progress=job.progress,
    )
    if result.status is TrainingStatus.INTERRUPTED:
        print(f"{result.message} {_how_to_go_on(job)}")
        return INTERRUPTED
    if result.status is TrainingStatus.DIVERGED:
        print(f"{result.message} No report was written; the last checkpoint is {job.checkpoint}.")
        return FAILED

    results = heldout.evaluate(model, sample, dates)
    inputs, change = sample.window(job.preset.window)
    agreement = compare_with_torch(model, inputs, change, entries=job.preset.entries, generator=for_checks)
    tree = xr.DataTree.from_dict(
        {
            "/": xr.Dataset(attrs=_provenance(job, results.stats)),
            "/training": _training_dataset(result),
            "/forecast": results.forecast,
            "/gates": results.gates,
            "/time_constants": heldout.spectrum({BEFORE: untrained, AFTER: model}, sample),
            **coupling(untrained, model, sample, job.preset),
            "/discrete_limit": discrete_limit(model, inputs, job.preset.refinements),
            "/checks": _checks_dataset(agreement, result, results.stats),
        }
    )
    _write(job, tree, time.perf_counter() - begun)
    return FINISHED


def _how_to_go_on(job: _Job) -> str:
    if not job.checkpoint.exists():
        return "Nothing was done yet."
    flags = f"--out {job.out} --seed {job.seed} --device {job.device} --preset {job.preset_name}"
    dtype = str(job.dtype).removeprefix("torch.")
    return f"What is done is kept; go on with: ctgate report {flags} --dtype {dtype} --resume"


def _write(job: _Job, tree: xr.DataTree, seconds: float) -> None:
    figures = {
        "forecast.png": plotting.plot_forecast(tree["forecast"].to_dataset(), COLOURS),
        "gates.png": plotting.plot_gates(tree["gates"].to_dataset()),
        "time_constants.png": plotting.plot_time_constants(tree["time_constants"].to_dataset()),
        "coupling.png": plotting.plot_coupling(
            *(tree[name].to_dataset() for name in ("effective_rates", "gradient_by_lag", "adjoint"))
        ),
        "discrete_limit.png": plotting.plot_discrete_limit(tree["discrete_limit"].to_dataset()),
    }
    for name, figure in figures.items():
        figure.savefig(job.out / name)
    tree.to_netcdf(job.out / "report.nc", engine="h5netcdf")
    table = console_table(tree)
    (job.out / "report.md").write_text(markdown(tree, table), encoding="utf-8")
    print(table)
    print(f"\nwritten to {job.out}: report.md, report.nc, {', '.join(figures)} ({seconds:.0f} s)")


def _provenance(job: _Job, flow: Stats) -> dict[str, str | int | float]:
    return {
        "title": "A continuous-time GRU on the weekly CO2 record",
        "ctgate": ct.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in VERSIONS},
        "seed": job.seed,
        "dtype": str(job.dtype).removeprefix("torch."),
        "device": str(job.device),
        "threads": torch.get_num_threads(),
        "preset": job.preset_name,
        "algorithm": str(TRAINING_ALGORITHM),
        "evaluation_algorithm": str(heldout.EVALUATION_ALGORITHM),
        "evaluation_engine": flow.engine,
        "evaluation_steps": flow.accepted,
        "evaluation_steps_rejected": flow.rejected,
        "evaluation_rtol": heldout.EVALUATION_TOLERANCES["rtol"],
        "evaluation_atol": heldout.EVALUATION_TOLERANCES["atol"],
        "gate_convention": "torch's: update gate z keeps the old state, reset gate acts after the product",
        "input_convention": "x[k] acts on [t_k, t_k+1), held across missing weeks",
        "data_source": co2.SOURCE,
        "data_licence": co2.LICENCE,
    }


def _training_dataset(result: TrainingResult) -> xr.Dataset:
    named = {
        "loss": ("mean squared error of the forecast change", "1"),
        "gradient_norm": ("norm of the gradient before clipping", "1"),
        "field_evaluations": ("evaluations of the field, forward", "1"),
    }
    return xr.Dataset(
        {
            name: ("step", result.history[name], {"long_name": text, "units": units})
            for name, (text, units) in named.items()
        },
        coords={
            "step": ("step", np.arange(result.step), {"long_name": "step of the optimizer", "units": "1"})
        },
    )


def _checks_dataset(agreement: TorchAgreement, result: TrainingResult, flow: Stats) -> xr.Dataset:
    rows = {
        "states": (agreement.states, "largest difference between Euler(dt=tau) and torch.nn.GRU"),
        "gradient_autograd": (agreement.autograd, "gradient against autograd through torch.nn.GRU, relative"),
        "gradient_differences": (
            agreement.differences,
            "gradient against finite differences of torch.nn.GRU, relative",
        ),
        "gradient_training": (
            agreement.training,
            "gradient of the training loss against finite differences, relative",
        ),
        "evaluations_training": (
            sum(result.history["field_evaluations"]),
            "field evaluations of the training",
        ),
        "evaluations_heldout": (
            float(flow.evaluations),
            "field evaluations of the held-out years, all samples at once",
        ),
    }
    return xr.Dataset(
        {
            name: ((), value, {"long_name": text, "units": "dimensionless"})
            for name, (value, text) in rows.items()
        }
    )
