"""What dynamic mean-field theory makes of a random network: one unit in Gaussian input."""

from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import expit

from ctgate.algorithms import Euler
from ctgate.fields import GRU, GatedRate, Leaky
from ctgate.meanfield.network import RandomNetwork
from ctgate.meanfield.paths import UnitNetwork
from ctgate.meanfield.stationary import GaussianNetwork, Relaxation, ResetGate
from ctgate.meanfield.theories import require


@dataclass(frozen=True)
class Reduction:
    r"""A network as its theory sees it.

    ``unit`` is one unit. ``gaussian`` is the lag equation where it is closed: a constant rate, no bias of h
    and no input, None elsewhere. Its x is h of a GatedRate; of a cell whose h relaxes to tanh(W h) it is the
    pre-activation W h, and C_h = C_x / a_h^2 (``preactivation``). ``reset_level`` is a constant reset gate,
    contained in ``unit.gains["h"]``.
    """

    unit: UnitNetwork
    gaussian: GaussianNetwork | None
    preactivation: bool
    reset_level: float

    @property
    def gain_squared(self) -> float:
        """a^2 of the lag equation."""
        return self.unit.gains["h"] ** 2


def reduce(network: RandomNetwork, alg: Any, adiabatic: bool, owner: str) -> Reduction:
    """What stands for the network in the flow (``alg`` None) or in Euler's map.

    Raises: ValueError for a network without this theory, time constants that differ between units, steps
    longer than a time constant, ``adiabatic`` where no gate has a delay. TypeError for another ``alg``.
    """
    require(network, "dmft", owner)
    if alg is not None and not isinstance(alg, Euler):
        raise TypeError(f"{owner}(alg=...): alg is {alg!r}; it must be None (the flow) or ct.Euler(dt)")
    step = 0.0 if alg is None else float(alg.dt)
    if adiabatic and (network.field is not GatedRate or "r" not in network.blocks):
        raise ValueError(f"{owner}(adiabatic=True): {network.field.__name__} has no reset gate with a delay")
    clocks = {name: _scalar(network, name, owner) for name in ("tau", "tau_z", "tau_r")}
    if 0.0 < min(clocks.values()) < step:
        raise ValueError(f"{owner}(alg=...): the step {step} exceeds a time constant, {min(clocks.values())}")

    rate = 1.0 / clocks["tau"]
    if network.field is Leaky:
        rate *= float(network.options.get("alpha", 1.0))
    update = 0 if "z" not in network.blocks else -1 if network.field is GRU else 1
    if update and not network.gains["z"]:
        rate, update = rate * float(expit(update * network.bias("z"))), 0
    gains = {"h": float(network.gains["h"])}
    level = 1.0
    if "r" in network.blocks and not network.gains["r"]:
        level = float(expit(network.bias("r")))
        gains["h"] *= level
    elif "r" in network.blocks:
        gains["r"] = float(network.gains["r"])
    if update:
        gains["z"] = float(network.gains["z"])

    delayed = network.field is GatedRate
    after = network.field is GRU and network.reset != "before" and "r" in gains
    slow_reset = delayed and not adiabatic and "r" in network.blocks
    unit = UnitNetwork(
        target="input" if delayed else "reset tanh" if after else "tanh",
        signal="tanh" if delayed else "state",
        gains=gains,
        biases={block: network.bias(block) for block in gains},
        rate=rate,
        update=update,
        relaxation_z=Relaxation(1.0 / clocks["tau_z"], step) if delayed and "z" in network.blocks else None,
        relaxation_r=Relaxation(1.0 / clocks["tau_r"], step) if slow_reset else None,
        step=step,
        input_variance=network.input_variance,
    )
    closed = not update and not network.bias("h") and not network.input_variance
    if not closed or (not delayed and "r" in gains):
        return Reduction(unit, None, not delayed, level)
    reset = ResetGate(gains["r"], network.bias("r"), unit.relaxation_r) if "r" in gains else None
    return Reduction(unit, GaussianNetwork(Relaxation(rate, step), reset=reset), not delayed, level)


def _scalar(network: RandomNetwork, name: str, owner: str) -> float:
    """A time constant that all units share."""
    value: Any = network.options.get(name, 1.0)
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise ValueError(f"{owner}: {name} has one value per unit; the theory is of one for all")
    return float(value)
