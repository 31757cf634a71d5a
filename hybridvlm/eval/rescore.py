"""Replies of a run, or of a log of lmms-eval, parsed and scored again: how much of a number is parsing. No model is needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hybridvlm.eval.benchmarks import letters, metrics
from hybridvlm.eval.logs import Answer, read
from hybridvlm.storage import as_path


def rescored(answers: Sequence[Answer]) -> dict[str, Any]:
    """Accuracy as the log has it and by the parser `letter`, over the same questions.

    Args:
        answers: of one task and method.

    Returns:
        n, recorded, letter, unparsed, replies (`metrics.replies`), changed: keys whose score is another.
    """
    counted = [a for a in answers if a.correct is not None and a.gold and (a.options or len(a.gold) == 1)]
    recorded, ours, changed, spread = 0, 0, [], []
    for answer in counted:
        options = answer.options or tuple(letters.ALPHABET[:5])  # a log without options: letters alone can be read
        parsed = None if answer.reply is None else letters.letter(answer.reply, options)
        right = parsed is not None and parsed.letter is not None and _right(parsed.letter, answer, options)
        recorded += bool(answer.correct)
        ours += right
        if right != answer.correct:
            changed.append(answer.key)
        spread.append(metrics.Answered({}, right, parsed.letter if parsed else None, answer.reply))
    n = len(counted)
    return {
        "n": n,
        "left_out": len(answers) - n,
        "recorded": recorded / n if n else None,
        "letter": ours / n if n else None,
        "replies": metrics.replies(spread),
        "changed": changed,
    }


def _right(letter: str, answer: Answer, options: Sequence[str]) -> bool:
    gold = answer.gold or ""
    text = letters.same_text(options[letters.ALPHABET.index(letter)])
    if len(gold) == 1 and gold in letters.ALPHABET[: len(options)]:
        return letter == gold or text == letters.same_text(options[letters.ALPHABET.index(gold)])
    return text == letters.same_text(gold)


def report(path: str | os.PathLike[str]) -> str:
    """A line per task and method of a samples file or folder, of a store too; InputError where it holds none."""
    answers = read(as_path(path))
    lines = [f"parser {letters.VERSION}; accuracy in percent, as the log has it and by this parser"]
    for task, method in dict.fromkeys((a.task, a.method) for a in answers):
        found = rescored([a for a in answers if (a.task, a.method) == (task, method)])
        name = f"{task} {'dense' if method == 'none' else method}"
        if not found["n"]:
            lines.append(f"{name}: none of {found['left_out']:,} questions has options and a published answer")
            continue
        spread = found["replies"]
        unparsed = "" if spread["unparsed"] is None else f", {spread['unparsed']:.1%} of replies without a letter"
        left_out = f", {found['left_out']:,} more left out (not scored, or no options)" if found["left_out"] else ""
        lines.append(
            f"{name}: {100 * found['recorded']:.2f} -> {100 * found['letter']:.2f} over {found['n']:,} questions, "
            f"{len(found['changed'])} changed{unparsed}{left_out}"
        )
        lines += [f"  warning: {line}" for line in metrics.warnings(spread)]
        if found["changed"]:
            lines.append(
                f"  changed: {', '.join(found['changed'][:10])}" + (", …" if len(found["changed"]) > 10 else "")
            )
    return "\n".join(lines)
