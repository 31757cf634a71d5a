"""Packed rows of prompts, and random insides of a Mamba layer for them."""

import jax.numpy as jnp
import numpy as np

from hybridvlm.ops.layer_aux import MambaAux
from hybridvlm.ops.tokens import Tokens

H, G, N, P, K, D = 6, 3, 5, 4, 2, 8


def prompts(rows, length):
    """Tokens of rows given as lists of segments (text before, visual, text after); padding up to `length`."""
    segment, visual, query, index = (np.zeros((len(rows), length), t) for t in (np.int32, bool, bool, np.int32))
    index[:] = -1
    for row, parts in enumerate(rows):
        at = 0
        for number, (before, seen, after) in enumerate(parts, start=1):
            stop = at + before + seen + after
            segment[row, at:stop] = number
            visual[row, at + before : at + before + seen] = True
            query[row, at + before + seen : stop] = True
            index[row, at:stop] = np.arange(stop - at)
            at = stop
    x = np.random.default_rng(0).normal(size=(len(rows), length, D)).astype(np.float32)
    frame = np.where(visual, index // 4, -1)
    return Tokens(*map(jnp.asarray, (x, index, segment, visual, query, index, frame)))


def mamba_aux(tokens, seed=0):
    r = np.random.default_rng(seed)
    b, length = tokens.segment.shape
    dt = np.log1p(np.exp(r.normal(size=(b, length, H)))) * (np.asarray(tokens.segment) > 0)[..., None]
    log_decay = -dt * np.exp(r.normal(size=H) - 2)
    return MambaAux(*(jnp.asarray(a, jnp.float32) for a in (*r.normal(size=(2, b, length, G, N)), dt, log_decay)))
