"""Finetuning under reduction: `python -m hybridvlm.train CONFIG`, or from Python

    from hybridvlm.train import Data, TrainConfig, train
    folder = train(TrainConfig(model="tiny", output="runs/mine", steps=100, data=Data(source="needle")))

What a config may hold is in config.py. Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "train": "loop",
    **dict.fromkeys(
        (
            "Checkpointing",
            "Convert",
            "Data",
            "Distill",
            "Export",
            "Logging",
            "Lora",
            "MeshSizes",
            "Optimizer",
            "ReductionMode",
            "TrainConfig",
        ),
        "config",
    ),
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"hybridvlm.train has no public name {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"hybridvlm.train.{_HOME[name]}"), name)
    globals()[name] = value
    return value
