"""Run by test_sharding.py in a process of its own, on 8 devices of the CPU: training on meshes against that on one device.

`sharding_worker.py NAME...`: one JSON line per case of `TRAIN` (default: all): {"case", "loss" (relative error), "error" (hidden
states), "gradient" (the worst parameter's max|difference| / max|reference|), "same kept"}.
"""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm import sharding
from hybridvlm.config import ModelConfig, Reduction, Schedule, ScoreOptions
from hybridvlm.nn.decoder import Decoder
from hybridvlm.nn.decoder import prefill as prefill_decoder
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction import METHODS, make_plan, score_fn

CONFIG = ModelConfig(
    pattern="M*M*-",
    width=32,
    vocab_size=64,
    mamba_heads=16,
    mamba_head_dim=6,
    ssm_groups=2,
    ssm_state=8,
    attention_heads=6,
    kv_heads=2,
    head_dim=8,
    mlp_width=64,
)


def difference(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(got - want)) / (np.max(np.abs(want)) or 1.0))  # a router's bias has no gradient


# A scan of two M-E, then drops; two prompts packed in a row of odd length, one that leaves half its row (whole shards, empty), a row
# of nothing, and one whose first prompt is text alone
ROWS = dataclasses.replace(
    CONFIG,
    pattern="M-EM-EM*M",
    mamba_heads=8,
    attention_heads=4,
    mlp_width=48,
    chunk_size=4,
    experts=8,
    experts_per_token=3,
    expert_width=12,
    shared_width=16,
    expert_latent=20,
    router_groups=2,
    router_top_groups=1,
    router_scale=2.0,
)
PACKED = (((19, 5), (13, 4)), ((15, 3),), (), ((0, 5), (9, 2)))  # (visual, text) of each segment, per row
LENGTH = 45
# name -> (score, remat, mesh)
TRAIN = {
    "ties sequence=4 tensor=2": ("ties", "layer", {"sequence": 4, "tensor": 2}),
    "str fsdp=2 tensor=4": ("str", "dots", {"fsdp": 2, "tensor": 4}),
    "str data=2 tensor=2 sequence=2": ("str", "layer", {"data": 2, "tensor": 2, "sequence": 2}),
    "str fsdp=2 sequence=4": ("str", "layer", {"fsdp": 2, "sequence": 4}),
    "str sequence=8": ("str", "layer", {"sequence": 8}),
    "str data=2 fsdp=2": ("str", "dots", {"data": 2, "fsdp": 2}),
    "str data=2 tensor=4": ("str", "none", {"data": 2, "tensor": 4}),
    "dense fsdp=2 tensor=4": ("dense", "dots", {"fsdp": 2, "tensor": 4}),
    "dense data=2 sequence=4": ("dense", "none", {"data": 2, "sequence": 4}),
    "saliency data=2 sequence=4": ("saliency", "layer", {"data": 2, "sequence": 4}),
    "zscore sequence=2 tensor=2": ("zscore", "layer", {"sequence": 2, "tensor": 2}),
    "max sequence=2 tensor=4": ("max", "layer", {"sequence": 2, "tensor": 4}),
    "fastv sequence=4 tensor=2": ("fastv", "layer", {"sequence": 4, "tensor": 2}),
    "lookahead sequence=4 tensor=2": ("str-lookahead", "layer", {"sequence": 4, "tensor": 2}),
    "lookahead fsdp=2 tensor=4": ("str-lookahead", "dots", {"fsdp": 2, "tensor": 4}),
    "random sequence=4": ("random", "layer", {"sequence": 4}),
    "across sequence=4": ("across", "layer", {"sequence": 4}),
}
IN_SUITE = 1  # of them; the others are for the slow tests


def packed_tokens(batch: int) -> Tokens:
    """`PACKED`, over and over, as rows of `LENGTH`."""
    rng = np.random.default_rng(1)
    rows = []
    for b in range(batch):
        segment, visual = [], []
        for number, (shown, said) in enumerate(PACKED[b % len(PACKED)], start=1):
            segment += [number] * (shown + said)
            visual += [True] * shown + [False] * said
        pad = LENGTH - len(segment)
        rows.append((segment + [0] * pad, visual + [False] * pad))
    segment, visual = (np.asarray(column) for column in zip(*rows, strict=True))
    place = np.tile(np.arange(LENGTH, dtype=np.int32), (batch, 1))
    x = rng.normal(size=(batch, LENGTH, ROWS.width)) * (segment > 0)[..., None]
    query = (segment > 0) & ~visual
    frame = np.where(visual, 0, -1)
    fields = (x.astype(np.float32), place, segment.astype(np.int32), visual, query, place, frame.astype(np.int32))
    return Tokens(*(jnp.asarray(field) for field in fields))


def scored(score: str):
    """The options of a prefill that ranks by `score`."""
    if score == "dense":
        return {}
    largest = ScoreOptions(groups="max", heads="max", queries="max")
    options = {"zscore": ScoreOptions(norm="zscore", decay=True), "max": largest, "fastv": largest}
    reduction = Reduction(
        score if score in METHODS else "str",
        0.95 if score == "fastv" else 1.0,
        schedule=Schedule("list", values=(*[1] * 7, 0.6, 0.3)),
        score=options.get(score, ScoreOptions()),
    )
    plan = make_plan(reduction, ROWS, visual_tokens=32, text_tokens=LENGTH - 32, frames=1)
    assert {ROWS.pattern[layer] for layer in plan.drops} == ({"*"} if score == "fastv" else {"M", "*"}), plan.drops
    own = score_fn(plan, segments=2)

    def ties(layer, aux, tokens):
        return own(layer, aux, tokens) if ROWS.pattern[layer] == "*" else (tokens.index % 3).astype(jnp.float32)

    def across(layer, aux, tokens):
        """Looks at other tokens of the row, as none of the library's own does after attention."""
        return jnp.flip(jnp.cumsum(jnp.flip(tokens.index, 1), axis=1), 1) % 7 + 0.1 * jnp.sin(tokens.x[..., 0])

    ties.__module__ = own.__module__  # the library's own, as far as attention goes
    rank = {"ties": ties, "across": across}.get(score, own)
    return {"plan": plan, "score_fn": rank, "collect": plan.drops[:1], "query_capacity": LENGTH - 32}


def train(names: list[str]) -> None:
    rng = np.random.default_rng(2)
    tokens = packed_tokens(4)
    params = jax.jit(Decoder(ROWS).init)(jax.random.key(0), tokens)["params"]
    noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(noise), a.shape), params)
    target = jnp.asarray(rng.normal(size=(4, LENGTH + 1, ROWS.width)), jnp.float32)
    references = {}

    def program(run):
        def loss(params):
            out = run(params)
            wanted = jnp.take_along_axis(target, out.tokens.index[..., None] % (LENGTH + 1), axis=1)
            error = jnp.square(out.tokens.x - wanted) * (out.tokens.segment > 0)[..., None]
            shown = {layer: jnp.where(tokens.visual, score, 0.0) for layer, score in out.scores.items()}
            return jnp.sum(error) + sum(jnp.sum(jnp.sin(score)) for score in shown.values()), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    for name in names or TRAIN:
        score, remat, sizes = TRAIN[name]
        options = scored(score) | {"segments": 2, "caches": False}
        if score not in references:
            references[score] = program(lambda p, o=options: prefill_decoder(p, ROWS, tokens, **o))(params)
        (want_loss, want), want_gradient = references[score]
        mesh = sharding.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
        devices = sharding.tensor_size(mesh)

        def run(params, mesh=mesh, devices=devices, options=options, remat=remat):
            laid = sharding.permute_for_tp({"decoder": params}, ROWS, devices)
            laid = jax.lax.with_sharding_constraint(laid, sharding.DEFAULT_RULES.shardings(mesh, laid))["decoder"]
            return sharding.prefill(laid, ROWS, tokens, mesh=mesh, remat=remat, **options)

        (loss, got), gradient = program(run)(params)
        real = np.asarray(want.tokens.segment > 0)[..., None]
        errors = jax.tree.map(difference, gradient, want_gradient)
        same = jax.tree.map(
            lambda a, b: bool(jnp.array_equal(a, b)), (got.survivors, got.kept), (want.survivors, want.kept)
        )
        worst = max(jax.tree_util.tree_leaves_with_path(errors), key=lambda item: item[1])
        case = {
            "case": name,
            "loss": abs(float(loss) / float(want_loss) - 1),
            "error": difference(got.tokens.x * real, want.tokens.x * real),
            "gradient": worst[1],
            "of": jax.tree_util.keystr(worst[0]),
            "same kept": all(jax.tree.leaves(same)),
        }
        print(json.dumps(case), flush=True)


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    assert jax.device_count() == 8, jax.devices()
    train(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
