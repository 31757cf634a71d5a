"""Cutting a model over devices: the rules, the layout of packed parameters, and training against that of one device."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.sharding_worker import IN_SUITE, TRAIN
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from hybridvlm import sharding
from hybridvlm.config import ModelConfig, ScoreOptions
from hybridvlm.config_files import load_model_config
from hybridvlm.models import nemotron_vl
from hybridvlm.nn.decoder import Decoder
from hybridvlm.ops.tokens import Tokens
from hybridvlm.parallel.scores import reduce_scores
from hybridvlm.parallel.sequence import shard_length
from hybridvlm.reduction.methods import get_method
from hybridvlm.sharding import ShardingRules, local_config, make_mesh, permute_for_tp, unpermute_for_tp

WORKER = pathlib.Path(__file__).parents[1] / "helpers" / "sharding_worker.py"
SMALL = ModelConfig(
    pattern="M*-",
    width=8,
    vocab_size=16,
    mamba_heads=8,
    mamba_head_dim=2,
    ssm_groups=2,
    ssm_state=3,
    attention_heads=6,
    kv_heads=2,
    head_dim=4,
    mlp_width=16,
)
EXPERTS = dataclasses.replace(SMALL, pattern="ME", experts=4, experts_per_token=2, expert_width=12, shared_width=16)


@pytest.fixture(scope="module")
def whole_12b():
    config = load_model_config("nemotron_nano_12b_v2_vl")
    return config, jax.eval_shape(lambda: nemotron_vl.init(config, jax.random.key(0)))


def on_eight_devices(*arguments):
    """The cases that the worker prints."""
    root = str(WORKER.parents[2])
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # what compiles, runs once
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    command = [sys.executable, str(WORKER), *arguments]
    ran = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize(
    "names",
    [list(TRAIN)[:IN_SUITE], pytest.param(list(TRAIN)[IN_SUITE:], marks=pytest.mark.slow)],
    ids=["some", "more"],
)
@pytest.mark.slow
def test_sharded_training_is_that_of_one_device(names):
    """Loss, hidden states, every parameter's gradient and who stays: experts too; rows packed, of odd length, or empty, a segment
    that ends at a border, shards of nothing but padding."""
    cases = on_eight_devices(*names)
    assert [case["case"] for case in cases] == names
    for case in cases:
        assert case["loss"] <= 1e-5, case
        assert case["error"] <= 1e-5, case
        assert case["gradient"] <= 1e-4, case
        assert case["same kept"], case


def test_copies_of_columns_share_a_gradient():
    rng = np.random.default_rng(0)
    decoder = {
        "mamba": {"in_proj": rng.normal(size=(1, 2, SMALL.in_proj_width))},
        "attention": {"k_proj": rng.normal(size=(1, 2, SMALL.kv_heads * SMALL.head_dim))},
        "norm_f": rng.normal(size=3),
    }
    params = {"decoder": decoder}
    laid = permute_for_tp(params, SMALL, 4)
    assert laid["decoder"]["mamba"]["in_proj"].shape[-1] > SMALL.in_proj_width
    jax.tree.map(np.testing.assert_array_equal, unpermute_for_tp(laid, SMALL, 4), params)
    whole, back = jax.vjp(lambda p: permute_for_tp(p, SMALL, 4), params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        unpermute_for_tp(whole, SMALL, 4, join="sum"),
        *back(whole),
    )
    with pytest.raises(ValueError, match="join must be 'first' or 'sum'"):
        unpermute_for_tp(laid, SMALL, 4, join="mean")


@pytest.mark.parametrize("devices", [2, 4])
def test_every_device_gets_its_own_part_of_each_packed_piece(devices):
    c, local = SMALL, local_config(SMALL, devices)
    params = {"decoder": {kind: {} for kind in ("mamba", "attention", "mlp")}}
    params["decoder"]["mamba"]["in_proj"] = np.arange(c.in_proj_width)[None, None]
    params["decoder"]["mamba"]["conv_bias"] = np.arange(c.conv_width)[None]
    params["decoder"]["attention"]["k_proj"] = np.arange(c.kv_heads * c.head_dim)[None, None]
    laid = permute_for_tp(params, c, devices)["decoder"]
    assert laid["mamba"]["in_proj"].shape[-1] == devices * local.in_proj_width
    groups = c.ssm_groups * c.ssm_state
    start = np.cumsum([0, c.mamba_width, c.mamba_width, groups, groups])
    for device, mine in enumerate(np.split(laid["mamba"]["in_proj"][0, 0], devices)):
        heads = np.arange(local.mamba_heads) + device * local.mamba_heads
        channels = (heads[:, None] * c.mamba_head_dim + np.arange(c.mamba_head_dim)).ravel()
        group = heads[0] // (c.mamba_heads // c.ssm_groups)  # all of a device's heads read the same group here
        state = np.arange(c.ssm_state) + group * c.ssm_state
        pieces = (channels, channels, state, state, heads)
        np.testing.assert_array_equal(mine, np.concatenate([s + piece for s, piece in zip(start, pieces, strict=True)]))
        bias = np.split(laid["mamba"]["conv_bias"][0], devices)[device]
        np.testing.assert_array_equal(
            bias, mine[local.mamba_width : local.mamba_width + local.conv_width] - c.mamba_width
        )
        keys = np.split(laid["attention"]["k_proj"][0, 0], devices)[device]
        np.testing.assert_array_equal(keys, np.arange(4) + 4 * (device * c.kv_heads // devices))


@pytest.mark.parametrize("devices", [1, 4, 8, 16])
def test_the_12b_model_is_cut_without_a_remainder(whole_12b, devices):
    """Every parameter has a rule, and a device holds its share of the decoder, within what groups shared by devices repeat."""
    config, params = whole_12b
    laid = jax.eval_shape(lambda p: permute_for_tp(p, config, devices), params)
    specs = ShardingRules().specs(laid)
    held = {"decoder": 0, "vision": 0}

    def count(path, leaf, spec):
        cut = [
            size // (devices if "tensor" in (axis or ()) else 1)
            for size, axis in zip(leaf.shape, [*spec, *[None] * 9], strict=False)
        ]
        assert all(
            size % (devices if "tensor" in (axis or ()) else 1) == 0
            for size, axis in zip(leaf.shape, spec, strict=False)
        )
        held[path[0].key] = held.get(path[0].key, 0) + int(np.prod(cut))

    jax.tree_util.tree_map_with_path(count, laid, specs)
    whole = sum(leaf.size for leaf in jax.tree.leaves(params["decoder"]))
    assert whole / devices <= held["decoder"] <= whole / devices * 1.06
    assert held["embed"] == config.vocab_size * config.width / devices
    assert held["vision"] == sum(leaf.size for leaf in jax.tree.leaves(params["vision"]))


def test_long_shards_of_a_row_are_whole_tiles():
    config = load_model_config("tiny")
    for length, shards, expected in ((206_020, 2, 103_024), (1024, 2, 512), (1026, 2, 528), (1000, 2, 500), (9, 8, 3)):
        each = shard_length(config, length, shards)
        assert each == expected and each * shards >= length
        assert shard_length(config, each * shards, shards) == each


def test_rules_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="no rule for the parameter 'decoder/mamba/novel'"):
        ShardingRules().spec("decoder/mamba/novel")
    assert ShardingRules().spec("decoder/mamba/out_proj") == P(None, ("tensor", "fsdp", "sequence"), None)
    assert ShardingRules(share=()).spec("decoder/mamba/out_proj") == P(None, "tensor", None)
    mesh = AbstractMesh((4, 6, 2), ("fsdp", "sequence", "tensor"))
    assert ShardingRules().spec("decoder/mamba/in_proj", (3, 8, 10), mesh) == P(None, "fsdp", "tensor")
    assert ShardingRules().spec("decoder/mamba/in_proj", (3, 6, 10), mesh) == P(None, None, "tensor")
    state = optax.adamw(1e-3).init({"decoder": {"mamba": {"in_proj": np.zeros((3, 24, 10))}}})
    specs = jax.tree.leaves(ShardingRules().specs(state, mesh), is_leaf=lambda leaf: isinstance(leaf, P))
    assert specs == [P(), *[P(None, ("fsdp", "sequence"), "tensor")] * 2]
    assert ShardingRules().spec("vision/blocks/qkv") == P()
    assert ShardingRules().spec("embed", (15, 8), mesh) == P(None, None)  # an odd vocabulary stays whole
    with pytest.raises(ValueError, match=r"ShardingRules.share: expected a tuple of axes out of .*, got \('model',\)"):
        ShardingRules(share=("model",))
    with pytest.raises(ValueError, match=r"ShardingRules.heads can only be \('tensor',\)"):
        ShardingRules(heads=())


def test_sizes_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="tensor=3 must divide kv_heads 2"):
        local_config(SMALL, 3)
    with pytest.raises(ValueError, match="not the number of devices"):
        make_mesh(data=3, devices=[1, 2])
    with pytest.raises(ValueError, match="one of them may be -1"):
        make_mesh(data=-1, tensor=-1)
    with pytest.raises(ValueError, match="tensor=8 does not divide expert_width 12"):
        local_config(EXPERTS, 8)
    with pytest.raises(ValueError, match="tensor=3 must divide kv_heads 2"):
        permute_for_tp({"decoder": {}}, SMALL, 3)
    assert make_mesh(data=-1).shape == {"data": jax.device_count(), "fsdp": 1, "sequence": 1, "tensor": 1}


def prefill_shapes(mesh, batch=2, **options):
    """Traced only."""
    config = dataclasses.replace(SMALL, pattern="M")
    place = jnp.zeros((batch, 5), jnp.int32)
    flags = jnp.zeros((batch, 5), bool)
    tokens = Tokens(jnp.zeros((batch, 5, 8)), place, place + 1, flags, flags, place, place)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
    return jax.eval_shape(lambda p: sharding.prefill(p, config, tokens, mesh=mesh, **options), params)


def test_meshes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="data x fsdp = 4 devices do not divide a batch of 2"):
        prefill_shapes(AbstractMesh((2, 2), ("data", "fsdp")))
    with pytest.raises(ValueError, match=r"mesh: expected axes out of .*, got \('model',\)"):
        prefill_shapes(AbstractMesh((2,), ("model",)))
    with pytest.raises(ValueError, match="leaves no caches"):
        prefill_shapes(AbstractMesh((2,), ("sequence",)), caches=True)
    # an axis that the mesh leaves out is one of a single device
    assert prefill_shapes(jax.sharding.Mesh(jax.devices()[:1], ("data",))).tokens.x.shape == (2, 5, 8)


def test_axes_that_take_every_cut_written_out_become_automatic():
    kinds = (AxisType.Explicit, AxisType.Auto)
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "tensor"), axis_types=kinds)
    found = sharding.auto_mesh(mesh)
    assert found == Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * 2) and found != mesh
    assert sharding.auto_mesh(found) is found
    abstract = sharding.auto_mesh(AbstractMesh((2, 2), ("data", "tensor"), axis_types=kinds))
    assert abstract == AbstractMesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    assert prefill_shapes(mesh).tokens.x.shape == (2, 5, 8)
    assert sharding.sharding_of(mesh, "embed", (4, 2)).mesh == found
    assert ShardingRules().shardings(mesh, {"embed": np.zeros((4, 2))})["embed"].mesh == found
    with pytest.raises(TypeError, match=r"mesh: expected a jax.sharding.Mesh, .* got list"):
        sharding.auto_mesh([1, 2])


@pytest.mark.parametrize("name", ["qwen3_vl_8b", "qwen2_vl_7b", "nemotron_3_nano_omni_30b_a3b", "tiny"])
def test_kinds_of_layers_that_a_model_lacks_do_not_count(name):
    """Its sizes for a Mamba-2 layer divide a Qwen model no more than its vocabulary has to come out even."""
    config = load_model_config(name)
    local = local_config(config, 4)
    assert local.attention_heads * local.head_dim * 4 == config.attention_heads * config.head_dim * local.kv_devices
    assert local.expert_width * 4 == config.expert_width
    if config.count("M"):
        assert local.mamba_heads * 4 == config.mamba_heads
    else:
        columns = np.zeros((1, 2, config.kv_heads * config.head_dim))
        laid = permute_for_tp({"decoder": {"attention": {"k_proj": columns}}}, config, 8)["decoder"]["attention"][
            "k_proj"
        ]
        assert laid.shape[-1] == max(8, config.kv_heads) * config.head_dim


def test_scores_that_need_whole_heads_are_refused():
    score = lambda layer, aux, tokens: tokens  # noqa: E731
    with pytest.raises(ValueError, match="cuts the 2 groups"):
        reduce_scores(score, local_config(SMALL, 4), ScoreOptions(dt=True))
    with pytest.raises(ValueError, match="queries may be one of"):
        reduce_scores(score, local_config(SMALL, 2), ScoreOptions(queries="max"))
    # a method with options of its own, and one that looks at no head, go by no plan's
    for method in ("fastv", "random"):
        reduce_scores(score, local_config(SMALL, 4), ScoreOptions(dt=True, heads="max"), get_method(method))
