"""Published checkpoints: their tensors, names and configs."""

from hybridvlm.checkpoints.hf_config import config_from_hf, vision_from_hf
from hybridvlm.checkpoints.names import canonical, params_from_hf
from hybridvlm.checkpoints.tensors import TensorFolder

__all__ = ["TensorFolder", "canonical", "config_from_hf", "params_from_hf", "vision_from_hf"]
