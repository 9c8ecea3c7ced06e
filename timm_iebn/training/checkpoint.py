"""Checkpoints of a run: one safetensors file each, written atomically, verified when read, the last two kept.

Not accelerate's `save_state`: it writes pickles, into a folder that a kill leaves half-filled.
"""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import WriteError, write_atomically
from ..messages import describe, shorten

KEPT = 2


class CheckpointError(RuntimeError):
    """A checkpoint that can't be written or read; the message names the file and the remedy."""


class TornCheckpointError(CheckpointError):
    """A checkpoint whose content is torn or changed."""


def _flatten(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """`tree` as JSON can hold it, each of its tensors replaced by its name in `tensors`."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(tree, dict):  # as pairs, because JSON's keys are strings only
        return {"dict": [[k, _flatten(v, tensors, f"{path}.{k}" if path else str(k))] for k, v in tree.items()]}
    if isinstance(tree, torch.dtype):
        return {"dtype": str(tree).removeprefix("torch.")}
    if isinstance(tree, list | tuple):
        return {type(tree).__name__: [_flatten(v, tensors, f"{path}.{i}") for i, v in enumerate(tree)]}
    return tree


def _unflatten(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: _unflatten(v, tensors) for k, v in value}
    if kind == "dtype":
        return getattr(torch, value)
    items = [_unflatten(v, tensors) for v in value]
    return tuple(items) if kind == "tuple" else items


def _digest(tree: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(tree.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where `save_checkpoint` writes."""
    return folder / f"{step:09d}.safetensors"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes `state`, a tree of dicts, lists, tensors and plain values, and removes all but the last checkpoints.

    Raises:
        CheckpointError: it can't be written; earlier checkpoints are untouched.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_flatten(state, tensors))
    metadata = dict(tree=tree, sha256=_digest(tree, tensors))
    path = checkpoint_path(folder, step)
    try:
        write_atomically(path, safetensors.torch.save(tensors, metadata))
    except WriteError as e:
        raise CheckpointError(str(e)) from e
    for old in sorted(folder.glob("*.safetensors"))[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in `path`, on the CPU.

    Raises:
        TornCheckpointError: the file is torn or changed.
        CheckpointError: it can't be read.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        tree, expected = metadata["tree"], metadata["sha256"]
    except OSError as e:
        raise CheckpointError(f"can't read {path}: {e}") from e
    except (SafetensorError, KeyError) as e:
        raise TornCheckpointError(f"{path} is not a whole checkpoint: {shorten(e)}") from e
    if _digest(tree, tensors) != expected:
        raise TornCheckpointError(f"{path} is not a whole checkpoint: its checksum is wrong")
    try:
        return _unflatten(json.loads(tree), tensors)
    except Exception as e:  # whatever another writer may have meant
        reason = describe(e)
        raise CheckpointError(f"{path} is whole, but no checkpoint as this version writes them: {reason}") from e


def load_latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint in `folder` with its path; warns of torn ones that are newer, and removes them, so
    that they are not among the last two that are kept. None where there is no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    paths = sorted(folder.glob("*.safetensors"), reverse=True)
    for i, path in enumerate(paths):
        try:
            state = read_checkpoint(path)
        except TornCheckpointError as e:
            warnings.warn(f"{e}; trying the one before", stacklevel=2)
            continue
        for torn in paths[:i]:
            torn.unlink()
        return path, state
    if paths:
        raise CheckpointError(f"no checkpoint in {folder} is whole: remove the folder to start again")
    return None
