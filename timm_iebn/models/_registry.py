"""From the name of a batch-norm network that timm knows to a registered IEBN network.

The twin is built by timm's own entrypoint and its batch norms are converted, shortcuts left alone: one mechanism for
every family, whatever each does with `norm_layer`.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    get_arch_pretrained_cfgs,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from ..convert import GATES, convert_bn_to_iebn, warm_start_state_dict
from ..layers import IEBN2d
from ..messages import describe
from ..zoo import WEIGHTS, HTTPError, check_download, check_weights
from ._fused import fuse_blocks

WARM_START = "warmstart_"  # how tags of batch-norm weights begin

_DAMAGED = (SafetensorError, UnpicklingError, EOFError, KeyError)  # the last two as torch.load has them
_LOADING_ERRORS = (OSError, EntryNotFoundError, HTTPError, RuntimeError, *_DAMAGED)
# stages are the children of `blocks`, which the feature extractor has to open; the stem is no feature
MOBILENET_FEATURES = dict(flatten_sequential=True)
_MOST_CHANNELS = 4096  # a network for more would take all memory before its weights are looked at


def define_model(module: str, name: str, doc: str, build: Callable[..., nn.Module]) -> None:
    """Registers `build(variant, pretrained, **kwargs)` as timm's model `name`, a function of `module`."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = module
    entrypoint.__doc__ = doc
    setattr(sys.modules[module], name, register_model(entrypoint))


def build_with_cfg(model_cls: Callable[..., nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """As timm's `build_model_with_cfg`; where weights can't be loaded, the error says which, from where, and why."""
    if not pretrained:
        return build_model_with_cfg(model_cls, variant, False, **kwargs)
    given, is_built = kwargs.get("pretrained_cfg"), False
    # timm gives what it read of a config.json as a dict
    folder = given.get("file") or given.get("hf_hub_id") if isinstance(given, dict) and _is_own(given) else None

    def build(*args: Any, **model_args: Any) -> nn.Module:
        nonlocal is_built
        model = model_cls(*args, **model_args)
        is_built = True  # what fails from here on is loading
        return model

    try:
        cfg = resolve_pretrained_cfg(variant, given, kwargs.get("pretrained_cfg_overlay"))
        if folder:
            _check_config(cfg, kwargs.get("pretrained_model_args") or {})
        model = build_model_with_cfg(build, variant, True, **kwargs)
    except Exception as e:
        if isinstance(e, SafetensorError) or (is_built and isinstance(e, _LOADING_ERRORS)):
            raise _explain(variant, cfg, kwargs.get("cache_dir"), e) from e
        if folder and not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and str(folder) not in str(e):
            raise RuntimeError(
                f"{folder} can't be loaded: its config.json and the arguments given say what can't be done with "
                f"{variant} or its weights ({describe(e)})"
            ) from e
        raise
    # timm takes a repository's weights from it, whatever else its config.json names
    is_online = cfg.source == "hf-hub" or (cfg.hf_hub_id and not cfg.file and not cfg.state_dict)
    if is_online:
        check_download(cfg.hf_hub_id, kwargs.get("cache_dir"), is_own=folder is not None)
    elif cfg.file:
        check_weights(_weights_of(cfg))
    return model


def build_converted(
    build: Callable[..., nn.Module], variant: str, pretrained: bool, feature_cfg: dict[str, Any], **kwargs: Any
) -> nn.Module:
    """The network that `build` makes of one of timm's by converting its norms, with weights that have gates too."""
    kwargs = dict(pretrained_filter_fn=_add_gates) | kwargs
    # for these, timm has classes of their own without a head, for its EfficientNets and MobileNets (with `feature_cfg`)
    if feature_cfg and kwargs.get("features_only") and kwargs.keys() & {"feature_location", "output_stride"}:
        features = partial(build, features_only=kwargs.pop("features_only"))
        return build_with_cfg(features, variant, pretrained, **kwargs, pretrained_strict=False)
    return build_with_cfg(build, variant, pretrained, **dict(feature_cfg=dict(feature_cfg)) | kwargs)


def define_iebn_twin(module: str, twin: str, feature_cfg: dict[str, Any]) -> None:
    """Registers `{twin}_iebn`. Its cfgs must be in the `default_cfgs` of `module` already.

    Besides the twin's arguments it takes `neutral_gates`, with which a training from scratch starts from the twin's
    function, as a warm start does.
    """
    build_twin = model_entrypoint(twin)

    def build_gated(neutral_gates: bool = False, **kwargs: Any) -> nn.Module:
        model = convert_bn_to_iebn(build_twin(pretrained=False, **kwargs), warm_start=neutral_gates)
        if not any(isinstance(m, IEBN2d) for m in model.modules()):
            raise ValueError(f"{twin}_iebn with {kwargs} has no batch norm that IEBN could replace")
        return fuse_blocks(model)

    def build(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
        return build_converted(build_gated, variant, pretrained, feature_cfg, **kwargs)

    define_model(
        module, f"{twin}_iebn", f"timm's `{twin}` with IEBN in place of batch norm, shortcuts excepted.", build
    )


def warm_start_cfgs(twin: str, default_tag: str) -> dict[str, PretrainedCfg]:
    """IEBN cfgs for every checkpoint that timm publishes of its batch-norm network `twin`, `default_tag` first.

    Each names timm's own Hub repository and keeps timm's preprocessing; its tag says that it is a warm start.
    """
    cfgs = {split_model_name_tag(name)[1]: cfg for name, cfg in get_arch_pretrained_cfgs(twin).items()}
    tags = [tag for tag in (default_tag, *cfgs) if cfgs[tag].hf_hub_id]
    return {
        f"{twin}_iebn.{WARM_START}{tag}": replace(cfgs[tag], architecture=None, tag=None, url="", custom_load=False)
        for tag in dict.fromkeys(tags)
    }


def _is_own(cfg: dict[str, Any]) -> bool:
    """Whether a cfg is from the config.json of a folder or repository, and not one of timm's or ours."""
    return cfg.get("source") in ("hf-hub", "local-dir")


def _weights_of(cfg: PretrainedCfg) -> Path:
    """The file of a cfg that names a file, or a folder."""
    return Path(cfg.file) / WEIGHTS if Path(cfg.file).is_dir() else Path(cfg.file)


def _check_config(cfg: PretrainedCfg, model_args: dict[str, Any]) -> None:
    """Raises ValueError unless the config.json of a folder or repository says one number of classes, and a folder's
    weights have it, and a number of channels that images can have.

    With two numbers of classes, timm would take the head for a new one and leave it random. That channels are those of
    the weights it checks itself.
    """
    found = {cfg.num_classes, model_args.get("num_classes", cfg.num_classes)}
    if cfg.source == "local-dir" and (weights := _weights_of(cfg)).exists():
        with safe_open(weights, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        heads = [shapes.get(f"{name}.weight") for name in _as_tuple(cfg.classifier)]
        found |= {shape[0] - (cfg.label_offset or 0) for shape in filter(None, heads)}
    channels = model_args.get("in_chans", cfg.input_size[0])
    if type(channels) is not int or not 0 < channels <= _MOST_CHANNELS:
        raise ValueError(f"in_chans: {channels!r} is no number of channels that images have")
    if len(found) > 1 or not all(type(n) is int and n >= 0 for n in found):
        raise ValueError(f"num_classes: config.json and weights do not agree on one number: {sorted(found, key=str)}")


def _as_tuple(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _check_fit(state_dict: dict[str, Tensor], model: nn.Module) -> None:
    """Raises unless `state_dict` is one of this network, but for its head and the channels of its first convolution.

    timm loads non-strictly for a new head or `features_only`, and then weights of a larger network, or a norm without
    its gate, would pass.
    """
    cfg, own = model.pretrained_cfg, model.state_dict()
    head = tuple(f"{name}." for name in _as_tuple(cfg.get("classifier")))
    stem = tuple(f"{name}.weight" for name in _as_tuple(cfg.get("first_conv")))

    def matters(key: str) -> bool:
        return not any(key.startswith(name) for name in head) and not key.endswith("num_batches_tracked")

    lacks = [key for key in own if matters(key) and key not in state_dict]
    has_head = not isinstance(model, EfficientNetFeatures | MobileNetV3Features)
    unknown = [key for key in state_dict if has_head and matters(key) and key not in own]
    reshaped = [
        key
        for key in own.keys() & state_dict.keys()
        if matters(key) and key not in stem and own[key].shape != state_dict[key].shape
    ]
    gates = [key for key in lacks if key.endswith(GATES)]
    if gates and not any(key.endswith(GATES) for key in state_dict):
        raise RuntimeError(
            f"it lacks all {len(gates)} gate parameters, first {gates[0]!r}. Are they batch norm's? Load them into the "
            "batch-norm network and call timm_iebn.convert_bn_to_iebn on it."
        )
    if lacks or unknown or reshaped:
        raise RuntimeError(
            f"it lacks {len(lacks)} of {len(own)} tensors, has {len(unknown)} unknown ones and {len(reshaped)} of "
            f"another shape, first {(gates + lacks + unknown + reshaped)[0]!r}. Are they of another architecture?"
        )


def _add_gates(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's `pretrained_filter_fn`: adds neutral gates to batch-norm weights, and checks that the result fits.

    Only weights of a warm-start tag are taken for batch norm's; a folder or repository of its own must have gates. It
    must raise no TypeError, which timm takes for a wrong signature.
    """
    cfg = model.pretrained_cfg
    is_own = _is_own(cfg) or not str(cfg.get("tag")).startswith(WARM_START)
    is_gated = any(key.endswith("gate_weight") for key in state_dict)
    try:
        if not is_own and not is_gated:
            state_dict = warm_start_state_dict(state_dict, model)
        _check_fit(state_dict, model)
    except RuntimeError as e:
        where = cfg.get("file") or cfg.get("hf_hub_id") or "the given state dict"
        raise RuntimeError(f"The weights in {where} do not fit {cfg.get('architecture')}: {e}") from e
    return state_dict


def _explain(variant: str, cfg: PretrainedCfg, cache_dir: str | Path | None, error: Exception) -> Exception:
    """One paragraph that says what was looked for, where, and what to do."""
    # the client's own message for a cold cache is a general one; what it was raised from says why
    reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    reason = describe(reason)
    where = str(cfg.file or cfg.hf_hub_id)
    if isinstance(error, _DAMAGED):
        return RuntimeError(
            f"The weights of {variant} in {where} can't be read ({reason}). The file is damaged or "
            "no safetensors file: fetch it again (for a Hub download, delete it from the cache first)."
        )
    if isinstance(error, RuntimeError):
        known = where in str(error) or not (cfg.file or cfg.hf_hub_id)
        return error if known else RuntimeError(f"The weights of {variant} in {where} can't be loaded: {error}")
    if cfg.file:
        return OSError(f"Can't read the weights of {variant} from {str(cfg.file)!r} ({reason}). Check the path.")
    offline = ", with HF_HUB_OFFLINE set" if constants.HF_HUB_OFFLINE else ""
    return OSError(
        f"Can't get the pretrained weights of {variant}. Looked for model.safetensors in the repository "
        f"{cfg.hf_hub_id!r} at {constants.ENDPOINT} and in the cache {cache_dir or constants.HF_HUB_CACHE}{offline} "
        f"({reason}). Check the connection (HF_ENDPOINT; HF_TOKEN for a private or gated repository), or download it "
        "where there is a network and pass cache_dir=, or load a file with pretrained_cfg_overlay=dict(file=...), or "
        "create the model with pretrained=False."
    )
