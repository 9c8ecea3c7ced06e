"""Every kind of file that the package reads, damaged and read as a user would, in a process of its own.

A read may end in what the file says, whole, or in an error that is clear. Everything else is a failure.
"""

import resource
import shutil
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from . import readers
from .mutate import damage

LIMIT_S = 60  # for one file, on a machine that has other work too
MEMORY = 2 * 2**30  # more than the process had before
KINDS = (ValueError, RuntimeError, OSError, UserWarning)  # the package's own errors are such, but for PublishError
FAILURES = ("unclear", "wrong", "memory", "crash", "hang")


@dataclass(frozen=True)
class Target:
    """A kind of file, and a way in which it is read."""

    file: str
    reader: str
    make: Callable[[Path], Any]  # fills an empty folder with whole files; what it returns, `read` gets
    read: Callable[[Path, Any], bool]  # reads from the folder; whether the result is right, whole and unchanged
    files: tuple[str, ...]  # of which one is damaged


TARGETS = [
    Target(file, reader, *rest)
    for file, reader, *rest in (
        (
            "model.safetensors",
            "timm.create_model('local-dir:...', pretrained=True)",
            readers.make_model_folder,
            readers.load_with_timm,
            ("model.safetensors",),
        ),
        (
            "model.safetensors",
            "timm.create_model('local-dir:...', pretrained=True), where config.json lacks its sha256",
            readers.make_timm_folder,
            readers.load_what_is_said,
            ("model.safetensors",),
        ),
        (
            "config.json",
            "timm.create_model('local-dir:...', pretrained=True)",
            readers.make_model_folder,
            readers.load_with_timm,
            ("config.json",),
        ),
        (
            "config.json",
            "as scripts/validate.py does",
            readers.make_model_folder,
            readers.load_to_validate,
            ("config.json",),
        ),
        (
            "recipe.yaml",
            "load_recipe",
            readers.make_model_folder,
            readers.read_recipe,
            ("recipe.yaml",),
        ),
        (
            "log.csv",
            "read_log, and train.py --resume on a finished run",
            readers.make_model_folder,
            readers.read_finished_log,
            ("log.csv",),
        ),
    )
]
OTHERS = [
    Target(
        "any file of a model folder",
        "as scripts/publish.py checks it",
        readers.make_published,
        readers.check_to_publish,
        readers.PUBLISHED,
    ),
    Target(
        "config.json, recipe.yaml, cost.csv",
        "read_zoo, list_zoo and the zoo's tables",
        readers.make_zoo,
        readers.read_zoo,
        readers.ZOO_FILES,
    ),
    Target("study.yaml, log.csv", "load_study, report", readers.make_study, readers.read_study, readers.STUDY_FILES),
    Target(
        "a checkpoint",
        "load_latest, where the one before is whole",
        readers.make_checkpoints,
        readers.resume_latest,
        ("000000002.safetensors",),
    ),
    Target(
        "a checkpoint of other content",
        "train.py --resume, its checksum being right",
        readers.make_run,
        readers.resume_run,
        ("tree.json",),
    ),
    Target(
        "authors' .pth.tar", "load_authors_checkpoint", readers.make_authors, readers.load_authors, ("model.pth.tar",)
    ),
    Target("an image", "read_image", readers.make_images, readers.read_images, ("train/ant/0.png", "train/ant/1.jpg")),
]


def is_clear(error: BaseException, folder: Path) -> bool:
    """Whether an error is one that a user can act on: a ValueError, RuntimeError or OSError, as the package's own are,
    or a PublishError; its message names the file or its folder, is no longer than 2000 characters, and is no traceback.
    """
    text = str(error)
    is_kind = isinstance(error, KINDS) or type(error).__name__ == "PublishError"
    return is_kind and str(folder) in text and len(text) <= 2000 and "Traceback" not in text


def judge(target: Target, folder: Path, context: Any) -> tuple[str, str]:
    """The outcome of reading what is in `folder`, and what there is to say about it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            is_right = target.read(folder, context)
    except BaseException as e:
        text = f"{type(e).__name__}: {e}"[:1000]
        if isinstance(e, MemoryError) or "can't allocate memory" in text or "bad allocation" in text:
            return "memory", text
        if is_clear(e, folder):
            return "clear", text
        frames = traceback.extract_tb(e.__traceback__)
        files = " ".join(frame.filename for frame in frames)
        if "/timm/models/" in files and "/timm_iebn/" not in files:
            return "not ours", text  # raised by timm before it calls the package
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-4:]))
        return "unclear", f"{text} ({where})"
    return ("right" if is_right else "wrong"), ""


def damaged_copies(target: Target, folder: Path, seed: int, indices: list[int]) -> Iterator[tuple[int, str, bytes]]:
    """For each index the name and content of a damaged file: a function of target, seed and index alone."""
    for index in indices:
        random = Random(f"{seed} {target.file} {target.reader} {index}")
        name = random.choice(target.files)
        yield index, name, damage(name, (folder / name).read_bytes(), random)


def work(sender: Connection, jobs: list[tuple[int, list[int]]], seed: int, folder: Path) -> None:
    """Reads damaged files of targets, and sends outcome after outcome."""
    for number, indices in jobs:
        target, whole, copy = [*TARGETS, *OTHERS][number], folder / f"whole{number}", folder / f"copy{number}"
        for place in (whole, copy):
            shutil.rmtree(place, ignore_errors=True)
        whole.mkdir(parents=True)
        context = target.make(whole)
        shutil.copytree(whole, copy)
        outcome = judge(target, copy, context)
        assert outcome == ("right", ""), (target, outcome)
        now = 1024 * int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        for index, name, data in damaged_copies(target, whole, seed, indices):
            sender.send((number, index, "begun", ""))
            (copy / name).write_bytes(data)
            sender.send((number, index, *judge(target, copy, context)))
            shutil.rmtree(copy)  # readers may have changed it
            shutil.copytree(whole, copy)


def fuzz(counts: dict[int, int], seed: int, folder: Path) -> dict[int, tuple[Counter[str], list[str]]]:
    """Damages `counts[n]` files of target n; returns how they ended, and an example or more of each bad ending."""
    todo = deque((n, i) for n, count in counts.items() for i in range(count))
    found: dict[int, tuple[Counter[str], list[str]]] = {n: (Counter(), []) for n in counts}

    def note(number: int, index: int, outcome: str, text: str) -> None:
        outcomes, examples = found[number]
        outcomes[outcome] += 1
        if outcome in (*FAILURES, "not ours"):
            examples.append(f"{outcome}, mutation {index}: {text}")

    while todo:
        jobs = [(n, [i for m, i in todo if m == n]) for n in dict.fromkeys(n for n, _ in todo)]
        receiver, sender = get_context("spawn").Pipe(duplex=False)
        process = get_context("spawn").Process(target=work, args=(sender, jobs, seed, folder))
        process.start()
        sender.close()
        begun, how = None, "hang"
        try:
            while todo and receiver.poll(LIMIT_S if begun else 300):
                *at, outcome, text = receiver.recv()
                begun = tuple(at) if outcome == "begun" else None
                if not begun:
                    note(*todo.popleft(), outcome, text)
        except EOFError:
            how = "crash"
        process.kill()
        process.join()
        if todo:
            if begun is None:
                raise RuntimeError(f"reading whole files ended in a {how}, before {todo[0]}: {process.exitcode}")
            note(*todo.popleft(), how, f"exit status {process.exitcode}")
    return found
