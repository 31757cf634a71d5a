"""The package itself: what importing it costs, what it offers, where it finds its configurations."""

import os
import subprocess
import sys

import pytest

import hybridvlm as hv
from hybridvlm.config_files import load_model_config


def test_import_is_light():
    """A fresh interpreter: under two seconds (the start of Python included), no JAX and no device."""
    code = (
        "import sys, time; t = time.perf_counter(); import hybridvlm; s = time.perf_counter() - t; "
        "print(s); assert s < 2, s; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_using_names_starts_no_device():
    code = (
        "import hybridvlm as hv; hv.Buckets(); hv.ops.ssd; hv.VisionConfig(); hv.Tokens; "
        "from jax._src import xla_bridge; assert not xla_bridge._backends, xla_bridge._backends"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_public_names():
    for name in hv.__all__:
        assert getattr(hv, name) is not None
        assert name in dir(hv)
    for op in ("ssd", "attention", "text_to_visual", "compact", "causal_conv1d"):
        assert callable(getattr(hv.ops, op))
    with pytest.raises(AttributeError, match="no public name 'Buckts'"):
        _ = hv.Buckts


def test_configs_are_found_by_name():
    for name in ("nemotron_nano_12b_v2_vl", "bench_100m", "vs_transformers_56m"):
        assert load_model_config(name).name == name
    with pytest.raises(FileNotFoundError, match="bench_100m"):
        load_model_config("bench_1m")
    assert "bench_100m" in hv.config_names()


def test_training_is_at_hand_from_python():
    from hybridvlm.train import config, loop

    assert hv.train.train is loop.train and hv.train.TrainConfig is config.TrainConfig
    for name in hv.train.__all__:
        assert callable(getattr(hv.train, name)) and getattr(hv.train, name).__doc__
    with pytest.raises(AttributeError, match="no public name 'fit'"):
        _ = hv.train.fit
