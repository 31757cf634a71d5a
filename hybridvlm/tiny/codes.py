"""The embedded model's configuration, and the directions that its text and its pictures share from the start.

Every attribute value (class, border colour, tags, cell, time) has an orthonormal direction in the width of the model. Visual
tokens are the sum of the directions of what they show; words are the same directions after a fixed rotation R, so that
text and video do not look alike, and a query projection that undoes R finds what a word names. It stands in for a
contrastively aligned vision tower; all of it is trained afterwards.
"""

from __future__ import annotations

import functools

import numpy as np

from hybridvlm.config import ATTENTION, MAMBA, ModelConfig, Reduction, Schedule
from hybridvlm.config_files import load_model_config
from hybridvlm.tiny import tiles, vocabulary

# attribute -> how many values; a time t is two digits, high = t // 8 and low = t % 8, as the two tags spell it
SIZES = {"class": tiles.CLASSES, "colour": 16, "tag1": 8, "tag2": 8, "cell": 16, "high": 8, "low": 8}
KEYS = ("colour", "cell", "high", "low")  # what a question can look a token up by
SEED = 20


def config() -> ModelConfig:
    """The configuration of the embedded models, configs/tiny.json."""
    return load_model_config("tiny")


def reduction() -> Reduction:
    """`str` at 25% mean, with the schedule that did best on validation videos: nothing is dropped until the first look-up is read,
    that is until the first Mamba layer after the first attention layer has run, and 2% stay to the end."""
    pattern = config().pattern
    return Reduction("str", 0.25, schedule=Schedule(start=pattern.index("M", pattern.index("*")), floor=0.02, stages=0))


def look_ups(config: ModelConfig) -> tuple[int, int]:
    """The attention layers where the first and the second look-up are taught: the first two of a hybrid. A model of attention alone
    takes the positions that they have in the embedded hybrid, whose baseline it is."""
    pattern = config.pattern if MAMBA in config.pattern else load_model_config("tiny").pattern
    first = pattern.index(ATTENTION)
    return first, pattern.index(ATTENTION, first + 1)


@functools.cache
def codes(width: int) -> dict[str, np.ndarray]:
    """Orthonormal directions, [values,D] for each attribute of SIZES, "word" [D] (no picture has it), and the rotation "R" [D,D]."""
    total = sum(SIZES.values())
    if width <= total:
        raise ValueError(
            f"width must be at least {total + 1}, one direction per attribute value and one more, got {width}"
        )
    rng = np.random.default_rng(SEED)
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0].astype(np.float32)
    ends = np.cumsum(list(SIZES.values()))
    out = {name: basis[end - size : end] for (name, size), end in zip(SIZES.items(), ends, strict=True)}
    out["word"] = basis[total]
    out["R"] = np.linalg.qr(rng.normal(size=(width, width)))[0].astype(np.float32)
    return out


def time_code(width: int) -> np.ndarray:
    """The direction of every time, [64,D]."""
    c, t = codes(width), np.arange(vocabulary.TIMES)
    return c["high"][t // 8] + c["low"][t % 8]


def word_embeddings(width: int) -> np.ndarray:
    """A start for the embedding table [V,D]: words that name something lie at R times its direction, the others at random."""
    c = codes(width)
    rng = np.random.default_rng(SEED + 1)
    table = rng.normal(size=(vocabulary.SIZE, width)).astype(np.float32) / np.sqrt(width)
    times = time_code(width)
    compound = (c["colour"][:, None] + times[None]).reshape(-1, width)
    for start, directions in (
        (vocabulary.TIME, times),
        (vocabulary.COMPOUND, compound),
        (vocabulary.CELL, c["cell"]),
        (vocabulary.CLASS, c["class"]),
    ):
        table[start : start + len(directions)] = directions @ c["R"].T
    return table


def projections(width: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A matching pair of projections onto the look-up directions: (of a word, of a visual token), each [D,columns].

    Both map the same attribute value to the same random vector of unit length, so that their product counts the matches.
    """
    c = codes(width)
    rng = np.random.default_rng([SEED, seed])
    keys = np.concatenate([c[name] for name in KEYS])
    mixed = rng.normal(size=(len(keys), columns)).astype(np.float32)
    if columns >= len(keys):
        mixed = np.linalg.qr(mixed.T)[0].T.astype(np.float32)
    else:
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    visual = keys.T @ mixed
    return c["R"] @ visual, visual
