"""The operation under torch's function transforms: compiled, traced, in forward mode, in torch.func, without data."""

import pytest
import torch
from numerics import MODES, check, draw, running
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from timm_iebn.ops import iebn


def compiled(*args):
    tensors, settings = args[:7], args[7:]
    return torch.compile(iebn, fullgraph=True)(*tensors, None, *settings)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_is_as_exact(mode):
    check(compiled, *draw((4, 8, 7, 5)), mode, 0.0, torch.float32, torch.channels_last)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated", "ignore:.*not supported in Python 3.14")
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_agrees_with_reverse_mode(training):
    (x, *params), tangent = draw((4, 3, 5, 5))
    args = *params, *running(3, "eval", 0.0, torch.float64), None, training, 0.0, 1e-5
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(iebn(forward_ad.make_dual(x, tangent), *args)).tangent
    leaf = x.clone().requires_grad_()
    y, g = iebn(leaf, *args), torch.randn_like(x)
    torch.testing.assert_close((found * g).sum(), (torch.autograd.grad(y, leaf, g)[0] * tangent).sum())


def test_torch_func_grad_agrees_with_autograd():
    tensors, grad = draw((4, 3, 5, 5))

    def loss(x):
        return (iebn(x, *tensors[1:], None, None, None, True, 0.1, 1e-5) * grad).sum()

    x = tensors[0].clone().requires_grad_()
    loss(x).backward()
    torch.testing.assert_close(torch.func.grad(loss)(tensors[0]), x.grad)


def test_a_graph_traced_by_a_dispatch_mode_holds_the_computation():
    (x, *params), _ = draw((4, 8, 5, 5))
    x, params = x.float(), [p.float() for p in params]
    graph = make_fx(lambda x: iebn(x, *params, None, None, None, True, 0.1, 1e-5))(x)
    x = torch.randn_like(x)
    torch.testing.assert_close(graph(x), iebn(x, *params, None, None, None, True, 0.1, 1e-5))


def test_fake_and_meta_tensors_pass_through_and_leave_nothing_behind():
    (x, *params), grad = draw((5, 7, 11, 17))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = iebn(mode.from_tensor(x.bfloat16()).requires_grad_(), *params, None, None, None, True, 0.1, 1e-5)
        y.sum().backward()
        assert y.shape == x.shape
    y = iebn(x.to("meta").requires_grad_(), *(p.to("meta") for p in params), None, None, None, True, 0.1, 1e-5)
    y.sum().backward()
    real = iebn(x.bfloat16().requires_grad_(), *params, None, None, None, True, 0.1, 1e-5)
    real.backward(grad.bfloat16())
    assert type(real.detach()) is torch.Tensor and real.isfinite().all()
