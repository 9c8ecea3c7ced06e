"""A training recipe: everything that decides a run's result, read from YAML and `key=value`, checked before the run."""

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


class RecipeError(ValueError):
    """A recipe that can't be run; the message names the key, the value and what is possible."""


@dataclass(frozen=True)
class Recipe:
    """Defaults are those of the IEBN authors' CIFAR script."""

    model: str
    data: str  # 'digits', or hfds/NAME with NAME a dataset of the Hugging Face Hub or a folder
    epochs: int = 164
    batch_size: int = 128  # over all processes
    opt: str = "momentum"  # a name of timm: plain momentum (its 'sgd' is Nesterov)
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_norms: bool = True  # weight decay on norms, biases and gates too, as the authors do and timm does not
    sched: str = "multistep"
    milestones: tuple[int, ...] = (81, 122)
    warmup_epochs: int = 0
    crop_padding: int = 4
    hflip: bool = True
    precision: str = "no"
    channels_last: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = {"milestones": tuple}.get(field.name, field.type)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, field.name, float(value))
            elif kind is tuple and isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif type(value) is not kind:
                raise RecipeError(f"{field.name}: expected {kind.__name__}, got {value!r}")
        for name in ("epochs", "batch_size", "lr"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name}: must be more than 0, got {getattr(self, name)!r}")
        for name in ("momentum", "weight_decay", "warmup_epochs", "crop_padding"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name}: must not be negative, got {getattr(self, name)!r}")
        for name, allowed in (("sched", ("multistep", "cosine")), ("precision", ("no", "bf16", "fp16"))):
            if getattr(self, name) not in allowed:
                raise RecipeError(f"{name}: must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def to_yaml(self) -> str:
        """The recipe as YAML that `load_recipe` reads back."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(plain, sort_keys=False)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with `key=value` overrides.

    Raises:
        RecipeError: no such file, no YAML mapping, an unknown key, or a value of the wrong type or range.
    """
    try:
        values: Any = yaml.safe_load(Path(path).read_text())
        values = dict(values) if isinstance(values, dict) else None
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals:
                raise RecipeError(f"{override!r}: overrides are written key=value")
            if values is not None:
                values[key] = yaml.safe_load(value)
    except (OSError, yaml.YAMLError) as e:
        raise RecipeError(f"can't read the recipe {path}: {e}") from e
    if values is None:
        raise RecipeError(f"{path} is not a recipe: it must hold one YAML mapping")
    known = [field.name for field in dataclasses.fields(Recipe)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            raise RecipeError(f"unknown key {key!r}: {hint}")
    for key in ("model", "data"):
        if key not in values:
            raise RecipeError(f"{path} lacks the key {key!r}")
    return Recipe(**values)
