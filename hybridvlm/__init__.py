"""Hybrid Mamba-Transformer vision-language models in JAX, with stateful token reduction for long video.

    import hybridvlm as hv
    model = hv.load("tiny-reduced")
    answer = model.ask("clip.mp4", "red@t12 none what ?", reduction="str", budget=0.25)

Names are loaded when they are first used: importing the package is quick and starts no device.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Buckets": "config",
    "ModelConfig": "config",
    "Reduction": "config",
    "Schedule": "config",
    "ScoreOptions": "config",
    "VisionConfig": "config",
    "config_names": "config_files",
    "load_model_config": "config_files",
    "Clip": "models.media",
    "PromptStyle": "models.prompt",
    "Tokens": "ops.tokens",
    "ReductionPlan": "reduction.plan",
    "ShardingRules": "sharding",
    "make_mesh": "sharding",
    "make_plan": "reduction.make_plan",
    "register_method": "reduction.methods",
    "init": "inference.model",
    "init_vamba_from": "inference.model",
    "Model": "inference.model",
    "Answer": "inference.conversation",
    "Conversation": "inference.conversation",
    "Sampling": "inference.sampling",
    "compile_count": "inference.program_cache",
    "Workload": "estimates.workload",
    "estimate": "estimates.result",
    "choose_mesh": "estimates.choose",
    "load": "inference.model",
}
_MODULES = (
    "config",
    "ops",
    "nn",
    "vision",
    "models",
    "reduction",
    "video",
    "checkpoints",
    "estimates",
    "inference",
    "parallel",
    "tokenizers",
    "train",
)

__all__ = sorted([*_HOME, "ops", "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"hybridvlm.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"hybridvlm.{name}")
    else:
        raise AttributeError(f"hybridvlm has no public name {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]
