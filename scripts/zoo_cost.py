"""Measures what networks cost: parameters, multiply-accumulates, and on this machine images per second in inference.

    python scripts/zoo_cost.py [PATTERN ...] [--threads N] [--repeats N] [--batch-size N]

Measured are the networks that timm lists for the patterns; by default those for 32x32 images, and the zoo's for images
of another size. They take turns in one process, in float32 and channels last, on CUDA where there is one; a
speed is the median of the repeats. Rows of other devices and networks stay. Nothing else may run meanwhile.
`update_zoo.py` then writes the table.
"""

import argparse
import csv
import io
import platform
import statistics
import sys
import time
from contextlib import suppress
from datetime import date
from pathlib import Path

import timm
import torch
from rich.progress import track
from torch import nn

import timm_iebn  # noqa: F401  registers the models
from timm_iebn.files import write_atomically
from timm_iebn.model_folder import count_macs
from timm_iebn.zoo import COSTS, WEIGHTS, ZOO, Cost, read_costs, read_zoo

Networks = dict[tuple[str, tuple[int, ...]], nn.Module]  # by architecture and input size


def create_networks(patterns: list[str]) -> Networks:
    """The networks that timm lists, as registered; without patterns those for 32x32 images and the zoo's."""
    networks = {}
    for name in dict.fromkeys(name for pattern in patterns or ["*_cifar*"] for name in timm.list_models(pattern)):
        model = timm.create_model(name)
        networks[name, tuple(model.pretrained_cfg["input_size"])] = model
    for folder, config in read_zoo(ZOO).items() if not patterns else ():
        key = config["architecture"], tuple(config["pretrained_cfg"]["input_size"])
        if key not in networks and (folder / WEIGHTS).exists():
            networks[key] = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return networks


def measure(networks: Networks, device: torch.device, repeats: int, batch_size: int) -> list[float]:
    """Images per second of each of `networks`."""
    put = dict(device=device, memory_format=torch.channels_last)
    models = [model.to(**put).eval() for model in networks.values()]
    batches = [torch.randn(batch_size, *size).to(**put) for _, size in networks]
    seconds = [[] for _ in models]
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with torch.inference_mode():
        for _ in track(range(repeats + 2), "taking turns"):
            for model, images, own in zip(models, batches, seconds, strict=True):
                start = time.perf_counter()
                model(images)
                synchronize()
                own.append(time.perf_counter() - start)
    return [batch_size / statistics.median(own[2:]) for own in seconds]


def device_name(device: torch.device) -> str:
    """The GPU, or the processor with what decides its speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or "CPU"
    with suppress(OSError), open("/proc/cpuinfo") as file:  # Linux's, which platform does not read
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", type=Path, default=ZOO / COSTS, help="default: zoo/cost.csv")
    args = parser.parse_args()
    try:
        costs = {_key(cost): cost for cost in read_costs(args.output)}
    except ValueError as e:
        sys.exit(f"zoo_cost.py: {e}")
    networks = create_networks(args.patterns)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, speeds = device_name(device), measure(networks, device, args.repeats, args.batch_size)
    for ((architecture, input_size), model), speed in zip(networks.items(), speeds, strict=True):
        size = "x".join(map(str, input_size)), sum(p.numel() for p in model.parameters()), count_macs(model, input_size)
        where = name, args.batch_size, float(f"{speed:.4g}"), torch.__version__, str(date.today())
        cost = Cost(architecture, *size, *where)
        costs[_key(cost)] = cost
        print(f"{architecture:32} {cost.images_per_second:8g} images/s on {name}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Cost._fields)
    for _, cost in sorted(costs.items()):
        writer.writerow(cost._replace(images_per_second=f"{cost.images_per_second:.9g}"))  # 81, not 81.0
    write_atomically(args.output, text.getvalue().encode())  # it holds other machines' figures too


def _key(cost: Cost) -> tuple[str, str, int, str]:
    """What one row of cost.csv is about."""
    return cost.architecture, cost.device, cost.batch_size, cost.input_size


if __name__ == "__main__":
    main()
