"""Numerics of hybrid models as plain functions: `from hybridvlm import ops`, then `ops.attention(...)`, `ops.ssd(...)`."""

from hybridvlm.ops.attention import attention, text_to_visual
from hybridvlm.ops.compact import compact
from hybridvlm.ops.conv1d import causal_conv1d
from hybridvlm.ops.fold import Selection, fold
from hybridvlm.ops.ssd import ssd
from hybridvlm.ops.tokens import Tokens

__all__ = ["Selection", "Tokens", "attention", "causal_conv1d", "compact", "fold", "ssd", "text_to_visual"]
