"""Batches behind one small interface: `Loader.epoch(n)` gives the normalised training or test batches of an epoch.

What a batch holds is a function of the seed, the epoch and its place in it, so that a run can go on in mid-epoch, and
not of the number of workers. Nor does it depend on the number of processes, but for what random erasing fills in.
"""

import hashlib
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import create_transform, resolve_data_config, str_to_interp_mode
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, Resize

from ..messages import describe
from ..recipe import Recipe, RecipeError
from .data import Images, read_image


def seed_everything(*numbers: int) -> None:
    """Seeds Python's, NumPy's and torch's generators with a hash of `numbers`."""
    seed = int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class Share:
    """Which part of each batch this process takes, where it takes it to, and how images are normalised there."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    channels_last: bool = False

    @cached_property
    def _scaling(self) -> tuple[Tensor, Tensor]:
        return tuple(torch.tensor(v, device=self.device).view(-1, 1, 1) * 255 for v in (self.mean, self.std))

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 `images` (N, C, H, W) as the network's float32 input."""
        mean, std = self._scaling
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.float().sub_(mean).div_(std).contiguous(memory_format=layout)


def make_generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A generator for one purpose in one epoch of a run."""
    name = f"{seed} {epoch} {purpose}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:6]))


class Loader:
    """Batches of one process, (B, C, H, W) float32 and (B,) labels, on its device.

    With a `recipe`, training batches: shuffled, augmented, without the last incomplete one. Without, test batches: in
    order, each image in exactly one process's share.
    """

    test_batch = 128  # of one process

    def __init__(self, size: int, share: Share, recipe: Recipe | None) -> None:
        self.size, self.share, self.recipe = size, share, recipe
        self.batch_size = self.test_batch * share.world_size
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
        self.erase = None
        if recipe and recipe.random_erasing:
            self.erase = RandomErasing(recipe.random_erasing, mode="pixel", device=share.device)

    def __len__(self) -> int:
        """Batches in an epoch; of training batches, whole groups between two updates."""
        if not self.recipe:
            return -(-len(range(self.share.rank, self.size, self.share.world_size)) // self.test_batch)
        return self.size // self.recipe.batch_size * self.recipe.grad_accumulation

    def indices(self, epoch: int) -> list[Tensor]:
        """The images of each of this process's batches."""
        order = torch.arange(self.size)
        if self.recipe:
            order = torch.randperm(self.size, generator=make_generator(self.recipe.seed, epoch, "order"))
        order = order[self.share.rank :: self.share.world_size]
        step = self.batch_size // self.share.world_size
        return [order[i * step : (i + 1) * step] for i in range(len(self))]

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `epoch` from number `start` on."""
        share = self.share
        for i, (images, labels) in enumerate(self._batches(epoch, start), start):
            images = share.normalize(images)
            if self.erase:
                seed_everything(self.recipe.seed, epoch, i, share.rank)
                images = self.erase(images)
            yield images, labels

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images and their labels on the device, augmented up to here."""
        raise NotImplementedError


class MemoryLoader(Loader):
    """Batches of a split that is held on the device, augmented there, whole batches at once.

    Worker processes would starve an accelerator at the sizes that it is made for.
    """

    test_batch = 500

    def __init__(self, split: Images, share: Share, recipe: Recipe | None = None) -> None:
        super().__init__(len(split), share, recipe)
        self.images, self.labels = split.images.to(share.device), split.labels.to(share.device)
        if recipe:
            _check_padding(recipe, self.images.shape[2:])

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.share.device
        if self.recipe:
            generator, padding = make_generator(self.recipe.seed, epoch, "augmentation"), self.recipe.crop_padding
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
        image, label = read_image(self.dataset, index)
        seed_everything(self.seed, self.epoch, index)
        return self.transform(image), label


class WorkerError(RuntimeError):
    """A process that loads images has broken off in the middle of a batch, and torch has not said that it died."""


def is_worker_death(e: RuntimeError) -> bool:
    """Whether a process that loads images has died: torch raises that wherever the main process is at the moment."""
    return isinstance(e, WorkerError) or "DataLoader worker (pid" in str(e)  # one that raised has other words


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
            raise RecipeError(f"data: can't load an image with {given}{data_config}: {describe(e)}") from e
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
        try:
            for images, labels in loader:
                yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        except RecipeError as e:
            # the text holds the worker's traceback, and what holds e's own keeps the workers alive
            raise RecipeError(str(e.with_traceback(None)).rpartition("RecipeError: ")[2].strip()) from None
        except (OSError, EOFError) as e:
            if not self.workers or "Caught " in str(e):  # the last is how torch passes on what is raised in a worker
                raise
            time.sleep(1)  # torch hears of most deaths meanwhile, and raises here what it knows
            raise WorkerError(
                f"the DataLoader's worker no longer answers: {describe(e.with_traceback(None))}"
            ) from None


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


def make_loader(
    split: Images | Dataset, share: Share, data_config: dict[str, Any], recipe: Recipe | None = None, workers: int = 0
) -> Loader:
    """The loader for a split of `open_data`; with a `recipe` for training, without for testing."""
    if isinstance(split, Images):
        return MemoryLoader(split, share, recipe)
    return TimmLoader(split, share, data_config, recipe, workers)


def make_share(
    model: nn.Module,
    split: Images | Dataset,
    accelerator: Accelerator | None = None,
    channels_last: bool = True,
    data_config: dict[str, Any] | None = None,
) -> tuple[Share, dict[str, Any]]:
    """This process's share of the data, and the preprocessing for `split`: that of timm's config of `model`, changed by
    `data_config`.

    Raises:
        RecipeError: `data_config` asks for what `split` or `model` can't do.
    """
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in (data_config or {}).items()}
    config = resolve_data_config(model=model) | given
    for key, least in dict(mean=-1e6, std=0).items():
        value = config[key]
        if not isinstance(value, list | tuple) or not all(
            isinstance(v, int | float) and least < v < 1e6 for v in value
        ):
            raise RecipeError(f"data_config: images can't be normalised by the {key} {value!r}")
    channels = 3
    if isinstance(split, Images):
        own = tuple(split.images.shape[1:])
        if given.get("input_size", own) != own:
            raise RecipeError(f"data_config: in memory, images keep their size {list(own)}: use loader: timm")
        channels, config["input_size"], config["crop_pct"] = own[0], own, 1.0
        if channels != len(config["mean"]) and not given.keys() & {"mean", "std"}:
            config |= {k: (sum(config[k]) / len(config[k]),) * channels for k in ("mean", "std")}
    for key, found in dict(
        input_size=config["input_size"][0], mean=len(config["mean"]), std=len(config["std"])
    ).items():
        if found != channels:
            raise RecipeError(f"data_config: {key} {list(config[key])} is not for images of {channels} channels")
    share = Share(tuple(config["mean"]), tuple(config["std"]), channels_last=channels_last)
    if accelerator:
        place = accelerator.process_index, accelerator.num_processes, accelerator.device
        share = replace(share, **dict(zip(("rank", "world_size", "device"), place, strict=True)))
    return share, config


def choose_images(
    split: Images | Dataset, count: int, share: Share, data_config: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """`count` images of `split`, always the same ones, as the network takes them, without augmentation; their labels.

    Raises:
        RecipeError: there are not so many.
    """
    if count > len(split):
        raise RecipeError(f"data: {count} images are asked for, and there are {len(split)}")
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:count]
    if isinstance(split, Images):
        part = replace(split, images=split.images[chosen], labels=split.labels[chosen])
    else:
        part = Subset(split, chosen.tolist())
    images, labels = zip(*make_loader(part, share, data_config).epoch(), strict=True)
    return torch.cat(images), torch.cat(labels)
