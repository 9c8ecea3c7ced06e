"""Convolutions in bfloat16 without AVX-512, against float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timm_iebn.training.bfloat16 import ConvolutionsInFloat32

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
