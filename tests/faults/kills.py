"""Processes that are killed at random moments: training, checkpoints, publishing, downloads, the zoo's texts.

Each victim is a fork of a process that has imported everything, so that a hundred take minutes. That process starts no
thread and computes nothing. Its `time.sleep` does not wait (see `hub_client`), so `select` does.
"""

import io
import json
import os
import runpy
import select
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from random import Random

import safetensors.torch
import timm
import torch
from hub_client import client
from hub_server import Fault, Hub
from hub_storage import Repo, sha256
from training import RICH, SCRIPTS, log, weights

import timm_iebn.publish
import timm_iebn.training.trainer  # noqa: F401  with all that victims need
from timm_iebn.model_folder import FILES
from timm_iebn.training.checkpoint import CheckpointError, load_latest, read_checkpoint, save_checkpoint
from timm_iebn.zoo import WEIGHTS, read_zoo

from . import TOKEN, Outcome
from .readers import TAG, write_folder

LIMIT_S = 90
ENVIRONMENT = dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", COLUMNS="200")
TIMING = ("images_per_second", "seconds")


def ready() -> None:
    """Returns when the process that runs it has imported everything."""


def fork(work: Callable[[], None], said: Path) -> int:
    """The id of a new process that does `work`; what it prints goes to `said`."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        number = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(number, stream)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w"), write_through=True) for n in (1, 2))
        work()
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1 if e.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def end(pid: int, seconds: float) -> int | None:
    """The exit status of a process that is killed after so many seconds; None where it was."""
    handle = os.pidfd_open(pid)
    try:
        is_done, _, _ = select.select([handle], [], [], seconds)
    finally:
        os.close(handle)
    if not is_done:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if status == -signal.SIGKILL else status


def script(name: str, *args: object) -> Callable[[], None]:
    """Runs one of the scripts as `python scripts/NAME ARGS` does."""

    def work() -> None:
        sys.argv = [str(SCRIPTS / name), *map(str, args)]
        runpy.run_path(sys.argv[0], run_name="__main__")

    return work


# ---- training


def _check_training(output: Path, whole: Path | None) -> None:
    """Nothing is half there: neither the model folder nor a checkpoint of a final name."""
    if output.exists():
        assert {p.name for p in output.iterdir()} == set(FILES), f"{output} is half there"
    for path in output.with_name(f"{output.name}.run").glob("0*.safetensors"):
        read_checkpoint(path)
    if whole:
        assert weights(output) == weights(whole), "other weights than an undisturbed run's"
        ours, theirs = ([{k: v for k, v in row.items() if k not in TIMING} for row in log(f)] for f in (output, whole))
        assert ours == theirs, "another log than an undisturbed run's"
        left = [p.name for p in output.parent.iterdir() if p != output]
        assert not left, f"left behind: {left}"


def script_ended(name: str, args: list[object], seconds: float, said: Path) -> int | None:
    """The exit status of one of the scripts, None where it was killed after so many seconds."""
    return end(fork(script(name, *args), said), seconds)


def training(kills: int, seed: int, folder: Path) -> Outcome:
    """Kills of scripts/train.py on digits with all that has a state; it is resumed and killed again until it ends by
    itself, and then compared with an undisturbed run.
    """
    random, done, in_write, runs, failures = Random(f"{seed} training"), 0, 0, 0, []
    whole, said = folder / "whole", folder / "said"
    with client(folder / "home", "http://127.0.0.1:9", "", **ENVIRONMENT) as call:
        call(ready)
        start = time.monotonic()
        assert call(script_ended, "train.py", ["--output", whole, *RICH], LIMIT_S, said) == 0, said.read_text()
        seconds = time.monotonic() - start
        while done < kills:
            runs += 1
            here = folder / f"run{runs}"
            here.mkdir()
            args = ["--output", here / "out", "--resume", "--checkpoint-updates", 1, *RICH]
            try:
                while (status := call(script_ended, "train.py", args, random.uniform(0, 0.7 * seconds), said)) is None:
                    done += 1
                    in_write += bool([*here.glob("out.run/*.partial"), *here.glob("out.run/result")])
                    _check_training(here / "out", None)
                assert status == 0, said.read_text(errors="replace")[-1000:]
                _check_training(here / "out", whole)
            except (AssertionError, CheckpointError) as e:
                failures.append(f"run {runs}: {e}")
                done += 1
            shutil.rmtree(here)
    return Outcome(done, failures, f"{runs} runs to the same bits and log; {in_write} kills while a file was written")


# ---- checkpoints


def _state(step: int) -> dict:
    return dict(step=step, model={name: torch.full((200, 700), step + 0.5) for name in "ab"})


def save_killed(folder: Path, seconds: float) -> bool:
    """A process that saves checkpoint after checkpoint, killed; whether one was being written."""
    reader, writer = os.pipe()

    def work() -> None:
        torch.set_num_threads(1)
        for step in count(1):
            save_checkpoint(folder, step, _state(step))
            os.write(writer, struct.pack("<I", step))

    folder.mkdir()
    pid = fork(work, folder.with_name("said"))
    os.close(writer)
    assert end(pid, seconds) is None, folder.with_name("said").read_text()
    with open(reader, "rb") as pipe:
        saved = len(pipe.read()) // 4
    found = load_latest(folder)
    step = found[1]["step"] if found else 0
    assert step >= saved, f"checkpoint {saved} was saved, {step} is there"
    if found:
        assert all(torch.equal(t, torch.full_like(t, step + 0.5)) for t in found[1]["model"].values())
        assert len(list(folder.glob("*.safetensors"))) <= 3  # the two that are kept, and the new one
    in_write = bool(list(folder.glob("*.partial")))
    shutil.rmtree(folder)
    return in_write


def checkpoints(kills: int, seed: int, folder: Path) -> Outcome:
    """Kills of a process that saves checkpoints without a pause."""
    random, in_write, failures = Random(f"{seed} checkpoints"), 0, []
    with client(folder / "home", "http://127.0.0.1:9", "", **ENVIRONMENT) as call:
        for i in range(kills):
            try:
                in_write += call(save_killed, folder / f"{i}", random.uniform(0, 0.5))
            except (AssertionError, CheckpointError) as e:
                failures.append(f"kill {i}: {e}")
    return Outcome(kills, failures, f"{in_write} kills while a checkpoint was written; the last one saved was there")


# ---- publishing


def _version(folder: Path, number: int) -> dict[str, bytes]:
    """Makes `folder` another version of itself, other weights included; what should be online then."""
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    tensors["fc.bias"] += 0.001
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors))
    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = sha256((folder / WEIGHTS).read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.txt").write_text(f"version {number}\n")
    contents = {name: (folder / name).read_bytes() for name in FILES}
    card = contents["README.md"].replace(f"timm-iebn/{folder.name}".encode(), f"lab/{folder.name}".encode())
    return contents | {"README.md": card}


def publishing(kills: int, seed: int, folder: Path) -> Outcome:
    """Kills of scripts/publish.py: of new repositories, and of new versions, with large and small files."""
    random, failures, changed, said = Random(f"{seed} publishing"), [], 0, folder / "said"
    mine, temporary = folder / TAG, folder / "tmp"
    write_folder(mine)
    temporary.mkdir()
    environment = ENVIRONMENT | dict(TIMM_IEBN_NAMESPACE="lab", TMPDIR=str(temporary))
    with Hub({TOKEN: {"lab"}}) as hub, client(folder / "home", hub.url, TOKEN, **environment) as call:
        name, seconds, new = f"lab/{mine.name}", 0.0, {}
        call(ready)

        def online() -> dict[str, bytes]:
            repo = hub.repos.get(name)
            return {path: data for path, data in repo.files.items() if path != ".gitattributes"} if repo else {}

        def go_on(number: int) -> None:
            status = call(script_ended, "publish.py", [mine, "--tag", f"v{number}"], LIMIT_S, said)
            assert status == 0 and online() == new, f"again: {status}: {said.read_text()[-500:]}"
            assert hub.repos[name].tags[f"v{number}"] == hub.repos[name].commit, "the tag is elsewhere"

        for i in range(kills + 1):
            if i % 5 == 1:  # a repository that is new
                hub.repos.clear()
                hub.blobs.clear()
            old, new = online(), _version(mine, i)
            try:
                if i:  # the first one says how long it takes
                    args = [mine, "--tag", f"v{i}"]
                    killed = call(script_ended, "publish.py", args, random.uniform(0, seconds), said) is None
                    assert online() in (old, new), f"a mixture is online: {sorted(online())}"
                    assert killed or online() == new
                    changed += killed and online() == new
                start = time.monotonic()
                go_on(i)
                seconds = seconds or time.monotonic() - start
            except AssertionError as e:
                failures.append(f"kill {i}: {e}")
    left = len(list(temporary.iterdir()))
    seen = (
        f"{changed} kills after the commit, the others before it; publishing again worked {kills - len(failures)} times"
    )
    return Outcome(kills, failures, f"{seen}; {left} temporary folders of killed processes stayed in TMPDIR")


# ---- downloads


def load_ended(name: str, cache: Path, seconds: float, said: Path) -> int | None:
    """The exit status of a process that loads a network and writes the digest of its weights, None if killed."""

    def work() -> None:
        model = timm.create_model(name, pretrained=True, cache_dir=cache)
        print("digest", sha256(safetensors.torch.save({k: t.contiguous() for k, t in model.state_dict().items()})))

    return end(fork(work, said), seconds)


def downloading(kills: int, seed: int, folder: Path) -> Outcome:
    """Kills of `timm.create_model('hf-hub:...')` while it downloads into an empty cache; then the same again."""
    random, failures, in_file, left, said = Random(f"{seed} downloading"), [], 0, 0, folder / "said"
    source = next(f for f in read_zoo() if "_iebn" in f.name)
    folder.mkdir(exist_ok=True)
    files = {name: (source / name).read_bytes() for name in FILES}
    model = timm.create_model(f"local-dir:{source}", pretrained=True)
    digest = sha256(safetensors.torch.save({k: t.contiguous() for k, t in model.state_dict().items()}))
    with Hub({TOKEN: {"lab"}}) as hub, client(folder / "home", hub.url, TOKEN, **ENVIRONMENT) as call:
        hub.repos["lab/network"] = Repo(files)
        hub.faults.append(Fault("GET /lab/network/resolve/.*safetensors", "trickle"))
        seconds = 0.0
        call(ready)
        for i in range(kills + 1):
            cache = folder / f"cache{i}"
            try:
                if i:
                    killed = call(load_ended, "hf-hub:lab/network", cache, random.uniform(0, seconds), said) is None
                    in_file += bool(list(cache.rglob("*.incomplete")))
                    blobs = [p for p in cache.rglob("blobs/*") if len(p.name) == 64]
                    assert all(sha256(p.read_bytes()) == p.name for p in blobs), "half a file under its final name"
                    assert killed or f"digest {digest}" in said.read_text()
                start = time.monotonic()
                status = call(load_ended, "hf-hub:lab/network", cache, LIMIT_S, said)
                assert status == 0 and f"digest {digest}" in said.read_text(), f"again: {said.read_text()[-500:]}"
                seconds = seconds or time.monotonic() - start
                left += bool(list(cache.rglob("*.incomplete")))
            except AssertionError as e:
                failures.append(f"kill {i}: {e}")
            shutil.rmtree(cache, ignore_errors=True)
    seen = (
        f"{in_file} kills in the middle of a file, after which {left} `.incomplete` files of huggingface_hub stay in "
    )
    seen += f"the cache; loading again gave the right ones {kills - len(failures)} times"
    return Outcome(kills, failures, seen)


# ---- the zoo's texts


def updating_the_zoo(kills: int, seed: int, folder: Path) -> Outcome:
    """Kills of scripts/update_zoo.py with README.md, which holds what people wrote, and zoo/README.md out of line."""
    random, failures, new, said = Random(f"{seed} zoo"), [], 0, folder / "said"
    checkout = folder / "checkout"
    for name in ("zoo", "scripts"):
        shutil.copytree(SCRIPTS.parent / name, checkout / name, ignore=shutil.ignore_patterns("studies", "__pycache__"))
    names = ("README.md", "zoo/README.md")
    shutil.copyfile(SCRIPTS.parent / "README.md", checkout / "README.md")
    with client(folder / "home", "http://127.0.0.1:9", "", **ENVIRONMENT) as call:

        def update(seconds: float) -> int | None:
            return call(script_ended, checkout / "scripts" / "update_zoo.py", [], seconds, said)

        call(ready)
        start = time.monotonic()
        assert update(LIMIT_S) == 0, said.read_text()
        seconds = time.monotonic() - start
        right = {name: (checkout / name).read_text() for name in names}
        stale = {name: text.replace("| resnet20_cifar |", "| resnet |") for name, text in right.items()}
        for i in range(kills):
            for name, text in stale.items():
                (checkout / name).write_text(text)
            try:
                update(random.uniform(0, seconds))
                texts = {name: (checkout / name).read_text() for name in names}
                assert all(texts[name] in (stale[name], right[name]) for name in names), "a text is not whole"
                new += texts == right
                assert update(LIMIT_S) == 0, said.read_text()
                assert all((checkout / name).read_text() == text for name, text in right.items()), "out of line"
                assert not list(checkout.rglob("*.partial")), "a partial file is left"
            except AssertionError as e:
                failures.append(f"kill {i}: {e}")
    return Outcome(kills, failures, f"{new} times all texts were new already; run again, it ended well")
