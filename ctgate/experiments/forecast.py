"""A continuous-time GRU that forecasts from irregular samples: model, training, held-out forecasts."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

import ctgate as ct
from ctgate.algorithms import Algorithm
from ctgate.tasks.co2 import Forecasting, Histories
from ctgate.training import Setting, TrainingResult, fit

CHANNELS = 2


@dataclass(frozen=True)
class Preset:
    """The sizes of one run. Times in weeks; ``until`` is the first date after the held-out years.

    ``run_up`` are the weeks that a state has before the first forecast that counts in the test, ``warmup``
    those in a training window. The sizes of ``full`` were chosen on 1978 to 1985 with the years before as
    training data, that is without the held-out years; a first look at learning rate, tau and horizon had
    seen them, which the report says.
    """

    hidden: int = 32
    steps: int = 700
    batch: int = 64
    window: int = 104
    warmup: int = 52
    thinnings: int = 64
    test_thinnings: int = 8
    learning_rate: float = 3e-2
    clip_norm: float = 1.0
    checkpoint_every: int = 25
    run_up: int = 156
    until: str = "2002-01-01"
    refinements: int = 7
    entries: int = 4


PRESETS = {
    "full": Preset(),
    "quick": Preset(
        hidden=6,
        steps=6,
        batch=4,
        window=39,
        warmup=13,
        thinnings=6,
        test_thinnings=2,
        checkpoint_every=2,
        run_up=52,
        until="1988-01-01",
        refinements=4,
        entries=2,
    ),
}
TRAINING_ALGORITHM = ct.Heun(dt=1.0)


class Forecaster(nn.Module):
    r"""Forecast of a change from the state of a flow and the input that is held,

    .. math::
        \frac{dh}{dt} = \frac{1 - z}{\tau} \odot (n - h), \qquad
        \hat y(s) = w \cdot (h(s), u(s)) + b, \qquad \tau = 1\ \text{week}.

    The readout starts at zero: the first forecast is persistence.

    Parameters:
        hidden: number of units. generator: for the field's initial weights. dtype: of the parameters.

    Source: THEORY.md 1.
    """

    def __init__(self, hidden: int, *, generator: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__()
        self.field = ct.GRU(CHANNELS, hidden, tau=1.0, generator=generator, dtype=dtype)
        self.weight = nn.Parameter(torch.zeros(hidden + CHANNELS, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros((), dtype=dtype))

    def problem(self, inputs: Float[Tensor, "time batch channel"]) -> ct.ODEProblem:
        """The flow driven by weekly ``inputs``, held between weeks and across NaN."""
        held = ct.ZeroOrderHold(torch.arange(len(inputs), dtype=torch.float64), inputs.to(self.weight))
        h0 = self.field.initial_state(inputs.shape[1:-1])
        return ct.ODEProblem(self.field, h0, (0.0, len(inputs) - 1.0), held)

    def solve(
        self,
        inputs: Float[Tensor, "time batch channel"],
        alg: Algorithm,
        *,
        rtol: float | None = None,
        atol: float | None = None,
    ) -> ct.Solution:
        """The states in every week."""
        weeks = [float(week) for week in range(len(inputs))]
        return ct.solve(
            self.problem(inputs), alg, saveat=weeks, rtol=rtol, atol=atol, dense=False, throw=True
        )

    def read(
        self, states: Float[Tensor, "time batch hidden"], inputs: Float[Tensor, "time batch channel"]
    ) -> Float[Tensor, "time batch"]:
        """The forecasts from states and held inputs."""
        return torch.cat([states, inputs.to(states)], -1) @ self.weight + self.bias


def train(
    model: Forecaster,
    task: Forecasting,
    histories: Histories,
    preset: Preset,
    *,
    generator: torch.Generator,
    settings: dict[str, Setting],
    checkpoint: Path,
    resume: bool,
    progress: bool,
) -> TrainingResult:
    """Fit the model to windows of the training years, each window with a thinning of its own.

    The loss is the mean squared error over the weeks of the windows after the warm-up. The learning rate
    rises over the first eighth and falls along a cosine.
    """
    device = model.weight.device
    last_start = task.split - task.horizon - preset.window
    weeks = torch.arange(preset.window, device=device)[:, None]

    def loss(step: int) -> dict[str, Tensor]:
        starts = torch.randint(last_start + 1, (preset.batch,), generator=generator).to(device)
        chosen = torch.randint(preset.thinnings, (preset.batch,), generator=generator).to(device)
        inputs, change = histories.window(starts, chosen, preset.window)
        solution = model.solve(inputs, TRAINING_ALGORITHM)
        forecast = model.read(solution.output, held(inputs))
        counted = (weeks >= preset.warmup) & ~change.isnan()
        errors = forecast[counted] - change[counted].to(forecast)
        evaluations = torch.tensor(float(solution.stats.evaluations))
        return {"loss": errors.square().mean(), "field_evaluations": evaluations}

    optimizer = torch.optim.Adam(model.parameters(), lr=preset.learning_rate)
    rise = max(preset.steps // 8, 1)

    def factor(step: int) -> float:
        fall = 0.5 * (1.0 + math.cos(math.pi * step / preset.steps))
        return min((step + 1) / rise, 1.0) * (0.02 + 0.98 * fall)

    return fit(
        loss,
        model,
        optimizer,
        preset.steps,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        clip_norm=preset.clip_norm,
        generators={"windows": generator},
        settings=settings,
        checkpoint=checkpoint,
        checkpoint_every=preset.checkpoint_every,
        resume=resume,
        progress=progress,
    )


def held(inputs: Float[Tensor, "time batch channel"]) -> Float[Tensor, "time batch channel"]:
    """Inputs with every NaN replaced by the value before it."""
    rows = torch.arange(len(inputs), device=inputs.device)[:, None, None]
    last = torch.where(inputs.isnan(), 0, rows).cummax(0).values
    return inputs.gather(0, last)
