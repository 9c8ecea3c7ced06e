"""Networks whose blocks add and activate inside the kernels."""

import pytest
import timm
import torch
from conftest import DEVICE, randomize
from timm.models.resnet import BasicBlock, Bottleneck

import timm_iebn
from timm_iebn.models._fused import fuse_blocks
from timm_iebn.ops import backend

triton = pytest.importorskip("timm_iebn.ops.triton", reason="Triton is not installed: pip install triton")


@pytest.mark.parametrize(
    ("name", "training"),
    [("resnet20_cifar_iebn", True), ("mobilenetv3_small_100_iebn", False)],
)
def test_a_network_gives_the_same_fused_and_unfused(name, training):
    # of a ReLU, one input within rounding of 0 would change gradients everywhere
    act = dict(act_layer="silu") if training else {}
    net = randomize(timm.create_model(name, num_classes=5, **act)).to(DEVICE).train(training)
    x, found = torch.randn(2, 3, 32, 32, device=DEVICE), []
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for chosen in ("eager", "triton"):
        net.load_state_dict(state)
        with backend(chosen):
            y = net(x)
            grads = torch.autograd.grad(y.square().sum(), list(net.parameters())) if training else ()
        found.append([t.detach().clone() for t in (y, *grads, *net.buffers())])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item() + 1e-6)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("downsampled", [True, False])
def test_a_block_gives_the_same_fused_and_unfused(block, downsampled):
    down = torch.nn.Conv2d(16, 16, 1) if downsampled else None
    made = block(16, 16 // block.expansion, downsample=down, norm_layer=timm_iebn.IEBN2d, act_layer=torch.nn.ReLU)
    made = fuse_blocks(randomize(made)).to(DEVICE)
    assert isinstance(made, block) and type(made) is not block
    state, found = {k: v.clone() for k, v in made.state_dict().items()}, []
    x = torch.randn(4, 16, 9, 7, device=DEVICE)
    for chosen in ("eager", "triton"):
        made.load_state_dict(state)
        with backend(chosen):
            leaf = x.clone().requires_grad_()
            y = made(leaf)
            found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *made.parameters()]), *made.buffers()])
        found[-1] = [t.detach().clone() for t in found[-1]]
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_blocks_fuse_the_addition_and_do_not_where_someone_looks(monkeypatch):
    net = timm.create_model("resnet20_cifar_iebn").to(DEVICE).eval()
    seen, real = [], triton.normalize

    def normalize(*args, residual=None, act=""):
        seen.append((residual is not None, act))
        return real(*args, residual=residual, act=act)

    monkeypatch.setattr(triton, "normalize", normalize)
    x = torch.randn(2, 3, 32, 32, device=DEVICE)
    with backend("triton"), torch.no_grad():
        net(x)
        assert (seen.count((False, "relu")), seen.count((True, "relu")), len(seen)) == (9, 9, 19)
        seen.clear()
        hook = net.layer1[0].bn2.register_full_backward_pre_hook(lambda *_: None)
        net(x)
        assert (seen.count((False, "relu")), seen.count((True, "relu")), len(seen)) == (8, 8, 19)
        hook.remove()
        seen.clear()
        net.layer1[0].bn1.forward = net.layer1[0].bn1.forward  # as accelerate puts weights in place
        net(x)
    assert (seen.count((False, "relu")), seen.count((True, "relu")), len(seen)) == (8, 8, 19)
