"""The training loop: a recipe in, a model folder out; stopped at any moment, it goes on from its last checkpoint."""

import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, set_seed
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from ..environment import environment
from ..files import WriteError, write_atomically
from ..messages import describe, shorten
from ..model_folder import save_model_folder
from ..recipe import Recipe, RecipeError
from ..run_log import log_text
from .attacks import noise_in_eval
from .batch_noise import batch_noise
from .bfloat16 import computed_in_float32, has_slow_bfloat16
from .checkpoint import CheckpointError, checkpoint_path, load_latest, save_checkpoint
from .display import Display
from .evaluate import evaluate
from .loaders import is_worker_death, seed_everything
from .processes import StopRequest, create_training_accelerator, on_main, start_trackers
from .run_folder import check_output, clean_up, finished_row, folder_lock, open_folder, work_folder
from .workload import Workload

_REMEDY = "Lower lr, add warmup_epochs or clip_grad, or use precision: no, in a run of its own."


class TrainingError(RuntimeError):
    """A run that can't go on; the message says why, where, and what is left."""


class Stopped(Exception):
    """A signal asked the run to stop; it has left a checkpoint."""

    def __init__(self, signum: int, output: Path, checkpoint: Path) -> None:
        name, again = signal.Signals(signum).name, f"the same command with --output {output} --resume"
        super().__init__(f"stopped by {name}; {again} goes on from {checkpoint}")
        self.signum = signum


class Trainer:
    """One run of a recipe on whatever `accelerate` was launched on.

    It works in `output` + '.run' (recipe, log, checkpoints, trackers' files) and writes `output` when it is done.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        resume: bool = False,
        data_dir: str = "",
        mix_data_dir: str = "",
        workers: int = 0,
        checkpoint_updates: int = 0,
        trackers: Sequence[str] = (),
    ) -> None:
        self.recipe, self.output = recipe, output
        self.folder = work_folder(output)
        self.checkpoint_updates = checkpoint_updates
        self.accelerator = create_training_accelerator(recipe, self.folder, trackers)
        on_main(lambda: check_output(recipe, output, resume))
        set_seed(recipe.seed)
        self.workload = Workload(recipe, self.accelerator, data_dir, mix_data_dir, workers)
        self.epoch, self.step = 0, 0  # the next batch
        self.rows: list[dict[str, Any]] = []
        self.environments = [environment(self.accelerator.device)]  # that a stopped run went on in, too
        self.sums = self._zeros()
        self.rates: dict[int, float] = {}  # of the epoch's batches
        self.last_checkpoint: Path | None = None
        self.request = StopRequest()
        self.lock = folder_lock(output)
        try:
            on_main(lambda: open_folder(recipe, output, resume, self.lock))
            start_trackers(self.accelerator, recipe, output, self.folder)
            if resume:
                self._resume()
            self.display = self._announce()
        except BaseException:
            self.lock.release()
            raise

    def _announce(self) -> Display:
        recipe, accelerator, batches = self.recipe, self.accelerator, len(self.workload.train_loader)
        display = Display(recipe.epochs, batches, (self.epoch, self.step), accelerator.is_main_process)
        where = f"{accelerator.num_processes} x {accelerator.device.type}, {torch.get_num_threads()} threads"
        display.say(f"{recipe.model} on {recipe.data}, {where}: {recipe.epochs} x {batches} batches, to {self.output}")
        if self.last_checkpoint:
            display.say(f"going on from {self.last_checkpoint}, epoch {self.epoch + 1}, batch {self.step}")
        if recipe.compile and has_slow_bfloat16(recipe, accelerator.device):
            display.say("without AVX-512, bf16 in compiled networks is many times as slow: use compile=false")
        return display

    def _zeros(self) -> Tensor:
        """Sums over an epoch: loss, correct, images, and the first batch whose loss was not finite."""
        return torch.tensor([0.0, 0.0, 0.0, math.inf], dtype=torch.float64, device=self.accelerator.device)

    @property
    def updates(self) -> int:
        """Updates made so far."""
        return self.epoch * self.workload.updates_per_epoch + self.step // self.recipe.grad_accumulation

    # ---- checkpoints

    def _save(self) -> None:
        self._check_finite()
        if not all(t.isfinite().all() for t in self.workload.net.state_dict().values() if t.is_floating_point()):
            raise TrainingError(
                f"weights are not finite at epoch {self.epoch + 1}, batch {self.step}; {self._left()}. {_REMEDY}"
            )
        # the sums of all processes; each keeps its own, so that they are added once
        sums = self.accelerator.reduce(self.sums[:3].clone())
        if not self.accelerator.is_main_process:
            self.last_checkpoint = checkpoint_path(self.folder, self.updates)
            return
        place = dict(epoch=self.epoch, step=self.step, rows=self.rows, sums=sums)
        state = place | dict(data=self.workload.data, environments=self.environments) | self.workload.state_dict()
        self.last_checkpoint = save_checkpoint(self.folder, self.updates, state)

    def _resume(self) -> None:
        found = on_main(lambda: load_latest(self.folder))
        if found is None:
            return
        self.last_checkpoint, state = found
        try:
            self._take_up(state)
        except RecipeError:
            raise
        except Exception as e:  # of a checkpoint of another version, say
            raise CheckpointError(f"can't go on from {self.last_checkpoint}: {describe(e)}") from e

    def _take_up(self, state: dict[str, Any]) -> None:
        for option, seen in state["data"].items():
            if seen != self.workload.data[option]:
                raise RecipeError(f"{self.last_checkpoint} was trained on other images than these, see {option}")
        self.epoch, self.step, self.rows = state["epoch"], state["step"], state["rows"]
        self.environments = [*dict.fromkeys(state["environments"] + self.environments)]
        if self.accelerator.is_main_process:
            self.sums[:3] = state["sums"].to(self.sums)
        self.workload.load_state_dict(state)

    def _check_finite(self) -> None:
        """Of all processes, which must call it together."""
        bad = self.accelerator.gather(self.sums[3:]).min().item()
        if math.isfinite(bad):
            raise TrainingError(
                f"the loss is not finite at epoch {self.epoch + 1}, batch {int(bad) + 1}, "
                f"learning rate {self.rates[int(bad)]:.6g}; {self._left()}. {_REMEDY}"
            )

    def _left(self) -> str:
        return f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "no checkpoint yet"

    # ---- stopping

    def _is_stopped(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.request.signum != 0
        # by all processes after the same batch; asking waits for the device, so there not after each
        every = 16 if self.accelerator.device.type == "cuda" else 1
        if self.step % every >= self.recipe.grad_accumulation:
            return False
        self._check_finite()
        if self.request.signum:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _stop(self) -> None:
        self.accelerator.wait_for_everyone()  # a launcher ends all processes when the first one ends
        raise Stopped(self.request.signum or signal.SIGTERM, self.output, self.last_checkpoint)

    # ---- the loop

    def train_epoch(self) -> float:
        """Trains from the current batch to the end of the epoch; returns the learning rate of its last update."""
        recipe, accelerator = self.recipe, self.accelerator
        self.workload.model.train()
        total = len(self.workload.train_loader)
        started, first, shown = time.perf_counter(), self.step, 0.0
        for images, labels in self.workload.train_loader.epoch(self.epoch, self.step):
            # dropout, drop path and mixup are functions of the place in the run, so nothing of them is to be saved
            seed_everything(recipe.seed, self.epoch, self.step, accelerator.process_index, 1)
            images, targets = self.workload.mixup(images, labels) if self.workload.mixup else (images, labels)
            smoothing = 0.0 if self.workload.mixup else recipe.label_smoothing
            if self.workload.strangers:
                images = self.workload.strangers.join(images, self.epoch, self.step)
            with accelerator.accumulate(self.workload.model):
                with accelerator.autocast():
                    logits = self.workload.model(images)[: len(labels)]
                    loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
                accelerator.backward(loss)
                if recipe.clip_grad and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.workload.model.parameters(), recipe.clip_grad)
                self.workload.optimizer.step()
                self.workload.optimizer.zero_grad()
            with torch.no_grad():
                loss = loss.detach().double()
                correct = (logits.argmax(1) == labels).sum()
                self.sums[:3] += torch.stack([loss * len(labels), correct, torch.ones_like(labels).sum()])
                bad = torch.where(loss.isfinite(), math.inf, float(self.step))
                self.sums[3] = torch.minimum(self.sums[3], bad)
            lr = self.rates[self.step] = self.workload.optimizer.param_groups[0]["lr"]
            self.step += 1
            if accelerator.sync_gradients:
                self.workload.scheduler.step_update(self.updates)
                if self.workload.ema:
                    self.workload.ema.update(self.workload.net, step=self.updates)
                if self.step < total:
                    is_due = self.checkpoint_updates and self.updates % self.checkpoint_updates == 0
                    is_stopped = self._is_stopped()
                    if is_due or is_stopped:
                        self._save()
                    if is_stopped:
                        self._stop()
            if time.perf_counter() - shown > 0.5 or self.step == total:  # reading the sums waits for the device
                shown = time.perf_counter()
                if accelerator.num_processes == 1:
                    self._check_finite()
                loss_sum, correct, seen, _ = self.sums.tolist()
                speed = (self.step - first) * self.workload.train_loader.batch_size / (shown - started)
                self.display.show(self.epoch, self.step, loss_sum / seen, 100 * correct / seen, speed)
        return lr

    def fit(self) -> dict[str, Any]:
        """Trains to the end and writes the model folder; returns the last epoch's row, whose accuracy is the result."""
        recipe, accelerator = self.recipe, self.accelerator
        with self.request, computed_in_float32(not recipe.compile and has_slow_bfloat16(recipe, accelerator.device)):
            try:
                with self.display.progress:
                    self._run_epochs()
                if accelerator.is_main_process:
                    self._finish()
            except (RecipeError, WriteError) as e:  # an image that can't be read, met late; a log that can't be written
                raise TrainingError(f"{e}; {self._left()}") from e
            except RuntimeError as e:
                if not is_worker_death(e):
                    raise
                raise TrainingError(f"a worker that loads images has died ({shorten(e)}); {self._left()}") from e
            finally:
                self.workload.release()
            accelerator.end_training()
        return self.rows[-1]

    def _run_epochs(self) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        while self.epoch < recipe.epochs:
            started, first = time.perf_counter(), self.step
            self.workload.scheduler.step_update(self.updates)
            lr = self.train_epoch()
            seconds = time.perf_counter() - started
            loss_sum, correct, seen = accelerator.reduce(self.sums[:3].clone()).tolist()
            images = (self.step - first) * self.workload.train_loader.batch_size
            row = dict(epoch=self.epoch + 1, updates=self.updates, lr=lr)
            row |= dict(train_loss=loss_sum / seen, train_top1=100 * correct / seen)
            self._share_statistics()
            row |= evaluate(self.workload.result, self.workload.test_loader, accelerator)
            if recipe.has_noise:
                with noise_in_eval(self.workload.result):
                    noisy = evaluate(self.workload.result, self.workload.test_loader, accelerator)
                row["test_top1_with_noise"] = noisy["test_top1"]
            if self.workload.noise_images:
                row |= batch_noise(
                    self.workload.net, *self.workload.noise_images, batch_size=self.workload.train_loader.batch_size
                )
            row |= dict(images_per_second=images / seconds, seconds=time.perf_counter() - started)
            self._check_finite()
            if not math.isfinite(row["test_loss"]):
                raise TrainingError(
                    f"the test loss is not finite after epoch {self.epoch + 1}, learning rate {lr:.6g}; "
                    f"{self._left()}. {_REMEDY}"
                )
            self.rows.append(row)
            self.epoch, self.step, self.sums = self.epoch + 1, 0, self._zeros()
            self._report(row)
            self._save()
            if self.epoch < recipe.epochs and self._is_stopped():
                self._stop()

    def _share_statistics(self) -> None:
        """Gives all processes the main one's running statistics, where norms are not synchronised."""
        if self.accelerator.num_processes > 1 and not self.recipe.sync_norms:
            for buffer in self.workload.result.buffers():
                buffer.copy_(broadcast(buffer.clone()))

    def _report(self, row: dict[str, Any]) -> None:
        self.accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=row["epoch"])
        if not self.accelerator.is_main_process:
            return
        write_atomically(self.folder / "log.csv", log_text(self.rows).encode())
        self.display.report(row)

    def _finish(self) -> None:
        work = self.folder / "result" / self.output.name  # which the card in it takes for its name
        try:
            made = self.recipe, self.rows, self.workload.classes, self.workload.data_config, self.environments
            save_model_folder(self.workload.result, self.output, work, *made)
        except (OSError, SafetensorError, ValueError) as e:
            raise CheckpointError(
                f"can't write {self.output}: {e}; the run is done, {self.last_checkpoint} is whole: --resume writes it"
            ) from e
        clean_up(self.folder)


def train(
    recipe: Recipe,
    output: str | Path,
    resume: bool = False,
    data_dir: str = "",
    mix_data_dir: str = "",
    workers: int = 0,
    checkpoint_updates: int = 500,
    trackers: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains as `recipe` says and writes the model folder `output`; returns the row of the last epoch, the result.

    Args:
        recipe: everything that decides the result.
        output: the folder to write, the main process's; must not exist, unless `resume`.
        resume: go on with an unfinished run, if there is one; return the result of a finished one.
        data_dir: where the data is on this machine; see `data.open_split`.
        mix_data_dir: the same for the recipe's `mix_data`.
        workers: processes that load images, where the recipe's loader is timm's.
        checkpoint_updates: a checkpoint after so many updates, beside that after each epoch; 0 for none.
        trackers: of `TRACKERS`, through accelerate.

    Raises:
        RecipeError: something is impossible; before the first step, and nothing is written.
        TrainingError: the loss is not finite, an image can't be read, or the log can't be written.
        CheckpointError: a checkpoint can't be written, or none can be read.
        Stopped: SIGTERM or Ctrl-C; a checkpoint is written.
    """
    output = Path(output)
    if resume and (row := on_main(lambda: finished_row(recipe, output))):
        return row
    if workers < 0 or checkpoint_updates < 0:
        raise RecipeError(f"workers and checkpoint_updates must not be negative, got {workers}, {checkpoint_updates}")
    trainer = Trainer(recipe, output, resume, data_dir, mix_data_dir, workers, checkpoint_updates, trackers)
    try:
        return trainer.fit()
    finally:
        trainer.lock.release()
