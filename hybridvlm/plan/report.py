"""Estimates as tables for people and as rows for JSON."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from hybridvlm.config import VambaConfig
from hybridvlm.console import plain_table
from hybridvlm.estimates import DoesNotFit, Estimate, MeshSizes, Workload, choose_mesh
from hybridvlm.estimates.memory import PROGRAMS
from hybridvlm.estimates.result import estimate_on
from hybridvlm.hardware import SLICES, Slice, of_chip, parse_slice, usual_slices
from hybridvlm.options import InputError
from hybridvlm.parallel.mesh import mesh_sizes, with_rest

PARTS = {
    "weights": "weights",
    "keys and values": "caches",
    "states": "states",
    "visual tokens": "visual",
    "tower: pixels, activations": "tower",
    "prefill: activations": "activations",
    "decoding: weights by layer": "decode",
}


def on_slice(works: Mapping[str, Workload], topology: str, mesh: str | None) -> dict[str, Estimate]:
    """The workloads on one slice: on the mesh that is asked for, else each on the smallest that fits (or nearly does)."""
    where = parse_slice(topology)
    return {name: estimate_on(work, where, _mesh(work, where, mesh)) for name, work in works.items()}


def _mesh(work: Workload, where: Slice, asked: str | None) -> MeshSizes:
    if asked not in (None, "auto"):
        mesh = MeshSizes(**with_rest(mesh_sizes(asked), where.chips))
        if mesh.devices > where.chips:
            raise InputError(f"--mesh {asked} takes {mesh.devices} devices, {where.name} has {where.chips}")
        return mesh
    try:
        return choose_mesh(work, where.chips, where.chip.hbm_bytes).mesh
    except DoesNotFit as error:
        return error.nearest


def survey(works: Mapping[str, Workload]) -> dict[str, list[dict[str, Any]]]:
    """Rows for the usual slices of every generation, up to the first on which all workloads fit."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for generation in SLICES:
        rows = tables[generation] = []
        for where in usual_slices(generation):
            found = {name: estimate_on(work, where, _mesh(work, where, None)) for name, work in works.items()}
            rows += [as_row(name, made) for name, made in found.items()]
            if all(row["fits"] for row in rows[-len(works) :]):
                break
    return tables


def as_row(name: str, made: Estimate) -> dict[str, Any]:
    """An estimate as plain values; bytes and seconds of one device."""
    row: dict[str, Any] = {
        "model": made.work.config.name,
        "method": name,
        "topology": made.slice.name,
        "chips": made.slice.chips,
        "hosts": made.slice.hosts,
        "mesh": str(made.mesh),
        "fits": made.fits,
        "tight": made.tight,
        "needed_bytes": made.needed,
        "limit_bytes": made.limit,
        "largest_program": made.memory.largest,
    }
    row |= {f"{part}_bytes": getattr(made.memory, part) for part in PARTS.values()}
    row |= {f"{program}_bytes": made.memory.program(program) for program in PROGRAMS}
    for phase, found in made.phases.items():
        row |= {f"{phase}_seconds": found.seconds, f"{phase}_bound": found.bound, f"{phase}_sent_bytes": found.sent}
    return row


def _asked(works: Mapping[str, Workload]) -> str:
    work = next(iter(works.values()))
    c, count = work.config, f"{work.frames:,} frames ({work.visual_tokens:,} visual tokens)"
    batch = f"{work.batch} prompt{'s' * (work.batch > 1)} at once"
    lines = [
        f"{c.name or 'model'}: {count}, {work.text:,} text tokens, {batch}, {work.max_new} new tokens, {work.dtype}"
    ]
    for name, other in works.items():
        if other.reduction is not None:
            plan = other.plan
            said = (
                f"{plan.flop_speedup:.2f}x fewer decoder FLOPs than dense, {1 / plan.total_flop_ratio:.2f}x from pixels"
            )
            lines.append(f"{name}: {said}")
    return "\n".join(lines)


def survey_text(works: Mapping[str, Workload], tables: Mapping[str, list[dict[str, Any]]]) -> str:
    """The usual slices as one table, and the first of each generation that fits."""
    lines, first = [], []
    for generation, rows in tables.items():
        for row in rows:
            lines.append(
                {
                    "slice": row["topology"],
                    "chips": str(row["chips"]),
                    "": row["method"],
                    "mesh": row["mesh"],
                    "GB a chip": f"{row['needed_bytes'] / 1e9:.1f} of {row['limit_bytes'] / 1e9:.0f}",
                    "fits": _verdict(row),
                    "prefill": _seconds(row["prefill_seconds"]),
                    "further": _seconds(row["further_seconds"]) if "further_seconds" in row else "-",
                    "a token": _seconds(row["decode_seconds"]),
                }
            )
        for name in works:
            fitting = [row["topology"] for row in rows if row["method"] == name and row["fits"]]
            first.append({"first that fits": generation, "": name, "slice": fitting[0] if fitting else "none of these"})
    return "\n\n".join([_asked(works), plain_table(lines), plain_table(first), _READING])


def _verdict(row: Mapping[str, Any]) -> str:
    return "tight" if row["tight"] else "yes" if row["fits"] else "no"


_READING = (
    "GB: of the largest program on each chip; tight: only with half of the activations, which compilers then manage.\n"
    "further: the prefill of one more question on the same video. Seconds are the least by a roofline;\n"
    "python -m hybridvlm.plan --topology SLICE shows one slice in full."
)


def slice_text(works: Mapping[str, Workload], estimates: Mapping[str, Estimate]) -> str:
    """One slice in full."""
    made = next(iter(estimates.values()))
    where, chip, dtype = made.slice, made.slice.chip, made.work.dtype
    peak = of_chip(where.generation).flops[dtype]
    head = (
        f"{where.name}: {where.chips} x {chip.kind} on {where.hosts} host{'s' * (where.hosts > 1)}; each {made.limit / 1e9:.1f} GB, "
        f"{chip.bandwidth / 1e9:,.0f} GB/s, {peak / 1e12:,.0f} TFLOP/s {dtype}, links {chip.link / 1e9:,.0f} GB/s"
    )
    rows = [{"on each chip": "mesh", **{name: str(one.mesh) for name, one in estimates.items()}}]
    for label, part in PARTS.items():
        rows.append({"on each chip": f"{label}, GB", **{n: _gb(getattr(e.memory, part)) for n, e in estimates.items()}})
    for program in PROGRAMS:
        cells = {name: _gb(one.memory.program(program)) for name, one in estimates.items()}
        rows.append({"on each chip": f"{program} in all, GB", **cells})
    rows.append({"on each chip": f"needed of {_gb(made.limit)} GB", **{n: _needed(e) for n, e in estimates.items()}})
    phases = {"tower": "tower", "prefill": "prefill", "further": "further question", "decode": "a decoded token"}
    for phase, label in phases.items():
        cells = {name: _phase(one, phase) for name, one in estimates.items()}
        rows.append({"on each chip": f"{label}, least time", **cells})
    if made.work.frames:
        cells = {name: _seconds(one.seconds()) for name, one in estimates.items()}
        rows.append({"on each chip": "pixels to the first token, least time", **cells})
        work = {name: sum(one.phases[phase].flops for phase in ("tower", "prefill")) for name, one in estimates.items()}
        first = next(iter(work.values()))
        cells = {
            name: f"{flops * 1e-12:.4g}" + (f" ({first / flops:.2f}x less)") * (flops < first)
            for name, flops in work.items()
        }
        rows.append({"on each chip": "pixels to the first token, TFLOPs", **cells})
    for phase, label in (("prefill", "prefill"), ("decode", "a decoded token")):
        cells = {name: _sent(one.phases[phase].sent) for name, one in estimates.items()}
        rows.append({"on each chip": f"{label}, sent", **cells})
    return "\n\n".join([_asked(works), head, plain_table(rows)])


def _phase(made: Estimate, name: str) -> str:
    found = made.phases.get(name)
    return "-" if found is None else f"{_seconds(found.seconds)} ({found.bound})"


def _needed(made: Estimate) -> str:
    if made.tight:
        return f"{_gb(made.needed)}: tight"
    return f"{_gb(made.needed)}: {'fits' if made.fits else 'too much'}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _sent(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def compile_rows(options: argparse.Namespace, works: Mapping[str, Workload], made: Estimate) -> list[dict[str, Any]]:
    """The compiler's own figures of the programs on the slice and mesh of an estimate, printed and returned.

    Raises:
        ImportError: the compiler is not installed.
        ValueError: for a GPU, or a model, that the bench cannot compile ahead of time.
    """
    from hybridvlm import aot
    from hybridvlm.bench import aot as bench
    from hybridvlm.sharding import make_mesh

    if isinstance(made.work.config, VambaConfig):
        raise ValueError("--compile takes models of the families nemotron_vl and qwen_vl; bench vamba compiles VAMBA")
    if made.slice.platform != "tpu":
        raise ValueError(
            f"--compile takes a TPU slice, since XLA's GPU compiler estimates no cost, got {made.slice.name}"
        )
    reason = aot.missing("tpu")
    if reason is not None:
        raise ImportError(reason)
    where = aot.target(made.slice.name)
    mesh = make_mesh(**vars(made.mesh), devices=where.devices[: made.mesh.devices])
    rows = []
    for name, work in works.items():
        # the tower does not know what is dropped later, unless tokens are chosen before it
        own_tower = work.reduction is None or work.plan.pixel_selection is not None
        for program in (p for p in PROGRAMS if work.frames and (p != "tower" or own_tower)):
            found = bench.compiled_row(program, where, mesh, work)
            rows.append({"compiler": True, **found, "method": name})
            print(f"compiled, {name} on mesh {made.mesh}: {_compiled(found)}")
    return rows


def _compiled(row: Mapping[str, Any]) -> str:
    needed = f"{row['program']} {row['needed_gb']:.2f} GB a chip (counted {row['counted_gb']:.2f})"
    if "cost_s" not in row:
        return f"{needed}: refused by the compiler, {row['compile_s']:.0f} s to compile"
    return (
        f"{needed}, {row['cost_s']:.3g} s by its cost model, {row['exchanged_gb']:.3g} GB handed to collectives, "
        f"{row['compile_s']:.0f} s to compile"
    )
