"""What IEBN costs beside batch norm on a CUDA GPU: layers, training steps and peak memory, side by side in one process.

    python scripts/benchmark_gpu.py [--output results]

Writes results.md and results.json. Every repeat times the baseline, then ours; a row is the median over the repeats of
the ratio within one repeat. Both files grow with each row.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import timm
import torch
import triton
from torch import nn
from torch.nn import functional as F

import timm_iebn
from timm_iebn.ops import iebn_reference

# the largest layers of ResNet-50 and MobileNetV2 at batch 256, and small ones of ResNet-164 at batch 128
LAYERS = [(256, 64, 112, 112), (256, 256, 56, 56), (256, 512, 28, 28), (256, 1024, 14, 14), (256, 2048, 7, 7)]
LAYERS += [(256, 96, 112, 112), (256, 144, 56, 56), (128, 64, 32, 32), (128, 16, 32, 32), (128, 256, 8, 8)]
LAYERS += [(256, 24, 56, 56), (1, 64, 512, 512)]  # channels that no 16 divides; one image, whose plane is cut in parts
NETWORKS = ["resnet50", "mobilenetv2_100", "resnext50_32x4d"]
LAYOUTS = {torch.channels_last: "NHWC", torch.contiguous_format: "NCHW"}
Row = dict[str, Any]


class Bench:
    """Runs and times on `device`; on CPU, in Triton's interpreter, only to try the script itself."""

    def __init__(self, device: str, repeats: int, loops: int = 1) -> None:
        self.device, self.repeats, self.loops = torch.device(device), repeats, loops

    def _ms(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - start)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(self.loops):
            run()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / self.loops

    def compare(self, name: str, baseline: Callable[[], Any], ours: Callable[[], Any], **more: Any) -> Row:
        """The row `name`: median ms of both and the median of their ratio."""
        pairs = [(self._ms(baseline), self._ms(ours)) for _ in range(self.repeats + 3)][3:]
        ms = [statistics.median(column) for column in zip(*pairs, strict=True)]
        ratio = statistics.median(b / a for a, b in pairs)
        return dict(name=name, baseline_ms=ms[0], ours_ms=ms[1], ratio=ratio, **more)

    def peak(self, run: Callable[[], Any]) -> float:
        """Peak memory of `run` in GB."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e9

    def held(self) -> float:
        """Memory in use, in GB."""
        return torch.cuda.memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0


def _step(forward: Callable[..., torch.Tensor], args: list[torch.Tensor], norm: nn.Module, grad: torch.Tensor) -> None:
    torch.autograd.grad(forward(*args), [*args, *norm.parameters()], grad)


def _add_and_relu(norm: nn.BatchNorm2d, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return F.relu(norm(x) + residual, inplace=True)


def layer_rows(bench: Bench, shapes: list[tuple[int, ...]], graphs: bool = False) -> Iterator[Row]:
    """Layers in training: forward and backward against batch norm, and each as a share of what a copy reaches.

    With `graphs`, the GPU's part alone, against batch norm.
    """
    wrap, how = (_captured, ", CUDA graph") if graphs else (lambda step: step, "")
    for shape, dtype, layout in product(shapes, (torch.bfloat16, torch.float32), LAYOUTS):
        kind = f"{shape} {str(dtype)[6:]} {LAYOUTS[layout]}{how}"
        x, residual, grad = (
            torch.randn(shape, device=bench.device, dtype=dtype).contiguous(memory_format=layout) for _ in range(3)
        )
        copy = partial(torch.empty_like(x).copy_, x.detach())
        x.requires_grad_(), residual.requires_grad_()
        bn, gated = (norm(shape[1]).to(bench.device) for norm in (nn.BatchNorm2d, timm_iebn.IEBN2d))
        steps = (partial(_step, norm, [x], norm, grad) for norm in (bn, gated))
        yield bench.compare(f"layer {kind}: batch norm, IEBN", *map(wrap, steps))
        if not graphs:
            backward = partial(torch.autograd.grad, gated(x), [x, *gated.parameters()], grad, retain_graph=True)
            for name, run, tensors in (("forward", partial(gated, x), 3), ("backward", backward, 5)):
                row = bench.compare(f"{name} {kind}: copy, IEBN", copy, run)
                yield row | dict(share_of_copy=tensors / 2 / row["ratio"], megabytes=x.numel() * x.element_size() / 1e6)
        fused = partial(gated.normalize, act="relu")
        yield bench.compare(
            f"with addition and ReLU {kind}: batch norm, IEBN",
            wrap(partial(_step, partial(_add_and_relu, bn), [x, residual], bn, grad)),
            wrap(partial(_step, fused, [x, residual], gated, grad)),
        )


def formula_rows(bench: Bench, shape: tuple[int, ...]) -> Iterator[Row]:
    """The plain composition of torch's operations, in eager and compiled, against the kernels."""
    x, grad = (
        torch.randn(shape, device=bench.device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    norm = timm_iebn.IEBN2d(shape[1]).to(bench.device)

    def formula(x: torch.Tensor) -> torch.Tensor:
        params = norm.weight, norm.bias, norm.gate_weight, norm.gate_bias
        return iebn_reference(x, *params, norm.running_mean, norm.running_var, True, 0.1, 1e-5)

    for name, baseline in (("formula", formula), ("compiled formula", torch.compile(formula))):
        steps = (partial(_step, forward, [x.requires_grad_()], norm, grad) for forward in (baseline, norm))
        yield bench.compare(f"{name} {shape} bfloat16 NHWC: {name}, IEBN", *steps)


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    with torch.autocast(images.device.type, torch.bfloat16):
        loss = F.cross_entropy(model(images).float(), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def network_rows(bench: Bench, names: list[str], batch: int, size: int, graphs: bool = False) -> Iterator[Row]:
    """Training steps under bfloat16 autocast in channels last, and their peak memory."""
    for name in names:
        steps, peaks = [], []
        images = torch.randn(batch, 3, size, size, device=bench.device).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (batch,), device=bench.device)
        for variant in (name, f"{name}_iebn"):
            others = bench.held()  # the twin, which stays
            model = timm.create_model(variant, num_classes=10).to(bench.device, memory_format=torch.channels_last)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            step = partial(_train_step, model, optimizer, images, labels)
            for _ in range(3 if bench.device.type == "cuda" else 1):
                step()
            peaks.append(bench.peak(step) - others)
            steps.append(_captured(step) if graphs else step)
        how = ", CUDA graph" if graphs else ""
        row = bench.compare(f"step of {name}, batch {batch}, {size}x{size}{how}: batch norm, IEBN", *steps)
        yield row | dict(baseline_gb=peaks[0], ours_gb=peaks[1])


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return partial(_replay, graph, step)


def _replay(graph: torch.cuda.CUDAGraph, _: Callable[[], None]) -> None:
    """Replays the step, which must live as long: it holds the tensors that the graph reads and writes."""
    graph.replay()


def markdown(rows: list[Row], environment: dict[str, str]) -> str:
    """`rows` as a table."""
    lines = [", ".join(f"{k} {v}" for k, v in environment.items()), ""]
    lines += [
        "| | baseline, ms | ours, ms | ours / baseline | share of copy | GB: baseline, ours |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = f"{100 * row['share_of_copy']:.0f} %" if "share_of_copy" in row else ""
        memory = f"{row['baseline_gb']:.2f}, {row['ours_gb']:.2f}" if "ours_gb" in row else ""
        times = f"{row['baseline_ms']:.3f} | {row['ours_ms']:.3f} | {row['ratio']:.2f}"
        lines.append(f"| {row['name']} | {times} | {share} | {memory} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--try-on-cpu", action="store_true", help="tiny shapes in Triton's interpreter: no measurement")
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.try_on_cpu):
        print("benchmark_gpu.py: there is no CUDA GPU", file=sys.stderr)
        return 2
    if args.try_on_cpu:
        bench, chosen = Bench("cpu", 1), "triton"
        work = [layer_rows(bench, [(2, 8, 6, 6)]), network_rows(bench, ["resnet20_cifar"], 2, 32)]
        device = "CPU: times mean nothing"
    else:
        bench, chosen = Bench("cuda", args.repeats, loops=10), "auto"
        few = Bench("cuda", args.repeats, loops=2)  # of what takes long
        work = [
            layer_rows(bench, LAYERS),
            layer_rows(bench, LAYERS, graphs=True),
            formula_rows(bench, (256, 256, 56, 56)),
            network_rows(few, NETWORKS, 256, 224),
            network_rows(few, ["resnet164_cifar"], 128, 32),
            network_rows(few, ["resnet164_cifar"], 128, 32, graphs=True),
        ]
        device = torch.cuda.get_device_name()
    versions = dict(torch=torch.__version__, triton=triton.__version__, timm=timm.__version__)
    environment = dict(device=device, date=str(date.today()), **versions, python=platform.python_version())
    rows = []
    with timm_iebn.backend(chosen):
        for row in chain.from_iterable(work):
            rows.append(row)
            print(f"{row['name']}: {row['ratio']:.2f}", flush=True)
            args.output.with_suffix(".md").write_text(markdown(rows, environment))
            args.output.with_suffix(".json").write_text(json.dumps(dict(environment=environment, rows=rows), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
