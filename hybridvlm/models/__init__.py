"""Model families, one module each; what a family module has to offer is listed at `FAMILIES`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from hybridvlm.plain import shown

# Every family is a module of this package with
#   NAME, MODEL_TYPES (as config.json has them under `model_type` or `architectures`), Config (a frozen dataclass),
#   METHODS (reductions it takes, None for all), CHAT (template where a checkpoint has none);
#   config_from_hf(raw, shapes), init(config, key), table(config): its form on disk;
#   frame_size, prompt, make_batch, pixels, make_plan: from frames and words to the arrays of a bucket (host);
#   encode, prefill, stepper, extend: the computation (traced);
#   and may have looked_at(config, clip), if it leaves frames out, and remember, if questions can share what it makes of a video.
# nemotron_vl.py is the one to read first.
FAMILIES = ("nemotron_vl", "vamba", "qwen_vl")


def family(name: str) -> ModuleType:
    """The module of a family by its name; ValueError names those there are."""
    if name not in FAMILIES:
        raise ValueError(f"no model family {name!r}; there are {', '.join(FAMILIES)}")
    return importlib.import_module(f"hybridvlm.models.{name}")


def family_for(config: Any) -> ModuleType:
    """The family whose configs are of this one's class."""
    for name in FAMILIES:
        if type(config) is family(name).Config:
            return family(name)
    raise ValueError(f"{type(config).__name__} is the config of no model family")


def family_of(raw: Mapping[str, Any]) -> ModuleType:
    """The family of a published config.json (parsed), by its `architectures` and `model_type`."""
    if "vision_mamba_mixer_config" in raw:  # VAMBA has the names of Qwen2-VL, which it was made from, and this
        return family("vamba")
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"config.json: architectures must be a list of words, got {shown(names)}")
    for kind in [*names, raw.get("model_type")]:
        for name in FAMILIES:
            if kind in family(name).MODEL_TYPES:
                return family(name)
    known = sorted(kind for name in FAMILIES for kind in family(name).MODEL_TYPES)
    raise ValueError(
        f"config.json: architectures {shown(names)} and model_type {shown(raw.get('model_type'))} belong to no family; "
        f"supported: {', '.join(known)}"
    )
