"""The benchmark of speed: what it concludes from right and wrong results, and whether its references are."""

import dataclasses
import gc
import importlib.util
import json
import math
import runpy
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import ctgate as ct
from ctgate.cli import main
from ctgate.experiments import speed
from ctgate.experiments.speed import adaptive, dopri5, memory, presets, rows, stiff
from ctgate.experiments.speed.compare import Found, checks, relative, timed
from ctgate.experiments.speed.driven import Driven
from ctgate.experiments.speed.lines import ERROR, MEMORY, Check, Line, Target
from ctgate.experiments.speed.pairing import Pairing, paired
from ctgate.experiments.speed.peers import NAMES, Flow, gru_loop, held, joined, weights_of
from ctgate.experiments.speed.presets import FULL, PRESETS, QUICK, Preset, preset_from, target
from ctgate.experiments.speed.table import table, write

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    ROOT / "benchmarks" / "speed" / f"{name}.py"
    for name in ("discrete", "adaptive", "products", "dynamics", "meanfield", "record")
]
TINY = Preset(
    rounds=2,
    records=True,
    batch=3,
    gru=((3, 5),),
    lstm=((3, 5),),
    dense=(4,),
    per_step=(2, 6),
    hidden=4,
    span=3,
    tolerances=(1e-4,),
    knot_tolerance=1e-5,
    samples=4,
    sample_steps=5,
    sample_hidden=3,
    sample_loop=2,
    tangent_steps=5,
    lyapunov_size=6,
    lyapunov=((1, 2), (2, 1)),
    lyapunov_rounds=1,
    phase=4,
    phase_loop=3,
)


class FakeClock:
    """Time that passes only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, *seconds: float) -> partial[None]:
        """A callable that takes these times in turn, the last one ever after."""
        left = list(seconds)

        def work() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return partial(work)


def test_pairs_take_turns_after_a_warm_up_that_does_not_count():
    clock = FakeClock()
    ours, theirs = clock.worker("a", 100.0, 2.0), clock.worker("b", 50.0, 6.0, 8.0, 4.0)
    pairing = paired(ours, theirs, 3, clock=clock)
    assert pairing == Pairing((2.0, 2.0, 2.0), (6.0, 8.0, 4.0))
    assert pairing.ratios == (3.0, 4.0, 2.0)
    assert "".join(clock.calls) == "ab" + "ab" + "ba" + "ab"


def test_what_slows_a_whole_round_down_does_not_count():
    clock = FakeClock()
    pairing = paired(
        clock.worker("a", 1.0, 1.0, 5.0, 1.0), clock.worker("b", 3.0, 3.0, 15.0, 3.0), 3, clock=clock
    )
    assert pairing.ratios == (3.0, 3.0, 3.0)


def test_short_work_is_repeated_and_counted_per_call():
    clock = FakeClock()
    pairing = paired(clock.worker("a", 0.25), clock.worker("b", 2.0), 1, shortest=1.0, clock=clock)
    assert clock.calls == ["a", "b", *"aaaa", "b"]
    assert pairing.ratios == (8.0,)


def test_pairing_leaves_the_garbage_collector_as_it_was():
    seen = []
    paired(lambda: seen.append(gc.isenabled()), lambda: None, 1, shortest=0.0)
    assert seen == [False, False]
    assert gc.isenabled()


def test_pairing_refuses_no_rounds():
    with pytest.raises(ValueError, match=r"rounds is 0; it must be at least 1"):
        paired(lambda: None, lambda: None, 0)


LARGER = "below: our error is larger"
RIGHT, WRONG = Check("states", 1e-7, 1e-5), Check("gradients", 2e-3, 1e-4)


@pytest.mark.parametrize(
    ("parts", "verdict", "wrong"),
    [
        ({"ratios": (1.3, 1.5, 1.6), "target": Target(1.4)}, "meets", False),
        ({"ratios": (1.3, 1.3, 1.6), "target": Target(1.4)}, "below", False),
        ({"ratios": (0.1,), "target": Target(0.125, True)}, "meets", False),
        ({"ratios": (0.13,), "target": Target(0.125, True)}, "above", False),
        ({"ratios": (math.nan,), "target": Target(0.125, True)}, "above", False),
        ({"ratios": (0.2,)}, "for the record", False),
        ({"ratios": (2.0,), "target": Target(1.0), "errors": (1e-6, 1e-6)}, "meets", False),
        ({"ratios": (2.0,), "target": Target(1.0), "errors": (2e-6, 1e-6)}, LARGER, False),
        ({"ratios": (2.0,), "target": Target(1.0), "errors": (math.nan, 1.0)}, LARGER, False),
        ({"checks": (RIGHT, WRONG), "target": Target(1.0)}, "wrong: gradients 2.0e-03 > 1e-04", True),
        ({"checks": (Check("states", math.nan, 1.0),), "ratios": (2.0,)}, "wrong: states nan > 1e+00", True),
        ({"skipped": "jax is not here", "target": Target(1.0)}, "not run: jax is not here", False),
        ({"failed": "ValueError: no"}, "failed: ValueError: no", True),
    ],
)  # fmt: skip
def test_verdicts(parts, verdict, wrong):
    line = Line("1", "work", "other", **parts)
    assert line.verdict == verdict
    assert line.wrong == wrong


def sample_lines() -> list[Line]:
    return [
        Line("1", "work", "nn.GRU", ratios=(1.0, 2.0, 3.0), target=Target(1.4), checks=(RIGHT,)),
        Line("4", "work", "torchdiffeq", MEMORY, (0.0625,), Target(0.125, True), errors=(1e-6, 2e-6)),
        Line("6", "work", "diffrax", skipped="diffrax not installed"),
        Line("7", "work", "adjoint", ERROR, note="it is not finite", numbers={"ours [s]": 0.25}),
        Line("8", "work", "loop", checks=(WRONG, Check("states", math.inf, 1.0))),
    ]


def test_lines_survive_json():
    for line in sample_lines():
        assert Line.from_dict(json.loads(json.dumps(line.to_dict()))) == line
    assert preset_from(json.loads(json.dumps(dataclasses.asdict(FULL)))) == FULL


def test_the_table_says_what_was_found():
    text = table(sample_lines()).splitlines()
    assert text[0].split() == ["row", "workload", "against", "ratio", "quartiles", "target", "verdict"]
    first = text[2].split()
    assert first == ["1", "work", "nn.GRU", "2", "1.5", "to", "2.5", ">=", "1.4", "meets"]
    assert text[3].strip() == "states 1.0e-07"
    assert text[4].split()[-4:] == ["0.0625", "<=", "0.125", "meets"]
    assert text[5].endswith("not run")
    assert text[6].strip() == "diffrax not installed"
    assert text[8].strip() == "it is not finite, ours [s] 0.25"
    assert text[9].endswith("wrong")
    assert text[10].strip().startswith("gradients 2.0e-03 > 1e-04, states inf > 1e+00")


def test_the_file_is_json_that_everybody_reads(tmp_path):
    path = write(tmp_path / "speed.json", sample_lines(), "full", FULL, "cpu")
    stored = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert list(tmp_path.iterdir()) == [path]
    assert (stored["preset"], stored["sizes"]["rounds"]) == ("full", FULL.rounds)
    assert {"device", "processor", "threads", "versions"} <= set(stored["machine"])
    assert stored["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    first, *_, last = stored["lines"]
    assert (first["median"], first["quartiles"], first["verdict"]) == (2.0, [1.5, 2.5], "meets")
    assert last["checks"][1]["error"] is None


def test_a_result_that_is_wrong_is_not_timed():
    def never() -> None:
        raise AssertionError("it was timed")

    found, other = Found(torch.ones(2, 3)), Found(torch.ones(2, 3) + 1e-3)
    line = Line("1", "w", "o", checks=checks(found, other, (1e-4, 1.0)), target=Target(1.0))
    assert timed(line, never, never, 3, "cpu") is line
    assert line.wrong


def test_errors_are_relative_to_the_largest_entry_of_each():
    reference = [torch.tensor([10.0, 1.0]), torch.tensor([0.1])]
    assert relative([torch.tensor([10.0, 1.5]), torch.tensor([0.1])], reference) == pytest.approx(0.05)
    assert relative([torch.tensor([10.0, 1.0]), torch.tensor([0.2])], reference) == pytest.approx(1.0)
    assert relative([], []) == 0.0
    assert math.isnan(relative([torch.tensor([math.nan])], [torch.tensor([1.0])]))
    assert math.isnan(relative([torch.tensor([1.0]), torch.tensor([math.nan])], reference[1:] * 2))


def test_references_are_torch_s_own_cell():
    torch_cell = nn.GRU(2, 3, dtype=torch.float64)
    xs = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = dict(zip(NAMES, weights_of(torch_cell), strict=True))
    states = gru_loop(weights, torch.zeros(5, 3, dtype=torch.float64), xs)
    torch.testing.assert_close(states[1:], torch_cell(xs)[0], rtol=1e-13, atol=1e-13)
    flow = Flow(torch_cell, held(xs))
    last = states[2] + flow(torch.tensor(2.5), states[2])
    torch.testing.assert_close(last, states[3], rtol=1e-13, atol=1e-13)
    assert [p.shape for p in weights_of(flow)] == [p.shape for p in torch_cell.parameters()]


def test_inputs_of_the_references_are_those_of_the_controls():
    xs = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ts = torch.arange(5, dtype=torch.float64)
    lines, steps = ct.LinearInterpolation(ts, xs), ct.ZeroOrderHold(ts, xs)
    for t in (0.0, 0.25, 1.0, 2.75, 4.0):
        torch.testing.assert_close(joined(xs)(torch.tensor(t)), lines(t), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(held(xs)(torch.tensor(t)), steps(t), rtol=0, atol=0)
    torch.testing.assert_close(held(xs)(torch.tensor(9.0)), xs[-1], rtol=0, atol=0)


def test_the_reference_s_steps_are_of_order_five():
    assert [sum(row) for row in dopri5._STAGES] == pytest.approx(dopri5._NODES, abs=1e-14)
    assert sum(dopri5._WEIGHTS) == pytest.approx(1.0, abs=1e-14)

    def error(steps: int) -> float:
        y = torch.ones(1, dtype=torch.float64)
        found = dopri5.along(lambda t, h: torch.cos(t) - h, y, [2.0 * k / steps for k in range(steps + 1)])
        return abs(float(found) - 0.5 * (math.cos(2.0) + math.sin(2.0) + math.exp(-2.0)))

    assert math.log2(error(8) / error(16)) == pytest.approx(5.0, abs=0.3)


@pytest.mark.parametrize("knots", [False, True])
def test_ours_and_torchdiffeq_solve_the_problem_of_the_reference(knots):
    case = Driven(3, 2, 2, knots=knots, dtype=torch.float64)
    for found in (case.gradient(1e-9), case.their_gradient(1e-9)):
        assert relative([found.states], [case.reference.states]) < 1e-6
        assert relative(found.gradients, case.reference.gradients) < 1e-6


def test_targets_belong_to_their_sizes_and_devices():
    assert target("cpu", "gru", 128, 256) == Target(1.2)
    assert target("cuda", "gru", 128, 256) == Target(0.9)
    assert target("cpu", "gru", 128, 255) is None
    assert target("cuda", "tangent", 128, 1024) is None
    named = {*presets._CPU, *presets._CUDA}
    assert {("gru", *size) for size in FULL.gru} | {("dense", FULL.hidden, t) for t in FULL.dense} <= named
    fields = [f.name for f in dataclasses.fields(Preset)]
    shorter = {name for name in fields if getattr(FULL, name) != getattr(QUICK, name)}
    lengths = {"rounds", "gru", "lstm", "dense", "tolerances", "sample_loop", "tangent_steps", "lyapunov"}
    assert shorter == {"records", *lengths}
    assert min(FULL.rounds, QUICK.rounds) >= 5


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """What pytest has piled up is left out of the collections before each timing."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are measured here, small."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(speed, "launch", lambda *given: list(rows.measure(*given)))
    monkeypatch.setattr(adaptive, "peaks", lambda *_: (1.0, 16.0))
    monkeypatch.setattr(stiff, "_STEPS", (0.125,))
    monkeypatch.setattr(stiff, "_TOLERANCES", (1e-3,))


@pytest.mark.usefixtures("in_this_process")
def test_every_row_is_right_in_small(tmp_path, capsys):
    chosen = [row for row in rows.ROWS if row != "6"]
    assert speed.run("tiny", tmp_path, rows=chosen, progress=False) == 0, capsys.readouterr().out
    lines = [Line.from_dict(one) for one in finite(tmp_path)]
    assert {line.row for line in lines} == set(chosen)
    for line in lines:
        assert (len(line.ratios) in (1, TINY.rounds)) or line.skipped or line.note
    stiff_gates = next(line for line in lines if line.row == "15")
    assert stiff_gates.verdict == "meets"
    exact = next(line for line in lines if line.row == "7")
    assert exact.verdict == "meets"
    assert "all results are right" in capsys.readouterr().out


@pytest.mark.usefixtures("in_this_process")
def test_a_preset_may_leave_out_what_has_no_target(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(TINY, records=False))
    assert speed.run("tiny", tmp_path, rows=["4", "5", "7"], progress=False) == 0
    # At these sizes there are no targets.
    assert {Line.from_dict(one).row for one in finite(tmp_path)} == {"4", "5", "7"}


def finite(folder: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((folder / "speed.json").read_text())["lines"]
    return found


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        ([Line("1", "w", "o", checks=(WRONG,), ratios=(9.0,))], "wrong: gradients 2.0e-03 > 1e-04"),
        (RuntimeError("out of\nluck"), "failed: RuntimeError: out of luck"),
    ],
)
def test_a_row_that_is_wrong_or_breaks_down_fails_and_the_rest_goes_on(
    monkeypatch, capsys, tmp_path, row, verdict
):
    def broken(preset, device):
        if isinstance(row, Exception):
            raise row
        yield from row

    monkeypatch.setitem(rows.ROWS, "1", broken)
    monkeypatch.setitem(rows.ROWS, "2", lambda preset, device: iter([Line("2", "w", "o", ratios=(2.0,))]))
    code = main(["bench", "speed", "--preset", "tiny", "--rows", "1,2", "--out", str(tmp_path)])
    assert code == 1
    out = capsys.readouterr().out
    assert all(part in out for part in verdict.split(": ", 1))
    assert finite(tmp_path)[0]["verdict"] == verdict
    assert "for the record" in out
    assert "1 of 2 results are WRONG" in out


@pytest.mark.usefixtures("in_this_process")
def test_a_missed_target_is_a_verdict_and_no_error(monkeypatch, capsys, tmp_path):
    slow = Line("1", "w", "o", ratios=(0.5,), target=Target(1.4))
    monkeypatch.setitem(rows.ROWS, "1", lambda preset, device: iter([slow]))
    assert speed.run("tiny", tmp_path, rows=["1"], progress=False) == 0
    out = capsys.readouterr().out
    assert "below" in out
    assert "0 of 1 targets are met, all results are right" in out


@pytest.mark.usefixtures("in_this_process")
def test_a_missing_peer_skips_its_row_visibly(monkeypatch, capsys, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("diffrax", "jax") else found(name)
    )
    assert speed.run("tiny", tmp_path, rows=["6"], progress=False) == 0
    out = capsys.readouterr().out
    assert "not run" in out
    assert "diffrax and jax not installed (pip install 'ctgate[bench]')" in out
    assert [line["verdict"].partition(":")[0] for line in finite(tmp_path)] == ["not run"]


def test_rows_are_measured_in_processes_of_their_own(monkeypatch, capfd, tmp_path):
    """From the command line to the file, without leaving traces in this process."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    before = torch.get_num_threads()
    code = main(["bench", "speed", "--preset", "tiny", "--rows", "1,8", "--out", str(tmp_path)])
    out = capfd.readouterr().out
    assert code == 0, out
    assert torch.get_num_threads() == before
    lines = finite(tmp_path)
    assert [line["row"] for line in lines] == ["1", "8", "8"]
    assert all(len(line["ratios"]) == TINY.rounds for line in lines)
    assert out.startswith("row")


def test_a_process_that_dies_is_a_row_that_fails(monkeypatch):
    program = f"print({json.dumps(json.dumps(sample_lines()[0].to_dict()))}); raise SystemExit(3)"
    monkeypatch.setattr(speed, "_CHILD", program)
    assert speed.launch("1", TINY, "cpu") == [
        sample_lines()[0],
        rows.failure("1", "its process ended with code 3"),
    ]


def test_measuring_processes_have_one_thread_and_keep_their_memory(monkeypatch):
    program = (
        "import json, os; from dataclasses import asdict\n"
        "from ctgate.experiments.speed.lines import Line\n"
        f"seen = {{name: os.environ[name] for name in {list(speed.ENVIRONMENT)!r}}}\n"
        "print(json.dumps(Line('1', json.dumps(seen), os.environ['OTHER']).to_dict()))"
    )
    monkeypatch.setattr(speed, "_CHILD", program)
    monkeypatch.setenv("OTHER", "kept")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    (line,) = speed.launch("1", TINY, "cpu")
    assert json.loads(line.workload) == speed.ENVIRONMENT
    assert line.workload.count('"1"') == 2
    assert line.against == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "fast"}, r"preset is 'fast'; it must be one of quick, full"),
        ({"rows": ["1", "99"]}, r"rows has '99'; the rows are: 1, 2, 3"),
        ({"device": "abacus"}, r"device is 'abacus'; it must be cpu or a CUDA device"),
        ({"device": "meta"}, r"device is 'meta'; it must be cpu, or cuda where"),
    ],
)
def test_run_refuses_what_it_does_not_know(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        speed.run(**{"preset": "quick", "out": tmp_path / "out"} | arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_call_their_rows(monkeypatch, tmp_path, path):
    calls = []
    monkeypatch.setattr(speed, "run", lambda *given: calls.append(given) or 0)
    monkeypatch.setattr(sys, "argv", [str(path), "--preset", "quick", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0
    ((preset, out, device, chosen),) = calls
    assert (preset, out, device) == ("quick", tmp_path, "cpu")
    assert set(chosen) <= set(rows.ROWS)


def test_scripts_cover_all_rows():
    covered = [row for path in SCRIPTS for row in runpy.run_path(str(path))["ROWS"]]
    assert sorted(covered) == sorted(rows.ROWS)


@pytest.mark.slow
def test_peaks_tell_a_process_that_keeps_more(monkeypatch):
    monkeypatch.delenv("MALLOC_TOP_PAD_", raising=False)
    size = dataclasses.replace(TINY, hidden=64, batch=64, span=16)
    ours, theirs = memory.peaks(size, 1e-4, "cpu")
    assert 0.0 <= ours < theirs
    assert theirs > 10 * 2**20


@pytest.mark.slow
def test_diffrax_solves_the_same_problem(tmp_path):
    pytest.importorskip("diffrax")
    case = Driven(4, 3, 3)
    other = adaptive.diffrax_of(case)
    state, gradients = other.gradient(case.span, 1e-6)
    assert relative([adaptive._tensor(state)], [case.reference.states]) < 1e-4
    found = [adaptive._tensor(gradients[name]) for name in NAMES]
    assert relative(found, case.reference.gradients) < 1e-4
    (line,) = adaptive.equal_error(TINY, "cpu")
    assert not line.wrong
    assert len(line.ratios) == TINY.rounds
