"""LVBench: 1,549 questions on 103 videos of about an hour, four options, several types a question."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hybridvlm.eval.benchmarks import prompts
from hybridvlm.eval.benchmarks.definition import Benchmark, Protocol, Question
from hybridvlm.eval.benchmarks.layout import Found, Marker
from hybridvlm.eval.benchmarks.metrics import values_of
from hybridvlm.eval.benchmarks.tables import Fields, rows, split_options

MARKERS = (
    Marker("data/video_info.meta.jsonl", "official"),
    Marker("video_info.meta.jsonl", "official"),
    Marker("data/train-*.parquet", "parquet", ("uid", "key", "question_type", "video_path")),
    Marker("*/train-*.parquet", "parquet", ("uid", "key", "question_type", "video_path")),
    Marker("lvbench_processed.jsonl", "flat"),
)
FOLDERS = ("videos", "video", "all_videos", "lvbench/all_videos", "lvbench", "lvbench/videos", "")
TYPES = {
    "key information retrieval": "KIR", "event understanding": "EU", "summarization": "Sum", "entity recognition": "ER",
    "reasoning": "Rea", "temporal grounding": "TG",
}  # fmt: skip


def load(found: Found) -> list[Question]:
    """Questions of the official file (a line per video), of the hub's copy, or of the flat file (no uid: the line's number)."""
    shards = _shards(found)
    questions: list[Question] = []
    for number, row in enumerate(rows(found.marker)):
        fields = Fields(row, found.marker, number)
        if found.kind == "official":
            asked = [Fields(item, found.marker, number) for item in fields.items("qa")]
        else:
            asked = [fields]
        if found.kind == "flat":
            video, kind = pathlib.PurePosixPath(fields.text("file_path")).stem, None
        else:
            video, kind = fields.text("key"), fields.text("type")
        for item in asked:
            published = item.text("question")
            question, options = split_options(published, "(A)")
            answer, remark = item.lettered("answer", len(options))
            labels = tuple(item.texts("question_type"))
            questions.append(
                Question(
                    id=str(number) if found.kind == "flat" else item.text("uid"),
                    video=video,
                    file=shards.get(video) or found.file(video, FOLDERS),
                    question=question,
                    options=item.choices("question", options),
                    answer=answer,
                    remark=remark,
                    groups={"question_type": labels} | ({"type": kind} if kind else {}),
                    row=len(questions),
                    published=published,
                )
            )
    return questions


def _shards(found: Found) -> dict[str, pathlib.Path]:
    """Videos as the downloader numbers them, by the id in the `url` of the JSON file beside each."""
    videos: dict[str, pathlib.Path] = {}
    for base in found.bases():
        for sidecar in sorted(base.glob("videos/[0-9]*/*.json")):
            try:
                told = json.loads(sidecar.read_text(encoding="utf-8"))
                url, status = str(told["url"]), told.get("status", "success")
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
            match = re.search(r"[?&]v=([\w-]+)", url)
            video = sidecar.with_suffix(".mp4")
            if status == "success" and video.is_file():
                videos.setdefault(match.group(1) if match else url.rstrip("/").rpartition("/")[2], video)
    return videos


_QWEN = (
    f"{prompts.MVBENCH_SYSTEM}Question: {{Q}}\nOptions:\n{{O)}}\n"
    "Answer with the option's letter from the given choices directly and only give the best option."
)
PROTOCOLS = (
    Protocol(
        "lmms-eval", prompts.LMMS, prompts.form("{P}\nAnswer the question with the option letter"),
        rule="linspace", frames=32, parser="lmms.mcq",
    ),
    Protocol(
        "qwen", "2025", prompts.form(_QWEN),
        rule="qwen:2", frames=768, parser="lmms.mcq", note="the prompt's last sentence is not published; this is a likely one",
    ),
    Protocol(
        "vamba", prompts.VAMBA, prompts.form(f"{prompts.SELECT_TWO_LINES}\n{{P}}"),
        rule="vamba", frames=1024, parser="vamba",
    ),
)  # fmt: skip


def board(
    questions: Sequence[Question], letters: Mapping[str, str | None], replies: Mapping[str, str]
) -> dict[str, Any]:
    """The accuracy in percent that the leaderboard takes, over all questions, and the replies by uid for the official script."""
    right = {q.id: q.answer is not None and letters.get(q.id) == q.answer for q in questions}
    table: dict[str, float] = {}
    for kind, short in TYPES.items():
        own = [right[q.id] for q in questions if kind in values_of(q.groups["question_type"])]
        if own:
            table[short] = 100 * sum(own) / len(own)
    table["Overall"] = 100 * sum(right.values()) / len(right)
    return {"lvbench_board.json": table, "lvbench_replies.json": {q.id: replies.get(q.id, "") for q in questions}}


BENCHMARKS = {
    "lvbench": Benchmark(
        "lvbench", "LVBench", MARKERS, load, PROTOCOLS, questions=1549, videos=103, groups=("question_type", "type"),
        folders=FOLDERS, order={"question_type": tuple(TYPES)}, submission=board, lmms=("lvbench", "lvbench_score", 1.0),
    ),
}  # fmt: skip
