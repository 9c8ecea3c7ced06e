"""The activations that can be fused behind the layer."""

from collections.abc import Callable

from timm.layers import activations as timm_activations
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as every_module

# `_cpu_vectors.h` has them in the same order
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hard_swish": F.hardswish,
    "silu": F.silu,
}
FROM_RESULT = ("relu", "relu6")  # whose gradient can be found from the result; in `_cpu_vectors.h` too
_MODULES = {
    nn.Identity: "",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hard_swish",
    timm_activations.HardSwish: "hard_swish",
    nn.SiLU: "silu",
    timm_activations.Swish: "silu",
}
# as torch's own _has_any_global_hook, which not all versions have
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def followed(y: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """What stands behind the layer, unfused: `residual` added to `y`, and `act` applied."""
    return ACTIVATIONS[act](y if residual is None else y + residual)


def kept(residual: Tensor | None, y: Tensor, act: str) -> tuple[Tensor | None, Tensor | None]:
    """What the gradient of `followed` needs besides the input of the layer: the residual, or the result `y`."""
    if residual is None or not act:
        return None, None
    return (None, y) if act in FROM_RESULT else (residual, None)


def is_hooked(module: nn.Module) -> bool:
    """Whether someone looks at what goes in or out of `module`, or has replaced its `forward`: it must be called."""
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(own) or any(getattr(every_module, name) for name in _GLOBAL_HOOKS) or "forward" in module.__dict__


def activation_name(module: nn.Module) -> str | None:
    """The name in `ACTIVATIONS` of what `module` computes; None where it is another one, or is hooked."""
    return None if is_hooked(module) else _MODULES.get(type(module))
