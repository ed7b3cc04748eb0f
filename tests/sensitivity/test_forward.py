"""Derivatives carried forwards against autograd through the solve, finite differences and closed forms."""

import pytest
import torch
from torch.func import jacrev

import ctgate as ct
from tests.typechecker import unchecked

F64 = torch.float64


class Warped(torch.nn.Module):
    """An equation of somebody else, which reads the time."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.tensor([[0.3, -0.8], [0.5, 0.1]], dtype=F64))

    def forward(self, t, h, u):
        return torch.cos(t) * torch.tanh(h @ self.matrix.T) - h + u.sum(-1, keepdim=True)


def stack(*sizes, **options):
    return ct.Stack([ct.GRU(*sizes, **options), ct.LSTM(2, 2, **options)])


FIELDS = {
    "Leaky": lambda **k: ct.Leaky(2, 2, alpha=0.6, learn_tau=True, **k),
    "ScalarGate": lambda **k: ct.ScalarGate(2, 2, **k),
    "MultiGate": lambda **k: ct.MultiGate(2, 3, layernorm=True, **k),
    "GRU-after": lambda **k: ct.GRU(2, 2, learn_tau=True, **k),
    "GRU-before": lambda **k: ct.GRU(2, 2, reset="before", **k),
    "LSTM": lambda **k: ct.LSTM(2, 2, **k),
    "LTC": lambda **k: ct.LTC(2, 2, **k),
    "GatedRate": lambda **k: ct.GatedRate(2, 2, tau_z=2.0, tau_r=0.7, **k),
    "Stack": lambda **k: stack(2, 2, **k),
    "Field": lambda **k: ct.Field(Warped(), state_size=2, input_size=2),
}
CONTROLS = ("hold", "smooth", "per-sample")
HOLD, SMOOTH, OWN = CONTROLS


def problem(name, control, dtype=F64, tau=0.7):
    """Two samples; inputs held or smooth, or with knots and spans of their own."""
    generator = torch.Generator().manual_seed(3)
    options = {} if name == "Field" else {"dtype": F64, "generator": generator, "tau": tau}
    field = FIELDS[name](**options).to(dtype)
    xs = torch.randn(4, 2, 2, generator=generator, dtype=F64).to(dtype)
    h0 = 0.5 * torch.randn(2, field.state_size, generator=generator, dtype=F64).to(dtype)
    ts = torch.tensor([0.0, 0.5, 1.1, 1.5], dtype=F64)
    if control == HOLD:
        return ct.ODEProblem(field, h0, (0.0, 1.5), ct.ZeroOrderHold(torch.cat((ts, ts[-1:] + 0.5)), xs))
    if control == SMOOTH:
        return ct.ODEProblem(field, h0, (0.0, 1.5), ct.CubicHermite(ts, xs))
    own = torch.stack((ts, 1.4 * ts + 0.1), -1)
    return ct.ODEProblem(field, h0, (own[0], own[-1]), ct.LinearInterpolation(own, xs))


def jacobians(prob, alg, **options):
    """dh/dtheta by name and dh/dh0 at the solve's times, by autograd through the solve."""

    def states(parameters, h0):
        return ct.solve(ct.remake(prob, parameters=parameters, h0=h0), alg, **options).hs

    point = {name: value.detach() for name, value in prob.named_parameters().items()}
    by_name, by_h0 = jacrev(states, argnums=(0, 1))(point, prob.h0)
    return {**by_name, "h0": torch.stack([by_h0[:, k, :, k] for k in range(len(prob.h0))], 1)}


def largest(ours, reference):
    assert ours.keys() == reference.keys()
    for name, value in ours.items():
        assert value.shape == reference[name].shape, name
    return max(float((value - reference[name]).abs().max()) for name, value in ours.items())


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", FIELDS)
def test_with_euler_it_is_the_derivative_of_the_map(name, control):
    prob = problem(name, control)
    alg = ct.Euler(0.4)
    result = ct.sensitivity(prob, alg, h0=True)
    assert (result.solution.hs - ct.solve(prob, alg).hs).abs().max() < 1e-14
    assert largest(result.derivatives, jacobians(prob, alg)) < 1e-13


@pytest.mark.parametrize("kind", [ct.Midpoint, ct.Heun, ct.RK4])
def test_with_fixed_steps_it_is_the_derivative_of_the_steps(kind):
    prob = problem("GRU-after", HOLD)
    assert largest(ct.sensitivity(prob, kind(0.4), h0=True).derivatives, jacobians(prob, kind(0.4))) < 1e-13


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", ["LSTM", "Field"])
def test_under_error_control_it_is_that_of_the_flow(name, control):
    prob = problem(name, control)
    result = ct.sensitivity(prob, ct.Dopri5(), h0=True, rtol=1e-9, atol=1e-10)
    reference = jacobians(prob, ct.RK4(0.025))
    ours = {key: value[-1] for key, value in result.derivatives.items()}
    assert largest(ours, {key: value[-1] for key, value in reference.items()}) < 5e-8


@pytest.mark.parametrize(
    ("alg", "tolerance"),
    [
        (ct.Rosenbrock23(), 1e-4),
        (ct.Bosh3(), 1e-4),
        (ct.Tsit5(per_sample=True), 1e-4),
        (ct.ExponentialMidpoint(0.02), 1e-3),
        (ct.ExponentialEuler(0.02), 2e-2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_methods_solve_the_same_equation(alg, tolerance):
    prob = problem("MultiGate", SMOOTH)
    options = {"rtol": 1e-5, "atol": 1e-6} if alg.adaptive else {}
    ours = ct.sensitivity(prob, alg, parameters=["bias"], saveat=[0.7, 1.5], **options)
    reference = jacobians(prob, ct.RK4(0.02), saveat=[0.7, 1.5])
    error = float((ours["bias"] - reference["bias"]).abs().max())
    assert error < tolerance
    assert torch.allclose(ours.solution(1.5), ours.solution.hs[-1], atol=1e-15)


def test_exponential_methods_converge_at_their_order():
    prob = problem("MultiGate", SMOOTH)
    names = list(prob.named_parameters())
    reference = jacobians(prob, ct.RK4(0.01), saveat=[1.5])
    for kind in (ct.ExponentialEuler, ct.ExponentialMidpoint):
        errors = []
        for dt in (0.1, 0.05):
            ours = ct.sensitivity(prob, kind(dt), saveat=[1.5]).derivatives
            errors.append(sum(float((ours[name] - reference[name]).abs().sum()) for name in names))
        assert 2.0 ** (kind.order - 0.25) < errors[0] / errors[1] < 2.0 ** (kind.order + 0.35)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", FIELDS)
def test_a_direction_satisfies_the_dot_product_identity(name, control):
    """<a, S v> with S v carried forwards and S^T a by reverse differentiation of the same steps."""
    prob = problem(name, control)
    alg = ct.RK4(0.4)
    generator = torch.Generator().manual_seed(5)
    leaves = {key: value.detach().requires_grad_() for key, value in prob.named_parameters().items()}
    h0 = prob.h0.clone().requires_grad_()
    sol = ct.solve(ct.remake(prob, parameters=leaves, h0=h0), alg)
    a = torch.randn(sol.hs.shape, generator=generator, dtype=F64)
    back = torch.autograd.grad((a * sol.hs).sum(), [*leaves.values(), h0])
    v = {key: torch.randn(value.shape, generator=generator, dtype=F64) for key, value in leaves.items()}
    v["h0"] = torch.randn(h0.shape, generator=generator, dtype=F64)
    ours = ct.sensitivity_jvp(prob, alg, direction=v)
    assert (ours.solution.hs - sol.hs).abs().max() < 1e-14
    forwards = float((a * ours.tangent).sum())
    backwards = sum(float((g * d).sum()) for g, d in zip(back, v.values(), strict=True))
    assert forwards == pytest.approx(backwards, rel=1e-12, abs=1e-13)


def test_a_direction_agrees_with_finite_differences():
    prob = problem("GRU-before", OWN)
    point = {name: value.detach() for name, value in prob.named_parameters().items()}
    v = {"weight_hh": torch.linspace(-1, 1, 12, dtype=F64).reshape(6, 2)}
    ours = ct.sensitivity_jvp(prob, direction=v, rtol=1e-8, atol=1e-9)
    values = {}
    for k in (-2, -1, 1, 2):
        moved = {**point, "weight_hh": point["weight_hh"] + 0.01 * k * v["weight_hh"]}
        values[k] = ct.solve(ct.remake(prob, parameters=moved), rtol=1e-10, atol=1e-11).hs[-1]
    reference = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / 0.12
    assert torch.allclose(ours.tangent[-1], reference, rtol=0, atol=2e-8)


def test_against_the_closed_form_between_steps_too():
    r"""dh/dt = -a h: h = h0 e^{-at}, dh/da = -t h, dh/dh0 = e^{-at}."""

    class Decay(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(0.8, dtype=F64))

        def forward(self, t, h, u):
            return -self.a * h

    prob = ct.ODEProblem(ct.Field(Decay()), torch.tensor([2.0, -1.0], dtype=F64), (1.0, 3.0))
    result = ct.sensitivity(prob, h0=True, rtol=1e-9, atol=1e-11)
    t = torch.tensor([1.0, 1.37, 2.9], dtype=F64)
    h = prob.h0 * torch.exp(-0.8 * (t[:, None] - 1.0))
    found = result(t)
    assert torch.allclose(found["fn.a"], -(t[:, None] - 1.0) * h, rtol=0, atol=1e-8)
    assert torch.allclose(found["h0"], torch.diag_embed(h / prob.h0), rtol=0, atol=1e-8)
    assert torch.allclose(result.solution(t), h, rtol=0, atol=1e-8)
    assert torch.allclose(result(2.9)["fn.a"], found["fn.a"][-1], rtol=0, atol=1e-15)


def test_parameters_that_the_problem_replaces_are_those_that_count():
    prob = problem("LTC", HOLD)
    other = {name: 1.5 * value.detach() for name, value in prob.named_parameters().items()}
    replaced = ct.remake(prob, parameters={"bias": other["bias"]})
    ours = ct.sensitivity(replaced, ct.Euler(0.4), parameters=["bias", "reversal"])
    point = {name: value.detach() for name, value in replaced.named_parameters().items()}
    assert torch.equal(point["bias"], other["bias"])
    reference = jacobians(replaced, ct.Euler(0.4))
    assert largest(ours.derivatives, {name: reference[name] for name in ("bias", "reversal")}) < 1e-13
    v = {"bias": torch.ones(2, dtype=F64)}
    along = ct.sensitivity_jvp(replaced, ct.Euler(0.4), direction=v).tangent
    assert torch.allclose(along, reference["bias"].sum(-1), rtol=0, atol=1e-13)


def test_single_precision_and_batches_of_any_shape():
    prob = problem("GRU-after", HOLD, dtype=torch.float32)
    ours = ct.sensitivity(prob, ct.Euler(0.4))
    exact = ct.sensitivity(problem("GRU-after", HOLD), ct.Euler(0.4))
    for name, value in ours.derivatives.items():
        assert value.dtype == torch.float32
        assert torch.allclose(value.double(), exact[name], atol=2e-5)
    wide = ct.remake(prob, h0=prob.h0.expand(3, 2, 2))
    again = ct.sensitivity(wide, ct.Euler(0.4))
    assert torch.allclose(again["bias_hh"], ours["bias_hh"].unsqueeze(1).expand(-1, 3, -1, -1, -1), atol=1e-7)


def test_as_a_dataset():
    prob = problem("Leaky", OWN)
    result = ct.sensitivity(prob, ct.Euler(0.4), h0=True)
    data = result.to_xarray()
    assert data["sensitivity"].dims == ("time", "batch", "unit", "entry")
    picked = data["sensitivity"].sel(entry="weight_hh[1,0]").values
    assert (picked == result["weight_hh"][..., 1, 0].numpy()).all()
    assert (data["initial_sensitivity"].values == result["h0"].numpy()).all()
    assert set(data["block"].values) == set(prob.named_parameters())
    assert (data["t"].values == result.solution.ts.numpy()).all()
    for variable in data.variables.values():
        assert {"long_name", "units"} <= set(variable.attrs)
    assert data.attrs["ctgate_version"] == ct.__version__
    assert {"algorithm", "dtype"} <= set(data.attrs)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"parameters": ["weight"]}, ValueError, "parameters has 'weight', which the field lacks"),
        ({"parameters": ["bias", "bias"]}, ValueError, "'bias' twice"),
        ({"parameters": "bias"}, TypeError, "list of names"),
        ({"parameters": []}, ValueError, "nothing to differentiate by"),
        ({"alg": ct.LSODA()}, ValueError, "Rosenbrock23"),
        ({"callback": print}, TypeError, "'callback'"),
    ],
)
def test_what_does_not_fit_is_named(options, error, says):
    with pytest.raises(error, match=says):
        unchecked(ct.sensitivity)(problem("Leaky", HOLD), **options)


@pytest.mark.parametrize(
    ("direction", "error", "says"),
    [
        (None, TypeError, "dict of tensors"),
        ({}, ValueError, "direction is empty"),
        ({"weight": torch.ones(2, dtype=F64)}, ValueError, "'weight', which the field lacks"),
        ({"bias": torch.ones(3, dtype=F64)}, ValueError, r"shape \(3,\); it must be \(2,\)"),
        ({"bias": torch.ones(2)}, TypeError, "float32"),
        ({"h0": torch.ones(3, dtype=F64)}, ValueError, r"shape \(3,\); it must be \(2, 2\)"),
        ({"bias": 1.0}, TypeError, "float"),
    ],
)
def test_a_direction_that_does_not_fit_is_named(direction, error, says):
    with pytest.raises(error, match=says):
        unchecked(ct.sensitivity_jvp)(problem("Leaky", HOLD), direction=direction)


def test_a_problem_is_wanted_and_a_derivative_that_is_there():
    with pytest.raises(TypeError, match=r"ct\.ODEProblem"):
        unchecked(ct.sensitivity)(3)
    result = ct.sensitivity(problem("Leaky", HOLD), ct.Euler(0.4), parameters=["bias"])
    with pytest.raises(KeyError, match="bias"):
        result["weight_hh"]
