"""The registered networks. Importing this package registers them with timm."""

from . import _timm_mobilenetv3, iebn_cifar, iebn_imagenet

__all__ = ["_timm_mobilenetv3", "iebn_cifar", "iebn_imagenet"]
