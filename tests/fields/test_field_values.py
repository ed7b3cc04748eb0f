"""Rates, drives and gates against equations written by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctgate.fields import GRU, LSTM, LTC, Field, GatedRate, Leaky, MultiGate, ScalarGate, VectorField


def assert_matches(field, reference, tools, h, u, tau, tolerance):
    rate, drive, gates = reference(tools.numpy(field), h.double().numpy(), u.double().numpy(), tau)
    with torch.no_grad():
        own_rate, own_drive = field.rate_drive(0.0, h, u)
        own_gates = field.gates(0.0, h, u)
        slope = field(0.0, h, u)
        constants = field.time_constants(0.0, h, u)
    for own in (own_rate, own_drive, slope, constants):
        assert own.shape == h.shape
        assert own.dtype == h.dtype
    scale = 1.0 + np.abs(drive).max()
    assert np.abs(own_rate.double().numpy() - rate).max(initial=0) <= tolerance * (1.0 + rate.max(initial=0))
    assert np.abs(own_drive.double().numpy() - drive).max(initial=0) <= tolerance * scale
    wanted = drive - rate * h.double().numpy()
    assert np.abs(slope.double().numpy() - wanted).max(initial=0) <= 4 * tolerance * (
        scale + np.abs(wanted).max()
    )
    awake = rate > 1e-3  # below, 1 - z has too few digits to be a reference
    np.testing.assert_allclose((constants.double().numpy() * rate)[awake], 1.0, rtol=2e3 * tolerance)
    assert tuple(own_gates) == field.gate_names == tuple(gates)
    for name, gate in gates.items():
        assert own_gates[name].shape == gate.shape
        assert np.abs(own_gates[name].double().numpy() - gate).max(initial=0) <= tolerance


@pytest.mark.parametrize("per_unit", [False, True], ids=["tau", "tau-per-unit"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_equations(case, tools, bias, per_unit):
    hidden = 4
    tau = torch.tensor([0.37, 1.0, 2.5, 0.2], dtype=torch.float64) if per_unit else 0.37
    field = tools.field(case, 3, hidden, bias=bias, tau=tau)
    h, u = tools.randn(6, field.state_size), tools.randn(6, 3, seed=2)
    assert_matches(field, case.reference, tools, h, u, np.asarray(tau), 4e-15)


def test_layernorm(case, tools):
    if not case.layernorm:
        with pytest.raises(TypeError, match="layernorm"):
            case.build(3, 4, layernorm=True)
        return
    field = tools.field(case, 3, 5, layernorm=True, tau=0.6)
    h, u = tools.randn(6, field.state_size), tools.randn(6, 3, seed=2)
    assert_matches(field, case.reference, tools, h, u, np.asarray(0.6), 2e-14)


def test_float32(case, tools):
    field = tools.field(case, 3, 4, tau=0.37, dtype=torch.float32)
    h = tools.randn(6, field.state_size, dtype=torch.float32)
    u = tools.randn(6, 3, seed=2, dtype=torch.float32)
    assert_matches(field, case.reference, tools, h, u, np.asarray(0.37), 3e-6)


@settings(max_examples=8, deadline=None)
@given(hidden=st.integers(1, 5), inputs=st.integers(1, 4), batch=st.integers(0, 5), seed=st.integers(0, 99))
def test_sizes(case, tools, hidden, inputs, batch, seed):
    """Any batch against any state size, equal ones and single units among them."""
    field = tools.field(case, inputs, hidden, seed=seed, tau=1.7)
    h = tools.randn(batch, field.state_size, seed=seed + 1)
    u = tools.randn(batch, inputs, seed=seed + 2)
    with torch.no_grad():
        rate, drive = field.rate_drive(0.0, h, u)
    assert rate.shape == drive.shape == (batch, field.state_size)
    for sample in range(batch):
        wanted_rate, wanted_drive, _ = case.reference(
            tools.numpy(field), h[sample].numpy(), u[sample].numpy(), np.asarray(1.7)
        )
        np.testing.assert_allclose(rate[sample].numpy(), wanted_rate, rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(drive[sample].numpy(), wanted_drive, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3)])
def test_shared_input_broadcasts(case, tools, batch):
    field = tools.field(case, 3, 4)
    h, u = tools.randn(*batch, field.state_size), tools.randn(3, seed=2)
    assert_matches(field, case.reference, tools, h, u, np.asarray(1.0), 4e-15)
    whole = field(0.0, h, u.expand(*batch, 3))
    torch.testing.assert_close(field(0.0, h, u), whole, rtol=1e-14, atol=1e-14)


def test_a_trajectory_is_evaluated_in_one_call(case, tools):
    """Autonomous fields take the time axis as one more leading dimension."""
    field = tools.field(case, 3, 4)
    assert field.autonomous
    h, u = tools.randn(5, 2, field.state_size), tools.randn(5, 2, 3, seed=2)
    one_by_one = torch.stack([field(float(k), h[k], u[k]) for k in range(5)])
    torch.testing.assert_close(field(0.0, h, u), one_by_one, rtol=1e-13, atol=1e-14)


def test_without_input_channels(case, tools):
    for bias in (True, False):
        field = tools.field(case, 0, 4, bias=bias)
        h = tools.randn(5, field.state_size)
        wanted = case.reference(tools.numpy(field), h.numpy(), np.zeros((5, 0)), np.asarray(1.0))
        for u in (None, torch.zeros(5, 0, dtype=torch.float64)):
            rate, drive = field.rate_drive(0.0, h, u)
            np.testing.assert_allclose(rate.detach().numpy(), wanted[0], rtol=1e-13, atol=1e-15)
            np.testing.assert_allclose(drive.detach().numpy(), wanted[1], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("switch", ["update_gate", "reset_gate"])
def test_gated_rate_with_one_gate(tools, switch):
    """A gate that is left out equals 1: the same as an open one, without its variable."""
    kept, variable = {"update_gate": ("reset", "r"), "reset_gate": ("update", "z")}[switch]
    field = GatedRate(3, 4, tau=0.6, tau_z=2.0, tau_r=0.7, dtype=torch.float64, **{switch: False})
    assert field.gate_names == (kept,)
    assert list(field.components) == ["hidden", variable]
    assert field.state_size == 8
    h, u = tools.randn(5, 8), tools.randn(5, 3, seed=2)
    full = GatedRate(3, 4, tau=0.6, tau_z=2.0, tau_r=0.7, dtype=torch.float64)
    rows = torch.cat([torch.arange(12)[full.components[name]] for name in field.components])
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            full.get_parameter(name)[rows] = parameter
    opened = torch.full((5, 12), 800.0, dtype=torch.float64)  # sigma(800) is 1
    for name, part in field.components.items():
        opened[:, full.components[name]] = h[:, part]
    wanted = full(0.0, opened, u)[:, rows]
    torch.testing.assert_close(field(0.0, h, u), wanted, rtol=1e-14, atol=1e-14)


def test_rates_of_slow_modes_keep_their_digits():
    """A bias of 50 is a time constant of exp(50), not infinity: 1 - sigmoid(50) would be exactly 0."""
    gru = GRU(1, 2, bias=True, dtype=torch.float64)
    lstm = LSTM(1, 2, bias=True, dtype=torch.float64)
    for field, rows in ((gru, slice(2, 4)), (lstm, slice(2, 4))):
        with torch.no_grad():
            for parameter in field.parameters():
                parameter.zero_()
            field.bias_ih[rows] = 50.0
        rate, _ = field.rate_drive(0.0, field.initial_state((1,)), torch.zeros(1, 1, dtype=torch.float64))
        np.testing.assert_allclose(rate[0, :2].detach().numpy(), math.exp(-50.0), rtol=1e-13)


def test_leaky_with_another_nonlinearity(tools):
    field = Leaky(2, 3, alpha=0.5, phi=torch.relu, tau=2.0, dtype=torch.float64)
    h, u = tools.randn(4, 3), tools.randn(4, 2, seed=2)
    pre = h @ field.weight_hh.T + u @ field.weight_ih.T + field.bias
    torch.testing.assert_close(field(0.0, h, u), 0.25 * (pre.clamp(min=0) - h))


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.eye(3, dtype=torch.float64) * 2.0)

    def forward(self, t, h, u):
        return torch.cos(t) * (h @ self.matrix.T) + (0.0 if u is None else u)


def test_field_wraps_any_equation(tools):
    h, u = tools.randn(5, 3), tools.randn(5, 3, seed=2)
    field = Field(Linear())
    assert [name for name, _ in field.named_parameters()] == ["fn.matrix"]
    assert not field.autonomous
    assert field.tau is None
    rate, drive = field.rate_drive(0.5, h, u)
    assert rate.count_nonzero() == 0
    wanted = math.cos(0.5) * 2.0 * h + u
    torch.testing.assert_close(drive, wanted)
    torch.testing.assert_close(field(0.5, h, u), wanted)
    torch.testing.assert_close(field(0.5, h), math.cos(0.5) * 2.0 * h)
    assert torch.isinf(field.time_constants(0.5, h, u)).all()
    assert field.gates(0.5, h, u) == {}


def test_field_gets_float64_time(tools):
    seen = []

    def fn(t, h, u):
        seen.append(t)
        return -h

    field = Field(fn, state_size=3, input_size=2)
    h = tools.randn(5, 3, dtype=torch.float32)
    u = tools.randn(5, 2, dtype=torch.float32)
    for t in (1.0 / 3.0, torch.tensor(1.0 / 3.0, dtype=torch.float64), torch.tensor(0.5)):
        assert field(t, h, u).dtype == torch.float32
    assert all(t.shape == () and t.dtype == torch.float64 for t in seen)
    assert [t.item() for t in seen] == [1.0 / 3.0, 1.0 / 3.0, 0.5]
    assert field.components == {"hidden": slice(0, 3)}
    assert field.initial_state((2,)).shape == (2, 3)


def test_field_shows_what_it_wraps():
    def swing(t, h, u):
        return -h

    assert repr(Field(swing)) == "Field(swing)"
    assert "Linear()" in repr(Field(Linear()))


def test_time_keeps_its_gradient(tools):
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    Field(lambda t, h, u: t**2 * h)(t, torch.ones(2, dtype=torch.float64)).sum().backward()
    assert t.grad.item() == pytest.approx(2 * 2 * 0.4)


class Oscillator(VectorField):
    """What a user writes: only rate_drive."""

    def __init__(self) -> None:
        super().__init__(input_size=0, state_size=2)

    def rate_drive(self, t, h, u=None):
        self.check_arguments(h, u)
        return torch.full_like(h, 0.1), torch.stack((h[..., 1], -h[..., 0]), -1)


def test_a_field_of_ones_own():
    field = Oscillator()
    h = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(field(0.0, h), torch.tensor([[1.9, -1.2]]))
    torch.testing.assert_close(field.time_constants(0.0, h), torch.full((1, 2), 10.0))
    assert field.output == slice(0, 2)
    assert field.gates(0.0, h) == {}
    assert field.tau is None


def test_initial_state_follows_the_parameters(case):
    for dtype in (torch.float32, torch.float64):
        field = case.build(2, 3, dtype=dtype)
        state = field.initial_state((4, 2))
        assert state.shape == (4, 2, field.state_size)
        assert state.dtype == dtype
        assert state.count_nonzero() == 0
        assert field.initial_state().shape == (field.state_size,)


def test_components_cover_the_state(case):
    field = case.build(2, 3)
    covered = [index for part in field.components.values() for index in range(field.state_size)[part]]
    assert covered == list(range(field.state_size))
    assert field.output == next(
        part for name, part in reversed(field.components.items()) if name.endswith("hidden")
    )


def test_component_names(tools):
    assert list(LSTM(2, 3).components.items()) == [("cell", slice(0, 3)), ("hidden", slice(3, 6))]
    assert list(GatedRate(2, 3).components) == ["hidden", "z", "r"]
    assert GRU(2, 3).components == {"hidden": slice(0, 3)}


def test_time_units(case, tools):
    """tau is the buffer it was given, or the exponential of its parameter."""
    fixed = case.build(2, 3, tau=0.37, dtype=torch.float64)
    assert fixed.tau.item() == 0.37
    assert not any("log" in name for name, _ in fixed.named_parameters())
    learned = case.build(2, 3, tau=0.37, learn_tau=True, dtype=torch.float64)
    assert any(name.endswith("log_tau") for name, _ in learned.named_parameters())
    assert learned.tau.item() == pytest.approx(0.37, rel=1e-15)
    per_unit = case.build(2, 3, tau=torch.tensor([1.0, 2.0, 3.0]), learn_tau=True, dtype=torch.float64)
    np.testing.assert_allclose(per_unit.tau.detach().numpy(), [1.0, 2.0, 3.0], rtol=1e-15)
    assert "tau=" in repr(fixed)
    assert "learn_tau=True" in repr(learned)
    assert "per unit" in repr(per_unit)


def test_gradient_of_tau_goes_through_the_rate(tools):
    """dh/dt is proportional to 1/tau, so d(dh/dt)/d(log tau) = -dh/dt."""
    for cls in (Leaky, ScalarGate, MultiGate, GRU, LSTM):
        field = cls(2, 3, tau=0.37, learn_tau=True, dtype=torch.float64)
        slope = field(0.0, tools.randn(4, field.state_size), tools.randn(4, 2, seed=2))
        (gradient,) = torch.autograd.grad(slope.sum(), field.log_tau)
        torch.testing.assert_close(gradient, -slope.sum(), rtol=1e-12, atol=1e-13)


def test_gated_rate_learns_every_time_constant():
    field = GatedRate(2, 3, tau=0.5, tau_z=2.0, tau_r=0.7, learn_tau=True, dtype=torch.float64)
    assert field.log_tau_z.exp().item() == pytest.approx(2.0, rel=1e-15)
    field(0.0, torch.ones(1, 9, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is not None for parameter in field.parameters())


def test_state_dict_round_trip(case, tools):
    field = tools.field(case, 2, 3, tau=0.37)
    other = tools.field(case, 2, 3, seed=9)
    other.load_state_dict(field.state_dict())
    h, u = tools.randn(4, field.state_size), tools.randn(4, 2, seed=2)
    assert torch.equal(field(0.0, h, u), other(0.0, h, u))


def test_state_dict_carries_alpha(tools):
    field, other = Leaky(2, 3, alpha=0.3), Leaky(2, 3, alpha=0.9)
    other.load_state_dict(field.state_dict())
    assert other.alpha.item() == pytest.approx(0.3)


def test_initial_weights_come_from_the_generator():
    for cls in (Leaky, ScalarGate, MultiGate, GRU, LSTM, LTC, GatedRate):
        draws = [cls(2, 16, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
        weights = [torch.cat([p.detach().flatten() for p in field.parameters()]) for field in draws]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
        assert draws[0].weight_hh.abs().max() <= 0.25  # 1 / sqrt(16)
        assert draws[0].weight_hh.std().item() == pytest.approx(0.25 / math.sqrt(3.0), rel=0.15)
