"""The IEBN layers, and how timm gets to know them by the name `iebn`."""

import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, create_norm, create_norm_act, register_notrace_module
from timm.layers.norm_act import _create_act
from timm.layers.typing import LayerType
from torch import Tensor, nn

from .ops import batch_share, check_input, fuses, iebn, iebn_reference
from .ops.activations import activation_name
from .ops.reference import wide_dtype

torch.fx.wrap("iebn")  # a symbolic trace of a bare layer keeps the call whole: it branches on sizes

GATE_BIAS_INIT = -1.0  # the authors' start
NEUTRAL_GATE = 1 / (1 + math.exp(-GATE_BIAS_INIT))  # of every image then, 0.2689


def _is_symbolic(layer: nn.Module, x: Tensor | torch.fx.Proxy) -> bool:
    """Whether torch.fx is tracing a network that `layer` is part of."""
    return isinstance(x, torch.fx.Proxy) and layer is not x.tracer.root


def _as_node(layer: nn.Module, x: torch.fx.Proxy) -> torch.fx.Proxy:
    """`layer` as one node of the graph, as torch's own layers are, so that it follows train() and eval()."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), {})


@register_notrace_module
class IEBN2d(nn.BatchNorm2d):
    r"""Instance Enhancement Batch Normalization over (N, C, H, W), from arXiv 1908.04008.

    .. math::
        y = \text{weight}_c \, \sigma(\text{gate\_weight}_c \, m_{nc} + \text{gate\_bias}_c)
            \, \frac{x - \mu_c}{\sqrt{v_c + \epsilon}} + \text{bias}_c

    where :math:`m_{nc}` is the mean of one channel of one input image. The arguments are those of
    :class:`torch.nn.BatchNorm2d`; ``affine=False`` leaves out ``weight`` and ``bias`` and keeps the gate.

    Parameters, each (C,): ``weight`` = 1, ``bias`` = 0, ``gate_weight`` = 0, ``gate_bias`` = -1.
    Buffers are batch norm's. The output has the input's dtype; statistics and gates are computed in float32 or wider.

    It is a ``BatchNorm2d``, so that tools which look for one to reset, skip or average its statistics find it. But
    ``eps`` can't be read: what would rebuild a layer as plain batch norm or fold it into a convolution reads it, and
    would lose the gate without a word (of known tools transformers' DETR alone does not: docs/downstream.md).
    ``timm_iebn.convert_sync_batchnorm``, ``freeze_batch_norm_2d`` and ``convert_iebn_to_bn`` keep it.

    Raises:
        ValueError: ``num_features`` < 1; input not 4D; training with a single value per channel.
        RuntimeError: input with another number of channels.
        NotImplementedError: input that is not floating point.
    """

    __constants__ = ["num_features", "momentum", "affine", "track_running_stats", "_eps"]
    __jit_unused_properties__ = ["eps"]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.gate_weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.gate_bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.frozen = False
        self.sync = False
        self.process_group: dist.ProcessGroup | None = None
        self.reset_gate()

    @property
    def eps(self) -> float:
        raise AttributeError  # so that Python goes on to __getattr__, and hasattr() is False

    def __getattr__(self, name: str) -> Any:
        if name == "eps":
            raise AttributeError(
                f"{type(self).__name__}.eps is not readable, because code that reads it is about to treat the layer as "
                "plain batch norm and to drop its gate. To synchronise or freeze, use timm_iebn.convert_sync_batchnorm "
                "or timm_iebn.freeze_batch_norm_2d; to fuse, timm_iebn.convert_iebn_to_bn first, which checks that the "
                "gates are neutral. The value itself is `_eps`."
            )
        return super().__getattr__(name)

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = value

    def reset_gate(self) -> None:
        """Sets the gate to the authors' start, sigmoid(-1) for every image."""
        nn.init.zeros_(self.gate_weight)
        nn.init.constant_(self.gate_bias, GATE_BIAS_INIT)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "gate_weight" in self._parameters:  # batch norm's constructor calls this before there are gates
            self.reset_gate()

    def extra_repr(self) -> str:
        state = "".join(f", {flag}=True" for flag in ("frozen", "sync") if getattr(self, flag))
        return (
            f"{self.num_features}, eps={self._eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}{state}"
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        gates = [prefix + "gate_weight", prefix + "gate_bias"]
        missing = [key for key in gates if key not in state_dict]
        if missing and any(key.startswith(prefix) for key in state_dict):
            # not left to `strict`: a network that runs with untrained gates looks loaded
            remedy = (
                "the checkpoint has norms without their gates. To start IEBN from batch-norm weights, load them into "
                "the batch-norm network and call timm_iebn.convert_bn_to_iebn."
            )
            if remedy not in error_msgs:  # of other layers
                error_msgs.append(remedy)
            error_msgs.append(f"{' and '.join(missing)}: not in the checkpoint")
        elif missing:  # one text for all layers, so that Python shows it once; `strict` is always true here
            warnings.warn(
                "the state dict lacks IEBN layers of this network, whose gates stay as they are", stacklevel=2
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def gate(self, x: Tensor) -> Tensor:
        """The gates of `x`, (N, C, H, W): (N, C), float32 or wider."""
        dtype = wide_dtype(x)
        mean = x.mean((2, 3), dtype=dtype)
        return torch.sigmoid(self.gate_weight.to(dtype) * mean + self.gate_bias.to(dtype))

    def normalize(self, x: Tensor, residual: Tensor | None = None, act: str = "") -> Tensor:
        """The layer on `x`, then `residual` added and the activation `act` applied (see `iebn`), without hooks."""
        training = self.training and not self.frozen
        if torch.jit.is_scripting():
            if training and self.sync:
                raise RuntimeError("scripted IEBN can't be synchronised: train it unscripted, in eval it scripts")
            check_input(x, self.num_features, training or self.running_mean is None)
            y = iebn_reference(
                x,
                self.weight,
                self.bias,
                self.gate_weight,
                self.gate_bias,
                self.running_mean,
                self.running_var,
                training,
                batch_share(self.num_batches_tracked, self.momentum, training),
                self._eps,
            )
            if training and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            return y
        if self.frozen and self.training and self.gate_weight.requires_grad:
            raise RuntimeError(
                f"this {type(self).__name__} is frozen, but its gate is set to train: timm_iebn.unfreeze_batch_norm_2d "
                "unfreezes it (timm's unfreezing knows no IEBN)"
            )
        return iebn(
            x,
            self.weight,
            self.bias,
            self.gate_weight,
            self.gate_bias,
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            training,
            self.momentum,
            self._eps,
            self._group(),
            residual,
            act,
        )

    @torch.jit.unused
    def _group(self) -> dist.ProcessGroup | None:
        if not self.sync or not self.training or self.frozen or not dist.is_initialized():
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W), in the dtype and layout of `x`."""
        if not torch.jit.is_scripting():
            if _is_symbolic(self, x):
                return _as_node(self, x)
        return self.normalize(x)


@register_notrace_module
class IEBNAct2d(IEBN2d):
    """IEBN followed by dropout and activation: the counterpart of timm's ``BatchNormAct2d``, with its arguments.

    Networks that timm builds from norm+act layers (MobileNet, EfficientNet, DenseNet, RegNet) need this form.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: LayerType = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: type[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.drop = drop_layer() if drop_layer is not None else nn.Identity()
        self.act = _create_act(act_layer, act_kwargs=act_kwargs, inplace=inplace, apply_act=apply_act)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W), in the dtype and layout of `x`."""
        if not torch.jit.is_scripting():
            if _is_symbolic(self, x):
                return _as_node(self, x)
            act = activation_name(self.act)
            if act and activation_name(self.drop) == "" and isinstance(x, Tensor) and fuses(x):
                return self.normalize(x, act=act)
        return self.act(self.drop(self.normalize(x)))


def sync_batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm over all ranks of `norm.process_group`: torch's on CUDA, elsewhere IEBN's kernel with open gates."""
    if not norm.training or not dist.is_initialized() or dist.get_world_size(norm.process_group) == 1:
        return nn.BatchNorm2d.forward(norm, x)
    if x.is_cuda:
        return nn.SyncBatchNorm.forward(norm, x)
    open_gate = x.new_full((norm.num_features,), float("inf"), dtype=torch.float32)
    return iebn(
        x,
        norm.weight,
        norm.bias,
        torch.zeros_like(open_gate),
        open_gate,
        norm.running_mean,
        norm.running_var,
        norm.num_batches_tracked,
        True,
        norm.momentum,
        norm.eps,
        norm.process_group or dist.group.WORLD,
    )


def as_plain(module: nn.Module, plain_class: type[nn.Module]) -> nn.Module:
    """`module` with its modules and parameters as one of `plain_class`, which TorchScript can compile."""
    plain = plain_class.__new__(plain_class)
    plain.__dict__ = dict(module.__dict__)
    return plain


def _as_unsynchronised(norm: nn.BatchNorm2d, plain_class: type[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    if norm.training:
        raise RuntimeError("scripted batch norm can't be synchronised: train it unscripted, in eval it scripts")
    return as_plain(norm, plain_class)


@register_notrace_module
class SyncBatchNorm2d(nn.BatchNorm2d):
    """Synchronised batch norm that works on CPU too.

    No `nn.SyncBatchNorm`, because DistributedDataParallel refuses those on CPU.
    """

    process_group: dist.ProcessGroup | None = None
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W), in the dtype and layout of `x`."""
        return _as_node(self, x) if _is_symbolic(self, x) else sync_batch_norm(self, x)

    def __prepare_scriptable__(self) -> nn.BatchNorm2d:
        return _as_unsynchronised(self, nn.BatchNorm2d)


@register_notrace_module
class SyncBatchNormAct2d(BatchNormAct2d):
    """`SyncBatchNorm2d` with dropout and activation."""

    process_group: dist.ProcessGroup | None = None
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W), in the dtype and layout of `x`."""
        return _as_node(self, x) if _is_symbolic(self, x) else self.act(self.drop(sync_batch_norm(self, x)))

    def __prepare_scriptable__(self) -> BatchNormAct2d:
        return _as_unsynchronised(self, BatchNormAct2d)


def _register_with_timm() -> None:
    """Makes `iebn` a name that timm's builders take for `norm_layer`; timm has no public way to add one."""
    for name in ("iebn", "iebn2d"):
        create_norm._NORM_MAP[name] = IEBN2d
        create_norm_act._NORM_ACT_MAP[name] = IEBNAct2d
        create_norm_act._NORM_TO_NORM_ACT_MAP[name] = IEBNAct2d
    create_norm._NORM_TYPES.add(IEBN2d)
    create_norm_act._NORM_ACT_TYPES.add(IEBNAct2d)
    create_norm_act._NORM_ACT_REQUIRES_ARG.add(IEBNAct2d)


_register_with_timm()
