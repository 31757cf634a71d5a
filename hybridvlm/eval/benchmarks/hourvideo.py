"""HourVideo: questions on first-person videos of 20 minutes to two hours, five options, some of them pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hybridvlm.eval.benchmarks import prompts
from hybridvlm.eval.benchmarks.definition import Benchmark, Protocol, Question
from hybridvlm.eval.benchmarks.layout import Found, Marker
from hybridvlm.eval.benchmarks.tables import Fields, mapping

MARKERS = tuple(
    Marker(f"{folder}{name}", kind)
    for name, kind in (("dev_v1.0_annotations.json", "official"), ("dev_v1.0.json", "without answers"))
    for folder in ("v1.0_release/json/", "json/", "")
)
FOLDERS = ("video_540ss", "videos/v2/video_540ss", "v2/video_540ss", "videos", "video", "")
PICTURES = "its options are pictures, beside a video; such questions are left out"


def load(found: Found) -> list[Question]:
    """Questions by video; what is no video's entry, such as the canary, is passed over and goes nowhere."""
    if found.kind != "official":
        found.notes.append(f"{found.marker.name} has no answers; dev_v1.0_annotations.json has")
    videos = mapping(found.marker)
    questions: list[Question] = []
    for uid, entry in videos.items():
        items = entry.get("benchmark_dataset") if isinstance(entry, Mapping) else None
        if not isinstance(items, list):
            continue
        file = found.file(uid, FOLDERS)
        for item in items:
            fields = Fields(item, found.marker, len(questions))
            task = fields.text("task")
            options = [fields.text(f"answer_{i}") for i in range(1, 6)]
            published = "correct_answer_label" in fields
            answer, remark = fields.lettered("correct_answer_label", 5) if published else (None, "")
            pictures = task.endswith("image") or all(re.search(r"\.(jpe?g|png)$", option) for option in options)
            questions.append(
                Question(
                    id=fields.text("qid"),
                    video=uid,
                    file=file,
                    question=fields.text("question"),
                    options=tuple(options),
                    answer=answer,
                    groups={"suite": task.partition("/")[0], "task": task},
                    row=len(questions),
                    end=_start(fields.text("relevant_timestamps")) if task == "reasoning/predictive" else None,
                    published=fields.text("mcq_test"),
                    scored=not pictures,
                    remark=PICTURES if pictures else remark,
                )
            )
    return questions


def _start(stamps: str) -> float | None:
    """The second at which the first of the times "hh:mm:ss - hh:mm:ss" lies."""
    match = re.search(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stamps)
    return int(match.group(1)) * 3600 + int(match.group(2)) * 60 + float(match.group(3)) if match else None


_FIRST, _, _LAST = prompts.select("A, B, C, D, or E", between="\n").partition("\n")
PROTOCOLS = (
    Protocol(
        "vamba", prompts.VAMBA, prompts.form(f"{_FIRST}\n{{Q}}\n{{P}}\n{_LAST}"), rule="vamba", frames=128, parser="vamba",
        note="the harness samples at temperature 1; here replies are greedy",
    ),
)  # fmt: skip
SUITES = ("summarization", "perception", "reasoning", "navigation")
BENCHMARKS = {
    "hourvideo": Benchmark(
        "hourvideo", "HourVideo, dev split", MARKERS, load, PROTOCOLS, questions=1182, videos=50, groups=("suite", "task"),
        folders=FOLDERS, order={"suite": SUITES},
    ),
}  # fmt: skip
