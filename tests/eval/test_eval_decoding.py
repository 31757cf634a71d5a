"""Reading videos for an evaluation: the cache of decoded frames, and the time that one video may take."""

import json
import os
import shutil
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.eval_world import build_world
from helpers.silent_model import silent_model

from hybridvlm.eval import __main__ as command
from hybridvlm.inference.model import Model
from hybridvlm.models.media import Clip
from hybridvlm.tiny.export import write_video
from hybridvlm.video import VideoError, VideoTimeout, clip, decode_frames, errors
from hybridvlm.video.errors import heard, warn
from hybridvlm.video.frame_cache import FrameCache


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("decoding"))


@pytest.fixture
def mouth(monkeypatch):
    told = silent_model(monkeypatch)
    told.reply = "red"
    return told


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that were decoded so far."""
    names, whole = [], clip.decode_frames

    def noted(path, *args, **kwargs):
        names.append(os.path.basename(path))
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(clip, "decode_frames", noted)
    return names


def run(world, output, *more, code=0, tasks="q.jsonl"):
    argv = ["--model", str(world / "micro"), "--tasks", str(world / tasks), "--output", str(output), "--limit", "0"]
    assert command.main([*argv, "--methods", "none", "--batch-size", "3", *map(str, more)]) == code
    if code:
        return None
    return json.loads((output / "results.json").read_text())


def lines_of(output):
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


# -- the cache, through the command


def test_frames_are_decoded_once_for_all_runs(world, mouth, decoded, tmp_path, monkeypatch):
    """A second run reads what the first one decoded; its pixels are the same, and a changed video is decoded anew."""
    seen, cache = [], ("--frame-cache", tmp_path / "frames")

    def keep(self, pixels, attention=False):
        seen.append(np.asarray(pixels).tobytes())
        return np.zeros((1, pixels.shape[1], 1, 1), np.float32)

    monkeypatch.setattr(Model, "encode", keep)
    first = run(world, tmp_path / "a", *cache)["metadata"]["frame_cache"]
    assert (first["hits"], first["decoded"], len(decoded)) == (0, 6, 6)
    again = run(world, tmp_path / "b", *cache)["metadata"]["frame_cache"]
    assert (again["hits"], again["decoded"], len(decoded)) == (6, 0, 6)
    assert seen[:6] == seen[6:] and len(set(seen)) == 6
    changed = tmp_path / "world"
    shutil.copytree(world, changed)
    rng = np.random.default_rng(9)
    write_video(changed / "v2.mp4", rng.integers(0, 255, (4, 16, 16, 3), dtype=np.uint8))
    third = run(changed, tmp_path / "c", *cache)["metadata"]["frame_cache"]
    assert (third["hits"], third["decoded"]) == (5, 1) and decoded[6:] == ["v2.mp4"]
    run(world, tmp_path / "d", "--frames", "2", *cache)  # other frames are another entry
    assert len(decoded) == 13


def test_what_was_said_of_a_video_is_said_again(world, mouth, decoded, tmp_path):
    write_video(tmp_path / "short.mp4", np.zeros((2, 16, 16, 3), np.uint8))
    shutil.copytree(world / "micro", tmp_path / "micro")
    row = {"video": "short.mp4", "question": "red", "answer": "red", "options": ["red", "green"]}
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    for name in "ab":
        told = run(tmp_path, tmp_path / name, "--frame-cache", tmp_path / "frames", tasks="one.jsonl")
        assert any("has 2 frames" in note for note in told["metadata"]["notes"])
        assert "has 2 frames" in lines_of(tmp_path / name)[0]["remarks"][0]
    assert decoded == ["short.mp4"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--frame-cache-size", "1GB"], "--frame-cache-size is the size of --frame-cache DIR"),
        (["--frame-cache", "x", "--frame-cache-size", "many"], "--frame-cache-size takes a size such as 500MB or 20GB"),
        (["--frame-cache", "gs://b/x"], "give a folder of this machine"),
        (["--frame-cache", "FILE"], "is a file; give a folder"),
        (["--video-timeout", "0"], "--video-timeout must be a number of seconds above 0, got 0"),
        (["--video-timeout", "nan"], "--video-timeout must be"),
        (["--tasks", "needle", "--model", "tiny", "--video-timeout", "5"], "is for video files; the task needle"),
    ],
)
def test_options_that_cannot_be_are_refused(world, mouth, tmp_path, capsys, more, words):
    (tmp_path / "file").write_text("x")
    run(world, tmp_path / "out", *(str(tmp_path / "file") if x == "FILE" else x for x in more), code=2)
    assert words in capsys.readouterr().err and not mouth.asked


# -- the cache itself


def clip_of(number, frames=2):
    pixels = np.full((frames, 8, 8, 3), number, np.uint8)
    return Clip(tuple(map(float, range(frames))), pixels, "video", (8, 8), tuple(range(frames)), 1.0)


def entries(folder):
    return sorted(folder.glob("*.npz"))


@pytest.fixture
def films(tmp_path):
    paths = [tmp_path / f"{number}.bin" for number in range(6)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 100)
    return paths


def test_the_oldest_goes_where_there_is_no_room(tmp_path, films):
    size = None
    for limit in (1 << 20, None):
        cache = FrameCache(tmp_path / f"frames-{limit}", limit or 3 * size)
        for number, path in enumerate(films[:3]):
            assert cache.clip(path, 4, lambda n=number: clip_of(n)).frames[0, 0, 0, 0] == number
        size = entries(cache.folder)[0].stat().st_size
    for age, path in enumerate(films[:3]):
        os.utime(next(e for e in entries(cache.folder) if e.stem == cache._key(path, 4)), (age, age))
    cache.clip(films[0], 4, lambda: pytest.fail("is there"))  # used now: no longer the oldest
    cache.clip(films[3], 4, lambda: clip_of(3))
    assert sum(e.stat().st_size for e in entries(cache.folder)) <= cache.limit
    kept = {e.stem for e in entries(cache.folder)}
    assert kept == {cache._key(films[i], 4) for i in (0, 2, 3)}
    cache.clip(films[4], 4, lambda: clip_of(4, frames=64))  # larger than all there is room for
    assert {e.stem for e in entries(cache.folder)} == kept
    assert (cache.hits, cache.misses) == (1, 5)


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "other"])
def test_an_entry_that_is_not_whole_is_decoded_anew(tmp_path, films, harm):
    cache = FrameCache(tmp_path / "frames", 1 << 20)
    cache.clip(films[0], "x", lambda: clip_of(7))
    (entry,) = entries(cache.folder)
    data = bytearray(entry.read_bytes())
    at = data.index(bytes([7] * 50))
    data[at] ^= 1
    entry.write_bytes({"cut": data[:-40], "flip": data, "empty": b"", "other": b"PK\x03\x04" + b"x" * 99}[harm])
    assert (cache.clip(films[0], "x", lambda: clip_of(7)).frames == 7).all() and cache.misses == 2
    assert (cache.clip(films[0], "x", lambda: pytest.fail("is there")).frames == 7).all()


def test_what_fails_leaves_nothing_and_times_alone_do_not_matter(tmp_path, films):
    cache = FrameCache(tmp_path / "frames", 1 << 20)

    def broken():
        raise VideoError("damaged")

    with pytest.raises(VideoError, match="damaged"):
        cache.clip(films[0], "x", broken)
    assert not entries(cache.folder)

    def remarked():
        warn("0.bin: a remark", stacklevel=1)
        return clip_of(1)

    for _ in range(2):
        with heard() as told:
            cache.clip(films[0], "x", remarked)
        assert told == ["0.bin: a remark"]
    # the same bytes elsewhere are the same video; another byte of the same length and date is another
    shutil.copy(films[0], tmp_path / "copy.bin")
    with heard():
        cache.clip(tmp_path / "copy.bin", "x", lambda: pytest.fail("is there"))
    status = films[0].stat()
    films[0].write_bytes(b"\1" + films[0].read_bytes()[1:])
    os.utime(films[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (cache.clip(films[0], "x", lambda: clip_of(5)).frames == 5).all()


def test_threads_share_it(tmp_path, films):
    cache = FrameCache(tmp_path / "frames", 4000)
    start = threading.Barrier(8)

    def work(worker):
        start.wait(10)
        return [
            int(cache.clip(films[(worker + i) % 6], "x", lambda n=(worker + i) % 6: clip_of(n)).frames[0, 0, 0, 0])
            for i in range(20)
        ]

    with ThreadPoolExecutor(8) as pool:
        for worker, found in enumerate(pool.map(work, range(8))):
            assert found == [(worker + i) % 6 for i in range(20)]
    assert sum(e.stat().st_size for e in entries(cache.folder)) <= 4000


# -- the time limit


@pytest.fixture
def slow(monkeypatch):
    """Decoding a file of these names takes 100 s by the clock that limits go by."""
    names, late, whole = set(), threading.local(), clip.decode_frames
    real = errors.time.monotonic

    def decode(path, *args, **kwargs):
        late.by = 100.0 if os.path.basename(path) in names else 0.0
        try:
            return whole(path, *args, **kwargs)
        finally:
            late.by = 0.0

    monkeypatch.setattr(errors, "time", types.SimpleNamespace(monotonic=lambda: real() + getattr(late, "by", 0.0)))
    monkeypatch.setattr(clip, "decode_frames", decode)
    return names


def test_a_video_that_takes_too_long_costs_its_own_questions(world, mouth, slow, tmp_path, capsys):
    """They are counted apart with their reason; under the same limit nothing is asked again, under a higher one they are."""
    slow |= {"v1.mp4", "v4.mp4"}
    limit = ("--video-timeout", "50")
    row = run(world, tmp_path / "out", *limit)["rows"][0]
    assert (row["n"], row["unanswered"]) == (12, 6)
    late = [r for r in lines_of(tmp_path / "out") if "failure" in r]
    assert {r["video"] for r in late} == {"v1.mp4", "v4.mp4"} and len(late) == 6
    assert all(
        "not read within 50 s" in r["failure"] and r["time_limit"] == 50 and r["prediction"] is None for r in late
    )
    asked = mouth.asked
    results = run(world, tmp_path / "out", *limit)
    assert mouth.asked == asked and results["rows"][0] == row and results["metadata"]["video_timeout"] == 50
    assert "6 questions are on files that could not be read" in capsys.readouterr().out
    for more, n in ((("--video-timeout", "20"), 12), (("--video-timeout", "400"), 18), (limit, 18), ((), 18)):
        found = run(world, tmp_path / "out", *more)["rows"][0]
        assert (found["n"], found["unanswered"]) == (n, 18 - n)
    lines = lines_of(tmp_path / "out")
    assert len(lines) == 24 and {r["video"] for r in lines[18:]} == {
        "v1.mp4",
        "v4.mp4",
    }  # asked once more, and once alone
    from hybridvlm.eval.logs import read

    assert sum(answer.correct is not None for answer in read(tmp_path / "out")) == 18


def test_every_way_to_read_a_file_ends_in_time(tmp_path, monkeypatch):
    """Its index and its frames, through tables or packets, and animated pictures."""
    from PIL import Image

    from hybridvlm.video import probe

    pixels = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", pixels)
    write_video(tmp_path / "a.mkv", pixels)
    pages = [Image.fromarray(page) for page in pixels]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:], duration=100)
    for name in ("a.mp4", "a.mkv", "a.gif"):
        with errors.time_limit(0.0), pytest.raises(VideoTimeout, match=f"{name}: not read within 0 s"):
            probe(tmp_path / name)
        with errors.time_limit(600.0):
            assert probe(tmp_path / name).frames == 6
        with errors.time_limit(0.0), pytest.raises(VideoTimeout, match="time limit of a video"):
            decode_frames(tmp_path / name, [0, 5])
        assert len(decode_frames(tmp_path / name, [0, 5])) == 2
