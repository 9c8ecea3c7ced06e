"""Evaluates a network on a test split: loss, top-1 and top-5, in float32, each image counted once.

    python scripts/validate.py MODEL --data hfds/uoft-cs/cifar100

MODEL is a registered name (with or without tag), a model folder, or hf-hub:ID. A folder remembers its data and can do
without --data.
"""

import argparse
import os
import sys
from pathlib import Path

import timm

import timm_iebn  # noqa: F401  registers the models
from timm_iebn.build import suggestion
from timm_iebn.data import open_test_data
from timm_iebn.evaluate import evaluate
from timm_iebn.loaders import make_loader, make_share
from timm_iebn.processes import create_accelerator
from timm_iebn.recipe import Recipe, RecipeError, load_recipe


def _recipe(args: argparse.Namespace) -> Recipe:
    """The part of a recipe that evaluation knows: the folder's own, changed by the arguments."""
    given = {k: v for k in ("data", "test_split", "loader") if (v := getattr(args, k)) is not None}
    stored = Path(args.model) / "recipe.yaml"
    if stored.exists():
        before = load_recipe(stored)
        given = {k: getattr(before, k) for k in ("data", "test_split", "loader", "channels_last")} | given
    elif ":" not in args.model and not Path(args.model).is_dir() and not timm.is_model(args.model):
        raise RecipeError(f"model: {args.model!r} is neither a folder nor a registered name{suggestion(args.model)}")
    if "data" not in given:
        raise RecipeError("data: say which data with --data")
    return Recipe(model=args.model, epochs=1, milestones=(), **given)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data")
    parser.add_argument("--data-dir", default="", help="where the data is, if not on the Hub: a folder or .tar file")
    parser.add_argument("--test-split")
    parser.add_argument("--loader", choices=["memory", "timm"])
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="for --loader timm")
    args = parser.parse_args()
    try:
        recipe = _recipe(args)
        accelerator = create_accelerator()
        test, classes = open_test_data(recipe, args.data_dir)
        name = f"local-dir:{args.model}" if Path(args.model).is_dir() else args.model
        model = timm.create_model(name, pretrained=True)
        if model.num_classes != len(classes):
            raise RecipeError(
                f"{args.model} tells {model.num_classes} classes apart, {recipe.data!r} has {len(classes)}"
            )
        names = model.pretrained_cfg.get("label_names") or classes
        if list(names) != classes:
            odd = next(f"{a!r} is {b!r}" for a, b in zip(names, classes, strict=True) if a != b)
            raise RecipeError(f"{args.model} knows other classes than {recipe.data!r}: {odd} there")
        share, data_config = make_share(model, test, accelerator, recipe.channels_last)
        loader = make_loader(test, share, data_config, workers=args.workers)
        row = evaluate(model.to(accelerator.device), loader, accelerator)
    except (RecipeError, RuntimeError, OSError, ValueError) as e:
        print(f"validate.py: {e}", file=sys.stderr)
        return 2
    accelerator.print(
        f"{args.model}: test loss {row['test_loss']:.4f}"
        f"  top-1 {row['test_top1']:.2f} %  top-5 {row['test_top5']:.2f} %"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
