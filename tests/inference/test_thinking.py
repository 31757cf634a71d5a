"""Replies that reason first: read after the tag, switched by the template, and held to a budget."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from hybridvlm.checkpoints.samples import byte_tokenizer
from hybridvlm.eval.tasks import parse_choice, parse_open
from hybridvlm.inference.sampling import Sampling, decode
from hybridvlm.inference.thinking import Reply, ThinkBudget, opens, read_reply, split_reply
from hybridvlm.tokenizers.published import PublishedTokenizer

OPTIONS = ("cat", "dog")


@pytest.mark.parametrize(
    ("reply", "choice", "text"),
    [
        ("It barks, so not a cat.\n</think>\n\nB", "dog", "B"),
        ("<think>A</think>B", "dog", "B"),
        ("<think>a</think>A<think>b</think> (B)", "dog", "(B)"),
        ("<think>\nIt is A", None, None),
        ("<think>A</think>", None, None),
        ("<think>A</think>\n<think>B", None, None),
        ("<THINK>a</THINK>B", "dog", "B"),
        ("a</think >B", "dog", "B"),
        ("< think>a< /Think >\n(B)", "dog", "(B)"),
        (" <Think>\nIt is A", None, None),
        ("Write <think> in front.", None, "Write <think> in front."),
        ("<think>a</think>Write <think>.", None, "Write <think>."),
        ("A", "cat", "A"),
    ],
)
def test_an_answer_stands_behind_the_last_closing_tag(reply, choice, text):
    assert parse_choice(reply, OPTIONS) == choice
    assert parse_open(reply) == text


def test_a_reply_in_its_parts():
    assert split_reply("x</think>\ny", opened=True) == Reply("y", "x")
    assert split_reply("x and y", opened=True) == Reply("", "x and y", True)
    assert split_reply(" x and y") == Reply(" x and y")
    assert split_reply("a <think> b") == Reply("a <think> b")
    assert split_reply("a <think> b", opened=True) == Reply("", "a  b", True)


@pytest.mark.parametrize("kind", ["nemotron", "qwen"])
def test_tags_are_known_by_their_tokens(kind):
    """Nemotron's tags are special tokens, which are left out of the text; the other tokenizer spells them in bytes."""
    tokenizer = PublishedTokenizer(byte_tokenizer(kind))
    ids = tokenizer.encode("hm</think>\nB")
    assert read_reply(tokenizer, ids, opened=True) == Reply("B", "hm")
    assert read_reply(tokenizer, tokenizer.encode("<think>hm</think>B")) == Reply("B", "hm")
    assert read_reply(tokenizer, tokenizer.encode("<think>hm"))[1:] == ("hm", True)
    assert read_reply(tokenizer, tokenizer.encode("hm"), opened=True) == Reply("hm", "hm", True)
    assert read_reply(tokenizer, tokenizer.encode("B.")) == Reply("B.")
    assert read_reply(tokenizer, tokenizer.encode("hm</THINK >\nB"), opened=True) == Reply("B", "hm")
    assert read_reply(tokenizer, tokenizer.encode("<think>hm</think>B<think>hm")).unfinished == (kind == "nemotron")
    assert opens(tokenizer, np.asarray(tokenizer.encode("Assistant\n<think>\n")))
    assert opens(tokenizer, np.asarray(tokenizer.encode("Assistant\n<Think >\n")))
    assert not opens(tokenizer, np.asarray(tokenizer.encode("Assistant\n<think></think>")))


# -- the budget, in the decode loop: a model that says what a table tells it --

OPEN, CLOSE, STOP, PAD = (20, 21), (22, 23), 30, 0


class Scripted:
    """A family whose next token depends on the last one alone: `follow` [V]."""

    def __init__(self, follow):
        self.follow = jnp.asarray(follow)

    def make_decode_step(self, params, config):
        def step(token, caches):
            return 9.0 * (jnp.arange(40)[None] == self.follow[token][:, None]), caches + 1

        return step


def said(first, inside, *, tokens, answer=3, pieces=(64,), follow=None):
    table = np.arange(1, 41) % 10 + 10  # 10 to 19 in turn
    for last, after in (follow or {}).items():
        table[last] = after
    config = types.SimpleNamespace(eos_ids=(STOP,), pad_id=PAD)
    budget = ThinkBudget(tokens, OPEN, CLOSE)
    out, state = [[] for _ in first], None
    for piece in pieces:
        logits = 9.0 * (jnp.arange(40)[None] == jnp.asarray(first)[:, None]) if state is None else None
        new, lengths, state = decode(
            {}, config, logits, jnp.int32(0) if state is None else state, jnp.zeros(len(first), jnp.int32),
            max_new=piece, sampling=Sampling(), limit=jnp.int32(answer), family=Scripted(table), budget=budget,
            inside=jnp.asarray(inside),
        )  # fmt: skip
        out = [row + more[:n].tolist() for row, more, n in zip(out, np.asarray(new), np.asarray(lengths), strict=True)]
        if state.done.all():
            break
    return out


@pytest.mark.parametrize("pieces", [(64,), (1,) * 64, (3,) * 30])
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_reasoning_is_ended_at_its_budget_and_the_answer_has_its_own(tokens, pieces):
    inside, plain = said([10, 10], [True, False], tokens=tokens, pieces=pieces)
    thought = [10, 11, 12, 13][:tokens]
    assert inside == [*thought, *CLOSE, 14, 15, 16]  # 23 is followed by 14
    assert plain == [10, 11, 12]


@pytest.mark.parametrize("pieces", [(64,), (2,) * 40])
def test_reasoning_that_ends_by_itself_is_left_alone(pieces):
    follow = {11: CLOSE[0], CLOSE[0]: CLOSE[1]}
    assert said([10], [True], tokens=9, follow=follow, pieces=pieces) == [[10, 11, *CLOSE, 14, 15, 16]]


def test_reasoning_that_the_model_opens_counts_too():
    follow = {OPEN[0]: OPEN[1], OPEN[1]: 10}
    assert said([OPEN[0]], [False], tokens=2, follow=follow) == [[*OPEN, 10, 11, *CLOSE, 14, 15, 16]]


def test_a_stop_token_ends_a_reply_inside_and_behind_the_reasoning():
    assert said([10, 14], [True, True], tokens=5, follow={12: STOP}) == [
        [10, 11, 12],
        [14, 15, 16, 17, 18, *CLOSE, 14, 15, 16],
    ]
    assert said([10], [True], tokens=1, follow={14: STOP}) == [[10, *CLOSE, 14]]
    assert said([10, 11], [True, False], tokens=1, answer=1) == [[10, *CLOSE, 14], [11]]
