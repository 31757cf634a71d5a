"""How much of a dropped token does the model still hold: compression, or dropping?

    python -m hybridvlm.analyze probe --model tiny --baseline runs/transformer

On validation videos of the embedded benchmark, exactly the tokens that 16 one-hop questions ask about are dropped after a layer;
ridge probes then try to read each one's content back: its features (what the tower said, position and time left out: R2), its class
and its border colour (accuracy). Folds are split by video, the strength is chosen inside the training folds, intervals are over
videos. `shuffled` pairs each reading with another token's content: chance. What is read:

  text rows          the question's rows after the last layer (its last row, and the mean of its rows)
  states             the final SSM states of all Mamba layers, each asked with the token's own key there: b^T H per head, which is
                     what a query that equals the key would be given (retrieval); heads are scaled to unit length.
                     The key is made of the token's content, so `never shown` may lie above `shuffled`: compare with `never shown`
  states after      the same, of the layers after the drop alone: they never saw the token
  states, last frame as `states`, where the 16 tokens of the last frame are dropped: tells a state that forgets with age from one
                     that never held what is asked for
  states, no key     --width random directions of the flattened states (more numbers than a probe can weigh), without knowing which
                     token is meant: the same for all tokens of a video, so that a linear probe cannot tell them apart by it

and by the layer after which the token was dropped: `never shown` (gone before layer 0) and `never dropped` are the ends of the
scale. `retained` is (value - never shown) / (never dropped - never shown), and empty where these ends are less than .05 apart: then
nothing is there to be retained. The colour stands in the question, so that text rows give it away in every case: compare with
`never shown`. A Transformer has no states, only text rows. Written: probe.json, probe.md, probe.png. 1 to 5 minutes a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Sequence
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
from hybridvlm.analyze.deletion import separate
from hybridvlm.analyze.ridge import probe
from hybridvlm.config import ATTENTION, MAMBA, ModelConfig
from hybridvlm.console import print_markdown, track
from hybridvlm.eval.results import write_atomic
from hybridvlm.inference.model import Model
from hybridvlm.nn.attention import attention_layer, attention_shared
from hybridvlm.nn.mamba2 import mamba_layer
from hybridvlm.nn.mlp import mlp_layer
from hybridvlm.nn.scan import layer_params
from hybridvlm.ops.compact import compact
from hybridvlm.ops.tokens import Tokens
from hybridvlm.tiny.bank import Bank, draw_videos, make_bank
from hybridvlm.tiny.shared import QUESTION, arrays, video_tokens

FRAMES, TARGETS, PART = 64, 16, 4
NEVER_SHOWN, NEVER_DROPPED = -1, None
READERS = ("text rows", "states", "states after", "states, last frame", "states, no key")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add = parser.add_argument
    add("--model", default="tiny", help="packaged name or checkpoint folder (default: %(default)s)")
    add("--baseline", help="a Transformer of the same size trained on the same data, probed in the same way")
    add("--videos", type=int, default=64, help="validation videos, 16 tokens each (default: %(default)s)")
    add("--layers", help="layers to drop after, such as 0,2,8 (default: every M and * but the last)")
    add(
        "--width",
        type=int,
        default=256,
        help="random directions of the flattened states that a probe reads (default: %(default)s)",
    )
    add("--seed", type=int, default=0)
    add("--output", type=pathlib.Path, help="folder for tables, JSON and pictures (default: results/...)")


def run(options: argparse.Namespace) -> int:
    """Probe the model, and the Transformer baseline if there is one."""
    if options.videos < 10:
        raise ValueError(f"--videos must be at least 10, for folds over videos, got {options.videos}")
    models = [(name, load_embedded(name)) for name in (options.model, options.baseline) if name]
    for _, model in models:
        _layers(options.layers, model)  # refused before anything is computed
    folder = output_folder(options, f"probe-{short(options.model)}")
    results = []
    for name, model in models:
        layers = _layers(options.layers, model)
        rows = probe_model(model, layers, options.videos, options.seed, options.width)
        results.append({"model": name, "pattern": model.config.pattern, "rows": rows})
    parts = [
        f"# What is left of a dropped token: {options.videos} videos, {options.videos * TARGETS} tokens\n\n`{options.command}`"
    ]
    for result in results:
        parts.append(f"## {result['model']}\n\n{markdown([_shown(row) for row in result['rows']])}")
    text = "\n\n".join(parts) + "\n"
    write_json(folder / "probe.json", {"command": options.command, "results": results})
    write_atomic(folder / "probe.md", text)
    write_figure(folder / "probe.png", picture(results))
    print_markdown(text)
    print(folder / "probe.md")
    return 0


def _layers(text: str | None, model: Model) -> list[int]:
    able = [layer for layer in mixers(model) if layer < len(model.config.pattern) - 1]
    return able if text is None else layers_of(text, able, model.config.pattern)


def probe_model(model: Model, layers: Sequence[int], videos: int, seed: int, width: int) -> list[Row]:
    """One row per reader and drop: never shown, after each of `layers`, never dropped; and the shuffled control."""
    bank = make_bank(model.params, model.config, FRAMES, 500, seed, split="val")
    batches, asked, last = _targets(bank, videos, seed)
    rows: list[Row] = []
    for content, column in ((asked, 1), (last, 2)):
        if column == 2 and MAMBA not in model.config.pattern:
            continue  # a Transformer keeps the last frame as it keeps any other
        found = [_read(model, bank, batch[0], batch[column], layers) for batch in track(batches, "part", "videos")]
        for layer in track([NEVER_SHOWN, *layers, NEVER_DROPPED], "drop", "probes"):
            inputs = _inputs([reading[layer] for reading in found], layer, width, seed, column == 2)
            for reader, x in inputs.items():
                rows.append(_drop(layer, model) | {"read from": reader} | content.probe(x))
                if layer is NEVER_DROPPED:
                    control = content.shuffled(seed).probe(x)
                    rows.append({"after": None, "kind": "shuffled", "read from": reader} | control)
    order = {reader: i for i, reader in enumerate(READERS)}
    return _with_retention(sorted(rows, key=lambda row: order[row["read from"]]))


@dataclasses.dataclass(frozen=True)
class Content:
    """What is to be read back: features [n,D] of the tokens, labels [n] by name, and the video of each."""

    features: np.ndarray
    labels: dict[str, np.ndarray]
    videos: list[str]

    @classmethod
    def of(cls, bank: Bank, tiles: np.ndarray) -> Content:
        """Of bank positions [V,Q]: class and border colour, and what the tower said of them without position and time."""
        flat, per = tiles.reshape(-1), bank.label.shape[1]
        labels = {"class": bank.label.reshape(-1)[flat], "colour": flat // per}
        features = np.asarray(bank.tokens).reshape(-1, bank.tokens.shape[-1])[flat]
        return cls(features, labels, [str(v) for v in range(len(tiles)) for _ in range(tiles.shape[1])])

    def shuffled(self, seed: int) -> Content:
        """Each reading with another token's content."""
        order = np.random.default_rng([seed, 41]).permutation(len(self.features))
        return Content(self.features[order], {k: v[order] for k, v in self.labels.items()}, self.videos)

    def probe(self, x: np.ndarray) -> Row:
        return probe(x, self.features, self.labels, self.videos).to_dict()


def _inputs(parts: Sequence[dict], layer: int | None, width: int, seed: int, last: bool) -> dict[str, np.ndarray]:
    """What each reader is given, [n,d], of one drop: of the asked tokens, or of those of the last frame."""
    mamba = list(parts[0]["states"])
    answers = {j: np.concatenate([part["answers"][j] for part in parts]) for j in mamba}
    if last:
        return {"states, last frame": np.concatenate(list(answers.values()), axis=1)}
    found = {"text rows": np.concatenate([part["text"] for part in parts])}
    if mamba:
        found["states"] = np.concatenate(list(answers.values()), axis=1)
        later = [answers[j] for j in mamba if layer is not None and j > layer >= 0]
        if later:
            found["states after"] = np.concatenate(later, axis=1)
        rows = [np.concatenate([part["states"][j].reshape(PART, -1) for j in mamba], axis=1) for part in parts]
        found["states, no key"] = np.repeat(_narrow(np.concatenate(rows), width, seed), TARGETS, axis=0)
    return found


def _drop(layer: int | None, model: Model) -> Row:
    if layer is NEVER_DROPPED:
        return {"after": None, "kind": "never dropped"}
    if layer == NEVER_SHOWN:
        return {"after": None, "kind": "never shown"}
    return {"after": layer, "kind": model.config.pattern[layer]}


def _with_retention(rows: list[Row]) -> list[Row]:
    ends = {(r["read from"], r["kind"]): r for r in rows if r["after"] is None}
    for row in rows:
        whole = "states" if row["read from"] == "states after" else row["read from"]
        low, high = (ends[whole, kind] for kind in ("never shown", "never dropped"))
        for name in ("features R2", "class"):
            gap = high[name] - low[name]
            row[f"retained {name}"] = (
                (row[name] - low[name]) / gap if gap > 0.05 and row["kind"] != "shuffled" else None
            )
    return rows


def _targets(bank: Bank, videos: int, seed: int) -> tuple[list, Content, Content]:
    """Batches (questions on their videos, the tokens [B,Q] that they ask about, the tokens [B,Q] of the last frame), and what those
    show."""
    rng = np.random.default_rng([seed, 43])
    batches, asked, last = list[Any](), [], []
    for _ in range(-(-videos // PART)):
        sample, questions = draw_videos(bank, FRAMES, PART, 3 * TARGETS, ("WHAT",), rng)
        chosen = np.stack([np.flatnonzero(separate(q.hop1, q.hop2))[:TARGETS] for q in questions])
        given = arrays(sample)
        rows = (np.arange(PART)[:, None] * 3 * TARGETS + chosen).reshape(-1)
        shown = {"cells": given["cells"], "rows": given["rows"][rows][:, :QUESTION]}
        tokens = np.stack([q.hop1[c] for q, c in zip(questions, chosen, strict=True)])
        ends = np.broadcast_to(np.arange((FRAMES - 1) * 16, FRAMES * 16), (PART, TARGETS))
        batches.append((shown, tokens, ends))
        cells = given["cells"].reshape(PART, -1)
        asked.append(np.take_along_axis(cells, tokens, 1))
        last.append(np.take_along_axis(cells, ends, 1))
    return batches, Content.of(bank, np.concatenate(asked)), Content.of(bank, np.concatenate(last))


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def _video_layer(p: dict, tokens: Tokens, *, config: ModelConfig, kind: str) -> tuple[Tokens, Any, Any]:
    """One layer over the video: tokens after it, its cache, and b [B,M,G,N] of a Mamba layer."""
    if kind == MAMBA:
        x, cache, aux = mamba_layer(p, config, tokens.x, tokens.segment)
        return tokens.replace(x=x), cache, aux.b
    if kind == ATTENTION:
        x, kept, _ = attention_layer(p, config, tokens.x, tokens.segment, position=tokens.position)
        return tokens.replace(x=x), kept, None
    return tokens.replace(x=mlp_layer(p, config, tokens.x)), None, None


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def _text_layer(p: dict, x: jax.Array, cache: Any, *, config: ModelConfig, kind: str) -> jax.Array:
    """One layer over the questions x [B*Q,T,D], apart from one another, after what `cache` holds of their B videos."""
    segment = jnp.ones(x.shape[:2], jnp.int32)
    if kind == MAMBA:
        return mamba_layer(p, config, x, segment, cache)[0]
    return attention_shared(p, config, x, segment, cache)[0] if kind == ATTENTION else mlp_layer(p, config, x)


@functools.partial(jax.jit, static_argnames="capacity")
def _without(tokens: Tokens, doomed: jax.Array, capacity: int) -> Tokens:
    keep = jnp.full((len(doomed), 1), capacity, jnp.int32)
    return compact(tokens, jnp.where(doomed, -1.0, 1.0), keep, capacity)


def _read(model: Model, bank: Bank, sample: dict, chosen: np.ndarray, layers: Sequence[int]) -> dict[int | None, dict]:
    """For every drop of the chosen tokens, what can be read: text rows [B*Q,2D], and of every Mamba layer the state [B,H,P,N] and
    what it answers [B*Q,H*P] to the chosen tokens' keys there.

    Layer by layer, so that a drop costs the layers after it only, and 6 small programs do for all drops.
    """
    config = model.config
    parts = [layer_params(model.params["decoder"], config, layer) for layer in range(len(config.pattern))]
    words = jnp.take(model.params["embed"], sample["rows"], axis=0)

    def walk(tokens: Tokens, start: int) -> tuple[list[Tokens], list, list]:
        rows, caches, keys = [], [], []
        for p, kind in zip(parts[start:], config.pattern[start:], strict=True):
            tokens, cache, b = _video_layer(p, tokens, config=config, kind=kind)
            rows.append(tokens)
            caches.append(cache)
            keys.append(b)
        return rows, caches, keys

    whole = video_tokens(model.params, bank.tokens, sample["cells"])
    doomed = np.zeros(whole.visual.shape, bool)
    doomed[np.arange(len(chosen))[:, None], chosen] = True
    rows, dense, keys = walk(whole, 0)
    own = {j: np.asarray(b)[np.arange(len(chosen))[:, None], chosen] for j, b in enumerate(keys) if b is not None}
    capacity = whole.length - TARGETS

    def reading(caches: list) -> dict:
        x = words
        for p, kind, cache in zip(parts, config.pattern, caches, strict=True):
            x = _text_layer(p, x, cache, config=config, kind=kind)
        states = {j: np.asarray(caches[j].ssm) for j in own}
        text = np.concatenate([np.asarray(x[:, -1]), np.asarray(x.mean(1))], axis=-1)
        return {"text": text, "states": states, "answers": {j: _retrieve(states[j], own[j]) for j in own}}

    out: dict[int | None, dict] = {NEVER_DROPPED: reading(dense)}
    out[NEVER_SHOWN] = reading(walk(_without(whole, doomed, capacity), 0)[1])
    for layer in layers:
        later = walk(_without(rows[layer], doomed, capacity), layer + 1)[1]
        out[layer] = reading(dense[: layer + 1] + later)
    return out


def _retrieve(state: np.ndarray, b: np.ndarray) -> np.ndarray:
    """State [B,H,P,N] asked with keys b [B,Q,G,N] -> [B*Q,H*P], every head scaled to unit length (decay with age is no content)."""
    heads, groups = state.shape[1], b.shape[2]
    per = np.repeat(b, heads // groups, axis=2)
    found = np.einsum("bhpn,bqhn->bqhp", state, per)
    found /= np.linalg.norm(found, axis=-1, keepdims=True) + 1e-12
    return found.reshape(-1, heads * found.shape[-1])


def _narrow(x: np.ndarray, width: int, seed: int) -> np.ndarray:
    """x [n,d] in at most `width` random directions."""
    if x.shape[1] <= width:
        return x
    x = (x - x.mean(0)) / (x.std(0) + 1e-9)
    directions = np.random.default_rng([seed, 47]).standard_normal(
        (x.shape[1], width), x.dtype
    )  # the same for every drop
    return x @ directions / np.sqrt(width)


def _shown(row: Row) -> Row:
    out: Row = {
        "read from": row["read from"],
        "dropped": f"after {row['after']} ({row['kind']})" if row["after"] is not None else row["kind"],
    }
    for name in ("features R2", "class", "colour"):
        interval = row[f"{name} ci95"]
        out[name] = f"{row[name]:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")
    for name in ("retained features R2", "retained class"):
        out[name] = row.get(name)
    return out


def picture(results: Sequence[Row]) -> Any:
    """Class accuracy and R2 by the layer of the drop; the ends of the scale as lines."""
    fig, panels = figure(2, len(results))
    for line, result in zip(panels, results, strict=True):
        for panel, name in zip(line, ("features R2", "class"), strict=True):
            for i, reader in enumerate(READERS):
                own = [r for r in result["rows"] if r["read from"] == reader]
                dropped = [r for r in own if r["after"] is not None]
                if not dropped:
                    continue
                y = [r[name] for r in dropped]
                ends = [r[f"{name} ci95"] for r in dropped]
                errors = [
                    [max(0.0, v - e[0]) for v, e in zip(y, ends, strict=True)],
                    [max(0.0, e[1] - v) for v, e in zip(y, ends, strict=True)],
                ]
                panel.errorbar(
                    [r["after"] for r in dropped],
                    y,
                    errors,
                    color=COLOURS[i],
                    label=reader,
                    marker=".",
                    capsize=2,
                    linewidth=1,
                )
                for r in own:
                    if r["kind"] in ("never shown", "never dropped"):
                        panel.axhline(
                            r[name],
                            color=COLOURS[i],
                            linewidth=0.7,
                            linestyle=":" if r["kind"] == "never shown" else "--",
                        )
            panel.set(title=f"{short(result['model'])}: {name}", xlabel="dropped after layer")
            panel.legend(
                fontsize=7, frameon=False, title="dotted: never shown, dashed: never dropped", title_fontsize=6
            )
    return fig
