"""Which subtitle lines stand in a prompt, by the rule of each harness."""

import json

import pytest
from helpers.benchmark_fixtures import fixture

from hybridvlm.eval.benchmarks import subtitles
from hybridvlm.eval.benchmarks.subtitles import between_frames, read_lvb, read_srt
from hybridvlm.options import InputError

FRAMES = [0, 5, 16, 25, 40, 45, 50, 70]


@pytest.fixture(scope="module")
def files():
    root, _ = fixture("videomme")
    folder = root / "unzipped/Video-MME/subtitle"
    names = {"font": "-aB3_xyz012", "plain": "Qw-9zz_kLMn", "bom": "_under_scor"}
    return {kind: read_srt(folder / f"{name}.srt") for kind, name in names.items()}


def test_the_reference_values(files):
    lines = files["font"]
    assert subtitles.slicer(lines, FRAMES, 10.0, 80) == "first line\nfirst line\nsecond part two\nthird line"
    assert subtitles.lmms(lines, FRAMES, 10.0, 80) == "first line\nsecond part two\nthird line\n  "
    assert subtitles.qwen(lines, FRAMES, 10.0, 80) == "first line second part two third line"


def test_plain_lines_are_lost_to_one_harness(files):
    assert subtitles.slicer(files["plain"], FRAMES, 10.0, 80).endswith("plain line")
    assert "plain line" not in subtitles.lmms(files["plain"], FRAMES, 10.0, 80)
    assert subtitles.lmms([], FRAMES, 10.0, 80) == "No subtitles available"


def test_marks_and_line_ends_make_no_difference(files, tmp_path):
    assert files["bom"] == files["plain"]
    text = "1\n00:00:01.500 --> 00:00:02.000\n1984\n\n2\n00:00:03,000 --> 00:00:04,000\nend"
    (tmp_path / "x.srt").write_text(text)
    assert [(line.start, line.end, line.text) for line in read_srt(tmp_path / "x.srt")] == [
        (1.5, 2.0, "1984"),
        (3.0, 4.0, "end"),
    ]


def test_lines_stand_between_frames(tmp_path):
    items = [([100.2, 101.0], "s1"), ([103.0, 104.9], "s2"), ([105.0, None], "s3"), ([106.0, 108], "s4")]
    (tmp_path / "x.json").write_text(json.dumps([{"timestamp": t, "text": s} for t, s in items]))
    lines = read_lvb(tmp_path / "x.json", 100.0, 10.0)
    assert between_frames(lines, [0, 2, 4, 6, 8]) == [0, 1, "s2", 2, 3, "s3", 4]
    late = {"start": "01:00:00.0", "end": "01:00:02.0", "line": "late"}
    (tmp_path / "y.json").write_text(
        json.dumps([{"start": "00:00:01.800", "end": "00:00:02.100", "line": "short"}, late])
    )
    assert between_frames(read_lvb(tmp_path / "y.json", 0.0, None), [0, 2, 4]) == [0, "short", 1, 2]


def test_a_short_line_is_widened_to_a_second():
    line = [subtitles.Line(1.9, 2.1, "short")]
    assert between_frames(line, [0, 2.4, 4]) == [0, "short", 1, 2]
    assert between_frames(line, [0, 2.6, 4]) == [0, 1, 2]


@pytest.mark.parametrize("text", ["{", "[1]", '[{"start": "x", "end": "y", "line": "z"}]'])
def test_what_is_no_subtitle_file_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json: no subtitles of LongVideoBench"):
        read_lvb(tmp_path / "x.json", 0.0, 1.0)
