"""Disks that are full and folders that can't be written to: real ones, mounted in a name space of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

from hub_client import SETTINGS
from hub_server import Hub
from hub_storage import Repo
from training import ENVIRONMENT, RICH, command, run, weights

from timm_iebn.model_folder import FILES
from timm_iebn.training.checkpoint import read_checkpoint

from . import TOKEN, Failures, Outcome
from .readers import TAG, write_folder

# A disk of its own, of $1 kB, at $2, in a name space that ends with the script: the lines on standard input.
MOUNT = 'mount -t tmpfs -o size="$1"k none "$2" && cd "$2" && sh'
DISK = ["unshare", "--mount", "--map-root-user", "sh", "-c", MOUNT, "-"]


def has_disks() -> bool:
    """Whether this machine lets us have a disk of our own."""
    return not subprocess.run([*DISK, "100", "/mnt"], input="true", text=True, capture_output=True).returncode


def on_disk(size_kb: int, place: Path, script: str, **env: str) -> list[tuple[int, str]]:
    """Does the lines of `script` on a disk of that size at `place`; the status of each, and what it printed."""
    place.mkdir(parents=True, exist_ok=True)
    lines = [f"( {line} ) 2>&1; status=$?; echo; echo ::$status" for line in script.strip().splitlines()]
    result = subprocess.run(
        [*DISK, str(size_kb), str(place)],
        input="\n".join(lines),
        env=ENVIRONMENT | env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    said, found = [], []
    for line in result.stdout.splitlines():
        if line.startswith("::"):
            found.append((int(line[2:]), "\n".join(said)))
            said = []
        else:
            said.append(line)
    assert len(found) == len(lines), result.stdout + result.stderr
    return found


def shell(*args: object, script: str = "train.py") -> str:
    """A command line for `on_disk`."""
    return " ".join(f"'{word}'" for word in command(*args, script=script))


def full_disk_in_training(times: int, seed: int, folder: Path) -> Outcome:
    """A disk that is too small by a random amount; then it grows, and the same command goes on."""
    random, failures, ends = Random(f"{seed} full disk"), Failures(), []
    whole = folder / "whole"
    assert run("--output", whole, *RICH, cwd=folder).returncode == 0
    train = shell("--output", "out", "--resume", "--checkpoint-updates", 1, *RICH)
    for i in range(times):
        size, kept = random.choice([*range(4, 400, 4)]), folder / f"kept{i}"
        grow = f"mkdir {kept} && cp -r . {kept}/full\nmount -o remount,size=100m .\n"
        script = f"{train}\n{grow}{train}\ncp -r . {kept}/large"
        (first, said), _, _, (second, again), _ = on_disk(size, folder / "disk", script)
        ends.append("fits" if first == 0 else "full")
        clear = first == 0 or "the disk is full" in said or "No space left" in said
        failures.expect(clear and "Traceback" not in said, f"{size} kB: {said}")
        full, large = kept / "full", kept / "large"
        failures.expect(not (full / "out").exists() or set(os.listdir(full / "out")) == set(FILES), f"{size} kB: half")
        for path in full.glob("out.run/0*.safetensors"):
            read_checkpoint(path)
        failures.expect(second == 0 and weights(large / "out") == weights(whole), f"{size} kB, again: {again}")
        failures.expect(os.listdir(large) == ["out"], f"left behind: {os.listdir(large)}")
    return Outcome(times, failures, f"{ends.count('full')} ended with one line; {times} went on to the same bits")


LOAD = (
    "import sys, timm, timm_iebn; timm.create_model(sys.argv[1], pretrained=True, cache_dir=sys.argv[2]); print('ok')"
)


def bad_disk_for_the_hub(times: int, seed: int, folder: Path) -> Outcome:
    """Downloads into a cache on a full disk, then a read-only one; publishing with TMPDIR on a full disk."""
    random, failures = Random(f"{seed} hub disk"), Failures()
    mine = folder / TAG
    write_folder(mine)
    with Hub({TOKEN: {"lab"}}) as hub:
        hub.repos["lab/network"] = Repo({name: (mine / name).read_bytes() for name in FILES})
        env = SETTINGS | dict(HF_HOME=str(folder / "home"), HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        load = f'{sys.executable} -c "{LOAD}" hf-hub:lab/network cache'
        publish = shell(mine, "--namespace", "lab", script="publish.py")
        for _ in range(times):
            size = random.randrange(40, 1000, 40)
            results = on_disk(
                size,
                folder / "disk",
                f"{load}\nTMPDIR=$PWD {publish}\nmount -o remount,size=100m .\n{load}\nmount -o remount,ro .\n{load}\n"
                f"{load}2\nmount -o remount,rw .\nTMPDIR=$PWD {publish}",
                **env,
            )
            (a, full), (b, unpublished), _, (c, larger), _, (d, kept), (e, read_only), _, (f, published) = results
            failures.expect(a != 0 and _names(full, "lab/network", "No space left"), f"{size} kB: {full}")
            failures.expect(b == 2 and "publish.py: " in unpublished and "Traceback" not in unpublished, unpublished)
            failures.expect(c == 0 and "ok" in larger, f"{size} kB, then larger: {larger}")
            failures.expect(d == 0 and "ok" in kept, f"a cache that can't be written to, with the weights: {kept}")
            failures.expect(e != 0 and _names(read_only, "Read-only"), f"without them: {read_only}")
            failures.expect(f == 0, f"publishing again: {published}")
    return Outcome(4 * times, failures, "each ended with an error that says why; again, with room, all went well")


def _names(said: str, *words: str) -> bool:
    """Whether the last line, where Python prints the error, holds all these."""
    last = [line for line in said.splitlines() if line.strip()][-1]
    return all(word in last for word in words)


def read_only_folders(times: int, seed: int, folder: Path) -> Outcome:
    """Training into a folder that can't be written to, from the start or from its first checkpoint on."""
    failures, kept = Failures(), folder / "kept"
    train = shell("--output", "out", "--resume", "--checkpoint-updates", 1, *RICH)
    cover = "while ! ls out.run/0*1.safetensors; do sleep 0.1; done; mount -t tmpfs -o ro none out.run"
    script = f"""\
mount -o remount,ro .
{train}
mount -o remount,rw .
{train} & {cover}; wait $!; status=$?; umount out.run; exit $status
{train}
cp -r . {kept}"""
    for _ in range(times):
        shutil.rmtree(kept, ignore_errors=True)
        _, (first, said), _, (middle, stopped), (last, again), _ = on_disk(100_000, folder / "disk", script)
        failures.expect(first == 2 and "train.py: output: can't write to out.run" in said, said)
        failures.expect(middle == 1 and "train.py: can't write" in stopped and "Traceback" not in stopped, stopped)
        failures.expect(last == 0 and "going on from" in again and os.listdir(kept) == ["out"], again)
    return Outcome(2 * times, failures, "one line each; then the same command went on to the end")
