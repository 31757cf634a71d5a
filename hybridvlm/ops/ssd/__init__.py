"""Mamba-2's state space dual: one public op, several implementations."""

from hybridvlm.ops.ssd.api import ssd, ssd_step

__all__ = ["ssd", "ssd_step"]
