"""Small-image data sets, held in memory as uint8, and batches of them, augmented on whole batches.

A loader with worker processes would starve an accelerator at these sizes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .recipe import RecipeError


@dataclass(frozen=True)
class Images:
    """A split: images (N, C, H, W) uint8, labels (N,) int64, and the names of all classes."""

    images: Tensor
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)


def load_splits(data: str) -> tuple[Images, Images]:
    """The training and test split of `data`, which is 'digits' or hfds/NAME as in timm.

    Raises:
        RecipeError: the name is of another form, or its data can't be read.
    """
    if data == "digits":
        return _load_digits()
    kind, _, name = data.partition("/")
    if kind != "hfds" or not name:
        raise RecipeError(f"data: expected 'digits' or 'hfds/NAME', got {data!r}")
    return _load_hfds(name)


def _load_digits() -> tuple[Images, Images]:
    """scikit-learn's bundled 8x8 digits, enlarged to 32x32; a fixed random fifth is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False).round().byte()
    labels = torch.from_numpy(digits.target).long()
    classes = [str(name) for name in digits.target_names]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([len(order) // 5])
    return tuple(Images(images[part], labels[part], classes) for part in (train, test))


def _load_hfds(name: str) -> tuple[Images, Images]:
    """A `datasets` data set with splits train and test and columns for image and (fine) label."""
    import datasets

    try:
        found = datasets.load_dataset(name)
    except (OSError, ValueError) as e:
        raise RecipeError(f"data: can't load the data set {name!r}: {e}") from e
    if missing := {"train", "test"} - set(found):
        raise RecipeError(f"data: {name!r} has no split {' or '.join(sorted(missing))}, but {', '.join(found)}")
    return tuple(_to_images(name, found[split]) for split in ("train", "test"))


def _to_images(name: str, split: "datasets.Dataset") -> Images:  # noqa: F821
    columns = [next((c for c in options if c in split.features), None) for options in (_IMAGE, _LABEL)]
    if None in columns:
        raise RecipeError(f"data: {name!r} needs one of the columns {_IMAGE} and {_LABEL}, has {list(split.features)}")
    image, label = columns
    arrays = [np.asarray(picture.convert("RGB")) for picture in split[image]]
    if len(shapes := {array.shape for array in arrays}) != 1:
        raise RecipeError(f"data: the images of {name!r} have {len(shapes)} different sizes; all must be the same")
    labels = torch.tensor(split[label])
    names = getattr(split.features[label], "names", None) or [str(i) for i in range(int(labels.max()) + 1)]
    return Images(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), labels, list(names))


_IMAGE, _LABEL = ("img", "image"), ("fine_label", "label")


def _crop_and_flip(images: Tensor, padding: int, hflip: bool, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to `padding` pixels, zeros moving in, and mirrored with probability 1/2."""
    n, _, h, w = images.shape
    if padding:
        top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
        rows, columns = top + torch.arange(h), left + torch.arange(w)
        padded = F.pad(images, (padding,) * 4)
        # advanced indices around a slice put the batch and image axes first
        images = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if hflip:
        mirrored = torch.rand(n, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


class Batches:
    """Normalised batches of one rank, (B, C, H, W) float32 and (B,) labels; iterating again starts the next epoch.

    Training batches are shuffled and augmented by a generator of `seed`, epoch and rank, and drop the rest of the
    last incomplete batch. Test batches are in order, and every image is in exactly one rank's share.
    """

    def __init__(
        self,
        split: Images,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        train: bool = False,
        crop_padding: int = 0,
        hflip: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> None:
        if train and batch_size * world_size > len(split):
            raise RecipeError(f"batch_size: {batch_size * world_size} is more than the {len(split)} training images")
        self.split, self.batch_size, self.train = split, batch_size, train
        self.crop_padding, self.hflip, self.seed = crop_padding, hflip, seed
        self.rank, self.world_size, self.device = rank, world_size, device
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) * 255 for v in (mean, std))
        self.epoch = 0

    def __len__(self) -> int:
        if self.train:
            return len(self.split) // (self.batch_size * self.world_size)
        share = len(range(self.rank, len(self.split), self.world_size))
        return -(-share // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.split))
        generator = torch.Generator()
        if self.train:
            order = torch.randperm(len(order), generator=generator.manual_seed(self.seed * 1_000_003 + self.epoch))
            generator.manual_seed((self.seed * 1_000_003 + self.epoch) * 1_009 + self.rank + 1)
            self.epoch += 1
        order = order[self.rank :: self.world_size]
        for i in range(len(self)):
            index = order[i * self.batch_size : (i + 1) * self.batch_size]
            images = self.split.images[index]
            if self.train:
                images = _crop_and_flip(images, self.crop_padding, self.hflip, generator)
            images = images.to(self.device).float().sub_(self.mean).div_(self.std)
            yield images.contiguous(memory_format=self.layout), self.split.labels[index].to(self.device)
