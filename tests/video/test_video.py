"""Decoding: the exact frame, or one clear line; sampling rules."""

import pathlib
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
from helpers.stamped import BITS, BLOCK, FRAMES, HEIGHT, WIDTH, stamped
from PIL import Image

from hybridvlm import video as video_files
from hybridvlm.models.media import resize
from hybridvlm.video import (
    VideoError,
    VideoInfo,
    VideoWarning,
    decode_frames,
    frame_seconds,
    probe,
    read_clip,
    read_image,
    sample_indices,
)

CLIP = pathlib.Path(__file__).parents[3] / "shared" / "videos" / "magic.mp4"


def stamps(frames):
    """The number on each frame [n,64,96,3]."""
    blocks = frames[:, 2:14, :, 0].reshape(len(frames), 12, BITS, BLOCK)[..., 2:-2].mean((1, 3)) > 128
    return (blocks << np.arange(BITS)).sum(1).tolist()


@pytest.mark.parametrize("gop", [1, 2, 5, 30])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
def test_exact_frames(tmp_path, gop, suffix):
    path = stamped(tmp_path / f"clip{suffix}", gop=gop, b_frames=3)
    info = probe(path)
    assert (info.frames, info.width, info.height, info.fps) == (FRAMES, WIDTH, HEIGHT, 25.0)
    assert info.duration == pytest.approx(FRAMES / 25, abs=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = [60, 3, 4, 4, 31, 0, 17, 58, 29, 30]
        assert stamps(decode_frames(path, asked)) == asked
        assert stamps(decode_frames(path, range(FRAMES))) == list(range(FRAMES))
        for one in (0, 1, 29, 30, 31, 60):
            assert stamps(decode_frames(path, [one])) == [one]


@pytest.mark.parametrize("gop", [5, 30])
def test_exact_frames_in_open_groups(tmp_path, gop):
    path = stamped(tmp_path / "clip.mp4", gop=gop, open_gop=True)
    for step in (1, 2, 7, 13):
        asked = list(range(0, FRAMES, step))
        assert stamps(decode_frames(path, asked)) == asked


def test_exact_frames_of_other_codecs(tmp_path):
    for name, codec in (("clip.mpg", "mpeg2video"), ("clip.webm", "libvpx")):
        path = stamped(tmp_path / name, gop=12, b_frames=0, codec=codec)
        asked = [40, 12, 11, 59]
        assert stamps(decode_frames(path, asked)) == asked


def test_seeks_only_where_a_key_frame_lies_ahead(tmp_path, monkeypatch):
    """Sparse frames over short groups decode few frames; dense frames never decode one twice."""
    path = stamped(tmp_path / "clip.mp4", gop=5, b_frames=0)
    probe(path)
    count = [0]
    plain = video_files.container.Reader.frames

    def counted(*given):
        for frame in plain(*given):
            count[0] += 1
            yield frame

    monkeypatch.setattr(video_files.container.Reader, "frames", counted)
    assert stamps(decode_frames(path, [2, 32, 57])) == [2, 32, 57]
    assert count[0] <= 9
    count[0] = 0
    decode_frames(path, range(FRAMES))
    assert count[0] == FRAMES


def test_a_changed_file_is_read_again(tmp_path):
    path = stamped(tmp_path / "clip.mp4", frames=10)
    assert probe(path).frames == 10
    stamped(path, frames=20)
    assert probe(path).frames == 20


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation(tmp_path, degrees):
    """The stored picture is turned counterclockwise by the angle, as players show it."""
    path = stamped(tmp_path / "clip.mp4", rotation=degrees)
    info = probe(path)
    assert (info.width, info.height) == ((WIDTH, HEIGHT) if degrees == 180 else (HEIGHT, WIDTH))
    turned = decode_frames(path, [5, 44])
    assert turned.shape[1:3] == (info.height, info.width)
    assert stamps(np.rot90(turned, -degrees // 90, axes=(1, 2))) == [5, 44]


def test_size(tmp_path):
    path = stamped(tmp_path / "clip.mp4")
    frames = decode_frames(path, [9, 3], size=(2 * HEIGHT, 2 * WIDTH))
    assert frames.shape == (2, 2 * HEIGHT, 2 * WIDTH, 3)
    assert stamps(frames[:, ::2, ::2]) == [9, 3]


def test_indices_out_of_range(tmp_path):
    path = stamped(tmp_path / "clip.mp4", frames=10)
    with pytest.raises(IndexError, match=r"0\.\.9"):
        decode_frames(path, [3, 10])
    with pytest.raises(IndexError, match=r"0\.\.9"):
        decode_frames(path, [-1])
    with pytest.raises(ValueError, match="at least one"):
        decode_frames(path, [])


def refused(path, *words):
    for call in (probe, lambda p: decode_frames(p, [0])):
        with pytest.raises(VideoError) as caught:
            call(path)
        text = str(caught.value)
        assert "\n" not in text
        assert str(path) in text
        for word in words:
            assert word in text


def test_files_that_are_no_videos(tmp_path):
    refused(tmp_path / "missing.mp4", "no such file")
    refused(tmp_path, "not a file")
    (tmp_path / "empty.mp4").write_bytes(b"")
    refused(tmp_path / "empty.mp4", "empty")
    (tmp_path / "text.mp4").write_text("hello\n" * 200)
    refused(tmp_path / "text.mp4", "not a video")
    (tmp_path / "text.txt").write_text("hello\n" * 200)
    refused(tmp_path / "text.txt", "not a video")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    refused(tmp_path / "noise.mp4", "not a video")


def test_still_picture_and_sound(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name in ("still.png", "still.jpg"):
        image.new("RGB", (32, 32)).save(tmp_path / name)
        refused(tmp_path / name, "still picture")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for _ in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    refused(tmp_path / "sound.mp4", "no pictures")


def cut(source, target, share):
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def test_truncated_without_index_is_refused(tmp_path):
    refused(cut(stamped(tmp_path / "clip.mp4"), tmp_path / "cut.mp4", 0.6), "cut off")
    refused(cut(stamped(tmp_path / "clip.mkv"), tmp_path / "cut.mkv", 0.01))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_truncated_uses_what_decodes_and_says_so(tmp_path, suffix):
    options = {"movflags": "faststart"} if suffix == ".mp4" else None
    whole = stamped(tmp_path / f"clip{suffix}", gop=12, b_frames=0, options=options)
    path = cut(whole, tmp_path / f"cut{suffix}", 0.6)
    with pytest.warns(VideoWarning, match="cut"):
        info = probe(path)
    assert 20 < info.frames < 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stamps(decode_frames(path, range(info.frames))) == list(range(info.frames))


def test_undecodable_stretch_is_filled_and_said(tmp_path):
    path = stamped(tmp_path / "clip.mp4", gop=12, b_frames=0)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for start, size in packets[24:36]:  # one whole group of pictures
        data[start : start + size] = bytes(size)
    path.write_bytes(data)
    assert probe(path).frames == FRAMES
    with pytest.warns(VideoWarning, match="could not be decoded"):
        read = stamps(decode_frames(path, [20, 23, 27, 36, 50]))
    assert read == [20, 23, 23, 36, 50]
    with pytest.raises(VideoError, match="none of the 2"):
        decode_frames(path, [26, 29])


INFO = VideoInfo(frames=100, fps=25.0, duration=4.0, width=8, height=8)


def test_sampling_rules():
    assert sample_indices(INFO, 5).tolist() == [0, 24, 49, 74, 99]
    assert sample_indices(INFO, 1).tolist() == [0]
    assert sample_indices(INFO, 5, "middle").tolist() == [10, 30, 50, 70, 90]
    assert sample_indices(INFO, 64, "fps:2").tolist() == np.linspace(0, 99, 8).astype(int).tolist()
    assert len(sample_indices(INFO, 3, "fps:2")) == 3
    assert len(sample_indices(INFO, 3, "fps:0.01")) == 1


def test_rules_of_the_engines():
    """n frames of 100, by hand."""
    for rule, want in (
        ("uniform-round", [0, 25, 50, 74, 99]),
        ("middle-low", [9, 29, 49, 69, 89]),
        ("steps", [0, 20, 40, 60, 80]),
        ("inner", [16, 33, 50, 66, 83]),
    ):
        assert sample_indices(INFO, 5, rule).tolist() == want, rule
    assert sample_indices(INFO, 64, "qwen:2").tolist() == [0, 14, 28, 42, 57, 71, 85, 99]
    assert len(sample_indices(INFO, 64, "qwen:0.1")) == 4  # never fewer
    assert len(sample_indices(INFO, 5, "qwen:2")) == 4  # always an even number
    assert sample_indices(INFO, 64, "nemotron-train:2").tolist() == [5, 14, 23, 33, 42, 52, 61, 70]
    odd = VideoInfo(frames=101, fps=25.0, duration=4.04, width=8, height=8)
    assert sample_indices(odd, 4, "middle").tolist() == [12, 37, 62, 88]
    for rule in ("uniform", "uniform-round", "middle", "middle-low", "steps", "inner"):
        for total, n in ((7, 7), (359, 64), (10, 3), (2, 1)):
            numbers = sample_indices(VideoInfo(total, 25.0, total / 25, 8, 8), n, rule)
            assert len(numbers) == n
            assert (np.diff(numbers) > 0).all()
            assert numbers[0] >= 0
            assert numbers[-1] < total


@pytest.mark.parametrize("rule", ["uniform", "middle"])
def test_short_video_gives_all_frames_and_says_so(rule):
    short = VideoInfo(frames=6, fps=25.0, duration=0.24, width=8, height=8)
    with pytest.warns(VideoWarning, match=r"clip\.mp4: has 6 frames, fewer than the 64"):
        assert sample_indices(short, 64, rule, name="clip.mp4").tolist() == list(range(6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sample_indices(short, 6, rule).tolist() == list(range(6))


@pytest.mark.parametrize("rule", ["random", "fps", "fps:", "fps:fast", "fps:0", "fps:-2", "fps:R"])
def test_unknown_rules_are_refused(rule):
    with pytest.raises(ValueError, match="rule"):
        sample_indices(INFO, 8, rule)


def test_no_frames_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        sample_indices(INFO, 0)


def test_variable_rate(tmp_path):
    """Frames at uneven times: all are found by number, and their time stamps are the file's own."""
    path = tmp_path / "uneven.mkv"
    times = np.cumsum([0, *np.random.default_rng(0).integers(5, 200, FRAMES - 1)])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "10", "bf": "2", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for k, at in enumerate(times.tolist()):
            picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
            picture[:16] = np.repeat(255 * ((k >> np.arange(BITS)) & 1), BLOCK)[None, :, None]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert probe(path).frames == FRAMES
    asked = [60, 2, 33, 9]
    assert stamps(decode_frames(path, asked)) == asked
    assert frame_seconds(path, asked) == pytest.approx((times[asked] / 1000).tolist(), abs=2e-3)


def test_clips(tmp_path):
    path = stamped(tmp_path / "clip.mp4")
    asked = []

    def size_of(height, width, frames, kind):
        asked.append((height, width, frames, kind))
        return 32, 48

    clip = read_clip(path, size_of, frames=4)
    assert (clip.numbers, clip.kind, clip.size, clip.fps) == ((0, 20, 40, 60), "video", (HEIGHT, WIDTH), 25.0)
    assert clip.seconds == pytest.approx((0.0, 0.8, 1.6, 2.4))
    assert clip.frames.shape == (4, 32, 48, 3)
    assert asked == [(HEIGHT, WIDTH, 4, "video")]
    full = decode_frames(path, [20])
    np.testing.assert_array_equal(clip.frames[1], resize(full, (32, 48))[0])  # an image processor's, not the decoder's
    slow = stamped(tmp_path / "slow.mp4")
    drifting = read_clip(slow, size_of, frames=4, clock="milliseconds")
    assert drifting.seconds == (0.0, 20 * 0.04, 40 * 0.04, 60 * 0.04)
    again = read_clip(clip, lambda *_: (16, 16))
    assert (again.frames.shape, again.seconds) == ((4, 16, 16, 3), clip.seconds)
    image = read_clip(full[0], size_of)
    assert (image.kind, image.frames.shape) == ("image", (1, HEIGHT, WIDTH, 3))
    with pytest.raises(ValueError, match="uint8"):
        read_clip(full.astype(np.float32), size_of)


@pytest.mark.parametrize("degrees", [90, 180])
def test_clips_are_turned_before_they_are_scaled(tmp_path, degrees):
    path = stamped(tmp_path / "clip.mp4", rotation=degrees)
    clip = read_clip(path, lambda *_: (48, 40), frames=2)
    assert clip.size == ((WIDTH, HEIGHT) if degrees == 90 else (HEIGHT, WIDTH))
    np.testing.assert_array_equal(clip.frames[0], resize(decode_frames(path, [0]), (48, 40))[0])


def test_images_are_turned_as_their_camera_says(tmp_path):
    picture = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0], np.rot90(np.asarray(picture), -1))


def test_images_of_16_bits_are_scaled(tmp_path):
    Image.fromarray(np.asarray([[0, 256, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == [[0] * 3, [1] * 3, [255] * 3]


@pytest.mark.skipif(not CLIP.is_file(), reason="the real clip is not part of the repository")
def test_real_clip():
    info = probe(CLIP)
    assert (info.frames, info.width, info.height) == (359, 1920, 1080)
    assert info.fps == pytest.approx(59.94, abs=0.01)
    frames = decode_frames(CLIP, sample_indices(info, 4), size=(90, 160))
    with av.open(str(CLIP)) as container:
        expected = next(frame for k, frame in enumerate(container.decode(video=0)) if k == 119)
        assert np.array_equal(frames[1], expected.to_ndarray(format="rgb24", width=160, height=90))
