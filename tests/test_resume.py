"""Runs that are stopped, killed or shared by processes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from training import ENVIRONMENT, RICH, SCRIPTS, SHORT, SMALL, THIN, image_folder, log, run, started, wait_for, weights

from timm_iebn.environment import environment
from timm_iebn.recipe import Recipe
from timm_iebn.run_log import read_log
from timm_iebn.training import Trainer, train
from timm_iebn.training.checkpoint import CheckpointError, read_checkpoint

KILLER = """
import os, random, runpy, signal, sys
import timm_iebn.training.checkpoint, timm_iebn.training.trainer
place, after, *sys.argv = sys.argv[1:]
places = dict(evaluation=(timm_iebn.training.trainer, "evaluate"), write=(os, "fsync"), rename=(os, "replace"))
module, name = (places | {"clean-up": (timm_iebn.training.trainer, "clean_up")})[place]
calls, real = 0, getattr(module, name)
def deadly(*args, **kwargs):
    global calls
    calls += 1
    if calls > int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(module, name, deadly)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "place", ["evaluation", *(pytest.param(p, marks=pytest.mark.slow) for p in ("write", "rename"))]
)
def test_killed_at_a_critical_place_it_goes_on_to_the_same_bits(place, uninterrupted, tmp_path):
    folder = tmp_path / "out"
    script = [str(SCRIPTS / "train.py"), "--output", str(folder), "--resume", "--checkpoint-updates", "3", *RICH]
    after = {"evaluation": 1, "write": 6, "rename": 5}[place]
    killed = subprocess.run(
        [sys.executable, "-c", KILLER, place, str(after), *script], env=ENVIRONMENT, capture_output=True, timeout=600
    )
    assert killed.returncode == -signal.SIGKILL and not folder.exists()
    assert list(folder.with_name("out.run").glob("*.safetensors"))
    result = run(*script[1:], cwd=tmp_path)
    assert result.returncode == 0 and "going on from" in result.stdout, result.stderr
    assert weights(folder) == weights(uninterrupted)
    assert [r["train_loss"] for r in log(folder)] == [r["train_loss"] for r in log(uninterrupted)]
    assert [r["lr"] for r in log(folder)] == [r["lr"] for r in log(uninterrupted)]


def test_killed_before_the_clean_up_it_only_cleans_up(tmp_path):
    folder = tmp_path / "out"
    script = [str(SCRIPTS / "train.py"), "--output", str(folder), "--resume", *SHORT, "epochs=1"]
    killed = subprocess.run([sys.executable, "-c", KILLER, "clean-up", "0", *script], env=ENVIRONMENT, timeout=600)
    assert killed.returncode == -signal.SIGKILL and list(folder.with_name("out.run").glob("*.safetensors"))
    before = weights(folder)
    result = run(*script[1:], cwd=tmp_path)
    assert result.returncode == 0 and "top-1" in result.stdout, result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and weights(folder) == before


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_asked_to_stop_it_leaves_a_checkpoint_and_says_how_to_go_on(signum, uninterrupted, tmp_path):
    folder = tmp_path / "out"
    args = ["--output", folder, "--resume", "--checkpoint-updates", "1", *RICH]
    with started(*args) as process:
        wait_for("0*.safetensors", folder.with_name("out.run"), process)
        process.send_signal(signum)
        _, err = process.communicate(timeout=120)
    last = sorted(folder.with_name("out.run").glob("*.safetensors"))[-1]
    assert process.returncode == 128 + signum
    assert f"stopped by {signum.name}; the same command with --output {folder} --resume goes on from {last}" in err
    assert run(*args, cwd=tmp_path).returncode == 0
    assert weights(folder) == weights(uninterrupted)


SLOW_DISK = """
import atexit, os, runpy, sys, time
from pathlib import Path
real = os.fsync
os.fsync = lambda number: (time.sleep(2), real(number))
sys.argv = sys.argv[1:]
work, rank = Path(sys.argv[2] + ".run"), os.environ["RANK"]
atexit.register(lambda: (work.parent / f"{rank}.exit").write_text(" ".join(sorted(p.name for p in work.glob("0*")))))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_processes_asked_to_stop_stop_together_and_go_on(tmp_path):
    """None ends before the checkpoint is whole: a launcher ends all when the first one ends."""
    folder, wrapper = tmp_path / "out", tmp_path / "wrapper.py"
    wrapper.write_text(SLOW_DISK)
    args = ["--output", folder, "--resume", "batch_size=16", "epochs=1", "warmup_epochs=0", SMALL]
    args += ["--checkpoint-updates", "20"]
    work = folder.with_name("out.run")
    with started(SCRIPTS / "train.py", *args, processes=2, script=wrapper) as launched:
        wait_for("0*.safetensors", work, launched)
        launched.send_signal(signal.SIGTERM)
        _, err = launched.communicate(timeout=120)
    *_, checkpoint = sorted(work.glob("*.safetensors"))
    assert (
        err.count(f"stopped by SIGTERM; the same command with --output {folder} --resume goes on from {checkpoint}")
        == 1
    ), err
    assert all(checkpoint.name in (tmp_path / f"{rank}.exit").read_text().split() for rank in range(2))
    state = read_checkpoint(checkpoint)
    assert state["step"] < 1438 // 16 and state["sums"][2] == 16 * state["step"]
    result = run(*args, cwd=tmp_path, processes=2)
    assert result.returncode == 0 and "going on from" in result.stdout, result.stderr
    assert log(folder)[0]["updates"] == str(1438 // 16)


def test_an_unfinished_run_is_neither_overwritten_nor_changed(tmp_path):
    folder = tmp_path / "out"
    args = ["--output", folder, *SHORT, "sched=multistep", "milestones=[1]", "lr=1e30"]
    for _ in range(2):  # there is nothing to lose
        failed = run(*args, cwd=tmp_path)
        assert failed.returncode == 1 and "the loss is not finite at epoch 1, batch" in failed.stderr
        assert "learning rate 1e+30" in failed.stderr and "no checkpoint yet" in failed.stderr
    args += ["warmup_epochs=1", "--checkpoint-updates", "1"]
    assert run(*args, cwd=tmp_path).returncode == 1
    again = run(*args, cwd=tmp_path)
    assert again.returncode == 2 and "out.run holds an unfinished run; --resume goes on" in again.stderr
    changed = run(*args, "seed=1", "--resume", cwd=tmp_path)
    assert changed.returncode == 2 and "seed: 0 became 1" in changed.stderr


def test_a_loss_that_bursts_names_the_last_good_checkpoint(tmp_path):
    folder = tmp_path / "out"
    args = ["--output", folder, "--checkpoint-updates", "1", *SHORT, "sched=multistep", "milestones=[1]", "lr=1e30"]
    result = run(*args, "warmup_epochs=1", cwd=tmp_path)
    assert result.returncode == 1 and "the last good checkpoint is " in result.stderr
    (named,) = [word.rstrip(".") for word in result.stderr.split() if word.rstrip(".").endswith(".safetensors")]
    assert all(t.isfinite().all() for t in read_checkpoint(Path(named))["model"].values())


POISON = """
import os, runpy, sys
from timm_iebn.training import loaders
real = loaders.Loader.epoch
def poisoned(self, *place):
    for i, (images, labels) in enumerate(real(self, *place)):
        yield images * (float("nan") if i == 2 and os.environ["RANK"] == "1" else 1), labels
loaders.Loader.epoch = poisoned
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_loss_that_bursts_in_one_process_ends_all_with_its_batch_and_rate(tmp_path):
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(POISON)
    args = [SCRIPTS / "train.py", "--output", tmp_path / "out", *SHORT, "warmup_epochs=2", "sync_norms=false"]
    result = run(*args, cwd=tmp_path, processes=2, script=wrapper)
    # the warmup begins at a tenth of 0.05 and would be at 0.05 after 14 updates
    rate = f"{0.005 + 0.045 * 2 / 14:.6g}"
    assert result.returncode == 1 and "Connection closed" not in result.stderr
    assert result.stderr.count(f"epoch 1, batch 3, learning rate {rate}; no checkpoint yet") == 2


@pytest.mark.parametrize("option", ["--data-dir", "--mix-data-dir"])
def test_other_data_is_not_gone_on_with(option, tmp_path):
    for name in ("one", "other"):
        image_folder(tmp_path / name, 20, size=32)
    args = ["--data-dir", tmp_path / "one", "--mix-data-dir", tmp_path / "one", "--checkpoint-updates", "1"]
    args += ["data=folder", "batch_size=8", "epochs=50", "mix_data=folder", "mix_images=4"]
    folder = tmp_path / "out"
    with started("--output", folder, *args) as process:
        wait_for("0*.safetensors", folder.with_name("out.run"), process)
    result = run("--output", folder, "--resume", *args, option, tmp_path / "other", cwd=tmp_path)
    assert result.returncode == 2 and f"was trained on other images than these, see {option}" in result.stderr


def test_a_finished_run_is_only_reported(uninterrupted, tmp_path):
    before = weights(uninterrupted)
    result = run("--output", uninterrupted, "--resume", *RICH, cwd=tmp_path)
    assert result.returncode == 0 and "top-1" in result.stdout and weights(uninterrupted) == before
    result = run("--output", uninterrupted, "--resume", *RICH, "seed=5", cwd=tmp_path)
    assert result.returncode == 2 and "started with another recipe (seed: 0 became 5)" in result.stderr


@pytest.mark.parametrize("changes", [dict(opt="lamb"), dict(opt="adafactorbv"), dict(freeze_gates=True)], ids=str)
def test_optimizers_with_a_state_of_their_own_go_on_to_the_same_bits(changes, tmp_path):
    given = dict(model="resnet20_cifar_iebn", model_args=THIN, data="digits", epochs=3, batch_size=700)
    recipe = Recipe(**given, milestones=(), lr=0.001, **changes)
    whole, cut = (Trainer(recipe, tmp_path / name) for name in ("whole", "cut"))
    whole.train_epoch()
    cut.train_epoch()
    cut._save()
    cut.lock.release()
    resumed = Trainer(recipe, tmp_path / "cut", resume=True)
    for trainer in (whole, resumed):
        trainer.epoch, trainer.step = 1, 0
        trainer.train_epoch()
    for key, value in whole.workload.net.state_dict().items():
        assert torch.equal(resumed.workload.net.state_dict()[key], value), key


# ---- several processes


def test_two_processes_train_to_the_weights_of_one(tmp_path):
    """Rounding alone moves a float32 gradient of ResNet-20 by some percent (batch norm's too); test_sync has the
    exact comparison, in float64.
    """
    recipe = ["epochs=1", "warmup_epochs=0", "lr=0.01", "batch_size=700"]
    vectors, rows = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        result = run("--output", folder, *recipe, cwd=tmp_path, processes=processes)
        assert result.returncode == 0, result.stderr
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        vectors.append(torch.nn.utils.parameters_to_vector(model.parameters()))
        (row,) = read_log(folder / "log.csv")
        rows.append(row)
    set_seed(0)
    start = timm.create_model("resnet20_cifar_iebn", num_classes=10, in_chans=1)
    moved = (vectors[0] - torch.nn.utils.parameters_to_vector(start.parameters())).norm()
    assert (vectors[1] - vectors[0]).norm() < 0.02 * moved  # 0.002 as a rule, 0.055 without synchronised norms
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["train_loss"], rel=1e-4)
    assert rows[1]["train_top1"] == pytest.approx(rows[0]["train_top1"], abs=0.2)


KEEP_EVALUATED = """
import os, runpy, sys
from safetensors.torch import save_file
from timm_iebn.training import trainer as train
real = train.evaluate
def keep(model, *args):
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, f"{os.path.dirname(sys.argv[2])}/{os.environ['RANK']}.safetensors")
    return real(model, *args)
train.evaluate = keep
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_norms_that_are_not_synchronised_are_evaluated_and_saved_with_one_statistics(tmp_path):
    folder, wrapper = tmp_path / "out", tmp_path / "wrapper.py"
    wrapper.write_text(KEEP_EVALUATED)
    args = [SCRIPTS / "train.py", "--output", folder, *SHORT, "sync_norms=false"]
    result = run(*args, cwd=tmp_path, processes=2, script=wrapper)
    assert result.returncode == 0, result.stderr
    saved, *ranks = (load_file(p) for p in (folder / "model.safetensors", *sorted(tmp_path.glob("?.safetensors"))))
    assert len(ranks) == 2 and all(torch.equal(rank[k], v) for rank in ranks for k, v in saved.items())


EACH_ITS_OWN = """
import atexit, os, runpy, sys, torch
script, root, *args = sys.argv[1:]
ends = open(f"{root}/{os.environ['RANK']}.ends", "a")
atexit.register(lambda: print("group" if torch.distributed.is_initialized() else "none", file=ends, flush=True))
sys.argv = [script, "--output", f"{root}/{os.environ['RANK']}/out", *args]
runpy.run_path(script, run_name="__main__")
"""


def test_machines_without_a_shared_disk_go_on_together(tmp_path):
    """What the main process finds in its folder holds for all; the others have none, or a stale one."""
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(EACH_ITS_OWN)
    args = [SCRIPTS / "train.py", tmp_path, "--resume", "--checkpoint-updates", "5"]
    args += ["batch_size=16", "epochs=1", "warmup_epochs=0", SMALL]
    with started(*args, processes=2, script=wrapper) as launched:
        wait_for("0*.safetensors", tmp_path / "0" / "out.run", launched)
        launched.send_signal(signal.SIGTERM)
        launched.communicate(timeout=120)
    for _ in range(2):  # goes on, then only reports
        result = run(*args, cwd=tmp_path, processes=2, script=wrapper)
        assert result.returncode == 0, result.stderr
    assert run(*(a for a in args if a != "--resume"), cwd=tmp_path, processes=2, script=wrapper).returncode != 0
    assert log(tmp_path / "0" / "out")[0]["updates"] == str(1438 // 16)
    assert not (tmp_path / "1" / "out").exists()
    # stopped, finished, with nothing to do or refused: a process group still there may abort the interpreter's end
    assert [(tmp_path / f"{rank}.ends").read_text() for rank in range(2)] == ["none\n" * 4] * 2


def test_two_trainers_do_not_write_to_one_folder(tmp_path):
    folder = tmp_path / "out"
    args = ["--output", folder, "--resume", "--checkpoint-updates", "1", "epochs=99"]
    with started(*args) as first:
        wait_for("0*.safetensors", folder.with_name("out.run"), first)
        second = run(*args, cwd=tmp_path)
        assert second.returncode == 2 and f"another process is training in {folder}.run" in second.stderr
        assert first.poll() is None


def test_a_signal_to_the_whole_group_spares_the_workers(tmp_path):
    """As a terminal or a job system sends it: the trainer still leaves its checkpoint."""
    images = image_folder(tmp_path / "images", 40, size=32)
    folder = tmp_path / "out"
    args = ["--output", folder, "--data-dir", images, "--workers", "2", "--checkpoint-updates", "1", "--resume"]
    args += ["data=folder", "loader=timm", "batch_size=8", "epochs=50"]
    with started(*args) as process:
        wait_for("0*.safetensors", folder.with_name("out.run"), process)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM; the same command with --output" in err, (
        err
    )


def test_a_run_that_can_not_go_on_does_not_keep_the_folder_from_the_next(tmp_path):
    recipe = Recipe(model="resnet20_cifar", model_args=THIN, data="digits", epochs=1, milestones=(), batch_size=700)
    trainer = Trainer(recipe, tmp_path / "out", checkpoint_updates=1)
    trainer._save()
    trainer.lock.release()
    (checkpoint,) = (tmp_path / "out.run").glob("*.safetensors")
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:1000])
    with pytest.warns(UserWarning, match="not a whole checkpoint"), pytest.raises(CheckpointError) as error:
        Trainer(recipe, tmp_path / "out", resume=True)
    checkpoint.write_bytes(whole)
    assert train(recipe, tmp_path / "out", resume=True)["epoch"] == 1 and error  # as a notebook keeps the last one


def test_every_environment_that_a_run_was_in_is_told(tmp_path, monkeypatch):
    recipe = Recipe(model="resnet20_cifar", model_args=THIN, data="digits", epochs=1, milestones=(), batch_size=700)
    with monkeypatch.context() as patch:
        patch.setattr("timm_iebn.training.trainer.environment", lambda _: "# another machine\n")
        trainer = Trainer(recipe, tmp_path / "out")
    trainer._save()
    trainer.lock.release()
    train(recipe, tmp_path / "out", resume=True)
    before, _, here = (tmp_path / "out" / "environment.txt").read_text().partition("\n\n")
    assert before == "# another machine" and here == environment(torch.device("cpu"))


def test_a_full_disk_leaves_the_checkpoint_and_no_half_folder(tmp_path, monkeypatch):
    recipe = Recipe(model="resnet20_cifar", model_args=THIN, data="digits", epochs=1, milestones=(), batch_size=700)
    trainer = Trainer(recipe, tmp_path / "out")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("timm_iebn.model_folder.plot_curves", full)
    with pytest.raises(CheckpointError, match="No space left.*the run is done, .*0000002.safetensors is whole"):
        trainer.fit()
    assert [p.name for p in tmp_path.iterdir()] == ["out.run"]
    trainer.lock.release()
    monkeypatch.undo()
    assert train(recipe, tmp_path / "out", resume=True)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
