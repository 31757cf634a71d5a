"""A hybrid of 24 layers and plans for it."""

import dataclasses

from hybridvlm.config import ModelConfig, Reduction, Schedule
from hybridvlm.reduction import make_plan


def model(pattern="M*-M-M*-M-M-M*-M-M-M-M-M-", **changes):
    small = ModelConfig(
        pattern=pattern,
        width=64,
        vocab_size=100,
        mamba_heads=4,
        mamba_head_dim=32,
        ssm_groups=2,
        ssm_state=16,
        attention_heads=4,
        kv_heads=2,
        head_dim=16,
        mlp_width=256,
    )
    return dataclasses.replace(small, **changes)


def plan(method="str", budget=0.25, kind="mean", config=None, frames=64, m=16, text=32, seed=0, **schedule):
    # as many lengths as there may be drops, unless a test asks for fewer
    reduction = Reduction(method, budget, kind, Schedule(**{"stages": 0, **schedule}), seed=seed)
    return make_plan(reduction, config or model(), visual_tokens=frames * m, text_tokens=text, frames=frames)
