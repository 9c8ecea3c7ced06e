"""Networks whose blocks add and activate inside the kernels."""

from functools import partial

import pytest
import timm
import torch
from conftest import DEVICE, randomize
from timm.layers import BlurPool2d, DropBlock2d, DropPath
from timm.models.resnet import BasicBlock, Bottleneck

import timm_iebn
from timm_iebn.models._fused import fuse_blocks
from timm_iebn.ops import backend, cpu
from timm_iebn.ops.backend import triton

needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed: pip install triton")
needs_library = pytest.mark.skipif(cpu.library is None, reason="the CPU library was not built")
each_backend = pytest.mark.parametrize(
    ("chosen", "device"),
    [pytest.param("eager", "cpu", marks=needs_library), pytest.param("triton", DEVICE, marks=needs_triton)],
)


@each_backend
@pytest.mark.parametrize(
    ("name", "training"),
    [("resnet20_cifar_iebn", True), ("mobilenetv3_small_100_iebn", False)],
)
def test_a_network_gives_the_same_fused_and_unfused(name, training, chosen, device):
    # of a ReLU, one input within rounding of 0 would change gradients everywhere
    act = dict(act_layer="silu") if training else {}
    net = randomize(timm.create_model(name, num_classes=5, **act)).to(device).train(training)
    x, found = torch.randn(2, 3, 32, 32, device=device), []
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for path in ("reference", chosen):
        net.load_state_dict(state)
        with backend(path):
            y = net(x)
            grads = torch.autograd.grad(y.square().sum(), list(net.parameters())) if training else ()
        found.append([t.detach().clone() for t in (y, *grads, *net.buffers())])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item() + 1e-6)


@each_backend
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("downsampled", [True, False])
def test_a_block_gives_the_same_fused_and_unfused(block, downsampled, chosen, device):
    downsample = torch.nn.Conv2d(16, 16, 1) if downsampled else None
    _assert_same_fused(chosen, device, block, torch.nn.ReLU, downsample=downsample)


@each_backend
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("part", ["se", "aa", "drop_path", "drop_block"])
def test_what_stands_behind_the_norms_of_a_block_stays(block, part, chosen, device):
    parts = dict(
        se=lambda: dict(attn_layer="se"),
        aa=lambda: dict(aa_layer=BlurPool2d, stride=2, downsample=torch.nn.Conv2d(16, 16, 1, stride=2)),
        drop_path=lambda: dict(drop_path=DropPath(0.5)),
        drop_block=lambda: dict(drop_block=partial(DropBlock2d, drop_prob=0.5, block_size=3)),
    )
    _assert_same_fused(chosen, device, block, torch.nn.SiLU, **parts[part]())


def _assert_same_fused(chosen, device, block, act_layer, **kwargs):
    kwargs |= dict(norm_layer=timm_iebn.IEBN2d, act_layer=act_layer)
    made = fuse_blocks(randomize(block(16, 16 // block.expansion, **kwargs))).to(device)
    assert isinstance(made, block) and type(made) is not block
    state, found = {k: v.clone() for k, v in made.state_dict().items()}, []
    x = torch.randn(4, 16, 9, 7, device=device)
    for path in ("reference", chosen):
        made.load_state_dict(state)
        torch.manual_seed(0)  # of what is dropped
        with backend(path):
            leaf = x.clone().requires_grad_()
            y = made(leaf)
            found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *made.parameters()]), *made.buffers()])
        found[-1] = [t.detach().clone() for t in found[-1]]
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@needs_triton
def test_blocks_fuse_the_addition_and_do_not_where_someone_looks(monkeypatch):
    net = timm.create_model("resnet20_cifar_iebn", depth=1).to(DEVICE).eval()
    seen, real = [], triton.normalize

    def normalize(*args, residual=None, act=""):
        seen.append((residual is not None, act))
        return real(*args, residual=residual, act=act)

    monkeypatch.setattr(triton, "normalize", normalize)
    x = torch.randn(2, 3, 32, 32, device=DEVICE)
    with backend("triton"), torch.no_grad():
        net(x)
        assert (seen.count((False, "relu")), seen.count((True, "relu")), len(seen)) == (3, 3, 7)
        seen.clear()
        hook = net.layer1[0].bn2.register_full_backward_pre_hook(lambda *_: None)
        net(x)
        assert (seen.count((False, "relu")), seen.count((True, "relu")), len(seen)) == (2, 2, 7)
        hook.remove()
        seen.clear()
        net.layer1[0].bn1.forward = net.layer1[0].bn1.forward  # as accelerate puts weights in place
        net(x)
    assert (seen.count((False, "relu")), seen.count((True, "relu")), len(seen)) == (2, 2, 7)


@each_backend
def test_a_norm_with_an_activation_does_not_fuse_where_someone_looks_between(chosen, device):
    norm, x, calls = timm_iebn.IEBNAct2d(4).to(device), torch.randn(2, 4, 5, 5, device=device), []
    norm.drop.register_forward_hook(lambda *_: calls.append(1))
    with backend(chosen):
        norm(x)
    assert calls
