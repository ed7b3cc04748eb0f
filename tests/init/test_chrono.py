"""Biases of gates by the memory that is asked for."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

import ctgate as ct
from ctgate.init import chrono_

LONGEST = 300.0
FIELDS = {
    "GRU": lambda: ct.GRU(2, 2000, dtype=torch.float64),
    "GRU before": lambda: ct.GRU(2, 2000, reset="before", dtype=torch.float64),
    "MultiGate": lambda: ct.MultiGate(2, 2000, dtype=torch.float64),
    "GatedRate": lambda: ct.GatedRate(2, 2000, dtype=torch.float64),
    "LSTM": lambda: ct.LSTM(2, 2000, dtype=torch.float64),
}


def times_at_rest(field: ct.VectorField) -> torch.Tensor:
    """How long units forget with all states and inputs at zero, from the field's own rates."""
    h = torch.zeros(field.state_size, dtype=torch.float64)
    if isinstance(field, ct.GatedRate):
        # Its gates have dynamics: they rest at their biases.
        size = field.hidden_size
        h[size : 2 * size] = field.bias.detach()[size : 2 * size]
    rate, _ = field.rate_drive(0.0, h, torch.zeros(2, dtype=torch.float64))
    part = field.components.get("cell", field.components["hidden"])
    return 1.0 / rate[part].detach()


@pytest.mark.parametrize("kind", FIELDS)
def test_times_at_rest_are_uniform_up_to_the_longest(kind):
    field = FIELDS[kind]()
    assert chrono_(field, LONGEST, generator=torch.Generator().manual_seed(0)) is field
    times = times_at_rest(field).numpy()
    assert stats.kstest(times, "uniform", (2.0, LONGEST - 2.0)).pvalue > 1e-3
    # The same draws, in a unit of time that is not 1.
    other = FIELDS[kind]()
    chrono_(other, LONGEST, generator=torch.Generator().manual_seed(1))
    assert stats.kstest(times_at_rest(other).numpy(), times).pvalue > 1e-3


@pytest.mark.parametrize("make", [nn.GRU, nn.LSTM, nn.GRUCell, nn.LSTMCell])
def test_torch_s_modules_start_as_the_fields_do(make):
    module = make(3, 500).double()
    untouched = {name: p.clone() for name, p in module.named_parameters() if "weight" in name}
    chrono_(module, 50.0, generator=torch.Generator().manual_seed(0))
    for name, weight in untouched.items():
        assert torch.equal(weight, module.get_parameter(name))
    end = "" if isinstance(module, nn.RNNCellBase) else "_l0"
    bias, twin = (module.get_parameter(f"bias_{kind}{end}").detach() for kind in ("ih", "hh"))
    parts, twins = bias.split(500), twin.split(500)
    b = parts[1]
    assert b.exp().min() >= 1.0
    assert 45.0 < b.exp().max() <= 49.0
    assert not twins[1].any()
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        assert torch.equal(parts[0], -b)
        assert not twins[0].any()
    else:
        assert twins[0].any()
        assert parts[0].any()


def test_every_layer_and_direction_starts_anew():
    module = nn.GRU(3, 20, num_layers=2, bidirectional=True)
    chrono_(module, 50.0)
    for end in ("l0", "l1", "l0_reverse", "l1_reverse"):
        assert not module.get_parameter(f"bias_hh_{end}")[20:40].any()
        assert module.get_parameter(f"bias_ih_{end}")[20:40].exp().max() <= 49.0 + 1e-4
    stack = ct.Stack([ct.GRU(3, 20), ct.LSTM(20, 5)])
    chrono_(stack, 50.0)
    assert not stack.layers[0].bias_hh[20:40].any()
    assert not stack.layers[1].bias_hh[5:10].any()


def test_a_memory_lasts_as_long_as_it_is_asked_to():
    """Without recurrent weights a unit of a GRU whose candidate rests at 0 decays by exp(-t / (1 + e^b))."""
    field = ct.GRU(0, 6, dtype=torch.float64)
    chrono_(field, 40.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        field.weight_hh.zero_()
        field.bias_ih[12:] = 0.0
        field.bias_hh[12:] = 0.0
        sol = ct.solve(
            ct.ODEProblem(field, torch.ones(6, dtype=torch.float64), (0.0, 7.0)), rtol=1e-10, atol=1e-12
        )
        times = 1.0 + field.bias_ih[6:12].exp()
    torch.testing.assert_close(sol.hs[-1], torch.exp(-7.0 / times), rtol=1e-8, atol=0.0)


def test_what_has_no_such_gate_is_refused():
    for module, part in (
        (ct.Leaky(1, 2), "Leaky in module has no update gate"),
        (ct.GatedRate(1, 2, update_gate=False), "GatedRate in module has no update gate"),
        (ct.GRU(1, 2, bias=False), "GRU in module has no biases"),
        (nn.LSTM(1, 4, proj_size=2), "proj_size must be 0"),
    ):
        with pytest.raises(ValueError, match=part):
            chrono_(module, 10.0)
    for module in (nn.Linear(2, 2), ct.LTC(1, 2)):
        with pytest.raises(TypeError, match="it must be one of"):
            chrono_(module, 10.0)
    for longest in (2.0, math.inf, math.nan, -3.0):
        with pytest.raises(ValueError, match="it must be finite and above 2"):
            chrono_(ct.GRU(1, 2), longest)
