import multiprocessing
import random
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F
from training import hub_split, image_folder

from timm_iebn.recipe import Recipe, RecipeError
from timm_iebn.training.data import Images, load_images, open_data
from timm_iebn.training.loaders import MemoryLoader, Share, TimmLoader, crop_and_flip, make_loader, make_share

# timm's reader of image folders leaves closing to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

PLAIN = Share((0.0,) * 3, (1 / 255,) * 3)  # batches hold the pixels' own values


def recipe(**changes):
    return Recipe(**dict(model="resnet20_cifar", data="digits", batch_size=16, crop_padding=0, hflip=False) | changes)


def numbered(n, size=4):
    """Images whose every pixel is their index, which is their label too."""
    index = torch.arange(n)
    images = index.byte()[:, None, None, None].expand(n, 3, size, size).contiguous()
    return Images(images, index, [str(i) for i in range(n)])


def share(rank, world_size):
    return Share(PLAIN.mean, PLAIN.std, rank, world_size)


def labels(batches):
    return torch.cat([y for _, y in batches]).tolist()


class AsDataset(torch.utils.data.Dataset):
    """`Images` as timm's data sets give them: a PIL image and a label for each index."""

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        return Image.fromarray(self.split.images[i].permute(1, 2, 0).numpy()), int(self.split.labels[i])


def data_config(size):
    return dict(input_size=(3, size, size), interpolation="bilinear", crop_pct=1.0, crop_mode="center", mean=PLAIN.mean)


def loader_of(kind, split, recipe=None, share=PLAIN, workers=0):
    if kind == "memory":
        return MemoryLoader(split, share, recipe)
    return TimmLoader(AsDataset(split), share, data_config(split.images.shape[2]), recipe, workers)


@pytest.fixture(params=["memory", "timm"])
def kind(request):
    return request.param


def test_an_epoch_sees_every_image_once_in_a_new_order(kind):
    loader = loader_of(kind, numbered(64), recipe(loader=kind))
    first, second = labels(loader.epoch(0)), labels(loader.epoch(1))
    assert sorted(first) == sorted(second) == list(range(64)) and first != second
    assert labels(loader.epoch(0)) == first


def test_images_stay_with_their_labels(kind):
    for images, y in loader_of(kind, numbered(64), recipe(loader=kind, hflip=True)).epoch():
        assert torch.equal(images[:, 0, 0, 0].round().long(), y)


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_counts_each_image_once_over_all_ranks(world_size, kind, monkeypatch):
    for loader in (MemoryLoader, TimmLoader):
        monkeypatch.setattr(loader, "test_batch", 7, raising=False)
    ranks = [loader_of(kind, numbered(50), share=share(r, world_size)) for r in range(world_size)]
    assert sorted(sum((labels(r.epoch()) for r in ranks), [])) == list(range(50))
    assert all(len(list(r.epoch())) == len(r) for r in ranks)


def test_the_batches_of_all_ranks_are_those_of_one_process(kind):
    given = recipe(loader=kind, crop_padding=1, hflip=True)
    split = Images(torch.randint(0, 256, (64, 3, 5, 5), dtype=torch.uint8), torch.arange(64), ["a"] * 64)
    one = loader_of(kind, split, given)
    two = [loader_of(kind, split, given, share(rank, 2)) for rank in range(2)]
    for (whole, y), (a, y_a), (b, y_b) in zip(one.epoch(3), *(rank.epoch(3) for rank in two), strict=True):
        assert torch.equal(whole[::2], a) and torch.equal(whole[1::2], b)
        assert torch.equal(y[::2], y_a) and torch.equal(y[1::2], y_b)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_in_its_middle_with_the_very_same_batches(kind, workers):
    given = recipe(loader=kind, crop_padding=1, hflip=True, random_erasing=0.5)
    split = Images(torch.randint(0, 256, (64, 3, 12, 12), dtype=torch.uint8), torch.arange(64), ["a"] * 64)
    whole = [images.clone() for images, _ in loader_of(kind, split, given).epoch(2)]
    rest = list(loader_of(kind, split, given, workers=workers).epoch(2, start=2))
    assert len(rest) == 2 and all(torch.equal(a, b) for a, (b, _) in zip(whole[2:], rest, strict=True))


def by_label(batches):
    """The images of an epoch in the order of their labels, which are all different."""
    images, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images[y.argsort()]


def random_split(size=12):
    return Images(torch.randint(0, 256, (64, 3, size, size), dtype=torch.uint8), torch.arange(64), ["a"] * 64)


def share_changed(a, b):
    return (a != b).flatten(1).any(1).float().mean().item()


def test_each_epoch_augments_anew(kind):
    split = random_split()
    plain = by_label(loader_of(kind, split, recipe(loader=kind)).epoch(0))
    assert torch.equal(plain, by_label(loader_of(kind, split, recipe(loader=kind)).epoch(1)))
    loader = loader_of(kind, split, recipe(loader=kind, crop_padding=2, hflip=True))
    epochs = [by_label(loader.epoch(epoch)) for epoch in range(2)]
    # 50 outcomes, one of which is the image itself
    assert share_changed(*epochs) > 0.7 and share_changed(epochs[0], plain) > 0.7


def test_random_erasing_and_auto_augment_change_images(kind):
    split = random_split()
    plain = by_label(loader_of(kind, split, recipe(loader=kind)).epoch())
    loader = loader_of(kind, split, recipe(loader=kind, random_erasing=1.0))
    erased = [by_label(loader.epoch(epoch)) for epoch in range(2)]
    assert share_changed(erased[0], plain) == share_changed(*erased) == 1
    assert 0 < (erased[0] == plain).float().mean() < 1  # a part of each image
    if kind == "timm":
        augmented = loader_of(kind, split, recipe(loader=kind, auto_augment="rand-m9-n3"))
        assert share_changed(by_label(augmented.epoch()), plain) > 0.7


def test_the_preprocessing_is_the_models_changed_by_the_recipe():
    net, split = timm.create_model("resnet20_cifar"), random_split(size=32)
    share, config = make_share(net, split)
    assert share.mean == net.default_cfg["mean"] and share.std == net.default_cfg["std"]
    share, config = make_share(net, split, data_config=dict(mean=[0.4] * 3, std=[0.2] * 3))
    assert share.mean == config["mean"] == (0.4,) * 3 and share.std == (0.2,) * 3
    images = torch.cat([images for images, _ in make_loader(split, share, config).epoch()])
    torch.testing.assert_close(images, (split.images.float() / 255 - 0.4) / 0.2)


def test_the_seed_decides_the_order(kind):
    a, b, c = (labels(loader_of(kind, numbered(64), recipe(loader=kind, seed=s)).epoch()) for s in (1, 1, 2))
    assert a == b != c


def test_crop_and_flip_gives_every_shift_and_mirror_of_the_padded_image():
    image = torch.arange(1, 28, dtype=torch.uint8).view(1, 3, 3, 3)
    padded = F.pad(image, (1, 1, 1, 1))[0]
    crops = {(i, j): padded[:, i : i + 3, j : j + 3] for i in range(3) for j in range(3)}
    for (i, j), crop in crops.items():
        shifts = torch.tensor([[i, i], [j, j]])
        out = crop_and_flip(image.expand(2, -1, -1, -1), 1, shifts, torch.tensor([False, True]))
        assert torch.equal(out[0], crop) and torch.equal(out[1], crop.flip(2))


def test_both_loaders_draw_from_the_same_distribution():
    """Every shift and mirror of a 3x3 image padded by 1: 18 outcomes of the same frequency, in both."""
    image = torch.arange(1, 28, dtype=torch.uint8).view(1, 3, 3, 3)
    split = Images(image.expand(1800, -1, -1, -1), torch.zeros(1800, dtype=torch.long), ["a"])
    counts = []
    seed = random.randrange(2**31)
    for kind in ("memory", "timm"):
        given = recipe(loader=kind, crop_padding=1, hflip=True, batch_size=600, seed=seed)
        drawn = torch.cat([images for e in range(2) for images, _ in loader_of(kind, split, given).epoch(e)])
        outcomes, count = np.unique(drawn.round().byte().reshape(len(drawn), -1).numpy(), axis=0, return_counts=True)
        counts.append(dict(zip((row.tobytes() for row in outcomes), count, strict=True)))
    memory, timm = counts
    assert memory.keys() == timm.keys() and len(memory) == 18
    expected = 3600 / 18
    for found in counts:  # chi-squared with 17 degrees of freedom: above 51 once in 30,000
        assert sum((count - expected) ** 2 / expected for count in found.values()) < 51


def test_both_loaders_give_the_same_test_batches():
    split = Images(torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8), torch.arange(30), ["a"] * 30)
    for (a, y_a), (b, y_b) in zip(*(loader_of(kind, split).epoch() for kind in ("memory", "timm")), strict=True):
        assert torch.equal(a, b) and torch.equal(y_a, y_b)


def test_batches_are_normalised_and_laid_out():
    split = load_images(recipe(), "test")
    images, _ = next(MemoryLoader(split, Share((0.25,), (0.5,), channels_last=True)).epoch())
    torch.testing.assert_close(images, (split.images[: len(images)].float() / 255 - 0.25) / 0.5)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_digits_splits_are_disjoint_and_whole():
    train, test, classes = open_data(recipe())
    assert len(train) + len(test) == 1797 and train.images.shape[1:] == (1, 32, 32) and len(classes) == 10
    seen = {row.numpy().tobytes() for row in train.images}
    assert sum(row.numpy().tobytes() in seen for row in test.images) == 0


@pytest.fixture
def pictures(tmp_path):
    """The same pictures of two classes as parquet of the Hub's form and as timm's image folders."""
    pixels = np.random.randint(256, size=(6, 8, 8, 3), dtype=np.uint8)
    names = ["ant", "bee"]
    for split, rows in (("train", range(4)), ("test", range(4, 6))):
        hub_split(tmp_path / "hub", split, pixels[rows], [i % 2 for i in rows], names)
        for i in rows:
            folder = tmp_path / "folders" / split / names[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(folder / f"{i}.png")
    return tmp_path, torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.mark.parametrize("form", ["hfds/{hub}", "hfds/x/y in {hub}", "folder in {folders}"])
def test_data_of_the_hub_and_of_folders_is_read_as_timm_reads_it(form, pictures):
    root, pixels = pictures
    data, _, data_dir = form.format(hub=root / "hub", folders=root / "folders").partition(" in ")
    train, test, classes = open_data(recipe(data=data), data_dir)
    order = torch.argsort(train.labels, stable=True)
    assert torch.equal(train.images[order], pixels[[0, 2, 1, 3]]) and train.labels[order].tolist() == [0, 0, 1, 1]
    assert len(test) == 2 and classes == ["ant", "bee"]
    train, test, classes = open_data(recipe(data=data, loader="timm"), data_dir)
    assert len(train) == 4 and len(test) == 2 and classes == ["ant", "bee"]


def test_large_images_go_through_timms_augmentations(pictures):
    root, _ = pictures
    given = recipe(data="folder", loader="timm", crop="resized", auto_augment="rand-m9-mstd0.5", batch_size=4)
    train, _, _ = open_data(given, str(root / "folders"))
    loader = TimmLoader(train, PLAIN, data_config(32), given, workers=1)
    ((images, y),) = loader.epoch()
    assert images.shape == (4, 3, 32, 32) and sorted(y.tolist()) == [0, 0, 1, 1]


def test_shifted_crops_of_images_of_any_size_are_of_the_networks(pictures):
    root, _ = pictures
    Image.new("RGB", (90, 70)).save(root / "folders" / "train" / "bee" / "9.png")
    given = recipe(data="folder", loader="timm", crop="pad", batch_size=5)
    train, _, _ = open_data(given, str(root / "folders"))
    ((images, _),) = TimmLoader(train, PLAIN, data_config(32), given).epoch()
    assert images.shape == (5, 3, 32, 32)


@pytest.mark.parametrize("changes", [dict(auto_augment="rnd-m9"), dict(crop="pad", crop_padding=32)], ids=str)
def test_transforms_that_cannot_work_are_named_before_a_run(changes, pictures):
    root, _ = pictures
    given = recipe(**dict(data="folder", loader="timm", crop="resized", batch_size=4) | changes)
    train, _, _ = open_data(given, str(root / "folders"))
    with pytest.raises(RecipeError, match="auto_augment 'rnd-m9'|crop_padding: 32 is too much for images of 32x32"):
        TimmLoader(train, PLAIN, data_config(32), given)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_ends_the_run_and_its_workers(workers, tmp_path):
    image_folder(tmp_path)
    (tmp_path / "train" / "bee" / "1.png").write_bytes(b"no picture")
    given = recipe(data="folder", loader="timm", batch_size=4)
    train, _, _ = open_data(given, str(tmp_path))
    loader = TimmLoader(train, PLAIN, data_config(8), given, workers)
    with pytest.raises(RecipeError, match="^data: can't read .*bee/1.png: RuntimeError: Failed to .*$") as caught:
        list(loader.epoch())
    assert caught.value  # as long as it is held, its frames are
    assert not multiprocessing.active_children()
    with pytest.raises(RecipeError, match="^data: can't read .*bee/1.png"):
        open_data(recipe(data="folder"), str(tmp_path))  # into memory


def test_images_of_several_sizes_ask_for_the_other_loader(pictures):
    root, _ = pictures
    Image.new("RGB", (9, 8)).save(root / "folders" / "train" / "bee" / "9.png")
    with pytest.raises(RecipeError, match="loader: .* 8x8 and 8x9.* use 'timm'"):
        open_data(recipe(data="folder"), str(root / "folders"))


def test_splits_of_other_classes_are_refused(pictures):
    root, _ = pictures
    (root / "folders" / "test" / "bee").rename(root / "folders" / "test" / "cat")
    with pytest.raises(RecipeError, match="do not have the same classes.*bee.*cat"):
        open_data(recipe(data="folder"), str(root / "folders"))


@pytest.mark.parametrize(
    ("data", "data_dir"),
    [("cifar100", ""), ("hfds/", ""), ("hfds//nowhere/at/all", ""), ("hfds/x/y", "/nowhere"), ("folder", "")]
    + [("torch/cifar100", "/nowhere"), ("torch/nothing", "/tmp"), ("folder", "/nowhere/{split}.tar")],
)
def test_unreadable_data_is_named(data, data_dir):
    with pytest.raises(RecipeError, match="data: .*" + (data_dir.format(split="train") or data.removeprefix("hfds/"))):
        open_data(recipe(data=data), data_dir)


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        (dict(batch_size=100), 1, "batch_size: 100 .* 64 training"),
        (dict(batch_size=16), 3, "batch_size: 16 can't be shared by 3"),
        (dict(batch_size=12, grad_accumulation=4, mixup=0.2), 1, "batch_size: mixup and cutmix pair images; 3 is odd"),
    ],
)
def test_an_impossible_batch_size_is_refused(changes, ranks, message):
    with pytest.raises(RecipeError, match=message):
        MemoryLoader(numbered(64), share(0, ranks), recipe(**changes))


def test_a_folder_without_the_split_is_not_taken_for_it(tmp_path):
    (image_folder(tmp_path) / "test").rename(tmp_path / "val")
    with pytest.raises(RecipeError, match=r"no folder 'test' in .*\['train', 'val'\].*test_split"):
        open_data(recipe(data="folder"), str(tmp_path))
    train, test, classes = open_data(recipe(data="folder", test_split="val"), str(tmp_path))
    assert (len(train), len(test), classes) == (4, 4, ["ant", "bee"])


@pytest.mark.parametrize("loader", ["memory", "timm"])
def test_tars_have_the_class_names_of_their_folders(tmp_path, loader):
    image_folder(tmp_path)
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(tmp_path / split, ".")
    train, test, classes = open_data(recipe(data="folder", loader=loader), str(tmp_path / "{split}.tar"))
    assert (len(train), len(test), classes) == (4, 4, ["ant", "bee"])
    with pytest.raises(RecipeError, match="no folder 'train'"):
        open_data(recipe(data="folder", loader=loader), str(tmp_path / "train.tar"))


def test_a_misspelt_split_of_torchvision_is_not_taken_for_the_test_split(tmp_path):
    with pytest.raises(RecipeError, match="'torch/mnist' has no split 'trian'"):
        open_data(recipe(data="torch/mnist", train_split="trian"), str(tmp_path))
