"""The one training loop: progress, history, checkpoints, exact resume, an orderly end on Ctrl-C."""

import contextlib
import enum
import math
import os
import signal
import threading
import time
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

Loss = Callable[[int], Tensor | Mapping[str, Tensor]]
Setting = str | int | float | bool | None

_FORMAT = 1


class TrainingStatus(enum.Enum):
    """How a call of :func:`fit` ended; its value is a sentence about it, also at ``.message``."""

    FINISHED = "All steps were taken."
    INTERRUPTED = "The training was interrupted from the keyboard."
    DIVERGED = "The loss or its gradient is no longer finite."

    @property
    def message(self) -> str:
        """One sentence that says what happened."""
        return str(self.value)


@dataclass(frozen=True)
class TrainingResult:
    """What :func:`fit` did.

    Attributes:
        status: a :class:`TrainingStatus`. message: what happened, with numbers.
        step: steps taken so far, those before a resume included.
        history: one value per step taken: "loss", "gradient_norm" (before clipping), the loss's own metrics.
        wall_time: seconds spent so far, those before a resume included.
    """

    status: TrainingStatus
    message: str
    step: int
    history: dict[str, list[float]] = field(repr=False)
    wall_time: float


def fit(
    loss: Loss,
    parameters: nn.Module | Mapping[str, nn.Module | Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    clip_norm: float | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    settings: Mapping[str, Setting] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    progress: bool = True,
    description: str = "training",
) -> TrainingResult:
    r"""Take ``steps`` steps of ``optimizer`` down ``loss``; the parameters are changed in place.

    A run that was interrupted and resumed ends with the bits of one that was not, if the loss depends on
    nothing but its step number, ``parameters`` and ``generators``.

    Parameters:
        loss: called as ``loss(step)``, step = 0, 1, ...; returns a scalar tensor, or a mapping with the
            scalar "loss" and further scalars to record.
        parameters: what is trained: a module, or modules and leaf tensors by name.
        optimizer: over tensors of ``parameters``. scheduler: stepped after each step.
        steps: the number of steps that the whole training has, also after a resume.
        clip_norm: the norm that the gradient is scaled down to where it is larger; None leaves it.
        generators: the random generators that ``loss`` draws from, by name.
        settings: what the training depends on besides (a seed, a size); kept in the checkpoint, and a resume
            with others is refused.
        checkpoint: file written every ``checkpoint_every`` steps, at the end and on Ctrl-C, whole or not at
            all. resume: go on from it; without that file, from the beginning.
        progress: show a bar, on a terminal only. description: its title.

    Returns: :class:`TrainingResult`. On Ctrl-C the step at hand is finished, the checkpoint written, and the
    status is INTERRUPTED; a second Ctrl-C drops the step at hand. Where the loss is not finite the parameters
    go back to the last ones whose loss and gradient were finite, where the gradient is not they stay, and the
    status is DIVERGED; the file then keeps the last checkpoint before.

    Raises:
        ValueError: ``steps``, ``clip_norm`` or ``checkpoint_every`` out of range, an optimizer over other
            tensors, a loss that is no scalar, ``resume`` without ``checkpoint`` or with one from another
            training.
        TypeError: ``parameters`` or what ``loss`` returns is of another kind.
    """
    _check_number("steps", steps, least=0)
    _check_number("checkpoint_every", checkpoint_every, least=1)
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm is {clip_norm!r}; it must be positive, or None")
    if resume and checkpoint is None:
        raise ValueError("resume is True and checkpoint is None; give the file to go on from")
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    run = _Training(_parts(parameters), optimizer, scheduler, dict(generators or {}), dict(settings or {}))
    if resume and path is not None and path.exists():
        run.restore(path)

    status = TrainingStatus.FINISHED
    begun = time.perf_counter() - run.wall_time
    with (
        _Interruptions() as interruptions,
        tqdm(total=steps, initial=run.step, desc=description, disable=None if progress else True) as bar,
    ):
        while run.step < steps and status is TrainingStatus.FINISHED:
            status, detail = run.advance(loss, clip_norm, interruptions)
            run.wall_time = time.perf_counter() - begun
            if status is TrainingStatus.FINISHED:
                bar.update()
                bar.set_postfix_str(f"loss {run.history['loss'][-1]:.4g}", refresh=False)
                if interruptions.asked:
                    status = TrainingStatus.INTERRUPTED
                elif path is not None and run.step % checkpoint_every == 0 and run.step < steps:
                    run.save(path)
        if path is not None and status is not TrainingStatus.DIVERGED:
            run.save(path)
    message = status.message
    if status is TrainingStatus.INTERRUPTED:
        message = f"{message} {run.step} of {steps} steps are done."
    elif status is TrainingStatus.DIVERGED:
        message = f"{message} {detail}"
    return TrainingResult(status, message, run.step, run.history, run.wall_time)


class _Training:
    """All that changes while training, to be saved and restored as one."""

    def __init__(
        self,
        parts: dict[str, nn.Module | Tensor],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        generators: dict[str, torch.Generator],
        settings: dict[str, Setting],
    ) -> None:
        self.parts = parts
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.generators = generators
        self.settings = settings
        self.step = 0
        self.wall_time = 0.0
        self.history: dict[str, list[float]] = {}
        self.trained = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        known = {
            id(tensor)
            for part in self.parts.values()
            for tensor in (part.parameters() if isinstance(part, nn.Module) else [part])
        }
        strangers = [tuple(tensor.shape) for tensor in self.trained if id(tensor) not in known]
        if strangers:
            raise ValueError(
                f"optimizer holds {len(strangers)} tensors that are not in parameters, the first of shape "
                f"{strangers[0]}; they would be lost from the checkpoint"
            )
        self.good: list[Tensor] = [tensor.detach().clone() for tensor in self.trained]

    def advance(
        self, loss: Loss, clip_norm: float | None, interruptions: "_Interruptions"
    ) -> tuple[TrainingStatus, str]:
        """One step: loss, gradient, update. Until the update, nothing but the generators has changed."""
        drawn = {name: generator.get_state() for name, generator in self.generators.items()}
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with interruptions.allowed():
                values = _scalars(loss(self.step))
                value = values["loss"]
                if not math.isfinite(value.item()):
                    self._return_to_good()
                    return TrainingStatus.DIVERGED, (
                        f"The loss of step {self.step} is {value.item()}; the parameters are the last ones "
                        "with a finite loss. Try a smaller learning rate or a smaller clip_norm."
                    )
                value.backward()  # type: ignore[no-untyped-call]
                norm = clip_grad_norm_(self.trained, math.inf if clip_norm is None else clip_norm)
                if not math.isfinite(norm.item()):
                    return TrainingStatus.DIVERGED, (
                        f"The gradient's norm at step {self.step} is {norm.item()} and the loss "
                        f"{value.item():.6g}; the step was not taken. Try a smaller learning rate, or look "
                        "for a function without a derivative in the loss."
                    )
        except KeyboardInterrupt:
            for name, generator in self.generators.items():
                generator.set_state(drawn[name])
            return TrainingStatus.INTERRUPTED, ""
        row = {name: number.item() for name, number in (values | {"gradient_norm": norm}).items()}
        if self.history and set(row) != set(self.history):
            raise ValueError(
                f"loss returned {sorted(values)} at step {self.step}, and the history has "
                f"{sorted(self.history)}; the metrics must be the same at every step"
            )
        self.good = [tensor.detach().clone() for tensor in self.trained]
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        for name, number in row.items():
            self.history.setdefault(name, []).append(number)
        self.step += 1
        return TrainingStatus.FINISHED, ""

    def _return_to_good(self) -> None:
        with torch.no_grad():
            for tensor, good in zip(self.trained, self.good, strict=True):
                tensor.copy_(good)

    def save(self, path: Path) -> None:
        """Write all of it, so that the file is at every moment the old checkpoint or the new one."""
        state = {
            "format": _FORMAT,
            "settings": self.settings,
            "step": self.step,
            "wall_time": self.wall_time,
            "history": self.history,
            "parameters": {
                name: part.state_dict() if isinstance(part, nn.Module) else part.detach()
                for name, part in self.parts.items()
            },
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
        }
        replace_atomically(path, lambda temporary: torch.save(state, temporary))

    def restore(self, path: Path) -> None:
        """Take everything from the file, after checking that it is of this training."""
        state: Any = None
        if zipfile.is_zipfile(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"checkpoint is {str(path)!r}, which is not a checkpoint of this version of fit")
        for name in sorted(set(self.settings) | set(state["settings"])):
            was, now = state["settings"].get(name), self.settings.get(name)
            if was != now:
                raise ValueError(
                    f"checkpoint {str(path)!r} was written with {name} = {was!r} and this training has "
                    f"{now!r}; resume with the same, or start afresh without resume"
                )
        for what, own in (("parameters", self.parts), ("generators", self.generators)):
            if set(state[what]) != set(own):
                raise ValueError(
                    f"checkpoint {str(path)!r} has {what} {sorted(state[what])} and this training has "
                    f"{sorted(own)}"
                )
        if (state["scheduler"] is None) != (self.scheduler is None):
            raise ValueError(
                f"checkpoint {str(path)!r} and this training must both have a scheduler, or neither"
            )
        with torch.no_grad():
            for name, part in self.parts.items():
                if isinstance(part, nn.Module):
                    part.load_state_dict(state["parameters"][name])
                else:
                    part.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        self.step, self.wall_time, self.history = state["step"], state["wall_time"], state["history"]
        self.good = [tensor.detach().clone() for tensor in self.trained]


class _Interruptions:
    """Ctrl-C as a request to stop after the step at hand; a second one ends the loss, never the update.

    An update that is cut in half belongs to no step. Python's own handler is back when the block ends. Where
    it is not installed (another thread, a program with a handler of its own), Ctrl-C keeps its meaning.
    """

    def __init__(self) -> None:
        self.asked = False
        self._droppable = False
        self._installed = False

    def __enter__(self) -> "_Interruptions":
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._on_signal)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        if self.asked and self._droppable:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Inside, a second Ctrl-C raises KeyboardInterrupt."""
        self._droppable = True
        try:
            yield
        finally:
            self._droppable = False


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, and move it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _parts(parameters: object) -> dict[str, nn.Module | Tensor]:
    if isinstance(parameters, nn.Module):
        return {"module": parameters}
    if not isinstance(parameters, Mapping):
        raise TypeError(
            f"parameters is {type(parameters).__name__}; it must be a module, or modules and tensors by name"
        )
    for name, part in parameters.items():
        if not isinstance(part, nn.Module | Tensor):
            raise TypeError(f"parameters[{name!r}] is {type(part).__name__}; it must be a module or a tensor")
        if isinstance(part, Tensor) and not (part.is_leaf and part.requires_grad):
            raise ValueError(f"parameters[{name!r}] must be a leaf tensor that requires grad")
    return dict(parameters)


def _scalars(result: object) -> dict[str, Tensor]:
    named: dict[str, object] = dict(result) if isinstance(result, Mapping) else {"loss": result}
    if "loss" not in named or "gradient_norm" in named:
        raise ValueError(
            f'loss returned {sorted(named)}; one must be called "loss", and "gradient_norm" is fit\'s own'
        )
    values: dict[str, Tensor] = {}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"loss returned {name} as {type(value).__name__}; it must be a scalar tensor")
        if value.numel() != 1:
            raise ValueError(f"loss returned {name} of shape {tuple(value.shape)}; it must be a scalar")
        values[name] = value
    if not values["loss"].requires_grad:
        raise ValueError("the loss does not require grad; it must depend on parameters that do")
    return values


def _check_number(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer >= {least}")
