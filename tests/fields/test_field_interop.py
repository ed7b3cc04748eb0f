"""Torch's own modules against one Euler step written by hand, and weights there and back."""

import pytest
import torch
from torch import nn

from ctgate.fields import GRU, LSTM, LTC, Stack

HIDDEN, INPUTS, BATCH, STEPS = 5, 3, 7, 9
MODULES = {"GRU": (GRU, nn.GRU, nn.GRUCell), "LSTM": (LSTM, nn.LSTM, nn.LSTMCell)}


@pytest.fixture(params=MODULES, ids=list(MODULES))
def kinds(request):
    return MODULES[request.param]


def module_of(kind, tools, *sizes, normal=False, dtype=torch.float64, **options):
    """A torch module with reproducible weights: its default initialisation, or N(0, 1/H)."""
    module = kind(*sizes, dtype=dtype, **options)
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            draw = tools.randn(*parameter.shape, seed=20 + k, dtype=torch.float64)
            scale = HIDDEN**-0.5
            parameter.copy_(draw * scale if normal else (2 * torch.special.ndtr(draw) - 1) * scale)
    return module


def euler(field, tau, state, inputs):
    """The discrete cell, by hand."""
    states = []
    for u in inputs:
        rate, drive = field.rate_drive(0.0, state, u)
        state = state + tau * (drive - rate * state)
        states.append(state)
    return torch.stack(states)


def torch_run(module, field, h0, inputs):
    """Run torch's module from the field's initial state; its output and final states by the field's names."""
    count = module.num_layers
    part = field.components if count > 1 else {f"layers.0.{k}": v for k, v in field.components.items()}
    h = torch.stack([h0[:, part[f"layers.{k}.hidden"]] for k in range(count)])
    if isinstance(module, nn.GRU):
        output, h_n = module(inputs, h)
        return output, {f"layers.{k}.hidden": h_n[k] for k in range(count)}, part
    c = torch.stack([h0[:, part[f"layers.{k}.cell"]] for k in range(count)])
    output, (h_n, c_n) = module(inputs, (h, c))
    final = {f"layers.{k}.hidden": h_n[k] for k in range(count)}
    return output, final | {f"layers.{k}.cell": c_n[k] for k in range(count)}, part


@pytest.mark.parametrize("tau", [1.0, 0.37])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("normal", [False, True], ids=["default", "normal"])
@pytest.mark.parametrize("layers", [1, 3])
def test_one_euler_step_is_the_torch_cell(kinds, tools, layers, normal, bias, tau):
    cls, recurrent, _ = kinds
    module = module_of(recurrent, tools, INPUTS, HIDDEN, layers, bias=bias, normal=normal)
    field = cls.from_torch(module, tau=tau)
    assert isinstance(field, Stack if layers > 1 else cls)
    h0 = 0.5 * tools.randn(BATCH, field.state_size)
    inputs = tools.randn(STEPS, BATCH, INPUTS, seed=2)
    cotangent = tools.randn(STEPS, BATCH, HIDDEN, seed=3)

    leaves = [x.clone().requires_grad_() for x in (h0, inputs)]
    states = euler(field, tau, *leaves)
    theirs = [x.clone().requires_grad_() for x in (h0, inputs)]
    output, final, part = torch_run(module, field, *theirs)

    scale = max(1.0, output.abs().max().item(), *(value.abs().max().item() for value in final.values()))
    assert (states[..., field.output] - output).abs().max() <= 1e-14 * scale
    for name, value in final.items():
        assert (states[-1][:, part[name]] - value).abs().max() <= 1e-14 * scale

    (states[..., field.output] * cotangent).sum().backward()
    (output * cotangent).sum().backward()
    pairs = [(own.grad, other.grad) for own, other in zip(leaves, theirs, strict=True)]
    for k in range(layers):
        layer = field.layers[k] if layers > 1 else field
        for name, parameter in layer.named_parameters():
            pairs.append((parameter.grad, getattr(module, f"{name}_l{k}").grad))
    assert len(pairs) == 2 + layers * (4 if bias else 2)
    for own, other in pairs:
        assert (own - other).abs().max() <= 1e-12 * other.abs().max()


def test_float32_step(kinds, tools):
    cls, recurrent, _ = kinds
    module = module_of(recurrent, tools, INPUTS, HIDDEN, 3, dtype=torch.float32)
    field = cls.from_torch(module, tau=0.37)
    h0 = tools.randn(BATCH, field.state_size, dtype=torch.float32)
    inputs = tools.randn(STEPS, BATCH, INPUTS, seed=2, dtype=torch.float32)
    states = euler(field, 0.37, h0, inputs)
    output, _, _ = torch_run(module, field, h0, inputs)
    assert states.dtype == torch.float32
    assert (states[..., field.output] - output).abs().max() <= 2e-6


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_cells(kinds, tools, bias):
    cls, _, kind = kinds
    cell = module_of(kind, tools, INPUTS, HIDDEN, bias=bias)
    field = cls.from_torch(cell, tau=0.37)
    h, u = tools.randn(BATCH, field.state_size), tools.randn(BATCH, INPUTS, seed=2)
    after = euler(field, 0.37, h, u[None])[0]
    if cls is GRU:
        wanted = cell(u, h)
    else:
        hidden, memory = cell(u, (h[:, HIDDEN:], h[:, :HIDDEN]))
        wanted = torch.cat((memory, hidden), -1)
    assert (after - wanted).abs().max() <= 1e-14 * max(1.0, wanted.abs().max().item())
    back = field.to_torch(cell=True)
    assert type(back) is kind
    assert_same_weights(back, cell)
    assert back.bias is bias


def assert_same_weights(own, other):
    pairs = zip(own.named_parameters(), other.named_parameters(), strict=True)
    for (name, weight), (other_name, other_weight) in pairs:
        assert name == other_name
        assert weight.dtype == other_weight.dtype
        assert torch.equal(weight, other_weight)
        assert weight.data_ptr() != other_weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("layers", [1, 3])
def test_round_trip(kinds, tools, layers, bias, dtype):
    cls, recurrent, _ = kinds
    module = module_of(recurrent, tools, INPUTS, HIDDEN, layers, bias=bias, dtype=dtype, batch_first=True)
    back = cls.from_torch(module, tau=0.37).to_torch()
    assert type(back) is recurrent
    assert (back.num_layers, back.bias, back.batch_first) == (layers, bias, False)
    assert_same_weights(back, module)
    inputs = tools.randn(BATCH, STEPS, INPUTS, dtype=dtype)
    again = cls.from_torch(module).to_torch(batch_first=True)
    assert torch.equal(again(inputs)[0], module(inputs)[0])


def test_weights_are_clones(kinds, tools):
    cls, recurrent, _ = kinds
    module = module_of(recurrent, tools, INPUTS, HIDDEN)
    field = cls.from_torch(module)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
    assert field.weight_ih.count_nonzero() == field.weight_ih.numel()


def test_frozen_weights_stay_frozen(kinds, tools):
    cls, recurrent, _ = kinds
    module = module_of(recurrent, tools, INPUTS, HIDDEN)
    module.weight_hh_l0.requires_grad_(False)
    field = cls.from_torch(module)
    assert [name for name, p in field.named_parameters() if not p.requires_grad] == ["weight_hh"]
    assert not field.to_torch().weight_hh_l0.requires_grad


def test_conversions_leave_the_global_generator_alone(kinds, tools):
    cls, recurrent, _ = kinds
    module = module_of(recurrent, tools, INPUTS, HIDDEN, 2)
    before = torch.get_rng_state()
    field = cls.from_torch(module)
    field.to_torch()
    field.layers[1].to_torch(cell=True)
    assert torch.equal(before, torch.get_rng_state())


def test_learnable_tau_from_torch(kinds, tools):
    cls, recurrent, _ = kinds
    module = module_of(recurrent, tools, INPUTS, HIDDEN, 2)
    field = cls.from_torch(module, tau=0.37, learn_tau=True)
    assert field.layers[0].log_tau.exp().item() == pytest.approx(0.37, rel=1e-15)
    assert_same_weights(field.to_torch(), module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bidirectional": True}, "from_torch: module has bidirectional=True"),
        ({"dropout": 0.2, "num_layers": 2}, "from_torch: module has dropout=0.2"),
    ],
)
def test_from_torch_refuses_by_name(kinds, options, message):
    cls, recurrent, _ = kinds
    with pytest.raises(ValueError, match=message):
        cls.from_torch(recurrent(INPUTS, HIDDEN, **options))


def test_from_torch_refuses_projections_and_other_modules():
    with pytest.raises(ValueError, match="module has proj_size=2"):
        LSTM.from_torch(nn.LSTM(INPUTS, HIDDEN, proj_size=2))
    with pytest.raises(TypeError, match=r"GRU\.from_torch: module is a LSTM; it must be a torch\.nn\.GRU"):
        GRU.from_torch(nn.LSTM(INPUTS, HIDDEN))
    with pytest.raises(TypeError, match=r"LSTM\.from_torch: module is a RNN; .* torch\.nn\.LSTMCell"):
        LSTM.from_torch(nn.RNN(INPUTS, HIDDEN))
    with pytest.raises(ValueError, match=r"GRU\(tau=\.\.\.\): tau is -1\.0"):
        GRU.from_torch(nn.GRU(INPUTS, HIDDEN), tau=-1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": torch.ones(HIDDEN)}, "tau is one value per unit"),
        ({"layernorm": True}, "layernorm=True"),
        ({"input_size": 0}, "input_size is 0"),
    ],
)
def test_to_torch_refuses_by_name(kinds, options, message):
    cls, _, _ = kinds
    options = {"input_size": INPUTS, "hidden_size": HIDDEN} | options
    with pytest.raises(ValueError, match=f"{cls.__name__}.to_torch: torch cannot hold this field: {message}"):
        cls(**options).to_torch()


def test_to_torch_refuses_the_other_reset():
    with pytest.raises(ValueError, match='reset="before"'):
        GRU(INPUTS, HIDDEN, reset="before").to_torch()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (LSTM(HIDDEN, HIDDEN), "layer 1 has kind LSTM and layer 0 has GRU"),
        (GRU(HIDDEN, 2), "layer 1 has hidden_size 2 and layer 0 has 5"),
        (GRU(HIDDEN, HIDDEN, bias=False), "layer 1 has bias False"),
        (GRU(HIDDEN, HIDDEN, tau=2.0), "layer 1 has tau 2.0 and layer 0 has 1.0"),
        (GRU(HIDDEN, HIDDEN, dtype=torch.float64), "layer 1 has dtype torch.float64"),
        (GRU(HIDDEN, HIDDEN, layernorm=True), "layer 1: torch cannot hold this field: layernorm"),
    ],
)
def test_to_torch_refuses_layers_that_differ(second, message):
    with pytest.raises(ValueError, match=message):
        Stack([GRU(INPUTS, HIDDEN), second]).to_torch()


def test_to_torch_refuses_what_a_cell_cannot_be():
    stack = Stack([GRU(INPUTS, HIDDEN), GRU(HIDDEN, HIDDEN)])
    with pytest.raises(ValueError, match="the stack has 2 layers"):
        stack.to_torch(cell=True)
    with pytest.raises(ValueError, match="a torch cell has no time axis"):
        GRU(INPUTS, HIDDEN).to_torch(batch_first=True, cell=True)
    with pytest.raises(TypeError, match="layer 1 is a LTC; torch holds GRU and LSTM"):
        Stack([GRU(INPUTS, HIDDEN), LTC(HIDDEN, 2)]).to_torch()


def test_one_unit(kinds, tools):
    """H == 1, B == 1, and tau given as one value per unit of a one-unit cell."""
    cls, recurrent, _ = kinds
    module = module_of(recurrent, tools, 1, 1)
    field = cls.from_torch(module, tau=torch.tensor([0.37], dtype=torch.float64))
    h0, inputs = tools.randn(1, field.state_size), tools.randn(STEPS, 1, 1, seed=2)
    output, _, _ = torch_run(module, field, h0, inputs)
    assert (euler(field, 0.37, h0, inputs)[..., field.output] - output).abs().max() <= 1e-14
    assert_same_weights(field.to_torch(), module)
