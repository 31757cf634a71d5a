"""The embedded benchmark as files: H.264 videos and a JSONL of questions, the form that `--tasks FILE` reads.

`python -m hybridvlm.tiny.export --output DIR --limit N --split test` writes `DIR/videos/<split>-<index>.mp4` (one coded
frame a video frame, 8 frames a second, yuv444p, so that the 2-pixel borders keep their colours) and
`DIR/questions.jsonl`, one question a line, grouped by video:

    id        text, unique
    video     path of the video, relative to the JSONL file
    question  text
    options   list of the words that could be the answer
    answer    the right one, a member of `options`
    type      question type, for the table by type
    two_hop   whether the answer needs a second look-up

`--scenes` writes those of `needle-scenes` instead.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np

from hybridvlm.tiny import assets, needle, scenes

FPS = 8
CRF = 8  # nearly lossless; colours stay within a few levels


def write_video(path: str | pathlib.Path, frames: np.ndarray, *, fps: int = FPS, crf: int = CRF) -> None:
    """Write frames uint8 [F,height,width,3] as H.264 in 4:4:4; one thread, so that equal input gives equal files."""
    import av

    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 [F,height,width,3], got {frames.dtype} {list(frames.shape)}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def export(
    output: str | pathlib.Path,
    *,
    split: str = "test",
    limit: int = 0,
    videos: int = 256,
    per_video: int = 4,
    frames: int = needle.FRAMES,
    seed: int = 0,
    lasting: bool = False,
) -> tuple[int, int]:
    """Write the first `limit` questions (0: all) of the benchmark and their videos; returns both counts.

    lasting: those of `scenes.split_questions`, instead of `needle.split_questions`.
    """
    if limit < 0:
        raise ValueError(f"limit must be at least 0 (0: all questions), got {limit}")
    output = pathlib.Path(output)
    (output / "videos").mkdir(parents=True, exist_ok=True)
    limit = min(limit, videos * per_video) or videos * per_video
    rows, written, source = [], 0, scenes if lasting else needle
    for video, questions in source.split_questions(split, -(-limit // per_video), per_video, frames, seed):
        name = f"videos/{split}-{video.index:04d}.mp4"
        write_video(output / name, source.render_video(video))
        written += 1
        fields = zip(questions.texts(), questions.options(), questions.answers(), questions.type_names(), strict=True)
        for number, (text, options, answer, kind) in enumerate(fields):
            row = {"id": source.question_id(video, number), "video": name, "question": text, "options": options}
            rows.append(row | {"answer": answer, "type": kind, "two_hop": kind in needle.TWO_HOP})
    rows = rows[:limit]
    (output / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return written, len(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hybridvlm.tiny.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder to write, made if it is missing")
    parser.add_argument("--limit", type=int, default=0, help="how many questions (default 0: all)")
    parser.add_argument("--split", choices=assets.SPLITS, default="test")
    parser.add_argument("--frames", type=int, default=needle.FRAMES, help=f"frames a video (default {needle.FRAMES})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", action="store_true", help="the videos whose scenes last (task needle-scenes)")
    options = parser.parse_args(argv)
    try:
        counts = export(
            options.output,
            split=options.split,
            limit=options.limit,
            frames=options.frames,
            seed=options.seed,
            lasting=options.scenes,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{counts[0]} videos, {counts[1]} questions -> {options.output / 'questions.jsonl'}")


if __name__ == "__main__":
    main()
