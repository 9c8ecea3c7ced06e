"""How exact a path is: random inputs, and the formula in float64, forward and all gradients; tests share it.

No tolerance is picked by hand: a path may be 16 times as far from float64 as the formula, torch's own batch norm, or
the variance that torch's batch norm finds, is in the same dtype and layout.
"""

import torch
from torch.nn import functional as F

from timm_iebn.ops import iebn_reference
from timm_iebn.ops.activations import ACTIVATIONS

SHAPES = [(4, 8, 7, 5), (1, 3, 6, 6), (16, 5, 1, 1), (3, 1, 33, 2), (2, 77, 9, 9), (40, 24, 29, 31)]
MODES = ["train", "eval", "untracked"]
LAYOUTS = dict(argvalues=[torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
DTYPES = dict(argvalues=[torch.float32, torch.bfloat16, torch.float16], ids=str)
PARAMETER_GRADS = ("dweight", "dbias", "dgate")


def draw(shape, mean=0.0, affine=True):
    n, c, h, w = shape
    x = (
        mean
        + torch.randn(shape, dtype=torch.float64)
        + torch.randn(n, c, 1, 1, dtype=torch.float64)  # instance means that differ, so that gates do
    )
    vectors = torch.randn(4, c, dtype=torch.float64)
    weight, bias = (1 + 0.3 * vectors[0], vectors[1]) if affine else (None, None)
    gate_weight, gate_bias = vectors[2] / (1 + abs(mean) / 10), vectors[3]
    return [x, weight, bias, gate_weight, gate_bias], torch.randn(shape, dtype=torch.float64)


def running(c, mode, mean, dtype):
    if mode == "untracked":
        return None, None
    generator = torch.Generator().manual_seed(c)
    running_mean = mean + torch.randn(c, generator=generator, dtype=torch.float64)
    return running_mean.to(dtype), (0.5 + torch.rand(c, generator=generator, dtype=torch.float64)).to(dtype)


def run(path, tensors, grad, mode, mean, x_dtype, dtype, layout=torch.contiguous_format):
    """Output, gradients and running statistics of `path`, as float64."""
    x, *params = tensors
    x = x.detach().to(x_dtype).contiguous(memory_format=layout).requires_grad_()
    params = [None if p is None else p.detach().to(dtype).requires_grad_() for p in params]
    stats = running(x.shape[1], mode, mean, dtype)
    y = path(x, *params, *stats, mode == "train", 0.3, 1e-5)
    assert y.dtype == x_dtype and y.is_contiguous(memory_format=layout)
    inputs = [x, *(p for p in params if p is not None)]
    grads = torch.autograd.grad(y, inputs, grad.to(x_dtype).contiguous(memory_format=layout))
    assert all(g.dtype == i.dtype and g.shape == i.shape for g, i in zip(grads, inputs, strict=True))
    names = [
        "y",
        "dx",
        *(f"d{n}" for n, p in zip("weight bias gate_w gate_b".split(), params, strict=True) if p is not None),
    ]
    out = dict(zip(names, (y, *grads), strict=True))
    if stats[0] is not None:
        out |= dict(running_mean=stats[0], running_var=stats[1])
    return {name: t.detach().double() for name, t in out.items()}


def composed(*args, residual=None, act=""):
    """The formula, then what the kernels take in as well."""
    y = iebn_reference(*args)
    return ACTIVATIONS[act](y if residual is None else y + residual)


def batch_norm(x, weight, bias, gate_weight, gate_bias, running_mean, running_var, training, momentum, eps):
    use_batch = training or running_mean is None
    y = F.batch_norm(x, running_mean, running_var, weight, bias, use_batch, momentum, eps)
    return y + 0 * (gate_weight.sum() + gate_bias.sum()).to(x.dtype)


def check(path, tensors, grad, mode, mean, dtype, layout):
    # inputs as the tested dtype holds them, so that only the computation's error is compared
    tensors = [tensors[0].to(dtype).double(), *(None if p is None else p.float().double() for p in tensors[1:])]
    grad = grad.to(dtype).double()
    param_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    wide = (torch.float64, torch.float64)
    tested = run(path, tensors, grad, mode, mean, dtype, param_dtype, layout)
    formula, exact = (run(iebn_reference, tensors, grad, mode, mean, *d) for d in ((dtype, param_dtype), wide))
    bn, exact_bn = (run(batch_norm, tensors, grad, mode, mean, *d, layout) for d in ((dtype, param_dtype), wide))

    def errors(low, high):
        """Relative to the largest value, or where sums cancel, to the size that sums of as many terms of about 1 have:
        the rounding of the partial sums does not cancel with them.
        """
        sizes = {n: (grad.numel() / grad.shape[1]) ** 0.5 if n.startswith(PARAMETER_GRADS) else 1.0 for n in high}
        return {n: ((low[n] - v).abs().max() / v.abs().max().clamp(min=sizes[n])).item() for n, v in high.items()}

    found = errors(tested, exact)
    variance = variance_error(tensors[0], dtype, param_dtype, layout) if mode != "eval" else 0.0
    for group in (["y", "dx"], [n for n in found if n not in ("y", "dx")]):
        ulp = torch.finfo(dtype if group[0] == "y" else param_dtype).eps * max(1, mean / 2)  # of the batch mean too
        if dtype == torch.float64:  # the formula's error is not known then
            ulp *= 100
        allowed = max(ulp, variance, *(e[n] for e in (errors(formula, exact), errors(bn, exact_bn)) for n in group))
        # max() would pass over a NaN
        assert all(found[n] <= 16 * allowed for n in group), f"{found}, allowed 16 * {allowed:.2g}"


def check_without_gates(path):
    """The other gradients are the same where gates are not trained."""
    tensors, grad = draw((4, 3, 5, 5))
    leaves, found = [t.float().requires_grad_() for t in tensors], []
    for count in (5, 3):  # with the gates, which are last, and without
        for gate in leaves[3:]:
            gate.requires_grad_(count == 5)
        y = path(*leaves, None, None, True, 0.1, 1e-5)
        found.append(torch.autograd.grad(y, leaves[:count], grad.float())[:3])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def variance_error(x, dtype, param_dtype, layout):
    """The relative error of the batch variance of torch's batch norm, whose kernel adds up in a row."""
    stats = torch.zeros(2, x.shape[1], dtype=param_dtype)
    F.batch_norm(x.to(dtype).contiguous(memory_format=layout), *stats, training=True, momentum=1.0)
    exact = x.var((0, 2, 3))
    return ((stats[1] - exact) / exact).abs().max().item()


def strided(t):
    return torch.stack([t, 0 * t], -1)[..., 0]
