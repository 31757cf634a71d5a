"""How other harnesses read a reply, for a second column beside `letters.letter`.

Each follows the rule of the harness that its name says, mistakes included; where a harness then draws a letter at random
this gives None and `guesses` is True, so that a reader can add the share that the harness expects from guessing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from hybridvlm.eval.benchmarks.letters import ALPHABET, Parsed, letter

Rule = Callable[[str, Sequence[str]], str | None]


@dataclasses.dataclass(frozen=True)
class Parser:
    """A way to read replies.

    Attributes:
        name: as on the command line.
        rule: (reply, options) -> letter or None.
        guesses: whether the harness draws a letter at random where the rule gives none.
        accepts: (reply, options, gold letter) -> whether the harness counts the reply as right, where that is not a matter of
            equal letters.
    """

    name: str
    rule: Rule
    guesses: bool = False
    accepts: Callable[[str, Sequence[str], str], bool] | None = None

    def right(self, reply: str, options: Sequence[str], gold: str) -> bool:
        """Whether the harness counts a reply as right."""
        if self.accepts is not None:
            return self.accepts(reply, options, gold)
        return self.rule(reply, options) == gold


PREFIXES = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    *("The best option is", "The correct option is", "Best answer:", "Best option:"),
)
_OUTER = ",.!?;:'\""
_PHRASES = r"(?:answer is|answer:|answer|option is|choice is|答案是|答案|答えは|respuesta es|la réponse est)"


def lmms_mcq(reply: str, options: Sequence[str]) -> str | None:
    """The best class of places wins, in it the last place: start, end, after a phrase, (X), X., X:, X), X and a space, any."""
    text = reply.strip().strip(_OUTER).strip()
    classes = (
        r"\A\(?([A-D])(?![A-Za-z])",
        r"(?<![A-Za-z])([A-D])\)?\Z",
        rf"{_PHRASES}\s*:?\s*\(?([A-D])(?![A-Za-z])",
        r"\(([A-D])\)",
        r"([A-D])\.",
        r"([A-D]):",
        r"([A-D])\)",
        r"([A-D]) ",
        r"([A-D])",
    )
    for pattern in classes:
        if found := re.findall(pattern, text):
            return found[-1]
    return None


def _first_capital(reply: str, prefixes: Sequence[str], letters: str) -> str | None:
    text = reply.strip()
    for prefix in prefixes:
        text = text.replace(prefix, "")
    found = re.search(f"[{letters}]", text)
    return found.group() if found else None


def vk_regex(reply: str, options: Sequence[str]) -> str | None:
    """The first capital A to D anywhere, after six prefixes; A to E where a question has five options."""
    prefixes = (*PREFIXES[:4], "Answer:", "Option:")  # of the others two commas are missing, so that none ever matches
    return _first_capital(reply, prefixes, "ABCDE" if len(options) > 4 else "ABCD")


def vk_infer(reply: str, options: Sequence[str]) -> str | None:
    """The only option letter that is a word of its own, else the only option text in the reply."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", reply).split()
    found = [x for x in ALPHABET[: len(options)] if x in words]
    if len(found) == 1 and not (found == ["A"] and len(words) > 3):  # an A in a sentence may be an article
        return found[0]
    if found:
        return None
    texts = [i for i, option in enumerate(options) if option.lower() in reply.lower()]
    return ALPHABET[texts[0]] if len(texts) == 1 else None


def lmms_lvb(reply: str, options: Sequence[str]) -> str | None:
    """The first capital A to E anywhere, after eight prefixes; else the harness guesses."""
    return _first_capital(reply, PREFIXES, "ABCDE")


def _mmmu(reply: str, options: Sequence[str], last: bool) -> str | None:
    """`(X)`, else `X ` and `X.`, else an option's text in a longer reply; of several by the last place of each."""
    text = f" {reply.strip(_OUTER)} "
    places = {x: text.rfind(f"({x})") for x in ALPHABET[:5]}
    if max(places.values()) < 0:
        places = {x: max(text.rfind(f"{x} "), text.rfind(f"{x}.")) for x in ALPHABET[:5]}
    if max(places.values()) < 0 and len(text.split()) > 5:
        places = {ALPHABET[i]: text.lower().rfind(option.lower()) for i, option in enumerate(options)}
    found = {x: place for x, place in places.items() if place >= 0}
    return (max if last else min)(found, key=lambda x: found[x]) if found else None


def lmms_mvb(reply: str, options: Sequence[str]) -> str | None:
    """`X.` at the start, else the first lone A to E of either case."""
    found = re.match(r"([A-E])\.", reply) or re.search(r"\b([A-E])\b", reply, re.IGNORECASE)
    return found.group(1).upper() if found else None


def mvb_official(reply: str, options: Sequence[str], gold: str) -> bool:
    """MVBench's notebook: the first word with a bracket before it, in "(x)" or the reverse; "" and "(" fit every answer."""
    text = reply.strip()
    line = (text if text.startswith("(") else f"({text}").split("\n")[0]
    word, answer = line.split(" ")[0].lower(), f"({gold.lower()})"
    return word in answer or answer in word or word.replace(".", "") in answer


def mlvu_official(reply: str, options: Sequence[str]) -> str | None:
    """The character before the first bracket, else the whole reply has to be a letter."""
    before, bracket, _ = reply.partition(")")
    return before[-1:] or None if bracket else reply.strip() if reply.strip() in ALPHABET[: len(options)] else None


def lvbench_official(reply: str, options: Sequence[str]) -> str | None:
    """The first character of the first word before ")" and after "("; its case is not looked at."""
    words = reply.partition(")")[0].rpartition("(")[2].split()
    return words[0][0] if words else None


def vamba(reply: str, options: Sequence[str]) -> str | None:
    """The first letter of the alphabet after "the answer is", "answer:" or "the option is "."""
    text = reply.lower()
    for phrase in ("the answer is", "answer:", "the option is "):
        text = text.split(phrase)[-1]
    found = re.search("[a-z]", text)
    return found.group().upper() if found else None


def tempcompass(reply: str, options: Sequence[str]) -> str | None:
    """The reply is a letter, "X. text" as the question has it, or begins with `X.` or `X)`."""
    text = reply.strip()
    found = re.match(r"([A-Z])(?:[.)]|\Z)", text)
    if found and found.group(1) in ALPHABET[: len(options)]:
        return found.group(1)
    return None


PARSERS = {
    parser.name: parser
    for parser in (
        Parser("letter", lambda reply, options: letter(reply, options).letter),
        Parser("lmms.mcq", lmms_mcq),
        Parser("vk.regex", vk_regex),
        Parser("vk.infer", vk_infer),
        Parser("lmms.lvb", lmms_lvb, guesses=True),
        Parser("lmms.ego", lambda reply, options: _mmmu(reply, options, last=False), guesses=True),
        Parser("lmms.nextqa", lambda reply, options: _mmmu(reply, options, last=True), guesses=True),
        Parser("lmms.mvb", lmms_mvb),
        Parser("mvb.off", lambda reply, options: letter(reply, options).letter, accepts=mvb_official),
        Parser("mlvu.off", mlvu_official),
        Parser("lvbench.off", lvbench_official),
        Parser("vamba", vamba),
        Parser("tempcompass.off", tempcompass),
    )
}


def parse(name: str, reply: str, options: Sequence[str]) -> Parsed:
    """A reply's letter by the parser of a name."""
    if name == "letter":
        return letter(reply, options)
    found = PARSERS[name].rule(reply, options)
    return Parsed(found, name if found else "none")
