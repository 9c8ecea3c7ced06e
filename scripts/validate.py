"""Evaluates a network on a test split: loss, top-1 and top-5, in float32, each image counted once.

    python scripts/validate.py MODEL --data hfds/uoft-cs/cifar100

MODEL is a registered name (with or without tag), a model folder, or hf-hub:ID. A folder remembers its data and can do
without --data.
"""

import argparse
import os
import sys

import timm_iebn  # noqa: F401  registers the models
from timm_iebn.recipe import RecipeError
from timm_iebn.training.data import add_data_dir
from timm_iebn.training.evaluate import evaluate, open_network
from timm_iebn.training.processes import create_accelerator, end_group


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data")
    add_data_dir(parser)
    parser.add_argument("--test-split")
    parser.add_argument("--loader", choices=["memory", "timm"])
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="for --loader timm")
    args = parser.parse_args()
    try:
        accelerator = create_accelerator()
        data = args.data, args.data_dir, args.test_split, args.loader, args.workers
        model, batches, _ = open_network(args.model, accelerator, *data)
        row = evaluate(model, batches, accelerator)
    except (RecipeError, RuntimeError, OSError, ValueError) as e:
        print(f"validate.py: {e}", file=sys.stderr)
        return 2
    accelerator.print(
        f"{args.model}: test loss {row['test_loss']:.4f}"
        f"  top-1 {row['test_top1']:.2f} %  top-5 {row['test_top5']:.2f} %"
    )
    return 0


if __name__ == "__main__":
    code = main()
    end_group()
    sys.exit(code)
