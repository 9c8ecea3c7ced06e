"""On CPU too, the residual and the activation behind a layer are computed with it."""

from contextlib import nullcontext

import pytest
import timm
import torch
from conftest import PATHS, randomize
from numerics import LAYOUTS, SHAPES, composed, draw, running, strided
from timm.layers import DropPath
from timm.models.resnet import BasicBlock, Bottleneck
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from timm_iebn import IEBN2d, IEBNAct2d
from timm_iebn import backend as use_backend
from timm_iebn.models._fused import fuse_blocks
from timm_iebn.ops import cpu, fuses, iebn, iebn_eager
from timm_iebn.ops.activations import ACTIVATIONS

needs_library = pytest.mark.skipif(cpu.library is None, reason="the CPU library was not built")


KINKS = -3, 0, 3, 6  # of the activations: rounding decides on which side of one an input is, and so the gradient


def results(path, kind, tensors, grad, training, act):
    """The output, the gradients if there is a `grad`, and the running statistics; and how large each may be taken."""
    wide = torch.promote_types(kind, torch.float32)
    kinds = kind, *(wide,) * 4, kind
    leaves = [None if t is None else t.to(k).requires_grad_() for t, k in zip(tensors, kinds, strict=True)]
    x, c = leaves[0], leaves[0].shape[1]
    stats = running(c, "eval", 0.0, wide)
    with torch.set_grad_enabled(grad is not None):
        y = path(*leaves[:5], *stats, training, 0.3, 1e-5, residual=leaves[5], act=act)
    inputs = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(y, inputs, grad.to(kind)) if grad is not None else ()
    assert all(d.dtype == t.dtype for d, t in zip(grads, inputs, strict=False))
    # sums may nearly cancel: as large as those of as many terms of about 1
    sizes = [1.0 if d.dim() == 4 else (x.numel() / c) ** 0.5 for d in grads]
    return [y.detach(), *grads, *stats], [1.0, *sizes, 1.0, 1.0]


@pytest.mark.parametrize("layout", **LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("training", "has_grad"), [(True, True), (False, True), (False, False)], ids=["train", "eval", "inference"]
)
@pytest.mark.parametrize("has_residual", [True, False], ids=["residual", ""])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("backend", PATHS[1:], indirect=True)
def test_results_and_gradients_are_as_exact_as_the_formula(
    act, has_residual, has_grad, training, dtype, layout, backend
):
    for shape in SHAPES:
        (x, *params), residual = draw(shape)
        dense = [t.to(dtype).contiguous(memory_format=layout) for t in (2 * x, residual, torch.randn_like(x))]
        tensors, grad = (dense[0], *(p.float() for p in params), dense[1] if has_residual else None), None
        if has_grad:
            (before, *_), _ = results(composed, torch.float64, tensors, None, training, "")
            near = torch.stack([(before - kink).abs() < 1e-3 for kink in KINKS]).any(0)
            grad = dense[2].masked_fill(near, 0)
        (ours, sizes), (exact, _), (formula, _) = (
            results(path, kind, tensors, grad, training, act)
            for path, kind in ((iebn_eager, dtype), (composed, torch.float64), (composed, dtype))
        )
        assert ours[0].dtype == dtype and ours[0].is_contiguous(memory_format=layout)
        largest = [b.abs().max().clamp(min=size) for b, size in zip(exact, sizes, strict=True)]
        errors, allowed = (
            [((a.double() - b).abs().max() / c).item() for a, b, c in zip(found, exact, largest, strict=True)]
            for found in (ours, formula)
        )
        for kind in {t.dtype for t in ours}:  # as `numerics.check` has it
            of_kind = [place for place, t in enumerate(ours) if t.dtype == kind]
            limit = 16 * max(torch.finfo(kind).eps, *(allowed[place] for place in of_kind))
            assert all(errors[place] <= limit for place in of_kind), (shape, errors, allowed)


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
    leaves, args = [residual.clone().requires_grad_() for _ in range(2)], (one, 0 * one, 0 * one, one, 0 * one, one)
    y = iebn_eager(x, *args, False, 0.1, 1e-5, residual=leaves[0], act=act)
    expected = ACTIVATIONS[act](leaves[1])
    torch.testing.assert_close(y, expected)
    grads = (torch.autograd.grad(result.sum(), leaf) for result, leaf in zip((y, expected), leaves, strict=True))
    torch.testing.assert_close(*grads)


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
def test_a_block_is_as_random_and_as_wide_as_unfused(block, seen):
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
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        fused = made(x).dtype
        with use_backend("reference"):
            assert made(x).dtype == fused


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
def test_blocks_fuse_and_do_not_where_someone_looks(seen):
    net, x = timm.create_model("resnet20_cifar_iebn", depth=1).eval(), torch.randn(2, 3, 32, 32)

    def calls():
        seen.clear()
        net(x)
        return seen.count((False, "relu")), seen.count((True, "relu")), len(seen)

    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert calls() == (3, 3, 7)
    hook = net.layer1[0].bn2.register_forward_hook(lambda *_: None)
    assert calls() == (2, 2, 7)
    hook.remove()
    with use_backend("reference"):
        assert calls() == (0, 0, 0) and not fuses(x)


@needs_library
def test_norms_with_an_activation_fuse_it(seen):
    layer, x = IEBNAct2d(4, act_layer="silu").eval(), torch.randn(2, 4, 5, 5)
    with use_backend("reference"):
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected)
    assert seen == [(False, "silu")]


def test_a_batched_function_is_that_of_each():
    layer, x = randomize(IEBNAct2d(4)).eval(), torch.randn(3, 2, 5, 6, 4).movedim(-1, 2)  # channels last
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(part) for part in x]))


@needs_library
def test_half_types_are_rounded_once():
    """Where the composition rounds after each step."""
    (x, *params), grad = draw((3, 20, 9, 11))
    x, residual, grad = (t.bfloat16().double() for t in (x, torch.randn_like(x), grad))
    found = []
    for function, kind in ((iebn_eager, torch.bfloat16), (composed, torch.float64)):
        leaves = [t.to(kind).requires_grad_() for t in (x, residual)]
        wide = [p.float().to(torch.promote_types(kind, torch.float32)) for p in params]
        y = function(leaves[0], *wide, None, None, True, 0.1, 1e-5, residual=leaves[1], act="silu")
        found.append([t.detach().double() for t in (y, *torch.autograd.grad(y, leaves, grad.to(kind)))])
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).abs().max() <= 0.51 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@needs_library
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("has_residual", [True, False], ids=["residual", ""])
def test_gradients_of_some_inputs_only(has_residual, act):
    (x, *params), residual = draw((4, 24, 5, 6))
    tensors, grad = [t.float() for t in (x, *params, residual)], torch.randn(x.shape)
    count = 6 if has_residual else 5

    def grads(path, wanted):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        y = path(*leaves[:5], None, None, True, 0.1, 1e-5, residual=leaves[5] if has_residual else None, act=act)
        y.backward(grad)
        return [leaf.grad for leaf in leaves[:count]]

    expected = grads(composed, range(count))
    for wanted in ([0], [2], [3, 4], [count - 1], [1, 2, 3, 4, 5]):
        for place, ours in enumerate(grads(iebn_eager, wanted)[:count]):
            if place in wanted:
                torch.testing.assert_close(ours, expected[place], rtol=1e-4, atol=1e-4)
            else:
                assert ours is None


@needs_library
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("has_residual", [True, False], ids=["residual", ""])
@pytest.mark.parametrize("twice", [True, False], ids=["twice", "watched"])
def test_derivatives_that_go_through_the_formula(twice, has_residual, act):
    """Second ones, and those in a backward pass that a dispatch mode watches."""
    (x, *params), residual = draw((2, 3, 4, 5))
    tensors, grad = [t.float() for t in (x, *params, *([residual] if has_residual else []))], torch.randn(x.shape)
    found = []
    for path in (iebn_eager, composed):
        leaves = [t.clone().requires_grad_() for t in tensors]
        behind = dict(residual=leaves[5] if has_residual else None, act=act)
        y = path(*leaves[:5], None, None, True, 0.1, 1e-5, **behind)
        with nullcontext() if twice else FlopCounterMode(display=False):
            first = torch.autograd.grad(y, leaves, grad, create_graph=twice)
        squares = sum((d**2).sum() for d in first)
        second = torch.autograd.grad(squares, leaves, materialize_grads=True) if twice else ()
        assert twice or not any(d.requires_grad for d in first)
        found.append((*first, *second))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@needs_library
def test_nothing_of_the_size_of_the_input_is_kept_but_where_it_is_needed():
    (x, *params), residual = draw((2, 24, 16, 16))
    x, *params, residual = (t.float().requires_grad_() for t in (x, *params, residual))
    for other, act, expected in ((None, "silu", 1), (residual, "", 1), (residual, "relu", 2), (residual, "silu", 2)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            iebn_eager(x, *params, None, None, True, 0.1, 1e-5, residual=other, act=act)
        assert sum(t.numel() == x.numel() for t in kept) == expected, act


@needs_library
@pytest.mark.parametrize("act", ["", "relu", "silu"])
def test_an_input_may_be_its_own_residual_and_a_gradient_without_strides(act):
    (x, *params), _ = draw((4, 24, 5, 6))
    found = []
    for path in (iebn_eager, composed):
        leaves = [t.float().requires_grad_() for t in (x, *params)]
        y = path(*leaves, None, None, True, 0.1, 1e-5, residual=leaves[0], act=act)
        found.append(torch.autograd.grad(y.sum(), leaves))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@needs_library
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of torch's own code
@pytest.mark.parametrize("act", ["", "relu", "silu"])
def test_gradients_may_be_taken_many_at_once_and_forward(act):
    (x, *params), residual = draw((3, 4, 5, 6))
    leaves, grads = [t.float().requires_grad_() for t in (x, *params, residual)], torch.randn(2, *x.shape)
    y = iebn_eager(*leaves[:5], None, None, True, 0.1, 1e-5, residual=leaves[5], act=act)

    def backward(grad, **kwargs):
        return torch.autograd.grad(y, leaves, grad, retain_graph=True, **kwargs)

    for at_once in (backward(grads, is_grads_batched=True), torch.vmap(backward)(grads)):
        for i in range(2):
            for ours, expected in zip(at_once, backward(grads[i]), strict=True):
                torch.testing.assert_close(ours[i], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    if act == "silu":  # whose own gradient torch does not take forward
        return
    with forward_ad.dual_level():
        tangents = [forward_ad.unpack_dual(d).tangent for d in backward(forward_ad.make_dual(*grads))]
    for ours, expected in zip(tangents, backward(grads[1]), strict=True):  # linear in the gradient
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@needs_library
@pytest.mark.parametrize("watched", ["forward", "backward"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_what_is_recomputed_is_the_same_where_someone_watches_one_pass(block, watched):
    made = fuse_blocks(randomize(block(16, 16 // block.expansion, norm_layer=IEBN2d, act_layer=torch.nn.SiLU)))
    state, x, found = {k: v.clone() for k, v in made.state_dict().items()}, torch.randn(4, 16, 5, 6), []
    for mode in (nullcontext, Watching):
        made.load_state_dict(state)
        leaf = x.clone().requires_grad_()
        with mode() if watched == "forward" else nullcontext():
            y = checkpoint(made, leaf, use_reentrant=False)
        with mode() if watched == "backward" else nullcontext():
            found.append(torch.autograd.grad(y.square().sum(), [leaf, *made.parameters()]))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@needs_library
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the compiler's own
@pytest.mark.parametrize("act", ["", "relu"])
def test_a_backward_pass_that_a_compiler_looks_at(act):
    """What it runs keeps no tensor longer than its code does, and the library must not write where one was."""
    layer, x = randomize(IEBN2d(8)), torch.randn(2, 8, 3, 3)

    @torch.compiler.disable
    def forward(x):
        return layer.normalize(x, None, act)

    def step(x):
        forward(x).square().sum().backward()

    found = []
    for run in (step, *(torch.compile(step, backend="eager"),) * 3):
        leaf = x.clone().requires_grad_()
        run(leaf)
        found.append(leaf.grad)
    for grad in found[1:]:
        torch.testing.assert_close(grad, found[0])
