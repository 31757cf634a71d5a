"""Run by test_sharding.py in a process of its own, on 8 devices of the CPU: sharded prefill beside that of one device.

Prints one JSON line per case: {"case", "error" (max|difference| / max|reference| of logits, states and keys), "same kept"}.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm import sharding
from hybridvlm.config import ModelConfig, Reduction, Schedule
from hybridvlm.models.nemotron_vl import Batch, HybridVLM, prefill
from hybridvlm.nn.parallel import LocalConfig
from hybridvlm.reduction.plan import make_plan

CONFIG = ModelConfig(
    pattern="M*M*-",
    width=32,
    vocab_size=64,
    mamba_heads=16,
    mamba_head_dim=6,
    ssm_groups=2,
    ssm_state=8,
    attention_heads=6,
    kv_heads=2,
    head_dim=8,
    mlp_width=64,
)
FRAMES, PER_FRAME, TEXT = 6, 8, 7


def inputs(config: ModelConfig):
    rng = np.random.default_rng(0)
    visual = FRAMES * PER_FRAME
    frame = np.concatenate([np.repeat(np.arange(FRAMES), PER_FRAME), np.full(TEXT, -1)])
    frame = np.tile(frame, (2, 1)).astype(np.int32)
    segment = np.ones_like(frame)
    segment[1, -2:] = 0  # the second example has less text
    ids = rng.integers(0, config.vocab_size, frame.shape)
    batch = Batch(ids.astype(np.int32), segment, frame, np.full(2, FRAMES, np.int32))
    tokens = rng.normal(size=(2, FRAMES, PER_FRAME, config.width)).astype(np.float32)
    params = jax.jit(HybridVLM(config).init)(jax.random.key(0), batch)["params"]
    plan = make_plan(
        Reduction("str", 0.6, schedule=Schedule("linear")),
        config,
        visual_tokens=visual,
        text_tokens=TEXT,
        frames=FRAMES,
    )
    return params, batch, tokens, plan


def packed_states(config: ModelConfig, local: LocalConfig, conv: np.ndarray) -> np.ndarray:
    """A sharded convolution state [B,W-1,devices*(x|B|C)] with its channels where the whole model has them."""
    parts = np.split(conv, local.devices, axis=-1)
    cuts = (local.mamba_width, local.mamba_width + local.ssm_groups * local.ssm_state)
    x, b, c = zip(*(np.split(part, cuts, axis=-1) for part in parts), strict=True)
    every = slice(None, None, local.group_devices)
    return np.concatenate([*x, *b[every], *c[every]], axis=-1)


def difference(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    assert jax.device_count() == 8, jax.devices()
    params, batch, visual, plan = inputs(CONFIG)
    assert {CONFIG.pattern[layer] for layer in plan.drops} == {"M", "*"}, plan.drops
    for name, method, meshes in (("dense", None, ((2, 4),)), ("str", plan, ((1, 2), (2, 4)))):
        run = jax.jit(lambda params, method=method: prefill(params, CONFIG, batch, visual, method, 0))
        want = run(params)
        for data, tensor in meshes:
            mesh = sharding.make_mesh(data=data, tensor=tensor, devices=jax.devices()[: data * tensor])
            local = sharding.local_config(CONFIG, tensor)
            cut = sharding.shard_params(params, CONFIG, mesh)
            sharded = jax.jit(
                lambda params, mesh=mesh, method=method: prefill(params, CONFIG, batch, visual, method, 0, mesh=mesh)
            )
            got = sharded(cut)
            errors = [difference(got.logits, want.logits), difference(got.decoder.tokens.x, want.decoder.tokens.x)]
            for kind, ours, theirs in zip(CONFIG.pattern, got.decoder.caches, want.decoder.caches, strict=True):
                if kind == "M":
                    errors.append(difference(ours.ssm, theirs.ssm))
                    errors.append(difference(packed_states(CONFIG, local, np.asarray(ours.conv)), theirs.conv))
                elif kind == "*":
                    errors.append(difference(np.asarray(ours.k)[:, :, :: local.kv_devices], theirs.k))
            same = all(
                bool(jnp.array_equal(a, b))
                for a, b in zip(
                    jax.tree.leaves((got.decoder.survivors, got.decoder.kept)),
                    jax.tree.leaves((want.decoder.survivors, want.decoder.kept)),
                    strict=True,
                )
            )
            held = {str(cut["decoder"]["mamba"]["in_proj"].addressable_shards[0].data.shape[-1])}
            case = {"case": f"{name} data={data} tensor={tensor}", "error": max(errors), "same kept": same}
            print(json.dumps(case | {"in_proj columns": held.pop()}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
