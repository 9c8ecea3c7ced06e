"""Batch norm to IEBN, with a warm start or without, and back."""

import copy

import pytest
import timm
import torch
import torchvision
from conftest import randomize
from networks import norms
from timm.layers import BatchNormAct2d
from torch import nn

from timm_iebn import (
    IEBN2d,
    IEBNAct2d,
    convert_bn_to_iebn,
    convert_iebn_to_bn,
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
)

NETWORKS = ["resnet18", "mobilenetv3_small_100", "densenet121", "regnety_002"]


def plain_network(name):
    return randomize(timm.create_model(name)).double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_warm_start_keeps_the_function_and_goes_back(name, training):
    before = plain_network(name).train(training)
    after = convert_bn_to_iebn(copy.deepcopy(before))
    assert len(norms(after)) > 15 and all(m.training == training for m in after.modules())
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    dropout = torch.random.get_rng_state()
    expected, y = before(x), (torch.random.set_rng_state(dropout), after(x))[1]
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    for key, value in before.state_dict().items():
        if "running" in key or "tracked" in key:
            torch.testing.assert_close(after.state_dict()[key], value)
    back = convert_iebn_to_bn(after)
    assert norms(back) == {} and back.state_dict().keys() == before.state_dict().keys()
    torch.testing.assert_close(back.eval()(x), before.eval()(x), rtol=1e-9, atol=1e-9)


def shared():
    """One norm in two places of one module, and in another module."""
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.ReLU(), norm, nn.Sequential(nn.Conv2d(3, 3, 1), norm))


def sequential():
    act = BatchNormAct2d(6, eps=1e-3, momentum=0.3, act_layer="silu", drop_layer=nn.Dropout2d)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=0.1, momentum=0.2), nn.Conv2d(5, 6, 3), act)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [sequential, shared])
def test_a_warm_start_of_a_plain_network_keeps_its_function(build, training):
    before = randomize(build()).double().train(training)
    for module in before.modules():
        if isinstance(module, nn.Dropout2d):
            module.eval()
    after = convert_bn_to_iebn(copy.deepcopy(before))
    x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    for _ in range(2):  # the second time with moved statistics
        torch.testing.assert_close(after(x), before(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(after.named_buffers()), dict(before.named_buffers()))
    assert all(isinstance(m, IEBN2d) for m in norms(after, nn.BatchNorm2d).values())
    back = convert_iebn_to_bn(after)
    torch.testing.assert_close(back(x), before(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(back.named_buffers()), dict(before.named_buffers()))


@pytest.mark.parametrize("convert", [convert_sync_batchnorm, freeze_batch_norm_2d])
def test_a_shared_norm_is_converted_everywhere(convert):
    assert not any(type(m) is nn.BatchNorm2d for m in convert(shared()).modules())


def test_activations_survive_both_ways():
    before = plain_network("mobilenetv3_small_100")
    after = convert_bn_to_iebn(copy.deepcopy(before))
    back = convert_iebn_to_bn(copy.deepcopy(after))
    for name, norm in norms(before, BatchNormAct2d).items():
        there, again = after.get_submodule(name), back.get_submodule(name)
        assert isinstance(there, IEBNAct2d) and isinstance(again, BatchNormAct2d)
        assert type(norm.act) is type(there.act) is type(again.act)
    act = sequential()[3]
    there = convert_bn_to_iebn(copy.deepcopy(act))
    for norm in (there, convert_iebn_to_bn(copy.deepcopy(there))):
        assert type(norm.act) is nn.SiLU and type(norm.drop) is nn.Dropout2d


@pytest.mark.parametrize(
    ("leave", "left"),
    [
        (None, "downsample"),
        ((), None),
        (["layer1.*"], "layer1."),
        ("*.bn2", "bn2"),
        (lambda name, norm: norm.num_features == 512, "layer4"),
    ],
)
def test_norms_are_left_as_asked(leave, left):
    before = plain_network("resnet18")
    after = convert_bn_to_iebn(copy.deepcopy(before), **({} if leave is None else dict(leave=leave)))
    stayed = {n for n in norms(after, nn.BatchNorm2d) if n not in norms(after)}
    assert stayed == {n for n in norms(before, nn.BatchNorm2d) if left and left in n}


def test_a_fresh_start_keeps_the_weights():
    norm = randomize(nn.BatchNorm2d(5))
    iebn = convert_bn_to_iebn(copy.deepcopy(norm), warm_start=False)
    assert torch.equal(iebn.weight, norm.weight) and iebn.gate_bias.unique().tolist() == [-1]


def test_conversion_keeps_settings_dtype_and_grad():
    norm = nn.BatchNorm2d(5, eps=1e-3, momentum=None, track_running_stats=False).bfloat16()
    norm.weight.requires_grad_(False)
    iebn = convert_bn_to_iebn(norm)
    assert (iebn._eps, iebn.momentum, iebn.running_mean) == (1e-3, None, None)
    assert {p.dtype for p in iebn.parameters()} == {torch.bfloat16} and not iebn.weight.requires_grad


def neutral(norm):
    """`norm` with random tensors, gates that differ among channels but not among images, and odd settings."""
    nn.init.zeros_(randomize(norm).gate_weight)
    return norm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "norm",
    [
        IEBN2d(5, eps=0.1, momentum=0.3),
        IEBN2d(5, momentum=None),
        IEBN2d(5, affine=False),
        IEBN2d(5, track_running_stats=False),
        IEBNAct2d(5, act_layer="silu"),
        convert_sync_batchnorm(IEBN2d(5)),
        freeze_batch_norm_2d(IEBN2d(5)),
        freeze_batch_norm_2d(IEBNAct2d(5)),
    ],
    ids=["eps", "cumulative", "no affine", "untracked", "act", "sync", "frozen", "frozen act"],
)
def test_neutral_gates_become_the_same_batch_norm(norm, training):
    before = neutral(copy.deepcopy(norm)).train(training)
    after, x = convert_iebn_to_bn(copy.deepcopy(before)), torch.randn(4, 5, 6, 6)
    assert not isinstance(after, IEBN2d)
    for _ in range(2):
        torch.testing.assert_close(after(x), before(x))
    if norm.track_running_stats:
        torch.testing.assert_close(after.running_mean, before.running_mean)
        torch.testing.assert_close(after.running_var, before.running_var)


def test_converting_twice_changes_nothing():
    net = convert_bn_to_iebn(plain_network("resnet18"))
    state = copy.deepcopy(net.state_dict())
    convert_bn_to_iebn(net)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_what_has_no_iebn_form_is_named():
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))
    with pytest.raises(TypeError, match="1 is a BatchNorm3d.*leave="):
        convert_bn_to_iebn(net)
    with pytest.raises(TypeError, match="no weight to warm start"):
        convert_bn_to_iebn(nn.BatchNorm2d(4, affine=False))
    assert isinstance(convert_bn_to_iebn(nn.Sequential(nn.BatchNorm1d(2)))[0], nn.BatchNorm1d)


@pytest.mark.parametrize("convert", [convert_bn_to_iebn, convert_sync_batchnorm])
def test_what_is_refused_is_not_half_converted(convert):
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(3), LoudBatchNorm(3))
    with pytest.raises(TypeError, match="2 is a LoudBatchNorm"):
        convert(net)
    assert [type(m) for m in net] == [nn.BatchNorm2d, nn.BatchNorm1d, LoudBatchNorm]
    assert (net[0].weight == 1).all()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_a_frozen_batch_norm_is_not_left_out_silently(kind):
    with pytest.raises(TypeError, match="0 is a FrozenBatchNorm.*leave="):
        convert_bn_to_iebn(timm.layers.freeze_batch_norm_2d(nn.Sequential(kind(3))))


def tied():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    net[2].weight = net[0].weight
    return net


def test_a_shared_weight_is_scaled_once_both_ways():
    before = randomize(tied()).eval()
    after, x = convert_bn_to_iebn(copy.deepcopy(before)), torch.randn(4, 3, 5, 5)
    assert after[0].weight is after[2].weight
    torch.testing.assert_close(after(x), before(x))
    torch.testing.assert_close(convert_iebn_to_bn(copy.deepcopy(after))(x), before(x))
    with torch.no_grad():
        after[2].gate_bias += 1
    with pytest.raises(ValueError, match="2 shares its weight with a norm of another gate_bias"):
        convert_iebn_to_bn(after)


def test_hooks_stay():
    norm, calls = nn.BatchNorm2d(3), []
    norm.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    convert_bn_to_iebn(norm)(torch.randn(4, 3, 5, 5))
    assert calls == [IEBN2d]


class LoudBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 100 * super().forward(x)


@pytest.mark.parametrize("convert", [convert_bn_to_iebn, convert_sync_batchnorm])
@pytest.mark.parametrize("norm", [LoudBatchNorm(3), timm.layers.SplitBatchNorm2d(4)], ids=["loud", "split"])
def test_a_class_with_a_forward_of_its_own_is_not_replaced(convert, norm):
    with pytest.raises(TypeError, match=f"0 is a {type(norm).__name__}"):
        convert(nn.Sequential(norm))


@pytest.mark.parametrize(
    ("name", "shortcuts"),
    [
        *[("resnet50d", 4), ("regnety_002", 4), ("dla34", 4), ("dpn48b", 4), ("xception41", 4), ("tresnet_m", 3)],
        *[("hgnet_tiny", 0), ("tiny_vit_5m_224", 0), ("inception_next_atto", 0)],
    ],
)
def test_shortcuts_are_known_in_timms_families(name, shortcuts):
    net = timm.create_model(name)
    total = len(norms(net, nn.BatchNorm2d))
    assert len(norms(convert_bn_to_iebn(net))) == total - shortcuts


def test_the_shortcuts_of_torchvisions_regnet_are_known():
    net = torchvision.models.regnet_y_400mf()
    total = len(norms(net, nn.BatchNorm2d))
    assert len(norms(convert_bn_to_iebn(net))) == total - 4


def test_learned_gates_do_not_become_batch_norm():
    net = convert_bn_to_iebn(plain_network("resnet18"))
    with torch.no_grad():
        net.layer2[0].bn1.gate_weight[3] = 0.1
        for n in (0, 1):
            nn.init.ones_(net.layer4[n].bn1.gate_weight), nn.init.ones_(net.layer4[n].bn2.gate_weight)
    before, state = norms(net), copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"layer2\.0\.bn1, layer4\.0\.bn1, layer4\.0\.bn2 and 2 more"):
        convert_iebn_to_bn(net)
    assert norms(net) == before and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_a_pattern_that_names_nothing_is_named():
    with pytest.raises(ValueError, match=r"no layer has a name like 'xx\.yy'"):
        convert_bn_to_iebn(timm.create_model("resnet18"), leave=["xx.yy"])
