"""Tangents, adjoints of blocks and gradients of single samples by fused cells, against torch.func.jvp and
autograd of loops that are written out here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jvp, vmap

import ctgate as ct
from ctgate.kernels.fused import (
    EULER,
    EXPONENTIAL,
    factors_along,
    pull_block,
    push_block,
    run_tangent,
    tangent,
)
from ctgate.kernels.fused import cell as fused_cell
from ctgate.sensitivity import reverse_map
from ctgate.sensitivity.memory import TensorMemory

F64 = torch.float64
CELLS = {
    "Leaky": lambda *sizes, **k: ct.Leaky(*sizes, alpha=0.6, **k),
    "ScalarGate": ct.ScalarGate,
    "MultiGate": ct.MultiGate,
    "GRU-after": ct.GRU,
    "GRU-before": lambda *sizes, **k: ct.GRU(*sizes, reset="before", **k),
    "LSTM": ct.LSTM,
    "LTC": ct.LTC,
}
NORMED = [*((name, False) for name in CELLS), *((name, True) for name in CELLS if name != "LTC")]
DT = 0.7


def normal(*shape, seed, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def field(name, layernorm=False, inputs=2, hidden=3, dtype=F64, **options):
    if layernorm:
        options["layernorm"] = True
    made = CELLS[name](inputs, hidden, generator=torch.Generator().manual_seed(1), dtype=F64, **options)
    return made.to(dtype)


def normalised(kind, p, pre):
    """The candidate's argument, by the definition of layer normalisation."""
    if kind.layernorm is None:
        return pre
    centred = pre - pre.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + kind.layernorm.eps).rsqrt()
    return p["layernorm.weight"] * centred * scale + p["layernorm.bias"]


def rate_drive(name, kind, p, h, u):
    """The equations of the fields' docstrings, in units of 1 / tau where tau = exp(log_tau)."""
    c, y = h.chunk(2, -1) if name == "LSTM" else (None, h)
    own, seen = y @ p["weight_hh"].T, u @ p["weight_ih"].T
    sigmoid, tanh = torch.sigmoid, torch.tanh
    tau, n = p["log_tau"].exp(), kind.hidden_size
    if name == "LTC":
        f = sigmoid(own + seen + p["bias"])
        return 1.0 / tau + f, f * p["reversal"]
    if name == "LSTM":
        i, f, g, o = (own + seen + p["bias_ih"] + p["bias_hh"]).chunk(4, -1)
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(normalised(kind, p, g)), sigmoid(o)
        ahead = o * tanh(f * c + i * g)
        rate = torch.cat((1.0 - f, torch.ones_like(f)), -1) / tau.expand(n).repeat(2)
        return rate, torch.cat((i * g, ahead), -1) / tau.expand(n).repeat(2)
    if name.startswith("GRU"):
        bias_ih, bias_hh = p["bias_ih"], p["bias_hh"]
        r, z, into = (seen + bias_ih).chunk(3, -1)
        if name == "GRU-after":
            kept_r, kept_z, kept = (own + bias_hh).chunk(3, -1)
            r, z = sigmoid(r + kept_r), sigmoid(z + kept_z)
            pre = into + r * kept
        else:
            kept_r, kept_z, _ = (own + bias_hh).chunk(3, -1)
            r, z = sigmoid(r + kept_r), sigmoid(z + kept_z)
            pre = into + (r * h) @ p["weight_hh"][2 * n :].T + bias_hh[2 * n :]
        gate = 1.0 - z
    else:
        rows = own + seen + p["bias"]
        gate = torch.full_like(h, 0.6) if name == "Leaky" else sigmoid(rows[..., :-n])
        pre = rows[..., -n:]
    return (gate / tau).expand_as(h), gate / tau * tanh(normalised(kind, p, pre))


def states(name, kind, rule, p, h, us, sizes):
    out = [h]
    for u, dt in zip(us, sizes, strict=True):
        rate, drive = rate_drive(name, kind, p, h, u)
        if rule.exponential:
            h = h + (1.0 - torch.exp(-rate * dt)) * (drive / rate - h)
        else:
            h = h + dt * (drive - rate * h)
        out.append(h)
    return torch.stack(out)


class Case:
    """A cell, a trajectory of it, and a direction of everything."""

    def __init__(self, name, layernorm=False, rule=EULER, steps=5, samples=2, tau=1.3, dtype=F64, **options):
        self.name, self.rule = name, rule
        self.field = field(name, layernorm, tau=tau, learn_tau=True, dtype=dtype, **options)
        self.p = {
            key: value.detach() + 0.1 * normal(*value.shape, seed=40 + k, dtype=dtype)
            for k, (key, value) in enumerate(self.field.named_parameters())
        }
        self.us = normal(steps, samples, self.field.input_size, seed=2, dtype=dtype)
        self.h0 = 0.5 * normal(samples, self.field.state_size, seed=3, dtype=dtype)
        self.sizes = [DT, *[0.4] * (steps - 1)]
        self.cell = self.field.fuse(self.p)
        self.along = {
            key: normal(*value.shape, seed=k, dtype=dtype) for k, (key, value) in enumerate(self.p.items())
        }
        self.v0 = normal(*self.h0.shape, seed=20, dtype=dtype)
        self.dus = normal(*self.us.shape, seed=21, dtype=dtype)

    def states(self, p, h0, us):
        return states(self.name, self.field, self.rule, p, h0, us, self.sizes)

    def reference(self, along=None, v0=None, dus=None):
        """States and their derivative along the direction; what is left out stands still."""
        still = {key: torch.zeros_like(value) for key, value in self.p.items()}
        moves = (
            still | (along or {}),
            torch.zeros_like(self.h0) if v0 is None else v0,
            torch.zeros_like(self.us) if dus is None else dus,
        )
        return jvp(self.states, (self.p, self.h0, self.us), moves)

    def run(self, directions, v0, dus=None):
        return run_tangent(self.cell, self.us, self.h0, self.sizes, self.rule, directions, v0, dus)


def far(ours, reference):
    assert ours.shape == reference.shape
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("rule", [EULER, EXPONENTIAL], ids=["Euler", "exponential"])
@pytest.mark.parametrize(("name", "layernorm"), NORMED)
def test_tangents_are_the_derivatives_of_the_steps(name, layernorm, rule):
    for tau in (1.3, torch.tensor([0.7, 1.1, 2.0], dtype=F64)):
        case = Case(name, layernorm, rule, tau=tau)
        hs, vs = case.run([case.along], case.v0[None], case.dus)
        expected, tangent = case.reference(case.along, case.v0, case.dus)
        assert far(hs, expected) < 1e-12
        assert far(vs[:, 0], tangent) < 1e-12


@pytest.mark.parametrize("name", CELLS)
def test_every_parameter_moves_them_by_itself(name):
    case = Case(name, layernorm=name != "LTC")
    for key, along in case.along.items():
        _, vs = case.run([{key: along}], torch.zeros_like(case.v0)[None])
        assert far(vs[:, 0], case.reference({key: along})[1]) < 1e-12, key


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(CELLS)),
    hidden=st.sampled_from([1, 2, 7, 17]),
    samples=st.sampled_from([1, 3, 17]),
    steps=st.integers(1, 6),
    inputs=st.sampled_from([1, 3]),
    blocks=st.integers(1, 3),
)
def test_sizes(name, hidden, samples, steps, inputs, blocks):
    case = Case(name, steps=steps, samples=samples, hidden=hidden, inputs=inputs)
    directions = [{key: (k + 1.0) * value for key, value in case.along.items()} for k in range(blocks)]
    starts = torch.stack([(k - 1.0) * case.v0 for k in range(blocks)])
    hs, vs = case.run(directions, starts)
    for k in range(blocks):
        assert far(vs[:, k], case.reference(directions[k], starts[k])[1]) < 1e-12
    factors = factors_along(case.cell, case.us, hs[:-1], case.sizes, EULER)
    pushed = push_block(case.cell, factors, starts)
    for k in range(blocks):
        assert far(pushed[k], case.reference(v0=starts[k])[1][-1]) < 1e-12
    a = normal(*starts.shape, seed=5)
    pulled = pull_block(case.cell, factors, a)
    forwards, backwards = (a * pushed).sum((1, 2)), (pulled * starts).sum((1, 2))
    assert (forwards - backwards).abs().max() < 1e-12 * a.abs().sum()


@pytest.mark.parametrize("rule", [EULER, EXPONENTIAL], ids=["Euler", "exponential"])
@pytest.mark.parametrize(("name", "layernorm"), NORMED)
def test_blocks_of_vectors(name, layernorm, rule):
    """Forwards the columns of jvp, backwards the rows of autograd; the vectors given stay as they are."""
    case = Case(name, layernorm, rule)
    hs = case.reference()[0]
    factors = factors_along(case.cell, case.us, hs[:-1], case.sizes, rule)
    vectors = normal(3, *case.h0.shape, seed=6)
    before = vectors.clone()
    pushed, pulled = push_block(case.cell, factors, vectors), pull_block(case.cell, factors, vectors)
    assert torch.equal(vectors, before)
    h0 = case.h0.clone().requires_grad_()
    final = case.states(case.p, h0, case.us)[-1]
    for k, vector in enumerate(vectors):
        assert far(pushed[k], case.reference(v0=vector)[1][-1]) < 1e-12
        back = torch.autograd.grad(final, h0, vector, retain_graph=True)[0]
        assert far(pulled[k], back) < 1e-12


@pytest.mark.parametrize("name", CELLS)
def test_float32_tangents(name):
    """Ten steps in single precision are 1e-5 from double precision: some tens of roundings of 6e-8."""
    exact = Case(name, steps=10, samples=3)
    single = Case(name, steps=10, samples=3, dtype=torch.float32)
    _, vs = single.run([single.along], single.v0[None])
    assert vs.dtype == torch.float32
    assert far(vs[:, 0].double(), exact.reference(exact.along, exact.v0)[1]) < 1e-5


def test_a_long_trajectory_is_taken_in_pieces():
    """The memory is that of states and tangents, and of pieces whose size does not grow."""
    peaks = []
    for steps in (128, 512):
        case = Case("GRU-after", steps=steps, samples=64, hidden=32)
        with TensorMemory() as memory:
            case.run([case.along], case.v0[None])
        peaks.append(memory.peak - 2 * case.h0.nbytes * (steps + 1))
    assert peaks[1] < 1.02 * peaks[0]


@pytest.mark.parametrize("name", CELLS)
def test_pieces_follow_on_one_another(name, monkeypatch):
    """Two steps at a time, the last one alone, with two directions at once."""
    case = Case(name)
    monkeypatch.setattr(tangent, "_PIECE", 2 * case.h0.numel())
    back = {key: -value for key, value in case.along.items()}
    hs, vs = case.run([case.along, back], torch.stack((case.v0, -case.v0)), case.dus)
    expected, along = case.reference(case.along, case.v0, case.dus)
    assert far(hs, expected) < 1e-12
    assert far(vs[:, 0], along) < 1e-12
    assert far(vs[:, 1], case.reference(back, -case.v0, case.dus)[1]) < 1e-12


def direction_of(prob, seed=30):
    named = {**dict(prob.field.named_parameters()), "h0": prob.h0}
    return {key: normal(*value.shape, seed=seed + k) for k, (key, value) in enumerate(named.items())}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("own_times", [False, True])
def test_sensitivity_jvp_by_euler(name, own_times):
    """Samples of one clock, and samples with steps of their own, the second of which stops early."""
    kind = field(name, tau=1.3, learn_tau=True)
    xs, h0 = normal(4, 2, 2, seed=2), 0.5 * normal(2, kind.state_size, seed=3)
    ends = torch.tensor([[0.0, 0.1], [0.7, 0.6], [1.4, 0.9], [2.1, 1.3], [2.5, 1.4]], dtype=F64)
    ts = ends if own_times else ends[:, 0]
    prob = ct.ODEProblem(kind, h0, (ts[0], ts[-1]) if own_times else (0.0, 2.5), ct.ZeroOrderHold(ts, xs))
    direction = direction_of(prob)
    result = ct.sensitivity_jvp(prob, ct.Euler(DT), direction=direction)
    assert result.solution.ts.shape == (5, 2) if own_times else (5,)
    assert far(result(result.solution.ts), result.tangent) < 1e-12
    v0 = direction.pop("h0")
    p = {key: value.detach() for key, value in kind.named_parameters()}
    sizes = ends.diff(dim=0).unsqueeze(-1)
    for k in range(2):
        dts = sizes[:, k if own_times else 0]
        expected, tangent = jvp(
            lambda q, h, k=k, dts=dts: states(name, kind, EULER, q, h, xs[:, k : k + 1], dts),
            (p, h0[k : k + 1]),
            (direction, v0[k : k + 1]),
        )
        assert far(result.solution.hs[:, k], expected[:, 0]) < 1e-12
        assert far(result.tangent[:, k], tangent[:, 0]) < 1e-12


@pytest.mark.parametrize("alg", [ct.Euler(0.3), ct.ExponentialEuler(0.3)], ids=["Euler", "exponential"])
def test_sensitivity_jvp_is_the_same_without_fast_paths(alg):
    kind = field("GRU-after", tau=1.3, learn_tau=True)
    control = ct.CubicHermite(torch.arange(4.0, dtype=F64), normal(4, 2, 2, seed=2))
    prob = ct.ODEProblem(kind, 0.5 * normal(2, 3, seed=3), (0.0, 3.0), control)
    options = {"direction": direction_of(prob), "saveat": [0.5, 1.0, 2.9]}
    fast = ct.sensitivity_jvp(prob, alg, **options)
    inside = torch.tensor([0.2, 1.7], dtype=F64)
    with ct.plain_paths():
        plain = ct.sensitivity_jvp(prob, alg, **options)
        assert far(fast.tangent, plain.tangent) < 1e-12
        assert far(fast.solution.hs, plain.solution.hs) < 1e-12
        assert far(fast(inside), plain(inside)) < 1e-12
    assert fast.solution.stats.evaluations == plain.solution.stats.evaluations


def test_sensitivity_jvp_under_vmap():
    """Many directions by a transform of torch.func, which in-place kernels leave to plain steps."""
    kind = field("GRU-after", tau=1.3)
    control = ct.ZeroOrderHold(torch.arange(4.0, dtype=F64), normal(3, 2, 2, seed=2))
    prob = ct.ODEProblem(kind, 0.5 * normal(2, 3, seed=3), (0.0, 3.0), control)
    starts = normal(4, 2, 3, seed=4)
    at_once = vmap(lambda v: ct.sensitivity_jvp(prob, ct.Euler(DT), direction={"h0": v}).tangent)(starts)
    for one, start in zip(at_once, starts, strict=True):
        assert far(one, ct.sensitivity_jvp(prob, ct.Euler(DT), direction={"h0": start}).tangent) < 1e-12


def test_tangents_that_diverge_end_the_solve():
    kind = ct.Leaky(2, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    control = ct.ZeroOrderHold(torch.arange(0.0, 5000.0, 4.0), torch.zeros(1250, 1, 2, dtype=F64))
    prob = ct.ODEProblem(kind, torch.zeros(1, 3, dtype=F64), control.support, control)
    with pytest.warns(RuntimeWarning, match="UNSTABLE"):
        result = ct.sensitivity_jvp(prob, ct.Euler(4.0), direction={"h0": torch.ones(1, 3, dtype=F64)})
    assert result.solution.retcode is ct.ReturnCode.UNSTABLE
    assert torch.isfinite(result.tangent).all()
    assert 100 < len(result.tangent) < 1250


SIZES = [0.7, 0.5, 0.7, 0.4]


def losses(name):
    """A problem with steps of several sizes, and a loss of each of its samples."""
    kind = field(name, tau=1.3, learn_tau=True)
    ts = torch.tensor([0.0, *SIZES], dtype=F64).cumsum(0)
    xs = normal(4, 3, 2, seed=2).requires_grad_()
    prob = ct.ODEProblem(
        kind, 0.5 * normal(3, kind.state_size, seed=3), (0.0, float(ts[-1])), ct.ZeroOrderHold(ts, xs)
    )
    weight = normal(kind.state_size, seed=9)
    loss = ct.Loss(
        terminal=lambda y: (y @ weight).square(), at=([float(ts[2])], lambda k, y: torch.sin(y @ weight))
    )
    return prob, xs, loss, weight


def by_hand(prob, xs, weight, name):
    """The loss of every sample from leaves: parameters, h0, inputs."""
    leaves = {key: value.detach().requires_grad_() for key, value in prob.field.named_parameters()}
    h0, us = prob.h0.clone().requires_grad_(), xs.detach().requires_grad_()
    hs = states(name, prob.field, EULER, leaves, h0, us, SIZES)
    return leaves, h0, us, (hs[-1] @ weight).square() + torch.sin(hs[2] @ weight)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("name", CELLS)
def test_gradients_of_single_samples(name):
    prob, xs, loss, weight = losses(name)
    rows = ct.per_sample_gradients(prob, loss, ct.Euler(DT))
    leaves, _, _, costs = by_hand(prob, xs, weight, name)
    assert rows.keys() == leaves.keys()
    for k, cost in enumerate(costs):
        found = torch.autograd.grad(cost, list(leaves.values()), retain_graph=True)
        for key, row in zip(leaves, found, strict=True):
            assert far(rows[key][k], row) < 1e-12, key


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("call", [1 << 21, 20])
def test_the_adjoint_of_the_map(name, call, monkeypatch):
    """In one piece, and in pieces of some steps."""
    monkeypatch.setattr(reverse_map, "_CALL", call)
    prob, xs, loss, weight = losses(name)
    flow = ct.adjoint(ct.solve(prob, ct.Euler(DT)), loss)
    leaves, h0, us, costs = by_hand(prob, xs, weight, name)
    by_h0, by_us, *found = torch.autograd.grad(costs.sum(), [h0, us, *leaves.values()])
    assert far(flow.initial, by_h0) < 1e-12
    assert far(flow.control[0], by_us) < 1e-12
    assert flow.gradient.keys() == leaves.keys()
    for key, row in zip(leaves, found, strict=True):
        assert far(flow.gradient[key], row) < 1e-12, key


@pytest.mark.parametrize("numbers", [1, 300, 1 << 18])
@pytest.mark.parametrize(("keep", "widths"), [(6, (5, 2, 1)), (3, (17,)), (2, (3, 0))])
def test_products_of_groups(keep, widths, numbers, monkeypatch):
    """All groups at once, and one or some of them at a time; sums of 8 to 24 products of numbers around 1."""
    monkeypatch.setattr(fused_cell, "_GROUPED", numbers)
    pre = normal(4, 6, 14, seed=1)[..., :9]
    seen = [normal(4, 6, width, seed=2 + width) for width in widths]
    found = fused_cell.outer_by_group(pre, seen, keep, ones=1)
    for x, own in zip([*seen, torch.ones(4, 6, 1, dtype=F64)], found, strict=True):
        groups = (y.unflatten(1, (keep, -1)) for y in (pre, x))
        torch.testing.assert_close(own, torch.einsum("tksi,tksj->kij", *groups), rtol=0.0, atol=1e-13)
        assert own.is_contiguous()


def test_gradients_of_single_samples_in_float32():
    """Four steps and products of 17 units: 1e-5 of the largest entry."""
    rows = {}
    for dtype in (F64, torch.float32):
        kind = field("GRU-after", hidden=17, dtype=dtype)
        control = ct.ZeroOrderHold(torch.arange(5.0, dtype=F64), normal(4, 3, 2, seed=2, dtype=dtype))
        prob = ct.ODEProblem(kind, normal(3, 17, seed=3, dtype=dtype), (0.0, 4.0), control)
        rows[dtype] = ct.per_sample_gradients(prob, ct.Loss(terminal=lambda y: y.sum(-1)), ct.Euler(1.0))
    for key, row in rows[torch.float32].items():
        assert row.dtype == torch.float32
        assert far(row.double(), rows[F64][key]) < 1e-5
