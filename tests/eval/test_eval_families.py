"""The evaluation command on every family, end to end: what the tower is shown there is what it is shown by ask, to the pixel."""

import dataclasses
import json

import numpy as np
import pytest

from hybridvlm.checkpoints.samples import write_sample
from hybridvlm.config import Reduction
from hybridvlm.eval import __main__ as command
from hybridvlm.eval.encodings import Encoding
from hybridvlm.eval.results import SampleStore
from hybridvlm.eval.runner import Runner
from hybridvlm.eval.tasks import TaskOptions, build_task
from hybridvlm.eval.variants import Planner
from hybridvlm.inference.conversation import Conversation
from hybridvlm.inference.model import load
from hybridvlm.models import vamba
from hybridvlm.models.prompt import user_message
from hybridvlm.options import override
from hybridvlm.reduction.pixels import PixelSelection
from hybridvlm.tiny.export import write_video

FAMILIES = ("nemotron_nano_vl", "nemotron_omni", "qwen2_vl", "qwen3_vl", "vamba")
WORDS = ["red", "green", "blue"]
BUCKETS = ["--buckets", "frames=4", "text=384", "max_new=4"]


def film(path, number, height=40, width=64, frames=5):
    rng = np.random.default_rng(number)
    write_video(path, rng.integers(0, 255, (frames, height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Checkpoints of all families, videos of two shapes, a picture, and questions on them."""
    from PIL import Image

    root = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        write_sample(name, root / name)
    film(root / "a.mp4", 1)
    film(root / "tall.mp4", 3, height=80, width=32, frames=3)
    Image.fromarray(np.random.default_rng(4).integers(0, 255, (24, 60, 3), dtype=np.uint8)).save(root / "still.png")
    rows = [
        {"video": video, "question": f"{word}?", "answer": word, "options": WORDS}
        for video in ("a.mp4", "tall.mp4", "still.png")
        for word in WORDS[: 2 if video == "a.mp4" else 1]
    ]
    (root / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(world, name, output, *more, tasks="q.jsonl"):
    argv = ["--model", str(world / name), "--tasks", str(world / tasks), "--output", str(output)]
    return command.main([*argv, "--frames", "4", "--batch-size", "1", *BUCKETS, *more])


def lines_of(output):
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


class Shown(Exception):
    """Raised instead of the tower, with what it was given."""


def asked(model, monkeypatch, path):
    """What ask shows the tower of a file, and the ids of its prompt; nothing is computed."""
    conversation = Conversation(model, path, frames=4)

    def encode(self, pixels, attention=False):
        raise Shown(np.asarray(pixels))

    with monkeypatch.context() as patch, pytest.raises(Shown) as caught:
        patch.setattr(type(model), "encode", encode)
        conversation.ask("red?")
    (layout,) = conversation._layouts([user_message("red?", model.style, [conversation.clips[0].kind])], (1, 1, 1))
    return caught.value.args[0], layout.ids.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tower_sees_what_ask_shows_it(world, tmp_path, monkeypatch, name):
    """Videos of two shapes and a picture: pixels and prompts of an evaluation are those of ask."""
    model = load(world / name)
    model = dataclasses.replace(model, buckets=override(model.buckets, BUCKETS[1:], "--buckets"))
    task = build_task(str(world / "q.jsonl"), TaskOptions(model.config, 4, model.buckets))
    store = SampleStore(tmp_path / "samples.jsonl")
    runner = Runner(model, task, [], Planner(model, Reduction()), store, weights="w")
    for video in ("a.mp4", "tall.mp4", "still.png"):
        sample = next(s for s in task.samples if s.video == video)
        shown, ids = asked(model, monkeypatch, world / video)
        with monkeypatch.context() as patch, pytest.raises(Shown) as caught:
            patch.setattr(
                type(model),
                "encode",
                lambda self, pixels, attention=False: (_ for _ in ()).throw(Shown(np.asarray(pixels))),
            )
            runner.videos.get(video, runner.buckets[sample.id], [Encoding()])
        np.testing.assert_array_equal(caught.value.args[0], shown)
        assert runner.prompts.layout(sample).ids.tolist() == ids
        assert shown.any() and runner.buckets[sample.id].size == shown.shape[-3:-1]


# the other families are as quick in test_the_tower_sees_what_ask_shows_it, and their numbers in tests of their own
RUNS = ("qwen3_vl",)


@pytest.mark.parametrize("name", [*RUNS, *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n not in RUNS)])
def test_the_command_runs(world, tmp_path, monkeypatch, capsys, name):
    """Dense and str at 25%; the tower sees the video once, as ask shows it; again, nothing is answered anew."""
    model = load(world / name)
    model = dataclasses.replace(model, buckets=override(model.buckets, BUCKETS[1:], "--buckets"))
    seen = []
    encode = type(model).encode
    monkeypatch.setattr(
        type(model),
        "encode",
        lambda self, pixels, **options: seen.append(np.asarray(pixels)) or encode(self, pixels, **options),
    )
    out = tmp_path / "out"
    code = run(world, name, out, "--methods", "str", "--limit", "2", "--batch-size", "2")
    assert code == 0, capsys.readouterr().err
    assert len(seen) == 1 and np.array_equal(seen[0], asked(model, monkeypatch, world / "a.mp4")[0])
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["n"], row["unanswered"]) for row in rows] == [(2, 0), (2, 0)]
    assert rows[1]["retention_mean"] == pytest.approx(0.25, abs=0.05) and rows[1]["flop_speedup"] > 1
    assert rows[1]["retention_achieved"] == pytest.approx(rows[1]["retention_mean"], abs=0.08)
    before = (out / "samples.jsonl").read_bytes()
    assert before.count(b"\n") == 4
    assert run(world, name, out, "--methods", "str", "--limit", "2", "--batch-size", "2") == 0
    assert (out / "samples.jsonl").read_bytes() == before and len(seen) == 1


RIVALS = {
    "features": "vidcom2,frames,resolution:0.5,divprune,divprune-frame,dycoke,tome,prunevid-outer,prunevid:0.5,vidcom2:0.8+str:0.8",
    "attention": "visionzip,fastvid,holitom-outer,flashvid-outer,holitom:0.6,flashvid:0.6,flashvid-outer:0.8+oneshot-last@0.7:0.9",
    "pixels": "evs-pixels,evs-pixels:0.8+str:0.8",
    "inside": "oneshot,oneshot-max,oneshot-last,dart,sparsevlm,holitom-inner,framefusion,utrc",
}


@pytest.mark.slow
@pytest.mark.parametrize("group", RIVALS)
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "nemotron_nano_vl", "nemotron_omni"])
def test_every_family_takes_the_methods_that_people_compare_with(world, tmp_path, name, group):
    """Each at three quarters of the tokens, some composed; what was kept is what the plan says, or the plan says why not."""
    methods = RIVALS[group].split(",")
    more = ["--budgets", "0.75", "--limit", "2", "--batch-size", "2", "--methods", RIVALS[group]]
    assert run(world, name, tmp_path / "out", *more) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    left_out = [note for note in results["metadata"]["notes"] if "was left out" in note]
    missing = [method for method in methods if method not in rows]
    assert len(missing) == len(left_out) and (group == "inside" or set(missing) <= {"resolution:0.5"})
    reasons = ("can meet mean budgets from", "have no such site", "resolution merges whole blocks")
    assert all(any(reason in note for reason in reasons) for note in left_out), left_out
    for name, row in rows.items():
        # of two or three frames the nearest whole number
        near = 0.26 if name in ("frames", "dycoke") else 0.08
        assert row["n"] == 2 and row["retention_achieved"] == pytest.approx(row["retention_mean"], abs=near)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nemotron_nano_vl", "nemotron_omni", "qwen3_vl"])
def test_text_of_frames_is_dropped_from_the_command_line(world, tmp_path, capsys, name):
    """Time stamps go with their frames; replies are those of ask; models without any, and methods that merge frames, say so."""
    methods = ["--methods", "str:0.6,frames:0.5,avgpool:0.5", "--limit", "2", "--batch-size", "2"]
    assert run(world, name, tmp_path / "out", *methods, "--drop-text", "best-frames") == 0
    assert "drop_text='best-frames' goes with methods that drop, and this one merges" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["n"] for row in results["rows"]] == [2, 2, 2]
    for extra in results["details"][1:]:
        (plan,) = extra["plans"]
        assert plan["drop_text"] == "best-frames" and plan["frame_text"] > 2
    model = load(world / name)
    model = dataclasses.replace(model, buckets=override(model.buckets, BUCKETS[1:], "--buckets"))
    said = {line["prediction"] for line in lines_of(tmp_path / "out") if line["method"] == "str:0.6"}
    reduction = model.reduction_for("str", 0.6, drop_text="best-frames")
    conversation = Conversation(model, world / "a.mp4", frames=4, reduction=reduction)
    prompt = json.loads((world / "q.jsonl").read_text().splitlines()[0])["question"]
    answer = conversation.ask(prompt)
    assert answer.plan.drop_text == "best-frames" and answer.text in said
    ran = run(world, "qwen2_vl", tmp_path / "none", *methods, "--drop-text", "empty-frames")
    assert ran == 2 and "prompt has none between its frames" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"), [("nemotron_omni", "evs"), ("qwen3_vl", "avgpool"), ("vamba", "evs-pixels")]
)
def test_methods_before_the_decoder(world, tmp_path, name, method):
    assert (
        run(world, name, tmp_path / "out", "--methods", method, "--budgets", "0.5", "--limit", "2", "--batch-size", "2")
        == 0
    )
    row = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][1]
    assert row["n"] == 2 and row["retention_achieved"] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nemotron_nano_vl", "qwen3_vl"])
def test_methods_that_spare_the_tower_have_encodings_of_their_own(world, tmp_path, monkeypatch, capsys, name):
    """A video is encoded once for all methods that want the same of it; and `ask` spares the tower likewise."""
    from hybridvlm import ask

    model = load(world / name)
    keeps, encode = [], type(model).encode
    monkeypatch.setattr(
        type(model), "encode", lambda self, *a, **o: keeps.append(o.get("keep")) or encode(self, *a, **o)
    )
    methods = ["evs-pixels:0.5", "str:0.7", "evs-pixels:0.5+str:0.7", "evs-pixels:0.8"]
    asked = ["--methods", ",".join(methods), "--limit", "2", "--batch-size", "2"]
    assert run(world, name, tmp_path / "out", *asked) == 0
    assert sorted(keep.rate if keep else 1.0 for keep in keeps) == [0.5, 0.8, 1.0]
    rows = {row["method"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    for method in methods:
        assert rows[method]["retention_achieved"] == pytest.approx(rows[method]["retention_mean"], abs=0.08)
    capsys.readouterr()
    there = ["--model", str(world / name), "--frames", "4", "--max-new", "4"]
    assert ask.main([str(world / "a.mp4"), "red?", *there, "--reduction", methods[2]]) == 0
    told = capsys.readouterr()
    assert "evs-pixels:0.5+str:0.7: predicted decoder FLOPs" in told.out + told.err
    # the clip was read anew for it, and its tower saw half of the tokens
    assert keeps[-1] == PixelSelection("evs-pixels", 0.5) and len(keeps) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "nemotron_nano_vl"])
def test_keys_hang_on_the_film_and_not_on_its_path(world, tmp_path, name):
    """Another folder, another date and another spelling are the same question; other pixels are another."""
    import os
    import shutil

    def keys(folder):
        run(folder, name, folder / "out", "--methods", "none", "--limit", "2")
        return {record["key"] for record in lines_of(folder / "out")}

    folders = [tmp_path / "one", tmp_path / "elsewhere" / "deep"]
    for folder in folders:
        folder.mkdir(parents=True)
        shutil.copytree(world / name, folder / name)
        shutil.copy(world / "a.mp4", folder / "a.mp4")
    rows = [
        {"video": "a.mp4", "question": "red?", "answer": "x"},
        {"video": "./a.mp4", "question": "b?", "answer": "x"},
    ]
    (folders[0] / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows[0]["video"] = str(folders[1] / "a.mp4")
    (folders[1] / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(folders[1] / "a.mp4", (1, 1))
    first = keys(folders[0])
    assert keys(folders[1]) == first and len(first) == 2
    results = json.loads((folders[0] / "out" / "results.json").read_text())
    assert results["details"][0]["videos"] == 1
    film(folders[0] / "a.mp4", 2)
    assert not first & (keys(folders[0]) - first) and len(keys(folders[0])) == 4


def test_evaluation_is_refused_where_another_is_at_work(world, tmp_path, capsys):
    from hybridvlm.files import folder_lock

    with folder_lock(tmp_path / "out", "an evaluation"):
        assert run(world, "qwen2_vl", tmp_path / "out", "--methods", "none", "--limit", "1") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "is in use: an evaluation" in errors[0]
    assert not (tmp_path / "out" / "samples.jsonl").exists()


SWITCHED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nemotron_nano_vl", "qwen2_vl"])
def test_thinking_is_switched_and_has_a_budget_of_its_own(world, tmp_path, name):
    """Of templates that think by default: one is told by words in the system message, the other by a variable."""
    import shutil

    shutil.copytree(world / name, tmp_path / name)
    if name == "qwen2_vl":
        (tmp_path / name / "chat_template.jinja").write_text(SWITCHED)
    shutil.copy(world / "a.mp4", tmp_path / "a.mp4")
    (tmp_path / "q.jsonl").write_text(json.dumps({"video": "a.mp4", "question": "red?", "answer": "x"}) + "\n")
    given = {"auto": [], "on": ["--thinking", "on", "--think-tokens", "3"], "off": ["--thinking", "off"]}
    found = {}
    for kind, more in given.items():
        assert run(tmp_path, name, tmp_path / "out", "--methods", "none", *more) == 0
        (found[kind],) = [r for r in lines_of(tmp_path / "out") if r["key"] not in {f["key"] for f in found.values()}]
    assert found["auto"]["no_answer"] == "ran out of thinking tokens" and found["auto"]["parsed"] is None
    assert "no_answer" not in found["on"] and found["on"]["thinking"] and "thinking" not in found["off"]
    model = load(tmp_path / name)
    model = dataclasses.replace(model, buckets=override(model.buckets, BUCKETS[1:], "--buckets"))
    shown = []
    answer = model.ask(tmp_path / "a.mp4", "red?", frames=4, thinking=True, think_tokens=3, show=shown.append)
    assert (answer.text, answer.thinking) == (found["on"]["prediction"], found["on"]["thinking"])
    assert "".join(shown).endswith(answer.text) and len(answer.tokens) <= 3 + 4 + 8 and not answer.unfinished


def test_a_template_without_a_switch_says_so(world, tmp_path, capsys):
    assert run(world, "qwen3_vl", tmp_path / "out", "--thinking", "off") == 2
    assert "has no switch for thinking" in capsys.readouterr().err
    assert run(world, "qwen3_vl", tmp_path / "out", "--think-tokens", "-1") == 2
    assert "think_tokens must be a whole number of at least 0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_video_of_vamba_is_walked_once_for_all_its_questions(world, tmp_path, monkeypatch):
    """Dense and under a plan that does not look at the question; one that does walks it for each.
    The answers are those that each question gets by itself."""
    from hybridvlm.inference.programs import ModelPrograms

    built, held = [], ModelPrograms.build_video_memory

    def counting(self, batch, visual, plan):
        built.append("dense" if plan is None else plan.method)
        return held(self, batch, visual, plan)

    monkeypatch.setattr(ModelPrograms, "build_video_memory", counting)
    rows = [
        {"video": video, "question": f"{WORDS[n % 3]} {n}?", "answer": WORDS[n % 3], "options": WORDS}
        for n in range(4)
        for video in ("a.mp4", "tall.mp4")
    ]
    (world / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods = ["--methods", "none,uniform,str-attention", "--batch-size", "2"]
    assert run(world, "vamba", tmp_path / "out", *methods, tasks="many.jsonl") == 0
    # for each of two videos, of different size, one while compiling, one to warm up and one that is used by all four questions
    count = len(built)
    assert set(built) == {"dense", "uniform"} and max(map(built.count, built)) <= 6
    lines = lines_of(tmp_path / "out")
    assert len(lines) == 24

    monkeypatch.setattr(vamba, "memory_serves", lambda plan: False)
    assert run(world, "vamba", tmp_path / "each", *methods, tasks="many.jsonl") == 0
    assert len(built) == count

    def said(folder):
        return {(line["method"], line["id"]): line["prediction"] for line in lines_of(folder)}

    assert said(tmp_path / "out") == said(tmp_path / "each")
