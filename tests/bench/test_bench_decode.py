"""The decode benchmark: numbers in frames survive every codec, and a reader that cannot is a row that says so."""

import argparse

import numpy as np
import pytest

from hybridvlm.bench import decode


def arguments(*argv):
    parser = argparse.ArgumentParser()
    decode.add_arguments(parser)
    return parser.parse_args([*argv, "--height", "64", "--width", "96"])


def test_a_frame_carries_its_number():
    for number in (0, 1, 77, 36_000, (1 << decode.BITS) - 1):
        assert decode.read_number(decode.picture(number, 48, 96)) == number


def test_ours_gives_exactly_the_frames_asked_for(tmp_path):
    args = arguments("--minutes", "0.1", "--frames", "5", "12", "--readers", "hybridvlm", "--codecs", "h264", "vp9")
    args.folder = tmp_path
    rows = decode.run(args)
    assert [(row["codec"], row["frames"], row["exact"], row["problem"]) for row in rows] == [
        (codec, n, 1.0, "") for codec in ("h264", "vp9") for n in (5, 12)
    ]
    assert all(row["frames/s"] > 0 for row in rows)


def test_wrong_frames_are_seen(tmp_path, monkeypatch):
    path = tmp_path / "x.mp4"
    decode.make(path, "h264", 20, 10, 64, 96, 10)
    monkeypatch.setitem(
        decode.READERS, "off", lambda p, n: decode.hybridvlm_frames(p, np.clip(np.asarray(n) + 1, 0, 19))
    )
    (row,) = decode._measure("h264", path, ["off"], 4, 2, 20)
    assert row["exact"] == 0.25  # the last one alone

    def absent(path, numbers):
        raise ImportError("No module named 'x'")

    monkeypatch.setitem(decode.READERS, "absent", absent)
    gone, there = decode._measure("h264", path, ["absent", "hybridvlm"], 4, 2, 20)
    assert gone["problem"].startswith("not installed") and (there["exact"], there["problem"]) == (1.0, "")


def test_what_is_too_small_is_refused():
    with pytest.raises(ValueError, match="too small"):
        decode.run(argparse.Namespace(**vars(arguments()) | {"height": 8}))
    with pytest.raises(ValueError, match="frames, got"):
        decode.run(argparse.Namespace(**vars(arguments()) | {"minutes": 1e6}))
