"""The house rules that a machine can check: what stands where, who imports whom, what an import may do."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

import ctgate

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ctgate"
MODULES = sorted(PACKAGE.rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

TOP_LEVEL = {
    "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md",
    "benchmarks", "ctgate", "notebooks", "pyproject.toml", "tests",
}  # fmt: skip

# From the ground floor up; a module imports from its own floor and those below.
FLOORS = (
    {"fields", "kernels", "controls", "adapters"},
    {"problem", "guard", "algorithms", "retcode"},
    {"integrators", "dense"},
    {"sensealg"},
    {
        "run",
        "run_adjoint",
        "run_samples",
        "solve",
        "solution",
        "options",
        "failure",
        "hidden",
        "storage",
        "ensembles",
        "stacked_field",
        "stacking",
    },
    {"convergence", "tasks", "training", "sensitivity"},
    {"dynamics", "meanfield", "learnability"},
    {"init", "experiments", "diagnose"},
    {"cli", "__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def identity(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """The absolute name of every module that the file imports, at its top or later."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(filter(None, [base, node.module]))
            # `from ctgate import solve` may mean the module of that name.
            found |= {f"{stem}.{alias.name}" for alias in node.names} if stem == "ctgate" else {stem}
    return found


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_top_level_holds_what_the_house_allows() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {line.split("/")[0] for line in done.stdout.splitlines()}
    assert {name for name in found if not name.startswith(".")} == TOP_LEVEL


@pytest.mark.parametrize("path", MODULES, ids=identity)
def test_a_module_is_short_enough_to_read_at_once(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=identity)
def test_lower_rooms_never_import_higher_ones(path: Path) -> None:
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room == "__init__":
        return
    names = [name.split(".") for name in imports(path)]
    inside = {parts[1] for parts in names if parts[0] == "ctgate" and len(parts) > 1}
    if room == "plotting":
        assert not inside, "plotting reads Datasets only"
        return
    assert room in FLOOR, f"{room} has no floor yet: give it one in FLOORS"
    known = {other for other in inside if other in FLOOR}
    assert {other for other in known if FLOOR[other] > FLOOR[room]} == set()


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements}


def test_what_is_imported_is_declared() -> None:
    required = requirement_names(PYPROJECT["project"]["dependencies"])
    optional = PYPROJECT["project"]["optional-dependencies"]
    extras = {name for group in optional.values() for name in requirement_names(group)}
    imported = {name.split(".")[0] for path in MODULES for name in imports(path)}
    assert imported - sys.stdlib_module_names - {"ctgate"} - required - extras == set()
    by_name = {"h5netcdf", "h5py", "zarr"}  # xarray loads these when a file is written or read
    assert required - by_name <= imported, "a dependency that nothing imports"


@pytest.mark.parametrize("name", ctgate.__all__)
def test_every_public_name_says_what_it_is(name: str) -> None:
    thing = getattr(ctgate, name)
    text = inspect.getdoc(thing)
    assert text is not None
    assert len(text.split()) > 3
    if inspect.isclass(thing):
        assert "__doc__" in vars(thing), "an inherited docstring describes the parent"


def test_what_is_public_is_listed_once_and_in_order() -> None:
    assert len(set(ctgate.__all__)) == len(ctgate.__all__)
    public = {
        name
        for name in vars(ctgate)
        if not name.startswith("_") and not inspect.ismodule(getattr(ctgate, name))
    }
    assert public <= set(ctgate.__all__)


def test_the_sections_that_docstrings_cite_exist() -> None:
    headings = set(re.findall(r"^## (\d+) ", (PACKAGE / "THEORY.md").read_text(), flags=re.MULTILINE))
    cited = {number for path in MODULES for number in re.findall(r"THEORY\.md (\d+)", path.read_text())}
    assert cited
    assert cited <= headings


def test_import_changes_no_global_state() -> None:
    run_python("""
        import importlib, logging, pkgutil, random, sys, warnings
        import matplotlib, numpy, statsmodels.api, torch, torchdiffeq, tqdm, xarray

        def state():
            return {
                "dtype": torch.get_default_dtype(),
                "device": torch.get_default_device(),
                "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
                "grad": (torch.is_grad_enabled(), torch.is_anomaly_enabled()),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "matmul": torch.get_float32_matmul_precision(),
                "torch": torch.random.get_rng_state().tolist(),
                "numpy": repr(numpy.random.get_state()),
                "numpy errors": numpy.geterr(),
                "random": random.getstate(),
                "warnings": list(warnings.filters),
                "logging": (logging.root.level, list(logging.root.handlers)),
                "hooks": (sys.excepthook, sys.displayhook),
                "matplotlib": dict(matplotlib.rcParams),
                "xarray": repr(xarray.get_options()),
            }

        before = state()
        import ctgate
        for module in pkgutil.walk_packages(ctgate.__path__, "ctgate."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        after = state()
        assert before == after, [name for name in before if before[name] != after[name]]
        """)


def test_the_package_imports_without_the_extras() -> None:
    extras = sorted(
        {
            name
            for group in PYPROJECT["project"]["optional-dependencies"].values()
            for name in requirement_names(group)
        }
        - requirement_names(PYPROJECT["project"]["dependencies"])
        - {"ctgate"}
    )
    out = run_python(f"""
        import sys
        from importlib.machinery import PathFinder

        class WithoutExtras(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return None if name.split(".")[0] in {extras!r} else super().find_spec(name, path, target)

        sys.meta_path[:] = [WithoutExtras if finder is PathFinder else finder for finder in sys.meta_path]
        import ctgate
        assert all(hasattr(ctgate, name) for name in ctgate.__all__)
        from ctgate.cli import main
        try:
            main(["--help"])
        except SystemExit as end:
            assert not end.code
        """)
    assert "report" in out


def test_the_citation_names_this_version() -> None:
    assert f"version: {ctgate.__version__}\n" in (ROOT / "CITATION.cff").read_text()
