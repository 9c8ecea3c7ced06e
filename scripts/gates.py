"""Shows what the gates of a trained IEBN network have learned, and what they are worth.

    python scripts/gates.py MODEL [--data NAME] [--data-dir FOLDER] [--output gates]

MODEL is a registered name, a model folder, or hf-hub:ID. Writes gates.md, a table with the versions that made it, and
gates.png: the gates of the test images by layer and class; and the accuracy with every gate frozen at its mean over
about 5000 training images, where IEBN is a batch norm. Its running statistics are those of the gated network, so the
accuracy with statistics of these images is shown too, for the network as trained as well. No weight is trained again:
what is lost says how much this network relies on its gates; what they are worth in training is its difference from a
batch-norm twin.
"""

import argparse
import copy
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

from torch.optim.swa_utils import update_bn

import timm_iebn  # noqa: F401  registers the models
from timm_iebn.environment import environment
from timm_iebn.gates import collect_gates, freeze_gates_at_mean, plot_gates, summary
from timm_iebn.layers import NEUTRAL_GATE
from timm_iebn.recipe import RecipeError, load_recipe
from timm_iebn.training.data import add_data_dir, open_part
from timm_iebn.training.evaluate import evaluate, open_network
from timm_iebn.training.loaders import make_loader, make_share
from timm_iebn.training.processes import create_accelerator


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data")
    add_data_dir(parser)
    parser.add_argument("--output", type=Path, default=Path("gates"), help="the two files' name without .md and .png")
    args = parser.parse_args()
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        accelerator = create_accelerator()
        model, batches, recipe = open_network(args.model, accelerator, args.data, args.data_dir)
        if (stored := Path(args.model) / "recipe.yaml").exists():  # its training images, as it was trained on them
            recipe = replace(load_recipe(stored), data=recipe.data)
        train_split, _ = open_part(recipe, recipe.train_split, args.data_dir)
        share, data_config = make_share(model, train_split, accelerator, recipe.channels_last)
        train_loader = make_loader(train_split, share, data_config, recipe)
        train_batches = list(islice(train_loader.epoch(), -(-5000 // train_loader.batch_size)))
        gates, test_labels = collect_gates(model, batches.epoch())
        train_gates, _ = collect_gates(model, train_batches)
    except (RecipeError, RuntimeError, OSError, ValueError) as e:
        print(f"gates.py: {e}", file=sys.stderr)
        return 2
    name = Path(args.model).name
    rows = summary(gates, test_labels)
    plot_gates(rows, gates, test_labels, f"{args.output}.png", name)
    networks = model, freeze_gates_at_mean(copy.deepcopy(model), train_gates)
    as_trained = [f"{evaluate(network, batches)['test_top1']:.2f}" for network in networks]
    for network in networks:
        update_bn(train_batches, network)
    estimated = [f"{evaluate(network, batches)['test_top1']:.2f}" for network in networks]
    lines = [
        f"# The gates of {name}",
        "",
        "| Top-1, % | As trained | Every gate frozen at its mean |",
        "|---|---|---|",
        f"| running statistics as trained | {' | '.join(as_trained)} |",
        f"| those of {sum(len(labels) for _, labels in train_batches)} training images | {' | '.join(estimated)} |",
        "",
        "No weight was trained again: so much does this network rely on gates that look at the image. What they are",
        "worth in training is its difference from a batch-norm twin.",
        "",
        f"All gates started at {NEUTRAL_GATE:.4f}. Deviation over images: a channel's, on the mean of the layer.",
        "",
        "| Layer | Mean | 5 % | 95 % | Deviation over images | Share between classes |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = (f"{row[key]:.3f}" for key in ("mean", "low", "high", "spread", "class_share"))
        lines.append(f"| {row['layer']} | {' | '.join(numbers)} |")
    print("\n".join(lines))
    lines += ["", f"![Gates]({args.output.name}.png)", "", "```", environment(accelerator.device) + "```"]
    Path(f"{args.output}.md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
