"""`pretrained=True` from files and folders, for which there is no Hub."""

import hashlib
import json

import pytest
import timm
import torch
from conftest import randomize
from pretrained import TWINS, WEIGHTS, assert_explains, assert_same, batch_norm_weights, failure, outputs
from safetensors.torch import save, save_file
from timm.models import save_for_hf

from timm_iebn import IEBN2d, convert_bn_to_iebn, convert_iebn_to_bn
from timm_iebn.convert import SHORTCUTS


@pytest.fixture
def file(tmp_path):
    """A function that gives the `create_model` arguments which load these weights from a file."""

    def make(weights):
        save_file(weights, tmp_path / "weights.safetensors")
        return dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.safetensors")))

    return make


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


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mobilenetv4_conv_small_050", "mobilenetv2_050", "resnet18"])
def test_what_timm_builds_with_the_layers_name_is_loaded_again_and_no_weights_without_gates(tmp_path, file, name):
    model = randomize(timm.create_model(name, norm_layer="iebn", num_classes=3)).eval()
    save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))
    plain = file(timm.create_model(name).state_dict())
    with pytest.raises(RuntimeError, match="timm_iebn.convert_bn_to_iebn"):
        timm.create_model(name, norm_layer="iebn", pretrained=True, **plain)


def test_a_converted_network_is_not_loaded_without_its_gates(tmp_path):
    kwargs = [{}, dict(features_only=True), dict(num_classes=4)]  # timm loads the last two non-strictly
    for name, leave in (("regnetx_002", SHORTCUTS), ("resnet18", ())):
        save_for_hf(convert_bn_to_iebn(timm.create_model(name), leave=leave), tmp_path / name, safe_serialization=True)
        for changes in kwargs:
            with pytest.raises(RuntimeError, match=f"{name}_iebn"):
                timm.create_model(f"local-dir:{tmp_path}/{name}", pretrained=True, **changes)
    model = convert_bn_to_iebn(timm.create_model("resnet18")).eval()
    save_for_hf(model, tmp_path / "twin", safe_serialization=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}/twin", pretrained=True).eval()(x), model(x))
    back = convert_iebn_to_bn(model)
    save_for_hf(back, tmp_path / "back", safe_serialization=True)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}/back", pretrained=True).eval()(x), back(x))


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


def test_weights_that_are_not_those_of_their_config_json_are_warned_of(folder, tmp_path):
    """Other tools copy config.json and write weights of their own beside it."""
    model = timm.create_model("resnet20_cifar_iebn")
    called = folder(model, model.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    config["weights_sha256"] = hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()
    (tmp_path / "config.json").write_text(json.dumps(config))
    timm.create_model(called, pretrained=True)
    flipped = bytearray((tmp_path / WEIGHTS).read_bytes())
    flipped[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(flipped)
    with pytest.warns(UserWarning, match=f"{tmp_path / WEIGHTS} is damaged, or was changed.*Remove weights_sha256"):
        timm.create_model(called, pretrained=True)


@pytest.mark.parametrize("text", ['{"weights_sha256": Infinity}', '{"weights_sha256": "0"}'])
def test_a_neighbour_of_the_weights_that_is_not_their_config_says_nothing_of_them(file, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    timm.create_model(
        "resnet20_cifar_iebn", pretrained=True, **file(timm.create_model("resnet20_cifar_iebn").state_dict())
    )


def test_a_wrong_argument_is_the_callers_and_not_the_folders(folder):
    model = timm.create_model("resnet20_cifar_iebn")
    with pytest.raises(TypeError, match="nonsense"):
        timm.create_model(folder(model, model.state_dict()), nonsense=1)


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
