"""Stacks: names, sizes, nesting, and the drive from below."""

import pytest
import torch

from ctgate.fields import GRU, LSTM, Field, GatedRate, Leaky, Stack


def test_names():
    stack = Stack([GRU(2, 3), LSTM(3, 4), GatedRate(4, 2, reset_gate=False)])
    assert stack.components == {
        "layers.0.hidden": slice(0, 3),
        "layers.1.cell": slice(3, 7),
        "layers.1.hidden": slice(7, 11),
        "layers.2.hidden": slice(11, 13),
        "layers.2.z": slice(13, 15),
    }
    assert stack.output == slice(11, 13)
    assert stack.state_size == 15
    assert stack.input_size == 2
    assert stack.gate_names == (
        "layers.0.update",
        "layers.0.reset",
        "layers.1.input",
        "layers.1.forget",
        "layers.1.output",
        "layers.2.update",
    )


def test_each_layer_is_driven_one_tau_ahead(tools):
    """Layers with their own time units, per unit too; rate_drive of the parts is tested elsewhere."""
    tau = torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64)
    low, high = LSTM(2, 3, tau=tau, dtype=torch.float64), Leaky(3, 4, tau=2.0, dtype=torch.float64)
    stack = Stack([low, high])
    h, u = tools.randn(5, 10), tools.randn(5, 2, seed=2)
    slope = low(0.0, h[:, :6], u)
    wanted = high(0.0, h[:, 6:], h[:, 3:6] + tau * slope[:, 3:])
    torch.testing.assert_close(stack(0.0, h, u), torch.cat((slope, wanted), -1), rtol=1e-14, atol=1e-15)
    assert stack.tau is high.tau


def test_a_stack_can_be_a_layer(tools):
    layers = [GRU(2, 3, dtype=torch.float64), LSTM(3, 3, dtype=torch.float64), GRU(3, 4, dtype=torch.float64)]
    flat, nested = Stack(layers), Stack([Stack(layers[:2]), layers[2]])
    h, u = tools.randn(5, 13), tools.randn(5, 2, seed=2)
    assert torch.equal(flat(0.0, h, u), nested(0.0, h, u))
    assert nested.components["layers.0.layers.1.cell"] == slice(3, 6)
    assert nested.output == flat.output
    for own, other in zip(nested.gates(0.0, h, u).values(), flat.gates(0.0, h, u).values(), strict=True):
        assert torch.equal(own, other)


def test_parameters_are_named_by_layer():
    names = [name for name, _ in Stack([GRU(2, 3), LSTM(3, 3, bias=False)]).named_parameters()]
    assert names[0] == "layers.0.weight_ih"
    assert names[-1] == "layers.1.weight_hh"


def test_errors():
    with pytest.raises(ValueError, match="layers is empty"):
        Stack([])
    with pytest.raises(ValueError, match="layer 1 is a Field without tau"):
        Stack([GRU(2, 3), Field(lambda t, h, u: -h, state_size=3, input_size=3)])
    with pytest.raises(ValueError, match="layer 1 has input_size 2 and layer 0 has 3 outputs"):
        Stack([GRU(2, 3), GRU(2, 3)])
    with pytest.raises(TypeError, match="layer"):
        Stack([torch.nn.GRU(2, 3)])
