"""Makes the runs of a study that are missing, and writes its table and curves.

    python scripts/study.py zoo/studies/NAME [...] [--jobs 2] [--data-dir FOLDER]

Several studies are worked on by turns, one seed of each after the other. Stopped at any moment, the same command goes
on. Runs are made in output/studies/; what documents them goes to the study's folder as they end.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from timm_iebn.recipe import RecipeError
from timm_iebn.study import Run, Study, keep, load_study, write_report

ROOT = Path(__file__).parents[1]


def make(study: Study, run: Run, output: Path, arguments: list[str]) -> int:
    """One run, in a process of its own; its exit status."""
    folder = output / study.folder.name / run.name
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--recipe", str(study.recipe_path), "--resume"]
    command += ["--output", str(folder), *arguments, *run.overrides]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.txt", "a") as log:
        status = subprocess.run(command, stdout=log, stderr=log).returncode
    if status == 0:
        keep(study, run, folder)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("output") / "studies")
    parser.add_argument("--report", action="store_true", help="make no runs")
    parser.add_argument("--data-dir", default="", help="for scripts/train.py")
    parser.add_argument("--mix-data-dir", default="", help="for scripts/train.py")
    args = parser.parse_args()
    try:
        studies = [load_study(folder) for folder in args.studies]
    except RecipeError as e:
        print(f"study.py: {e}", file=sys.stderr)
        return 2
    todo = [(study, run) for study in studies for run in study.runs if study.log(run) is None]
    todo.sort(key=lambda pair: pair[0].seeds.index(pair[1].seed))
    arguments = ["--data-dir", args.data_dir, "--mix-data-dir", args.mix_data_dir]
    writing, failed = Lock(), []

    def work(place: int) -> None:
        study, run = todo[place]
        print(f"{place + 1}/{len(todo)} {study.folder.name}: {run.name}", flush=True)
        if make(study, run, args.output, arguments):
            failed.append(run.name)
            print(f"{run.name} stopped: see {args.output / study.folder.name / run.name}.txt", file=sys.stderr)
        with writing:
            write_report(study)

    if not args.report:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(work, range(len(todo))))
    for study in studies:
        write_report(study)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
