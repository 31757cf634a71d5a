"""Videos and pictures as they come from cameras, rippers, browsers and strangers: read right, or refused in words."""

import gc
import io
import os
import shutil
import struct
import sys
import threading
import time
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
from helpers import films
from helpers.films import corners, film, joined, matrix, numbers, quarters, streams, transport, trimmed
from PIL import Image

from hybridvlm.video import (
    VideoError,
    VideoWarning,
    decode_frames,
    frame_seconds,
    probe,
    read_clip,
    read_image,
    sample_indices,
)
from hybridvlm.video import container as film_container


@pytest.fixture(autouse=True)
def loud():
    """Every warning that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def as_is(height, width, frames, kind):
    return height, width


def every(path):
    """(what probe says, the numbers on all frames, their seconds)."""
    info = probe(path)
    return info, numbers(decode_frames(path, range(info.frames))), np.asarray(frame_seconds(path, range(info.frames)))


# -- clocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("offsets", [(0.0, 0.51), (50.0, 0.2), (5.0, 5.0), (2.0, 7200.0), (95000.0, 3.0)])
def test_a_clock_that_starts_anew(tmp_path, offsets, b_frames):
    """Overlap, reset, the same again, hours ahead (another evening on the same channel), after the counter's end."""
    parts = [
        transport(tmp_path / f"{i}.ts", 12 * i, offset, b_frames=b_frames, options={"x264-params": "open-gop=0"})
        for i, offset in enumerate(offsets)
    ]
    path = joined(tmp_path / "joined.ts", *parts)
    info, read, seconds = every(path)
    assert read == list(range(24))
    np.testing.assert_allclose(np.diff(seconds), 1 / 12, atol=2e-3)
    assert info.duration == pytest.approx(2.0, abs=0.01)
    assert info.fps == pytest.approx(12, abs=0.05)
    for asked in ([23], [11, 12], [13, 3, 20], [17, 5]):
        assert numbers(decode_frames(path, asked)) == asked


def test_three_parts_are_read_in_their_order(tmp_path):
    parts = [transport(tmp_path / f"{i}.ts", 12 * i, offset, gop=4) for i, offset in enumerate((40.0, 20.0, 20.5))]
    path = joined(tmp_path / "joined.ts", *parts)
    _, read, seconds = every(path)
    assert read == list(range(36))
    assert (np.diff(seconds) > 0).all()
    assert numbers(decode_frames(path, [2, 34])) == [2, 34]
    assert numbers(read_clip(path, as_is, frames=3).frames) == [0, 17, 35]


def test_program_streams_put_together(tmp_path):
    parts = [
        film(tmp_path / f"{i}.mpg", 12, first=12 * i, fps=25, codec="mpeg2video", options={"qscale": "2"})
        for i in range(2)
    ]
    _, read, seconds = every(joined(tmp_path / "joined.mpg", *parts))
    assert read == list(range(24))
    assert (np.diff(seconds) > 0).all()


def test_matroska_put_together(tmp_path):
    parts = [film(tmp_path / f"{i}.mkv", 24, first=12 * i, seconds=[j / 12 for j in range(24)]) for i in range(2)]
    _, read, seconds = every(joined(tmp_path / "joined.mkv", *parts))
    assert read == [*range(24), *range(12, 36)]
    assert (np.diff(seconds) > 0).all()


def test_what_lies_behind_the_end_of_a_flash_film_is_missed(tmp_path):
    parts = [film(tmp_path / f"{i}.flv", 12, first=12 * i) for i in range(2)]
    with pytest.warns(VideoWarning, match=r"joined\.flv: the file is damaged.*nothing can be read after"):
        assert probe(joined(tmp_path / "joined.flv", *parts)).frames == 12
    assert every(parts[0])[1] == list(range(12))


def test_parts_of_different_sizes(tmp_path):
    parts = [transport(tmp_path / "a.ts", 0, 0.0), transport(tmp_path / "b.ts", 12, 0.4, width=96, height=64)]
    info, read, _ = every(joined(tmp_path / "joined.ts", *parts))
    assert (read, info.fps) == (list(range(24)), pytest.approx(12, abs=0.01))


def test_a_counter_that_runs_over(tmp_path):
    """33 bits of 1/90000 s: after 26.5 hours the clock of a broadcast is at nought again."""
    path = transport(tmp_path / "a.ts", 0, (1 << 33) / 90000 - 1.0, 36)
    _, read, seconds = every(path)
    assert read == list(range(36))
    np.testing.assert_allclose(np.diff(seconds), 1 / 12, atol=1e-3)


def test_long_pauses_are_no_restarts(tmp_path):
    for name in ("a.mkv", "a.mp4", "a.ts"):
        path = film(tmp_path / name, 4, seconds=[0, 20, 40.5, 41])
        assert frame_seconds(path, range(4)) == pytest.approx((0, 20, 40.5, 41), abs=2e-3)
        assert every(path)[1] == [0, 1, 2, 3]


# -- rates and lengths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_the_rate_is_measured(tmp_path, name):
    times = [0.5 * i for i in range(12)] + [6 + i / 30 for i in range(12)]
    info = probe(film(tmp_path / name, seconds=times, fps=30))
    assert info.fps == pytest.approx(24 / 6.4, rel=0.02)
    assert info.fps * info.duration == pytest.approx(24)
    assert len(set(sample_indices(info, 8, "nemotron-train:1").tolist())) == 8


@pytest.mark.parametrize(("name", "codec", "container"), [("a.m4v", "mpeg4", "m4v"), ("a.hevc", "libx265", "hevc")])
def test_the_rate_of_a_raw_stream(tmp_path, name, codec, container):
    """Its container knows no rate, and says 25."""
    info, read, seconds = every(film(tmp_path / name, codec=codec, container=container))
    assert (info.frames, info.fps, info.duration) == (24, pytest.approx(12), pytest.approx(2))
    assert seconds[-1] == pytest.approx(23 / 12)
    assert read == list(range(24))


def test_an_exact_rate_stays_exact(tmp_path):
    """Matroska counts milliseconds; the declared rate, where they bear it out, is the better number."""
    path = film(
        tmp_path / "a.mkv", 30, fps=Fraction(30000, 1001), seconds=[i * 1001 / 30000 for i in range(30)], tick=1000
    )
    assert probe(path).fps == 30000 / 1001


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_the_last_slide_lasts_its_own_time(tmp_path, name):
    path = film(tmp_path / name, 3, seconds=[0, 30, 60], lengths=[30, 30, 30], options={"tune": "zerolatency"})
    info = probe(path)
    assert (info.frames, info.duration) == (3, pytest.approx(90, abs=0.1))
    assert info.fps == pytest.approx(1 / 30, rel=0.01)
    assert len(sample_indices(info, 64, "fps:0.04")) == 3


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_film_of_one_picture(tmp_path, name):
    for length in (2, 30):
        path = film(tmp_path / name, 1, lengths=[length], options={"tune": "zerolatency"})
        info, read, seconds = every(path)
        assert (info.frames, read, seconds.tolist()) == (1, [0], [0.0])
        assert info.duration == pytest.approx(length, abs=0.01)


def test_empty_places_of_an_avi_are_time(tmp_path):
    """AVI has no stamps: pictures that are shown for longer are followed by empty places."""
    info, read, seconds = every(film(tmp_path / "a.avi", 3, seconds=[0, 3, 6], codec="mpeg4", tick=12))
    assert read == [0, 1, 2]
    assert seconds.tolist() == pytest.approx([0, 3, 6])
    assert info.fps < 1


def test_trimmed_films_are_whole(tmp_path):
    source = film(tmp_path / "a.mp4", gop=24)
    for name, start, kept in (("b.mp4", 14 / 12, 10), ("c.mov", 5 / 12, 19)):
        info, read, _ = every(trimmed(source, tmp_path / name, start))
        assert read == list(range(24 - kept, 24))
        assert info.duration == pytest.approx(kept / 12, abs=0.01)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_sound_that_is_longer_than_the_pictures_is_no_fault(tmp_path, name):
    with av.open(str(tmp_path / name), "w") as out:
        pictures, sound = out.add_stream("libx264", rate=12), out.add_stream("aac", rate=16000, layout="mono")
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        for i in range(12):
            out.mux(pictures.encode(av.VideoFrame.from_ndarray(films.plain(i), format="rgb24")))
        out.mux(pictures.encode(None))
        for i in range(100):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * i
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    assert probe(tmp_path / name).duration == pytest.approx(1.0, abs=0.01)


# -- what is shown --------------------------------------------------------------------------------------------------------

# (display matrix, what stored RGBW becomes)
SHOWN = [
    ((1, 0, 0, 1), "RGBW"),
    ((-1, 0, 0, 1), "GRWB"),
    ((1, 0, 0, -1), "BWRG"),
    ((-1, 0, 0, -1), "WBGR"),
    ((0, 1, 1, 0), "RBGW"),
    ((0, -1, -1, 0), "WGBR"),
    ((0, 1, -1, 0), "BRWG"),
    ((0, -1, 1, 0), "GWRB"),
]


@pytest.mark.parametrize(("entries", "expected"), SHOWN)
def test_every_way_to_hold_a_camera(tmp_path, entries, expected):
    path = matrix(film(tmp_path / "a.mp4", 2, picture=quarters, options={"crf": "5"}), *entries)
    info = probe(path)
    assert (info.width, info.height) == ((48, 64) if entries[0] == 0 else (64, 48))
    (frame,) = decode_frames(path, [1])
    assert (frame.shape[:2], corners(frame)) == ((info.height, info.width), expected)
    clip = read_clip(path, lambda *_: (40, 56), frames=2)
    assert (corners(clip.frames[0]), clip.size) == (expected, (info.height, info.width))


@pytest.mark.parametrize("flips", [(True, False), (False, True)])
def test_mirrors_that_a_writer_declares(tmp_path, flips):
    with av.open(str(tmp_path / "a.mov"), "w") as out:
        stream = out.add_stream("libx264", rate=12, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(0, hflip=flips[0], vflip=flips[1])
        out.mux(stream.encode(av.VideoFrame.from_ndarray(quarters(), format="rgb24")))
        out.mux(stream.encode(None))
    assert corners(decode_frames(tmp_path / "a.mov", [0])[0]) == ("GRWB" if flips[0] else "BWRG")


@pytest.mark.parametrize(
    ("name", "codec", "aspect", "size"),
    [
        ("a.mp4", "libx264", Fraction(2), (48, 128)),
        ("a.mkv", "libx264", Fraction(1, 2), (96, 64)),
        ("a.ts", "mpeg2video", Fraction(4, 3), (48, 85)),
        ("a.avi", "mpeg4", Fraction(3, 2), (48, 96)),
        ("a.mp4", "libx264", Fraction(1, 200), (48, 64)),
    ],
)
def test_pixels_that_are_not_square(tmp_path, name, codec, aspect, size):
    """The last: no camera has such pixels."""
    fps = 25 if codec == "mpeg2video" else 12
    path = film(tmp_path / name, 12, fps=fps, codec=codec, aspect=aspect, picture=quarters)
    info = probe(path)
    height, width = (info.height, info.width)
    assert (height, width) == size
    asked = []
    clip = read_clip(path, lambda *given: asked.append(given) or (24, 32), frames=2)
    assert asked == [(height, width, 2, "video")]
    assert clip.size == (height, width)
    assert corners(decode_frames(path, [1])[0]) == "RGBW"
    assert decode_frames(path, [1]).shape[1:3] == (height, width)


def test_pixels_that_are_not_square_in_a_turned_film(tmp_path):
    path = matrix(film(tmp_path / "a.mp4", 2, aspect=Fraction(2), picture=quarters), 0, 1, -1, 0)
    info = probe(path)
    assert (info.height, info.width) == (128, 48)
    assert corners(decode_frames(path, [0])[0]) == "BRWG"


# -- which stream ---------------------------------------------------------------------------------------------------------

FILM = ("libx264", (64, 48), 24, "yuv420p")


@pytest.mark.parametrize(
    "specs",
    [
        [("mjpeg", (32, 24), 1, "yuvj420p", True), (*FILM, False)],
        [("mjpeg", (640, 480), 1, "yuvj420p", True), (*FILM, False)],
        [("libx264", (32, 24), 24, "yuv420p", True), (*FILM, False)],
        [("mjpeg", (640, 480), 3, "yuvj420p", None), (*FILM, None)],
        [("libx264", (80, 60), 24, "yuv420p", False), (*FILM, True)],
        [(*FILM, None), ("mjpeg", (32, 24), 2, "yuvj420p", None)],
    ],
    ids=["thumbnail", "cover", "preview", "stills", "default", "film first"],
)
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_the_film_among_several_streams(tmp_path, name, specs):
    info, read, _ = every(streams(tmp_path / name, *specs))
    assert (info.frames, info.width, info.height) == (24, 64, 48)
    assert read == list(range(24))


# -- containers, names, notes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.avi", "a.mp4", "a.mkv"])
def test_notes_that_are_no_utf8(tmp_path, name):
    path = film(tmp_path / name, 12, codec="mpeg4", title="caf#")
    data = path.read_bytes()
    assert b"caf#" in data
    path.write_bytes(data.replace(b"caf#", b"caf\xe9"))
    assert every(path)[1] == list(range(12))


def test_whatever_the_decoder_raises_names_the_file(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mp4", 3)
    for error in (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"), KeyError("pix"), RuntimeError("x")):

        def broken(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(av, "open", broken)
            with pytest.raises(VideoError, match=r"a\.mp4: cannot be opened"):
                probe(path)


@pytest.mark.parametrize(
    "name", ["12:30:05.mp4", "http:film.mp4", "frame%03d.mp4", "-loop.mp4", "concat:a|b.mp4", "a?b#c.mp4"]
)
def test_names_are_names(tmp_path, monkeypatch, name):
    """No file name is an address, a pattern or an option."""
    monkeypatch.chdir(tmp_path)
    film(tmp_path / "plain.mp4", 3)
    shutil.move(tmp_path / "plain.mp4", tmp_path / name)
    assert probe(name).frames == 3
    assert numbers(decode_frames(name, [2])) == [2]
    assert numbers(read_clip(name, as_is, frames=3).frames) == [0, 1, 2]


def test_a_picture_named_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(quarters()).save("12:30.png")
    assert corners(read_clip("12:30.png", as_is).frames[0]) == "RGBW"


LISTS = {
    "concat": "ffconcat version 1.0\nfile secret.ts\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:2,\nsecret.ts\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet><Representation'
    ' id="1"><BaseURL>secret.ts</BaseURL></Representation></AdaptationSet></Period></MPD>\n',
}


@pytest.mark.parametrize("suffix", [".mp4", ".m3u8", ".png", ".txt"])
@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_other_files_are_refused(tmp_path, monkeypatch, kind, suffix):
    monkeypatch.chdir(tmp_path)
    film(tmp_path / "secret.ts", 6)
    (tmp_path / f"upload{suffix}").write_text(LISTS[kind])
    opened = []
    monkeypatch.setattr(film_container.Reader, "frames", lambda *_: opened.append(1))
    for call in (probe, lambda p: decode_frames(p, [0]), lambda p: read_clip(p, as_is)):
        with pytest.raises(VideoError, match=f"upload{suffix}"):
            call(f"upload{suffix}")
    assert not opened


def test_series_of_pictures_are_no_film(tmp_path):
    for i in range(3):
        Image.fromarray(quarters()).save(tmp_path / f"a{i}.png")
    with pytest.raises(VideoError, match="no such file"):
        read_clip(tmp_path / "a%d.png", as_is)
    with pytest.raises(VideoError, match="still picture"):
        probe(tmp_path / "a0.png")


def test_what_is_no_film_says_what_it_is(tmp_path):
    for name, data, words in (
        ("a.mp4", b"hello\n" * 300, "not a video"),
        ("b.mp4", b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(200), "not a video|cannot be opened|still picture"),
        (
            "c.mkv",
            b"RIFF"
            + bytes(4)
            + b"WAVEfmt "
            + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
            + b"data"
            + bytes(400),
            "wav",
        ),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VideoError, match=words):
            probe(tmp_path / name)


# -- damage ---------------------------------------------------------------------------------------------------------------


def harmed(path, target, change):
    data = bytearray(path.read_bytes())
    change(data)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("where", [0.3, 0.5, 0.7])
def test_what_the_container_loses_is_told(tmp_path, where):
    """2,000 zeroed bytes in the middle of a Matroska file: frames are gone, and nothing fails to decode."""
    path = film(tmp_path / "a.mkv", 48, fps=25, width=128, height=96, picture=films.noisy)

    def zero(data):
        at = int(len(data) * where)
        data[at : at + 2000] = bytes(2000)

    bad = harmed(path, tmp_path / "bad.mkv", zero)
    with pytest.warns(VideoWarning, match=r"bad\.mkv: .*(damaged|incomplete).*FFmpeg: ") as caught:
        info = probe(bad)
    assert info.frames < 48
    assert f"about {48 - info.frames} frames are missing" in str(caught[0].message)
    with pytest.warns(VideoWarning, match="FFmpeg"):
        read_clip(bad, as_is, frames=4)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mkv", "libx264"), ("a.mp4", "libx264"), ("a.mkv", "mpeg4"), ("a.mkv", "mjpeg")]
)
def test_what_the_decoder_makes_up_is_told(tmp_path, name, codec):
    """Rubbish inside of one picture: it and what is built on it are said to be damaged, and no others."""
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = film(tmp_path / name, 36, width=128, height=96, codec=codec, pix_fmt=pix_fmt, picture=films.noisy)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    start, size = packets[14]

    def spoil(data):
        data[start + size // 3 : start + size] = np.random.default_rng(1).bytes(size - size // 3)

    bad = harmed(path, tmp_path / ("bad-" + name), spoil)
    with pytest.warns(VideoWarning, match=r"bad-a.*(damage|could not be decoded)"):
        decode_frames(bad, [5, 14, 20])
    clean = decode_frames(path, [5, 11, 24, 35])
    np.testing.assert_array_equal(decode_frames(bad, [5, 11, 24, 35]), clean)


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mjpeg"), ("a.avi", "mpeg4")])
def test_what_an_index_knows_of_is_missed(tmp_path, name, codec):
    """A piece cut out of an AVI: it is read on after it, and nothing complains."""
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = film(tmp_path / name, 36, width=128, height=96, codec=codec, pix_fmt=pix_fmt, picture=films.noisy)

    def cut(data):
        at = len(data) // 2
        del data[at : at + len(data) // 12]

    with pytest.warns(VideoWarning, match=r"bad\.avi: the file is (incomplete|damaged)"):
        info = probe(harmed(path, tmp_path / "bad.avi", cut))
    assert info.frames < 36


def test_two_files_with_the_same_fault_are_both_told(tmp_path):
    path = film(tmp_path / "a.mkv", 48, fps=25, width=128, height=96, picture=films.noisy)

    def zero(data):
        data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)

    for name in ("b.mkv", "c.mkv"):
        with pytest.warns(VideoWarning, match=name):
            probe(harmed(path, tmp_path / name, zero))


def test_listening_is_of_one_thread_and_leaves_the_log_as_it_was(tmp_path):
    good = film(tmp_path / "good.mkv", 24, picture=films.noisy, width=128, height=96)
    long = film(tmp_path / "a.mkv", 48, fps=25, width=128, height=96, picture=films.noisy)

    def zero(data):
        data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)

    files = [harmed(long, tmp_path / f"bad{i}.mkv", zero) for i in range(4)]
    files += [shutil.copy(good, tmp_path / f"good{i}.mkv") for i in range(4)]
    said, before = {}, av.logging.get_level()

    def look(path):
        from hybridvlm.video.index import index_of

        said[os.path.basename(path)] = index_of(path).remarks
        decode_frames(path, [0, 5])

    threads = [threading.Thread(target=look, args=(path,)) for path in files]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads)
    assert av.logging.get_level() == before
    assert {name for name, remarks in said.items() if remarks} == {f"bad{i}.mkv" for i in range(4)}


# -- pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jfif", "JPEG"),
        ("a", "PNG"),
        ("a.mp4", "JPEG"),
        ("a.png", "WEBP"),
        ("a.heic", "JPEG"),
        ("A.JPE", "JPEG"),
        ("a.b", "BMP"),
        ("a.x", "GIF"),
        ("a.dat", "AVIF"),
        ("a.tmp", "TIFF"),
    ],
)
def test_pictures_are_known_by_what_they_hold(tmp_path, name, kind):
    Image.fromarray(quarters()).save(tmp_path / name, kind)
    clip = read_clip(tmp_path / name, as_is)
    assert (clip.kind, clip.frames.shape, corners(clip.frames[0])) == ("image", (1, 48, 64, 3), "RGBW")


def test_a_film_named_as_a_picture_is_a_film(tmp_path):
    film(tmp_path / "a.mp4", 5)
    clip = read_clip(shutil.copy(tmp_path / "a.mp4", tmp_path / "a.png"), as_is, frames=5)
    assert (clip.kind, numbers(clip.frames)) == ("video", list(range(5)))


def test_a_row_of_jpegs_is_a_film(tmp_path):
    path = film(
        tmp_path / "a.jpg", 6, codec="mjpeg", pix_fmt="yuvj420p", container="mjpeg", options={"qmin": "1", "qmax": "2"}
    )
    clip = read_clip(path, as_is, frames=6)
    assert (clip.kind, numbers(clip.frames)) == ("video", list(range(6)))


def mark(mode):
    """A black mark in the middle of a transparent ground that is black underneath."""
    image = np.zeros((48, 64, 4), np.uint8)
    image[12:36, 16:48, 3] = 255
    image = Image.fromarray(image, "RGBA")
    if mode == "P":
        image = Image.fromarray(np.where(np.asarray(image)[..., 3] > 0, 1, 0).astype(np.uint8), "P")
        image.putpalette([0, 0, 0] * 256)
        image.info["transparency"] = 0
    elif mode in ("1", "L", "RGB", "I;16"):
        shape = np.full((48, 64), 7, np.uint16 if mode == "I;16" else np.uint8)
        shape[12:36, 16:48] = 0
        image = Image.fromarray(shape).convert("RGB") if mode == "RGB" else Image.fromarray(shape)
        image.info["transparency"] = (7, 7, 7) if mode == "RGB" else 7
    elif mode != "RGBA":
        image = image.convert(mode)
    return image


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "RGBA"),
        ("a.png", "LA"),
        ("a.png", "P"),
        ("a.png", "L"),
        ("a.png", "RGB"),
        ("a.png", "I;16"),
        ("a.webp", "RGBA"),
        ("a.gif", "P"),
        ("a.tif", "RGBA"),
        ("a.avif", "RGBA"),
    ],
)
def test_transparent_parts_stand_on_white(tmp_path, name, mode):
    image = mark(mode)
    extra = {"lossless": True} if name.endswith("webp") else {}
    if "transparency" in image.info:
        extra["transparency"] = image.info["transparency"]
    image.save(tmp_path / name, **extra)
    shown = read_image(tmp_path / name)[0].astype(int)
    assert shown[24, 32].max() < 20
    assert shown[2, 2].min() > 235
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    half.save(tmp_path / "half.png")
    assert read_image(tmp_path / "half.png")[0, 4, 4].tolist() == pytest.approx([255, 127, 127], abs=1)


def shots(count=8, transparent=False):
    out = [Image.fromarray(films.plain(4 * i)) for i in range(count)]
    return [mark("RGBA") for _ in range(count)] if transparent else out


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.gif", "a.avif", "a.jpg"])
def test_animated_pictures_are_films(tmp_path, name):
    """The last by its content, under a wrong name."""
    first, *rest = shots()
    lengths = [100, 200, 300, 400, 500, 600, 700, 800]
    kind = {"a.jpg": "WEBP"}.get(name)
    extra = {"lossless": True} if name in ("a.webp", "a.jpg") else {"quality": 100} if name == "a.avif" else {}
    first.save(tmp_path / name, kind, save_all=True, append_images=rest, duration=lengths, **extra)
    info = probe(tmp_path / name)
    assert (info.frames, info.width, info.height) == (8, 64, 48)
    assert (info.duration, info.fps) == (pytest.approx(3.6), pytest.approx(8 / 3.6))
    assert frame_seconds(tmp_path / name, [0, 1, 2, 7]) == pytest.approx((0, 0.1, 0.3, 2.8))
    clip = read_clip(tmp_path / name, as_is, frames=8)
    assert clip.kind == "video"
    assert np.abs(np.asarray(numbers(clip.frames)) - 4 * np.arange(8)).max() <= 1
    assert (
        np.abs(np.asarray(numbers(decode_frames(tmp_path / name, [5, 2, 5], size=(10, 12)))) - [20, 8, 20]).max() <= 1
    )
    with pytest.warns(VideoWarning, match="8 frames; the first"):
        assert read_image(tmp_path / name).shape == (1, 48, 64, 3)


def test_animated_pictures_without_times_and_ground(tmp_path):
    """Nought is no time: browsers show such frames for a tenth of a second. Transparent parts stand on white."""
    first, *rest = [Image.new("RGBA", (16, 16), (0, 0, 10 * i, 0)) for i in range(4)]
    dot = Image.new("RGBA", (4, 4), (0, 0, 0, 255))
    for i, image in enumerate([first, *rest]):
        image.paste(dot, (3 * i, 0))
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=0, disposal=2)
    assert probe(tmp_path / "a.gif").duration == pytest.approx(0.4)
    frames = decode_frames(tmp_path / "a.gif", range(4))
    assert frames[:, 12, 12].min() == 255
    assert [int(frames[i, 1, 3 * i + 1].max()) for i in range(4)] == [0] * 4


@pytest.mark.parametrize("name", ["a.avif", "a.gif"])
def test_an_animation_that_breaks_off(tmp_path, name):
    """What can be read is used, with a word; or the file is refused."""
    first, *rest = [Image.fromarray(films.noisy(i)) for i in range(6)]
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=100)

    def spoil(data):
        at = len(data) * 2 // 3
        data[at : at + len(data) // 4] = bytes(len(data) // 4)

    bad = harmed(tmp_path / name, tmp_path / ("bad-" + name), spoil)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VideoWarning)
        try:
            read = read_clip(bad, as_is, frames=2)
        except VideoError as error:
            assert "bad-a" in str(error)
            return
    assert max(read.numbers) + 1 == 6 or any("damaged" in str(w.message) for w in caught)


def test_the_picture_before_an_animation_is_no_frame(tmp_path):
    cover, *rest = shots()
    cover.save(tmp_path / "a.png", save_all=True, append_images=rest, duration=100, default_image=True)
    assert probe(tmp_path / "a.png").frames == 7
    assert numbers(decode_frames(tmp_path / "a.png", range(7))) == [4 * i for i in range(1, 8)]


def test_pages_are_counted(tmp_path):
    first, *rest = shots(3)
    first.save(tmp_path / "a.tif", save_all=True, append_images=rest)
    with pytest.warns(VideoWarning, match=r"a\.tif: has 3 pages; the first"):
        clip = read_clip(tmp_path / "a.tif", as_is)
    assert (clip.kind, numbers(clip.frames)) == ("image", [0])


def test_previews_beside_a_picture_are_no_pages(tmp_path, monkeypatch):
    from PIL import TiffImagePlugin

    first, small = shots(2)
    smaller_copy = TiffImagePlugin.ImageFileDirectory_v2()
    smaller_copy[254] = 1
    with TiffImagePlugin.AppendingTiffWriter(str(tmp_path / "a.tif"), True) as out:
        first.save(out, "TIFF")
        out.newFrame()
        small.resize((16, 12)).save(out, "TIFF", tiffinfo=smaller_copy)
    # the writer, whose file is closed by then, complains when it is collected
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    del out
    gc.collect()
    with Image.open(tmp_path / "a.tif") as image:
        assert image.n_frames == 2
    assert read_image(tmp_path / "a.tif").shape == (1, 48, 64, 3)


def test_several_pictures_in_a_jpeg_are_one(tmp_path):
    first, *rest = shots(2)
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=rest)
    assert numbers(read_clip(tmp_path / "a.jpg", as_is).frames) == [0]


RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ((RAMP * 65535).astype(np.int32), "from 0 to 65535"),
        ((RAMP * 2000 - 1000).astype(np.int32), "from -1000 to 1000"),
        ((RAMP * 5e4).astype(np.float32), "from 0 to 50000"),
        (RAMP.astype(np.float32), ""),
    ],
)
def test_deep_pictures_are_scaled(tmp_path, values, warned):
    Image.fromarray(values).save(tmp_path / "a.tif")
    if warned:
        with pytest.warns(VideoWarning, match=rf"a\.tif: holds values {warned}"):
            shown = read_clip(tmp_path / "a.tif", as_is).frames[0]
    else:
        shown = read_image(tmp_path / "a.tif")[0]
    np.testing.assert_allclose(shown[..., 0].astype(float), 255 * RAMP, atol=1)


def tiff(path, values, *, kind, bits, white_is_zero=False):
    """An uncompressed TIFF of one channel. kind: 1 unsigned, 2 signed, 3 float."""
    data, (height, width) = values.tobytes(), values.shape
    entries = [
        (256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_zero else 1),
        (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, kind),
    ]  # fmt: skip
    table = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in entries)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(entries)) + table + bytes(4))
    return path


def test_other_deep_pictures(tmp_path):
    whole = (RAMP * (2**32 - 1)).astype("<u4")
    with pytest.warns(VideoWarning, match="holds values from 0 to"):
        shown = read_image(tiff(tmp_path / "a.tif", whole, kind=1, bits=32))[0, ..., 0]
    np.testing.assert_allclose(shown.astype(float), 255 * RAMP, atol=1)
    signed = (RAMP * 65535 - 32768).astype("<i2")
    with pytest.warns(VideoWarning, match="holds values from -32768"):
        shown = read_image(tiff(tmp_path / "b.tif", signed, kind=2, bits=16))[0, ..., 0]
    np.testing.assert_allclose(shown.astype(float), 255 * RAMP, atol=1)
    turned = (RAMP * 65535).astype("<u2")
    shown = read_image(tiff(tmp_path / "c.tif", turned, kind=1, bits=16, white_is_zero=True))[0, ..., 0]
    np.testing.assert_allclose(shown.astype(float), 255 * (1 - RAMP), atol=1)
    Image.fromarray(turned).save(tmp_path / "d.png")
    np.testing.assert_allclose(read_image(tmp_path / "d.png")[0, ..., 0].astype(float), 255 * RAMP, atol=1)
    Image.frombytes("I;16B", (64, 48), turned.astype(">u2").tobytes()).save(tmp_path / "e.tif")
    np.testing.assert_allclose(read_image(tmp_path / "e.tif")[0, ..., 0].astype(float), 255 * RAMP, atol=1)
    holes = RAMP.astype(np.float32)
    holes[0, 0] = np.nan
    Image.fromarray(holes).save(tmp_path / "f.tif")
    with pytest.raises(VideoError, match=r"f\.tif: holds values that are no numbers"):
        read_image(tmp_path / "f.tif")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "1"),
        ("a.tif", "1"),
        ("a.png", "P"),
        ("a.tif", "CMYK"),
        ("a.jpg", "CMYK"),
        ("a.tif", "LAB"),
        ("a.tif", "YCbCr"),
    ],
)
def test_pictures_of_other_colours(tmp_path, name, mode):
    image = Image.fromarray(quarters())
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    elif mode == "1":
        image = Image.fromarray(films.plain(0)).convert("L").point(lambda _: 255).convert("1")
    else:
        image = image.convert(mode)
    image.save(tmp_path / name)
    shown = read_image(tmp_path / name)
    assert corners(shown[0]) == ("WWWW" if mode == "1" else "RGBW")


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "JPEG2000"), ("a.jpg", "EPS"), ("a.png", "ICO"), ("a.tif", "PPM"), ("a.png", "TGA")]
)
def test_only_pictures_of_known_formats(tmp_path, name, kind):
    Image.fromarray(quarters()).save(tmp_path / name, kind)
    with pytest.raises(VideoError, match=f"{name}.*none of PNG"):
        read_image(tmp_path / name)
    with pytest.raises(VideoError, match=name):
        read_clip(tmp_path / name, as_is)


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"heix"])
def test_heic_is_refused_in_words(tmp_path, brand):
    box = struct.pack(">I4s4sI4s4s", 24, b"ftyp", brand, 0, b"mif1", b"heic")
    (tmp_path / "a.heic").write_bytes(box + struct.pack(">I4s", 108, b"meta") + bytes(100))
    for call in (read_image, probe, lambda p: read_clip(p, as_is), lambda p: decode_frames(p, [0])):
        with pytest.raises(VideoError, match=r"a\.heic: is a HEIC picture.*save it as"):
            call(tmp_path / "a.heic")


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    for side in (13000, 9000, 60000):
        head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        path = tmp_path / f"{side}.png"
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", head)
            + chunk(b"IDAT", zlib.compress(bytes(1000)))
            + chunk(b"IEND", b"")
        )
        monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
        for call in (read_image, lambda p: read_clip(p, as_is), probe):
            with pytest.raises(VideoError, match=rf"{side}\.png: has .* pixels, more than"):
                call(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("size", [20, 26])
def test_pictures_that_break_off_at_once_are_named_as_pictures(tmp_path, kind, size):
    held = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 10, 10)).save(held, kind)
    path = tmp_path / "cut"
    path.write_bytes(held.getvalue()[:size])
    with pytest.raises(VideoError, match="cannot be read as an image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_clip(path, lambda *_: (28, 28))


def test_damaged_pictures_are_refused(tmp_path):
    Image.fromarray(films.noisy(0)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for name, data in (
        ("cut.png", whole[: len(whole) // 2]),
        ("head.png", whole[:20]),
        ("zero.png", whole[:200] + bytes(300)),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VideoError, match=name):
            read_image(tmp_path / name)
        with pytest.raises(VideoError, match=name):
            read_clip(tmp_path / name, as_is)


def test_a_picture_with_broken_notes_is_read(tmp_path):
    Image.fromarray(quarters()).save(
        tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01", quality=95
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's own remark
        assert corners(read_image(tmp_path / "a.jpg")[0]) == "RGBW"


# -- what is easily missed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "size"), [("libx265", 700), ("libx264", 500)])
def test_what_is_lost_while_a_film_is_opened_is_told(tmp_path, codec, size):
    """Damage in the first kilobytes, which FFmpeg reads, and complains of, before the first packet is asked for."""
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = film(tmp_path / "a.mkv", 36, codec=codec, picture=films.noisy, width=128, height=96, options=options)
    with av.open(str(path)) as container:
        places = [p.pos for p in container.demux(video=0) if p.size]

    def cut(data):
        del data[places[0] + 200 : places[0] + 200 + size]

    bad = harmed(path, tmp_path / "bad.mkv", cut)
    with pytest.warns(VideoWarning, match=r"bad\.mkv: the file is (damaged|incomplete).*FFmpeg: "):
        assert probe(bad).frames < 36


def test_pictures_that_are_missing_at_the_start_are_told(tmp_path):
    """The first cluster is overwritten by what has to be passed over: FFmpeg says nothing, the index knows of it."""
    path = film(
        tmp_path / "a.mkv", 36, gop=4, seconds=[5 + i / 12 for i in range(36)], muxer={"cluster_time_limit": "300"}
    )
    assert probe(path).frames == 36
    data = bytearray(path.read_bytes())
    clusters = [at for at in range(len(data)) if data[at : at + 4] == b"\x1f\x43\xb6\x75"]
    gap = clusters[3] - clusters[0]
    # an EBML Void of that length
    data[clusters[0] : clusters[0] + 9] = b"\xec\x01" + (gap - 9).to_bytes(7, "big")
    (tmp_path / "bad.mkv").write_bytes(data)
    with pytest.warns(VideoWarning, match=r"bad\.mkv: .*the index knows of pictures that begin \d"):
        assert probe(tmp_path / "bad.mkv").frames < 36


@pytest.mark.parametrize("offset", [1.0, 1.5, 31.0])
def test_parts_whose_clock_runs_on_are_whole(tmp_path, offset):
    parts = [transport(tmp_path / f"{i}.ts", 12 * i, i * offset) for i in range(2)]
    assert every(joined(tmp_path / "joined.ts", *parts))[1] == list(range(24))


def test_a_broadcast_that_lost_packets_is_damaged(tmp_path):
    path = transport(tmp_path / "a.ts", 0, 0.0, 36, picture=films.noisy, width=128, height=96)
    for name, begin, size in (("bytes.ts", 0.33, 700), ("packets.ts", 0.5, 188 * 6)):

        def cut(data, begin=begin, size=size):
            at = int(len(data) * begin) // 188 * 188
            del data[at : at + size]

        with pytest.warns(VideoWarning, match=f"{name}: the file is damaged"):
            probe(harmed(path, tmp_path / name, cut))


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mov", "mpeg4"), ("fragments.mp4", "libx264"), ("a.asf", "mpeg4"), ("a.nut", "mpeg4")],
)
def test_a_second_film_behind_the_first_is_missed(tmp_path, name, codec):
    muxer = {"movflags": "frag_keyframe+empty_moov"} if name == "fragments.mp4" else {}
    parts = [film(tmp_path / f"{i}{name}", 12, first=12 * i, codec=codec, muxer=muxer) for i in range(2)]
    assert probe(parts[0]).frames == 12
    size = parts[0].stat().st_size
    with pytest.warns(VideoWarning, match=rf"joined-.*: a second video begins at byte {size} of"):
        probe(joined(tmp_path / f"joined-{name}", *parts))


def ghost(path, codec, pix_fmt):
    """Four pictures of a black mark on a transparent ground that is black underneath."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=12, options={"auto-alt-ref": "0"} if codec == "libvpx" else {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(np.asarray(mark("RGBA")), format="rgba").reformat(format=pix_fmt)
            frame.pts, frame.time_base = i, Fraction(1, 12)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.avi", "png", "rgba"),
        ("a.mov", "qtrle", "argb"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.mkv", "libvpx", "yuva420p"),
    ],
)
def test_transparent_films_stand_on_white(tmp_path, name, codec, pix_fmt):
    path = ghost(tmp_path / name, codec, pix_fmt)
    for shown in (decode_frames(path, [0, 3]), read_clip(path, lambda *_: (24, 32), frames=2).frames):
        height, width = shown.shape[1:3]
        assert shown[:, height // 2, width // 2].max() < 20
        assert shown[:, 2, 2].min() > 235


def test_a_fourth_channel_that_was_never_filled_hides_nothing(tmp_path):
    pixels = np.dstack([quarters(), np.zeros((48, 64), np.uint8)])
    frame = film_container.on_white(av.VideoFrame.from_ndarray(pixels, format="rgba"))
    assert corners(frame.to_ndarray(format="rgb24")) == "RGBW"


@pytest.mark.parametrize("extra", [{}, {"kmin": 0}, {"minimize_size": True}])
def test_animated_webp_of_opaque_parts_stands_on_white(tmp_path, extra):
    """Cropped to what is opaque, its frames carry no mark of transparency; what they leave free is transparent."""
    shown = []
    for i in range(5):
        picture = np.zeros((48, 64, 4), np.uint8)
        picture[12:36, 4 + 4 * i : 12 + 4 * i] = 200, 0, 0, 255
        shown.append(Image.fromarray(picture, "RGBA"))
    path = tmp_path / "a.webp"
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=100, lossless=True, **extra)
    frames = decode_frames(path, range(5))
    assert frames[:, 2, 2].min() == 255
    assert [frames[i, 24, 8 + 4 * i].tolist() for i in range(5)] == [[200, 0, 0]] * 5
    with pytest.warns(VideoWarning, match="the first"):
        assert read_image(path)[0, 2, 2].tolist() == [255] * 3


@pytest.mark.parametrize(
    "head", [b"%PDF-1.4\n1 0 obj\n<< /Filter /DCTDecode >>\nstream\n", b"<html><body>", b"PK\x03\x04" + bytes(26)]
)
def test_a_jpeg_in_another_file_is_no_film(tmp_path, head):
    Image.fromarray(films.noisy(0)).save(tmp_path / "a.jpg", quality=95)
    (tmp_path / "a.bin").write_bytes(head + 3 * (tmp_path / "a.jpg").read_bytes() + b"\nendstream\n%%EOF")
    for call in (probe, lambda p: read_clip(p, as_is)):
        with pytest.raises(VideoError, match=r"a\.bin"):
            call(tmp_path / "a.bin")


@pytest.mark.parametrize("name", ["img%d.png", "a?b.jpg", "x[1]*.png"])
def test_a_film_under_the_name_of_a_series_of_pictures(tmp_path, name):
    shutil.move(film(tmp_path / "a.mkv", 12), tmp_path / name)
    assert every(tmp_path / name)[1] == list(range(12))


def test_deep_png_with_a_transparent_colour(tmp_path):
    import zlib

    values = np.full((48, 64, 3), (40000, 300, 65000), np.uint16)
    values[12:36, 16:48] = 0

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)),
        (b"tRNS", struct.pack(">HHH", 40000, 300, 65000)),
    ]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    shown = read_image(tmp_path / "a.png")[0]
    assert (shown[2, 2].tolist(), shown[24, 32].tolist()) == ([255] * 3, [0] * 3)


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(24000, 1001)])
def test_a_rate_out_of_milliseconds_is_exact(tmp_path, rate):
    """An MP4 put into Matroska: stamps and lengths become whole milliseconds, and no rate is declared."""
    source = film(tmp_path / "a.mp4", 39, fps=rate, seconds=[i / rate for i in range(39)])
    assert probe(trimmed(source, tmp_path / "b.mkv", 0)).fps == pytest.approx(float(rate), rel=1e-9)
