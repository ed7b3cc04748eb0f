"""phi1 and the exponential steps against 50-digit arithmetic, in value and in gradient."""

import subprocess
import sys

import mpmath
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from ctgate.integrators.exponential import exponential_euler_step, exponential_midpoint_step, phi1, relax

POINTS = [0.0, 1e-12, 1e-8, 1e-4, 1.0, 1e4]
# Around the place where one formula takes over from the other, and the other sign.
MORE_POINTS = [
    1e-300,
    0.1,
    0.4999999,
    0.5,
    0.5000001,
    2.0,
    20.0,
    700.0,
    -1e-12,
    -1e-4,
    -0.3,
    -0.5,
    -2.0,
    -30.0,
]


def exact_phi1(x: float, derivative: int = 0) -> mpmath.mpf:
    """(-1)^k int_0^1 s^k e^{-xs} ds, by its power series in 400 digits."""
    with mpmath.workdps(400):
        x = mpmath.mpf(x)
        if x > 100:  # the lower incomplete gamma function is complete to 40 digits
            moment = mpmath.factorial(derivative) / x ** (derivative + 1)
        else:
            moment = mpmath.nsum(lambda j: (-x) ** j / (mpmath.factorial(j) * (derivative + j + 1)), [0, 500])
        return (-1) ** derivative * moment


def exact_relax(h: float, rate: float, drive: float, dt: float) -> dict[str, mpmath.mpf]:
    """Value and gradient of h e^{-r dt} + drive (1 - e^{-r dt})/r."""
    with mpmath.workdps(60):
        x = mpmath.mpf(rate) * mpmath.mpf(dt)
        decay, mean, slope = mpmath.exp(-x), exact_phi1(x), exact_phi1(x, 1)
        return {
            "value": h * decay + drive * dt * mean,
            "h": decay,
            "rate": -dt * h * decay + drive * mpmath.mpf(dt) ** 2 * slope,
            "drive": dt * mean,
        }


def relative(value: float, exact: mpmath.mpf) -> float:
    if abs(exact) < 1e-320:  # e^{-10000}: zero as a float
        return abs(value)
    return float(abs((mpmath.mpf(value) - exact) / exact))


def test_reference_is_the_integral():
    for x in (0.0, 0.7, 150.0, -3.0):
        for k in range(3):
            with mpmath.workdps(50):
                integral = (-1) ** k * mpmath.quad(
                    lambda s, k=k, x=x: s**k * mpmath.exp(-x * s), [0, 0.01, 0.1, 1]
                )
                assert abs(exact_phi1(x, k) / integral - 1) < 1e-30


@pytest.mark.parametrize("x", POINTS + MORE_POINTS)
def test_phi1_and_its_derivatives(x):
    argument = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = phi1(argument)
    for k, tolerance in enumerate((1e-15, 1e-14, 1e-13)):
        assert relative(value.item(), exact_phi1(x, k)) < tolerance, f"derivative {k}"
        if k < 2:
            (value,) = torch.autograd.grad(value, argument, create_graph=True)


@pytest.mark.parametrize("x", POINTS + [x for x in MORE_POINTS if abs(x) > 1e-30])
def test_phi1_in_float32(x):
    argument = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    value = phi1(argument)
    (slope,) = torch.autograd.grad(value, argument)
    assert value.dtype is slope.dtype is torch.float32
    assert relative(value.item(), exact_phi1(argument.item())) < 3e-7
    assert relative(slope.item(), exact_phi1(argument.item(), 1)) < 3e-6


@pytest.mark.parametrize("x", POINTS)
@pytest.mark.parametrize("dt", [1.0, 0.25])
def test_relax_value_and_gradient(x, dt):
    numbers = {"h": -0.8, "rate": x / dt, "drive": 1.3}
    tensors = {
        name: torch.tensor([value], dtype=torch.float64, requires_grad=True)
        for name, value in numbers.items()
    }
    value = relax(**tensors, dt=dt)
    gradients = torch.autograd.grad(value, list(tensors.values()))
    exact = exact_relax(**numbers, dt=dt)
    assert relative(value.item(), exact["value"]) < 1e-13
    for name, gradient in zip(tensors, gradients, strict=True):
        assert relative(gradient.item(), exact[name]) < 1e-13, name


def test_closed_gate_integrates_exactly():
    h = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(relax(h, torch.zeros(6, dtype=torch.float64), 2.0 * h, 0.5), h + h)


def points() -> Tensor:
    return torch.tensor([0.0, 1e-9, -1e-3, 0.3, 0.6, -0.7, 4.0, 40.0], dtype=torch.float64)


def test_phi1_passes_gradcheck_of_both_orders():
    x = points().requires_grad_()
    assert gradcheck(phi1, x, atol=1e-8)
    assert gradgradcheck(phi1, x, atol=1e-7)


def test_relax_passes_gradcheck_of_both_orders():
    draw = torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    arguments = (draw[0].requires_grad_(), points().requires_grad_(), draw[1].requires_grad_())
    assert gradcheck(lambda h, r, d: relax(h, r, d, 0.7), arguments)
    assert gradgradcheck(lambda h, r, d: relax(h, r, d, 0.7), arguments)


def test_phi1_under_function_transforms():
    x = points()
    values = torch.tensor([float(exact_phi1(v)) for v in x.tolist()], dtype=torch.float64)
    slopes = torch.tensor([float(exact_phi1(v, 1)) for v in x.tolist()], dtype=torch.float64)
    curvatures = torch.tensor([float(exact_phi1(v, 2)) for v in x.tolist()], dtype=torch.float64)

    def close(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0.0)

    close(vmap(phi1)(x), values)
    close(vmap(grad(phi1))(x), slopes)
    close(vmap(grad(grad(phi1)))(x), curvatures)
    value, tangent = jvp(phi1, (x,), (torch.full_like(x, 2.0),))
    close(value, values)
    close(tangent, 2.0 * slopes)
    for jacobian in (jacrev, jacfwd):
        close(jacobian(phi1)(x), torch.diag(slopes))
    for hessian in (jacrev(jacrev(phi1)), jacfwd(jacrev(phi1)), jacrev(jacfwd(phi1))):
        close(hessian(x).diagonal().diagonal(), curvatures)


def test_relax_under_vmap_over_everything():
    draw = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    h, rate, drive = draw[0], draw[1].abs(), draw[2]
    batched = vmap(lambda *x: relax(*x, 0.3), in_dims=(0, 0, 0))(h, rate, drive)
    for i in range(4):
        torch.testing.assert_close(batched[i], relax(h[i], rate[i], drive[i], 0.3), rtol=1e-15, atol=0.0)


def test_compiles_without_a_graph_break():
    program = """
import torch
from ctgate.integrators.exponential import relax
draw = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
h, rate, drive = (x.clone().requires_grad_() for x in (draw[0], draw[1].abs() * torch.arange(6), draw[2]))
compiled = torch.compile(lambda *x: relax(*x, 0.5), backend="eager", fullgraph=True)
for function in (relax(h, rate, drive, 0.5), compiled(h, rate, drive)):
    print(*torch.cat([function, *torch.autograd.grad(function.sum(), (h, rate, drive))]).tolist())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    eager, compiled = run.stdout.splitlines()
    assert len(eager.split()) == 24
    assert eager == compiled


def rate_drive(t: float, h: Tensor) -> tuple[Tensor, Tensor]:
    return 1.0 + torch.sin(h) ** 2 + t, torch.cos(2.0 * h) - t


def exact_step(h: Tensor, rate: Tensor, drive: Tensor, dt: float) -> Tensor:
    """Rates are far from 0 here, so the textbook formula is exact."""
    return h * (-rate * dt).exp() + drive * (1.0 - (-rate * dt).exp()) / rate


def test_exponential_euler_step_is_its_formula():
    h = torch.randn(5, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = exact_step(h, *rate_drive(0.3, h), 0.4)
    torch.testing.assert_close(
        exponential_euler_step(rate_drive, 0.3, 0.4, h), expected, rtol=1e-14, atol=1e-15
    )


def test_exponential_midpoint_step_is_its_formula():
    h = torch.randn(5, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    middle = exact_step(h, *rate_drive(0.3, h), 0.2)
    expected = exact_step(h, *rate_drive(0.5, middle), 0.4)
    torch.testing.assert_close(
        exponential_midpoint_step(rate_drive, 0.3, 0.4, h), expected, rtol=1e-14, atol=1e-15
    )


@pytest.mark.parametrize("step", [exponential_euler_step, exponential_midpoint_step])
def test_exact_when_rate_and_drive_are_constant(step):
    rate, drive = torch.tensor([0.0, 0.5, 80.0]), torch.tensor([1.0, -2.0, 40.0])
    rate, drive, h = rate.double(), drive.double(), torch.tensor([0.3, 1.0, -7.0]).double()
    following = step(lambda t, h: (rate, drive), 0.0, 3.0, h)
    expected = torch.tensor(
        [
            float(exact_relax(*x, 3.0)["value"])
            for x in zip(h.tolist(), rate.tolist(), drive.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(following, expected, rtol=1e-14, atol=0.0)
