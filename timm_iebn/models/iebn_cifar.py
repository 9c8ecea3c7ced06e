"""The 32x32 networks of the CIFAR literature, from timm's own classes: with batch norm, with IEBN (`_iebn`), and with
batch norm and squeeze-and-excitation (`_se`), IEBN's usual alternative.

A class here only exchanges the stem of timm's, which is made for 224x224, for the 3x3 convolution of stride 1.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d, SEModule, create_conv2d
from timm.models import generate_default_cfgs
from timm.models._efficientnet_builder import decode_arch_def
from timm.models._features import feature_take_indices
from timm.models.densenet import DenseNet
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn

from ..zoo import zoo_cfgs
from ._registry import build_with_cfg, define_iebn_twin, define_model


def _stem(in_chans: int, out_chans: int, device: Any, dtype: Any) -> nn.Conv2d:
    conv = nn.Conv2d(in_chans, out_chans, 3, padding=1, bias=False, device=device, dtype=dtype)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _add_se(model: nn.Module, name: str) -> None:
    """Puts squeeze-and-excitation behind the convolution `name` of every block, where timm's blocks have no place."""
    for block in [m for m in model.modules() if isinstance(getattr(m, name, None), nn.Conv2d)]:
        conv = getattr(block, name)
        like = dict(device=conv.weight.device, dtype=conv.weight.dtype)
        setattr(block, name, nn.Sequential(conv, SEModule(conv.out_channels, **like)))


class _FourTaps:
    """Feature taps of a network of a stem and three stages, where timm's classes count on four."""

    def forward_intermediates(
        self, x: torch.Tensor, indices: int | list[int] | None = None, *args: Any, **kwargs: Any
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """As timm's."""
        return super().forward_intermediates(x, feature_take_indices(4, indices)[0], *args, **kwargs)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's."""
        take, last = feature_take_indices(4, indices)
        # with all stages kept, timm must not take a fourth for pruned
        super().prune_intermediate_layers([*take, 4] if last == 3 else take, prune_norm, prune_head)
        return take


class CifarResNet(_FourTaps, ResNet):
    """timm's ResNet with a 3x3 stem, no pooling and three stages (He et al. 2015, section 4.2)."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depth: int,
        channels: tuple[int, int, int] = (16, 32, 64),
        stem_chans: int = 16,
        se: bool = False,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        block_args = dict(block_args=dict(attn_layer="se")) if se else {}
        kwargs = dict(zero_init_last=False) | block_args | kwargs
        # timm's plain stem is 64 wide; its deep stem takes any width
        super().__init__(
            block,
            (depth,) * 3,
            channels=channels,
            stem_type="deep",
            stem_width=stem_chans // 2,
            in_chans=in_chans,
            device=device,
            dtype=dtype,
            **kwargs,
        )
        self.conv1 = _stem(in_chans, stem_chans, device, dtype)
        self.maxpool = nn.Identity()
        self.layer4 = nn.Sequential()  # timm's forward names four stages
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)


class CifarResNetV2(_FourTaps, ResNetV2):
    """timm's pre-activation ResNet with a 3x3 stem, no pooling and three stages (He et al. 2016; WRN, 1605.07146)."""

    def __init__(
        self,
        depth: int,
        channels: tuple[int, int, int],
        se: bool = False,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        kwargs = dict(conv_layer=create_conv2d, norm_layer=BatchNormAct2d, stem_chs=16) | kwargs
        super().__init__((depth,) * 3, channels, in_chans=in_chans, device=device, dtype=dtype, **kwargs)
        self.stem = nn.Sequential()
        self.stem.add_module("conv", _stem(in_chans, kwargs["stem_chs"], device, dtype))
        self.stem_feat_idx = 0
        if se:
            _add_se(self, "conv2" if kwargs.get("basic") else "conv3")
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)


class CifarDenseNet(DenseNet):
    """timm's DenseNet-BC with a 3x3 stem that feeds the first block directly (Huang et al., 1608.06993)."""

    def __init__(
        self, se: bool = False, in_chans: int = 3, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(in_chans=in_chans, device=device, dtype=dtype, **kwargs)
        self.features.conv0 = _stem(in_chans, self.features.conv0.out_channels, device, dtype)
        self.features.norm0 = nn.Identity()
        self.features.pool0 = nn.Identity()
        if se:
            _add_se(self, "conv2")
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)


class CifarMobileNetV2(EfficientNet):
    """timm's MobileNetV2 x1.0 with its first two strides taken out, so that 32x32 images end at 4x4."""

    def __init__(self, se: bool = False, **kwargs: Any) -> None:
        stages = (
            "ds_r1_k3_s1_c16",
            "ir_r2_k3_s2_e6_c24",
            "ir_r3_k3_s2_e6_c32",
            "ir_r4_k3_s2_e6_c64",
            "ir_r3_k3_s1_e6_c96",
            "ir_r3_k3_s2_e6_c160",
            "ir_r1_k3_s1_e6_c320",
        )
        suffix = "_se0.25" if se else ""
        definition = decode_arch_def([[stage + suffix] for stage in stages])
        super().__init__(definition, **dict(act_layer="relu6") | kwargs)
        self.conv_stem.stride = self.blocks[1][0].conv_dw.stride = (1, 1)
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)


_ROWS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "resnet20_cifar": (CifarResNet, dict(block=BasicBlock, depth=3)),
    "resnet32_cifar": (CifarResNet, dict(block=BasicBlock, depth=5)),
    "resnet44_cifar": (CifarResNet, dict(block=BasicBlock, depth=7)),
    "resnet56_cifar": (CifarResNet, dict(block=BasicBlock, depth=9)),
    "resnet110_cifar": (CifarResNet, dict(block=BasicBlock, depth=18)),
    "resnet164_cifar": (CifarResNet, dict(block=Bottleneck, depth=18)),
    "resnext29_8x64d_cifar": (
        CifarResNet,
        dict(block=Bottleneck, depth=3, channels=(64, 128, 256), stem_chans=64, cardinality=8, base_width=64),
    ),
    "preresnet164_cifar": (CifarResNetV2, dict(depth=18, channels=(64, 128, 256))),
    "wrn_28_10_cifar": (CifarResNetV2, dict(depth=4, channels=(160, 320, 640), basic=True, bottle_ratio=1.0)),
    "wrn_52_4_cifar": (CifarResNetV2, dict(depth=8, channels=(64, 128, 256), basic=True, bottle_ratio=1.0)),
    "densenet_bc_100_12_cifar": (CifarDenseNet, dict(growth_rate=12, block_config=(16, 16, 16))),
    "mobilenetv2_cifar": (CifarMobileNetV2, {}),
}

# class -> its first convolution, classifier and number of feature levels
_LAYOUT = {
    CifarResNet: ("conv1", "fc", 4),
    CifarResNetV2: ("stem.conv", "head.fc", 4),
    CifarDenseNet: ("features.conv0", "classifier", 4),
    CifarMobileNetV2: ("conv_stem", "classifier", 5),
}


def _cfg(first_conv: str, classifier: str, _: int) -> dict[str, Any]:
    return dict(
        num_classes=100,
        input_size=(3, 32, 32),
        pool_size=(4, 4) if first_conv == "conv_stem" else (8, 8),
        crop_pct=1.0,
        interpolation="bicubic",
        mean=(0.5071, 0.4865, 0.4409),  # of the CIFAR-100 training images
        std=(0.2673, 0.2564, 0.2761),
        first_conv=first_conv,
        classifier=classifier,
    )


def _cfgs(name: str, cfg: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return zoo_cfgs(name, cfg) or {name: cfg}


default_cfgs = generate_default_cfgs(
    {
        tagged: cfg
        for name, (cls, _) in _ROWS.items()
        for network in (name, f"{name}_iebn", f"{name}_se")
        for tagged, cfg in _cfgs(network, _cfg(*_LAYOUT[cls])).items()
    }
)


def _define(name: str) -> None:
    model_cls, args = _ROWS[name]
    feature_cfg = dict(
        out_indices=tuple(range(_LAYOUT[model_cls][2])),
        flatten_sequential=model_cls is not CifarResNet,  # the one class whose stages are its own children
    )

    def build(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
        return build_with_cfg(model_cls, variant, pretrained, **dict(args, feature_cfg=dict(feature_cfg)) | kwargs)

    what = f"`{model_cls.__name__}` for 32x32 images, with batch norm"
    define_model(__name__, name, f"{what}.", build)
    define_model(__name__, f"{name}_se", f"{what} and squeeze-and-excitation.", partial(build, se=True))
    define_iebn_twin(__name__, name, feature_cfg)


for _name in _ROWS:
    _define(_name)
