"""timm's own demands on a model, over every name that is registered here."""

import copy

import pytest
import timm
import torch
from conftest import randomize
from timm.layers import SEModule
from timm.models import get_pretrained_cfg, group_parameters, is_model
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._features_fx import FeatureGraphNet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from timm_iebn import IEBN2d, iebn
from timm_iebn.models._fused import FusedBasicBlock, FusedBottleneck

RESNETS = (
    "resnet18 resnet26 resnet34 resnet50 resnet101 resnet152 resnet50d wide_resnet50_2 wide_resnet101_2 "
    "resnext50_32x4d resnext101_32x4d resnext101_32x8d resnext101_64x4d"
).split()
MOBILENETS = (
    "mobilenetv1_100 mobilenetv2_050 mobilenetv2_100 mobilenetv2_140 mobilenetv3_small_100 mobilenetv3_large_100 "
    "mobilenetv4_conv_small mobilenetv4_conv_medium mobilenetv4_conv_large"
).split()
# batch-norm twin -> its published number of parameters at 100 classes (none was found for WRN-52-4)
CIFAR = {
    "resnet20_cifar": 278_324,
    "resnet32_cifar": 472_756,
    "resnet44_cifar": 667_188,
    "resnet56_cifar": 861_620,
    "resnet110_cifar": 1_736_564,
    "resnet164_cifar": 1_727_284,
    "preresnet164_cifar": 1_726_388,
    "wrn_28_10_cifar": 36_536_884,
    "wrn_52_4_cifar": None,
    "resnext29_8x64d_cifar": 34_518_948,
    "densenet_bc_100_12_cifar": 800_032,
    "mobilenetv2_cifar": 2_351_972,
}
TWINS = [*RESNETS, *MOBILENETS, *CIFAR]
NAMES = [f"{twin}_iebn" for twin in TWINS]
# one of every block, builder and stem
FAMILIES = [
    "resnet18_iebn",
    "resnet50d_iebn",
    "resnext50_32x4d_iebn",
    "mobilenetv1_100_iebn",
    "mobilenetv2_050_iebn",
    "mobilenetv3_small_100_iebn",
    "mobilenetv4_conv_small_iebn",
    "resnet20_cifar_iebn",
    "preresnet164_cifar_iebn",
    "densenet_bc_100_12_cifar_iebn",
    "mobilenetv2_cifar_iebn",
]
TWIN = "resnet20_cifar"
# exports and scripts of these take long, of as few blocks as have every form of them a moment
SHALLOW = {"preresnet164_cifar_iebn": dict(depth=2), "densenet_bc_100_12_cifar_iebn": dict(block_config=(2, 2, 2))}
# of the same blocks as another one that is always tried
REST = [pytest.param(name, marks=pytest.mark.slow) for name in (*NAMES, *CIFAR) if name not in (*FAMILIES, TWIN)]
ALL = [*FAMILIES, TWIN, *REST]

# timm and torch about their own future
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*is not supported in Python 3.14"),
]


def build(name, **kwargs):
    return randomize(timm.create_model(name, **kwargs))


def images(name, batch=2, chans=3):
    size = 32 if "cifar" in name else 64
    return torch.randn(batch, chans, size, size)


def test_the_registered_names_are_the_promised_ones():
    assert sorted(timm.list_models("*_iebn")) == sorted(NAMES)
    assert sorted(timm.list_models("*_cifar")) == sorted(CIFAR)


@pytest.mark.parametrize(
    ("twin", "blocks"),
    [("resnet20_cifar", 9), ("preresnet164_cifar", 54), ("densenet_bc_100_12_cifar", 48), ("mobilenetv2_cifar", 17)],
)
def test_squeeze_and_excitation_is_in_every_block(twin, blocks):
    """Behind its last norm or convolution, or, in MobileNetV2, its depthwise one: where each has been published."""
    assert sorted(timm.list_models("*_cifar_se")) == sorted(f"{name}_se" for name in CIFAR)
    model = build(f"{twin}_se", num_classes=5).train()
    modules = [m for m in model.modules() if isinstance(m, SEModule | SqueezeExcite)]
    assert len(modules) == blocks
    reached = []
    for m in modules:
        m.register_forward_hook(lambda *_: reached.append(1))
    y = model(images(twin, batch=3))
    y.square().mean().backward()
    assert len(reached) == blocks and all(p.grad is not None for p in model.parameters())
    own, plain = (sum(p.numel() for p in timm.create_model(name).parameters()) for name in (f"{twin}_se", twin))
    assert own - plain == sum(p.numel() for m in modules for p in m.parameters())
    assert [f.shape[0] for f in build(f"{twin}_se", features_only=True).eval()(images(twin))] == [2] * (
        5 if "mobilenet" in twin else 4
    )


@pytest.mark.parametrize("name", ["resnet20_cifar_iebn", "resnet18_iebn"])
def test_neutral_gates_start_from_the_twins_function(name):
    x = images(name)
    torch.manual_seed(0)
    twin = timm.create_model(name.removesuffix("_iebn")).eval()
    torch.manual_seed(0)
    neutral = timm.create_model(name, neutral_gates=True).eval()
    torch.testing.assert_close(neutral(x), twin(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_forward_and_backward(name):
    model = build(name).train()
    y = model(images(name, batch=3))
    assert y.shape == (3, model.num_classes) and y.isfinite().all()
    y.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", ALL)
def test_heads_and_channels(name):
    x = images(name, chans=1)
    model = build(name, in_chans=1, num_classes=7).eval()
    assert model.in_chans == 1 and model(x).shape == (2, 7)
    features = model.forward_features(x)
    assert features.shape[:2] == (2, model.num_features) and features.dim() == 4
    torch.testing.assert_close(model.forward_head(features), model(x))
    pre = model.forward_head(features, pre_logits=True)
    assert pre.shape == (2, model.head_hidden_size)
    classifier = model.get_classifier()
    assert classifier.weight.shape[0] == 7 and any(m is classifier for m in model.modules())
    model.reset_classifier(5)
    assert model.num_classes == 5 and model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    unpooled = model(x)  # MobileNetV3 and V4 have a convolution in their head
    assert unpooled.dim() == 4 and unpooled.shape[1] == model.head_hidden_size
    assert timm.create_model(name, num_classes=0, in_chans=1).eval()(x).shape == (2, model.head_hidden_size)


@pytest.mark.parametrize("name", ALL)
def test_features(name):
    x = images(name)
    model = build(name, features_only=True).eval()
    found = model(x)
    expected = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    assert [(f.shape[1], x.shape[-1] // f.shape[-1]) for f in found] == list(expected)
    if not name.startswith(tuple(CIFAR)):
        twin = timm.create_model(name.removesuffix("_iebn"), features_only=True)
        assert model.feature_info.channels() == twin.feature_info.channels()
        assert model.feature_info.reduction() == twin.feature_info.reduction()
    assert len(timm.create_model(name, features_only=True, out_indices=(1, 3))(x)) == 2


@pytest.mark.parametrize("name", ALL)
def test_intermediates(name):
    x = images(name)
    model = build(name).eval()
    features = model.forward_features(x)
    final, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(final, features)
    info = model.feature_info
    assert len(intermediates) == len(info)
    assert [(t.shape[1], x.shape[-1] // t.shape[-1]) for t in intermediates] == [
        (i["num_chs"], i["reduction"]) for i in info
    ]
    only = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert len(only) == 2
    torch.testing.assert_close(only[1], intermediates[-1])
    if "cifar" in name:
        assert model.prune_intermediate_layers(len(info) - 1, prune_head=False) == list(range(1, len(info)))
        torch.testing.assert_close(model.forward_intermediates(x, [len(info) - 1])[0], features)
    model.prune_intermediate_layers([1], prune_head=True)
    (pruned,) = model.forward_intermediates(x, [1], intermediates_only=True)
    torch.testing.assert_close(pruned, intermediates[1])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradient_checkpointing_changes_nothing(name, training):
    x = images(name)
    plain, saving = build(name).double(), timm.create_model(name).double()
    saving.load_state_dict(plain.state_dict())
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        model.train(training).drop_rate = 0.0
    ys = [model(x.double()) for model in (plain, saving)]
    torch.testing.assert_close(*ys)
    for y in ys:
        y.square().mean().backward()
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_has_a_group(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    for coarse in (True, False):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(sum(groups.values(), [])) == sorted(n for n, _ in model.named_parameters())
    assert len(groups) > 2


# timm's DenseNet has no drop path, MobileNetV1 no residual
@pytest.mark.parametrize("name", [n for n in FAMILIES if "densenet" not in n and "netv1" not in n])
def test_drop_path(name):
    model = build(name, drop_path_rate=0.5).train()
    assert sum(type(m).__name__ == "DropPath" for m in model.modules()) > 2
    x = images(name, batch=8)
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_torchscript(name):
    x = images(name)
    model = build(name, scriptable=True, **SHALLOW.get(name, {})).eval()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_fx_features(name):
    x = images(name)
    model = build(name).eval()
    names = [i["module"] for i in model.feature_info]
    found = FeatureGraphNet(model, out_indices=(len(names) - 2, len(names) - 1))(x)
    assert [f.shape[1] for f in found] == [i["num_chs"] for i in model.feature_info][-2:]
    _, expected = model.forward_intermediates(x)
    torch.testing.assert_close(found[-1], expected[-1])
    levels = build(name, features_only=True, feature_cls="fx").eval()
    assert [f.shape[1] for f in levels(x)] == levels.feature_info.channels()
    nodes = levels.graph_module.graph.nodes
    assert any(isinstance(levels.graph_module.get_submodule(n.target), IEBN2d) for n in nodes if n.op == "call_module")
    assert not any(n.target is iebn for n in nodes)  # the layer is a leaf, as batch norm is


@pytest.mark.parametrize("name", FAMILIES)
def test_exports(name):
    x = images(name)
    model = build(name, **SHALLOW.get(name, {})).eval()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_training_step_compiles_without_a_graph_break():
    eager = build("resnet20_cifar_iebn", depth=1).double()
    x, compiled = images("resnet20_cifar_iebn").double(), torch.compile(copy.deepcopy(eager), fullgraph=True)
    for model in (eager, compiled):
        model(x).square().mean().backward()
    for (key, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(dict(eager.named_buffers()), dict(compiled._orig_mod.named_buffers()))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        *((name, dict(feature_location="expansion")) for name in ("mobilenetv1_100_iebn", "mobilenetv2_050_iebn")),
        *((name, dict(output_stride=16)) for name in FAMILIES if "mobilenet" in name and "cifar" not in name),
    ],
    ids=str,
)
def test_features_that_timm_takes_inside_of_mobilenets(name, kwargs):
    whole, x = timm.create_model(name), images(name)
    kwargs = kwargs | dict(features_only=True)
    twin = timm.create_model(name.removesuffix("_iebn"), **kwargs)
    weights = dict(pretrained=True, pretrained_cfg_overlay=dict(state_dict=whole.state_dict()))
    found = timm.create_model(name, **kwargs, **weights).eval()
    assert [f.shape for f in found(x)] == [f.shape for f in twin(x)]
    assert found.feature_info.reduction() == twin.feature_info.reduction()
    assert any(isinstance(m, IEBN2d) for m in found.modules())
    torch.testing.assert_close(found.conv_stem.weight, whole.conv_stem.weight, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet20_cifar_iebn", "preresnet164_cifar_iebn"])
def test_strides_of_dilated_features_are_true(name):
    levels = timm.create_model(name, features_only=True, output_stride=8).eval()
    assert levels.feature_info.reduction() == [32 // f.shape[-1] for f in levels(torch.randn(1, 3, 32, 32))]


def test_a_network_without_a_gate_is_refused():
    with pytest.raises(ValueError, match="resnet18_iebn with .*groupnorm.* has no batch norm"):
        timm.create_model("resnet18_iebn", norm_layer="groupnorm")


@pytest.mark.parametrize("name", ALL)
def test_the_cfg_names_real_layers_and_true_sizes(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = model.pretrained_cfg
    stem, head = model.get_submodule(cfg["first_conv"]), model.get_submodule(cfg["classifier"])
    assert isinstance(stem, nn.Conv2d) and stem.in_channels == cfg["input_size"][0] == 3
    assert head.weight.shape[0] == cfg["num_classes"] == model.num_classes
    with torch.device("meta"):
        assert model.forward_features(torch.randn(1, *cfg["input_size"])).shape[2:] == tuple(cfg["pool_size"])


@pytest.mark.parametrize("twin", TWINS)
def test_all_norms_but_the_shortcuts_are_gated(twin):
    with torch.device("meta"):
        plain, gated = timm.create_model(twin), timm.create_model(f"{twin}_iebn")
    norms = {n: m for n, m in gated.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {n for n, m in norms.items() if not isinstance(m, IEBN2d)} == {n for n in norms if "downsample" in n}
    assert norms.keys() == {n for n, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)}
    channels = sum(m.num_features for m in norms.values() if isinstance(m, IEBN2d))
    plain_count, gated_count = (sum(p.numel() for p in m.parameters()) for m in (plain, gated))
    assert channels > 0 and gated_count == plain_count + 2 * channels
    assert CIFAR.get(twin) in (None, plain_count)
    others = [{n: m for n, m in net.named_modules() if n not in norms} for net in (plain, gated)]
    assert others[0].keys() == others[1].keys()
    fused = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}
    for name, module in others[0].items():
        assert type(others[1][name]) is fused.get(type(module), type(module)), name


@pytest.mark.parametrize("twin", [*RESNETS, *MOBILENETS])
def test_the_default_weights_are_a_warm_start_from_timms_own(twin):
    cfg = get_pretrained_cfg(f"{twin}_iebn")
    assert cfg.tag.startswith("warmstart_") and cfg.architecture == f"{twin}_iebn"
    source = get_pretrained_cfg(f"{twin}.{cfg.tag.removeprefix('warmstart_')}")
    assert cfg.hf_hub_id == source.hf_hub_id == f"timm/{twin}.{source.tag}"
    for field in ("mean", "std", "input_size", "crop_pct", "interpolation", "num_classes", "license"):
        assert getattr(cfg, field) == getattr(source, field)
    assert is_model(f"{twin}_iebn.{cfg.tag}")


def test_cifar_networks_that_are_not_in_the_zoo_say_so():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for resnet32_cifar_iebn"):
        timm.create_model("resnet32_cifar_iebn", pretrained=True)
