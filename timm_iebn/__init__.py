"""Instance Enhancement Batch Normalization (arXiv 1908.04008) for timm. Importing it registers the models."""

from .versions import check_versions

check_versions()

from . import models
from .convert import (
    convert_bn_to_iebn,
    convert_iebn_to_bn,
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
    load_authors_checkpoint,
    unfreeze_batch_norm_2d,
)
from .layers import IEBN2d, IEBNAct2d
from .ops import backend, get_backend, iebn, set_backend
from .zoo import list_zoo

__version__ = "0.1.0.dev0"

__all__ = [
    "IEBN2d",
    "IEBNAct2d",
    "backend",
    "convert_bn_to_iebn",
    "convert_iebn_to_bn",
    "convert_sync_batchnorm",
    "freeze_batch_norm_2d",
    "get_backend",
    "iebn",
    "list_zoo",
    "load_authors_checkpoint",
    "models",
    "set_backend",
    "unfreeze_batch_norm_2d",
]
