"""All faults in a table: what is provoked and how, what must hold, and the function or the tests that do it."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from . import Outcome, accidents, disks, kills
from .fuzz import OTHERS, TARGETS, fuzz

ROOT = Path(__file__).parents[2]
NAMED = 4  # kinds of files whose mutations count: model.safetensors, config.json, recipe.yaml, log.csv
READ_RIGHT = "A clear error, or what the file says, all of it: no crash, no hang, no half-loaded network, within 2 GB"


@dataclass(frozen=True)
class Fault:
    """A row of the table. `provoke(times, seed, folder)` gives what was seen; for tests, they are run."""

    part: str
    name: str
    how: str  # as the test does, where it is empty
    must: str
    provoke: Callable[[int, int, Path], Outcome] | None = None
    tests: str = ""  # a file of tests/, a colon, and what their names begin with
    share: float = 1  # of the number of kills or mutations that is asked for; or, where `times`, that many
    times: int = 0
    tested: int = 1  # how often tests/test_faults.py provokes it, in which mutations have a test of their own


def _fuzzed(number: int, times: int, seed: int, folder: Path) -> Outcome:
    outcomes, examples = fuzz({number: times}, seed, folder)[number]
    words = dict(right="read as they are", clear="clear errors")
    words |= {"not ours": "errors of timm's own, before it calls this package, that do not name the file (none loaded)"}
    seen = ", ".join(f"{outcomes[key]} {word}" for key, word in words.items() if outcomes[key])
    return Outcome(times, examples, seen)


def _fuzz_rows() -> list[Fault]:
    rows = []
    for number, target in enumerate([*TARGETS, *OTHERS]):
        # kinds of files have equal parts, and so have the ways to read one
        share = 1 / NAMED / sum(t.file == target.file for t in TARGETS) if target in TARGETS else 0.03
        if target.file == "a checkpoint of other content":
            share = 0.02  # each starts a trainer
        how = f"damaged, then {target.reader}"
        rows.append(Fault("fuzz", target.file, how, READ_RIGHT, partial(_fuzzed, number), share=share, tested=0))
    return rows


ONE_LINE = "One line that says why, and no traceback; nothing half-written; the same command goes on"
FAULTS = [
    Fault(
        "kills",
        "Training is killed",
        "SIGKILL at random moments of train.py (ResNet-20 with IEBN, cut to 8 layers; digits; a checkpoint after every "
        "update; EMA, mixup, AdamW, attacks), resumed and killed until it ends",
        "Weights and log are those of an undisturbed run, to the bit; nothing is left behind",
        kills.training,
        tested=3,
    ),
    Fault(
        "kills",
        "Checkpointing is killed",
        "SIGKILL at random moments of a process that saves checkpoints without a pause",
        "What was saved last is there, whole",
        kills.checkpoints,
        tested=5,
    ),
    Fault(
        "kills",
        "Publishing is killed",
        "SIGKILL at random moments of publish.py, of new repositories and of new versions; then again",
        "Online is the old commit or the new one, whole; publishing again ends well, with its tag",
        kills.publishing,
        tested=2,
    ),
    Fault(
        "kills",
        "Downloading is killed",
        "SIGKILL at random moments of `timm.create_model('hf-hub:...')` with an empty cache; then again",
        "No half file under its final name; loading again gives the right weights",
        kills.downloading,
        tested=2,
    ),
    Fault(
        "kills",
        "update_zoo.py is killed",
        "SIGKILL at random moments, with README.md to be written; then again",
        "README.md is the old or the new one, whole; again, it is the new one, and nothing else is left",
        kills.updating_the_zoo,
        share=0.25,
        tested=0,  # for the time that it takes
    ),
    *_fuzz_rows(),
    Fault(
        "disks",
        "The disk is full in training",
        "a tmpfs of 4 to 396 kB, a random size each time; then it grows",
        ONE_LINE + ", to the same bits",
        disks.full_disk_in_training,
        times=3,
        tested=0,
    ),
    Fault(
        "disks",
        "The disk is full or read-only for the Hub's cache or TMPDIR",
        "a tmpfs of random size, then read-only, for the cache of a download and the comparison after publishing",
        "An error that says why; with room, all goes well",
        disks.bad_disk_for_the_hub,
        times=1,
        tested=0,
    ),
    Fault(
        "disks",
        "The folder is read-only in training",
        "a read-only tmpfs, from the start, or from the first checkpoint on",
        ONE_LINE,
        disks.read_only_folders,
        times=1,
    ),
    Fault("disks", "The disk is full for a checkpoint", "", ONE_LINE, tests="test_checkpoint.py:test_a_full_disk"),
    Fault("disks", "A file can't grow", "", "It is as before", tests="test_files.py:test_a_file_that_can_not"),
    Fault("disks", "The disk is full for the model folder", "", ONE_LINE, tests="test_resume.py:test_a_full_disk"),
    Fault(
        "accidents",
        "Two trainers in one folder",
        "",
        "The second one ends with a message, the first goes on",
        tests="test_resume.py:test_two_trainers",
    ),
    Fault(
        "accidents",
        "Two publish one folder at once",
        "two processes of publish.py",
        "One commit, whole; each ends well or says in a line to run again",
        accidents.two_publish_at_once,
        times=3,
        tested=0,
    ),
    Fault(
        "accidents",
        "Two update the zoo at once",
        "two processes of update_zoo.py",
        "All texts are whole",
        accidents.two_update_the_zoo_at_once,
        times=2,
        tested=0,
    ),
    Fault(
        "accidents",
        "Others publish meanwhile",
        "",
        "What they put online stays",
        tests="test_publish.py:test_somebody_elses",
    ),
    Fault(
        "accidents",
        "The clock jumps",
        "a preloaded library moves the wall clock by years from call to call; checkpoints' file times are reversed",
        "The same bits; the newest checkpoint is taken",
        accidents.clock_that_jumps,
        times=2,
        tested=0,
    ),
    Fault(
        "accidents",
        "A loader's worker dies",
        "SIGKILL to a process that loads images",
        ONE_LINE,
        accidents.worker_that_dies,
        times=12,
    ),
    Fault(
        "accidents",
        "One rank of two dies",
        "SIGKILL to a process of torchrun, the first or the second one",
        "The run stops with a message within 60 s; the same command goes on",
        accidents.rank_that_dies,
        times=2,
    ),
    Fault(
        "accidents",
        "Images are NaN",
        "float32 TIFF files of NaN and infinity among others",
        "Loss and weights are finite",
        accidents.images_that_are_nan,
        times=6,
        tested=3,
    ),
    Fault(
        "accidents",
        "A batch is NaN in one process of two",
        "",
        "All end, and name the batch",
        tests="test_resume.py:test_a_loss_that_bursts",
    ),
    Fault(
        "accidents",
        "Other class counts than the head's",
        "a network of 10 classes, data of 2",
        "Refused by name, or a new head where that is asked for",
        accidents.other_class_counts,
        times=1,
    ),
    Fault(
        "accidents",
        "Other class names than the network's",
        "",
        "Refused by name",
        tests="test_train.py:test_validate_takes_either",
    ),
    Fault(
        "accidents",
        "A damaged image, met late",
        "",
        "It is named; the last checkpoint too",
        tests="test_train.py:test_an_image_that_is_damaged",
    ),
    Fault(
        "accidents",
        "Trouble with the Hub at any request",
        "",
        "Nothing half-done; again, it goes on",
        tests="test_publish.py:test_an_interruption",
    ),
]


def run_tests(name: str) -> Outcome:
    """What pytest says of the tests that `name` stands for."""
    file, _, prefix = name.partition(":")
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "1",
            f"tests/{file}",
            "-k",
            prefix,
            f"--junitxml={report}",
        ]
        subprocess.run(command, cwd=ROOT, capture_output=True, timeout=1800)
        cases = [*ElementTree.parse(report).iter("testcase")]
    bad = [case.get("name") for case in cases if len(case) and case[0].tag in ("failure", "error")]
    skipped = sum(len(case) and case[0].tag == "skipped" for case in cases)
    if not cases or skipped == len(cases):
        return Outcome(0, [f"no test was run of tests/{name}"])
    return Outcome(len(cases), bad, f"tests/{file}, `{prefix}...`: {len(cases) - len(bad) - skipped} tests pass")
