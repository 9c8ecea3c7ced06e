from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from timm_iebn.recipe import Recipe, RecipeError, load_recipe
from timm_iebn.safe_yaml import parse_yaml
from timm_iebn.training.loaders import _train_transform

RECIPES = sorted((Path(__file__).parents[1] / "zoo" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_round_trips(path, tmp_path):
    recipe = load_recipe(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.to_yaml())
    assert load_recipe(copy) == recipe


def test_overrides_win_over_the_file():
    recipe = load_recipe(RECIPES[0], ["lr=2.5e-1", "milestones=[3, 4]", "epochs=7", "weight_decay=1e-4"])
    assert (recipe.lr, recipe.milestones, recipe.epochs, recipe.weight_decay) == (0.25, (3, 4), 7, 1e-4)


def test_numbers_are_read_as_json_and_python_write_them():
    overrides = ['opt_args={"eps": 1e-08, "a": 2.5E3, "b": -.5e+1}', "data_config={mean: [1e-1, 0.1, 1.e-1]}"]
    recipe = load_recipe(RECIPES[0], overrides)
    assert recipe.opt_args == dict(eps=1e-8, a=2500.0, b=-5.0) and recipe.data_config == dict(mean=[0.1] * 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epoch=3", "'epoch'.*'epochs'"),
        ("lr=fast", "lr: expected a number, got 'fast'"),
        ("lr=-1", "lr: must be more than 0, got -1"),
        ("epochs=1.5", "epochs: expected a whole number, got 1.5"),
        ("hflip=1", "hflip: expected true or false, got 1"),
        ("sched=linear", "sched: must be one of .*, got 'linear'"),
        ("precision=fp8", "precision: must be one of .*, got 'fp8'"),
        ("loader=tmm", "loader: must be one of memory, timm, got 'tmm'"),
        ("auto_augment=rand-m9", "auto_augment: 'rand-m9' .* needs loader: timm"),
        ("auto_augment=rand-mfoo", "auto_augment: expected timm's notation, as rand-m9-mstd0.5, got 'rand-mfoo'"),
        ("auto_augment=rand-m9-tnonsense", "auto_augment: expected timm's notation"),
        ("opt_args={lr: 5.0, eps: 1e-8}", "opt_args: lr must be given as keys of the recipe itself"),
        ("auto_augment=randm9", "auto_augment: expected timm's notation"),
        ("epochs=[", r"'epochs=\[': '\[' is not YAML"),
        ("crop=resized", "crop: 'resized' .* needs loader: timm"),
        ("random_erasing=1.5", "random_erasing: must be between 0 and 1, got 1.5"),
        ("lr=.inf", "lr: must be more than 0, got inf"),
        ("mixup=.nan", "mixup: must not be negative, got nan"),
        ("milestones=[4, 3]", r"milestones: expected epochs in order, got \[4, 3\]"),
        ("compile_mode=fast", "compile_mode: must be one of default, reduce-overhead, .*, got 'fast'"),
        ("compile_mode=reduce-overhead", "compile_mode: 'reduce-overhead' is of use with compile: true only"),
        ("grad_accumulation=7", "grad_accumulation: 7 does not divide batch_size 128"),
        ("model_args=[1]", "model_args: expected a mapping, as .*, got"),
        ("seed", "'seed': overrides are written key=value"),
        ("min_lr=0.5", "min_lr: 0.5 is more than lr"),
        ("ema_decay=1", "ema_decay: must be at least 0 and less than 1, got 1"),
        ("data_config={size: 3}", "data_config: unknown key 'size'; known keys: input_size"),
        ("data_config={mean: 0.5}", "data_config: mean must be a list of numbers"),
        ("data_config={std: [0, 1, 1]}", "data_config: std must be a list of numbers above 0"),
        ("data_config={input_size: [32, 32]}", r"input_size is \[channels, height, width\], got \[32, 32\]"),
    ],
)
def test_a_bad_override_is_named(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(RECIPES[0], [override])


def test_cuda_graphs_do_not_accumulate_gradients():
    graphs = ["compile=true", "compile_mode=reduce-overhead"]
    load_recipe(RECIPES[0], graphs)
    with pytest.raises(RecipeError, match="overwrite the gradients that grad_accumulation 2 adds up: use default"):
        load_recipe(RECIPES[0], [*graphs, "grad_accumulation=2"])


GOOD = "model: resnet20_cifar\ndata: digits\n"
LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghijkl"))


@pytest.mark.parametrize(
    "text",
    [
        "- a list",
        "model: resnet20_cifar",
        "{: :",
        b"model: \xff",
        f"{LAUGHS}{GOOD}epochs: *l",
        f"{GOOD}data: folder",
        f"{GOOD}epochs: !!python/object/apply:os.getpid []",
        f"{GOOD}epochs: 0x{'f' * 5000}",
        f"{GOOD}epochs: {'9' * 5000}",
        f"{GOOD}model_args: {'[' * 5000}",
        f"{GOOD}train_split: 2001-13-45",
        f"{GOOD}epochs: 1.5",
        f"{GOOD}epoch: 1",
    ],
    ids=lambda text: repr(text[-30:]),
)
def test_a_bad_file_is_named(text, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["{1: a, '1': b}", "{<<: {a: 1}, a: 2}", "[x, x]"])
def test_what_is_not_twice_in_yaml_is_taken(text):
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text",
    ["rand-m9-t3a", "rand-t3aw-m9-mstd0.5", "rand-m9-n3-mstd0.5-inc1-tweights", "augmix-m5-w4-d2", "original", "3a"],
)
def test_timms_notation_of_augmentation_is_taken(text):
    given = Recipe(model="m", data="folder", loader="timm", epochs=200, auto_augment=text)
    data_config = dict(input_size=(3, 32, 32), interpolation="bilinear", mean=(0.5,) * 3)
    assert _train_transform(given, data_config)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"gone\.yaml"):
        load_recipe(tmp_path / "gone.yaml")


def test_the_defaults_are_the_authors():
    recipe = Recipe(model="resnet164_cifar_iebn", data="hfds/uoft-cs/cifar100")
    assert (recipe.epochs, recipe.milestones, recipe.lr, recipe.weight_decay) == (164, (81, 122), 0.1, 1e-4)


def test_precision_no_is_a_word_and_not_false(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ndata: digits\nprecision: no\n")
    assert load_recipe(path).precision == load_recipe(path, ["precision=no"]).precision == "no"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(epochs=60), "milestones: epoch 122 is not within the 60 epochs"),
        (dict(milestones=(3, 3)), r"milestones: \[3, 3\] names an epoch twice"),
        (dict(seed=-1), "seed: must be between 0 and"),
    ],
)
def test_values_that_could_not_do_what_they_say_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(model="m", data="digits", **changes)
