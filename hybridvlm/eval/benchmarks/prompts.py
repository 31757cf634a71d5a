"""The sentences of the benchmarks' and harnesses' prompts, byte for byte, and the pieces they are put together from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

from hybridvlm.eval.benchmarks.definition import PromptFn, Question
from hybridvlm.eval.benchmarks.letters import ALPHABET

_SELECT = "Select the best answer to the following multiple-choice question based on the video{also}."
_RESPOND = "Respond with only the letter ({letters}) of the correct option."
LMMS = "75571cf"
VLMEVALKIT = "e8e78f0"
VAMBA = "4464145"

LETTER = "Answer with the option's letter from the given choices directly."
SUBTITLES = "This video's subtitles are listed below:"
MLVU_SYSTEM = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, select the best option that "
    "accurately addresses the question."
)
MVBENCH_SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of objects, "
    "and the action and pose of persons. Based on your observations, select the best option that accurately addresses the "
    "question.\n"
)


def select(letters: str = "A, B, C, or D", also: str = "", between: str = " ") -> str:
    """The sentence "Select the best answer …", with what it names beside the video and what stands before "Respond"."""
    return _SELECT.format(also=also) + between + _RESPOND.format(letters=letters)


SELECT_4 = select()
SELECT_5 = select("A, B, C, D, or E")
SELECT_SUBTITLES = select(also=" and the subtitles")
SELECT_TWO_LINES = select(between="\n")


def dotted_list(options: Sequence[str]) -> list[str]:
    """Options as "A. text"."""
    return [f"{ALPHABET[i]}. {option}" for i, option in enumerate(options)]


def dotted(options: Sequence[str]) -> str:
    """Options as lines "A. text", with no line break after the last."""
    return "\n".join(dotted_list(options))


def bracketed(options: Sequence[str]) -> str:
    """Options as lines "(A) text", with no line break after the last."""
    return "\n".join(f"({ALPHABET[i]}) {option}" for i, option in enumerate(options))


def form(template: str) -> PromptFn:
    """A prompt from a template.

    Args:
        template: may name {Q} (question), {O.} and {O)} (options by `dotted` and `bracketed`), {P} (the question as the file
            has it, with its options), {S} (subtitles). A part between ⟦ and ⟧ stands only where there are subtitles.
    """

    def prompt(question: Question, subtitles: str) -> str:
        head, _, rest = template.partition("⟦")
        within, _, tail = rest.partition("⟧")
        text = head + (within if subtitles else "") + tail
        values = {
            "{O.}": dotted(question.options),
            "{O)}": bracketed(question.options),
            "{P}": question.published or f"{question.question}\n{bracketed(question.options)}",
            "{Q}": question.question,
            "{S}": subtitles,
        }
        return fill(text, values)

    return prompt


def fill(template: str, values: dict[str, str]) -> str:
    """A template with its names replaced, once: what is filled in is never looked at again."""
    out, at = [], 0
    while at < len(template):
        name = next((name for name in values if template.startswith(name, at)), None)
        out.append(template[at] if name is None else values[name])
        at += 1 if name is None else len(name)
    return "".join(out)


def digest(prompts: Iterable[tuple[str, str, str, str]]) -> str:
    """A hash of all prompts of a task: (id, system text, user text, assistant prefix) of each question, in any order."""
    return hashlib.sha256(json.dumps(sorted(prompts)).encode()).hexdigest()[:12]
