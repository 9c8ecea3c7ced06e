"""Data sets: the splits that a recipe names, in memory or as timm's data sets, with the names of their classes."""

import hashlib
import os
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..messages import describe
from ..recipe import Recipe, RecipeError

_TORCH_SPLITS = ("train", "training", "test", "val", "valid", "validation", "eval", "evaluation")
_IMAGE, _LABEL = ("image", "img"), ("label", "fine_label")


@dataclass(frozen=True)
class Images:
    """A split in memory: images (N, C, H, W) uint8, labels (N,) int64, and the names of all classes."""

    images: Tensor
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)


def add_data_dir(parser: ArgumentParser) -> None:
    """The option of scripts that says where the data is."""
    help_ = "where the data is, if not on the Hub: a folder or .tar file (default: DATA_DIR of the environment)"
    parser.add_argument("--data-dir", default=os.environ.get("DATA_DIR", ""), help=help_)


def open_split(recipe: Recipe, split: str, data_dir: str = "") -> tuple[Dataset, list[str]]:
    """timm's data set (its items are PIL images and labels) and the names of its classes.

    `data_dir` is the folder or .tar file of torch/NAME and 'folder' ({split} stands for the split's name), and for
    hfds/NAME a folder that holds a copy of the Hub's data set.

    Raises:
        RecipeError: the name is of another form, or its data can't be read.
    """
    kind, _, name = recipe.data.partition("/")
    if kind not in ("hfds", "torch", "folder") or bool(name) == (kind == "folder"):
        raise RecipeError(f"data: expected 'digits', 'hfds/NAME', 'torch/NAME' or 'folder', got {recipe.data!r}")
    root = data_dir.replace("{split}", split)
    if kind == "torch" and split not in _TORCH_SPLITS:  # timm takes any other name for the test split
        raise RecipeError(f"data: {recipe.data!r} has no split {split!r}: choose of {', '.join(_TORCH_SPLITS)}")
    if (root or kind != "hfds") and not (root and Path(root).exists()):
        raise RecipeError(f"data: {recipe.data!r} needs --data-dir with an existing folder or .tar file, got {root!r}")
    if kind == "folder" and "{split}" not in data_dir:
        # timm would look through all of it, other splits included
        if not Path(root, split).is_dir():
            found = [p.name for p in sorted(Path(root).iterdir()) if p.is_dir()] if Path(root).is_dir() else []
            raise RecipeError(
                f"data: no folder {split!r} in {root} (there are: {found}); set train_split and test_split, or write "
                "{split} into --data-dir"
            )
        root = str(Path(root, split))
    try:
        if kind == "hfds":
            keys = _hfds_keys(root or name, split)
            dataset = create_dataset(f"hfds/{root or name}", split=split, **keys)
        else:
            dataset = create_dataset("" if kind == "folder" else recipe.data, root, split)
    except (OSError, ValueError, RuntimeError, AssertionError) as e:
        where = f" in {root}" if root else " (--data-dir takes a folder with a copy of it)"
        raise RecipeError(f"data: can't load split {split!r} of {recipe.data!r}{where}: {e}") from e
    dataset._max_retries = 1  # timm takes the next image in place of one that it can't read
    source = getattr(dataset, "reader", dataset)
    index = getattr(source, "class_to_idx", None) or getattr(source, "class_name_to_idx", None) or {}
    names = {i: str(name) for name, i in reversed(index.items())}  # the first one where a class has several
    return dataset, [names[i] for i in sorted(names)]


def _hfds_keys(name: str, split: str) -> dict[str, str]:
    """The names that a `datasets` data set gives to its image and its (fine) label, as timm's arguments."""
    import datasets

    features = datasets.load_dataset(name, split=split).features
    image, label = (next((c for c in options if c in features), None) for options in (_IMAGE, _LABEL))
    if image is None or label is None:
        raise RecipeError(f"data: {name!r} needs one of the columns {_IMAGE} and {_LABEL}, has {list(features)}")
    return dict(input_key=image, target_key=label)


def read_image(dataset: Dataset, index: int) -> tuple[Image.Image, int]:
    """The RGB image and the label of one item of timm's `dataset`.

    Raises:
        RecipeError: it can't be read.
    """
    try:
        image, label = dataset[index]
        return image.convert("RGB"), label
    except Exception as e:  # whatever a reader or decoder makes of it
        reason = describe(e)
    try:
        name = dataset.filename(index, absolute=True)
    except Exception:  # a data set that knows no names, or can't read this one either
        name = f"image {index}"
    raise RecipeError(f"data: can't read {name}: {reason}")


def fingerprint(split: Images | Dataset, classes: list[str]) -> str:
    """A digest of what distinguishes a split: its size, its classes, and 16 of its images with their labels."""
    digest = hashlib.sha256(repr((len(split), classes)).encode())
    for i in range(0, len(split), -(-len(split) // 16)):
        image, label = (split.images[i], int(split.labels[i])) if isinstance(split, Images) else read_image(split, i)
        digest.update(np.asarray(image).tobytes() + str(label).encode())
    return digest.hexdigest()


def load_images(recipe: Recipe, split: str, data_dir: str = "") -> Images:
    """A whole split in memory.

    Raises:
        RecipeError: as `open_split`; or the images differ in size.
    """
    if recipe.data == "digits":
        if data_dir and data_dir != os.environ.get("DATA_DIR"):  # which may be there for other runs
            raise RecipeError(f"data: 'digits' come with scikit-learn and take no --data-dir, got {data_dir!r}")
        return _load_digits(split)
    dataset, classes = open_split(recipe, split, data_dir)
    arrays, labels = [], []
    for image, label in (read_image(dataset, i) for i in range(len(dataset))):
        arrays.append(np.asarray(image))
        labels.append(int(label))
        if arrays[-1].shape != arrays[0].shape:
            shapes = " and ".join("x".join(map(str, a.shape[:2])) for a in (arrays[0], arrays[-1]))
            raise RecipeError(f"loader: 'memory' needs images of one size, {recipe.data!r} has {shapes}: use 'timm'")
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(labels), classes or [str(i) for i in range(max(labels) + 1)])


def _load_digits(split: str) -> Images:
    """scikit-learn's bundled 8x8 digits, enlarged to 32x32; a fixed random fifth is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False).round().byte()
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("test", "train"), order.tensor_split([len(order) // 5]), strict=True))
    if split not in parts:
        raise RecipeError(f"data: 'digits' has the splits train and test, not {split!r}")
    return Images(images[parts[split]], labels[parts[split]], [str(name) for name in digits.target_names])


def open_data(recipe: Recipe, data_dir: str = "") -> tuple[Images | Dataset, Images | Dataset, list[str]]:
    """The training and the test split, and the names of their classes.

    Raises:
        RecipeError: as `open_split` and `load_images`; or the splits do not have the same classes.
    """
    train, classes = open_part(recipe, recipe.train_split, data_dir)
    test, test_classes = open_test_data(recipe, data_dir)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))[:5]
        raise RecipeError(f"data: training and test split of {recipe.data!r} do not have the same classes: {odd}")
    return train, test, classes


def open_test_data(recipe: Recipe, data_dir: str = "") -> tuple[Images | Dataset, list[str]]:
    """The test split alone, and the names of its classes."""
    return open_part(recipe, recipe.test_split, data_dir)


def open_part(recipe: Recipe, split: str, data_dir: str) -> tuple[Images | Dataset, list[str]]:
    """One split, as the recipe's loader takes it, and the names of its classes.

    Raises:
        RecipeError: as `open_split` and `load_images`.
    """
    if recipe.loader == "memory":
        images = load_images(recipe, split, data_dir)
        found = images, images.classes
    elif recipe.data == "digits":
        raise RecipeError("loader: 'digits' are in memory only, got 'timm'")
    else:
        found = open_split(recipe, split, data_dir)
    if len(found[1]) < 2:
        raise RecipeError(f"data: {recipe.data!r} does not say what its classes are (found {found[1]})")
    return found
