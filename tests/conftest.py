"""Shared by all tests: where the goldens lie, and numerics that do not depend on the machine's settings."""

import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The interpreters of Pallas kernels wait in one thread for what another computes: with a pool of two they can wait for ever.
os.environ.setdefault("NPROC", "8")

import jax
import numpy as np
import pytest

GOLDENS = pathlib.Path(__file__).parent / "goldens"

jax.config.update("jax_default_matmul_precision", "highest")


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
