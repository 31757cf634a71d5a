"""A WebM's own blocks against one pass over its packets: the same index, or none from the blocks."""

import av
import numpy as np
import pytest
from helpers.stamped import FRAMES, stamped
from test_mp4 import both, same

from hybridvlm.video import decode_frames, matroska
from hybridvlm.video import index as indexes
from hybridvlm.video.errors import VideoTimeout, time_limit

QUICK = {"deadline": "realtime", "cpu-used": "8"}


def quick_film(path, codec, gop, count=40):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options=QUICK | {"g": str(gop)})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(count):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 5 * number, np.uint8), "rgb24")))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("suffix", "codec", "gop"), [(".webm", "libvpx", 7), (".mkv", "libvpx-vp9", 1), (".webm", "libvpx-vp9", 60)]
)
def test_the_blocks_give_the_index_of_the_packets(tmp_path, suffix, codec, gop):
    assert same(quick_film(tmp_path / f"clip{suffix}", codec, gop))


def with_sound(path, ticks):
    """A VP9 film with sound beside it, its pictures at these milliseconds; with pictures that are never shown, in their packets."""
    import fractions

    rng, tick = np.random.default_rng(0), fractions.Fraction(1, 1000)
    options = QUICK | {"g": "9"} | {"auto-alt-ref": "1", "lag-in-frames": "8", "deadline": "good"}
    with av.open(str(path), "w") as out:
        video = out.add_stream("libvpx-vp9", rate=25, options=options)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.time_base = video.codec_context.time_base = tick
        sound = out.add_stream("libopus", rate=48000)
        sound.layout = "mono"
        for number, at in enumerate(ticks):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 5 * number, np.uint8), "rgb24")
            picture.pts, picture.time_base = at, tick
            out.mux(video.encode(picture))
            heard = av.AudioFrame.from_ndarray(rng.normal(0, 1e-3, (1, 960)).astype(np.float32), "fltp", "mono")
            heard.sample_rate, heard.pts = 48000, 960 * number
            out.mux(sound.encode(heard))
        out.mux(video.encode(None))
        out.mux(sound.encode(None))
    return path


def test_uneven_times_sound_and_pictures_that_are_never_shown(tmp_path):
    ticks = np.cumsum(np.random.default_rng(1).integers(1, 400, 40)).tolist()
    path = with_sound(tmp_path / "clip.webm", [t - ticks[0] for t in ticks])
    assert same(path)
    frames = decode_frames(path, [0, 13, 39])
    assert [round(float(f.mean()) / 5) for f in frames] == [0, 13, 39]


def test_other_codecs_are_read_packet_by_packet(tmp_path):
    path = stamped(tmp_path / "clip.mkv", gop=10, b_frames=2)
    assert both(path)[0] is None and indexes.index_of(path).info.frames == FRAMES


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A path, and the bytes of a sound film to change and put there."""
    path = tmp_path_factory.mktemp("film") / "clip.webm"
    quick_film(path, "libvpx-vp9", 10)
    return path, path.read_bytes()


def test_files_that_are_not_plain_are_left_to_ffmpeg(film):
    path, data = film
    path.write_bytes(data)
    assert matroska.blocks(str(path)) is not None

    def left(changed):
        assert changed != data
        path.write_bytes(changed)
        return matroska.blocks(str(path)) is None

    cluster = data.index(b"\x1f\x43\xb6\x75")
    assert left(data[:-1]) and left(data[: len(data) // 2]) and left(data[:20])  # cut off
    assert left(data + data)  # a second film behind it
    assert left(data[: cluster + 4] + b"\x01" + b"\xff" * 7 + data[cluster + 12 :])  # a cluster of unknown size
    _, (_, start, end) = matroska._elements(data, 0, len(data))
    first = next(own for kind, *own in matroska._elements(data, start, end) if kind == matroska._CLUSTER)
    block, _ = next(own for kind, *own in matroska._elements(data, *first) if kind == matroska._SIMPLE)
    flags = block + 3
    for odd in (0x08, 0x02, 0x04, 0x06):  # invisible, several pictures in one
        assert left(data[:flags] + bytes([data[flags] | odd]) + data[flags + 1 :])
    # FFmpeg asks the pictures which of them are keys, not the container
    assert data[flags] == 0x80 and left(data[:flags] + b"\0" + data[flags + 1 :])
    assert left(data[: flags + 1] + bytes([data[flags + 1] | 0x04]) + data[flags + 2 :])
    # the cluster's time stamp under an id that is not known
    assert data[first[0]] == matroska._TIME and left(data[: first[0]] + b"\xe8" + data[first[0] + 1 :])


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
@pytest.mark.parametrize("said", [True, False])
def test_key_frames_are_those_of_the_pictures_whatever_a_remuxer_said(tmp_path, codec, said):
    """A picture in the middle under a flag that is wrong, which neither the first block nor those from the last key on show."""
    path = quick_film(tmp_path / "clip.webm", codec, 10)
    data = bytearray(path.read_bytes())
    _, (_, start, end) = matroska._elements(data, 0, len(data))
    (cluster,) = (own for kind, *own in matroska._elements(data, start, end) if kind == matroska._CLUSTER)
    blocks = [at for kind, at, _ in matroska._elements(data, *cluster) if kind == matroska._SIMPLE]
    flags = blocks[15 if said else 20] + 3
    assert bool(data[flags] & 0x80) is not said
    data[flags] ^= 0x80
    path.write_bytes(data)
    assert both(path)[0] is None
    found = indexes.index_of(path)
    assert found.key_place.tolist() == [0, 10, 20, 30]


def test_damaged_files_have_the_index_of_their_packets_or_none_of_the_blocks(film):
    path, data = film
    rng, taken = np.random.default_rng(0), 0
    for _ in range(24):
        some = bytearray(data)
        for at in rng.integers(0, len(data), 2):
            some[at] = rng.integers(256)
        path.write_bytes(bytes(some))
        try:
            quick, slow = both(path)
        except ValueError:  # no video to FFmpeg either
            continue
        if quick is not None:
            taken += 1
            np.testing.assert_array_equal(quick.pts, slow.pts)
            np.testing.assert_array_equal(quick.key_pts, slow.key_pts)
            assert quick.remarks == slow.remarks
    assert taken  # damage inside of pictures is no matter of the index


def test_a_time_limit_holds(film):
    path, data = film
    path.write_bytes(data)
    with pytest.raises(VideoTimeout), time_limit(1e-9):
        matroska.blocks(str(path))
