"""Any other differential equation as a field."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ctgate.fields.base import Time, VectorField

RightHandSide = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Field(VectorField):
    r"""Any :math:`dh/dt = \mathrm{fn}(t, h, u)`, so that every solver and sensitivity works on it.

    The split is the trivial one, ``rate = 0`` and ``drive = fn(t, h, u)``: nothing is known about what leaks,
    exponential methods reduce to explicit ones, and ``time_constants`` is infinite everywhere.

    Parameters:
        fn: a function or an ``nn.Module`` of (t, h, u) that returns dh/dt [state/time] in the shape and dtype
            of ``h``. ``t`` arrives as a float64 tensor on the device of ``h``: 0-dimensional, or a column
            ``(*batch, 1)`` where the samples have times of their own. ``u`` is None without a control. A
            module's parameters are the field's, under ``fn.``; a tensor that a plain function captures is not
            seen among them.
        state_size, input_size: checked against ``h`` and ``u`` when given.

    Raises:
        TypeError: ``fn`` is not callable. ValueError: sizes that are not positive integers.

    Source: THEORY.md 1.
    """

    autonomous = False

    def __init__(
        self, fn: RightHandSide, *, state_size: int | None = None, input_size: int | None = None
    ) -> None:
        if not callable(fn):
            raise TypeError(f"Field(fn=...): fn is {fn!r}; it must be a function or nn.Module of (t, h, u)")
        super().__init__(input_size=input_size, state_size=state_size)
        self.fn = fn

    def rate_drive(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(0, fn(t, h, u)), what ``fn`` returns as it is."""
        return torch.zeros_like(h), self(t, h, u)

    def forward(
        self, t: Time, h: Float[Tensor, "*batch state"], u: Float[Tensor, "*#batch channel"] | None = None
    ) -> Tensor:
        """fn(t, h, u), as it is: ``drive - 0 * h`` would broadcast a wrong shape away."""
        self.check_arguments(h, u)
        # float32 time is too coarse for long records, so fn always gets float64
        if isinstance(t, Tensor):
            time = t.to(device=h.device, dtype=torch.float64)
        else:
            time = torch.full((), t, device=h.device, dtype=torch.float64)
        return self.fn(time, h, u)

    def extra_repr(self) -> str:
        """The wrapped function, for ``print(field)``."""
        return "" if isinstance(self.fn, torch.nn.Module) else getattr(self.fn, "__name__", repr(self.fn))
