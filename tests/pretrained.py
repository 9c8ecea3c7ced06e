"""What comes of `pretrained=True`, be it from the Hub, a file or a folder; tests share it."""

import traceback

import pytest
import timm
import torch
from conftest import randomize
from safetensors.torch import save
from timm.models._hub import save_config_for_hf

import timm_iebn  # noqa: F401  whose networks are known by name, in a client's process too

TOKEN = "hf_do_not_print_this"
WEIGHTS = "model.safetensors"
TWINS = {
    "resnet18": "a1_in1k",
    "mobilenetv3_small_100": "lamb_in1k",
    "mobilenetv4_conv_small": "e2400_r224_in1k",
}


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


def batch_norm_weights(name):
    return randomize(timm.create_model(name)).state_dict()


@pytest.fixture
def folder(tmp_path):
    """A function that gives the `local-dir:` name of a folder with these weights, or bytes, of `model`."""

    def make(model, weights):
        save_config_for_hf(model, tmp_path / "config.json")
        (tmp_path / WEIGHTS).write_bytes(weights if isinstance(weights, bytes) else save(weights))
        return f"local-dir:{tmp_path}"

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
