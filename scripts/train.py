"""Trains a network by a recipe; without one, IEBN ResNet-20 on scikit-learn's digits.

    python scripts/train.py [--recipe zoo/recipes/NAME.yaml] [--output FOLDER] [key=value ...]
    accelerate launch scripts/train.py ...        the same on whatever `accelerate config` describes

Writes a model folder, loads it back with timm and classifies some test images with it.
"""

import argparse
import sys
from pathlib import Path

import timm
import torch
from accelerate import PartialState

import timm_iebn  # noqa: F401  registers the models
from timm_iebn.data import Batches, load_splits
from timm_iebn.recipe import Recipe, RecipeError, load_recipe
from timm_iebn.train import train

RECIPES = Path(__file__).parents[1] / "zoo" / "recipes"


def _free_folder(recipe: Recipe) -> Path:
    stem = f"{Path(recipe.data).name}-{recipe.model}-seed{recipe.seed}"
    names = (stem if i == 1 else f"{stem}-{i}" for i in range(1, 10_000))
    return next(path for name in names if not (path := Path("output") / name).exists())


def _show_predictions(folder: Path, recipe: Recipe) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    cfg = model.pretrained_cfg
    test = load_splits(recipe.data)[1]
    images, labels = next(iter(Batches(test, 8, cfg["mean"], cfg["std"])))
    with torch.no_grad():
        confidence, predicted = model(images).softmax(1).max(1)
    print(f"\nloaded back with timm.create_model('local-dir:{folder}', pretrained=True); the first test images:")
    for label, guess, p in zip(labels.tolist(), predicted.tolist(), confidence.tolist(), strict=True):
        verdict = "right" if guess == label else "wrong"
        print(f"  {verdict}: {test.classes[guess]} ({100 * p:.1f} %), is {test.classes[label]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPES / "digits.yaml")
    parser.add_argument("--output", type=Path, help="a folder that does not exist yet (default: under output/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    args = parser.parse_args()
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        folder = args.output or _free_folder(recipe)
        row = train(recipe, folder)
    except RecipeError as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    if PartialState().is_main_process:
        print(
            f"\n{recipe.model}: top-1 {row['test_top1']:.2f} % on the test split after the last epoch; wrote {folder}"
        )
        _show_predictions(folder, recipe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
