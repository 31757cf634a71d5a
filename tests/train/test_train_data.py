"""The input pipeline: rows and labels, packing, order, position, and videos that cannot be read."""

import json
import types

import grain
import numpy as np
import pytest
from helpers.train_micro import FRAMES, micro, settings

import hybridvlm as hv
from hybridvlm.checkpoints.samples import raw_config, write_sample, write_text_files
from hybridvlm.models.family import family_of
from hybridvlm.models.media import Clip
from hybridvlm.tiny import tiles
from hybridvlm.tokenizers.published import PublishedTokenizer
from hybridvlm.train import pipeline
from hybridvlm.train.config import Data
from hybridvlm.train.rows import Shape, arrange, example, packed, sharing, single
from hybridvlm.train.sources import JsonlSource, NeedleSource, TfdsSource, check_needle, read_line
from hybridvlm.video import VideoError


@pytest.fixture(scope="module")
def model():
    return micro()


@pytest.fixture(scope="module")
def needle(model):
    return NeedleSource(settings(), model)


class Numbers:
    """Sample i: 1 + i % 3 frames of 2 tokens, then text that spells i; every `broken`-th cannot be read."""

    shuffled = False

    def __init__(self, count: int, broken: int = 0):
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def name(self, number: int) -> str:
        return f"film{number}"

    def sample(self, number: int):
        if self.broken and number % self.broken == self.broken - 1:
            raise VideoError(f"film{number}: cut off")
        frames = 1 + number % 3
        frame = np.repeat(np.arange(frames), 2)
        row = arrange(
            np.concatenate([np.zeros(2 * frames, np.int32), [100 + number]]),
            np.concatenate([frame, [-1]]),
            np.asarray([200 + number, 2], np.int32),
        )
        return row | {"visual_features": np.full((frames, 2, 4), number, np.float32)}


def dataset(source, shape, rows=2, **options):
    reader = pipeline.Reader(source, pipeline.row_check(shape, 8), 0.01, lambda text: None)
    options = {"shuffle": True, "seed": 3, "threads": 2, "prefetch": 2} | options
    return pipeline.Stream(pipeline.row_dataset(source, reader, shape, rows, **options), reader)


def test_question_label_and_answer_of_a_row():
    row = arrange(np.asarray([7, 0, 0, 8, 9]), np.asarray([-1, 0, 0, -1, -1]), np.asarray([5, 2], np.int32))
    assert row["ids"].tolist() == [7, 0, 0, 8, 9, 5, 2]
    assert row["frame"].tolist() == [-1, 0, 0, -1, -1, -1, -1]
    assert row["label"].tolist() == [0, 0, 0, 0, 6, 3, 0]  # one more than the token that comes next
    assert row["question"].tolist() == [False, False, False, True, True, False, False]
    turned = arrange(
        np.asarray([7, 0, 8]), np.asarray([-1, 0, -1]), np.asarray([5, 2]), np.asarray([[0] * 3, [1, 1, 1], [4, 4, 4]])
    )
    assert turned["position"].tolist()[3:] == [[5] * 3, [6] * 3]


def test_needle_samples_are_the_benchmark_and_the_same_every_time(needle, model):
    a, b = needle.sample(5), needle.sample(5)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    assert (a["frame"] >= 0).sum() == 16 * FRAMES and len(a["ids"]) == 16 * FRAMES + 6
    said = a["label"][a["label"] > 0] - 1
    assert len(said) == 2 and said[-1] == model.config.eos_ids[0]
    assert not np.array_equal(a["visual_cells"], needle.sample(6)["visual_cells"])
    many = needle.shared(5, 9)
    assert many["ids"].shape == (9, 5) and many["prefix"].shape == (16 * FRAMES,)
    assert (many["segment"].sum(1) == 5).all() and (many["question"].sum(1) == 4).all()


def test_a_share_of_needle_samples_is_of_scenes_that_last(model):
    def rendered(scenes):
        source = NeedleSource(settings(data={"features": "pixels", "scenes": scenes}), model)
        return [source.sample(number) for number in range(12)]

    def lasts(row):
        cells = tiles.split_cells(row["visual_pixels"]).reshape(FRAMES, 16, -1).astype(int)
        return bool((abs(cells[1:] - cells[:-1]).max(-1) < 20).mean() > 0.3)

    assert sum(lasts(row) for row in rendered(0.0)) == 0
    assert sum(lasts(row) for row in rendered(1.0)) >= 10  # two frames may lie on both sides of a cut
    assert 2 < sum(lasts(row) for row in rendered(0.5)) < 10
    for wrong in ({"features": "cached"}, {"source": "jsonl", "path": "x"}):
        with pytest.raises(ValueError, match=r"Data\.scenes needs the source 'needle' with features 'pixels'"):
            Data(**{"features": "pixels", "scenes": 0.5} | wrong)
    with pytest.raises(ValueError, match=r"Data.scenes must lie in \[0, 1\], got 2"):
        Data(scenes=2)


def test_rows_are_padded_at_the_end():
    row = single(Numbers(9).sample(1), Shape(4, 5, 1, 2))
    assert row["segment"].tolist() == [1] * 7 + [0] * 6 and row["frame_count"] == 2
    assert row["frame"].tolist() == [0, 0, 1, 1, -1, -1, -1] + [-1] * 6
    assert row["visual_features"].shape == (4, 2, 4)


def test_packing_keeps_samples_apart():
    shape = Shape(6, 12, 3, 2)
    stream = dataset(Numbers(40), shape, rows=2, shuffle=False)
    held = [next(stream) for _ in range(5)]
    found = []
    for batch in held:
        for row in range(2):
            segment, frame, ids = (batch[name][row] for name in ("segment", "frame", "ids"))
            for s in range(1, segment.max() + 1):
                mine = segment == s
                frames = frame[mine & (frame >= 0)]
                number = ids[mine & (frame < 0)][0] - 100
                found.append(int(number))
                assert len(frames) == 2 * (1 + number % 3) and (np.diff(frames) >= 0).all()
                # the frames that the row's places name hold this sample's features
                assert (batch["visual_features"][row][np.unique(frames)] == number).all()
                assert batch["label"][row][mine].tolist()[-3:] == [201 + number, 3, 0]
                assert batch["question"][row][mine].sum() == 1
            assert (np.diff(segment[segment > 0]) >= 0).all() and segment.max() > 1
            assert ((frame < 0) & (segment > 0)).sum() <= shape.own_text
    assert sorted(found) == list(range(len(found)))


@pytest.mark.parametrize("segments", [1, 3])
def test_order_hangs_on_the_seed_and_goes_on_where_it_stopped(segments):
    shape = Shape(6, 12, segments, 2)
    straight, other = dataset(Numbers(11), shape), dataset(Numbers(11), shape, seed=4)
    batches = [next(straight)["ids"] for _ in range(12)]  # more than two passes over the samples
    assert any((next(other)["ids"] != batch).any() for batch in batches)
    first = dataset(Numbers(11), shape)
    for want in batches[:5]:
        np.testing.assert_array_equal(next(first)["ids"], want)
    state = json.loads(json.dumps(first.state()))
    again = dataset(Numbers(11), shape)
    again.restore(state)
    for want in batches[5:]:
        np.testing.assert_array_equal(next(again)["ids"], want)


def test_processes_share_the_samples_out(monkeypatch):
    class Shard:
        shard_index, shard_count = 0, 3

        def __init__(self, drop_remainder):
            assert drop_remainder

    monkeypatch.setattr(grain.sharding, "ShardByJaxProcess", Shard)
    seen = []
    for Shard.shard_index in range(3):
        own = pipeline.numbers(10, False, True, 0)
        seen.append({int(own[i]) for i in range(3)})
        assert {int(own[i]) for i in range(3, 6)} == seen[-1]  # the next pass
    assert set.union(*seen) == set(range(9)) and sum(map(len, seen)) == 9


def test_bad_videos_are_passed_over_named_and_counted():
    told = []
    source = Numbers(300, broken=150)
    reader = pipeline.Reader(source, lambda row, name: None, 0.01, told.append)
    shape = Shape(3, 5, 1, 2)
    stream = iter(pipeline.row_dataset(source, reader, shape, 2, shuffle=False, seed=0, threads=0, prefetch=0))
    got = np.concatenate([next(stream)["ids"].max(1) for _ in range(150)]) - 200
    assert got.tolist() == [*(i for i in range(300) if i not in (149, 299)), 0, 1]
    assert [name for name, _ in reader.bad.values()] == ["film149", "film299"] and "film149: cut off" in told[0]
    again = pipeline.Reader(source, lambda row, name: None, 0.01)
    again.restore(json.loads(json.dumps(reader.state())))
    assert again.bad == reader.bad and again.seen == reader.seen


@pytest.mark.parametrize(
    "error",
    [UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"), ValueError("no such pixel format"), EOFError("cut off")],
)
def test_whatever_decoding_one_sample_raises_of_its_data_is_counted(error):
    class Odd(Numbers):
        def sample(self, number):
            if number == 7:
                raise error
            return super().sample(number)

    source = Odd(120)
    reader = pipeline.Reader(source, lambda row, name: None, 0.01, lambda text: None)
    rows = [reader(place, place) for place in range(120)]
    assert rows[7] is None and sum(row is None for row in rows) == 1 and reader.bad[7][0] == "film7"


def test_a_full_disk_is_no_fault_of_a_sample():
    class Full(Numbers):
        def sample(self, number):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        pipeline.Reader(Full(120), lambda row, name: None, 0.01, lambda text: None)(0, 0)


def test_a_conversation_is_refused_before_the_start_where_the_model_knows_none(tmp_path, model):
    spoken = [{"from": "human", "value": "red@t00 none what ?"}, {"from": "gpt", "value": "bag"}]
    for line in ({"conversations": [{"from": "system", "value": "bag"}, *spoken]}, {"conversations": spoken * 2}):
        (tmp_path / "t.jsonl").write_text(json.dumps({"video": "v"} | line))
        config = settings(data={"source": "jsonl", "path": str(tmp_path / "t.jsonl"), "features": "pixels", "text": 64})
        with pytest.raises(ValueError, match="line 1: this model knows no conversation"):
            JsonlSource(config, model)
    (tmp_path / "t.jsonl").write_text(
        '{"video": "v", "question": "red@t00 none what ?", "answer": "bag", "answer": "shoe"}'
    )
    with pytest.raises(ValueError, match="line 1: the key 'answer' stands twice"):
        JsonlSource(config, model)


@pytest.mark.parametrize("name", ["nemotron_omni", "qwen2_vl", "qwen3_vl"])
def test_a_system_message_is_part_of_the_prompt_and_not_of_what_is_learnt(name, tmp_path):
    write_text_files(name, tmp_path)
    raw = raw_config(name)
    family = family_of(raw)
    config = family.config_from_hf(raw)
    tokenizer = PublishedTokenizer.from_folder(tmp_path)
    own = types.SimpleNamespace(family=family, config=config, tokenizer=tokenizer, style=family.style_for(config))
    clip = Clip((0.0, 1.0), np.zeros((2, 16, 16, 3), np.uint8))
    plain, told = (example(own, clip, "What?", "A cat.", (), system) for system in ("", "Be very brief."))
    text = tokenizer.decode(told["ids"][told["frame"] < 0])
    assert "Be very brief." in text and text.index("Be very brief.") < text.index("What?")
    assert "Be very brief." not in tokenizer.decode(plain["ids"][plain["frame"] < 0])
    np.testing.assert_array_equal(told["label"][told["label"] > 0], plain["label"][plain["label"] > 0])


@pytest.mark.parametrize("name", ["vamba", "tiny"])
def test_questions_share_a_row_as_far_as_it_has_room_for_their_text(name, tmp_path, model):
    """Those of one video are split over rows, none is lost, and no row is longer than Data.text."""
    if name == "vamba":
        model = hv.load(write_sample("vamba", tmp_path / "vamba"))
    asked = ["red@t00 none what ?", "red@t00 none where ?"]
    lines = [{"video": v, "question": asked[i % 2], "answer": "bag"} for v in ("a.mp4", "b.mp4") for i in range(5)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def samples(text, **more):
        own = {"source": "jsonl", "path": str(tmp_path / "t.jsonl"), "features": "cached", "cache": str(tmp_path / "c")}
        own |= {"text": text, "answer": 0, **more}
        source = JsonlSource(settings(data=own), model)
        rows = [
            [example(model, Clip((0.0,) * source.patch), *turn) for (turn,) in (t.turns for t in talks)]
            for _, talks in source.samples
        ]
        assert [v for v, talks in source.samples for _ in talks] == [line["video"] for line in lines]
        lengths = [int((sharing(row)["frame"] < 0).sum()) for row in rows]
        return [len(row) for row in rows], lengths, source

    (one, *_), (each, *_), _ = samples(1 << 20)
    assert one == 1
    for room, want in ((6 * each, [4, 1, 4, 1]), (3 * each + 4, [3, 2, 3, 2]), (each + 4, [1] * 10)):
        counts, lengths, source = samples(room, questions=4)
        assert counts == want and max(lengths) <= room
    assert source.digest != samples(6 * each, questions=4)[-1].digest
    counts, lengths, _ = samples(
        3 * each + 8, questions=4, segments=9
    )  # of packed rows as many stay free as there are segments
    assert max(lengths) <= 3 * each - 5 and max(counts) == 2


def test_more_bad_videos_than_allowed_stop_the_run():
    stream = dataset(Numbers(200, broken=50), Shape(3, 5, 1, 2), shuffle=False, threads=0, prefetch=0)
    with pytest.raises(pipeline.TooManyBad, match=r"2 of 100 .* film49, film99"):
        for _ in range(100):
            next(stream)


def test_samples_that_do_not_fit_are_passed_over_and_named():
    stream = dataset(Numbers(9), Shape(2, 5, 1, 2), shuffle=False, threads=0, prefetch=0)
    with pytest.raises(
        pipeline.TooManyBad, match=r"2 of 6 samples could not be used, .*: film2, film5; the first: film2 has 3 frames"
    ):
        for _ in range(9):
            next(stream)


def test_packed_rows_of_grain_match_a_row_by_hand():
    shape = Shape(4, 8, 2, 2)
    a, b = Numbers(9).sample(0), Numbers(9).sample(1)
    n, m = len(a["ids"]), len(b["ids"])
    by_hand = {
        name: np.zeros((shape.length, *a[name].shape[1:]), a[name].dtype)
        for name in ("ids", "frame", "label", "question")
    }
    for name, rows in by_hand.items():
        rows[:n], rows[n : n + m] = a[name], b[name]
    by_hand["ids_segment_ids"] = np.asarray([1] * n + [2] * m + [0] * (shape.length - n - m))
    by_hand["visual_features"] = np.concatenate(
        [a["visual_features"], b["visual_features"], np.zeros((1, 2, 4), np.float32)]
    )
    by_hand["visual_features_segment_ids"] = np.asarray([1, 2, 2, 0])
    row = packed(by_hand, shape)
    assert row["frame"][:n].tolist() == [0, 0, -1, -1, -1] and row["frame"][n : n + m].tolist() == [
        1,
        1,
        2,
        2,
        -1,
        -1,
        -1,
    ]
    assert row["frame_count"] == 3 and (row["frame"][n + m :] == -1).all()


# -- files ------------------------------------------------------------------------------------------------------------


def film(path, frames: int = 4) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 64
        for i in range(frames):
            pixels = np.full((64, 64, 3), 40 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def test_jsonl_of_questions_and_conversations(tmp_path, model):
    film(tmp_path / "a.mp4")
    lines = [
        {"video": "a.mp4", "question": "red@t00 none what ?", "answer": "bag"},
        {
            "video": "a.mp4",
            "conversations": [
                {"from": "human", "value": "<video>\nred@t00 none where ?"},
                {"from": "gpt", "value": "c3"},
            ],
        },
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pixels = settings(data={"source": "jsonl", "path": str(tmp_path / "t.jsonl"), "features": "pixels"})
    source = JsonlSource(pixels, model)
    assert len(source) == 2 and source.name(1) == "a.mp4"
    row = source.sample(0)
    assert row["visual_pixels"].shape == (FRAMES, 128, 128, 3) and (row["frame"] >= 0).sum() == 16 * FRAMES
    assert model.tokenizer.decode(row["label"][row["label"] > 0] - 1) == "bag"
    cached = settings(
        data={"source": "jsonl", "path": str(tmp_path / "t.jsonl"), "features": "cached", "cache": str(tmp_path / "c")}
    )
    held = JsonlSource(cached, model)
    features = held.sample(0)["visual_features"]
    want = np.asarray(model.family.encode(model.params, model.config, row["visual_pixels"][None]))[0]
    np.testing.assert_allclose(features, want, rtol=2e-3, atol=2e-3)  # kept in float16
    assert held.cache.made == 1
    held.sample(1)
    again = JsonlSource(cached, model)
    np.testing.assert_array_equal(again.sample(0)["visual_features"], np.load(next((tmp_path / "c").glob("*.npy"))))
    assert held.cache.made == 1 and again.cache.made == 0 and not list((tmp_path / "c").glob("*.part"))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_an_array_is_read_as_lines_are(mark, tmp_path, model):
    path = tmp_path / "t.json"
    config = settings(data={"source": "jsonl", "path": str(path), "features": "pixels"})
    spoken = [{"from": "human", "value": "red@t00 none what ?"}, {"from": "gpt", "value": "bag"}]
    lines = [{"video": f"{name}.mp4", "conversations": spoken} for name in "ab"]
    path.write_bytes(mark + json.dumps(lines, indent=1).encode())
    listed = JsonlSource(config, model).samples
    path.write_bytes(mark + "\n".join(map(json.dumps, lines)).encode())
    assert JsonlSource(config, model).samples == listed and len(listed) == 2
    path.write_bytes(mark + json.dumps([*lines, {"video": "c.mp4"}]).encode())
    with pytest.raises(ValueError, match=r't\.json, entry 3: needs "question"'):
        JsonlSource(config, model)
    path.write_bytes(mark + b'[{"video": "a.mp4",]')
    with pytest.raises(ValueError, match=r"t\.json is no JSON array"):
        JsonlSource(config, model)


def test_earlier_turns_are_part_of_the_prompt():
    def turn(a, b):
        return [{"from": "human", "value": a}, {"from": "gpt", "value": b}]

    spoken = turn("<video>one?", "1") + turn("two?", "2")
    video, talk = read_line({"video": "v", "conversations": spoken})
    assert video == "v" and talk == ((("one?", "1"), ("two?", "2")), "")
    said = "Be brief."
    first = {"from": "system", "value": said}
    for line in ({"conversations": [first, *spoken]}, {"conversations": spoken, "system": said}):
        assert read_line({"video": "v", **line})[1] == (talk.turns, said)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"question": "a", "answer": "b"}, "video"),
        ({"video": "v", "question": "a", "answer": " "}, "not empty"),
        ({"video": "v", "conversations": [{"from": "gpt", "value": "x"}]}, "one after the other"),
        (
            {"video": "v", "conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]},
            "one after",
        ),
        ({"video": "v", "conversations": [{"from": "system", "value": "x"}]}, "one after the other"),
        ({"video": "v", "question": "a", "answer": "b", "system": 3}, "must be a text"),
        ({"video": "v\0.mp4", "question": "a", "answer": "b"}, "zero byte"),
        ({"video": "v", "question": "a", "answer": "\ud800"}, "half a surrogate pair"),
        (
            {"video": "v", "conversations": [{"from": "human", "value": "x"}, {"from": "system", "value": "y"}]},
            "one after the other",
        ),
    ],
)
def test_wrong_lines_are_refused(line, says, tmp_path, model):
    with pytest.raises(ValueError, match=says):
        read_line(line)
    (tmp_path / "t.jsonl").write_text(json.dumps(line))
    config = settings(data={"source": "jsonl", "path": str(tmp_path / "t.jsonl"), "features": "pixels"})
    with pytest.raises(ValueError, match="line 1"):
        JsonlSource(config, model)


def test_lines_end_where_json_lines_end_and_long_texts_are_refused_before_the_start(tmp_path, model):
    path, text = tmp_path / "t.jsonl", "red@t00 none what ?"
    config = settings(data={"source": "jsonl", "path": str(path), "features": "pixels"})
    line = json.dumps({"video": "a\u2028b.mp4", "question": text, "answer": "bag"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    source = JsonlSource(config, model)
    assert [source.name(i) for i in range(len(source))] == ["a\u2028b.mp4"]
    path.write_text(line + "\n" + json.dumps({"video": "v", "question": " ".join([text] * 9), "answer": "bag"}))
    with pytest.raises(ValueError, match=r"line 2: 37 text tokens, and a row has room for \d+ \(Data.text\)"):
        JsonlSource(config, model)
    assert (
        JsonlSource(
            settings(data={"source": "jsonl", "path": str(path), "features": "pixels", "text": 64}), model
        ).digest
        != source.digest
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"types": ["3X"]}, "Data.types of needle"),
        ({"split": "test"}, "nobody trains on test"),
        ({"frames": 65}, "2 to 64"),
    ],
)
def test_what_needle_cannot_do_is_known_without_its_bank(data, says, model):
    config = settings(data=data)
    with pytest.raises(ValueError, match=says):
        check_needle(config, model, Shape(config.data.frames, config.data.text, 1, 16), config.data.answer)


def test_tfds_records(model):
    frames = np.random.default_rng(0).integers(0, 255, (5, 40, 50, 3), np.uint8)
    records = [
        {"video": frames, "question": b"red@t00 none what ?", "answer": b"bag"},
        {"video": frames, "answer": b"bag"},
    ]
    config = settings(data={"source": "tfds", "path": "films", "features": "pixels"})
    source = TfdsSource(config, model, source=records)
    row = source.sample(0)
    assert row["visual_pixels"].shape == (FRAMES, 128, 128, 3) and source.name(0) == "films:val:0"
    assert model.tokenizer.decode(row["label"][row["label"] > 0] - 1) == "bag"
    with pytest.raises(ValueError, match="question"):
        source.sample(1)
