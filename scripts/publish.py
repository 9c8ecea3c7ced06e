"""Publishes model folders on the Hugging Face Hub, each as a repository of its name.

    python scripts/publish.py zoo/resnet20_cifar_iebn.cifar100_60epochs_seed0 [...] [--dry-run]

Every folder is checked first. Then all files of a folder go up in one commit, are downloaded again and compared. Run
twice, it changes nothing; interrupted, a second run goes on. The token is that of `hf auth login` or HF_TOKEN.
"""

import argparse
import os
import sys
from pathlib import Path

# before huggingface_hub is imported: uploads by plain HTTP are repeated after a failure and can be stopped, Xet's not
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

from huggingface_hub import HfApi
from rich.console import Console
from rich.table import Table

from timm_iebn.publish import Plan, PublishError, check_access, check_folder, diff, make_plan, publish
from timm_iebn.recipe import RecipeError
from timm_iebn.training.data import add_data_dir
from timm_iebn.training.evaluate import evaluate, open_network
from timm_iebn.training.processes import create_accelerator
from timm_iebn.zoo import hub_namespace, read_config

_TOLERANCE = 0.05  # of accuracy, in percent: other processors round otherwise, and an image may fall on the other side


def _reevaluate(folder: Path, data_dir: str) -> None:
    try:
        model, batches, _ = open_network(str(folder), create_accelerator(), data_dir=data_dir)
        row = evaluate(model, batches)
    except (RecipeError, RuntimeError, OSError, ValueError) as e:
        raise PublishError(f"{folder}: {' '.join(str(e).split())}") from e
    for key in ("test_top1", "test_top5"):
        said = read_config(folder)["training"][key]
        print(f"{folder}: {key} {row[key]:.2f} % now, {said:.2f} % in its config.json")
        if abs(row[key] - said) > _TOLERANCE:
            raise PublishError(f"{folder}: {key} is {row[key]:.2f} % now, {said:.2f} % in its config.json")


def _show(plans: list[Plan], revisions: dict[str, str], tag: str | None) -> None:
    table = Table("Repository", "Files", "Revision", "Tag")
    for plan in plans:
        counts = (len(plan.added), len(plan.changed), len(plan.removed), len(plan.unchanged))
        words = (f"{n} {word}" for n, word in zip(counts, ("new", "changed", "removed", "unchanged"), strict=True) if n)
        done = plan.repo in revisions
        table.add_row(plan.repo, ", ".join(words), revisions.get(plan.repo, "not published"), tag if done else "")
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="+", type=Path)
    parser.add_argument("--namespace", default=hub_namespace(), help="user or organisation (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="for repositories that are created")
    parser.add_argument("--delete", action="store_true", help="remove what is online and not in the folder")
    parser.add_argument("--dry-run", action="store_true", help="show what would change, and change nothing")
    parser.add_argument("--tag", help="a tag for the revision, such as v1")
    parser.add_argument("--evaluate", action="store_true", help="first evaluate again, and compare")
    add_data_dir(parser)
    args = parser.parse_args()
    api, plans, revisions = HfApi(), [], {}
    try:
        names = [folder.resolve().name for folder in args.folder]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise PublishError(f"two of the folders have the name {twice}, and so would be one repository")
        contents = {folder: check_folder(folder) for folder in args.folder}
        for folder in args.folder if args.evaluate else ():
            _reevaluate(folder, args.data_dir)
        if not args.dry_run:
            check_access(args.namespace, args.tag, api)
        plans = [make_plan(folder, contents[folder], args.namespace, args.tag, api) for folder in args.folder]
        for plan in plans:
            if args.dry_run:
                who = "private" if plan.private or (plan.head is None and args.private) else "public"
                print(f"{plan.repo}: {who}, {'to be changed' if plan.head else 'to be created, or not visible to you'}")
                print(diff(plan, api))
            elif plan.removed and not args.delete:
                what = ", ".join(plan.removed)
                raise PublishError(f"{plan.repo} holds {what}, which the folder does not: --delete removes it")
            elif args.private and plan.head and not plan.private:
                raise PublishError(f"{plan.repo} is public already: --private is for repositories that are created")
        for plan in () if args.dry_run else plans:
            revisions[plan.repo] = publish(plan, args.private, args.tag, api)
    except PublishError as e:
        print(f"publish.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("publish.py: interrupted. What is online is whole; run again to go on.", file=sys.stderr)
        return 130
    finally:
        if revisions:
            _show(plans, revisions, args.tag)
    return 0


if __name__ == "__main__":
    sys.exit(main())
