"""What keeps a model folder from being published, before anything is sent."""

import json
import re
import shutil

import pytest
import safetensors.torch
from publishing import SCRIPT, copy, refused, save_weights

from timm_iebn.zoo import WEIGHTS


def _flip(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def _put_nan(folder):
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    weights["fc.bias"][0] = float("nan")
    save_weights(folder, weights)


def _link(folder):
    (folder / "environment.txt").unlink()
    (folder / "environment.txt").symlink_to(SCRIPT)


def _config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))

    return edit


def _edit(name, old, new):
    def edit(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return edit


def _claim(key, value):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        config["training"][key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flip, "model.safetensors is not what config.json says"),
        (lambda f: (f / "weights.pth").write_bytes(b""), "weights.pth does not belong there"),
        (lambda f: (f / "recipe.yaml").unlink(), "recipe.yaml missing"),
        (lambda f: (f / "log.csv").write_text("epoch\n"), "log.csv has no epochs"),
        (lambda f: (f / "config.json").write_text("{"), "config.json can't be read"),
        (_claim("test_top1", 99.0), "test_top1 is .* in log.csv, 99.0 in config.json"),
        (_claim("epochs", 164), "differ in epochs"),
        (_edit("README.md", "library_name: timm", "library_name: other"), "library_name"),
        (_edit("README.md", "value: ", "value: 1"), "other figures than config.json"),
        (shutil.rmtree, "no such folder"),
        (_put_nan, "fc.bias in model.safetensors not finite"),
        (_link, "environment.txt is no regular file"),
        (_config(parameters=1), "config.json has not the network's 279700 parameters"),
        (_config(parameters=None), "lacks 'parameters'"),
        (_config(num_classes=99), "as many classes and names"),
        (_config(architecture="resnet32_cifar_iebn"), "should be named resnet32_cifar_iebn.TAG"),
        (
            _edit("config.json", '"pretrained_cfg": {', '"pretrained_cfg": {"hf_hub_filename": "x.bin",'),
            "another file for",
        ),
        (_config(weights_sha256=None), "lacks 'weights_sha256'"),
        (lambda f: (f / "curves.png").write_bytes(b"\x80\x04."), "curves.png is no PNG"),
        (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), "can't be read"),
        (lambda f: (f / "recipe.yaml").write_text("nothing"), "can't be read"),
        (_edit("README.md", "hf-hub:timm-iebn", "hf-hub:other"), "the card loads another repository"),
        (_edit("README.md", "license: apache-2.0\n", ""), "lacks a license"),
        (_edit("recipe.yaml", "hfds/uoft-cs", "hfds//home/me"), "a place on this machine as its data"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_before_anything_is_sent(hub, publish, tmp_path, damage, reason):
    folder = copy(tmp_path)
    damage(folder)
    result = publish(folder=folder)
    refused(result, str(folder))
    assert re.search(reason, result.err), result.err
    assert not hub.requests
