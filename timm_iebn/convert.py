"""Batch norm to IEBN and back, synchronised, frozen, and from the authors' checkpoints."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

import timm.layers
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops.misc import FrozenBatchNorm2d

from .layers import GATE_BIAS_INIT, NEUTRAL_GATE, IEBN2d, IEBNAct2d, SyncBatchNorm2d, SyncBatchNormAct2d

# of timm's ResNet, TResNet, RegNet, byobnet, DLA and DPN blocks, and of torchvision's RegNet
SHORTCUTS = (
    *("*.downsample.[1-9]", "*.downsample.[0-9].bn", "*.b[0-9]*.downsample.bn"),
    *("*.shortcut", "*.shortcut.*", "*.project.1", "*.c1x1_w*", "*.proj.1"),
)

# the batch norms that are known to compute batch norm and nothing else
_PLAIN = {nn.BatchNorm2d, BatchNormAct2d, nn.SyncBatchNorm, SyncBatchNormAct, SyncBatchNorm2d, SyncBatchNormAct2d}

# what the state dict of a norm has more than batch norm's
GATES = ("gate_weight", "gate_bias")
_AUTHORS_NAMES = {"weight_readjust": "gate_weight", "bias_readjust": "gate_bias"}


def _replace(module: nn.Module, swap: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """`module` with every submodule for which `swap(name, submodule)` is not None replaced by that, in place.

    A module that stands in several places is asked for once, by its first name, and replaced in all of them.
    """
    done: dict[nn.Module, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> nn.Module:
        if module not in done:
            found = swap(name, module)
            done[module] = module if found is None else found
            if found is None:
                for key, child in module._modules.items():
                    if child is not None:
                        module._modules[key] = visit(f"{name}.{key}" if name else key, child)
        return done[module]

    return visit("", module)


def _rename(model: nn.Module, rename: Callable[[str], str]) -> None:
    """Has the cfg of a network of timm's name the architecture that it is of now."""
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict) and cfg.get("architecture"):
        model.pretrained_cfg = model.default_cfg = cfg | dict(architecture=rename(cfg["architecture"]))


def _set_tensors(target: nn.Module, source: nn.Module) -> None:
    """Moves the parameters and buffers that both norms have, their mode and hooks, from `source` to `target`."""
    for kind in ("_parameters", "_buffers"):
        for key, tensor in getattr(source, kind).items():
            if key in getattr(target, kind):
                getattr(target, kind)[key] = tensor
    target.__dict__.update({k: v for k, v in vars(source).items() if "_hook" in k})
    target.train(source.training)
    if hasattr(source, "act"):
        target.drop, target.act = source.drop, source.act


def convert_bn_to_iebn(
    module: nn.Module, warm_start: bool = True, leave: Iterable[str] | Callable[[str, nn.Module], bool] = SHORTCUTS
) -> nn.Module:
    """`module` with IEBN in place of its 2-d batch norms, in place; a batch norm itself is returned converted.

    Args:
        module: any network. Layers that are IEBN already stay as they are.
        warm_start: divide each weight by the gate's start, sigmoid(-1), so that the network computes the same function
            as before, in training and in eval. Otherwise weights are kept, and outputs shrink: the authors' start
            for training from scratch.
        leave: which batch norms stay: patterns for their qualified names (as in `fnmatch`), or a function of name and
            layer. By default those of the shortcuts, as in the authors' networks, where they have the names of
            `SHORTCUTS`; say it for blocks that call them otherwise.

    A network of timm's is called NAME_iebn in its `pretrained_cfg` from then on, so that what `timm.models.save_for_hf`
    makes of it isn't loaded as NAME, without gates. Where NAME_iebn is registered and has the same norms, it is loaded
    as that; otherwise it is refused: build and convert the network again, and load the state dict into that.

    Raises:
        ValueError: a pattern of one's own matches nothing.
        TypeError: a batch norm of a kind that has no IEBN form (frozen, 3-d or a class of its own, for example) is
            not left out, or has no weight to start from. In either case nothing has been changed.
    """
    if callable(leave):
        left_out = leave
    else:
        patterns = (leave,) if isinstance(leave, str) else tuple(leave)
        names = [name for name, _ in module.named_modules()]
        for pattern in patterns:
            if pattern not in SHORTCUTS and not any(fnmatch(name, pattern) for name in names):
                raise ValueError(f"leave: no layer has a name like {pattern!r}")

        def left_out(name: str, _: nn.Module) -> bool:
            return any(fnmatch(name, pattern) for pattern in patterns)

    def is_wanted(name: str, norm: nn.Module) -> bool:
        is_norm = isinstance(norm, _BatchNorm | FrozenBatchNorm2d | FrozenBatchNormAct2d)
        if not is_norm or isinstance(norm, IEBN2d | nn.BatchNorm1d) or left_out(name, norm):
            return False
        if type(norm) not in _PLAIN:
            raise TypeError(f"{name or 'module'} is a {type(norm).__name__}, which has no IEBN form: pass leave=")
        if warm_start and norm.weight is None:
            raise TypeError(f"{name or 'module'} has no weight to warm start from: pass warm_start=False or leave=")
        return True

    wanted = {norm for name, norm in module.named_modules() if is_wanted(name, norm)}
    scaled: set[Tensor] = set()  # two norms may share a weight

    def swap(_: str, norm: nn.Module) -> nn.Module | None:
        if norm not in wanted:
            return None
        kind = IEBNAct2d if hasattr(norm, "act") else IEBN2d
        tensors = chain((norm.weight, norm.running_mean), module.parameters())
        like = next((t for t in tensors if t is not None), torch.empty(0))
        iebn = kind(
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            device=like.device,
            dtype=like.dtype,
        )
        _set_tensors(iebn, norm)
        if isinstance(norm, nn.SyncBatchNorm | SyncBatchNorm2d | SyncBatchNormAct2d):
            iebn.sync, iebn.process_group = True, norm.process_group
        if warm_start and iebn.weight not in scaled:
            scaled.add(iebn.weight)
            with torch.no_grad():
                iebn.weight.div_(NEUTRAL_GATE)
        return iebn

    converted = _replace(module, swap)
    if wanted:
        _rename(converted, lambda name: f"{name.removesuffix('_iebn')}_iebn")
    return converted


def convert_iebn_to_bn(module: nn.Module) -> nn.Module:
    """`module` with batch norm in place of IEBN, in place, computing the same function.

    Raises:
        ValueError: some gate depends on its input (`gate_weight` is not 0), so no batch norm equals it; or norms share
            a weight and not their gates. Nothing has been changed then.
    """
    learned = [
        name or "module"
        for name, m in module.named_modules()
        if isinstance(m, IEBN2d) and bool((m.gate_weight != 0).any())
    ]
    if learned:
        shown = ", ".join(learned[:3]) + (f" and {len(learned) - 3} more" if len(learned) > 3 else "")
        raise ValueError(
            f"the gates of {shown} depend on their input (gate_weight is not 0), so the network has no equal with "
            "batch norm. Only neutral gates, such as those of a warm start, can be converted."
        )

    gates: dict[Tensor, Tensor] = {}
    for name, norm in module.named_modules():
        if isinstance(norm, IEBN2d) and norm.weight is not None:
            if not torch.equal(gates.setdefault(norm.weight, norm.gate_bias), norm.gate_bias):
                raise ValueError(f"{name} shares its weight with a norm of another gate_bias: give it one of its own")
    scaled: set[Tensor] = set()

    def swap(_: str, norm: nn.Module) -> nn.Module | None:
        if not isinstance(norm, IEBN2d):
            return None
        kind = BatchNormAct2d if isinstance(norm, IEBNAct2d) else nn.BatchNorm2d
        like = norm.gate_weight
        bn = kind(
            norm.num_features,
            norm._eps,
            norm.momentum,
            track_running_stats=norm.track_running_stats,
            device=like.device,
            dtype=like.dtype,
        )
        own_weight = bn.weight
        _set_tensors(bn, norm)
        with torch.no_grad():
            if norm.weight is None:
                bn.weight = own_weight
            if bn.weight not in scaled:
                scaled.add(bn.weight)
                bn.weight.mul_(torch.sigmoid(norm.gate_bias))
        if norm.frozen:
            return timm.layers.freeze_batch_norm_2d(bn)
        return convert_sync_batchnorm(bn, norm.process_group) if norm.sync else bn

    converted = _replace(module, swap)
    _rename(converted, lambda name: name.removesuffix("_iebn"))
    return converted


def convert_sync_batchnorm(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """`module` with IEBN and batch norm taking their batch statistics over all ranks of `process_group`, in place.

    The counterpart of `torch.nn.SyncBatchNorm.convert_sync_batchnorm` and timm's, which know no gates; unlike theirs,
    the 2-d layers work on CPU as well. In a single process they are plain IEBN and batch norm. 1-d and 3-d batch norms
    become torch's `SyncBatchNorm`.

    Raises:
        TypeError: a 2-d batch norm of a class of its own, which would be lost. Nothing has been changed then.
    """
    for name, norm in module.named_modules():
        if isinstance(norm, nn.BatchNorm2d) and type(norm) not in _PLAIN and not isinstance(norm, IEBN2d):
            raise TypeError(f"{name or 'module'} is a {type(norm).__name__}, which has no synchronised form")

    def swap(_: str, norm: nn.Module) -> nn.Module | None:
        if isinstance(norm, IEBN2d):
            norm.sync, norm.process_group = True, process_group
            return norm
        if not isinstance(norm, nn.BatchNorm2d):
            if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm3d):
                return None
            synced = nn.SyncBatchNorm.convert_sync_batchnorm(norm, process_group)
            synced.is_2d = False  # which its class does not say, and freezing asks
            return synced
        kind = SyncBatchNormAct2d if isinstance(norm, BatchNormAct2d) else SyncBatchNorm2d
        synced = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        _set_tensors(synced, norm)
        synced.process_group = process_group
        return synced

    return _replace(module, swap)


def _set_requires_grad(norm: IEBN2d, value: bool) -> IEBN2d:
    for parameter in norm.parameters(recurse=False):  # not those of an activation
        parameter.requires_grad_(value)
    return norm


def freeze_batch_norm_2d(module: nn.Module) -> nn.Module:
    """`module` with its IEBN and batch norms frozen, in place, as `timm.layers.freeze_batch_norm_2d` does.

    Frozen IEBN keeps its gate and its state dict keys, uses its running statistics in training too, and trains no
    parameter. Batch norms become timm's frozen ones, which count no batches. Synchronised norms are no longer so.
    """

    def swap(_: str, norm: nn.Module) -> nn.Module | None:
        if isinstance(norm, IEBN2d):
            norm.frozen, norm.sync, norm.process_group = True, False, None
            return _set_requires_grad(norm, False)
        if not isinstance(norm, _BatchNorm) or not getattr(norm, "is_2d", True):
            return None
        return timm.layers.freeze_batch_norm_2d(norm).train(norm.training)

    return _replace(module, swap)


def unfreeze_batch_norm_2d(module: nn.Module) -> nn.Module:
    """Undoes `freeze_batch_norm_2d`, in place."""

    def swap(_: str, norm: nn.Module) -> nn.Module | None:
        if isinstance(norm, IEBN2d):
            norm.frozen = False
            return _set_requires_grad(norm, True)
        is_frozen = isinstance(norm, FrozenBatchNorm2d | FrozenBatchNormAct2d)
        return timm.layers.unfreeze_batch_norm_2d(norm).train(norm.training) if is_frozen else None

    return _replace(module, swap)


def warm_start_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A batch-norm network's `state_dict` with the gates that `model` has added, computing the same function.

    Raises:
        RuntimeError: some of the gates are there already, or a norm that the model has is not.
    """
    norms = [name for name, m in model.named_modules() if isinstance(m, IEBN2d)]
    gated = [name for name in norms if any(f"{name}.{gate}" in state_dict for gate in GATES)]
    absent = [name for name in norms if f"{name}.weight" not in state_dict]
    if gated or absent:
        which, what = (gated, "already have a gate") if gated else (absent, "are not in the checkpoint")
        raise RuntimeError(
            f"can't warm start {type(model).__name__} from this checkpoint: {len(which)} of its {len(norms)} gated "
            f"norms {what}, the first is {which[0]!r}. A warm start needs the batch-norm network of the same name."
        )
    out = dict(state_dict)
    for name in norms:
        weight = out[f"{name}.weight"]
        out[f"{name}.weight"] = weight / NEUTRAL_GATE
        out[f"{name}.gate_weight"] = torch.zeros_like(weight)
        out[f"{name}.gate_bias"] = torch.full_like(weight, GATE_BIAS_INIT)
    return out


def load_authors_checkpoint(model: nn.Module, path: str | Path) -> nn.Module:
    """Loads a `.pth.tar` file of the IEBN authors' CIFAR code into `model`, which is returned.

    Args:
        model: the network of the same depth, such as `timm.create_model('resnet164_cifar_iebn', num_classes=...)`.
        path: the checkpoint: a dict with `state_dict`, keys with or without `module.`, norm parameters (1, C, 1, 1)
            called weight, bias, weight_readjust and bias_readjust. Read with `weights_only=True`.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: not a checkpoint of the authors' code, or one of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise RuntimeError(f"{path} is not a checkpoint that can be read safely (weights only): {e}") from e
    state_dict = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    is_state_dict = isinstance(state_dict, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state_dict.items()
    )
    if not is_state_dict or not any(key.endswith("weight_readjust") for key in state_dict):
        raise RuntimeError(f"{path} is not a checkpoint of the IEBN authors: it has no 'state_dict' with gates")
    converted = {}
    for key, tensor in state_dict.items():
        prefix, _, leaf = key.removeprefix("module.").rpartition(".")
        is_norm_vector = tensor.dim() == 4 and tensor.shape[0] == 1 and tensor.shape[2:] == (1, 1)
        has_gate = f"{key.rpartition('.')[0]}.weight_readjust" in state_dict
        converted[f"{prefix}.{_AUTHORS_NAMES.get(leaf, leaf)}"] = (
            tensor.flatten() if has_gate and is_norm_vector else tensor
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is an error here
            model.load_state_dict(converted)
    except RuntimeError as e:
        raise RuntimeError(f"{path} does not fit {type(model).__name__}: {e}") from e
    return model
