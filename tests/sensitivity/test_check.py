"""The table of all ways to a gradient, and the count of bytes in it."""

import math
import warnings

import pytest
import torch
from torch import Tensor

import ctgate as ct
from ctgate.sensitivity.memory import TensorMemory
from tests.typechecker import unchecked

DOUBLE = torch.float64


def problem() -> ct.ODEProblem:
    generator = torch.Generator().manual_seed(0)
    field = ct.GRU(2, 3, dtype=DOUBLE, learn_tau=True, generator=generator)
    values = torch.randn(4, 2, 2, dtype=DOUBLE, generator=generator)
    control = ct.ZeroOrderHold(torch.linspace(0.0, 2.0, 5, dtype=DOUBLE), values)
    return ct.ODEProblem(
        field, torch.randn(2, 3, dtype=DOUBLE, generator=generator), (0.0, 2.0), control=control
    )


LOSS = ct.Loss(terminal=lambda h: h.square().sum(-1), at=([0.7, 1.5], lambda k, h: (k + 1) * h.sin().sum(-1)))


def test_all_ways_agree_on_a_flow() -> None:
    table = ct.check_sensitivities(problem(), LOSS, ct.Dopri5(), rtol=1e-7)
    assert table.sizes == {"way": 8, "parameter": 6}
    assert (table["note"] == "").all(), table["note"].values
    # Errors of a solve to 1e-7 over two time constants; the reference is a thousand times finer.
    for name in ("error", "difference_error", "identity_error"):
        assert float(table[name].max()) < 2e-6, table[name]
    assert (table["evaluations_forward"] > 50).all()
    carried = [name for name in table["way"].values if name.startswith("Forward")]
    assert (table["evaluations_backward"].drop_sel(way=carried) > 0).all()
    assert (table["peak_memory"] > 0).all()
    assert (table["seconds"] > 0.0).all()


def test_a_map_has_its_own_gradient() -> None:
    """Discrete and forward derivatives are those of Euler's map; the adjoint equation is that of the flow."""
    table = ct.check_sensitivities(problem(), ct.Loss(terminal=lambda h: h.square().sum(-1)), ct.Euler(0.1))
    exact = [repr(ct.DiscreteAdjoint()), repr(ct.ForwardSensitivity()), "adjoint(sol, loss)"]
    assert float(table["error"].sel(way=exact).max()) < 1e-12
    assert float(table["identity_error"].sel(way=exact).max()) < 1e-12
    # Central differences of order 4 with a step of eps^(1/5).
    assert float(table["difference_error"].sel(way=exact).max()) < 1e-9
    flow = table.sel(way=repr(ct.GaussAdjoint()))
    assert 1e-3 < float(flow["error"].max()) < 0.3
    refused = table.sel(way=repr(ct.BacksolveAdjoint()))
    assert "Euler" in str(refused["note"].values)
    assert math.isnan(float(refused["error"].max()))
    assert int(refused["evaluations_forward"]) == -1


def test_it_finds_the_gradient_that_is_wrong() -> None:
    """A fast leaky unit that drives a slow one: backsolve is wrong (THEORY.md 6), the others are not."""
    rates = torch.tensor([10.0, 0.5], dtype=DOUBLE)

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=DOUBLE))

        def forward(self, t: Tensor, h: Tensor, u: Tensor | None) -> Tensor:
            return -rates * h + torch.tanh(h) @ self.weight.mT

    prob = ct.ODEProblem(ct.Field(Two()), torch.tensor([1.0, 0.5], dtype=DOUBLE), (0.0, 4.0))
    ways = [ct.DiscreteAdjoint(), ct.GaussAdjoint(), ct.BacksolveAdjoint()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        table = ct.check_sensitivities(
            prob, ct.Loss(terminal=lambda h: h[..., 1]), ct.Dopri5(), sensealgs=ways
        )
    error = table["error"].sel(parameter="fn.weight")
    backsolve = repr(ct.BacksolveAdjoint())
    assert float(error.sel(way=backsolve)) > 0.05
    assert float(error.drop_sel(way=backsolve).max()) < 1e-5


def test_the_callers_gradients_are_left_alone() -> None:
    prob = problem()
    before = torch.random.get_rng_state()
    ct.check_sensitivities(prob, LOSS, ct.Euler(0.5), sensealgs=[ct.DiscreteAdjoint()])
    assert all(parameter.grad is None for parameter in prob.field.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_no_sensealg_is_refused() -> None:
    with pytest.raises(TypeError, match=r"sensealgs=.*'discrete'"):
        unchecked(ct.check_sensitivities)(problem(), LOSS, ct.Euler(0.5), sensealgs=["discrete"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prob": None}, r"prob is NoneType; it must be a ct\.ODEProblem"),
        ({"loss": torch.sum}, r"loss is .*; it must be a ct\.Loss"),
        ({"sensealgs": ct.DiscreteAdjoint()}, "it must be a list of them"),
        ({"seed": "one"}, "seed is 'one'"),
    ],
)
def test_what_is_of_the_wrong_kind_is_named(changes: dict[str, object], says: str) -> None:
    arguments = {"prob": problem(), "loss": LOSS, "alg": ct.Euler(0.5), **changes}
    with pytest.raises(TypeError, match=says):
        unchecked(ct.check_sensitivities)(**arguments)


def test_bytes_alive_at_once() -> None:
    with TensorMemory() as memory:
        x = torch.zeros(100, dtype=DOUBLE)
        assert memory.now == 800
        y = x + 1.0
        z = y.view(10, 10)
        assert memory.now == memory.peak == 1600
        del y
        assert memory.now == 1600  # the view holds it
        del z
        assert memory.now == 800
        x.add_(1.0)
    assert memory.peak == 1600
