"""Layers and networks that are compiled, scripted, traced, exported, copied or pickled: what eager mode computes."""

import copy
import io
import pickle

import onnxruntime
import pytest
import torch
from networks import images, layer, network
from torch import nn

import timm_iebn
from timm_iebn import IEBN2d, IEBNAct2d

scripting = pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated", "ignore:.*not supported in Python 3.14")
COMPILERS = dict(
    script=lambda m, x: torch.jit.script(m),
    trace=lambda m, x: torch.jit.trace(copy.deepcopy(m), x, check_trace=False),
    fx=lambda m, x: torch.fx.symbolic_trace(m),
    compile=lambda m, x: torch.compile(m, fullgraph=True),
)


@pytest.mark.parametrize("kind", [IEBN2d, IEBNAct2d])
@pytest.mark.parametrize("training", [True, False])
class TestCompilers:
    @scripting
    @pytest.mark.parametrize("compiler", COMPILERS)
    def test_outputs_statistics_and_gradients_are_eagers(self, kind, training, compiler):
        eager = layer(kind=kind).train(training)
        other = copy.deepcopy(eager)
        x = images()
        compiled = COMPILERS[compiler](other, x)
        if compiler == "trace":  # tracing has run the copy once
            compiled.load_state_dict(eager.state_dict())
        ys = []
        for module in (eager, compiled):
            module.zero_grad()
            y = module(x)
            y.square().sum().backward()
            ys.append(y)
        torch.testing.assert_close(*ys, rtol=1e-4, atol=1e-5)
        gradients = dict(eager.named_parameters())
        assert len(list(compiled.parameters())) == 4
        for name, parameter in compiled.named_parameters():
            expected = gradients[name.removeprefix("_orig_mod.")].grad
            torch.testing.assert_close(
                parameter.grad, expected, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
        buffers = dict(eager.named_buffers())
        for name, buffer in compiled.named_buffers():  # in eval, traces drop the count of batches
            torch.testing.assert_close(buffer, buffers[name.removeprefix("_orig_mod.")])
        assert len(list(compiled.buffers())) == 3 or not training

    def test_copies_and_pickles(self, kind, training):
        norm, x = layer(kind=kind).train(training), images()
        copies = [copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))]
        y = norm(x)
        assert all(torch.equal(other(x), y) for other in copies)

    def test_meta_construction_materialises(self, kind, training):
        norm = layer(kind=kind).train(training)
        with torch.device("meta"):
            empty = kind(6)
        assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
        empty = empty.to_empty(device="cpu").train(training)
        empty.load_state_dict(norm.state_dict())
        x = images()
        assert torch.equal(empty(x), norm(x))


@scripting
def test_a_scripted_layer_cannot_be_synchronised_silently():
    scripted = torch.jit.script(timm_iebn.convert_sync_batchnorm(layer()))
    with pytest.raises(torch.jit.Error, match="scripted IEBN can't be synchronised"):
        scripted(images())
    assert scripted.eval()(images()).isfinite().all()


@scripting
@pytest.mark.parametrize("compiler", ["script", "compile"])
def test_an_empty_batch_moves_no_statistics_however_it_runs(compiler):
    norm = layer()
    before = copy.deepcopy(norm.state_dict())
    COMPILERS[compiler](norm, None)(torch.randn(0, 6, 4, 4))
    for name in ("running_mean", "running_var"):
        assert torch.equal(norm.state_dict()[name], before[name])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_cumulative_average_needs_no_value_in_eval(device):
    norm, x = layer(momentum=None).eval().to(device), images().to(device)
    assert norm(x).shape == x.shape
    torch.export.export(norm, (x,))


def test_fx_keeps_a_layer_whole():
    net, x = nn.Sequential(nn.Conv2d(3, 6, 3), IEBNAct2d(6, act_layer="silu")), torch.randn(4, 3, 9, 9)
    traced = torch.fx.symbolic_trace(copy.deepcopy(net))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    torch.testing.assert_close(traced(x), net(x))
    torch.testing.assert_close(traced.eval()(x), net.eval()(x))


@scripting
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_network_computes_and_counts_what_eager_does(compiler, training):
    net, x = network().train(training), torch.randn(4, 3, 9, 9)
    compiled = COMPILERS[compiler](copy.deepcopy(net), x)
    if compiler == "trace":  # tracing has run the copy once
        compiled.load_state_dict(net.state_dict(), strict=training)  # in eval, it drops the count of batches
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    buffers = dict(net.named_buffers())
    for name, buffer in compiled.named_buffers():
        torch.testing.assert_close(buffer, buffers[name.removeprefix("_orig_mod.")])


@scripting
@pytest.mark.parametrize("compiler", ["script", "fx", "compile"])  # torch.jit.trace keeps batch norm's mode too
@pytest.mark.parametrize("first", [True, False])
def test_a_compiled_network_follows_train_and_eval(compiler, first):
    net, x = network().train(first), torch.randn(4, 3, 9, 9)
    compiled = COMPILERS[compiler](copy.deepcopy(net), x).train(not first)
    torch.testing.assert_close(compiled(x), net.train(not first)(x), rtol=1e-4, atol=1e-5)


@scripting
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 6, 5), r"got 3D input of shape \[4, 6, 5\]"),
        ((4, 3, 5, 5), r"expected 6 channels, got 3 in input of shape \[4, 3, 5, 5\]"),
        ((1, 6, 1, 1), r"when training, got input of shape \[1, 6, 1, 1\]"),
    ],
)
def test_a_scripted_layer_refuses_bad_input(shape, message):
    scripted = torch.jit.script(layer())
    with pytest.raises(torch.jit.Error, match=message):
        scripted(torch.randn(shape))


def test_export_takes_any_batch():
    net = network().eval()
    dim = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (torch.randn(2, 3, 9, 9),), dynamic_shapes=({0: dim},))
    x = torch.randn(5, 3, 9, 9)
    torch.testing.assert_close(program.module()(x), net(x))


def test_onnx_runs_to_equal_outputs():
    net, x = network().eval(), torch.randn(2, 3, 9, 9)
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_fx_fusion_leaves_iebn_alone():
    from torch.fx.experimental.optimization import fuse

    net, x = network().eval(), torch.randn(2, 3, 9, 9)
    fused = fuse(copy.deepcopy(net))
    torch.testing.assert_close(fused(x), net(x))
    assert {k for k in net.state_dict() if "gate" in k} <= fused.state_dict().keys()
