"""Optax: AdamW whose decay knows what it may touch, warm-up and cosine, clipping, and which parameters are trained at all.

Trained parameters are a flat dict by path ("decoder/mamba/in_proj"), in float32; what is frozen is no part of it, so that it has
neither gradient nor optimizer state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybridvlm.models.weights import FLOAT32
from hybridvlm.train.config import Optimizer

Flat = dict[str, jax.Array]

# Last parts of the paths that never decay: what is no weight of a product (norms, decay rates, step sizes, skips, biases,
# gates of single numbers), convolutions, and tables that are looked up.
DECAY_FREE = re.compile(r"(^|/)(\w*norm\w*|A_log|D|dt_bias|\w*bias|alpha|conv\w*|embed|cell|time|position|prefix)$")


def decays(path: str, more: tuple[str, ...] = ()) -> bool:
    """Whether weight decay acts on the parameter at `path`; `more`: further patterns of those it does not."""
    return DECAY_FREE.search(path) is None and not any(re.search(pattern, path) for pattern in more)


def check_decay_free(flat: Mapping[str, Any], patterns: tuple[str, ...]) -> None:
    """ValueError for a pattern that finds nothing."""
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in flat):
            raise ValueError(f"Optimizer.decay_free: {pattern!r} finds no parameter; there are {', '.join(flat)}")


def split(flat: Mapping[str, Any], frozen: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trained, frozen) parameters; ValueError for a pattern that finds nothing, or where nothing is left to train."""
    for pattern in frozen:
        if not any(re.search(pattern, path) for path in flat):
            raise ValueError(f"Optimizer.frozen: {pattern!r} finds no parameter; there are {', '.join(flat)}")
    still = {path for path in flat if any(re.search(pattern, path) for pattern in frozen)}
    if len(still) == len(flat):
        raise ValueError(f"Optimizer.frozen {frozen} leaves nothing to train")
    return {p: a for p, a in flat.items() if p not in still}, {p: a for p, a in flat.items() if p in still}


def schedule(o: Optimizer, steps: int) -> optax.Schedule:
    """The rate of every step: from rate * start up over `warmup` steps, then a cosine down to rate * end at the last."""
    warmup = min(o.warmup, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        o.rate * o.start if warmup else o.rate, o.rate, warmup, max(steps, warmup + 1), o.rate * o.end
    )


def make(o: Optimizer, steps: int, path_of: Any = lambda path: path) -> optax.GradientTransformation:
    """The transformation of a run; its state is a tree over the trained flat dict. path_of: the path that decides on decay."""

    def mask(tree: Flat) -> dict[str, bool]:
        return {path: decays(path_of(path), o.decay_free) for path in tree}

    adamw = optax.adamw(schedule(o, steps), b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(o.clip), adamw) if o.clip else adamw


def cast(flat: Mapping[str, jax.Array], dtype: Any) -> Flat:
    """Parameters as the computation takes them: in `dtype`, but for the leaves that stay in float32 in any model."""
    kept = lambda path: path.rsplit("/", 1)[-1] in FLOAT32  # noqa: E731
    return {path: a if kept(path) else a.astype(dtype) for path, a in flat.items()}


def average(ema: Flat, new: Flat, decay: float) -> Flat:
    """The exponential moving average one step on."""
    return jax.tree.map(lambda old, now: decay * old + (1 - decay) * now.astype(jnp.float32), ema, new)
