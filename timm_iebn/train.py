"""The training loop: a recipe in, a model folder out."""

import time
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn import functional as F

from .convert import convert_sync_batchnorm
from .data import Batches, load_splits
from .recipe import Recipe, RecipeError
from .zoo import save_model_folder

console = Console()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, accelerator: Accelerator) -> dict[str, float]:
    """Loss and top-1 and top-5 accuracy in percent over the whole split, each image counted once."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for images, labels in batches:
        with accelerator.autocast():
            logits = model(images).float()
        top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss, top5[:, 0].sum(), top5.sum(), torch.tensor(len(labels), device=loss.device)]).cpu()
    loss, top1, top5, count = accelerator.reduce(sums.float().to(accelerator.device)).double().tolist()
    return dict(test_loss=loss / count, test_top1=100 * top1 / count, test_top5=100 * top5 / count)


def _create_model(recipe: Recipe, num_classes: int, in_chans: int) -> nn.Module:
    try:
        return timm.create_model(recipe.model, num_classes=num_classes, in_chans=in_chans)
    except (RuntimeError, ValueError) as e:
        raise RecipeError(f"model: can't create {recipe.model!r}: {e}") from e


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    accelerator: Accelerator,
    progress: Progress,
    title: str,
) -> dict[str, float]:
    model.train()
    task = progress.add_task(title, total=len(batches), note="")
    start, loss_sum, correct, seen = time.perf_counter(), 0.0, 0, 0
    for images, labels in batches:
        with accelerator.autocast():
            logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.item() * len(labels)
        correct += int((logits.argmax(1) == labels).sum())
        seen += len(labels)
        speed = accelerator.num_processes * seen / (time.perf_counter() - start)
        progress.update(
            task,
            advance=1,
            note=f"loss {loss_sum / seen:.3f}  top-1 {100 * correct / seen:.1f} %  {speed:.0f} images/s",
        )
    progress.remove_task(task)
    sums = torch.tensor([loss_sum, correct, seen], dtype=torch.float32, device=accelerator.device)
    loss_sum, correct, seen = accelerator.reduce(sums).tolist()
    return dict(train_loss=loss_sum / seen, train_top1=100 * correct / seen, images_per_second=speed)


def train(recipe: Recipe, output: str | Path) -> dict[str, Any]:
    """Trains as `recipe` says, on whatever `accelerate` was launched on, and writes the model folder `output`.

    Returns the row of the last epoch, whose accuracy is the result.

    Raises:
        RecipeError: something in the recipe is impossible, or `output` exists; before the first step.
    """
    output = Path(output)
    if output.exists():
        raise RecipeError(f"output: {output} exists already; choose another folder or move it away")
    accelerator = Accelerator(mixed_precision=recipe.precision)
    if recipe.batch_size % accelerator.num_processes:
        raise RecipeError(f"batch_size: {recipe.batch_size} can't be shared by {accelerator.num_processes} processes")
    set_seed(recipe.seed)
    train_split, test_split = load_splits(recipe.data)
    model = _create_model(recipe, len(train_split.classes), train_split.images.shape[1])
    if accelerator.num_processes > 1:
        convert_sync_batchnorm(model)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)

    cfg = model.pretrained_cfg
    in_chans = train_split.images.shape[1]
    mean, std = (tuple(cfg[k]) if in_chans == 3 else (sum(cfg[k]) / 3,) * in_chans for k in ("mean", "std"))
    common = dict(
        mean=mean,
        std=std,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        channels_last=recipe.channels_last,
    )
    per_process = recipe.batch_size // accelerator.num_processes
    train_batches = Batches(
        train_split,
        per_process,
        train=True,
        crop_padding=recipe.crop_padding,
        hflip=recipe.hflip,
        seed=recipe.seed,
        **common,
    )
    test_batches = Batches(test_split, 500, **common)

    optimizer = create_optimizer_v2(
        model,
        opt=recipe.opt,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        filter_bias_and_bn=not recipe.decay_norms,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.sched,
        num_epochs=recipe.epochs,
        decay_milestones=recipe.milestones,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.lr / 10,
    )
    model, optimizer = accelerator.prepare(model, optimizer)

    is_main = accelerator.is_main_process
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not is_main) as progress:
        for epoch in range(recipe.epochs):
            start = time.perf_counter()
            row = dict(epoch=epoch + 1, lr=optimizer.param_groups[0]["lr"])
            title = f"epoch {epoch + 1}/{recipe.epochs}"
            row |= _train_epoch(model, optimizer, train_batches, accelerator, progress, title)
            row |= evaluate(model, test_batches, accelerator)
            row["seconds"] = time.perf_counter() - start
            rows.append(row)
            scheduler.step(epoch + 1)
            if is_main:
                progress.console.print(
                    f"{title:>13}  lr {row['lr']:.4f}  "
                    f"train loss {row['train_loss']:.3f}  top-1 {row['train_top1']:.2f} %"
                    f"  test loss {row['test_loss']:.3f}  top-1 {row['test_top1']:.2f} %  {row['seconds']:.0f} s",
                    highlight=False,
                    soft_wrap=True,
                )
    if is_main:
        data_config = dict(input_size=tuple(train_split.images.shape[1:]), mean=mean, std=std)
        save_model_folder(accelerator.unwrap_model(model), output, recipe, rows, train_split.classes, data_config)
    accelerator.end_training()
    return rows[-1]
