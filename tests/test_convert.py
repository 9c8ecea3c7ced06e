import copy
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
from conftest import randomize
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torch.nn import functional as F
from torchvision.ops.misc import FrozenBatchNorm2d

from timm_iebn import (
    IEBN2d,
    IEBNAct2d,
    convert_bn_to_iebn,
    convert_iebn_to_bn,
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
    load_authors_checkpoint,
    unfreeze_batch_norm_2d,
)
from timm_iebn.layers import SyncBatchNorm2d

NETWORKS = ["resnet18", "mobilenetv3_small_100", "densenet121", "regnety_002"]


def plain_network(name):
    return randomize(timm.create_model(name)).double()


def norms(net, kind=IEBN2d):
    return {n: m for n, m in net.named_modules() if isinstance(m, kind)}


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


def test_the_layer_shows_that_it_is_frozen_or_synchronised():
    assert "frozen=True" in repr(freeze_batch_norm_2d(IEBN2d(4))) and "sync=True" not in repr(IEBN2d(4))
    assert "sync=True" in repr(convert_sync_batchnorm(IEBN2d(4)))


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


def test_a_synchronised_norm_stays_synchronised():
    group = object()
    for norm in (nn.SyncBatchNorm(4, process_group=group), convert_sync_batchnorm(nn.BatchNorm2d(4), group)):
        iebn = convert_bn_to_iebn(norm)
        assert iebn.sync and iebn.process_group is group
        back = convert_iebn_to_bn(iebn)
        assert isinstance(back, SyncBatchNorm2d) and back.process_group is group
    assert convert_sync_batchnorm(IEBN2d(4), group).process_group is group


def test_what_has_no_iebn_form_is_named():
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))
    with pytest.raises(TypeError, match="1 is a BatchNorm3d.*leave="):
        convert_bn_to_iebn(net)
    with pytest.raises(TypeError, match="no weight to warm start"):
        convert_bn_to_iebn(nn.BatchNorm2d(4, affine=False))
    assert isinstance(convert_bn_to_iebn(nn.Sequential(nn.BatchNorm1d(2)))[0], nn.BatchNorm1d)


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


def test_norms_of_other_dimensions_are_synchronised_by_torchs_layer():
    net = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3)))
    assert [type(m) for m in net] == [nn.SyncBatchNorm, SyncBatchNorm2d, nn.SyncBatchNorm]


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


@pytest.mark.parametrize("sizes", [(4, 4), (5, 3)])
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


class AuthorsNorm(nn.Module):
    """As in the authors' code: four parameters of shape (1, C, 1, 1)."""

    def __init__(self, c):
        super().__init__()
        for name in ("weight", "bias", "weight_readjust", "bias_readjust"):
            self.register_parameter(name, nn.Parameter(torch.randn(1, c, 1, 1)))
        self.register_buffer("running_mean", torch.randn(c))
        self.register_buffer("running_var", torch.rand(c) + 0.5)
        self.register_buffer("num_batches_tracked", torch.tensor(7))

    def forward(self, x):
        gate = torch.sigmoid(x.mean((2, 3), keepdim=True) * self.weight_readjust + self.bias_readjust)
        return F.batch_norm(x, self.running_mean, self.running_var) * self.weight * gate + self.bias


class AuthorsBlock(nn.Module):
    def __init__(self, c_in, planes, stride, expansion):
        super().__init__()
        out = planes * expansion
        kernels = [(c_in, planes, 1, 1), (planes, planes, 3, stride), (planes, out, 1, 1)]
        kernels = kernels if expansion == 4 else [(c_in, planes, 3, stride), (planes, out, 3, 1)]
        for i, (a, b, k, s) in enumerate(kernels, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, k, s, k // 2, bias=False))
            self.add_module(f"bn{i}", AuthorsNorm(b))
        self.depth, self.downsample = len(kernels), None
        if stride != 1 or c_in != out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, out, 1, stride, bias=False), randomize(nn.BatchNorm2d(out)))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.depth else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class AuthorsResNet(nn.Module):
    def __init__(self, depth, expansion, num_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), AuthorsNorm(16)
        c = 16
        for i, planes in enumerate((16, 32, 64), 1):
            blocks = []
            for j in range(depth):
                blocks.append(AuthorsBlock(c, planes, 2 if i > 1 and j == 0 else 1, expansion))
                c = planes * expansion
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.fc = nn.Linear(c, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.avg_pool2d(self.layer3(self.layer2(self.layer1(x))), 8).flatten(1))


@pytest.fixture
def authors_file(tmp_path):
    def write(depth, expansion, prefix="module."):
        theirs = AuthorsResNet(depth, expansion, 10).double().eval()
        with torch.no_grad():  # keeps 164 layers of random norms within range
            for name, parameter in theirs.named_parameters():
                if name.endswith(("bn2.weight", "bn3.weight")):
                    parameter.mul_(0.2)
        path = tmp_path / "model_best.pth.tar"
        state = {prefix + k: v for k, v in theirs.state_dict().items()}
        torch.save(dict(epoch=164, state_dict=state, best_acc=77.09), path)
        return theirs, path

    return write


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize(
    ("name", "depth", "expansion"), [("resnet164_cifar_iebn", 18, 4), ("resnet20_cifar_iebn", 3, 1)]
)
def test_the_authors_checkpoints_load(name, depth, expansion, prefix, authors_file):
    theirs, path = authors_file(depth, expansion, prefix)
    ours = load_authors_checkpoint(timm.create_model(name, num_classes=10).double(), path).eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = theirs(x)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(ours(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "num_classes", "why"),
    [
        ("resnet32_cifar_iebn", 10, r"Missing key.*layer1\.3"),
        ("resnet20_cifar_iebn", 100, r"size mismatch for fc\.weight"),
        ("resnet20_cifar", 10, r"Unexpected key.*bn1\.gate_weight"),
        ("resnet164_cifar_iebn", 10, r"Missing key.*layer1\.0\.conv3"),
    ],
)
def test_an_authors_checkpoint_of_another_network_is_named(name, num_classes, why, authors_file):
    _, path = authors_file(3, 1)
    with pytest.raises(RuntimeError, match=rf"(?s)model_best\.pth\.tar does not fit CifarResNet.*{why}"):
        load_authors_checkpoint(timm.create_model(name, num_classes=num_classes), path)


def test_an_authors_checkpoint_of_a_deeper_network_is_named(authors_file):
    _, path = authors_file(5, 1)
    with pytest.raises(RuntimeError, match=r"(?s)does not fit CifarResNet.*Unexpected key.*layer1\.3"):
        load_authors_checkpoint(timm.create_model("resnet20_cifar_iebn", num_classes=10), path)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def corrupt(path, content):
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["state_dict"]
    if content == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif content == "text":
        path.write_text("hello")
    elif content == "half a file":
        path.write_bytes(path.read_bytes()[:5000])
    elif content == "batch norm":
        torch.save(dict(state_dict=nn.BatchNorm2d(3).state_dict()), path)
    elif content == "bare state dict":
        torch.save(state, path)
    elif content == "list":
        torch.save([1, 2], path)
    elif content == "number":
        torch.save(dict(state_dict=state | {"module.bn1.weight_readjust": 3}), path)
    elif content == "odd key":
        torch.save(dict(state_dict={0: torch.ones(1)} | state), path)
    else:  # complete, and more than that
        torch.save(checkpoint | dict(extra=Bomb()), path, _use_new_zipfile_serialization="legacy" not in content)


@pytest.mark.parametrize(
    "content",
    [
        *["pickle", "code", "code, legacy", "text", "half a file"],
        *["batch norm", "bare state dict", "list", "number", "odd key"],
    ],
)
def test_no_other_file_is_taken_for_an_authors_checkpoint(content, authors_file):
    _, path = authors_file(3, 1)
    model = timm.create_model("resnet20_cifar_iebn", num_classes=10)
    state = copy.deepcopy(model.state_dict())
    corrupt(path, content)
    with pytest.raises(RuntimeError, match=r"model_best\.pth\.tar is not a checkpoint"):
        load_authors_checkpoint(model, path)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_missing_authors_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth\.tar"):
        load_authors_checkpoint(timm.create_model("resnet20_cifar_iebn"), tmp_path / "gone.pth.tar")


def test_a_pattern_that_names_nothing_is_named():
    with pytest.raises(ValueError, match=r"no layer has a name like 'xx\.yy'"):
        convert_bn_to_iebn(timm.create_model("resnet18"), leave=["xx.yy"])


@pytest.mark.parametrize("training", [True, False])
def test_freezing_and_back_keeps_the_mode_of_every_norm(training):
    model = timm.create_model("resnet20_cifar_iebn").train(training)
    freeze_batch_norm_2d(model)
    assert all(m.training == training for m in model.modules())
    unfreeze_batch_norm_2d(model)
    assert all(m.training == training for m in model.modules())
