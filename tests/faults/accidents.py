"""Two at once, clocks, workers, ranks and data that go wrong, each in processes as a user starts them."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import timm
from hub_client import SETTINGS
from hub_server import Hub
from PIL import Image
from training import ENVIRONMENT, RICH, SCRIPTS, command, image_folder, run, started, wait_for, weights

from timm_iebn.model_folder import FILES

from . import TOKEN, Failures, Outcome
from .readers import TAG, write_folder

ROOT = SCRIPTS.parent


# ---- two at once


def two_publish_at_once(times: int, seed: int, folder: Path) -> Outcome:
    """Two processes publish one folder at the same moment."""
    failures, statuses = Failures(), []
    mine = folder / TAG
    write_folder(mine)
    with Hub({TOKEN: {"lab"}}) as hub:
        env = ENVIRONMENT | SETTINGS | dict(HF_HOME=str(folder / "home"), HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        for _ in range(times):
            hub.repos.clear()
            statuses.append(_both(command(mine, "--namespace", "lab", script="publish.py"), env, failures))
            repo = hub.repos[f"lab/{mine.name}"]
            failures.expect(set(FILES) <= set(repo.files) and len(repo.commits) == 2, f"{len(repo.commits)} commits")
    refused = sum(2 in pair for pair in statuses)
    return Outcome(times, failures, f"one whole commit each time; {refused} times the other one was told to run again")


def _both(words: list[str], env: dict[str, str], failures: Failures) -> list[int]:
    """The exit statuses of two processes that do the same; one at least must succeed, and both speak in one line."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(words, env=env, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in processes]
    statuses = [process.returncode for process in processes]
    failures.expect(0 in statuses and not any("Traceback" in text for text in said), f"{statuses}: {said}")
    return statuses


def two_update_the_zoo_at_once(times: int, seed: int, folder: Path) -> Outcome:
    """Two processes of scripts/update_zoo.py on one checkout, both with README.md to write."""
    failures = Failures()
    for name in ("zoo", "scripts", "timm_iebn"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("studies", "__pycache__"))
    text = (ROOT / "README.md").read_text()
    env = ENVIRONMENT | dict(PYTHONPATH=str(folder))
    (folder / "README.md").write_text(text)
    subprocess.run([sys.executable, folder / "scripts" / "update_zoo.py"], env=env, check=True, capture_output=True)
    right = {name: (folder / name).read_text() for name in ("README.md", "zoo/README.md")}
    for _ in range(times):
        for name, whole in right.items():
            (folder / name).write_text(whole.replace("resnet20_cifar ", "resnet "))
        _both([sys.executable, str(folder / "scripts" / "update_zoo.py")], env, failures)
        failures.expect(all((folder / n).read_text() == whole for n, whole in right.items()), "a text is not whole")
        failures.expect(not list(folder.rglob("*.partial")), "a partial file is left")
    return Outcome(times, failures, "all texts whole, those of people unchanged")


# ---- clocks

JUMPS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
/* the wall clock, and it alone, is years off, and other years from call to call */
static long off(void) { static unsigned calls; return ((long)(calls++ % 7) - 3) * 100000000L; }
int clock_gettime(clockid_t clock, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, t);
    if (clock == CLOCK_REALTIME) t->tv_sec += off();
    return status;
}
int gettimeofday(struct timeval *t, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec; t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
"""


def clock_that_jumps(times: int, seed: int, folder: Path) -> Outcome:
    """Training by a wall clock that jumps by years, and going on from checkpoints whose file times are reversed."""
    failures, whole = Failures(), folder / "whole"
    (folder / "jumps.c").write_text(JUMPS)
    shim = folder / "jumps.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, folder / "jumps.c", "-ldl"], check=True)
    env = ENVIRONMENT | dict(LD_PRELOAD=str(shim))
    years = subprocess.run(
        [sys.executable, "-c", "import time; print({time.localtime().tm_year for _ in range(9)})"],
        env=env,
        capture_output=True,
        text=True,
    ).stdout
    failures.expect(years.count(",") > 1, f"the clock does not jump: {years}")
    assert run("--output", whole, *RICH, cwd=folder).returncode == 0
    for i in range(times):
        output = folder / f"jumped{i}"
        args = ["--output", output, "--resume", "--checkpoint-updates", "1", *RICH]
        with started(*args) as process:
            wait_for("*3.safetensors", output.with_name(f"{output.name}.run"), process)
            process.kill()
            process.wait()
        checkpoints = sorted(output.with_name(f"{output.name}.run").glob("0*.safetensors"))
        for age, path in enumerate(checkpoints):
            os.utime(path, (2_000_000_000 - 10**8 * age,) * 2)  # the newest one is the oldest by its file time
        result = run(*args, cwd=folder, env=env)
        failures.expect(result.returncode == 0 and f"going on from {checkpoints[-1]}" in result.stdout, result.stderr)
        failures.expect(output.exists() and weights(output) == weights(whole), "other weights")
    return Outcome(times, failures, f"the same bits, from the newest checkpoint; years seen: {years.strip()}")


# ---- workers, ranks


def worker_that_dies(times: int, seed: int, folder: Path) -> Outcome:
    """SIGKILL to a process that loads images, in the middle of training; then the same command."""
    failures, seconds = Failures(), []
    images = image_folder(folder / "images", 60, size=32)
    for i in range(times):
        output = folder / f"out{i}"
        args = ["--output", output, "--data-dir", images, "--workers", "2", "--checkpoint-updates", "1", "--resume"]
        args += [*(arg for arg in RICH if not arg.startswith("mix_")), "data=folder", "loader=timm", "batch_size=8"]
        args += ["epochs=6"]
        with started(*args) as process:
            wait_for("0*.safetensors", output.with_name(f"{output.name}.run"), process)
            worker = _children(process.pid)[-1]
            start = time.monotonic()
            os.kill(worker, signal.SIGKILL)
            _, said = process.communicate(timeout=120)
            seconds.append(time.monotonic() - start)
        line = said.strip().splitlines()[-1]
        wanted = ("train.py: a worker that loads images has died", "the last good checkpoint is ")
        failures.expect(process.returncode == 1 and all(w in line for w in wanted) and "Traceback" not in said, said)
        again = run(*args, cwd=folder)
        failures.expect(again.returncode == 0 and "going on from" in again.stdout, again.stderr)
    return Outcome(times, failures, f"one line after {max(seconds):.0f} s at most; the same command went on")


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in found.split()]


def rank_that_dies(times: int, seed: int, folder: Path) -> Outcome:
    """SIGKILL to one of two processes of torchrun, the first or the second one; then the same command."""
    failures, seconds = Failures(), []
    for i in range(times):
        output = folder / f"out{i}"
        args = ["--output", output, "--resume", "--checkpoint-updates", "2", *RICH, "batch_size=20"]
        with started(*args, processes=2) as launched:
            wait_for("0*.safetensors", output.with_name(f"{output.name}.run"), launched)
            start = time.monotonic()
            os.kill(_children(launched.pid)[-1 - i % 2], signal.SIGKILL)
            _, said = launched.communicate(timeout=240)
            seconds.append(time.monotonic() - start)
        failures.expect(launched.returncode != 0 and "SIGKILL" in said, said)
        failures.expect(seconds[-1] < 60, f"it stopped after {seconds[-1]:.0f} s")
        again = run(*args, cwd=folder, processes=2)
        failures.expect(again.returncode == 0 and "going on from" in again.stdout, again.stderr)
    return Outcome(times, failures, f"torchrun's message after {max(seconds):.0f} s at most; the same command went on")


# ---- data


def images_that_are_nan(times: int, seed: int, folder: Path) -> Outcome:
    """Float32 TIFF images of NaN and infinity among the others: pixels are read as bytes, so the run stays finite."""
    failures, images = Failures(), image_folder(folder / "images", 20, size=32)
    for i in range(times):
        pixels = np.full((32, 32), (np.nan, np.inf, -np.inf)[i % 3], dtype=np.float32)
        Image.fromarray(pixels).save(images / "train" / "ant" / f"bad{i}.tif")
    args = [
        "data=folder",
        "--data-dir",
        images,
        "batch_size=8",
        "warmup_epochs=0",
        "epochs=1",
        "--output",
        folder / "out",
    ]
    result = run(*args, cwd=folder)
    failures.expect(result.returncode == 0, result.stderr)
    if result.returncode == 0:
        with open(folder / "out" / "log.csv") as file:
            finite = all(np.isfinite(float(v)) for row in csv.DictReader(file) for v in row.values())
        failures.expect(finite, "the log is not finite")
    return Outcome(times, failures, "read as black or white; loss and weights finite")


def other_class_counts(times: int, seed: int, folder: Path) -> Outcome:
    """A network of 10 classes meets data of 2, for evaluation and fine-tuning, and a config.json that says 2."""
    failures, images, mine = Failures(), image_folder(folder / "images", 20, size=32), folder / TAG
    write_folder(mine)
    data = ["--data", "folder", "--data-dir", images]
    result = run(mine, *data, cwd=folder, script="validate.py")
    refused = "tells 10 classes apart, 'folder' has 2"
    failures.expect(result.returncode == 2 and refused in result.stderr, result.stdout + result.stderr)
    tune = ["--output", folder / "tuned", f"model=local-dir:{mine}", "pretrained=true", "data=folder", "--data-dir"]
    result = run(*tune, images, "batch_size=8", "epochs=1", "warmup_epochs=0", cwd=folder)
    failures.expect(result.returncode == 0, result.stderr)
    if result.returncode == 0:
        net = timm.create_model(f"local-dir:{folder}/tuned", pretrained=True)
        failures.expect(net.num_classes == 2, f"the head has {net.num_classes} classes")
    text = (mine / "config.json").read_text()
    assert text.count('"num_classes": 10') > 1
    (mine / "config.json").write_text(text.replace('"num_classes": 10', '"num_classes": 2', 1))
    result = run(mine, "--data", "digits", cwd=folder, script="validate.py")
    failures.expect(result.returncode == 2 and "num_classes: config.json and weights" in result.stderr, result.stderr)
    return Outcome(3, failures, "two refused in a line that names both numbers; the head got 2 classes")
