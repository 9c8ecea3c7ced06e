"""Measures the images per second of the zoo's networks in inference, on this machine, and writes them to zoo/speed.csv.

    python scripts/zoo_speed.py [--threads N] [--repeats N]

All networks take turns in one process, in float32 and channels last, on CUDA where there is one; a figure is the median
of the repeats. Rows of other devices stay, and those of networks whose weights are not here. Nothing else may
run meanwhile.
"""

import argparse
import csv
import io
import platform
import statistics
import time
from contextlib import suppress
from datetime import date

import timm
import torch

from timm_iebn.files import write_atomically
from timm_iebn.zoo import WEIGHTS, ZOO, read_zoo

FIELDS = ("architecture", "input_size", "device", "batch_size", "images_per_second", "torch", "date")


def measure(device: torch.device, repeats: int, batch_size: int) -> dict[tuple[str, str], float]:
    """Images per second of each architecture and input size in the zoo."""
    networks, times = {}, {}
    for folder, config in read_zoo().items():
        if not (folder / WEIGHTS).exists():
            continue
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        size = config["pretrained_cfg"]["input_size"]
        images = torch.randn(batch_size, *size)
        put = dict(device=device, memory_format=torch.channels_last)
        networks[config["architecture"], "x".join(map(str, size))] = model.to(**put), images.to(**put)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with torch.inference_mode():
        for _ in range(repeats + 2):
            for name, (model, images) in networks.items():
                start = time.perf_counter()
                model(images)
                synchronize()
                times.setdefault(name, []).append(time.perf_counter() - start)
    return {name: batch_size / statistics.median(seconds[2:]) for name, seconds in times.items()}


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
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, path, rows = device_name(device), ZOO / "speed.csv", {}
    if path.exists():
        with open(path, newline="") as file:
            rows = {(row["architecture"], row["device"], row["input_size"]): row for row in csv.DictReader(file)}
    about = dict(device=name, batch_size=args.batch_size, torch=torch.__version__, date=str(date.today()))
    for (architecture, size), speed in sorted(measure(device, args.repeats, args.batch_size).items()):
        row = dict(architecture=architecture, input_size=size, images_per_second=f"{speed:.0f}", **about)
        rows[architecture, name, size] = row
        print(f"{architecture:32} {row['images_per_second']:>8} images/s on {name}")
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for _, row in sorted(rows.items()))
    write_atomically(path, text.getvalue().encode())  # it holds other machines' figures too


if __name__ == "__main__":
    main()
