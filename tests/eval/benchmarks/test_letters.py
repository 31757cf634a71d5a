"""Replies to letters: the 24 replies of the table, hard cases, and laws."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridvlm.eval.benchmarks.letters import ALPHABET, letter
from hybridvlm.eval.benchmarks.parity import PARSERS, parse

OPTIONS = ("red", "Blue", "green", "yellow")
COLUMNS = [
    "lmms.mcq",
    "vk.regex",
    "vk.infer",
    "lmms.lvb",
    "lmms.ego",
    "lmms.nextqa",
    "lmms.mvb",
    "lvbench.off",
    "vamba",
    "letter",
]
# reply | each parser's letter: - for none, R where its harness then draws one at random; the last column is ours
TABLE = r"""
A                                   | A A A A A A A A A | A
b                                   | - - - R R R B b B | B
B) Blue                             | B B B B R R B B B | B
The answer is D                     | D D D D D D D T D | D
Answer: C                           | C C C A C C C A C | C
The best answer is: B               | B B B B B B B T T | B
**D**                               | D D D D R R D * D | D
I think it is C because A is wrong. | A C - C C A C I I | C
A man opens the door.               | A A - A A A A A A | -
Based on the video, none.           | B B - B R R - B B | -
                                    | - - - R R R - - - | -
None of the above                   | - - - R R R - N N | -
C: the cat                          | C C C C R R C C C | C
It shows Elephants and Birds        | B B - E R R - I I | -
a)                                  | - - - R R R A a A | A
F                                   | - - - R R R - F F | -
(E)                                 | - - - E E E E E E | -
Cannot determine                    | C C - C R R - C C | -
<think>maybe A</think>\nB           | B A B A B B A < T | B
B\n\nExplanation: A is not shown    | B B - B A A B B B | B
Best option: (C) red                | C B C C C C C C B | C
A, B                                | A A - A B B A A A | -
D. A book                           | D D - D D A D D D | D
The correct option is E.            | - - - E E E E T T | -
"""
ROWS = [line.split(" | ") for line in TABLE.strip("\n").splitlines()]


@pytest.mark.parametrize(("reply", "harnesses", "ours"), ROWS, ids=[row[0].strip() or "empty" for row in ROWS])
def test_the_table_of_replies(reply, harnesses, ours):
    reply = reply.strip().replace(r"\n", "\n")
    for name, wanted in zip(COLUMNS, [*harnesses.split(), ours.strip()], strict=True):
        found = PARSERS[name].rule(reply, OPTIONS)
        assert (found or ("R" if PARSERS[name].guesses else "-")) == wanted, name


@pytest.mark.parametrize(
    ("reply", "options", "found", "how"),
    [
        ("C", ("red", "green"), None, "no such letter"),
        ("A", ("C", "A", "B"), "A", "first"),  # a bare letter is never matched as a text
        ("A.", ("C", "A", "B"), "A", "first"),
        ("green", ("red", "green", "green"), "B", "text"),
        ("'Green.'", ("red", "green"), "B", "text"),
        ("B) red", OPTIONS, None, "letter and text disagree"),
        ("(B", OPTIONS, "B", "first"),
        ("B. It is blue, as one sees.", OPTIONS, "B", "first"),
        ("So the answer is A. No, the answer is B.", OPTIONS, "B", "named"),
        ("the answer is A dog", OPTIONS, None, "none"),
        ("It is A because of the hat", OPTIONS, "A", "lone"),
        ("the answer is A because it moves", OPTIONS, "A", "named"),
        ("either C or D", OPTIONS, None, "several"),
        (r"So \boxed{C}", OPTIONS, "C", "first"),
        (r"So \boxed{\text{C}}", OPTIONS, "C", "first"),
        ("<think>A or B", OPTIONS, None, "thinking not closed"),
        ("<think>A</think> ", OPTIONS, None, "empty"),
        (" \n ", OPTIONS, None, "empty"),
        ("(", OPTIONS, None, "none"),
        ("`B`", OPTIONS, "B", "first"),
        ("D", tuple("abcd"), "D", "first"),
        ("I", tuple("abcdefghi"), "I", "first"),
    ],
)
def test_our_steps(reply, options, found, how):
    assert letter(reply, options) == (found, how)


def test_nothing_but_the_notebook_takes_empty_replies():
    """MVBench's own check is fooled by "" and "(", and is named for it; no other parser is."""
    for reply in ("", "   ", "("):
        assert letter(reply, OPTIONS).letter is None
        for gold in "ABCD":
            assert PARSERS["mvb.off"].right(reply, OPTIONS, gold)
            assert not any(p.right(reply, OPTIONS, gold) for name, p in PARSERS.items() if name != "mvb.off")
    assert PARSERS["mvb.off"].right("B) Blue", OPTIONS, "B") and not PARSERS["mvb.off"].right("B) Blue", OPTIONS, "A")


def test_the_official_letter_of_twins():
    """MLVU's own check takes the letter alone."""
    options = ("red", "green", "green", "yellow")
    assert not PARSERS["mlvu.off"].right("B", options, "C") and PARSERS["mlvu.off"].right("C", options, "C")
    assert PARSERS["mlvu.off"].right("C) green", options, "C") and not PARSERS["mlvu.off"].right("green", options, "C")


@settings(max_examples=60)
@given(st.text(max_size=40), st.integers(2, 10))
def test_only_letters_of_the_options_come_out(reply, count):
    options = tuple(f"option {x}" for x in ALPHABET[:count])
    found = letter(reply, options)
    assert found.letter is None or found.letter in ALPHABET[:count]
    assert found == letter(reply, options)
    for name in PARSERS:
        parse(name, reply, options)


@settings(max_examples=30)
@given(st.integers(2, 8), st.data())
def test_every_plain_form_of_a_letter_is_read(count, data):
    options = tuple(f"option number {i}" for i in range(count))
    place = data.draw(st.integers(0, count - 1))
    x = ALPHABET[place]
    forms = (
        x,
        x.lower(),
        f"({x})",
        f"{x})",
        f"{x}.",
        f"{x}:",
        f"{x}. {options[place]}",
        options[place],
        f"The answer is {x}.",
    )
    for form in forms:
        assert letter(form, options).letter == x, form
