"""Products of every field's derivatives with vectors, against whole Jacobians by torch.func."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, jacrev, vmap
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from ctgate.controls import FunctionControl
from ctgate.fields import GRU, LSTM, LTC, Field, GatedRate, Leaky, MultiGate, ScalarGate, Stack, VectorField
from ctgate.kernels import AutogradLinearization
from ctgate.problem import ODEProblem


def gru_below_lstm(channels, hidden, layernorm=False, **options):
    return Stack(
        [
            GRU(channels, hidden, layernorm=layernorm, **options),
            LSTM(hidden, hidden, layernorm=layernorm, **options),
        ]
    )


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[..., VectorField]
    layernorm: bool = True


CASES = [
    Case("Leaky", lambda i, h, **k: Leaky(i, h, alpha=0.3, **k)),
    Case("Leaky-softplus", lambda i, h, **k: Leaky(i, h, phi=torch.nn.functional.softplus, **k)),
    Case("ScalarGate", ScalarGate),
    Case("MultiGate", MultiGate),
    Case("GRU-after", GRU),
    Case("GRU-before", lambda i, h, **k: GRU(i, h, reset="before", **k)),
    Case("LSTM", LSTM),
    Case("LTC", LTC, False),
    Case("GatedRate", lambda i, h, **k: GatedRate(i, h, tau_z=2.0, tau_r=0.7, **k), False),
    Case("GatedRate-update", lambda i, h, **k: GatedRate(i, h, tau_z=2.0, reset_gate=False, **k), False),
    Case("GatedRate-reset", lambda i, h, **k: GatedRate(i, h, tau_r=2.0, update_gate=False, **k), False),
    Case("GatedRate-ungated", partial(GatedRate, update_gate=False, reset_gate=False), False),
    Case("Stack", gru_below_lstm),
]  # fmt: skip


@pytest.fixture(scope="session", params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


def randn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def filled(field, seed=0):
    """The field with parameters of order 1, layer norms included."""
    with torch.no_grad():
        for k, parameter in enumerate(field.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=1000 * seed + k, dtype=parameter.dtype))
    return field


def make(case, channels, hidden, seed=0, **options):
    return filled(case.build(channels, hidden, **{"dtype": torch.float64, **options}), seed)


def all_that_is_learned(case, channels, hidden):
    options = {"layernorm": True} if case.layernorm else {}
    return make(case, channels, hidden, learn_tau=True, **options)


class PlainNorm(torch.nn.LayerNorm):
    """Of elementary operations: of torch's own the third derivative is wrong, and under vmap the gradient of
    its weight's gradient."""

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return centred / deviation * self.weight + self.bias


def plain(field):
    """A copy without torch's layer norms."""
    field = copy.deepcopy(field)
    for module in list(field.modules()):
        if getattr(module, "layernorm", None) is not None:
            module.layernorm = PlainNorm(module.hidden_size, dtype=torch.float64)
    return field


class Whole:
    """d(dh/dt) by state, input and parameters, whole, one sample after the other."""

    def __init__(self, field, t, h, u, parameters=None):
        parameters = dict(field.named_parameters()) if parameters is None else parameters
        self.batch, self.parameters = h.shape[:-1], parameters
        own = h.new_zeros(*h.shape[:-1], 0) if u is None else u.expand(*h.shape[:-1], u.shape[-1])
        times = torch.as_tensor(t, dtype=torch.float64).expand(*h.shape[:-1], 1)

        def slope(h, v, parameters, t):
            arguments = (t[0], h, None if u is None else v)
            return functional_call(field, parameters, arguments)

        flat = [x.reshape(math.prod(self.batch), x.shape[-1]) for x in (h, own, times)]
        by = vmap(jacrev(slope, argnums=(0, 1, 2)), in_dims=(0, 0, None, 0))(*flat[:2], parameters, flat[2])
        with_batch = lambda x: x.reshape(*self.batch, *x.shape[1:])  # noqa: E731
        self.state, self.input = with_batch(by[0]), with_batch(by[1])
        self.blocks = {name: with_batch(block) for name, block in by[2].items()}

    def push(self, matrix, vectors):
        return torch.einsum("...ij,...j->...i", matrix, vectors)

    def pull(self, matrix, vectors):
        return torch.einsum("...ij,...i->...j", matrix, vectors)

    def flat(self, name):
        """One column for each number in a parameter."""
        return self.blocks[name].reshape(*self.state.shape[:-1], self.parameters[name].numel())

    def parameter_jvp(self, direction):
        rows = [self.push(self.flat(name), value.flatten()) for name, value in direction.items()]
        return torch.stack(rows).sum(0)

    def parameter_vjp(self, a, keep):
        found = {}
        for name in self.blocks:
            row = self.pull(self.flat(name), a)
            for _ in range(len(self.batch) - keep):
                row = row.sum(0)
            found[name] = row.reshape((*row.shape[:-1], *self.parameters[name].shape))
        return found


def assert_near(own, wanted, tolerance=1e-12):
    assert own.shape == wanted.shape
    if own.numel():
        size = max(1.0, float(wanted.detach().abs().max()))
        assert (own.detach().double() - wanted.detach()).abs().max() <= tolerance * size


def assert_right(own, whole, like, tolerance=1e-12, lead=(3,)):
    """All six products of a linearization, at vectors in the dtype of ``like``."""
    batch, state, channels = whole.batch, whole.state.shape[-1], whole.input.shape[-1]

    def vectors(*shape, seed):
        drawn = randn(*shape, seed=seed, dtype=like.dtype)
        return drawn, drawn.double()

    a, exact = vectors(*lead, *batch, state, seed=11)
    assert own.jvp(a).dtype == own.vjp(a).dtype == like.dtype
    assert_near(own.jvp(a), whole.push(whole.state, exact), tolerance)
    assert_near(own.vjp(a), whole.pull(whole.state, exact), tolerance)
    assert_near(own.input_vjp(a), whole.pull(whole.input, exact), tolerance)
    w, exact = vectors(*lead, *batch, channels, seed=12)
    assert_near(own.input_jvp(w), whole.push(whole.input, exact), tolerance)

    drawn = {name: vectors(*value.shape, seed=13) for name, value in whole.parameters.items()}
    for names in [[name] for name in drawn] + [list(drawn)]:
        along = own.parameter_jvp({name: drawn[name][0] for name in names})
        assert_near(along, whole.parameter_jvp({name: drawn[name][1] for name in names}), tolerance)
    assert_near(own.parameter_jvp({}), torch.zeros(*batch, state, dtype=torch.float64))

    a, exact = vectors(*batch, state, seed=14)
    for keep in range(len(batch) + 1):
        found, wanted = own.parameter_vjp(a, keep), whole.parameter_vjp(exact, keep)
        assert list(found) == list(whole.parameters)
        for name, block in found.items():
            assert block.dtype == like.dtype
            assert_near(block, wanted[name], tolerance)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_products_are_those_of_the_derivatives(case, data):
    hidden, channels = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 4))
    batch = data.draw(st.sampled_from([(), (1,), (hidden,), (3, 2), (hidden, hidden)]))
    shared = data.draw(st.sampled_from([(), (1,) * len(batch), batch[1:], batch]))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    options = {
        "dtype": dtype,
        "tau": data.draw(st.sampled_from([0.37, torch.linspace(0.3, 2.0, hidden, dtype=torch.float64)])),
        "learn_tau": data.draw(st.booleans()),
        "bias": data.draw(st.booleans()),
    }
    if case.layernorm:
        options["layernorm"] = data.draw(st.booleans())
    field = make(case, channels, hidden, seed=data.draw(st.integers(0, 99)), **options)
    h = randn(*batch, field.state_size, dtype=dtype)
    u = None if channels == 0 and data.draw(st.booleans()) else randn(*shared, channels, seed=2, dtype=dtype)
    whole = Whole(copy.deepcopy(field).double(), 0.0, h.double(), None if u is None else u.double())

    own = field.linearize(0.0, h, u)
    assert not isinstance(own, AutogradLinearization)
    # A layer norm of two nearly equal numbers magnifies rounding, by 1 / sqrt(1e-5) at most.
    tolerance = 1e-12 if dtype == torch.float64 else 3e-3 if options.get("layernorm") else 2e-5
    assert_right(own, whole, h, tolerance, lead=data.draw(st.sampled_from([(), (3,), (2, 2)])))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_the_automatic_products_are_those_of_the_derivatives(case, batch):
    """The reference of the rest of the package, and what a user's field gets."""
    field = all_that_is_learned(case, 2, 3)
    h, u = randn(*batch, field.state_size), randn(2, seed=2)
    assert_right(AutogradLinearization(field, 0.0, h, u), Whole(field, 0.0, h, u), h)


@pytest.mark.parametrize("keep", [0, 1])
def test_the_products_are_transposes_of_each_other(case, keep):
    """<a, X v> = <X^T a, v> at sizes at which no Jacobian is formed."""
    field = all_that_is_learned(case, 7, 40)
    h, u = randn(5, 8, field.state_size), randn(5, 1, 7, seed=2)
    own = field.linearize(0.0, h, u)
    a, v, w = randn(*h.shape, seed=3), randn(*h.shape, seed=4), randn(5, 8, 7, seed=5)
    direction = {name: randn(*value.shape, seed=6) for name, value in field.named_parameters()}
    blocks = own.parameter_vjp(a, keep)

    def pair(x, y):
        return (x * y).sum((0, 2) if keep else (0, 1, 2))

    shape = (8, -1) if keep else (-1,)
    along = sum((blocks[name] * value).reshape(shape).sum(-1) for name, value in direction.items())
    for left, right in (
        (pair(a, own.jvp(v)), pair(own.vjp(a), v)),
        (pair(a, own.input_jvp(w)), pair(own.input_vjp(a), w)),
        (pair(a, own.parameter_jvp(direction)), along),
    ):
        assert_near(left, right, 1e-12 * a.numel() ** 0.5)


def test_a_trajectory_at_once_is_every_time_and_sample_alone(case):
    field = all_that_is_learned(case, 2, 3)
    h, u, a = randn(4, 5, field.state_size), randn(4, 1, 2, seed=2), randn(4, 5, field.state_size, seed=3)
    own = field.linearize(0.0, h, u)
    rows = own.parameter_vjp(a, keep=1)
    total = own.parameter_vjp(a)
    for name in rows:
        assert_near(rows[name].sum(0), total[name], 1e-14 * 20)
    for sample in range(5):
        wanted = {name: torch.zeros_like(row[0]) for name, row in rows.items()}
        for time in range(4):
            alone = field.linearize(0.0, h[time, sample], u[time, 0])
            assert_near(own.vjp(a)[time, sample], alone.vjp(a[time, sample]), 1e-14)
            for name, block in alone.parameter_vjp(a[time, sample]).items():
                wanted[name] += block
        for name in rows:
            assert_near(rows[name][sample], wanted[name], 1e-13)


def test_the_products_with_unit_vectors_are_the_jacobian(case):
    field = all_that_is_learned(case, 2, 3)
    h, u = randn(4, field.state_size), randn(4, 2, seed=2)
    own = field.linearize(0.0, h, u)
    unit = torch.eye(field.state_size, dtype=h.dtype).unsqueeze(1).expand(-1, 4, -1)
    full = field.jacobian(0.0, h, u).full()
    assert_near(own.jvp(unit).movedim(0, -1), full, 1e-14)
    assert_near(own.vjp(unit).movedim(0, -2), full, 1e-14)
    assert_near(own.input_vjp(unit).movedim(0, -2), field.input_jacobian(0.0, h, u), 1e-14)
    assert_near(own.slope, field(0.0, h, u), 1e-14)


def test_layers_of_different_kinds_and_times():
    tau = torch.tensor([0.4, 1.0, 2.2, 0.6], dtype=torch.float64)
    options = {"dtype": torch.float64, "learn_tau": True}
    layers = [GRU(3, 4, tau=tau, reset="before", **options), LSTM(4, 2, tau=0.3, **options)]
    top = GatedRate(2, 3, tau=0.8, tau_z=3.0, reset_gate=False, **options)
    fixed = ScalarGate(4, 5, tau=0.7, dtype=torch.float64)
    nested = Stack([layers[0], Stack([fixed, LTC(5, 2, **options)]), top])
    for stack in (Stack([*layers, top]), Stack([Stack(layers), top]), nested, Stack([top])):
        filled(stack)
        h, u = randn(4, stack.state_size), randn(stack.input_size, seed=2)
        own = stack.linearize(0.0, h, u)
        assert not isinstance(own, AutogradLinearization)
        assert_right(own, Whole(stack, 0.0, h, u), h)
        assert_near(own.slope, stack(0.0, h, u), 1e-14)


def test_replaced_parameters_are_read_once(case):
    field = all_that_is_learned(case, 2, 3)
    h, u = randn(4, field.state_size), randn(4, 2, seed=2)
    replaced = {name: 0.5 * value.detach() for name, value in field.named_parameters()}
    prob = ODEProblem(field, h, (0.0, 1.0), control=FunctionControl(lambda t: u), parameters=replaced)
    assert_right(prob.call("linearize", 0.4, h, u), Whole(field, 0.4, h, u, replaced), h)


def test_gradients_pass_through_the_products(case):
    """Second derivatives of dh/dt, by state, input and parameters."""
    field = all_that_is_learned(case, 2, 3)
    h, u = randn(4, field.state_size).requires_grad_(), randn(4, 2, seed=2).requires_grad_()
    v, w = randn(4, field.state_size, seed=4), randn(4, 2, seed=5)
    direction = {name: randn(*value.shape, seed=6) for name, value in field.named_parameters()}
    own, whole = field.linearize(0.0, h, u), Whole(plain(field), 0.0, h, u, dict(field.named_parameters()))
    pairs = [
        (own.jvp(v), whole.push(whole.state, v)),
        (own.vjp(v), whole.pull(whole.state, v)),
        (own.input_jvp(w), whole.push(whole.input, w)),
        (own.input_vjp(v), whole.pull(whole.input, v)),
        (own.parameter_jvp(direction), whole.parameter_jvp(direction)),
    ]
    mine, theirs = own.parameter_vjp(v, keep=1), whole.parameter_vjp(v, keep=1)
    pairs += [(mine[name], theirs[name]) for name in mine]
    totals = [sum((x * randn(*x.shape, seed=7)).sum() for x in side) for side in zip(*pairs, strict=True)]
    variables = [h, u, *field.parameters()]
    gradients = [torch.autograd.grad(total, variables, materialize_grads=True) for total in totals]
    for mine, wanted in zip(*gradients, strict=True):
        assert_near(mine, wanted, 1e-12)


def test_without_a_graph_and_under_transforms(case):
    field = all_that_is_learned(case, 2, 3)
    h, u, a = randn(4, field.state_size), randn(4, 2, seed=2), randn(4, field.state_size, seed=3)
    own = field.linearize(0.0, h, u)
    assert own.vjp(a).requires_grad
    each = vmap(lambda x, v, b: field.linearize(0.0, x, v).parameter_vjp(b))(h, u, a)
    for name, row in own.parameter_vjp(a, keep=1).items():
        assert_near(each[name], row, 1e-14)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            bare = field.linearize(0.0, h, u)
            assert not bare.vjp(a).requires_grad
            assert_near(bare.vjp(a), own.vjp(a), 1e-14)


class Watch(TorchDispatchMode):
    """The operations that run, and the largest result."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        outputs = result if isinstance(result, tuple | list) else [result]
        self.largest = max([self.largest, *(x.numel() for x in outputs if isinstance(x, torch.Tensor))])
        return result


def test_no_matrix_is_formed_and_weights_take_one_product(case):
    """Per sample nothing larger than all pre-activations of a cell, and one batched product per weight and
    piece of it."""
    field = make(case, 3, 16)
    h, u, a = randn(6, 7, field.state_size), randn(6, 7, 3, seed=2), randn(6, 7, field.state_size, seed=3)
    with torch.no_grad():
        own = field.linearize(0.0, h, u)
        with Watch() as watch:
            own.jvp(a), own.vjp(a), own.input_vjp(a)
        assert watch.largest <= 6 * 7 * 4 * 16
        for keep, kind in ((0, "mm"), (1, "bmm")):
            with Watch() as watch:
                own.parameter_vjp(a, keep)
            per_cell = 3 if case.name in ("GRU-before", "GatedRate", "GatedRate-reset") else 2
            expected = 4 if case.name == "Stack" else per_cell
            backwards = {"GRU-before": 1, "Stack": 1}.get(case.name, 0)  # through r * h; to the lower layer
            found = watch.names.count(kind)
            assert found == expected + (backwards if kind == "mm" else 0)


def test_a_nearly_closed_gate_keeps_its_digits():
    """1 - z and its derivative are e^-50, far below the rounding of 1."""
    for reset in ("after", "before"):
        field = GRU(0, 1, reset=reset, dtype=torch.float64)
        with torch.no_grad():
            for parameter in field.parameters():
                parameter.fill_(0.5)
            field.bias_ih[1] = 49.5
        h, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        own = field.linearize(0.0, h)
        r, closed = torch.sigmoid(one), torch.exp(-50.0 * one)
        n = torch.tanh(0.5 + 0.5 * (r if reset == "after" else one))
        slope = 0.5 * r * (1.0 if reset == "before" else 1.0 + 0.5 * (1.0 - r))
        wanted = closed * ((1.0 - n * n) * slope - 0.5 * n - 1.0)
        for product in (own.jvp(one), own.vjp(one)):
            torch.testing.assert_close(product, wanted, rtol=1e-13, atol=0.0)


class Cubed(GRU):
    def rate_drive(self, t, h, u=None):
        rate, drive = super().rate_drive(t, h, u)
        return rate, drive**3


class Slower(LSTM):
    @property
    def tau(self):
        return 2.0 * super().tau


class Louder(MultiGate):
    def candidate(self, pre):
        return 1.5 * super().candidate(pre)


class Shift:
    def forward(self, t, h, u=None):
        return super().forward(t, h, u) + torch.sin(h)


class Shifted(Shift, LTC):
    pass


class Grandchild(Cubed):
    pass


@pytest.mark.parametrize("kind", [Cubed, Slower, Louder, Grandchild])
def test_a_subclass_with_another_equation_is_differentiated(kind):
    field = filled(kind(2, 3, learn_tau=True, dtype=torch.float64))
    h, u = randn(4, field.state_size), randn(4, 2, seed=2)
    whole = Whole(field, 0.0, h, u)
    assert_right(field.linearize(0.0, h, u), whole, h)
    assert_near(field.jacobian(0.0, h, u).full(), whole.state)
    assert_near(field.input_jacobian(0.0, h, u), whole.input)
    stack = filled(Stack([field, LTC(3, 2, dtype=torch.float64)]))
    h = randn(4, stack.state_size)
    assert_right(stack.linearize(0.0, h, u), Whole(stack, 0.0, h, u), h)


def test_an_equation_changed_from_beside_is_differentiated():
    field = filled(Shifted(2, 3, dtype=torch.float64))
    h, u = randn(4, 3), randn(4, 2, seed=2)
    assert_right(field.linearize(0.0, h, u), Whole(field, 0.0, h, u), h)


def test_a_subclass_with_the_same_equation_keeps_its_products():
    class Named(GRU):
        def extra_repr(self):
            return "named"

    class Stated(Cubed):
        def linearize(self, t, h, u=None):
            return "its own"

    h, u = randn(4, 3), randn(4, 2, seed=2)
    assert not isinstance(Named(2, 3, dtype=torch.float64).linearize(0.0, h, u), AutogradLinearization)
    assert Named.jacobian is GRU.jacobian
    assert Stated(2, 3).linearize(0.0, h, u) == "its own"


class Bent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(randn(1))

    def forward(self, x):
        return torch.tanh(self.gain * x)


class Symmetric(torch.nn.Module):
    def forward(self, x):
        return x + x.tril(-1).mT


def test_parameters_behind_parameters():
    """A weight that is computed from another, a nonlinearity that learns, a layer that is used twice."""
    twice = LTC(2, 2, learn_tau=True, dtype=torch.float64)
    symmetric = Leaky(2, 3, dtype=torch.float64)
    parametrize.register_parametrization(symmetric, "weight_hh", Symmetric())
    unbiased = LSTM(2, 2, dtype=torch.float64)
    parametrize.register_parametrization(unbiased, "bias_hh", torch.nn.Tanh())
    fields = [
        symmetric,
        unbiased,
        Leaky(2, 3, phi=Bent(), dtype=torch.float64),
        Stack([twice, twice]),
    ]
    for field in map(filled, fields):
        h, u = randn(4, field.state_size), randn(4, 2, seed=2)
        assert_right(field.linearize(0.0, h, u), Whole(field, 0.0, h, u), h)


class Timed(torch.nn.Module):
    """An equation of somebody else, with a parameter and a dependence on time."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(randn(3, 3))

    def forward(self, t, h, u):
        return torch.cos(t) * torch.tanh(h @ self.matrix.T) * u.sum(-1, keepdim=True)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_wrapped_equation_at_its_own_times(per_sample):
    field = Field(Timed())
    h, u = randn(4, 3), randn(2, seed=2)
    t = randn(4, 1, seed=3) if per_sample else 0.4
    assert_right(field.linearize(t, h, u), Whole(field, t, h, u), h)


def test_no_samples(case):
    field = all_that_is_learned(case, 2, 3)
    own = field.linearize(0.0, torch.zeros(0, field.state_size, dtype=torch.float64), randn(2))
    a = torch.zeros(0, field.state_size, dtype=torch.float64)
    assert own.vjp(a).shape == a.shape
    for name, value in field.named_parameters():
        assert own.parameter_vjp(a)[name].shape == value.shape
        assert own.parameter_vjp(a)[name].abs().sum() == 0.0
        assert own.parameter_vjp(a, keep=1)[name].shape == (0, *value.shape)


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("case", [CASES[2], CASES[-1]], ids=["cell", "stack"])
def test_what_does_not_fit_is_refused(case, stated):
    field = make(case, 2, 3)
    size = field.state_size
    h, u = randn(4, size), randn(4, 2, seed=2)
    own = field.linearize(0.0, h, u) if stated else AutogradLinearization(field, 0.0, h, u)
    for name in ("jvp", "vjp", "input_vjp"):
        with pytest.raises(ValueError, match=rf"{name}\([av]=...\): . has shape \(3, {size}\); it must"):
            getattr(own, name)(randn(3, size))
    with pytest.raises(ValueError, match=r"w has shape \(4, 3\); it must be \(\*lead, 4, 2\)"):
        own.input_jvp(randn(4, 3))
    with pytest.raises(ValueError, match=rf"a has shape \(2, 4, {size}\); it must be \(4, {size}\)"):
        own.parameter_vjp(randn(2, 4, size))
    with pytest.raises(ValueError, match=r"keep is 2; it must be between 0 and 1"):
        own.parameter_vjp(h, keep=2)
    with pytest.raises(KeyError, match=r"'weight' is no parameter of the field"):
        own.parameter_jvp({"weight": u})
    name, value = next(iter(field.named_parameters()))
    with pytest.raises(ValueError, match=rf"'{name}' has shape \(1,\); it must be \({value.shape[0]}, 2\)"):
        own.parameter_jvp({name: torch.zeros(1, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"h has shape \(4, 1\)"):
        field.linearize(0.0, h[:, :1], u)
