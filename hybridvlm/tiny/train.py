"""Train the embedded model on the task: `python -m hybridvlm.tiny.train --output DIR`.

Stages of growing length; many questions share one pass over a video. The hop is supervised: before the second look-up the
last word of a two-hop question must spell where to look, in the space of the word embeddings, and the second attention layer
must look there. A killed run resumes from its last checkpoint and draws the same batches (a batch depends on seed, stage and
step alone).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybridvlm.config import MIXERS, ModelConfig
from hybridvlm.config_files import load_model_config
from hybridvlm.errors import said
from hybridvlm.files import folder_lock
from hybridvlm.nn.caches import AttentionCache
from hybridvlm.nn.decoder import DecoderOutput
from hybridvlm.nn.incremental import SharedOutput
from hybridvlm.tiny import codes, needle, tower
from hybridvlm.tiny.bank import Bank, Sample, batches, draw, make_bank
from hybridvlm.tiny.setup import initial_params
from hybridvlm.tiny.shared import QUESTION, arrays, forward

HOP_WEIGHT, LOOK_WEIGHT = 0.5, 0.2
CELLS_PER_COLOUR = (
    4000  # size of the bank of training cells; short videos, which hardly teach the classes, do with fewer
)
ONE_HOP = tuple(t for t in needle.TYPES if t not in needle.TWO_HOP)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps on videos of `frames` frames; the learning rate falls from `rate` to `rate * end` (cosine) after a short rise."""

    name: str
    frames: int
    videos: int
    questions: int
    steps: int
    rate: float
    end: float
    types: tuple[str, ...] = needle.TYPES


STAGES = (
    Stage("one-hop", 4, 32, 12, 80, 1.5e-3, 1.0, ONE_HOP),
    Stage("hops", 8, 20, 24, 90, 1.5e-3, 1.0, needle.TYPES + needle.TWO_HOP),
    Stage("longer", 24, 8, 40, 40, 1.5e-3, 1.0, needle.TYPES + needle.TWO_HOP),
    Stage("full", 64, 4, 48, 200, 1.5e-3, 0.6, needle.TYPES + needle.TWO_HOP),
    Stage("settle", 64, 4, 48, 60, 1e-3, 0.01, needle.TYPES + needle.TWO_HOP),
)


def hop_layers(config: ModelConfig) -> tuple[int, int]:
    """Where the hop is supervised: after the second mixer layer after the first look-up, and just before the second look-up."""
    first, second = codes.look_ups(config)
    between = [layer for layer in range(first + 1, second) if config.pattern[layer] in MIXERS]
    return between[1], second - 1


def hop_loss(config: ModelConfig, x: jax.Array, sample: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """x [n,D], the last word's residual stream, must spell the second look-up: (mean cross-entropy, share spelt right)."""
    direction = codes.codes(config.width)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
    loss: jax.Array | float = 0.0
    count: jax.Array | float = 0.0
    right = jnp.ones(len(x), bool)
    parts = (
        ("high", jnp.where(sample["frame"] >= 0, sample["frame"] // 8, -1)),
        ("low", jnp.where(sample["frame"] >= 0, sample["frame"] % 8, -1)),
        ("cell", sample["cell"]),
        ("colour", sample["colour"]),
    )
    for name, target in parts:
        logits = x @ (direction[name] @ direction["R"].T).T
        asked = target >= 0
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(target, 0))
        loss += jnp.sum(jnp.where(asked, each, 0))
        count += jnp.sum(asked)
        right &= ~asked | (jnp.argmax(logits, -1) == target)
    two_hop = sample["frame"] >= 0
    return loss / jnp.maximum(count, 1), jnp.sum(right & two_hop) / jnp.maximum(jnp.sum(two_hop), 1)


def look_loss(config: ModelConfig, shared: SharedOutput, out: DecoderOutput, hop2: jax.Array) -> jax.Array:
    """Minus log of the second look-up's attention weight, mean over heads, from the last word to the token of the second look-up."""
    layer = codes.look_ups(config)[1]
    q, lse = shared.queries[layer]
    cache = out.caches[layer]
    assert isinstance(cache, AttentionCache)  # look-ups are layers of attention
    keys = cache.k
    n, _, heads, width = q.shape
    video = jnp.arange(n) // (n // keys.shape[0])
    k = jnp.repeat(keys[video, jnp.maximum(hop2, 0)], heads // config.kv_heads, axis=1)  # [n,H,P]
    log_weight = jnp.sum(q[:, QUESTION - 1] * k, -1) / np.sqrt(width) - lse[:, :, QUESTION - 1]
    each = jnp.log(heads) - jax.nn.logsumexp(log_weight, axis=1)
    return jnp.sum(jnp.where(hop2 >= 0, each, 0)) / jnp.maximum(jnp.sum(hop2 >= 0), 1)


def task_loss(params: dict, config: ModelConfig, bank_tokens: jax.Array, sample: dict[str, jax.Array]):
    """Answer and <eos>, and the hop: (loss, metrics)."""
    logits, shared, out = forward(params, config, bank_tokens, sample)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, sample["targets"])
    hops = [hop_loss(config, shared.residual[layer][:, QUESTION - 1], sample) for layer in hop_layers(config)]
    loss = each[:, 0].mean() + 0.2 * each[:, 1].mean() + HOP_WEIGHT * sum(h for h, _ in hops) / len(hops)
    looked = look_loss(config, shared, out, sample["hop2"])
    loss += LOOK_WEIGHT * looked
    right = jnp.argmax(logits[:, 0], -1) == sample["targets"][:, 0]
    return loss, {"right": right, "hop": hops[-1][1], "look": jnp.exp(-looked)}


def decayed(path: tuple, _: Any) -> bool:
    """Weight decay acts on the decoder's projections alone: no norms, A_log, D, dt_bias, convolutions or embeddings."""
    return path[-1].key.endswith("_proj")


def make_optimizer(rate: optax.Schedule | float) -> optax.GradientTransformation:
    """AdamW with clipping. Tower and connector stay: their entries are small, and Adam's equal steps would blur the directions
    of cells and times long before the questions teach how to read them."""

    def label(path, _):
        return "frozen" if path[0].key in ("vision", "projector") else "train"

    inner = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            rate, b2=0.98, weight_decay=0.02, mask=lambda tree: jax.tree_util.tree_map_with_path(decayed, tree)
        ),
    )
    return optax.multi_transform(
        {"train": inner, "frozen": optax.set_to_zero()},
        lambda tree: jax.tree_util.tree_map_with_path(label, tree),
    )


def accuracy_by_type(right: np.ndarray, kind: np.ndarray) -> str:
    """A line such as `WHAT .98 2P .91`."""
    parts = [(name, right[kind == i]) for i, name in enumerate(needle.TYPES)]
    return " ".join(f"{name} {values.mean():.2f}" for name, values in parts if len(values))


def stage_optimizer(stage: Stage) -> optax.GradientTransformation:
    """The optimizer of one stage: a short rise, then a cosine to `rate * end`."""
    rise = 20
    fall = optax.cosine_decay_schedule(stage.rate, max(stage.steps - rise, 1), stage.end)
    return make_optimizer(
        optax.join_schedules([optax.linear_schedule(stage.rate / 10, stage.rate, rise), fall], [rise])
    )


def train_stage(
    params: dict,
    config: ModelConfig,
    stage: Stage,
    seed: int,
    *,
    bank: Bank,
    start: int = 0,
    state: Any = None,
    on_step: Callable[[int, dict, Any], None] | None = None,
) -> dict:
    """Run one stage from its step `start`; `on_step(steps done, params, state)` is called after every step, for checkpoints."""
    optimizer = stage_optimizer(stage)
    state = optimizer.init(params) if state is None else state

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, tokens, sample):
        (loss, metrics), grads = jax.value_and_grad(task_loss, has_aux=True)(params, config, tokens, sample)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, metrics

    begin, seen, kinds = time.time(), [], []

    def sample_of(step: int) -> Sample:
        rng = np.random.default_rng([seed, *stage.name.encode(), step])
        return draw(bank, stage.frames, stage.videos, stage.questions, stage.types, rng)

    for step, sample in enumerate(batches(sample_of, start, stage.steps), start):
        params, state, loss, metrics = update(params, state, bank.tokens, arrays(sample))
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"stage {stage.name}: the loss is {loss} at step {step}; the last checkpoint is kept"
            )
        seen.append(np.asarray(metrics["right"]))
        kinds.append(sample.type)
        if step % 25 == 24 or step == stage.steps - 1:
            line = accuracy_by_type(np.concatenate(seen), np.concatenate(kinds))
            each = (time.time() - begin) / (step + 1 - start)
            print(
                f"{stage.name} {step + 1}/{stage.steps}: loss {loss:.3f}, hop spelt {metrics['hop']:.2f}, "
                f"looked at {metrics['look']:.2f}"
                f" | {line} | {each:.2f} s/step",
                flush=True,
            )
            seen, kinds = [], []
        if on_step is not None:
            on_step(step + 1, params, state)
    return params


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridvlm.tiny.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, required=True, help="checkpoint folder to write at the end")
    parser.add_argument("--work", type=pathlib.Path, help="folder of the run's own checkpoints (default: OUTPUT.run)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--transformer",
        action="store_true",
        help="train the Transformer baseline instead: every Mamba layer is an attention layer of about as many parameters",
    )
    args = parser.parse_args(argv)
    work = args.work or args.output.with_name(args.output.name + ".run")
    try:
        with folder_lock(work, "the training of an embedded model"):
            train(args.output, work, args.seed, transformer=args.transformer)
    except (OSError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise SystemExit(f"error: {said(error)}") from None


def train(output: pathlib.Path, work: pathlib.Path, seed: int, *, transformer: bool = False) -> None:
    """All stages, or what is left of them by the checkpoints in `work`; the model is written to `output` at the end."""
    from hybridvlm.tiny.resume import Saved, write_checkpoint

    config = load_model_config("tiny_transformer" if transformer else "tiny")
    saved = Saved(work, repr((seed, STAGES, config)))
    begins = np.cumsum([0, *(stage.steps for stage in STAGES)]).tolist()

    def stage_of(step: int) -> int:
        return max(i for i, begin in enumerate(begins[:-1]) if begin <= step)

    params = initial_params(config, tower.initial_tower(config, seed), seed)
    done, params, state = saved.restore(params, lambda p, step: stage_optimizer(STAGES[stage_of(step)]).init(p))
    if done is None:
        trained, done = tower.train_tower(config, seed), 0
        read = tower.accuracy(trained, config, "val")
        print(
            "tower, validation cells: " + ", ".join(f"{name} {share:.4f}" for name, share in read.items()), flush=True
        )
        params = initial_params(config, trained, seed)
        saved.save(0, params, stage_optimizer(STAGES[0]).init(params), now=True)
    if done:
        print(f"resuming after step {done} of {begins[-1]}")
    for i, stage in enumerate(STAGES):
        if done >= begins[i + 1]:
            continue
        start = max(done - begins[i], 0)
        bank = make_bank(params, config, stage.frames, CELLS_PER_COLOUR if stage.frames > 8 else 1500, seed)

        def keep(step: int, params: dict, state: Any, i: int = i, stage: Stage = stage) -> None:
            if step < stage.steps:  # at a stage's end the optimizer starts anew, so its last state is not worth keeping
                saved.save(begins[i] + step, params, state)

        params = train_stage(
            params, config, stage, seed, bank=bank, start=start, state=state if start else None, on_step=keep
        )
        if i + 1 < len(STAGES):
            saved.save(begins[i + 1], params, stage_optimizer(STAGES[i + 1]).init(params), now=True)
    saved.wait()
    # never reduced in training, but evaluated with the schedule that its benchmark asks for
    dense = dataclasses.replace(codes.reduction(), method="none", budget=1.0)
    write_checkpoint(output, config, params, config.name, dense)


if __name__ == "__main__":
    main()
