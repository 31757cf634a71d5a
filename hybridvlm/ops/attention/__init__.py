"""Causal grouped-query attention over segments, and the text-to-visual scores read off it."""

from hybridvlm.ops.attention.api import attention
from hybridvlm.ops.attention.visual import text_to_visual

__all__ = ["attention", "text_to_visual"]
