"""What the gates of a trained network have learned: how far they moved, and what they depend on."""

from collections.abc import Iterable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from .layers import NEUTRAL_GATE, IEBN2d


@torch.no_grad()
def collect_gates(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """The gates (N, C) of all images, by layer, and the labels (N,).

    Raises:
        ValueError: the network has no gates.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, IEBN2d)}
    if not norms:
        raise ValueError(f"{type(model).__name__} has no IEBN, and so no gates")
    found: dict[str, list[Tensor]] = {name: [] for name in norms}
    hooks = [
        norm.register_forward_pre_hook(lambda m, args, name=name: found[name].append(m.gate(args[0]).cpu()))
        for name, norm in norms.items()
    ]
    model.eval()
    try:
        labels = []
        for images, own in batches:
            model(images)
            labels.append(own.cpu())
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(gates) for name, gates in found.items()}, torch.cat(labels)


@torch.no_grad()
def freeze_gates_at_mean(model: nn.Module, gates: dict[str, Tensor]) -> nn.Module:
    """`model`, in place, with every channel's gate the mean of its `gates`, whatever the image: a batch norm."""
    for name, norm in model.named_modules():
        if isinstance(norm, IEBN2d):
            norm.gate_weight.zero_()
            norm.gate_bias.copy_(torch.logit(gates[name].double().mean(0)))
    return model


def _class_means(gates: Tensor, labels: Tensor) -> Tensor:
    """Means (classes, C) of gates (N, C), as far as there are images of a class."""
    return torch.stack([gates[labels == c].mean(0) for c in labels.unique()])


def summary(gates: dict[str, Tensor], labels: Tensor) -> list[dict[str, Any]]:
    """For each layer: mean and percentiles of the gates; `spread`, the standard deviation over the images of a channel,
    on the mean of the channels; and `class_share`, how much of that variance lies between the classes.
    """
    rows = []
    for name, layer in gates.items():
        low, high = (layer.flatten().kthvalue(max(1, round(q * layer.numel()))).values.item() for q in (0.05, 0.95))
        variance = layer.var(0, correction=0)
        sizes = torch.stack([(labels == c).sum() for c in labels.unique()])
        between = ((_class_means(layer, labels) - layer.mean(0)).square() * sizes[:, None]).sum(0) / len(labels)
        row = dict(layer=name, mean=layer.mean().item(), low=low, high=high, spread=variance.sqrt().mean().item())
        rows.append(row | dict(class_share=(between.sum() / variance.sum().clamp(min=1e-30)).item()))
    return rows


def plot_gates(rows: list[dict[str, Any]], gates: dict[str, Tensor], labels: Tensor, path: str, title: str) -> None:
    """As PNG: the distribution of the gates over the layers, how much they depend on the image and on its class, and
    the class means of the last layer's gates. `rows` are those of `summary`.
    """
    at = range(len(rows))
    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(title)
    distribution, dependence, classes = figure.subplots(1, 3)
    distribution.fill_between(at, *([row[k] for row in rows] for k in ("low", "high")), alpha=0.25, label="5 to 95 %")
    distribution.plot(at, [row["mean"] for row in rows], ".-", label="mean")
    distribution.axhline(NEUTRAL_GATE, color="gray", linestyle="--", label=f"start, {NEUTRAL_GATE:.4f}")
    distribution.set_ylabel("gate")
    dependence.plot(at, [row["spread"] for row in rows], ".-", label="deviation over images")
    dependence.plot(at, [row["class_share"] for row in rows], ".-", label="share of variance between classes")
    for axes in (distribution, dependence):
        axes.set_xlabel("layer, from the input on")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    name, last = list(gates.items())[-1]
    means = _class_means(last, labels) - last.mean(0)
    limit = means.abs().max().item()
    image = classes.imshow(means, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    figure.colorbar(image, label="mean gate of the class less that of all")
    classes.set_title(f"last layer, {name}", fontsize=9)
    classes.set_xlabel("channel")
    classes.set_ylabel("class")
    figure.savefig(path, dpi=110)
