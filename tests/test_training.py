"""fit: what it computes, that a resumed run is the run, and how it ends."""

import inspect
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctgate.training import TrainingResult, TrainingStatus, fit, replace_atomically

STEPS = 12


class Job:
    """A noisy regression: its loss draws from a generator, its optimizer and schedule have a memory."""

    def __init__(self, seed: int = 0, at_step: Callable[[int], None] = lambda step: None) -> None:
        own = torch.Generator().manual_seed(7)
        self.weight = torch.randn(3, 2, generator=own, dtype=torch.float64).requires_grad_()
        self.scale = nn.Module()
        self.scale.register_parameter("log", nn.Parameter(torch.zeros((), dtype=torch.float64)))
        self.generator = torch.Generator().manual_seed(seed)
        self.at_step = at_step
        self.optimizer = torch.optim.Adam([self.weight, *self.scale.parameters()], lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda k: 1 / (1 + k))

    def loss(self, step: int) -> dict[str, Tensor]:
        x = torch.randn(5, 3, generator=self.generator, dtype=torch.float64)
        self.at_step(step)
        residual = x @ self.weight * self.scale.log.exp() - x[:, :2]
        return {"loss": residual.square().mean(), "largest": residual.detach().abs().max()}

    def fit(self, steps: int = STEPS, **options: Any) -> TrainingResult:
        return fit(
            self.loss,
            {"weight": self.weight, "scale": self.scale},
            self.optimizer,
            steps,
            scheduler=self.scheduler,
            generators={"noise": self.generator},
            **options,
        )

    def everything(self) -> dict[str, Any]:
        return {
            "weight": self.weight.tolist(),
            "log": self.scale.log.item(),
            "moments": [
                {name: value.tolist() for name, value in state.items()}
                for state in self.optimizer.state_dict()["state"].values()
            ],
            "rate": self.scheduler.get_last_lr(),
            "noise": self.generator.get_state().tolist(),
        }


def interrupt_at(wanted: int, times: int = 1) -> Callable[[int], None]:
    def act(step: int) -> None:
        if step == wanted:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    return act


def test_the_iterates_of_gradient_descent() -> None:
    x = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    curvature = torch.tensor([1.0, 3.0], dtype=torch.float64)
    result = fit(
        lambda step: 0.5 * (curvature * x.square()).sum(), {"x": x}, torch.optim.SGD([x], lr=0.1), steps=10
    )
    path = [[0.9**k * 1.0, 0.7**k * -2.0] for k in range(11)]
    assert x.tolist() == pytest.approx(path[-1], rel=1e-14)
    assert result.history["loss"] == pytest.approx(
        [0.5 * (a * a + 3 * b * b) for a, b in path[:-1]], rel=1e-14
    )
    norms = [(a * a + 9 * b * b) ** 0.5 for a, b in path[:-1]]
    assert result.history["gradient_norm"] == pytest.approx(norms, rel=1e-14)
    assert (result.status, result.step) == (TrainingStatus.FINISHED, 10)


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = Job()
    expected = whole.fit()
    Job().fit(steps=5, checkpoint=tmp_path / "a.pt")
    second = Job()
    result = second.fit(checkpoint=tmp_path / "a.pt", resume=True)
    assert second.everything() == whole.everything()
    assert result.history == expected.history
    assert {len(column) for column in result.history.values()} == {STEPS}
    assert set(result.history) == {"loss", "gradient_norm", "largest"}


def test_a_checkpoint_every_k_steps(tmp_path: Path) -> None:
    """The process dies in step 8 without a chance to write; the file is of step 6."""

    class Death(Exception):
        pass

    def die(step: int) -> None:
        if step == 8:
            raise Death

    with pytest.raises(Death):
        Job(at_step=die).fit(checkpoint=tmp_path / "a.pt", checkpoint_every=3)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 6
    whole, second = Job(), Job()
    whole.fit()
    second.fit(checkpoint=tmp_path / "a.pt", resume=True)
    assert second.everything() == whole.everything()


@pytest.mark.parametrize(("times", "done"), [(1, 6), (2, 5)], ids=["first finishes", "second drops"])
def test_control_c_keeps_what_is_done(tmp_path: Path, times: int, done: int) -> None:
    """Once: step 5 is finished. Twice: it is dropped, with the numbers that it had drawn."""
    first = Job(at_step=interrupt_at(5, times))
    result = first.fit(checkpoint=tmp_path / "a.pt")
    assert result.status is TrainingStatus.INTERRUPTED
    assert result.message.endswith(f"{done} of {STEPS} steps are done.")
    assert result.step == len(result.history["loss"]) == done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    whole, second = Job(), Job()
    whole.fit()
    second.fit(checkpoint=tmp_path / "a.pt", resume=True)
    assert second.everything() == whole.everything()


def test_a_program_with_its_own_handler_keeps_it(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        result = Job(at_step=interrupt_at(5)).fit()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]
    assert result.status is TrainingStatus.FINISHED


def test_resume_without_a_file_starts_and_after_the_end_does_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.pt"
    job = Job()
    assert job.fit(checkpoint=path, resume=True).step == STEPS
    again = Job()
    result = again.fit(checkpoint=path, resume=True)
    assert again.everything() == job.everything()
    assert result.step == STEPS


def test_a_loss_that_is_not_finite_leaves_the_last_good_parameters(tmp_path: Path) -> None:
    """x doubles its exponent at each step until x^4 overflows: the last finite loss was at step 3."""
    x = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    seen: list[float] = []

    def loss(step: int) -> Tensor:
        seen.append(x.item())
        return x.pow(4).sum()

    result = fit(loss, {"x": x}, torch.optim.SGD([x], lr=1e20), 20, checkpoint=tmp_path / "a.pt")
    assert result.status is TrainingStatus.DIVERGED
    assert "loss of step" in result.message
    assert "is inf" in result.message
    assert "smaller learning rate" in result.message
    assert x.item() == seen[-2]
    assert torch.isfinite(x.pow(4)).all()
    assert result.step == len(result.history["loss"]) == len(seen) - 1
    assert not (tmp_path / "a.pt").exists()


def test_a_gradient_that_is_not_finite_is_not_followed() -> None:
    x = torch.tensor([1.0, 4.0], dtype=torch.float64, requires_grad=True)
    result = fit(lambda step: (x - step).abs().sqrt().sum(), {"x": x}, torch.optim.SGD([x], lr=1e-9), steps=1)
    assert result.status is TrainingStatus.FINISHED
    y = torch.tensor([0.0, 4.0], dtype=torch.float64, requires_grad=True)
    result = fit(lambda step: y.sqrt().sum(), {"y": y}, torch.optim.SGD([y], lr=0.1), steps=1)
    assert result.status is TrainingStatus.DIVERGED
    assert "gradient's norm at step 0 is inf" in result.message
    assert y.tolist() == [0.0, 4.0]


def test_clipping_scales_the_step_and_records_the_norm_before() -> None:
    x = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    result = fit(lambda step: x.square().sum() / 2, {"x": x}, torch.optim.SGD([x], lr=1.0), 1, clip_norm=0.5)
    assert result.history["gradient_norm"] == [5.0]
    assert x.tolist() == pytest.approx([3 - 0.3, 4 - 0.4], rel=1e-5)


def test_nothing_global_is_touched_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.random.get_rng_state()
    Job().fit()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_atomically(path, half)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]
    replace_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    Job().fit(2, checkpoint=path, settings={"seed": 0, "units": 3})
    with pytest.raises(ValueError, match=r"written with seed = 0 and this training has 1"):
        Job().fit(checkpoint=path, resume=True, settings={"seed": 1, "units": 3})
    job = Job()
    with pytest.raises(ValueError, match=r"has generators \['noise'\] and this training has \[\]"):
        fit(
            job.loss,
            {"weight": job.weight, "scale": job.scale},
            job.optimizer,
            3,
            scheduler=job.scheduler,
            settings={"seed": 0, "units": 3},
            checkpoint=path,
            resume=True,
        )
    with pytest.raises(ValueError, match=r"both have a scheduler, or neither"):
        fit(
            job.loss,
            {"weight": job.weight, "scale": job.scale},
            job.optimizer,
            3,
            generators={"noise": job.generator},
            settings={"seed": 0, "units": 3},
            checkpoint=path,
            resume=True,
        )
    path.write_text("something else")
    with pytest.raises(ValueError, match="not a checkpoint of this version"):
        Job().fit(checkpoint=path, resume=True)


X = torch.ones(2, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"steps": -1}, ValueError, r"steps is -1; it must be an integer >= 0"),
        ({"steps": 2.0}, ValueError, r"steps is 2.0; it must be an integer"),
        ({"checkpoint_every": 0}, ValueError, r"checkpoint_every is 0; it must be an integer >= 1"),
        ({"clip_norm": 0.0}, ValueError, r"clip_norm is 0.0; it must be positive"),
        ({"resume": True}, ValueError, r"resume is True and checkpoint is None"),
        ({"parameters": {}}, ValueError, r"holds 1 tensors that are not in parameters.*shape \(2,\)"),
        ({"parameters": X}, TypeError, r"parameters is Tensor; it must be a module, or"),
        ({"parameters": {"x": 3}}, TypeError, r"parameters\['x'\] is int; it must be a module or a tensor"),
        ({"parameters": {"x": X * 2}}, ValueError, r"parameters\['x'\] must be a leaf tensor"),
        ({"loss": lambda step: X}, ValueError, r"loss of shape \(2,\); it must be a scalar"),
        ({"loss": lambda step: 3.0}, TypeError, r"loss as float; it must be a scalar tensor"),
        ({"loss": lambda step: {"error": X.sum()}}, ValueError, r"\['error'\]; one must be called \"loss\""),
        ({"loss": lambda step: torch.tensor(1.0)}, ValueError, r"the loss does not require grad"),
        (
            {"loss": lambda step: {"loss": X.sum(), **({"more": X.sum()} if step else {})}},
            ValueError,
            r"\['loss', 'more'\] at step 1.*must be the same at every step",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {
        "loss": lambda step: X.square().sum(),
        "parameters": {"x": X},
        "optimizer": torch.optim.SGD([X], lr=0.0),
        "steps": 3,
    }
    # a user has no type checks in front of fit, as these tests do
    with pytest.raises(error, match=match):
        inspect.unwrap(fit)(**arguments | changes)
