"""Shared by all tests: where the goldens lie, and numerics that do not depend on the machine's settings."""

import importlib.metadata
import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The interpreters of Pallas kernels wait in one thread for what another computes: with a pool of two they can wait for ever.
os.environ.setdefault("NPROC", "8")

# Most of the suite's time is compilation, and most programs run once: LLVM's optimizations cost more than they save.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# XLA's older emitters of fused loops take less than half the time to compile. JAX 0.11 has them no more, and XLA ends a process that
# sets a flag it does not know.
if (0, 8) <= tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

import jax
import numpy as np
import pytest

GOLDENS = pathlib.Path(__file__).parent / "goldens"

jax.config.update("jax_default_matmul_precision", "highest")


def pytest_runtest_setup(item):
    """A test marked aot("tpu") or aot("gpu") takes that compiler, and is skipped by its name where it is not installed."""
    for marker in item.iter_markers("aot"):
        from hybridvlm import aot

        if (reason := aot.missing(*marker.args)) is not None:
            pytest.skip(reason)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a class that lists `quick` cases, the other parametrized ones are slow: every interpreted kernel takes seconds."""
    for item in items:
        quick = getattr(item.cls, "quick", None)
        if quick is not None and hasattr(item, "callspec") and item.name not in quick:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def memory_maps_to_spare():
    """A compiled program holds some 15 memory maps, Linux gives a process 65530, and XLA crashes where there are none left."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def golden():
    """golden(name) -> (config.json or None, io.npz as a dict) of a reference under tests/goldens."""

    def read(name: str):
        folder = GOLDENS / name
        config = folder / "config.json"
        with np.load(folder / "io.npz") as io:
            return (json.loads(config.read_text()) if config.is_file() else None), dict(io)

    return read


@pytest.fixture(scope="session")
def golden_path():
    """Folder of all goldens."""
    return GOLDENS
