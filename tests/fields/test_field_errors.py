"""Bad arguments are refused early and by name."""

import pytest
import torch

from ctgate.fields import GRU, LSTM, LTC, Field, GatedRate, Leaky, MultiGate, ScalarGate

CELLS = [Leaky, ScalarGate, MultiGate, GRU, LSTM, LTC, GatedRate]


@pytest.fixture(params=CELLS, ids=lambda cls: cls.__name__)
def cls(request):
    return request.param


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        (-0.5, r"tau is -0\.5; it must be positive and finite"),
        (0.0, r"tau is 0\.0; it must be positive"),
        (float("nan"), "tau is nan; it must be positive"),
        (float("inf"), "tau is inf; it must be positive and finite"),
        (torch.tensor([1.0, 0.0, 2.0]), r"tau is \[1\.0, 0\.0, 2\.0\]; it must be positive"),
        (torch.ones(4), r"tau has shape \(4,\); it must be a scalar or one value per unit, \(3,\)"),
        (1e-60, r"tau is 0\.0; it must be positive"),
    ],
)
@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
def test_tau(cls, tau, message, learn):
    with pytest.raises(ValueError, match=rf"{cls.__name__}\(tau=\.\.\.\): {message}"):
        cls(2, 3, tau=tau, learn_tau=learn, dtype=torch.float32)


def test_tau_that_is_no_time(cls):
    with pytest.raises(TypeError, match=r"tau is a bool; it must be a float or a tensor"):
        cls(2, 3, tau=True)
    with pytest.raises(ValueError, match="tau requires grad, and the field would keep a copy"):
        cls(2, 3, tau=torch.tensor(1.0, requires_grad=True))


@pytest.mark.parametrize("name", ["tau_z", "tau_r"])
def test_gate_time_constants(name):
    with pytest.raises(ValueError, match=rf"GatedRate\({name}=\.\.\.\): {name} is -1\.0"):
        GatedRate(2, 3, **{name: -1.0})


def test_sizes(cls):
    with pytest.raises(ValueError, match="hidden_size is 0; it must be an integer >= 1"):
        cls(2, 0)
    with pytest.raises(ValueError, match="input_size is -1; it must be an integer >= 0"):
        cls(-1, 3)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.5, float("nan")])
def test_alpha(alpha):
    with pytest.raises(ValueError, match=r"alpha is .*; it must be in \(0, 1\]"):
        Leaky(2, 3, alpha=alpha)


def test_phi_and_fn_must_be_functions():
    with pytest.raises(TypeError, match="phi"):
        Leaky(2, 3, phi="tanh")
    with pytest.raises(TypeError, match="fn"):
        Field(torch.ones(3))


def test_reset():
    with pytest.raises(ValueError, match=r'reset is .never.; it must be "after" \(torch\) or "before"'):
        GRU(2, 3, reset="never")


def test_shapes_of_state_and_input(case):
    field = case.build(2, 3)
    h, u = field.initial_state((4,)), torch.zeros(4, 2)
    size, name = field.state_size, type(field).__name__
    with pytest.raises(ValueError, match=rf"{name}: h has shape \(4, 99\); .* state_size = {size}"):
        field(0.0, torch.zeros(4, 99), u)
    with pytest.raises(ValueError, match=r"h has shape \(4, 99\)"):
        field.gates(0.0, torch.zeros(4, 99), u)
    with pytest.raises(ValueError, match=r"u has shape \(4, 5\); its last dimension must be input_size = 2"):
        field(0.0, h, torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"u is None; the field has input_size = 2"):
        field(0.0, h)
    with pytest.raises(ValueError, match=r"u has batch shape \(4,\), which does not broadcast"):
        field.check_arguments(h[0], u)
    with pytest.raises(ValueError, match=r"u has shape \(4, 1\); its last dimension must be input_size = 0"):
        case.build(0, 3)(0.0, h, torch.zeros(4, 1))


def test_a_batch_of_inputs_does_not_enlarge_a_batch_of_one(case):
    """The run-time type checks of the tests would speak first, so the check is called directly."""
    field = case.build(2, 3)
    with pytest.raises(
        ValueError, match=r"batch shape \(4,\), which does not broadcast to the batch shape \(1,\)"
    ):
        field.check_arguments(field.initial_state((1,)), torch.zeros(4, 2))


def test_dtypes(case):
    field = case.build(2, 3, dtype=torch.float64)
    h, u = field.initial_state((4,)), torch.zeros(4, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"h is torch\.float32 on cpu and the parameters are torch\.float64"):
        field(0.0, h.float(), u)
    with pytest.raises(TypeError, match=r"u is torch\.float32 on cpu and the parameters are torch\.float64"):
        field(0.0, h, u.float())


def test_devices(case):
    field = case.build(2, 3)
    with pytest.raises(TypeError, match=r"u is torch\.float32 on meta and the parameters are .* on cpu"):
        field(0.0, field.initial_state((4,)), torch.zeros(4, 2, device="meta"))


def test_field_sizes():
    field = Field(lambda t, h, u: -h, state_size=3, input_size=2)
    with pytest.raises(ValueError, match=r"Field: h has shape \(4, 2\); .* state_size = 3"):
        field(0.0, torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"Field: u is None; the field has input_size = 2"):
        field(0.0, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"Field\(state_size=\.\.\.\): state_size is 0"):
        Field(lambda t, h, u: -h, state_size=0)
    with pytest.raises(ValueError, match=r"Field\.initial_state: state_size is None"):
        Field(lambda t, h, u: -h).initial_state()


def test_a_scalar_is_no_state():
    """The run-time type checks of the tests would speak first, so the check is called directly."""
    for field in (GRU(1, 1), Field(lambda t, h, u: -h)):
        with pytest.raises(ValueError, match=r"h has shape \(\)"):
            field.check_arguments(torch.zeros(()), torch.zeros(1))
        with pytest.raises(ValueError, match=r"u has shape \(\)"):
            field.check_arguments(torch.zeros(1), torch.zeros(()))


def test_field_keeps_a_wrong_shape_visible():
    """solve must be able to see it: drive - 0 * h would have broadcast it to the shape of h."""
    field = Field(lambda t, h, u: h.sum(-1, keepdim=True))
    h = torch.zeros(4, 3)
    assert field(0.0, h).shape == (4, 1)
    assert field.rate_drive(0.0, h)[1].shape == (4, 1)
