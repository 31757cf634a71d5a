"""The closed word-level vocabulary of the embedded model: a Hugging Face `tokenizers` WordLevel tokenizer.

One token a word. A question is four words, `<colour>@t<NN> <t<NN>|none> <type> ?`; an answer is one word and `<eos>`.
Ids lie in blocks, so that arrays of colours, times, ... become ids by adding the block's start:
`COMPOUND + colour * 64 + time`, `TIME + time`, `TYPE + type`, `CELL + cell`, `TAG + tag colour`, `CLASS + class`.

`python -m hybridvlm.tiny.vocabulary` writes the packaged `data/tokenizer.json` again.
"""

from __future__ import annotations

import functools
import pathlib
from typing import TYPE_CHECKING

from hybridvlm.tiny import tiles
from hybridvlm.tokenizers.word_level import UnknownWord as UnknownWord
from hybridvlm.tokenizers.word_level import WordLevel, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PATH = pathlib.Path(__file__).parent / "data" / "tokenizer.json"
TIMES = 64
# question types, in the order of their ids; the first four need one look-up in the video, the others two
TYPES = ("WHAT", "WHERE", "TAG1", "TAG2", "2G", "2P", "2C")
TYPE_WORDS = ("what", "where", "tag1", "tag2", "class-at", "class-pointed", "class-same")
TIME_WORDS = tuple(f"t{t:02d}" for t in range(TIMES))
CELL_WORDS = tuple(f"c{c}" for c in range(tiles.CELLS))
COMPOUND_WORDS = tuple(f"{colour}@{time}" for colour in tiles.BORDER_WORDS for time in TIME_WORDS)
SPECIAL = ("<pad>", "<video>", "<eos>")
PAD_ID, VIDEO_ID, EOS_ID = range(3)

# the classes come last: another choice of classes moves no other id
_BLOCKS = (
    SPECIAL,
    ("none", "?"),
    TYPE_WORDS,
    TIME_WORDS,
    COMPOUND_WORDS,
    CELL_WORDS,
    tiles.TAG_WORDS,
    tiles.CLASS_WORDS,
)
_, NONE, TYPE, TIME, COMPOUND, CELL, TAG, CLASS = (sum(len(b) for b in _BLOCKS[:i]) for i in range(len(_BLOCKS)))
MARK = NONE + 1  # "?"
WORDS = tuple(word for block in _BLOCKS for word in block)
SIZE = len(WORDS)


def build() -> Tokenizer:
    """The tokenizer, made from the words above."""
    return WordLevel.from_words(WORDS[NONE:], SPECIAL).tokenizer


class Vocabulary(WordLevel):
    """Words <-> ids, read from a `tokenizer.json` (see `tokenizers/word_level.py` for what it does).

    Attributes: `size`, `pad_id`, `video_id` (the placeholder of a visual token), `eos_id`, `tokenizer` (the Hugging
    Face object).
    """

    def __init__(self, path: str | pathlib.Path = PATH):
        super().__init__(read_tokenizer(path))
        self.pad_id, self.video_id, self.eos_id = (self.id(word) for word in SPECIAL)


@functools.lru_cache(maxsize=1)
def default() -> Vocabulary:
    """The packaged vocabulary, read once."""
    return Vocabulary()


if __name__ == "__main__":
    PATH.parent.mkdir(parents=True, exist_ok=True)
    build().save(str(PATH))
    print(f"{SIZE} words -> {PATH}")
