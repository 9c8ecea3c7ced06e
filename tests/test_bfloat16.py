"""Convolutions in bfloat16 without AVX-512, against float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training import ENVIRONMENT, SCRIPTS, SHORT, run

from timm_iebn.recipe import Recipe
from timm_iebn.training.bfloat16 import ConvolutionsInFloat32, bfloat16_context, lacks_bfloat16

HALF_ULP = 2.0**-8  # of bfloat16's 8 bits


def rounded(shape, scale=1.0):
    """Random values that bfloat16 holds, so that rounding them again changes nothing."""
    return (scale * torch.randn(shape)).bfloat16().float()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=3, padding=1),
        dict(kernel_size=3, stride=2, padding=1, groups=8),
        dict(kernel_size=1, bias=False),
        dict(kernel_size=3, padding="same", dilation=2),
    ],
    ids=str,
)
def test_results_and_gradients_are_those_of_float64_rounded_once(options, memory_format):
    layer = nn.Conv2d(24, 32, **options).to(memory_format=memory_format)
    for parameter in layer.parameters():
        parameter.data = rounded(parameter.shape, 0.1).to(memory_format=memory_format if parameter.ndim == 4 else None)
    x = rounded((5, 24, 9, 9)).to(memory_format=memory_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), ConvolutionsInFloat32():
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=memory_format)
    grad = torch.randn_like(y)
    found = [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]

    exact = nn.Conv2d(24, 32, **options).double()
    exact.load_state_dict(layer.state_dict())
    x = x.detach().double().requires_grad_()
    y = exact(x)
    wanted = [y.detach(), *torch.autograd.grad(y, [x, *exact.parameters()], grad.double())]
    for a, b in zip(found, wanted, strict=True):
        # float32 sums are off by far less than the rounding, except where terms cancel
        torch.testing.assert_close(a.double(), b, rtol=1.01 * HALF_ULP, atol=2e-5 * b.abs().max().item())


def test_only_convolutions_within_autocast_are_changed():
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3)
    with ConvolutionsInFloat32():
        assert F.conv2d(x, weight).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert F.conv2d(input=x, weight=weight, padding=1).dtype == torch.bfloat16
            assert F.linear(x, x[0, 0]).dtype == torch.bfloat16
            assert F.batch_norm(x, None, None, training=True).dtype == torch.float32
            with torch.autocast("cpu", enabled=False):
                torch.testing.assert_close(F.conv2d(x, weight), F.conv2d(x.double(), weight.double()).float())


COUNTING = """
import atexit, runpy, torch
from torch.nn import functional as F
from timm_iebn.training.bfloat16 import ConvolutionsInFloat32

count, take = 0, ConvolutionsInFloat32.__torch_function__

def count_and_take(self, func, types, args=(), kwargs=None):
    global count
    count += func is F.conv2d and torch.is_autocast_enabled('cpu')
    return take(self, func, types, args, kwargs)

ConvolutionsInFloat32.__torch_function__ = count_and_take
atexit.register(lambda: print("convolutions:", count))
runpy.run_path({path!r}, run_name="__main__")
"""


def test_training_in_bfloat16_without_avx512_uses_them(tmp_path):
    script = tmp_path / "counting.py"
    script.write_text(COUNTING.format(path=str(SCRIPTS / "train.py")))
    environment = ENVIRONMENT | dict(ATEN_CPU_CAPABILITY="avx2")  # as torch sees a processor without AVX-512
    recipe = [*SHORT, "epochs=1", "precision=bf16"]
    result = run("--output", tmp_path / "out", *recipe, cwd=tmp_path, env=environment, script=script)
    assert result.returncode == 0, result.stderr
    (count,) = [int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("convolutions:")]
    assert count == 7 * 9  # batches and convolutions; evaluation is in float32


@pytest.mark.parametrize(
    "precision, compile, device",
    [("bf16", False, "cpu"), ("bf16", True, "cpu"), ("bf16", False, "cuda"), ("no", False, "cpu")],
)
def test_nothing_else_uses_them(precision, compile, device):
    recipe = Recipe(model="resnet20_cifar", data="digits", precision=precision, compile=compile)
    context = bfloat16_context(recipe, torch.device(device))
    is_eager_bfloat16 = (precision, compile, device) == ("bf16", False, "cpu")
    assert isinstance(context, ConvolutionsInFloat32) == (is_eager_bfloat16 and lacks_bfloat16())
