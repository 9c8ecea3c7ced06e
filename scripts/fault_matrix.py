"""Provokes faults in numbers, and writes what was seen to docs/fault_matrix.md.

    python scripts/fault_matrix.py [--kills 100] [--mutations 10000] [--seed 0] [--only PART [PART ...]]

PART is one of kills, fuzz, disks, accidents, or words of a row's name. Each row is written as soon as it is known, and
the others stay, so that a run that was stopped goes on with `--only`. In all it takes an hour or two of two CPU cores.
The faults are in tests/faults/; tests/test_faults.py provokes the same ones a few times.
"""

import argparse
import platform
import sys
import time
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from faults import Outcome  # noqa: E402
from faults.matrix import FAULTS, Fault, run_tests  # noqa: E402

from timm_iebn.files import write_atomically  # noqa: E402

TABLE = ROOT / "docs" / "fault_matrix.md"
HEAD = """\
<!-- written by scripts/fault_matrix.py -->
# Bad days

Faults that were provoked on purpose, and what they did. "Failed" says how often something happened that must not. An
error is clear (`is_clear` in `tests/faults/fuzz.py`) if it is a ValueError, RuntimeError or OSError, or the package's
own, whose message names the file or its folder, has no more than 2000 characters, and is no traceback.

    python scripts/fault_matrix.py

{summary}

| Fault | How | Times | What must hold | Failed | What was seen | When, with what |
|---|---|---|---|---|---|---|
"""


def rows_of(text: str) -> dict[tuple[str, str], str]:
    """The lines of a table, by fault and how."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| Fault |")]
    return {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in lines}


def key(fault: Fault) -> tuple[str, str]:
    """What its line begins with."""
    return fault.name, fault.how or "as the test does"


def row(fault: Fault, outcome: Outcome, seconds: float) -> str:
    """A line of the table."""
    seen = outcome.seen
    if outcome.failures:
        first = " ".join(outcome.failures[0].split())[:300].replace("|", "/").replace(str(ROOT), "")
        seen += f"; the first failure: {first}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "safetensors", "huggingface-hub"))
    when = f"{date.today()}, {seconds:.0f} s; Python {platform.python_version()}, {packages}"
    cells = *key(fault), str(outcome.times), fault.must, str(len(outcome.failures)), seen, when
    return f"| {' | '.join(cells)} |"


def summary(lines: Iterable[str]) -> str:
    """What a table's lines come to."""
    counts = [(int(cells[3]), int(cells[5])) for cells in (line.split("|") for line in lines)]
    failed = [f for _, f in counts if f]
    return (
        f"In all {sum(times for times, _ in counts)} faults in {len(counts)} rows. In {len(failed)} of the rows "
        f"something was seen that must not be, {sum(failed)} times."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each kind of work")
    parser.add_argument(
        "--mutations", type=int, default=10_000, help="of weights, config.json, recipe.yaml and log.csv"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="PART")
    parser.add_argument("--output", type=Path, default=TABLE, help="default: docs/fault_matrix.md")
    args = parser.parse_args()
    failed = False
    for fault in FAULTS:
        if args.only and not any(part == fault.part or part in f"{fault.name}, {fault.how}" for part in args.only):
            continue
        total = args.mutations if fault.part == "fuzz" else args.kills
        start = time.monotonic()
        print(f"{fault.part}: {fault.name}, {fault.how}", flush=True)
        with TemporaryDirectory() as folder:
            if fault.provoke:
                outcome = fault.provoke(fault.times or round(total * fault.share), args.seed, Path(folder))
            else:
                outcome = run_tests(fault.tests)
        failed |= bool(outcome.failures)
        print(*outcome.failures, sep="\n")
        rows = rows_of(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
        line = row(fault, outcome, time.monotonic() - start)
        rows |= rows_of(line)
        lines = [rows[key(f)] for f in FAULTS if key(f) in rows]
        text = HEAD.replace("{summary}", summary(lines)) + "".join(f"{line}\n" for line in lines)
        write_atomically(args.output, text.encode())
        print(line, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
