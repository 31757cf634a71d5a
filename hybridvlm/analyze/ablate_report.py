"""Tables and pictures of an ablation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridvlm.analyze import over_seeds
from hybridvlm.analyze.ablate_checkpoints import Checkpoint
from hybridvlm.analyze.cells import CLAIMS, REFERENCE, SETS, Cell
from hybridvlm.analyze.common import (
    COLOURS,
    Row,
    figure,
    markdown,
)
from hybridvlm.eval.variants import DENSE
from hybridvlm.reduction import ReductionPlan


def summarise(
    checkpoints: Sequence[Checkpoint], cells: Sequence[Cell], possible: set[tuple[int, str]]
) -> dict[str, Any]:
    """rows (one per group and cell), claims (paired differences) and groups (differences between groups)."""
    task = checkpoints[0].runner.task
    videos = [s.video for s in task.samples]
    hops = np.array([s.two_hop for s in task.samples])
    kinds = np.array([s.type for s in task.samples])
    groups: dict[str, list[int]] = {}
    for i, checkpoint in enumerate(checkpoints):
        groups.setdefault(checkpoint.group, []).append(i)
    rows: list[Row] = []
    right: dict[tuple[str, str], np.ndarray] = {}
    for group, members in groups.items():
        dense = np.stack([checkpoints[i].correct(DENSE) for i in members])
        right[group, "dense"] = dense
        rows.append({"set": "", "cell": "dense", "group": group} | _row(dense, dense, dense, videos, hops, kinds, None))
        reference = None
        for cell in cells:
            if any((i, cell.name) not in possible for i in members):
                continue
            correct = np.stack([checkpoints[i].correct(cell) for i in members])
            right[group, cell.name] = correct
            reference = correct if cell.name == REFERENCE else reference
            plan = checkpoints[members[0]].plan(cell)
            row = {"set": cell.set, "cell": cell.name, "group": group}
            rows.append(row | _row(correct, dense, reference, videos, hops, kinds, plan))
    claims = [
        {"claim": claim, "group": group, "better": a, "than": b}
        | {
            f"{part} {k}": v
            for part, keep in (("all", None), ("two-hop", hops))
            for k, v in _gap(right[group, a], right[group, b], videos, keep).items()
        }
        for claim, (a, b) in CLAIMS.items()
        for group in groups
        if (group, a) in right and (group, b) in right
    ]
    apart = [
        {"cell": cell, "group": first, "against": second}
        | {
            f"accuracy {k}": v
            for k, v in over_seeds.between(right[first, cell], right[second, cell], videos).to_dict().items()
        }
        | (_losses(right, first, second, cell, videos) if cell != "dense" else {})
        for first in groups
        for second in list(groups)[list(groups).index(first) + 1 :]
        for cell in ["dense", *(c.name for c in cells)]
        if (first, cell) in right and (second, cell) in right
    ]
    return {"rows": rows, "claims": claims, "between_groups": apart}


def _row(correct, dense, reference, videos, hops, kinds, plan: ReductionPlan | None) -> Row:
    out: Row = {"accuracy": over_seeds.accuracy(correct, videos).to_dict()}
    out["to_dense"] = None if correct is dense else over_seeds.difference(correct, dense, videos).to_dict()
    itself = reference is None or correct is reference
    out["to_reference"] = None if itself else over_seeds.difference(correct, reference, videos).to_dict()
    if hops.any():
        out["two_hop"] = over_seeds.accuracy(
            correct[:, hops], [v for v, h in zip(videos, hops, strict=True) if h]
        ).to_dict()
    out["by_type"] = {kind: float(correct[:, kinds == kind].mean()) for kind in dict.fromkeys(kinds.tolist())}
    if plan is not None:
        out["plan"] = plan.to_dict()
        out |= {"method": plan.method, "budget": plan.budget, "kind": plan.kind, "flops": plan.flop_ratio}
        out |= {"kept_mean": plan.retention_mean, "kept_final": plan.retention_final, "start": plan.schedule.start}
    else:
        out |= {"method": "none", "budget": 1.0, "kind": "mean", "flops": 1.0, "kept_mean": 1.0, "kept_final": 1.0}
    return out


def _gap(a: np.ndarray, b: np.ndarray, videos: Sequence[str], keep: np.ndarray | None) -> Row:
    if keep is not None:
        videos = [v for v, k in zip(videos, keep, strict=True) if k]
        a, b = a[:, keep], b[:, keep]
    return over_seeds.difference(a, b, videos).to_dict() if len(videos) else {}


def _losses(right, first: str, second: str, cell: str, videos) -> Row:
    """Difference of two groups' changes from dense to a cell: negative where the first degrades more."""
    a, b = (right[g, cell].astype(float) - right[g, "dense"] for g in (first, second))
    return {f"loss to dense {k}": v for k, v in over_seeds.between(a, b, videos).to_dict().items()}


def shown(value: Row | None, sign: bool = False) -> str:
    """`97.1 [96.0, 98.2]` in percent; the interval is over seeds where there are several that differ, else over videos."""
    if not value:
        return ""
    form = "+.1f" if sign else ".1f"
    interval = value["ci95_seeds"] or value["ci95_videos"]
    ends = "" if interval is None else " [" + ", ".join(f"{100 * v:{form}}" for v in interval) + "]"
    return f"{100 * value['mean']:{form}}{ends}"


def verdict(value: Row) -> str:
    """What the intervals say of "the first is better": both of them, over seeds and over videos, have to leave out zero."""
    found = [interval for interval in (value["ci95_seeds"], value["ci95_videos"]) if interval is not None]
    if not found:
        return "one cluster, no interval"
    if all(low > 0 for low, _ in found):
        return "for"
    return "against" if all(high < 0 for _, high in found) else "undecided"


def report(results: Row) -> str:
    """ablation.md."""
    meta, rows = results["metadata"], results["rows"]
    groups = {
        g: [m for m in meta["models"] if m["group"] == g] for g in dict.fromkeys(m["group"] for m in meta["models"])
    }
    names = "; ".join(f"{g}: {', '.join(m['name'] for m in ms)}" for g, ms in groups.items())
    parts = [
        f"# Ablation on the embedded benchmark, {meta['questions']} questions on {meta['videos']} {meta['split']} videos",
        f"`{meta['command']}`\n\nCheckpoints: {names}. Accuracies and differences in points; 95% intervals in brackets, Student's "
        "over training seeds where a group has several that differ, else clustered by video. All cells answer the same questions.",
    ]
    for name in dict.fromkeys(r["set"] for r in rows if r["set"] != "reference"):
        chosen = [r for r in rows if r["set"] == name or (name and r["cell"] in ("dense", REFERENCE))]
        if not name:
            chosen = [r for r in rows if r["cell"] in ("dense", REFERENCE)]
        table = [
            {
                "cell": r["cell"],
                "group": r["group"],
                "accuracy %": shown(r["accuracy"]),
                "two-hop %": shown(r.get("two_hop")),
                "to dense": "" if r["cell"] == "dense" else shown(r["to_dense"], True),
                "to reference": "" if r["cell"] in ("dense", REFERENCE) else shown(r["to_reference"], True),
                "FLOPs / dense": r["flops"],
                "kept % mean / last": f"{100 * r['kept_mean']:.1f} / {100 * r['kept_final']:.1f}",
            }
            for r in chosen
        ]
        parts.append(
            f"## {name or 'reference'}\n\n{SETS[name][1] + chr(10) + chr(10) if name in SETS else ''}{markdown(table)}"
        )
    if results["claims"]:
        table = [
            {
                "claim": c["claim"],
                "group": c["group"],
                "all questions": shown(_part(c, "all"), True),
                "two-hop": shown(_part(c, "two-hop"), True),
                "says": verdict(_part(c, "all")),
            }
            for c in results["claims"]
        ]
        words = "`for` and `against` where the intervals over seeds and over videos (in the JSON) both leave out zero."
        parts.append(f"## Claims: differences on the same questions and seeds\n\n{words}\n\n{markdown(table)}")
    if results["between_groups"]:
        table = [
            {
                "cell": c["cell"],
                "group": f"{c['group']} - {c['against']}",
                "accuracy": shown(_part(c, "accuracy"), True),
                "change from dense": shown(_part(c, "loss to dense"), True),
            }
            for c in results["between_groups"]
        ]
        words = "Differences between groups (Welch over seeds). Change from dense: positive where the first group loses less."
        parts.append(f"## Between groups\n\n{words}\n\n{markdown(table)}")
    if results["notes"]:
        parts.append("## Notes\n\n" + "\n".join(f"- {line}" for line in results["notes"]))
    return "\n\n".join(parts) + "\n"


def _part(row: Row, name: str) -> Row:
    return {k.removeprefix(name + " "): v for k, v in row.items() if k.startswith(name + " ")}


def _bar(value: Row) -> tuple[float, float, float]:
    """(mean, below, above) in percent, for error bars."""
    interval = value["ci95_seeds"] or value["ci95_videos"] or [value["mean"]] * 2
    mean = value["mean"]
    return 100 * mean, 100 * max(0.0, mean - interval[0]), 100 * max(0.0, interval[1] - mean)


def pictures(results: Row) -> dict[str, Any]:
    """Bars of every set but the budgets, and the curves of those."""
    rows, out = results["rows"], {}
    groups = list(dict.fromkeys(r["group"] for r in rows))
    sets = [s for s in dict.fromkeys(r["set"] for r in rows) if s not in ("", "reference", "budgets")]
    if sets:
        most = max(len({r["cell"] for r in rows if r["set"] == s}) for s in sets) + 2
        fig, panels = figure(1, len(sets), width=9, height=0.9 + 0.16 * most * (1 + len(groups)))
        for panel, name in zip(panels[:, 0], sets, strict=True):
            chosen = [r for r in rows if r["set"] == name or r["cell"] in ("dense", REFERENCE)]
            labels = list(dict.fromkeys(r["cell"] for r in chosen))
            for g, group in enumerate(groups):
                own = [r for r in chosen if r["group"] == group]
                means, below, above = zip(*(_bar(r["accuracy"]) for r in own), strict=True)
                heights = [labels.index(r["cell"]) + 0.8 * (g + 0.5) / len(groups) - 0.4 for r in own]
                panel.barh(
                    heights,
                    means,
                    0.8 / len(groups),
                    xerr=[below, above],
                    color=COLOURS[g % 10],
                    label=group,
                    capsize=2,
                )
            panel.set_yticks(range(len(labels)), labels, fontsize=8)
            panel.invert_yaxis()
            panel.set(title=name, xlabel="accuracy, % (95% interval)")
            panel.legend(fontsize=7, frameon=False)
        out["ablation.png"] = fig
    curves = [r for r in rows if r["set"] in ("budgets", "reference") or r["cell"] == "dense"]
    if any(r["set"] == "budgets" for r in curves):
        fig, panels = figure(len(groups), 1, width=5.6, height=4.2)
        for panel, group in zip(panels[0], groups, strict=True):
            own = [r for r in curves if r["group"] == group and r["cell"] != "dense"]
            for m, method in enumerate(dict.fromkeys(r["method"] for r in own)):
                points = sorted((r for r in own if r["method"] == method), key=lambda r: r["flops"])
                means, below, above = zip(*(_bar(r["accuracy"]) for r in points), strict=True)
                x = [100 * r["flops"] for r in points]
                panel.errorbar(
                    x, means, [below, above], label=method, color=COLOURS[m], marker="o", capsize=2, linewidth=1
                )
            dense = next(r for r in curves if r["group"] == group and r["cell"] == "dense")
            panel.axhline(100 * dense["accuracy"]["mean"], color="#999999", linewidth=0.8, label="dense")
            panel.set(title=group, xlabel="predicted FLOPs, % of dense", ylabel="accuracy, % (95% interval)")
            panel.legend(fontsize=8, frameon=False)
        out["budgets.png"] = fig
    return out
