"""Up to which depth are visual tokens needed, and do the scores follow the question?

    python -m hybridvlm.tiny.control --model tiny-reduced

Two tables on validation videos. (1) The deletion control: exactly the needed tokens are deleted after each layer, and the
accuracy per question type is read again; a drop says that this layer's successors still needed them. `unrelated` deletes as
many tokens that no question needs. (2) Per layer: Jaccard overlap of the top quarter between two questions on one video (near
1: the score ignores the question), against the overlap of random sets, and how often the needed tokens are in that quarter.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.config import MIXERS, ModelConfig
from hybridvlm.tiny import needle
from hybridvlm.tiny.bank import Bank, draw_videos, make_bank
from hybridvlm.tiny.shared import arrays, forward, layer_scores

FRAMES, QUESTIONS = 64, 16


@dataclasses.dataclass(frozen=True)
class Deletion:
    """A plan that drops `count` tokens of every video after one layer."""

    layer: int
    count: int
    length: int

    @property
    def drops(self) -> tuple[int, ...]:
        return (self.layer,)

    def keep(self, layer: int, count: jax.Array) -> jax.Array:
        return count - self.count

    def row_length(self, layer: int) -> int:
        return self.length - self.count


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
        counted = {name: [] for name in doomed}
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
                counted[name].append(picked >= 0)
            rows += (b * len(q) + chosen).tolist()
        batches.append(
            (arrays(sample), doomed, np.asarray(rows), {k: np.concatenate(v) for k, v in counted.items()}, sample.type)
        )

    table = []
    for layer in (None, *layers):
        for name in ("nothing",) if layer is None else ("hop 1", "hop 2", "unrelated"):
            right, kind = [], []
            for sample, doomed, rows, counted, types in batches:
                mask = doomed["unrelated"] if layer is None else doomed[name]
                got = np.asarray(answers(sample, mask, layer))[rows]
                valid = np.ones(len(rows), bool) if layer is None else counted[name]
                right.append(got[valid])
                kind.append(types[rows][valid])
            right, kind = np.concatenate(right), np.concatenate(kind)
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


def follow_table(
    params: dict, config: ModelConfig, bank: Bank, videos: int, seed: int, share: float = 0.25, part: int = 4
) -> list[dict]:
    """Per mixer layer: overlap of the kept quarter between questions, and recall of the needed tokens in it."""

    @jax.jit
    def kept_sets(sample):
        _, told, out = forward(params, config, bank.tokens, sample, keys=True)
        kept = {}
        for layer, score in layer_scores(config, told, out).items():
            m = score.shape[-1]
            order = jnp.argsort(-score, axis=-1)
            rank = (
                jnp.zeros(score.shape, jnp.int32)
                .at[jnp.arange(score.shape[0])[:, None, None], jnp.arange(score.shape[1])[None, :, None], order]
                .set(jnp.arange(m))
            )
            kept[layer] = rank < round(share * m)
        return kept

    rng = np.random.default_rng([seed, 37])
    sums: dict[int, dict[str, list]] = {}
    for _ in range(-(-videos // part)):
        sample, asked = draw_videos(bank, FRAMES, part, QUESTIONS, needle.TYPES + needle.TWO_HOP, rng)
        for layer, kept in jax.device_get(kept_sets(arrays(sample))).items():
            row = sums.setdefault(layer, {"jaccard": [], "hop 1": [], "hop 2": []})
            for b, q in enumerate(asked):
                first, second = kept[b, :-1], kept[b, 1:]
                row["jaccard"] += ((first & second).sum(-1) / (first | second).sum(-1)).tolist()
                row["hop 1"] += kept[b, np.arange(len(q)), q.hop1].tolist()
                two = np.flatnonzero(q.hop2 >= 0)
                row["hop 2"] += kept[b, two, q.hop2[two]].tolist()
    return [
        {"layer": layer, "kind": config.pattern[layer], "chance": share / (2 - share)}
        | {k: float(np.mean(v)) for k, v in row.items()}
        for layer, row in sorted(sums.items())
    ]


def show(rows: list[dict]) -> str:
    """Rows as a text table."""
    names = list(dict.fromkeys(k for row in rows for k in row))
    cells = [
        [("" if row.get(k) is None else f"{row[k]:.3f}" if isinstance(row[k], float) else str(row[k])) for k in names]
        for row in rows
    ]
    widths = [max(len(n), *(len(c[i]) for c in cells)) for i, n in enumerate(names)]
    lines = ["  ".join(n.rjust(w) for n, w in zip(names, widths, strict=True))]
    return "\n".join(lines + ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells])


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridvlm.tiny.control",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="tiny-reduced", help="name or folder of a checkpoint (default: %(default)s)")
    parser.add_argument("--videos", type=int, default=24, help="validation videos (default: %(default)s)")
    parser.add_argument(
        "--layers",
        help="layers to delete after, such as 0,2,4 (default: every M and * up to the second *, and two more)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path, help="write both tables there as well")
    args = parser.parse_args(argv)
    from hybridvlm.checkpoints.folder import load

    try:
        model = load(args.model)
    except (OSError, ValueError) as error:
        parser.error(f"--model: {error}")
    config = model.config
    if config.pattern.count("*") < 2:
        parser.error(
            f"--model {args.model} has fewer than two attention layers ({config.pattern}); nothing to look up twice"
        )
    mixers = [layer for layer, kind in enumerate(config.pattern) if kind in MIXERS]
    second = [layer for layer in mixers if config.pattern[layer] == "*"][1]
    layers = [layer for layer in mixers if layer <= second] + [layer for layer in mixers if layer > second][:2]
    if args.layers:
        layers = [int(part) for part in args.layers.split(",")]
    bank = make_bank(model.params, config, FRAMES, 1000, args.seed, split="val")
    deletion = deletion_table(model.params, config, bank, tuple(layers), args.videos, args.seed)
    print(f"{args.model}: accuracy when exactly these tokens are deleted after a layer\n{show(deletion)}\n")
    follow = follow_table(model.params, config, bank, args.videos, args.seed)
    print(f"{args.model}: does the score follow the question? (top 25% of each layer's score)\n{show(follow)}")
    if args.json:
        args.json.write_text(json.dumps({"model": args.model, "deletion": deletion, "follow": follow}, indent=1))


if __name__ == "__main__":
    main()
