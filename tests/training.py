"""Runs the scripts as a user does, in processes of their own; tests share it."""

import csv
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import forkserver, get_context, get_start_method, set_start_method
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import datasets
import numpy as np
from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "scripts"
# 8 layers in place of 20, of few channels; with 4 in its stem, torch on AVX2 crashes (oneDNN's issue 6035). The disks
# of faults/disks.py are made for checkpoints of its size.
THIN = dict(depth=1, channels=[8, 8, 16], stem_chans=8)
SMALL = f"model_args={THIN}"
SHORT = ["epochs=2", "warmup_epochs=0", "batch_size=200", SMALL]  # 14 updates
# all that has a state or draws random numbers
RICH = [
    *SHORT,
    "mixup=0.2",
    "ema_decay=0.99",
    "random_erasing=0.2",
    "opt=adamw",
    "lr=0.002",
    f"model_args={THIN | dict(drop_rate=0.1)}",
    "noise_scale=0.9",
    "noise_offset=0.1",
    "mix_data=digits",
    "mix_images=10",
]
USERS_OWN = ("DATA_DIR", "TIMM_IEBN_NAMESPACE")  # what a user may have set for other runs
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in USERS_OWN}
ENVIRONMENT |= dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")


def command(*args, processes=1, script="train.py"):
    """The command line; `script` is one of the scripts, or another path."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launch, str(SCRIPTS / script), *map(str, args)]


@cache
def _forks():
    """The context of processes forked of one that has imported the libraries, in the environment of a script."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["timm_iebn.training", "datasets", "sklearn.datasets"])
    with patch.dict(os.environ, ENVIRONMENT, clear=True):
        forkserver.ensure_running()
    return context


def _run_forked(args, cwd, output, start_method):
    """In a process of its own: what `python ARGS` does in `cwd`. What it prints is in files of the folder `output`."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT), number)
    set_start_method(start_method, force=True)  # of the workers of loaders
    np.random.seed()  # as in a new process
    os.chdir(cwd)
    sys.argv, sys.path[0] = args, str(Path(args[0]).parent)
    runpy.run_path(args[0], run_name="__main__")


def run(*args, cwd, env=ENVIRONMENT, processes=1, fork=True, **kwargs):
    """The script's exit status and output.

    With `fork`, one process in the usual environment is forked of one that has imported the libraries, which take most
    of a short run's time. It does not show how the interpreter ends, nor what an import or a set's order does.
    """
    line = command(*args, processes=processes, **kwargs)
    if processes > 1 or env is not ENVIRONMENT or not fork:
        return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    with TemporaryDirectory() as output:
        process = _forks().Process(target=_run_forked, args=(line[1:], cwd, output, get_start_method()))
        process.start()
        try:
            process.join(600)
        finally:
            finished = process.exitcode is not None
            process.kill()
            process.join()
        printed = [(Path(output) / name).read_text() for name in ("stdout", "stderr")]
    assert finished, printed
    return subprocess.CompletedProcess(line, process.exitcode, *printed)


@contextmanager
def started(*args, **kwargs):
    """The script, at work; whatever the test does, none of its processes is left."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command(*args, **kwargs), env=ENVIRONMENT, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(pattern, folder, process):
    """Until `folder` holds a file like that, or the process is at its end."""
    deadline = time.monotonic() + 300
    while not list(folder.glob(pattern)) and process.poll() is None:
        assert time.monotonic() < deadline, f"no {pattern} in {folder}"
        time.sleep(0.02)


def image_folder(root, images_per_class=2, size=8):
    """Image folders as timm reads them: splits train and test, classes ant and bee, of random pixels."""
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(images_per_class):
                pixels = np.random.randint(256, size=(size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def hub_split(root, split, pixels, labels, classes):
    """A split of (N, H, W, 3) `pixels` as parquet in the form that the Hub has CIFAR-100 in."""
    features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(names=classes))
    rows = dict(img=[Image.fromarray(image) for image in pixels], fine_label=labels)
    (root / "data").mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "data" / f"{split}-0.parquet")


def log(folder):
    return list(csv.DictReader((folder / "log.csv").read_text().splitlines()))


def weights(folder):
    return (folder / "model.safetensors").read_bytes()
