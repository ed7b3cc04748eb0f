"""Gradients of single samples against a loop of autograd, and their spectrum against numpy."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import ctgate as ct
from ctgate.sensitivity import Loss
from ctgate.sensitivity.per_sample import per_sample_gradients
from ctgate.sensitivity.reverse_map import pull_back
from tests.typechecker import unchecked

SAMPLES, STEPS, INPUT, HIDDEN = 4, 7, 2, 3
FIELDS = [ct.Leaky, ct.ScalarGate, ct.MultiGate, ct.GRU, ct.LSTM, ct.LTC]
F64 = torch.float64


def normal(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Driven(nn.Module):
    """A user's function that reads the time, as a module."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(HIDDEN, HIDDEN + INPUT, seed=8))

    def forward(self, t, h, u):
        return torch.tanh(torch.cat([h, u], -1) @ self.weight.T) * (1.0 + 0.3 * t) - h


def make(kind, tau=0.5):
    generator = torch.Generator().manual_seed(1)
    if kind is ct.Field:
        return ct.Field(Driven(), state_size=HIDDEN, input_size=INPUT)
    if kind is ct.Stack:
        sizes = ((ct.GRU, INPUT), (ct.MultiGate, HIDDEN))
        return ct.Stack([k(n, HIDDEN, tau=tau, generator=generator, dtype=F64) for k, n in sizes])
    return kind(INPUT, HIDDEN, tau=tau, learn_tau=kind is ct.MultiGate, generator=generator, dtype=F64)


def problem(kind, span=2.0, per_sample=False):
    field = make(kind)
    ts = torch.linspace(0.0, span, STEPS + 1, dtype=F64)
    if per_sample:
        ts = ts[:, None] * torch.tensor([1.0, 0.7, 1.2, 0.4], dtype=F64)
    h0 = 0.3 * normal(SAMPLES, field.state_size, seed=3)
    control = ct.ZeroOrderHold(ts, normal(STEPS, SAMPLES, INPUT, seed=2))
    tspan = control.sample_support if per_sample else (0.0, span)
    return ct.ODEProblem(field, h0, tspan, control)


def losses(field, target, at):
    """The loss of all samples, of some; the readout is theirs together."""
    torch.manual_seed(4)
    hidden = len(range(*field.output.indices(field.state_size)))
    readout = nn.Sequential(nn.Linear(hidden, 3, dtype=F64), nn.Tanh(), nn.Linear(3, 1, dtype=F64))

    def of(samples):
        y = target[samples]
        return Loss(
            terminal=lambda o: (o[..., 0] - y).square(),
            running=lambda t, o: (1.0 + t.reshape(-1)) * o[..., 0].square() * y,
            at=(at, lambda k, o: (k + 1) * torch.sin(o[..., 0]) * y),
            readout=readout,
        )

    return of, readout


def alone(prob, i):
    """The i-th sample's own problem."""
    control, own = prob.control, slice(i, i + 1)
    ts = control.ts if control.shared else control.ts[:, own]
    one = ct.ZeroOrderHold(ts, control.xs[:, own])
    span = prob.tspan if control.shared else one.sample_support
    return ct.ODEProblem(prob.field, prob.h0[own], span, one)


def by_loop(prob, of, readout, alg, **tolerances):
    named = {
        **dict(prob.field.named_parameters()),
        **{f"readout.{name}": p for name, p in readout.named_parameters()},
    }
    rows = []
    for i in range(SAMPLES):
        value = of(slice(i, i + 1))(ct.solve(alone(prob, i), alg, **tolerances))
        rows.append(torch.autograd.grad(value, list(named.values())))
    return {name: torch.stack(row) for name, row in zip(named, zip(*rows, strict=True), strict=True)}


def assert_same(rows, reference, bound):
    assert list(rows) == list(reference)
    for name, row in rows.items():
        assert row.shape == reference[name].shape
        assert (row - reference[name]).abs().max() <= bound * (1.0 + reference[name].abs().max()), name


@pytest.mark.parametrize("kind", [*FIELDS, ct.Stack, ct.Field])
def test_the_reverse_loop_of_euler_gives_each_sample_its_own_gradient(kind):
    prob = problem(kind)
    of, readout = losses(prob.field, normal(SAMPLES, seed=5), prob.control.ts[[2, 5, 7]].tolist())
    alg = ct.Euler(dt=0.2)
    rows = per_sample_gradients(prob, of(slice(None)), alg)
    sol = ct.solve(prob, alg)
    assert len(sol.ts) > STEPS + 1, "steps end at knots too"
    assert_same(rows, by_loop(prob, of, readout, alg), 1e-12)


@pytest.mark.parametrize("alg", [ct.RK4(dt=0.3), ct.ExponentialEuler(dt=0.3), ct.Dopri5(per_sample=True)])
def test_other_methods_give_each_sample_its_own_gradient(alg):
    prob = problem(ct.MultiGate)
    of, readout = losses(prob.field, normal(SAMPLES, seed=5), [0.4, 1.2])
    rows = per_sample_gradients(prob, of(slice(None)), alg)
    assert_same(rows, by_loop(prob, of, readout, alg), 1e-12)


@pytest.mark.parametrize("alg", [ct.Euler(dt=0.2), ct.Dopri5()])
def test_samples_may_have_times_of_their_own(alg):
    prob = problem(ct.GRU, per_sample=True)
    target = normal(SAMPLES, seed=5)
    readout = nn.Linear(HIDDEN, 1, dtype=F64)

    def of(samples):
        y = target[samples]
        return Loss(
            terminal=lambda o: (o[..., 0] - y).square(),
            running=lambda t, o: (t[..., 0] + o[..., 0]).square(),
            readout=readout,
        )

    rows = per_sample_gradients(prob, of(slice(None)), alg)
    assert_same(rows, by_loop(prob, of, readout, alg), 1e-12)


def test_a_long_trajectory_is_taken_in_pieces(monkeypatch):
    prob = problem(ct.GRU)
    of, _ = losses(prob.field, normal(SAMPLES, seed=5), [2.0])
    whole = per_sample_gradients(prob, of(slice(None)), ct.Euler(dt=0.2))
    monkeypatch.setattr(sys.modules[pull_back.__module__], "_CALL", 3 * SAMPLES * HIDDEN)
    assert_same(per_sample_gradients(prob, of(slice(None)), ct.Euler(dt=0.2)), whole, 1e-14)


@pytest.fixture(scope="module")
def gru():
    """torch.nn.GRU on a batch, its field, a loss of both, and the rows by torch alone."""
    torch.manual_seed(0)
    module = nn.GRU(INPUT, HIDDEN, dtype=F64)
    readout = nn.Linear(HIDDEN, 1, dtype=F64)
    x, y = normal(STEPS, SAMPLES, INPUT, seed=6), normal(SAMPLES, seed=7)
    rows = []
    for i in range(SAMPLES):
        out = module(x[:, i : i + 1])[0][-1, 0]
        grads = torch.autograd.grad(
            (readout(out)[0] - y[i]).square(), [*module.parameters(), *readout.parameters()]
        )
        rows.append(torch.cat([grad.flatten() for grad in grads]).numpy())
    loss = Loss(terminal=lambda o: (o[..., 0] - y).square(), readout=readout)
    return ct.GRU.from_torch(module), loss, x, np.stack(rows)


def expected(g, v, scale):
    sigma = np.linalg.svd(g / scale, compute_uv=False)
    directions = np.linalg.svd(g, full_matrices=False)[2]
    matrix = (g / scale).T @ (g / scale)
    rank = np.linalg.matrix_rank(g)
    left = np.linalg.svd(g / (np.sqrt(v) + 1e-8), compute_uv=False)

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    return {
        "singular_value": sigma,
        "concentration": np.cumsum(sigma**2) / np.trace(matrix),
        "anisotropy": sigma[0] / sigma[rank - 1],
        "numerical_rank": rank,
        "participation_ratio": np.trace(matrix) ** 2 / np.trace(matrix @ matrix),
        "adam_alignment": cosine(np.diag(matrix), v),
        "adam_direction_alignment": [
            cosine(d**2, v) if k < rank else np.nan for k, d in enumerate(directions)
        ],
        "diagonality": np.linalg.norm(np.diag(matrix)) / np.linalg.norm(matrix),
        "adam_anisotropy": left[0] / left[rank - 1],
    }


def assert_described(data, g, v):
    spread = g - g.mean(0)
    for moment, part, scale in (
        ("second", g, np.sqrt(len(g))), ("covariance", spread, np.sqrt(len(g) - 1)),
    ):  # fmt: skip
        for name, value in expected(part, v, scale).items():
            found = data[name].sel(moment=moment).values
            np.testing.assert_allclose(found, value, rtol=1e-10, atol=1e-12, err_msg=f"{moment} {name}")
    norm = np.linalg.norm(g.mean(0))
    noise = np.trace(np.cov(g.T)) / len(g)
    np.testing.assert_allclose(data["mean_norm"], norm, rtol=1e-12)
    np.testing.assert_allclose(data["signal_to_noise"], norm / np.sqrt(noise), rtol=1e-12)


def test_the_spectrum_is_that_of_torch_s_gradients_by_numpy(gru):
    field, loss, x, g = gru
    data = ct.gradient_covariance(field, loss, x)
    assert_described(data, g, (g**2).mean(0))
    assert data.attrs["adam_diagonal"] == "mean of squares in this batch"
    assert data.sizes["block"] == 6
    first = data["block_energy"].sel(moment="second", block="weight_ih")
    np.testing.assert_allclose(first, (g[:, : 9 * INPUT] ** 2).sum() / (g**2).sum(), rtol=1e-12)
    for name, variable in data.variables.items():
        assert name in data.coords or {"long_name", "units"} <= set(variable.attrs)


def test_without_alg_a_tensor_is_held_for_one_tau_each(gru):
    field, loss, x, g = gru
    control = ct.ZeroOrderHold(torch.arange(STEPS + 1.0, dtype=F64), x)
    h0 = torch.zeros(HIDDEN, dtype=F64)
    for data in (
        ct.gradient_covariance(field, loss, control, h0=h0),
        ct.gradient_covariance(field, loss, x, ct.Euler(dt=1.0), h0=h0.expand(SAMPLES, HIDDEN)),
    ):
        assert_described(data, g, (g**2).mean(0))


def test_the_diagonal_is_adam_s_own_where_its_state_is_given(gru):
    field, loss, x, g = gru
    optimizer = torch.optim.Adam([*field.parameters(), *loss.readout.parameters()], lr=1e-300)
    second = np.zeros(g.shape[1])
    for k in range(3):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = normal(*parameter.shape, seed=20 + k)
        flat = np.concatenate([p.grad.flatten().numpy() for p in optimizer.param_groups[0]["params"]])
        second = 0.999 * second + 0.001 * flat**2
        optimizer.step()
    data = ct.gradient_covariance(field, loss, x, optimizer_state=optimizer)
    assert_described(data, g, second / (1.0 - 0.999**3))
    assert data.attrs["adam_diagonal"] == "exp_avg_sq of Adam"
    names = [*dict(field.named_parameters()), "readout.weight", "readout.bias"]
    parameters = optimizer.param_groups[0]["params"]
    state = {name: optimizer.state[p]["exp_avg_sq"] for name, p in zip(names, parameters, strict=True)}
    assert_described(ct.gradient_covariance(field, loss, x, optimizer_state=state), g, second)


def test_float32_in_float32_out(gru):
    field, loss, x, g = gru
    single = ct.GRU.from_torch(field.to_torch().float())
    readout = nn.Linear(HIDDEN, 1)
    with torch.no_grad():
        for target, source in zip(readout.parameters(), loss.readout.parameters(), strict=True):
            target.copy_(source)
    y = normal(SAMPLES, seed=7).float()
    data = ct.gradient_covariance(
        single, Loss(terminal=lambda o: (o[..., 0] - y).square(), readout=readout), x.float()
    )
    assert data["singular_value"].dtype == np.float32
    sigma = np.linalg.svd(g, compute_uv=False) / np.sqrt(SAMPLES)
    np.testing.assert_allclose(data["singular_value"][0], sigma, rtol=1e-4)


def test_what_does_not_fit_is_named(gru):
    field, loss, x, _ = gru
    covariance = unchecked(ct.gradient_covariance)
    with pytest.raises(ValueError, match=r"terminal=.*returned \(\).*one number per sample, \(4,\)"):
        covariance(field, Loss(terminal=lambda h: h.sum()), x)
    with pytest.raises(ValueError, match="1 sample; a spread needs two"):
        covariance(field, Loss(terminal=lambda h: h.sum(-1)), x[:, :1])
    with pytest.raises(ValueError, match=r"t = 0\.5, between two steps of Euler"):
        covariance(field, Loss(at=([0.5], lambda k, h: h.sum(-1))), x)
    with pytest.raises(ValueError, match="which gradients do not pass"):
        covariance(field, loss, x, ct.LSODA())
    with pytest.raises(ValueError, match="SGD has no exp_avg_sq for 'weight_ih'"):
        covariance(field, loss, x, optimizer_state=torch.optim.SGD(field.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="'weight_ih' is missing"):
        covariance(field, loss, x, optimizer_state={})
    with pytest.raises(TypeError, match="batch is list"):
        covariance(field, loss, [1.0])
    with pytest.raises(TypeError, match="field is GRU; it must be a ctgate field"):
        covariance(nn.GRU(1, 1), loss, x)
    with pytest.raises(ValueError, match=r"it must be \(time, sample, channel\)"):
        covariance(field, loss, x[0])
    with pytest.raises(TypeError, match="optimizer_state is int; it must be an Adam"):
        covariance(field, loss, x, optimizer_state=3)
    with pytest.raises(ValueError, match="'weight_ih' is float"):
        covariance(field, loss, x, optimizer_state={"weight_ih": 1.0})
    with pytest.raises(TypeError, match="h0 is list"):
        covariance(field, loss, x, h0=[0.0])
    with pytest.raises(ValueError, match=r"h0 has shape \(1, 4, 3\)"):
        covariance(field, loss, x, h0=torch.zeros(1, SAMPLES, HIDDEN, dtype=F64))
    uneven = ct.Stack([make(ct.GRU), ct.MultiGate(HIDDEN, HIDDEN, tau=0.25, dtype=F64)])
    with pytest.raises(ValueError, match=r"Stack has the tau 0\.5, 0\.25"):
        covariance(uneven, loss, x)
    with pytest.raises(ValueError, match=r"GRU has the tau \[1\.0, 2\.0, 3\.0\]"):
        covariance(make(ct.GRU, tau=torch.tensor([1.0, 2.0, 3.0], dtype=F64)), loss, x)
    with pytest.raises(ValueError, match="Field has no tau"):
        covariance(make(ct.Field), loss, x)
    endless, h0 = ct.FunctionControl(lambda t: x[0]), torch.zeros(SAMPLES, HIDDEN, dtype=F64)
    with pytest.raises(ValueError, match="without an end"):
        covariance(field, loss, endless, h0=h0)
    random = nn.Sequential(nn.Dropout(), nn.Linear(HIDDEN, 1, dtype=F64))
    with pytest.raises(TypeError, match="vmap, which does not pass through Sequential"):
        covariance(field, Loss(terminal=lambda o: o[..., 0], readout=random), x)
    field.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the field or of the readout requires grad"):
        covariance(field, Loss(terminal=lambda h: h.sum(-1)), x)
    field.requires_grad_(True)
