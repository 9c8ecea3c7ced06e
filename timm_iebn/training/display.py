"""What a run shows of itself: a bar that moves, and a line for each epoch."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """The bar, within `with display.progress:`, and the lines above it; nothing at all unless `is_on`."""

    def __init__(self, epochs: int, batches: int, place: tuple[int, int], is_on: bool) -> None:
        """For `epochs` of `batches` each, from `place` on: epoch and batch, from 0 on."""
        self.epochs, self.batches = epochs, batches
        self.console = Console(quiet=not is_on)
        title, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
        columns = title, BarColumn(), note, TimeRemainingColumn()
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not is_on)
        done = place[0] * batches + place[1]
        self.task = self.progress.add_task("starting", total=epochs * batches, completed=done, note="")

    def show(self, epoch: int, step: int, loss: float, top1: float, speed: float) -> None:
        """Moves the bar to the end of batch `step` of `epoch` (both from 0 on), with the epoch's means so far."""
        note = f"loss {loss:.3f}  top-1 {top1:.1f} %  {speed:.0f} images/s"
        title = f"epoch {epoch + 1}/{self.epochs}"
        self.progress.update(self.task, description=title, completed=epoch * self.batches + step, note=note)

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def report(self, row: dict[str, Any]) -> None:
        """The line of an epoch, from its row of the log."""
        self.say(
            f"epoch {row['epoch']:>3}/{self.epochs}  lr {row['lr']:.4f}"
            f"  train loss {row['train_loss']:.3f}  top-1 {row['train_top1']:.2f} %"
            f"  test loss {row['test_loss']:.4f}  top-1 {row['test_top1']:.2f} %"
            f"  {row['images_per_second']:.0f} images/s  {row['seconds']:.0f} s"
        )
