"""What a recipe asks for reaches the optimizer, the schedule, the loss and the averaged weights: against what the tests
work out themselves.
"""

import copy
import math
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from training import ENVIRONMENT, THIN

from timm_iebn.recipe import Recipe
from timm_iebn.training import Trainer
from timm_iebn.training.build import create_optimizer, create_scheduler
from timm_iebn.zoo import read_config


def recipe(**asked):
    """That of a small network without batch statistics or dropout."""
    given = dict(model="test_vit", data="digits", model_args=dict(img_size=32), milestones=(), epochs=2)
    return Recipe(**given | asked)


@pytest.mark.parametrize("decay_norms", [True, False])
def test_weight_decay_is_on_norms_biases_and_gates_if_the_recipe_says_so(decay_norms):
    net = timm.create_model("resnet20_cifar_iebn")
    asked = Recipe(model="m", data="digits", lr=0.3, momentum=0.7, weight_decay=0.02, decay_norms=decay_norms)
    optimizer = create_optimizer(asked, net)
    names = {p: name for name, p in net.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    vectors = {name for name, p in net.named_parameters() if p.ndim == 1}
    assert {"bn1.weight", "bn1.gate_weight", "bn1.gate_bias", "fc.bias"} < vectors < set(names.values())
    assert decay == {name: 0.0 if name in vectors and not decay_norms else 0.02 for name in names.values()}
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"], group["nesterov"]) == (0.3, 0.7, False)


@pytest.mark.parametrize("start", [{}, dict(neutral_gates=True)], ids=["authors", "neutral"])
def test_frozen_gates_stay_as_they_start_and_everything_else_is_trained(tmp_path, start):
    given = dict(model="resnet20_cifar_iebn", data="digits", batch_size=700, epochs=1, milestones=(), lr=0.01)
    folder = tmp_path / "out"
    trainer = Trainer(Recipe(**given, model_args=THIN | start, freeze_gates=True), folder)
    before = {name: p.detach().clone() for name, p in trainer.workload.net.named_parameters()}
    trainer.fit()
    assert "Here the gates were not trained" in (folder / "README.md").read_text()
    assert read_config(folder)["training"]["is_study"]
    after = load_file(folder / "model.safetensors")
    kept = {name for name, p in before.items() if torch.equal(p, after[name])}
    assert kept == {name for name in before if name.endswith(("gate_weight", "gate_bias"))} != set()


def rates(**asked):
    """The learning rate of each update, ten an epoch."""
    asked = Recipe(model="m", data="digits", lr=0.5, **asked)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=asked.lr)
    scheduler, found = create_scheduler(asked, optimizer, updates_per_epoch=10), []
    for update in range(10 * asked.epochs):
        scheduler.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_learning_rate_falls_as_the_schedule_says():
    multistep = rates(epochs=4, milestones=(1, 3), decay_rate=0.5)
    assert multistep == pytest.approx([0.5] * 10 + [0.25] * 20 + [0.125] * 10)
    short = dict(epochs=4, milestones=(), min_lr=0.1)
    shares = [update / 40 for update in range(40)]
    cosine = [0.1 + 0.2 * (1 + math.cos(math.pi * share)) for share in shares]
    assert rates(sched="cosine", **short) == pytest.approx(cosine)
    poly = [0.1 + 0.4 * (1 - share) ** 2 for share in shares]
    assert rates(sched="poly", decay_rate=2.0, **short) == pytest.approx(poly)
    tanh = rates(sched="tanh", **short)
    assert tanh == sorted(tanh, reverse=True) and tanh[0] > 0.49 and 0.1 < tanh[-1] < 0.12


def test_the_learning_rate_warms_up():
    found = rates(epochs=4, milestones=(), warmup_epochs=2, sched="cosine")
    assert found[:20] == pytest.approx([0.05 + 0.45 * update / 20 for update in range(20)])
    assert found[20] > 0.2 and found[20:] == sorted(found[20:], reverse=True)


@pytest.mark.parametrize("clip_grad", [0.0, 0.01])
def test_an_update_is_that_of_the_smoothed_loss_and_the_clipped_gradient(tmp_path, clip_grad):
    asked = dict(batch_size=1400, label_smoothing=0.3, clip_grad=clip_grad, lr=0.05, weight_decay=0.1)
    trainer = Trainer(recipe(**asked), tmp_path / "out")
    net = copy.deepcopy(trainer.workload.net)
    ((images, labels),) = trainer.workload.train_loader.epoch(0)
    trainer.train_epoch()
    targets = 0.7 * F.one_hot(labels, 10) + 0.3 / 10
    loss = -(targets * net(images).log_softmax(1)).sum(1).mean()
    grads = torch.autograd.grad(loss, list(net.parameters()))
    norm = torch.stack([g.norm() for g in grads]).norm()
    assert norm > 0.1
    share = clip_grad / norm if clip_grad else 1.0
    updated = dict(trainer.workload.net.named_parameters())
    for (name, before), grad in zip(net.named_parameters(), grads, strict=True):
        decay = 0.0 if name in net.no_weight_decay() else 0.1
        expected = before - 0.05 * (share * grad + decay * before)
        torch.testing.assert_close(updated[name], expected, rtol=1e-4, atol=1e-6)
    assert trainer.sums[0].item() / 1400 == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_are_mixed_with_those_of_the_batch_from_its_end_and_so_are_labels(tmp_path, kind):
    plain = dict(crop_padding=0, hflip=False)
    trainer = Trainer(recipe(batch_size=400, **plain, **{kind: 1.0}), tmp_path / "out")
    loader, seen, losses, shares = trainer.workload.train_loader, [], [], []
    loader.images = torch.randint_like(loader.images, 256)  # or equal pixels would hide where a box ends
    trainer.workload.net.register_forward_hook(lambda _, inputs, logits: seen.append((inputs[0].clone(), logits)))
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss: (losses.append(loss.item()), backward(loss))
    trainer.train_epoch()
    for (images, labels), (mixed, logits), loss in zip(loader.epoch(0), seen, losses, strict=True):
        other = images.flip(0)
        if kind == "mixup":
            off = images - other
            share = (((mixed - other) * off).sum() / (off**2).sum()).item()
            torch.testing.assert_close(mixed, other + share * off, rtol=1e-4, atol=1e-4)
        else:
            box = (mixed != images).any(0).any(0)
            assert torch.equal(mixed, torch.where(box, other, images))
            share = 1 - box.float().mean().item()
        one_hot = F.one_hot(labels, 10).float()
        targets = share * one_hot + (1 - share) * one_hot.flip(0)
        assert loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-4)
        shares.append(share)
    assert min(shares) < 0.9 and len(set(shares)) == 3


def test_averaged_weights_follow_the_updates(tmp_path):
    trainer = Trainer(recipe(batch_size=400, ema_decay=0.3, lr=0.05), tmp_path / "out")
    workload, average = trainer.workload, None
    step = workload.optimizer.step
    decays = iter((0.0, 0.3, 0.3))  # the first one starts; timm's warmup, 1 - 2 ** (-2 / 3), is above 0.3 then

    def follow(*args, **kwargs):
        nonlocal average
        step(*args, **kwargs)
        decay, now = next(decays), [p.detach().clone() for p in workload.net.parameters()]
        average = [decay * a + (1 - decay) * p for a, p in zip(average or now, now, strict=True)]

    workload.optimizer.step = follow
    trainer.train_epoch()
    assert next(decays, None) is None and workload.result is workload.ema.module
    for expected, ours in zip(average, workload.result.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)
    assert not torch.equal(workload.result.head.weight, workload.net.head.weight)


def test_every_batch_draws_random_numbers_of_its_own(tmp_path):
    trainer = Trainer(recipe(batch_size=400), tmp_path / "out")
    seeds = []
    trainer.workload.net.register_forward_hook(lambda *_: seeds.append(torch.initial_seed()))
    for epoch in range(2):
        trainer.epoch, trainer.step = epoch, 0
        trainer.train_epoch()
    assert len(set(seeds)) == len(seeds) == 6


IN_BF16 = """
import sys, timm, torch
from pathlib import Path
from timm_iebn.recipe import Recipe
from timm_iebn.training import Trainer

args = dict(img_size=32)
recipe = Recipe(model="test_vit", data="digits", model_args=args, precision="bf16")
trainer = Trainer(recipe, Path(sys.argv[1]))
fresh = timm.create_model("test_vit", num_classes=10, in_chans=1, **args).eval().to(memory_format=torch.channels_last)
fresh.load_state_dict(trainer.workload.result.state_dict())
x = torch.randn(8, 1, 32, 32)
with torch.no_grad():
    exact, evaluated = fresh(x), trainer.workload.result.eval()(x)
    with trainer.accelerator.autocast():
        trained = trainer.workload.model(x)
print(torch.equal(evaluated, exact), torch.equal(trained.float(), exact))
"""


def test_evaluation_is_in_float32_where_training_is_not(tmp_path):
    """In a process of its own, which has one precision only."""
    command = [sys.executable, "-c", IN_BF16, tmp_path / "out"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines()[-1] == "True False", result.stdout + result.stderr
