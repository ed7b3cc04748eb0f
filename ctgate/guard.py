"""Notice that what a solve has read was changed before somebody reads the rest of it."""

from itertools import chain

import torch
from torch import Tensor, nn

from ctgate.controls import FunctionControl
from ctgate.controls.sampled import SampledControl
from ctgate.problem import ODEProblem


def _read_by(prob: ODEProblem, with_state: bool) -> dict[str, Tensor]:
    """The tensors that a problem's solution depends on, by what a person calls them."""
    parts = chain(prob.named_parameters().items(), prob.field.named_buffers())
    tensors = {f"the field's {name}": tensor for name, tensor in parts}
    if isinstance(prob.control, SampledControl):
        tensors["the control's xs"] = prob.control.xs
    if isinstance(prob.control, FunctionControl) and isinstance(prob.control.fn, nn.Module):
        own = chain(prob.control.fn.named_parameters(), prob.control.fn.named_buffers())
        tensors.update((f"the control's {name}", tensor) for name, tensor in own)
    if with_state:
        tensors["h0"] = prob.h0
    return tensors


class Unchanged:
    """Remembers the tensors of a problem and their versions, and raises when one was replaced or written to.

    The initial state is among them ``with_state``: who takes steps again needs it, who reads states does not.
    Tensors that only a plain function captures are not seen, nor those made under ``torch.inference_mode``,
    which have no versions.
    """

    def __init__(self, prob: ODEProblem, with_state: bool = False) -> None:
        # Whether autograd follows the solve: what is read of it later may have a graph only then.
        self.followed = torch.is_grad_enabled()
        self._prob = prob
        self._with_state = with_state
        self._versions = {
            name: (tensor, None if tensor.is_inference() else tensor._version)
            for name, tensor in _read_by(prob, with_state).items()
        }

    def check(self, what: str, remedy: str) -> None:
        """Raise RuntimeError, naming the tensor, if one changed; ``remedy`` says what to do instead."""
        now = _read_by(self._prob, self._with_state)
        for name, (tensor, version) in self._versions.items():
            if now.get(name) is not tensor or (version is not None and tensor._version != version):
                raise RuntimeError(f"{what}: {name} was changed since the solve; {remedy}")
