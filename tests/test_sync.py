"""Synchronised norms: several processes are one, and one is as if it were not synchronised."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from conftest import randomize
from networks import norms
from torch import nn
from torch.nn import functional as F

from timm_iebn import IEBN2d, convert_bn_to_iebn, convert_iebn_to_bn, convert_sync_batchnorm, freeze_batch_norm_2d
from timm_iebn.layers import SyncBatchNorm2d


def test_a_synchronised_norm_stays_synchronised():
    group = object()
    for norm in (nn.SyncBatchNorm(4, process_group=group), convert_sync_batchnorm(nn.BatchNorm2d(4), group)):
        iebn = convert_bn_to_iebn(norm)
        assert iebn.sync and iebn.process_group is group
        back = convert_iebn_to_bn(iebn)
        assert isinstance(back, SyncBatchNorm2d) and back.process_group is group
    assert convert_sync_batchnorm(IEBN2d(4), group).process_group is group


def test_norms_of_other_dimensions_are_synchronised_by_torchs_layer():
    net = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3)))
    assert [type(m) for m in net] == [nn.SyncBatchNorm, SyncBatchNorm2d, nn.SyncBatchNorm]
    frozen = freeze_batch_norm_2d(net).eval()  # as freezing leaves those of other dimensions, synchronised or not
    assert frozen[0](torch.randn(4, 3)).shape == (4, 3) and frozen[2](torch.randn(4, 3, 2, 2, 2)).dim() == 5
    assert not frozen[1].training and not [*frozen[1].parameters()]


SYNCED = ["resnet20_cifar_iebn", "mobilenetv2_cifar", "mobilenetv2_cifar_iebn"]


def step(net, x, target):
    y = net(x)
    F.cross_entropy(y, target, reduction="sum").backward()
    return y


def sync_worker(rank, folder, sizes):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(sizes))
    data = torch.load(f"{folder}/data.pt", weights_only=True)
    results = {}
    for name in SYNCED:
        net = timm.create_model(name).double()
        net.load_state_dict(data[name])
        x = data["x"].split(sizes)[rank]
        with torch.no_grad():  # not converted, each rank is on its own
            alone = copy.deepcopy(net)(x)
        y = step(convert_sync_batchnorm(net), *(t.split(sizes)[rank] for t in (data["x"], data["target"])))
        grads = [p.grad for p in net.parameters()]
        for grad in grads:
            dist.all_reduce(grad)
        state = copy.deepcopy(net.state_dict())
        with torch.no_grad():  # neither do ranks meet in eval or with frozen norms
            calm = net.eval()(x)
            frozen = freeze_batch_norm_2d(net).train()(x)
        results[name] = dict(y=y.detach(), grads=grads, state=state, alone=alone, calm=calm, frozen=frozen)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [(5, 3), pytest.param((4, 4), marks=pytest.mark.slow)])
def test_two_processes_are_one(sizes, tmp_path):
    nets = {name: randomize(timm.create_model(name)).double() for name in SYNCED}
    x, target = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.randint(0, 100, (8,))
    torch.save(dict(x=x, target=target, **{n: net.state_dict() for n, net in nets.items()}), tmp_path / "data.pt")
    torch.multiprocessing.spawn(sync_worker, (str(tmp_path), sizes), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    close = dict(rtol=1e-8, atol=1e-8)
    for name, net in nets.items():
        for rank, part in zip(ranks, x.split(sizes), strict=True):
            torch.testing.assert_close(rank[name]["alone"], copy.deepcopy(net)(part).detach(), **close)
        y = step(net, x, target)
        torch.testing.assert_close(torch.cat([r[name]["y"] for r in ranks]), y.detach(), **close)
        for rank in ranks:
            for (key, parameter), grad in zip(net.named_parameters(), rank[name]["grads"], strict=True):
                torch.testing.assert_close(grad, parameter.grad, **close, msg=lambda m, k=key: f"{k}: {m}")
            for key, value in net.state_dict().items():
                torch.testing.assert_close(rank[name]["state"][key], value, **close, msg=lambda m, k=key: f"{k}: {m}")
        expected = net.eval()(x).detach()
        for key in ("calm", "frozen"):
            torch.testing.assert_close(torch.cat([r[name][key] for r in ranks]), expected, **close)


def test_a_synchronised_network_works_alone():
    net = randomize(timm.create_model("resnet20_cifar_iebn"))
    alone, x = copy.deepcopy(net), torch.randn(4, 3, 32, 32)
    assert all(m.sync for m in norms(convert_sync_batchnorm(net)).values())
    torch.testing.assert_close(net(x), alone(x))
    torch.testing.assert_close(net.eval()(x), alone.eval()(x))
    assert net.state_dict().keys() == alone.state_dict().keys()


def test_in_a_group_of_one_it_is_batch_norm_too(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        norm, plain, x = convert_sync_batchnorm(nn.BatchNorm2d(3)), nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)
        assert torch.equal(norm(x), plain(x)) and torch.equal(norm.running_var, plain.running_var)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm(x[:1, :, :1, :1])
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated", "ignore:.*not supported in Python 3.14")
@pytest.mark.parametrize("name", ["resnet20_cifar_iebn", "mobilenetv2_cifar"])
def test_a_synchronised_network_scripts_in_eval_and_traces(name):
    net = convert_sync_batchnorm(randomize(timm.create_model(name)))
    x, traced = torch.randn(2, 3, 32, 32), torch.fx.symbolic_trace(nn.Sequential(*list(net.children())[:2]))
    assert {type(traced.get_submodule(n.target)) for n in traced.graph.nodes if n.op == "call_module"} >= {
        type(net.bn1)
    }
    if not norms(net):
        with pytest.raises(RuntimeError, match="in eval it scripts"):
            torch.jit.script(net)
    torch.testing.assert_close(torch.jit.script(net.eval())(x), net(x), rtol=1e-4, atol=1e-4)
