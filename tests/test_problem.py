"""Bad problems are refused before any work, by name."""

import pytest
import torch

import ctgate as ct
from tests.typechecker import unchecked


def gru(**options):
    return ct.GRU(3, 4, dtype=torch.float64, **options)


def held(steps=5, batch=(2,), channels=3, dtype=torch.float64, **options):
    return ct.ZeroOrderHold(
        torch.arange(steps + 1.0), torch.zeros(steps, *batch, channels, dtype=dtype), **options
    )


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(*shape, dtype=dtype)


GOOD = {"h0": lambda: zeros(2, 4), "tspan": (0.0, 5.0), "control": held}


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"field": lambda: torch.nn.GRU(3, 4)}, TypeError, r"field is GRU.*ct\.Field"),
        ({"h0": lambda: zeros(2, 5)}, ValueError, r"h0 has shape \(2, 5\); it must be \(\*batch, 4\)"),
        ({"h0": lambda: torch.tensor(1.0)}, ValueError, r"h0 has shape \(\)"),
        ({"h0": lambda: torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "h0 is torch.int64"),
        (
            {"h0": lambda: zeros(2, 4).index_fill(1, torch.tensor(3), torch.nan)},
            ValueError,
            r"h0\[0, 3\] is nan",
        ),
        ({"h0": lambda: zeros(2, 4) + torch.inf}, ValueError, r"h0\[0, 0\] is inf; h0 must be finite"),
        ({"h0": lambda: zeros(2, 4, dtype=torch.float32)}, ValueError, "must have one dtype"),
        (
            {"h0": lambda: torch.zeros(2, 4, dtype=torch.float64, device="meta")},
            ValueError,
            "must be on one device",
        ),
        ({"tspan": (5.0, 0.0)}, ValueError, r"tspan is \(5.0, 0.0\); it must be finite with t0 < t1"),
        ({"tspan": (0.0, 0.0)}, ValueError, "t0 < t1"),
        ({"tspan": (0.0, float("nan"))}, ValueError, "t0 < t1"),
        ({"tspan": 5.0}, TypeError, "tspan is 5.0; it must be a pair"),
        ({"tspan": (0.0, 6.0)}, ValueError, r"tspan is \(0.0, 6.0\).*known on \[0.0, 5.0\].*extrapolate"),
        ({"tspan": (-1.0, 5.0)}, ValueError, r"tspan is \(-1.0, 5.0\)"),
        ({"control": lambda: None}, ValueError, "control is None and the field takes 3 input channels"),
        ({"control": lambda: torch.zeros(5, 2, 3)}, TypeError, "control is Tensor"),
        (
            {"control": lambda: held(channels=2)},
            ValueError,
            r"shape \(2, 2\); the field takes \(\*batch, 3\)",
        ),
        ({"control": lambda: held(batch=(5,))}, ValueError, "must broadcast to that of h0"),
        ({"control": lambda: held(dtype=torch.float32)}, ValueError, "control's value is torch.float32"),
        ({"parameters": {"weight": zeros(1)}}, ValueError, "parameters has 'weight', which the field lacks"),
        ({"parameters": {"weight_hh": zeros(1)}}, ValueError, r"parameters\['weight_hh'\] has shape \(1,\)"),
    ],
)
def test_bad_problem(changes, error, match):
    arguments = {"field": gru, **GOOD, **changes}
    values = {name: value() if callable(value) else value for name, value in arguments.items()}
    with pytest.raises(error, match=match):
        unchecked(ct.ODEProblem)(**values)


def sampled():
    ts = torch.arange(6.0, dtype=torch.float64)[:, None].expand(6, 2) * torch.tensor([1.0, 1.1])
    return ct.ZeroOrderHold(ts, zeros(5, 2, 3))


def test_spans_per_sample():
    control = sampled()
    prob = ct.ODEProblem(gru(), zeros(2, 4), control.sample_support, control)
    assert prob.per_sample
    assert [t.tolist() for t in prob.tspan] == [[0.0, 0.0], [5.0, pytest.approx(5.5)]]
    # Floats are a span for all; a tensor that requires grad is one per sample.
    assert ct.ODEProblem(gru(), zeros(2, 4), (0.0, 5.0), control).per_sample
    stop = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    prob = ct.ODEProblem(gru(), zeros(2, 4), (0.0, stop), held())
    assert prob.per_sample
    assert prob.sample_spans()[1].shape == (2,)
    assert not ct.ODEProblem(gru(), zeros(2, 4), (torch.tensor(0.0), 5.0), held()).per_sample


@pytest.mark.parametrize(
    ("tspan", "control", "message"),
    [
        (
            (0.0, torch.tensor([5.0, 5.6])),
            sampled,
            r"tspan of sample \(1,\) is \(0.0, 5.5\d*\).*sample_support",
        ),
        ((torch.tensor([0.0, 3.0]), 2.0), held, r"tspan of sample \(1,\) is \(3.0, 2.0\); it must be finite"),
        ((0.0, torch.tensor([1.0, torch.nan])), held, r"tspan of sample \(1,\)"),
        ((0.0, torch.ones(3)), held, r"tspan\[1\] has shape \(3,\); it must broadcast.*\(2,\)"),
        ((0.0, 5.4), sampled, r"tspan of sample \(0,\) is \(0.0, 5.4\)"),
    ],
)
def test_spans_per_sample_that_do_not_fit(tspan, control, message):
    with pytest.raises(ValueError, match=message):
        ct.ODEProblem(gru(), zeros(2, 4), tspan, control())


def test_remake_replaces_and_checks():
    prob = ct.ODEProblem(gru(), zeros(2, 4), (0.0, 5.0), held())
    assert ct.remake(prob, tspan=(1.0, 2.0)).tspan == (1.0, 2.0)
    assert prob.tspan == (0.0, 5.0)
    with pytest.raises(TypeError, match=r"remake got 'p'; a problem has \['field', 'h0'"):
        ct.remake(prob, p=1)
    with pytest.raises(ValueError, match="h0 has shape"):
        ct.remake(prob, h0=zeros(2, 3))


def test_shared_input_for_a_batch():
    field = gru()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = ct.ZeroOrderHold(torch.arange(6.0), x)
    own = ct.ZeroOrderHold(torch.arange(6.0), x[:, None].expand(5, 2, 3))
    h0 = zeros(2, 4)
    one = ct.solve(ct.ODEProblem(field, h0, (0.0, 5.0), shared), ct.RK4(dt=0.5))
    two = ct.solve(ct.ODEProblem(field, h0, (0.0, 5.0), own), ct.RK4(dt=0.5))
    assert torch.allclose(one.hs, two.hs, rtol=0, atol=1e-15)
    assert torch.allclose(one(1.3), two(1.3), rtol=0, atol=1e-15)
