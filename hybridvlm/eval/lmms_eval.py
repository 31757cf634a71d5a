"""lmms-eval's result files: written from our records, so that both open side by side.

Metrics stand under lmms-eval's names and scales and are computed by its parser; ours are beside them under "hybridvlm". What
is not known here (hashes of its documents, its versions) is left out.
"""

from __future__ import annotations

import json
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybridvlm.eval.benchmarks import metrics, parity
from hybridvlm.eval.benchmarks.definition import Benchmark, Question
from hybridvlm.eval.results import Record, write_atomic
from hybridvlm.eval.tasks import Task
from hybridvlm.eval.tasks.benchmark import BenchmarkTask
from hybridvlm.storage import make_folder

FORM = "%Y%m%d_%H%M%S"


def write(
    folder: pathlib.Path,
    model: str,
    tasks: Sequence[Task],
    records: Callable[[Task], Mapping[str, Record]],
    command: str,
) -> list[pathlib.Path]:
    """Write `<stamp>_results.json` and a `<stamp>_samples_<task>.jsonl` per task, of the dense row.

    Args:
        folder: the model's folder is made in it.
        model: name of the model.
        tasks: of these the published benchmarks that lmms-eval has.
        records: the dense records of a task by sample id.
        command: that made them.

    Returns:
        The files.
    """
    home = folder / re.sub(r"[^\w.-]", "__", model)
    make_folder(home)
    stamp = time.strftime(FORM)
    results: dict[str, Any] = {}
    counts: dict[str, dict[str, int]] = {}
    written = []
    for task in tasks:
        if not isinstance(task, BenchmarkTask) or task.benchmark.lmms is None or task.dense_only:
            continue
        own = records(task)
        for name, questions in _tasks(task).items():
            lines = [_line(task, q, own[q.id]) for q in questions if own[q.id].get("prediction") is not None]
            if not lines:
                continue
            path = home / f"{stamp}_samples_{name}.jsonl"
            write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            written.append(path)
            results[name] = _result(task.benchmark, name, questions, own)
            counts[name] = {"original": len(task.listed), "effective": len(lines)}
    whole = {
        "results": results,
        "n-samples": counts,
        "config": {"model": model, "resolved_cli_args": command},
        "model_name": model,
        "date": time.time(),
    }
    path = home / f"{stamp}_results.json"
    write_atomic(path, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return [path, *written]


def _tasks(task: BenchmarkTask) -> dict[str, list[Question]]:
    """Questions by lmms-eval's name of their task; MVBench is one task per kind there."""
    assert task.benchmark.lmms is not None
    name = (task.protocol.interleaved and task.benchmark.lmms_interleaved) or task.benchmark.lmms[0]
    out: dict[str, list[Question]] = {}
    for sample in task.samples:
        question = task.questions[sample.id]
        out.setdefault(f"{name}_{question.groups['task']}" if name == "mvbench" else name, []).append(question)
    return out


def _rule(benchmark: Benchmark) -> parity.Parser:
    return parity.PARSERS[next((p.parser for p in benchmark.protocols if p.name == "lmms-eval"), "letter")]


def _result(
    benchmark: Benchmark, name: str, questions: Sequence[Question], records: Mapping[str, Record]
) -> dict[str, Any]:
    assert benchmark.lmms is not None
    _, metric, scale = benchmark.lmms
    rule = _rule(benchmark)
    scored = [
        q for q in questions if records[q.id]["correct"] is not None and records[q.id].get("prediction") is not None
    ]

    def score(right: Callable[[Question], bool]) -> float | None:
        answers = [metrics.Answered(q.groups, right(q), None, None) for q in scored]
        value = metrics.scores(benchmark, answers)["value"]
        return None if value is None else scale * value

    theirs = score(lambda q: q.answer is not None and rule.right(records[q.id]["prediction"], q.options, q.answer))
    ours = score(lambda q: bool(records[q.id]["correct"]))
    return {
        "alias": name,
        f"{metric},none": theirs,
        f"{metric}_stderr,none": "N/A",
        "samples": len(scored),
        "hybridvlm": {"parser": "letter", metric: ours},
    }


def _line(task: BenchmarkTask, question: Question, record: Record) -> dict[str, Any]:
    assert task.benchmark.lmms is not None
    reply = record["prediction"]
    found = _rule(task.benchmark).rule(reply, question.options) or ""
    sample = next(s for s in task.samples if s.id == question.id)
    return {
        "doc_id": question.row,
        "target": gold(question),
        "filtered_resps": [reply],
        "input": task.prompt(sample),
        task.benchmark.lmms[1]: payload(task.benchmark.name, question, found, reply),
    }


def gold(question: Question) -> str | None:
    """The right letter; "" where the answer is no option, None where it is not published."""
    return question.answer or ("" if question.remark else None)


def payload(name: str, q: Question, found: str, reply: str) -> Any:
    """What lmms-eval writes under its metric's name for one question.

    Args:
        name: of our task.
        q: the question.
        found: the letter that its parser gives, "" for none.
        reply: what the model said.
    """
    answer = gold(q)
    right = bool(answer) and found == answer
    if name.startswith("videomme"):
        return {
            "question_id": q.id, "duration": q.groups["duration"], "category": q.groups["domain"],
            "sub_category": q.groups["sub_category"], "task_category": q.groups["task_type"], "pred_answer": found,
            "answer": answer, "score": int(right), "videoID": q.video,
        }  # fmt: skip
    if name == "longvideobench":
        return {
            "id": q.id, "duration_group": int(str(q.groups["duration_group"])), "parsed_pred": found, "answer": answer,
            "question_category": q.groups["question_category"],
        }  # fmt: skip
    if name.startswith("mlvu"):
        return {"question_id": q.published, "task_type": q.groups["task"], "pred_answer": found, "answer": answer}
    if name == "mvbench":
        return {"pred_answer": found, "gt_answer": answer, "score": int(right)}
    if name in ("longvideobench-test", "egoschema"):
        return {q.id: reply}
    return right
