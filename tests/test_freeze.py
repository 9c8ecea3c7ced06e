"""Norms that are frozen, and thawed again."""

import copy

import pytest
import timm
import torch
from conftest import randomize
from networks import norms
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from timm_iebn import IEBN2d, IEBNAct2d, freeze_batch_norm_2d, unfreeze_batch_norm_2d


def test_timms_unfreezing_does_not_leave_a_network_half_frozen():
    net = freeze_batch_norm_2d(timm.create_model("resnet20_cifar_iebn")).train()
    timm.utils.unfreeze(net)
    with pytest.raises(RuntimeError, match="IEBN2d is frozen.*timm_iebn.unfreeze_batch_norm_2d"):
        net(torch.randn(2, 3, 32, 32))
    unfreeze_batch_norm_2d(net)(torch.randn(2, 3, 32, 32))


def test_freezing_leaves_an_activations_parameters_alone():
    norm = IEBNAct2d(3, act_layer=nn.PReLU)
    assert freeze_batch_norm_2d(norm).act.weight.requires_grad
    norm.act.weight.requires_grad_(False)
    assert not unfreeze_batch_norm_2d(norm).act.weight.requires_grad and norm.weight.requires_grad


@pytest.mark.parametrize("name", ["resnet18_iebn", "mobilenetv3_small_100_iebn"])
def test_frozen_norms_keep_their_gates_and_statistics(name):
    net = randomize(timm.create_model(name)).double()
    reference, state = copy.deepcopy(net).eval(), copy.deepcopy(net.state_dict())
    frozen = freeze_batch_norm_2d(net).train()
    assert norms(net).keys() == norms(reference).keys()
    assert not any(p.requires_grad for m in norms(net).values() for p in m.parameters(recurse=False))
    assert isinstance(frozen.get_submodule("bn1"), IEBN2d)
    assert not any(
        type(m) is nn.BatchNorm2d or type(m) is BatchNormAct2d for m in net.modules()
    )  # the shortcuts' are timm's frozen ones
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for module in frozen.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    frozen.drop_rate = 0.0
    torch.testing.assert_close(frozen(x), reference(x))
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key
    for key in norms(net):
        assert all(f"{key}.{k}" in net.state_dict() for k in IEBN2d(1).state_dict())
    thawed = unfreeze_batch_norm_2d(frozen)
    assert all(m.weight.requires_grad and not m.frozen for m in norms(thawed).values())
    assert not norms(thawed, FrozenBatchNorm2d) and not norms(thawed, FrozenBatchNormAct2d)
    assert all(p.requires_grad for p in thawed.parameters()) and thawed.state_dict().keys() == state.keys()
    torch.testing.assert_close(thawed.eval()(x), reference(x))
    thawed.train()(x)
    assert not torch.equal(thawed.state_dict()["bn1.running_mean"], state["bn1.running_mean"])


@pytest.mark.parametrize("training", [True, False])
def test_freezing_and_back_keeps_the_mode_of_every_norm(training):
    model = timm.create_model("resnet20_cifar_iebn").train(training)
    freeze_batch_norm_2d(model)
    assert all(m.training == training for m in model.modules())
    unfreeze_batch_norm_2d(model)
    assert all(m.training == training for m in model.modules())
