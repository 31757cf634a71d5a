"""Answered questions out of files: runs of this library, and samples that lmms-eval logged."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from hybridvlm.eval.benchmarks import MODULES, published
from hybridvlm.eval.benchmarks.letters import ALPHABET
from hybridvlm.options import InputError

SHOWN = 8  # folders that a message names
_LMMS = re.compile(r"(?:\d{8}_\d{6}_)?samples_(\w+)\.jsonl$")
_OPTION = re.compile(r"^\(?([A-J])[.)]\s*(.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One question of a log.

    Attributes:
        task: our name of its task.
        method: of token reduction, "none" for dense; with its budget where there is one.
        key: what the same question has in other logs of the same kind.
        row: number of the question in its file.
        reply: what the model said; None where the question was not asked.
        gold: letter of the right option, or its text; None where that is not known.
        options: as far as the log tells.
        correct: as the log has it; None where it is left out of the score.
        groups: field -> values.
        cluster: the video, "" where the log does not tell it.
        kind: "ours" or "lmms-eval": whose log it is; keys of one say nothing of the other.
    """

    task: str
    method: str
    key: str
    row: str
    reply: str | None
    gold: str | None
    options: tuple[str, ...]
    correct: bool | None
    groups: Mapping[str, tuple[str, ...]]
    cluster: str = ""
    kind: str = "ours"


def lmms_names() -> dict[str, str]:
    """lmms-eval's names of tasks -> ours."""
    names: dict[str, str] = {}
    for name in MODULES:
        benchmark = published(name)
        if benchmark.lmms is not None:
            names.setdefault(benchmark.lmms[0], name)
            names.setdefault(benchmark.lmms_interleaved or benchmark.lmms[0], name)
    return names


def sample_files(path: Any) -> list[Any]:
    """The samples files of a folder, or the one file that a path is; InputError where there is none, or those of several runs.

    Of a folder of our results only our own, as the logs of lmms-eval that --format writes below hold the same answers.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    for where in ("", "**/"):
        if own := sorted({p for name in ("samples.jsonl", "samples-*.jsonl") for p in path.glob(where + name)}):
            _refuse_several(path, own)
            return own
    found = sorted(path.glob("**/*samples_*.jsonl"))
    if not found:
        raise InputError(f"{path}: no samples in it; give a folder of results, or a samples file (of lmms-eval too)")
    latest: dict[str, Any] = {}
    for file in found:  # of several stamps of one task in one folder the last one
        match = _LMMS.search(file.name)
        latest[f"{file.parent}/{match.group(1) if match else file.name}"] = file
    by_task: dict[str, list[Any]] = {}
    for name, file in latest.items():
        by_task.setdefault(name.rpartition("/")[2], []).append(file)
    for files in by_task.values():
        _refuse_several(path, files)
    return list(latest.values())


def _refuse_several(path: Any, files: Iterable[Any]) -> None:
    """InputError where files lie in more than one folder: answers of one run would stand for those of another."""
    folders = list(dict.fromkeys(str(file.parent) for file in files))
    if len(folders) > 1:
        named = ", ".join(folders[:SHOWN]) + (f" and {len(folders) - SHOWN} more" if len(folders) > SHOWN else "")
        raise InputError(f"{path} holds {len(folders)} runs: {named}; give the folder of one")


def read(path: Any) -> list[Answer]:
    """All answers of a run's folder, of a samples file, or of logs of lmms-eval; the latest of each question.

    Args:
        path: `pathlib.Path`, or of a store as `storage.as_path` gives it. A last line that a kill cut off is passed over.

    Raises:
        InputError: with file and line for what is none of these, and where there is no answer in it.
    """
    found: dict[tuple[str, str, str], Answer] = {}
    for file in sample_files(path):
        lmms, wrong = _LMMS.search(file.name), _counted_wrong(file.parent)
        # lines end at line feeds alone: texts may hold U+2028 and other separators as they are
        lines = file.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if number == len(lines) > 1:
                    continue
                raise InputError(f"{file}, line {number}: not JSON: {error}") from None
            try:
                answer = _from_lmms(lmms.group(1), row) if lmms and "doc_id" in row else _from_ours(row, wrong)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise InputError(
                    f"{file}, line {number}: no sample of this library or of lmms-eval: {error!r}"
                ) from None
            found[answer.task, answer.method, answer.key] = answer
    if not found:
        raise InputError(f"{path}: no answer in it yet")
    return list(found.values())


def _counted_wrong(folder: Any) -> set[str]:
    """Tasks of a run whose questions count as wrong where they could not be asked, as its results.json says."""
    try:
        tasks = json.loads((folder / "results.json").read_bytes())["tasks"]
        return {name for name, about in tasks.items() if about.get("missing", {}).get("rule") == "wrong"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _from_ours(row: Mapping[str, Any], wrong: Container[str]) -> Answer:
    dense = row["method"] == "none"
    groups = {name: _values(value) for name, value in row.get("groups", {}).items()}
    if row.get("type") and not groups:
        groups = {"type": (row["type"],)}
    return Answer(
        row["task"],
        "none" if dense else f"{row['method']}@{row['budget']:g}",
        row["id"],
        row["id"] if row["task"] == "mvbench" else str(row.get("row", row["id"])),
        row["prediction"],
        row["answer"] or None,
        tuple(row.get("options", ())),
        row["correct"] if "failure" not in row else False if row["task"] in wrong else None,
        groups,
        row.get("cluster") or row["video"],
    )


def _values(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


# fields of lmms-eval's payloads that are groups -> our names of them
_FIELDS = {
    "duration": "duration", "category": "domain", "sub_category": "sub_category", "task_category": "task_type",
    "duration_group": "duration_group", "question_category": "question_category", "task_type": "task",
}  # fmt: skip


def _from_lmms(name: str, row: Mapping[str, Any]) -> Answer:
    names = lmms_names()
    task, kind = names.get(name, name), ""
    if name.startswith("mvbench_"):
        task, kind = "mvbench", name.removeprefix("mvbench_")
    value = _payload(row)
    groups: dict[str, tuple[str, ...]] = {"task": (kind,)} if kind else {}
    correct: bool | None = None
    cluster = ""
    if isinstance(value, Mapping):
        groups |= {ours: _values(value[theirs]) for theirs, ours in _FIELDS.items() if theirs in value}
        cluster = str(value.get("videoID", ""))
        given = value.get("pred_answer", value.get("parsed_pred"))
        gold = value.get("answer", value.get("gt_answer"))
        if given is not None and gold is not None:
            correct = bool(gold) and str(given).lower() == str(gold).lower()
    elif isinstance(value, bool | int | float):
        correct = bool(value)
    replies = row.get("filtered_resps") or row["resps"]
    reply = replies[0]
    while isinstance(reply, list):
        reply = reply[0]
    number = str(row["doc_id"])
    key = f"{kind}-{number}" if kind else number
    gold = row.get("target")
    gold = ALPHABET[gold] if isinstance(gold, int) and not isinstance(gold, bool) else gold
    return Answer(
        task, "none", key, key, str(reply), None if gold is None else str(gold).strip(), _options(row.get("input")),
        correct, groups, cluster, "lmms-eval",
    )  # fmt: skip


_PLAIN = {
    *("doc_id", "target", "resps", "filtered_resps", "token_counts", "doc_hash", "input", "input_media", "submission"),
    *("doc", "arguments", "prompt_hash", "target_hash"),
}


def _payload(row: Mapping[str, Any]) -> Any:
    """What stands under the metric's name."""
    return next((value for name, value in row.items() if name not in _PLAIN), None)


def _options(text: Any) -> tuple[str, ...]:
    """Options out of a prompt: the last run of lines A, B, C, …"""
    if not isinstance(text, str):
        return ()
    options: list[str] = []
    for letter, option in _OPTION.findall(text):
        if letter == "A":
            options = [option]
        elif letter == ALPHABET[len(options)]:
            options.append(option)
    return tuple(options)


def only(answers: Iterable[Answer], method: str) -> list[Answer]:
    """The answers of one method; InputError names those there are."""
    answers = list(answers)
    methods = list(dict.fromkeys(answer.method for answer in answers))
    if method not in methods:
        raise InputError(f"no answers of {method!r}; there are {', '.join(methods)} (dense is none)")
    return [answer for answer in answers if answer.method == method]
