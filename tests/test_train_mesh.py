"""Training on eight virtual devices gives what it gives on one, and a checkpoint of one mesh goes on on another."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

WORKER = pathlib.Path(__file__).with_name("train_mesh_worker.py")


@pytest.mark.slow
def test_meshes_train_as_one_device(tmp_path):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, str(WORKER), str(tmp_path), "one,data,fsdp,tensor,sequence"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads((tmp_path / "told.json").read_text())
    for name, values in told.items():
        assert len(values) == 5
        np.testing.assert_allclose(values, told["one"], rtol=2e-4, atol=1e-5, err_msg=name)
