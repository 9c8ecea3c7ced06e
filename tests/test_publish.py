"""Publishing to a loopback Hub with the real client, and loading from it what was published."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import timm
from conftest import randomize
from hub_client import SETTINGS
from hub_server import Fault
from hub_storage import Repo
from publishing import FOLDER, READER, SCRIPT, TOKEN, copy, refused, save_weights, succeeded
from training import SHORT, run

from timm_iebn.model_folder import FILES
from timm_iebn.zoo import WEIGHTS

NAME = f"lab/{FOLDER.name}"


def state(name, token=TOKEN, **kwargs):
    """The weights of a network that somebody loads, or the error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", token)
        try:
            model = timm.create_model(name, pretrained=True, **kwargs)
        except OSError as e:
            return str(e)
    return {key: t.numpy().tobytes() for key, t in model.state_dict().items()}


def push(name, repo, **kwargs):
    """timm's own publishing of a network with random gates; returns its weights."""
    model = randomize(timm.create_model(name))
    timm.models.push_to_hf_hub(model, repo, **kwargs)
    return {key: t.numpy().tobytes() for key, t in model.state_dict().items()}


def whole(hub):
    """Whether what is online is the folder, all of it and nothing else."""
    files = {path: data for path, data in hub.repos[NAME].files.items() if path != ".gitattributes"}
    return files.keys() == set(FILES) and all(files[n] == (FOLDER / n).read_bytes() for n in set(FILES) - {"README.md"})


def test_a_folder_is_published_in_one_commit_and_the_second_time_changes_nothing(hub, publish, call, tmp_path):
    succeeded(publish("--tag", "v1"))
    repo = hub.repos[NAME]
    assert whole(hub) and len(repo.commits) == 2 and repo.tags == {"v1": repo.commit} and not repo.private
    card = repo.files["README.md"].decode()
    assert f"hf-hub:{NAME}" in card and "hf-hub:timm-iebn/" not in card
    before = len(hub.requests)
    assert f"{len(FILES)} unchanged" in succeeded(publish("--tag", "v1"))
    assert len(repo.commits) == 2 and repo.tags == {"v1": repo.commit}
    assert not [request for request in hub.requests[before:] if request.method == "PUT" or "/commit/" in request.path]
    expected = call(state, f"local-dir:{FOLDER}")
    for name in (f"hf-hub:{NAME}", f"hf-hub:{NAME}@v1", f"hf-hub:{NAME}@{repo.commit}"):
        assert call(state, name, cache_dir=tmp_path) == expected, name
    from_hub = dict(pretrained_cfg_overlay=dict(file=None))  # as where the package came without the weights
    before = hub.count("GET", NAME)
    assert call(state, FOLDER.name, cache_dir=tmp_path / "fresh", **from_hub) == expected
    assert hub.count("GET", NAME) == before + 1


def test_timms_own_publishing_keeps_the_gates(hub, call, tmp_path):
    pushed = call(push, "resnet20_cifar_iebn", "lab/pushed", safe_serialization=True)
    assert set(hub.repos["lab/pushed"].files) >= {"config.json", WEIGHTS} and "gate" in str(pushed.keys())
    assert call(state, "hf-hub:lab/pushed", cache_dir=tmp_path) == pushed


def test_a_dry_run_shows_what_would_change_and_changes_nothing(hub, publish):
    out = succeeded(publish("--dry-run", HF_TOKEN=""))
    assert NAME in out and f"+ {WEIGHTS}\n" in out and not hub.repos
    hub.repos[NAME] = Repo(
        {"notes.txt": b"old", "log.csv": b"old", "recipe.yaml": (FOLDER / "recipe.yaml").read_bytes()}
    )
    before = hub.repos[NAME].commit
    out = succeeded(publish("--dry-run"))
    assert re.search(r"^- notes\.txt$", out, re.M) and re.search(r"^= recipe\.yaml$", out, re.M)
    assert re.search(r"^~ log\.csv\n--- online\n\+\+\+ here\n@@.*\n-old\n\+epoch,", out, re.M)
    assert hub.repos[NAME].commit == before
    assert not [request for request in hub.requests if request.method != "GET" and request.method != "HEAD"]


def test_what_others_put_online_goes_only_if_asked(hub, publish):
    hub.repos[NAME] = Repo({"sub/notes.txt": b"old", "log.csv": b"old", ".gitattributes": b""})
    refused(publish(), "sub/notes.txt", "--delete")
    assert len(hub.repos[NAME].commits) == 1
    succeeded(publish("--delete"))
    assert whole(hub) and len(hub.repos[NAME].commits) == 2


def test_a_private_repository_is_seen_by_its_owner_alone(hub, publish, call, tmp_path):
    succeeded(publish("--private"))
    assert hub.repos[NAME].private
    assert call(state, f"hf-hub:{NAME}", cache_dir=tmp_path / "mine") == call(state, f"local-dir:{FOLDER}")
    assert "404" in call(state, f"hf-hub:{NAME}", token=READER, cache_dir=tmp_path / "theirs")
    assert "private" in succeeded(publish("--dry-run"))


def test_a_public_repository_is_not_taken_for_a_private_one(hub, publish):
    succeeded(publish())
    refused(publish("--private"), NAME, "public already")


def test_a_tag_does_not_move(hub, publish, tmp_path):
    succeeded(publish("--tag", "v1"))
    old = hub.repos[NAME].commit
    folder = copy(tmp_path)
    (folder / "environment.txt").write_text("another machine\n")
    refused(publish("--tag", "v1", folder=folder), "the tag v1 stands at", old[:8], "another tag")
    assert hub.repos[NAME].commit == old
    succeeded(publish("--tag", "v2", folder=folder))
    assert hub.repos[NAME].tags == {"v1": old, "v2": hub.repos[NAME].commit} and hub.repos[NAME].commit != old


@pytest.mark.parametrize(
    ("args", "env", "reasons"),
    [
        ([], dict(HF_TOKEN="hf_planted_nobody"), ["does not accept this token", "hf auth login"]),
        ([], dict(HF_TOKEN=""), ["no token", "hf auth login", "HF_TOKEN"]),
        ([], dict(HF_TOKEN=READER), ["refuses to write to lab", "You don't have the rights", "--namespace"]),
        (["--namespace", "elsewhere"], {}, ["refuses to write to elsewhere"]),
        (["--tag", "main"], {}, ["'main' can't be a tag"]),
        (["--tag", "a b"], {}, ["'a b' can't be a tag"]),
    ],
)
def test_who_may_not_is_told_so(hub, publish, args, env, reasons):
    refused(publish(*args, **env), *reasons)
    assert not hub.repos


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT /lfs/", "503", 2),
        Fault("PUT /lfs/", "hang up", 2),
        Fault("PUT /lfs/", "no answer", 1),
        Fault("POST .*/preupload/", "503", 1),
        Fault("GET .*/resolve/.*safetensors", "cut", 1),
        Fault("HEAD .*/resolve/", "503", 2),
        Fault("POST .*/lfs/objects/batch", "slow", 1),
    ],
    ids=lambda fault: f"{fault.pattern} {fault.kind}",
)
def test_a_short_trouble_goes_unnoticed(hub, publish, fault):
    hub.faults.append(fault)
    succeeded(publish("--tag", "v1"))
    assert fault.times == 0 and whole(hub) and len(hub.repos[NAME].commits) == 2


@pytest.mark.parametrize("kind", ["503", "hang up", "no answer"])
@pytest.mark.parametrize(
    "pattern",
    [
        "GET /api/whoami-v2",
        "POST /api/repos/create",
        "POST /api/validate-yaml",
        "POST .*/preupload/",
        "POST .*/lfs/objects/batch",
        "PUT /lfs/",
        "POST .*/verify",
        "POST .*/commit/",
        "HEAD .*/resolve/",
        "POST .*/tag/",
    ],
)
def test_an_interruption_leaves_nothing_half_done_and_a_second_run_goes_on(hub, publish, pattern, kind):
    hub.faults.append(Fault(pattern, kind))
    refused(publish("--tag", "v1"))
    assert hub.faults.pop().times < 1_000_000
    if NAME in hub.repos:
        assert whole(hub) or set(hub.repos[NAME].files) == {".gitattributes"}
        assert not hub.repos[NAME].tags or whole(hub)
    succeeded(publish("--tag", "v1"))
    assert whole(hub) and len(hub.repos[NAME].commits) == 2 and hub.repos[NAME].tags == {"v1": hub.repos[NAME].commit}


def test_what_comes_back_changed_is_noticed_and_gets_no_tag(hub, publish):
    hub.faults.append(Fault("GET .*/resolve/.*safetensors", "corrupt", 1))
    refused(publish("--tag", "v1"), "came back changed", WEIGHTS)
    assert not hub.repos[NAME].tags
    succeeded(publish("--tag", "v1"))
    assert hub.repos[NAME].tags


def test_somebody_elses_commit_meanwhile_is_not_overwritten(hub, publish):
    theirs = {"README.md": b"theirs"}
    hub.repos[NAME] = Repo({})
    hub.faults.append(Fault("POST .*/commit/", lambda: hub.repos[NAME].add_commit(theirs), 1))
    refused(publish(), "has changed meanwhile", "run again")
    assert hub.repos[NAME].files == theirs


def test_somebody_elses_repository_meanwhile_is_not_overwritten(hub, publish):
    theirs = {"README.md": b"theirs"}
    hub.faults.append(Fault("POST /api/repos/create", lambda: hub.repos.update({NAME: Repo(theirs)}), 1))
    refused(publish(), "has changed meanwhile", "run again")
    assert hub.repos[NAME].files == theirs


def test_the_tag_is_that_of_our_revision_whatever_others_do_meanwhile(hub, publish):
    hub.faults.append(Fault("POST .*/tag/", lambda: hub.repos[NAME].add_commit({"README.md": b"theirs"}), 1))
    succeeded(publish("--tag", "v1"))
    assert hub.repos[NAME].tags == {"v1": hub.repos[NAME].commits[-2].oid}
    hub.repos.clear()
    hub.faults.append(Fault("POST .*/tag/", lambda: hub.repos[NAME].tags.update(v1=hub.repos[NAME].commits[0].oid), 1))
    refused(publish("--tag", "v1"), "the tag v1", "another tag")


def test_two_folders_of_one_name_are_refused(publish, tmp_path):
    refused(publish(str(copy(tmp_path))), "have the name resnet20")


def test_evaluation_again_finds_another_result(hub, publish, tmp_path):
    assert run(*SHORT, cwd=tmp_path).returncode == 0
    (folder,) = (tmp_path / "output").iterdir()
    assert "test_top1" in succeeded(publish("--evaluate", "--dry-run", folder=folder))
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    weights["fc.bias"] = weights["fc.bias"].roll(1)
    other = tmp_path / folder.name
    shutil.copytree(folder, other)
    save_weights(other, weights)
    refused(publish("--evaluate", folder=other), "now", "in its config.json")
    assert not hub.repos


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_nothing_half_done(hub, publish, tmp_path, how):
    hub.faults.append(Fault("PUT /lfs/", "slow"))
    env = os.environ | SETTINGS | dict(HF_HOME=str(tmp_path), HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    command = [sys.executable, SCRIPT, FOLDER, "--namespace", "lab"]
    # A test run in the background inherits an ignored SIGINT, and so would the command.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 100
    while not hub.blobs and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    _, printed = process.communicate(timeout=100)
    assert hub.blobs and set(hub.repos[NAME].files) == {".gitattributes"}
    assert how == signal.SIGKILL or (process.returncode == 130 and "Traceback" not in printed), printed
    hub.faults.clear()
    succeeded(publish())
    assert whole(hub) and len(hub.repos[NAME].commits) == 2
