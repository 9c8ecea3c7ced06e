"""A training recipe: everything that decides a run's result, read from YAML and `key=value`, checked before the run."""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

import yaml

from .messages import shorten
from .safe_yaml import parse_yaml

_CHOICES = dict(
    sched=("multistep", "cosine", "tanh", "poly"),
    loader=("memory", "timm"),
    crop=("pad", "resized"),
    precision=("no", "bf16", "fp16"),
    compile_mode=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
)
_POSITIVE = ("epochs", "batch_size", "grad_accumulation", "lr", "decay_rate")
_NOT_NEGATIVE = ("weight_decay", "clip_grad", "warmup_epochs", "min_lr", "crop_padding", "mixup", "cutmix")
_NOT_NEGATIVE += ("mix_images", "batch_noise_images")
_BELOW_ONE = ("momentum", "label_smoothing", "ema_decay")
# timm passes over sections without a digit and sets of transforms that it does not know
_AUTO_AUGMENT = re.compile(r"(rand|augmix|(?!rand|augmix)\w+)(-(t(weights|3aw?)|[a-z]+\d[\d.]*))*")
_OPTIMIZER = {"opt", "lr", "momentum", "weight_decay", "filter_bias_and_bn"}
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list, as [30, 45]",
    dict: "a mapping, as {key: value}",
}
_PREPROCESSING = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


class RecipeError(ValueError):
    """A recipe that can't be run; the message names the key, the value and what is possible."""


# what other trainers call the keys
_ALIASES = dict(learning_rate=["lr"], optimizer=["opt"], scheduler=["sched"], wd=["weight_decay"], bs=["batch_size"])


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a result. Defaults are those of the IEBN authors' CIFAR script."""

    model: str  # a name that timm.create_model takes: registered, local-dir:FOLDER or hf-hub:ID
    data: str  # 'digits', hfds/NAME with a data set of the Hugging Face Hub or a folder, torch/NAME, or 'folder'
    train_split: str = "train"
    test_split: str = "test"
    pretrained: bool = False  # start from the weights of the model's tag, folder or id
    model_args: dict[str, Any] = field(default_factory=dict)  # for timm.create_model: drop_path_rate and the like
    data_config: dict[str, Any] = field(
        default_factory=dict
    )  # instead of the model's: timm's input_size, mean, std, ...
    epochs: int = 164
    batch_size: int = 128  # images between two updates, over all processes
    grad_accumulation: int = 1  # in so many parts, each with its own batch statistics
    opt: str = "momentum"  # a name of timm: plain momentum (its 'sgd' is Nesterov)
    lr: float = 0.1
    momentum: float = 0.9
    opt_args: dict[str, Any] = field(default_factory=dict)  # further ones of timm's optimizer: betas, eps
    weight_decay: float = 1e-4
    decay_norms: bool = True  # weight decay on norms, biases and gates too, as the authors do and timm does not
    clip_grad: float = 0.0  # largest norm of the gradient; 0 for no limit
    sched: str = "multistep"
    milestones: tuple[int, ...] = (81, 122)  # epochs after which multistep multiplies the rate by decay_rate
    decay_rate: float = 0.1  # of multistep; the power of poly
    warmup_epochs: int = 0
    min_lr: float = 0.0
    loader: str = "memory"  # 'memory' for small images, 'timm' for timm's transforms in worker processes
    crop: str = "pad"  # 'pad': shifted by up to crop_padding pixels; 'resized': timm's random resized crop
    crop_padding: int = 4
    hflip: bool = True
    auto_augment: str = ""  # timm's notation, as rand-m9-mstd0.5
    random_erasing: float = 0.0  # probability
    mixup: float = 0.0  # alpha, as is cutmix; with both, one of them by turns at random
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    ema_decay: float = 0.0  # above 0, the averaged weights are evaluated and saved; with timm's warmup
    precision: str = "no"
    channels_last: bool = True
    compile: bool = False
    compile_mode: str = "default"  # torch.compile's; with reduce-overhead, CUDA graphs spare small networks the host
    grad_checkpointing: bool = False  # runs layers twice, and so moves running statistics by twice their momentum
    sync_norms: bool = True  # with several processes
    freeze_gates: bool = False  # IEBN's gates stay as they start: a control, for what training them adds
    # the attacks on training, see training/attacks.py: normalised features x become x * noise_scale + noise_offset,
    # evaluated with the noise kept too; of the training split of mix_data, named as `data`, mix_images join each
    # batch's statistics, not its loss
    noise_scale: float = 1.0
    noise_offset: float = 0.0
    mix_data: str = ""
    mix_images: int = 0
    batch_noise_images: int = 0  # so many have their batch noise measured after each epoch, see training/batch_noise.py
    seed: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            kind = get_origin(f.type) or f.type
            if kind is float and type(value) is int:
                object.__setattr__(self, f.name, float(value))
            elif f.name == "precision" and value is False:  # YAML reads no as false
                object.__setattr__(self, f.name, "no")
            elif kind is tuple and isinstance(value, list):
                object.__setattr__(self, f.name, tuple(value))
            elif type(value) is not kind:
                raise RecipeError(f"{f.name}: expected {_KINDS[kind]}, got {value!r}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise RecipeError(f"{name}: must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(f"{name}: must be more than 0, got {getattr(self, name)!r}")
        for name in _BELOW_ONE:
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{name}: must be at least 0 and less than 1, got {getattr(self, name)!r}")
        if not 0 <= self.random_erasing <= 1:
            raise RecipeError(f"random_erasing: must be between 0 and 1, got {self.random_erasing!r}")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"{name}: must not be negative, got {getattr(self, name)!r}")
        for name in ("noise_scale", "noise_offset"):
            if not math.isfinite(getattr(self, name)):
                raise RecipeError(f"{name}: must be finite, got {getattr(self, name)!r}")
        if bool(self.mix_data) != bool(self.mix_images):
            raise RecipeError(f"mix_images: {self.mix_images} images of mix_data {self.mix_data!r}: set both or none")
        if self.min_lr > self.lr:
            raise RecipeError(f"min_lr: {self.min_lr} is more than lr {self.lr}")
        self._check_data_config()
        if own := _OPTIMIZER & self.opt_args.keys():
            raise RecipeError(f"opt_args: {', '.join(sorted(own))} must be given as keys of the recipe itself")
        if not all(type(m) is int and m > 0 for m in self.milestones) or sorted(self.milestones) != [*self.milestones]:
            raise RecipeError(f"milestones: expected epochs in order, got {list(self.milestones)!r}")
        if len(set(self.milestones)) < len(self.milestones):
            raise RecipeError(f"milestones: {list(self.milestones)} names an epoch twice")
        if self.sched == "multistep" and self.milestones and self.milestones[-1] >= self.epochs:
            raise RecipeError(
                f"milestones: epoch {self.milestones[-1]} is not within the {self.epochs} epochs; set milestones=[...]"
            )
        if not 0 <= self.seed < 2**32:
            raise RecipeError(f"seed: must be between 0 and 2**32 - 1, got {self.seed}")
        if self.warmup_epochs > self.epochs:
            raise RecipeError(f"warmup_epochs: {self.warmup_epochs} are more than the {self.epochs} epochs")
        if self.auto_augment and not _AUTO_AUGMENT.fullmatch(self.auto_augment):
            raise RecipeError(f"auto_augment: expected timm's notation, as rand-m9-mstd0.5, got {self.auto_augment!r}")
        if self.loader == "memory" and (self.auto_augment or self.crop != "pad"):
            key = "auto_augment" if self.auto_augment else "crop"
            raise RecipeError(f"{key}: {getattr(self, key)!r} works on single images and needs loader: timm")
        if self.compile_mode != "default" and not self.compile:
            raise RecipeError(f"compile_mode: {self.compile_mode!r} is of use with compile: true only")
        if self.compile_mode in ("reduce-overhead", "max-autotune") and self.grad_accumulation > 1:
            raise RecipeError(
                f"compile_mode: {self.compile_mode!r} replays CUDA graphs, which overwrite the gradients that "
                f"grad_accumulation {self.grad_accumulation} adds up: use default or max-autotune-no-cudagraphs"
            )
        if self.batch_size % self.grad_accumulation:
            raise RecipeError(
                f"grad_accumulation: {self.grad_accumulation} does not divide batch_size {self.batch_size}"
            )

    @property
    def has_noise(self) -> bool:
        """Whether the constant noise attack is on."""
        return (self.noise_scale, self.noise_offset) != (1.0, 0.0)

    @property
    def is_study(self) -> bool:
        """Whether the network is one to learn from, not to use: attacked, or a control."""
        return self.has_noise or bool(self.mix_data) or self.freeze_gates

    def _check_data_config(self) -> None:
        for key, value in self.data_config.items():
            if key not in _PREPROCESSING:
                raise RecipeError(f"data_config: unknown key {key!r}; known keys: {', '.join(_PREPROCESSING)}")
            if key in ("input_size", "mean", "std"):
                kind = int if key == "input_size" else (int, float)
                is_list = isinstance(value, list) and all(
                    isinstance(v, kind) and not isinstance(v, bool) for v in value
                )
                if not is_list or (key != "mean" and min(value, default=0) <= 0):
                    raise RecipeError(f"data_config: {key} must be a list of numbers above 0, got {value!r}")
                if key == "input_size" and len(value) != 3:
                    raise RecipeError(f"data_config: input_size is [channels, height, width], got {value!r}")

    def to_yaml(self) -> str:
        """The recipe as YAML that `load_recipe` reads back."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return yaml.safe_dump(plain, sort_keys=False)


def changes_between(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which values of `now` are others in `before`, and what they were; empty where none is."""
    return "; ".join(f"{k}: {before.get(k)!r} became {v!r}" for k, v in now.items() if before.get(k) != v)


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """The values of `key=value` overrides, which are YAML.

    Raises:
        RecipeError: one is of another form.
    """
    values = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"{override!r}: overrides are written key=value")
        try:
            values[key] = parse_yaml(value)
        except yaml.YAMLError as e:
            raise RecipeError(f"{override!r}: {value!r} is not YAML: {str(e).splitlines()[0]}") from e
    return values


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with `key=value` overrides.

    Raises:
        RecipeError: no such file, no YAML mapping, an unknown key, or a value of the wrong type or range.
    """
    overrides = list(overrides)
    where = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    try:
        values: Any = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise RecipeError(f"can't read the recipe {path}: {shorten(e)}") from e
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a recipe: it must hold one YAML mapping")
    values = values | parse_overrides(overrides)
    known = [f.name for f in fields(Recipe)]
    for key in values:
        if key not in known:
            close = [*_ALIASES.get(key, ()), *difflib.get_close_matches(str(key), known, n=1)]
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            raise RecipeError(f"{where}: unknown key {shorten(repr(key))}: {hint}")
    for key in ("model", "data"):
        if key not in values:
            raise RecipeError(f"{path} lacks the key {key!r}")
    try:
        return Recipe(**values)
    except RecipeError as e:
        raise RecipeError(f"{where}: {shorten(e)}") from e
