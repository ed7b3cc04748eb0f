"""What runs on the CPU runs on an accelerator, with the same numbers.

Every test here takes a device: the CPU in every run, CUDA where there is one (``-m gpu``). The numbers are
held against those of plain steps on the CPU in float64; what fused steps and accelerators change is the order
of sums.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import ctgate as ct
from ctgate.algorithms import Algorithm

D = torch.float64
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
        ],
    ),
]
FIELDS: dict[str, Callable[[torch.Generator], ct.VectorField]] = {
    "leaky": lambda g: ct.Leaky(2, 3, alpha=0.7, generator=g, dtype=D),
    "scalar": lambda g: ct.ScalarGate(2, 3, layernorm=True, generator=g, dtype=D),
    "multi": lambda g: ct.MultiGate(2, 3, learn_tau=True, generator=g, dtype=D),
    "gru": lambda g: ct.GRU(2, 3, generator=g, dtype=D),
    "gru before": lambda g: ct.GRU(2, 3, reset="before", generator=g, dtype=D),
    "lstm": lambda g: ct.LSTM(2, 3, generator=g, dtype=D),
    "ltc": lambda g: ct.LTC(2, 3, generator=g, dtype=D),
    "gated rate": lambda g: ct.GatedRate(2, 3, tau_z=2.0, generator=g, dtype=D),
    "stack": lambda g: ct.Stack([ct.GRU(2, 3, generator=g, dtype=D), ct.GRU(3, 2, generator=g, dtype=D)]),
}
FIXED = [ct.Euler(0.5), ct.ExponentialEuler(0.5), ct.ExponentialMidpoint(0.5), ct.RK4(0.5)]
ADAPTIVE = [ct.Bosh3(), ct.Dopri5(), ct.Tsit5(), ct.Dopri8(), ct.Rosenbrock23()]
CONTROLS: dict[str, Callable[[Tensor, Tensor], ct.Control]] = {
    "hold": lambda ts, xs: ct.ZeroOrderHold(ts, xs),
    "linear": lambda ts, xs: ct.LinearInterpolation(ts, xs),
    "hermite": lambda ts, xs: ct.CubicHermite(ts, xs),
}


def problem(
    field: str = "gru", device: str = "cpu", control: str = "linear", own_times: bool = False
) -> tuple[ct.ODEProblem, Tensor]:
    """A problem on a device, the same on each, and the values of its input, which want a gradient."""
    generator = torch.Generator().manual_seed(3)
    own = FIELDS[field](generator).to(device)
    xs = torch.randn(5, 2, 2, generator=generator, dtype=D).to(device).requires_grad_()
    ts = torch.linspace(0.0, 2.0, 5, dtype=D, device=device)
    if own_times:
        ts = ts[:, None] * torch.tensor([1.0, 0.9], dtype=D, device=device)
    u = CONTROLS[control](ts, xs)
    h0 = 0.3 * torch.randn(2, own.state_size, generator=generator, dtype=D).to(device)
    return ct.ODEProblem(own, h0, u.sample_support if own_times else (0.0, 1.75), u), xs


def wave(t: Tensor) -> Tensor:
    """An input that wants no gradient."""
    return torch.stack([t.sin(), t.cos()], -1).expand(2, 2)


def gradients(prob: ct.ODEProblem, xs: Tensor, sol: ct.Solution) -> list[Tensor]:
    """Of a smooth function of all states, by the input and all parameters."""
    found = torch.autograd.grad(sol.hs.sin().sum(), [xs, *prob.field.parameters()])
    assert all(gradient.device == xs.device for gradient in found)
    return [gradient.cpu() for gradient in found]


def check(solve: Callable[[str], tuple[Tensor, list[Tensor]]], device: str, tolerance: float = 1e-11) -> None:
    """The same states and gradients on ``device`` as by plain steps on the CPU."""
    states, found = solve(device)
    assert states.device.type == device
    with ct.plain_paths():
        expected, wanted = solve("cpu")
    assert_close(states.detach().cpu(), expected.detach(), rtol=tolerance, atol=tolerance)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alg", FIXED, ids=str)
@pytest.mark.parametrize("field", FIELDS)
def test_fields_and_fixed_steps(field: str, alg: Algorithm, device: str) -> None:
    def solve(where: str) -> tuple[Tensor, list[Tensor]]:
        prob, xs = problem(field, where, "hold")
        sol = ct.solve(prob, alg)
        return sol.hs, gradients(prob, xs, sol)

    check(solve, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alg", ADAPTIVE, ids=str)
@pytest.mark.parametrize("field", ["gru", "lstm", "gated rate"])
def test_fields_and_adaptive_steps(field: str, alg: Algorithm, device: str) -> None:
    def solve(where: str) -> tuple[Tensor, list[Tensor]]:
        prob, xs = problem(field, where)
        sol = ct.solve(prob, alg, rtol=1e-3, atol=1e-5, saveat=[0.0, 0.6, 1.75])
        return sol.hs, gradients(prob, xs, sol)

    # Sizes of steps follow from an error estimate, whose last digits are a matter of the order of sums.
    check(solve, device, 1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("alg", [ct.Euler(0.25), ct.Tsit5(per_sample=True)], ids=str)
def test_times_per_sample(alg: Algorithm, control: str, device: str) -> None:
    def solve(where: str) -> tuple[Tensor, list[Tensor]]:
        prob, xs = problem("gru", where, control, own_times=True)
        sol = ct.solve(prob, alg)
        return sol.hs, gradients(prob, xs, sol)

    check(solve, device, 1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "sensealg",
    [
        ct.DiscreteAdjoint(checkpoints=3),
        ct.InterpolatingAdjoint(),
        ct.GaussAdjoint(),
        ct.BacksolveAdjoint(),
        ct.ForwardSensitivity(),
    ],
    ids=str,
)
def test_sensitivity_algorithms(sensealg: object, device: str) -> None:
    def solve(where: str) -> tuple[Tensor, list[Tensor]]:
        prob, xs = problem("gru", where)
        if isinstance(sensealg, ct.ForwardSensitivity):
            # It carries derivatives by parameters and initial state only.
            xs = prob.h0.requires_grad_()
            prob = ct.remake(prob, control=ct.FunctionControl(lambda t: wave(t).to(where)))
        sol = ct.solve(prob, ct.Dopri5(), rtol=1e-7, atol=1e-9, saveat=[0.0, 1.0, 1.75], sensealg=sensealg)
        return sol.hs, gradients(prob, xs, sol)

    check(solve, device, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_torch_modules_come_and_go(device: str) -> None:
    for kind, cell in ((nn.GRU, ct.GRU), (nn.LSTM, ct.LSTM)):
        module = kind(2, 3).to(device, D)
        field = cell.from_torch(module)
        x = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(0), dtype=D).to(device)
        u = ct.ZeroOrderHold(torch.arange(7.0, device=device), x)
        prob = ct.ODEProblem(field, field.initial_state((4,)), (0.0, 6.0), u)
        sol = ct.solve(prob, ct.Euler(1.0))
        assert sol.hs.device.type == device
        assert_close(sol.output[1:], module(x)[0], rtol=1e-12, atol=1e-12)
        assert_close(ct.hidden_states(prob, ct.Euler(1.0)), sol.output, rtol=1e-12, atol=1e-12)
        again = field.to_torch()
        for one, other in zip(module.parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_stored_and_labelled(device: str, tmp_path: object) -> None:
    prob, _ = problem("lstm", device)
    with torch.no_grad():
        sol = ct.solve(prob, ct.Dopri5())
    path = f"{tmp_path}/sol.nc"
    sol.save(path)
    loaded = ct.load(path)
    assert_close(loaded.hs, sol.hs.cpu(), rtol=0, atol=0)
    assert sol.to_xarray().attrs["device"].startswith(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alg", [ct.Euler(0.25), ct.Dopri5()], ids=str)
def test_sensitivities(alg: Algorithm, device: str) -> None:
    def numbers(where: str) -> list[Tensor]:
        prob, _ = problem("gru", where)
        options = {"rtol": 1e-8, "atol": 1e-10} if alg.adaptive else {}
        loss = ct.Loss(terminal=lambda h: h.square().sum(-1))
        with torch.no_grad():
            sol = ct.solve(prob, alg, **options)
        flow = ct.adjoint(sol, loss)
        direction = {"weight_hh": torch.ones_like(prob.named_parameters()["weight_hh"])}
        along = ct.sensitivity_jvp(prob, alg, direction=direction, **options)
        start, stop = float(sol.ts[0]), float(sol.ts[-1])
        samples = ct.per_sample_gradients(prob, loss, alg)
        found = [
            *flow.gradient.values(),
            along.tangent[-1],
            ct.transition(sol, stop, start),
            *samples.values(),
        ]
        assert all(tensor.device.type == where for tensor in found)
        return [tensor.detach().cpu() for tensor in found]

    with ct.plain_paths():
        expected = numbers("cpu")
    for one, other in zip(numbers(device), expected, strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("device", DEVICES)
def test_fused_and_plain_steps_agree(device: str) -> None:
    prob, xs = problem("lstm", device, "hold")
    sol = ct.solve(prob, ct.Euler(0.25))
    found = gradients(prob, xs, sol)
    with ct.plain_paths():
        plain = ct.solve(prob, ct.Euler(0.25))
        expected = gradients(prob, xs, plain)
    assert_close(sol.hs, plain.hs, rtol=1e-12, atol=1e-12)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12)
