"""Training, run as a user runs it: scripts in processes of their own."""

import json
import re
import shutil
import subprocess
import weakref
from dataclasses import replace
from importlib.metadata import version
from multiprocessing.resource_sharer import DupFd

import pytest
import safetensors.torch
import timm
import torch
from accelerate.utils import is_compiled_module
from packaging.version import Version
from torch import nn
from training import ENVIRONMENT, SHORT, SMALL, THIN, image_folder, log, run, weights

from timm_iebn.environment import commit_of
from timm_iebn.model_folder import save_weights
from timm_iebn.recipe import Recipe, RecipeError, load_recipe
from timm_iebn.run_log import columns_of, read_log
from timm_iebn.training import Trainer, TrainingError
from timm_iebn.training.data import Images
from timm_iebn.training.evaluate import evaluate, open_network
from timm_iebn.training.loaders import MemoryLoader, Share
from timm_iebn.training.processes import create_accelerator


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = run("epochs=2", "warmup_epochs=0", cwd=folder, fork=False)
    assert result.returncode == 0, result.stderr
    (output,) = (folder / "output").iterdir()  # and no working folder beside it
    return output, result.stdout


def test_the_default_writes_a_complete_model_folder(trained):
    folder, output = trained
    names = "model.safetensors config.json README.md recipe.yaml log.csv curves.png environment.txt"
    assert {p.name for p in folder.iterdir()} == set(names.split())
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.epochs == 2 and [*log(folder)[0]] == columns_of(recipe)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "resnet20_cifar_iebn" and config["label_names"] == [str(i) for i in range(10)]
    assert config["num_classes"] == 10 and "num_classes" not in config["model_args"]  # transformers would pass it twice
    assert "epoch   2/2" in output and output.count(" is ") >= 8
    assert f'"hf-hub:timm-iebn/{folder.name}"' in (folder / "README.md").read_text()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_commit_that_made_a_run_is_found_where_there_is_one(tmp_path):
    def git(*args):
        command = ["git", "-C", tmp_path, "-c", "user.name=me", "-c", "user.email=me@example.org", *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package, other = tmp_path / "package", tmp_path / "other"
    for folder in (package, other):
        folder.mkdir()
        (folder / "code.py").write_text("x = 1")
    assert commit_of(package) == ""
    git("init", "-q")
    git("add", "package")
    git("commit", "-qm", "one")
    assert commit_of(other) == "" and commit_of(package) == f"  # commit {git('log', '-1', '--format=%h')}"
    (package / "code.py").write_text("x = 2")
    assert commit_of(package).endswith(", with changes")


def test_validate_agrees_with_the_log_to_the_last_digit(trained):
    folder, output = trained
    result = run(folder, cwd=folder.parent, script="validate.py", fork=False)
    expected = re.findall(r"test loss .* top-1 [\d.]* %", output)[-1]
    assert expected in result.stdout, result.stdout + result.stderr
    row = read_log(folder / "log.csv")[-1]
    assert float(expected.split()[2]) == pytest.approx(row["test_loss"], abs=6e-5) and row["test_top1"] > 25


def test_validate_takes_any_number_of_processes(trained):
    folder, _ = trained
    one, two = (run(folder, cwd=folder.parent, script="validate.py", processes=n) for n in (1, 2))
    # some versions of torch print something of the processes too
    one, two = ([line for line in r.stdout.splitlines() if "test loss" in line] for r in (one, two))
    assert one == two and len(one) == 1


def test_a_folder_whose_preprocessing_is_none_is_named(trained, tmp_path):
    folder = tmp_path / trained[0].name
    shutil.copytree(trained[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["std"] = ["x"]
    (folder / "config.json").write_text(json.dumps(config))
    result = run(folder, cwd=tmp_path, script="validate.py")
    assert (
        result.returncode == 2 and f"can't use '{folder}'" in result.stderr and "normalised by the std" in result.stderr
    )


def test_an_image_that_is_damaged_is_named_and_ends_the_run(tmp_path):
    """Whoever meets it: the training or the evaluation, at once in memory, late with timm's loader."""
    data, folder = image_folder(tmp_path / "data", 20, size=32), tmp_path / "out"
    args = ["data=folder", "epochs=1", "batch_size=8", "warmup_epochs=0", SMALL, "--data-dir", data]
    assert run("--output", folder, *args, cwd=tmp_path).returncode == 0
    (data / "test" / "ant" / "3.png").write_bytes(b"no picture")
    for loader in ("memory", "timm"):
        result = run(folder, "--data-dir", data, "--loader", loader, cwd=tmp_path, script="validate.py")
        assert result.returncode == 2 and "data: can't read " in result.stderr and "Traceback" not in result.stderr
        result = run("--output", tmp_path / loader, *args, f"loader={loader}", cwd=tmp_path)
        assert result.returncode == dict(memory=2, timm=1)[loader] and "Traceback" not in result.stderr
        last = result.stderr.splitlines()[-1]
        assert (
            "data: can't read " in last and "ant/3.png" in last and ("no checkpoint yet" in last) == (loader == "timm")
        )


def test_validate_takes_either_loader_and_the_classes_of_the_training_only(tmp_path):
    data, folder = image_folder(tmp_path / "data", 20, size=32), tmp_path / "out"
    args = ["data=folder", "epochs=1", "batch_size=8", "warmup_epochs=0", SMALL, "--data-dir", data]
    args += ["loader=timm", "auto_augment=rand-m3"]
    assert run("--output", folder, *args, cwd=tmp_path).returncode == 0
    memory, timms = (
        run(folder, "--data-dir", data, "--loader", name, cwd=tmp_path, script="validate.py")
        for name in ("memory", "timm")
    )
    assert memory.stdout == timms.stdout != "", timms.stderr
    (data / "test" / "bee").rename(data / "test" / "cat")
    other = run(folder, "--data-dir", data, cwd=tmp_path, script="validate.py")
    assert other.returncode == 2 and "knows other classes than 'folder': 'bee' is 'cat' there" in other.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnet20_cifar"], "data: say which data"),
        (
            ["resnet20_cifar_ibn", "--data", "digits"],
            "'resnet20_cifar_ibn' is neither .* did you mean 'resnet20_cifar_iebn'",
        ),
        (["resnet32_cifar", "--data", "digits"], "pretrained"),
        (["{folder}/.."], "has no config.json, so it is no model folder"),
        (["{folder}", "--data", "hfds//nowhere"], "/nowhere"),
    ],
)
def test_validate_says_in_a_line_what_it_lacks(args, message, trained):
    folder, _ = trained
    result = run(*(a.format(folder=folder) for a in args), cwd=folder.parent, script="validate.py")
    assert result.returncode == 2 and re.search(message, result.stderr) and "Traceback" not in result.stderr


def test_fine_tuning_to_other_classes_starts_from_the_weights(trained, tmp_path):
    source, _ = trained
    folder = tmp_path / "out"
    start = [f"model=local-dir:{source}", "pretrained=true", "model_args={}", "lr=1e-9", "weight_decay=0.0"]
    result = run("--output", folder, *SHORT, *start, "epochs=1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    tuned, given = (safetensors.torch.load_file(f / "model.safetensors") for f in (folder, source))
    for name, tensor in tuned.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(tensor, given[name], rtol=0, atol=1e-4)
    assert json.loads((folder / "config.json").read_text())["architecture"] == "resnet20_cifar_iebn"


def test_nothing_is_overwritten(trained):
    folder, _ = trained
    before = weights(folder)
    for args, message in (([], "exists already"), (["--resume", "lr=0.01"], "another recipe (lr: 0.05 became 0.01)")):
        result = run("epochs=2", "warmup_epochs=0", *args, cwd=folder.parents[1])
        assert result.returncode == 2 and f"output/{folder.name}" in result.stderr and message in result.stderr
    assert weights(folder) == before


def test_a_folder_that_is_not_a_runs_is_left_alone(tmp_path):
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "notes.txt").write_text("mine")
    result = run("--output", tmp_path / "out", "--resume", cwd=tmp_path)
    assert result.returncode == 2 and "out.run is not the folder of a run" in result.stderr
    assert [p.name for p in (tmp_path / "out.run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "override",
    [
        "model=resnet20_cifar_ibn",
        "modell=x",
        "batch_size=9999",
        "opt=sdg",
        "opt=adahessian",
        "model_args={drop_rat: 1}",
        "opt_args={betta: 1}",
        "opt_args={eps: 1e-8}",
        "data_config={mean: [0.5, 0.5, 0.5]}",
        "data_config={input_size: [1, 8, 8]}",
        "crop_padding=99",
        "model=vit_tiny_patch16_224",
        "model_args={num_classes: 0}",
    ],
)
def test_a_bad_recipe_ends_with_one_line_and_writes_nothing(override, tmp_path):
    result = run(override, cwd=tmp_path)
    key, value = override.split("=")
    assert result.returncode == 2 and not any(tmp_path.iterdir())
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: ") and key in last and (value in last or "{" in value or key == "modell")


def test_a_file_in_the_place_of_the_work_folder_is_named(tmp_path):
    (tmp_path / "out.run").write_text("mine")
    result = run("--output", tmp_path / "out", cwd=tmp_path)
    assert result.returncode == 2 and "out.run, where the run would work, is a file" in result.stderr
    assert (tmp_path / "out.run").read_text() == "mine" and "Traceback" not in result.stderr


def test_a_tracker_that_is_not_installed_is_named_first(tmp_path):
    result = run("--track", "wandb", "--output", tmp_path / "out", cwd=tmp_path)
    assert result.returncode == 2 and "track: 'wandb' is not installed: pip" in result.stderr
    assert not any(tmp_path.iterdir())


def test_gradient_checkpointing_that_a_network_lacks_is_named(tmp_path):
    result = run("model=dla34", "grad_checkpointing=true", cwd=tmp_path)
    assert result.returncode == 2 and "grad_checkpointing: 'dla34' has none" in result.stderr
    assert not any(tmp_path.iterdir())


def test_gates_that_a_network_lacks_cannot_be_frozen(tmp_path):
    result = run("model=resnet20_cifar", "freeze_gates=true", cwd=tmp_path)
    assert result.returncode == 2 and "freeze_gates: 'resnet20_cifar' has no IEBN" in result.stderr
    assert not any(tmp_path.iterdir())


def test_accelerates_environment_does_not_change_the_recipe(tmp_path):
    environment = ENVIRONMENT | dict(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2")
    result = run("grad_accumulation=4", cwd=tmp_path, env=environment)
    assert result.returncode == 2 and "grad_accumulation: the environment of accelerate says 2" in result.stderr


@pytest.mark.skipif(Version(version("accelerate")) < Version("1.15"), reason="older ones let these processes join")
@pytest.mark.parametrize(
    "script", [["train.py"], ["validate.py", "resnet50_iebn", "--data", "digits"]], ids=lambda s: s[0]
)
def test_processes_that_do_not_know_of_each_other_are_refused(script, tmp_path):
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "ACCELERATE_USE_CPU"} | dict(CUDA_VISIBLE_DEVICES="")
    name, *args = script
    result = run(*args, cwd=tmp_path, script=name, processes=2, env=environment)
    assert result.returncode != 0 and "2 processes were launched for one: set ACCELERATE_USE_CPU=true" in result.stderr
    assert not any(tmp_path.iterdir())


def test_a_second_run_of_a_process_cannot_change_its_precision(tmp_path):
    recipe = Recipe(model="resnet20_cifar", data="digits")
    Trainer(recipe, tmp_path / "a")
    with pytest.raises(RecipeError, match="accelerate: .*mixed_precision"):
        Trainer(replace(recipe, precision="bf16"), tmp_path / "b")
    assert not (tmp_path / "b.run").exists()


# ---- what a recipe can ask for


def test_averaged_weights_are_what_is_saved_and_evaluated(uninterrupted):
    result = run(uninterrupted, cwd=uninterrupted.parent, script="validate.py")
    loss = re.search(r"test loss ([\d.]*) ", result.stdout)[1]
    assert float(loss) == pytest.approx(read_log(uninterrupted / "log.csv")[-1]["test_loss"], abs=6e-5)


@pytest.mark.parametrize(
    "wanted",
    [
        ["precision=bf16", "epochs=1", "clip_grad=1.0", "label_smoothing=0.1", "cutmix=1.0"],
        ["grad_accumulation=4", "opt=sgd", "sched=cosine", "warmup_epochs=1", "min_lr=0.001"],
        [
            "grad_checkpointing=true",
            f"model_args={THIN | dict(drop_path_rate=0.1)}",
            "channels_last=false",
            "decay_norms=false",
        ],
        ["compile=true", "compile_mode=reduce-overhead", "epochs=1"],
    ],
    ids=" ".join,
)
def test_what_a_recipe_asks_for_trains_and_loads(wanted, tmp_path):
    folder = tmp_path / "out"
    result = run("--output", folder, "--track", "tensorboard", *SHORT, *wanted, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = read_log(folder / "log.csv")
    assert all(row["train_loss"] < 3 for row in rows)
    model, batches, _ = open_network(str(folder), create_accelerator())
    assert rows[-1]["test_loss"] == pytest.approx(evaluate(model, batches)["test_loss"], rel=2e-5)
    assert list(folder.with_name("out.run").rglob("events.out.tfevents.*"))


def test_the_parts_of_an_accumulated_batch_add_up_to_it(tmp_path):
    """In a network without batch statistics, or each part would have its own."""
    recipe = Recipe(model="test_vit", data="digits", epochs=2, batch_size=400, milestones=(), lr=0.01, opt="sgd")
    recipe = replace(recipe, model_args=dict(img_size=32))
    moves = []
    for n in (1, 4):
        trainer = Trainer(replace(recipe, grad_accumulation=n), tmp_path / str(n))
        start = nn.utils.parameters_to_vector(trainer.workload.net.parameters()).detach()
        trainer.train_epoch()
        assert trainer.updates == 3 and trainer.step == 3 * n
        moves.append(nn.utils.parameters_to_vector(trainer.workload.net.parameters()).detach() - start)
    assert (moves[1] - moves[0]).norm() < 1e-3 * moves[0].norm() > 0


def test_loss_and_accuracies_are_those_of_the_logits():
    logits, y = torch.randn(700, 9), torch.randint(9, (700,))
    pixels = torch.arange(700)[:, None] // torch.tensor([256, 1]) % 256  # of an image, which is its number
    split = Images(pixels.byte().view(700, 1, 1, 2), y, list("abcdefghi"))

    class Known(nn.Module):
        def forward(self, images):
            return logits[(images.flatten(1).round() @ torch.tensor([256.0, 1.0])).long()]

    row = evaluate(Known(), MemoryLoader(split, Share((0.0,), (1 / 255,))))
    better = (logits > logits[torch.arange(700), y][:, None]).sum(1)  # than the right class
    loss = (logits.exp().sum(1).log() - logits[torch.arange(700), y]).mean().item()
    assert row["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert row["test_top1"] == pytest.approx(100 * (better < 1).float().mean().item())
    assert row["test_top5"] == pytest.approx(100 * (better < 5).float().mean().item())


def test_evaluation_is_in_full_float32():
    class Seen(nn.Module):
        def forward(self, images):
            flags.append(torch.backends.cudnn.allow_tf32)
            return images.flatten(1)

    flags, before = [], torch.backends.cudnn.allow_tf32
    split = Images(torch.randint(0, 256, (6, 1, 2, 2), dtype=torch.uint8), torch.zeros(6).long(), list("abcd"))
    evaluate(Seen(), MemoryLoader(split, Share((0.5,), (0.5,))))
    assert flags == [False] and torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("epoch,loss\n1,0.5\n2\n", "line 3, .*1 values for 2 columns"),
        ("epoch,loss\n1,0.5,7\n", "line 2, .*3 values for 2 columns"),
        ("epoch,loss\n1,high\n", "line 2, .*'high'"),
        ("epoch,epoch\n1,1\n", "line 1, .*a column stands twice"),
        ('epoch,loss\n1,"0.5\n', "line 2, .*unexpected end"),
        ("epoch,loss\n1,\x000\n", "line 2, "),
        (b"epoch,loss\n\xff,0\n", "line "),
    ],
)
def test_a_damaged_log_is_named_with_its_line(text, reason, tmp_path):
    (tmp_path / "log.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"log.csv, {reason}"):
        read_log(tmp_path / "log.csv")


def test_channels_last_weights_save_and_load(tmp_path):
    model = timm.create_model("resnet20_cifar_iebn").to(memory_format=torch.channels_last)
    save_weights(model, tmp_path / "model.safetensors")
    for name, tensor in safetensors.torch.load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_the_learning_rate_falls_with_the_first_batch_of_its_epoch(tmp_path):
    recipe = Recipe(model="resnet20_cifar", data="digits", epochs=4, batch_size=700, milestones=(1, 3), lr=0.5)
    trainer = Trainer(recipe, tmp_path / "out")
    rates = []
    for update in range(4 * trainer.workload.updates_per_epoch):
        trainer.workload.scheduler.step_update(update)
        rates.append(round(trainer.workload.optimizer.param_groups[0]["lr"], 9))
    assert rates == [0.5] * 2 + [0.05] * 4 + [0.005] * 2


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise RuntimeError("a bug of the data set's own")


def test_an_error_in_a_worker_is_not_called_its_death(tmp_path, monkeypatch):
    trainer = Trainer(Recipe(model="resnet20_cifar", data="digits"), tmp_path / "out")
    loader = torch.utils.data.DataLoader(Broken(), num_workers=1)
    monkeypatch.setattr(trainer, "_run_epochs", lambda: next(iter(loader)))
    with pytest.raises(RuntimeError, match="a bug of the data set's own") as error:
        trainer.fit()
    assert not isinstance(error.value, TrainingError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm's data sets leave files open
@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), OSError("got end of file")])
def test_a_worker_that_breaks_off_in_a_batch_has_died(tmp_path, monkeypatch, error):
    data = image_folder(tmp_path / "data", 20, size=32)
    recipe = Recipe(model="resnet20_cifar", data="folder", loader="timm", batch_size=8)
    trainer = Trainer(recipe, tmp_path / "out", data_dir=str(data), workers=1)

    def detach(_):  # a worker's memory, which is taken over from it
        raise error

    monkeypatch.setattr(DupFd, "detach", detach)
    with pytest.raises(TrainingError, match=f"has died .*{type(error).__name__}"):
        trainer.fit()


def test_each_run_of_a_process_is_compiled_as_its_recipe_says(tmp_path):
    modes = dict(compile=True, compile_mode="reduce-overhead"), dict(compile=True), {}
    for i, (asked, expected) in enumerate(zip(modes, ("reduce-overhead", "default", None), strict=True)):
        trainer = Trainer(Recipe(model="resnet20_cifar", data="digits", **asked), tmp_path / f"out{i}")
        assert is_compiled_module(trainer.workload.model) == bool(expected)
        assert trainer.accelerator.state.dynamo_plugin.mode == (expected or "default")


@pytest.mark.parametrize("compile", [False, True])
def test_nothing_holds_the_wrapped_network_when_the_process_group_ends(tmp_path, compile):
    trainer = Trainer(Recipe(model="resnet20_cifar", data="digits", compile=compile), tmp_path / "out")
    wrapped = weakref.ref(trainer.workload.model)
    trainer.workload.release()
    assert wrapped() is None


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = Trainer(Recipe(model="resnet20_cifar", data="digits"), tmp_path / "out")
    with torch.no_grad():
        trainer.workload.net.conv1.weight[0] = float("nan")
    with pytest.raises(TrainingError, match="weights are not finite.*no checkpoint yet"):
        trainer._save()
    assert not list((tmp_path / "out.run").glob("*.safetensors"))
