"""Small problems of every kind on which gradients are compared."""

import torch
from torch import Tensor, nn

import ctgate as ct

DOUBLE = torch.float64
SPAN = 0.8
# One of them is a knot of the held and of the smooth input.
SAVED = [0.2, 0.3, 0.7]


class Bent(nn.Module):
    """An equation of one's own, with parameters and a dependence on time."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(2, 2, dtype=dtype, generator=generator))
        self.speed = nn.Parameter(torch.tensor(1.3, dtype=dtype))

    def forward(self, t: float | Tensor, h: Tensor, u: Tensor | None) -> Tensor:
        time = torch.as_tensor(t, dtype=torch.float64).to(h.dtype)
        driven = 0.0 if u is None else u.sum(-1, keepdim=True)
        return torch.cos(self.speed * time) * torch.tanh(h @ self.matrix.mT) - h + driven


class Wave(nn.Module):
    """A smooth input, one channel, with parameters."""

    def __init__(self, dtype: torch.dtype = DOUBLE) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor([0.8], dtype=dtype))
        self.speed = nn.Parameter(torch.tensor([2.0], dtype=dtype))

    def forward(self, t: Tensor) -> Tensor:
        return self.size * torch.sin(self.speed * t.to(self.size.dtype))


def field(kind: str, generator: torch.Generator, dtype: torch.dtype = DOUBLE) -> ct.VectorField:
    """A field of one input channel with parameters of order 1."""
    options = {"dtype": dtype, "generator": generator, "tau": 0.6}
    if kind == "Field":
        return ct.Field(Bent(generator, dtype), state_size=2, input_size=1)
    made: ct.VectorField
    if kind == "Leaky":
        made = ct.Leaky(1, 2, alpha=0.7, learn_tau=True, **options)
    elif kind == "ScalarGate":
        made = ct.ScalarGate(1, 2, **options)
    elif kind == "MultiGate":
        made = ct.MultiGate(1, 2, learn_tau=True, **options)
    elif kind == "GRU":
        made = ct.GRU(1, 2, **options)
    elif kind == "GRU-before":
        made = ct.GRU(1, 2, reset="before", **options)
    elif kind == "LSTM":
        made = ct.LSTM(1, 2, **options)
    elif kind == "LTC":
        made = ct.LTC(1, 2, **options)
    elif kind == "GatedRate":
        made = ct.GatedRate(1, 2, tau_z=0.5, tau_r=0.9, **options)
    else:
        made = ct.Stack([ct.GRU(1, 2, **options), ct.LSTM(2, 1, **options)])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, dtype=dtype, generator=generator))
    return made


FIELDS = [
    "Leaky",
    "ScalarGate",
    "MultiGate",
    "GRU",
    "GRU-before",
    "LSTM",
    "LTC",
    "GatedRate",
    "Stack",
    "Field",
]


class Case:
    """A problem with all that can want a gradient: parameters, h0, and the input's tensors."""

    def __init__(
        self,
        kind: str,
        control: str,
        seed: int = 0,
        batch: tuple[int, ...] = (2,),
        dtype: torch.dtype = DOUBLE,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.field = field(kind, generator, dtype)
        size = self.field.state_size
        assert size is not None
        self.h0 = (0.5 * torch.randn(*batch, size, dtype=dtype, generator=generator)).requires_grad_()
        self.inputs: list[Tensor] = []
        self.span: tuple[float, float] | tuple[Tensor, Tensor] = (0.0, SPAN)
        if control == "smooth":
            wave = Wave(dtype)
            self.control: ct.Control = ct.FunctionControl(wave)
            self.inputs = list(wave.parameters())
        elif control == "cubic":
            xs = torch.randn(4, *batch, 1, dtype=dtype, generator=generator).requires_grad_()
            self.control = ct.CubicHermite(torch.tensor([0.0, 0.3, 0.5, SPAN], dtype=DOUBLE), xs)
            self.inputs = [xs]
        elif control == "held":
            xs = torch.randn(3, *batch, 1, dtype=dtype, generator=generator).requires_grad_()
            self.control = ct.ZeroOrderHold(torch.tensor([0.0, 0.3, 0.5, SPAN], dtype=DOUBLE), xs)
            self.inputs = [xs]
        else:
            # Samples that begin, end and have knots when they like; the second has one knot fewer.
            xs = torch.randn(4, *batch, 1, dtype=dtype, generator=generator).requires_grad_()
            times = torch.tensor([0.0, 0.3, 0.5, SPAN], dtype=DOUBLE).reshape(-1, *(1,) * len(batch))
            ts = times + 0.05 * torch.rand(4, *batch, dtype=DOUBLE, generator=generator)
            ts[3, 1:] = torch.nan
            self.control = ct.LinearInterpolation(ts, xs)
            self.inputs = [xs]
            self.span = self.control.sample_support
        self.parameters = dict(self.field.named_parameters())

    def problem(self, **changes: object) -> ct.ODEProblem:
        prob = ct.ODEProblem(self.field, self.h0, self.span, self.control)
        return ct.remake(prob, **changes) if changes else prob

    @property
    def wanted(self) -> list[Tensor]:
        return [self.h0, *self.parameters.values(), *self.inputs]

    def hold_inputs(self) -> None:
        """Let the input want no gradient."""
        for tensor in self.inputs:
            tensor.requires_grad_(False)
        self.inputs = []


def saved_times(case: Case) -> list[float] | Tensor:
    """Where a loss looks: inside the span of every sample, for the second sample elsewhere."""
    if isinstance(case.span[0], float):
        return SAVED
    places = torch.tensor([0.2, 0.6, 1.0], dtype=DOUBLE).reshape(-1, *(1,) * case.span[0].ndim)
    return case.span[0] + places * (case.span[1] - case.span[0])


def loss_of(kind: str, case: Case) -> ct.Loss:
    """A loss with curvature in the state and a dependence on time, of one kind or of all."""
    terminal = lambda h: (h.square() + h).sum(-1)  # noqa: E731
    running = lambda t, h: (torch.as_tensor(t).squeeze(-1) + h.sin().sum(-1)).square()  # noqa: E731
    at = (saved_times(case), lambda k, h: (k + 1.0) * h.square().sum(-1))
    parts = {"terminal": {"terminal": terminal}, "running": {"running": running}, "saved": {"at": at}}
    if kind == "all":
        return ct.Loss(terminal=terminal, running=running, at=at)
    return ct.Loss(**parts[kind])


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two gradients, relative to the largest entry of them."""
    scale = max(float(part.abs().max()) for part in other)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / scale
