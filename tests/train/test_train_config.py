"""What a training config takes and refuses, which parameters decay, and how LoRA is merged. Nothing here runs a model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.train_micro import settings

from hybridvlm.checkpoints.folder import expected_shapes
from hybridvlm.config_files import load_model_config
from hybridvlm.models.family import get_family
from hybridvlm.train import lora, optimizer
from hybridvlm.train.config import Lora, Optimizer, TrainConfig
from hybridvlm.train.config_files import read
from hybridvlm.train.schedule import reduction_at, reductions, teaches


def written(path, data) -> str:
    path.write_text(json.dumps(data))
    return path


def test_read_json_yaml_python_and_changes(tmp_path):
    data = {"steps": 7, "optimizer": {"rate": 3e-4}, "reduction": {"reduction": {"method": "str", "budget": 0.5}}}
    a = read(written(tmp_path / "a.json", data), ["reduction.reduction.budget=0.125", "data.batch=3", "output=x/y"])
    assert a.steps == 7 and a.optimizer.rate == 3e-4 and a.reduction.reduction.budget == 0.125
    assert a.data.batch == 3 and a.output == "x/y"
    (tmp_path / "b.yaml").write_text("steps: 7\noptimizer:\n  rate: 3e-4\n")
    (tmp_path / "c.py").write_text(
        "from hybridvlm.train.config import *\nconfig = TrainConfig(steps=7, optimizer=Optimizer(rate=3e-4))\n"
    )
    assert read(tmp_path / "b.yaml") == read(tmp_path / "c.py") == TrainConfig(steps=7, optimizer=Optimizer(rate=3e-4))
    # a part that the file does not have starts from the default of the whole, not from that of its class
    assert (
        read(written(tmp_path / "d.json", {}), ["reduction.reduction.budget=0.5"]).reduction.reduction.method == "str"
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"optimizer": {"rat": 1}}, "did you mean 'rate'"),
        ({"reduction": {"reduction": {"metod": "str"}}}, "did you mean 'method'"),
        ({"steps": "many"}, "TrainConfig.steps must be of type int"),
        ({"optimizer": {"rate": "1e-4x"}}, "Optimizer.rate"),
        ({"reduction": {"mode": "random"}}, "ReductionMode.budgets"),
        ({"data": {"batch": 3}, "optimizer": {"accumulate": 2}}, "not a multiple"),
        ({"data": {"source": "jsonl"}}, "Data.path"),
        ({"optimizer": {"frozen": ["("]}}, "no regular expression"),
        ({"data": {"features": "cached"}, "optimizer": {"frozen": ["^vision/"]}}, "does not cover projector"),
        ({"distill": {"scores": 1.0}}, "Distill.teach"),
        ({"optimizer": None}, "TrainConfig.optimizer must be given by its fields"),
        ({"reduction": {"reduction": "str"}}, "ReductionMode.reduction must be given by its fields"),
        ({"optimizer": {"frozen": [3]}}, "Optimizer.frozen must be a list of str"),
        ({"optimizer": {"rate": float("nan")}}, "Optimizer.rate must be a finite number"),
        ({"optimizer": {"b1": 1.5}}, r"Optimizer.b1 must lie in \[0, 1\)"),
        ({"lora": {"rank": 4, "targets": ["in_proj"], "alpha": -1.0}}, "a positive alpha"),
        ({"mesh": {"data": -3}}, "MeshSizes must be 1 or more"),
        ({"data": {"rule": "sometimes"}}, "sometimes"),
        ({"data": {"bad_share": 2.0}}, "Data.bad_share"),
        ({"output": ""}, "TrainConfig.output"),
    ],
)
def test_wrong_configs_say_what_is_wrong(tmp_path, data, says):
    with pytest.raises(ValueError, match=says):
        read(written(tmp_path / "a.json", data))


def test_a_file_that_is_no_config_is_named(tmp_path):
    for name, held in (("a.yaml", b"a: [1"), ("b.json", b"{"), ("c.yaml", b"\xff\xfe\x00x")):
        (tmp_path / name).write_bytes(held)
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read(tmp_path / name)


def test_which_step_runs_under_what():
    curriculum = settings(steps=9, reduction={"mode": "curriculum", "budgets": [1.0, 0.5, 0.25]})
    assert [reduction_at(curriculum, step) for step in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert reductions(curriculum.reduction)[0] is None and reductions(curriculum.reduction)[2].budget == 0.25
    drawn = settings(steps=60, reduction={"mode": "random", "budgets": [0.5, 0.25]})
    chosen = [reduction_at(drawn, step) for step in range(60)]
    assert chosen == [reduction_at(drawn, step) for step in range(60)] and 15 < sum(chosen) < 45
    taught = settings(steps=8, distill={"teach": 2, "every": 2, "scores": 1.0})
    assert [teaches(taught, step) for step in range(8)] == [True, True, False, True, False, True, False, True]
    assert not any(teaches(settings(), step) for step in range(8))


@pytest.mark.parametrize("name", ["tiny", "nemotron_3_nano_omni_30b_a3b", "vamba_qwen2_vl_7b", "qwen3_vl_8b"])
def test_decay_acts_on_products_alone(name):
    config = load_model_config(name)
    kind = get_family("vamba" if "vamba" in name else "qwen_vl" if "qwen" in name else "nemotron_vl")
    weights = ("_proj", "/up", "/down", "fc1", "fc2", "/proj", "/router", "_fc1", "_fc2", "patch_embed", "lm_head")
    for path, shape in expected_shapes(config, kind).items():
        assert optimizer.decays(path) == path.endswith(weights), path
        if optimizer.decays(path):
            assert len(shape) >= 2, path
    assert not optimizer.decays("decoder/mamba/in_proj", ("in_proj",))


def test_decay_mask_reaches_adamw_and_lora_is_decayed_like_its_weight():
    o = Optimizer(rate=1.0, warmup=0, end=1.0, decay=0.1, clip=0.0, eps=1.0)
    train = {
        "decoder/mlp/up_proj": jnp.ones((1, 2, 2)),
        "decoder/mlp/norm": jnp.ones((1, 2)),
        "decoder/mamba/A_log": jnp.ones(2),
    }
    make = optimizer.make(o, 10)
    updates, _ = make.update(jax.tree.map(jnp.zeros_like, train), make.init(train), train)
    np.testing.assert_allclose(updates["decoder/mlp/up_proj"], -0.1, rtol=1e-6)
    assert not np.any(updates["decoder/mlp/norm"]) and not np.any(updates["decoder/mamba/A_log"])


def test_rate_rises_and_falls():
    rate = optimizer.schedule(Optimizer(rate=2.0, warmup=4, start=0.1, end=0.25), 20)
    assert np.isclose(rate(0), 0.2) and np.isclose(rate(4), 2.0) and np.isclose(rate(20), 0.5) and rate(10) > rate(15)


def test_lora_starts_as_nothing_merges_exactly_and_is_saved_apart(tmp_path):
    rng = np.random.default_rng(0)
    flat = {
        "decoder/attention/q_proj": jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32),
        "decoder/attention/norm": jnp.ones((2, 6)),
    }
    adapter = Lora(rank=3, alpha=6.0, targets=("q_proj$",))
    factors = lora.init(adapter, flat, jax.random.key(0))
    assert sorted(factors) == ["decoder/attention/q_proj/lora_a", "decoder/attention/q_proj/lora_b"]
    np.testing.assert_array_equal(
        lora.merge(adapter, flat, factors)["decoder/attention/q_proj"], flat["decoder/attention/q_proj"]
    )
    factors = {name: jnp.asarray(rng.normal(size=a.shape), jnp.float32) for name, a in factors.items()}
    merged = lora.merge(adapter, flat, factors)
    a, b = (np.asarray(factors[f"decoder/attention/q_proj/lora_{part}"], np.float64) for part in "ab")
    want = np.stack([np.asarray(flat["decoder/attention/q_proj"][i], np.float64) + 2.0 * a[i] @ b[i] for i in range(2)])
    np.testing.assert_allclose(merged["decoder/attention/q_proj"], want, rtol=1e-6, atol=1e-6)
    assert merged["decoder/attention/norm"] is flat["decoder/attention/norm"]
    lora.save(tmp_path / "lora", adapter, factors, "micro")
    again, held = lora.load(tmp_path / "lora")
    assert again == adapter
    for name in factors:
        np.testing.assert_array_equal(held[name], factors[name])
    with pytest.raises(ValueError, match="finds no parameter"):
        lora.init(Lora(rank=1, targets=("nothing",)), flat, jax.random.key(0))


def test_small_updates_of_bfloat16_weights_are_not_lost():
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.uniform(1, 1.9, (1, 256, 256)), jnp.bfloat16)  # the last digit is 1/128
    factors = {"q_proj/lora_a": jnp.full((1, 256, 1), 1.0), "q_proj/lora_b": jnp.full((1, 1, 256), 2.0**-10)}
    adapter = Lora(rank=1, alpha=1.0, targets=("q_proj$",))
    merged = lora.merge(adapter, {"q_proj": weight}, factors)["q_proj"]
    np.testing.assert_array_equal(merged, np.asarray(weight, np.float32) + 2.0**-10)  # as it is exported
    assert (merged.astype(jnp.bfloat16) == weight).all()  # an eighth of a digit: a cast loses all of it
    key = jax.random.key(1)
    taken = lora.rounded(merged, jnp.dtype("bfloat16"), key)
    moved = np.asarray(taken, np.float32) - np.asarray(weight, np.float32)
    assert taken.dtype == jnp.bfloat16 and set(np.unique(moved)) == {0.0, 2.0**-7}
    np.testing.assert_allclose(moved.mean(), 2.0**-10, rtol=0.05)  # of 65,536 weights; its deviation is 1%
    np.testing.assert_array_equal(lora.rounded(weight.astype(jnp.float32), jnp.dtype("bfloat16"), key), weight)
    slope = jax.grad(lambda a: lora.rounded(a, jnp.dtype("bfloat16"), key).astype(jnp.float32).sum())(merged)
    np.testing.assert_array_equal(slope, 1.0)


def test_frozen_groups_are_split_off():
    flat = {"vision/a": 1, "projector/b": 2, "decoder/c": 3}
    assert optimizer.split(flat, ("^vision/", "^projector/")) == ({"decoder/c": 3}, {"vision/a": 1, "projector/b": 2})
    with pytest.raises(ValueError, match="finds no parameter"):
        optimizer.split(flat, ("^tower/",))
    with pytest.raises(ValueError, match="nothing to train"):
        optimizer.split(flat, (".",))
    optimizer.check_decay_free(flat, ("^decoder/",))
    with pytest.raises(ValueError, match=r"decay_free: 'router' finds no parameter; there are vision/a, projector/b"):
        optimizer.check_decay_free(flat, ("router",))


def test_logging_to_what_is_installed(tmp_path, monkeypatch):
    import sys
    import types

    from hybridvlm.train import log

    with pytest.raises(ValueError, match="wandb"):
        log.check_installed(settings(logging={"wandb": "project"}).logging)
    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer, __spec__=object()))
    config = settings(tmp_path, logging={"tensorboard": True})
    log.check_installed(config.logging)
    (tmp_path / log.FILE).write_text('{"step": 1, "loss": 5}\n{"step": 2, "loss": 4}\n{"step": 3, "lo')
    run = log.Log(tmp_path, config, 1)
    run.step({"step": 2, "loss": 4.5, "kind": "dense", "retention": [1.0, 0.5]})
    run.close()
    assert written == [("loss", 4.5, 2), ("retention/layer 00", 1.0, 2), ("retention/layer 01", 0.5, 2)]
    lines = [json.loads(line) for line in (tmp_path / log.FILE).read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in lines] == [(1, 5), (2, 4.5)]  # what came after step 1 is written again
