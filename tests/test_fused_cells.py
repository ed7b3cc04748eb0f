"""Fused cells, against loops written here that evaluate the field and leave the rest to autograd."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.utils import parametrizations

import ctgate as ct
from ctgate.kernels.fused import EULER, EXPONENTIAL, SLOPE, Rule, Stretch, node, run, run_back, unroll
from ctgate.kernels.switch import fast_paths, plain_paths

KINDS = {
    "leaky": partial(ct.Leaky, alpha=0.6),
    "scalar": ct.ScalarGate,
    "multi": ct.MultiGate,
    "gru after": ct.GRU,
    "gru before": partial(ct.GRU, reset="before"),
    "lstm": ct.LSTM,
    "ltc": ct.LTC,
}
ALGORITHMS = {"euler": (ct.Euler, EULER), "exponential": (ct.ExponentialEuler, EXPONENTIAL)}


@pytest.fixture(scope="session", params=KINDS.values(), ids=KINDS.keys())
def kind(request):
    return request.param


@pytest.fixture(scope="session", params=ALGORITHMS.values(), ids=ALGORITHMS.keys())
def algorithm(request):
    return request.param


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(kind, channels=3, hidden=4, *, seed=0, layernorm=False, dtype=torch.float64, **options):
    """A field whose layer normalisation, if it can have one, does something."""
    if layernorm and kind is not ct.LTC:
        options["layernorm"] = True
    generator = torch.Generator().manual_seed(seed)
    field = kind(channels, hidden, generator=generator, dtype=dtype, **options)
    if getattr(field, "layernorm", None) is not None:
        # A deviation of 0, as in a layer of one unit, has no derivative to compare without it.
        field.layernorm.eps = 0.1
        with torch.no_grad():
            field.layernorm.weight.copy_(draw(hidden, seed=seed + 1))
            field.layernorm.bias.copy_(draw(hidden, seed=seed + 2))
    return field


def rate_drive(field, named, h, u):
    """What the field says, with these parameters."""

    class Said(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.field = field

        def forward(self, *arguments):
            return self.field.rate_drive(*arguments)

    return functional_call(Said(), {f"field.{k}": v for k, v in named.items()}, (0.0, h, u))


def loop(field, named, us, h0, sizes, rule: Rule) -> Tensor:
    """The states of these steps, one after the other; a size is a number or (sample,)."""
    states = [h0]
    for k, size in enumerate(sizes):
        dt = size.unsqueeze(-1) if isinstance(size, Tensor) else size
        h = states[-1]
        rate, drive = rate_drive(field, named, h, None if us is None else us[k])
        if rule.exponential:
            states.append(h * torch.exp(-rate * dt) - drive / rate * torch.expm1(-rate * dt))
        elif rule.keep:
            states.append(h + dt * (drive - rate * h))
        else:
            states.append(drive - rate * h)
    return torch.stack(states)


def stretch_of(field, sizes, rule: Rule) -> tuple[Stretch, Tensor | None]:
    """A stretch of these steps, and the sizes that it wants as a tensor."""
    own = isinstance(sizes, Tensor)

    def plain(named, us, h0, dts):
        return loop(field, named, us, h0, sizes if dts is None else dts, rule)

    names = tuple(name for name, _ in field.named_parameters())
    return Stretch(field.fuse, names, rule, None if own else sizes, plain), sizes if own else None


def close(own, reference, tolerance=1e-12):
    """To rounding, of the largest of its numbers."""
    for x, y in zip(own, reference, strict=True):
        assert x.shape == y.shape
        if x.numel():
            error = (x - y).abs().max() / y.abs().max().clamp(min=1.0)
            assert error <= tolerance, f"{error:.1e} of {y.abs().max():.1e}"


@dataclass
class Spy:
    """How many steps a fused cell has taken."""

    steps: int = 0

    def __call__(self, cell, us, h0, dts, rule):
        self.steps += len(dts)
        return run(cell, us, h0, dts, rule)


@pytest.fixture
def spy(monkeypatch):
    if not fast_paths():
        pytest.skip("fast paths are off")
    found = Spy()
    monkeypatch.setattr(node, "run", found)
    return found


def solved(field, xs, h0, alg, span=(0.0, 5.0), **options):
    control = None if xs is None else ct.ZeroOrderHold(torch.arange(len(xs) + 1.0), xs)
    return ct.solve(ct.ODEProblem(field, h0, span, control, **options), alg)


# --- states and first derivatives -------------------------------------------------------------------------

cases = st.fixed_dictionaries(
    {
        "channels": st.integers(0, 3),
        "hidden": st.sampled_from([1, 2, 3, 5, 16, 17]),
        "samples": st.integers(1, 3),
        "steps": st.integers(1, 6),
        "rule": st.sampled_from([EULER, EXPONENTIAL, SLOPE]),
        "sizes": st.sampled_from(["tau", "equal", "varying", "of samples"]),
        "tau": st.sampled_from(["1", "2.5", "per unit"]),
        "options": st.fixed_dictionaries(
            {"learn_tau": st.booleans(), "bias": st.booleans(), "layernorm": st.booleans()}
        ),
        "seed": st.integers(0, 2**16),
    }
)  # fmt: skip


def sizes_of(case) -> list[float] | Tensor:
    count, samples, seed = case["steps"], case["samples"], case["seed"]
    if case["rule"] is SLOPE:
        return [1.0] * count
    if case["sizes"] == "of samples":
        sizes = draw(count, samples, seed=seed).sigmoid()
        sizes[0, 0] = 0.0  # this one stands still
        return sizes
    return {
        "tau": [2.5 if case["tau"] == "2.5" else 1.0] * count,
        "equal": [0.3] * count,
        "varying": [0.2 + 0.1 * k for k in range(count)],
    }[case["sizes"]]


@pytest.mark.usefixtures("both_ways")
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    # Of all examples one way: both_ways.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases)
def test_states_and_gradients_are_those_of_the_loop(kind, case):
    """States to rounding, and the gradients to input, initial state, sizes of steps and every parameter."""
    hidden, seed, rule = case["hidden"], case["seed"], case["rule"]
    tau = draw(hidden, seed=seed).exp() if case["tau"] == "per unit" else float(case["tau"])
    field = make(kind, case["channels"], hidden, seed=seed, tau=tau, **case["options"])
    h0 = draw(case["samples"], field.state_size, seed=seed + 3).requires_grad_()
    us = (
        draw(case["steps"], case["samples"], case["channels"], seed=seed + 4).requires_grad_()
        if case["channels"]
        else None
    )
    stretch, own = stretch_of(field, sizes_of(case), rule)
    named = dict(field.named_parameters())
    if own is not None:
        own.requires_grad_()
    wanted = [x for x in (us, h0, own, *named.values()) if x is not None]

    states = unroll(stretch, us, h0, own, list(named.values()))
    expected = loop(field, named, us, h0, stretch.sizes(own), rule)
    cotangent = draw(*states.shape, seed=seed + 5)
    close([states], [expected])
    given = torch.autograd.grad(states, wanted, cotangent)
    found = torch.autograd.grad(expected, wanted, cotangent, materialize_grads=True)
    if own is not None:
        # A sample that takes no step is asked for no derivative by its size.
        found = [
            torch.where(own == 0.0, 0.0, x) if y is own else x for x, y in zip(found, wanted, strict=True)
        ]
    close(given, found)


@pytest.mark.usefixtures("both_ways")
def test_many_steps_of_many_samples(kind):
    """More numbers than are multiplied out at once."""
    field = make(kind, 2, 33, layernorm=True, learn_tau=True)
    us, h0 = draw(40, 64, 2), draw(64, field.state_size, seed=1).requires_grad_()
    stretch, _ = stretch_of(field, [0.7] * 40, EULER)
    wanted = [h0, *field.parameters()]
    named = dict(field.named_parameters())
    states = unroll(stretch, us, h0, None, list(named.values()))
    expected = loop(field, named, us, h0, [0.7] * 40, EULER)
    cotangent = draw(*states.shape, seed=2)
    close([states], [expected])
    close(*(torch.autograd.grad(x, wanted, cotangent) for x in (states, expected)))


@pytest.mark.usefixtures("both_ways")
def test_one_evaluation_is_the_field(kind):
    """The rule SLOPE without a graph: dh/dt, its cotangents, and with groups one gradient for each."""
    field = make(kind, layernorm=True, tau=0.7, learn_tau=True)
    h, u = draw(6, field.state_size).requires_grad_(), draw(6, 3, seed=1).requires_grad_()
    named = dict(field.named_parameters())
    slope = field(0.0, h, u)
    cotangent = draw(*slope.shape, seed=2)
    expected = torch.autograd.grad(slope, [h, u, *named.values()], cotangent, retain_graph=True)
    with torch.no_grad():
        cell = field.fuse(named)
        states, parts = run(cell, u[None], h, [1.0], SLOPE)
        both = torch.stack([torch.zeros_like(cotangent), cotangent])
        a, found, inputs = run_back(cell, u[None], states, parts, [1.0], SLOPE, both, 0, True)
        groups = run_back(cell, u[None], states, parts, [1.0], SLOPE, both, 3)[1]
    close([states[1]], [slope])
    close([a[0], inputs[0], *(found[name] for name in named)], expected)
    for k in range(3):
        mask = torch.zeros(6, 1, dtype=h.dtype)
        mask[2 * k : 2 * k + 2] = 1.0
        part = torch.autograd.grad(slope, list(named.values()), cotangent * mask, retain_graph=True)
        close([groups[name][k] for name in named], part)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_solves_are_the_loop(kind, algorithm, dtype, spy):
    """Steps of 0.4 to 5.0, the last one shorter. In float32 to 2e-6 of the largest number: 13 steps of some
    rounding errors of 6e-8 each."""
    alg, rule = algorithm
    field = make(kind, layernorm=True, learn_tau=True, dtype=dtype)
    xs, h0 = (
        x.requires_grad_()
        for x in (draw(5, 2, 3, dtype=dtype), draw(2, field.state_size, seed=1, dtype=dtype))
    )
    wanted = [xs, h0, *field.parameters()]
    sol = solved(field, xs, h0, alg(0.4))
    assert spy.steps == len(sol.hs) - 1 == sol.stats.evaluations
    sizes = sol.ts.diff().tolist()
    us = torch.stack([xs[min(int(t + 1e-9), 4)] for t in sol.ts[:-1].tolist()])
    expected = loop(field, dict(field.named_parameters()), us, h0, sizes, rule)
    cotangent = draw(*expected.shape, seed=2, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    close([sol.hs], [expected], tolerance)
    close(*(torch.autograd.grad(x, wanted, cotangent) for x in (sol.hs, expected)), tolerance)
    assert sol.hs.dtype == dtype


def test_samples_on_clocks_of_their_own(kind, algorithm, spy):
    """A span for each sample: one of them takes fewer steps, and then stands still."""
    alg, rule = algorithm
    field = make(kind)
    times = [torch.tensor([0.0, 0.5, 1.5, 2.0]).double(), torch.tensor([1.0, 1.7]).double()]
    values = [draw(4, 3).requires_grad_(), draw(2, 3, seed=1).requires_grad_()]
    control = ct.from_sequences(times, values, ct.ZeroOrderHold)
    h0 = draw(2, field.state_size, seed=2).requires_grad_()
    wanted = [h0, *values, *field.parameters()]
    sol = ct.solve(ct.ODEProblem(field, h0, control.sample_support, control), alg(0.25))
    assert spy.steps == len(sol.ts) - 1
    assert (sol.ts[-1] > sol.ts[-2]).tolist() == [True, False]
    named, alone = dict(field.named_parameters()), []
    for nodes, t, x, h in zip(sol.ts.unbind(1), times, values, h0, strict=True):
        us = torch.stack([x[(t <= node + 1e-9).sum() - 1] for node in nodes[:-1]])
        alone.append(loop(field, named, us, h, nodes.diff().tolist(), rule))
    expected = torch.stack(alone, 1)
    weight = draw(*expected.shape, seed=3)
    close([sol.hs], [expected])
    close(*(torch.autograd.grad(x, wanted, weight) for x in (sol.hs, expected)))


# --- higher derivatives and transforms --------------------------------------------------------------------


def variables(field, sizes, steps=2, samples=2):
    """Input, initial state and parameters, small enough for finite differences."""
    us = draw(steps, samples, field.input_size, seed=5).requires_grad_()
    h0 = draw(samples, field.state_size, seed=6).requires_grad_()
    own = [sizes.requires_grad_()] if isinstance(sizes, Tensor) else []
    return [us, h0, *own, *(p.detach().clone().requires_grad_() for p in field.parameters())]


@pytest.mark.parametrize("rule", [EULER, EXPONENTIAL], ids=["euler", "exponential"])
@pytest.mark.parametrize("of_samples", [False, True], ids=["numbers", "of samples"])
def test_finite_differences(kind, rule, of_samples):
    """First and second derivatives of the node."""
    field = make(kind, 1, 2, layernorm=True, learn_tau=True, tau=draw(2).exp())
    sizes = draw(2, 2, seed=9).sigmoid() if of_samples else [0.5, 0.8]
    stretch, _ = stretch_of(field, sizes, rule)

    def states(us, h0, *rest):
        dts, parameters = (rest[0], rest[1:]) if of_samples else (None, rest)
        return unroll(stretch, us, h0, dts, list(parameters))

    values = variables(field, sizes)
    assert gradcheck(states, values, fast_mode=True)
    assert gradgradcheck(states, values, fast_mode=True)


def losses(field, sizes=(1.0, 1.0, 0.7), rule: Rule = EULER) -> tuple[Callable, Callable]:
    """A number made of the states, by solve and by the loop."""

    def of(states):
        return (
            (states * torch.linspace(-1.0, 1.0, states.numel(), dtype=states.dtype).view(states.shape))
            .sin()
            .sum()
        )

    def own(named, h0, xs):
        return of(solved(field, xs, h0, ct.Euler(1.0), (0.0, 2.7), parameters=named).hs)

    def plain(named, h0, xs):
        return of(loop(field, named, xs, h0, sizes, rule))

    return own, plain


def squares(tree) -> Tensor:
    return sum(x.square().sum() for x in tree.values())


TRANSFORMS = {
    "grad": lambda f, p, h, x: grad(f)(p, h, x),
    "vmap over initial states": lambda f, p, h, x: vmap(f, (None, 0, None))(
        p, torch.stack([h, h + 0.1, -h]), x
    ),
    "vmap(grad) over samples": lambda f, p, h, x: vmap(grad(f, (0, 1, 2)), (None, 0, 1))(
        p, h.unsqueeze(1), x.unsqueeze(2)
    ),
    "vmap(grad) over weights": lambda f, p, h, x: vmap(grad(f), (0, None, None))(
        {k: torch.stack([v, 0.9 * v, v - 0.1]) for k, v in p.items()}, h, x
    ),
    "vmap of vmap": lambda f, p, h, x: vmap(vmap(grad(f), (None, 0, None)), (None, None, 0))(
        p, torch.stack([h, -h]), torch.stack([x, 0.5 * x, -x])
    ),
    "hessian": lambda f, p, h, x: hessian(f, argnums=1)(p, h, x),
    "grad of vmap(grad)": lambda f, p, h, x: grad(
        lambda q: squares(vmap(grad(f), (None, 0, 1))(q, h.unsqueeze(1), x.unsqueeze(2)))
    )(p),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms(kind, transform, request, spy):
    """What torch.func makes of a solve is what it makes of the loop. ``hessian`` is forward over reverse, and
    left to plain steps."""
    field = make(kind, learn_tau=True, layernorm=True)
    named = {name: parameter.detach() for name, parameter in field.named_parameters()}
    h0, xs = draw(2, field.state_size), draw(3, 2, 3, seed=1)
    own, plain = (torch.utils._pytree.tree_leaves(transform(loss, named, h0, xs)) for loss in losses(field))
    assert spy.steps > 0 or "hessian" in request.node.name
    close(own, plain)


def test_gradients_of_gradients(kind):
    """By autograd, with create_graph, to everything."""
    field = make(kind, learn_tau=True)
    named = {name: p.detach().clone().requires_grad_() for name, p in field.named_parameters()}
    h0, xs = draw(2, field.state_size).requires_grad_(), draw(3, 2, 3, seed=1).requires_grad_()
    wanted = [h0, xs, *named.values()]
    found = []
    for loss in losses(field):
        first = torch.autograd.grad(loss(named, h0, xs), wanted, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), wanted))
    close(*found)


# --- what is taken, and what is left to plain steps -------------------------------------------------------


def test_fast_paths_are_taken(kind, algorithm, spy):
    """In as many steps as there are, and none of them within plain_paths."""
    field = make(kind, layernorm=True)
    xs, h0 = draw(5, 2, 3), draw(2, field.state_size)
    own = solved(field, xs, h0, algorithm[0](0.5))
    assert spy.steps == 10
    with plain_paths():
        plain = solved(field, xs, h0, algorithm[0](0.5))
    assert spy.steps == 10
    assert own.stats.evaluations == plain.stats.evaluations == 10
    close([own.hs], [plain.hs])


@pytest.mark.skipif(not fast_paths(), reason="fast paths are off")
def test_memory_is_flat(kind, monkeypatch):
    """Nothing of 50 solves and gradients is left, without the garbage collector."""
    left = []

    def watched(*arguments):
        states, parts = run(*arguments)
        left.extend(weakref.ref(x) for x in (states.untyped_storage(), *(p.untyped_storage() for p in parts)))
        return states, parts

    monkeypatch.setattr(node, "run", watched)
    field = make(kind, layernorm=True, learn_tau=True)
    xs, h0 = draw(5, 2, 3), draw(2, field.state_size)
    for _ in range(50):
        field.zero_grad()
        solved(field, xs, h0, ct.Euler(0.5)).hs.sum().backward()
    assert len(left) >= 100
    assert not [x for x in left if x() is not None]


class Slower(ct.GRU):
    """Another equation."""

    def rate_drive(self, t, h, u=None):
        rate, drive = super().rate_drive(t, h, u)
        return 0.5 * rate, 0.5 * drive


class Wider(ct.MultiGate):
    """With a parameter of its own that the equation does not have."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.gain = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))


def parametrized():
    return parametrizations.weight_norm(make(ct.MultiGate), "weight_hh")


def with_fixed_bias():
    field = make(ct.LTC)
    bias = field.bias.detach() + 1.0
    del field.bias
    field.register_buffer("bias", bias)
    return field


def with_learned_alpha():
    field = make(ct.Leaky)
    del field.alpha
    field.alpha = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    return field


def with_shared_biases():
    field = make(ct.GRU)
    field.bias_hh = field.bias_ih
    return field


def with_other_norm():
    field = make(ct.ScalarGate, layernorm=True)
    field.layernorm = torch.nn.GroupNorm(2, 4, dtype=torch.float64)
    return field


UNKNOWN = {
    "another equation": lambda: make(Slower),
    "another parameter": lambda: make(Wider),
    "another phi": lambda: make(ct.Leaky, phi=torch.nn.functional.softplus),
    "parametrized weights": parametrized,
    "bias as a buffer": with_fixed_bias,
    "alpha as a parameter": with_learned_alpha,
    "one bias for two": with_shared_biases,
    "another normalisation": with_other_norm,
}


@pytest.mark.parametrize("build", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_what_the_cell_does_not_know_is_left_to_plain_steps(build, spy):
    """And right, with its gradients."""
    field = build()
    xs, h0 = draw(5, 2, 3), draw(2, field.state_size).requires_grad_()
    named = dict(field.named_parameters())
    own = solved(field, xs, h0, ct.Euler(1.0)).hs
    assert spy.steps == 0
    expected = loop(field, named, xs, h0, [1.0] * 5, EULER)
    wanted = [h0, *named.values()]
    close([own], [expected])
    close(*(torch.autograd.grad(x.sin().sum(), wanted, materialize_grads=True) for x in (own, expected)))


def test_forward_derivatives_are_left_to_plain_steps(kind, spy):
    field = make(kind)
    own, plain = losses(field)
    named = {name: parameter.detach() for name, parameter in field.named_parameters()}
    h0, xs = draw(2, field.state_size), draw(3, 2, 3, seed=1)
    tangents = {name: draw(*p.shape, seed=7) for name, p in named.items()}
    found = jvp(own, (named, h0, xs), (tangents, h0, xs))
    assert spy.steps == 0
    close(found, jvp(plain, (named, h0, xs), (tangents, h0, xs)))


def test_autocast_is_left_to_plain_steps(kind, spy):
    """Products in bfloat16 are what was asked for."""
    field = make(kind, dtype=torch.float32)
    xs, h0 = draw(5, 2, 3, dtype=torch.float32), draw(2, field.state_size, dtype=torch.float32)
    exact = solved(field, xs, h0, ct.Euler(1.0)).hs
    taken = spy.steps
    with torch.autocast("cpu", torch.bfloat16):
        own = solved(field, xs, h0, ct.Euler(1.0)).hs
        expected = loop(field, dict(field.named_parameters()), xs, h0, [1.0] * 5, EULER)
    assert taken == spy.steps == 5
    close([own], [expected], 1e-6)
    assert (own - exact).abs().max() > 1e-4


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dt", [50.0, 1e6])
def test_divergence_ends_as_it_does_in_plain_steps(kind, dt):
    """The same code, message, times and states. With gates that do not see the state every step multiplies
    it, until float32 ends."""
    field = make(kind, dtype=torch.float32)
    with torch.no_grad():
        field.weight_hh.zero_()
    xs, h0 = draw(60, 2, 3, dtype=torch.float32), draw(2, field.state_size, dtype=torch.float32)
    control = ct.ZeroOrderHold(dt * torch.arange(61.0), xs)
    prob = ct.ODEProblem(field, h0, (0.0, 60.0 * dt), control)
    with pytest.warns(RuntimeWarning, match="UNSTABLE"):
        own = ct.solve(prob, ct.Euler(dt))
    with plain_paths(), pytest.warns(RuntimeWarning, match="UNSTABLE"):
        plain = ct.solve(prob, ct.Euler(dt))
    assert own.retcode is plain.retcode is ct.ReturnCode.UNSTABLE
    assert own.message == plain.message
    assert own.stats.evaluations == plain.stats.evaluations
    torch.testing.assert_close(own.ts, plain.ts)
    torch.testing.assert_close(own.hs, plain.hs, rtol=1e-4, atol=1e-4, equal_nan=True)
