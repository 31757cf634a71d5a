"""Models on meshes: what they answer, keep and draw is what they do on one device."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.mesh_worker import CASES, HYBRID, random_model
from jax.experimental.layout import Format, Layout

import hybridvlm as hv
from hybridvlm.inference.placement import check_mesh
from hybridvlm.inference.sampling import Sampling, sample_token
from hybridvlm.parallel.mesh import full_mesh, mesh_sizes
from hybridvlm.parallel.vocab import keep_likeliest
from hybridvlm.sharding import row_major

WORKER = pathlib.Path(__file__).parents[1] / "helpers" / "mesh_worker.py"
FAST, *SLOW = CASES


def check_on_eight_devices(*names):
    root = str(WORKER.parents[2])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, str(WORKER), *names]
    ran = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    cases = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [case["case"] for case in cases] == list(names)
    for case in cases:
        assert case["logits"] <= 1e-5, case
        assert case["extended"] <= 1e-5, case
        assert case["kept"] and case["tokens"] and case["answers"] and case["step bytes"] is True, case


def test_a_model_on_a_mesh_is_that_of_one_device():
    """Prefill under a plan, decoding, text behind the caches and drawing, over data, sequence and tensor."""
    check_on_eight_devices(FAST)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_models_on_meshes_are_those_of_one_device(name):
    """Dense and at 25%, prompts of odd length, fewer and more rows than devices, more devices than kv heads and SSM groups."""
    check_on_eight_devices(name)


def test_a_mesh_is_written_as_a_list_of_sizes():
    assert mesh_sizes("data=-1, tensor=2") == {"data": -1, "tensor": 2}
    for wrong in ("", "tensor", "tensor=0", "tensor=-2", "model=2", "tensor=2,tensor=4", "tensor=²"):
        with pytest.raises(ValueError, match="one N may be -1"):
            mesh_sizes(wrong)


def test_a_mesh_of_some_axes_has_the_others_of_one_device():
    mesh = full_mesh(jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("tensor", "data")))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert full_mesh(mesh) is mesh


def test_weights_lie_as_programs_read_them():
    """Wherever parameters come from, a loaded or placed model's have their last axis innermost in memory, and answer the same."""
    innermost = lambda a: a.format.layout.major_to_minor[-1]  # noqa: E731
    model = hv.load("tiny")
    columns = jax.tree.map(
        lambda a: jax.device_put(a, Format(Layout(tuple(reversed(range(a.ndim)))), a.sharding)), model.params
    )
    assert innermost(columns["decoder"]["mamba"]["in_proj"]) == 0
    turned = dataclasses.replace(model, params=columns).to_mesh(hv.make_mesh(devices=jax.devices()[:1]))
    for before, after in zip(jax.tree.leaves(model.params), jax.tree.leaves(turned.params), strict=True):
        assert after.ndim == 0 or innermost(after) == after.ndim - 1
        np.testing.assert_array_equal(before, after)
    given = columns["decoder"]["mamba"]["in_proj"]
    assert row_major(given) is not given and not given.is_deleted()
    row_major(given, consume=True)
    assert given.is_deleted()
    lying = model.params["decoder"]["mamba"]["in_proj"]
    assert row_major(lying, consume=True) is lying and not lying.is_deleted()


def test_axes_that_cannot_cut_a_model_are_named():
    family = types.SimpleNamespace(NAME="new", MESH_AXES=("data", "tensor"))
    with pytest.raises(ValueError, match=r"'new' run over data, tensor, got sequence=4"):
        check_mesh(family, HYBRID, jax.sharding.AbstractMesh((4,), ("sequence",)))
    with pytest.raises(ValueError, match="tensor=3 must divide kv_heads 2, or be a multiple of it"):
        random_model(HYBRID).to_mesh(jax.sharding.AbstractMesh((3,), ("tensor",)))


def test_a_model_on_one_device_of_a_mesh_is_saved_as_it_was(tmp_path):
    model = random_model(HYBRID)
    mesh = hv.make_mesh(devices=jax.devices()[:1])
    model.to_mesh(mesh).save(tmp_path / "saved")
    again = hv.load(tmp_path / "saved", mesh=mesh)
    assert again.mesh == mesh and "mesh of one device" in repr(again)
    jax.tree.map(np.testing.assert_array_equal, again.whole_params(), model.params)


def test_the_likeliest_tokens_are_those_of_a_sorted_row():
    """Equal logits too, of which the first stay; and those that are not finite."""
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(size=(6, 40)), 1).astype(np.float32)
    logits[1, 3], logits[2] = -np.inf, 0.0
    keys = jax.random.split(jax.random.key(0), 6)
    for top_p in (0.05, 0.93):
        order = np.argsort(-logits, axis=-1, kind="stable")
        share = np.exp(logits.astype(np.float64))
        share = np.take_along_axis(share / share.sum(-1, keepdims=True), order, axis=-1)
        drop = np.zeros(logits.shape, bool)
        np.put_along_axis(drop, order, np.cumsum(share, axis=-1) - share >= top_p, axis=-1)
        want = jax.vmap(jax.random.categorical)(keys, jnp.where(drop, -jnp.inf, logits))
        got = sample_token(HYBRID, jnp.asarray(logits), keys, Sampling(1.0, top_p))
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(
            np.isneginf(keep_likeliest(HYBRID, jnp.asarray(logits), top_p)), drop | np.isneginf(logits)
        )
