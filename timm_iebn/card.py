"""The cards: the README.md of a model folder, and what there is to say about a warm start."""

import csv
import re
from pathlib import Path

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_arch_pretrained_cfgs

from .convert import GATES
from .models._registry import WARM_START
from .recipe import load_recipe
from .results import BATCH_NORM, IEBN, NEUTRAL_IEBN, SE, Comparison, compare, count, norm_of
from .zoo import NAMESPACE, ZOO, hub_id, read_config

TEMPLATE = Path(__file__).with_name("card_template.md")
WARM_START_TEMPLATE = Path(__file__).with_name("warm_start_template.md")
REPORTED = ZOO / "warm_starts" / "reported.csv"  # by timm; in a checkout alone

_IEBN = (
    "Instance Enhancement Batch Normalization ([arXiv 1908.04008](https://arxiv.org/abs/1908.04008)) is batch norm "
    "whose scale is gated, for each image and channel, by the channel's mean in that image. It costs two parameters "
    "for each channel and needs no other change to the network."
)
_TWIN = (
    "The {} twin of `{{model}}_iebn`, trained by the same recipe to compare [IEBN](https://arxiv.org/abs/1908.04008) "
    "with."
)
_NEUTRAL = f"{_IEBN} Here all gates started neutral, so that training started from batch norm's function."
_ABOUT = {
    BATCH_NORM: _TWIN.format("batch-norm"),
    IEBN: _IEBN,
    SE: _TWIN.format("squeeze-and-excitation"),
    NEUTRAL_IEBN: _NEUTRAL,
}

_CITATION = """\
@article{liang2019iebn,
  title     = {Instance Enhancement Batch Normalization: an Adaptive Regulator of Batch Noise},
  author    = {Liang, Senwei and Huang, Zhongzhan and Liang, Mingfu and Yang, Haizhao},
  journal   = {arXiv preprint arXiv:1908.04008},
  year      = {2019}
}"""


def make_card(folder: Path, comparison: Comparison | None = None) -> ModelCard:
    """The card of the model folder `folder`, from the other files in it.

    Args:
        comparison: the runs of the zoo that this one stands beside.
    """
    recipe, config = load_recipe(folder / "recipe.yaml"), read_config(folder)
    training, model, size = config["training"], config["architecture"], config["pretrained_cfg"]["input_size"]
    if not comparison:
        (comparison,) = compare({folder: config})
    own = norm_of(recipe, model)
    data = recipe.data.removeprefix("hfds/")
    on_hub = recipe.data.startswith("hfds/") and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", data))
    metrics = (("Top 1 Accuracy", "accuracy", "test_top1"), ("Top 5 Accuracy", "accuracy@5", "test_top5"))
    card_data = ModelCardData(
        library_name="timm",
        license=config["pretrained_cfg"].get("license"),
        base_model=training.get("base_model"),
        tags=["image-classification", "timm", "timm-iebn"],
        pipeline_tag="image-classification",
        datasets=[data] if on_hub else None,
        metrics=["accuracy"],
        model_name=folder.resolve().name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name="Image Classification",
                dataset_type=data if on_hub else "other",
                dataset_name=data.rpartition("/")[2],
                dataset_split=recipe.test_split,
                metric_type=metric_type,
                metric_name=name,
                metric_value=training[key],
            )
            for name, metric_type, key in metrics
        ],
    )
    twin = model.removesuffix("_se")
    about = _ABOUT[own].format(model=twin) if own.suffix == "_iebn" or timm.is_model(f"{twin}_iebn") else ""
    notes = []
    if recipe.mix_data or recipe.has_noise:
        notes.append("Trained under a noise attack, as `recipe.yaml` says: it is for study, not for use.")
    if recipe.freeze_gates:
        about += " Here the gates were not trained."
        notes.append("The gates are those it started with: it is for study, not for use.")
    sides = [
        dict(
            norm=f"**{norm.name}**" if norm is own else norm.name,
            parameters=count(comparison.config(norm)["parameters"]),
            macs=count(comparison.config(norm)["macs"]),
            top1=comparison.mean(norm),
            difference=comparison.difference(norm),
            paper=f"{comparison.paper[norm]:.2f}" if norm in comparison.paper else "-",
            runs=", ".join(run.folder.resolve().name for _, run in sorted(runs.items())),
        )
        for norm, runs in comparison.sides.items()
    ]
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=f"{model}{', fine-tuned' if recipe.pretrained else ''} on {data.rpartition('/')[2]}",
        about=about,
        sides=sides,
        paper=bool(comparison.paper),
        top1=training["test_top1"],
        top5=training["test_top5"],
        test_split=recipe.test_split,
        epochs=recipe.epochs,
        seed=recipe.seed,
        spread=max(map(len, comparison.sides.values())) > 1,
        runs=len(comparison.sides[own]),
        source=f"hf-hub:{hub_id(folder, NAMESPACE)}",
        mode="L" if size[0] == 1 else "RGB",
        input_size=", ".join(map(str, size)),
        size=f"{size[1]}x{size[2]}",
        precision=recipe.precision,
        num_classes=config["num_classes"],
        data=f"[{data}](https://huggingface.co/datasets/{data})" if on_hub else f"`{data}`",
        pretrained=recipe.pretrained,
        start=training.get("base_model") or recipe.model.rpartition("/")[2].removeprefix("local-dir:"),
        small=size[1] < 64,
        notes=notes,
        citation=_CITATION,
    )


def make_warm_start_card(model: str) -> ModelCard:
    """The card of an ImageNet network without weights of its own: what it starts from, and what timm reports of that.

    Args:
        model: such as 'resnet50_iebn'.
    """
    with open(REPORTED, newline="") as file:
        reported = {f"timm/{row['source']}": row for row in csv.DictReader(file)}
    cfgs = [cfg for cfg in get_arch_pretrained_cfgs(model).values() if cfg.tag.startswith(WARM_START)]
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in timm.create_model(model).named_parameters()}
    rows = [
        dict(
            tag=cfg.tag,
            source=cfg.hf_hub_id,
            license=cfg.license or "-",
            top1=found.get("top1", "-"),
            top5=found.get("top5", "-"),
            size=found.get("img_size", "-"),
        )
        for cfg in cfgs
        for found in [reported.get(cfg.hf_hub_id, {})]
    ]
    card_data = ModelCardData(
        library_name="timm",
        license=cfgs[0].license,
        tags=["image-classification", "timm", "timm-iebn"],
        pipeline_tag="image-classification",
        base_model=cfgs[0].hf_hub_id,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(WARM_START_TEMPLATE),
        model=model,
        about=_IEBN,
        twin=model.removesuffix("_iebn"),
        base=cfgs[0].hf_hub_id,
        parameters=count(sum(sizes.values())),
        gates=count(sum(size for name, size in sizes.items() if name.endswith(GATES))),
        rows=rows,
        citation=_CITATION,
    )
