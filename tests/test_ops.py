"""The passes on CPU, in torch's operations and in C++: as exact as the formula, and right at every edge."""

import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import PATHS
from numerics import MODES, SHAPES, check, check_without_gates, draw, running, strided
from torch.nn import functional as F

from timm_iebn.ops import cpu, iebn, iebn_eager, iebn_reference
from timm_iebn.ops.reference import wide_dtype


def test_the_library_is_built_of_these_sources_where_there_is_a_compiler():
    """Or the tests of it would be skipped, or be of another one."""
    if not shutil.which("c++") or torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        pytest.skip("there is no C++ compiler, or no AVX2")
    assert cpu.library is not None, "pip install -e . did not build it"
    folder = Path(cpu.__file__).parent
    built, changed = ([p.stat().st_mtime for p in folder.glob(f"_cpu*{end}")] for end in (".so", "[ph]"))
    assert min(built) >= max(changed), "the sources have changed since: pip install -e ."


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *product(PATHS, [torch.float32, torch.bfloat16]),
        *product(PATHS[:1], [torch.float64, torch.float16]),  # which the library does not take
    ],
    ids=str,
    indirect=["backend"],
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eager_is_as_exact_as_the_formula(shape, mode, dtype, layout, backend):
    if mode != "eval" and shape[0] * shape[2] * shape[3] == 1:
        pytest.skip("one value per channel")
    check(iebn_eager, *draw(shape), mode, 0.0, dtype, layout)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_a_large_mean_cancels_nothing(mode, layout, backend):
    check(iebn_eager, *draw((8, 6, 9, 9), mean=100.0), mode, 100.0, torch.float32, layout)


@pytest.mark.parametrize("mode", MODES)
def test_without_affine(mode, backend):
    check(iebn_eager, *draw((4, 8, 7, 5), affine=False), mode, 0.0, torch.float32, torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
def test_a_strided_input_is_as_exact(training):
    (x, *params), grad = draw((4, 8, 7, 5))
    wide = torch.zeros(4, 16, 14, 5, dtype=torch.float64)
    wide[:, ::2, ::2] = x
    view = wide[:, ::2, ::2]
    stats = running(8, "eval", 0.0, torch.float64)
    torch.testing.assert_close(
        iebn_eager(view, *params, stats[0].clone(), stats[1].clone(), training, 0.1, 1e-5),
        iebn_reference(x, *params, stats[0].clone(), stats[1].clone(), training, 0.1, 1e-5),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_variance_channels_stay_finite(dtype, backend):
    (x, *params), grad = draw((4, 3, 5, 5))
    x[:, 1] = 2.5
    x, grad, params = x.to(dtype), grad.to(dtype), [p.to(wide_dtype(x.to(dtype))) for p in params]
    x.requires_grad_()
    y = iebn_eager(x, *params, None, None, True, 0.1, 1e-5)
    torch.testing.assert_close(y, iebn_reference(x, *params, None, None, True, 0.1, 1e-5))
    torch.testing.assert_close(y[:, 1], params[1][1].to(dtype).expand_as(y[:, 1]))
    y.backward(grad)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_and_gradgradcheck(training, affine):
    tensors, _ = draw((3, 2, 3, 2), affine=affine)
    stats = running(2, "eval", 0.0, torch.float64)

    def f(*tensors):
        given = iter(tensors)
        args = [next(given) if i in present else None for i in range(5)]
        return iebn_eager(*args, stats[0].clone(), stats[1].clone(), training, 0.1, 1e-3)

    present = [i for i, t in enumerate(tensors) if t is not None]
    inputs = tuple(tensors[i].requires_grad_() for i in present)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize(
    "odd", [lambda v: v.repeat_interleave(3)[::3], lambda v: v[:1].expand(len(v))], ids=["strided", "expanded"]
)
def test_running_statistics_may_be_views(odd, backend):
    (x, *params), grad = draw((4, 8, 7, 5))
    x, params = x.float(), [p.float().requires_grad_() for p in params]
    found = []
    for dense in (False, True):
        stats = [odd(t) for t in running(8, "eval", 0.0, torch.float32)]
        leaf = x.clone().requires_grad_()
        y = iebn_eager(leaf, *params, *(t.clone() if dense else t for t in stats), False, 0.1, 1e-5)
        found.append([y, *torch.autograd.grad(y, [leaf, *params], grad.float())])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_graph_of_eval_outlives_a_step_in_training(backend):
    (x, *params), grad = draw((4, 8, 7, 5))
    x, params = x.float(), [p.float().requires_grad_() for p in params]
    stats = running(8, "eval", 0.0, torch.float32)
    expected = torch.autograd.grad(iebn_eager(x, *params, *stats, False, 0.1, 1e-5), params, grad.float())
    y = iebn_eager(x, *params, *stats, False, 0.1, 1e-5)
    iebn_eager(x, *params, *stats, True, 0.1, 1e-5)
    torch.testing.assert_close(torch.autograd.grad(y, params, grad.float()), expected, rtol=0, atol=0)


def test_gradients_where_gates_are_not_trained(backend):
    check_without_gates(iebn_eager)


def test_gradients_of_some_inputs_only():
    tensors, grad = draw((4, 3, 5, 5))
    tensors[2].requires_grad_()  # only the bias, as behind a frozen stem
    iebn_eager(*tensors, None, None, True, 0.1, 1e-5).backward(grad)
    torch.testing.assert_close(tensors[2].grad, grad.sum((0, 2, 3)))
    assert tensors[0].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_of_another_layout_or_none_at_all(dtype, backend):
    (x, *params), grad = draw((4, 24, 6, 5))
    params = [p.float() for p in params]
    found = []
    for layout in (torch.channels_last, torch.contiguous_format):
        leaf = x.to(dtype, memory_format=torch.channels_last, copy=True).requires_grad_()
        y = iebn_eager(leaf, *params, None, None, True, 0.1, 1e-5)
        y.backward(grad.to(dtype).contiguous(memory_format=layout))
        found.append(leaf.grad)
    torch.testing.assert_close(*found)
    leaf.grad = None
    y = iebn_eager(leaf, *params, None, None, True, 0.1, 1e-5)
    y.sum().backward()  # a gradient without strides
    expanded = leaf.grad
    leaf.grad = None
    iebn_eager(leaf, *params, None, None, True, 0.1, 1e-5).backward(torch.ones_like(y))
    torch.testing.assert_close(leaf.grad, expanded)


@pytest.mark.parametrize("shape", [(6, 40, 13, 9), (2, 3, 60, 50), (1, 300, 9, 23)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_cpu_library_gives_the_same_bits_with_any_number_of_threads(shape, layout):
    (x, *params), grad = draw(shape)
    x, grad = (t.float().contiguous(memory_format=layout) for t in (x, grad))
    params = [p.float().requires_grad_() for p in params]
    threads, found = torch.get_num_threads(), []
    if cpu.library is None:
        pytest.skip("the CPU library was not built")
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            y = iebn_eager(leaf, *params, None, None, True, 0.1, 1e-5)
            found.append([y, *torch.autograd.grad(y, [leaf, *params], grad)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_not_a_number_stays_one_and_in_its_channel(backend):
    (x, *params), grad = draw((4, 9, 5, 5))
    x, params = x.bfloat16(), [p.float() for p in params]
    x[1, 4, 2, 2] = float("nan")
    x.requires_grad_()
    y = iebn_eager(x, *params, None, None, True, 0.1, 1e-5)
    y.backward(grad.bfloat16())
    bad = torch.zeros(9, dtype=torch.bool)
    bad[4] = True
    for t in (y, x.grad):
        assert torch.equal(t.isnan().all((0, 2, 3)), bad) and torch.equal(t.isnan().any(3).any(2).any(0), bad)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_moves_nothing(shape, training, backend):
    vectors = [p.float().requires_grad_() for p in draw((4, 8, 5, 5))[0][1:]]
    stats, before = [t.float() for t in running(8, "eval", 0.0, torch.float64)], running(8, "eval", 0.0, torch.float32)
    x = torch.randn(shape).requires_grad_()
    y = iebn_eager(x, *vectors, *stats, training, 0.3, 1e-5)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and all((v.grad == 0).all() for v in vectors)
    assert torch.equal(stats[0], before[0]) and torch.equal(stats[1], before[1])


def test_bfloat16_is_rounded_to_nearest_even_as_torch_does(backend):
    x = torch.randn(4, 24, 16, 16).bfloat16()
    one, zero = torch.ones(24), torch.zeros(24)
    scale = torch.rand(24)
    y = iebn_eager(x, scale, zero, zero, 100 * one, zero, one, False, 0.1, 0.0)  # just scale * x
    assert torch.equal(y, (x.float() * scale[:, None, None]).bfloat16())


def test_parameters_that_do_not_fit_are_refused(backend):
    (x, *params), _ = draw((4, 8, 5, 5))
    x, params = x.float(), [p.float() for p in params]
    for i in range(4):
        wrong = [p[:5] if i == j else p for j, p in enumerate(params)]
        with pytest.raises(RuntimeError):
            iebn_eager(x, *wrong, None, None, True, 0.1, 1e-5)
        if cpu.library is not None:  # it reads memory, which torch's operations check themselves
            wrong = [p.to("meta") if i == j else p for j, p in enumerate(params)]
            with pytest.raises(RuntimeError, match="on cpu, got .* on meta"):
                iebn_eager(x, *wrong, None, None, True, 0.1, 1e-5)
    with pytest.raises(RuntimeError):
        iebn_eager(x, *params, torch.zeros(5), torch.ones(5), False, 0.1, 1e-5)


@pytest.mark.parametrize("path", [iebn_eager, iebn_reference])
def test_open_gates_are_batch_norm(path):
    (x, weight, bias, *_), _ = draw((4, 8, 7, 5))
    closed, opened = torch.zeros(8, dtype=torch.float64), torch.full((8,), float("inf"), dtype=torch.float64)
    ours, theirs = running(8, "train", 0.0, torch.float64), running(8, "train", 0.0, torch.float64)
    y = path(x, weight, bias, closed, opened, *ours, True, 0.3, 1e-5)
    torch.testing.assert_close(y, F.batch_norm(x, *theirs, weight, bias, True, 0.3, 1e-5))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_layer_used_twice_has_its_gradients_once(dtype, backend):
    """With create_graph=True too, where one input of the second use is a function of the others."""
    (x, *params), _ = draw((3, 4, 5, 6))
    found = []
    for function, kind in ((iebn_eager, dtype), (iebn_reference, torch.float64)):
        inputs = [t.to(kind).requires_grad_() for t in (x, *params)]
        inner = torch.nn.functional.silu(function(*inputs, None, None, True, 0.1, 1e-5))
        y = function(inner, *inputs[1:], None, None, True, 0.1, 1e-5)
        first = torch.autograd.grad((y**3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum((d**2).sum() for d in first), inputs)
        found.append((*first, *second))
    for ours, expected in zip(*found, strict=True):
        near = {} if dtype == torch.float64 else dict(rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        torch.testing.assert_close(ours.double(), expected, **near)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00001, -1])
@pytest.mark.parametrize("where", ["x", "gate_bias"])
def test_every_kind_of_nan_stays_one(bits, where, backend):
    (x, *params), _ = draw((2, 8, 4, 4))
    x, weight, bias, gate_weight, gate_bias = (t.float() for t in (x, *params))
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    dict(x=x[:, 3], gate_bias=gate_bias[3:4])[where][:] = nan
    running = torch.zeros(8), torch.ones(8)
    y = iebn_eager(x, weight, bias, gate_weight, gate_bias, *running, False, 0.1, 1e-5)
    assert torch.equal(y.isnan().all((0, 2, 3)), torch.arange(8) == 3)


@pytest.mark.parametrize("place", [0, 4999])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_infinity_is_the_same_wherever_it_stands(place, layout, backend):
    x = torch.randn(1, 2, 100, 50)
    x[0, 0].view(-1)[place] = float("inf")
    one = torch.ones(2)
    args = x.contiguous(memory_format=layout), one, 0 * one, 0.5 * one, 0 * one, 0 * one, one, False, 0.1, 1e-5
    torch.testing.assert_close(iebn_eager(*args), iebn_reference(*args))


@pytest.mark.parametrize("unpack", [strided, torch._neg_view], ids=["strided", "negative"])
def test_what_autograd_gives_back_may_lie_in_another_way(unpack, backend):
    (x, *params), grad = draw((2, 40, 8, 8))
    inputs = [t.float().requires_grad_() for t in (x, *params)]
    y = iebn_eager(*inputs, None, None, True, 0.1, 1e-5)
    expected = torch.autograd.grad(y, inputs, grad.float())
    pack = torch._neg_view if unpack is torch._neg_view else lambda t: t
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = iebn_eager(*inputs, None, None, True, 0.1, 1e-5)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, strided(grad.float())), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_negated_views_are_read_as_what_they_are(backend):
    (x, *params), grad = draw((2, 8, 4, 4))
    x, grad, params = x.float().requires_grad_(), grad.float(), [p.float() for p in params]
    found = []
    for view in (torch.neg, torch._neg_view):
        y = iebn_eager(view(x), *map(view, params), None, None, True, 0.1, 1e-5)
        found += [(y, *torch.autograd.grad(y, x, view(grad)))]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_parameters_of_another_shape_are_refused_before_anything_moves():
    (x, weight, bias, gate_weight, gate_bias), _ = draw((2, 8, 4, 4))
    running = torch.zeros(8), torch.ones(8)
    for wrong in range(4):
        params = [weight, bias, gate_weight, gate_bias]
        params[wrong] = torch.ones(1)
        with pytest.raises(RuntimeError, match="one shape|channels"):
            iebn(x.float(), *(p.float() for p in params), *running, None, True, 0.1, 1e-5)
    assert running[0].eq(0).all()


@pytest.mark.parametrize("wrong", [float("nan"), 1.01], ids=["nan", "1 percent"])
@pytest.mark.parametrize("place", range(5), ids=["x", "weight", "bias", "gate_weight", "gate_bias"])
def test_a_wrong_gradient_does_not_pass(place, wrong):
    """The check that all paths go through."""

    def path(*args):
        args = list(args)
        if args[place].requires_grad:
            args[place] = args[place] * 1
            args[place].register_hook(lambda grad: grad * wrong)
        return iebn_reference(*args)

    with pytest.raises(AssertionError, match="allowed 16"):
        check(path, *draw((4, 8, 7, 5)), "train", 0.0, torch.float32, torch.contiguous_format)
