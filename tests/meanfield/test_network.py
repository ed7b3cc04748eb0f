"""Random networks: what is drawn, what is refused, and what a changed copy keeps."""

import numpy as np
import pytest
import torch

import ctgate as ct
from ctgate.meanfield import RandomNetwork
from ctgate.meanfield.network import BLOCKS
from tests.typechecker import unchecked

SIZE = 400
GAINS = {"h": 1.5, "z": 0.5, "r": 2.0, "i": 0.5, "f": 1.0, "g": 2.0, "o": 0.0}
BIASES = {"h": 0.1, "z": -0.2, "r": 0.3, "i": -0.4, "f": 0.5, "g": 0.6, "o": -0.7}


def network(kind: type[ct.VectorField], **changes: object) -> RandomNetwork:
    blocks = BLOCKS[kind]
    return RandomNetwork(kind, SIZE, {k: GAINS[k] for k in blocks}, {k: BIASES[k] for k in blocks}, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_blocks_have_their_gains_and_biases(kind: type[ct.VectorField]) -> None:
    field = network(kind, input_variance=0.5, seed=3).draw()
    parameters = dict(field.named_parameters())
    bias = parameters["bias_ih"] if "bias_ih" in parameters else parameters["bias"]
    start = 0
    for block in BLOCKS[kind]:
        rows = 1 if kind is ct.ScalarGate and block == "z" else SIZE
        part = slice(start, start + rows)
        start += rows
        assert bias[part].detach().numpy() == pytest.approx(BIASES[block])
        for name in ("weight_hh", "weight_ih"):
            weight = parameters[name][part].detach().numpy()
            # The variance of n Gaussians is off by sqrt(2 / n).
            wanted = GAINS[block] ** 2 / SIZE
            assert (weight**2).mean() == pytest.approx(wanted, rel=5.0 * (2.0 / weight.size) ** 0.5)
            assert abs(weight.mean()) <= 5.0 * (wanted / weight.size) ** 0.5
    assert start == len(bias)
    if "bias_hh" in parameters:
        assert not parameters["bias_hh"].any()


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    one, same = network(ct.GRU, seed=1).draw(), network(ct.GRU, seed=2).draw(seed=1)
    other = network(ct.GRU, seed=2).draw()
    assert torch.equal(one.weight_hh, same.weight_hh)
    assert not torch.equal(one.weight_hh, other.weight_hh)
    assert torch.equal(torch.get_rng_state(), state)
    low = network(ct.GRU, seed=1).draw(dtype=torch.float32)
    assert torch.equal(low.weight_hh, one.weight_hh.to(torch.float32))


def test_the_pre_activations_have_the_variance_of_the_theory() -> None:
    """a^2 (q + v), and the candidate's bias outside the reset gate in both conventions."""
    for reset in ("before", "after"):
        drawn = network(ct.GRU, reset=reset, input_variance=0.5, seed=0)
        field, u = drawn.draw(), drawn.draw_input(seed=1)
        assert field.reset == reset
        h = torch.randn(SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        z = field.gates(0.0, h, u)["update"]
        pre = torch.logit(z).detach().numpy()
        wanted = GAINS["z"] ** 2 * (float(h.square().mean()) + float(u.square().mean()))
        assert pre.var() == pytest.approx(wanted, rel=5.0 * (2.0 / SIZE) ** 0.5)
        still = torch.zeros(SIZE, dtype=torch.float64)
        rate, drive = field.rate_drive(0.0, still, torch.zeros_like(u))
        assert (drive / rate).detach().numpy() == pytest.approx(np.tanh(BIASES["h"]))


def test_a_network_without_input_has_no_channels() -> None:
    drawn = network(ct.LSTM)
    assert drawn.draw().input_size == 0
    assert drawn.draw_input() is None
    u = network(ct.LSTM, input_variance=2.0).draw_input((3,), dtype=torch.float32)
    assert u.shape == (3, SIZE)
    assert u.dtype == torch.float32
    assert float(u.square().mean()) == pytest.approx(2.0, rel=0.2)


def test_a_changed_copy() -> None:
    base = network(ct.GRU, seed=5)
    changed = base.at("gains.h", 3.0).at("biases.z", 1.0).at("input_variance", 0.3)
    assert (changed.gains["h"], changed.bias("z"), changed.input_variance) == (3.0, 1.0, 0.3)
    assert (changed.gains["r"], changed.seed) == (base.gains["r"], 5)
    assert base.gains["h"] == GAINS["h"]
    assert RandomNetwork(ct.Leaky, 3, {"h": 1.0}).bias("h") == 0.0


def test_gates_that_are_left_out_have_no_block() -> None:
    plain = RandomNetwork(
        ct.GatedRate, 10, {"h": 1.0}, options={"update_gate": False, "reset_gate": False, "tau": 2.0}
    )
    assert plain.blocks == ("h",)
    field = plain.draw()
    assert field.weight_hh.shape == (10, 10)
    assert float(field.tau) == 2.0
    with pytest.raises(ValueError, match="GatedRate has no 'z'"):
        plain.at("gains.z", 1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"field": ct.LTC}, TypeError, "must be one of Leaky, ScalarGate"),
        ({"size": 0}, ValueError, "size is 0"),
        ({"reset": "between"}, ValueError, "'before' or 'after'"),
        ({"gains": {"h": 1.0, "z": 1.0}}, ValueError, "the gain of 'r' is missing"),
        ({"gains": {"h": 1.0, "z": 1.0, "r": -1.0}}, ValueError, "that of 'r' is -1.0"),
        ({"gains": {"h": 1.0, "z": 1.0, "r": float("nan")}}, ValueError, "that of 'r' is nan"),
        ({"biases": {"f": 1.0}}, ValueError, "GRU has no 'f'; it has r, z, h"),
        ({"input_variance": -1.0}, ValueError, "must not be negative"),
    ],
)
def test_what_does_not_fit_is_named(arguments, error, message) -> None:
    given = {"field": ct.GRU, "size": 4, "gains": {"h": 1.0, "z": 1.0, "r": 1.0}} | arguments
    with pytest.raises(error, match=message):
        unchecked(RandomNetwork)(**given)


def test_a_reset_belongs_to_a_gru() -> None:
    with pytest.raises(ValueError, match="the field LSTM"):
        unchecked(RandomNetwork)(ct.LSTM, 4, dict.fromkeys("ifgo", 1.0), reset="after")
