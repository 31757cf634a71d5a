"""Which questions of a batch are answered together."""

import itertools
import json
import types
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.eval_world import build_world
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridvlm.checkpoints.samples import write_sample
from hybridvlm.eval import __main__ as command
from hybridvlm.eval import report, runner
from hybridvlm.eval.calls import PADDED, Call, by_video, grouped, questions_at_once, shared_part, videos_at_once, whole
from hybridvlm.eval.encodings import EncodedBatch, Encoding
from hybridvlm.eval.tasks import Sample
from hybridvlm.eval.variants import DENSE, Bucket
from hybridvlm.models import nemotron_vl
from hybridvlm.models.prompt import Layout
from hybridvlm.tiny.export import write_video


def samples(counts):
    return [Sample(f"{v}-{i}", f"v{v}", "?", "a") for v, count in enumerate(counts) for i in range(count)]


def test_what_is_shared_is_the_prompt_up_to_its_last_visual_token():
    frame = np.asarray([-1, 0, 0, -1, 1, -1, -1], np.int32)
    one, other = (Layout(np.asarray([5, 0, 0, 6, 0, *rest], np.int32), frame, 2) for rest in ((7, 8), (9, 9)))
    assert shared_part("v", one) == shared_part("v", other) != shared_part("w", one)
    before = Layout(one.ids + (frame < 0), frame, 2)
    assert shared_part("v", before) != shared_part("v", one)
    assert shared_part("v", Layout(one.ids[:5], frame[:5], 2)) is None
    assert shared_part("v", Layout(one.ids[5:], frame[5:], 0)) is None


def test_questions_at_once_compute_little_twice():
    assert questions_at_once([4] * 10, 8) == 4 and questions_at_once([16] * 3, 8) == 8
    assert questions_at_once([3, 3, 3], 8) == 3 and questions_at_once([1, 1, 9], 8) == 1
    assert questions_at_once([10], 8) == 5


def test_videos_at_once_fill_their_calls():
    assert [videos_at_once(8, each) for each in (1, 2, 3, 4, 5, 8)] == [8, 4, 1, 2, 1, 1]
    asked = samples([4, 4, 4])
    first, second = (by_video(batch, {s.id: s.video for s in asked}, 8, 1) for batch in (asked[:8], asked[8:]))
    assert [[s.video for s in call.videos] for call in first] == [["v0", "v1"]] and len(first[0].answered) == 8
    assert [[s.video for s in call.videos] for call in second] == [["v2", "v2"]] and len(second[0].answered) == 4
    few = by_video(asked[:8], {s.id: s.video for s in asked}, 8, 1, 5)
    assert few == whole(asked[:8], 8)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 3))
def test_every_question_is_answered_once_in_rows_of_its_video(counts, batch_size, parts):
    asked = samples(counts)
    shared = {s.id: s.video for s in asked}
    order = grouped(asked[::-1], shared)
    assert sorted(s.id for s in order) == sorted(s.id for s in asked)
    assert len({s.video for s in asked}) == 1 + sum(a.video != b.video for a, b in itertools.pairwise(order))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        calls = by_video(batch, shared, batch_size, parts)
        answered = [s.id for call in calls for _, s in call.answered]
        assert sorted(answered) == sorted(s.id for s in batch)
        for call in calls:
            assert all(call.rows[row] == sample for row, sample in call.answered)
            if not call.videos:
                assert len(call.rows) == batch_size
                continue
            each = len(call.rows) // len(call.videos)
            assert len(call.videos) % parts == 0 and len(call.rows) == each * len(call.videos) <= batch_size
            assert all(call.rows[i].video == call.videos[i // each].video for i in range(len(call.rows)))
            several = [c for c in counts if c > 1]
            assert sum(-(-c // each) * each for c in several) <= PADDED * sum(several)


def test_single_questions_and_those_that_share_nothing_are_asked_whole():
    asked = samples([1, 1, 2])
    shared = {s.id: s.video for s in asked}
    alone, pair = by_video(asked, shared, 4, 1)
    assert [s.id for _, s in alone.answered] == ["0-0", "1-0"] and not alone.videos and len(alone.rows) == 4
    assert [s.id for _, s in pair.answered] == ["2-0", "2-1"] and [s.video for s in pair.videos] == ["v2", "v2"]
    assert by_video(asked, dict.fromkeys(shared), 4, 1) == whole(asked, 4)
    assert by_video(asked, shared, 1, 2) == whole(asked, 1) and whole([], 4) == []


def test_a_memory_is_timed_as_a_prefill_is(monkeypatch):
    """From visual tokens on the device: laying prompts out and sending them there is on no clock."""
    now = [0.0]

    def takes(seconds, result):
        def call(*args):
            now[0] += seconds
            return result

        return call

    monkeypatch.setattr(runner.time, "perf_counter", lambda: now[0])
    model = types.SimpleNamespace(build_video_memory=takes(2.0, np.zeros(3)), mesh=None)
    of = types.SimpleNamespace(
        _batch=takes(5.0, ("batch", None)),
        _put=takes(7.0, ("batch", "visual")),
        _encoding=lambda variant, bucket: Encoding(),
        model=model,
    )
    batch = EncodedBatch(0, Bucket(4, 8), samples([1]), {"0-0": {Encoding(): np.ones(2)}}, {})
    _, seconds = runner.Runner._build(of, DENSE, batch, Call([], [], tuple(samples([1]))))
    assert seconds == 2.0 and now[0] == 14.0


@pytest.mark.parametrize(("name", "method"), [("vamba", "none"), ("qwen3_vl", "str")])
def test_every_question_is_shown_its_own_video(tmp_path, monkeypatch, name, method):
    """Of batches in which some questions go on from the memory of a video and others are asked whole, in any order."""
    from hybridvlm.inference.model import Model

    shades = {"a": 40, "b": 120, "c": 200, "d": 250}
    for video, shade in shades.items():
        write_video(tmp_path / f"{video}.mp4", np.full((4, 40, 40, 3), shade, np.uint8))
    order = ["a", "b", "a", "c", "a", "d", "d", "d"]
    rows = [{"video": f"{v}.mp4", "question": f"shade {n}?", "answer": "x"} for n, v in enumerate(order)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_sample(name, tmp_path / name)

    def generate(self, batch, visual, plan=None, **options):
        rows = len(batch.input_ids)
        seen = np.repeat(np.asarray(visual), rows // len(visual), axis=0)
        timing = types.SimpleNamespace(prefill=0.01, decode=0.01)
        said = {"text": [f"{x:.0f}" for x in seen[:, 0, 0, 0]], "unfinished": [False] * rows, "thinking": [""] * rows}
        return types.SimpleNamespace(**said, timing=timing, plan=None, peak_bytes=1)

    monkeypatch.setattr(runner, "SHARED_FROM", 2)
    monkeypatch.setattr(Model, "generate", generate)
    monkeypatch.setattr(Model, "verify", lambda self, generation: None)
    monkeypatch.setattr(Model, "compile_prefill", lambda *args: None)
    monkeypatch.setattr(Model, "build_video_memory", lambda self, batch, visual, plan: jnp.asarray(visual))
    shade_of = lambda self, pixels, attention=False: np.full((1, 2, 1, 1), np.mean(pixels), np.float32)  # noqa: E731
    monkeypatch.setattr(Model, "encode", shade_of)
    monkeypatch.setattr(report, "picture", lambda *args: b"")
    argv = ["--model", str(tmp_path / name), "--tasks", str(tmp_path / "q.jsonl"), "--methods", method, "--frames", "4"]
    argv += ["--buckets", "frames=2", "text=256", "max_new=4", "--batch-size", "2", "--output", str(tmp_path / "out")]
    assert command.main(argv) == 0
    records = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert len(records) == len(order) * (1 if method == "none" else 2)
    assert any("further_ms" in record for record in records)
    for record in records:
        assert abs(float(record["prediction"]) - shades[record["video"][0]]) < 8, record


def test_a_run_of_other_variants_has_their_tokens(tmp_path, monkeypatch):
    """As an ablation runs its cells: not those that the runner was made for."""
    from hybridvlm.config import Reduction
    from hybridvlm.eval.results import SampleStore
    from hybridvlm.eval.tasks import TaskOptions, build_task
    from hybridvlm.eval.variants import Planner, Variant
    from hybridvlm.inference.model import Model, load

    world = build_world(tmp_path)
    model, cells = load(world / "micro"), [Variant("frames", 0.5), Variant("evs-pixels", 0.5)]
    task = build_task(str(world / "q.jsonl"), TaskOptions(model.config, None, model.buckets))
    store = SampleStore(tmp_path / "samples.jsonl")
    own = runner.Runner(model, task, [], Planner(model, Reduction()), store, weights="w", batch_size=3)
    seen, put, alive = {}, [], []
    to_device = own._put

    def put_away(array):
        found = to_device(array)
        put.append(weakref.ref(found))
        return found

    def encode(self, pixels, attention=False, keep=None, frame_count=None):
        alive.append((len(put), sum(one() is not None for one in put)))
        return np.full((1, 4, 1, 1), {"frames": 1, "evs-pixels": 2}[keep.method], np.float32)

    def answer(self, variant, batch):
        (visual,) = batch.visual.values()
        seen.setdefault(variant.method, []).append(float(np.max(visual)))
        return []

    monkeypatch.setattr(Model, "encode", encode)
    monkeypatch.setattr(runner.Runner, "_answer", answer)
    monkeypatch.setattr(runner.Runner, "_compile", lambda *args: None)
    monkeypatch.setattr(own, "_put", put_away)
    for cell in cells:
        own.run(variants=[cell])
    assert {name: set(found) for name, found in seen.items()} == {"frames": {1.0}, "evs-pixels": {2.0}}
    # a batch's tokens are gone from the devices when the next batch's videos are encoded
    assert alive[-1][0] > 1 and {held for _, held in alive} == {0}


@pytest.mark.slow
def test_an_evaluation_answers_the_same_with_and_without_shared_layers(tmp_path, monkeypatch):
    """Replies and shares that were kept, of questions on shared videos; a batch that cuts a video's questions in two."""
    world = build_world(tmp_path)
    options = [
        "--model",
        str(world / "micro"),
        "--tasks",
        str(world / "q.jsonl"),
        "--methods",
        "str,oneshot-attention,uniform",
    ]
    options += ["--budgets", "0.6", "--limit", "0", "--batch-size", "4"]
    found = {}
    monkeypatch.setattr(runner, "SHARED_FROM", 2)
    for name in ("shared", "whole"):
        if name == "whole":
            monkeypatch.setattr(nemotron_vl, "memory_serves", lambda plan: False)
        assert command.main([*options, "--output", str(tmp_path / name)]) == 0
        lines = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        found[name] = {(r["method"], r["id"]): (r["prediction"], r["retention"]) for r in lines}
        assert {r["method"] for r in lines if "further_ms" in r} == (
            {"str", "oneshot-attention"} if name == "shared" else set()
        )
    assert found["shared"] == found["whole"] and len(found["whole"]) == 4 * 18
