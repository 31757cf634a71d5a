"""Up to which depth are visual tokens needed?

    python -m hybridvlm.analyze deletion --model tiny-reduced --videos 12

Exactly the tokens that the questions need are deleted after each layer, on validation videos of the embedded benchmark, and the
accuracy per question type is read again; a drop says that this layer's successors still needed them. `unrelated` deletes as many
tokens that no question needs. Written: deletion.json, deletion.md, deletion.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.analyze.common import (
    COLOURS,
    Row,
    figure,
    layers_of,
    load_embedded,
    markdown,
    mixers,
    output_folder,
    short,
    write_figure,
    write_json,
)
from hybridvlm.config import ATTENTION, ModelConfig
from hybridvlm.console import print_markdown, track
from hybridvlm.eval.results import write_atomic
from hybridvlm.tiny import codes, needle
from hybridvlm.tiny.bank import Bank, draw_videos, make_bank
from hybridvlm.tiny.shared import arrays, forward

FRAMES, QUESTIONS = 64, 16


@dataclasses.dataclass(frozen=True)
class Deletion:
    """A plan that drops `count` tokens of every video after one layer."""

    layer: int
    count: int
    length: int
    frames: int = FRAMES

    @property
    def drops(self) -> tuple[int, ...]:
        return (self.layer,)

    def keep(self, layer: int, count: jax.Array) -> jax.Array:
        return count - self.count

    def row_length(self, layer: int) -> int:
        return self.length - self.count

    def most_frames(self, kept: jax.Array) -> None:
        return None


def separate(hop1: np.ndarray, hop2: np.ndarray) -> np.ndarray:
    """Greedy choice of questions none of whose needed tokens another chosen one needs: bool [n]."""
    taken: set[int] = set()
    chosen = np.zeros(len(hop1), bool)
    for i, tokens in enumerate(zip(hop1.tolist(), hop2.tolist(), strict=True)):
        mine = {t for t in tokens if t >= 0}
        if not mine & taken and len(mine) == sum(t >= 0 for t in tokens):
            taken |= mine
            chosen[i] = True
    return chosen


def deletion_table(
    params: dict, config: ModelConfig, bank: Bank, layers: tuple[int, ...], videos: int, seed: int, part: int = 4
) -> list[dict]:
    """Accuracy per type with nothing deleted and with hop-1, hop-2 or unrelated tokens deleted after each of `layers`."""
    tokens = FRAMES * 16

    @functools.partial(jax.jit, static_argnames="layer")
    def answers(sample, doomed, layer: int | None):
        plan = None if layer is None else Deletion(layer, QUESTIONS, tokens)
        score = functools.partial(lambda doomed, _layer, _aux, t: jnp.where(doomed, -1.0, 1.0), doomed)
        logits, _, _ = forward(params, config, bank.tokens, sample, plan=plan, score_fn=score)
        return jnp.argmax(logits[:, 0], -1) == sample["targets"][:, 0]

    rng = np.random.default_rng([seed, 31])
    batches = []
    for _ in range(-(-videos // part)):
        sample, asked = draw_videos(bank, FRAMES, part, 3 * QUESTIONS, needle.TYPES + needle.TWO_HOP, rng)
        doomed = {name: np.zeros((part, tokens), bool) for name in ("hop 1", "hop 2", "unrelated")}
        needs: dict[str, list[np.ndarray]] = {name: [] for name in doomed}
        rows = []
        for b, q in enumerate(asked):
            chosen = np.flatnonzero(separate(q.hop1, q.hop2))[:QUESTIONS]
            needed = set(q.hop1[chosen].tolist()) | set(q.hop2[chosen].tolist())
            spare = rng.permutation([t for t in range(tokens) if t not in needed])
            for name, picked in (
                ("hop 1", q.hop1[chosen]),
                ("hop 2", q.hop2[chosen]),
                ("unrelated", spare[: len(chosen)]),
            ):
                doomed[name][b, picked[picked >= 0]] = True
                short = QUESTIONS - int(doomed[name][b].sum())
                doomed[name][b, spare[-short:] if short else []] = (
                    True  # the same number everywhere: filled up with spare tokens
                )
                needs[name].append(picked >= 0)
            rows += (b * len(q) + chosen).tolist()
        batches.append(
            (arrays(sample), doomed, np.asarray(rows), {k: np.concatenate(v) for k, v in needs.items()}, sample.type)
        )

    table = []
    for layer in track((None, *layers), "layer"):
        for name in ("nothing",) if layer is None else ("hop 1", "hop 2", "unrelated"):
            hits, kinds = [], []
            for inputs, masks, places, counted, types in batches:
                mask = masks["unrelated"] if layer is None else masks[name]
                got = np.asarray(answers(inputs, mask, layer))[places]
                valid = np.ones(len(places), bool) if layer is None else counted[name]
                hits.append(got[valid])
                kinds.append(types[places][valid])
            right, kind = np.concatenate(hits), np.concatenate(kinds)
            by_type = {t: float(right[kind == i].mean()) for i, t in enumerate(needle.TYPES) if (kind == i).any()}
            table.append(
                {
                    "after": layer,
                    "kind": "" if layer is None else config.pattern[layer],
                    "deleted": name,
                    "n": len(right),
                }
                | by_type
            )
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add = parser.add_argument
    add("--model", default="tiny-reduced", help="packaged name or checkpoint folder (default: %(default)s)")
    add("--videos", type=int, default=24, help="validation videos (default: %(default)s)")
    layers = "layers to delete after, such as 0,2,4 (default: every M and * up to the second look-up, and two more)"
    add("--layers", help=layers)
    add("--seed", type=int, default=0)
    add("--output", type=pathlib.Path, help="folder for tables, JSON and pictures (default: results/...)")


def run(options: argparse.Namespace) -> int:
    """Delete, ask, write."""
    if options.videos < 1:
        raise ValueError(f"--videos must be at least 1, got {options.videos}")
    model = load_embedded(options.model)
    able = mixers(model)
    if options.layers is not None:
        layers = layers_of(options.layers, able, model.config.pattern)
    elif model.config.pattern.count(ATTENTION) < 2:
        layers = list(able)  # no second look-up
    else:
        second = codes.look_ups(model.config)[1]
        layers = [layer for layer in able if layer <= second] + [layer for layer in able if layer > second][:2]
    folder = output_folder(options, f"deletion-{short(options.model)}")
    bank = make_bank(model.params, model.config, FRAMES, 1000, options.seed, split="val")
    rows = deletion_table(model.params, model.config, bank, tuple(layers), options.videos, options.seed)
    title = f"# {options.model}: accuracy when exactly these tokens are deleted after a layer"
    write_json(folder / "deletion.json", {"command": options.command, "model": options.model, "rows": rows})
    write_atomic(folder / "deletion.md", f"{title}\n\n`{options.command}`\n\n{markdown(rows)}\n")
    write_figure(folder / "deletion.png", picture(rows))
    print_markdown(f"{title}\n\n{markdown(rows)}\n")
    print(folder / "deletion.md")
    return 0


def picture(rows: list[Row]) -> Any:
    """Mean accuracy over two-hop types by the layer of the deletion, one line per kind of token."""
    fig, panels = figure()
    panel = panels[0, 0]

    def two_hop(row: Row) -> float:
        return 100 * float(np.mean([row[t] for t in needle.TWO_HOP if t in row]))

    for i, name in enumerate(("hop 1", "hop 2", "unrelated")):
        own = [row for row in rows if row["deleted"] == name]
        panel.plot([r["after"] for r in own], [two_hop(r) for r in own], ".-", color=COLOURS[i], label=name)
    panel.axhline(two_hop(rows[0]), color="#999999", linewidth=0.8, label="nothing deleted")
    panel.set(xlabel="deleted after layer", ylabel="accuracy on two-hop questions, %")
    panel.legend(fontsize=8, frameon=False)
    return fig
