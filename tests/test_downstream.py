"""The recipes of docs/downstream.md with the real libraries, each skipped where its library is not installed."""

import csv
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from conftest import blocks
from hub_client import client
from hub_server import Hub
from hub_storage import Repo
from PIL import Image
from safetensors.torch import save
from timm.data import create_transform, resolve_data_config
from training import ENVIRONMENT, image_folder

import timm_iebn
from timm_iebn import IEBN2d
from timm_iebn.zoo import ZOO

# other libraries' warnings are theirs; what speaks of IEBN is ours
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.filterwarnings(r"error:.*(IEBN|\bgates?\b)")]

TEXT = (Path(__file__).parents[1] / "docs" / "downstream.md").read_text(encoding="utf-8")
RECIPES = blocks(TEXT, "python")


@pytest.fixture
def run_recipe(tmp_path, monkeypatch):
    """A function that runs the block with `word`, if its library is installed, and gives its names."""
    monkeypatch.chdir(tmp_path)

    def run(library, word):
        pytest.importorskip(library)
        (code,) = [code for code in RECIPES if word in code]
        names = {"__name__": "recipe"}
        exec(compile(code, "downstream.md", "exec"), names)
        return names

    return run


def norms(net):
    return [m for m in net.modules() if isinstance(m, IEBN2d)]


def all_trained(net):
    """Whether every gate left its start; of residual branches that start at 0, it does so at the second update."""
    return all((m.gate_weight != 0).any() for m in norms(net))


def test_every_recipe_is_run_here():
    words = re.findall(r"run_recipe\(\"\w+\", \"(.*?)\"\)", Path(__file__).read_text(encoding="utf-8"))
    assert [sum(word in code for word in words) for code in RECIPES] == [1] * len(RECIPES) != []


def test_segmentation_trains_the_gates_of_its_encoder(run_recipe):
    names = run_recipe("segmentation_models_pytorch", "smp.Unet")
    net = names["net"]
    assert len(norms(net.encoder)) == 49 and (norms(net)[0].gate_weight != 0).all()
    torch.nn.functional.cross_entropy(net(names["images"]), names["masks"]).backward()
    names["optimizer"].step()
    assert all_trained(net)


def test_segmentation_freezes_its_encoder():
    smp = pytest.importorskip("segmentation_models_pytorch")
    net, images = smp.Unet("tu-resnet18_iebn", encoder_weights=None), torch.randn(2, 3, 64, 64)
    net.freeze_encoder()
    before = {k: v.clone() for k, v in net.encoder.state_dict().items()}
    net.train()(images).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in net.encoder.state_dict().items())
    assert all(m.gate_weight.grad is None for m in norms(net))
    net.unfreeze_encoder()
    net.train()(images).square().sum().backward()
    assert all(m.gate_bias.grad is not None for m in norms(net))
    assert not torch.equal(norms(net)[0].running_mean, before["model.bn1.running_mean"])


def test_fastai_fine_tunes_the_gates_of_a_zoo_network(run_recipe):
    learn = run_recipe("fastai", "vision_learner(")["learn"]
    _, top1 = learn.validate()
    start = timm.create_model("resnet20_cifar_iebn", pretrained=True)
    assert top1 > 0.4 and len(norms(learn.model)) == 19
    for before, after in zip(norms(start), norms(learn.model), strict=True):
        assert not torch.equal(before.gate_weight, after.gate_weight.cpu())
        assert not torch.equal(before.gate_bias, after.gate_bias.cpu())


def fastai_with_a_frozen_body():
    """What of `resnet50_iebn` from the Hub, its body frozen, changes in an epoch: the kinds of tensors."""
    from fastai.vision.all import DataLoaders, vision_learner

    data = [(torch.randn(3, 32, 32), i % 3) for i in range(32)]
    dls = DataLoaders.from_dsets(data, data, bs=16, num_workers=0, device="cpu")
    learn = vision_learner(dls, "resnet50_iebn", n_out=3, loss_func=torch.nn.functional.cross_entropy)
    body = learn.model[0]
    before = {k: v.clone() for k, v in body.state_dict().items()}
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, lr=1e-2)
    gates = [m for m in body.modules() if isinstance(m, IEBN2d)]
    moved = [k for k, v in body.state_dict().items() if not torch.equal(v, before[k])]
    norms_moved = sorted({k.rpartition(".")[2] for k in moved if "bn" in k})
    decayed = [p for m in gates for p in m.parameters() if learn.opt.state[p].get("do_wd", True)]
    return len(gates), before["model.bn1.weight"].numpy(), norms_moved, [k for k in moved if ".conv" in k], len(decayed)


def test_fastai_starts_from_the_warm_start_and_keeps_the_gates_of_a_frozen_body_training(tmp_path):
    pytest.importorskip("fastai")
    twin = timm.create_model("resnet50").state_dict()
    with Hub({"hf_any": set()}) as hub:
        hub.repos["timm/resnet50.a1_in1k"] = Repo({"model.safetensors": save(twin)})
        with client(tmp_path, hub.url, "hf_any") as call:
            count, weight, changed, convs, decayed = call(fastai_with_a_frozen_body)
    assert count == 49
    np.testing.assert_allclose(weight, twin["bn1.weight"] * (1 + np.e), rtol=1e-6)
    assert changed == sorted("weight bias gate_weight gate_bias running_mean running_var num_batches_tracked".split())
    assert convs == [] and decayed == 0


def test_transformers_computes_what_timm_computes_from_the_same_folder(run_recipe, tmp_path):
    names = run_recipe("transformers", "AutoModelForImageClassification")
    net = timm.create_model("resnet20_cifar_iebn", pretrained=True).eval()
    picture = Image.fromarray(names["image"])
    pixels = create_transform(**resolve_data_config({}, model=net))(picture)[None]
    assert torch.equal(names["processor"](picture, return_tensors="pt")["pixel_values"], pixels)
    assert torch.equal(names["logits"], net(pixels)) and len(norms(names["net"])) == 19
    assert names["net"].config.id2label[0] == "apple"
    names["net"].save_pretrained(tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(again(pixels), net(pixels))


def test_transformers_fine_tunes_a_folder_for_other_classes():
    transformers = pytest.importorskip("transformers")
    folder = ZOO / "resnet20_cifar_iebn.cifar100_60epochs_seed0"
    net = transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=10, ignore_mismatched_sizes=True
    )
    start = timm.create_model("resnet20_cifar_iebn", pretrained=True)
    for before, after in zip(norms(start), norms(net), strict=True):
        assert torch.equal(before.gate_weight, after.gate_weight)
    out = net(torch.randn(4, 3, 32, 32), labels=torch.tensor([1, 2, 3, 4]))
    out.loss.backward()
    assert out.logits.shape == (4, 10) and all(m.gate_weight.grad.abs().sum() > 0 for m in norms(net))


def test_every_folder_of_the_zoo_is_a_checkpoint_of_transformers():
    transformers = pytest.importorskip("transformers")
    folders = sorted(path.parent for path in ZOO.glob("*/model.safetensors"))
    for folder in folders:
        _, info = transformers.AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), (folder, info)
    assert folders != []


def test_detr_has_gates_with_the_backbone_of_the_recipe(run_recipe):
    net = run_recipe("transformers", "DetrConfig")["net"].eval()
    assert len(norms(net)) == 17 and all(m.frozen for m in norms(net))
    assert net(torch.randn(1, 3, 64, 64)).logits.shape[:2] == (1, 100)


def test_detection_trains_the_gates_of_its_body(run_recipe):
    names = run_recipe("torchvision", "FasterRCNN")
    net = names["net"]
    assert len(norms(net.backbone)) == 17
    assert (norms(net)[0].gate_weight.grad != 0).all()
    timm_iebn.freeze_batch_norm_2d(names["body"])
    before = {k: v.clone() for k, v in names["body"].state_dict().items() if "bn" in k}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    sum(net.train()(names["images"], names["targets"]).values()).backward()
    optimizer.step()
    assert all(torch.equal(names["body"].state_dict()[k], v) for k, v in before.items())
    assert net.eval()(names["images"])[0].keys() == {"boxes", "labels", "scores"}


def test_lightning_trains_the_gates(run_recipe):
    names = run_recipe("lightning", "lightning.Trainer")
    assert all_trained(names["net"]) and all(m.sync for m in norms(names["net"])) and len(norms(names["net"])) == 19
    assert names["net"].trainer.current_epoch == 1


def test_lightning_does_not_drop_gates_to_synchronise():
    lightning = pytest.importorskip("lightning")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = timm.create_model("resnet20_cifar_iebn")

        def training_step(self, batch):
            return self.net(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, strategy="ddp", sync_batchnorm=True, logger=False, enable_checkpointing=False
    )
    try:
        with pytest.raises(AttributeError, match="timm_iebn.convert_sync_batchnorm"):
            trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(4, 3, 32, 32), batch_size=2))
    finally:
        torch.distributed.destroy_process_group()


def test_onnxruntime_computes_what_torch_computes(run_recipe):
    names = run_recipe("onnxruntime", "onnxruntime.InferenceSession")
    session, net = names["session"], names["net"]
    for images in (names["images"], torch.rand(3, 3, 32, 32)):
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, net(images), rtol=1e-4, atol=1e-4)
    assert sum(node.op_type == "Sigmoid" for node in onnx.load("net.onnx").graph.node) == len(norms(net)) == 19


def test_a_script_that_knows_no_iebn_runs_with_its_networks(tmp_path):
    (tmp_path / "beside.py").write_text("NAME = 'resnet20_cifar_iebn'\n")
    script = tmp_path / "script.py"
    script.write_text("import sys, timm\nfrom beside import NAME\nprint(len(sys.argv), timm.create_model(NAME).bn1)\n")
    command = [sys.executable, "-m", "timm_iebn"]
    run = partial(subprocess.run, capture_output=True, text=True)
    assert run([*command, str(script), "--flag"]).stdout.startswith("2 IEBN2d(16")
    assert "is a file; got ['missing.py']" in run([*command, "missing.py"], cwd=tmp_path).stderr


@pytest.mark.skipif("TIMM_REPOSITORY" not in os.environ, reason="needs a checkout of timm's repository")
def test_timms_scripts_train_validate_and_benchmark(tmp_path):
    data = image_folder(tmp_path / "data", images_per_class=20, size=32)
    folder = Path(os.environ["TIMM_REPOSITORY"])

    def run(*command):
        model = ["--model", "resnet20_cifar_iebn", "--num-classes", "2", "--device", "cpu", "-b", "8"]
        command = [sys.executable, *map(str, command), *model]
        result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout.rpartition("--result\n")[2]

    train = ["--data-dir", data, "--val-split", "test", "-j", 1, "--epochs", 1, "--warmup-epochs", 0, "--lr", 0.1]
    run(folder / "train.py", "--device-modules", "timm_iebn", *train, "--output", tmp_path, "--experiment", "run")
    checkpoint = tmp_path / "run" / "last.pth.tar"
    net = timm.create_model("resnet20_cifar_iebn", num_classes=2, checkpoint_path=checkpoint)
    assert all_trained(net)
    validate = ["--checkpoint", checkpoint, "--data-dir", data, "--split", "test", "-j", 1]
    (row,) = csv.DictReader((tmp_path / "run" / "summary.csv").read_text().splitlines())
    result = json.loads(run("-m", "timm_iebn", folder / "validate.py", *validate))
    assert result["top1"] == pytest.approx(float(row["eval_top1"]), abs=1e-3)
    steps = ["--num-warm-iter", 1, "--num-bench-iter", 5]
    result = json.loads(run("-m", "timm_iebn", folder / "benchmark.py", *steps))
    assert result["infer_samples_per_sec"] > 0 < result["train_samples_per_sec"]
