"""Samples with times, spans and lengths of their own, against each of them solved alone."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import ctgate as ct

KINDS = [ct.ZeroOrderHold, ct.LinearInterpolation, ct.CubicHermite]
UNITS, CHANNELS = 4, 2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def ragged(samples: int, seed: int = 1) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Irregular times of 2 to 7 observations, on spans that begin and end anywhere, and their values."""
    chance = np.random.default_rng(seed)
    times, values = [], []
    for number in range(samples):
        count = 2 + number % 6
        gaps = torch.as_tensor(chance.uniform(0.1, 0.9, count))
        times.append(float(chance.uniform(-2.0, 2.0)) + gaps.cumsum(0))
        values.append(torch.as_tensor(chance.normal(size=(count, CHANNELS))))
    return times, values


def gru(seed: int = 2) -> ct.GRU:
    return ct.GRU(CHANNELS, UNITS, tau=0.7, learn_tau=True, generator=generator(seed), dtype=torch.float64)


def together(field, times, values, h0, kind, alg, **options) -> ct.Solution:
    control = ct.from_sequences(times, values, kind)
    return ct.solve(ct.ODEProblem(field, h0, control.sample_support, control), alg, **options)


def alone(field, t, x, h0, kind, alg, **options) -> ct.Solution:
    """One sample on the clock that a batch of one shares."""
    control = kind(t.detach(), x[:, None])
    low, high = control.support
    return ct.solve(ct.ODEProblem(field, h0[None], (low, high), control), alg, **options)


@pytest.mark.parametrize(("kind", "every"), [(KINDS[0], 1), (KINDS[1], 9), (KINDS[2], 9)])
def test_64_samples_are_64_solves(kind, every):
    """States within 10 x tolerance, final ones and inside, and gradients to 1e-8."""
    times, values = ragged(64)
    values = [value.requires_grad_() for value in values]
    h0 = draw(64, UNITS).requires_grad_()
    field = gru()
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    sol = together(field, times, values, h0, kind, ct.Dopri5(), **tolerance)
    assert sol.retcode is ct.ReturnCode.SUCCESS
    assert sol.retcodes.shape == (64,)
    shared = list(field.parameters())
    weight = draw(UNITS, seed=5)
    loss = (sol.hs[-1, ::every] @ weight).sum()
    grads = torch.autograd.grad(loss, [*shared, h0, *values], materialize_grads=True, retain_graph=True)
    total = [torch.zeros_like(parameter) for parameter in shared]
    inside = torch.stack([torch.lerp(t0, t1, 0.37) for t0, t1 in zip(*sol.prob.tspan, strict=True)]).detach()
    with torch.no_grad():
        middle = sol(inside[None])[0]
    for i in range(0, 64, every):
        one = alone(field, times[i], values[i], h0[i], kind, ct.Dopri5(), **tolerance)
        assert (sol.hs[-1, i] - one.hs[-1, 0]).abs().max() <= 1e-5
        own = torch.autograd.grad(one.hs[-1, 0] @ weight, [*shared, h0, values[i]])
        for k in range(len(shared)):
            total[k] += own[k]
        assert (grads[len(shared)][i] - own[-2][i]).abs().max() <= 1e-8
        assert (grads[len(shared) + 1 + i] - own[-1]).abs().max() <= 1e-8
        with torch.no_grad():
            assert (middle[i] - one(inside[i].item())[0]).abs().max() <= 1e-5
    for mine, summed in zip(grads, total, strict=False):
        assert (mine - summed).abs().max() <= 1e-8 * summed.abs().max()


def numpy_gru(field: ct.GRU):
    w, u, b, c = (
        part.detach().numpy() for part in (field.weight_hh, field.weight_ih, field.bias_hh, field.bias_ih)
    )
    tau = field.tau.item()

    def rhs(x, h):
        own, into = w @ h + b, u @ x + c
        r, z = (1 / (1 + np.exp(-(own + into)[k * UNITS : (k + 1) * UNITS])) for k in (0, 1))
        n = np.tanh(into[2 * UNITS :] + r * own[2 * UNITS :])
        return (1 - z) * (n - h) / tau

    return rhs


@pytest.mark.parametrize("alg", [ct.Bosh3(), ct.Dopri5(), ct.Tsit5(), ct.Rosenbrock23()])
def test_against_scipy(alg):
    """Held inputs, piece by piece, with gates written in numpy."""
    times, values = ragged(6)
    field, h0 = gru(), draw(6, UNITS)
    rhs = numpy_gru(field)
    tolerance = 1e-4 if isinstance(alg, ct.Rosenbrock23) else 1e-6
    with torch.no_grad():
        sol = together(field, times, values, h0, ct.ZeroOrderHold, alg, rtol=tolerance, atol=tolerance)
    for i, (t, x) in enumerate(zip(times, values, strict=True)):
        h = h0[i].numpy()
        edges = [*t.tolist(), 2 * float(t[-1]) - float(t[-2])]
        for k in range(len(t)):
            piece = solve_ivp(
                lambda s, y, k=k, x=x: rhs(x[k].numpy(), y),
                edges[k : k + 2],
                h,
                method="DOP853",
                rtol=1e-12,
                atol=1e-12,
            )
            h = piece.y[:, -1]
        assert np.abs(sol.hs[-1, i].numpy() - h).max() <= 10 * tolerance


@pytest.mark.parametrize(
    ("kind", "alg"),
    [
        *((kind, ct.Dopri5()) for kind in KINDS),
        (ct.LinearInterpolation, ct.Tsit5()),
        (ct.ZeroOrderHold, ct.RK4(dt=0.11)),
        (ct.CubicHermite, ct.RK4(dt=0.11)),
    ],
)
def test_gradients_are_finite_differences(kind, alg):
    """With respect to values, times (spans move along), h0, tau and weights: directional derivatives."""
    times, values = ragged(3)
    field = gru()
    parts = {
        "values": [value.clone() for value in values],
        "times": [time.clone() for time in times],
        "h0": [draw(3, UNITS)],
        "tau": [field.log_tau.detach().clone()],
        "weights": [field.weight_hh.detach().clone(), field.bias_ih.detach().clone()],
    }
    weight = draw(UNITS, seed=6)
    options = {} if isinstance(alg, ct.RK4) else {"rtol": 1e-10, "atol": 1e-10}

    def loss(parts):
        control = ct.from_sequences(parts["times"], parts["values"], kind)
        parameters = {
            "log_tau": parts["tau"][0],
            "weight_hh": parts["weights"][0],
            "bias_ih": parts["weights"][1],
        }
        low, high = control.sample_support
        prob = ct.ODEProblem(field, parts["h0"][0], (low, high), control, parameters)
        saves = torch.stack([torch.lerp(low, high, 0.3), high])
        sol = ct.solve(prob, alg, saveat=saves, **options)
        return (sol.hs @ weight).square().sum()

    for tensors in parts.values():
        for tensor in tensors:
            tensor.requires_grad_()
    flat = [tensor for tensors in parts.values() for tensor in tensors]
    grads = iter(torch.autograd.grad(loss(parts), flat))
    # Fixed steps have a kink where a step count changes: the direction stays well inside.
    eps = 1e-3
    for name, tensors in parts.items():
        directions = [
            torch.sin(7.0 * torch.arange(t.numel(), dtype=t.dtype)).reshape(t.shape) for t in tensors
        ]
        if name == "tau":
            directions = [torch.ones_like(tensors[0])]
        mine = sum(float((next(grads) * d).sum()) for d in directions)

        def moved(step, name=name, tensors=tensors, directions=directions):
            shifted = [(t + step * d).detach() for t, d in zip(tensors, directions, strict=True)]
            with torch.no_grad():
                return float(loss({**parts, name: shifted}))

        near, far = moved(eps) - moved(-eps), moved(2 * eps) - moved(-2 * eps)
        reference = (8.0 * near - far) / (12.0 * eps)
        assert mine == pytest.approx(reference, rel=1e-6, abs=1e-6), name


def test_gradients_of_spans_and_saved_times():
    """d h(t) / d t = dh/dt, for the end of the span and for a saved time; sooner is the opposite of later."""
    field, h0 = gru(), draw(3, UNITS)
    ts = torch.linspace(0.0, 4.0, 9, dtype=torch.float64)
    control = ct.LinearInterpolation(ts, draw(9, 3, CHANNELS))
    start = torch.tensor([0.0, 0.3, 1.1], dtype=torch.float64, requires_grad=True)
    stop = torch.tensor([2.0, 3.3, 1.9], dtype=torch.float64, requires_grad=True)
    saves = torch.tensor([[0.5, 0.9, 1.5]], dtype=torch.float64, requires_grad=True)
    prob = ct.ODEProblem(field, h0, (start, stop), control)
    sol = ct.solve(prob, ct.Dopri5(), rtol=1e-11, atol=1e-11)
    (by_stop,) = torch.autograd.grad(sol.hs[-1].sum(), stop, retain_graph=True)
    slope = field(0.0, sol.hs[-1], control(stop[None])[0]).sum(-1)
    assert (by_stop - slope).abs().max() <= 1e-8
    saved = ct.solve(prob, ct.Dopri5(), rtol=1e-11, atol=1e-11, saveat=saves)
    (by_save,) = torch.autograd.grad(saved.hs.sum(), saves, retain_graph=True)
    slope = field(0.0, saved.hs[0], control(saves)[0]).sum(-1)
    assert (by_save[0] - slope).abs().max() <= 1e-6
    # One scalar that all samples share is per sample too, and its gradient is the sum.
    end = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    shared = ct.solve(ct.ODEProblem(field, h0, (0.0, end), control), ct.Dopri5(), rtol=1e-11, atol=1e-11)
    (by_end,) = torch.autograd.grad(shared.hs[-1].sum(), end)
    slope = field(0.0, shared.hs[-1], control(2.0)).sum()
    assert float(by_end) == pytest.approx(slope.item(), abs=1e-8)


class Quadratic(torch.nn.Module):
    """dh/dt = w h^2 - h: blows up in finite time from h > 1/w, decays below."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, t, h, u):
        return self.w * h * h - h


PER_SAMPLE = [
    ct.Dopri5(per_sample=True),
    ct.Bosh3(per_sample=True),
    ct.Rosenbrock23(per_sample=True),
    ct.RK4(dt=0.1),
    ct.ExponentialMidpoint(dt=0.1),
]


@pytest.mark.parametrize("alg", PER_SAMPLE)
@pytest.mark.parametrize("saveat", [None, [0.0, 0.7, 2.9, 3.0]])
def test_a_sample_that_diverges_leaves_the_others_alone(alg, saveat):
    quiet = torch.tensor([[0.1, 0.2], [0.5, -1.0], [0.7, 0.3]], dtype=torch.float64)
    field = ct.Field(Quadratic())
    span = (torch.zeros(3, dtype=torch.float64), torch.full((3,), 3.0, dtype=torch.float64))

    # A blow-up takes a method of low order many steps.
    tolerance = 1e-6 if isinstance(alg, ct.Dopri5) else 1e-3
    options = {"rtol": tolerance, "atol": tolerance} if alg.adaptive else {}

    def run(h0):
        start = h0.clone().requires_grad_()
        return ct.solve(ct.ODEProblem(field, start, span), alg, saveat=saveat, **options), start

    calm, calm_start = run(quiet)
    assert calm.retcode is ct.ReturnCode.SUCCESS
    wild = quiet.clone()
    wild[1] = torch.tensor([5.0, 9.0])
    with pytest.warns(RuntimeWarning, match=r"1 of 3 samples; the first: .*worst is unit 1 of .* \(1,\)"):
        sol, start = run(wild)
    assert sol.retcode in (ct.ReturnCode.UNSTABLE, ct.ReturnCode.DT_UNDERFLOW)
    assert [code.good for code in sol.retcodes] == [True, False, True]
    keep = [0, 2]
    last, reference = sol.hs[-1, keep], calm.hs[-1, keep]
    assert (last - reference).abs().max() <= 1e-14
    # Gradients too: nothing that is not finite comes from the sample that failed.
    mine = torch.autograd.grad(last.square().sum(), [start, field.fn.w])
    theirs = torch.autograd.grad(reference.square().sum(), [calm_start, field.fn.w])
    assert bool((mine[0][1] == 0).all())
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-13 * b.abs().max()
    if saveat is None:
        # The good part: finite, up to the time that it reached, where it stands still.
        assert bool(torch.isfinite(sol.hs).all())
        assert float(sol.ts[-1, 1]) <= 0.5
    else:
        assert sol.ts.tolist() == saveat
        assert torch.equal(sol.hs[0], wild)
        assert bool(sol.hs[1:, 1].isnan().all())
        assert not bool(sol.hs[:, keep].isnan().any())


def test_what_else_is_in_the_batch_does_not_matter():
    """Steps and results of a sample are its own: bit for bit the same in any company of one size."""
    times, values = ragged(6)
    field, h0 = gru(), draw(6, UNITS)
    with torch.no_grad():
        first = together(field, times, values, h0, ct.ZeroOrderHold, ct.Dopri5())
        order = [3, 5, 0, 1, 2, 4]
        second = together(
            field,
            [times[i] for i in order],
            [values[i] for i in order],
            h0[order],
            ct.ZeroOrderHold,
            ct.Dopri5(),
        )
    assert first.stats.accepted == second.stats.accepted
    assert (first.hs[-1, order] - second.hs[-1]).abs().max() <= 1e-14


@pytest.mark.parametrize("samples", [1, UNITS, CHANNELS])
def test_ragged_sequences_through_the_discrete_cell(samples):
    """Euler at dt = tau on each sample's own edges is torch.nn.GRU on each sequence, where the batch has as
    many samples as there are units, or channels, or times."""
    torch_gru = torch.nn.GRU(CHANNELS, UNITS).double()
    field = ct.GRU.from_torch(torch_gru, tau=0.25)
    sequences = [draw(length, CHANNELS, seed=length) for length in range(1, samples + 1)]
    times = [1.5 * i + 0.25 * torch.arange(len(x) + 1, dtype=torch.float64) for i, x in enumerate(sequences)]
    control = ct.from_sequences(times, sequences)
    with torch.no_grad():
        prob = ct.ODEProblem(field, field.initial_state((samples,)), control.sample_support, control)
        sol = ct.solve(prob, ct.Euler(dt=0.25))
        for i, x in enumerate(sequences):
            outputs, last = torch_gru(x)
            assert (sol.hs[1 : len(x) + 1, i] - outputs).abs().max() <= 1e-14
            assert (sol.hs[-1, i] - last[0]).abs().max() <= 1e-14
            assert sol.ts[len(x) :, i].tolist() == [float(times[i][-1])] * (samples - len(x) + 1)


def test_saved_times_per_sample():
    times, values = ragged(3)
    field, h0 = gru(), draw(3, UNITS)
    control = ct.from_sequences(times, values, ct.LinearInterpolation)
    low, high = control.sample_support
    saves = torch.stack([low, torch.lerp(low, high, 0.4), high])
    saves[2, 1] = torch.nan
    prob = ct.ODEProblem(field, h0, (low, high), control)
    with torch.no_grad():
        sol = ct.solve(prob, ct.Dopri5(), saveat=saves)
        every = ct.solve(prob, ct.Dopri5())
    assert torch.equal(sol.hs[0], h0)
    assert bool(sol.hs[2, 1].isnan().all())
    assert torch.allclose(sol.hs[2, [0, 2]], every.hs[-1, [0, 2]], rtol=0, atol=1e-14)
    assert torch.allclose(sol.hs[1], every(saves[1:2])[0], rtol=0, atol=1e-14)
    # A shared clock may be asked for times per sample as well.
    shared = ct.ODEProblem(field, h0, (0.0, 2.0), ct.ZeroOrderHold(torch.arange(3.0), draw(2, 3, CHANNELS)))
    asked = torch.tensor([[0.0, 0.5, 1.0], [0.7, 1.9, 2.0]], dtype=torch.float64)
    with torch.no_grad():
        sol = ct.solve(shared, ct.Dopri5(), saveat=asked)
        dense = ct.solve(shared, ct.Dopri5())
    for k in range(2):
        for i in range(3):
            assert torch.allclose(sol.hs[k, i], dense(float(asked[k, i]))[i], rtol=0, atol=1e-14)


def test_solution_between_the_nodes_of_each_sample():
    times, values = ragged(4)
    field, h0 = gru(), draw(4, UNITS)
    with torch.no_grad():
        sol = together(field, times, values, h0, ct.ZeroOrderHold, ct.Dopri5(), rtol=1e-8, atol=1e-8)
        fine = together(field, times, values, h0, ct.ZeroOrderHold, ct.Dopri5(), rtol=1e-12, atol=1e-12)
    low, high = sol.dense.span
    inside = torch.stack([torch.lerp(low, high, w) for w in torch.linspace(0, 1, 23, dtype=torch.float64)])
    assert (sol(inside) - fine(inside)).abs().max() <= 1e-7
    first = int(low.argmax())
    with pytest.raises(ValueError, match=r"sol\(t\): t is .*must be in \[.*\] for sample"):
        sol(float(low.max()) - 0.5)
    with pytest.raises(ValueError, match=r"t has shape \(2, 3\)"):
        sol(torch.zeros(2, 3))
    assert torch.equal(sol(low[None])[0, first], h0[first])


def test_limits_per_sample():
    times, values = ragged(4)
    field, h0 = gru(), draw(4, UNITS)
    with pytest.warns(RuntimeWarning, match=r"solve ended with MAX_STEPS: \d of 4 samples"):
        sol = together(field, times, values, h0, ct.ZeroOrderHold, ct.Dopri5(), max_steps=14)
    enough = [code is ct.ReturnCode.SUCCESS for code in sol.retcodes]
    assert any(enough)
    assert not all(enough)
    reached = sol.ts[-1] >= sol.prob.tspan[1] - 1e-12
    assert reached.tolist() == enough
    with pytest.warns(RuntimeWarning, match=r"2 steps were taken and t = "):
        sol = together(field, times, values, h0, ct.ZeroOrderHold, ct.RK4(dt=0.3), max_steps=2)
    assert len(sol.ts) == 3
    with pytest.raises(ct.SolveError, match="samples"):
        together(field, times, values, h0, ct.ZeroOrderHold, ct.Dopri5(), max_steps=14, throw=True)


@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.RK4(dt=0.2)])
def test_callbacks_see_all_samples_and_may_end(alg):
    times, values = ragged(4)
    field, h0 = gru(), draw(4, UNITS)
    seen = []

    def watch(t, h):
        seen.append((t.clone(), h.clone()))
        return len(seen) == 3

    with torch.no_grad():
        sol = together(field, times, values, h0, ct.ZeroOrderHold, alg, callback=watch)
    assert sol.retcode is ct.ReturnCode.TERMINATED
    assert len(seen) == 3
    assert torch.equal(sol.ts[-1], seen[-1][0])
    assert torch.equal(sol.hs[-1], seen[-1][1])

    def impatient(t, h):
        raise KeyboardInterrupt

    with pytest.warns(RuntimeWarning, match="INTERRUPTED"):
        sol = together(field, times, values, h0, ct.ZeroOrderHold, alg, callback=impatient)
    assert ct.ReturnCode.INTERRUPTED in sol.retcodes
    assert bool(torch.isfinite(sol.hs).all())


@pytest.mark.parametrize("alg", [*PER_SAMPLE, ct.Radau(), ct.LSODA()])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_any_batch_shape(alg, batch):
    """Spans per sample, one of them without length."""
    field = ct.Field(lambda t, h, u: -h + torch.cos(t))
    h0 = draw(*batch, 2)
    start = torch.zeros(batch, dtype=torch.float64)
    stop = torch.linspace(0.0, 1.0, max(start.numel(), 2), dtype=torch.float64)[-max(start.numel(), 1) :]
    stop = stop[: start.numel()].reshape(batch)
    with torch.no_grad():
        sol = ct.solve(ct.ODEProblem(field, h0, (start, stop)), alg)
        assert sol.retcode is ct.ReturnCode.SUCCESS
        assert sol.hs.shape[1:] == h0.shape
        exact = (h0 - 0.5) * torch.exp(-stop)[..., None] + 0.5 * (torch.cos(stop) + torch.sin(stop))[
            ..., None
        ]
        if h0.numel():
            assert (sol.hs[-1] - exact).abs().max() <= 2e-3
            assert torch.allclose(sol.ts[-1], stop, rtol=0, atol=1e-12)


def test_float32_states_on_float64_times():
    """Late times per sample do not lose their digits in float32 states."""
    field = ct.Leaky(1, 2, generator=generator(), dtype=torch.float32)
    offsets = torch.tensor([0.0, 1e6, 3.3e7], dtype=torch.float64)
    grid = torch.tensor([0.0, 0.25, 1.0, 1.5], dtype=torch.float64)
    control = ct.ZeroOrderHold(grid[:, None] + offsets, torch.ones(3, 1, 1).expand(3, 3, 1))
    h0 = torch.full((3, 2), 0.3)
    with torch.no_grad():
        sol = ct.solve(ct.ODEProblem(field, h0, control.sample_support, control), ct.Dopri5())
    assert sol.hs.dtype is torch.float32
    assert (sol.hs[-1] - sol.hs[-1, :1]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("alg", "options", "message"),
    [
        (ct.Dopri8(), {}, r"alg is Dopri8.*one batch on one clock: use Dopri5"),
        (
            ct.Dopri5(per_sample=False),
            {},
            r"samples have times of their own; per_sample must be True or None",
        ),
        (ct.Dopri5(), {"sensealg": ct.BacksolveAdjoint()}, r"BacksolveAdjoint\(\) and samples take steps"),
        (ct.Dopri5(), {"saveat": [0.5, torch.nan]}, "saveat has NaN among times for all samples"),
        (
            ct.Dopri5(),
            {"saveat": [[0.1, 0.2, 0.3]]},
            r"saveat has shape \(1, 3\); .*\(time, \*batch\).*\(2,\)",
        ),
        (ct.Dopri5(), {"saveat": [[0.5, 0.5], [0.4, 0.6]]}, r"saveat\[1, 0\] is 0.4 after 0.5"),
        (ct.Dopri5(), {"saveat": [[0.5, torch.nan], [0.6, 0.7]]}, r"saveat\[1, 1\] is 0.7 after nan"),
        (
            ct.Dopri5(),
            {"saveat": [[0.5, 7.0]]},
            r"saveat\[0, 1\] is 7.0.*tspan of sample \(1,\), \(0.0, 2.0\)",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(alg, options, message):
    prob = ct.ODEProblem(
        ct.Field(lambda t, h, u: -h), torch.ones(2, 1).double(), (0.0, torch.tensor([1.0, 2.0]))
    )
    with pytest.raises(ValueError, match=message):
        ct.solve(prob, alg, **options)


@pytest.mark.parametrize("alg", [ct.Radau(), ct.BDF(), ct.LSODA()])
def test_no_gradient_passes_through_scipy(alg):
    field, control = gru(), ct.ZeroOrderHold(torch.arange(3.0), torch.zeros(2, CHANNELS).double())
    h0 = torch.zeros(2, UNITS, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"weight_ih requires grad; no gradient passes.*Rosenbrock23"):
        ct.solve(ct.ODEProblem(field, h0, (0.0, 2.0), control), alg)
    captured = torch.ones(1, dtype=torch.float64, requires_grad=True)
    plain = ct.Field(lambda t, h, u: -captured * h)
    with pytest.raises(ValueError, match="a tensor that the field captures requires grad"):
        ct.solve(ct.ODEProblem(plain, h0, (0.0, 2.0)), alg)
    with pytest.raises(ValueError, match="h0 requires grad"):
        ct.solve(ct.ODEProblem(ct.Field(lambda t, h, u: -h), h0.clone().requires_grad_(), (0.0, 2.0)), alg)
    with torch.no_grad():
        assert ct.solve(ct.ODEProblem(field, h0, (0.0, 2.0), control), alg).stats.engine == "scipy"
    # Nothing asks for a gradient: nothing to refuse.
    sol = ct.solve(ct.ODEProblem(ct.Field(lambda t, h, u: -h), h0, (0.0, 2.0)), alg)
    assert not sol.hs.requires_grad


@pytest.mark.parametrize(
    ("saves", "span", "knots"), [(True, False, False), (False, True, False), (False, False, True)]
)
def test_no_gradient_of_times_passes_through_scipy(saves, span, knots):
    field = ct.Field(lambda t, h, u: u - h)
    ts = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64, requires_grad=knots)
    stop = torch.tensor([2.0], dtype=torch.float64, requires_grad=span)
    control = ct.ZeroOrderHold(ts, torch.ones(2, 1, 1, dtype=torch.float64))
    prob = ct.ODEProblem(field, torch.zeros(1, 1, dtype=torch.float64), (0.0, stop), control)
    saveat = torch.tensor([[1.5]], dtype=torch.float64, requires_grad=saves)
    with pytest.raises(ValueError, match="a time of tspan, saveat or the control requires grad"):
        ct.solve(prob, ct.Radau(), saveat=saveat)


@pytest.mark.parametrize("alg", [ct.Dopri5(), ct.Tsit5(per_sample=True), ct.Rosenbrock23(), ct.RK4(dt=0.1)])
def test_forward_mode_is_reverse_mode(alg):
    """jvp along parameters, state and the end of the span against gradients; nothing is silently zero."""
    field, h0 = gru(), draw(3, UNITS)
    values = {name: value.detach() for name, value in field.named_parameters()}
    ts = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)
    control = ct.LinearInterpolation(ts, draw(5, 3, CHANNELS))

    def loss(values, h0, stop):
        prob = ct.ODEProblem(field, h0, (0.0, stop), control, values)
        return ct.solve(prob, alg).hs[-1].square().sum()

    def fixed_span(values, h0):
        prob = ct.ODEProblem(field, h0, (0.0, 2.0), control, values)
        return ct.solve(prob, alg, saveat=[0.7, 2.0]).hs.square().sum()

    stop = torch.tensor(1.75, dtype=torch.float64)
    tangents = ({name: torch.sin(value) for name, value in values.items()}, torch.cos(h0))
    for function, primals, along in (
        (loss, (values, h0, stop), (*tangents, torch.ones_like(stop))),
        (fixed_span, (values, h0), tangents),
    ):
        _, tangent = torch.func.jvp(function, primals, along)
        grads = torch.func.grad(function, argnums=tuple(range(len(primals))))(*primals)
        pulled = sum((grads[0][name] * along[0][name]).sum() for name in values)
        pulled += sum((grad * direction).sum() for grad, direction in zip(grads[1:], along[1:], strict=True))
        assert tangent.item() == pytest.approx(pulled.item(), rel=1e-10)
        assert abs(tangent.item()) > 1e-3


def test_vmap_is_refused_where_steps_are_looked_up():
    span = (0.0, torch.tensor([1.0, 2.0], dtype=torch.float64))
    for alg in (ct.Euler(dt=0.1), ct.Dopri5()):

        def last(h0, alg=alg):
            return ct.solve(ct.ODEProblem(ct.Field(lambda t, h, u: -h), h0, span), alg).hs[-1]

        with pytest.raises(TypeError, match=r"torch\.func\.vmap does not pass through .*EnsembleProblem"):
            torch.func.vmap(last)(torch.zeros(3, 2, 1, dtype=torch.float64))


@pytest.mark.parametrize("alg", PER_SAMPLE)
def test_nobody_has_anything_to_do(alg):
    span = (torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    h0 = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    sol = ct.solve(ct.ODEProblem(ct.Field(lambda t, h, u: -h), h0, span), alg)
    assert sol.retcode is ct.ReturnCode.SUCCESS
    assert torch.equal(sol.hs, h0[None])


class Logarithm(torch.nn.Module):
    """dh/dt = -w log h, which is not a number where h is not positive."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t, h, u):
        return -self.w * torch.log(h)


@pytest.mark.parametrize("alg", PER_SAMPLE)
@pytest.mark.parametrize("saveat", [None, [0.5, 1.0]])
@pytest.mark.parametrize("short", [False, True])
def test_a_sample_without_a_derivative_spoils_no_gradient(alg, saveat, short):
    """One that fails in its first step, or that has no time to go anywhere and may be anything."""
    field = ct.Field(Logarithm())
    h0 = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    stop = torch.tensor([1.0, 0.0 if short else 1.0], dtype=torch.float64)
    saves = saveat if saveat is None else torch.tensor([saveat, [torch.nan] * 2], dtype=torch.float64).T
    prob = ct.ODEProblem(field, h0, (torch.zeros(2, dtype=torch.float64), stop))
    if short:
        sol = ct.solve(prob, alg, saveat=saves)
        assert sol.retcode is ct.ReturnCode.SUCCESS
    else:
        with pytest.warns(RuntimeWarning, match="1 of 2 samples"):
            sol = ct.solve(prob, alg, saveat=saves)
    alone = ct.solve(ct.remake(prob, h0=h0[:1], tspan=(stop[:1] - 1.0, stop[:1])), alg, saveat=saveat)
    (mine,) = torch.autograd.grad(sol.hs[-1, 0].sum(), field.fn.w)
    (reference,) = torch.autograd.grad(alone.hs[-1, 0].sum(), field.fn.w)
    assert mine.item() == pytest.approx(reference.item(), rel=1e-12)


def test_saved_times_off_by_rounding_are_the_ends():
    """Times for all samples in float32, the ends of whose span they miss by rounding."""
    grid = torch.linspace(0.0, 0.1, 5, dtype=torch.float64).unsqueeze(1).expand(5, 3)
    control = ct.LinearInterpolation(grid, draw(5, 3, CHANNELS))
    prob = ct.ODEProblem(gru(), draw(3, UNITS), (0.0, 0.1), control)
    saves = torch.tensor([0.0, 0.05, 0.1], dtype=torch.float32)
    with torch.no_grad():
        for alg in (ct.Dopri5(), ct.Radau(), ct.RK4(dt=0.01)):
            sol = ct.solve(prob, alg, saveat=saves)
            assert sol.ts.shape == (3,)
            assert torch.equal(sol.hs[-1], ct.solve(prob, alg).hs[-1])


def test_messages_per_sample():
    h0 = torch.tensor([[0.1], [2.1], [1.1]], dtype=torch.float64)
    prob = ct.ODEProblem(ct.Field(lambda t, h, u: h * h), h0, (0.0, torch.tensor(2.0)))
    with pytest.warns(RuntimeWarning, match="2 of 3"):
        sol = ct.solve(ct.remake(prob, tspan=(0.0, torch.full((3,), 2.0))), ct.Dopri5())
    assert sol.messages[0] == ct.ReturnCode.SUCCESS.message
    # The poles of 1 / (1/h0 - t).
    assert "t = 0.4761" in sol.messages[1]
    assert "t = 0.9090" in sol.messages[2]
