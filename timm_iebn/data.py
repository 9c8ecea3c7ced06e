"""Training and test data behind one small interface: `Loader.epoch(n)` gives the normalised batches of an epoch.

What a batch holds is a function of the seed, the epoch and its place in it, so that a run can go on in mid-epoch, and
not of the number of workers. Nor does it depend on the number of processes, but for what random erasing fills in.
"""

import hashlib
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_dataset, create_transform, str_to_interp_mode
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, Resize

from .recipe import Recipe, RecipeError

TEST_BATCH = 500
_TORCH_SPLITS = ("train", "training", "test", "val", "valid", "validation", "eval", "evaluation")
_IMAGE, _LABEL = ("image", "img"), ("label", "fine_label")


def seed_everything(*numbers: int) -> None:
    """Seeds Python's, NumPy's and torch's generators with a hash of `numbers`."""
    seed = int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class Images:
    """A split in memory: images (N, C, H, W) uint8, labels (N,) int64, and the names of all classes."""

    images: Tensor
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)


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
        where = f" in {root}" if root else ""
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


def load_images(recipe: Recipe, split: str, data_dir: str = "") -> Images:
    """A whole split in memory.

    Raises:
        RecipeError: as `open_split`; or the images differ in size.
    """
    if recipe.data == "digits":
        return _load_digits(split)
    dataset, classes = open_split(recipe, split, data_dir)
    arrays, labels = [], []
    for image, label in (dataset[i] for i in range(len(dataset))):
        arrays.append(np.asarray(image.convert("RGB")))
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


@dataclass(frozen=True)
class Share:
    """Which part of each batch this process takes, where it takes it to, and how images are normalised there."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    channels_last: bool = False


class Loader:
    """Batches of one process, (B, C, H, W) float32 and (B,) labels, on its device.

    With a `recipe`, training batches: shuffled, augmented, without the last incomplete one. Without, test batches: in
    order, each image in exactly one process's share.
    """

    def __init__(self, size: int, share: Share, recipe: Recipe | None) -> None:
        self.size, self.share, self.recipe = size, share, recipe
        self.batch_size = TEST_BATCH * share.world_size
        if recipe:
            self.batch_size = recipe.batch_size // recipe.grad_accumulation
            parts = recipe.grad_accumulation * share.world_size
            if recipe.batch_size % parts:
                raise RecipeError(f"batch_size: {recipe.batch_size} can't be shared by {parts} (processes x parts)")
            if (recipe.mixup or recipe.cutmix) and recipe.batch_size // parts % 2:
                raise RecipeError(f"batch_size: mixup and cutmix pair images; {recipe.batch_size // parts} is odd")
            if recipe.batch_size > size:
                raise RecipeError(f"batch_size: {recipe.batch_size} is more than the {size} training images")
        elif size == 0:
            raise RecipeError("data: the test split is empty")
        self.mean, self.std = (
            torch.tensor(v, device=share.device).view(-1, 1, 1) * 255 for v in (share.mean, share.std)
        )
        self.erase = None
        if recipe and recipe.random_erasing:
            self.erase = RandomErasing(recipe.random_erasing, mode="pixel", device=share.device)

    def __len__(self) -> int:
        """Batches in an epoch; of training batches, whole groups between two updates."""
        if not self.recipe:
            return -(-len(range(self.share.rank, self.size, self.share.world_size)) // TEST_BATCH)
        return self.size // self.recipe.batch_size * self.recipe.grad_accumulation

    def indices(self, epoch: int) -> list[Tensor]:
        """The images of each of this process's batches."""
        order = torch.arange(self.size)
        if self.recipe:
            order = torch.randperm(self.size, generator=self._generator(epoch, "order"))
        order = order[self.share.rank :: self.share.world_size]
        step = self.batch_size // self.share.world_size
        return [order[i * step : (i + 1) * step] for i in range(len(self))]

    def _generator(self, epoch: int, purpose: str) -> torch.Generator:
        name = f"{self.recipe.seed} {epoch} {purpose}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:6]))

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `epoch` from number `start` on."""
        share = self.share
        for i, (images, labels) in enumerate(self._batches(epoch, start), start):
            images = images.float().sub_(self.mean).div_(self.std)
            if self.erase:
                seed_everything(self.recipe.seed, epoch, i, share.rank)
                images = self.erase(images)
            layout = torch.channels_last if share.channels_last else torch.contiguous_format
            yield images.contiguous(memory_format=layout), labels

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images and their labels on the device, augmented up to here."""
        raise NotImplementedError


class MemoryLoader(Loader):
    """Batches of a split that is held on the device, augmented there, whole batches at once.

    Worker processes would starve an accelerator at the sizes that it is made for.
    """

    def __init__(self, split: Images, share: Share, recipe: Recipe | None = None) -> None:
        super().__init__(len(split), share, recipe)
        self.images, self.labels = split.images.to(share.device), split.labels.to(share.device)
        if recipe:
            _check_padding(recipe, self.images.shape[2:])

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.share.device
        if self.recipe:
            generator, padding = self._generator(epoch, "augmentation"), self.recipe.crop_padding
            # for every image of the epoch, so that they do not depend on how batches are cut
            shifts = torch.randint(0, 2 * padding + 1, (2, self.size), generator=generator).to(device)
            mirrored = (torch.rand(self.size, generator=generator) < 0.5 * self.recipe.hflip).to(device)
        for index in self.indices(epoch)[start:]:
            index = index.to(device)
            images = self.images[index]
            if self.recipe:
                images = crop_and_flip(images, padding, shifts[:, index], mirrored[index])
            yield images, self.labels[index]


def crop_and_flip(images: Tensor, padding: int, shifts: Tensor, mirrored: Tensor) -> Tensor:
    """Windows of the zero-padded images (N, C, H, W) at `shifts` (2, N), those that are `mirrored` (N,) flipped."""
    n, _, h, w = images.shape
    if padding:
        rows, columns = (
            s[:, None] + torch.arange(size, device=s.device) for s, size in zip(shifts, (h, w), strict=True)
        )
        padded = F.pad(images, (padding,) * 4)
        image = torch.arange(n, device=images.device)[:, None, None]
        # advanced indices around a slice put the batch and image axes first
        images = padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


class _Reproducible(Dataset):
    """`dataset` with `transform`, whose random choices depend on the seed, the epoch and the image alone."""

    def __init__(self, dataset: Dataset, transform: Any, seed: int) -> None:
        self.dataset, self.transform, self.seed, self.epoch = dataset, transform, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            image, label = self.dataset[index]
        except Exception as e:  # whatever a reader or decoder makes of it
            raise RecipeError(f"data: can't read image {index}: {type(e).__name__}: {e}") from None
        seed_everything(self.seed, self.epoch, index)
        return self.transform(image.convert("RGB")), label


def _outlive_signals(_: int) -> None:
    """A signal to the whole group of processes must not take a worker from the trainer before its last update."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))  # multiprocessing ends workers in this way too


def _check_padding(recipe: Recipe, size: Sequence[int]) -> None:
    if recipe.crop == "pad" and recipe.crop_padding >= min(size):
        raise RecipeError(f"crop_padding: {recipe.crop_padding} is too much for images of {size[0]}x{size[1]}")


class TimmLoader(Loader):
    """Batches of any map-style data set of timm, through timm's transforms in worker processes."""

    def __init__(
        self,
        dataset: Dataset,
        share: Share,
        data_config: dict[str, Any],
        recipe: Recipe | None = None,
        workers: int = 0,
    ) -> None:
        super().__init__(len(dataset), share, recipe)
        try:
            transform = _train_transform(recipe, data_config) if recipe else _test_transform(data_config)
            self.dataset = _Reproducible(dataset, transform, recipe.seed if recipe else 0)
            self.dataset[0]  # transforms say what they can't do when they are used
        except RecipeError:
            raise
        except (AssertionError, KeyError, ValueError, TypeError, AttributeError, OSError) as e:
            given = f"auto_augment {recipe.auto_augment!r}, " if recipe else ""
            raise RecipeError(f"data: can't load an image with {given}{data_config}: {type(e).__name__}: {e}") from e
        self.workers = workers

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.share.device
        self.dataset.epoch = epoch
        loader = DataLoader(
            self.dataset,
            batch_sampler=[index.tolist() for index in self.indices(epoch)[start:]],
            num_workers=self.workers,
            collate_fn=fast_collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=_outlive_signals,
        )
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _test_transform(data_config: dict[str, Any]) -> Any:
    names = ("input_size", "interpolation", "crop_pct", "crop_mode")
    return create_transform(**{k: data_config[k] for k in names}, use_prefetcher=True)


def _train_transform(recipe: Recipe, data_config: dict[str, Any]) -> Any:
    size, flip = data_config["input_size"], 0.5 * recipe.hflip
    first, *rest = create_transform(
        size,
        is_training=True,
        hflip=flip,
        color_jitter=None,
        auto_augment=recipe.auto_augment or None,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        use_prefetcher=True,
        separate=True,
    )
    if recipe.crop == "pad":
        _check_padding(recipe, size[1:])
        resize = Resize(size[1:], str_to_interp_mode(data_config["interpolation"]))  # leaves images of that size alone
        first = Compose([resize, RandomCrop(size[1:], padding=recipe.crop_padding), RandomHorizontalFlip(flip)])
    return Compose([first, *rest])


def open_data(recipe: Recipe, data_dir: str = "") -> tuple[Images | Dataset, Images | Dataset, list[str]]:
    """The training and the test split, and the names of their classes.

    Raises:
        RecipeError: as `open_split` and `load_images`; or the splits do not have the same classes.
    """
    train, classes = _open(recipe, recipe.train_split, data_dir)
    test, test_classes = open_test_data(recipe, data_dir)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))[:5]
        raise RecipeError(f"data: training and test split of {recipe.data!r} do not have the same classes: {odd}")
    return train, test, classes


def open_test_data(recipe: Recipe, data_dir: str = "") -> tuple[Images | Dataset, list[str]]:
    """The test split alone, and the names of its classes."""
    return _open(recipe, recipe.test_split, data_dir)


def _open(recipe: Recipe, split: str, data_dir: str) -> tuple[Images | Dataset, list[str]]:
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
