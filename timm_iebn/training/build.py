"""What a recipe asks for: the network and the optimizer, tried before a run starts, the schedule, mixup."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..layers import IEBN2d
from ..messages import describe
from ..recipe import Recipe, RecipeError


def suggestion(model: str) -> str:
    """A question after a registered name that is like `model`, or nothing."""
    close = difflib.get_close_matches(model, timm.list_models(), n=1, cutoff=0.8)
    return f"; did you mean {close[0]!r}?" if close and close[0] != model else ""


def check_model(recipe: Recipe) -> None:
    """Raises RecipeError if there is no such model, before data that may be slow to come is asked for."""
    kind, colon, folder = recipe.model.partition(":")
    if not colon and not timm.is_model(recipe.model.split(".")[0]):
        raise RecipeError(f"model: unknown model {recipe.model!r}{suggestion(recipe.model)}")
    if kind == "local-dir" and not Path(folder, "config.json").exists():
        raise RecipeError(f"model: {folder!r} is no model folder: it has no config.json")


def create_model(recipe: Recipe, num_classes: int, in_chans: int) -> nn.Module:
    """The network of the recipe.

    Raises:
        RecipeError: timm has no such model, or it does not take the arguments, or it lacks what the recipe asks of it.
    """
    try:
        net = timm.create_model(
            recipe.model, pretrained=recipe.pretrained, num_classes=num_classes, in_chans=in_chans, **recipe.model_args
        )
    except Exception as e:  # whatever a network makes of its arguments
        reason = f"{describe(e)}{suggestion(recipe.model)}"
        raise RecipeError(f"model: can't create {recipe.model!r} with model_args {recipe.model_args}: {reason}") from e
    if recipe.grad_checkpointing:
        try:
            net.set_grad_checkpointing()
        except (AssertionError, AttributeError) as e:
            raise RecipeError(f"grad_checkpointing: {recipe.model!r} has none") from e
    if recipe.freeze_gates:
        norms = [module for module in net.modules() if isinstance(module, IEBN2d)]
        if not norms:
            raise RecipeError(f"freeze_gates: {recipe.model!r} has no IEBN, and so no gates")
        for norm in norms:
            norm.gate_weight.requires_grad_(False)
            norm.gate_bias.requires_grad_(False)
    return net


def try_model(recipe: Recipe, net: nn.Module, input_size: Sequence[int], num_classes: int) -> None:
    """Shows two black images of (C, H, W) `input_size` to `net`.

    Raises:
        RecipeError: it can't take them, or does not tell `num_classes` classes apart.
    """
    net.eval()
    try:
        with torch.no_grad():
            shape = net(torch.zeros(2, *input_size, device=next(net.parameters()).device)).shape
    except Exception as e:  # whatever a network makes of them
        reason = describe(e)
        raise RecipeError(f"model: {recipe.model!r} can't take images of {list(input_size)}: {reason}") from e
    if tuple(shape) != (2, num_classes):
        raise RecipeError(f"model: {recipe.model!r} with model_args {recipe.model_args} gives no logits: {list(shape)}")


def create_optimizer(recipe: Recipe, net: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the recipe, for `net`.

    Raises:
        RecipeError: timm has no such optimizer, or it does not take the arguments or can't work on this device.
    """
    args = dict(opt=recipe.opt, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    args |= dict(filter_bias_and_bn=not recipe.decay_norms) | recipe.opt_args
    try:
        about = get_optimizer_info(recipe.opt.lower().split("_")[-1])  # of lookahead_NAME too
        taken = dict(eps=about.has_eps, betas=about.has_betas)
        if dropped := [key for key in recipe.opt_args if not taken.get(key, True)]:
            raise ValueError(f"it takes no {', '.join(dropped)}, and timm would drop it")
        # many find out in their first step only that they can't work here
        trial = nn.Linear(8, 8, device=next(net.parameters()).device)
        trial_optimizer = create_optimizer_v2(trial, **args)
        trial(trial.weight).sum().backward()
        trial_optimizer.step()
        return create_optimizer_v2(net, **args)
    except Exception as e:
        raise RecipeError(f"opt: {recipe.opt!r} with opt_args {recipe.opt_args}: {describe(e)}") from e


def create_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
    """The learning rate's schedule of the recipe, to be moved after each update."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.sched,
        num_epochs=recipe.epochs,
        # timm lets an epoch's last update have the next one's rate; half an update later is right
        decay_milestones=[m + 0.5 / updates_per_epoch for m in recipe.milestones],
        decay_rate=recipe.decay_rate,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.lr / 10,
        min_lr=recipe.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def create_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    """Mixup or CutMix of a batch, by turns at random, where the recipe has one of them."""
    if not (recipe.mixup or recipe.cutmix):
        return None
    smoothing = recipe.label_smoothing
    return Mixup(recipe.mixup, recipe.cutmix, switch_prob=0.5, label_smoothing=smoothing, num_classes=num_classes)
