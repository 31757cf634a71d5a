"""Videos dealt over processes, and fingerprints of weights by their files."""

import hashlib
import itertools
import shutil

import jax
import pytest
from helpers.eval_world import build_world
from hypothesis import given
from hypothesis import strategies as st

from hybridvlm.checkpoints.names import PACKAGED
from hybridvlm.config import Reduction
from hybridvlm.distributed import Process
from hybridvlm.eval.deal import deal, weights_fingerprint
from hybridvlm.eval.results import SampleStore
from hybridvlm.eval.runner import Runner
from hybridvlm.eval.tasks import TaskOptions, build_task
from hybridvlm.eval.variants import Planner, Variant
from hybridvlm.inference.model import load


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(1, 5))
def test_every_video_has_one_process_and_loads_are_even(costs, processes):
    hands = deal(dict(enumerate(costs)), processes)
    assert sorted(video for hand in hands for video in hand) == list(range(len(costs)))
    loads = [sum(costs[video] for video in hand) for hand in hands]
    # whoever has most got the last of it when nobody had less
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert all(costs[a] >= costs[b] for hand in hands for a, b in itertools.pairwise(hand))


def test_the_dearest_come_first():
    assert deal({"hour": 3600, "clip": 8, "film": 1200, "short": 9}, 2) == [["hour"], ["film", "short", "clip"]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


def runner(world, folder, process=Process(0, 1), batch_size=4):  # noqa: B008, frozen
    folder.mkdir(exist_ok=True)
    model = load(world / "micro")
    task = build_task(str(world / "q.jsonl"), TaskOptions(model.config, None, model.buckets))
    store = SampleStore(folder / "samples.jsonl", process)
    weights = weights_fingerprint(world / "micro", model.params)
    variants = [Variant("str", 0.5)]
    return Runner(model, task, variants, Planner(model, Reduction()), store, batch_size=batch_size, weights=weights)


def test_processes_share_videos_and_keys_depend_on_neither(world, tmp_path):
    alone = runner(world, tmp_path / "a")
    parts = [runner(world, tmp_path / "a", Process(index, 3), batch_size=2) for index in range(3)]
    asked = [{s.id: s.video for batch in part.missing(part.variants) for s in batch.samples} for part in parts]
    assert sum(map(len, asked)) == 18 and set().union(*asked) == {s.id for s in alone.task.samples}
    videos = [set(own.values()) for own in asked]
    assert [len(own) for own in videos] == [2, 2, 2] and len(set().union(*videos)) == 6
    numbers = [batch.number for part in parts for batch in part.missing(part.variants)]
    assert len(numbers) == len(set(numbers))
    for sample in alone.task.samples:
        assert {part.key(part.variants[1], sample) for part in parts} == {alone.key(alone.variants[1], sample)}


def test_keys_are_those_of_another_copy(world, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(world, copy, copy_function=shutil.copy)  # new times
    (copy / "micro").rename(copy / "renamed")
    shutil.copytree(copy / "renamed", copy / "micro")
    here, there = runner(world, tmp_path / "a"), runner(copy, tmp_path / "b")
    for sample in here.task.samples:
        for variant in here.variants:
            assert here.key(variant, sample) == there.key(variant, sample)


def test_what_is_answered_is_left_out(world, tmp_path):
    first = runner(world, tmp_path / "a")
    (variant,) = first.variants[1:]
    done = [s for s in first.task.samples if s.video in ("v0.mp4", "v1.mp4")]
    records = [{"key": first.key(v, s)} for v in first.variants for s in done]
    first.store.append(records)
    left = [s for batch in first.missing(first.variants) for s in batch.missing[variant]]
    assert len(left) == 12 and not {s.id for s in left} & {s.id for s in done}


def test_weights_are_told_by_their_files(world, tmp_path):
    model = load(world / "micro")
    one = weights_fingerprint(world / "micro", model.params)
    assert one == weights_fingerprint(world / "micro", {}) and len(one) == 32
    assert weights_fingerprint("tiny", {}) != weights_fingerprint("tiny-reduced", {}) != one
    assert weights_fingerprint(PACKAGED["tiny"], {}) == weights_fingerprint("tiny", {})
    other = tmp_path / "other"
    shutil.copytree(world / "micro", other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert weights_fingerprint(other, {}) != one
    # as the hub's cache has it, a link to a blob called by its hash
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    shutil.copytree(world / "micro", snapshot)
    digest = hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()
    (snapshot / "model.safetensors").rename(blobs / digest)
    (snapshot / "model.safetensors").symlink_to(blobs / digest)
    assert weights_fingerprint(snapshot, {}) == one


def test_weights_without_files_are_summed_where_they_lie(world):
    model = load(world / "micro")
    found = weights_fingerprint(None, model.params)
    changed = jax.tree.map(lambda a: a, model.params)
    changed["embed"] = changed["embed"].at[0, 0].add(1)
    assert found != weights_fingerprint(None, changed) and found == weights_fingerprint(
        None, load(world / "micro").params
    )
