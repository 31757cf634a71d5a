"""The command on published benchmarks, end to end: every task from one folder of data, with and without a model that computes."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from helpers.benchmark_fixtures import TASKS, fixture
from helpers.benchmark_tasks import UNPACKED
from helpers.silent_model import silent_model

from hybridvlm.checkpoints.samples import write_sample
from hybridvlm.eval import __main__ as command
from hybridvlm.eval.benchmarks import MODULES

FAMILIES = ("nemotron_nano_vl", "nemotron_omni", "qwen2_vl", "qwen3_vl", "vamba")
NAMES = list(MODULES)
ALL = ",".join(NAMES)
BUCKETS = ["--buckets", "frames=4", "text=640", "max_new=2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Checkpoints of all families, and one folder that holds every benchmark."""
    root = tmp_path_factory.mktemp("published")
    for name in FAMILIES:
        write_sample(name, root / name)
    (root / "data").mkdir()
    for name, layout in UNPACKED.items():
        base, expected = fixture(name)
        (root / "data" / name).symlink_to(base / expected["layouts"]["video" if name == "mvbench" else layout])
    return root


def arguments(world, output, name="qwen3_vl", tasks=ALL, methods="none"):
    argv = ["--model", str(world / name), "--tasks", tasks, "--data", str(world / "data"), "--output", str(output)]
    argv += ["--methods", methods, "--frames", "4", "--batch-size", "2", "--incomplete", "ok", "--missing", "wrong"]
    return [*argv, *BUCKETS]


def run(world, output, *more, **given):
    return command.main([*arguments(world, output, **given), *more])


@pytest.fixture
def mouth(monkeypatch):
    """A model that computes nothing and says what it is told."""
    return silent_model(monkeypatch)


def rows_of(output):
    results = json.loads((output / "results.json").read_text())
    return {row["task"]: (row, extra) for row, extra in zip(results["rows"], results["details"], strict=True)}, results


def test_every_benchmark_through_the_command(world, mouth, tmp_path, capsys):
    """Always "A": each number is the one that the benchmark defines; everything that a reader needs is written."""
    assert run(world, tmp_path / "out") == 0, capsys.readouterr().err
    rows, results = rows_of(tmp_path / "out")
    assert list(rows) == NAMES
    for name in ("videomme", "longvideobench", "nextqa", "mvbench", "tempcompass", "perceptiontest"):
        row, extra = rows[name]
        wanted = fixture(TASKS[name][0])[1]["scores"]
        assert row["accuracy"] == pytest.approx(wanted["overall"])
        for field, values in wanted["groups"].items():
            assert {k: c["accuracy"] for k, c in extra["scores"]["groups"][field].items()} == pytest.approx(values)
        assert extra["replies"]["letter_share"] == 1.0 and extra["replies"]["unparsed"] == 0.0
    assert rows["lvbench"][0]["accuracy"] == pytest.approx(1 / 9)
    assert 100 * rows["mlvu"][1]["scores"]["value"] == pytest.approx(fixture("mlvu")[1]["scores"]["expected_m_avg"])
    assert (rows["egoschema"][0]["n"], rows["egoschema"][1]["unscored"]) == (2, 2)
    assert (rows["longvideobench-test"][0]["n"], rows["longvideobench-test"][1]["unscored"]) == (0, 2)
    about = results["tasks"]["videomme"]
    assert about["protocol"] == "official" and about["parser"] == "letter-1" and about["protocol_parser"] == "vk.regex"
    assert about["frames"] == {"rule": "slicer", "asked": 4, "least": 4, "median": 4, "most": 4}
    files = {str(p.relative_to(tmp_path / "out/submissions")) for p in (tmp_path / "out/submissions").rglob("*.json")}
    assert {
        "egoschema/none/egoschema_submission.json",
        "longvideobench-test/none/longvideobench_submission.json",
        "perceptiontest/none/perceptiontest_submission.json",
    } <= files
    report = (tmp_path / "out/report.md").read_text()
    for words in ("M-Avg", "protocol official (2024)", "% by duration", "count as wrong"):
        assert words in report
    records = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    gone = [r for r in records if r["video"] == "GoneGone000"]
    assert len(gone) == 3 and all(r["prediction"] is None and "missing" in r["failure"] for r in gone)
    whole = "".join(p.read_text() for p in (tmp_path / "out").rglob("*") if p.suffix in (".json", ".jsonl", ".md"))
    assert "CANARY" not in whole.upper()
    before = mouth.asked
    assert run(world, tmp_path / "out") == 0 and mouth.asked == before  # nothing is asked again


def test_a_folder_answers_for_the_rule_and_the_protocol_of_today(world, mouth, tmp_path):
    """Nothing is asked again under another --missing or another protocol's parser, and every number is that of a fresh run."""
    from hybridvlm.eval.logs import read

    mouth.reply = "a"  # a letter to ours and to vamba's parser, nothing to lmms-eval's
    told = ["--prompt", "{question} {options}", "--sampling", "linspace"]
    ways = [("wrong", "lmms-eval"), ("skip", "lmms-eval"), ("skip", "vamba")]
    parities, asked = [], []
    for missing, protocol in ways:
        more = [*told, "--missing", missing, "--protocol", protocol]
        assert run(world, tmp_path / "one", *more, tasks="lvbench") == 0
        asked.append(mouth.asked)
        assert run(world, tmp_path / f"{missing}-{protocol}", *more, tasks="lvbench") == 0
        mouth.asked = asked[0]
        (row, extra), (fresh, theirs) = (rows_of(tmp_path / x)[0]["lvbench"] for x in ("one", f"{missing}-{protocol}"))
        for key in ("n", "accuracy", "unanswered"):
            assert row[key] == fresh[key], key
        assert row["n"] == (9 if missing == "wrong" else 6) and extra["scores"] == theirs["scores"]
        parities.append(extra["scores"]["parity"])
        counted = [x.correct for x in read(tmp_path / "one") if x.correct is not None]
        assert (len(counted), sum(counted) / len(counted)) == (row["n"], row["accuracy"])
    assert len(set(asked)) == 1 and parities == [0, 0, pytest.approx(1 / 6)]
    gone = [r for r in map(json.loads, (tmp_path / "one/samples.jsonl").read_text().splitlines()) if "failure" in r]
    assert len(gone) == 3 and all(len(r["options"]) == 4 and isinstance(r["row"], int) for r in gone)


def test_a_video_found_damaged_while_decoding_counts_by_the_rule(world, mouth, tmp_path, monkeypatch):
    from hybridvlm.video import VideoError, clip

    whole = clip.decode_frames

    def failing(path, *args, **kwargs):
        if pathlib.Path(path).name == "1034419625.mp4":
            raise VideoError(f"{path}: none of the frames could be decoded")
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(clip, "decode_frames", failing)
    found = {}
    for missing in ("wrong", "skip", "wrong"):
        assert run(world, tmp_path / "out", "--missing", missing, tasks="tempcompass") == 0
        row, _ = rows_of(tmp_path / "out")[0]["tempcompass"]
        assert found.setdefault(missing, (row["n"], row["accuracy"])) == (row["n"], row["accuracy"])
    (every, low), (some, high) = found["wrong"], found["skip"]
    assert every == 10 and 0 < some < every and low * every == pytest.approx(high * some)


def test_a_killed_run_over_several_tasks_goes_on(world, mouth, tmp_path):
    """Killed in the middle of the second task: together both runs ask what one asks, and the results are the same."""
    tasks = "tempcompass,nextqa"
    assert run(world, tmp_path / "whole", tasks=tasks) == 0
    mouth.asked, mouth.most = 0, 14
    assert run(world, tmp_path / "killed", tasks=tasks) == 130
    kept = (tmp_path / "killed/samples.jsonl").read_text().count("\n")
    assert 10 <= kept < 18
    mouth.most = None
    assert run(world, tmp_path / "killed", tasks=tasks) == 0
    records = [json.loads(line) for line in (tmp_path / "killed/samples.jsonl").read_text().splitlines()]
    assert len(records) == 18 and len({r["key"] for r in records}) == 18
    for key in ("accuracy", "n", "by_type"):
        assert [r[0][key] for r in rows_of(tmp_path / "whole")[0].values()] == [
            r[0][key] for r in rows_of(tmp_path / "killed")[0].values()
        ]


@pytest.mark.parametrize("processes", [2, 3])
def test_other_numbers_of_processes_go_on(world, mouth, tmp_path, processes):
    """All processes but the last answer their share and are gone; one alone asks the rest, and nothing twice."""
    from hybridvlm.config import Reduction
    from hybridvlm.distributed import Process
    from hybridvlm.eval.results import SampleStore
    from hybridvlm.eval.runner import Runner
    from hybridvlm.eval.tasks import Published, TaskOptions, build_task
    from hybridvlm.eval.variants import Planner
    from hybridvlm.inference.model import load
    from hybridvlm.options import override

    model = load(world / "qwen3_vl")
    model = dataclasses.replace(model, buckets=override(model.buckets, BUCKETS[1:], "--buckets"))
    own = Published(data=world / "data", incomplete=True, missing="wrong")
    task = build_task("lvbench", TaskOptions(model.config, 4, model.buckets, published=own))

    def runner(process):
        store = SampleStore(tmp_path / "samples.jsonl", process)
        return Runner(model, task, [], Planner(model, Reduction()), store, weights="w", batch_size=2)

    for index in range(processes - 1):
        runner(Process(index, processes)).run()
    last = runner(Process(0, 1))
    assert 0 < last.pending() < 6  # of six that can be asked
    last.run()
    records = SampleStore(tmp_path / "samples.jsonl", Process(0, 1)).records
    assert len(records) == len({r["key"] for r in records}) == 9 and last.pending() == 0
    assert sorted(r["id"] for r in records if r.get("correct")) == ["0"]


def test_a_limit_is_of_each_task(world, mouth, tmp_path):
    assert run(world, tmp_path / "out", "--limit", "5", tasks="tempcompass,nextqa") == 0
    assert [row["n"] for row, _ in rows_of(tmp_path / "out")[0].values()] == [5, 5]


def test_sanity_rows_and_the_collapse_warning(world, mouth, tmp_path, monkeypatch, capsys):
    from hybridvlm.eval.benchmarks import metrics

    monkeypatch.setattr(metrics, "LEAST", 5)
    assert (
        run(world, tmp_path / "out", "--no-video", "--shuffle-frames", "--format", "lmms-eval", tasks="videomme-subs")
        == 0
    )
    rows, results = rows_of(tmp_path / "out")
    assert list(rows) == ["videomme-subs", "videomme-subs-no-video", "videomme-subs-shuffle-frames"]
    assert results["tasks"]["videomme-subs-no-video"]["frames"] is None
    assert "all 12 replies are the same" in capsys.readouterr().out
    assert "writes no files of" not in capsys.readouterr().err
    (log,) = (tmp_path / "out/lmms-eval/qwen3_vl").glob("*_samples_videomme_w_subtitle.jsonl")
    assert len(log.read_text().splitlines()) == 12
    for path in ("out/samples.jsonl", "out"):  # of the folder, not its copy for lmms-eval as well
        assert command.main(["--rescore", str(tmp_path / path)]) == 0
        told = capsys.readouterr().out
        assert told.count("dense:") == 3 and "videomme-subs dense: 25.00 -> 25.00 over 12 questions" in told
    assert command.main(["compare", str(tmp_path / "out"), str(tmp_path / "out")]) == 0
    assert "videomme-subs: 12 questions" in (told := capsys.readouterr().out) and "videomme_w_subtitle" not in told


@pytest.mark.parametrize(
    ("more", "tasks", "words"),
    [
        (["--missing", "fail"], "lvbench", "GoneGone000 (3); go on with --missing wrong"),
        (["--incomplete", "fail"], "nextqa", "holds 8 of 8,564 questions"),
        ([], "nextqa,nextqa", "names 'nextqa' twice"),
        (["--protocol", "x"], "lvbench", "lvbench has no protocol 'x'; it has lmms-eval, qwen, vamba"),
        (["--data", "none"], "lvbench", "--data none is no folder"),
        (["--data", "gs://b/x"], "lvbench", "mount the bucket"),
        (["--sampling", "odd"], "lvbench", "--sampling 'odd' is no rule"),
        (["--limit-videos", "-1"], "lvbench", "--limit-videos must be at least 0"),
        (["--sampling", "vk.fps:0"], "lvbench", "--sampling 'vk.fps:0' is no rule"),
        (["--format", "lmms-eval"], "hourvideo", "--format lmms-eval is for benchmarks that lmms-eval has"),
        ([], "lvbenhc", "did you mean 'lvbench'"),
        (["--task-module", "no/such.py"], "lvbench", "there is no file"),
    ],
)
def test_what_cannot_run_is_said_before_it_starts(world, mouth, tmp_path, capsys, more, tasks, words):
    assert run(world, tmp_path / "out", *more, tasks=tasks) == 2
    assert words in capsys.readouterr().err and not mouth.asked
    assert not (tmp_path / "out/samples.jsonl").exists()


def test_tasks_of_which_no_log_is_written_are_named(world, mouth, tmp_path, capsys):
    assert run(world, tmp_path / "out", "--format", "lmms-eval", "--limit", "2", tasks="tempcompass,nextqa") == 0
    assert "--format lmms-eval writes no files of tempcompass" in capsys.readouterr().err
    (log,) = (tmp_path / "out/lmms-eval/qwen3_vl").glob("*_samples_*.jsonl")
    assert log.name.endswith("_samples_nextqa_mc_test.jsonl")


def test_a_damaged_video_is_named_with_its_reason(world, mouth, tmp_path, capsys):
    """One that is there and cannot be read is told from one that is missing; once it is whole it is asked about."""
    import shutil

    shutil.copytree(world / "data/tempcompass", tmp_path / "data/tempcompass")
    broken = tmp_path / "data/tempcompass/videos/1034419625.mp4"
    whole = broken.read_bytes()
    broken.write_bytes(b"")
    told = {"tasks": "tempcompass", "methods": "none"}
    own = ["--data", str(tmp_path / "data"), "--missing"]
    assert run(world, tmp_path / "out", *own, "fail", **told) == 2
    assert (
        "cannot be read: 1034419625 (" in (said := capsys.readouterr().err) and "the file is empty; go on with" in said
    )
    assert run(world, tmp_path / "out", *own, "skip", **told) == 0
    assert "a file that is put in its place is asked about by the next run" in capsys.readouterr().out
    some = mouth.asked
    others = {path: path.read_bytes() for path in broken.parent.iterdir() if path != broken}
    for path in others:
        path.write_bytes(b"")
    assert run(world, tmp_path / "none", *own, "skip", **told) == 2
    assert f"no video of it can be read below {tmp_path}/data/tempcompass: " in (said := capsys.readouterr().err)
    assert "the file is empty" in said
    for path, content in {**others, broken: whole}.items():
        path.write_bytes(content)
    assert run(world, tmp_path / "out", *own, "skip", **told) == 0
    assert rows_of(tmp_path / "out")[0]["tempcompass"][0]["n"] == 10 and 10 <= mouth.asked < some + 10


@pytest.mark.parametrize(
    ("more", "flag"),
    [
        (["--data", "."], "data"),
        (["--protocol", "official"], "protocol"),
        (["--limit-videos", "2"], "limit-videos"),
        (["--missing", "skip"], "missing"),
        (["--incomplete", "ok"], "incomplete"),
        (["--verify", "full"], "verify"),
        (["--no-video"], "no-video"),
        (["--format", "lmms-eval"], "format lmms-eval"),
    ],
)
def test_options_that_nothing_takes_are_refused(tmp_path, capsys, more, flag):
    assert command.main(["--tasks", "needle", "--output", str(tmp_path / "out"), *more]) == 2
    assert f"error: --{flag} is for " in capsys.readouterr().err and not (tmp_path / "out").exists()


OWN_BENCHMARK = """
import dataclasses

from hybridvlm.eval.benchmarks import published
from hybridvlm.eval.tasks import register
from hybridvlm.eval.tasks.benchmark import BenchmarkTask

MINE = dataclasses.replace(published("tempcompass"), name="mine", title="Mine")
register("mine", lambda name, options: BenchmarkTask(MINE, options), "a benchmark of one's own")
"""


def test_a_benchmark_from_outside_the_package_is_one(world, mouth, tmp_path, capsys, monkeypatch):
    """Whether it comes by --task-module or is registered already, as by an entry point: --data, all questions, sanity rows."""
    from hybridvlm.eval import published, tasks

    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    monkeypatch.setattr(published, "LIMIT", 4)
    (tmp_path / "own_benchmark.py").write_text(OWN_BENCHMARK)
    module = ["--task-module", str(tmp_path / "own_benchmark.py")]
    assert run(world, tmp_path / "one", "--no-video", *module, tasks="mine") == 0, capsys.readouterr().err
    assert {name: row["n"] for name, (row, _) in rows_of(tmp_path / "one")[0].items()} == {
        "mine": 10,
        "mine-no-video": 10,
    }
    assert run(world, tmp_path / "two", "--limit", "4", tasks="mine") == 0, capsys.readouterr().err
    assert rows_of(tmp_path / "two")[0]["mine"][0]["n"] == 4


@pytest.mark.parametrize("text", ["import no_such_module_x", "x = 1\n1 / 0", "def (", "raise SystemError('odd')"])
def test_a_task_module_that_fails_is_named(tmp_path, capsys, text):
    (tmp_path / "broken_task.py").write_text(text)
    for _ in range(2):  # half of a module is not taken for one that was read
        assert command.main(["--list", "--task-module", str(tmp_path / "broken_task.py")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --task-module {tmp_path / 'broken_task.py'}: ") and "Error: " in line
    if "1 / 0" in text:
        assert "broken_task.py, line 2)" in line


OWN = '''
from hybridvlm.eval.tasks import Sample, register
from hybridvlm.eval.tasks.jsonl import JsonlTask


class Colours(JsonlTask):
    """A task of one's own: the questions of a JSONL file, with another prompt."""

    def prompt(self, sample: Sample) -> str:
        return "Name the colour. " + super().prompt(sample)


def build(name, options):
    import pathlib

    task = Colours(pathlib.Path(__file__).parent / "q.jsonl", options)
    task.name = name
    return task


register("colours", build, "colours of a second")
'''


def test_a_task_from_outside_the_package(world, mouth, tmp_path, capsys, monkeypatch):
    from hybridvlm.eval import tasks

    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    (tmp_path / "own.py").write_text(OWN)
    video = fixture("tempcompass")[0] / "official/videos/1034419625.mp4"
    row = {"video": str(video), "question": "Which?", "answer": "red", "options": ["red", "green"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    assert run(world, tmp_path / "out", "--task-module", str(tmp_path / "own.py"), tasks="colours") == 0
    assert rows_of(tmp_path / "out")[0]["colours"][0]["accuracy"] == 1.0
    assert command.main(["--list", "--task-module", str(tmp_path / "own.py")]) == 0
    out = capsys.readouterr().out
    assert "colours of a second" in out and "videomme " in out and "official, lmms-eval" in out
    with pytest.raises(ValueError, match="task 'lvbench' is there already"):
        tasks.register("lvbench", lambda name, options: None, "")


def test_a_family_sees_subtitles_between_frames(world):
    """The ids of a prompt hold every frame in order and the lines between them; the reply's beginning stands at its end."""
    from hybridvlm.eval.layouts import Asking, lay_out
    from hybridvlm.eval.tasks import Published, TaskOptions, build_task
    from hybridvlm.inference.model import load
    from hybridvlm.inference.thinking import switch
    from hybridvlm.options import override

    for family in FAMILIES:
        model = load(world / family)
        model = dataclasses.replace(model, buckets=override(model.buckets, BUCKETS[1:], "--buckets"))
        for name in ("longvideobench", "mvbench"):
            own = Published(data=world / "data", incomplete=True, missing="skip")
            task = build_task(name, TaskOptions(model.config, 8, model.buckets, published=own))
            sample = next(s for s in task.samples if s.cluster in ("86Cxyz_FV9M", "ssv2_video_mp4/166583.mp4"))
            layout = lay_out(model, task, sample, (1, 1, 1), Asking(), switch(model, None))
            clip, config = task.clip(sample.video, pixels=False)
            patch = config.vision.temporal_patch
            assert layout.frames == -(-len(clip.seconds) // patch), family
            seen = layout.frame[layout.frame >= 0]
            assert np.all(np.diff(seen) >= 0) and len(np.unique(seen)) == layout.frames
            text = model.tokenizer.decode(layout.ids[layout.frame < 0].tolist())
            if name == "mvbench":
                assert text.endswith("Best option:(") and "Carefully watch the video" in text
                continue
            assert "Question: Which colour" in text and "s4, its end a whole number" in text
            runs = np.flatnonzero(np.diff(np.flatnonzero(layout.frame >= 0)) > 1)
            assert len(runs) >= 1  # text between frames
            batch, *_ = model.family.make_batch(config, [layout], model.buckets)
            assert (np.asarray(batch.frame_count) == layout.frames).all()


def test_modules_are_files():
    folder = pathlib.Path(command.__file__).parent / "benchmarks"
    assert all((folder / f"{module}.py").is_file() for module in MODULES.values())
