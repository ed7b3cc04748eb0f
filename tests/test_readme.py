"""README and THEORY.md say only what is true: the Python runs, and what they point at exists."""

import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

import ctgate

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
THEORY = (ROOT / "ctgate/THEORY.md").read_text()
SECTIONS = re.findall(r"^## (\d+) ", THEORY, flags=re.MULTILINE)
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
MAP_ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.partition("## Equation map")[2].partition("\n## ")[0].splitlines()
    if line.startswith("|") and "`" in line
]


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=lambda block: block.split("\n")[0][:40])
def test_the_python_in_it_runs(block: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_the_first_screen_has_code_commands_and_a_figure() -> None:
    first_screen = README[: README.index("\n## ")]
    assert "```python" in first_screen
    assert "ctgate report" in first_screen
    assert "![" in first_screen


def test_the_files_that_it_points_at_exist() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", PROSE) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_equation_map_is_read() -> None:
    assert len(MAP_ROWS) >= 20


@pytest.mark.parametrize("row", MAP_ROWS, ids=lambda row: row[1])
def test_a_row_of_the_equation_map(row: list[str]) -> None:
    equation, functions, tests = row
    assert "THEORY.md" in equation
    for name in re.findall(r"`([^`]+)`", functions):
        assert name.startswith("ct.")
        assert attrgetter(name.removeprefix("ct."))(ctgate) is not None
    for name in re.findall(r"`([^`]+)`", tests):
        path, _, test = name.partition("::")
        assert f"def {test}(" in (ROOT / path).read_text() if test else (ROOT / path).exists(), name


def test_every_section_has_a_row() -> None:
    cited = {number for row in MAP_ROWS for number in re.findall(r"THEORY\.md (\d+)", row[0])}
    assert cited == set(SECTIONS)


def test_the_sections_are_numbered_and_say_what_checks_them() -> None:
    assert [str(number) for number in range(1, len(SECTIONS) + 1)] == SECTIONS
    for section in re.split(r"^## ", THEORY, flags=re.MULTILINE)[1:]:
        assert re.search(r"^Sources?: .* Checked by ", section, flags=re.MULTILINE), section.splitlines()[0]
    named = re.findall(r"`((?:tests|benchmarks|notebooks)/[^`:]*)`", THEORY)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_docstrings_cite_sections_that_exist() -> None:
    files = [*(ROOT / "ctgate").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    for path in files:
        for phrase in re.findall(r"THEORY\.md ([\d, and]*\d)", path.read_text()):
            assert set(re.findall(r"\d+", phrase)) <= set(SECTIONS), f"{path}: {phrase}"
