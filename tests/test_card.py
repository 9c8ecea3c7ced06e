"""The cards: what they say to the Hub, and that their code runs."""

import csv

import pytest
import timm
from conftest import blocks
from huggingface_hub import ModelCard
from PIL import Image
from timm.models import get_pretrained_cfg

from timm_iebn.card import REPORTED, make_card, make_warm_start_card
from timm_iebn.recipe import load_recipe
from timm_iebn.results import BATCH_NORM, IEBN, TrainedModel, compare
from timm_iebn.zoo import read_config, read_zoo

FOLDERS = [*read_zoo()]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_hub_can_read_the_card(folder):
    card, training = ModelCard.load(folder / "README.md"), read_config(folder)["training"]
    assert card.data.library_name == "timm" and card.data.license == "apache-2.0"
    assert card.data.datasets == ["uoft-cs/cifar100"] and "timm-iebn" in card.data.tags
    top1, top5 = card.data.eval_results
    assert (top1.metric_value, top5.metric_value) == (training["test_top1"], training["test_top5"])
    assert (
        top1.dataset_type == "uoft-cs/cifar100" and top1.dataset_split == load_recipe(folder / "recipe.yaml").test_split
    )
    for name in ("recipe.yaml", "log.csv", "environment.txt", "curves.png"):
        assert name in card.text and (folder / name).exists()


@pytest.mark.parametrize("folder", FOLDERS[:2], ids=lambda folder: folder.name)
def test_the_code_of_a_card_runs(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (50, 40), 130).save("image.png")
    card = str(make_card(folder)).replace(f"hf-hub:timm-iebn/{folder.name}", f"local-dir:{folder}")
    code = blocks(card, "python")
    assert len(code) == 3 and all("import timm_iebn" in block for block in code)
    for block in code:
        exec(compile(block, folder.name, "exec"), {})
    said = capsys.readouterr().out
    names = timm.create_model(folder.name, pretrained=True).pretrained_cfg["label_names"]
    assert sum(name in said for name in names) >= 5 and "torch.Size([2, 64])" in said


def test_a_card_of_several_runs_shows_their_spread_and_one_of_one_run_its_limits(tmp_path):
    folder = FOLDERS[0]
    run = TrainedModel(folder, read_config(folder))
    (own,) = compare({folder: run.config})
    for norm in (BATCH_NORM, IEBN):  # the same run again, for the form of the text
        own.sides.setdefault(norm, {})[9] = run
    assert "± 0.00 (2 seeds)" in make_card(folder, own).text
    assert "luck of the seed" in make_card(folder).text


def test_the_figures_reported_of_warm_starts_belong_to_their_sources():
    sources = {
        cfg.hf_hub_id for name in timm.list_pretrained("*_iebn.warmstart_*") for cfg in [get_pretrained_cfg(name)]
    }
    with open(REPORTED, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["source"] for row in rows}) and {f"timm/{row['source']}" for row in rows} < sources
    card = make_warm_start_card("resnet50_iebn").content
    for row in rows:
        assert 50 < float(row["top1"]) < float(row["top5"]) < 100
        cells = f"| {row['top1']} | {row['top5']} | {row['img_size']} |"
        assert not row["source"].startswith("resnet50.") or cells in card
