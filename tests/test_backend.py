"""The choice among the backends: by the user, and by input and device."""

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE

import timm_iebn
from timm_iebn.ops import backend, uses_triton

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
triton = importlib.import_module("timm_iebn.ops.triton")
backends = importlib.import_module("timm_iebn.ops.backend")  # the function has the module's name


def test_the_choice_of_the_backend():
    assert timm_iebn.get_backend() == "auto"
    with backend("reference"):
        assert timm_iebn.get_backend() == "reference"
        with backend("eager"):
            assert timm_iebn.get_backend() == "eager"
    assert timm_iebn.get_backend() == "auto"
    with pytest.raises(ValueError, match="one of auto, reference, eager, triton, got 'cuda'"):
        timm_iebn.set_backend("cuda")


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU on which the kernels run")
def test_a_device_where_triton_does_not_run_is_left_to_torch_with_a_warning(monkeypatch):
    """Chosen for an input as on such a device, which is all that this machine lacks."""
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dim=lambda: 4, is_floating_point=lambda: True)
    monkeypatch.setattr(triton, "supports", lambda _: True)
    monkeypatch.setattr(backends, "_tried", {})
    with pytest.warns(UserWarning, match="takes torch's operations on cuda:0, its kernels do not run: .+"):
        assert not uses_triton(x)
    assert not uses_triton(x)  # and is not tried again
    monkeypatch.setattr(backends, "_tried", {x.device: True})
    assert uses_triton(x)


def test_triton_is_refused_at_once_where_there_is_no_gpu_for_it():
    code = "import timm_iebn; timm_iebn.set_backend('triton')"
    environment = os.environ | dict(TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode and "RuntimeError: the backend 'triton' needs a CUDA GPU; 'auto'" in result.stderr


def test_what_the_kernels_cannot_take_is_named_where_they_are_forced():
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    layer = timm_iebn.IEBN2d(4).double()
    with (
        backend("triton"),
        pytest.raises(RuntimeError, match="can't take torch.float64 input.*set_backend\\('auto'\\)"),
    ):
        layer(x)
    layer(x)


@pytest.mark.parametrize("chosen", ["reference", "eager", "triton"])
@pytest.mark.parametrize("act_layer", [torch.nn.ReLU, torch.nn.ReLU6, torch.nn.Hardswish, torch.nn.SiLU, torch.nn.Tanh])
def test_a_layer_gives_the_same_with_every_backend(chosen, act_layer):
    layer = timm_iebn.IEBNAct2d(4, act_layer=act_layer).to(DEVICE)
    torch.nn.init.normal_(layer.gate_weight)
    x, found = torch.randn(2, 4, 6, 6, device=DEVICE), []
    for name in ("reference", chosen):
        with backend(name):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            found.append((y, *torch.autograd.grad(y.sum(), [leaf, *layer.parameters()])))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
