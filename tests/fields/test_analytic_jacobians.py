"""The Jacobians that the fields state, against automatic differentiation of dh/dt, one sample at a time."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from ctgate.controls import FunctionControl
from ctgate.fields import GRU, LSTM, LTC, Field, GatedRate, Leaky, ScalarGate, Stack, VectorField, jacobian
from ctgate.problem import ODEProblem
from tests.typechecker import unchecked


def samples(field, t, h, u):
    """(t, h, u) of every sample; u may broadcast, t may be one time or a column."""
    batch = h.shape[:-1]
    own = None if u is None else u.expand(*batch, u.shape[-1])
    for place in itertools.product(*map(range, batch)):
        time = t.expand(*batch, 1)[place] if isinstance(t, torch.Tensor) and t.ndim else t
        yield time, h[place], None if own is None else own[place]


def by_state(field, t, h, u, create_graph=False):
    """d(dh/dt)/dh by reverse differentiation."""
    return torch.stack(
        [
            torch.autograd.functional.jacobian(lambda z: field(s, z, v), x, create_graph=create_graph)  # noqa: B023
            for s, x, v in samples(field, t, h, u)
        ]
    ).reshape(*h.shape, h.shape[-1])


def by_input(field, t, h, u):
    """d(dh/dt)/du by reverse differentiation."""
    return torch.stack(
        [
            torch.autograd.functional.jacobian(lambda z: field(s, x, z), v)  # noqa: B023
            for s, x, v in samples(field, t, h, u)
        ]
    ).reshape(*h.shape, u.shape[-1])


def assert_near(own, wanted, tolerance=1e-12):
    assert own.shape == wanted.shape
    assert (own - wanted).abs().max() <= tolerance * max(1.0, float(wanted.detach().abs().max()))


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_jacobian_is_the_derivative_of_the_flow(case, tools, data):
    hidden, channels = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    batch = data.draw(st.sampled_from([(), (1,), (hidden,), (channels,), (2, 3), (hidden, hidden)]))
    shared_input = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    per_unit = torch.linspace(0.3, 2.0, hidden, dtype=torch.float64)
    options = {
        "tau": data.draw(st.sampled_from([0.37, per_unit])),
        "learn_tau": data.draw(st.booleans()),
        "bias": data.draw(st.booleans()),
    }
    if case.layernorm:
        options["layernorm"] = data.draw(st.booleans())
    field = tools.field(case, channels, hidden, seed=data.draw(st.integers(0, 99)), **options)
    h = tools.randn(*batch, field.state_size)
    u = tools.randn(*(() if shared_input else batch), channels, seed=2)
    full, by_u = by_state(field, 0.0, h, u), by_input(field, 0.0, h, u)
    leak = field.rate_drive(0.0, h, u)[0]

    field, h, u = field.to(dtype), h.to(dtype), u.to(dtype)
    own, own_by_u = jacobian(field, 0.0, h, u), field.input_jacobian(0.0, h, u)
    assert own.coupling.dtype == own.leak.dtype == own_by_u.dtype == dtype
    # A layer norm of two nearly equal numbers magnifies rounding, by 1 / sqrt(1e-5) at most.
    tolerance = 1e-12 if dtype == torch.float64 else 3e-3 if options.get("layernorm") else 1e-4
    assert_near(own.full().double(), full, tolerance)
    assert_near(own.leak.double(), leak, tolerance)
    assert_near(own_by_u.double(), by_u, tolerance)


def test_without_input_channels(case, tools):
    field = tools.field(case, 0, 3)
    h = tools.randn(4, field.state_size)
    assert_near(jacobian(field, 0.0, h).full(), by_state(field, 0.0, h, None))
    assert field.input_jacobian(0.0, h).shape == (4, field.state_size, 0)


def tall_stacks(tools):
    """Three layers of different sizes and times, and the same with the lower two as one layer."""
    options = {"dtype": torch.float64}
    tau = torch.tensor([0.4, 1.0, 2.2, 0.6], dtype=torch.float64)
    layers = [GRU(3, 4, tau=tau, learn_tau=True, **options), LSTM(4, 2, tau=0.3, **options)]
    top = GatedRate(2, 3, tau=0.8, tau_z=3.0, reset_gate=False, **options)
    stacks = [Stack([*layers, top]), Stack([Stack(layers), top]), Stack([top, Leaky(3, 1, **options)])]
    for stack in stacks:
        with torch.no_grad():
            for k, parameter in enumerate(stack.parameters()):
                parameter.copy_(tools.randn(*parameter.shape, seed=20 + k))
    return stacks


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_stack_of_different_layers(tools, which):
    stack = tall_stacks(tools)[which]
    h, u = tools.randn(5, stack.state_size), tools.randn(5, stack.input_size, seed=2)
    own = jacobian(stack, 0.0, h, u)
    assert_near(own.full(), by_state(stack, 0.0, h, u))
    assert_near(own.leak, stack.rate_drive(0.0, h, u)[0])
    assert_near(stack.input_jacobian(0.0, h, u), by_input(stack, 0.0, h, u))
    first = stack.layers[0].state_size
    assert (own.coupling[:, :first, first:] == 0).all()
    assert own.coupling[:, first:, :first].abs().max() > 1e-3


def test_a_whole_trajectory_at_once(case, tools):
    field = tools.field(case, 3, 3)
    h, u = tools.randn(4, 2, field.state_size), tools.randn(4, 1, 3, seed=2)
    whole = jacobian(field, 0.0, h, u).full()
    for k in range(4):
        assert_near(whole[k], jacobian(field, 0.0, h[k], u[k]).full(), 1e-14)


def test_its_gradient_is_the_second_derivative_of_the_flow(field, tools):
    h, u = tools.randn(3, field.state_size).requires_grad_(), tools.randn(3, 3, seed=2).requires_grad_()
    weights = tools.randn(3, field.state_size, field.state_size, seed=3)
    variables = [h, u, *field.parameters()]
    own = torch.autograd.grad(
        (weights * jacobian(field, 0.4, h, u).full()).sum(), variables, allow_unused=True
    )
    reference = (weights * by_state(field, 0.4, h, u, create_graph=True)).sum()
    wanted = torch.autograd.grad(reference, variables, allow_unused=True)
    for value, target in zip(own, wanted, strict=True):
        if value is None or target is None:
            rest = target if value is None else value
            assert rest is None or rest.abs().max() == 0.0
        else:
            assert_near(value, target)


def test_torch_func_passes_through(field, tools):
    h, u = tools.randn(3, field.state_size), tools.randn(3, 3, seed=2)
    own = jacobian(field, 0.4, h, u)
    assert_near(vmap(lambda x, v: jacobian(field, 0.4, x, v).full())(h, u), own.full(), 1e-14)
    gradient = grad(lambda x: jacobian(field, 0.4, x, u).coupling.square().sum())(h)
    leaf = h.clone().requires_grad_()
    jacobian(field, 0.4, leaf, u).coupling.square().sum().backward()
    assert_near(gradient, leaf.grad, 1e-14)
    with torch.inference_mode():
        assert_near(jacobian(field, 0.4, h, u).full(), own.full(), 1e-14)


def test_replaced_parameters_are_read(field, tools):
    h, u = tools.randn(3, field.state_size), tools.randn(3, 3, seed=2)
    control = FunctionControl(lambda t: u)
    replaced = {name: 0.5 * value.detach() for name, value in field.named_parameters()}
    prob = ODEProblem(field, h, (0.0, 1.0), control=control, parameters=replaced)
    wanted = by_state(lambda t, x, v: functional_call(field, replaced, (t, x, v)), 0.4, h, u)
    assert_near(prob.call("jacobian", 0.4, h, u).full(), wanted)


class Warped(VectorField):
    """A field of a user's own: nothing but rate and drive, and both look at time, state and input."""

    autonomous = False

    def __init__(self) -> None:
        super().__init__(input_size=2, state_size=3)

    @property
    def tau(self) -> torch.Tensor:
        return torch.tensor(0.7, dtype=torch.float64)

    def rate_drive(self, t, h, u=None):
        rate = torch.exp(h.flip(-1) + u.sum(-1, keepdim=True)) * (1.0 + t**2)
        return rate, rate * torch.sin(h.roll(1, -1) * u[..., :1])


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_field_that_states_no_jacobian(tools, per_sample):
    field = Warped()
    h, u = tools.randn(4, 3), tools.randn(4, 2, seed=2)
    t = tools.randn(4, 1, seed=3) if per_sample else 0.4
    own = jacobian(field, t, h, u)
    assert_near(own.full(), by_state(field, t, h, u))
    assert_near(own.leak, field.rate_drive(t, h, u)[0])
    assert_near(field.input_jacobian(t, h, u[0]), by_input(field, t, h, u[0]))
    stack = Stack([field, LTC(3, 2, dtype=torch.float64)])
    state = tools.randn(4, 5)
    assert_near(jacobian(stack, t, state, u).full(), by_state(stack, t, state, u))


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_wrapped_function_leaks_nothing(tools, per_sample):
    field = Field(lambda t, h, u: torch.cos(t).to(h) * h.roll(1, -1) * h - torch.tanh(h * u))
    h, u = tools.randn(4, 3), tools.randn(4, 3, seed=2)
    t = tools.randn(4, 1, seed=3) if per_sample else torch.tensor(0.4, dtype=torch.float64)
    own = jacobian(field, t, h, u)
    assert (own.leak == 0).all()
    assert_near(own.full(), by_state(field, t, h, u))


def test_the_gradient_is_right_through_layer_norm(tools):
    """torch 2.13 loses a part of it when it differentiates a forward derivative."""
    matrix = tools.randn(4, 4, seed=3)
    norm = torch.nn.LayerNorm(4, dtype=torch.float64)
    field = Field(lambda t, h, u: torch.tanh(norm(h @ matrix) * u))
    h = tools.randn(2, 4).requires_grad_()
    u = tools.randn(2, 4, seed=2)
    assert torch.autograd.gradcheck(lambda h: jacobian(field, 0.0, h, u).full(), h)
    assert torch.autograd.gradcheck(lambda h: field.input_jacobian(0.0, h, u), h)


@pytest.mark.parametrize("tracked", [False, True])
def test_inside_a_checkpoint(field, tools, tracked):
    """Where torch.func refuses to differentiate: the same values and gradients."""
    weights = tools.randn(3, field.state_size, field.state_size, seed=3)
    results = []
    for call in (lambda run, *args: run(*args), partial(checkpoint, use_reentrant=False)):
        h, u = tools.randn(3, field.state_size).requires_grad_(tracked), tools.randn(3, 3, seed=2)
        u.requires_grad_()

        def run(h, u):
            return (weights * jacobian(field, 0.4, h, u).full()).sum() + field.input_jacobian(0.4, h, u).sum()

        value = call(run, h, u)
        inputs = [*([h] if tracked else []), u, *field.parameters()]
        results.append([value, *torch.autograd.grad(value, inputs, materialize_grads=True)])
    for own, wanted in zip(*results, strict=True):
        assert_near(own, wanted, 1e-13)


@pytest.mark.parametrize(
    "phi", [torch.nn.functional.softplus, torch.sin, torch.nn.PReLU(dtype=torch.float64)]
)
def test_a_leaky_unit_with_another_nonlinearity(tools, phi):
    field = Leaky(2, 3, phi=phi, layernorm=True, dtype=torch.float64)
    h, u = tools.randn(4, 3), tools.randn(4, 2, seed=2)
    assert_near(jacobian(field, 0.0, h, u).full(), by_state(field, 0.0, h, u))
    assert_near(field.input_jacobian(0.0, h, u), by_input(field, 0.0, h, u))


@pytest.mark.parametrize("reset", ["after", "before"])
def test_a_nearly_closed_gate_keeps_its_digits(reset):
    """1 - z and its derivative z (1 - z) are e^-50, far below the rounding of 1."""
    field = GRU(0, 1, reset=reset, dtype=torch.float64)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.fill_(0.5)
        field.bias_ih[1] = 49.5
    h = torch.zeros(1, dtype=torch.float64)
    own = jacobian(field, 0.0, h)
    n, r = (
        math.tanh(1.0 if reset == "before" else 0.5 + 0.5 / (1.0 + math.exp(-1.0))),
        1 / (1 + math.exp(-1.0)),
    )
    slope = 0.5 * r * (1.0 if reset == "before" else 1.0 + 0.5 * (1 - r))
    wanted = math.exp(-50.0) * ((1 - n * n) * slope - 0.5 * n)
    torch.testing.assert_close(own.leak.item(), math.exp(-50.0), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(own.coupling.item(), wanted, rtol=1e-13, atol=0.0)


def test_what_does_not_fit_is_refused(tools):
    free = unchecked(jacobian)
    field = ScalarGate(2, 3, dtype=torch.float64)
    h, u = tools.randn(4, 3), tools.randn(4, 2)
    with pytest.raises(TypeError, match=r"field is function; it must be a ctgate field"):
        free(lambda t, h, u: h, 0.0, h, u)
    with pytest.raises(TypeError, match=r"h is torch.int64; it must be a floating-point tensor"):
        free(field, 0.0, torch.ones(4, 3, dtype=torch.int64), u)
    with pytest.raises(TypeError, match=r"h is list; it must be a floating-point tensor"):
        free(field, 0.0, [1.0], u)
    with pytest.raises(ValueError, match=r"h has shape \(4, 5\)"):
        free(field, 0.0, tools.randn(4, 5), u)
    with pytest.raises(ValueError, match=r"u is None"):
        free(field, 0.0, h)
    with pytest.raises(TypeError, match=r"h is torch.float32"):
        free(field, 0.0, h.float(), u)
    with pytest.raises(ValueError, match=r"u has batch shape \(3,\)"):
        free(Warped(), 0.0, h, u[:3])
    with pytest.raises(ValueError, match=r"u is None"):
        Warped().input_jacobian(0.0, h)
