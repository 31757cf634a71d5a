"""A model of four layers over the embedded benchmark's frames and words, and configs that train it in seconds."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax

from hybridvlm.config import Buckets, ModelConfig, Reduction, Schedule, VisionConfig
from hybridvlm.inference.model import Model, init_vamba_from
from hybridvlm.models import nemotron_vl
from hybridvlm.tiny import vocabulary
from hybridvlm.tokenizers.word_level import WordLevel
from hybridvlm.train.config import TrainConfig
from hybridvlm.train.config_files import build

FRAMES, TEXT = 2, 8
CONFIG = ModelConfig(
    pattern="M*-M",
    width=32,
    vocab_size=vocabulary.SIZE,
    mamba_heads=2,
    mamba_head_dim=16,
    ssm_groups=1,
    ssm_state=8,
    attention_heads=2,
    kv_heads=1,
    head_dim=16,
    mlp_width=32,
    eos_ids=(vocabulary.EOS_ID,),
    name="micro",
    vision=VisionConfig(
        kind="stem", image_size=(128, 128), patch_size=32, width=32, downsample=1, max_frames=64, stem_channels=(4, 8)
    ),
)
TRANSFORMER = dataclasses.replace(CONFIG, pattern="**-*-", qk_norm=True, name="micro-transformer")
VAMBA_REDUCTION = Reduction("str-attention", 0.5, schedule=Schedule(floor=0.05))
REDUCTION = Reduction("str", 0.5, schedule=Schedule(floor=0.05))


def micro(seed: int = 0) -> Model:
    """The model, with random weights."""
    params = jax.jit(lambda key: nemotron_vl.init(CONFIG, key))(jax.random.key(seed))
    tokenizer = WordLevel.from_file(vocabulary.PATH)
    return Model(CONFIG, params, tokenizer, buckets=Buckets((FRAMES,), (TEXT,), 4), reduction=REDUCTION, name="micro")


def micro_transformer() -> Model:
    """A Transformer over the same frames and words; its first layer of attention has no MLP."""
    params = jax.jit(lambda key: nemotron_vl.init(TRANSFORMER, key))(jax.random.key(3))
    tokenizer = WordLevel.from_file(vocabulary.PATH)
    return Model(TRANSFORMER, params, tokenizer, buckets=Buckets((FRAMES,), (TEXT,), 4), name=TRANSFORMER.name)


def micro_vamba() -> Model:
    """The VAMBA that it becomes."""
    return init_vamba_from(micro_transformer(), ssm_state=8, mamba_head_dim=16, expand=1)


def settings(output: pathlib.Path | str = "unused", **changes: Any) -> TrainConfig:
    """A config of few steps; a change is a dict of fields for one of its parts, or a plain field."""
    base = {
        "model": "micro",
        "output": str(output),
        "steps": 6,
        "data": {
            "split": "val",
            "features": "cached",
            "bank": 8,
            "batch": 4,
            "frames": FRAMES,
            "text": TEXT,
            "answer": 2,
        },
        "reduction": {"reduction": dataclasses.asdict(REDUCTION)},
        "optimizer": {"rate": 1e-3, "warmup": 2},
        "checkpoints": {"every": 2},
        "logging": {"every": 3, "peak_flops": 1e11},
    }
    for name, value in changes.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    return build(TrainConfig, base)
