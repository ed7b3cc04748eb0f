"""The initial value problem: a field, an initial state, a span of time, an input."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn
from torch.func import functional_call

from ctgate.controls import Control
from ctgate.controls.base import concrete, differentiated
from ctgate.controls.sampled import SampledControl
from ctgate.controls.times import as_float64, first_index, rounding_of
from ctgate.fields import VectorField
from ctgate.fields.base import broadcasts_to


class Method(nn.Module):
    """Makes one method of a field callable by ``functional_call``, which calls modules only."""

    def __init__(self, field: VectorField, name: str) -> None:
        super().__init__()
        self.field = field
        self.name = name

    def forward(self, *args: Any) -> Any:
        return getattr(self.field, self.name)(*args)


@dataclasses.dataclass(frozen=True, eq=False)
class ODEProblem:
    r"""The problem :math:`dh/dt = -rate(t,h,u)\,h + drive(t,h,u)`, :math:`h(t_0) = h_0`, u = control(t).

    Parameters
    ----------
    field: a :class:`ctgate.VectorField`; wrap a plain function ``fn(t, h, u)`` in :class:`ctgate.Field`.
    h0: initial state, ``(*batch, state)``, finite.
    tspan: ``(t0, t1)`` in the units of the field's tau, ``t0 < t1``, inside the control's support. Two floats
        that all samples share, or a span for every sample: tensors that broadcast to ``batch`` (kept as
        float64; one that requires grad is per sample too), where ``t0 == t1`` is a sample that stays at h0.
    control: a :class:`ctgate.Control` with values ``(*batch, channel)`` at each time; its batch may
        broadcast against that of ``h0``. None for a field without input.
    parameters: values in place of ``field.named_parameters()``, a dict in their names (any subset), so that
        ``torch.func.grad`` and ``vmap`` over parameters work through :func:`ctgate.solve`.

    Raises: TypeError or ValueError naming the argument, what it was and what it must be.

    Source: THEORY.md 1 and 11.
    """

    field: VectorField
    h0: Float[Tensor, "*batch state"]
    tspan: tuple[float | Real[Tensor, "..."], float | Real[Tensor, "..."]]
    control: Control | None = None
    parameters: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.field, VectorField):
            raise TypeError(
                f"field is {type(self.field).__name__}; it must be a ctgate field: wrap fn(t, h, u) in "
                "ct.Field(fn)"
            )
        if self.control is not None and not isinstance(self.control, Control):
            raise TypeError(
                f"control is {type(self.control).__name__}; it must be a ctgate control such as "
                "ct.ZeroOrderHold(ts, xs)"
            )
        self._check_state()
        object.__setattr__(self, "tspan", self._checked_span())
        self._check_parameters()
        self._check_control()

    def _check_state(self) -> None:
        if not isinstance(self.h0, Tensor) or not self.h0.is_floating_point():
            kind = self.h0.dtype if isinstance(self.h0, Tensor) else type(self.h0).__name__
            raise TypeError(f"h0 is {kind}; it must be a floating-point tensor of shape (*batch, state)")
        size = self.field.state_size
        if self.h0.ndim == 0 or (size is not None and self.h0.shape[-1] != size):
            expected = "state" if size is None else size
            raise ValueError(f"h0 has shape {tuple(self.h0.shape)}; it must be (*batch, {expected})")
        if self.h0.device.type != "meta" and concrete(torch.isfinite(self.h0).all()) == 0.0:
            first = (~torch.isfinite(self.h0)).nonzero()[0].tolist()
            raise ValueError(
                f"h0[{', '.join(map(str, first))}] is {self.h0[tuple(first)].item()}; h0 must be finite"
            )
        for name, parameter in self.field.named_parameters():
            self._check_companion(f"the field's {name}", parameter)

    def _check_companion(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.h0.device:
            raise ValueError(
                f"{name} is on {tensor.device} and h0 on {self.h0.device}; they must be on one device"
            )
        if tensor.dtype != self.h0.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and h0 {self.h0.dtype}; they must have one dtype")

    def _check_parameters(self) -> None:
        if self.parameters is None:
            return
        known = dict(self.field.named_parameters())
        for name, value in self.parameters.items():
            if name not in known:
                raise ValueError(
                    f"parameters has {name!r}, which the field lacks; its parameters are {sorted(known)}"
                )
            if value.shape != known[name].shape:
                raise ValueError(
                    f"parameters[{name!r}] has shape {tuple(value.shape)}; it must be "
                    f"{tuple(known[name].shape)}"
                )
            self._check_companion(f"parameters[{name!r}]", value)

    def _check_control(self) -> None:
        size = self.field.input_size
        if self.control is None:
            if size:
                raise ValueError(
                    f"control is None and the field takes {size} input channels; give a ct.Control"
                )
            return
        self._check_support(self.control)
        if self.per_sample:
            u = self.control(self.sample_spans()[0].detach()[None])[0]
        elif isinstance(self.control, SampledControl):
            u = self.control.xs[0]
        else:
            u = self.control(max(self.span[0], self.control.support[0]))
        if u.ndim == 0 or (size is not None and u.shape[-1] != size):
            raise ValueError(
                f"control gives values of shape {tuple(u.shape)}; the field takes (*batch, {size})"
            )
        self._check_companion("the control's value", u)
        batch = self.h0.shape[:-1]
        if not broadcasts_to(u.shape[:-1], batch):
            raise ValueError(
                f"control gives values of shape {tuple(u.shape)}; their batch must broadcast to that of "
                f"h0, {tuple(batch)}"
            )

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the field, such as ``rate_drive``, with this problem's parameters in place."""
        if self.parameters is None:
            return getattr(self.field, method)(*args)
        named = {f"field.{name}": value for name, value in self.parameters.items()}
        return functional_call(Method(self.field, method), named, args)

    def named_parameters(self) -> dict[str, Tensor]:
        """The parameters in force: the field's own, with ``parameters`` in their place."""
        return {**dict(self.field.named_parameters()), **(self.parameters or {})}

    @property
    def per_sample(self) -> bool:
        """Whether samples have times of their own, in the control or in tspan."""
        return isinstance(self.tspan[0], Tensor) or (self.control is not None and not self.control.shared)

    @property
    def span(self) -> tuple[float, float]:
        """tspan as two floats that all samples share."""
        start, stop = self.tspan
        assert not isinstance(start, Tensor)
        assert not isinstance(stop, Tensor)
        return start, stop

    def sample_spans(self) -> tuple[Tensor, Tensor]:
        """tspan of every sample, two float64 tensors ``(*batch)``, with their graph."""
        batch, device = self.h0.shape[:-1], self.h0.device
        start, stop = (torch.as_tensor(t, dtype=torch.float64, device=device) for t in self.tspan)
        return start.expand(batch), stop.expand(batch)

    def _checked_span(self) -> tuple[float, float] | tuple[Tensor, Tensor]:
        pair = self.tspan
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"tspan is {pair!r}; it must be a pair of times (t0, t1)")
        if any(isinstance(t, Tensor) and (t.ndim > 0 or t.requires_grad or differentiated(t)) for t in pair):
            return self._checked_sample_spans(pair)
        try:
            start, stop = float(pair[0]), float(pair[1])
        except (TypeError, ValueError) as error:
            raise TypeError(f"tspan is {pair!r}; it must be a pair of times (t0, t1)") from error
        if not (math.isfinite(start) and math.isfinite(stop) and start < stop):
            raise ValueError(f"tspan is ({start}, {stop}); it must be finite with t0 < t1")
        return start, stop

    def _checked_sample_spans(self, pair: Sequence[Any]) -> tuple[Tensor, Tensor]:
        batch = self.h0.shape[:-1]
        times = []
        for number, t in enumerate(pair):
            time = as_float64(t, f"tspan[{number}]")[0].to(self.h0.device)
            if not broadcasts_to(time.shape, batch):
                raise ValueError(
                    f"tspan[{number}] has shape {tuple(time.shape)}; it must broadcast to the batch shape of "
                    f"h0, {tuple(batch)}"
                )
            times.append(time.expand(batch))
        start, stop = times
        wrong = first_index(~(start.isfinite() & stop.isfinite() & (start <= stop)).detach())
        if wrong is not None:
            place = tuple(wrong)
            raise ValueError(
                f"tspan of sample {place} is ({start[place].item()}, {stop[place].item()}); it must be "
                "finite with t0 <= t1"
            )
        return start, stop

    def _check_support(self, control: Control) -> None:
        """Raise ValueError where a span leaves what the control knows."""
        if not self.per_sample:
            start, stop = self.span
            low, high = control.support
            early = start < low - rounding_of(start, control.resolution)
            if early or stop > high + rounding_of(stop, control.resolution):
                raise ValueError(
                    f"tspan is {self.tspan} and the control is known on [{low}, {high}]; tspan must lie "
                    'inside, or give the control extrapolate="hold"'
                )
            return
        starts, stops = (t.detach() for t in self.sample_spans())
        lows, highs = (t.detach().to(starts.device) for t in control.sample_support)
        if not broadcasts_to(lows.shape, starts.shape):
            raise ValueError(
                f"control has times per sample of batch shape {tuple(lows.shape)}; it must broadcast to that "
                f"of h0, {tuple(starts.shape)}"
            )
        before = starts < lows - rounding_of(starts, control.resolution)
        outside = first_index(before | (stops > highs + rounding_of(stops, control.resolution)))
        if outside is not None:
            place = tuple(outside)
            low, high = (float(t.expand(starts.shape)[place]) for t in (lows, highs))
            raise ValueError(
                f"tspan of sample {place} is ({starts[place].item()}, {stops[place].item()}) and the control "
                f"is known there on [{low}, {high}]; tspan must lie inside (tspan=control.sample_support is "
                'the whole of it), or give the control extrapolate="hold"'
            )


def remake(prob: ODEProblem, **changes: Any) -> ODEProblem:
    """The same problem with some parts replaced: ``remake(prob, h0=..., parameters=...)``.

    Raises: TypeError for a name that a problem does not have.
    """
    known = [field.name for field in dataclasses.fields(prob)]
    for name in changes:
        if name not in known:
            raise TypeError(f"remake got {name!r}; a problem has {known}")
    return dataclasses.replace(prob, **changes)
