"""hidden_states: torch's kernels where they compute the same, the solver everywhere else, one answer."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.utils import parametrizations

import ctgate as ct
from ctgate.hidden import from_library
from tests.typechecker import unchecked

STEPS, CHANNELS, HIDDEN = 7, 3, 4
ONEDNN = torch.backends.mkldnn.is_available()
EPS = {torch.float32: 2e-5, torch.float64: 1e-12}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def module_of(kind, dtype, layers=1, **options) -> nn.Module:
    module = kind(CHANNELS, HIDDEN, num_layers=layers, dtype=dtype, **options)
    with torch.no_grad():
        for k, weight in enumerate(module.parameters()):
            weight.copy_(0.6 * draw(*weight.shape, seed=k))
    return module


def field_of(module, tau=1.0):
    return (ct.GRU if isinstance(module, nn.GRU) else ct.LSTM).from_torch(module, tau)


def problem(field, xs, h0=None, dt=1.0, **options):
    ts = dt * torch.arange(len(xs) + 1, dtype=torch.float64)
    start = field.initial_state(xs.shape[1:-1]) if h0 is None else h0
    return ct.ODEProblem(field, start, (0.0, float(ts[-1])), ct.ZeroOrderHold(ts, xs), **options)


def lstm_problem(**options):
    """A problem that torch's kernel takes."""
    return problem(field_of(module_of(nn.LSTM, torch.float32)), draw(STEPS, 2, CHANNELS).float(), **options)


def states_of(prob, module, layers):
    """The initial state as torch's module takes it: (layers, sample, hidden), h before c."""
    parts = prob.h0.reshape(-1, layers, prob.field.state_size // layers // HIDDEN, HIDDEN).unbind(2)
    first, *rest = (part.movedim(1, 0).contiguous() for part in reversed(parts))
    return (first, *rest) if rest else first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_torch_and_of_solve(kind, layers, dtype, bias):
    """To input, initial state and weights; torch's module and ``solve`` are each other's witnesses."""
    module = module_of(kind, dtype, layers, bias=bias)
    field = field_of(module)
    xs = draw(STEPS, 2, CHANNELS, seed=20, dtype=dtype).requires_grad_()
    h0 = (0.5 * draw(2, field.state_size, seed=21, dtype=dtype)).requires_grad_()
    weights = draw(STEPS, 2, HIDDEN, seed=22, dtype=dtype)
    prob = problem(field, xs, h0)
    found = ct.hidden_states(prob, ct.Euler(1.0))
    outputs, _ = module(xs, states_of(prob, module, layers))
    solved = ct.solve(prob, ct.Euler(1.0)).output
    eps = EPS[dtype]
    torch.testing.assert_close(found, solved, atol=eps, rtol=eps)
    torch.testing.assert_close(found[1:], outputs, atol=eps, rtol=eps)
    torch.testing.assert_close(ct.hidden_states(prob, ct.Euler(1.0), initial=False), found[1:])
    leaves = [xs, h0, *field.parameters()]
    own = torch.autograd.grad((found[1:] * weights).sum(), leaves)
    expected = torch.autograd.grad((outputs * weights).sum(), [xs, h0, *module.parameters()])
    others = torch.autograd.grad((solved[1:] * weights).sum(), leaves)
    for one, two, three in zip(own, expected, others, strict=True):
        torch.testing.assert_close(one, two, atol=eps, rtol=10 * eps)
        torch.testing.assert_close(one, three, atol=eps, rtol=10 * eps)


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("layers", [1, 2])
def test_any_batch(batch, layers):
    """The first row is the initial state; inputs that samples share are broadcast."""
    field = field_of(module_of(nn.LSTM, torch.float32, layers))
    h0 = draw(*batch, field.state_size, seed=1, dtype=torch.float32)
    for shape in {batch, (1,) * len(batch), ()}:
        prob = problem(field, draw(STEPS, *shape, CHANNELS, seed=2, dtype=torch.float32), h0)
        found = ct.hidden_states(prob, ct.Euler(1.0))
        assert found.shape == (STEPS + 1, *batch, HIDDEN)
        assert torch.equal(found[0], h0[..., field.output])
        torch.testing.assert_close(found, ct.solve(prob, ct.Euler(1.0)).output, atol=2e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_cudnn(kind, layers):
    """Values and gradients against those of the solver on the CPU."""
    found = []
    for device in ("cpu", "cuda"):
        field = field_of(module_of(kind, torch.float64, layers)).to(device)
        xs = draw(STEPS, 2, CHANNELS, seed=20).to(device).requires_grad_()
        prob = problem(field, xs)
        if device == "cuda":
            assert from_library(prob, ct.Euler(1.0)) is not None
            states = ct.hidden_states(prob, ct.Euler(1.0))
        else:
            states = ct.solve(prob, ct.Euler(1.0)).output
        gradients = torch.autograd.grad(states.square().sum(), [xs, *field.parameters()])
        found.append([x.cpu() for x in (states, *gradients)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-9)


@pytest.fixture
def fast():
    """Where the use of torch's kernel is the question, also where the tests run on plain paths."""
    with ct.plain_paths(False):
        yield


@pytest.mark.usefixtures("fast")
@pytest.mark.skipif(not ONEDNN, reason="torch was built without oneDNN")
def test_the_kernel_is_used_and_its_last_state_is_that_of_solve():
    prob = lstm_problem()
    outputs, last = from_library(prob, ct.Euler(1.0))
    sol = ct.solve(prob, ct.Euler(1.0))
    torch.testing.assert_close(last, sol.hs[-1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(outputs, sol.output[1:], atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("fast")
@pytest.mark.skipif(not ONEDNN, reason="torch was built without oneDNN")
@pytest.mark.parametrize("tau", [0.1, 0.3])
def test_a_tau_that_its_dtype_rounds_is_still_dt(tau):
    field = field_of(module_of(nn.LSTM, torch.float32), tau)
    prob = problem(field, draw(STEPS, 2, CHANNELS).float(), dt=tau)
    assert from_library(prob, ct.Euler(tau)) is not None
    found, solved = ct.hidden_states(prob, ct.Euler(tau)), ct.solve(prob, ct.Euler(tau)).output
    torch.testing.assert_close(found, solved, atol=1e-6, rtol=1e-5)


class Slower(ct.LSTM):
    """Another equation with the same parameters."""

    def rate_drive(self, t, h, u=None):
        rate, drive = super().rate_drive(t, h, u)
        return 0.5 * rate, 0.5 * drive


def unlike_torch():
    """Problems whose hidden states torch's kernel does not compute, or not here, by name."""
    single = {"dtype": torch.float32, "generator": torch.Generator().manual_seed(0)}
    xs, one = draw(STEPS, 2, CHANNELS).float(), ct.Euler(1.0)
    parametrized = ct.LSTM(CHANNELS, HIDDEN, **single)
    parametrizations.weight_norm(parametrized, "weight_hh")
    uneven = torch.tensor([0.0, 1.0, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5], dtype=torch.float64)
    fields = {
        "another equation": Slower(CHANNELS, HIDDEN, **single),
        "a parametrization": parametrized,
        "layer normalisation": ct.LSTM(CHANNELS, HIDDEN, layernorm=True, **single),
        "a learnable tau": ct.LSTM(CHANNELS, HIDDEN, learn_tau=True, **single),
        "a tau per unit": ct.LSTM(CHANNELS, HIDDEN, tau=torch.ones(HIDDEN), **single),
        "another tau": ct.LSTM(CHANNELS, HIDDEN, tau=2.0, **single),
        "a reset before the product": ct.Stack([ct.GRU(CHANNELS, HIDDEN, reset="before", **single)]),
        "another cell": ct.MultiGate(CHANNELS, HIDDEN, **single),
        "layers of two kinds": ct.Stack([ct.GRU(CHANNELS, HIDDEN, **single), ct.LSTM(HIDDEN, 4, **single)]),
        "layers of two widths": ct.Stack([ct.GRU(CHANNELS, 5, **single), ct.GRU(5, HIDDEN, **single)]),
        "a loop of our own that is faster": ct.GRU(CHANNELS, HIDDEN, **single),
    }
    cases = {name: (problem(field, xs), one) for name, field in fields.items()}
    cell = ct.LSTM(CHANNELS, HIDDEN, **single)
    cases["no input"] = (
        ct.ODEProblem(ct.LSTM(0, HIDDEN, **single), torch.zeros(2, 2 * HIDDEN), (0.0, 3.0)),
        one,
    )
    cases["another step"] = (problem(cell, xs), ct.Euler(0.5))
    cases["another method"] = (problem(cell, xs), ct.ExponentialEuler(1.0))
    control = ct.ZeroOrderHold(uneven, xs)
    cases["a shorter step"] = (ct.ODEProblem(cell, torch.zeros(2, 8), (0.0, 6.5), control), one)
    spans = torch.zeros(2), torch.tensor([7.0, 5.0])
    ts = torch.arange(STEPS + 1, dtype=torch.float64)
    cases["clocks of their own"] = (
        ct.ODEProblem(cell, torch.zeros(2, 8), spans, ct.ZeroOrderHold(ts, xs)),
        one,
    )
    cases["float64"] = (problem(ct.LSTM(CHANNELS, HIDDEN, dtype=torch.float64), xs.double()), one)
    return cases


@pytest.mark.parametrize("name", unlike_torch())
def test_everything_else_is_solved(name):
    prob, alg = unlike_torch()[name]
    assert from_library(prob, alg) is None
    assert torch.equal(ct.hidden_states(prob, alg), ct.solve(prob, alg).output)


def test_without_fast_paths_it_is_solved():
    prob = lstm_problem()
    with ct.plain_paths():
        assert from_library(prob, ct.Euler(1.0)) is None
        found = ct.hidden_states(prob, ct.Euler(1.0))
    torch.testing.assert_close(found, ct.hidden_states(prob, ct.Euler(1.0)), atol=1e-6, rtol=1e-5)


def test_parameters_of_the_problem_take_the_place_of_the_fields():
    """Their gradient as well, in a stack, by the layers' names."""
    module = module_of(nn.LSTM, torch.float32, 2)
    field, xs = field_of(module), draw(STEPS, 2, CHANNELS).float()
    named = {name: (0.5 * value).detach().requires_grad_() for name, value in field.named_parameters()}
    prob = problem(field, xs, parameters=named)
    found = ct.hidden_states(prob, ct.Euler(1.0))
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(0.5)
    torch.testing.assert_close(found[1:], module(xs)[0], atol=1e-6, rtol=1e-5)
    own = torch.autograd.grad(found.sum(), list(named.values()))
    expected = torch.autograd.grad(module(xs)[0].sum(), list(module.parameters()))
    for one, two in zip(own, expected, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


def test_second_derivatives():
    """Of oneDNN's kernel, against those of the solver in float64."""
    exact = field_of(module_of(nn.LSTM, torch.float64))
    field = field_of(module_of(nn.LSTM, torch.float32))
    xs = draw(STEPS, 2, CHANNELS, seed=3)

    def second(field, xs):
        xs = xs.requires_grad_()
        (first,) = torch.autograd.grad(
            ct.hidden_states(problem(field, xs), ct.Euler(1.0)).sum(), xs, create_graph=True
        )
        return torch.autograd.grad(first.square().sum(), [xs, field.weight_hh])

    for one, two in zip(second(field, xs.float()), second(exact, xs.clone()), strict=True):
        torch.testing.assert_close(one.double(), two, atol=1e-5, rtol=1e-4)


def test_transforms_of_torch_func_pass():
    """They are solved; gradients under vmap are those one by one."""
    prob = lstm_problem()
    named = {name: weight.detach() for name, weight in prob.field.named_parameters()}
    inputs = draw(3, STEPS, 2, CHANNELS, seed=4).float()

    def loss(named, xs):
        own = problem(prob.field, xs, prob.h0, parameters=named)
        return ct.hidden_states(own, ct.Euler(1.0)).square().sum()

    together = vmap(grad(loss), (None, 0))(named, inputs)
    for k, xs in enumerate(inputs):
        weights = {name: weight.clone().requires_grad_() for name, weight in named.items()}
        apart = torch.autograd.grad(loss(weights, xs), list(weights.values()))
        for gradient, expected in zip(together.values(), apart, strict=True):
            torch.testing.assert_close(gradient[k], expected, atol=2e-5, rtol=1e-4)


def test_weights_that_are_not_finite_end_as_a_solve_does():
    prob = lstm_problem()
    with torch.no_grad():
        prob.field.weight_hh[0, 0] = float("nan")
    with pytest.raises(ct.SolveError, match="t = 0"):
        ct.hidden_states(prob, ct.Euler(1.0))


def test_nothing_is_kept_once_the_result_is_gone():
    prob = lstm_problem()
    found = ct.hidden_states(prob, ct.Euler(1.0))
    found.sum().backward()
    gone = weakref.ref(found)
    del found
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("alg", [ct.Dopri5(), None, "euler"])
def test_a_method_without_fixed_steps_is_refused(alg):
    with pytest.raises(TypeError, match=r"hidden_states: alg is .*; it must be a method of fixed steps"):
        unchecked(ct.hidden_states)(lstm_problem(), alg)


def test_something_that_is_no_problem_is_refused():
    with pytest.raises(TypeError, match=r"prob is LSTM; it must be a ct\.ODEProblem"):
        unchecked(ct.hidden_states)(ct.LSTM(3, 4), ct.Euler(1.0))
