"""The gates of a trained network: collected, frozen, summed up; and the script that shows them."""

import re

import pytest
import timm
import torch
from conftest import randomize
from training import run

import timm_iebn
from timm_iebn.gates import collect_gates, freeze_gates_at_mean, summary
from timm_iebn.layers import NEUTRAL_GATE
from timm_iebn.run_log import read_log


def trained():
    net = randomize(timm.create_model("resnet20_cifar_iebn", num_classes=3)).eval()
    return net, [(torch.randn(8, 3, 32, 32), torch.arange(8) % 3) for _ in range(2)]


def test_gates_are_those_that_the_layers_use():
    net, batches = trained()
    gates, labels = collect_gates(net, batches)
    assert len(labels) == 16 and gates["bn1"].shape == (16, 16) and gates["layer3.2.bn2"].shape == (16, 64)
    x = net.conv1(batches[0][0])
    gated, plain = net.bn1(x), net.bn1.weight[:, None, None] * (x - net.bn1.running_mean[:, None, None])
    plain = plain / torch.sqrt(net.bn1.running_var + 1e-5)[:, None, None]
    found = (gated - net.bn1.bias[:, None, None]) / plain
    torch.testing.assert_close(found.flatten(2).median(2).values, gates["bn1"][:8], rtol=1e-3, atol=1e-3)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_network_with_frozen_gates_is_a_batch_norm_network():
    net, batches = trained()
    gates, _ = collect_gates(net, batches)
    freeze_gates_at_mean(net, gates)
    for layer, of_each in collect_gates(net, batches)[0].items():
        torch.testing.assert_close(of_each, gates[layer].mean(0).expand_as(of_each))
    images, expected = batches[0][0], net(batches[0][0])
    torch.testing.assert_close(timm_iebn.convert_iebn_to_bn(net)(images), expected, rtol=1e-3, atol=1e-3)


def test_the_summary_tells_images_and_classes_apart():
    labels = torch.arange(12) % 3
    by_class = NEUTRAL_GATE + 0.1 * (labels[:, None] - 1.0).expand(12, 5)
    noise = torch.tensor([1.0, -1.0]).repeat_interleave(6)[:, None].expand(12, 5) * 0.2 + 0.5
    first, second = summary({"a": by_class, "b": noise}, labels)
    assert first["mean"] == pytest.approx(NEUTRAL_GATE) and first["class_share"] == pytest.approx(1.0)
    assert first["spread"] == pytest.approx(0.1 * (2 / 3) ** 0.5)
    assert second["class_share"] == pytest.approx(0.0, abs=1e-6) and second["spread"] == pytest.approx(0.2)
    assert (second["low"], second["high"]) == (pytest.approx(0.3), pytest.approx(0.7))


def test_the_script_shows_what_gates_are_worth(tmp_path, uninterrupted):
    result = run(uninterrupted, "--output", tmp_path / "found", cwd=tmp_path, script="gates.py", fork=False)
    assert result.returncode == 0, result.stderr
    assert "those of 1400 training images" in result.stdout  # in batches of 200, as it was trained
    assert "Every gate frozen at its mean" in result.stdout and "| layer3.0.bn2 |" in result.stdout
    trained, _ = re.search(r"running statistics as trained \| ([\d.]+) \| ([\d.]+)", result.stdout).groups()
    assert float(trained) == pytest.approx(read_log(uninterrupted / "log.csv")[-1]["test_top1"], abs=0.01)
    assert (tmp_path / "found.md").exists() and (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_a_network_without_gates_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ResNet has no IEBN"):
        collect_gates(timm.create_model("resnet18"), [])
