"""The kernels compiled for GPUs, which takes none, and what only a GPU can show."""

import os
import subprocess
import sys

import pytest
import timm
import torch
from numerics import DTYPES, LAYOUTS, composed, draw

import timm_iebn
from timm_iebn.ops import iebn

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

COMPILE = """
import inspect, re, subprocess, sys, tempfile
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
optional = "square running_mean running_var weight bias residual result dresidual".split()
for name in "statistics merge_statistics normalize reduce merge_gradients grad_input".split():
    kernel = getattr(kernels, f"{name}_kernel")
    blocks = (grid.merge_blocks if "merge" in name else grid.blocks) | dict(ACT="relu", BATCH=bool(given))
    signature, constants, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in blocks:
            signature[argument], constants[i,] = "constexpr", blocks[argument]
        elif not given and argument.removesuffix("_ptr") in optional:
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
        ptxas = get_ptxas(capability) if inspect.signature(get_ptxas).parameters else get_ptxas()
        command = [ptxas.path, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
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
    """Against the formula in float64, forward and all gradients, twice the same bits.

    No gradient comes to where the activation's input is within rounding of 0, which may fall on either side.
    """
    for shape in shapes_of(name, size):
        (x, *params), grad = draw(shape)
        x, grad = (t.to("cuda", dtype).contiguous(memory_format=layout) for t in (x, grad))
        params, found = [p.float().cuda() for p in params], []
        grad[composed(x.double(), *(p.double() for p in params), None, None, True, 0.1, 1e-5).abs() < 1e-4] = 0
        for function, kind in ((iebn, None), (iebn, None), (composed, torch.float64)):
            leaves = [t.to(kind or t.dtype).detach().requires_grad_() for t in (x, *params)]
            args = (*leaves, None, None, *((None,) if function is iebn else ()), True, 0.1, 1e-5)
            y = function(*args, act="relu")
            found.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
        for ours, again, exact in zip(*found, strict=True):
            assert torch.equal(ours, again)
            step = torch.finfo(ours.dtype).eps
            bound = 1e-4 * exact.abs().max() + 2 * step * exact.abs() + 1e-6 * grad.numel() ** 0.5
            assert ((ours - exact).abs() <= bound).all(), f"{shape} {dtype}"


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
