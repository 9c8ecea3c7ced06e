"""The layers in eager mode: formula, statistics, state dicts, timm's ways to build them, and what would drop a gate."""

import copy
import types

import pytest
import timm
import torch
from conftest import randomize
from networks import images, layer, network
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import timm_iebn
from timm_iebn import IEBN2d, IEBNAct2d, convert_sync_batchnorm, freeze_batch_norm_2d

FORMATS = [torch.contiguous_format, torch.channels_last]


def test_parameters_and_start_values():
    state = IEBN2d(5).state_dict()
    assert list(state) == "weight bias gate_weight gate_bias running_mean running_var num_batches_tracked".split()
    start = dict(weight=1, bias=0, gate_weight=0, gate_bias=-1, running_mean=0, running_var=1)
    for name, value in start.items():
        assert torch.equal(state[name], torch.full((5,), float(value)))
    norm = layer()
    norm.reset_parameters()
    assert norm.gate_weight.abs().max() == 0 and norm.gate_bias.unique().tolist() == [-1]
    norm.running_mean.fill_(3)
    norm.reset_running_stats()
    assert norm.running_mean.abs().max() == 0


@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
def test_the_layer_is_the_formula(layout):
    norm, x = layer().double(), images().double()
    gate = torch.sigmoid(norm.gate_weight * x.mean((2, 3)) + norm.gate_bias)[:, :, None, None]
    bn = F.batch_norm(x, norm.running_mean.clone(), norm.running_var.clone(), training=True)
    expected = norm.weight[:, None, None] * gate * bn + norm.bias[:, None, None]
    y = norm(x.contiguous(memory_format=layout))
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_batch_norms(momentum):
    ours, theirs = IEBN2d(6, momentum=momentum), nn.BatchNorm2d(6, momentum=momentum)
    for _ in range(5):
        x = images()
        ours(x), theirs(x)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer)


def test_without_affine_only_the_gate_is_learned():
    norm = layer(affine=False)
    assert [n for n, _ in norm.named_parameters()] == ["gate_weight", "gate_bias"]
    x = images()
    gate = torch.sigmoid(norm.gate_weight * x.mean((2, 3)) + norm.gate_bias)[:, :, None, None]
    torch.testing.assert_close(norm(x), gate * F.batch_norm(x, None, None, training=True))


def test_without_running_statistics_eval_uses_the_batch():
    norm, x = layer(track_running_stats=False), images()
    y = norm(x)
    torch.testing.assert_close(norm.eval()(x), y)


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (1, 6, 33, 1), (3, 6, 2, 31)])
def test_eval_takes_any_size(shape):
    norm, x = layer().eval(), torch.randn(shape)
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]))


def test_an_empty_batch_stays_empty_in_eval():
    assert layer().eval()(torch.randn(0, 6, 4, 4)).shape == (0, 6, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_autocast_returns_what_batch_norm_returns(dtype, training):
    ours, theirs = layer().train(training), nn.BatchNorm2d(6).train(training)
    x = images().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(x)
        assert y.dtype == theirs(x).dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype and ours.gate_weight.grad.dtype == torch.float32


def test_a_bfloat16_layer_works_in_bfloat16():
    norm, x = layer(), images()
    half = copy.deepcopy(norm).bfloat16()
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), norm(x), atol=0.1, rtol=0.1)


def test_a_bad_num_features_is_named():
    for bad in (0, -3):
        with pytest.raises(ValueError, match=f"num_features must be at least 1, got {bad}"):
            IEBN2d(bad)


def test_the_layer_shows_that_it_is_frozen_or_synchronised():
    assert "frozen=True" in repr(freeze_batch_norm_2d(IEBN2d(4))) and "sync=True" not in repr(IEBN2d(4))
    assert "sync=True" in repr(convert_sync_batchnorm(IEBN2d(4)))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(4, 6, 5), ValueError, r"4D.*3D.*\[4, 6, 5\]"),
        (torch.randn(4, 3, 5, 5), RuntimeError, r"expected 6 channels, got 3.*\[4, 3, 5, 5\]"),
        (torch.randn(1, 6, 1, 1), ValueError, r"more than 1 value per channel.*\[1, 6, 1, 1\]"),
        (torch.ones(4, 6, 5, 5, dtype=torch.int64), NotImplementedError, "torch.int64.*float"),
    ],
)
def test_bad_input_raises_as_batch_norm_does(x, error, message):
    with pytest.raises(error):
        nn.BatchNorm2d(6)(x)
    norm = IEBN2d(6)
    with pytest.raises(error, match=message):
        norm(x)
    assert norm.num_batches_tracked == 0


def test_activation_checkpointing_keeps_gradients():
    norm, x = layer().eval(), images().requires_grad_()
    (expected,) = torch.autograd.grad(norm(x).square().sum(), x)
    (found,) = torch.autograd.grad(checkpoint(norm, x, use_reentrant=False).square().sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("lost", [("gate_weight", "gate_bias"), ("gate_bias",)])
def test_a_state_dict_without_gates_is_refused(strict, lost):
    net = network()
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("1.") or k.split(".")[1] not in lost}
    with pytest.raises(RuntimeError, match=rf"(?s)convert_bn_to_iebn.*1\.{lost[0]}"):
        net.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("kept", ["0.", "nothing"])
def test_a_state_dict_that_leaves_a_norm_out_loads_with_a_warning(kept):
    net = network()
    state = {k: v for k, v in net.state_dict().items() if k.startswith(kept)}
    with pytest.warns(UserWarning, match="lacks IEBN layers of this network, whose gates stay as they are"):
        net.load_state_dict(state, strict=False)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=r"(?s)Missing key.*1\.gate_weight"):
        net.load_state_dict(state)


def test_a_state_dict_of_statistics_alone_is_refused():
    net = network()
    state = {k: v for k, v in net.state_dict().items() if "running_var" in k}
    with pytest.raises(RuntimeError) as error:
        net.load_state_dict(state, strict=False)
    assert str(error.value).count("convert_bn_to_iebn") == 1
    for name in (name for name, m in net.named_modules() if isinstance(m, IEBN2d)):
        assert f"\t{name}.gate_weight and {name}.gate_bias: not in the checkpoint" in str(error.value)


def gates(net):
    return sum(isinstance(m, IEBN2d) for m in net.modules())


def quantise(*names):
    return lambda net: torch.ao.quantization.fuse_modules(net, [list(names)])


@pytest.mark.parametrize(
    "drop_gates",
    [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        timm.layers.convert_sync_batchnorm,
        timm.layers.convert_splitbn_model,
        timm.layers.freeze_batch_norm_2d,
        timm.utils.freeze,
        lambda net: nn.utils.fusion.fuse_conv_bn_eval(net[0], net[1]),
        lambda net: net[1].eps,
        quantise("0", "1"),
        quantise("0", "1", "2"),
        quantise("1", "2"),
    ],
    ids=[
        *["torch sync", "timm sync", "split", "timm freeze", "timm.utils.freeze", "fuse conv", "eps"],
        *["quantise conv", "quantise conv relu", "quantise relu"],
    ],
)
def test_what_would_drop_a_gate_fails_loudly_and_changes_nothing(drop_gates, request):
    net, x = network().eval(), torch.randn(2, 3, 9, 9)
    y, state = net(x), copy.deepcopy(net.state_dict())
    quantising = "quantise" in request.node.callspec.id
    error, message = (AssertionError, "IEBN2d") if quantising else (AttributeError, r"IEBN2d\.eps is not readable")
    with pytest.raises(error, match=message):
        drop_gates(net)
    assert gates(net) == 2 and net.state_dict().keys() == state.keys()
    assert torch.equal(net(x), y)


def test_eps_is_missing_and_the_message_names_every_remedy():
    norm = IEBN2d(6, eps=1e-3)
    assert not hasattr(norm, "eps") and norm._eps == 1e-3
    with pytest.raises(AttributeError) as error:
        _ = norm.eps
    for remedy in ("convert_sync_batchnorm", "freeze_batch_norm_2d", "convert_iebn_to_bn"):
        assert f"timm_iebn.{remedy}" in str(error.value) and hasattr(timm_iebn, remedy)
    assert "`_eps`" in str(error.value)


def test_weight_averaging_recomputes_the_statistics():
    net = network()
    batches = [torch.randn(8, 3, 9, 9) for _ in range(3)]
    torch.optim.swa_utils.update_bn(batches, net)
    inputs = torch.stack([net[0](b) for b in batches])
    torch.testing.assert_close(net[1].running_mean, inputs.mean((0, 1, 3, 4)))
    assert net[1].num_batches_tracked == 3 and net[1].momentum == 0.1


@pytest.mark.parametrize(
    "name", ["densenet121", "efficientnet_b0", "regnety_002", "mobilenetv3_large_100", "mobilenetv4_conv_small"]
)
def test_timm_builds_with_the_name_and_keeps_every_activation(name):
    plain, gated = timm.create_model(name), timm.create_model(name, norm_layer="iebn")
    norms = [m for m in gated.modules() if isinstance(m, nn.BatchNorm2d)]
    twins = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == len(twins) > 30 and all(isinstance(m, IEBN2d) for m in norms)
    for norm, twin in zip(norms, twins, strict=True):
        assert isinstance(norm, IEBNAct2d) == isinstance(twin, BatchNormAct2d)
        if isinstance(twin, BatchNormAct2d):
            assert (type(norm.act), type(norm.drop)) == (type(twin.act), type(twin.drop))
    y = randomize(gated)(torch.randn(2, 3, 64, 64))
    y.square().mean().backward()
    assert all(m.gate_weight.grad.isfinite().all() for m in norms)
    with pytest.raises((KeyError, TypeError, AssertionError)):
        timm.create_model(name, norm_layer="no_such_norm")


@pytest.mark.parametrize("name", ["iebn", "iebn2d"])
def test_timm_knows_the_layers_by_name_and_by_class(name):
    assert timm.layers.get_norm_layer(name) is timm.layers.get_norm_layer(IEBN2d) is IEBN2d
    assert type(timm.layers.create_norm_layer(name, 4)) is IEBN2d
    for given in (name, IEBN2d, IEBNAct2d):
        norm = timm.layers.get_norm_act_layer(given, "silu")(4)
        assert type(norm) is IEBNAct2d and isinstance(norm.act, nn.SiLU)
        bare = timm.layers.get_norm_act_layer(given, "silu")(4, apply_act=False)
        assert isinstance(bare.act, nn.Identity)


@pytest.mark.parametrize("act", [nn.ReLU, nn.Hardswish, "silu", None])
def test_the_act_form_is_the_layer_and_the_activation(act):
    x, plain = images(), layer()
    both = IEBNAct2d(6, act_layer=act)
    both.load_state_dict(plain.state_dict())
    function = {nn.ReLU: F.relu, nn.Hardswish: F.hardswish, "silu": F.silu, None: lambda x: x}[act]
    torch.testing.assert_close(both(x), function(plain(x)))
    off = IEBNAct2d(6, act_layer=act, apply_act=False)
    off.load_state_dict(plain.state_dict())
    torch.testing.assert_close(off.eval()(x), plain.eval()(x))


def test_dropout_sits_between_norm_and_activation():
    calls = types.SimpleNamespace(seen=None)

    class Half(nn.Module):
        def forward(self, x):
            calls.seen = x
            return x / 2

    both, plain, x = IEBNAct2d(6, drop_layer=Half), IEBN2d(6), images()
    torch.testing.assert_close(both(x), F.relu(plain(x) / 2))
    assert calls.seen.min() < 0
