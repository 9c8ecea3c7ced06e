"""`pretrained=True` with the real Hub client against a loopback Hub.

The client reads its environment when it is imported, so what needs a Hub runs in a process of its own: `online`,
`offline` and `unreachable` are functions that run a function there.
"""

import json
import os
import re
import socket

import pytest
import timm
import torch
from conftest import blocks, randomize
from hub_client import client
from hub_server import Fault, Hub
from hub_storage import Repo
from pretrained import TOKEN, TWINS, WEIGHTS, assert_explains, assert_same, batch_norm_weights, failure, outputs, state
from safetensors.torch import load, save

from timm_iebn.card import make_warm_start_card
from timm_iebn.zoo import read_zoo


def execute(code, folder):
    os.chdir(folder)
    exec(code, {})


@pytest.fixture(scope="module")
def hub():
    """timm's repositories with random weights of ours, and some of a lab in which something is wrong."""
    torch.manual_seed(0)
    with Hub({TOKEN: {"lab"}}) as hub:
        for name, tag in (*TWINS.items(), ("resnet18", "tv_in1k")):
            hub.repos[f"timm/{name}.{tag}"] = Repo({WEIGHTS: save(batch_norm_weights(name))})
        whole = hub.repos["timm/resnet18.a1_in1k"].files[WEIGHTS]
        hub.repos |= {
            "lab/empty": Repo({"README.md": b"no weights here"}),
            "lab/damaged": Repo({WEIGHTS: whole[: len(whole) // 2]}),
            "lab/gated": Repo({WEIGHTS: whole}),
            "lab/down": Repo({WEIGHTS: whole}),
            # below 10 MB, the client's chunk: it tries for ever while there is progress
            "lab/cut": Repo({WEIGHTS: whole[:1_000_000]}),
            "lab/hangs-up": Repo({WEIGHTS: whole}),
            "lab/busy": Repo({WEIGHTS: whole}),
            "lab/cut-once": Repo({WEIGHTS: whole}),
            "lab/corrupt": Repo({WEIGHTS: whole}),
        }
        kinds = {"gated": "gated", "down": "503", "cut": "cut", "hangs-up": "hang up"}
        hub.faults += [Fault(f"(GET|HEAD) /lab/{name}/", kind) for name, kind in kinds.items()]
        hub.faults += [Fault("HEAD /lab/busy/", "503", 2), Fault("HEAD /lab/busy/", "slow", 1)]
        hub.faults += [Fault("GET /lab/cut-once/", "cut", 1), Fault("GET /lab/corrupt/", "corrupt", 1)]
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub, home):
    with client(home, hub.url, TOKEN) as call:
        yield call


@pytest.fixture(scope="module")
def closed_port():
    with socket.socket() as s:  # bound but not listening: nobody else gets it
        s.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture(scope="module")
def unreachable(closed_port, tmp_path_factory):
    with client(tmp_path_factory.mktemp("unreachable"), closed_port, TOKEN) as call:
        yield call


@pytest.fixture(scope="module")
def offline(closed_port, tmp_path_factory):
    with client(tmp_path_factory.mktemp("offline"), closed_port, TOKEN, HF_HUB_OFFLINE="1") as call:
        yield call


# --- warm starts from the Hub


@pytest.mark.parametrize("kwargs", [{}, dict(in_chans=1), dict(features_only=True)], ids=str)
@pytest.mark.parametrize("twin", TWINS)
def test_a_warm_start_computes_what_timms_network_does(online, twin, kwargs):
    assert_same(online(outputs, f"{twin}_iebn", **kwargs), online(outputs, f"{twin}.{TWINS[twin]}", **kwargs))


@pytest.mark.parametrize("twin", TWINS)
def test_a_warm_start_with_a_new_head_keeps_the_features(online, twin):
    kwargs = dict(call="forward_features", num_classes=10)
    assert_same(online(outputs, f"{twin}_iebn", **kwargs), online(outputs, f"{twin}.{TWINS[twin]}", **kwargs))
    assert online(outputs, f"{twin}_iebn", num_classes=10)[0].shape == (2, 10)


def test_a_warm_start_follows_its_tag(online):
    ours = online(outputs, "resnet18_iebn.warmstart_tv_in1k")
    assert_same(ours, online(outputs, "resnet18.tv_in1k"))
    assert abs(ours[0] - online(outputs, "resnet18_iebn")[0]).max() > 0.1


def test_a_warm_start_leaves_the_gates_neutral(online):
    gates = {key: set(t) for key, t in online(state, "resnet18_iebn").items() if "gate_" in key}
    assert len(gates) == 2 * 17
    assert all(values == ({0} if key.endswith("gate_weight") else {-1}) for key, values in gates.items())


def test_weights_are_downloaded_once_into_cache_dir_and_load_without_a_hub(hub, online, offline, tmp_path):
    before = hub.count("GET", "timm/mobilenetv3_small_100.lamb_in1k")
    first, again = (online(outputs, "mobilenetv3_small_100_iebn", cache_dir=tmp_path) for _ in range(2))
    assert hub.count("GET", "timm/mobilenetv3_small_100.lamb_in1k") == before + 1
    assert len(list(tmp_path.glob(f"models--timm--mobilenetv3_small_100.lamb_in1k/snapshots/*/{WEIGHTS}"))) == 1
    without = offline(outputs, "mobilenetv3_small_100_iebn", cache_dir=tmp_path)
    assert (first[0] == again[0]).all() and (first[0] == without[0]).all()


def test_a_published_network_keeps_its_gates(hub, online, folder, tmp_path):
    model = randomize(timm.create_model("mobilenetv3_small_100_iebn"))
    folder(model, model.state_dict())
    hub.repos["lab/trained"] = Repo({name: (tmp_path / name).read_bytes() for name in ("config.json", WEIGHTS)})
    loaded = online(state, "hf-hub:lab/trained")
    assert loaded.keys() == model.state_dict().keys()
    assert all((loaded[key] == t.numpy()).all() for key, t in model.state_dict().items())


def test_others_may_publish_a_training_of_their_own_under_a_name_of_the_zoo(hub, online, home, folder, tmp_path):
    name = [*read_zoo()][0].name
    model = randomize(timm.create_model(name.split(".")[0]))
    folder(model, model.state_dict())
    hub.repos |= {
        f"{owner}/{name}": Repo({file: (tmp_path / file).read_bytes() for file in ("config.json", WEIGHTS)})
        for owner in ("lab", "timm-iebn")
    }
    loaded = online(state, f"hf-hub:lab/{name}")
    assert all((loaded[key] == t.numpy()).all() for key, t in model.state_dict().items())
    found = online(failure, f"hf-hub:timm-iebn/{name}")  # where it would be another one than the zoo's
    assert_explains(found, RuntimeError, "others than this version of timm-iebn knows", f"timm-iebn/{name}@REVISION")
    assert [path for path in (home / "hub" / f"models--timm-iebn--{name}").glob("blobs/*") if path.is_file()]
    assert online(state, f"hf-hub:timm-iebn/{name}@main").keys() == loaded.keys()  # a revision asked for by name


@pytest.mark.parametrize("key", ["file", "state_dict"])
def test_what_a_repository_says_of_other_places_does_not_spare_it_the_check(hub, online, folder, tmp_path, key):
    model = randomize(timm.create_model("mobilenetv3_small_100_iebn"))
    folder(model, model.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"][key] = str(tmp_path / WEIGHTS)
    files = {"config.json": json.dumps(config).encode(), WEIGHTS: (tmp_path / WEIGHTS).read_bytes()}
    (tmp_path / "config.json").write_text("{not read")
    hub.repos[f"lab/{key}"] = Repo(files)
    hub.faults.append(Fault(f"GET /lab/{key}/resolve/.*safetensors", "corrupt", 1))
    assert_explains(
        online(failure, f"hf-hub:lab/{key}"), RuntimeError, f"lab/{key}", "damaged", "removed from the cache"
    )
    loaded = online(state, f"hf-hub:lab/{key}")
    assert all((loaded[name] == t.numpy()).all() for name, t in model.state_dict().items())


def test_the_code_of_a_warm_starts_card_runs(online, tmp_path):
    (code,) = blocks(make_warm_start_card("mobilenetv3_small_100_iebn").content, "python")
    online(execute, code, tmp_path)
    expected = online(outputs, "mobilenetv3_small_100_iebn")[0]
    assert (online(outputs, f"local-dir:{tmp_path}/mobilenetv3_small_100_iebn")[0] == expected).all()


# --- errors of the Hub


@pytest.mark.parametrize("repo", ["lab/busy", "lab/cut-once"])
def test_a_short_trouble_of_the_hub_goes_unnoticed(hub, online, repo):
    loaded = online(state, "resnet18_iebn", pretrained_cfg_overlay=dict(hf_hub_id=repo))
    assert not [fault for fault in hub.faults if fault.times and re.search(fault.pattern, f"GET /{repo}/")]
    assert (loaded["conv1.weight"] == load(hub.repos[repo].files[WEIGHTS])["conv1.weight"].numpy()).all()


def test_flipped_bits_are_found_and_do_not_stay_in_the_cache(hub, online, home):
    """The client compares only sizes."""
    wanted = dict(pretrained_cfg_overlay=dict(hf_hub_id="lab/corrupt"))
    found = online(failure, "resnet18_iebn", **wanted)
    assert_explains(found, RuntimeError, "lab/corrupt", "damaged", "removed from the cache")
    assert not [path for path in (home / "hub" / "models--lab--corrupt").glob("blobs/*") if path.is_file()]
    loaded = online(state, "resnet18_iebn", **wanted)
    assert (loaded["conv1.weight"] == load(hub.repos["lab/corrupt"].files[WEIGHTS])["conv1.weight"].numpy()).all()


@pytest.mark.parametrize(
    "repo, reason",
    [
        ("lab/nowhere", "Repository Not Found"),
        ("timm/resnet18.a1_in1k@v9", "Revision Not Found"),
        ("lab/empty", "Entry Not Found"),
        ("lab/gated", "Access to model lab/gated is restricted"),
        ("lab/down", "503"),
        ("lab/cut", "closed connection"),
        ("lab/hangs-up", "disconnected"),
    ],
)
def test_a_failed_download_says_what_was_looked_for_and_where(hub, online, home, repo, reason):
    found = online(failure, "resnet18_iebn", pretrained_cfg_overlay=dict(hf_hub_id=repo))
    assert hub.requests[-1].token == TOKEN
    remedy = ("HF_TOKEN", "cache_dir=", "pretrained=False")
    assert_explains(found, OSError, "resnet18_iebn", WEIGHTS, repr(repo), hub.url, home / "hub", reason, *remedy)


def test_the_repository_of_the_tag_and_the_cache_dir_asked_for_are_named(online, tmp_path):
    found = online(failure, "resnet18_iebn.warmstart_a2_in1k", cache_dir=tmp_path)
    assert_explains(found, OSError, "'timm/resnet18.a2_in1k'", f"cache {tmp_path} ")


def test_weights_that_arrive_damaged_are_named(online):
    found = online(failure, "resnet18_iebn", pretrained_cfg_overlay=dict(hf_hub_id="lab/damaged"))
    assert_explains(found, RuntimeError, "resnet18_iebn", "lab/damaged", "fetch it again", "delete it from the cache")


def test_a_hub_that_cannot_be_reached_is_named(unreachable, closed_port):
    found = unreachable(failure, "resnet18_iebn")
    assert_explains(found, OSError, "resnet18_iebn", closed_port, "'timm/resnet18.a1_in1k'", "refused", "HF_ENDPOINT")


def test_offline_with_a_cold_cache_says_so(offline, closed_port, tmp_path):
    found = offline(failure, "resnet18_iebn", cache_dir=tmp_path)
    assert_explains(found, OSError, "with HF_HUB_OFFLINE set", "'timm/resnet18.a1_in1k'", tmp_path, "pretrained=False")
