"""Bad days: faults that are provoked, and what they leave. `scripts/fault_matrix.py` runs them in numbers, tests a few.

mutate, readers, fuzz: damaged files, and how they are read. kills: processes that are killed at random moments.
disks: full and read-only ones. accidents: two at once, clocks, workers, ranks and data that go wrong.
"""

from dataclasses import dataclass, field

TOKEN = "hf_planted_writer"  # of who may write to the loopback Hub


@dataclass
class Outcome:
    """What was seen of one fault: how often it was provoked, what went against what must hold, and what else to say."""

    times: int
    failures: list[str] = field(default_factory=list)
    seen: str = ""


class Failures(list[str]):
    """What went against what must hold."""

    def expect(self, holds: bool, what: str) -> None:
        """Notes `what` unless it `holds`."""
        if not holds:
            self.append(what[-600:])
