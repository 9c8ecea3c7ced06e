"""The zoo: the model folders that come with the package, their tags, and their places on the Hub."""

import csv
import json
import os
import re
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from timm.models._hub import hf_split

from .files import sha256
from .messages import describe, shorten

_INSTALLED = Path(__file__).with_name("_zoo")
ZOO = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "zoo"  # of a wheel, of a checkout
WEIGHTS = "model.safetensors"
COSTS = "cost.csv"
HTTPError = HfHubHTTPError.__bases__[0]  # of whichever HTTP library huggingface_hub uses

NAMESPACE = "timm-iebn"  # ours on the Hub, which the cards name


def hub_namespace() -> str:
    """Whose repositories on the Hub hold the zoo: `TIMM_IEBN_NAMESPACE` in the environment, or ours."""
    return os.environ.get("TIMM_IEBN_NAMESPACE") or NAMESPACE


def hub_id(folder: Path, namespace: str = "") -> str:
    """The Hub repository that is, or would be, the model folder `folder`."""
    return f"{namespace or hub_namespace()}/{folder.resolve().name}"


# what the trainer writes into config.json, and others read
_NUMBER = (int, float)
_CONFIG = dict(architecture=str, label_names=list, parameters=int, macs=int, weights_sha256=str)
_TRAINING = dict(data=str, epochs=int, seed=int, pretrained=bool, date=str)
_TRAINING |= dict(test_loss=_NUMBER, test_top1=_NUMBER, test_top5=_NUMBER)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _parse_config(path: Path) -> dict[str, Any]:
    """What the config.json of anybody's model folder says; ValueError where it is damaged."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} can't be read: {shorten(e)}") from e
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no mapping")
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder that the trainer has written.

    Raises:
        ValueError: it is damaged, or somebody else's; the message names it.
    """
    path = folder / "config.json"
    config = _parse_config(path)

    def check(part: Any, name: str, kinds: dict[str, Any]) -> None:
        if not isinstance(part, dict):
            raise ValueError(f"{path}: {name!r} is missing or no mapping")
        for key, kind in kinds.items():
            allowed = kind if isinstance(kind, tuple) else (kind,)
            if type(part.get(key)) not in allowed:
                words = " or ".join(k.__name__ for k in allowed)
                raise ValueError(f"{path}: {key!r} should be of type {words}, is {shorten(repr(part.get(key)))}")

    check(config, "", _CONFIG)
    check(config.get("training"), "training", _TRAINING)
    check(config.get("pretrained_cfg"), "pretrained_cfg", dict(input_size=list))
    return config


def read_zoo(zoo: Path = ZOO) -> dict[Path, dict[str, Any]]:
    """The config.json of each model folder in `zoo`. The first one of an architecture is its default: the longest
    training from scratch, the lowest seed, those for study last; never the best result, a choice by the test split.
    """
    ranks, configs = {}, {}
    for path in zoo.glob("*/config.json"):
        try:
            config = read_config(path.parent)
            training = config["training"]
            if not path.parent.name.startswith(f"{config['architecture']}."):
                raise ValueError(f"the folder is not named {config['architecture']}.TAG")
            order = bool(training.get("is_study")), training["pretrained"], -training["epochs"], training["seed"]
            rank = *order, path.parent.name
        except (ValueError, OSError) as e:
            warnings.warn(f"{path.parent} is left out ({e})", stacklevel=2)
        else:
            ranks[path.parent], configs[path.parent] = rank, config
    return {folder: configs[folder] for folder in sorted(ranks, key=ranks.get)}


_read_shipped = cache(read_zoo)  # for each architecture that is registered


def zoo_cfgs(architecture: str, base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """timm's pretrained cfgs of the zoo's checkpoints of `architecture`, by name and tag; `base` says the rest.

    A checkpoint that is here has both a file, which timm prefers, and a repository on the Hub.
    """
    cfgs = {}
    for folder, config in _read_shipped().items():
        if config["architecture"] != architecture:
            continue
        own = {k: tuple(v) if isinstance(v, list) else v for k, v in config["pretrained_cfg"].items() if k in base}
        weights = folder / WEIGHTS
        cfgs[folder.name] = (
            base
            | own
            | dict(
                file=str(weights) if weights.exists() else None,
                hf_hub_id=hub_id(folder),
                label_names=tuple(config["label_names"]),
            )
        )
    return cfgs


def check_weights(weights: Path) -> None:
    """Compares a model folder's weights with the digest that its config.json holds, if it holds one.

    Weights that others have written into the folder differ too, and are only warned of. Nobody
    writes those of the zoo.

    Raises:
        RuntimeError: weights of the zoo are damaged.
    """
    if weights.name != WEIGHTS:  # the digest is that of this file alone
        return
    try:
        expected = _parse_config(weights.with_name("config.json")).get("weights_sha256")
    except (OSError, ValueError):  # whoever needs it will say so
        expected = None
    if expected is None or not weights.exists() or (digest := sha256(weights)) == expected:
        return
    if weights.parent.resolve().parent == ZOO.resolve():
        raise RuntimeError(
            f"{weights} is damaged (its sha256 is {digest}): install timm-iebn again, or take the file from git again"
        )
    warnings.warn(
        f"{weights} is damaged, or was changed: its sha256 is {digest}, config.json has another. Remove weights_sha256 "
        "there if the weights are yours",
        stacklevel=2,
    )


def check_download(hub_id: str, cache_dir: str | Path | None = None, is_own: bool = False) -> None:
    """Compares the cached weights of a Hub repository with what they should be.

    The Hub's client compares sizes only; the name of a large file in its cache is the sha256 that it should have. A
    checkpoint of the zoo has its sha256 in the config that came with the package.

    Args:
        is_own: whether the repository was named by its user, and speaks for itself, its config.json included.

    Raises:
        RuntimeError: they are damaged, and have been removed from the cache; or, under the name of a checkpoint of the
            zoo and without a revision, they are others.
    """
    repo, revision = hf_split(hub_id)
    path = try_to_load_from_cache(repo, WEIGHTS, cache_dir, revision)
    if not isinstance(path, str):
        return
    blob, (owner, _, name) = Path(path).resolve(), repo.partition("/")
    digest = sha256(blob)
    if re.fullmatch("[0-9a-f]{64}", blob.name) and digest != blob.name:
        blob.unlink(missing_ok=True)
        Path(path).unlink(missing_ok=True)
        raise RuntimeError(
            f"The weights of {hub_id} are damaged: {blob} was not what its sha256 says and has been removed from the "
            "cache. Load them again."
        )
    # others may give the name to a training of their own
    is_zoos = owner == NAMESPACE or (owner == hub_namespace() and not is_own)
    if is_zoos and not revision and (ZOO / name / "config.json").exists():
        if digest != read_config(ZOO / name)["weights_sha256"]:
            raise RuntimeError(
                f"The weights of {hub_id} (sha256 {digest}) are others than this version of timm-iebn knows: install "
                f"the version that they belong to, or say which revision you want, hf-hub:{repo}@REVISION."
            )


class ZooModel(NamedTuple):
    """A checkpoint of the zoo. Accuracy is that of its last epoch, `images_per_second` as `speeds_of` has it."""

    name: str
    data: str
    top1: float
    top5: float
    epochs: int
    seeds: int  # checkpoints of this recipe in the zoo
    parameters: int
    macs: int
    images_per_second: dict[str, float]
    date: str


def list_zoo(pattern: str = "*", zoo: Path = ZOO) -> list[ZooModel]:
    """The checkpoints of the zoo, each with what one needs to choose.

    Args:
        pattern: of the names, as in `timm.list_models`: 'resnet20_*'.
    """
    models, configs, costs = [], read_zoo(zoo), read_costs(zoo / COSTS)
    seeds = Counter(map(_without_seed, configs))
    for folder, config in configs.items():
        if not folder.match(pattern):
            continue
        training = config["training"]
        models.append(
            ZooModel(
                folder.name,
                training["data"],
                training["test_top1"],
                training["test_top5"],
                training["epochs"],
                seeds[_without_seed(folder)],
                config["parameters"],
                config["macs"],
                speeds_of(config, costs),
                training["date"],
            )
        )
    return models


def _without_seed(folder: Path) -> str:
    return re.sub(r"seed\d+$", "", folder.name)


class Cost(NamedTuple):
    """What a network costs: its size, and its speed in inference on one device."""

    architecture: str
    input_size: str  # as 3x32x32
    parameters: int
    macs: int  # of convolutions and matrix products, for one image
    device: str
    batch_size: int
    images_per_second: float
    torch: str  # its version
    date: str


def read_costs(path: Path = ZOO / COSTS) -> list[Cost]:
    """What a cost.csv says; nothing where there is none.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        types = get_type_hints(Cost)
        if any(row.keys() != types.keys() or None in row.values() for row in rows):
            raise ValueError(f"not every row has {', '.join(types)}")
        return [Cost(*(kind(row[key]) for key, kind in types.items())) for row in rows]
    except (ValueError, csv.Error) as e:
        raise ValueError(f"{path} is not as zoo_cost.py writes it: {describe(e)}") from e


def speeds_of(config: dict[str, Any], costs: list[Cost]) -> dict[str, float]:
    """Images per second in inference of a network with this config.json, by device and size of the batch."""
    network = config["architecture"], "x".join(map(str, config["pretrained_cfg"]["input_size"]))
    own = [cost for cost in costs if (cost.architecture, cost.input_size) == network]
    return {f"{cost.device}, batch {cost.batch_size}": cost.images_per_second for cost in own}
