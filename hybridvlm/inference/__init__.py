"""Models in use: one compiled program per bucket, plan and phase, sampling, conversations."""
