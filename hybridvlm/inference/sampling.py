"""How the next token is chosen, and the loop that decodes an answer from the caches of a prefill."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from hybridvlm.config import ModelConfig
from hybridvlm.inference.thinking import ThinkBudget, Thought, think
from hybridvlm.inference.thinking import begin as start_thought
from hybridvlm.models import nemotron_vl
from hybridvlm.models.family import Family
from hybridvlm.parallel.tensor import all_rows
from hybridvlm.parallel.vocab import gumbel_noise, keep_likeliest, likeliest


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: the likeliest tokens that hold that much probability are kept, in (0, 1].
        stop_ids: tokens that end an answer; None takes the model's own (its eos_ids), () lets it run to the end.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"Sampling.temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p must lie in (0, 1], got {self.top_p}")
        if self.stop_ids is not None:
            # it is part of a program's key
            object.__setattr__(self, "stop_ids", tuple(self.stop_ids))


def sample_token(config: ModelConfig, logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Next token of each example: logits [B,V] fp32 (a device's own where the vocabulary is cut), one key each -> [B] int32."""
    if sampling.temperature == 0:
        return likeliest(config, logits)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        logits = keep_likeliest(config, logits, sampling.top_p)
    return likeliest(config, logits + gumbel_noise(config, keys, logits.shape[-1]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where decoding stands between two pieces of an answer.

    Attributes:
        token: [B], chosen and not yet in the caches.
        done: [B] bool, whether the answer has ended.
        steps: [], how many tokens were chosen.
        caches: the family's.
        thought: where the reasoning stands, if it has a budget.
    """

    token: jax.Array
    done: jax.Array
    steps: jax.Array
    caches: Any
    thought: Thought | None = None


def decode(
    params: dict[str, Any],
    config: Any,
    logits: jax.Array | None,
    caches: Any,
    seeds: jax.Array,
    *,
    max_new: int,
    sampling: Sampling,
    limit: jax.Array | None = None,
    family: Family = nemotron_vl,
    budget: ThinkBudget | None = None,
    inside: jax.Array | None = None,
    real: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, DecodeState]:
    """Generate up to `max_new` tokens per example; ends early once all have stopped.

    An example's random numbers depend on its own seed and step alone, so that it gets in a batch what it gets by itself.

    Args:
        params: of the model.
        config: of the family.
        logits: [B,V] after the prompt; None goes on from a DecodeState.
        caches: with room for `max_new` tokens; without logits, the DecodeState that an earlier call came to.
        seeds: [B] int32.
        max_new: most tokens, a static number.
        sampling: how they are chosen.
        limit: [], fewer than max_new, by a number that need not be known when this is compiled. With a budget it counts
            the answer's tokens alone, over all pieces.
        family: whose decode step runs.
        budget: reasoning has tokens of its own.
        inside: [B] bool, whether the prompt opened the reasoning.
        real: [B] bool, False for a row that only fills a batch up and says nothing (default: all are real).

    Returns:
        Tokens [B,max_new] (pad_id after the end), lengths [B], the stop token not counted, and where decoding stands.
    """
    b = seeds.shape[0]
    stops = jnp.asarray((config.eos_ids if sampling.stop_ids is None else sampling.stop_ids) or (-1,), jnp.int32)
    decode_step = family.make_decode_step(params, config)
    base = jax.vmap(jax.random.key)(seeds)
    begin = jnp.int32(0) if logits is not None else caches.steps
    answer = jnp.int32(max_new) if limit is None else limit

    def pick(
        step: jax.Array, logits: jax.Array, done: jax.Array, out: jax.Array, length: jax.Array, thought: Thought | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Thought | None]:
        token = sample_token(config, logits, jax.vmap(jax.random.fold_in, (0, None))(base, step), sampling)
        if budget is None or thought is None:
            done = done | jnp.any(token[:, None] == stops, axis=1)
        else:
            token, thought, ended = think(budget, thought, token, stops)
            done = done | ended
        out = out.at[:, step - begin].set(jnp.where(done, config.pad_id, token))
        length = length + ~done
        if thought is not None:
            done = done | (thought.said >= answer)
        return token, done, out, length, thought

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, _, token, done, out, length, thought, caches = state
        logits, caches = decode_step(token, caches)
        token, done, *rest = pick(step, logits, done, out, length, thought)
        return step + 1, all_rows(config, done), token, done, *rest, caches

    out, length = jnp.full((b, max_new), config.pad_id, jnp.int32), jnp.zeros((b,), jnp.int32)
    if logits is not None:
        thought = None
        if budget is not None:
            thought = start_thought(budget, jnp.zeros((b,), bool) if inside is None else jnp.asarray(inside))
        over = jnp.zeros((b,), bool) if real is None else ~real
        token, done, *rest = pick(begin, logits, over, out, length, thought)
        state = (begin + 1, all_rows(config, done), token, done, *rest, caches)
    else:
        ended = all_rows(config, caches.done)
        state = (begin, ended, caches.token, caches.done, out, length, caches.thought, caches.caches)
    most = max_new if budget is not None else jnp.minimum(answer, max_new)
    # whether all have ended is part of the state: all devices take the same number of steps, which exchange what they make
    state = jax.lax.while_loop(lambda s: (s[0] - begin < most) & ~s[1], body, state)
    step, _, token, done, out, length, thought, caches = state
    return out, length, DecodeState(token, done, step, caches, thought)
