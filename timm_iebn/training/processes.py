"""The processes of a run: what they run on, who decides for all, and who asks them to stop."""

import hashlib
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, TorchDynamoPlugin, broadcast_object_list, parse_flag_from_env

from ..recipe import Recipe, RecipeError
from ..versions import check_versions

TRACKERS = ("tensorboard", "wandb")

_SPREAD = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}


def create_accelerator(**kwargs: Any) -> Accelerator:
    """`Accelerator(**kwargs)` on plain processes, on CPU or CUDA.

    Raises:
        RecipeError: accelerate sees another kind of device or spread, or does not see the processes that were launched.
        ImportError: something that training needs is of a version that it does not work with.
    """
    check_versions("train")
    try:
        accelerator = Accelerator(**kwargs)
    except ValueError as e:  # another run of this process has set what can't be changed
        raise RecipeError(f"accelerate: {e}") from e
    launched, kind = int(os.environ.get("WORLD_SIZE", 1)), accelerator.distributed_type
    if launched != accelerator.num_processes:
        raise RecipeError(f"accelerate: {launched} processes were launched for one: set ACCELERATE_USE_CPU=true")
    if kind not in _SPREAD or accelerator.device.type not in ("cpu", "cuda"):  # sums need float64, which MPS lacks
        raise RecipeError(
            f"accelerate: {kind.value} on {accelerator.device.type} is not supported: use plain processes on CUDA, or "
            "on CPU with ACCELERATE_USE_CPU=true"
        )
    return accelerator


def create_training_accelerator(recipe: Recipe, project_dir: Path, trackers: Sequence[str] = ()) -> Accelerator:
    """The accelerator that trains `recipe`, and whose trackers write into `project_dir`.

    Raises:
        RecipeError: as `create_accelerator`; a tracker is not installed, the environment contradicts the recipe, or the
            device lacks its precision.
    """
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise RecipeError(f"track: {tracker!r} is not installed: pip install {tracker}")
    accelerator = create_accelerator(
        mixed_precision=recipe.precision,
        gradient_accumulation_steps=recipe.grad_accumulation,
        log_with=list(trackers) or None,
        project_dir=project_dir,
    )
    # given to its constructor, that of a process's first run would hold for all
    compiler = TorchDynamoPlugin("inductor" if recipe.compile else "no", mode=recipe.compile_mode)
    accelerator.state.dynamo_plugin = compiler
    if (parts := accelerator.gradient_accumulation_steps) != recipe.grad_accumulation:
        raise RecipeError(f"grad_accumulation: the environment of accelerate says {parts}; the recipe must decide")
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise RecipeError("precision: 'fp16' needs a GPU: use bf16 or no")
    return accelerator


def start_trackers(accelerator: Accelerator, recipe: Recipe, output: Path, project_dir: Path) -> None:
    """Starts those that the accelerator has; a run that goes on is the same one to them."""
    config = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in asdict(recipe).items()}
    run_id = hashlib.sha256(f"{output.resolve()}\n{recipe.to_yaml()}".encode()).hexdigest()[:16]
    wandb = dict(dir=str(project_dir), name=output.name, id=run_id, resume="allow")
    accelerator.init_trackers("timm-iebn", config, dict(wandb=wandb))


def on_main(work: Callable[[], Any]) -> Any:
    """What `work` returns or raises in the main process, in all: other machines may see other folders."""
    # PartialState itself does not look at what `accelerate launch --cpu` says
    state, result = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")), None
    if state.is_main_process:
        try:
            result = work()
        except Exception as e:  # whatever it is, the others wait for it
            result = e
    if state.num_processes > 1:
        (result,) = broadcast_object_list([result])
    if isinstance(result, Exception):
        raise result
    return result


def end_group() -> None:
    """Ends the process group, if there is one: threads of one that is still there may abort the interpreter's end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class StopRequest:
    """SIGTERM or Ctrl-C while it is entered: `signum`, 0 without. Another one, 5 s later or more, ends the process."""

    def __init__(self) -> None:
        self.signum, self._asked = 0, 0.0

    def __enter__(self) -> "StopRequest":
        in_main_thread = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if in_main_thread else ()
        self._before = {s: signal.signal(s, self._take) for s in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _take(self, signum: int, _: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._asked = signum, time.monotonic()
        elif time.monotonic() - self._asked > 5:  # sooner, it is the same one, passed on by a launcher
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
