"""The folders of a run: `NAME`, the model folder that it writes at its end, and `NAME.run`, where it works."""

import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import write_atomically
from ..recipe import Recipe, RecipeError, changes_between, load_recipe
from ..run_log import read_log


def work_folder(output: Path) -> Path:
    """Where the run that writes `output` works."""
    if not output.name or output.name == "..":
        raise RecipeError(f"output: {str(output)!r} does not name a new folder")
    return output.with_name(output.name + ".run")


def check_output(recipe: Recipe, output: Path, resume: bool) -> None:
    """Raises RecipeError where a run would overwrite something or go on with what is not its own."""
    folder = work_folder(output)
    if output.exists():
        raise RecipeError(f"output: {output} exists already; choose another one or move it away")
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"output: {folder}, where the run would work, is a file: choose another output or move it")
    if not folder.exists() or {p.name for p in folder.iterdir()} <= {"lock", "recipe.yaml", "recipe.yaml.partial"}:
        return  # no run, or one that came to nothing
    if not (folder / "recipe.yaml").exists():
        raise RecipeError(f"output: {folder} is not the folder of a run: choose another output or move it away")
    if not resume:
        raise RecipeError(
            f"output: {folder} holds an unfinished run; --resume goes on with it; else choose another output or remove "
            "that folder"
        )
    _check_same_recipe(recipe, folder)


def finished_row(recipe: Recipe, output: Path) -> dict[str, float] | None:
    """The last row of a run that has written its output."""
    if not (output / "log.csv").exists():
        return None
    _check_same_recipe(recipe, output)
    try:
        rows = read_log(output / "log.csv")
    except ValueError as e:
        raise RecipeError(f"output: {e}: move it away") from e
    whole = [row for row in rows if "test_top1" in row]
    if len(whole) < recipe.epochs:
        raise RecipeError(f"output: {output / 'log.csv'} has {len(whole)} of {recipe.epochs} epochs: move it away")
    clean_up(work_folder(output))  # a kill may have prevented it
    return rows[-1]


def clean_up(folder: Path) -> None:
    """Removes what is of no use after the model folder is written: all but what trackers left."""
    shutil.rmtree(folder / "result", ignore_errors=True)
    with suppress(OSError):
        for path in (*folder.glob("*.safetensors"), *(folder / name for name in ("log.csv", "recipe.yaml", "lock"))):
            path.unlink(missing_ok=True)
        folder.rmdir()


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    if changes := changes_between(asdict(load_recipe(folder / "recipe.yaml")), asdict(recipe)):
        raise RecipeError(
            f"resume: {folder} was started with another recipe ({changes}): choose another --output or move it away"
        )


def folder_lock(output: Path) -> FileLock:
    """What `open_folder` takes; it is given back when it is released or the process ends, however it does."""
    return FileLock(work_folder(output) / "lock", timeout=0)


def open_folder(recipe: Recipe, output: Path, resume: bool, lock: FileLock) -> None:
    """Makes the work folder this process's own, and takes `lock` on it.

    Raises:
        RecipeError: as `check_output`; another process has it, or it can't be written to.
    """
    folder = work_folder(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        check_output(recipe, output, resume)  # once more: another run may have come and gone
        for path in folder.glob("*.partial"):  # of a run that was killed
            path.unlink()
        shutil.rmtree(folder / "result", ignore_errors=True)
        write_atomically(folder / "recipe.yaml", recipe.to_yaml().encode())
    except Timeout as e:
        raise RecipeError(f"output: another process is training in {folder}") from e
    except OSError as e:
        raise RecipeError(f"output: can't write to {folder}: {e.strerror or e}") from e
