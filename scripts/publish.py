"""Publishes model folders on the Hugging Face Hub, each as a repository of its name.

    python scripts/publish.py zoo/resnet20_cifar_iebn.cifar100_60epochs_seed0 [...] [--dry-run]

Every folder is checked first. Then all files of a folder go up in one commit, are downloaded again and compared. Run
twice, it changes nothing; interrupted, a second run goes on. The token is that of `hf auth login` or HF_TOKEN.
"""

import argparse
import os
import sys
from pathlib import Path

from huggingface_hub import HfApi
from rich.console import Console
from rich.table import Table

from timm_iebn.processes import create_accelerator
from timm_iebn.publish import Plan, PublishError, check_folder, check_token, make_plan, publish
from timm_iebn.recipe import RecipeError
from timm_iebn.validate import validate
from timm_iebn.zoo import hub_namespace, read_config


def _reevaluate(folder: Path, data_dir: str) -> None:
    row, said = validate(str(folder), create_accelerator(), data_dir=data_dir), read_config(folder)["training"]
    if any(abs(row[key] - said[key]) > 0.005 for key in ("test_top1", "test_top5")):
        raise PublishError(
            f"{folder}: top-1 {row['test_top1']:.2f} % now, {said['test_top1']:.2f} % in its config.json"
        )


def _show(plans: list[Plan], title: str, results: dict[str, str]) -> None:
    table = Table("Repository", "Added", "Changed", "Removed", "Unchanged", title, show_lines=True)
    for plan in plans:
        groups = (plan.added, plan.changed, plan.removed, plan.unchanged)
        table.add_row(plan.repo, *("\n".join(names) or "-" for names in groups), results.get(plan.repo, ""))
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="+", type=Path)
    parser.add_argument("--namespace", default=hub_namespace(), help="user or organisation (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="for repositories that are created")
    parser.add_argument("--dry-run", action="store_true", help="show what would change, and change nothing")
    parser.add_argument("--tag", help="a tag for the revision, such as v1")
    parser.add_argument("--evaluate", action="store_true", help="first evaluate again, and compare")
    parser.add_argument("--data-dir", default=os.environ.get("DATA_DIR", ""), help="for --evaluate, as in training")
    args = parser.parse_args()
    api, plans, revisions = HfApi(), [], {}
    try:
        for folder in args.folder:
            check_folder(folder)
            if args.evaluate:
                _reevaluate(folder, args.data_dir)
        if not args.dry_run:
            check_token(args.namespace, api)
        plans = [make_plan(folder, args.namespace, args.tag, api) for folder in args.folder]
        if args.dry_run:
            _show(plans, "", {})
            return 0
        for plan in plans:
            revisions[plan.repo] = publish(plan, args.private, args.tag, api)
    except (PublishError, RecipeError) as e:
        print(f"publish.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("publish.py: interrupted. What is online is whole; run again to go on.", file=sys.stderr)
        return 130
    finally:
        if revisions:
            _show(plans, "Revision", revisions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
