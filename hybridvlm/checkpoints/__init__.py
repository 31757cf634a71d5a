"""Checkpoints: the library's own folders, and published ones in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hybridvlm.checkpoints.folder import Checkpoint, read_checkpoint, save_folder
from hybridvlm.checkpoints.hf import params_from_tensors, read_params, save_published
from hybridvlm.checkpoints.tensors import TensorFolder
from hybridvlm.config import ModelConfig, VisionConfig
from hybridvlm.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "TensorFolder",
    "params_from_hf",
    "params_from_tensors",
    "read_checkpoint",
    "read_params",
    "save_folder",
    "save_published",
]


def params_from_hf(
    config: ModelConfig | VisionConfig, tensors: Mapping[str, np.ndarray], *, dtype: Any = None
) -> dict[str, Any]:
    """Our parameters (NumPy) from Nemotron tensors under any of their known names; of a VisionConfig, a RADIO tower alone."""
    from hybridvlm.models.nemotron_vl.weights import weight_map

    params = params_from_tensors(weight_map(config), tensors, dtype=dtype)
    return params["vision"] if isinstance(config, VisionConfig) else params
