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
from timm_iebn.zoo import WEIGHTS, ZOO, read_zoo

FIELDS = ("architecture", "input_size", "parameters", "macs", "device", "batch_size", "images_per_second")
FIELDS += ("torch", "date")
KEY = ("architecture", "device", "batch_size", "input_size")
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
    parser.add_argument("--output", type=Path, default=ZOO / "cost.csv", help="default: zoo/cost.csv")
    args = parser.parse_args()
    networks = create_networks(args.patterns)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, rows = device_name(device), {}
    if args.output.exists():
        with open(args.output, newline="") as file:
            rows = {tuple(row[k] for k in KEY): row for row in csv.DictReader(file)}
    about = dict(device=name, batch_size=args.batch_size, torch=torch.__version__, date=str(date.today()))
    speeds = measure(networks, device, args.repeats, args.batch_size)
    for ((architecture, input_size), model), speed in zip(networks.items(), speeds, strict=True):
        size, shown = "x".join(map(str, input_size)), f"{speed:.4g}" if speed < 1e4 else f"{speed:.0f}"
        row = dict(architecture=architecture, input_size=size, images_per_second=shown)
        row |= dict(parameters=sum(p.numel() for p in model.parameters()), macs=count_macs(model, input_size))
        rows[architecture, name, str(args.batch_size), size] = row | about
        print(f"{architecture:32} {shown:>8} images/s on {name}")
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for _, row in sorted(rows.items()))
    write_atomically(args.output, text.getvalue().encode())  # it holds other machines' figures too


if __name__ == "__main__":
    main()
