"""timm's residual blocks, with additions and activations inside their IEBN layers where these can.

The parameters, their names and the results are those of timm's blocks, whose own `forward` runs everywhere else.
"""

from timm.layers import DropPath
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from ..layers import IEBN2d, as_plain
from ..ops import fuses
from ..ops.activations import activation_name, is_hooked


def _is_off(module: nn.Module | None) -> bool:
    """Whether `module` does nothing, and no one looks."""
    if type(module) is DropPath:
        return not module.training and not is_hooked(module)
    return module is None or activation_name(module) == ""


def _can_fuse(block: BasicBlock | Bottleneck, x: Tensor, depth: int) -> bool:
    """Whether nothing but an activation stands behind each norm of `block`, and no one looks between the two."""
    if type(x) is not Tensor or not fuses(x):
        return False
    norms = [getattr(block, f"bn{i}") for i in range(1, depth + 1)]
    acts = [getattr(block, f"act{i}") for i in range(1, depth + 1)]
    return (
        all(type(norm) is IEBN2d and not is_hooked(norm) for norm in norms)
        and all(activation_name(act) is not None for act in acts)
        and all(_is_off(module) for module in (block.drop_block, block.aa, block.se, block.drop_path))
    )


class FusedBasicBlock(BasicBlock):
    """timm's `BasicBlock` for IEBN."""

    def forward(self, x: Tensor) -> Tensor:
        """As timm's."""
        if not _can_fuse(self, x, 2):
            return BasicBlock.forward(self, x)
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1.normalize(self.conv1(x), act=activation_name(self.act1))
        x = self.conv2(x)
        return self.bn2.normalize(x, shortcut.to(x.dtype), activation_name(self.act2))  # timm adds in place

    def __prepare_scriptable__(self) -> BasicBlock:
        return as_plain(self, BasicBlock)


class FusedBottleneck(Bottleneck):
    """timm's `Bottleneck` for IEBN."""

    def forward(self, x: Tensor) -> Tensor:
        """As timm's."""
        if not _can_fuse(self, x, 3):
            return Bottleneck.forward(self, x)
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1.normalize(self.conv1(x), act=activation_name(self.act1))
        x = self.bn2.normalize(self.conv2(x), act=activation_name(self.act2))
        x = self.conv3(x)
        return self.bn3.normalize(x, shortcut.to(x.dtype), activation_name(self.act3))  # timm adds in place

    def __prepare_scriptable__(self) -> Bottleneck:
        return as_plain(self, Bottleneck)


_FUSED = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}


def fuse_blocks(model: nn.Module) -> nn.Module:
    """Gives `model`'s residual blocks their fused forward pass, in place; returns it."""
    for module in model.modules():
        module.__class__ = _FUSED.get(type(module), type(module))
    return model
