"""The network and the optimizer of a recipe, tried before a run starts."""

import difflib
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from .convert import GATES
from .recipe import Recipe, RecipeError


def suggestion(model: str) -> str:
    """A question after a registered name that is like `model`, or nothing."""
    close = difflib.get_close_matches(model, timm.list_models(), n=1, cutoff=0.8)
    return f"; did you mean {close[0]!r}?" if close and close[0] != model else ""


def create_model(recipe: Recipe, num_classes: int, in_chans: int) -> nn.Module:
    """The network of the recipe.

    Raises:
        RecipeError: timm has no such model, or it does not take the arguments or has no gradient checkpointing.
    """
    try:
        net = timm.create_model(
            recipe.model, pretrained=recipe.pretrained, num_classes=num_classes, in_chans=in_chans, **recipe.model_args
        )
    except Exception as e:  # whatever a network makes of its arguments
        reason = f"{type(e).__name__}: {e}{suggestion(recipe.model)}"
        raise RecipeError(f"model: can't create {recipe.model!r} with model_args {recipe.model_args}: {reason}") from e
    if recipe.grad_checkpointing:
        try:
            net.set_grad_checkpointing()
        except (AssertionError, AttributeError) as e:
            raise RecipeError(f"grad_checkpointing: {recipe.model!r} has none") from e
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
        reason = f"{type(e).__name__}: {e}"
        raise RecipeError(f"model: {recipe.model!r} can't take images of {list(input_size)}: {reason}") from e
    if tuple(shape) != (2, num_classes):
        raise RecipeError(f"model: {recipe.model!r} with model_args {recipe.model_args} gives no logits: {list(shape)}")


def _groups_without_decayed_gates(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    gates = [p for name, p in net.named_parameters() if name.endswith(GATES)]
    others = [p for name, p in net.named_parameters() if not name.endswith(GATES)]
    groups = dict(params=others, weight_decay=weight_decay), dict(params=gates, weight_decay=0.0)
    return [group for group in groups if group["params"]]


def create_optimizer(recipe: Recipe, net: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the recipe, for `net`.

    Raises:
        RecipeError: timm has no such optimizer, or it does not take the arguments or can't work on this device.
    """
    args = dict(opt=recipe.opt, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    args |= dict(filter_bias_and_bn=not recipe.decay_norms) | recipe.opt_args
    if recipe.decay_norms and not recipe.decay_gates:
        args |= dict(param_group_fn=partial(_groups_without_decayed_gates, weight_decay=recipe.weight_decay))
    try:
        # many find out in their first step only that they can't work here
        trial = nn.Linear(8, 8, device=next(net.parameters()).device)
        trial_optimizer = create_optimizer_v2(trial, **args)
        trial(trial.weight).sum().backward()
        trial_optimizer.step()
        return create_optimizer_v2(net, **args)
    except Exception as e:
        raise RecipeError(f"opt: {recipe.opt!r} with opt_args {recipe.opt_args}: {type(e).__name__}: {e}") from e
