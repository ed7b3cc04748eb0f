"""The matched statistic against torch's own cells, differentiated by torch.func and walked in plain loops."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, jvp

import ctgate as ct
from ctgate.learnability import matched_statistic
from ctgate.tasks.multi_lag import multi_lag, random_direction
from tests.typechecker import unchecked

STEPS, SAMPLES, CHANNELS, HIDDEN, OUTPUTS = 64, 4, 3, 8, 2
LAGS = [0, 1, 2, 3, 7, 20, 63]
EVERY = list(range(STEPS))


def weights(module: nn.Module, seed: int, gain: float = 1.0) -> None:
    """Weights of numpy's, those of the state of standard deviation gain / sqrt(hidden)."""
    rng = np.random.default_rng(seed)
    for name, parameter in module.named_parameters():
        size = (gain if "hh" in name else 1.0) / np.sqrt(parameter.shape[-1])
        parameter.data = torch.from_numpy(size * rng.normal(size=parameter.shape))


def data(samples: int = SAMPLES, steps: int = STEPS) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(7)
    shapes = ((steps, samples, CHANNELS), (steps, samples, OUTPUTS))
    x, y = (torch.from_numpy(rng.normal(size=shape)) for shape in shapes)
    return x, y


def network(gain: float = 1.5) -> tuple[nn.GRUCell, nn.Linear]:
    cell, readout = nn.GRUCell(CHANNELS, HIDDEN).double(), nn.Linear(HIDDEN, OUTPUTS).double()
    weights(cell, 1, gain)
    weights(readout, 2)
    return cell, readout


def named(field: nn.Module, seed: int = 3) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {name: torch.from_numpy(rng.normal(size=p.shape)) for name, p in field.named_parameters()}


class Direct:
    """One sample by nn.GRUCell: states one by one, Jacobians by jacrev, gates from its weights; the influence
    of a direction on each step, and the slope of the squared error after it."""

    def __init__(self, cell, readout, x, y, direction) -> None:
        self.jacobians, self.leak, self.b, self.delta = [], [], [], []
        parameters = {name: p.detach() for name, p in cell.named_parameters()}
        h = torch.zeros(HIDDEN, dtype=torch.float64)
        for u, wanted in zip(x, y, strict=True):
            self.jacobians.append(jacrev(lambda state, u=u: cell(u, state))(h).detach().numpy())
            pre = cell.weight_ih @ u + cell.bias_ih + cell.weight_hh @ h + cell.bias_hh
            self.leak.append(torch.sigmoid(pre[HIDDEN : 2 * HIDDEN]).detach().numpy())

            def step(values, u=u, h=h):
                return functional_call(cell, values, (u, h))

            h, moved = (part.detach() for part in jvp(step, (parameters,), (direction,)))
            self.b.append(moved.numpy())
            error = (readout(h) - wanted).detach()
            self.delta.append((2.0 * readout.weight.T @ error).detach().numpy())

    def phi(self, t: int, s: int) -> np.ndarray:
        total = np.eye(HIDDEN)
        for j in range(s + 1, t + 1):
            total = self.jacobians[j] @ total
        return total

    def mu(self, t: int, s: int, order: str) -> np.ndarray:
        if order == "exact":
            return np.diag(self.phi(t, s))
        mu = np.ones(HIDDEN)
        for j in range(s + 1, t + 1):
            mu = mu * self.leak[j]
        if order == "leak":
            return mu
        extra = np.zeros(HIDDEN)
        for j in range(s + 1, t + 1):
            term = np.diag(self.jacobians[j]) - self.leak[j]
            for i in range(s + 1, t + 1):
                term = term if i == j else term * self.leak[i]
            extra += term
        return mu + extra

    def psi(self, t: int, s: int, order: str) -> float:
        if order == "full":
            return float(self.delta[t] @ self.phi(t, s) @ self.b[s])
        return float(np.sum(self.delta[t] * self.mu(t, s, order) * self.b[s]))


@pytest.fixture(scope="module")
def setting():
    cell, readout = network()
    x, y = data()
    direction = named(cell)
    reference = [Direct(cell, readout, x[:, k], y[:, k], direction) for k in range(SAMPLES)]
    return ct.GRU.from_torch(cell), readout, x, y, direction, reference


@pytest.mark.parametrize("order", ["leak", "first", "exact", "full"])
def test_psi_and_envelope_are_a_direct_evaluation(setting, order: str) -> None:
    field, readout, x, y, direction, reference = setting
    found = matched_statistic(field, readout, x, y, LAGS, order, direction=direction, compare=SAMPLES)
    expected = np.full((len(LAGS), STEPS, SAMPLES), np.nan)
    whole, sizes = expected.copy(), []
    for row, lag in enumerate(LAGS):
        size = []
        for sample, one in enumerate(reference):
            for t in range(lag, STEPS):
                expected[row, t, sample] = one.psi(t, t - lag, order)
                whole[row, t, sample] = one.psi(t, t - lag, "full")
                if order != "full":
                    size.append(np.abs(one.mu(t, t - lag, order)).mean())
        sizes.append(np.mean(size) if size else np.nan)
    psi = found["psi"].transpose("lag", "time", "sample").values
    assert np.array_equal(np.isnan(psi), np.isnan(expected))
    for row in range(len(LAGS)):
        # Relative to the lag's own size, which falls by orders of magnitude.
        scale = np.nanmax(np.abs(expected[row]))
        np.testing.assert_allclose(psi[row], expected[row], rtol=0.0, atol=1e-9 * scale)
    np.testing.assert_allclose(found["envelope"], sizes, rtol=1e-9)
    np.testing.assert_allclose(found["sample_mean"], np.nanmean(expected, 1), rtol=1e-8, atol=1e-14)
    apart = np.sqrt(np.nansum((expected - whole) ** 2, (1, 2)) / np.nansum(whole**2, (1, 2)))
    np.testing.assert_allclose(found["distance"], apart, rtol=1e-7, atol=1e-9)
    assert bool(found["finite"].all())


def test_lag_by_lag_the_whole_makes_the_derivative_of_the_loss(setting) -> None:
    field, readout, x, y, direction, _ = setting
    cell, _ = network()
    found = matched_statistic(field, readout, x, y, EVERY, "full", direction=direction, compare=0)

    def losses(values):
        h, rows = x.new_zeros(SAMPLES, HIDDEN), []
        for u, wanted in zip(x, y, strict=True):
            h = functional_call(cell, values, (u, h))
            rows.append((readout(h) - wanted).square().sum(-1))
        return torch.stack(rows)

    parameters = {name: p.detach() for name, p in cell.named_parameters()}
    value, slope = jvp(losses, (parameters,), (direction,))
    total = found["psi"].sum("lag").transpose("time", "sample").values
    np.testing.assert_allclose(
        total, slope.detach().numpy(), rtol=0.0, atol=1e-11 * float(slope.detach().abs().max())
    )
    assert found.attrs["loss"] == pytest.approx(float(value.detach().mean()), rel=1e-13)


def test_the_hidden_state_of_an_lstm_goes_back_one_whole_step() -> None:
    cell, readout = nn.LSTMCell(CHANNELS, HIDDEN).double(), network()[1]
    weights(cell, 4)
    x, y = data(steps=12)
    direction = named(cell)
    found = matched_statistic(
        ct.LSTM.from_torch(cell), readout, x, y, [0, 1, 2, 6], "leak", direction=direction
    )
    parameters = {name: p.detach() for name, p in cell.named_parameters()}
    for sample in range(SAMPLES):
        state = torch.zeros(2 * HIDDEN, dtype=torch.float64)
        b, forget, jacobians, delta = [], [], [], []
        for u, wanted in zip(x[:, sample], y[:, sample], strict=True):

            def step(values, at, u=u):
                c, h = at[:HIDDEN], at[HIDDEN:]
                h, c = functional_call(cell, values, (u, (h, c)))
                return torch.cat([c, h])

            pre = cell.weight_ih @ u + cell.bias_ih + cell.weight_hh @ state[HIDDEN:] + cell.bias_hh
            forget.append(torch.sigmoid(pre[HIDDEN : 2 * HIDDEN]).detach().numpy())
            jacobians.append(jacrev(step, argnums=1)(parameters, state).detach().numpy())
            state, moved = (
                part.detach() for part in jvp(lambda v, at=state: step(v, at), (parameters,), (direction,))
            )
            b.append(moved.numpy())
            error = readout(state[HIDDEN:]) - wanted
            delta.append(np.concatenate([np.zeros(HIDDEN), (2 * readout.weight.T @ error).detach().numpy()]))
        psi = found["psi"].isel(sample=sample)
        for t in range(12):
            np.testing.assert_allclose(psi.sel(lag=0)[t], delta[t] @ b[t], rtol=1e-9, atol=1e-13)
            back = jacobians[t].T @ delta[t]
            for lag in (1, 2, 6):
                if t >= lag:
                    kept = np.prod(forget[t - lag + 1 : t], axis=0) * np.ones(HIDDEN)
                    hidden = np.ones(HIDDEN) if lag == 1 else np.zeros(HIDDEN)
                    mu = np.concatenate([kept, hidden])
                    np.testing.assert_allclose(
                        psi.sel(lag=lag)[t], np.sum(back * mu * b[t - lag]), rtol=1e-9, atol=1e-13
                    )
    # One step is the whole transport.
    np.testing.assert_allclose(found["distance"][:2], 0.0, atol=1e-13)
    assert float(found["distance"][2]) > 1e-3
    kept = found["envelope"].values
    assert kept[0] == 1.0
    assert 0.0 < kept[3] < kept[1] < 1.0


def test_signs_are_from_other_samples_than_the_signal() -> None:
    cell, readout = network()
    x, y = data(samples=40, steps=10)
    found = matched_statistic(ct.GRU.from_torch(cell), readout, x, y, [1, 4], held_out=0.25, compare=0)
    out = found["held_out"].values
    assert out.sum() == 10
    mean = np.nanmean(found["psi"].transpose("lag", "time", "sample").values, 1)
    sign = np.sign(mean[:, out].mean(1))
    np.testing.assert_array_equal(found["sign"], sign)
    np.testing.assert_allclose(found["signal"], sign * mean[:, ~out].mean(1), rtol=1e-12)
    error = mean[:, ~out].std(1, ddof=1) / np.sqrt(30)
    np.testing.assert_allclose(found["standard_error"], error, rtol=1e-12)
    assert np.isnan(found["distance"]).all()


class _Nothing(nn.Module):
    """Its value is 0, its slope 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.detach()


def test_noise_has_no_signal() -> None:
    # An answer of 0 and targets that hang together with nothing: psi is symmetric about 0.
    cell, readout = network()
    field, mute = ct.GRU.from_torch(cell), nn.Sequential(readout, _Nothing())
    x, _ = data(samples=20, steps=8)
    ratios = []
    for seed in range(40):
        y = torch.from_numpy(np.random.default_rng(seed).normal(size=(8, 20, OUTPUTS)))
        found = matched_statistic(field, mute, x, y, [0, 3], seed=seed, compare=0)
        ratios.append((found["signal"] / found["standard_error"]).values)
    pooled = np.concatenate(ratios)
    # 80 ratios of 10 samples each: Student's t with 9 degrees of freedom, of variance 9/7.
    assert abs(pooled.mean()) < 4 * np.sqrt(9 / 7 / len(pooled))
    assert 0.5 < np.abs(pooled).mean() < 1.3


def test_batches_do_not_matter_and_psi_may_be_left_out(setting) -> None:
    field, readout, x, y, direction, _ = setting
    whole = matched_statistic(field, readout, x, y, LAGS, direction=direction, compare=2)
    passed: list[torch.Tensor] = []
    pieces = matched_statistic(
        field, readout, x, y, LAGS, direction=direction, compare=2, batch=3, keep=False, each=passed.append
    )
    assert [psi.shape[-1] for psi in passed] == [3, 1]
    np.testing.assert_allclose(torch.cat(passed, -1).numpy(), whole["psi"].values, rtol=0.0, atol=1e-13)
    assert "psi" not in pieces
    for name in pieces.variables:
        np.testing.assert_allclose(
            pieces[name].values.astype(float), whole[name].values.astype(float), rtol=1e-10, atol=1e-13
        )
    assert pieces.attrs["loss"] == pytest.approx(whole.attrs["loss"], rel=1e-13)


def test_a_direction_is_drawn_from_the_seed(setting) -> None:
    field, readout, x, y, _, _ = setting
    one, same, other = (
        matched_statistic(field, readout, x, y, LAGS, seed=seed, compare=0, held_out=0.5)["psi"].values
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert np.nanmax(np.abs(one - other)) > 0.01 * np.nanmax(np.abs(one))


def test_a_direction_may_leave_parameters_where_they_are(setting) -> None:
    field, readout, x, y, direction, _ = setting
    name = "weight_hh"
    part = {name: direction[name]}
    rest = {key: value for key, value in direction.items() if key != name}
    one, two, both = (
        matched_statistic(field, readout, x, y, LAGS, direction=d, compare=0)["psi"].values
        for d in (part, rest, direction)
    )
    np.testing.assert_allclose(one + two, both, rtol=0.0, atol=1e-12)
    assert min(np.nanmax(np.abs(one)), np.nanmax(np.abs(two))) > 1e-3


@pytest.mark.parametrize("order", ["leak", "first", "exact", "full"])
def test_single_precision(setting, order: str) -> None:
    field, readout, x, y, direction, _ = setting
    double = matched_statistic(field, readout, x, y, LAGS, order, direction=direction, compare=0)
    cell, own = network()
    single = matched_statistic(
        ct.GRU.from_torch(cell.float()),
        own.float(),
        x.float(),
        y.float(),
        LAGS,
        order,
        direction={name: value.float() for name, value in direction.items()},
        compare=0,
    )
    assert single["psi"].dtype == np.float32
    assert single.attrs["dtype"] == "float32"
    scale = np.abs(double["psi"]).max(("time", "sample"))
    # The trajectory has rounding of its own, which its transport carries on.
    assert float((np.abs(single["psi"] - double["psi"]) / scale).max()) < 1e-3


def test_every_cell_has_a_statistic() -> None:
    _, readout = network()
    x, y = data(steps=12)
    kind = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(0)}
    cells = (
        ct.Leaky(CHANNELS, HIDDEN, alpha=0.3, **kind),
        ct.ScalarGate(CHANNELS, HIDDEN, layernorm=True, **kind),
        ct.MultiGate(CHANNELS, HIDDEN, layernorm=True, **kind),
        ct.GRU(CHANNELS, HIDDEN, reset="before", layernorm=True, **kind),
        ct.LSTM(CHANNELS, HIDDEN, layernorm=True, **kind),
    )
    for field in cells:
        orders = [
            matched_statistic(field, readout, x, y, [0, 1, 4], order, compare=SAMPLES)
            for order in ("leak", "first")
        ]
        for found in orders:
            assert bool(found["finite"].all())
            assert float(found["distance"][0]) < 1e-12
            assert 0.0 < float(found["envelope"][2]) < float(found["envelope"][1]) < 1.0


def test_states_that_are_not_finite_are_said(setting) -> None:
    _, readout, x, y, _, _ = setting
    cell, _ = network()
    with torch.no_grad():
        cell.weight_hh[0, 0] = torch.nan
    with pytest.raises(ct.SolveError, match="finite"):
        matched_statistic(ct.GRU.from_torch(cell), readout, x, y, [0, 1])


def test_a_statistic_that_is_not_finite_is_flagged(setting) -> None:
    field, readout, x, y, _, _ = setting
    y = y.clone()
    y[30, 2, 0] = torch.inf
    with pytest.warns(UserWarning, match=r"psi is not finite at the lags \[0, 1\]"):
        found = matched_statistic(field, readout, x, y, [0, 1], compare=0)
    assert not found["finite"].any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"field": nn.Linear(3, 8)}, TypeError, "field is Linear; it must be a VectorField"),
        ({"readout": torch.sin}, TypeError, "it must be a Module"),
        ({"order": "second"}, ValueError, "order is 'second'; it must be one of"),
        ({"lags": [0, 64]}, ValueError, "the longest lag is 64 of 64 steps; it must be less"),
        ({"lags": [3, 1]}, ValueError, "increase"),
        ({"held_out": 1.0}, ValueError, "held_out is 1.0, of 4 samples"),
        ({"held_out": 0.7}, ValueError, "it must leave one sample or more for the signs and two or more"),
        ({"batch": 0}, ValueError, "batch is 0; it must be at least 1"),
        ({"compare": -1}, ValueError, "compare is -1; it must be at least 0"),
        (
            {"y": torch.ones(STEPS, SAMPLES, 1).double()},
            ValueError,
            r"y is \(64, 4, 1\) where the readout gives \(64, 4, 2\)",
        ),
        ({"y": torch.ones(STEPS, 1, 2).double()}, ValueError, "with the same times and samples"),
        ({"direction": {"weight": torch.ones(1)}}, KeyError, "'weight' is no parameter"),
    ],
)
def test_what_does_not_fit(setting, changes: dict[str, object], error: type[Exception], message: str) -> None:
    field, readout, x, y, _, _ = setting
    given = {"field": field, "readout": readout, "x": x, "y": y, "lags": [0, 1], **changes}
    with pytest.raises(error, match=message):
        unchecked(matched_statistic)(**given)


def test_diagonals_are_far_from_the_whole_but_where_gates_are_slow() -> None:
    # What THEORY says of networks of 16 units before training, at lag 4.
    generator = torch.Generator().manual_seed(0)
    x, y = multi_lag(64, 8, random_direction(16, generator), generator, lags=(4, 8), coefficients=(0.6, 0.5))
    readout = nn.Linear(16, 1).double()
    weights(readout, 2)
    kind = {"dtype": torch.float64, "generator": generator}
    slow = ct.Leaky(16, 16, alpha=0.05, layernorm=True, **kind)
    fast = (ct.MultiGate(16, 16, layernorm=True, **kind), ct.GRU(16, 16, **kind))
    for order in ("leak", "first", "exact"):
        distances = [
            matched_statistic(field, readout, x, y, [4], order)["distance"].item() for field in (slow, *fast)
        ]
        assert distances[0] < 0.2
        assert all(0.5 < distance < 1.1 for distance in distances[1:])
