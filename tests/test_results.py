"""What is written about the zoo, and the script that trains all of it."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_config
from filelock import FileLock
from training import SMALL, wait_for

from timm_iebn.recipe import Recipe, load_recipe
from timm_iebn.results import (
    compare,
    costs_table,
    mean_and_spread,
    paired_difference,
    plot_results,
    results_table,
    short_table,
)
from timm_iebn.run_log import read_log
from timm_iebn.zoo import COSTS, Cost, read_costs, read_zoo

ROOT = Path(__file__).parents[1]


def add_run(zoo, name, top1, architecture=None, **recipe):
    recipe = Recipe(**dict(model="resnet164_cifar", data="hfds/uoft-cs/cifar100") | recipe)
    folder = zoo / f"{architecture or recipe.model}.{name}"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    training = dict(test_top1=top1, epochs=recipe.epochs, seed=recipe.seed, pretrained=recipe.pretrained)
    write_config(folder, architecture or recipe.model, **training)


def write_costs(zoo, *rows):
    rows = [f"{row},2.14.1,2026-11-28" for row in rows]
    (zoo / COSTS).write_text("\n".join((",".join(Cost._fields), *rows)) + "\n")


def table_of(zoo):
    return results_table(compare(read_zoo(zoo)), read_costs(zoo / COSTS))


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_runs_that_differ_in_norm_and_seed_are_compared(tmp_path):
    add_run(tmp_path, "a", 70.0)
    add_run(tmp_path, "b", 72.0, seed=1)
    add_run(tmp_path, "c", 75.0, model="resnet164_cifar_iebn")
    add_run(tmp_path, "d", 60.0, lr=0.2)
    write_costs(tmp_path, "resnet164_cifar,3x32x32,1,1,CPU,8,61.6")
    add_run(tmp_path, "e", 72.0, model="resnet164_cifar_se")
    add_run(tmp_path, "f", 74.0, model="resnet164_cifar_se", seed=1)
    add_run(tmp_path, "g", 76.0, model="resnet164_cifar_iebn", model_args=dict(neutral_gates=True), seed=1)
    add_run(tmp_path, "h", 69.0, model="resnet164_cifar_iebn", freeze_gates=True)
    frozen_neutral = dict(model_args=dict(neutral_gates=True), freeze_gates=True)
    add_run(tmp_path, "i", 68.0, model="resnet164_cifar_iebn", **frozen_neutral)
    (bn, iebn, se, neutral, other, *frozen) = cells(table_of(tmp_path))
    assert bn[:4] == ["resnet164_cifar", "cifar100", "164", "batch norm"]
    assert bn[4:10] == ["1.727 M", "247 M", "61.6 (CPU, batch 8)", "71.00 ± 1.41 (2 seeds)", "", "74.29"]
    assert iebn[3] == "IEBN" and iebn[6:10] == ["-", "75.00 (one seed)", "+5.00", "77.09"]
    assert se[3] == "squeeze-and-excitation" and se[7:10] == ["73.00 ± 1.41 (2 seeds)", "+2.00 (each)", "-"]
    assert neutral[3] == "IEBN, neutral gates" and neutral[7:10] == ["76.00 (one seed)", "+4.00", "-"]
    assert [row[0] for row in frozen] == ["resnet164_cifar, for study"] * 2
    assert [(row[3], row[7]) for row in frozen] == [
        ("IEBN", "69.00 (one seed)"),
        ("IEBN, neutral gates", "68.00 (one seed)"),
    ]
    assert other[7] == "60.00 (one seed)"
    assert bn[10] == "[seed 0](resnet164_cifar.a) [seed 1](resnet164_cifar.b)"
    assert iebn[10] == "[seed 0](resnet164_cifar_iebn.c)"
    ((name, data, epochs, *both),) = cells(short_table(compare(read_zoo(tmp_path))))
    assert both == ["71.00 ± 1.41 (2 seeds)", "75.00 (one seed)", "+5.00"]


def test_costs_stand_beside_those_of_the_twin_on_the_same_device(tmp_path):
    rows = ["big,3x32x32,2000000,9000000,CPU,8,100", "big_iebn,3x32x32,2010000,9000000,CPU,8,94"]
    rows += ["big_se,3x32x32,2200000,9100000,GPU,8,5000", "alone_iebn,3x32x32,500,600,CPU,8,7.25"]
    write_costs(tmp_path, *rows, "big_iebn,1x8x8,2010000,500000,CPU,8,2000", "big_se,3x32x32,1,2,CPU,16,99")
    found = [tuple(row) for row in cells(costs_table(read_costs(tmp_path / COSTS)))]
    assert found == [
        ("big", "1x8x8", "IEBN", "2.01 M", "0.5 M", "2000", "8", "CPU"),
        ("alone", "3x32x32", "IEBN", "500", "600", "7.25", "8", "CPU"),
        ("big", "3x32x32", "batch norm", "2 M", "9 M", "100", "8", "CPU"),
        ("big", "3x32x32", "IEBN", "2.01 M (+0.50 %)", "9 M", "94 (-6 %)", "8", "CPU"),
        ("big", "3x32x32", "squeeze-and-excitation", "1", "2", "99", "16", "CPU"),
        ("big", "3x32x32", "squeeze-and-excitation", "2.2 M", "9.1 M", "5000", "8", "GPU"),
    ]


def test_a_network_stands_on_the_side_of_its_norm(tmp_path):
    tuned = dict(pretrained=True, data="digits", architecture="resnet20_cifar_iebn")
    add_run(tmp_path, "a", 98.0, model="local-dir:somewhere", **tuned)
    add_run(tmp_path, "b", 50.0, model="resnet50", model_args=dict(norm_layer="iebn"))
    (tuned, own) = cells(table_of(tmp_path))
    assert (
        tuned[0] == "resnet20_cifar, fine-tuned"
        and tuned[3] == "IEBN"
        and tuned[7:10] == ["98.00 (one seed)", "-", "-"]
    )
    assert own[0] == "resnet50" and own[3] == "IEBN" and own[7] == "50.00 (one seed)"


def test_fine_tunings_of_other_weights_are_not_compared(tmp_path):
    def tune(name, top1, norm, tag, **more):
        add_run(tmp_path, name, top1, model=f"resnet18{norm}.{tag}", architecture=f"resnet18{norm}", **tuned | more)

    tuned = dict(pretrained=True, data="digits")
    tune("a", 90.0, "", "a1_in1k")
    tune("b", 91.0, "_iebn", "warmstart_a1_in1k")
    tune("c", 93.0, "_iebn", "warmstart_tv_in1k")
    tune("d", 95.0, "_iebn", "cifar100_seed0")
    tune("e", 97.0, "_iebn", "cifar100_seed1/")
    found = [(row[0], row[3], row[7]) for row in cells(table_of(tmp_path))]
    assert found == [
        ("resnet18.a1_in1k, fine-tuned", "batch norm", "90.00 (one seed)"),
        ("resnet18.a1_in1k, fine-tuned", "IEBN", "91.00 (one seed)"),
        ("resnet18.tv_in1k, fine-tuned", "IEBN", "93.00 (one seed)"),
        ("resnet18.cifar100_seed0, fine-tuned", "IEBN", "95.00 (one seed)"),
        ("resnet18.cifar100_seed1, fine-tuned", "IEBN", "97.00 (one seed)"),
    ]


def test_a_copy_is_no_second_seed(tmp_path):
    add_run(tmp_path, "a", 70.0)
    add_run(tmp_path, "b", 70.0)
    with pytest.raises(ValueError, match="resnet164_cifar.b is the same run as resnet164_cifar.a"):
        table_of(tmp_path)


@pytest.mark.parametrize(("seeds", "spread", "t"), [([0, 1], 2**0.5, 12.7062), ([0, 1, 2], 1.0, 4.3027)])
def test_a_paired_difference_has_students_interval(seeds, spread, t):
    """`t` is from a table: the 97.5th percentile for one degree of freedom less than there are seeds."""
    ours, baseline = {0: 71.0, 1: 75.0, 2: 77.0, 7: 0.0}, {seed: (70.0, 72.0, 75.0)[seed] for seed in seeds}
    half = t * spread / len(seeds) ** 0.5
    assert paired_difference(ours, baseline) == f"+2.00 [{2 - half:+.2f}, {2 + half:+.2f}]"
    assert paired_difference({0: 71.0}, baseline) == "+1.00" and paired_difference({7: 1.0}, baseline) == "-"


def test_no_figure_is_rounded_to_what_says_nothing():
    assert paired_difference({0: 1.0010, 1: 2.0012}, {0: 1.0, 1: 2.0}) == "+0.0011 [-0.0002, +0.0024]"
    assert paired_difference({0: 70.28, 1: 0.38}, {0: 70.0, 1: 0.1}) == "+0.28 (each)"
    assert mean_and_spread([0.0010, 0.0014]) == "0.0012 ± 0.0003 (2 seeds)"
    assert mean_and_spread([65.0, 66.0]) == "65.50 ± 0.71 (2 seeds)"
    assert mean_and_spread([math.nan, 66.0]) == "nan ± nan (2 seeds)"
    assert paired_difference({0: math.inf, 1: 66.0}, {0: 1.0, 1: 2.0}) == "+inf [+nan, +nan]"


def test_the_plot_shows_both_norms(tmp_path):
    add_run(tmp_path, "a", 70.0)
    add_run(tmp_path, "c", 75.0, model="resnet164_cifar_iebn")
    (axes,) = plot_results(compare(read_zoo(tmp_path))).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["batch norm", "IEBN"]
    points = [bar.lines[0].get_xydata()[0].tolist() for bar in axes.containers]
    assert [y for _, y in points] == [70.0, 75.0] and [round(x) for x, _ in points] == [245, 249]


def test_what_is_written_about_the_zoo_agrees_with_its_folders():
    script = [sys.executable, ROOT / "scripts" / "update_zoo.py", "--check"]
    result = subprocess.run(script, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    for folder, config in read_zoo().items():
        training, recipe = config["training"], load_recipe(folder / "recipe.yaml")
        row = read_log(folder / "log.csv")[-1]
        assert row["epoch"] == recipe.epochs
        for key in ("data", "epochs", "seed", "pretrained"):
            assert training[key] == getattr(recipe, key)
        for key in ("test_loss", "test_top1", "test_top5"):
            assert training[key] == pytest.approx(row[key], abs=6e-4)


def test_what_is_wrong_with_the_zoo_is_said_in_a_line(tmp_path):
    for name in ("zoo", "scripts", "timm_iebn"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("studies", "__pycache__"))
    shutil.copyfile(ROOT / "README.md", tmp_path / "README.md")
    run = tmp_path / "zoo" / "resnet20_cifar.cifar100_60epochs_seed0"

    def check():
        command = [sys.executable, tmp_path / "scripts" / "update_zoo.py", "--check"]
        environment = os.environ | dict(PYTHONPATH=str(tmp_path))
        return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)

    shutil.copytree(run, run.with_name("resnet20_cifar.copy"))
    assert "update_zoo.py: resnet20_cifar.copy is the same run as resnet20" in (result := check()).stderr
    run.with_name("resnet20_cifar.copy").rename(run.with_name("misnamed"))
    with open(run / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    damaged = check()
    assert "misnamed is left out" in damaged.stderr and "misnamed" not in damaged.stdout
    assert "model.safetensors is damaged" in damaged.stderr
    assert result.returncode == 1 and "Traceback" not in result.stderr + damaged.stderr


def test_one_command_starts_or_continues_the_whole_list(tmp_path):
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | dict(
        PATH=python, MODELS="resnet20_cifar", NORMS="- _iebn", SEEDS="0", OUTPUT=str(tmp_path), JOBS="2"
    )
    environment |= dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    command = [ROOT / "scripts" / "reproduce.sh", "data=digits", "data_config={}", "epochs=1"]
    command += ["milestones=[]", SMALL]
    outputs = [tmp_path / f"{model}.digits_1epochs_seed0" for model in ("resnet20_cifar", "resnet20_cifar_iebn")]
    one_by_one = environment | dict(JOBS="1")
    with subprocess.Popen(command, env=one_by_one, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as stopped:
        wait_for(f"{outputs[0].name}.run/lock", tmp_path, stopped)
        stopped.terminate()
    assert stopped.returncode == 143
    with FileLock(tmp_path / f"{outputs[0].name}.run" / "lock", timeout=60):  # the signal has reached the run too
        assert not outputs[0].exists() and not (tmp_path / "resnet20_cifar_iebn.cifar100_authors_seed0.txt").exists()
    for _ in range(2):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
    for output in outputs:
        assert (output / "model.safetensors").exists()
        model = output.name.partition(".")[0]
        said = (tmp_path / f"{model}.cifar100_authors_seed0.txt").read_text()
        assert said.count("epoch   1/1") == 1 and said.count("on the test split") == 2, said
