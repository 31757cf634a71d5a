"""Real processes on one machine, joined through `jax.distributed`."""

import os
import socket
import subprocess
import sys

from hybridvlm import distributed


def start(args: list[str], address: str, index: int, count: int = 2, devices: int = 4) -> subprocess.Popen:
    """One process of `count`, with CPU devices of its own."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        distributed.ADDRESS: address,
        distributed.COUNT: str(count),
        distributed.INDEX: str(index),
    }
    return subprocess.Popen(
        [sys.executable, *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_both(args: list[list[str]], devices: int = 4) -> list[subprocess.Popen]:
    """Two processes of one run."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    return [start(own, address, index, devices=devices) for index, own in enumerate(args)]


def run_both(args: list[list[str]], timeout: float = 240, devices: int = 4) -> list[tuple[int, str]]:
    """(exit code, output) of two processes; both are killed when one does not end."""
    processes = start_both(args, devices)
    try:
        return [(p.returncode, out) for p in processes for out in [p.communicate(timeout=timeout)[0]]]
    finally:
        for process in processes:
            process.kill()
