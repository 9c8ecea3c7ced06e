"""Makes the runs of a study that are missing, and writes its table and curves.

    python scripts/study.py zoo/studies/NAME [...] [--jobs 2] [--data-dir FOLDER] [--again FOLDER [--change key=value]]

Several studies are worked on by turns, one seed of each after the other. Stopped at any moment, the same command goes
on. Runs are made in output/studies/; what documents them goes to the study's folder as they end. A run whose
very recipe the zoo or another study has made already is taken from there.
With --again all runs are made anew, in FOLDER/NAME, with the table and curves, and if wanted by a changed recipe. What
the studies share is made once.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TextIO, TypeVar

from timm_iebn.recipe import load_recipe
from timm_iebn.study import Run, Study, keep, load_study, same_run
from timm_iebn.study_report import Results, write_report
from timm_iebn.training.data import add_data_dir

ROOT = Path(__file__).parents[1]
Result = TypeVar("Result")


def say(line: str, file: TextIO = sys.stdout) -> None:
    """In one piece, as threads write beside each other: `print` would write the end of the line by itself."""
    file.write(f"{line}\n")
    file.flush()


class Queue:
    """Makes runs, each in a process of its own, until a signal stops it and them."""

    def __init__(self, studies: list[Study], output: Path, arguments: list[str]) -> None:
        self.output, self.arguments = output, arguments
        missing = [(study, run) for study in studies for run in study.runs if study.log(run) is None]
        missing.sort(key=lambda pair: pair[0].seeds.index(pair[1].seed))
        by_recipe: dict[str, list[tuple[Study, Run]]] = {}
        for study, run in missing:
            by_recipe.setdefault(load_recipe(study.recipe_path, run.overrides).to_yaml(), []).append((study, run))
        self.todo = [*by_recipe.values()]
        self.processes: set[subprocess.Popen] = set()
        self.failed, self.signum = False, 0
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self._stop)

    def _stop(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum
        for process in list(self.processes):  # which leave a checkpoint; what Ctrl-C has told them already is the same
            process.send_signal(signum)

    def make(self, place: int) -> None:
        """The run at that place, for all studies that want it."""
        if self.signum:
            return
        wanted = self.todo[place]
        names = ", ".join(f"{study.folder.name}: {run.name}" for study, run in wanted)
        made = same_run(*wanted[0])  # another process may have made it meanwhile
        say(f"{place + 1}/{len(self.todo)} {names}{f' is {made}' if made else ''}")
        folder = made or self.attempt(lambda: self.train(*wanted[0]))
        for study, run in wanted:
            if folder:
                self.attempt(lambda study=study, run=run: keep(study, run, folder))
            self.report(study)

    def train(self, study: Study, run: Run) -> Path | None:
        """The model folder that the run has left, if it came to its end."""
        folder = self.output / study.folder.name / run.name
        command = [sys.executable, ROOT / "scripts" / "train.py", "--recipe", study.recipe_path, "--resume"]
        command += ["--output", folder, *self.arguments, *run.overrides]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.txt", "a") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            self.processes.add(process)
            if self.signum:  # which has come meanwhile
                process.send_signal(self.signum)
            process.wait()
            self.processes.discard(process)
        if process.returncode and not self.signum:
            self.failed = True
            said = Path(f"{folder}.txt").read_text(errors="replace").splitlines() or [""]
            say(f"{run.name} stopped: {said[-1]}; see {folder}.txt", sys.stderr)
        return None if process.returncode else folder

    def report(self, study: Study) -> Results | None:
        """Writes what the study's logs say."""
        return self.attempt(lambda: write_report(study))

    def attempt(self, work: Callable[[], Result]) -> Result | None:
        """`work()`; that it can't be done is no reason to stop the other runs."""
        try:
            return work()
        except (OSError, ValueError) as e:
            self.failed = True
            say(f"study.py: {e}", sys.stderr)
            return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--output", type=Path, help="where runs are made (default: output/studies, or FOLDER of --again)"
    )
    parser.add_argument("--again", type=Path, metavar="FOLDER", help="make all runs anew, there")
    change_help = "with --again: a change to the studies' recipes, as precision=no; may be given more than once"
    parser.add_argument("--change", action="append", default=[], metavar="key=value", help=change_help)
    add_data_dir(parser)
    parser.add_argument("--mix-data-dir", default="", help="for scripts/train.py")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    os.environ["DATA_DIR"] = args.data_dir  # not as an option, which runs on the digits would refuse
    try:
        studies = [load_study(folder, args.again, args.change) for folder in args.studies]
        output = args.output or args.again or Path("output") / "studies"
        queue = Queue(studies, output, ["--mix-data-dir", args.mix_data_dir])
    except (OSError, ValueError) as e:  # RecipeError too
        print(f"study.py: {e}", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(queue.make, range(len(queue.todo))))
    for study in studies:
        if results := queue.report(study):
            say(f"{results.made} of {len(study.runs)} runs are made: see {study.folder / 'README.md'}")
    if queue.signum:
        print("study.py: stopped; the same command goes on", file=sys.stderr)
    return 128 + queue.signum if queue.signum else int(queue.failed)


if __name__ == "__main__":
    sys.exit(main())
