"""Studies: their runs, made and continued, and what is written from their logs."""

from pathlib import Path

import pytest
import yaml
from training import THIN, started, wait_for
from training import run as run_script

from timm_iebn.recipe import RecipeError, load_recipe
from timm_iebn.study import RUN_FILES, keep, load_study, same_run
from timm_iebn.study_report import read_results, write_report
from timm_iebn.study_report import report as report_on

STUDIES = sorted(Path(__file__).parents[1].glob("zoo/studies/*/study.yaml"))
RECIPE = f"""\
model: resnet20_cifar
model_args: {THIN}
data: digits
epochs: 2
milestones: []
batch_size: 700
lr: 0.01
"""
STUDY = dict(
    title="A trial",
    text="Does it work?",
    recipe="../recipe.yaml",
    networks={"batch norm": dict(model="resnet20_cifar"), "IEBN": dict(model="resnet20_cifar_iebn")},
    seeds=[0, 1],
    rows={"plain": {}, "scale 0.5, offset 0.5": dict(noise_scale=0.5, noise_offset=0.5)},
    columns=dict(test_top1="top-1, %"),
)


def write_study(root, **changes):
    (root / "recipe.yaml").write_text(RECIPE)
    folder = root / "trial"
    folder.mkdir()
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return folder


def report(study):
    return report_on(read_results(study))


def write_run(folder, recipe, top1=50.0, epochs=2):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "environment.txt").write_text("here")
    rows = enumerate([1.0] * (epochs - 1) + [top1], 1)
    (folder / "log.csv").write_text("epoch,test_top1\n" + "".join(f"{n},{value}\n" for n, value in rows))


def add_log(study, run, top1):
    write_run(study.folder / "runs" / run.name, load_recipe(study.recipe_path, run.overrides), top1)


def test_the_table_says_what_the_last_epochs_of_the_logs_say(tmp_path):
    study = load_study(write_study(tmp_path))
    assert [(r.row, r.network, r.seed) for r in study.runs[:3]] == [
        ("plain", "batch norm", 0),
        ("plain", "IEBN", 0),
        ("scale 0.5, offset 0.5", "batch norm", 0),
    ]
    top1 = {("plain", "batch norm", 0): 50, ("plain", "batch norm", 1): 52}
    top1 |= {("plain", "IEBN", 0): 53, ("plain", "IEBN", 1): 56, ("scale 0.5, offset 0.5", "IEBN", 0): 10}
    for run in study.runs:
        if (key := (run.row, run.network, run.seed)) in top1:
            add_log(study, run, top1[key])
    text = report(study)
    assert "| plain | batch norm | 51.00 ± 1.41 (2 seeds) |  |" in text
    assert "| plain | IEBN | 54.50 ± 2.12 (2 seeds) | +3.50 [-2.85, +9.85] |" in text
    assert "| scale 0.5, offset 0.5 | IEBN | 10.00 (one seed) | - |" in text
    assert "| scale 0.5, offset 0.5 | batch norm | - |  |" in text and "5 of 8 runs are made" in text


def test_conditions_are_compared_with_the_control_and_small_figures_are_shown(tmp_path):
    columns = dict(test_top1="top-1, %", epoch="epochs")
    study = load_study(write_study(tmp_path, control="plain", columns=columns))
    noisy = "scale 0.5, offset 0.5"
    top1 = {("plain", "batch norm"): (0.0502, 0.0514), (noisy, "batch norm"): (0.0402, 0.0412)}
    top1 |= {("plain", "IEBN"): (0.0521, 0.0531), (noisy, "IEBN"): (0.0501,)}
    for run in study.runs:
        if run.seed < len(found := top1[run.row, run.network]):
            add_log(study, run, found[run.seed])
    results, changes = report(study).split("What has changed from plain, with the same norm:")
    assert "| plain | batch norm | 0.05080 ± 0.00085 (2 seeds) |  | 2.00 ± 0.00 (2 seeds) |  |\n" in results
    assert f"| {noisy} | IEBN | 0.0501 (one seed) | +0.0099 | 2.00 (one seed) | +0.00 |\n" in results
    assert f"| {noisy} | batch norm | -0.0101 [-0.0114, -0.0088] |  | 80.118 ± 0.054 (2 seeds) |  |\n" in changes
    assert f"| {noisy} | IEBN | -0.0020 | +0.0080 | 96.2 (one seed) | +16.1 |\n" in changes
    assert "| plain |" not in changes


def test_networks_are_compared_in_pairs_too(tmp_path):
    networks = STUDY["networks"] | {"frozen": dict(model="resnet20_cifar_iebn", freeze_gates=True)}
    study = load_study(write_study(tmp_path, networks=networks, pairs=[["IEBN", "frozen"]]))
    top1 = {"batch norm": (10, 20), "IEBN": (53, 56), "frozen": (51, 52)}
    for run in study.runs:
        if run.row == "plain" or run.seed == 0:
            add_log(study, run, top1[run.network][run.seed])
    results, pairs = report(study).split("Networks compared with others than batch norm:\n\n")
    assert "against frozen" not in results and pairs.startswith("| | Norms | top-1, % |\n|---|---|---|\n")
    assert "| plain | IEBN against frozen | +3.00 [-9.71, +15.71] |\n" in pairs
    assert "| scale 0.5, offset 0.5 | IEBN against frozen | +2.00 |\n" in pairs


def test_a_run_without_noise_counts_as_one_with_none(tmp_path):
    study = load_study(write_study(tmp_path, seeds=[0], columns=dict(test_top1_with_noise="with the noise")))
    plain, _, noisy, _ = study.runs
    add_log(study, plain, 50)
    assert "| plain | batch norm | 50.00 (one seed) |  |" in report(study)
    add_log(study, noisy, 40)
    log = study.folder / "runs" / noisy.name / "log.csv"
    log.write_text("epoch,test_top1,test_top1_with_noise\n1,20,40\n")
    assert "| scale 0.5, offset 0.5 | batch norm | 40.00 (one seed) |  |" in report(study)


def test_what_a_study_has_kept_stays(tmp_path):
    study = load_study(write_study(tmp_path))
    (run, *_) = study.runs
    add_log(study, run, 50)
    (study.folder / "runs" / run.name / "notes.txt").write_text("mine")
    again = tmp_path / "again"
    again.mkdir()
    for name in RUN_FILES:
        (again / name).write_text("epoch,test_top1\n1,2.0\n")
    keep(study, run, again)
    assert study.log(run)[-1]["test_top1"] == 50
    assert sorted(p.name for p in (study.folder / "runs" / run.name).iterdir()) == sorted([*RUN_FILES, "notes.txt"])
    assert [p.name for p in (study.folder / "runs").iterdir()] == [run.name]


def test_a_log_without_the_columns_is_named(tmp_path):
    study = load_study(write_study(tmp_path))
    add_log(study, study.runs[0], 1.0)
    log = study.folder / "runs" / study.runs[0].name / "log.csv"
    log.write_text("epoch,loss\n1,1\n")
    for refused in (report, lambda study: load_study(study.folder)):
        with pytest.raises(ValueError, match="log.csv lacks one of the study's columns, test_top1"):
            refused(study)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(nonsense=1), "is no study, which has the keys title, text, recipe, networks"),
        (dict(rows={"a": dict(noise_scal=1)}), "unknown key 'noise_scal': did you mean 'noise_scale'"),
        (dict(recipe="nowhere.yaml"), "can't read the recipe"),
        (dict(networks=5), "study.yaml is no study.*networks should be a mapping .*, is 5"),
        (dict(networks={}), "networks should be"),
        (dict(rows={"a": 1}), "rows should be"),
        (dict(seeds=["0"]), "seeds should be a list of one or more whole numbers"),
        (dict(seeds=[]), "seeds should be a list of one or more whole numbers"),
        (dict(columns=["test_top1"]), "columns should be"),
        (dict(title=None), "title should be text"),
        (dict(control="plane"), "control should be one of the rows, is 'plane'"),
        (dict(pairs=[["IEBN", "frozen"]]), r"pairs should be a list of pairs of networks, is \[\['IEBN', 'frozen'\]\]"),
        (dict(pairs={"IEBN": "batch norm"}), "pairs should be"),
        (dict(pairs=["IEBN", "batch norm"]), "pairs should be"),
        (dict(pairs=[["IEBN", "IEBN"]]), "pairs should be"),
        (dict(pairs=[["IEBN", {}]]), "pairs should be"),
        (dict(rows={"wide": dict(model="resnet56_cifar")}), "row 'wide' and network 'batch norm' both set model"),
        (dict(rows={"+0.5": {}, "-0.5": dict(lr=0.1)}), "2 runs would share the folder _0.5.batch_norm.seed0"),
        (dict(seeds=[1, 1]), "2 runs would share the folder plain.batch_norm.seed1"),
        (
            dict(columns=dict(test_top_1="top-1")),
            "plain.batch_norm.seed0 will log no test_top_1, but epoch, updates, lr",
        ),
        (dict(columns=dict(feature_noise="noise")), "plain.batch_norm.seed0 will log no feature_noise, but"),
    ],
    ids=str,
)
def test_a_study_that_can_not_be_made_is_refused(changes, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        load_study(write_study(tmp_path, **changes))


def test_a_network_may_end_the_models_of_the_rows(tmp_path):
    networks = {"batch norm": {}, "IEBN": dict(model="_iebn")}
    rows = {depth: dict(model=f"resnet{depth}_cifar") for depth in ("20", "56")}
    runs = load_study(write_study(tmp_path, seeds=[0], networks=networks, rows=rows)).runs
    models = [load_recipe(tmp_path / "recipe.yaml", run.overrides).model for run in runs]
    assert models == ["resnet20_cifar", "resnet20_cifar_iebn", "resnet56_cifar", "resnet56_cifar_iebn"]


def test_what_was_made_with_an_option_that_is_gone_stays_in_the_table(tmp_path):
    folder = write_study(tmp_path, seeds=[0], rows=dict(gone={}))
    study = load_study(folder)
    changed = STUDY | dict(seeds=[0], rows=dict(gone=dict(decay_gates=False)))
    (folder / "study.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    for top1, run in enumerate(study.runs, 50):
        with pytest.raises(RecipeError, match="unknown key 'decay_gates'"):
            load_study(folder)
        add_log(study, run, top1)
        with open(folder / "runs" / run.name / "recipe.yaml", "a") as file:
            file.write("decay_gates: false\n")
    assert "| gone | IEBN | 51.00 (one seed) | +1.00 |" in report(load_study(folder))


def test_no_run_stays_in_the_table_of_a_study_that_says_otherwise(tmp_path):
    folder = write_study(tmp_path, seeds=[0], rows=dict(plain={}))
    study = load_study(folder)
    run, other = study.runs
    add_log(study, run, 50)
    add_log(study, other, 51)
    assert load_study(folder) == study
    for changes, message in (
        (
            dict(rows=dict(plain=dict(lr=0.5))),
            r"plain.batch_norm.seed0, plain.IEBN.seed0 \(lr: 0.01 became 0.5\)",
        ),
        (
            dict(networks={"batch norm": dict(model="resnet56_cifar")}),
            r"plain.batch_norm.seed0 \(model: 'resnet20_cifar' became 'resnet56_cifar'\)",
        ),
    ):
        changed = STUDY | dict(seeds=[0], rows=dict(plain={})) | changes
        (folder / "study.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
        with pytest.raises(RecipeError, match=rf"runs by another recipe than the study's: {message}; move them away"):
            load_study(folder)
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | dict(seeds=[0], rows=dict(plain={})), sort_keys=False))
    log, recipe = (folder / "runs" / run.name / name for name in ("log.csv", "recipe.yaml"))
    log.write_text("epoch,test_top1\n1,50\n")
    with pytest.raises(RecipeError, match="log.csv has 1 of 2 epochs: move its run away"):
        load_study(folder)
    for damaged in (b"5", b"model: a", b"[", b"\xff", None):
        recipe.unlink() if damaged is None else recipe.write_bytes(damaged)
        with pytest.raises(RecipeError, match="recipe.yaml"):
            load_study(folder)


def test_a_run_that_came_to_nothing_is_reported(tmp_path):
    study = load_study(write_study(tmp_path, seeds=[0, 1], rows=dict(plain={})))
    for run, top1 in zip(study.runs, ("nan", 50, 51, 52), strict=True):
        add_log(study, run, top1)
    write_report(study)
    text = (study.folder / "README.md").read_text()
    assert "| batch norm | nan ± nan (2 seeds) |" in text and "| IEBN | 51.00 ± 1.41 (2 seeds) | +nan" in text


def test_the_runs_that_are_missing_are_made_and_no_others(tmp_path):
    networks = dict(STUDY["networks"], none=dict(model="resnet21_cifar"))
    folder = write_study(tmp_path, seeds=[3], rows=dict(plain=dict(epochs=1)), networks=networks)

    def make():
        return run_script(folder, "--output", tmp_path / "output", "--jobs", "2", cwd=tmp_path, script="study.py")

    result = make()
    assert result.returncode == 1 and "plain.none.seed3 stopped: train.py: model: unknown model" in result.stderr
    assert sorted(p.name for p in (folder / "runs").iterdir()) == ["plain.IEBN.seed3", "plain.batch_norm.seed3"]
    kept = folder / "runs" / "plain.IEBN.seed3"
    assert {p.name for p in kept.iterdir()} == {"recipe.yaml", "log.csv", "environment.txt"}
    assert yaml.safe_load((kept / "recipe.yaml").read_text())["model"] == "resnet20_cifar_iebn"
    before = (folder / "README.md").read_text()
    assert before.count("(one seed)") == 2 and (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    again = make()
    end = f"2 of 3 runs are made: see {folder / 'README.md'}\n"
    assert again.stdout == f"1/1 trial: plain.none.seed3\n{end}" and (folder / "README.md").read_text() == before


def test_again_makes_all_runs_anew_elsewhere(tmp_path):
    (tmp_path / "studies").mkdir()
    folder = write_study(tmp_path / "studies", seeds=[3], rows=dict(plain={}))
    study = load_study(folder)
    for run in study.runs:
        add_log(study, run, 50)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = ["--again", tmp_path / "again", "--change", "lr=0.02"]
    result = run_script(folder, *again, cwd=tmp_path, script="study.py")
    assert result.returncode == 0, result.stderr
    *lines, end = result.stdout.splitlines()
    assert lines == ["1/2 trial: plain.batch_norm.seed3", "2/2 trial: plain.IEBN.seed3"]
    assert end == f"2 of 2 runs are made: see {tmp_path / 'again' / 'trial' / 'README.md'}"
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    made = load_study(folder, tmp_path / "again", ["lr=0.02"])
    assert all(made.log(run)[-1]["test_loss"] > 0 for run in made.runs)
    assert {load_recipe(path).lr for path in made.folder.glob("runs/*/recipe.yaml")} == {0.02}
    text = (tmp_path / "again" / "trial" / "README.md").read_text()
    assert "Here the recipe is changed: lr=0.02." in text and "Here the recipe" not in report(study)
    assert not (tmp_path / "output").exists()  # where there may be runs made before
    assert "2 of 2 runs are made" in text and text.count("(one seed)") == 2
    with pytest.raises(RecipeError, match="studies/trial is the folder of a study: have it made again elsewhere"):
        load_study(folder, folder.parent)
    (made.folder / "runs" / "plain.IEBN.seed3" / "log.csv").unlink()
    assert f"study.py zoo/studies/trial --again {tmp_path / 'again'} --change lr=0.02\n" in report(made)


def test_a_study_is_made_by_one_recipe(tmp_path):
    folder, again = write_study(tmp_path), tmp_path / "again"
    with pytest.raises(RecipeError, match="by its own recipe: precision=bf16 is possible with --again only"):
        load_study(folder, changes=["precision=bf16"])
    with pytest.raises(ValueError, match="'A trial' sets seed for each run"):
        load_study(folder, again, ["seed=5"])
    with pytest.raises(RecipeError, match="unknown key 'precisio'.* did you mean 'precision'"):
        load_study(folder, again, ["precisio=bf16"])
    study = load_study(folder, again, ["precision=bf16"])
    recipe = load_recipe(study.recipe_path, study.runs[0].overrides)
    assert recipe.precision == "bf16"
    write_run(study.folder / "runs" / study.runs[0].name, recipe)
    assert load_study(folder, again, ["precision=bf16"]).log(study.runs[0])
    with pytest.raises(RecipeError, match=r"batch_norm.seed0 \(precision: 'bf16' became 'no'\); have the study"):
        load_study(folder, again)


@pytest.mark.parametrize("place", ["studies/other/runs/plain.seed0", "resnet20_cifar.digits_seed0"])
def test_a_run_that_another_study_or_the_zoo_has_made_is_taken_from_there(place, tmp_path):
    (tmp_path / "studies").mkdir()
    folder = write_study(tmp_path / "studies", seeds=[0], rows=dict(plain={}), networks=dict(a=dict(epochs=2)))
    write_run(tmp_path / place, load_recipe(tmp_path / "studies" / "recipe.yaml"))
    result = run_script(folder, "--output", tmp_path / "output", cwd=tmp_path, script="study.py")
    end = f"1 of 1 runs are made: see {folder / 'README.md'}\n"
    assert result.stdout == f"1/1 trial: plain.a.seed0 is {tmp_path / place}\n{end}" and result.returncode == 0
    assert not (tmp_path / "output").exists() and "| plain | a | 50.00 (one seed)" in (folder / "README.md").read_text()
    assert (folder / "runs" / "plain.a.seed0" / "environment.txt").read_text() == "here"


def test_what_studies_share_is_made_once_and_none_that_can_not_be_kept_stops_the_others(tmp_path):
    folder = write_study(tmp_path, seeds=[0], rows=dict(plain=dict(epochs=1)))
    other = folder.with_name("other")
    other.mkdir()
    (other / "study.yaml").write_text((folder / "study.yaml").read_text())
    in_the_way = other / "runs" / "plain.batch_norm.seed0" / "notes.txt"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("mine")
    result = run_script(other, folder, "--jobs", "2", cwd=tmp_path, script="study.py")
    lines = [f"{i}/2 other: plain.{n}.seed0, trial: plain.{n}.seed0" for i, n in ((1, "batch_norm"), (2, "IEBN"))]
    lines += [f"{n} of 2 runs are made: see {path / 'README.md'}" for n, path in ((1, other), (2, folder))]
    assert sorted(result.stdout.splitlines()) == sorted(lines) and result.returncode == 1
    assert f"Directory not empty: '{in_the_way.parent}" in result.stderr and "Traceback" not in result.stderr
    assert "2 of 2 runs are made" in (folder / "README.md").read_text() and in_the_way.read_text() == "mine"
    assert "1 of 2 runs are made" in (other / "README.md").read_text()
    assert sorted(p.name for p in (other / "runs").iterdir()) == ["plain.IEBN.seed0", "plain.batch_norm.seed0"]


def test_no_run_is_taken_that_is_another_or_is_not_whole(tmp_path):
    study = load_study(write_study(tmp_path, rows=dict(plain={})))
    run, other_seed = study.runs[0], study.runs[2]
    recipe, runs = load_recipe(study.recipe_path, run.overrides), tmp_path / "other" / "runs"
    assert same_run(study, run) is None  # though the study's recipe is beside it
    write_run(runs / "other_seed", load_recipe(study.recipe_path, other_seed.overrides))
    write_run(runs / "short", recipe, epochs=1)
    write_run(runs / "being_copied.partial", recipe)
    write_run(runs / "without_log", recipe)
    (runs / "without_log" / "log.csv").unlink()
    write_run(runs / "damaged", recipe)
    with open(runs / "damaged" / "recipe.yaml", "a") as file:
        file.write("option_that_is_gone: true\n")
    assert same_run(study, run) is None
    write_run(runs / "whole", recipe)
    assert same_run(study, run) == runs / "whole"


def test_a_stop_reaches_the_runs_and_the_same_command_goes_on(tmp_path):
    folder = write_study(tmp_path, seeds=[0], rows=dict(plain=dict(epochs=6)))
    output = tmp_path / "again" / "trial"
    arguments = [folder, "--again", output.parent]
    with started(*arguments, script="study.py") as process:
        wait_for("plain.batch_norm.seed0.run/0*.safetensors", output, process)
        process.terminate()
        assert process.wait(120) == 143
        assert "the same command goes on" in process.stderr.read()
    log = output / "plain.batch_norm.seed0.txt"
    assert "stopped by SIGTERM" in log.read_text() and not (output / "runs").exists()
    assert not (output / "plain.IEBN.seed0.txt").exists()
    with started(*arguments, script="study.py") as process:
        assert process.wait(300) == 0
    assert "going on from" in log.read_text() and len(list(output.glob("runs/*/log.csv"))) == 2
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_every_run_in_the_zoos_studies_is_one_of_the_study(path):
    study = load_study(path.parent)
    made = {run.name for run in study.runs if study.log(run)}
    assert {p.name for p in path.parent.glob("runs/*")} == made
