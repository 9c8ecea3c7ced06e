"""Bad days, a few times each: scripts/fault_matrix.py provokes the same faults in numbers (docs/fault_matrix.md)."""

import random
from pathlib import Path

import pytest
from faults import disks
from faults.fuzz import FAILURES, OTHERS, TARGETS, Target, fuzz, judge
from faults.matrix import FAULTS


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f for f in FAULTS if f.provoke and f.tested], ids=lambda f: f.name)
def test_a_bad_day_leaves_nothing_half_done(fault, tmp_path):
    if fault.part == "disks" and not disks.has_disks():
        pytest.skip("no disk of our own can be mounted here")
    outcome = fault.provoke(fault.tested, random.randrange(10**6), tmp_path)
    assert outcome.times >= fault.tested and not outcome.failures, outcome


@pytest.mark.slow
def test_damaged_files_are_read_whole_or_end_in_a_clear_error(tmp_path):
    targets = [*TARGETS, *OTHERS]
    found = fuzz(dict.fromkeys(range(len(targets)), 15), random.randrange(10**6), tmp_path)
    for number, (outcomes, examples) in found.items():
        assert sum(outcomes.values()) == 15, targets[number]
        assert not [example for example in examples if example.startswith(FAILURES)], (targets[number], examples)


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.tests], ids=lambda f: f.name)
def test_the_tests_that_a_fault_names_are_there(fault):
    file, _, prefix = fault.tests.partition(":")
    assert f"\ndef {prefix}" in Path(__file__).with_name(file).read_text()


def _fail(error):
    raise error


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda folder, _: True, "right"),
        (lambda folder, _: False, "wrong"),
        (lambda folder, _: _fail(ValueError(f"{folder}/a is damaged")), "clear"),
        (lambda folder, _: _fail(KeyError(f"{folder}/a")), "unclear"),
        (lambda folder, _: _fail(ValueError("a is damaged")), "unclear"),
        (lambda folder, _: _fail(ValueError(f"{folder}/a" + "x" * 3000)), "unclear"),
        (lambda folder, _: _fail(MemoryError()), "memory"),
    ],
)
def test_an_outcome_is_judged_by_what_a_user_sees(read, outcome, tmp_path):
    assert judge(Target("a", "", None, read, ("a",)), tmp_path, None)[0] == outcome
