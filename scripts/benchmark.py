"""What IEBN costs beside batch norm, and the trainer beside a bare loop: ratios, measured side by side in one process.

    python scripts/benchmark.py [layer] [train] [inference] [trainer] [--repeats N] [--threads N]

Every repeat runs the baseline, then ours; a row is the median over the repeats of the ratio within one repeat. Numbers
mean nothing while something else runs on the machine. glibc is told to keep freed memory: else either side may spend
more on page faults than on work, depending on what else lies on the heap.
"""

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.layers import BatchNormAct2d
from torch import nn

from timm_iebn import IEBN2d, IEBNAct2d
from timm_iebn.recipe import Recipe
from timm_iebn.training import Trainer

LAYER_SHAPES = [(32, 256, 14, 14), (128, 16, 32, 32), (128, 64, 8, 8), (128, 32, 16, 16)]
LAYOUTS = {torch.channels_last: "NHWC", torch.contiguous_format: "NCHW"}
PAIRS = {"a layer": (nn.BatchNorm2d, IEBN2d), "one with ReLU": (BatchNormAct2d, IEBNAct2d)}
Row = tuple[str, float, float, float]


def compare(name: str, baseline: Callable[[], None], ours: Callable[[], None], repeats: int) -> Row:
    """The row `name`: median ms of each, and the median ratio ours / baseline."""
    pairs = []
    for _ in range(repeats + max(2, repeats // 10)):
        seconds = []
        for run in (baseline, ours):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        pairs.append(seconds)
    pairs = pairs[-repeats:]  # the first ones warm up
    median = [1000 * statistics.median(column) for column in zip(*pairs, strict=True)]
    return name, *median, statistics.median(b / a for a, b in pairs)


def _layer_step(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> None:
    x.grad = None
    layer(x).backward(grad)


def layer_rows(repeats: int) -> list[Row]:
    """Forward and backward of one layer, alone and with ReLU, training, channels last."""
    rows = []
    for what, dtype, shape in product(PAIRS, (torch.float32, torch.bfloat16), LAYER_SHAPES):
        x, grad = (torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(2))
        steps = [partial(_layer_step, layer(shape[1]), x.requires_grad_(), grad) for layer in PAIRS[what]]
        rows.append(compare(f"training of {what} {shape} {str(dtype).removeprefix('torch.')}", *steps, repeats))
    return rows


def _train_step(name: str, batch_size: int, size: int) -> Callable[[], None]:
    """A training step of the network `name` on one batch of images of size x size."""
    images = torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 100, (batch_size,))
    model = timm.create_model(name, num_classes=100).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def train_rows(repeats: int) -> list[Row]:
    """A training step of ResNet-20 on 32x32 images, and of ResNet-50 and MobileNetV2 on larger ones."""
    rows = []
    for name, batch_size, size in (("resnet20_cifar", 128, 32), ("resnet50", 8, 224), ("mobilenetv2_100", 8, 160)):
        steps = [_train_step(network, batch_size, size) for network in (name, f"{name}_iebn")]
        what = f"training of {name}, {size}x{size}, batch {batch_size}, float32"
        rows.append(compare(what, *steps, max(10, repeats // 4)))
    return rows


def inference_rows(repeats: int) -> list[Row]:
    """One layer in eval, alone and with ReLU, in both layouts, and ResNet-50 on 224x224 images, batch 8."""
    rows = []
    for what, dtype, shape, layout in product(PAIRS, (torch.float32, torch.bfloat16), LAYER_SHAPES, LAYOUTS):
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
        layers = [layer(shape[1]).eval() for layer in PAIRS[what]]
        with torch.inference_mode():
            name = f"inference of {what} {shape} {str(dtype).removeprefix('torch.')} {LAYOUTS[layout]}"
            rows.append(compare(name, *(partial(layer, x) for layer in layers), repeats))
    images = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)
    models = [
        timm.create_model(name).eval().to(memory_format=torch.channels_last) for name in ("resnet50", "resnet50_iebn")
    ]
    with torch.inference_mode():
        runs = [lambda model=model: model(images) for model in models]
        return [*rows, compare("inference resnet50, batch 8, float32", *runs, max(10, repeats // 5))]


def trainer_rows(repeats: int) -> list[Row]:
    """An epoch of the trainer on the digits, with augmentation and metrics, against as many bare steps.

    ResNet-20 in float32 on CPU, ResNet-164 in bfloat16 on CUDA.
    """
    on_cuda = torch.cuda.is_available()
    name, precision = ("resnet164_cifar_iebn", "bf16") if on_cuda else ("resnet20_cifar_iebn", "no")
    recipe = Recipe(model=name, data="digits", lr=0.01, precision=precision)
    synchronize = torch.cuda.synchronize if on_cuda else lambda: None
    with TemporaryDirectory() as folder:
        trainer = Trainer(recipe, Path(folder) / "out")
        model = timm.create_model(recipe.model, num_classes=10, in_chans=1).to(memory_format=torch.channels_last)
        device = trainer.accelerator.device
        model.to(device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        images = torch.randn(128, 1, 32, 32, device=device).to(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (128,), device=device)

        def bare() -> None:
            for _ in range(len(trainer.workload.train_loader)):
                with torch.autocast(device.type, torch.bfloat16, enabled=on_cuda):
                    loss = nn.functional.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            synchronize()

        def ours() -> None:
            trainer.step = 0
            trainer.train_epoch()
            synchronize()

        row = f"trainer, {name}, precision {precision}, against a bare loop"
        return [compare(row, bare, ours, max(10, repeats // 5))]


PARTS = dict(layer=layer_rows, train=train_rows, inference=inference_rows, trainer=trainer_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}: choose of {', '.join(PARTS)}")
    torch.set_num_threads(args.threads)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    table = Table("", "baseline, ms", "ours, ms", "ours / baseline")
    for part in args.parts or PARTS:
        for name, baseline, ours, ratio in PARTS[part](args.repeats):
            table.add_row(name, f"{baseline:.2f}", f"{ours:.2f}", f"{ratio:.2f}")
    console = Console()
    console.print(table)
    console.print(f"torch {torch.__version__}, timm {timm.__version__}, {args.threads} CPU threads, channels last")


if __name__ == "__main__":
    main()
