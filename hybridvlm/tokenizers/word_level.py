"""A closed word-level tokenizer: one id a word, and a word that it does not have is refused by name."""

from __future__ import annotations

import contextlib
import difflib
import pathlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from hybridvlm.files import parse_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class UnknownWord(ValueError):
    """A text holds a word that the closed vocabulary does not have."""


@contextlib.contextmanager
def library_faults(source: object) -> Iterator[None]:
    """What the tokenizers library raises, as a ValueError that names the tokenizer.

    It raises bare `Exception` for whatever it cannot do, and where its own code panics (a pattern that takes too many steps)
    a `BaseException` that `except Exception` lets through.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        told = " ".join(str(error).split())[:300]
        raise ValueError(f"the tokenizer failed: {told} (tokenizer {source or 'given'})") from error


def read_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """The Hugging Face `tokenizers` object of a `tokenizer.json` with a WordLevel model.

    FileNotFoundError if there is none; ValueError if the file is not JSON or not a WordLevel tokenizer.
    """
    from tokenizers import Tokenizer

    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}")
    try:
        model = parse_json(path.read_bytes()).get("model", {})
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if model.get("type") != "WordLevel" or not isinstance(vocab, dict) or not vocab:
        raise ValueError(f"{path} must hold a WordLevel model with a vocabulary, got type {model.get('type')!r}")
    with library_faults(path):
        return Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))


class WordLevel:
    """Words <-> ids by a Hugging Face WordLevel tokenizer (attribute `tokenizer`); `size` is the number of ids."""

    def __init__(self, tokenizer: Tokenizer, source: str = ""):
        self.tokenizer, self.source = tokenizer, source
        self._id: dict[str, int] = tokenizer.get_vocab()
        self._word = {i: word for word, i in self._id.items()}
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.size = len(self._id)

    @classmethod
    def from_file(cls, path: str | pathlib.Path) -> WordLevel:
        """Read a `tokenizer.json`."""
        return cls(read_tokenizer(path), str(path))

    @classmethod
    def from_words(cls, words: Iterable[str], special: Iterable[str] = ("<pad>",)) -> WordLevel:
        """Ids in the order given, `special` first; words are split at spaces and letter case does not matter."""
        from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

        special = list(special)
        ids = {word: i for i, word in enumerate([*special, *words])}
        tokenizer = Tokenizer(models.WordLevel(ids))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
        return cls(tokenizer)

    def __len__(self) -> int:
        return self.size

    def id(self, word: str) -> int:
        """The id of one word; UnknownWord, with near words, if there is none."""
        if word not in self._id:
            near = difflib.get_close_matches(word, self._id, n=4, cutoff=0.5)
            some = [self._word[i] for i in sorted(self._word) if i not in self._special][:8]
            hint = f"near it: {', '.join(near)}" if near else f"it has {', '.join(some)}, ..."
            raise UnknownWord(f"the vocabulary has no word {word!r}; {hint}")
        return self._id[word]

    def split(self, text: str) -> list[str]:
        """The words of a text, as the tokenizer's own normaliser and pre-tokenizer make them."""
        with library_faults(self.source):
            if self.tokenizer.normalizer is not None:
                text = self.tokenizer.normalizer.normalize_str(text)
            if self.tokenizer.pre_tokenizer is None:
                return text.split()
            return [word for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, one a word; special tokens are not words, and an empty text is refused."""
        ids = [self.id(word) for word in self.split(text)]
        if not ids:
            raise UnknownWord("the text is empty; a question needs at least one word")
        for i in ids:
            if i in self._special:
                raise UnknownWord(
                    f"{self._word[i]!r} is not a word of a question; leave it out, prompts add it themselves"
                )
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The words of `ids`, joined by spaces; special tokens are left out unless `skip_special` is false.

        An id without a word (a model may have more rows than the vocabulary has words) reads `<id 1234>`: it must not
        pass for nothing at all.
        """
        words = (self._word.get(i, f"<id {i}>") for i in map(int, ids) if not (skip_special and i in self._special))
        return " ".join(words)

    def save(self, path: str | pathlib.Path) -> None:
        """Write a `tokenizer.json`."""
        self.tokenizer.save(str(path))
