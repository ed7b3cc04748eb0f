"""How much is measured, and what must be reached."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctgate.experiments.speed.lines import Target


@dataclass(frozen=True)
class Preset:
    """Sizes of the workloads; targets belong to those of ``full``.

    ``rounds`` of each pairing; ``records``, whether what has no target is measured as well; ``batch`` of all
    workloads but the gradients of samples. ``gru`` and ``lstm``, (hidden, steps) of the discrete cells;
    ``dense``, the steps of the comparison with torchdiffeq's Euler, and ``per_step``, the shorter and the
    longer sequence of our time per step. ``hidden`` of that, of the flows and of the tangent. ``span`` [tau]
    of the flows, and their ``tolerances``, or ``knot_tolerance`` where the input has knots. ``samples``,
    ``sample_steps`` and ``sample_hidden`` of the gradients of samples, and ``sample_loop``, on how many of
    them the loop is timed. ``tangent_steps`` of the tangent. ``lyapunov_size`` units of the network whose
    exponents are wanted, ``lyapunov`` (initial states, span [tau]) of each case, and its ``lyapunov_rounds``.
    ``phase``, values of each parameter of a phase diagram, and ``phase_loop``, on how many of its cells the
    loop is timed.
    """

    rounds: int
    records: bool
    batch: int
    gru: tuple[tuple[int, int], ...]
    lstm: tuple[tuple[int, int], ...]
    dense: tuple[int, ...]
    per_step: tuple[int, int]
    hidden: int
    span: int
    tolerances: tuple[float, ...]
    knot_tolerance: float
    samples: int
    sample_steps: int
    sample_hidden: int
    sample_loop: int
    tangent_steps: int
    lyapunov_size: int
    lyapunov: tuple[tuple[int, int], ...]
    lyapunov_rounds: int
    phase: int
    phase_loop: int


FULL = Preset(
    rounds=9,
    records=True,
    batch=64,
    gru=((64, 80), (128, 256), (512, 256)),
    lstm=((64, 80), (128, 256)),
    dense=(256, 1024),
    per_step=(128, 1024),
    hidden=128,
    span=64,
    tolerances=(1e-4, 1e-6),
    knot_tolerance=1e-6,
    samples=256,
    sample_steps=120,
    sample_hidden=64,
    sample_loop=16,
    tangent_steps=1024,
    lyapunov_size=200,
    lyapunov=((1, 1000), (8, 125)),
    lyapunov_rounds=3,
    phase=40,
    phase_loop=64,
)
QUICK = Preset(
    rounds=5,
    records=False,
    batch=64,
    gru=((64, 80), (128, 256)),
    lstm=((64, 80),),
    dense=(256,),
    per_step=(128, 1024),
    hidden=128,
    span=64,
    tolerances=(1e-4,),
    knot_tolerance=1e-6,
    samples=256,
    sample_steps=120,
    sample_hidden=64,
    sample_loop=4,
    tangent_steps=256,
    lyapunov_size=200,
    lyapunov=((1, 60), (8, 8)),
    lyapunov_rounds=3,
    phase=40,
    phase_loop=64,
)
PRESETS: dict[str, Preset] = {"quick": QUICK, "full": FULL}


def preset_from(stored: Mapping[str, Any]) -> Preset:
    """The preset of ``dataclasses.asdict``, as it comes out of JSON."""

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return Preset(**{name: tuples(value) for name, value in stored.items()})


Key = tuple[str | int | float, ...]


def _at_most(bound: float) -> Target:
    return Target(bound, at_most=True)


# What the ratios must reach on one thread of a CPU, by workload and by the sizes that it is stated for.
_CPU: dict[Key, Target] = {
    ("gru", 64, 80): Target(1.4),
    ("gru", 128, 256): Target(1.2),
    ("gru", 512, 256): Target(1.1),
    ("lstm", 64, 80): Target(1.0),
    ("lstm", 128, 256): Target(1.0),
    ("dense", 128, 256): Target(2.5),
    ("dense", 128, 1024): Target(6.0),
    ("per step", 128, 1024): _at_most(1.15),
    ("flow forward", 128, 64): Target(2.5),
    ("flow gradient", 128, 64): Target(2.0),
    ("flow memory", 128, 64): _at_most(0.125),
    ("knots", 128, 64, 1e-6): Target(3.0),
    ("equal error", 128, 64): Target(1.0),
    ("exact gradient",): _at_most(1e-6),
    ("samples loop", 256, 120): Target(80.0),
    ("samples vmap", 256, 120): Target(10.0),
    ("tangent", 128, 1024): Target(4.0),
    ("stiff gates",): _at_most(0.25),
    ("lyapunov", "Euler", 200, 1): Target(3.0),
    ("lyapunov", "Euler", 200, 8): Target(4.0),
    ("phase", 40): Target(20.0),
}
_CUDA: dict[Key, Target] = {
    **{("gru", hidden, steps): Target(0.9) for hidden, steps in FULL.gru},
    ("flow forward", 128, 64): Target(3.0),
    ("flow gradient", 128, 64): Target(3.0),
    ("flow memory", 128, 64): _at_most(0.125),
    ("exact gradient",): _at_most(1e-6),
    ("stiff gates",): _at_most(0.25),
}


def target(device: str, *key: str | int | float) -> Target | None:
    """What must be reached on this kind of device; None where nothing is stated for these sizes."""
    return (_CPU if device == "cpu" else _CUDA).get(key)
