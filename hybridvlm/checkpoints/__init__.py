"""Checkpoints: the library's own folders, and the tensors, names and configs of published ones."""

from hybridvlm.checkpoints.folder import CheckpointError, load, save_folder
from hybridvlm.checkpoints.hf_config import config_from_hf, vision_from_hf
from hybridvlm.checkpoints.names import canonical, params_from_hf
from hybridvlm.checkpoints.tensors import TensorFolder

__all__ = [
    "CheckpointError",
    "TensorFolder",
    "canonical",
    "config_from_hf",
    "load",
    "params_from_hf",
    "save_folder",
    "vision_from_hf",
]
