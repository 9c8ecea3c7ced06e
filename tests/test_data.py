import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from timm_iebn.data import Batches, Images, _crop_and_flip, load_splits
from timm_iebn.recipe import RecipeError


def numbered(n, size=4):
    """Images whose every pixel is their index, which is their label too."""
    index = torch.arange(n)
    images = index.byte()[:, None, None, None].expand(n, 3, size, size).contiguous()
    return Images(images, index, [str(i) for i in range(n)])


def labels(batches):
    return torch.cat([y for _, y in batches]).tolist()


def test_an_epoch_sees_every_image_once_in_a_new_order():
    batches = Batches(numbered(64), 16, (0,) * 3, (1 / 255,) * 3, train=True)
    first, second = labels(batches), labels(batches)
    assert sorted(first) == sorted(second) == list(range(64)) and first != second


def test_images_stay_with_their_labels():
    batches = Batches(numbered(64), 16, (0,) * 3, (1 / 255,) * 3, train=True, hflip=True)
    for images, y in batches:
        assert torch.equal(images[:, 0, 0, 0].round().long(), y)


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_counts_each_image_once_over_all_ranks(world_size):
    ranks = [Batches(numbered(50), 7, (0,) * 3, (1,) * 3, rank=r, world_size=world_size) for r in range(world_size)]
    assert sorted(sum((labels(r) for r in ranks), [])) == list(range(50))
    assert all(len(list(r)) == len(r) for r in ranks)


def test_ranks_train_on_different_images():
    ranks = [Batches(numbered(64), 8, (0,) * 3, (1,) * 3, train=True, rank=r, world_size=2) for r in range(2)]
    assert sorted(labels(ranks[0]) + labels(ranks[1])) == list(range(64))


def test_the_seed_decides_the_order():
    a, b, c = (labels(Batches(numbered(64), 8, (0,) * 3, (1,) * 3, train=True, seed=s)) for s in (1, 1, 2))
    assert a == b != c


def test_crop_and_flip_gives_every_shift_and_mirror_of_the_padded_image():
    image = torch.arange(1, 28, dtype=torch.uint8).view(1, 3, 3, 3)
    padded = F.pad(image, (1, 1, 1, 1))[0]
    crops = [padded[:, i : i + 3, j : j + 3] for i in range(3) for j in range(3)]
    expected = {tuple(c.flatten().tolist()) for crop in crops for c in (crop, crop.flip(2))}
    out = _crop_and_flip(image.expand(2000, -1, -1, -1), 1, True, torch.Generator().manual_seed(0))
    seen, counts = np.unique(out.reshape(2000, -1).numpy(), axis=0, return_counts=True)
    assert {tuple(row.tolist()) for row in seen} == expected
    assert counts.min() > 2000 / len(expected) / 2


def test_batches_are_normalised():
    split = load_splits("digits")[1]
    images, _ = next(iter(Batches(split, 8, (0.25,), (0.5,), channels_last=True)))
    torch.testing.assert_close(images, (split.images[:8].float() / 255 - 0.25) / 0.5)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_digits_splits_are_disjoint_and_whole():
    train, test = load_splits("digits")
    assert len(train) + len(test) == 1797 and train.images.shape[1:] == (1, 32, 32)
    seen = {row.numpy().tobytes() for row in train.images}
    assert sum(row.numpy().tobytes() in seen for row in test.images) == 0


def test_a_folder_of_parquet_is_read_as_timm_reads_it(tmp_path):
    rng = np.random.default_rng()
    pixels = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(names=["ant", "bee"]))
    for split, rows in (("train", slice(0, 4)), ("test", slice(4, 6))):
        images = [Image.fromarray(p) for p in pixels[rows]]
        data = dict(img=images, fine_label=[i % 2 for i in range(len(images))])
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(data, features=features).to_parquet(tmp_path / "data" / f"{split}-0.parquet")
    train, test = load_splits(f"hfds/{tmp_path}")
    assert torch.equal(train.images, torch.from_numpy(pixels[:4]).permute(0, 3, 1, 2))
    assert len(test) == 2 and train.classes == ["ant", "bee"] and train.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("data", ["cifar100", "torch/cifar100", "hfds/", "hfds//nowhere/at/all"])
def test_unreadable_data_is_named(data):
    with pytest.raises(RecipeError, match="data: .*" + (data.removeprefix("hfds/") or "hfds")):
        load_splits(data)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(RecipeError, match="batch_size: 100 .* 64 training"):
        Batches(numbered(64), 100, (0,) * 3, (1,) * 3, train=True)
