"""bfloat16 computed in float32, where torch's own is slow, against float64."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training import SCRIPTS, SHORT, run

from timm_iebn.recipe import Recipe
from timm_iebn.training.bfloat16 import computed_in_float32, has_slow_bfloat16

HALF_ULP = 2.0**-8  # of bfloat16's 8 bits
LAYERS = {
    "conv2d": (lambda: nn.Conv2d(24, 32, 3, padding=1), (5, 24, 9, 9)),
    "grouped": (lambda: nn.Conv2d(24, 32, 3, stride=2, groups=8, bias=False), (5, 24, 9, 9)),
    "same": (lambda: nn.Conv2d(24, 32, 3, padding="same", dilation=2), (5, 24, 9, 9)),
    "conv1d": (lambda: nn.Conv1d(24, 32, 5, padding="same"), (5, 24, 33)),
    "conv3d": (lambda: nn.Conv3d(6, 8, 3), (2, 6, 7, 7, 7)),
    "linear": (lambda: nn.Linear(96, 32), (50, 96)),
}


def rounded(t):
    """Values that bfloat16 holds, so that rounding them again changes nothing."""
    return t.bfloat16().float()


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_results_and_gradients_are_those_of_float64_rounded_once(kind, memory_format, is_checkpointed):
    make, shape = LAYERS[kind]
    if memory_format == torch.channels_last and len(shape) != 4:
        pytest.skip("channels last is for images")
    layer, x = make(), rounded(torch.randn(shape))
    for parameter in layer.parameters():
        parameter.data = rounded(parameter.data)
    exact = make().double()
    exact.load_state_dict(layer.state_dict())
    exact_x = x.double().requires_grad_()
    layer, x = layer.to(memory_format=memory_format), x.to(memory_format=memory_format).requires_grad_()
    with computed_in_float32(True):
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(layer, x, use_reentrant=False) if is_checkpointed else layer(x)
        assert y.dtype == torch.bfloat16
        grad = torch.randn_like(y)
        found = [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]
    if len(shape) == 4:
        assert y.is_contiguous(memory_format=memory_format)
    y = exact(exact_x)
    wanted = [y.detach(), *torch.autograd.grad(y, [exact_x, *exact.parameters()], grad.double())]
    for a, b in zip(found, wanted, strict=True):
        # float32 sums are off by far less than the rounding, except where terms cancel
        torch.testing.assert_close(a.double(), b, rtol=1.01 * HALF_ULP, atol=2e-5 * b.abs().max().item())


def test_what_autocast_leaves_alone_is_left_alone():
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3)
    with computed_in_float32(True):
        torch.testing.assert_close(F.conv2d(x, weight), F.conv2d(x.double(), weight.double()).float())
        with torch.autocast("cpu", torch.bfloat16):
            assert F.conv2d(x.double(), weight.double()).dtype == torch.float64
            assert F.conv2d(input=x.bfloat16(), weight=weight, padding=1).dtype == torch.bfloat16
            assert F.batch_norm(x, None, None, training=True).dtype == torch.float32
            with torch.autocast("cpu", enabled=False):
                assert F.conv2d(x, weight).dtype == torch.float32
        with torch.autocast("cpu", torch.float16):
            assert F.conv2d(x, weight).dtype == torch.float16


def test_torchs_own_kernels_are_back_afterwards():
    def is_own():
        """As only the graph of ours has float32 in it."""
        with torch.autocast("cpu", torch.bfloat16):
            y = F.conv2d(torch.randn(1, 3, 8, 8), torch.randn(2, 3, 3, 3, requires_grad=True))
        return y.grad_fn.name() == "ConvolutionBackward0"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_own()
        for _ in range(2):
            with pytest.raises(KeyError), computed_in_float32(True):
                assert not is_own()
                raise KeyError
            with computed_in_float32(False):
                assert is_own()


@pytest.mark.parametrize("capability", ["AVX2", "AVX512", "SVE256"])
def test_processors_with_avx2_alone_are_slow(capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    recipe = Recipe(model="resnet20_cifar", data="digits", precision="bf16")
    assert has_slow_bfloat16(recipe, torch.device("cpu")) == (capability == "AVX2")
    assert not has_slow_bfloat16(recipe, torch.device("cuda"))
    assert not has_slow_bfloat16(Recipe(model="resnet20_cifar", data="digits"), torch.device("cpu"))


AS_IF_SLOW = """
import runpy
from timm_iebn.training import bfloat16, trainer

calls, compute = {{"conv2d": 0, "linear": 0}}, bfloat16._compute

def counted(operator, *args, **kwargs):
    calls[operator.name().removeprefix("aten::")] += 1
    return compute(operator, *args, **kwargs)

bfloat16._compute, trainer.has_slow_bfloat16 = counted, lambda recipe, device: True
try:
    runpy.run_path({path!r}, run_name="__main__")
finally:
    print("calls:", calls)
"""


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        # 7 batches, 9 convolutions; evaluation is in float32
        ("grad_checkpointing=false", dict(conv2d=7 * 9, linear=7)),
        # those of blocks once more backward
        ("grad_checkpointing=true", dict(conv2d=7 * (9 + 8), linear=7)),
    ],
)
def test_trainings_on_such_processors_use_it(change, calls, tmp_path):
    script = tmp_path / "as_if_slow.py"
    script.write_text(AS_IF_SLOW.format(path=str(SCRIPTS / "train.py")))
    recipe = [*SHORT, "epochs=1", "precision=bf16", change]
    result = run("--output", tmp_path / "out", *recipe, cwd=tmp_path, script=script)
    assert result.returncode == 0, result.stderr
    assert f"calls: {calls}" in result.stdout
