"""The command line: ``ctgate report`` and ``ctgate bench``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ctgate import __version__

BENCHMARKS = ("convergence", "speed")
USAGE_ERROR, INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; ``--help`` has the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ctgate`` with these arguments, by default those of the process.

    Returns: the exit code, 0 for success, 1 for a result that is not good, 2 for arguments or an installation
    that do not fit (after one line on stderr), 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        print(f"ctgate {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(f"ctgate {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ctgate",
        description="Gated recurrent networks as continuous-time systems: gates are inverse time constants.",
    )
    parser.add_argument("--version", action="version", version=f"ctgate {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    report = commands.add_parser(
        "report",
        help="train a continuous-time GRU on the weekly CO2 record and write a report",
        description="Train a continuous-time GRU on irregular samples of the weekly CO2 record at Mauna Loa, "
        "compare it with persistence and a linear autoregression on held-out years, check it against "
        "torch.nn.GRU, and write a folder with report.md, report.nc and figures.",
    )
    report.add_argument(
        "--out", type=Path, default=Path("ctgate-report"), help="folder (default: %(default)s)"
    )
    report.add_argument("--seed", type=int, default=0, help="of every random number (default: %(default)s)")
    report.add_argument("--device", default="cpu", help="of the network (default: %(default)s)")
    report.add_argument("--dtype", default="float64", help="float64 or float32 (default: %(default)s)")
    report.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    report.add_argument(
        "--preset",
        default="full",
        help="full, or quick: seconds, and it learns nothing (default: %(default)s)",
    )
    report.set_defaults(run=_report)

    bench = commands.add_parser(
        "bench",
        help="run a benchmark: " + ", ".join(BENCHMARKS),
        description="Run a benchmark and print its table. convergence writes netCDF and PNG, and the exit "
        "code is 1 when a slope is off. speed writes JSON, and the exit code is 1 when a result is wrong or "
        "a comparison breaks down; a missed target is a verdict, since times depend on the machine.",
    )
    bench.add_argument("name", help="one of: " + ", ".join(BENCHMARKS))
    bench.add_argument("--out", type=Path, default=None, help="folder (default: ctgate-bench/NAME)")
    bench.add_argument("--preset", default="full", help="full or quick (default: %(default)s)")
    bench.add_argument("--device", default="cpu", help="of speed: cpu or cuda (default: %(default)s)")
    bench.add_argument(
        "--rows", default=None, help="of speed: some of its rows, as 1,3,record (default: all)"
    )
    bench.set_defaults(run=_bench)
    return parser


def _report(options: argparse.Namespace) -> int:
    # imported late: `ctgate --help` need not wait for it
    from ctgate.experiments import report

    return report.run(
        options.out,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
        preset=options.preset,
        resume=options.resume,
    )


def _bench(options: argparse.Namespace) -> int:
    if options.name not in BENCHMARKS:
        raise ValueError(
            f"there is no benchmark {options.name!r}; the known ones are: {', '.join(BENCHMARKS)}"
        )
    out = Path("ctgate-bench") / options.name if options.out is None else options.out
    if options.name == "speed":
        from ctgate.experiments import speed

        rows = None if options.rows is None else options.rows.split(",")
        return speed.run(options.preset, out, options.device, rows)
    for flag, usual in (("device", "cpu"), ("rows", None)):
        if getattr(options, flag) != usual:
            raise ValueError(f"--{flag} is for the benchmark speed; {options.name} takes none")
    from ctgate.experiments import convergence

    return convergence.run(options.preset, out)
