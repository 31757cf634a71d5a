"""What a run leaves after: one line per answered question, and the rows of the table made from them.

samples.jsonl is only ever added to, a batch at a time, and is what a killed run resumes from. Everything else is made
from it anew and written whole or not at all.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hybridvlm.distributed import Process, gather
from hybridvlm.eval import statistics
from hybridvlm.eval.tasks import Sample, Task
from hybridvlm.files import parse_json
from hybridvlm.inference.generation import Generation
from hybridvlm.inference.placement import to_host
from hybridvlm.reduction import ReductionPlan, parse_method
from hybridvlm.reduction.cost import Cost
from hybridvlm.storage import GrowingFile, is_url
from hybridvlm.storage import write_atomic as write_atomic
from hybridvlm.video import VideoError, VideoTimeout

# the keys of a row of results.json, in this order; scripts may rely on them
ROW_KEYS = (
    "task",
    "method",
    "budget",
    "accuracy",
    "n",
    "ci95",
    "delta",
    "delta_ci95",
    "mcnemar_p",
    "by_type",
    "accuracy_two_hop",
    "retention_mean",
    "retention_final",
    "retention_achieved",
    "prefill_ms",
    "speedup",
    "flop_speedup",
    "decode_ms",
    "peak_bytes",
    "compiles",
    "parse_failures",
    "unanswered",
    # shares and operations from pixels to the first token, and whether the method took part at all
    "retention_input",
    "decoder_flops",
    "scoring_flops",
    "vision_flops",
    "total_flop_speedup",
    "ttft_ms",
    "changed",
    "evs",
)
Record = dict[str, Any]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import hybridvlm

    found = {"hybridvlm": hybridvlm.__version__, "python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "numpy", "scipy", "av", "tokenizers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def digest(value: Any) -> str:
    """A short text that differs where plain values do."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


class SampleStore:
    """samples.jsonl: what has been answered, by key. A last line that a kill cut off is dropped; it is asked again.

    process: of several that share a run, each adds to a file of its own (samples-1.jsonl, …) next to it, and reads all there are.
    In a store (gs://…) every process adds to objects of its own (samples-1-0.jsonl, …), until all is written as one.
    writes: False where another process writes what this one finds too.
    """

    def __init__(self, path: Any, process: Process = Process(0, 1), *, writes: bool = True):  # noqa: B008, frozen
        self.path, self.process, self.writes = path, process, writes
        self.own = (
            path if process.first and not is_url(path) else path.parent / f"{path.stem}-{process.index}{path.suffix}"
        )
        self._file = GrowingFile(self.own)
        self.records: list[Record] = []
        self._by_key: dict[str, Record] = {}
        self._seen: set[str] = set()
        for part in [path, *self._parts()]:
            if part.is_file():
                self._read(part)

    def _parts(self) -> list[Any]:
        folder = self.path.parent
        found = folder.glob(f"{self.path.stem}-*{self.path.suffix}") if folder.exists() else ()
        return sorted(found, key=lambda part: part.name)

    def _read(self, path: Any) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        self.merge(data[:whole], str(path))
        if whole < len(data) and path == self.own and not is_url(path):
            with open(path, "r+b") as file:
                file.truncate(whole)

    def merge(self, lines: bytes, source: str) -> None:
        """Take up records that another file or process holds; ValueError for lines that are none, with their `source`."""
        for number, line in enumerate(lines.splitlines(), 1):
            try:
                record = parse_json(line)
                key = record["key"]
                if not isinstance(key, str):
                    raise TypeError(key)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(
                    f"{source}, line {number} is no sample of this library; move the file or choose another --output"
                ) from None
            self._add(record, key)

    def _add(self, record: Record, key: str) -> None:
        line = json.dumps(record)
        if line not in self._seen:  # the same record may lie in the parts of several processes
            self._seen.add(line)
            self.records.append(record)
            self._by_key[key] = record

    def lines(self) -> bytes:
        """All records, a line each."""
        return "".join(json.dumps(record) + "\n" for record in self.records).encode()

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def get(self, key: str) -> Record:
        """The latest record of a key."""
        return self._by_key[key]

    def append(self, records: Iterable[Record]) -> None:
        """Add records and hand them to the operating system before returning."""
        records = list(records)
        if self.writes:
            self._file.add("".join(json.dumps(record) + "\n" for record in records).encode())
        for record in records:
            self._add(record, record["key"])

    def forget_timeouts(self, seconds: float | None) -> None:
        """Leave out records of videos that ran out of a time limit below `seconds` (None: below any), to be asked again."""
        for record in list(self.records):
            limit = record.get("time_limit")
            if limit is not None and (seconds is None or limit < seconds):
                self.records.remove(record)
                if self._by_key.get(record["key"]) == record:
                    del self._by_key[record["key"]]

    def join(self) -> None:
        """Bring together what all processes hold; every one of them has to call it."""
        if self.process.count > 1:
            for index, part in enumerate(gather(self.lines())):
                self.merge(part, f"the samples of process {index}")

    def finish(self) -> None:
        """With everything joined, one file for all: process 0 writes it whole, the others' parts go."""
        if self.process.first and (self.process.count > 1 or self._parts() or is_url(self.path)):
            write_atomic(self.path, self.lines())
            for part in self._parts():
                part.unlink(missing_ok=True)
        elif not self.process.first:
            self._file.remove()


def failure_of(error: VideoError) -> Record:
    """What a record holds of a video that cannot be read; with the time limit, for `forget_timeouts`, where it took too long."""
    late = {"time_limit": error.seconds} if isinstance(error, VideoTimeout) else {}
    return {"failure": str(error)} | late


def achieved(generation: Generation, own: Sequence[int]) -> list[float]:
    """Per example, the share of its video's `own` tokens [B] that really entered each layer, averaged over layers."""
    plan = generation.plan
    if plan is None:
        return [1.0] * len(own)
    kept = np.asarray(to_host(generation.prefilled.decoder.kept), np.float64)[:, : len(own), 0]  # [1 + drops, B]
    edges = [0, *(site + 1 for site in plan.drops), plan.layers]
    return (np.repeat(kept, np.diff(edges), axis=0).mean(axis=0) / np.asarray(own)).tolist()


def timing_run(records: Sequence[Record], dense: Sequence[Record]) -> str | None:
    """The one run whose clock counts for a row: it timed most of its questions together with dense; the latest of equals."""
    with_dense = {record["run"] for record in dense}
    counts: dict[str, int] = {}
    for record in records:
        if record["run"] in with_dense:
            counts[record["run"]] = counts.get(record["run"], 0) + 1
    return max(counts, key=lambda run: (counts[run], run)) if counts else None


def _batches(records: Sequence[Record], run: str | None) -> dict[int, Record]:
    """One record for every batch of a run: the clock's readings belong to the batch."""
    return {record["batch"]: record for record in records if record["run"] == run and "batch" in record}


def build_row(
    task: Task,
    method: str,
    budget: float,
    plans: Mapping[str, ReductionPlan | None],
    key: Callable[[str, Any], str],
    store: SampleStore,
    dense: Mapping[str, Cost] = {},
) -> tuple[Record, Record]:
    """The row of one method and budget, and what else is known of it.

    Args:
        task: whose samples were asked.
        method: as written.
        budget: that all its parts share.
        plans: of every sample, by its id; None where nothing is reduced.
        key: (variant, sample) -> the key of a sample's answer, the variant being "row" or "dense".
        store: of the answers.
        dense: what a dense pass costs, of every sample by its id.

    Returns:
        (row, extra): values by `ROW_KEYS`, and what reports and results.json say besides.
    """
    pairs = [
        (s, task.judged(store.get(key("row", s)), s), task.judged(store.get(key("dense", s)), s)) for s in task.samples
    ]
    # questions on videos that could not be read are neither right nor wrong: they are counted apart
    # (their `correct` is None, like that of questions whose answer is not published)
    asked = [pair for pair in pairs if not any(_left_out(record) for record in pair[1:])]
    scored = [pair for pair in asked if all(record["correct"] is not None for record in pair[1:])]
    unanswered = len(pairs) - len(asked)
    apart = {"unscored": len(asked) - len(scored)} | task.summary([(s, a) for s, a, _ in asked])
    if not scored:
        row, extra = _empty_row(task, method, budget, unanswered)
        return row, extra | apart
    samples, answers, references = (list(part) for part in zip(*scored, strict=True))
    clock = _clock(store, {r["key"] for r in answers}, {r["key"] for r in references})
    used = [plans[sample.id] for sample in samples if sample.id in plans] or [None]
    different = list(dict.fromkeys(plan for plan in used if plan is not None))
    changed = sum(a["prediction"] != d["prediction"] for a, d in zip(answers, references, strict=True))
    named = {"task": task.name, "method": method, "budget": budget}
    right, extra_right = _right(samples, answers, references)
    shares = [r["retention"] for r in answers if r["retention"] is not None] or [1.0]
    found = named | right | _planned(used) | clock.row
    found |= {
        "retention_achieved": sum(shares) / len(shares),
        "parse_failures": sum(r["parsed"] is None and r["prediction"] is not None for r in answers),
        "unanswered": unanswered,
        **_from_pixels(used, [dense[s.id] for s in samples if s.id in dense]),
        "changed": changed / len(answers),
        "evs": evs_rate(method, budget),
    }
    replies = collections.Counter(record["prediction"] for record in answers)
    extra = named | extra_right | clock.extra
    extra |= {
        "predictions_changed": changed,
        "thinking_unfinished": sum("no_answer" in r for r in answers),
        "most_common_reply": max(replies.values()) / len(answers),
        "plans": [plan.to_dict() for plan in different],
        "explained": [plan.explain() for plan in different],
    }
    return {name: found[name] for name in ROW_KEYS}, extra | apart


def _right(samples: Sequence[Sample], answers: Sequence[Record], references: Sequence[Record]) -> tuple[Record, Record]:
    """(what a row says of right answers, and of their difference to dense, what is said besides)."""
    clusters = [sample.whole for sample in samples]
    correct, reference = [r["correct"] for r in answers], [r["correct"] for r in references]
    total = statistics.accuracy(correct, clusters)
    delta = statistics.difference(correct, reference, clusters)
    itself = {r["key"] for r in answers} == {r["key"] for r in references}
    types: dict[str, list[bool]] = {}
    for sample, right in zip(samples, correct, strict=True):
        types.setdefault(sample.type or "all", []).append(right)
    two_hop = [right for sample, right in zip(samples, correct, strict=True) if sample.two_hop]
    row = {
        "accuracy": total.mean,
        "n": total.n,
        "ci95": total.interval,
        "delta": delta.mean,
        "delta_ci95": [0.0, 0.0] if itself else delta.interval,
        "mcnemar_p": statistics.mcnemar(correct, reference),
        "by_type": {kind: sum(rights) / len(rights) for kind, rights in types.items()},
        "accuracy_two_hop": sum(two_hop) / len(two_hop) if two_hop else None,
    }
    extra = {"videos": total.clusters, "n_by_type": {kind: len(rights) for kind, rights in types.items()}}
    return row, extra | {"n_two_hop": len(two_hop)}


def _planned(used: Sequence[ReductionPlan | None]) -> Record:
    """What the plans of a row's samples promise, the mean over them; None: a dense pass."""
    mean, final = (sum(1.0 if p is None else getattr(p, f"retention_{of}") for p in used) for of in ("mean", "final"))
    work = sum(1.0 if p is None else p.flop_ratio for p in used)
    return {
        "retention_mean": mean / len(used),
        "retention_final": final / len(used),
        "flop_speedup": len(used) / work,
    }


class _Clock(NamedTuple):
    """run: the one whose clock counts. row, extra: what a row says of times and memory, and what is said besides."""

    run: str | None
    row: Record
    extra: Record


def _clock(store: SampleStore, keys: set[str], dense_keys: set[str]) -> _Clock:
    """The readings of a row, by the batches that one run answered under it and under dense.

    The tower's time is that of all frames of a video by itself, as `encode` took it; prefill's is per question of a batch.
    """
    timed = [r for r in store.records if r["key"] in keys]
    timed_dense = [r for r in store.records if r["key"] in dense_keys]
    run = timing_run(timed, timed_dense)
    batches, dense_batches = _batches(timed, run), _batches(timed_dense, run)

    def first_token(records: Sequence[Record], prefill: float | None) -> float | None:
        encode = statistics.median([r["encode_ms"] for r in records if r["run"] == run and r.get("encode_ms")])
        return encode + prefill if encode and prefill else None

    both = sorted(set(batches) & set(dense_batches))
    prefill = statistics.median([batches[b]["prefill_ms"] for b in both])
    dense_prefill = statistics.median([dense_batches[b]["prefill_ms"] for b in both])
    row = {
        "prefill_ms": prefill,
        "speedup": dense_prefill / prefill if prefill and dense_prefill else None,
        "decode_ms": statistics.median([batches[b]["decode_ms"] for b in both]),
        "peak_bytes": max((r["peak_bytes"] for r in batches.values()), default=None),
        "compiles": sum(r["compiles"] for r in batches.values()) if batches else None,
        "ttft_ms": first_token(timed, prefill),
    }
    extra = {
        "timing_run": run,
        # of dense in the same run, which the row of dense may not be timed in
        "dense_ttft_ms": first_token(timed_dense, dense_prefill),
        "timed_batches": len(both),
        # of the prefill of a question whose video was there already; None where every prompt is run whole
        "further_ms": statistics.median([batches[b]["further_ms"] for b in both if "further_ms" in batches[b]]),
    }
    return _Clock(run, row, extra)


def _from_pixels(used: Sequence[ReductionPlan | None], dense: Sequence[Cost]) -> Record:
    """What a row costs from pixels to the first token, as predicted: by part, and against dense."""
    plans = [plan for plan in used if plan is not None]
    costs = [plan.cost for plan in plans] or list(dense)
    count = max(1, len(costs))
    total = sum(cost.total for cost in costs)
    whole = sum(plan.dense_cost.total for plan in plans) if plans else total
    return {
        "retention_input": sum(1.0 if plan is None else plan.retention_input for plan in used) / len(used),
        "decoder_flops": sum(cost.decoder for cost in costs) / count if costs else None,
        "scoring_flops": sum(cost.scoring for cost in costs) / count if costs else None,
        "vision_flops": sum(cost.vision for cost in costs) / count if costs else None,
        "total_flop_speedup": whole / total if total else None,
    }


def evs_rate(method: str, budget: float) -> float | None:
    """The share of tokens that EVS keeps in a row; None: it is off, as in every row that does not name it."""
    for name, rate in parse_method(method):
        if name == "evs":
            return budget if rate is None else rate
    return None


def _left_out(record: Record) -> bool:
    """Whether a question could not be asked, and does not count as wrong for that."""
    return "failure" in record and record["correct"] is None


def _empty_row(task: Task, method: str, budget: float, unanswered: int) -> tuple[Record, Record]:
    """The row of a task none of whose videos could be read."""
    row = dict.fromkeys(ROW_KEYS) | {"task": task.name, "method": method, "budget": budget, "n": 0, "by_type": {}}
    extra = {"task": task.name, "method": method, "budget": budget, "videos": 0, "n_by_type": {}, "n_two_hop": 0}
    extra |= {"predictions_changed": 0, "thinking_unfinished": 0, "most_common_reply": 0.0, "timing_run": None}
    extra |= {"dense_ttft_ms": None, "timed_batches": 0, "plans": [], "explained": []}
    return row | {"parse_failures": 0, "unanswered": unanswered}, extra


def compare(
    task: Task, name: dict[str, Any], other: dict[str, Any], records: Sequence[Record], others: Sequence[Record]
) -> list[Record]:
    """Paired differences name - other on the same questions: over all of them, and over the two-hop ones.

    records, others: in the order of the task's samples, as `Task.judged` gives them.
    """
    out = []
    for subset in ("all", "two_hop"):
        pairs = [
            (a["correct"], b["correct"], sample.whole)
            for sample, a, b in zip(task.samples, records, others, strict=True)
            if (subset == "all" or sample.two_hop) and a["correct"] is not None and b["correct"] is not None
        ]
        if not pairs:
            continue
        first, second, clusters = map(list, zip(*pairs, strict=True))
        delta = statistics.difference(first, second, clusters)
        out.append(
            {
                "task": task.name,
                "subset": subset,
                "method": name["method"],
                "budget": name["budget"],
                "against": other["method"],
                "against_budget": other["budget"],
                "n": delta.n,
                "accuracy": sum(first) / len(first),
                "against_accuracy": sum(second) / len(second),
                "delta": delta.mean,
                "delta_ci95": delta.interval,
                "mcnemar_p": statistics.mcnemar(first, second),
            }
        )
    return out
