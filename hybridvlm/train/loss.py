"""Losses on answer tokens, found through Tokens.index wherever reduction has put them; as sums, so that microbatches add up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from hybridvlm.ops.tokens import Tokens


def answers(tokens: Tokens, label: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """(hidden states [B,A,D] of the positions that say an answer's tokens, those tokens [B,A] int32, -1 where there is none).

    tokens: after the decoder, reduced or not; label [B,L] of the unreduced row (`rows.TrainBatch`). A = `most`. All text stays in its
    order, so that position a is the same answer token in every pass over the same row.
    """
    at = jnp.clip(tokens.index, 0, label.shape[1] - 1)
    said = jnp.take_along_axis(label, at, axis=1)
    said = jnp.where((tokens.segment > 0) & ~tokens.visual & (tokens.index >= 0), said, 0)
    return first_answers(tokens.x, said, most)


def first_answers(x: jax.Array, label: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """As `answers`, of hidden states [B,L,D] whose label [B,L] stands next to them."""
    index = jnp.argsort(label == 0, axis=1, stable=True)[:, : min(most, label.shape[1])]
    return jnp.take_along_axis(x, index[..., None], axis=1), jnp.take_along_axis(label, index, axis=1) - 1


def cross_entropy(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of the cross-entropies, how many tokens the model says right) of logits [...,V] fp32 and target [...], -1 = none."""
    real = target >= 0
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(target, 0))
    correct = jnp.sum(real & (jnp.argmax(logits, -1) == target))
    return jnp.sum(jnp.where(real, each, 0)), correct


def divergence(logits: jax.Array, teacher: jax.Array, target: jax.Array, temperature: float) -> jax.Array:
    """Sum over answer tokens of temperature^2 KL(teacher || student), both softened; no gradient goes to the teacher."""
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
    student = jax.nn.log_softmax(logits / temperature)
    each = jnp.sum(jnp.exp(teacher) * (teacher - student), -1)
    return temperature**2 * jnp.sum(jnp.where(target >= 0, each, 0))


def rank_loss(pattern: str, scores: dict[int, jax.Array], mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How far each Mamba layer's score is from ranking as the next attention layer does: (sum, weight); the loss is their ratio.

    scores: {mixer layer: [B,S,M]}, of S questions (or packed segments) on M visual tokens each; mask [B,S,M]: which belong to it. The
    cross-entropy of the Mamba score, z-scored and softmaxed over the visual tokens, towards the attention weights (no gradient).
    A question counts as far as its teacher is sharp (1 - entropy / log M): one that looks everywhere teaches nothing.
    Layers after the last attention layer have no teacher and are left alone.
    """
    count = jnp.sum(mask, -1)
    total = weight = jnp.float32(0)
    attention = [layer for layer in sorted(scores) if pattern[layer] == "*"]
    for layer in sorted(scores):
        teachers = [at for at in attention if at > layer]
        if pattern[layer] != "M" or not teachers:
            continue
        target = jnp.where(mask, jax.lax.stop_gradient(scores[teachers[0]]), 0)
        target = target / jnp.maximum(jnp.sum(target, -1, keepdims=True), 1e-20)
        entropy = -jnp.sum(target * jnp.log(target + 1e-20), -1)
        sharp = jnp.where(count > 1, 1 - entropy / jnp.log(jnp.maximum(count, 2)), 0)
        score, n = scores[layer], jnp.maximum(count, 1)[..., None]
        mean = jnp.sum(jnp.where(mask, score, 0), -1, keepdims=True) / n
        variance = jnp.sum(jnp.where(mask, (score - mean) ** 2, 0), -1, keepdims=True) / n
        # where every score is the same there is no direction to teach, and the root would have no gradient
        z = (score - mean) / (jnp.sqrt(jnp.maximum(variance, 1e-30)) + 1e-6)
        told = jax.nn.log_softmax(jnp.where(mask, z, -1e30))
        total += jnp.sum(-jnp.sum(jnp.where(mask, target * told, 0), -1) * sharp)
        weight += jnp.sum(sharp)
    return total, weight
