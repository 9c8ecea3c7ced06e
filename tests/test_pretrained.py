"""`pretrained=True` with the real Hub client against a loopback Hub, and from files and folders.

The client reads its environment when it is imported, so what needs a Hub runs in a process of its own: `online`,
`offline` and `unreachable` are functions that run a function there.
"""

import hashlib
import json
import os
import re
import socket
import traceback

import pytest
import timm
import torch
from conftest import blocks, randomize
from hub_client import client
from hub_server import Fault, Hub, Repo
from safetensors.torch import load, save, save_file
from timm.models._hub import save_config_for_hf

from timm_iebn import IEBN2d
from timm_iebn.card import make_warm_start_card

TOKEN = "hf_do_not_print_this"
WEIGHTS = "model.safetensors"
TWINS = {
    "resnet18": "a1_in1k",
    "mobilenetv3_small_100": "lamb_in1k",
    "mobilenetv4_conv_small": "e2400_r224_in1k",
}


# --- run by the clients' processes


def outputs(name, call="__call__", **kwargs):
    """What the network computes for a fixed batch, in float64."""
    model = timm.create_model(name, pretrained=True, **kwargs).double().eval()
    shape = (2, kwargs.get("in_chans", 3), 64, 64)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = getattr(model, call)(x)
    return [t.numpy() for t in y] if isinstance(y, list) else [y.numpy()]


def state(name, **kwargs):
    model = timm.create_model(name, pretrained=True, **kwargs)
    return {key: t.numpy() for key, t in model.state_dict().items()}


def failure(name, **kwargs):
    """The type of the error that `create_model` ends in, its message and everything that would be printed."""
    try:
        timm.create_model(name, pretrained=True, **kwargs)
    except Exception as e:
        return type(e), str(e), "".join(traceback.format_exception(e))
    raise AssertionError(f"{name} was created")


def execute(code, folder):
    os.chdir(folder)
    exec(code, {})


# --- Hub, clients, files


def batch_norm_weights(name):
    return randomize(timm.create_model(name)).state_dict()


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


@pytest.fixture
def folder(tmp_path):
    """A function that gives the `local-dir:` name of a folder with these weights, or bytes, of `model`."""

    def make(model, weights):
        save_config_for_hf(model, tmp_path / "config.json")
        (tmp_path / WEIGHTS).write_bytes(weights if isinstance(weights, bytes) else save(weights))
        return f"local-dir:{tmp_path}"

    return make


@pytest.fixture
def file(tmp_path):
    """A function that gives the `create_model` arguments which load these weights from a file."""

    def make(weights):
        save_file(weights, tmp_path / "weights.safetensors")
        return dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.safetensors")))

    return make


def assert_same(ours, theirs):
    """The same to the rounding of weights that were divided by the gate's start, which they carry in float32."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and b.std() > 0
        assert abs(a - b).max() <= 1e-5 * abs(b).max()


def assert_explains(found, kind, *names):
    """The error is of this kind, one paragraph with these names in it, and the token is nowhere."""
    error, message, printed = found
    assert issubclass(error, kind), printed
    assert not [str(name) for name in names if str(name) not in message], message
    assert "\n" not in message
    assert TOKEN not in printed


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


# --- files and folders, for which there is no Hub


@pytest.mark.parametrize("twin", TWINS)
def test_a_batch_norm_file_is_a_warm_start(file, twin):
    kwargs = file(batch_norm_weights(twin))
    assert_same(outputs(f"{twin}_iebn", **kwargs), outputs(twin, **kwargs))


@pytest.mark.parametrize("source", ["file", "folder"])
def test_trained_gates_load_untouched(file, folder, source):
    model = randomize(timm.create_model("resnet18_iebn"))
    if source == "file":
        loaded = timm.create_model("resnet18_iebn", pretrained=True, **file(model.state_dict()))
    else:
        loaded = timm.create_model(folder(model, model.state_dict()), pretrained=True)
    assert any(m.gate_weight.any() for m in loaded.modules() if isinstance(m, IEBN2d))
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


CHANGES = [{}, dict(num_classes=10), dict(features_only=True)]  # timm loads the last two non-strictly


@pytest.mark.parametrize("kwargs", CHANGES, ids=str)
@pytest.mark.parametrize("lost", ["gate_", "layer2.0.bn1.gate_bias", "layer2.0.bn1."])
def test_a_native_checkpoint_without_gates_is_refused(folder, lost, kwargs):
    model = timm.create_model("resnet18_iebn")
    kept = {key: t for key, t in model.state_dict().items() if lost not in key}
    first = "bn1.gate_weight" if lost == "gate_" else "layer2.0.bn1.gate_"
    assert_explains(failure(folder(model, kept), **kwargs), RuntimeError, "resnet18_iebn", "lacks", "gate", first)


@pytest.mark.parametrize("kwargs", CHANGES, ids=str)
@pytest.mark.parametrize("lost", ["layer2.0.bn1.gate_bias", "layer2.0.bn1."])
def test_a_gated_file_that_lacks_some_gates_is_refused(file, lost, kwargs):
    weights = timm.create_model("resnet18_iebn").state_dict()
    kept = {key: t for key, t in weights.items() if lost not in key}
    error, message, _ = failure("resnet18_iebn", **file(kept), **kwargs)
    assert error is RuntimeError and "layer2.0.bn1.gate_" in message


# --- errors of files, folders and names


def test_an_overlay_file_that_does_not_exist_is_named(tmp_path):
    path = tmp_path / "nowhere.safetensors"
    found = failure("resnet18_iebn", pretrained_cfg_overlay=dict(file=str(path)))
    assert_explains(found, OSError, "resnet18_iebn", path, "Check the path")


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1000], lambda _: b"not safetensors"], ids=["cut", "text"])
@pytest.mark.parametrize("name", ["mobilenetv3_small_100_iebn", "resnet20_cifar"])
def test_a_damaged_file_is_named(folder, tmp_path, name, damage):
    model = timm.create_model(name)
    found = failure(folder(model, damage(save(model.state_dict()))))
    assert_explains(found, RuntimeError, name, tmp_path, "damaged", "fetch it again")


@pytest.mark.parametrize("content", ["cut", "text", "empty"])
@pytest.mark.parametrize("name", ["resnet18_iebn", "resnet20_cifar"])
def test_a_damaged_pickle_is_named(tmp_path, name, content):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model(name).state_dict(), path)
    path.write_bytes(dict(cut=path.read_bytes()[:-1000], text=b"hello", empty=b"")[content])
    assert_explains(failure(name, pretrained_cfg_overlay=dict(file=str(path))), RuntimeError, name, path)


@pytest.mark.parametrize("name", ["resnet20_cifar_iebn", "resnet20_cifar"])
@pytest.mark.parametrize("place", ["num_classes", "model_args"])
@pytest.mark.parametrize("number", [-1, 10, 10**9, "ten", None])
def test_classes_that_are_not_those_of_the_weights_leave_no_random_head(folder, tmp_path, name, place, number):
    model = timm.create_model(name, num_classes=12)
    called = folder(model, model.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {place: number if place == "num_classes" else dict(num_classes=number)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_explains(failure(called), RuntimeError, tmp_path, "num_classes", name)


def test_what_config_json_can_not_mean_is_named_with_its_folder(folder, tmp_path):
    model = timm.create_model("resnet20_cifar_iebn")
    called = folder(model, model.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | dict(model_args=dict(nonsense=1))))
    assert_explains(failure(called), RuntimeError, tmp_path, "config.json", "nonsense")


def test_weights_that_are_not_those_of_their_config_json_are_refused(folder, tmp_path):
    model = timm.create_model("resnet20_cifar_iebn")
    called = folder(model, model.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    config["weights_sha256"] = hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()
    (tmp_path / "config.json").write_text(json.dumps(config))
    timm.create_model(called, pretrained=True)
    flipped = bytearray((tmp_path / WEIGHTS).read_bytes())
    flipped[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(flipped)
    assert_explains(failure(called), RuntimeError, tmp_path / WEIGHTS, "damaged")


def test_a_folder_without_config_is_named(tmp_path):
    assert_explains(failure(f"local-dir:{tmp_path}"), FileNotFoundError, tmp_path / "config.json")


def test_a_folder_without_weights_is_named(folder, tmp_path):
    name = folder(timm.create_model("resnet18_iebn"), b"")
    (tmp_path / WEIGHTS).unlink()
    assert_explains(failure(name), RuntimeError, tmp_path)


@pytest.mark.parametrize("kwargs", CHANGES, ids=str)
@pytest.mark.parametrize("other", ["resnet34", "resnet34_iebn", "mobilenetv3_small_100", "mobilenetv3_small_100_iebn"])
def test_weights_of_another_network_are_refused(file, other, kwargs):
    error, _, printed = failure("resnet18_iebn", **file(timm.create_model(other).state_dict()), **kwargs)
    assert error is RuntimeError, printed


@pytest.mark.parametrize("other", ["resnet34", "resnet34_iebn", "mobilenetv3_small_100", "mobilenetv3_small_100_iebn"])
def test_weights_of_another_network_are_named(file, tmp_path, other):
    found = failure("resnet18_iebn", **file(timm.create_model(other).state_dict()))
    assert_explains(found, RuntimeError, "resnet18_iebn", tmp_path / "weights.safetensors")


@pytest.mark.parametrize("name", ["resnet19_iebn", "resnet18_iebn.warmstart_a9_in1k"])
def test_an_unknown_name_is_named(name):
    assert_explains(failure(name), RuntimeError, *name.split("."))


@pytest.mark.parametrize("name", ["resnet18_iebn", "resnet20_cifar"])
def test_a_bad_argument_is_not_called_a_bad_file(name):
    with pytest.raises(KeyError, match="nope"):
        timm.create_model(name, pretrained=True, act_layer="nope")
