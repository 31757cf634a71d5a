"""Replies that reason first: the chat template's switch, a token budget for the reasoning, and the answer behind it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from hybridvlm.models.prompt import Message

OPEN, CLOSE = "<think>", "</think>"
_TAIL = 16  # tokens at the end of a prompt that an opening tag is looked for in
UNFINISHED = "ran out of thinking tokens"
# as models write them; an opening tag opens where a reply begins, and is a word like others behind that
_CLOSES = re.compile(r"<\s*/\s*think\s*>", re.IGNORECASE)
_OPENS = re.compile(r"\s*<\s*think\s*>", re.IGNORECASE)
_OPENED = re.compile(r"<\s*think\s*>\s*\Z", re.IGNORECASE)
_TAGS = re.compile(r"<\s*/?\s*think\s*>", re.IGNORECASE)


class Reply(NamedTuple):
    """A reply in its parts: text is the answer, thinking the reasoning before it; unfinished: the reasoning never ended, and
    there is no answer (text is then what was said, if it is not empty)."""

    text: str
    thinking: str = ""
    unfinished: bool = False


def split_reply(text: str, opened: bool = False) -> Reply:
    """A reply's text in its parts: the answer stands behind the last closing tag. An opening tag counts where a reply or the rest
    of it begins with it; further on it is a word.

    opened: the prompt ends in an opening tag, so that the reply begins inside the reasoning.
    """
    *_, close = None, *_CLOSES.finditer(text)
    before, rest = ("", text) if close is None else (text[: close.start()], text[close.end() :])
    if _OPENS.match(rest) or (opened and close is None):
        return Reply("", _bare(text), True)
    return Reply(text) if close is None else Reply(rest.lstrip(), _bare(before))


def _bare(text: str) -> str:
    """A text without tags."""
    return _TAGS.sub("", text).strip()


def read_reply(tokenizer: Any, ids: Sequence[int], opened: bool = False) -> Reply:
    """The parts of a reply's tokens: tags are known by their tokens too, which a decoder may leave out of the text."""
    if tokenizer is None:
        return Reply("")
    if not hasattr(tokenizer, "chat"):
        return Reply(tokenizer.decode(ids))
    ids = list(map(int, ids))
    close, open_ = tokenizer.encode(CLOSE), tokenizer.encode(OPEN)
    at = _last(ids, close)
    before, rest = ([], ids) if at is None else (ids[:at], ids[at + len(close) :])
    reply = split_reply(tokenizer.decode(rest), opened and at is None)
    # a tag that is no part of the text is no mention of one
    if reply.unfinished or (_last(rest, open_) is not None and not tokenizer.decode(open_)):
        whole = tokenizer.decode(ids)
        return Reply(whole, split_reply(whole, True).thinking, True)
    if at is None:
        return reply
    return Reply(reply.text.lstrip(), (split_reply(tokenizer.decode(before), True).thinking + reply.thinking).strip())


def _last(ids: Sequence[int], part: Sequence[int]) -> int | None:
    """Where `part` last begins in `ids`."""
    places = range(len(ids) - len(part), -1, -1)
    return next((i for i in places if list(ids[i : i + len(part)]) == list(part)), None) if part else None


def opens(tokenizer: Any, ids: np.ndarray) -> bool:
    """Whether a prompt ends in an opening tag: what is said next is reasoning."""
    if not hasattr(tokenizer, "chat"):
        return False
    return bool(_OPENED.search(tokenizer.decode(np.asarray(ids)[-_TAIL:].tolist(), skip_special=False)))


class Switch(NamedTuple):
    """What a prompt takes to turn reasoning on or off: variables of the chat template, or words in the system message."""

    options: Mapping[str, Any] | None = None
    words: str = ""

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation with the words in its system message."""
        if not self.words:
            return list(messages)
        if messages and messages[0]["role"] == "system":
            first, rest = messages[0]["content"], list(messages[1:])
            return [{"role": "system", "content": f"{first} {self.words}"}, *rest]
        return [{"role": "system", "content": self.words}, *messages]


def switch(model: Any, on: bool | None) -> Switch:
    """How this model's chat template is told to reason (None: as it does by itself).

    Templates know `enable_thinking`, or "/think" and "/no_think" in a system message, which they take out of it. ValueError for a
    model whose template knows neither.
    """
    if on is None:
        return Switch()
    if not hasattr(model.tokenizer, "chat"):
        raise ValueError(f"{model.name} knows no conversation and so no thinking; leave thinking at auto")

    def ids(option: Switch) -> list[int]:
        asked = option.messages([{"role": "user", "content": "?"}])
        return model.family.prompt(
            model.config, model.tokenizer, asked, [], style=model.style, template_options=option.options
        ).ids.tolist()

    by_variable = [Switch({"enable_thinking": value}) for value in (False, True)]
    if ids(by_variable[0]) != ids(by_variable[1]):
        return by_variable[on]
    by_words = [Switch(None, word) for word in ("/no_think", "/think")]
    told = [ids(option) for option in by_words]
    read = [
        word.words in model.tokenizer.decode(found, skip_special=False)
        for word, found in zip(by_words, told, strict=True)
    ]
    if told[0] != told[1] and not any(read):
        return by_words[on]
    raise ValueError(
        f"the chat template of {model.name} has no switch for thinking (enable_thinking, or /think and /no_think in a system "
        "message); leave thinking at auto"
    )


@dataclasses.dataclass(frozen=True)
class ThinkBudget:
    """The most tokens of reasoning, after which the closing tag is put; open, close: the tags' tokens."""

    tokens: int
    open: tuple[int, ...]
    close: tuple[int, ...]

    @property
    def decode_capacity(self) -> int:
        """The most tokens that a reply may have beside those of its answer."""
        return len(self.open) + self.tokens + len(self.close)


def think_budget(model: Any, tokens: int | None) -> ThinkBudget | None:
    """The budget of a model's tags; None for none. ValueError for a number below 0, or a model that knows no conversation."""
    if tokens is None:
        return None
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise ValueError(f"think_tokens must be a whole number of at least 0, got {tokens!r}")
    if not hasattr(model.tokenizer, "chat"):
        raise ValueError(f"{model.name} knows no conversation and so no thinking; leave think_tokens out")
    return ThinkBudget(tokens, tuple(model.tokenizer.encode(OPEN)), tuple(model.tokenizer.encode(CLOSE)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Thought:
    """Where the reasoning of each row stands: inside [B] bool; used, forced, said [B] int32, tokens of reasoning, of the closing
    tag that was put, and of the answer; window [B,W] int32, the last tokens."""

    inside: jax.Array
    used: jax.Array
    forced: jax.Array
    said: jax.Array
    window: jax.Array


def begin(budget: ThinkBudget, inside: jax.Array) -> Thought:
    """Before the first token: inside [B] bool, whether the prompt opened the reasoning."""
    none = jnp.zeros(inside.shape, jnp.int32)
    width = max(len(budget.open), len(budget.close))
    return Thought(inside, none, none, none, jnp.full((*inside.shape, width), -1, jnp.int32))


def think(
    budget: ThinkBudget, thought: Thought, token: jax.Array, stop: jax.Array
) -> tuple[jax.Array, Thought, jax.Array]:
    """The next token of each row [B], the closing tag's where the budget is used up; where things stand after it; and whether
    the reply ends with it, bool [B].

    stop [S] int32: tokens that end a reply; they do not count, and those of the closing tag are none.
    """
    close, open_ = (jnp.asarray(tag, jnp.int32) for tag in (budget.close, budget.open))
    force = thought.inside & (thought.used >= budget.tokens)
    token = jnp.where(force, close[jnp.minimum(thought.forced, len(budget.close) - 1)], token)
    ends = jnp.any(token[:, None] == stop, axis=1) & ~force
    window = jnp.concatenate([thought.window[:, 1:], token[:, None]], axis=1)
    closed = thought.inside & jnp.all(window[:, -len(budget.close) :] == close, axis=1)
    opened = ~thought.inside & jnp.all(window[:, -len(budget.open) :] == open_, axis=1)
    said = thought.said + (~thought.inside & ~ends)
    after = Thought(
        (thought.inside & ~closed) | opened,
        thought.used + (thought.inside & ~force & ~ends),
        jnp.where(closed, 0, thought.forced + force),
        jnp.where(opened, said - len(budget.open), said),  # the tag is no part of the answer
        window,
    )
    return token, after, ends
