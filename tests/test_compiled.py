"""Compiled loops: their elementary functions against numpy's long double, and cells that use them against the
same cells without, and against loops written here with autograd."""

import importlib
import sys
import threading
from functools import partial
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ctgate as ct
from ctgate.kernels import compiled
from ctgate.kernels.fused import EULER, run, run_back, run_tangent, walk
from ctgate.kernels.switch import fast_paths

pytest.importorskip("numba", reason="the extra fast is not installed")
elementary = importlib.import_module("ctgate.kernels.compiled.elementary")

# Of states and gradients, relative to the largest number: rounding of a few steps.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}


# --- elementary functions ---------------------------------------------------------------------------------


def over(function):
    """A compiled function of one number, over an array."""

    def loop(xs, ys):
        for i in range(xs.size):
            ys[i] = function(xs[i])

    return elementary.njit(loop, **elementary._OPTIONS)


EXACT = {"exp": np.exp, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "tanh": np.tanh}
BOUNDS = {"exp": 2.0, "sigmoid": 3.0, "tanh": 2.0}
LOOPS = {name: over(getattr(elementary, name)) for name in EXACT}
FLOATS = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def values(name, xs):
    ys = np.empty_like(xs)
    LOOPS[name](xs, ys)
    return ys


def arguments(dtype):
    """Dense where the functions bend, all that has a finite value, every size down to the smallest."""
    info, rng = np.finfo(dtype), np.random.default_rng(0)
    tiny = 10.0 ** rng.uniform(np.log10(float(info.smallest_subnormal)) + 0.5, 0.0, 50_000)
    low, high = float(np.log(info.tiny)), float(np.log(info.max)) - 0.5
    spread = [np.linspace(low, high, 200_001), np.linspace(-20.0, 20.0, 400_001), rng.normal(size=100_000)]
    return np.concatenate([*spread, tiny, -tiny]).astype(dtype)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="long double is no better than double here")
@FLOATS
@pytest.mark.parametrize("name", EXACT)
def test_elementary_functions_are_exact_to_some_units_in_the_last_place(name, dtype):
    """As the module says, where the value is a normal number; elsewhere to the smallest of these."""
    xs = arguments(dtype)
    ys, tiny = values(name, xs).astype(np.longdouble), np.finfo(dtype).tiny
    exact = EXACT[name](xs.astype(np.longdouble))
    units = np.spacing(np.maximum(np.abs(exact), tiny).astype(dtype)).astype(np.longdouble)
    error = np.abs(ys - exact) / units
    normal = np.abs(exact) >= tiny
    assert normal.mean() > 0.9
    assert error[normal].max() <= BOUNDS[name], xs[normal][error[normal].argmax()]
    assert (np.abs(ys - exact)[~normal] <= tiny).all()


@FLOATS
def test_ends(dtype):
    """Infinities, numbers that are too large, zeros and NaN."""
    xs = np.array([-np.inf, -1e30, -1e3, 0.0, 1e3, 1e30, np.inf], dtype)
    ends = {
        "exp": [0, 0, 0, 1, np.inf, np.inf, np.inf],
        "sigmoid": [0, 0, 0, 0.5, 1, 1, 1],
        "tanh": [-1, -1, -1, 0, 1, 1, 1],
    }
    for name, expected in ends.items():
        np.testing.assert_array_equal(values(name, xs), np.array(expected, dtype))
        nothing = values(name, np.full(40, np.nan, dtype))
        assert np.isnan(nothing).all()
        mixed = values(name, np.where(np.arange(40) % 3 == 0, np.nan, 0.3).astype(dtype))
        assert (np.isnan(mixed) == (np.arange(40) % 3 == 0)).all()


@FLOATS
@pytest.mark.parametrize("name", EXACT)
def test_nothing_falls_as_the_argument_grows(name, dtype):
    """Beyond the last place; across the ends of the range as well."""
    edge = float(np.log(np.finfo(dtype).max))
    xs = np.concatenate([np.linspace(-edge - 2, edge + 2, 20_001), [-1e4, 1e4]]).astype(dtype)
    ys = values(name, np.sort(xs))
    with np.errstate(invalid="ignore"):
        falls = np.diff(ys) < -4 * np.spacing(np.abs(ys[1:]))
    assert not falls.any()
    assert ys.min() >= (-1 if name == "tanh" else 0)
    assert name == "exp" or ys.max() == 1


# --- cells ------------------------------------------------------------------------------------------------

# Kind and the module of its loops.
KINDS = {
    "leaky": (partial(ct.Leaky, alpha=0.6), "gated"),
    "scalar": (ct.ScalarGate, "gated"),
    "multi": (ct.MultiGate, "gated"),
    "gru after": (ct.GRU, "gru"),
    "gru before": (partial(ct.GRU, reset="before"), "gru_before"),
    "lstm": (ct.LSTM, "lstm"),
    "ltc": (ct.LTC, "liquid"),
}


@pytest.fixture(scope="session", params=KINDS.values(), ids=KINDS.keys())
def kind(request):
    return request.param[0]


class Spy(ModuleType):
    """A module of loops that counts its calls."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module.__name__)
        self.module, self.calls = module, {"forward": 0, "backward": 0}

    def forward(self, *arguments) -> None:
        self.calls["forward"] += 1
        self.module.forward(*arguments)

    def backward(self, *arguments) -> None:
        self.calls["backward"] += 1
        self.module.backward(*arguments)

    def backward_within(self, *arguments) -> None:
        self.calls["backward"] += 1
        self.module.backward_within(*arguments)

    def __getattr__(self, name: str):
        return getattr(self.module, name)


@pytest.fixture
def spied(monkeypatch):
    """A function that gives how often loops were called, forwards and back, since it was last asked."""
    if not fast_paths():
        pytest.skip("fast paths are off")
    spies = {name: Spy(compiled.kernels(name)) for _, name in KINDS.values()}
    monkeypatch.setattr(walk, "kernels", spies.__getitem__)

    def calls() -> tuple[int, int]:
        found = tuple(sum(spy.calls[way] for spy in spies.values()) for way in ("forward", "backward"))
        for spy in spies.values():
            spy.calls = dict.fromkeys(spy.calls, 0)
        return found

    return calls


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def setting(kind, channels=3, hidden=4, samples=2, knots=6, dtype=torch.float64, **options):
    """A problem, and all that has a gradient, by name."""
    field = kind(channels, hidden, generator=torch.Generator().manual_seed(0), dtype=dtype, **options)
    h0 = draw(samples, field.state_size, seed=1, dtype=dtype).requires_grad_()
    wanted = {**dict(field.named_parameters()), "h0": h0}
    u = None
    if channels:
        wanted["xs"] = xs = draw(knots, samples, channels, seed=2, dtype=dtype).requires_grad_()
        u = ct.ZeroOrderHold(torch.arange(float(knots)), xs)
    else:
        del wanted["weight_ih"]
    return ct.ODEProblem(field, h0, (0.0, knots - 1.5), u), wanted


def weighed(hs: Tensor) -> Tensor:
    return (hs * torch.linspace(-1.0, 2.0, hs.numel(), dtype=hs.dtype).view(hs.shape)).sin().sum()


def results(prob, wanted, alg, **options):
    """Solution, states and gradients, these as they are scaled."""
    sol = ct.solve(prob, alg, **options)
    return sol, [sol.hs.detach(), *torch.autograd.grad(weighed(sol.hs), list(wanted.values()))]


def close(own, reference, tolerance):
    for x, y in zip(own, reference, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        if x.numel():
            error = (x - y).abs().max() / y.abs().max().clamp(min=1.0)
            assert error <= tolerance, f"{error:.1e} of {y.abs().max():.1e}"


def by_autograd(prob, wanted, times: list[float]):
    """Euler's steps between these times."""
    states = [prob.h0]
    for start, stop in pairwise(times):
        u = None if prob.control is None else prob.control.xs[int(start + 1e-9)]
        states.append(states[-1] + (stop - start) * prob.field(start, states[-1], u))
    hs = torch.stack(states)
    return [hs.detach(), *torch.autograd.grad(weighed(hs), list(wanted.values()))]


cases = st.fixed_dictionaries(
    {
        "channels": st.integers(0, 3),
        "hidden": st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 33, 64]),
        "samples": st.integers(1, 5),
        "bias": st.booleans(),
        "tau": st.sampled_from([1.0, 2.5]),
    }
)
# In units of tau; most leave a shorter step at the end of each interval.
STEPS = [1.0, 0.5, 0.3]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=cases, dt=st.sampled_from(STEPS), dtype=st.sampled_from(list(TOLERANCES)))
def test_steps_are_those_without_loops_and_those_of_autograd(kind, case, dt, dtype):
    # The cotangent of log tau is one sum of all, much of which cancels.
    prob, wanted = setting(kind, dtype=dtype, learn_tau=dtype == torch.float64, **case)
    alg = ct.Euler(dt * case["tau"])
    sol, own = results(prob, wanted, alg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "kernels", lambda name: None)
        _, plain = results(prob, wanted, alg)
    close(own, plain, TOLERANCES[dtype])
    close(own, by_autograd(prob, wanted, sol.ts.tolist()), TOLERANCES[dtype])


@pytest.mark.parametrize("learn_tau", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_stages_are_those_without_loops(kind, dtype, learn_tau, spied):
    """Steps of the same sizes. What is kept of an evaluation is overwritten unless log tau wants it."""
    prob, wanted = setting(kind, hidden=17, samples=3, knots=4, dtype=dtype, tau=0.7, learn_tau=learn_tau)
    alg = ct.RK4(0.4)
    _, own = results(prob, wanted, alg)
    forward, backward = spied()
    assert forward > 0
    assert backward > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "kernels", lambda name: None)
        _, plain = results(prob, wanted, alg)
    close(own, plain, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tangents_are_those_without_loops(kind, dtype, monkeypatch):
    """Two directions at once: of the state and, in different amounts, of all weights."""
    prob, _ = setting(kind, hidden=17, samples=3, dtype=dtype, tau=0.7)
    cell = prob.field.fuse({name: p.detach() for name, p in prob.named_parameters().items()})
    us, h0 = prob.control.xs.detach()[:4], prob.h0.detach()
    along = [
        {name: draw(*p.shape, seed=seed, dtype=dtype) for name, p in prob.named_parameters().items()}
        for seed in (3, 4)
    ]
    arguments = us, h0, [0.3, 0.7, 0.7, 0.2], EULER, along, draw(2, *h0.shape, seed=9, dtype=dtype)
    own = run_tangent(cell, *arguments)
    monkeypatch.setattr(walk, "kernels", lambda name: None)
    close(own, run_tangent(cell, *arguments), TOLERANCES[dtype])


def test_steps_that_choose_their_sizes(kind, spied):
    """The same number of them; where they end differs by the rounding of error estimates, which the tolerance
    of the solve makes small."""
    prob, wanted = setting(kind)
    options = {"rtol": 1e-10, "atol": 1e-12}
    one, own = results(prob, wanted, ct.Dopri5(), saveat=[1.0, 3.3], dense=False, **options)
    forward, backward = spied()
    assert forward >= 6 * one.stats.accepted
    assert backward >= 6 * one.stats.accepted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "kernels", lambda name: None)
        other, plain = results(prob, wanted, ct.Dopri5(), saveat=[1.0, 3.3], dense=False, **options)
    assert one.stats.accepted == other.stats.accepted
    close(own, plain, 1e-9)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ["h0", "xs", "weight_hh"])
def test_nan_stays_nan(kind, name, dtype):
    """Where the steps without loops have it, and nowhere else, and infinity too."""
    for bad in (float("nan"), float("inf")):
        prob, wanted = setting(kind, hidden=17, dtype=dtype)
        with torch.no_grad():
            wanted[name].view(-1)[-1] = bad
        found = []
        for module in (walk.kernels, lambda name: None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(walk, "kernels", module)
                cell = prob.field.fuse({k: p.detach() for k, p in prob.field.named_parameters()})
                us, h0 = prob.control.xs.detach(), prob.h0.detach()
                sizes = [0.5] * len(us)
                states, parts = run(cell, us, h0, sizes, EULER)
                a, *_ = run_back(cell, us, states, parts, sizes, EULER, torch.ones_like(states))
                found.append(torch.cat([states, a]))
        assert bad == bad or not found[0].isfinite().all()
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4, equal_nan=True)


# --- what is taken ----------------------------------------------------------------------------------------


def test_loops_are_taken(kind, spied):
    """In every step, forwards and back."""
    prob, wanted = setting(kind)
    sol, _ = results(prob, wanted, ct.Euler(0.5))
    assert spied() == (len(sol.ts) - 1, len(sol.ts) - 1)


def test_loops_do_not_know_all(kind, spied):
    """Other rules, a tau per unit, steps of each sample's own, half precision."""
    for options, alg in (({}, ct.ExponentialEuler(0.5)), ({"tau": draw(4).exp()}, ct.Euler(0.5))):
        results(*setting(kind, **options), alg)
        assert spied() == (0, 0)
    prob, wanted = setting(kind)
    stops = torch.tensor([4.5, 2.0], dtype=torch.float64)
    results(ct.remake(prob, tspan=(torch.zeros(2), stops)), wanted, ct.Euler(0.5))
    assert spied() == (0, 0)
    results(*setting(kind, dtype=torch.bfloat16), ct.Euler(0.5))
    assert spied() == (0, 0)


@pytest.mark.parametrize("kind", [kind for name, (kind, _) in KINDS.items() if name != "ltc"])
def test_loops_do_not_normalise(kind, spied):
    results(*setting(kind, layernorm=True), ct.Euler(0.5))
    assert spied() == (0, 0)


@pytest.mark.parametrize("broken", [None, "without compiling"])
def test_without_numba(kind, broken, monkeypatch):
    """Absent, or told not to compile: the same numbers by torch alone."""
    prob, wanted = setting(kind)
    _, own = results(prob, wanted, ct.Euler(0.5))
    numba = None if broken is None else sys.modules["numba"]
    if numba is not None:
        monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    monkeypatch.setitem(sys.modules, "numba", numba)
    compiled.available.cache_clear()
    try:
        assert not compiled.available()
        assert compiled.kernels("gru") is None
        _, plain = results(prob, wanted, ct.Euler(0.5))
    finally:
        compiled.available.cache_clear()
    close(own, plain, 1e-12)


# --- threads, and where machine code is kept --------------------------------------------------------------


def test_threads_do_not_meet(kind):
    """Each its own problem, of its own size, over and over."""
    sizes = (5, 33)
    problems = [setting(kind, hidden=size, samples=4, knots=30) for size in sizes]
    expected = [results(*problem, ct.Euler(0.5))[1] for problem in problems]
    found: list[list[list[Tensor]]] = [[] for _ in sizes]
    ready = threading.Barrier(len(sizes))

    def work(which: int) -> None:
        ready.wait()
        found[which].extend(results(*problems[which], ct.Euler(0.5))[1] for _ in range(10))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, reference in zip(found, expected, strict=True):
        assert len(own) == 10
        for each in own:
            close(each, reference, 0.0)


SOURCE = """
from ctgate.kernels.compiled.elementary import compiled, tanh

@compiled
def loop(xs):
    for i in range(xs.size):
        xs[i] = tanh(xs[i])
"""


@pytest.mark.parametrize("place", ["beside it", "the user's", "none"])
def test_machine_code_is_kept_where_it_can_be(place, tmp_path, monkeypatch):
    """A file in place of a directory cannot be written into, by nobody."""
    folder, cache = tmp_path / "package", tmp_path / "cache"
    folder.mkdir()
    (folder / f"loops_{place[:3]}.py").write_text(SOURCE)
    if place != "beside it":
        (folder / "__pycache__").write_text("")
    if place == "none":
        cache.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("HOME", str(cache))
    monkeypatch.setenv("LOCALAPPDATA", str(cache))
    monkeypatch.syspath_prepend(folder)
    xs = np.linspace(-1.0, 1.0, 9)
    expected = np.tanh(xs)
    importlib.import_module(f"loops_{place[:3]}").loop(xs)
    np.testing.assert_allclose(xs, expected, rtol=1e-15)
    kept = {"beside it": folder / "__pycache__", "the user's": cache}.get(place)
    assert kept is None or list(kept.rglob("*.nbi"))
    assert sum(1 for _ in tmp_path.rglob("*.nbc")) == (0 if kept is None else 1)


def test_machine_code_on_disk_is_that_of_these_elementary_functions():
    """Its name tells with which source it was made."""
    loop = compiled.kernels("gru").forward
    assert loop.py_func.__qualname__ == f"forward_{elementary._VERSION}"
