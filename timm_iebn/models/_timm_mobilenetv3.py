"""Lets timm's MobileNetV3 and V4 entrypoints take `norm_layer='iebn'`, as its other families do.

timm (1.0.31) sets `norm_layer` itself there and fails on a second one. Anything but IEBN is still passed on to it.
"""

from functools import wraps
from typing import Any

from timm.models import _registry as timm_registry
from timm.models import list_models, model_entrypoint
from torch import nn

from ..convert import convert_bn_to_iebn
from ..layers import IEBN2d, IEBNAct2d
from ._registry import MOBILENET_FEATURES, build_converted


def _accept_iebn(name: str) -> None:
    build = model_entrypoint(name)

    def build_gated(**kwargs: Any) -> nn.Module:
        return convert_bn_to_iebn(build(**kwargs), warm_start=False, leave=())

    @wraps(build)
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if kwargs.get("norm_layer") not in ("iebn", "iebn2d", IEBN2d, IEBNAct2d):
            return build(pretrained=pretrained, **kwargs)
        del kwargs["norm_layer"]
        return build_converted(build_gated, name, pretrained, MOBILENET_FEATURES, **kwargs)

    timm_registry._model_entrypoints[name] = entrypoint


for _name in list_models(module="mobilenetv3"):
    _accept_iebn(_name)
