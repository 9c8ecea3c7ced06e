"""From the name of a batch-norm network that timm knows to a registered IEBN network.

The twin is built by timm's own entrypoint and its batch norms are converted, shortcuts left alone: one mechanism for
every family, whatever each does with `norm_layer`.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    get_arch_pretrained_cfgs,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import Tensor, nn

from ..convert import GATES, convert_bn_to_iebn, warm_start_state_dict
from ..layers import IEBN2d

WARM_START = "warmstart_"  # how tags of batch-norm weights begin

_HTTPError = HfHubHTTPError.__bases__[0]  # of whichever HTTP library huggingface_hub uses


def define_model(module: str, name: str, doc: str, build: Callable[..., nn.Module]) -> None:
    """Registers `build(variant, pretrained, **kwargs)` as timm's model `name`, a function of `module`."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = module
    entrypoint.__doc__ = doc
    setattr(sys.modules[module], name, register_model(entrypoint))


def define_iebn_twin(module: str, twin: str, feature_cfg: dict[str, Any]) -> None:
    """Registers `{twin}_iebn`. Its cfgs must be in the `default_cfgs` of `module` already."""
    build_twin = model_entrypoint(twin)

    def build_gated(**kwargs: Any) -> nn.Module:
        return convert_bn_to_iebn(build_twin(pretrained=False, **kwargs), warm_start=False)

    def build(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
        kwargs = dict(feature_cfg=dict(feature_cfg), pretrained_filter_fn=_add_gates) | kwargs
        try:
            return build_model_with_cfg(build_gated, variant, pretrained, **kwargs)
        except (OSError, EntryNotFoundError, _HTTPError, SafetensorError) as e:
            cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
            raise _explain(variant, cfg, kwargs.get("cache_dir"), e) from e

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


def _add_gates(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's `pretrained_filter_fn`: adds neutral gates to batch-norm weights and insists on gates in all others.

    The check is here as well as in the layer, because timm loads non-strictly for a new head or `features_only`, and
    then a norm that is missing altogether would pass. It must raise no TypeError, which timm takes for a wrong
    signature.
    """
    cfg = model.pretrained_cfg
    if str(cfg.get("tag")).startswith(WARM_START) and cfg.get("source") not in ("hf-hub", "local-dir"):
        is_gated = any(key.endswith("gate_weight") for key in state_dict)
        return dict(state_dict) if is_gated else warm_start_state_dict(state_dict, model)
    wanted = [f"{n}.{gate}" for n, m in model.named_modules() if isinstance(m, IEBN2d) for gate in GATES]
    missing = [key for key in wanted if key not in state_dict]
    if missing:
        raise RuntimeError(
            f"the checkpoint for {cfg.get('architecture')} lacks {len(missing)} of its {len(wanted)} gate parameters, "
            f"first {missing[0]!r}. Is it a batch-norm checkpoint, or one of another architecture?"
        )
    return state_dict


def _explain(variant: str, cfg: PretrainedCfg, cache_dir: str | Path | None, error: Exception) -> Exception:
    """One paragraph that says what was looked for, where, and what to do."""
    reason = error.__cause__ or error
    reason = f"{type(reason).__name__}: {' '.join(str(reason).split()) or 'no details'}"
    if isinstance(error, SafetensorError):
        return RuntimeError(
            f"The weights of {variant} in {cfg.file or cfg.hf_hub_id} can't be read ({reason}). The file is damaged or "
            "no safetensors file: fetch it again (for a Hub download, delete it from the cache first)."
        )
    if cfg.file:
        return OSError(f"Can't read the weights of {variant} from {str(cfg.file)!r} ({reason}). Check the path.")
    offline = ", with HF_HUB_OFFLINE set" if constants.HF_HUB_OFFLINE else ""
    return OSError(
        f"Can't get the pretrained weights of {variant}. Looked for model.safetensors in the repository "
        f"{cfg.hf_hub_id!r} at {constants.ENDPOINT} and in the cache {cache_dir or constants.HF_HUB_CACHE}{offline} "
        f"({reason}). Check the connection (HF_ENDPOINT; HF_TOKEN for a private repository), or download it where "
        "there is a network and pass cache_dir=, or load a file with pretrained_cfg_overlay=dict(file=...), or create "
        "the model with pretrained=False."
    )
