"""Subtitle files, and which of their lines the benchmarks and harnesses put into a prompt."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hybridvlm.options import InputError


class Line(NamedTuple):
    """A subtitle: seconds from and to, its text, and the text with its tags."""

    start: float
    end: float
    text: str
    tagged: str = ""


_TIMES = re.compile(r"(\d+):(\d+):(\d+)[,.](\d+)\s*-->\s*(\d+):(\d+):(\d+)[,.](\d+)")
_WHITE = re.compile(r'<font color="white" size="\.72c">(.*?)</font>', re.DOTALL)


def read_srt(path: pathlib.Path) -> list[Line]:
    """The lines of an .srt file, with or without a byte order mark, any line ends, "," or "." before milliseconds."""
    text = path.read_bytes().decode("utf-8-sig", "replace").replace("\r\n", "\n").replace("\r", "\n")
    lines, matches = [], list(_TIMES.finditer(text))
    for match, following in zip(matches, [*matches[1:], None], strict=True):
        body = text[match.end() : following.start() if following else len(text)].strip("\n")
        if following:  # the number of the next line stands before its times
            body = re.sub(r"\n+\s*\d+\s*\Z", "", "\n" + body).strip("\n")
        h1, m1, s1, f1, h2, m2, s2, f2 = match.groups()
        start = int(h1) * 3600 + int(m1) * 60 + int(s1) + float(f"0.{f1}")
        end = int(h2) * 3600 + int(m2) * 60 + int(s2) + float(f"0.{f2}")
        bare = re.sub(r"<[^>]*>|\{\\[^}]*\}", "", body).replace("\n", " ")
        lines.append(Line(start, end, bare, body.replace("\n", " ")))
    return lines


def _clock(text: str) -> float:
    hours, minutes, seconds = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def read_lvb(path: pathlib.Path, start: float, duration: float | None) -> list[Line]:
    """LongVideoBench's subtitles in seconds of the cut clip, by the middle of each line.

    Args:
        path: JSON, either of the two forms that the benchmark has.
        start: second of the whole video at which the clip begins.
        duration: of the clip, the end of a line that has none.
    """
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
        lines = []
        for item in items:
            if "timestamp" in item:
                low, high = item["timestamp"]
                text = item["text"]
            else:
                low, high, text = _clock(item["start"]), _clock(item["end"]), item["line"]
            low = float(low) - start
            last = float(high) - start if high is not None else duration if duration is not None else low + 1
            lines.append(Line(low, last, text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no subtitles of LongVideoBench: {error!r}") from None
    return sorted(lines, key=lambda line: line.start + line.end)


def slicer(lines: Sequence[Line], numbers: Sequence[int], fps: float, total: int) -> str:
    """The first line around each frame, strictly; repeats kept, blank ones dropped (official Video-MME, VLMEvalKit)."""
    shown = []
    for number in numbers:
        ms = round(number * 1000 / fps)
        line = next((line for line in lines if round(line.start * 1000) < ms < round(line.end * 1000)), None)
        if line is not None and line.text.strip():
            shown.append(line.text)
    return "\n".join(shown)


def lmms(lines: Sequence[Line], numbers: Sequence[int], fps: float, total: int) -> str:
    """All lines at any of 32 even frames, not at the model's; text in the published font tag alone; in the file's order."""
    frames = np.linspace(0, total - 1, 32).astype(int)
    by_time = {(line.start, line.end): line for line in lines}  # equal times overwrite one another
    shown = []
    for line in by_time.values():
        if np.any((frames >= int(line.start * fps)) & (frames < int(line.end * fps))):
            shown += _WHITE.findall(line.tagged)
    return "\n".join(shown) or "No subtitles available"


def qwen(lines: Sequence[Line], numbers: Sequence[int], fps: float, total: int) -> str:
    """Each line once if any frame lies strictly inside it, joined by a blank."""
    times = [number / fps for number in numbers]
    shown = [line.text.strip() for line in lines if any(line.start < t < line.end for t in times)]
    return " ".join(text for text in shown if text)


RULES = {"slicer": slicer, "lmms": lmms, "qwen": qwen}


def between_frames(lines: Sequence[Line], seconds: Sequence[float]) -> list[int | str]:
    """Frame positions and subtitle texts in their order (LongVideoBench): a line stands after the frames up to its middle.

    A line is kept if any frame lies strictly inside it; one shorter than a second is widened to a second around its middle.
    """
    kept = []
    for line in lines:
        middle = (line.start + line.end) / 2
        low, high = (line.start, line.end) if line.end - line.start >= 1 else (middle - 0.5, middle + 0.5)
        if any(low < t < high for t in seconds):
            kept.append((middle, line.text))
    kept.sort(key=lambda item: item[0])
    out: list[int | str] = []
    for position, t in enumerate(seconds):
        while kept and kept[0][0] < t:
            out.append(kept.pop(0)[1])
        out.append(position)
    return out + [text for _, text in kept]
