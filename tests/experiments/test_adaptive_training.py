"""Training through the native adaptive loop: the gradient is that of the steps taken, and a resumed run is
the run."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import ctgate as ct
from ctgate.training import TrainingStatus, fit

STEPS = 4


class Job:
    """A GRU that is taught to end at 0.3 times its last input, on random held inputs of a generator's own."""

    def __init__(self) -> None:
        self.field = ct.GRU(1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(1)
        self.optimizer = torch.optim.Adam(self.field.parameters(), lr=0.1)

    def problem(self) -> ct.ODEProblem:
        xs = torch.randn(4, 5, 1, generator=self.generator, dtype=torch.float64)
        control = ct.ZeroOrderHold(torch.arange(5.0, dtype=torch.float64), xs)
        return ct.ODEProblem(self.field, self.field.initial_state((5,)), (0.0, 4.0), control)

    def loss(self, step: int) -> dict[str, Tensor]:
        prob = self.problem()
        sol = ct.solve(prob, ct.Dopri5(), saveat=[2.5, 4.0], rtol=1e-4, atol=1e-6, throw=True)
        assert sol.stats.engine == "native"
        assert prob.control is not None
        missed = sol.hs[-1, :, 0] - 0.3 * prob.control(4.0)[:, 0]
        accepted = torch.tensor(float(sol.stats.accepted))
        return {"loss": missed.square().mean() + 1e-3 * sol.hs[0].square().mean(), "accepted": accepted}

    def score(self) -> float:
        """The loss on inputs that are always the same."""
        drawn = self.generator.get_state()
        self.generator.manual_seed(2)
        with torch.no_grad():
            value = self.loss(0)["loss"].item()
        self.generator.set_state(drawn)
        return value

    def fit(self, steps: int, checkpoint: Path, *, resume: bool = False) -> dict[str, list[float]]:
        result = fit(
            self.loss, self.field, self.optimizer, steps, clip_norm=1.0,
            generators={"inputs": self.generator}, checkpoint=checkpoint, resume=resume, progress=False,
        )  # fmt: skip
        assert result.status is TrainingStatus.FINISHED
        return result.history


def test_a_resumed_training_is_the_training(tmp_path: Path) -> None:
    whole, first, second = Job(), Job(), Job()
    before = whole.score()
    history = whole.fit(STEPS, tmp_path / "whole.pt")
    first.fit(STEPS // 2, tmp_path / "half.pt")
    assert second.fit(STEPS, tmp_path / "half.pt", resume=True) == history
    for own, other in zip(whole.field.parameters(), second.field.parameters(), strict=True):
        assert torch.equal(own, other)
    assert min(history["accepted"]) >= 4
    assert whole.score() < 0.8 * before


def test_its_gradient_is_the_difference_quotient() -> None:
    """At a tolerance at which the steps do not change under so small a shift of a weight."""
    job = Job()
    prob = job.problem()

    def end() -> Tensor:
        sol = ct.solve(prob, ct.Dopri5(), saveat=[4.0], rtol=1e-4, atol=1e-6, throw=True)
        return sol.hs[-1].square().sum()

    (gradient,) = torch.autograd.grad(end(), job.field.weight_hh)
    row, column = divmod(int(gradient.abs().argmax()), gradient.shape[1])
    with torch.no_grad():
        weight = job.field.weight_hh
        values = []
        for shift in (1e-5, -2e-5):
            weight[row, column] += shift
            values.append(float(end()))
    quotient = (values[0] - values[1]) / 2e-5
    assert float(gradient[row, column]) == pytest.approx(quotient, rel=1e-3)
