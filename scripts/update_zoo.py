"""Brings what is written about the zoo in line with its model folders: all cards, zoo/README.md, README.md,
the plot.

To add a trained network, copy the trainer's output folder to zoo/ and run this.

    python scripts/update_zoo.py [--check | --table FOLDER]

With --check nothing is written; the exit status is 1 if something is out of line. With --table nothing is either: the
table of the model folders in FOLDER, output/ say, is printed.
"""

import argparse
import sys
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import timm
from filelock import FileLock

from timm_iebn.card import make_card, make_warm_start_card
from timm_iebn.files import write_atomically
from timm_iebn.models._registry import WARM_START
from timm_iebn.results import Comparison, compare, costs_table, plot_results, results_table, short_table
from timm_iebn.study import Study, load_study
from timm_iebn.study_report import read_results, report, write_report
from timm_iebn.zoo import COSTS, WEIGHTS, check_weights, read_costs, read_zoo

ROOT = Path(__file__).parents[1]
ZOO_README = """\
<!-- written by scripts/update_zoo.py -->
# Zoo

Top-1 accuracy on the test split after the last epoch, mean and standard deviation over seeds; all norms of a network
were trained by one recipe. Differences from batch norm are those of runs of one seed, with their 95 % confidence
interval by Student's t. `timm_iebn.list_zoo()` gives the same in Python. A run's folder holds its weights, card,
recipe, log and curves.

![Accuracy against cost](results.png)

"""
COSTS_TEXT = """
## What the networks cost

Parameters with 100 classes, multiply-accumulates of convolutions and matrix products for one image, and images per
second in inference in float32, measured by `scripts/zoo_cost.py`; in brackets, against batch norm. On a machine that
others share, measured twice, speeds of batch norm itself differed by up to 14 %: a few percent say little.

"""
STUDIES = """
## Studies

What the paper claims, put to the test: each a table with error bars, curves, and the logs of every run. Then what the
gates of networks above have learned.

"""
WARM_STARTS = """
## Warm starts

The ImageNet networks have no weights of their own yet: they start from timm's batch-norm weights, as their cards say.

"""
BEGIN, END = "<!-- zoo: written by scripts/update_zoo.py -->\n", "<!-- end of zoo -->\n"


def texts(root: Path, comparisons: list[Comparison], studies: list[Study]) -> dict[Path, str]:
    """What each generated file should say."""
    zoo = root / "zoo"
    readme = (root / "README.md").read_text(encoding="utf-8")
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        sys.exit(f"README.md must hold each of {BEGIN.strip()} and {END.strip()} once: the table goes between them")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    models = [model for row in comparisons for runs in row.sides.values() for model in runs.values()]
    trained = {model.config["architecture"] for model in models}
    networks = dict.fromkeys(name.split(".")[0] for name in timm.list_pretrained(f"*_iebn.{WARM_START}*"))
    networks = [name for name in networks if name not in trained]
    links = "\n".join(f"- [{name}](warm_starts/{name}.md)" for name in networks)
    of_gates = sorted(zoo.glob("studies/gates/*.md"))
    titles = {study.folder / "README.md": study.title for study in studies}
    titles |= {path: path.read_text(encoding="utf-8").split("\n")[0].lstrip("# ") for path in of_gates}
    study_links = "".join(f"- [{title}]({path.relative_to(zoo).as_posix()})\n" for path, title in titles.items())
    found = {zoo / "warm_starts" / f"{name}.md": str(make_warm_start_card(name)) for name in networks}
    found[root / "README.md"] = before + BEGIN + short_table(comparisons) + END + after
    measured = read_costs(zoo / COSTS)
    parts = ZOO_README, results_table(comparisons, measured), COSTS_TEXT, costs_table(measured)
    parts += STUDIES, study_links, WARM_STARTS, links, "\n"
    found[zoo / "README.md"] = "".join(parts)
    for comparison in comparisons:
        for folder, _ in chain(*(runs.values() for runs in comparison.sides.values())):
            found[folder / "README.md"] = str(make_card(folder, comparison))
    found |= {study.folder / "README.md": report(read_results(study)) for study in studies}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--check", action="store_true")
    modes.add_argument("--table", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    try:
        if args.table:
            print(results_table(compare(read_zoo(args.table)), read_costs(args.table / COSTS)), end="")
            return 0
        # two at once would write into each other's files
        with nullcontext() if args.check else FileLock(ROOT / "zoo" / ".lock", timeout=300):
            return update(args.check)
    except (RuntimeError, ValueError, OSError) as e:  # RecipeError and WriteError too
        sys.exit(f"update_zoo.py: {e}")


def update(is_check: bool) -> int:
    """Writes what is out of line, or says so; the exit status."""
    zoo = ROOT / "zoo"
    configs = read_zoo(zoo)
    for folder in configs:
        check_weights(folder / WEIGHTS)
    comparisons = compare(configs)
    studies = [load_study(path.parent) for path in sorted(zoo.glob("studies/*/study.yaml"))]
    wanted = texts(ROOT, comparisons, studies)
    if orphans := set((zoo / "warm_starts").glob("*.md")) - wanted.keys():
        sys.exit(f"{', '.join(str(path.relative_to(ROOT)) for path in orphans)}: no such network; remove it")
    stale = {
        path: text for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    by_write_report = {study.folder / "README.md" for study in studies}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)} {'is out of line' if is_check else 'written'}")
        if not is_check and path not in by_write_report:
            write_atomically(path, text.encode())  # README.md holds what people wrote
    if not is_check:
        plot_results(comparisons).savefig(zoo / "results.png", dpi=120)
        for study in studies:
            write_report(study)
    if not stale:
        print("all up to date")
    return int(is_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
