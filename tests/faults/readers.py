"""How a user's files come to be, and how they are read: for each kind, a maker of whole ones and a reader.

A reader returns whether what it got is right: all that the file says, or what was there before the damage.
"""

import csv
import json
import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from timm.data import ImageDataset
from torch import Tensor

from timm_iebn import load_authors_checkpoint
from timm_iebn.model_folder import FILES, save_model_folder
from timm_iebn.publish import check_folder
from timm_iebn.recipe import Recipe, load_recipe
from timm_iebn.results import compare, results_table
from timm_iebn.run_log import log_text, read_log
from timm_iebn.study import load_study
from timm_iebn.study_report import read_results, report
from timm_iebn.training import Trainer
from timm_iebn.training.checkpoint import _digest, load_latest, save_checkpoint
from timm_iebn.training.data import read_image
from timm_iebn.training.evaluate import open_network
from timm_iebn.training.run_folder import finished_row
from timm_iebn.zoo import COSTS, WEIGHTS, list_zoo, read_costs
from timm_iebn.zoo import read_zoo as read_configs

ARCHITECTURE = "resnet20_cifar_iebn"
RECIPE = Recipe(model=ARCHITECTURE, data="digits", epochs=2, milestones=(1,), batch_size=700, lr=0.01)
TAG = f"{ARCHITECTURE}.digits_2epochs_seed0"
PUBLISHED = tuple(f"{TAG}/{name}" for name in FILES)
ZOO_FILES = (*(f"{TAG}/{name}" for name in ("config.json", "recipe.yaml")), "cost.csv")

State = dict[str, Tensor]


def same(ours: State, theirs: State) -> bool:
    """Bit for bit, NaN included, whatever the dtype in which a file holds it."""
    return ours.keys() == theirs.keys() and all(
        ours[key].shape == t.shape and torch.equal(ours[key].nan_to_num(7.5), t.to(ours[key].dtype).nan_to_num(7.5))
        for key, t in theirs.items()
    )


def write_folder(folder: Path, seed: int = 0) -> State:
    """A model folder that the trainer's own function writes; returns the weights."""
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, num_classes=10, in_chans=1, drop_rate=0.1)
    rows = [
        dict(epoch=e, updates=2 * e, lr=0.01, train_loss=2.0 / e, train_top1=20.0 * e)
        | dict(test_loss=1.9 / e, test_top1=21.5 * e, test_top5=45.25 * e, images_per_second=99.5, seconds=14.25)
        for e in (1, 2)
    ]
    data_config = dict(input_size=(1, 32, 32), interpolation="bicubic", mean=(0.5,), std=(0.25,), crop_pct=1.0)
    work = folder.parent / "work" / folder.name
    save_model_folder(model, folder, work, RECIPE, rows, [str(i) for i in range(10)], data_config, ["# here\n"])
    work.parent.rmdir()
    return model.state_dict()


# ---- weights and config.json


def make_model_folder(folder: Path) -> State:
    folder.rmdir()
    return write_folder(folder)


def load_with_timm(folder: Path, weights: State) -> bool:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is damaged, or was changed")  # it has been said: that is clear too
        return same(timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict(), weights)


def make_timm_folder(folder: Path) -> None:
    make_model_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"]  # of which timm's own publishing knows nothing
    (folder / "config.json").write_text(json.dumps(config))


def load_what_is_said(folder: Path, _: None) -> bool:
    """As without a checksum nobody can tell other numbers from the right ones: all tensors, and those of the file."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return same(model.state_dict(), safetensors.torch.load((folder / WEIGHTS).read_bytes()))


def load_to_validate(folder: Path, weights: State) -> bool:
    model, batches, _ = open_network(str(folder), Accelerator())
    images, _ = next(iter(batches.epoch()))
    with torch.no_grad():
        return same(model.state_dict(), weights) and model.eval()(images[:2]).shape == (2, 10)


# ---- recipe.yaml, log.csv


def read_recipe(folder: Path, _: State) -> bool:
    got = asdict(load_recipe(folder / "recipe.yaml"))
    said = yaml.safe_load((folder / "recipe.yaml").read_text())

    def means(got: Any, said: Any) -> bool:
        if isinstance(got, tuple):
            return [*got] == said
        if isinstance(got, float):
            return got == float(said)
        return got == said or (got == "no" and said is False)

    return all(means(got[key], value) for key, value in said.items()) and not Path("executed").exists()


def read_finished_log(folder: Path, _: State) -> bool:
    rows = read_log(folder / "log.csv")
    with open(folder / "log.csv", newline="") as file:
        said = [*csv.DictReader(file)]
    same_rows = len(rows) == len(said) and all(
        row.keys() == other.keys()
        and all(row[k] == float(v) or (math.isnan(row[k]) and math.isnan(float(v))) for k, v in other.items())
        for row, other in zip(rows, said, strict=True)
    )
    return same_rows and finished_row(RECIPE, folder)["test_top1"] == rows[-1]["test_top1"]


# ---- publishing, zoo, studies


def make_published(folder: Path) -> bytes:
    write_folder(folder / TAG)
    return (folder / TAG / WEIGHTS).read_bytes()


def check_to_publish(folder: Path, weights: bytes) -> bool:
    return check_folder(folder / TAG)[WEIGHTS] == weights


def make_zoo(folder: Path) -> None:
    write_folder(folder / TAG)
    other = folder / TAG.replace("_iebn.", ".")
    other.mkdir()
    for name in ("config.json", "recipe.yaml", "log.csv"):
        (other / name).write_text((folder / TAG / name).read_text().replace(ARCHITECTURE, "resnet20_cifar"))
    cost = "architecture,input_size,parameters,macs,device,batch_size,images_per_second,torch,date\n"
    (folder / "cost.csv").write_text(cost + f"{ARCHITECTURE},1x32x32,278000,40800000,CPU,128,900,2.9,2026-11-26\n")


def read_zoo(folder: Path, _: None) -> bool:
    """The folder that is not damaged is there in any case, with its own figures."""
    table = results_table(compare(read_configs(folder)), read_costs(folder / COSTS))
    names = [model.name for model in list_zoo(zoo=folder)]
    return TAG.replace("_iebn.", ".") in names and "| resnet20_cifar |" in table and "43.00 (one seed)" in table


STUDY = f"""\
title: A trial
text: Does it work?
recipe: recipe.yaml
networks:
  batch norm: {{model: resnet20_cifar}}
  IEBN: {{model: {ARCHITECTURE}}}
seeds: [0, 1]
rows:
  plain: {{}}
  noise: {{noise_scale: 0.5, noise_offset: 0.5}}
columns: {{test_top1: 'top-1, %'}}
"""
STUDY_FILES = ("study.yaml", "recipe.yaml", *(f"runs/plain.IEBN.seed0/{name}" for name in ("recipe.yaml", "log.csv")))


def make_study(folder: Path) -> None:
    (folder / "study.yaml").write_text(STUDY)
    (folder / "recipe.yaml").write_text(RECIPE.to_yaml())
    run = folder / "runs" / "plain.IEBN.seed0"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE.to_yaml())
    (run / "log.csv").write_text(log_text([dict(epoch=1, test_top1=43.5), dict(epoch=2, test_top1=53.5)]))


def read_study(folder: Path, _: None) -> bool:
    study = load_study(folder)
    text, said = report(read_results(study)), yaml.safe_load((folder / "study.yaml").read_text())
    return all(getattr(study, key) == value for key, value in said.items()) and study.title in text


# ---- checkpoints


def make_checkpoints(folder: Path) -> list[dict[str, Any]]:
    states = [
        dict(step=step, rows=[dict(loss=0.5)], model={"a": torch.randn(30, 4), "b": torch.randn(3)}) for step in (1, 2)
    ]
    for state in states:
        save_checkpoint(folder, state["step"], state)
    return states


def resume_latest(folder: Path, states: list[dict[str, Any]]) -> bool:
    _, state = load_latest(folder)
    wanted = next(s for s in states if s["step"] == state["step"])
    return state["rows"] == wanted["rows"] and same(state["model"], wanted["model"])


def make_run(folder: Path) -> tuple[State, dict[str, Tensor]]:
    """A run that was stopped after its first update. What its checkpoint says beside tensors is in tree.json."""
    trainer = Trainer(RECIPE, folder / "out")
    trainer.step = 1
    trainer._save()
    trainer.lock.release()
    with safe_open(trainer.last_checkpoint, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        (folder / "tree.json").write_text(file.metadata()["tree"])
    return trainer.workload.net.state_dict(), tensors


def resume_run(folder: Path, context: tuple[State, dict[str, Tensor]]) -> bool:
    weights, tensors = context
    tree = (folder / "tree.json").read_text(errors="replace")
    metadata = dict(tree=tree, sha256=_digest(tree, tensors))
    (checkpoint,) = (folder / "out.run").glob("0*.safetensors")
    checkpoint.write_bytes(safetensors.torch.save(tensors, metadata))
    trainer = Trainer(RECIPE, folder / "out", resume=True)
    trainer.lock.release()
    return same(trainer.workload.net.state_dict(), weights)


# ---- the rest


def make_authors(folder: Path) -> None:
    names = dict(gate_weight="weight_readjust", gate_bias="bias_readjust")
    state = timm.create_model(ARCHITECTURE).state_dict()
    theirs = {
        f"module.{key.rpartition('.')[0]}.{names.get(leaf, leaf)}": t
        for key, t in state.items()
        for leaf in [key.rpartition(".")[2]]
    }
    torch.save(dict(epoch=1, state_dict=theirs), folder / "model.pth.tar")


def load_authors(folder: Path, _: None) -> bool:
    model = load_authors_checkpoint(timm.create_model(ARCHITECTURE), folder / "model.pth.tar")
    said = torch.load(folder / "model.pth.tar", weights_only=True)["state_dict"]
    return sum(t.double().nansum() for t in model.state_dict().values()) == sum(
        t.double().nansum() for t in said.values()
    )


def make_images(folder: Path) -> None:
    (folder / "train" / "ant").mkdir(parents=True)
    for i, kind in enumerate(("png", "jpg")):
        pixels = np.random.default_rng(i).integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train" / "ant" / f"{i}.{kind}")


def read_images(folder: Path, _: None) -> bool:
    dataset = ImageDataset(str(folder / "train"))
    dataset._max_retries = 1
    return all(read_image(dataset, i)[0].mode == "RGB" for i in range(len(dataset)))
