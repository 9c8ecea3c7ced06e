"""The fused kernels: in Triton's interpreter on CPU, on the device itself where there is a CUDA GPU."""

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.distributed as dist
from conftest import randomize
from test_ops import MODES, check, draw, running, strided
from timm.models.resnet import BasicBlock, Bottleneck

import timm_iebn
from timm_iebn.models._fused import fuse_blocks
from timm_iebn.ops import backend, iebn, iebn_reference, uses_triton
from timm_iebn.ops.activations import ACTIVATIONS

triton = pytest.importorskip("timm_iebn.ops.triton", reason="Triton is not installed: pip install triton")
custom = pytest.importorskip("timm_iebn.ops.custom")

backends = importlib.import_module("timm_iebn.ops.backend")  # the function has the module's name

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(4, 8, 7, 5), (1, 3, 6, 6), (6, 5, 1, 1), (3, 1, 33, 2), (2, 77, 9, 9), (1, 24, 70, 71)]
LAYOUTS = dict(argvalues=[torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
DTYPES = dict(argvalues=[torch.float32, torch.bfloat16, torch.float16], ids=str)


def fused(*args, residual=None, act="", path=iebn):
    """`iebn` through the kernels, called as the other paths are, with all on the CPU."""
    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in (*args, residual)]
    with backend("triton"):
        y = path(*moved[:7], None, *moved[7:-1], residual=moved[-1], act=act)
    for given, statistics in zip(args[5:7], moved[5:7], strict=True):
        if given is not None:
            given.copy_(statistics)
    return y.cpu()


def composed(*args, residual=None, act=""):
    y = iebn_reference(*args)
    return ACTIVATIONS[act](y if residual is None else y + residual)


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


COMPILE = """
import re, subprocess, sys, tempfile
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from timm_iebn.ops import triton as passes, triton_kernels as kernels

dtype, capability, n, c, size, channels_last, given = sys.argv[1], *map(int, sys.argv[2:])
passes._PROGRAMS = 528  # as on a GPU with 132 multiprocessors
grid = passes._grid_of(n, c, size, bool(channels_last), None)
numbers = dict(zip(("C", "L", "parts", "part"), grid.shape), N=n)
tensors = "x_ptr residual_ptr y_ptr g_ptr result_ptr dresidual_ptr dx_ptr".split()
optional = "square mean_NC mean_C weight bias residual result dresidual sums".split()
needed = [("normalize", "mean_NC_ptr"), ("merge_gradients", "mean_NC_ptr"), ("merge_gradients", "sums_ptr")]
for name in "statistics merge_statistics normalize reduce merge_gradients grad_input".split():
    kernel = getattr(kernels, f"{name}_kernel")
    blocks = (grid.merge_blocks if "merge" in name else grid.blocks) | dict(ACT="relu")
    signature, constants, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in blocks:
            signature[argument], constants[i,] = "constexpr", blocks[argument]
        elif not given and argument.removesuffix("_ptr") in optional and (name, argument) not in needed:
            signature[argument], constants[i,] = "constexpr", None
        elif argument == "residual_ptr" and name == "reduce":  # the result tells more
            signature[argument], constants[i,] = "constexpr", None
        elif argument.endswith("_ptr"):
            signature[argument] = "*" + (dtype if argument in tensors else "fp32")
            attributes[i,] = [["tt.divisibility", 16]]
        elif argument not in numbers:
            signature[argument] = "fp32"
        elif numbers[argument] == 1 and argument not in ("N", "parts"):  # as Triton specialises
            signature[argument], constants[i,] = "constexpr", 1
        else:
            signature[argument] = "i32"
            if numbers[argument] % 16 == 0 and argument not in ("N", "parts"):
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = dict(num_warps=blocks.get("num_warps", 4))
    ptx = compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"\\.target (\\w+)", ptx)[1]
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = sum(map(int, re.findall(r"(\\d+) bytes spill", said)))
    print(name, ptx.count("ld.global.v4"), ptx.count("st.global.v4"), ptx.count("st.global.b16"), spilled)
"""


def compile_kernels(*arguments):
    """Counts of wide loads, wide stores and narrow stores, and bytes of spilled registers, by kernel.

    It needs no GPU. The interpreter takes what the compiler does not.
    """
    command = [sys.executable, "-c", COMPILE, *map(str, arguments)]
    result = subprocess.run(
        command, env=os.environ | dict(TRITON_INTERPRET="0"), capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    found = {name: list(map(int, counts)) for name, *counts in map(str.split, result.stdout.splitlines())}
    assert len(found) == 6
    return found


@pytest.mark.parametrize(
    ("dtype", "capability", "shape", "layout"),
    [
        ("bf16", 90, (256, 64, 112 * 112), 1),
        ("bf16", 90, (256, 24, 56 * 56), 1),
        ("fp16", 80, (256, 256, 56 * 56), 0),
        ("fp32", 90, (2, 64, 112 * 112), 0),
    ],
    ids=str,
)
def test_the_kernels_compile_for_gpus_and_move_sixteen_bytes_at_once(dtype, capability, shape, layout):
    found = compile_kernels(dtype, capability, *shape, layout, 1)
    assert all(found[name][0] for name in ("statistics", "normalize", "reduce", "grad_input"))
    assert all(found[name][1] and not found[name][2] for name in ("normalize", "reduce", "grad_input"))
    assert not any(counts[3] for counts in found.values())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(256, 2048, 49), (1, 1, 1)], ids=str)
def test_the_kernels_compile_for_planes_of_odd_size_and_spill_nothing(shape, dtype):
    assert not any(counts[3] for counts in compile_kernels(dtype, 90, *shape, 0, 1).values())


@pytest.mark.parametrize("layout", [0, 1], ids=["nchw", "nhwc"])
def test_the_kernels_compile_without_what_may_be_missing(layout):
    compile_kernels("bf16", 90, 2, 3, 1, layout, 0)


# ---- the choice


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


# ---- networks


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


# ---- on a GPU


def shapes_of(name, size):
    """The shapes of all inputs of norms in a network, for a batch of 32."""
    net, shapes = timm.create_model(name).to("meta"), set()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, args: shapes.add(tuple(args[0].shape)))
    net(torch.empty(32, 3, size, size, device="meta"))
    return sorted(shapes)


NETWORKS = [("resnet50", 224), ("mobilenetv2_100", 224), ("resnet164_cifar", 32)]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", **LAYOUTS)
@pytest.mark.parametrize("dtype", **DTYPES)
@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_every_shape_of_a_network_on_the_gpu(name, size, dtype, layout):
    """Against the formula in float64, forward and all gradients, twice the same bits."""
    for shape in shapes_of(name, size):
        (x, *params), grad = draw(shape)
        x, grad = (t.to("cuda", dtype).contiguous(memory_format=layout) for t in (x, grad))
        params, found = [p.float().cuda() for p in params], []
        for function, kind in ((iebn, None), (iebn, None), (composed, torch.float64)):
            leaves = [t.to(kind or t.dtype).detach().requires_grad_() for t in (x, *params)]
            args = (*leaves, None, None, *((None,) if function is iebn else ()), True, 0.1, 1e-5)
            y = function(*args, act="relu")
            found.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
        for ours, again, exact in zip(*found, strict=True):
            assert torch.equal(ours, again)
            step = torch.finfo(ours.dtype).eps
            bound = 1e-4 * exact.abs().max() + 2 * step * exact.abs() + 1e-6 * grad.numel() ** 0.5
            # an activation's input within rounding of 0 may fall on either side
            assert ((ours - exact).abs() > bound).double().mean() < 1e-4, f"{shape} {dtype}"


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shape", [(2**15 + 1, 2, 256, 128), (1, 2**15 + 8, 256, 256)], ids=["batch", "image"])
def test_more_values_than_32_bits_can_count(shape, training):
    """The last of them, forward and backward, is what it is in a batch, or among channels, of few."""
    n, c = shape[:2]
    x, g = torch.randn(2, 1, 2, *shape[2:], device="cuda", dtype=torch.bfloat16)
    found = []
    for repeats in ((n, c // 2, 1, 1), (2, 1, 1, 1)):  # the same values again and again, and so the same statistics
        leaf = x.repeat(repeats).requires_grad_()
        y = timm_iebn.IEBN2d(leaf.shape[1]).cuda().train(training)(leaf)
        (dx,) = torch.autograd.grad(y, leaf, g.repeat(repeats))
        found.append((y[-1:, -2:].detach().clone(), dx[-1:, -2:].clone()))
        del leaf, y, dx
    for large, small in zip(*found, strict=True):
        assert small.abs().max() > 0.1
        torch.testing.assert_close(large, small, rtol=0.02, atol=0.01)
