"""Recurrent weights at the onset of chaos."""

import pytest
import torch
from torch import nn

import ctgate as ct
from ctgate.init import critical_

SIZE = 600
FIELDS = {
    "Leaky": lambda: ct.Leaky(0, SIZE, dtype=torch.float64),
    "MultiGate": lambda: ct.MultiGate(0, SIZE, dtype=torch.float64),
    "ScalarGate": lambda: ct.ScalarGate(0, SIZE, dtype=torch.float64),
    "GRU": lambda: ct.GRU(0, SIZE, dtype=torch.float64),
    "GRU before": lambda: ct.GRU(0, SIZE, reset="before", dtype=torch.float64),
    "LSTM": lambda: ct.LSTM(0, SIZE, dtype=torch.float64),
    "GatedRate": lambda: ct.GatedRate(0, SIZE, dtype=torch.float64),
    "GatedRate without update": lambda: ct.GatedRate(0, SIZE, update_gate=False, dtype=torch.float64),
}


def spread_biases(field: ct.VectorField) -> None:
    """Other biases for every unit, of the gates too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            if name.startswith("bias"):
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def growth(field: ct.VectorField) -> float:
    """The largest real part of the flow's eigenvalues at rest, from autograd's Jacobian."""
    h = torch.zeros(field.state_size, dtype=torch.float64)
    if isinstance(field, ct.GatedRate):
        h[field.hidden_size :] = field.bias.detach()[field.hidden_size :]
    assert field(0.0, h).detach().abs().max() < 1e-14
    jacobian = torch.func.jacrev(lambda h: field(0.0, h))(h).detach()
    return float(torch.linalg.eigvals(jacobian).real.max())


@pytest.mark.parametrize("kind", FIELDS)
def test_rest_loses_its_stability_at_the_onset(kind):
    """The edge of the spectrum of N units is blurred by about 1 / sqrt(N), 4 %, of the gain."""
    field = FIELDS[kind]()
    spread_biases(field)
    grown = [
        growth(critical_(field, excess=excess, generator=torch.Generator().manual_seed(0)))
        for excess in (-0.12, 0.0, 0.12)
    ]
    assert grown[0] < 0.0 < grown[2]
    assert abs(grown[1]) < grown[2]


def test_gains_without_biases_are_those_of_the_closed_form():
    """1 without gates, 2 for a GRU and an LSTM whose gates stand half open."""
    for field, block, gain in (
        (ct.Leaky(0, 400, bias=False), slice(None), 1.0),
        (ct.GRU(0, 400, bias=False), slice(800, 1200), 2.0),
        (ct.LSTM(0, 400, bias=False), slice(800, 1200), 2.0),
    ):
        critical_(field, generator=torch.Generator().manual_seed(0))
        drawn = field.weight_hh.detach()[block].std().item() * 400**0.5
        # 160,000 draws: a standard error of 0.2 %.
        assert drawn == pytest.approx(gain, rel=0.01)


def test_torch_s_modules_start_as_the_fields_do():
    module = nn.GRU(3, 200, num_layers=2).double()
    gates = module.weight_hh_l1[:400].clone()
    critical_(module, excess=0.5, generator=torch.Generator().manual_seed(0))
    for end in ("l0", "l1"):
        reset = sum(module.get_parameter(f"bias_{kind}_{end}")[:200] for kind in ("ih", "hh"))
        gain = module.get_parameter(f"weight_hh_{end}")[400:].std() * 200**0.5
        onset = torch.sigmoid(reset).square().mean() ** -0.5
        assert gain.item() == pytest.approx(1.5 * onset.item(), rel=0.02)
        assert not module.get_parameter(f"bias_ih_{end}")[400:].any()
    assert torch.equal(gates, module.weight_hh_l1[:400])
    critical_(module, gains={"z": 3.0, "r": 0.0}, generator=torch.Generator().manual_seed(0))
    assert not module.weight_hh_l0[:200].any()
    assert module.weight_hh_l0[200:400].std().item() * 200**0.5 == pytest.approx(3.0, rel=0.02)


def test_gains_of_what_is_no_gate_are_refused():
    with pytest.raises(ValueError, match=r"'h' is no gate of GRU, which has r, z"):
        critical_(ct.GRU(1, 2), gains={"h": 1.0})
    with pytest.raises(ValueError, match=r"'z' is no gate of Leaky, which has none"):
        critical_(ct.Leaky(1, 2), gains={"z": 1.0})
    with pytest.raises(ValueError, match="it must not be negative"):
        critical_(ct.GRU(1, 2), gains={"z": -1.0})
    with pytest.raises(ValueError, match="excess is -1"):
        critical_(ct.GRU(1, 2), excess=-1.0)
    with pytest.raises(TypeError, match="module is Linear"):
        critical_(nn.Linear(2, 2))
