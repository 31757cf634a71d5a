"""Training batches for the embedded model: visual tokens out of a bank, questions out of the benchmark's own rules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.config import ModelConfig
from hybridvlm.tiny import assets, needle, tiles, vocabulary
from hybridvlm.tiny.tower import features


@dataclasses.dataclass(frozen=True)
class Bank:
    """Visual tokens of single cells, without position and time, grouped by border colour.

    tokens [16,n,D]; label, tag1, tag2 [16,n].
    """

    tokens: jax.Array
    label: np.ndarray
    tag1: np.ndarray
    tag2: np.ndarray


def make_bank(params: dict, config: ModelConfig, frames: int, n: int, seed: int, split: str = "train") -> Bank:
    """Run n random cells of each border colour through the frozen tower; their tags point at one of `frames` frames."""
    rng = np.random.default_rng([seed, frames, 11])
    images = assets.load_bank(split)
    label = rng.integers(tiles.CLASSES, size=(16, n))
    image = rng.integers(images.start[label], images.start[label + 1])
    number = rng.integers(frames, size=(16, n))
    run = jax.jit(functools.partial(features, config=config))
    part = 500
    tokens = np.zeros((16, n, config.width), np.float32)
    for colour in range(16):
        for at in range(0, n, part):
            cut = (colour, slice(at, at + part))
            cells = tiles.render(
                images.images[image[cut]], np.full(len(label[cut]), colour), number[cut] // 8, number[cut] % 8
            )
            tokens[cut] = run(params, cells=cells)
    return Bank(jnp.asarray(tokens), label, number // 8, number % 8)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A training batch: cells [B,F,16] (colour * n + position in the bank), border colours are in it; questions are flat [B*Q]."""

    cells: np.ndarray
    text: np.ndarray
    answer: np.ndarray
    type: np.ndarray
    frame: np.ndarray
    cell: np.ndarray
    colour: np.ndarray
    hop2: np.ndarray


def draw(
    bank: Bank, frames: int, videos: int, questions: int, types: tuple[str, ...], rng: np.random.Generator
) -> Sample:
    """`videos` videos of `frames` frames with `questions` questions each."""
    return draw_videos(bank, frames, videos, questions, types, rng)[0]


def batches(make: Callable[[int], Sample], start: int, stop: int) -> Iterator[Sample]:
    """make(step) for start <= step < stop, in order; a thread draws ahead while the device works on the step before."""
    import grain

    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(reading))


def draw_videos(
    bank: Bank, frames: int, videos: int, questions: int, types: tuple[str, ...], rng: np.random.Generator
) -> tuple[Sample, list[needle.Questions]]:
    """As `draw`, with the questions of each video (which tokens they need) next to the sample."""
    n = bank.label.shape[1]
    border = rng.permuted(np.broadcast_to(np.arange(16), (videos, frames, 16)), axis=2)
    tile = rng.integers(n, size=border.shape)
    asked = []
    for b in range(videos):
        cut = (border[b], tile[b])
        video = needle.Video("train", b, tile[b], bank.label[cut], border[b], bank.tag1[cut], bank.tag2[cut])
        order = list(types)
        rng.shuffle(order)
        asked.append(needle.make_questions(video, questions, rng, order))

    def flat(name: str) -> np.ndarray:
        return np.concatenate([getattr(q, name) for q in asked])

    sample = Sample(
        (border * n + tile).astype(np.int32),
        flat("text"),
        flat("answer"),
        flat("type"),
        flat("target_frame"),
        flat("target_cell"),
        flat("target_colour"),
        flat("hop2"),
    )
    return sample, asked


def embed_video(params: dict, bank_tokens: jax.Array, cells: jax.Array) -> jax.Array:
    """Bank positions [B,F,16] -> visual tokens [B,F*16,D], with position and time."""
    b, f, m = cells.shape
    x = bank_tokens.reshape(-1, bank_tokens.shape[-1])[cells]
    x = x + params["projector"]["cell"] + params["projector"]["time"][:f, None]
    return x.reshape(b, f * m, -1)


def words_and_targets(text: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n,5] of question and answer, and the two words to be said: answer after the question, then <eos>: [n,2]."""
    rows = np.concatenate([text, answer[:, None]], axis=1)
    return rows, np.stack([answer, np.full_like(answer, vocabulary.EOS_ID)], axis=1)
