"""Training on eight virtual devices, in one process or two, gives what one device gives; a checkpoint goes on on another mesh."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

WORKER = pathlib.Path(__file__).parents[1] / "helpers" / "train_mesh_worker.py"


def start(folder: pathlib.Path, names: str, devices: int, kind: str = "micro", **more: str) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} | more
    command = [sys.executable, str(WORKER), str(folder), names, kind]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen) -> None:
    try:
        for process in processes:
            out, _ = process.communicate(timeout=2400)
            assert process.returncode == 0, out[-4000:]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["micro", "vamba"])
def test_meshes_train_as_one_device(tmp_path, kind):
    finish(start(tmp_path, "one,data,fsdp,tensor,sequence", 8, kind))
    told = json.loads((tmp_path / "told-one.json").read_text())
    assert len(told) == 5
    for name, values in told.items():
        assert len(values) == 5
        np.testing.assert_allclose(values, told["one"], rtol=2e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    finish(start(tmp_path / "a", "one", 1))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    # each process draws its own rows; together they are those of one
    finish(*(start(tmp_path / "b", "data", 4, JAX_PROCESS_ID=str(i), **own) for i in range(2)))
    one, two = (json.loads((tmp_path / at).read_text()) for at in ("a/told-one.json", "b/told-data.json"))
    np.testing.assert_allclose(two["data"], one["one"], rtol=2e-4, atol=1e-5)
