"""The command line: what it calls, and one clear line with exit code 2 when it cannot."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ctgate
from ctgate.cli import main
from ctgate.experiments import convergence, report, speed


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a call that ends with exit code 2."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "ctgate: the following arguments are required: command"),
        (["sing"], "ctgate: argument command: invalid choice: 'sing'"),
        (["report", "--seed", "one"], "ctgate report: argument --seed: invalid int value: 'one'"),
        (["report", "--seed", "-1"], "ctgate report: seed is -1; it must be in [0, 2^63)"),
        (["report", "--dtype", "float16"], "ctgate report: dtype is 'float16'; it must be one of"),
        (["report", "--preset", "huge"], "ctgate report: preset is 'huge'; it must be one of"),
        (["report", "--device", "abacus"], "ctgate report: device is 'abacus'; it must be a device that is"),
        (["bench"], "ctgate bench: the following arguments are required: name"),
        (["bench", "sound"], "there is no benchmark 'sound'; the known ones are: convergence, speed"),
        (["bench", "speed", "--rows", "1,99"], "ctgate bench: rows has '99'; the rows are: 1, 2, 3"),
        (["bench", "speed", "--device", "abacus"], "ctgate bench: device is 'abacus'; it must be cpu"),
        (
            ["bench", "convergence", "--rows", "1"],
            "--rows is for the benchmark speed; convergence takes none",
        ),
        (["bench", "convergence", "--device", "cuda"], "--device is for the benchmark speed"),
        (["bench", "convergence", "--preset", "huge"], "ctgate bench: preset is 'huge'"),
    ],
)
def test_one_line_and_exit_code_2(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in failure(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    assert "taken" in failure(["report", "--out", str(tmp_path / "taken")], capsys)


@pytest.mark.parametrize("name", ["statsmodels", "matplotlib"])
def test_without_an_extra_its_name(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = report.importlib.util.find_spec
    monkeypatch.setattr(
        report.importlib.util, "find_spec", lambda wanted: None if wanted == name else found(wanted)
    )
    line = failure(["report", "--out", str(tmp_path / "out")], capsys)
    assert f"the report needs {name}" in line
    assert "pip install 'ctgate[report]'" in line


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []

    def record(*values: Any, **named: Any) -> int:
        seen.append((*values, named))
        return 7

    monkeypatch.setattr(report, "run", record)
    monkeypatch.setattr(convergence, "run", record)
    monkeypatch.setattr(speed, "run", record)
    return seen


def test_report_passes_its_flags_on(calls: list[tuple[Any, ...]]) -> None:
    assert main(["report"]) == 7
    flags = "--out o --seed 3 --device cuda --dtype float32 --resume --preset quick"
    assert main(["report", *flags.split()]) == 7
    usual = {"seed": 0, "device": "cpu", "dtype": "float64", "preset": "full", "resume": False}
    given = {"seed": 3, "device": "cuda", "dtype": "float32", "preset": "quick", "resume": True}
    assert calls == [(Path("ctgate-report"), usual), (Path("o"), given)]


def test_bench_exits_with_the_code_of_the_benchmark(calls: list[tuple[Any, ...]]) -> None:
    assert main(["bench", "convergence"]) == 7
    assert main(["bench", "convergence", "--preset", "quick", "--out", "o"]) == 7
    assert calls == [("full", Path("ctgate-bench/convergence"), {}), ("quick", Path("o"), {})]


def test_bench_speed_passes_its_flags_on(calls: list[tuple[Any, ...]]) -> None:
    assert main(["bench", "speed"]) == 7
    flags = "--out o --preset quick --device cuda --rows 1,record"
    assert main(["bench", "speed", *flags.split()]) == 7
    assert calls == [
        ("full", Path("ctgate-bench/speed"), "cpu", None, {}),
        ("quick", Path("o"), "cuda", ["1", "record"], {}),
    ]


def test_control_c_ends_a_benchmark_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(convergence, "run", interrupted)
    assert main(["bench", "convergence"]) == 130
    assert capsys.readouterr().err == "ctgate bench: interrupted\n"


def test_python_m_ctgate_says_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ctgate", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ctgate {ctgate.__version__}\n", "")
