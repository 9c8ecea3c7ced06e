"""Inference on CPU, where the residual and the activation behind a layer are computed with it."""

import pytest
import timm
import torch
from conftest import randomize
from numerics import LAYOUTS, SHAPES, composed, draw, running, strided
from timm.layers import DropPath
from timm.models.resnet import BasicBlock, Bottleneck
from torch.testing._internal.two_tensor import TwoTensor

from timm_iebn import IEBN2d, IEBNAct2d
from timm_iebn import backend as use_backend
from timm_iebn.models._fused import fuse_blocks
from timm_iebn.ops import cpu, fuses, iebn, iebn_eager
from timm_iebn.ops.activations import ACTIVATIONS

needs_library = pytest.mark.skipif(cpu.library is None, reason="the CPU library was not built")


@pytest.mark.parametrize("layout", **LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", ""])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_results_are_as_exact_as_the_formula(act, with_residual, training, dtype, layout, backend):
    for shape in SHAPES:
        (x, *params), residual = draw(shape)
        x, residual = (t.to(dtype).contiguous(memory_format=layout) for t in (x, residual))
        params = [p.float() for p in params]

        def result(path, kind, x=x, params=params, residual=residual):
            wide = torch.promote_types(kind, torch.float32)
            stats = running(x.shape[1], "eval", 0.0, wide)
            behind = dict(residual=residual.to(kind) if with_residual else None, act=act)
            with torch.no_grad():
                y = path(x.to(kind), *(p.to(wide) for p in params), *stats, training, 0.3, 1e-5, **behind)
            return y, *stats

        ours, exact, formula = result(iebn_eager, dtype), result(composed, torch.float64), result(composed, dtype)
        assert ours[0].dtype == dtype and ours[0].is_contiguous(memory_format=layout)
        for place, (a, b, c) in enumerate(zip(ours, exact, formula, strict=True)):
            error, allowed = ((t.double() - b).abs().max() for t in (a, c))
            ulp = torch.finfo(dtype if place == 0 else torch.float32).eps * b.abs().max()
            assert error <= 16 * max(allowed, ulp), (shape, place)  # as `numerics.check` has it


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_not_a_number_stays_one(act, backend):
    x, one = torch.randn(2, 24, 5, 5), torch.ones(24)
    residual = torch.zeros_like(x)
    residual[1, 7, 2, 3] = float("nan")
    with torch.no_grad():
        y = iebn_eager(x, one, 0 * one, 0 * one, one, 0 * one, one, False, 0.1, 1e-5, residual=residual, act=act)
    assert torch.equal(y.isnan(), residual.isnan())


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_large_values_are_those_of_torch(act, backend):
    x, one = torch.zeros(1, 16, 1, 4), torch.ones(16)
    residual = torch.tensor([-1e38, -200.0, 200.0, 1e38]).expand_as(x).contiguous()
    with torch.no_grad():
        y = iebn_eager(x, one, 0 * one, 0 * one, one, 0 * one, one, False, 0.1, 1e-5, residual=residual, act=act)
    torch.testing.assert_close(y, ACTIVATIONS[act](residual))


@needs_library
@pytest.mark.parametrize("odd", [strided, torch._neg_view, lambda t: t.to(memory_format=torch.channels_last)])
def test_a_residual_may_lie_in_any_way(odd):
    x, one, residual = torch.randn(2, 24, 5, 5), torch.ones(24), odd(torch.randn(2, 24, 5, 5))
    args = x, one, 0 * one, 0 * one, one, 0 * one, one, False, 0.1, 1e-5
    with torch.no_grad():
        fused = iebn_eager(*args, residual=residual, act="relu")
    torch.testing.assert_close(fused, (iebn_eager(*args) + residual).relu())


@needs_library
def test_a_residual_that_does_not_fit_is_added_as_torch_does():
    x, one = torch.randn(2, 24, 5, 5), torch.ones(24)
    args = x, one, 0 * one, 0 * one, one, 0 * one, one, None, False, 0.1, 1e-5
    with torch.no_grad():
        for residual in (torch.randn(24, 1, 1), torch.randn(2, 24, 5, 5).double()):
            torch.testing.assert_close(iebn(*args, residual=residual), iebn(*args) + residual)
        torch.testing.assert_close(iebn(*args, residual=x.to_sparse()), iebn(*args) + x)
        with pytest.raises(RuntimeError, match="must match the size"):
            iebn(*args, residual=torch.randn(2, 24, 5, 4))
        with pytest.raises((RuntimeError, NotImplementedError)):
            iebn(*args, residual=torch.randn(2, 24, 5, 5, device="meta")).sum().item()


@needs_library
def test_a_residual_without_memory_of_its_own_is_added():
    """As of distributed tensors: the library would read nothing where it is."""
    x, one = torch.randn(2, 24, 5, 5), torch.ones(24)
    args = x, one, 0 * one, 0 * one, one, 0 * one, one, None, False, 0.1, 1e-5
    with torch.no_grad():
        y = iebn(*args, residual=TwoTensor(x, 2 * x), act="relu")
        torch.testing.assert_close(y.a, (iebn(*args) + x).relu())
        torch.testing.assert_close(y.b, (iebn(*args) + 2 * x).relu())


@needs_library
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_block_is_as_random_and_as_wide_without_a_gradient(block, seen):
    made = fuse_blocks(block(16, 16 // block.expansion, norm_layer=IEBN2d, drop_path=DropPath(0.5))).eval()
    x, calls = torch.randn(64, 16, 5, 5), []
    made.drop_path.train()
    with torch.no_grad():
        assert not torch.equal(made(x), made(x))
        made.drop_path.eval()
        assert torch.equal(made(x), made(x)) and (True, "relu") in seen
        hook = made.drop_path.register_forward_hook(lambda *_: calls.append(1))
        made(x)
    assert calls
    hook.remove()  # or nothing would be fused below
    with torch.autocast("cpu", torch.bfloat16):
        types = [made(x).dtype]
        with torch.no_grad():
            types.append(made(x).dtype)
    assert types[0] == types[1]


@pytest.fixture
def seen(monkeypatch):
    """What each layer has computed with it: whether a residual, and which activation."""
    calls, real = [], cpu.forward

    def forward(*args, residual=None, act="", **kwargs):
        calls.append((residual is not None, act))
        return real(*args, residual=residual, act=act, **kwargs)

    monkeypatch.setattr(cpu, "forward", forward)
    return calls


@needs_library
def test_blocks_fuse_in_inference_alone_and_not_where_someone_looks(seen):
    net, x = timm.create_model("resnet20_cifar_iebn", depth=1).eval(), torch.randn(2, 3, 32, 32)

    def calls():
        seen.clear()
        net(x)
        return seen.count((False, "relu")), seen.count((True, "relu")), len(seen)

    assert calls() == (0, 0, 7)  # a gradient is wanted
    with torch.no_grad():
        assert calls() == (3, 3, 7)
        hook = net.layer1[0].bn2.register_forward_hook(lambda *_: None)
        assert calls() == (2, 2, 7)
        hook.remove()
        with use_backend("reference"):
            assert calls() == (0, 0, 0) and not fuses(x)
    with torch.inference_mode():
        assert calls() == (3, 3, 7)


@needs_library
def test_norms_with_an_activation_fuse_it(seen):
    layer, x = IEBNAct2d(4, act_layer="silu").eval(), torch.randn(2, 4, 5, 5)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert seen == [(False, ""), (False, "silu")]


def test_a_batched_function_is_that_of_each():
    layer, x = randomize(IEBNAct2d(4)).eval(), torch.randn(3, 2, 5, 6, 4).movedim(-1, 2)  # channels last
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(part) for part in x]))


@needs_library
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_networks_give_the_same_with_and_without_a_gradient(block, training):
    name = "resnet18_iebn" if block is BasicBlock else "resnet50_iebn"
    net = randomize(timm.create_model(name, num_classes=5, layers=[1, 1, 1, 1], act_layer="silu"))
    net.train(training).to(memory_format=torch.channels_last)
    state, x, found = {k: v.clone() for k, v in net.state_dict().items()}, torch.randn(4, 3, 64, 64), []
    for has_grad in (True, False):
        net.load_state_dict(state)
        with torch.set_grad_enabled(has_grad):
            y = net(x)
        found.append([t.detach().clone() for t in (y, *net.buffers())])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
