r"""What the fused cells with one gate share: :math:`\tau\,\dot h = g\,(n - h)`, gate and candidate."""

import abc
from collections.abc import Mapping

import torch
from torch import Tensor

from ctgate.kernels.fused.cell import FusedCell, Gradients, Parts, Scale, scaled, total_like
from ctgate.kernels.fused.norm import Norm
from ctgate.kernels.fused.rule import Rule


class RelaxingCell(FusedCell):
    """A cell whose rate is a gate over tau and whose target is a bounded candidate, ``tanh`` of what it sees.

    The last parts of an evaluation are the candidate's: its value n, and with layer normalisation its
    pre-activation and that one's mean and reciprocal deviation. The last two views are gate and candidate.
    """

    def __init__(self, parameters: Mapping[str, Tensor], tau: Tensor, eps: float | None) -> None:
        super().__init__(parameters, tau, eps)
        self.norm = (
            None if eps is None else Norm(parameters["layernorm.weight"], parameters["layernorm.bias"], eps)
        )
        if self.norm is not None:
            self.kernels = ""

    @abc.abstractmethod
    def gate(self, parts: Parts) -> Tensor:
        """rate * tau, (step, sample, hidden) or what broadcasts to it."""

    def candidate_parts(self, parts: Parts) -> Parts:
        """Those of the candidate: the last ones."""
        return parts[-1:] if self.norm is None else parts[-4:]

    def candidate_room(self, like: Tensor, steps: int, samples: int) -> Parts:
        """Room for the candidate's parts."""
        widths = [self.hidden] if self.norm is None else [self.hidden, self.hidden, 1, 1]
        return tuple(like.new_empty(steps, samples, width) for width in widths)

    def candidate(self, parts: Parts) -> Tensor:
        """n, (step, sample, hidden)."""
        return self.candidate_parts(parts)[0]

    def before(self, parts: Parts) -> Tensor:
        """Where the candidate's pre-activation is put: over n itself, unless it is normalised."""
        return parts[-1] if self.norm is None else parts[-3]

    def activate(self, candidate: Parts) -> None:
        """n from its pre-activation, in place; ``candidate`` are the candidate's parts of one evaluation."""
        if self.norm is None:
            candidate[0].tanh_()
        else:
            self.norm.activate(candidate)

    def advance(self, views: Parts, h: Tensor, scale: Scale, rule: Rule, out: Tensor) -> None:
        """keep h + w (n - h)."""
        gate, target = views[-2:]
        if not rule.keep:
            torch.sub(target, h, out=out).mul_(scaled(gate, scale))
        elif isinstance(scale, float) and scale != 1.0 and not rule.exponential:
            torch.sub(target, h, out=out)
            torch.addcmul(h, gate, out, value=scale, out=out)
        else:
            torch.lerp(h, target, rule.weight(scaled(gate, scale)), out=out)

    def slopes(
        self, parts: Parts, h: Tensor, scale: Scale, rule: Rule, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives of what :meth:`advance` gave: by h with gate and candidate held, by the logarithm
        of the gate, and by the candidate's argument, normalised if it is, in ``out`` where that is given."""
        target = self.candidate(parts)
        weight, bend = rule.weights(scaled(self.gate(parts), scale))
        through = torch.addcmul(weight, weight * target, target, value=-1.0, out=out)
        return rule.keep - weight, bend * (target - h), through

    def stretch(self, parts: Parts, h: Tensor, scale: Scale, rule: Rule) -> Tensor:
        """x dw/dx (n - h)."""
        _, bend = rule.weights(scaled(self.gate(parts), scale))
        return bend * (self.candidate(parts) - h)

    def through_norm(self, y: Tensor, candidate: Parts) -> Tensor:
        """The cotangent of the candidate's pre-activation from that of its normalised value, in one step or
        in many."""
        return y if self.norm is None else self.norm.pull(y, candidate)

    def norm_gradients(self, y: Tensor, parts: Parts, keep: int) -> Gradients:
        """Of the normalisation's parameters, from the cotangent of the normalised value (step, ...)."""
        if self.norm is None:
            return {}
        return self.norm.gradients(y, self.candidate_parts(parts), keep)

    def norm_sources(self, direction: Mapping[str, Tensor], parts: Parts, out: Tensor) -> None:
        """The transpose of :meth:`norm_gradients`: writes what the normalised value's tangent gets."""
        if self.norm is not None:
            self.norm.add_sources(direction, self.candidate_parts(parts), out.zero_())

    def tau_sources(
        self, direction: Mapping[str, Tensor], parts: Parts, h: Tensor, scale: Scale, rule: Rule
    ) -> Tensor | None:
        """The transpose of :meth:`tau_gradients`."""
        along = direction.get("log_tau")
        return None if along is None else -along * self.stretch(parts, h, scale, rule)

    def tau_gradients(
        self, parts: Parts, a: Tensor, h: Tensor, scale: Scale, rule: Rule, keep: int
    ) -> Gradients:
        """Of log tau, where it is a parameter, from the cotangents of what the steps gave."""
        parameter = self.parameters.get("log_tau")
        if parameter is None:
            return {}
        return {"log_tau": -total_like(a * self.stretch(parts, h, scale, rule), parameter, keep)}
