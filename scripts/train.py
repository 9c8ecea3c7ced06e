"""Trains a network by a recipe; without one, IEBN ResNet-20 on scikit-learn's digits.

    python scripts/train.py [--recipe zoo/recipes/NAME.yaml] [--output FOLDER] [--resume] [key=value ...]
    accelerate launch scripts/train.py ...        the same on whatever `accelerate config` describes

Writes a model folder, loads it back with timm and classifies some test images with it. Stopped at any moment, the same
command with --resume goes on.
"""

import argparse
import os
import sys
from pathlib import Path

import timm
import torch
from accelerate import PartialState

import timm_iebn  # noqa: F401  registers the models
from timm_iebn.messages import describe
from timm_iebn.recipe import Recipe, RecipeError, load_recipe
from timm_iebn.training import TRACKERS, Stopped, TrainingError, train
from timm_iebn.training.checkpoint import CheckpointError
from timm_iebn.training.data import add_data_dir, open_test_data
from timm_iebn.training.loaders import make_loader, make_share
from timm_iebn.training.processes import end_group

RECIPES = Path(__file__).parents[1] / "zoo" / "recipes"


def _default_folder(root: Path, recipe: Recipe) -> Path:
    """ARCH.TAG in `root`, named like a folder of the zoo."""
    data, model = (
        name.rstrip("/").rpartition("/")[2].removeprefix("local-dir:") for name in (recipe.data, recipe.model)
    )
    return root / f"{model.split('.')[0]}.{data}_{recipe.epochs}epochs_seed{recipe.seed}"


def _show_predictions(folder: Path, recipe: Recipe, data_dir: str) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    test, classes = open_test_data(recipe, data_dir)
    images, labels = (t[:8] for t in next(iter(make_loader(test, *make_share(model, test)).epoch())))
    with torch.no_grad():
        confidence, predicted = model(images).softmax(1).max(1)
    print(f"\nloaded back with timm.create_model('local-dir:{folder}', pretrained=True); the first test images:")
    for label, guess, p in zip(labels.tolist(), predicted.tolist(), confidence.tolist(), strict=True):
        verdict = "right" if guess == label else "wrong"
        print(f"  {verdict}: {classes[guess]} ({100 * p:.1f} %), is {classes[label]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPES / "digits.yaml")
    parser.add_argument("--output", type=Path, help="a folder that does not exist yet (default: one in --output-root)")
    parser.add_argument("--output-root", type=Path, default=Path("output"), help="default: output/")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run, if there is one")
    add_data_dir(parser)
    parser.add_argument("--mix-data-dir", default="", help="the same for the recipe's mix_data")
    parser.add_argument("--checkpoint-updates", type=int, default=500, help="beside those after each epoch; 0 for none")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="for 'loader: timm'")
    parser.add_argument("--track", action="append", default=[], choices=TRACKERS, help="may be given more than once")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    args = parser.parse_intermixed_args()
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        folder = args.output or _default_folder(args.output_root, recipe)
        was_there = folder.exists()
        row = train(
            recipe,
            folder,
            resume=args.resume,
            data_dir=args.data_dir,
            mix_data_dir=args.mix_data_dir,
            workers=args.workers,
            checkpoint_updates=args.checkpoint_updates,
            trackers=args.track,
        )
    except KeyboardInterrupt:
        print("train.py: interrupted before the first step", file=sys.stderr)
        return 130
    except (RecipeError, TrainingError, CheckpointError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2 if isinstance(e, RecipeError) else 1
    except Stopped as e:
        if PartialState().is_main_process:
            print(f"train.py: {e}", file=sys.stderr)
        return 128 + e.signum
    if PartialState().is_main_process:
        print(f"\n{recipe.model}: top-1 {row['test_top1']:.2f} % on the test split after the last epoch; see {folder}")
        if not was_there:
            try:
                _show_predictions(folder, recipe, args.data_dir)
            except (RecipeError, OSError, RuntimeError, KeyboardInterrupt) as e:  # the run is done all the same
                print(f"train.py: no predictions are shown: {describe(e)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    code = main()
    end_group()
    sys.exit(code)
