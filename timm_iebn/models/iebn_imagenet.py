"""ImageNet-sized IEBN networks: one row each, from timm's network of the same name without `_iebn`.

`pretrained=True` warm starts from timm's batch-norm weights: same accuracy, gates at their neutral start.
"""

from typing import Any

from timm.models import generate_default_cfgs

from ..zoo import zoo_cfgs
from ._registry import MOBILENET_FEATURES, define_iebn_twin, warm_start_cfgs

# timm's network -> the tag of the weights to start from: of those under a free licence, the best in timm's
# results/results-imagenet.csv at the input size of their own cfg.
_RESNETS = {
    "resnet18": "a1_in1k",
    "resnet26": "bt_in1k",
    "resnet34": "a1_in1k",
    "resnet50": "a1_in1k",
    "resnet101": "a1h_in1k",
    "resnet152": "a1h_in1k",
    "resnet50d": "ra4_e3600_r224_in1k",
    "wide_resnet50_2": "racm_in1k",
    "wide_resnet101_2": "tv2_in1k",
    "resnext50_32x4d": "a1h_in1k",
    "resnext101_32x4d": "gluon_in1k",
    "resnext101_32x8d": "tv2_in1k",
    "resnext101_64x4d": "tv_in1k",
}
_MOBILENETS = {
    "mobilenetv1_100": "ra4_e3600_r224_in1k",
    "mobilenetv2_050": "lamb_in1k",
    "mobilenetv2_100": "ra_in1k",
    "mobilenetv2_140": "ra_in1k",
    "mobilenetv3_small_100": "lamb_in1k",
    "mobilenetv3_large_100": "miil_in21k_ft_in1k",
    "mobilenetv4_conv_small": "e2400_r224_in1k",
    "mobilenetv4_conv_medium": "e500_r256_in1k",
    "mobilenetv4_conv_large": "e600_r384_in1k",
}


def _cfgs(twin: str, tag: str) -> dict[str, Any]:
    cfgs = warm_start_cfgs(twin, tag)
    return cfgs | zoo_cfgs(f"{twin}_iebn", next(iter(cfgs.values())).to_dict(remove_source=True))


default_cfgs = generate_default_cfgs(
    {name: cfg for twin, tag in (_RESNETS | _MOBILENETS).items() for name, cfg in _cfgs(twin, tag).items()}
)

for _twin in _RESNETS:
    define_iebn_twin(__name__, _twin, feature_cfg={})
for _twin in _MOBILENETS:
    define_iebn_twin(__name__, _twin, feature_cfg=MOBILENET_FEATURES)
