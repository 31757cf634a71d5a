"""Tiny synthetic copies of the on-disk layouts in which long-video benchmarks are published: pictures, files, expectations.

`benchmark_fixtures.make(name, folder)` writes one. The questions and videos are invented; only names of files, folders and fields
are those of the benchmarks. Every frame carries its own number, so that a test can ask which frame was really shown
(`read_number`); the colour of the picture is COLOURS[(2 * seed + second) % 6], so the questions have true answers.

folder holds one folder per layout and `expected.json`:

    layouts   name of a layout -> folder
    samples   what a loader must give, the same from every layout that lists the split
    counts    split -> [questions, videos]
    problems  what a loader must report, one text per problem
    scores    of the reply "A" to every question: overall and per group, computed as the benchmark defines it

The quirks of the real files are here on purpose: ids that begin with "-", extensions in capitals, missing and empty files, twin
options, an answer that is no option, one video name in two folders, missing values, numbers where texts are expected,
archives that nobody has unpacked.
"""

from __future__ import annotations

import collections
import csv
import fractions
import io
import json
import pathlib
import shutil
import tarfile
import zipfile
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SIDE = 64
COLOURS = {
    "red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 210),
    "yellow": (220, 200, 40), "purple": (140, 40, 160), "orange": (240, 130, 20),
}  # fmt: skip
NAMES = list(COLOURS)
LETTERS = "ABCDEFGHIJ"
Row = dict[str, Any]


# ---------------------------------------------------------------- pictures and videos


def colour(seed: int, second: int) -> str:
    """The colour of the picture in a second of the video `seed`."""
    return NAMES[(2 * seed + second) % len(NAMES)]


def render(seed: int, number: int, fps: float) -> np.ndarray:
    """Frame `number`: its colour, and its number as 16 bits in two rows of blocks, the highest bit first."""
    frame = np.empty((SIDE, SIDE, 3), np.uint8)
    frame[:] = COLOURS[colour(seed, int(number / fps))]
    for bit in range(16):
        y, x = divmod(bit, 8)
        frame[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = 255 if number >> (15 - bit) & 1 else 0
    return frame


def read_number(frame: np.ndarray) -> int:
    """The number that a frame [64,64,3] carries."""
    bits = [frame[8 * y + 2 : 8 * y + 6, 8 * x + 2 : 8 * x + 6].mean() > 127 for y in range(2) for x in range(8)]
    return int("".join("1" if bit else "0" for bit in bits), 2)


def write_video(path: pathlib.Path, seconds: float, fps: int = 10, seed: int = 0) -> None:
    """A video; the codec follows the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.lower()
    codec, container = {".avi": ("mpeg4", "avi"), ".webm": ("libvpx", "webm"), ".mkv": ("libx264", "matroska")}.get(
        kind, ("libx264", "mp4")
    )
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.options = {
            "libx264": {"crf": "15", "g": "20"},
            "libvpx": {"crf": "8", "b": "1M", "deadline": "realtime"},
        }.get(codec, {"qscale": "3"})
        if codec == "mpeg4":
            stream.bit_rate = 1_000_000
        for number in range(round(seconds * fps)):
            for packet in stream.encode(av.VideoFrame.from_ndarray(render(seed, number, fps), "rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)


def write_jpeg(path: pathlib.Path, picture: np.ndarray) -> None:
    """One JPEG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    context = av.CodecContext.create("mjpeg", "w")
    context.width, context.height, context.pix_fmt = picture.shape[1], picture.shape[0], "yuvj420p"
    context.time_base = fractions.Fraction(1)
    context.options = {"qmin": "1", "qmax": "2"}
    frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuvj420p")
    packets = [*context.encode(frame), *context.encode(None)]
    path.write_bytes(bytes(packets[0]))


# ---------------------------------------------------------------- files


def dump(path: pathlib.Path, value: Any, lines: bool = False) -> None:
    """JSON, or JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if lines:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value), encoding="utf-8")
    else:
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def parquet(path: pathlib.Path, rows: list[Row], schema: pa.Schema | None = None) -> None:
    """Rows as a parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def tsv(path: pathlib.Path, rows: list[Row]) -> None:
    """Rows as VLMEvalKit writes them: tab separated, quoted where needed, lists as Python texts, no value as nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows([{k: "" if v is None else v for k, v in row.items()} for row in rows])


def zipped(path: pathlib.Path, members: dict[str, pathlib.Path]) -> None:
    """A zip of files: name in it -> file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as out:
        for name, file in members.items():
            out.write(file, name)


def split_tar(folder: pathlib.Path, stem: str, members: dict[str, pathlib.Path], part: int) -> None:
    """stem.tar.part.aa, .ab, ...: a tar cut into pieces of `part` bytes; whole as stem.tar with part 0."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as out:
        for name, file in members.items():
            out.add(file, name)
    folder.mkdir(parents=True, exist_ok=True)
    content = data.getvalue()
    if not part:
        (folder / f"{stem}.tar").write_bytes(content)
        return
    for number, start in enumerate(range(0, len(content), part)):
        suffix = chr(ord("a") + number // 26) + chr(ord("a") + number % 26)
        (folder / f"{stem}.tar.part.{suffix}").write_bytes(content[start : start + part])


def copied(source: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def hub(folder: pathlib.Path, repository: str, files: dict[str, pathlib.Path]) -> pathlib.Path:
    """A snapshot as huggingface_hub keeps it: blobs, and links to them. Returns its folder."""
    base = folder / "hub" / ("datasets--" + repository.replace("/", "--"))
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = base / "snapshots" / revision
    (base / "refs").mkdir(parents=True, exist_ok=True)
    (base / "refs" / "main").write_text(revision)
    for number, (name, file) in enumerate(sorted(files.items())):
        blob = base / "blobs" / f"{number:040x}"
        copied(file, blob)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(pathlib.Path(*[".."] * (len(pathlib.Path(name).parts) + 1)) / "blobs" / blob.name)
    return snapshot


def choice(seed: int, second: int, count: int = 4, turn: int = 0) -> tuple[str, list[str], int]:
    """(question, options, place of the right one) about one second of a video."""
    right = colour(seed, second)
    wrong = [name for name in NAMES if name != right][: count - 1]
    place = (turn + second) % count
    return f"Which colour fills the picture in second {second}?", wrong[:place] + [right] + wrong[place:], place


class Collector:
    """Builds expected.json."""

    def __init__(self, root: pathlib.Path, layouts: dict[str, str]):
        self.root, self.layouts = root, layouts
        self.samples: list[Row] = []
        self.problems: list[str] = []

    def add(
        self, identity: str, split: str, video: str, files: Row, question: str, options: list[str], answer: int | None,
        *, start: float | None = None, end: float | None = None, subtitle: Row | None = None, **groups: Any,
    ) -> None:  # fmt: skip
        self.samples.append({
            "id": identity, "split": split, "video": video, "files": files, "question": question, "options": options,
            "answer": None if answer is None else LETTERS[answer], "groups": groups, "start": start, "end": end,
            "subtitle": subtitle,
        })  # fmt: skip

    def write(self, scores: Row | None = None) -> None:
        counts = {}
        for sample in self.samples:
            questions, videos = counts.setdefault(sample["split"], [0, set()])
            counts[sample["split"]][0] = questions + 1
            videos.add(sample["video"])
        dump(self.root / "expected.json", {
            "layouts": self.layouts, "counts": {k: [n, len(v)] for k, (n, v) in counts.items()}, "problems": self.problems,
            "scores": scores or {}, "samples": self.samples,
        })  # fmt: skip

    def always_a(self, split: str, *names: str) -> Row:
        """Scores of the reply "A": micro overall, and by the groups `names`; a list of values counts in each of them.

        As if all videos were there; `missing`: per layout that lacks some, the overall score with these counted as wrong
        ("wrong") and left out ("skip"), and the number of questions that can be asked.
        """
        mine = [s for s in self.samples if s["split"] == split and s["answer"]]
        by: dict[str, dict[str, list[int]]] = {name: collections.defaultdict(list) for name in names}
        for sample in mine:
            for name in names:
                values = sample["groups"][name]
                for value in values if isinstance(values, list) else [values]:
                    by[name][str(value)].append(sample["answer"] == "A")
        missing = {}
        for layout in self.layouts:
            asked = [s for s in mine if s["files"].get(layout)]
            if asked and len(asked) < sum(layout in s["files"] for s in mine):
                right = sum(s["answer"] == "A" for s in asked)
                missing[layout] = {"n": len(asked), "wrong": right / len(mine), "skip": right / len(asked)}
        return {
            "split": split,
            "overall": sum(s["answer"] == "A" for s in mine) / len(mine),
            "missing": missing,
            "groups": {n: {k: sum(v) / len(v) for k, v in g.items()} for n, g in by.items()},
            "macro": {n: sum(sum(v) / len(v) for v in g.values()) / len(g) for n, g in by.items()},
        }
