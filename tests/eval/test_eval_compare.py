"""Two runs side by side, replies scored again, and lmms-eval's files, checked against independent computations."""

import json
import math

import numpy as np
import pytest
from helpers.benchmark_tasks import answered, task
from scipy import stats

from hybridvlm.eval import __main__ as command
from hybridvlm.eval import compare, lmms_eval, rescore
from hybridvlm.eval.logs import read
from hybridvlm.options import InputError


def record(task_name, name, correct, *, video, method="none", budget=1.0, gold="A", reply=None, **more):
    reply = (gold if correct else "D") if reply is None else reply
    row = {
        "key": f"{task_name}{name}{method}",
        "task": task_name,
        "method": method,
        "budget": budget,
        "id": name,
        "video": video,
    }
    row |= {"type": "", "answer": gold, "prediction": reply, "parsed": reply, "correct": correct}
    return row | {"options": ["red", "green", "blue", "white"], "cluster": video, "groups": {"part": name[0]}} | more


def folder(path, rows):
    path.mkdir()
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pair(tmp_path):
    """Two runs on 60 questions of 20 videos, three a video, the second one somewhat better."""
    rng = np.random.default_rng(3)
    easy = rng.random(20)
    first = rng.random(60) < np.repeat(easy, 3)
    second = np.where(rng.random(60) < 0.7, first, rng.random(60) < 0.8)
    names = [f"{'xy'[i % 2]}{i:02d}" for i in range(60)]
    videos = [f"video{i // 3}" for i in range(60)]
    paths = []
    for label, rights in (("a", first), ("b", second)):
        rows = [record("t", n, bool(r), video=v) for n, r, v in zip(names, rights, videos, strict=True)]
        paths.append(folder(tmp_path / label, rows))
    return paths, first.astype(int), second.astype(int), np.repeat(np.arange(20), 3), names


def test_paired_numbers_are_those_of_an_independent_computation(pair):
    (a, b), first, second, video, names = pair
    found = compare.compare(read(a), read(b), paired=True)
    d = second - first
    sums = np.array([(d - d.mean())[video == v].sum() for v in range(20)])
    se = math.sqrt(20 / 19 * (sums**2).sum()) / 60
    half = stats.t.ppf(0.975, 19) * se
    assert found.delta == pytest.approx(d.mean()) and found.interval == pytest.approx(
        [d.mean() - half, d.mean() + half]
    )
    gained, lost = int((d == 1).sum()), int((d == -1).sum())
    assert found.mcnemar == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    assert found.gained == sorted(n for n, x in zip(names, d, strict=True) if x == 1) and len(found.lost) == lost
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert found.needed == math.ceil(z**2 * 60 * se**2 / 0.01**2)
    odd = [i for i, n in enumerate(names) if n[0] == "y"]
    assert found.groups["part"]["y"] == (30, pytest.approx(first[odd].mean()), pytest.approx(second[odd].mean()))


def test_paired_interval_is_that_of_statsmodels(pair):
    api = pytest.importorskip("statsmodels.api")
    (a, b), first, second, video, _ = pair
    fit = api.OLS(second - first, np.ones(60)).fit(
        cov_type="cluster", cov_kwds={"groups": video, "use_correction": True}
    )
    found = compare.compare(read(a), read(b), paired=True)
    # statsmodels' correction has (n - 1) / (n - k) too, which is 1 for a mean
    assert (found.interval[1] - found.delta) / stats.t.ppf(0.975, 19) == pytest.approx(fit.bse[0])


def wilson(p, n, z):
    """Wilson's interval for a share p of n."""
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return middle - half, middle + half


def newcombe(first, second):
    """Newcombe's interval of second - first, each (share, low, high)."""
    (p, low, high), (q, below, above) = first, second
    return [q - p - math.hypot(q - below, high - p), q - p + math.hypot(above - q, p - low)]


def test_unpaired_numbers_are_those_of_an_independent_computation(pair):
    (a, b), first, second, video, _ = pair
    found = compare.compare(read(a), read(b), paired=False)
    sides = []
    for x in (first, second):
        sums = np.array([(x - x.mean())[video == v].sum() for v in range(20)])
        n = x.mean() * (1 - x.mean()) / (20 / 19 * (sums**2).sum() / 60**2)
        assert n < 60
        sides.append((x.mean(), *wilson(x.mean(), n, stats.t.ppf(0.975, 19))))
    assert found.interval == pytest.approx(newcombe(*sides)) and found.mcnemar is None
    assert any("--paired" in note for note in found.notes)


def sides_of(tmp_path, first, second):
    """Two runs on questions of their own, each on a video of its own."""
    out = []
    for label, rights in (("a", first), ("b", second)):
        rows = [record("t", f"{label}{i}", bool(r), video=f"{label}{i}") for i, r in enumerate(rights)]
        out.append(folder(tmp_path / label, rows))
    return out


@pytest.mark.parametrize(
    ("k1", "k2", "n1", "n2"),
    [(0, 2000, 2000, 2000), (2000, 2000, 2000, 2000), (0, 0, 900, 2000), (60, 2000, 2000, 2000)],
)
def test_runs_that_are_all_right_or_all_wrong_have_a_proper_interval(tmp_path, capsys, k1, k2, n1, n2):
    """Newcombe's of Wilson's intervals as SciPy has them; of so many videos Student's quantile is the normal one to 1e-3."""
    a, b = sides_of(tmp_path, np.arange(n1) < k1, np.arange(n2) < k2)
    sides = []
    for k, n in ((k1, n1), (k2, n2)):
        interval = stats.binomtest(k, n).proportion_ci(method="wilson")
        sides.append((k / n, interval.low, interval.high))
    low, high = compare.compare(read(a), read(b), paired=False).interval
    assert [low, high] == pytest.approx(newcombe(*sides), abs=2e-5)
    assert -1 <= low < high <= 1
    assert command.main(["compare", str(a), str(b)]) == 0
    assert f"[{100 * low:+.2f}, {100 * high:+.2f}] points" in capsys.readouterr().out


def test_unpaired_interval_is_that_of_statsmodels(tmp_path):
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    a, b = sides_of(tmp_path, np.zeros(1500), np.ones(1500))
    wanted = proportion.confint_proportions_2indep(1500, 1500, 0, 1500, method="newcomb", compare="diff")
    assert compare.compare(read(a), read(b), paired=False).interval == pytest.approx(wanted, abs=2e-5)


def test_a_few_questions_all_right_against_all_wrong_are_not_certain(tmp_path):
    """Four videos each; paired, too, where every video differs alike."""
    a, b = sides_of(tmp_path, [0] * 4, [1] * 4)
    low, high = compare.compare(read(a), read(b), paired=False).interval
    z = stats.t.ppf(0.975, 3)
    # of no and of all of 4: the one bound is z^2 / (4 + z^2) from the end
    assert (low, high) == (pytest.approx(1 - math.sqrt(2) * z**2 / (4 + z**2)), pytest.approx(1.0))
    same = folder(tmp_path / "c", [record("t", f"a{i}", True, video=f"a{i}") for i in range(4)])
    found = compare.compare(read(a), read(same), paired=True)
    share = 1 - 0.025 ** (1 / 4)
    assert found.interval == [pytest.approx(1 - 2 * share), 1.0] and found.mcnemar == pytest.approx(2 / 16)


def test_differences_that_cancel_in_every_video_are_not_certain():
    from hybridvlm.eval import statistics

    found = statistics.difference([1, 0, 1, 0], [0, 1, 0, 1], list("aabb"))
    assert (found.mean, found.high) == (0.0, pytest.approx(1 - 0.025**0.5))


@pytest.mark.parametrize("kind", ["ours", "stored", "theirs"])
def test_several_runs_below_one_folder_are_not_read_together(tmp_path, capsys, kind):
    one = folder(tmp_path / "single", [record("t", "q", True, video="v")])
    home = tmp_path / "results"
    home.mkdir()
    if kind == "theirs":
        lmms_log(home / "x", ["A"], ["A"])
        lmms_log(home / "y", ["B"], ["A"])
    else:
        folder(home / "x", [record("t", "q", True, video="v")])
        folder(home / "y", [record("t", "q", False, video="v")])
        if kind == "stored":  # parts of several processes
            (home / "y" / "samples.jsonl").rename(home / "y" / "samples-1.jsonl")
    for argv in (["compare", str(one), str(home)], ["compare", str(home), str(one)], ["--rescore", str(home)]):
        assert command.main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"error: {home} holds 2 runs: {home / 'x'}, {home / 'y'}; give the folder of one"
    only = str(home / "x") if kind == "theirs" else str(one)
    assert command.main(["compare", str(home / "x"), only]) == 0


def test_a_hand_worked_case(tmp_path):
    """Four videos of one question: B has two more right. Difference .5; variance (1 + 0 + 1 + 0 - 4/4) / 3 = 1/3, over 4."""
    a = folder(
        tmp_path / "a", [record("t", f"q{i}", r, video=f"v{i}") for i, r in enumerate([False, True, False, False])]
    )
    b = folder(
        tmp_path / "b", [record("t", f"q{i}", r, video=f"v{i}") for i, r in enumerate([True, True, True, False])]
    )
    found = compare.compare(read(a), read(b), paired=True)
    half = 3.182446305 * math.sqrt(1 / 12)
    assert found.interval == pytest.approx([0.5 - half, min(0.5 + half, 1)], rel=1e-6)  # no difference is over 1
    assert found.mcnemar == pytest.approx(0.5)  # two of two
    assert found.needed == math.ceil(2.801585219**2 * (1 / 3) / 1e-4)


def test_the_command_prints_it(pair, capsys):
    (a, b), *_ = pair
    assert command.main(["compare", str(a), str(b), "--paired"]) == 0
    out = capsys.readouterr().out
    for words in (
        "t: 60 questions",
        "McNemar p",
        "only B is right on",
        "power: a difference of 1 point",
        "part x (n=30)",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["a", "none"], "no samples in it"),
        (["a", "other"], "no task is common: A has t; B has u"),
        (["a:str@0.25", "a"], "no answers of 'str@0.25'; there are none"),
        (["a", "gold"], "one log has answer A, the other B"),
        (["a", "broken"], "line 1: no sample of this library"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, capsys, argv, words):
    folder(tmp_path / "a", [record("t", "q", True, video="v"), record("t", "r", True, video="w")])
    folder(tmp_path / "other", [record("u", "q", True, video="v")])
    folder(tmp_path / "gold", [record("t", "q", True, video="v", gold="B")])
    folder(tmp_path / "broken", [{"x": 1}])
    (tmp_path / "none").mkdir()
    assert command.main(["compare", *(str(tmp_path / name) for name in argv)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith("error: ") and words in line


# -- logs of lmms-eval

NAMES = ["short", "short", "long", "long"]


def lmms_log(path, replies, golds):
    """A samples file of Video-MME as lmms-eval writes one, ranks mixed up."""
    path.mkdir()
    lines = []
    for i, (reply, gold) in enumerate(zip(replies, golds, strict=True)):
        pred = next((x for x in "ABCD" if x in reply), "")
        payload = {
            "question_id": f"{i // 2:03d}-{i % 2 + 1}", "duration": NAMES[i], "category": "Knowledge", "sub_category": "Astronomy",
            "task_category": "OCR Problems", "pred_answer": pred, "answer": gold, "score": int(pred == gold), "videoID": f"v{i // 2}",
        }  # fmt: skip
        prompt = "Which?\nA. red\nB. green\nC. blue\nD. white\nThe best answer is:"
        lines.append({
            "doc_id": i, "target": gold, "filtered_resps": [reply], "doc_hash": "0", "input": prompt,
            "videomme_perception_score": payload,
        })  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in reversed(lines))
    (path / "20260101_000000_samples_videomme.jsonl").write_text(text)
    return path


def test_logs_of_lmms_eval_are_read(tmp_path, capsys):
    golds = ["A", "B", "C", "D"]
    a = lmms_log(tmp_path / "a", ["A", "B.", "A", "Based on it, none"], golds)
    b = lmms_log(tmp_path / "b", ["A", "D", "C", "D"], golds)
    answers = {x.key: x for x in read(a)}
    assert [answers[str(i)].correct for i in range(4)] == [True, True, False, False]
    assert (
        answers["2"].groups["duration"] == ("long",)
        and answers["2"].cluster == "v1"
        and answers["0"].task == "videomme"
    )
    assert answers["0"].options == ("red", "green", "blue", "white")
    found = compare.compare(read(a), read(b), paired=True)
    assert found.delta == 0.25 and (found.gained, found.lost) == (["2", "3"], ["1"])
    d = np.array([0, -1, 1, 1])
    sums = np.array([(d - 0.25)[:2].sum(), (d - 0.25)[2:].sum()])
    half = stats.t.ppf(0.975, 1) * math.sqrt(2 * (sums**2).sum()) / 4
    assert found.interval == pytest.approx([max(0.25 - half, -1), min(0.25 + half, 1)])
    assert command.main(["--rescore", str(a)]) == 0
    assert "videomme dense: 50.00 -> 50.00 over 4 questions, 0 changed" in capsys.readouterr().out


def test_parsing_alone_can_move_a_score(tmp_path):
    """Their first capital takes "Based" for B; ours takes it for nothing, and reads what theirs misses."""
    log = lmms_log(tmp_path / "a", ["Based on it, none", "b", "(C) blue", "green"], ["B", "B", "C", "B"])
    found = rescore.rescored(read(log))
    assert (found["recorded"], found["letter"]) == (0.5, 0.75)
    assert sorted(found["changed"]) == ["0", "1", "3"] and found["replies"]["unparsed"] == 0.25


def test_ours_written_as_theirs_and_read_again(tmp_path):
    """The same accuracy; their names and scales."""
    for name, metric, scale, replies in (
        ("videomme", "videomme_perception_score", 100, "A"),
        ("mlvu", "mlvu_percetion_score", 100, "A"),
        ("lvbench", "lvbench_score", 1, "A"),
        ("nextqa", "exact_match", 1, "A"),
        ("mvbench", "mvbench_accuracy", 100, "A"),
        ("longvideobench", "lvb_acc", 1, "A"),
    ):
        lmms_name = {"mlvu": "mlvu_dev", "longvideobench": "longvideobench_val_i"}.get(name, "")
        built = task(name)
        records = answered(built, replies)
        path, *_ = lmms_eval.write(tmp_path / name, "my/model", [built], lambda _, own=records: own, "command")
        assert path.parent.name == "my__model"
        results = json.loads(path.read_text())["results"]
        asked = [r for r in records.values() if r["correct"] is not None]
        if name == "mvbench":
            assert len(results) == 19 and all(f"{metric},none" in r for r in results.values())
            mean = np.mean([r[f"{metric},none"] for r in results.values()])
            assert mean == pytest.approx(scale * np.mean([r["correct"] for r in asked]))
        else:
            ((theirs, found),) = results.items()
            assert lmms_name in (theirs, "")
            pairs = [(s, records[s.id]) for s in built.samples if records[s.id]["correct"] is not None]
            value = built.summary(pairs)["scores"]["value"]
            assert found["hybridvlm"][metric] == pytest.approx(scale * value)
            if name != "nextqa":
                assert found[f"{metric},none"] == pytest.approx(scale * value)
        again = [x for x in read(path.parent) if x.correct is not None]
        assert {x.task for x in again} == {name} and len(again) == len(asked)
        assert np.mean([x.correct for x in again]) == pytest.approx(np.mean([r["parity"]["correct"] for r in asked]))


def test_a_log_of_theirs_beside_a_run_of_ours(tmp_path):
    built = task("videomme")
    rows = []
    for sample in built.samples:
        row = {
            "key": sample.id,
            "task": "videomme",
            "method": "none",
            "budget": 1.0,
            "id": sample.id,
            "video": sample.video,
        }
        row |= {"type": sample.type, "answer": sample.answer, "groups": dict(sample.groups), "cluster": sample.cluster}
        rows.append(row | answered(built, "A")[sample.id])
    ours = folder(tmp_path / "ours", rows)
    path, *_ = lmms_eval.write(tmp_path / "theirs", "m", [built], lambda _: answered(built, "B"), "command")
    found = compare.compare(read(ours), read(path.parent), paired=True)
    assert found.n == (12, 12) and found.accuracy[0] == pytest.approx(0.25)
    assert found.delta == pytest.approx(sum(s.answer == "B" for s in built.samples) / 12 - 0.25)
    with pytest.raises(InputError, match="no scored question is common"):
        compare.compare(read(ours), [], paired=True)


# -- files as kills, editors and other tools leave them


def test_a_line_ends_at_a_line_feed_alone_and_a_cut_one_is_passed_over(tmp_path):
    """Replies hold other separators as they are; a kill leaves half a line."""
    log = lmms_log(tmp_path / "theirs", ["A\u2028B", "B\u0085", "C", "D"], ["A", "B", "C", "D"])
    (file,) = log.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text().split("\n")[3]), ensure_ascii=False) + "\n")
    (only,) = read(log)
    assert only.reply == "A\u2028B"
    ours = folder(tmp_path / "ours", [record("t", "q", True, video="v"), record("t", "r", True, video="w")])
    with open(ours / "samples.jsonl", "a") as file:
        file.write('{"key": "tcut", "task": "t", "me')
    assert [x.key for x in read(ours)] == ["q", "r"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "no answer in it yet"), (b"\x89PNG\xff\n\xfe", "line 1: not JSON"), (b"\n\n", "no answer in it yet")],
)
def test_a_file_without_answers_is_one_line(tmp_path, capsys, content, words):
    (tmp_path / "samples.jsonl").write_bytes(content)
    for argv in (["compare", str(tmp_path), str(tmp_path)], ["--rescore", str(tmp_path / "samples.jsonl")]):
        assert command.main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path}") and words in line


def test_a_run_in_a_store_and_methods_with_colons(tmp_path, capsys, monkeypatch):
    from helpers.object_store import OBJECTS

    rows = [record("t", f"q{i}", i > 0, video=f"v{i}") for i in range(3)]
    rows += [record("t", f"q{i}", True, video=f"v{i}", method="evs:0.5+str:0.5", budget=0.25) for i in range(3)]
    home = folder(tmp_path / "ours", rows)
    monkeypatch.setitem(OBJECTS, "fake://b/run/samples.jsonl", (home / "samples.jsonl").read_bytes())
    for place in (str(home), "fake://b/run"):
        assert command.main(["compare", str(home), f"{place}:evs:0.5+str:0.5@0.25"]) == 0
        assert "A 66.67   B 100.00" in capsys.readouterr().out
    assert command.main(["--rescore", "fake://b/run"]) == 0
    assert command.main(["compare", "fake://b/none", str(home)]) == 2
    assert "fake://b/none: there is no such file or folder" in capsys.readouterr().err


def test_keys_of_two_kinds_of_logs_are_not_joined(tmp_path):
    """LVBench's uids are numbers, and so are lmms-eval's rows; a question that was not asked is joined by its row too."""
    rows = [record("lvbench", str(i), True, video="v", gold="ABCD"[i - 1], row=i - 1) for i in range(1, 5)]
    ours = folder(tmp_path / "ours", rows)
    (tmp_path / "theirs").mkdir()
    lines = [{"doc_id": i, "target": "ABCD"[i], "filtered_resps": ["A"], "lvbench_score": i == 0} for i in range(4)]
    log = tmp_path / "theirs/20260101_000000_samples_lvbench.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare.compare(read(ours), read(log), paired=True)
    assert (found.n, found.lost) == ((4, 4), ["1", "2", "3"])


def test_what_rescoring_leaves_out_is_said(tmp_path):
    rows = [record("t", f"q{i}", True, video="v") for i in range(3)] + [record("t", "open", None, video="v", gold="")]
    assert "over 3 questions, 0 changed, " in (told := rescore.report(folder(tmp_path / "ours", rows)))
    assert "1 more left out" in told
