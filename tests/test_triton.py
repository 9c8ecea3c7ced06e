"""The fused kernels: in Triton's interpreter on CPU, on the device itself where there is a CUDA GPU.

Both compute the same values; what the interpreter can't show of the kernels is in test_triton_gpu.
"""

import importlib

import pytest
import torch
import torch.distributed as dist
from conftest import DEVICE
from numerics import DTYPES, LAYOUTS, MODES, check, check_without_gates, composed, draw, running, strided

import timm_iebn
from timm_iebn.ops import backend, iebn, iebn_reference
from timm_iebn.ops.activations import ACTIVATIONS

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
triton = importlib.import_module("timm_iebn.ops.triton")
custom = importlib.import_module("timm_iebn.ops.custom")
SHAPES = [(4, 8, 7, 5), (1, 3, 6, 6), (6, 5, 1, 1), (3, 1, 33, 2), (2, 77, 9, 9), (1, 24, 70, 71)]


def fused(*args, residual=None, act="", path=iebn):
    """`iebn` through the kernels, called as the other paths are, with all on the CPU."""
    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in (*args, residual)]
    with backend("triton"):
        y = path(*moved[:7], None, *moved[7:-1], residual=moved[-1], act=act)
    for given, statistics in zip(args[5:7], moved[5:7], strict=True):
        if given is not None:
            given.copy_(statistics)
    return y.cpu()


@pytest.mark.parametrize("layout", **LAYOUTS)
@pytest.mark.parametrize("dtype", **DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_is_as_exact_as_the_formula(shape, mode, dtype, layout):
    check(fused, *draw(shape), mode, 0.0, dtype, layout)


@pytest.mark.parametrize("layout", **LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_large_mean_cancels_nothing(mode, layout):
    check(fused, *draw((4, 6, 33, 31), mean=100.0), mode, 100.0, torch.float32, layout)


@pytest.mark.parametrize(("shape", "rounds"), [((130, 1, 2, 1), (2, 1)), ((65, 1, 65, 64), (1, 3))], ids=str)
def test_more_images_or_parts_than_are_merged_at_once(shape, rounds, monkeypatch):
    monkeypatch.setattr(triton, "_PROGRAMS", 1000)
    monkeypatch.setattr(triton, "_grid_of", triton._grid_of.__wrapped__)
    grid = triton._grid(torch.empty(shape, device=DEVICE))
    blocks = grid.merge_blocks
    assert (-(-shape[0] // blocks["BLOCK_N"]), -(-grid.parts // blocks["BLOCK_P"])) == rounds
    check(fused, *draw(shape), "train", 0.0, torch.float32, torch.contiguous_format)


def test_gradients_where_gates_are_not_trained():
    check_without_gates(fused)


@pytest.mark.parametrize("mode", MODES)
def test_without_affine(mode):
    check(fused, *draw((4, 8, 7, 5), affine=False), mode, 0.0, torch.float32, torch.channels_last)


@pytest.mark.parametrize("path", [fused, composed], ids=["fused", "composed"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("act", list(ACTIVATIONS), ids=lambda a: a or "identity")
@pytest.mark.parametrize("layout", **LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_residual_and_activation_are_as_exact_as_behind_the_formula(training, layout, act, has_residual, path):
    """In float32 against float64; the composition shows that the bound is one that float32 can keep."""
    (x, *params), grad = draw((3, 20, 9, 11))
    x, residual = 2 * x, 2 * torch.randn_like(x) if has_residual else None
    found = []
    for function, dtype in ((path, torch.float32), (composed, torch.float64)):
        inputs = [t.to(dtype).contiguous(memory_format=layout) if t.dim() == 4 else t.to(dtype) for t in (x, *params)]
        other = None if residual is None else residual.to(dtype)  # may lie in another layout
        stats = running(20, "eval", 0.0, dtype)
        leaves = [t.requires_grad_() for t in (*inputs, *([] if other is None else [other]))]
        y = function(*inputs, *stats, training, 0.3, 1e-5, residual=other, act=act)
        grads = torch.autograd.grad(y, leaves, grad.to(dtype))
        found.append([y.detach(), *grads, *stats])
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).abs().max() < 2e-5 * exact.abs().max().clamp(min=(grad.numel() / 20) ** 0.5 / 10)


@pytest.mark.parametrize("shape", [(3, 20, 9, 11), (3, 20, 1, 1), (20, 1, 1)], ids=str)
def test_a_residual_that_the_kernels_do_not_take_is_added_behind_them(shape):
    """One of another dtype, and those that spread over the image."""
    residual = torch.randn(shape, dtype=torch.float64 if len(shape) == 4 and shape[2] > 1 else torch.float32)
    (x, *params), _ = draw((3, 20, 9, 11))
    inputs = [t.float() for t in (x, *params)]
    ours, expected = (f(*inputs, None, None, True, 0.1, 1e-5, residual=residual, act="silu") for f in (fused, composed))
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_half_types_are_rounded_once(act, dtype):
    """Where the composition rounds after each step."""
    (x, *params), grad = draw((3, 20, 9, 11))
    x, residual, grad = (t.to(dtype).double() for t in (x, torch.randn_like(x), grad))
    found = []
    for function, kind in ((fused, dtype), (composed, torch.float64)):
        args = [
            x.to(kind).requires_grad_(),
            *(p.float().to(torch.float32 if function is fused else kind) for p in params),
        ]
        other = residual.to(kind).requires_grad_()
        y = function(*args, None, None, True, 0.1, 1e-5, residual=other, act=act)
        found.append(
            (y.detach().double(), *(g.double() for g in torch.autograd.grad(y, [args[0], other], grad.to(kind))))
        )
    for ours, exact in zip(*found, strict=True):  # the interpreter cuts bfloat16 off, which is up to a whole step
        assert (ours - exact).abs().max() <= 1.5 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("act", list(ACTIVATIONS), ids=lambda a: a or "identity")
@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
def test_second_derivatives_go_through_the_formula(has_residual, act):
    (x, *params), grad = draw((2, 3, 4, 5))
    residual = torch.randn_like(x) if has_residual else None
    found = []
    for function in (fused, composed):
        inputs = [t.float().requires_grad_() for t in (x, *params, *([] if residual is None else [residual]))]
        other = inputs[5] if has_residual else None
        y = function(*inputs[:5], None, None, True, 0.1, 1e-3, residual=other, act=act)
        first = torch.autograd.grad((y * y * grad).sum(), inputs, create_graph=True)
        found.append((*first, *torch.autograd.grad(sum((d**2).sum() for d in first), inputs)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("layout", **LAYOUTS)
def test_a_plane_in_parts_gives_the_bits_of_a_repeat(layout):
    (x, *params), grad = draw((1, 24, 70, 71))
    x, grad, params = x.float().contiguous(memory_format=layout), grad.float(), [p.float() for p in params]
    assert triton._grid(x.to(DEVICE)).parts > 1
    found = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, *params)]
        y = fused(*leaves, None, None, True, 0.1, 1e-5, act="relu")
        found.append([y, *torch.autograd.grad(y, leaves, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("momentum", [0.3, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("apart", [False, True], ids=["dense", "strided"])
def test_running_statistics_follow_as_in_batch_norm(momentum, dtype, apart):
    """Also from values that are far away, and autograd sees that they are no longer what they were."""
    layers = [kind(3, momentum=momentum).to(DEVICE) for kind in (timm_iebn.IEBN2d, torch.nn.BatchNorm2d)]
    for layer in layers:
        for name, start in (("running_mean", -1e5), ("running_var", 1e9)):
            wide = torch.full((6,), start, dtype=dtype, device=DEVICE)
            setattr(layer, name, wide[::2] if apart else wide[:3])
    for _ in range(2):
        # means of one sign, so that the error of their average stays relative
        x = 1e-3 * (1 + torch.randn(4, 3, 5, 5, device=DEVICE))
        versions = layers[0].running_mean._version, layers[0].running_var._version
        with backend("triton"):
            layers[0](x)
        layers[1].to(torch.float64)(x.double())
        assert layers[0].running_mean._version > versions[0] and layers[0].running_var._version > versions[1]
    for name in ("running_mean", "running_var"):
        found, expected = (getattr(layer, name) for layer in layers)
        assert found.dtype == dtype
        eps = torch.finfo(dtype).eps
        left = 1e9 * eps * (momentum == 0.3)  # the rounding of what was; a share of 1 leaves nothing of it
        torch.testing.assert_close(found.double(), expected, rtol=4 * eps + 1e-5, atol=left + 1e-9)


def test_gradients_of_parameters_hold_on_to_nothing_of_the_size_of_the_batch():
    layer = timm_iebn.IEBN2d(8).to(DEVICE)
    with backend("triton"):
        layer(torch.randn(64, 8, 2, 2, device=DEVICE)).sum().backward()
    assert all(p.grad.untyped_storage().nbytes() <= 6 * 8 * 4 for p in layer.parameters())


def settings(training=True, residual=True, act="relu", layout=torch.channels_last):
    (x, *params), _ = draw((2, 8, 6, 5))
    tensors = [t.float().to(DEVICE).requires_grad_() for t in (x.contiguous(memory_format=layout), *params)]
    other = torch.randn_like(tensors[0]).requires_grad_() if residual else None
    stats = (None, None) if training else [t.to(DEVICE) for t in running(8, "eval", 0.0, torch.float32)]
    return (*tensors, other, *stats, 1e-5, act)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck's own tensors
@pytest.mark.parametrize("layout", **LAYOUTS)
@pytest.mark.parametrize("act", ["", "relu", "silu"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_operator_is_well_formed(training, residual, act, layout):
    torch.library.opcheck(custom.iebn_op, settings(training, residual, act, layout))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # of torch's own code
@pytest.mark.parametrize("training", [True, False])
def test_compiled_it_is_one_graph_with_the_operator(training):
    (x, *params), grad = draw((2, 8, 6, 5))
    graphs = []

    def inspect(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    found = []
    for path in (iebn, torch.compile(iebn, fullgraph=True, backend=inspect)):
        leaves = [t.float().requires_grad_() for t in (x, *params)]
        stats = running(8, "eval", 0.0, torch.float32)
        y = fused(*leaves, *stats, training, 0.3, 1e-5, residual=x.float(), act="relu", path=path)
        found.append([y, *torch.autograd.grad(y, leaves, grad.float()), *stats])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)
    assert any("timm_iebn.iebn" in str(node.target) for node in graphs[0].graph.nodes)


def test_exported_it_is_the_operator():
    layer = timm_iebn.IEBNAct2d(8).to(DEVICE).eval()
    torch.nn.init.normal_(layer.gate_weight)
    x = torch.randn(2, 8, 6, 5, device=DEVICE)
    with backend("triton"):
        program = torch.export.export(layer, (x,))
        torch.testing.assert_close(program.module()(x), layer(x))
    assert any("timm_iebn.iebn" in str(node.target) for node in program.graph.nodes)


def test_autocast_and_activation_checkpointing():
    conv, layer = torch.nn.Conv2d(3, 8, 3).to(DEVICE), timm_iebn.IEBNAct2d(8, momentum=0.0).to(DEVICE)
    x, found = torch.randn(2, 3, 8, 8, device=DEVICE), []
    for checkpointed in (False, True):
        with backend("triton"), torch.autocast(DEVICE, torch.bfloat16):
            block = torch.nn.Sequential(conv, layer)
            y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
            assert y.dtype == torch.bfloat16
            found.append(torch.autograd.grad(y.float().square().sum(), [*block.parameters()]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("unpack", [strided, torch._neg_view], ids=["strided", "negative"])
def test_what_autograd_gives_back_may_lie_in_another_way(unpack):
    (x, *params), grad = draw((2, 40, 8, 8))
    inputs, residual = [t.float().requires_grad_() for t in (x, *params)], torch.randn(2, 40, 8, 8)
    pack = torch._neg_view if unpack is torch._neg_view else lambda t: t
    for act in ("", "relu", "silu"):
        args = dict(residual=residual, act=act)
        expected = torch.autograd.grad(fused(*inputs, None, None, True, 0.1, 1e-5, **args), inputs, grad.float())
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = fused(*inputs, None, None, True, 0.1, 1e-5, **args)
        for ours, theirs in zip(torch.autograd.grad(y, inputs, strided(grad.float())), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_operators_take_dense_input_only():
    (x, *params), grad = draw((2, 8, 6, 6))
    x, grad, params = x.float().to(DEVICE), grad.float().to(DEVICE), [p.float().to(DEVICE) for p in params]
    every_other = x[:, ::2], *(p[::2].contiguous() for p in params), None, None, None, 1e-5, ""
    with pytest.raises(RuntimeError, match=r"can't take torch.float32 input of shape \[2, 4, 6, 6\] with strides"):
        custom.iebn_op(*every_other)
    with pytest.raises(RuntimeError, match=r"of shape \[0, 8, 6, 6\]"):
        custom.iebn_op(x[:0], *params, None, None, None, 1e-5, "")
    with pytest.raises(RuntimeError, match=r"vectors of shapes \[\[8\], \[8\], \[8\], \[4\]\]"):
        custom.iebn_op(x, *params[:3], params[3][:4], None, None, None, 1e-5, "")
    # backward gets from hooks what they like
    _, *found = custom.iebn_op(x, *params, None, None, None, 1e-5, "")
    tail = *params[:3], None, None, *found, True, 1e-5, ""
    expected = custom.iebn_backward_op(grad, x, *tail)
    torch.testing.assert_close(custom.iebn_backward_op(strided(grad), strided(x), *tail), expected)


@pytest.mark.parametrize("place", [0, 4999])
@pytest.mark.parametrize("layout", **LAYOUTS)
def test_infinity_is_the_same_wherever_it_stands(place, layout):
    x = torch.randn(1, 2, 100, 50)
    x[0, 0].view(-1)[place] = float("inf")
    one = torch.ones(2)
    args = x.contiguous(memory_format=layout), one, 0 * one, 0.5 * one, 0 * one, 0 * one, one, False, 0.1, 1e-5
    torch.testing.assert_close(fused(*args), iebn_reference(*args))


def test_an_empty_batch_moves_nothing():
    vectors = [p.float().requires_grad_() for p in draw((4, 8, 5, 5))[0][1:]]
    stats = running(8, "eval", 0.0, torch.float32)
    x = torch.randn(0, 8, 4, 4).requires_grad_()
    y = fused(x, *vectors, *stats, True, 0.3, 1e-5, act="relu")
    y.sum().backward()
    assert y.shape == x.shape and all((v.grad == 0).all() for v in vectors)
    assert torch.equal(stats[0], running(8, "eval", 0.0, torch.float32)[0])


def test_not_a_number_stays_one_and_in_its_channel():
    (x, *params), _ = draw((2, 9, 5, 5))
    x, params = x.float(), [p.float() for p in params]
    x[1, 4, 2, 2] = float("nan")
    for act in ACTIVATIONS:
        y = fused(x, *params, None, None, True, 0.1, 1e-5, act=act)
        assert torch.equal(y.isnan().all((0, 2, 3)), torch.arange(9) == 4), act


def compiled(*args):
    return torch.compile(iebn, backend="aot_eager")(*args)


def rank_of_two(rank, folder, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    (x, *params), grad, residual = torch.load(f"{folder}/data.pt", weights_only=True)
    share = slice(0, 1) if rank == 0 else slice(1, None)  # of different sizes
    leaves = [t.requires_grad_() for t in (x[share].clone(), *params, residual[share].clone())]
    stats = running(8, "eval", 0.0, torch.float32)
    with backend("triton"):
        y = path(*leaves[:5], *stats, None, True, 0.3, 1e-5, dist.group.WORLD, leaves[5], "relu")
    dx, *grads, dresidual = torch.autograd.grad(y, leaves, grad[share])
    for g in grads:
        dist.all_reduce(g)
    torch.save([y.detach(), dx, dresidual, *grads, *stats], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="two processes on one GPU need NCCL's permission")
@pytest.mark.parametrize("path", [iebn, compiled], ids=["eager", "compiled"])
def test_two_ranks_are_one_batch(path, tmp_path):
    (x, *params), grad = draw((4, 8, 7, 5))
    x, grad, residual, params = x.float(), grad.float(), torch.randn(4, 8, 7, 5), [p.float() for p in params]
    torch.save([[x, *params], grad, residual], tmp_path / "data.pt")
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path), path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    leaves, stats = (
        [t.double().requires_grad_() for t in (x, *params, residual)],
        running(8, "eval", 0.0, torch.float64),
    )
    y = composed(*leaves[:5], *stats, True, 0.3, 1e-5, residual=leaves[5], act="relu")
    dx, *grads, dresidual = torch.autograd.grad(y, leaves, grad.double())
    for i, exact in enumerate((y, dx, dresidual)):
        torch.testing.assert_close(torch.cat([r[i] for r in ranks]).double(), exact, rtol=1e-4, atol=1e-4)
    for rank in ranks:
        torch.testing.assert_close([t.double() for t in rank[3:]], [*grads, *stats], rtol=1e-4, atol=1e-4)
