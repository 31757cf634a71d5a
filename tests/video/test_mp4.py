"""An MP4's tables against one pass over its packets: the same index, or none from the tables."""

import dataclasses
import fractions
import pathlib
import struct

import av
import numpy as np
import pytest
from helpers.stamped import FRAMES, stamped

from hybridvlm.video import index as indexes
from hybridvlm.video import mp4
from hybridvlm.video.decode import decode_frames

CLIP = pathlib.Path(__file__).parents[3] / "shared" / "videos" / "magic.mp4"


def both(path):
    """(index from the tables or None, index from the packets) of a file."""
    name = str(path)
    return indexes._from_tables(name, name), indexes._from_packets(name, name, pathlib.Path(path).stat().st_size)


def same(path):
    """Whether the tables give the packets' index, field for field."""
    quick, slow = both(path)
    if quick is None:
        return False
    for field in dataclasses.fields(slow):
        mine, theirs = getattr(quick, field.name), getattr(slow, field.name)
        if isinstance(theirs, np.ndarray):
            np.testing.assert_array_equal(mine, theirs, err_msg=field.name)
        else:
            assert mine == theirs, field.name
    return True


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
@pytest.mark.parametrize(("gop", "b_frames"), [(1, 0), (12, 0), (12, 3), (30, 2)])
def test_the_tables_give_the_index_of_the_packets(tmp_path, suffix, gop, b_frames):
    assert same(stamped(tmp_path / f"clip{suffix}", gop=gop, b_frames=b_frames))


def test_other_codecs_open_groups_and_turned_pictures(tmp_path):
    assert same(stamped(tmp_path / "open.mp4", gop=10, open_gop=True))
    assert same(stamped(tmp_path / "turned.mp4", rotation=90))
    assert same(stamped(tmp_path / "hevc.mp4", codec="libx265", gop=10, b_frames=3))
    assert same(stamped(tmp_path / "av1.mp4", codec="libsvtav1", gop=10, b_frames=0))
    # FFmpeg takes these packets apart and puts them together anew
    assert both(stamped(tmp_path / "old.mp4", codec="mpeg4", gop=10, b_frames=0))[0] is None


def test_uneven_times(tmp_path):
    path = tmp_path / "uneven.mp4"
    rng = np.random.default_rng(0)
    ticks = np.cumsum(rng.integers(1, 90, 40)).tolist()
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"g": "7", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for tick in ticks:
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8), "rgb24")
            frame.pts, frame.time_base = tick, fractions.Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert same(path)


def test_a_film_from_a_camera():
    if not CLIP.exists():
        pytest.skip("shared/videos/magic.mp4 is not here")
    assert same(CLIP)


def boxes(data, at=0, end=None):
    end = len(data) if end is None else end
    while at + 8 <= end:
        length = struct.unpack(">I", data[at : at + 4])[0]
        yield bytes(data[at + 4 : at + 8]), at, length
        at += length


def place(data, *path):
    """Where the content of a box begins."""
    at, end = 0, len(data)
    for name in path:
        _, begin, length = next(box for box in boxes(data, at, end) if box[0] == name)
        at, end = begin + 8, begin + length
    return at


TABLES = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


@pytest.fixture
def film(tmp_path):
    path = stamped(tmp_path / "clip.mp4", gop=10, b_frames=2)
    return path, bytearray(path.read_bytes())


def left(film, change):
    """Whether the tables are left alone once `change` has been at the file's bytes."""
    path, data = film
    path.write_bytes(change(data) or data)
    return mp4.samples(str(path), 1) is None


def test_tables_that_are_not_plain_are_left_to_ffmpeg(film):
    path, data = film
    assert mp4.samples(str(path), 1) is not None and mp4.samples(str(path), 2) is None

    def write(value, *names, offset=0):
        def change(data):
            at = place(data, *names) + offset
            data[at : at + 4] = struct.pack(">I", value)

        return change

    def fresh(change):
        return left((path, bytearray(data)), change)

    assert fresh(lambda d: d[:-1])  # ends before its boxes do
    assert fresh(lambda d: d + struct.pack(">I4s", 8, b"moof"))
    assert fresh(write(5, *TABLES, b"stts", offset=8))  # fewer samples than there are sizes
    assert fresh(write(1 << 29, *TABLES, b"ctts", offset=12))
    assert fresh(write(0, *TABLES, b"stss", offset=8))
    assert fresh(write(1 << 30, *TABLES, b"stco", offset=8))  # beyond the file
    assert fresh(write(0, *TABLES, b"stsz", offset=12))  # an empty sample
    edits = (b"moov", b"trak", b"edts", b"elst")
    assert fresh(write(1, *edits, offset=8))  # shows but the beginning
    assert fresh(write(1 << 17, *edits, offset=16))  # at double speed
    assert fresh(write((1 << 32) - 1, *edits, offset=12))  # does but wait


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_read_packet_by_packet(tmp_path, keep):
    path = stamped(tmp_path / "clip.mp4", gop=10, b_frames=2, options={"movflags": "faststart"})
    whole = path.read_bytes()
    assert same(path)
    path.write_bytes(whole[: int(keep * len(whole))])
    quick, slow = both(path)
    assert quick is None and indexes.index_of(path).remarks == slow.remarks and slow.remarks


def test_fragments_are_read_packet_by_packet(tmp_path):
    path = stamped(tmp_path / "clip.mp4", gop=10, options={"movflags": "frag_keyframe+empty_moov"})
    quick, slow = both(path)
    assert quick is None and slow.info.frames == FRAMES


def test_an_edit_that_hides_frames_hides_them_still(film):
    """The edit list begins after the first 20 frames: FFmpeg decodes and does not show them."""
    path, data = film
    scale = struct.unpack(">I", data[place(data, b"moov", b"trak", b"mdia", b"mdhd") + 12 :][:4])[0]
    at = place(data, b"moov", b"trak", b"edts", b"elst") + 12
    start = struct.unpack(">I", data[at : at + 4])[0]
    data[at : at + 4] = struct.pack(">I", start + 20 * scale // 25)
    path.write_bytes(data)
    assert indexes._from_tables(str(path), str(path)) is None
    assert indexes.index_of(path).info.frames == FRAMES - 20
    assert len(decode_frames(path, [0])) == 1
