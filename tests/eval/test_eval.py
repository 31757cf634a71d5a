"""The evaluation command: statistics, parsing, resuming, bad input, and the files it leaves."""

import dataclasses
import errno
import importlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers.eval_world import build_world
from helpers.micro_checkpoint import micro_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hybridvlm.checkpoints.folder import save_folder
from hybridvlm.config import Reduction, Schedule, ScoreOptions
from hybridvlm.eval import __main__ as command
from hybridvlm.eval import runner, statistics
from hybridvlm.eval.results import ROW_KEYS, SampleStore, timing_run, write_atomic
from hybridvlm.eval.tasks import parse_choice
from hybridvlm.eval.tasks.jsonl import read_samples
from hybridvlm.eval.variants import DENSE, Variant, expand
from hybridvlm.inference import program_cache
from hybridvlm.options import InputError, override, parse_pairs
from hybridvlm.tiny.export import write_video

# -- statistics --


@settings(max_examples=30)
@given(st.lists(st.booleans(), min_size=2, max_size=40))
def test_one_question_per_video_is_the_plain_standard_error(values):
    mean, se, groups = statistics.cluster_se(values, [str(i) for i in range(len(values))])
    assert groups == len(values)
    assert mean == pytest.approx(np.mean(values))
    assert se == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-12)


def test_copies_of_a_question_add_nothing():
    values, names = [1, 0, 0, 1, 1, 0, 1, 1], list("abcdefgh")
    once = statistics.cluster_se(values, names)
    thrice = statistics.cluster_se(np.repeat(values, 3), np.repeat(names, 3))
    assert thrice == pytest.approx(once)
    assert statistics.difference(np.repeat(values, 3), [0] * 24, np.repeat(names, 3)).interval == pytest.approx(
        statistics.difference(values, [0] * 8, names).interval
    )


def test_accuracy_interval_is_wilsons_without_clusters():
    values = [1] * 70 + [0] * 30
    found = statistics.accuracy(values, [str(i) for i in range(100)])
    t = stats.t.ppf(0.975, 99)
    n = 99.0  # p (1 - p) / se^2 of s / sqrt(n)
    middle = (0.7 + t**2 / (2 * n)) / (1 + t**2 / n)
    half = t / (1 + t**2 / n) * math.sqrt(0.21 / n + t**2 / (4 * n**2))
    assert found.interval == pytest.approx([middle - half, middle + half])


@settings(max_examples=30)
@given(st.integers(2, 30), st.integers(1, 5), st.booleans())
def test_accuracy_interval_stays_inside_and_has_width(videos, each, right):
    values = [right] * (videos * each)
    found = statistics.accuracy(values, [str(i // each) for i in range(len(values))])
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.high - found.low > 0.05


def test_one_video_gives_no_interval():
    assert statistics.accuracy([1, 0, 1], ["a"] * 3).interval is None
    assert statistics.difference([1, 0, 1], [0, 0, 0], ["a"] * 3).interval is None


def test_interval_covers_as_often_as_it_says():
    """Questions of one video that stand and fall together: the clustered interval covers, the naive one does not."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 5)
    hits = naive = 0
    for _ in range(400):
        video = rng.random(40) < 0.8
        values = np.where(rng.random(200) < 0.9, np.repeat(video, 5), rng.random(200) < 0.8)
        found = statistics.accuracy(values, clusters)
        hits += found.low <= 0.8 <= found.high
        half = 1.96 * math.sqrt(found.mean * (1 - found.mean) / 200)
        naive += abs(found.mean - 0.8) <= half
    assert 0.92 <= hits / 400 <= 0.985
    assert naive / 400 < 0.75


def test_mcnemar_is_the_exact_binomial():
    a = [True] * 9 + [False] * 1 + [True] * 50
    b = [False] * 9 + [True] * 1 + [True] * 50
    assert statistics.mcnemar(a, b) == pytest.approx(2 * sum(math.comb(10, k) for k in (0, 1)) / 2**10)
    assert statistics.mcnemar(a, a) == 1.0


def test_difference_is_paired():
    names = [str(i) for i in range(6)]
    found = statistics.difference([1, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 0], names)
    assert found.mean == pytest.approx(2 / 6)
    half = stats.t.ppf(0.975, 5) * np.std([1, 0, 0, 0, 0, 1], ddof=1) / math.sqrt(6)
    assert found.interval == pytest.approx([2 / 6 - half, 2 / 6 + half])


def test_a_difference_of_two_videos_lies_in_what_differences_can_be():
    assert statistics.difference([1, 1, 1, 0], [0, 0, 1, 0], list("aabb")).interval == [-1.0, 1.0]


def test_no_disagreement_is_not_certainty():
    low, high = statistics.difference([1, 0, 1, 1], [1, 0, 1, 1], list("abcd")).interval
    assert -low == high and (1 - high) ** 4 == pytest.approx(0.025)  # 0 of 4 is no rarer than 1 in 40 there


# -- parsing --

OPTIONS = ("boot", "bag", "sandal")


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("boot", "boot"),
        (" Boot. ", "boot"),
        ("'bag'", "bag"),
        ("B", "bag"),
        ("b", "bag"),
        ("(C)", "sandal"),
        ("C.", "sandal"),
        ("A) boot", "boot"),
        ("A. bag", None),  # letter and text disagree
        ("D", None),
        ("boot bag", None),
        ("the boot", None),
        ("", None),
        ("   ", None),
        ("not A", None),
        ("boo", None),
    ],
)
def test_parse_choice(reply, answer):
    assert parse_choice(reply, OPTIONS) == answer


def test_option_text_goes_before_letters():
    assert parse_choice("b", ("c", "b", "a")) == "b"


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["x", "yes", "no", "twelve", "12"]), min_size=2, unique=True), st.data())
def test_parsing_never_guesses(options, data):
    """A reply names one option, by its text or letter; anything more is no answer."""
    at = data.draw(st.integers(0, len(options) - 1))
    text, letter = options[at], chr(ord("A") + at)
    replies = [f" {text}\n", text.upper(), f"{text}.", f"'{text}'", letter, letter.lower(), f"({letter})", f"{letter}."]
    reply = data.draw(st.sampled_from([*replies, f"{letter}) {text}"]))
    assert parse_choice(reply, options) == text
    other = data.draw(st.sampled_from([option for option in options if option != text]))
    beyond = chr(ord("A") + len(options))
    for unclear in (f"{text} or {other}", f"not {reply}", f"the {text}", f"{letter}) {other}", text[:-1], beyond):
        assert parse_choice(unclear, options) is None, unclear


# -- options --


def test_expand():
    assert expand(["none", "str"], [0.25, 0.5]) == [DENSE, Variant("str", 0.25), Variant("str", 0.5)]
    assert expand(["str", "str"], [0.25]) == [DENSE, Variant("str", 0.25)]
    (composed,) = expand(["evs:0.5+str:0.5"], [0.1, 0.9])[1:]
    assert (composed.budget, composed.product, composed.fixed) == (0.25, 0.25, True)
    assert Variant("evs:0.5+str", 0.5).product == 0.25 and Variant("str", 0.5).product == 0.5
    with pytest.raises(ValueError, match="did you mean 'saliency'"):
        expand(["salency"], [0.25])


def test_override():
    assert parse_pairs(["frames=8,16", "text=4"], "x") == {"frames": ["8", "16"], "text": ["4"]}
    assert override(ScoreOptions(), ["decay=on", "sign=relu"], "--score") == ScoreOptions(decay=True, sign="relu")
    assert override(Schedule(), ["shape=step,start=2,never=0,3"], "--schedule") == Schedule(
        "step", start=2, never=(0, 3)
    )
    told = override(Schedule(), ["shape=list", "layer_weights=0,0.5", "values=1,0.25"], "--schedule")
    assert (told.layer_weights, told.values) == ((0.0, 0.5), (1.0, 0.25))
    for tokens, words in (
        (["decai=on"], "did you mean 'decay'"),
        (["decay=maybe"], "on or off"),
        (["sign=up"], "sign must be one of"),
        (["decay"], "key=value"),
    ):
        with pytest.raises(InputError, match=words):
            override(ScoreOptions(), tokens, "--score")


# -- the store --


def test_broken_last_line_is_dropped_and_the_rest_kept(tmp_path):
    path = tmp_path / "samples.jsonl"
    store = SampleStore(path)
    store.append({"key": str(i), "n": i} for i in range(3))
    path.write_bytes(path.read_bytes() + b'{"key": "3", "n')
    again = SampleStore(path)
    assert [r["n"] for r in again.records] == [0, 1, 2]
    again.append([{"key": "3", "n": 3}])
    assert [r["n"] for r in SampleStore(path).records] == [0, 1, 2, 3]


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"key": "0"}\nhello\n{"key": "1"}\n')
    with pytest.raises(ValueError, match="line 2"):
        SampleStore(path)


def test_timings_of_different_runs_do_not_mix():
    def records(run, n):
        return [{"run": run}] * n

    assert timing_run(records("a", 3) + records("b", 5), records("a", 3) + records("b", 5)) == "b"
    assert timing_run(records("a", 3) + records("b", 5), records("a", 3)) == "a"  # b has no dense with it
    assert timing_run(records("b", 5), records("a", 3)) is None
    assert timing_run(records("a", 4) + records("b", 4), records("a", 1) + records("b", 1)) == "b"


def test_atomic_write_leaves_the_old_file_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomic(path, "old")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


# -- questions on files --

GOOD = {"video": "a.mp4", "question": "red", "options": ["red", "green"], "answer": "red"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"video": ', "line 2: not JSON"),
        ("[1]", "line 2: must be an object"),
        (json.dumps({**GOOD, "answer": "blue"}), "line 2: answer 'blue' is none of"),
        (json.dumps({**GOOD, "answer": "C"}), "line 2: answer 'C' is none of"),
        (json.dumps({**GOOD, "options": ["red"]}), "line 2: options must be a list of at least two"),
        (json.dumps({**GOOD, "options": ["red", "Red."]}), "line 2: options must be"),
        (json.dumps({**GOOD, "video": ""}), "line 2: video must be a text"),
        (json.dumps({**GOOD, "quesiton": "x"}), "line 2: has no field 'quesiton'"),
        (json.dumps({**GOOD, "id": "line-1"}), "line 2: id 'line-1' is also that of line 1"),
        (json.dumps({**GOOD, "two_hop": "yes"}), "line 2: two_hop must be true or false"),
        (json.dumps({**GOOD, "video": "a\0.mp4"}), "line 2: video holds a zero byte"),
        (json.dumps({**GOOD, "question": "red \ud800"}), "line 2: .* half a surrogate pair"),
        (json.dumps({**GOOD, "options": ["red", "\udc00"]}), "line 2: .* half a surrogate pair"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, words):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=words) as caught:
        read_samples(path)
    assert str(path) in str(caught.value)


def test_answers_may_be_letters(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{**GOOD, "answer": "b"}, {**GOOD, "answer": "RED"}, {"video": "a.mp4", "question": "x", "answer": "seven"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [s.answer for s in read_samples(path)] == ["green", "red", "seven"]


# -- whole runs, on a micro model and micro videos --


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder where compiled programs are kept: the runs of this file are many, their programs few."""
    cache = tmp_path_factory.mktemp("compiled")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(cache), 0.0), strict=True):
        jax.config.update(name, value)
    yield cache
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def world(tmp_path_factory, compiled):
    """A random model, six videos and a file of questions (eval_world.py)."""
    return build_world(tmp_path_factory.mktemp("world"))


def run_eval(world, output, *more, check=None):
    """Run the command in this process; returns its exit code."""
    argv = ["--model", str(world / "micro"), "--tasks", str(world / "q.jsonl"), "--output", str(output)]
    code = command.main([*argv, "--batch-size", "4", *more])
    assert check is None or code == check
    return code


def lines_of(output):
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def answers_of(output):
    return {(r["method"], r["budget"], r["id"]): (r["prediction"], r["correct"], r["key"]) for r in lines_of(output)}


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """One whole run."""
    output = tmp_path_factory.mktemp("done")
    run_eval(world, output, "--methods", "str,uniform-input", "--budgets", "0.5", check=0)
    return output


def test_a_run_leaves_everything(done, capsys):
    assert {p.name for p in done.iterdir()} == {
        "accuracy_vs_retention.png",
        "accuracy_vs_speedup.png",
        "report.md",
        "results.json",
        "samples.jsonl",
    }
    results = json.loads((done / "results.json").read_text())
    assert [(r["method"], r["budget"]) for r in results["rows"]] == [
        ("none", 1.0),
        ("str", 0.5),
        ("uniform-input", 0.5),
    ]
    for row in results["rows"]:
        assert tuple(row) == ROW_KEYS
        assert row["n"] == 18
        assert set(row["by_type"]) == {"type-0", "type-1", "type-2"}
        assert row["accuracy"] == pytest.approx(np.mean(list(row["by_type"].values())))
        assert row["accuracy_two_hop"] == row["by_type"]["type-2"]
        assert row["prefill_ms"] > 0 and row["decode_ms"] > 0 and row["speedup"] > 0 and row["peak_bytes"] > 0
        assert row["compiles"] > 0
        assert 0 <= row["parse_failures"] <= 18
    dense, progressive, uniform = results["rows"]
    assert (dense["delta"], dense["speedup"], dense["retention_achieved"], dense["flop_speedup"]) == (0, 1, 1, 1)
    for row in (progressive, uniform):
        assert row["retention_mean"] == pytest.approx(0.5, abs=0.02)
        assert row["retention_achieved"] == pytest.approx(row["retention_mean"], abs=0.05)
        assert row["flop_speedup"] > 1
    assert results["comparisons"][0]["method"] == "str"
    assert results["metadata"]["versions"]["jax"] and results["metadata"]["device"]["kind"]
    assert (
        0 <= results["metadata"]["waited_s"] <= results["metadata"]["answered_s"]
        and results["metadata"]["mesh"] is None
    )
    assert results["details"][1]["plans"][0]["method"] == "str"
    assert "drop after" in (done / "report.md").read_text()


def test_wrong_and_unreadable_answers_count_as_wrong(done):
    """The micro model is random and may say anything; whatever cannot be read must be wrong and counted."""
    results = json.loads((done / "results.json").read_text())
    for row in results["rows"]:
        mine = [r for r in lines_of(done) if (r["method"], r["budget"]) == (row["method"], row["budget"])]
        assert len(mine) == 18
        assert row["parse_failures"] == sum(r["parsed"] is None for r in mine)
        assert not any(r["correct"] for r in mine if r["parsed"] is None)
        assert row["accuracy"] == pytest.approx(sum(r["parsed"] == r["answer"] for r in mine) / 18)
    assert 0 < results["rows"][0]["parse_failures"] < 18
    assert len({r["prediction"] for r in lines_of(done)}) > 2


def test_a_second_call_answers_nothing_anew(world, done, capsys):
    before = (done / "samples.jsonl").read_bytes()
    rows = json.loads((done / "results.json").read_text())["rows"]
    run_eval(world, done, "--methods", "str,uniform-input", "--budgets", "0.5", check=0)
    assert (done / "samples.jsonl").read_bytes() == before
    assert json.loads((done / "results.json").read_text())["rows"] == rows
    assert "54 of 54 answers are already" in capsys.readouterr().err


@pytest.mark.slow
def test_another_seed_of_weights_or_plan_is_another_key(world, done, tmp_path):
    """What changes an answer changes its key; what cannot, does not."""
    keys = {key for *_, key in answers_of(done).values()}
    output = tmp_path / "out"
    more = ["--budgets", "0.5", "--schedule", "shape=linear"]
    run_eval(world, output, "--methods", "str", "--limit", "3", *more, check=0)
    for row in lines_of(output):
        assert (row["key"] in keys) == (row["method"] == "none")
    (output / "samples.jsonl").unlink()
    changed = micro_model()
    changed.params["embed"] = changed.params["embed"] * 1.01
    save_folder(tmp_path / "other", changed)
    run_eval(world, output, "--methods", "none", "--limit", "3", "--model", str(tmp_path / "other"), check=0)
    assert not keys & {row["key"] for row in lines_of(output)}


def test_new_methods_join_old_answers(world, done, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "samples.jsonl").write_bytes((done / "samples.jsonl").read_bytes())
    run_eval(world, output, "--methods", "str,random", "--budgets", "0.5", check=0)
    results = json.loads((output / "results.json").read_text())
    runs = [extra["timing_run"] for extra in results["details"]]
    assert runs[0] != runs[2] or runs[0] != runs[1]  # str keeps its old clock, random has the new one
    assert all(row["speedup"] is not None for row in results["rows"])
    old = answers_of(done)
    assert all(value == old[key] for key, value in answers_of(output).items() if key in old)


@pytest.mark.slow
def test_many_methods_are_answered_in_groups_with_dense_along_and_old_programs_go(world, done, tmp_path, monkeypatch):
    """One by one, with no memory maps to spare: the answers of both together, each clock with a dense of its own."""
    monkeypatch.setattr(runner, "TOGETHER", 1)
    monkeypatch.setattr(program_cache, "MOST_MAPS", 0.0)
    held, real = [], program_cache.memory_maps_used
    monkeypatch.setattr(program_cache, "memory_maps_used", lambda: held.append(real()) or held[-1])
    run_eval(world, tmp_path / "out", "--methods", "str,uniform-input", "--budgets", "0.5", check=0)
    assert answers_of(tmp_path / "out") == answers_of(done) and all(0 < share < 1 for share in held)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    clocks = [extra["timing_run"] for extra in results["details"]]
    assert clocks[2] == clocks[1] + ".1" and all(row["speedup"] is not None for row in results["rows"])
    batches = {(r["run"], r["batch"]) for r in lines_of(tmp_path / "out") if r["method"] == "none"}
    assert {run for run, _ in batches} == set(clocks[1:])


def test_programs_that_were_not_used_for_longest_make_room(monkeypatch):
    cache, used = program_cache.ProgramCache(), [0.0]
    monkeypatch.setattr(program_cache, "memory_maps_used", lambda: used.pop() if len(used) > 1 else used[0])
    for n in range(1, 5):
        cache.get(jax.numpy.negative, np.zeros(n))
    one = cache.get(jax.numpy.negative, np.zeros(1))  # now the latest
    used += [0.5, 0.9]  # over, then enough: a third of four, rounded up, has gone
    cache.get(jax.numpy.negative, np.zeros(9))
    assert len(cache) == 3 and cache.get(jax.numpy.negative, np.zeros(1)) is one
    seconds = cache.compile_seconds
    cache.get(jax.numpy.negative, np.zeros(4))
    assert cache.compile_seconds == seconds
    cache.get(jax.numpy.negative, np.zeros(2))
    assert cache.compile_seconds > seconds


def environment(compiled):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    # the precision of conftest.py, so that a child gives the very numbers of the runs in this process
    return os.environ | cache | {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}


def arguments(world, output, *more):
    base = [sys.executable, "-m", "hybridvlm.eval", "--model", str(world / "micro"), "--tasks", str(world / "q.jsonl")]
    return [*base, "--output", str(output), "--batch-size", "1", "--methods", "str", "--budgets", "0.5", *more]


@pytest.mark.slow
def test_resume_after_a_kill(world, done, compiled, tmp_path):
    output = tmp_path / "out"
    process = subprocess.Popen(arguments(world, output), env=environment(compiled), stderr=subprocess.DEVNULL)
    samples = output / "samples.jsonl"
    deadline = time.monotonic() + 120
    while not (samples.is_file() and samples.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = samples.read_bytes()
    first = [json.loads(line) for line in kept.splitlines(keepends=True) if line.endswith(b"\n")]
    assert 3 <= len(first) < 36
    subprocess.run(arguments(world, output), env=environment(compiled), check=True, capture_output=True)
    assert samples.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])  # nothing that was answered is touched
    run = first[0]["run"]
    again = [row for row in lines_of(output) if row["run"] != run and row["method"] == "str"]
    assert {row["id"] for row in again}.isdisjoint(row["id"] for row in first if row["method"] == "str")
    results = json.loads((output / "results.json").read_text())
    assert [row["n"] for row in results["rows"]] == [18, 18]
    whole = answers_of(done)
    assert all(value[0] == whole[key][0] for key, value in answers_of(output).items())
    for extra in results["details"]:  # one run's clock, stated
        assert extra["timing_run"] in {row["run"] for row in lines_of(output)}
        assert extra["timed_batches"] <= 18


BAD = [
    (["--methods", "sttr"], "unknown reduction method 'sttr'; did you mean 'str'?"),
    (["--tasks", "nedle"], "unknown task 'nedle'; did you mean 'needle'?"),
    (["--budgets", "0"], "budget must lie in (0, 1], got 0"),
    (["--budgets", "1.2"], "budget must lie in (0, 1], got 1.2"),
    (["--budgets", "half"], "--budgets takes numbers"),
    (["--sampling", "fps:0"], "rule 'fps:0' needs a rate above 0"),
    (["--model", "nowhere"], "'nowhere' is no folder here"),
    (["--tasks", "nowhere.jsonl"], "no questions at nowhere.jsonl"),
    (["--frames", "9"], "--frames 9 is over the most"),
    (["--buckets", "text=2"], "text = 3 is over the largest bucket; the text buckets are (2,)"),
    (["--limit", "-1"], "--limit must be at least 0"),
    (["--match-flops", "none"], "--match takes a method that drops"),
    (["--match", "final"], "--match takes mean, flops, total-flops"),
    *(
        (["--prompt", text], "--prompt may name {question} and {options} only")
        for text in (
            "{question.__class__}",
            "{options[0]}",
            "{question!r}",
            "{question:>9999}",
            "{}",
            "{0}",
            "{que",
            "{x}",
        )
    ),
    (["--compare", "fastv"], "--compare 'fastv' is not among"),
    (["--methods", "evs,fastv", "--first-drop", "2"], "--first-drop 2: evs drops before layer 0, wherever a schedule"),
    (["--drop-text", "best-frames"], "this model's prompt has none between its frames"),
]


@pytest.mark.parametrize(("more", "words"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_options_are_one_line(world, tmp_path, capsys, more, words):
    assert run_eval(world, tmp_path / "out", "--methods", "str", *more) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0]
    assert not (tmp_path / "out" / "samples.jsonl").exists()


def test_bad_videos_are_named_before_anything_runs(world, compiled, tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    (tmp_path / "cut.mp4").write_bytes((world / "v0.mp4").read_bytes()[:300])
    names = ("missing.mp4", "empty.mp4", "text.mp4", "cut.mp4")
    rows = [{**GOOD, "video": str(world / "v0.mp4")}, *({**GOOD, "video": name} for name in names)]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "out"
    output.mkdir()
    (output / "results.json").write_text("{}")
    call = [*arguments(world, output), "--tasks", str(tmp_path / "bad.jsonl")]
    found = subprocess.run(call, env=environment(compiled), capture_output=True, text=True)
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert found.returncode == 2 and len(errors) == len(names)
    assert all(name in line for name, line in zip(names, errors, strict=True))
    assert (output / "results.json").read_text() == "{}"


def test_a_short_video_uses_all_frames_and_says_so(world, tmp_path, capsys):
    write_video(tmp_path / "short.mp4", np.zeros((2, 16, 16, 3), np.uint8))
    (tmp_path / "q.jsonl").write_text(json.dumps({**GOOD, "video": "short.mp4"}))
    run_eval(world, tmp_path / "out", "--tasks", str(tmp_path / "q.jsonl"), "--methods", "none", check=0)
    assert "has 2 frames, fewer than the 4 asked for; using all" in capsys.readouterr().err
    assert "has 2 frames" in (tmp_path / "out" / "report.md").read_text()


def test_match_flops_solves_all_to_one_cost(world, tmp_path):
    more = ["--methods", "str,uniform-input,random", "--budgets", "0.5", "--match-flops", "str", "--limit", "3"]
    run_eval(world, tmp_path / "out", *more, check=0)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    goal = rows[1]["flop_speedup"]
    assert [row["flop_speedup"] for row in rows[1:]] == pytest.approx([goal] * 3, rel=0.02)


def test_a_method_that_does_nothing_is_called_out(world, tmp_path):
    run_eval(world, tmp_path / "out", "--methods", "uniform", "--budgets", "1", "--limit", "6", check=0)
    assert "the same 6 replies as dense" in (tmp_path / "out" / "report.md").read_text()


def test_frames_that_are_left_out_never_enter_the_tower(world, tmp_path, monkeypatch, capsys):
    """Each row is encoded, and timed, as it would be alone; of a method that no first drop moves it is said."""
    through = []
    for name in ("model", "pixels"):
        module = importlib.import_module(f"hybridvlm.models.nemotron_vl.{name}")
        real = module.encode_frames

        def counting(params, config, shown, *rest, real=real, **options):
            through.append((len(shown), options.get("attention", False)))
            return real(params, config, shown, *rest, **options)

        monkeypatch.setattr(module, "encode_frames", counting)
    more = ["--methods", "frames,uniform", "--budgets", "0.5", "--limit", "3", "--first-drop", "0"]
    run_eval(world, tmp_path / "out", *more, check=0)
    # traced once each: four frames for dense and uniform, two for the other; one frame is that of a model's shapes
    assert sorted(seen for seen in through if seen[0] > 1) == [(2, False), (4, False)]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["retention_achieved"] for row in rows] == [1, 0.5, pytest.approx(0.5, abs=0.1)]
    assert "--first-drop 0 changes nothing for frames: frames drops before layer 0" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mean", "final"])
def test_reductions_come_from_the_checkpoint_unless_told(kind):
    from hybridvlm.eval.evaluate import base_reduction

    own = Reduction("str", 0.25, kind="flops", schedule=Schedule("linear"), score=ScoreOptions(dt=True))
    options = command.build_parser().parse_args(["--score", "decay=on", "--kind", kind])
    base = base_reduction(options, own)
    assert (base.schedule, base.score, base.kind) == (own.schedule, ScoreOptions(decay=True, dt=True), kind)
    assert base_reduction(command.build_parser().parse_args([]), own).kind == "flops"


def test_listing(capsys):
    assert command.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert "str-mamba" in out and "needle" in out


@pytest.mark.parametrize("name", ["needle", "needle-scenes"])
def test_the_needle_tasks_are_the_embedded_benchmark(name):
    from hybridvlm.config import VisionConfig
    from hybridvlm.eval.tasks import TaskOptions, build_task

    config = micro_model().config
    vision = VisionConfig(
        kind="stem", image_size=(128, 128), patch_size=32, width=12, downsample=1, max_frames=64, stem_channels=(4,)
    )
    shown = TaskOptions(dataclasses.replace(config, vision=vision), frames=5, limit=12)
    task = build_task(name, shown)
    assert len(task.samples) == 12 and 1 < len(task.videos) < 12
    assert [s.video for s in task.samples] == sorted(s.video for s in task.samples)
    assert {s.type for s in task.samples} == {"WHAT", "WHERE", "TAG1", "TAG2", "2G", "2P", "2C"}
    assert all(s.two_hop == s.type.startswith("2") for s in task.samples)
    pixels, seconds = task.frames(task.videos[0])
    assert pixels.shape == (5, 128, 128, 3) and len(seconds) == 5 == len(task.seconds(task.videos[0]))
    for sample in task.samples:
        assert task.correct(task.parse(sample.answer, sample), sample)
        wrong = next(option for option in sample.options if option != sample.answer)
        assert not task.correct(task.parse(wrong, sample), sample)
        assert task.parse("zebra", sample) is None and not task.correct(None, sample)
    assert {s.id for s in build_task(name, dataclasses.replace(shown, split="val")).samples}.isdisjoint(
        s.id for s in task.samples
    )
    with pytest.raises(ValueError, match="128x128 pixels, the model takes 16x16"):
        build_task(name, dataclasses.replace(shown, config=config))


@pytest.mark.parametrize(
    ("reply", "options", "found"),
    [
        ("boot", OPTIONS, ("boot", "text")),
        ("(C)", OPTIONS, ("sandal", "first")),
        ("A) boot", OPTIONS, ("boot", "first")),
        ("A. bag", OPTIONS, (None, "letter and text disagree")),
        ("A man", OPTIONS, (None, "none")),
        ("D", OPTIONS, (None, "no such letter")),
        ("the boot", OPTIONS, (None, "none")),
        (" ", OPTIONS, (None, "empty")),
        ("<think>boot", OPTIONS, (None, "thinking not closed")),
        ("<think>bag</think> boot", OPTIONS, ("boot", "text")),
        (None, OPTIONS, (None, "thinking not closed")),
        ("a boot", (), ("a boot", "text")),
        ("", (), (None, "empty")),
        ("<think>x", (), (None, "thinking not closed")),
    ],
)
def test_records_say_how_a_reply_was_read(reply, options, found):
    """Of JSONL files and the embedded benchmark alike, which score by the same function."""
    from hybridvlm.eval.tasks import Sample, Task
    from hybridvlm.eval.tasks.jsonl import JsonlTask
    from hybridvlm.eval.tasks.needle import Needle

    for kind in (JsonlTask, Needle):
        assert kind.score is Task.score
        task = object.__new__(kind)
        record = task.score(reply, Sample("q", "v", "?", "boot", options))
        assert (record["parsed"], record["how"]) == found and record["correct"] is (found[0] == "boot")


def test_a_parser_of_ones_own_is_taken_at_its_word():
    from hybridvlm.eval.tasks import Sample
    from hybridvlm.eval.tasks.jsonl import JsonlTask

    class Last(JsonlTask):
        def parse(self, text, sample):
            return text.split()[-1]

    task, sample = object.__new__(Last), Sample("q", "v", "?", "boot", OPTIONS)
    assert [task.score(reply, sample)["how"] for reply in ("the boot", "boot")] == ["own", "text"]


# -- damaged videos, reasoning, locks, and what goes wrong on the way --


def break_decoding(monkeypatch, *names):
    """Videos of these names turn out damaged when they are decoded, and not before."""
    from hybridvlm.video import VideoError, clip

    whole = clip.decode_frames

    def failing(path, *args, **kwargs):
        if pathlib.Path(path).name in names:
            raise VideoError(f"{path}: none of the frames could be decoded")
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(clip, "decode_frames", failing)


@pytest.mark.parametrize("names", [("v3.mp4",), ("v0.mp4", "v5.mp4")])
def test_a_damaged_film_costs_its_own_questions(world, done, tmp_path, monkeypatch, capsys, names):
    break_decoding(monkeypatch, *names)
    run_eval(world, tmp_path / "out", "--methods", "str", "--budgets", "0.5", check=0)
    records, lost = lines_of(tmp_path / "out"), 3 * len(names)
    assert len(records) == 2 * 18 and sum("failure" in r for r in records) == 2 * lost
    assert all((r["video"] in names) == ("failure" in r) for r in records)
    assert all("correct" not in r and "none of the frames" in r["failure"] for r in records if "failure" in r)
    old = answers_of(done)
    assert all(old[r["method"], r["budget"], r["id"]][0] == r["prediction"] for r in records if "failure" not in r)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for row in results["rows"]:
        assert (row["n"], row["unanswered"]) == (18 - lost, lost)
        mine = [r for r in records if r["method"] == row["method"] and "failure" not in r]
        assert row["accuracy"] == pytest.approx(np.mean([r["correct"] for r in mine]))
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"{lost} questions are on files that could not be read" in report
    assert all(f"{name}: none of the frames could be decoded" in report for name in names)
    before = (tmp_path / "out" / "samples.jsonl").read_bytes()
    capsys.readouterr()
    run_eval(world, tmp_path / "out", "--methods", "str", "--budgets", "0.5", check=0)
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == before
    assert "36 of 36 answers are already" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == results["rows"]


def test_a_task_without_one_film_that_can_be_read_fails_with_a_report(world, tmp_path, monkeypatch, capsys):
    break_decoding(monkeypatch, *(f"v{i}.mp4" for i in range(6)))
    run_eval(world, tmp_path / "out", "--methods", "str", "--budgets", "0.5", check=1)
    row = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][1]
    assert (row["n"], row["unanswered"], row["accuracy"]) == (0, 18, None)
    told = capsys.readouterr()
    assert "18 questions are on files that could not be read" in told.out
    errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "q: no video of it could be read" in errors[0]
    assert "none of the frames could be decoded" in errors[0]
    run_eval(world, tmp_path / "out", "--methods", "str", "--budgets", "0.5", check=1)  # nor is it done the second time


def test_what_the_decoder_complains_of_stays_in_the_results(world, tmp_path, capsys):
    write_video(tmp_path / "short.mp4", np.zeros((2, 16, 16, 3), np.uint8))
    (tmp_path / "q.jsonl").write_text(json.dumps({**GOOD, "video": "short.mp4"}))
    for _ in range(2):
        run_eval(world, tmp_path / "out", "--tasks", str(tmp_path / "q.jsonl"), "--methods", "none", check=0)
        notes = json.loads((tmp_path / "out" / "results.json").read_text())["metadata"]["notes"]
        assert any("has 2 frames" in note for note in notes)
    (record,) = lines_of(tmp_path / "out")
    assert "has 2 frames" in record["remarks"][0]


def test_two_spellings_are_one_film(world, tmp_path):
    from hybridvlm.eval.tasks import TaskOptions, build_task

    os.symlink(world / "v0.mp4", tmp_path / "link.mp4")
    names = ["v1.mp4", f"../{world.name}/v0.mp4", str(world / "v0.mp4"), str(tmp_path / "link.mp4"), "./v0.mp4"]
    lines = [json.dumps({**GOOD, "video": name}) for name in names]
    (world / "spelled.jsonl").write_text("\n".join(lines))
    task = build_task(str(world / "spelled.jsonl"), TaskOptions(micro_model().config, frames=4))
    assert task.videos == names[:2] and [s.video for s in task.samples] == [names[0]] + [names[1]] * 4


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (json.dumps([GOOD, GOOD]), 2),
        ("[\n" + json.dumps(GOOD, indent=1) + "\n]\n", 1),
        ("\ufeff" + json.dumps(GOOD) + "\r\n" + json.dumps(GOOD), 2),
    ],
)
def test_arrays_and_marks_are_read(tmp_path, text, count):
    path = tmp_path / "q.json"
    path.write_text(text, encoding="utf-8")
    assert len(read_samples(path)) == count


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps([GOOD, 3]), "entry 2: must be an object"),
        (json.dumps([GOOD, {**GOOD, "answer": "blue"}]), "entry 2: answer 'blue' is none of"),
        ('[{"video": "a.mp4",]', "is no JSON array"),
        ('{"video": "a", "video": "b", "question": "x", "answer": "y"}', "line 1: the key 'video' stands twice"),
    ],
)
def test_broken_tasks_are_named(tmp_path, text, words):
    path = tmp_path / "q.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_samples(path)


@pytest.mark.parametrize("line", ['{"key": ["x"]}', '{"key": null}', '{"key": "a", "key": "b"}', "[]"])
def test_a_store_with_a_strange_key_is_refused(tmp_path, line):
    (tmp_path / "samples.jsonl").write_text('{"key": "0"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2 is no sample"):
        SampleStore(tmp_path / "samples.jsonl")


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (
            MemoryError("cannot allocate 9 GiB"),
            "out of memory: cannot allocate 9 GiB; what was saved before is kept; use smaller batches",
            1,
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "make room on that disk", 1),
        (KeyboardInterrupt(), "stopped; what was answered is kept", 130),
    ],
)
def test_what_ends_a_run_is_one_line_and_loses_nothing(world, tmp_path, monkeypatch, capsys, error, words, code):
    append = SampleStore.append

    def failing(self, records):
        if len(self.records) >= 8:
            raise error
        append(self, records)

    monkeypatch.setattr(SampleStore, "append", failing)
    assert run_eval(world, tmp_path / "out", "--methods", "none") == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in lines[0] and len(lines) <= 2 and len(lines_of(tmp_path / "out")) == 8
    assert not (tmp_path / "out" / ".lock").exists()
    monkeypatch.undo()
    run_eval(world, tmp_path / "out", "--methods", "none", check=0)
    assert len(lines_of(tmp_path / "out")) == 18


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    store = SampleStore(tmp_path / "samples.jsonl")
    store.append([{"key": "0"}])
    before = store.path.read_bytes()
    import io

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() > len(before):
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(bytes(data)[:3])

    from hybridvlm import storage

    monkeypatch.setattr(storage, "open", lambda path, mode, **_: Full(path, mode.replace("b", "")), raising=False)
    with pytest.raises(OSError, match="No space"):
        store.append([{"key": "1"}])
    assert store.path.read_bytes() == before and "1" not in store


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(world, question, capsys):
    from hybridvlm import ask

    with pytest.raises(ValueError, match="the question is empty"):
        micro_model().ask(np.zeros((4, 16, 16, 3), np.uint8), question)
    assert ask.main(["nowhere.mp4", question, "--model", str(world / "micro")]) == 2
    assert "the question is empty" in capsys.readouterr().err


@pytest.mark.slow
def test_every_row_says_its_four_budgets_and_that_it_took_part(world, tmp_path):
    """Shares, FLOPs by part and time from pixels; `--match` makes one of them equal to that of a method."""
    methods = "str,frames,vidcom2,evs:0.5+str:0.5"
    more = ["--methods", methods, "--budgets", "0.5", "--match", "total-flops", "--limit", "6"]
    run_eval(world, tmp_path / "out", *more, check=0)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    dense, by_str, frames, vidcom2 = results["rows"][:4]
    assert results["metadata"]["match"] == "total-flops:str"
    for row in results["rows"]:
        assert row["decoder_flops"] > 0 and row["vision_flops"] > 0 and row["ttft_ms"] > row["prefill_ms"]
    assert (dense["retention_input"], dense["changed"], dense["total_flop_speedup"]) == (1, 0, 1)
    assert frames["vision_flops"] < dense["vision_flops"] == vidcom2["vision_flops"]
    assert (dense["scoring_flops"], by_str["scoring_flops"] > 0, by_str["retention_input"]) == (0, True, 1)
    assert vidcom2["total_flop_speedup"] == pytest.approx(by_str["total_flop_speedup"], rel=0.02)
    assert [row["evs"] for row in results["rows"]] == [None] * 4 + [0.5]
    changed = [extra["predictions_changed"] / 6 for extra in results["details"]]
    assert [row["changed"] for row in results["rows"]] == changed
    report = (tmp_path / "out" / "report.md").read_text()
    assert "EVS is off, in dense too, but in rows that name it: evs:0.5+str:0.5" in report


def test_match_takes_a_kind_and_a_method():
    from hybridvlm.eval.variants import Match

    assert Match.read("mean") == ("mean", "str") and str(Match.read("flops:fastv")) == "flops:fastv"
    with pytest.raises(ValueError, match="--match takes mean, flops, total-flops"):
        Match.read("final")
