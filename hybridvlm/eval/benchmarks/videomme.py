"""Video-MME: 2,700 questions on 900 videos of 11 seconds to an hour, four options, with and without subtitles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hybridvlm.eval.benchmarks import prompts
from hybridvlm.eval.benchmarks.definition import Benchmark, Protocol, Question
from hybridvlm.eval.benchmarks.layout import Found, Marker
from hybridvlm.eval.benchmarks.tables import Fields, rows, without_letters

MARKERS = (
    Marker("videomme/test-00000-of-00001.parquet", "parquet", ("videoID", "question_id", "options")),
    Marker("Video-MME.tsv", "vlmevalkit"),
)
FOLDERS = ("data", "video", "videos", "videomme/data", "videomme", "videos/data", "videos/videos_chunked_*/data", "")
SUBTITLES = ("subtitle", "subtitles", "videomme/subtitle")
GROUPS = ("duration", "domain", "sub_category", "task_type")


def load(found: Found) -> list[Question]:
    """Questions of the parquet or of VLMEvalKit's table."""
    table = found.kind == "vlmevalkit"
    seen: Counter[str] = Counter()
    questions = []
    for number, row in enumerate(rows(found.marker)):
        fields = Fields(row, found.marker, number)
        video = fields.text("video" if table else "videoID")
        seen[video] += 1
        listed = "candidates" if table else "options"
        options = fields.choices(listed, without_letters(fields.texts(listed)))
        answer, remark = fields.lettered("answer", len(options))
        questions.append(
            Question(
                id=f"{video}-{seen[video]}" if table else fields.text("question_id"),
                video=video,
                file=found.file(video, FOLDERS),
                question=fields.text("question"),
                options=options,
                answer=answer,
                remark=remark,
                groups={name: fields.text(name) for name in GROUPS},
                row=number,
                subtitle=found.file(video, SUBTITLES, (".srt",)),
                extra={} if table else {"video_id": fields.text("video_id")},
            )
        )
    return questions


_TWO_LINES = f"{prompts.SELECT_TWO_LINES}\n{{Q}}\n"
_SUBS = f"⟦{prompts.SUBTITLES}\n{{S}}\n⟧"


def _protocols(subs: bool) -> tuple[Protocol, ...]:
    end = "\nThe best answer is:"
    lmms = (
        f"⟦{prompts.SUBTITLES} \n{{S}}\n⟧{prompts.SELECT_SUBTITLES}\n{{Q}}\n{{O.}}{end}"
        if subs
        else f"{prompts.SELECT_SUBTITLES}\n{{Q}}\n{{O.}}\n\n{prompts.LETTER}"
    )
    vk_head = "\nThese are the frames of a video. "
    vk = f"{vk_head}⟦{prompts.SUBTITLES}\n{{S}}\n⟧{prompts.SELECT_4}\nQuestion: {{Q}}\n{{O.}}\nAnswer: "
    sampled = "the harness samples at temperature 0.7; here replies are greedy"
    found = [
        Protocol(
            "official", "2024", prompts.form(f"{_SUBS}{prompts.SELECT_4}\n{{Q}}\n{{O.}}{end}"),
            rule="slicer", frames=64, subtitles="slicer" if subs else "", parser="vk.regex",
        ),
        Protocol(
            "lmms-eval", prompts.LMMS, prompts.form(lmms),
            rule="linspace", frames=32, subtitles="lmms" if subs else "", parser="lmms.mcq",
        ),
        Protocol(
            "vlmevalkit", prompts.VLMEVALKIT, prompts.form(vk),
            rule="vk.nframe", frames=64, subtitles="slicer" if subs else "", parser="vk.regex",
        ),
        Protocol(
            "qwen", "2025", prompts.form(f"{_SUBS}{prompts.SELECT_4}\nQuestion: {{Q}}\n{{O.}}{end}"),
            rule="qwen:2", frames=512, subtitles="qwen" if subs else "", parser="vk.regex", note=sampled,
        ),
    ]  # fmt: skip
    if not subs:
        found.append(
            Protocol(
                "vamba", prompts.VAMBA, lambda q, _: prompts.fill(_TWO_LINES, {"{Q}": q.question}) + _joined(q),
                rule="vamba", frames=512, parser="vamba",
            )
        )  # fmt: skip
    return tuple(found)


def _joined(question: Question) -> str:
    """Options one after another, a blank between them."""
    return " ".join(prompts.dotted_list(question.options))


def official(
    questions: Sequence[Question], letters: Mapping[str, str | None], replies: Mapping[str, str]
) -> dict[str, Any]:
    """The list that the official scorer reads, a video each with its questions and the replies as they are."""
    videos: dict[str, dict[str, Any]] = {}
    for q in questions:
        entry = videos.setdefault(q.video, {
            "video_id": q.extra.get("video_id", q.video), "duration": q.groups["duration"], "domain": q.groups["domain"],
            "sub_category": q.groups["sub_category"], "missing": False, "questions": [],
        })  # fmt: skip
        entry["missing"] |= q.id not in replies
        entry["questions"].append({
            "question_id": q.id, "task_type": q.groups["task_type"], "question": q.question,
            "options": prompts.dotted_list(q.options), "answer": q.answer, "response": replies.get(q.id, ""),
        })  # fmt: skip
    return {"videomme_official.json": list(videos.values())}


def _benchmark(name: str, title: str, subs: bool) -> Benchmark:
    return Benchmark(
        name, title, MARKERS, load, _protocols(subs), questions=2700, folders=FOLDERS, videos=900, groups=GROUPS,
        order={"duration": ("short", "medium", "long")}, submission=official,
        lmms=("videomme_w_subtitle" if subs else "videomme", "videomme_perception_score", 100.0),
    )  # fmt: skip


BENCHMARKS = {
    "videomme": _benchmark("videomme", "Video-MME without subtitles", False),
    "videomme-subs": _benchmark("videomme-subs", "Video-MME with subtitles", True),
}
